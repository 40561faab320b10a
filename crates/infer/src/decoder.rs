use crate::Error;
use crate::session::{piece, read};
use anser_model::{AttentionState, DecodeStep, LayerState, Model, Part, State};
use anser_ops::Var;
use anser_ops::attention::Past;
use anser_ops::choose::{Draw, choose};
use anser_tensor::cuda::{Cuda, Graph, Pinned};
use anser_tensor::{Buf, Context, DType, DisjointMut};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

/// Values that a thread copies at a time.
const COPIED: usize = 1 << 17;

/// Many sequences decoded together on a GPU: every slot holds one, whose state is advanced in place.
///
/// A step launches work that was recorded once for its number of sequences; addresses are fixed for the life of the decoder. What attention keeps is a
/// [`Past`] of every slot as elsewhere, and is shared with whoever has a copy of the state; where it is stands in memory that the recorded work reads.
pub struct Decoder<'m> {
    // Recorded work first: it must go before the buffers that it uses.
    graphs: HashMap<usize, Graph>,
    /// The numbers of sequences of which a step has run, which loads its kernels.
    warm: HashSet<usize>,
    step: DecodeStep<'m>,
    state: State,
    input: Pinned,
    output: Pinned,
    /// Draws as the kernel has them, and what they choose.
    draws: Buf,
    chosen: Buf,
    /// A state in f32 on its way to the host.
    leaving: Option<(Buf, Pinned)>,
    /// The slots of the last step.
    last: Vec<usize>,
    /// Steps of so few sequences that rows under zeros are counted.
    few_steps: usize,
    cuda: Arc<Cuda>,
    ctx: Context,
    model: &'m Model,
}

impl<'m> Decoder<'m> {
    /// Slots at most.
    pub const MOST_SLOTS: usize = DecodeStep::MOST;

    /// A decoder with `slots` empty sequences, or `None` if [`DecodeStep::new`] gives none.
    ///
    /// # Errors
    /// When there are no slots or more than [`Decoder::MOST_SLOTS`], or memory runs out.
    pub fn new(ctx: &Context, model: &'m Model, slots: usize) -> Result<Option<Decoder<'m>>, Error> {
        Self::with_states(ctx, model, slots, DType::F32)
    }

    /// The same with WKV states kept as `kept` between steps, f32 or f16: with many sequences they are most of what a step moves. Arithmetic is f32
    /// in both; rounding to f16 at every step is as rough as the rest of a step in f16.
    ///
    /// # Errors
    /// As [`Decoder::new`], and when `kept` is neither.
    pub fn with_states(
        ctx: &Context, model: &'m Model, slots: usize, kept: DType,
    ) -> Result<Option<Decoder<'m>>, Error> {
        if kept == DType::BF16 {
            return Err(Error::State("states are kept in f32 or f16".into()));
        }
        if slots == 0 || slots > Self::MOST_SLOTS {
            return Err(Error::State(format!("{slots} slots: there must be 1 to {}", Self::MOST_SLOTS)));
        }
        let (Some(cuda), Some(step)) = (ctx.cuda_shared().cloned(), DecodeStep::new(ctx, model, slots)) else {
            return Ok(None);
        };
        let state = State::zeros_as(ctx, model.config(), slots, kept);
        let input = Pinned::new(&cuda, Draw::WORDS * step.most())?;
        let output = Pinned::new(&cuda, step.most() * model.config().vocab_size)?;
        let (draws, chosen) = (ctx.alloc_f32(Draw::WORDS * step.most()), ctx.alloc_f32(step.most()));
        ctx.check()?;
        let (graphs, warm) = (HashMap::new(), HashSet::new());
        Ok(Some(Decoder {
            graphs,
            warm,
            step,
            state,
            input,
            output,
            draws,
            chosen,
            leaving: None,
            last: Vec::new(),
            few_steps: 0,
            cuda,
            ctx: ctx.clone(),
            model,
        }))
    }

    /// From now on each sequence of a step gives the same to the bit as alone, whatever the others are, in steps of up to so many.
    pub fn set_apart(&mut self) -> usize {
        self.step.set_apart()
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.state.slots()
    }

    /// Reads one token for each of some sequences, given as (slot, token): their logits [n, V], in that order.
    ///
    /// # Errors
    /// As [`Decoder::feed`].
    pub fn step(&mut self, sequences: &[(usize, u32)]) -> Result<&[f32], Error> {
        self.feed(sequences)?;
        self.logits(0..sequences.len())
    }

    /// The same, leaving the logits on the device until some are asked for.
    ///
    /// # Errors
    /// When a token or slot doesn't exist or a slot is named twice; nothing has happened then.
    pub fn feed(&mut self, sequences: &[(usize, u32)]) -> Result<(), Error> {
        self.check_inputs(sequences)?;
        self.last = sequences.iter().map(|s| s.0).collect();
        if !sequences.is_empty() {
            self.begin(sequences);
            self.run();
        }
        Ok(())
    }

