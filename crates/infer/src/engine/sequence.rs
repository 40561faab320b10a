use super::batch::{Output, Rows, Wants, Work};
use super::snapshot::Snapshot;
use super::store::Prefix;
use super::{End, Event, Next, Request, TokenLogprob};
use crate::{Error, InitialState, Sampler};
use anser_ops::log_sum_exp;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc::Sender;

/// A request that runs.
pub(super) struct Sequence {
    pub request: Request,
    pub sampler: Sampler,
    pub to: Sender<Event>,
    /// All tokens since the beginning, those not read yet last.
    pub tokens: Vec<u32>,
    /// What they begin from.
    pub initial: Option<Arc<InitialState>>,
    /// The state that the request came with.
    pub given: Option<Arc<Snapshot>>,
    /// Where the prompt begins and ends in them.
    pub prompt: std::ops::Range<usize>,
    /// How many of them the state is after, and their key.
    pub read: usize,
    pub prefix: Prefix,
    /// After the tokens read, if they were all that there were.
    pub logits: Vec<f32>,
    /// The next token if a GPU has chosen it, as in [`Output`].
    pub chosen: Option<Option<u32>>,
    /// The last token, until the client is told of it.
    pub said: Option<Event>,
    /// Tokens of the prompt that were not read.
    pub cached: usize,
    pub prompt_logprobs: Vec<TokenLogprob>,
    pub hidden: Option<Vec<f32>>,
    pub phase: Phase,
    /// After the prompt, to go back to.
    pub after_prompt: Option<(Arc<Snapshot>, Prefix)>,
    /// When it last had a piece of its prompt read.
    pub turn: u64,
    pub began: Instant,
    /// Bytes set apart for it.
    pub needed: usize,
}

#[derive(Clone)]
pub(super) enum Phase {
    Prompt,
    Answer,
    /// It ends when everything that the state to keep is after has been read.
    Closing(End),
}

impl Sequence {
    /// Tokens that were not read yet.
    pub fn left(&self) -> usize {
        self.tokens.len() - self.read
    }

    /// Whether the state is after tokens that the answer doesn't have.
    pub fn is_beyond(&self) -> bool {
        self.read > self.tokens.len()
    }

    /// Whether it needs nothing of its prompt but the state and the prediction after it, which it may take from another that reads the same.
    pub fn may_follow(&self, other: &Sequence) -> bool {
        let alike = |s: &Sequence| matches!(s.phase, Phase::Prompt) && s.tokens.len() == self.tokens.len();
        let plain = self.request.prompt_logprobs.is_none() && !self.request.hidden;
        let origin = |s: &Sequence| (s.initial.as_ref().map(Arc::as_ptr), s.given.as_ref().map(Arc::as_ptr));
        plain
            && origin(self) == origin(other)
            && alike(self)
            && alike(other)
            && self.request.owner == other.request.owner
            && self.tokens == other.tokens
    }

    /// Whether logits are wanted of every token that it reads next.
    pub fn predicts(&self) -> bool {
        self.request.prompt_logprobs.is_some() && self.prompt.contains(&self.read)
    }

