use super::bytes::{Reader, put_floats, put_number, seal};
use crate::Error;
use crate::state_file::filled;
use anser_model::{Cache, Config, State};
use anser_ops::Var;
use anser_ops::attention::{Chunks, Past};
use anser_tensor::Context;
use anser_tensor::cuda::Cuda;

/// A sequence's state and prediction, in host memory but for what attention keeps, which is shared with whoever goes on from it.
pub(super) struct Snapshot {
    /// The state's matrices one after the other ([`State::vars`]).
    values: Vec<f32>,
    /// Of each attention block.
    pasts: Vec<Past>,
    /// For the next token; none in the middle of a prompt.
    pub logits: Vec<f32>,
}

/// What states of a model are like.
pub(super) struct Form {
    pub ctx: Context,
    /// One of one slot.
    pub empty: State,
    pub chunks: Option<Chunks>,
    pub vocab: usize,
}

impl Form {
    /// Of a model's states, with a bound on what attention keeps.
    ///
    /// # Errors
    /// When the bound doesn't fit the model.
    pub fn new(ctx: &Context, config: &Config, bound: Option<Cache>) -> Result<Form, Error> {
        let mut empty = State::zeros(ctx, config, 1);
        if let Some(bound) = bound {
            bound.validate(config)?;
            empty.cache = Some(bound);
        }
        ctx.check()?;
        let chunks = config.hybrid.map(|h| h.chunks());
        Ok(Form { ctx: ctx.clone(), empty, chunks, vocab: config.vocab_size })
    }
}

impl Snapshot {
    /// Of a state of one slot; waits for the device.
    pub fn new(state: &State, logits: Vec<f32>) -> Snapshot {
        let mut values = Vec::with_capacity(state.vars().map(|v| v.buf().len()).sum());
        state.vars().for_each(|v| values.extend_from_slice(&v.to_vec()));
        Snapshot { values, pasts: state.attention.iter().map(|a| a.pasts[0].clone()).collect(), logits }
    }

    /// Of the values of a state, in the order of [`State::vars`], and what its attention keeps.
    pub fn of(values: Vec<f32>, pasts: Vec<Past>, logits: Vec<f32>) -> Snapshot {
        Snapshot { values, pasts, logits }
    }

    /// Whether it is of such a state.
    pub fn fits(&self, form: &Form) -> bool {
        let values: usize = form.empty.vars().map(|v| v.buf().len()).sum();
        self.values.len() == values
            && [0, form.vocab].contains(&self.logits.len())
            && self.pasts.len() == form.empty.attention.len()
    }