    /// Logits of some of the sequences of the last step, by their places in it.
    ///
    /// # Errors
    /// When there were not as many, or the device has failed.
    pub fn logits(&mut self, of: Range<usize>) -> Result<&[f32], Error> {
        if of.start > of.end || of.end > self.last.len() {
            return Err(Error::State(format!("logits {of:?} of a step of {} sequences", self.last.len())));
        }
        let (vocab, n) = (self.model.config().vocab_size, of.len());
        self.output.receive(self.step.logits().offset(of.start * vocab, DType::F32), n * vocab);
        self.cuda.synchronize();
        self.ctx.check()?;
        Ok(&self.output.floats()[..n * vocab])
    }

    /// Tokens chosen on the device, of sequences of the last step: rows are their places in it. The logits stay there. `None` where one of them is no
    /// finite number.
    ///
    /// # Errors
    /// When there were not as many, or the device has failed.
    pub fn choose(&mut self, draws: &[Draw]) -> Result<Vec<Option<u32>>, Error> {
        if draws.len() > self.step.most() || draws.iter().any(|d| d.row >= self.last.len()) {
            return Err(Error::State(format!("tokens of a step of {} sequences", self.last.len())));
        }
        // Until the step has taken its input.
        self.cuda.synchronize();
        let words = self.input.integers_mut().as_chunks_mut::<{ Draw::WORDS }>().0;
        words.iter_mut().zip(draws).for_each(|(to, draw)| *to = draw.words());
        self.input.send(self.draws.ptr(), 0, Draw::WORDS * draws.len());
        let vocab = self.model.config().vocab_size;
        choose(&self.ctx, self.step.logits(), self.draws.ptr(), self.chosen.ptr(), draws.len(), vocab);
        self.output.receive(self.chosen.ptr(), draws.len());
        self.cuda.synchronize();
        self.ctx.check()?;
        Ok(self.output.integers()[..draws.len()].iter().map(|t| u32::try_from(*t).ok()).collect())
    }

    /// Goes on with the most probable token `steps` times without waiting for the host, from the (slot, token) given: the last tokens.
    ///
    /// # Errors
    /// As [`Decoder::feed`].
    pub fn greedy(&mut self, sequences: &[(usize, u32)], steps: usize) -> Result<Vec<u32>, Error> {
        self.check_inputs(sequences)?;
        let n = sequences.len();
        if steps == 0 || n == 0 {
            return Ok(sequences.iter().map(|s| s.1).collect());
        }
        self.begin(sequences);
        self.last = sequences.iter().map(|s| s.0).collect();
        (0..steps).for_each(|_| self.run());
        self.output.receive(self.step.tokens(), n);
        self.cuda.synchronize();
        self.ctx.check()?;
        Ok(self.output.integers()[..n].iter().map(|&t| t as u32).collect())
    }

    fn check_inputs(&self, sequences: &[(usize, u32)]) -> Result<(), Error> {
        let vocab = self.model.config().vocab_size;
        let mut seen = vec![false; self.slots()];
        for (position, &(slot, token)) in sequences.iter().enumerate() {
            if token as usize >= vocab {
                return Err(anser_model::Error::Token { token, position, vocab }.into());
            }
            match seen.get_mut(slot) {
                Some(seen) if !*seen => *seen = true,
                Some(_) => return Err(Error::State(format!("slot {slot} is named twice in one step"))),
                None => return Err(Error::State(format!("there is no slot {slot}: there are {}", self.slots()))),
            }
        }
        Ok(())
    }

    /// Sends tokens and slots.
    fn begin(&mut self, sequences: &[(usize, u32)]) {
        let n = sequences.len();
        // Until the step before has taken its own.
        self.cuda.synchronize();
        let words = self.input.integers_mut();
        for (i, &(slot, token)) in sequences.iter().enumerate() {
            (words[i], words[n + i]) = (token as i32, slot as i32);
        }
        self.input.send(self.step.tokens(), 0, n);
        self.input.send(self.step.slots(), n, n);
    }

    /// One step of the sequences in the slots of `last`.
    fn run(&mut self) {
        let n = self.last.len();
        self.few_steps += usize::from(n <= 4);
        self.step.prepare(&mut self.state, &self.last);
        self.launch(n);
        self.step.finish(&mut self.state, &self.last);
    }

    /// The kernels of a step of `n` sequences: recorded the second time.
    fn launch(&mut self, n: usize) {
        if self.warm.insert(n) {
            return self.step.run(&self.state, n);
        }
        if !self.graphs.contains_key(&n) {
            let Some(graph) = self.cuda.capture(|| self.step.run(&self.state, n)) else { return };
            self.graphs.insert(n, graph);
        }
        if let Some(graph) = self.graphs.get(&n) {
            graph.replay();
        }
    }

