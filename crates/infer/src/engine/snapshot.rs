use anser_model::State;
use anser_ops::Var;
use anser_ops::attention::Past;
use anser_tensor::Context;

/// A sequence's state and prediction, in host memory but for what attention keeps, which is shared with whoever goes on from it.
pub(super) struct Snapshot {
    /// The state's matrices one after the other ([`State::vars`]).
    values: Vec<f32>,
    /// Of each attention block.
    pasts: Vec<Past>,
    /// For the next token; none in the middle of a prompt.
    pub logits: Vec<f32>,
}

impl Snapshot {
    /// Of a state of one slot; waits for the device.
    pub fn new(state: &State, logits: Vec<f32>) -> Snapshot {
        let mut values = Vec::with_capacity(state.vars().map(|v| v.buf().len()).sum());
        state.vars().for_each(|v| values.extend_from_slice(&v.to_vec()));
        Snapshot { values, pasts: state.attention.iter().map(|a| a.pasts[0].clone()).collect(), logits }
    }

    /// The state, made like `empty`.
    pub fn state(&self, ctx: &Context, empty: &State) -> State {
        let mut state = empty.clone();
        let mut rest = &self.values[..];
        for (_, v) in state.named_mut() {
            let mut buf = ctx.alloc_as(v.buf().dtype(), v.buf().len());
            let now;
            (now, rest) = rest.split_at(buf.len());
            buf.copy_from(now);
            *v = Var::constant(v.rows(), v.cols(), buf);
        }
        state.attention.iter_mut().zip(&self.pasts).for_each(|(a, past)| a.pasts = vec![past.clone()]);
        state
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        (self.values.len() + self.logits.len()) * 4 + self.pasts.iter().map(Past::bytes).sum::<usize>()
    }
}