    /// The state.
    pub fn state(&self, form: &Form) -> State {
        let mut state = form.empty.clone();
        let mut rest = &self.values[..];
        for (_, v) in state.named_mut() {
            let mut buf = form.ctx.alloc_as(v.buf().dtype(), v.buf().len());
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

    /// Bytes of it in a file, where all is f32.
    pub fn encoded_bytes(&self, form: &Form) -> usize {
        let notes = form.empty.cache.map_or(0, |c| c.notes());
        let past = |past: &Past| {
            let [keys, noted] = past.channels();
            16 + 4 * past.len() * (2 * keys + notes * noted)
        };
        24 + 4 * (self.values.len() + self.logits.len()) + self.pasts.iter().map(past).sum::<usize>() + 4
    }

    /// For a file: the numbers of values, logits, pasts; the values, the logits; of every past its tokens, its matrices and these; a checksum.
    ///
    /// # Errors
    /// When the device has failed: what came from there since is worth nothing.
    pub fn encode(&self, form: &Form) -> Result<Vec<u8>, Error> {
        let mut out = Vec::with_capacity(self.encoded_bytes(form));
        [self.values.len(), self.logits.len(), self.pasts.len()].iter().for_each(|&n| put_number(&mut out, n));
        put_floats(&mut out, &self.values);
        put_floats(&mut out, &self.logits);
        for past in &self.pasts {
            let matrices = {
                // The engine's thread may be about to record a step.
                let _aside = form.ctx.cuda().map(Cuda::aside);
                past.to_vecs()
            };
            put_number(&mut out, past.len());
            put_number(&mut out, matrices.len());
            matrices.iter().for_each(|m| put_floats(&mut out, m));
        }
        form.ctx.check()?;
        seal(&mut out);
        Ok(out)
    }

    /// From a file; nothing if it is damaged or not of such a state.
    pub fn decode(form: &Form, bytes: &[u8]) -> Option<Snapshot> {
        let mut from = Reader::sealed(bytes)?;
        let [values, logits, pasts] = [from.number()?, from.number()?, from.number()?];
        let expected: usize = form.empty.vars().map(|v| v.buf().len()).sum();
        if values != expected || ![0, form.vocab].contains(&logits) || pasts != form.empty.attention.len() {
            return None;
        }
        let (values, logits) = (from.floats(values)?, from.floats(logits)?);
        // As when it was encoded.
        let _aside = form.ctx.cuda().map(Cuda::aside);
        let past = |empty: &State| {
            let (tokens, matrices) = (from.number()?, from.number()?);
            if matrices != 2 + empty.cache.map_or(0, |c| c.notes()) {
                return None;
            }
            let [keys, noted] = empty.attention[0].pasts[0].channels();
            let len = |i| tokens.checked_mul(if i < 2 { keys } else { noted });
            let rows = (0..matrices).map(|i| Some(form.ctx.copy_of(&from.floats(len(i)?)?)));
            Some(filled(
                &form.ctx,
                &empty.attention[0].pasts[0],
                &rows.collect::<Option<Vec<_>>>()?,
                tokens,
                form.chunks?,
            ))
        };
        let pasts = std::iter::repeat_n(&form.empty, pasts).map(past).collect::<Option<Vec<_>>>()?;
        from.is_empty().then_some(Snapshot { values, pasts, logits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Session;
    use anser_model::{Eviction, Hybrid, Init, Model};

    #[test]
    fn files_give_back_the_state_or_nothing() {
        let hybrid = Config {
            hybrid: Some(Hybrid { chunk: 8, topk: 2, key_heads: Some(1), ..Hybrid::new(2) }),
            head_size: 16,
            ..Config::new(2, 64, 20)
        };
        let bound = Some(Cache::new(64, Eviction::Error, true));
        for (config, bound) in [(Config::new(2, 64, 20), None), (hybrid.clone(), None), (hybrid, bound)] {
            let ctx = Context::cpu(1);
            let model = Model::init(&ctx, &config, Init::Current, 1).unwrap();
            let form = Form::new(&ctx, &config, bound).unwrap();
            let mut session = Session::new(&ctx, &model);
            if let Some(bound) = bound {
                session = session.bounded(bound).unwrap();
            }
            session.feed(&(0..30).map(|i| i * 7 % 20).collect::<Vec<_>>()).unwrap();
            let snapshot = Snapshot::new(&session.state().unwrap(), session.logits().unwrap().to_vec());
            let bytes = snapshot.encode(&form).unwrap();
            let back = Snapshot::decode(&form, &bytes).unwrap();
            assert!(back.values == snapshot.values && back.logits == snapshot.logits);
            for (a, b) in back.pasts.iter().zip(&snapshot.pasts) {
                assert!(a.len() == 30 && a.to_vecs() == b.to_vecs());
            }
            assert_eq!(bytes.len(), snapshot.encoded_bytes(&form));
            // Damaged, cut off, with the right checksum of too much, and of another model.
            for i in (0..bytes.len()).step_by(97) {
                let mut damaged = bytes.clone();
                damaged[i] ^= 1;
                assert!(Snapshot::decode(&form, &damaged).is_none());
                assert!(Snapshot::decode(&form, &bytes[..i]).is_none());
            }
            let mut longer = bytes[..bytes.len() - 4].to_vec();
            longer.push(0);
            seal(&mut longer);
            assert!(Snapshot::decode(&form, &longer).is_none());
            let other = Form::new(&ctx, &Config::new(1, 64, 20), None).unwrap();
            assert!(Snapshot::decode(&other, &bytes).is_none());
        }
    }
}