    /// Reads the tokens of a prompt into a slot, going on from its state: the logits after the last.
    ///
    /// # Errors
    /// When a token or the slot doesn't exist, or there are no tokens.
    pub fn prefill(&mut self, slot: usize, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        let mut state = self.state(slot)?;
        let mut logits = Vec::new();
        let mut rest = tokens;
        while !rest.is_empty() {
            let now;
            (now, rest) = rest.split_at(rest.len().min(piece(&self.ctx, self.model)).min(state.room(0)));
            (logits, state) = read(&self.ctx, self.model, now, 1, &state)?;
        }
        self.set_state(slot, &state)?;
        if logits.is_empty() { Err(Error::Empty) } else { Ok(logits) }
    }

    /// Tokens that a slot may read until its attention gives up a part of its past ([`State::room`]).
    pub fn room(&self, slot: usize) -> usize {
        self.state.room(slot)
    }

    /// What attention keeps of a slot, one past for each block.
    pub fn pasts(&self, slot: usize) -> impl Iterator<Item = &Past> {
        self.state.attention.iter().map(move |a| &a.pasts[slot])
    }

    /// A copy of a slot's state, as a state of one slot in f32; what attention keeps is shared.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn state(&self, slot: usize) -> Result<State, Error> {
        self.states(&[slot])
    }

    /// The same of several slots, as a state with as many, in that order: a copy for each run of neighbours.
    pub(crate) fn states(&self, slots: &[usize]) -> Result<State, Error> {
        slots.iter().try_for_each(|&slot| self.check(slot))?;
        let part = |v: &Var| {
            let n = v.cols();
            let mut to = self.ctx.alloc_as(v.buf().dtype(), slots.len() * n);
            runs(slots).for_each(|(at, first, count)| to.write_part(at * n, v.buf(), first * n, count * n));
            Var::constant(slots.len(), n, to)
        };
        let in_f32 = |v: &Var| {
            let (n, dtype) = (v.cols(), v.buf().dtype());
            let to = self.ctx.alloc_f32(slots.len() * n);
            for (at, first, count) in runs(slots) {
                let [to, from] = [to.ptr().offset(at * n, DType::F32), v.buf().ptr().offset(first * n, dtype)];
                self.cuda.widen(from, dtype, to, count * n);
            }
            Var::constant(slots.len(), n, to)
        };
        let layer = |l: &LayerState| {
            let (att_x, wkv, ffn_x) = (part(&l.att_x), in_f32(&l.wkv), part(&l.ffn_x));
            LayerState { att_x, wkv, ffn_x }
        };
        let attention = |a: &AttentionState| {
            let pasts = slots.iter().map(|&slot| a.pasts[slot].clone()).collect();
            AttentionState { ffn_x: part(&a.ffn_x), pasts }
        };
        Ok(State {
            layers: self.state.layers.iter().map(layer).collect(),
            attention: self.state.attention.iter().map(attention).collect(),
            cache: self.state.cache,
        })
    }

    /// The values of a slot's state on the host, in the order of [`State::vars`].
    ///
    /// # Errors
    /// When there is no such slot, or memory runs out.
    pub(crate) fn values(&mut self, slot: usize) -> Result<Vec<f32>, Error> {
        self.check(slot)?;
        let len = self.state.vars().map(Var::cols).sum();
        let (all, pinned) = match self.leaving.take() {
            Some(room) => room,
            None => (self.ctx.alloc_f32(len), Pinned::new(&self.cuda, len)?),
        };
        let mut at = 0;
        for v in self.state.vars() {
            let (n, dtype, to) = (v.cols(), v.buf().dtype(), all.ptr().offset(at, DType::F32));
            let from = v.buf().ptr().offset(slot * n, dtype);
            match dtype {
                DType::F32 => self.cuda.copy(from, to, n * dtype.size()),
                _ => self.cuda.widen(from, dtype, to, n),
            }
            at += n;
        }
        pinned.receive(all.ptr(), len);
        self.cuda.synchronize();
        self.ctx.check()?;
        let mut values = vec![0.0; len];
        let (to, from) = (DisjointMut::new(&mut values), &pinned.floats()[..len]);
        self.ctx.threads().run(len.div_ceil(COPIED), |i| {
            let part = i * COPIED..len.min((i + 1) * COPIED);
            // SAFETY: each part is copied by one task.
            unsafe { to.get(part.clone()) }.copy_from_slice(&from[part]);
        });
        self.leaving = Some((all, pinned));
        Ok(values)
    }

    /// Puts a state of one slot into a slot. A bound on what attention keeps is then that of all slots.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn set_state(&mut self, slot: usize, state: &State) -> Result<(), Error> {
        self.set_states(&[slot], state)
    }

    /// The same of several slots, all different, from a state with as many, in that order.
    pub(crate) fn set_states(&mut self, slots: &[usize], state: &State) -> Result<(), Error> {
        slots.iter().try_for_each(|&slot| self.check(slot))?;
        for (to, from) in self.state.vars().zip(state.vars()) {
            let (n, dtype, other) = (to.cols(), to.buf().dtype(), from.buf().dtype());
            assert!(from.cols() == n && from.rows() == slots.len());
            for (at, first, count) in runs(slots) {
                let (from, len) = (from.buf().ptr().offset(at * n, other), count * n);
                let to = to.buf().ptr().offset(first * n, dtype);
                if other == dtype {
                    self.cuda.copy(from, to, len * dtype.size());
                } else {
                    let wide = self.ctx.alloc_f32(len);
                    self.cuda.widen(from, other, wide.ptr(), len);
                    self.cuda.round(wide.ptr(), to, len, dtype);
                }
            }
        }
        for (to, from) in self.state.attention.iter_mut().zip(&state.attention) {
            slots.iter().zip(&from.pasts).for_each(|(&slot, past)| to.pasts[slot] = past.clone());
        }
        if self.state.cache != state.cache {
            // What is noted of a token is part of the recorded work.
            self.state.cache = state.cache;
            self.graphs.clear();
        }
        Ok(())
    }

    /// Empties a slot.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn clear(&mut self, slot: usize) -> Result<(), Error> {
        self.check(slot)?;
        for v in self.state.vars() {
            let (n, dtype) = (v.cols(), v.buf().dtype());
            self.cuda.clear(v.buf().ptr().offset(slot * n, dtype), n * dtype.size());
        }
        self.forget(slot);
        Ok(())
    }

    /// Gives up what attention keeps of a slot that is not in use.
    pub(crate) fn forget(&mut self, slot: usize) {
        let empty = self.model.config().empty_past(&self.ctx);
        self.state.attention.iter_mut().for_each(|a| a.pasts[slot] = empty.clone());
    }

    fn check(&self, slot: usize) -> Result<(), Error> {
        if slot < self.slots() {
            Ok(())
        } else {
            Err(Error::State(format!("there is no slot {slot}: there are {}", self.slots())))
        }
    }

    /// Share of relu(.)^2 that was zero for all sequences of a step, so far; steps of more than 4 don't count, they skip nothing.
    pub fn zero_share(&self) -> f64 {
        self.step.zero_share(self.few_steps)
    }

    /// The type of WKV states between steps.
    fn kept(&self) -> DType {
        self.state.layers.first().map_or(DType::F32, |l| l.wkv.buf().dtype())
    }

    /// Bytes that a step of `n` sequences moves at least, given the share of rows that are skipped.
    pub fn bytes(&self, n: usize, zero_share: f64) -> f64 {
        self.step.bytes(n, self.kept(), zero_share, None)
    }

    /// Seconds that the kernels of each kind take in a step of `n` sequences when nothing else runs, and the bytes they move at least. The states of the slots
    /// are worthless afterwards.
    pub fn profile(&mut self, n: usize, zero_share: f64) -> Vec<(Part, f64, f64)> {
        const RUNS: u32 = 20;
        self.step.prepare(&mut self.state, &(0..n).collect::<Vec<_>>());
        let (step, state, cuda, kept) = (&self.step, &self.state, &self.cuda, self.kept());
        let time = |part: Part| {
            let graph = cuda.capture(|| step.run_only(state, n, Some(part)));
            let mut seconds = f64::INFINITY;
            for _ in 0..3 {
                cuda.synchronize();
                let start = std::time::Instant::now();
                (0..RUNS).for_each(|_| graph.iter().for_each(Graph::replay));
                cuda.synchronize();
                seconds = seconds.min(start.elapsed().as_secs_f64() / f64::from(RUNS));
            }
            (part, seconds, step.bytes(n, kept, zero_share, Some(part)))
        };
        Part::ALL.into_iter().map(time).collect()
    }
}

/// Runs of neighbouring slots: where each begins in the list, its first slot and how many there are.
fn runs(slots: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut at = 0;
    slots.chunk_by(|a, b| a + 1 == *b).map(move |run| {
        at += run.len();
        (at - run.len(), run[0], run.len())
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn runs_of_neighbours() {
        let runs = |slots: &[usize]| super::runs(slots).collect::<Vec<_>>();
        assert_eq!(runs(&[3, 4, 5, 7, 6, 0, 1]), [(0, 3, 3), (3, 7, 1), (4, 6, 1), (5, 0, 2)]);
        assert_eq!(runs(&[]), []);
    }
}
