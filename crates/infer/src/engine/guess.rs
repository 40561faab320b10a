use crate::Error;
use crate::lookup::Lookup;
use crate::session::read;
use anser_model::{Model, State};
use anser_ops::attention::Past;
use anser_tensor::Context;

/// Tokens after the state at most that are read again beside a guess.
const MOST_PENDING: usize = 8;

/// Tokens read ahead for a sequence that is alone on a CPU: those that followed the last three where they stood before. A few tokens at once take little
/// longer than one, and of those guessed right the logits are then there already, the same to the bit.
pub(super) struct Guesses {
    /// Tokens of a guess at most.
    most: usize,
    lookup: Lookup,
    /// Tokens that the state is not after yet, though the sequence is, and what was read beyond them.
    pending: Vec<u32>,
    ahead: Option<Ahead>,
}

/// Guessed tokens that were read after the pending ones: the next comes true when it is fed.
struct Ahead {
    tokens: Vec<u32>,
    /// How many have come true.
    taken: usize,
    /// Logits after each, [tokens, vocabulary].
    logits: Vec<f32>,
    /// The state after all.
    state: State,
}

impl Guesses {
    /// Guesses of up to `most` tokens.
    pub fn new(most: usize) -> Guesses {
        Guesses { most, lookup: Lookup::new(most), pending: Vec::new(), ahead: None }
    }

    /// What was guessed, and what is pending, belonged to a sequence that is not there any more.
    pub fn forget(&mut self) {
        *self = Guesses::new(self.most);
    }

    /// Tokens that `state` has to be brought on by.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Brings the state, of one slot, to where its sequence is.
    pub fn settle(&mut self, ctx: &Context, model: &Model, state: &mut State) -> Result<(), Error> {
        self.ahead = None;
        if !self.pending.is_empty() {
            *state = read(ctx, model, &self.pending, 0, state)?.1;
            self.pending.clear();
        }
        Ok(())
    }

    /// Reads a token after those `before` it: its logits. If it was guessed, they are there. After a failure the sequence is as before.
    pub fn feed(
        &mut self, ctx: &Context, model: &Model, state: &mut State, before: &[u32], token: u32,
    ) -> Result<Vec<f32>, Error> {
        before[self.lookup.len().min(before.len())..].iter().for_each(|&t| self.lookup.push(t));
        if let Some(mut ahead) = self.ahead.take() {
            let vocab = model.config().vocab_size;
            let hit =
                (ahead.tokens[ahead.taken] == token).then(|| ahead.logits[ahead.taken * vocab..][..vocab].to_vec());
            if hit.is_some() {
                ahead.taken += 1;
                self.pending.push(token);
            }
            let (taken, length) = (ahead.taken, ahead.tokens.len());
            if hit.is_some() && taken < length {
                self.ahead = Some(ahead);
                return Ok(hit.unwrap_or_default());
            }
            self.lookup.learn(taken, length);
            if taken == length {
                *state = ahead.state;
                self.pending.clear();
            } else {
                drop(ahead);
            }
            // What attention has seen of a wrong guess makes room.
            state.attention.iter().for_each(|a| a.pasts.iter().for_each(Past::reclaim));
            if let Some(logits) = hit {
                return Ok(logits);
            }
        }
        // What is pending is read once more, beside the next guess; alone if there is much of it. There is room for one token more, as there was for a guess.
        if self.pending.len() >= MOST_PENDING {
            self.settle(ctx, model, state)?;
        }
        let mut now = [&self.pending[..], &[token]].concat();
        let guess = self.lookup.guess(token, state.room(0) - now.len());
        now.extend(&guess);
        let (mut logits, next) = read(ctx, model, &now, 1 + guess.len(), state)?;
        if guess.is_empty() {
            *state = next;
            self.pending.clear();
        } else {
            let after = logits.split_off(model.config().vocab_size);
            self.pending.push(token);
            self.ahead = Some(Ahead { tokens: guess, taken: 0, logits: after, state: next });
        }
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Session;
    use anser_model::{Config, Hybrid, Init};

    #[test]
    fn what_repeats_itself_is_read_ahead_and_nothing_changes() {
        let ctx = Context::cpu(2);
        let plain = Config::new(2, 64, 40);
        let hybrid = Config { hybrid: Some(Hybrid { chunk: 8, topk: 2, ..Hybrid::new(1) }), ..plain.clone() };
        // Twelve tokens again and again, with others now and then, from where a guess may be wrong.
        let token = |i: u32| if i % 29 < 2 { i * 7 % 40 } else { i % 12 };
        let tokens: Vec<u32> = (0..220).map(token).collect();
        for config in [plain, hybrid] {
            let model = Model::init(&ctx, &config, Init::Noise, 1).unwrap();
            let mut right = 0;
            for most in [1, 3, 8] {
                let (mut guesses, mut state) = (Guesses::new(most), State::zeros(&ctx, &config, 1));
                let mut session = Session::new(&ctx, &model);
                for (i, &t) in tokens.iter().enumerate() {
                    let taken = |g: &Guesses| g.ahead.as_ref().map_or(0, |a| a.taken);
                    let before = taken(&guesses);
                    let mut feed = |t| guesses.feed(&ctx, &model, &mut state, &tokens[..i], t);
                    assert!(i % 40 != 9 || feed(40).is_err());
                    let logits = feed(t).unwrap();
                    right += usize::from(taken(&guesses) > before);
                    session.feed(&[t]).unwrap();
                    assert!(logits == session.logits().unwrap(), "{config:?} {most} {i}");
                    if i % 40 == 7 {
                        guesses.settle(&ctx, &model, &mut state).unwrap();
                        let all = |s: &State| s.vars().map(|v| v.to_vec()).collect::<Vec<_>>();
                        assert!(all(&state) == all(&session.state().unwrap()));
                    }
                }
            }
            assert!(right > 100, "{right}");
        }
    }
}