    /// Reading the next `count` tokens, and with `choosing` choosing the one after them.
    pub fn work(&mut self, slot: usize, count: usize, choosing: bool) -> Work<'_> {
        let end = self.read + count;
        let in_prompt = self.read < self.prompt.end;
        let logits = match self.request.prompt_logprobs {
            Some(_) if self.predicts() => Rows::All,
            Some(_) if end == self.prompt.start => Rows::Last,
            _ if end == self.tokens.len() => Rows::Last,
            _ => Rows::None,
        };
        let hidden = self.request.hidden && in_prompt && end == self.prompt.end;
        let plain = self.request.logprobs.is_none() && !self.masks();
        let writes = matches!(self.phase, Phase::Answer) && self.left() == 1;
        let token = if choosing && plain && writes { self.sampler.cuts() } else { None };
        Work {
            slot,
            before: &self.tokens[..self.read],
            tokens: &self.tokens[self.read..end],
            wants: Wants { logits, hidden, token },
            greedy: self.sampler.greedy(),
        }
    }

    /// Takes what came of reading `count` tokens.
    pub fn take(&mut self, count: usize, output: Output) {
        let now = self.read..self.read + count;
        self.prefix.push(&self.tokens[now.clone()]);
        self.read = now.end;
        self.hidden = output.hidden.or(self.hidden.take());
        self.chosen = output.token;
        let Some(rows) = output.logits.len().checked_div(now.len()) else { return };
        match self.request.prompt_logprobs {
            Some(best) if now.start < self.prompt.end && now.start >= self.prompt.start => {
                // What comes before a token predicts it.
                let before = [&self.logits[..]].into_iter().chain(output.logits.chunks_exact(rows));
                for (token, logits) in self.tokens[now].iter().zip(before).filter(|(_, l)| !l.is_empty()) {
                    self.prompt_logprobs.push(logprob(*token, logits, best));
                }
                self.logits = output.logits[output.logits.len() - rows..].to_vec();
            }
            _ => self.logits = output.logits,
        }
    }

    /// Chooses the next token.
    pub fn choose(&mut self) -> Result<(), String> {
        // The state and the end have the last places.
        if self.to.capacity() < 3 {
            return Err(format!("the answer isn't read: {} tokens wait", self.to.max_capacity() - 3));
        }
        let token = match self.chosen.take() {
            Some(chosen) => chosen.ok_or_else(|| Error::NotFinite.to_string())?,
            None => self.sample()?,
        };
        if self.request.stop_tokens.contains(&token) {
            self.phase = Phase::Closing(End::Stop);
            return Ok(());
        }
        let written = match self.request.logprobs {
            Some(best) => logprob(token, &self.logits, best),
            None => TokenLogprob { token, logprob: f32::NAN, best: Vec::new() },
        };
        self.tokens.push(token);
        self.said = Some(Event::Token(written));
        let next = match &mut self.request.constraint {
            Some(constraint) => constraint.accept(token)?,
            None => Next::More,
        };
        if let Next::Cut(count) = next
            && self.request.keeps_state()
        {
            // Where the state is after more than these, it goes back ([`Sequence::is_beyond`]).
            self.tokens.truncate(self.prompt.end.saturating_add(count));
        }
        if next != Next::More {
            self.phase = Phase::Closing(End::Constraint);
        } else if self.tokens.len() - self.prompt.end == self.request.max_tokens {
            self.phase = Phase::Closing(End::Length);
        }
        Ok(())
    }

    /// Whether there are tokens that may not come next.
    fn masks(&self) -> bool {
        self.request.constraint.as_ref().is_some_and(|c| c.masks())
    }

    /// The next token, from logits that are here.
    fn sample(&mut self) -> Result<u32, String> {
        let mut allowed;
        let logits = match &mut self.request.constraint {
            Some(constraint) if constraint.masks() => {
                if self.logits.iter().any(|l| !l.is_finite()) {
                    return Err(Error::NotFinite.to_string());
                }
                allowed = self.logits.clone();
                constraint.mask(&mut allowed)?;
                if allowed.iter().all(|&l| l == f32::NEG_INFINITY) {
                    return Err("the constraint allows no token here".into());
                }
                // Far below whatever bias and penalties can make of a logit, and a number, as the sampler wants.
                allowed.iter_mut().filter(|l| **l == f32::NEG_INFINITY).for_each(|l| *l = -1e30);
                &allowed
            }
            _ => &self.logits,
        };
        self.sampler.sample(logits).map_err(|e| e.to_string())
    }

    /// How it ended, if it did: a state that is kept is after all tokens.
    pub fn ended(&self) -> Option<End> {
        match &self.phase {
            Phase::Closing(end) if self.read == self.tokens.len() || !self.request.keeps_state() => Some(end.clone()),
            Phase::Closing(end @ End::Failed(_)) => Some(end.clone()),
            _ => None,
        }
    }

    /// Tells the client of the last token, if it doesn't know of it yet.
    pub fn tell(&mut self) {
        if let Some(event) = self.said.take() {
            let _ = self.to.try_send(event);
        }
    }

    pub fn end(mut self, end: End) {
        self.tell();
        let _ = self.to.try_send(Event::End(end));
    }
}

/// The log probability of a token and the `count` best.
fn logprob(token: u32, logits: &[f32], count: usize) -> TokenLogprob {
    let total = log_sum_exp(logits);
    let of = |i: usize| (f64::from(logits[i]) - total) as f32;
    let count = count.min(logits.len());
    let mut order: Vec<usize> = if count == 0 { Vec::new() } else { (0..logits.len()).collect() };
    let by_logit = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, by_logit);
    }
    order.truncate(count);
    order.sort_unstable_by(by_logit);
    let best = order.into_iter().map(|i| (i as u32, of(i))).collect();
    TokenLogprob { token, logprob: of(token as usize), best }
}
