//! What is asked of an engine, and what comes of it.

use super::SavedState;
use super::shared::Shared;
use crate::{Error, Sampler, Sampling};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

/// What a request goes on from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// Nothing.
    #[default]
    Empty,
    /// The initial state or the owner's state of this name.
    Named(String),
    /// This state. What goes on from it is not cached for others, and gets no name.
    State(SavedState),
}

/// A prompt and what is wanted after it.
pub struct Request {
    /// Tokens to read; there may be none after a state.
    pub prompt: Vec<u32>,
    /// What the prompt goes on from.
    pub start: Start,
    /// Whose request this is: states and cached prefixes of one owner are invisible to another, and owners take turns when requests wait.
    pub owner: String,
    /// How tokens are chosen; its seed is not used.
    pub sampling: Sampling,
    /// Seed of the random numbers.
    pub seed: u64,
    /// A sampler that goes on choosing, instead of a new one of `sampling` and `seed`.
    pub sampler: Option<Sampler>,
    /// Tokens to write at most. 0 only where the prompt alone gives something: its log probabilities, its hidden vector or a state to keep.
    pub max_tokens: usize,
    /// Tokens that end the answer; they are no part of it.
    pub stop_tokens: Vec<u32>,
    /// Log probabilities of every token written, with so many of the best beside it.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt, all but the first of an empty sequence, which nothing predicts. The whole prompt is read for it.
    pub prompt_logprobs: Option<usize>,
    /// What may be written, and where it ends.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Name under which the state is kept at the end, after all tokens of the answer.
    pub save_as: Option<String>,
    /// Whether the state at the end is wanted, after all tokens of the answer.
    pub keep_state: bool,
    /// Whether the last hidden vector of the prompt is wanted, `[C]` after the last norm.
    pub hidden: bool,
}

impl Default for Request {
    fn default() -> Request {
        Request {
            prompt: Vec::new(),
            start: Start::Empty,
            owner: String::new(),
            sampling: Sampling::default(),
            seed: 0,
            sampler: None,
            max_tokens: 256,
            stop_tokens: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            constraint: None,
            save_as: None,
            keep_state: false,
            hidden: false,
        }
    }
}

impl Request {
    /// Whether the state at the end is to be after all tokens of the answer.
    pub(super) fn keeps_state(&self) -> bool {
        self.save_as.is_some() || self.keep_state
    }
}

/// Whether an answer goes on after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It does.
    More,
    /// It is complete.
    End,
    /// It ended with its first so many tokens, as before a stop text: a state that is kept is after these. The others come all the same.
    Cut(usize),
}

/// What may come next in an answer, such as a grammar, and where it ends.
pub trait Constraint: Send {
    /// Sets the logits of tokens that may not come next to minus infinity.
    ///
    /// # Errors
    /// What is wrong with the constraint; the answer ends with it.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Takes note of the token that was chosen: whether the answer goes on.
    ///
    /// # Errors
    /// As [`Constraint::mask`].
    fn accept(&mut self, token: u32) -> Result<Next, String>;

    /// Whether there are tokens that may not come next: one that only ends answers, as stop texts do, is not asked for a mask.
    fn masks(&self) -> bool {
        true
    }
}

/// A token and its log probability under the model: before bias, penalties, temperature and constraints.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Its log probability; NaN if none was asked for.
    pub logprob: f32,
    /// The most probable tokens, the best first.
    pub best: Vec<(u32, f32)>,
}

/// What comes of a request, in this order: one `Prompt`, tokens, a `State` if it is wanted, one `End`. A failure or cancellation may end it before.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt was read.
    Prompt {
        /// Its tokens, without those behind a named state.
        tokens: usize,
        /// How many of them were not read, as a state after them was cached, or another request that ran read them.
        cached: usize,
        /// See [`Request::prompt_logprobs`].
        logprobs: Vec<TokenLogprob>,
        /// See [`Request::hidden`].
        hidden: Option<Vec<f32>>,
    },
    /// A token was written.
    Token(TokenLogprob),
    /// The state at the end ([`Request::keep_state`]).
    State(SavedState),
    /// Nothing more will come.
    End(End),
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It has as many tokens as were asked for.
    Length,
    /// A stop token came.
    Stop,
    /// The constraint has ended it.
    Constraint,
    /// The engine ended.
    Cancelled,
    /// The state could not be kept, as where it is to be cannot be reached.
    Unreachable(String),
    /// Something went wrong.
    Failed(String),
}

impl End {
    /// How the answer ended, unless something went wrong.
    ///
    /// # Errors
    /// What went wrong, as when the engine ended.
    pub fn checked(self) -> Result<End, Error> {
        match self {
            End::Failed(why) | End::Unreachable(why) => Err(Error::Answer(why)),
            End::Cancelled => Err(Error::Answer("the engine has ended".into())),
            end => Ok(end),
        }
    }
}

/// The events of a request. Dropping it cancels the request, and keeps no state. Nobody waits for whoever doesn't read them ([`unread`](super::EngineOptions::unread)).
pub struct Stream {
    events: mpsc::Receiver<Event>,
    ended: bool,
}

impl Stream {
    pub(super) fn new(events: mpsc::Receiver<Event>) -> Stream {
        Stream { events, ended: false }
    }

    /// The next event, `None` after the end.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        self.note(event)
    }

    /// The same, waiting for it; not to be called from async code.
    pub fn recv(&mut self) -> Option<Event> {
        let event = self.events.blocking_recv();
        self.note(event)
    }

    /// The next event, or nothing if `stop` becomes true before, as when Ctrl-C is pressed while a long prompt is read.
    pub fn recv_unless(&mut self, stop: &AtomicBool) -> Option<Event> {
        while !stop.load(Ordering::SeqCst) {
            match self.events.try_recv() {
                Err(TryRecvError::Empty) => std::thread::sleep(Duration::from_millis(1)),
                event => return self.note(event.ok()),
            }
        }
        None
    }

    /// There is an end even if the engine didn't come to it.
    fn note(&mut self, event: Option<Event>) -> Option<Event> {
        if event.is_none() && !self.ended {
            self.ended = true;
            return Some(Event::End(End::Failed("the engine has stopped working".into())));
        }
        self.ended |= matches!(event, Some(Event::End(_)));
        event
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// As many wait as may.
    #[error("too many requests are waiting: try again in {} s", retry_after.as_secs().max(1))]
    Busy {
        /// When there may be room.
        retry_after: Duration,
    },
    /// The engine is ending.
    #[error("the server is shutting down")]
    Draining,
    /// The engine has failed for good ([`Engine::failure`](super::Engine::failure)).
    #[error("the engine has failed and must be started again: {0}")]
    Failed(String),
    /// What is asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Where the named state is cannot be reached.
    #[error("{0}")]
    Unreachable(String),
}

impl Shared {
    /// The sampler of a request that makes sense.
    pub(super) fn check(&self, request: &Request) -> Result<Sampler, Refused> {
        let invalid = |m: String| Err(Refused::Invalid(m));
        let tokens = request.prompt.iter().chain(&request.stop_tokens);
        if let Some(token) = tokens.copied().find(|&t| t as usize >= self.vocab) {
            return invalid(format!("token {token} is outside the model's vocabulary of {}", self.vocab));
        }
        if request.prompt.is_empty() && request.hidden {
            return invalid("the prompt is empty: there is no hidden vector of its last token".into());
        }
        if let Start::State(saved) = &request.start {
            if !saved.snapshot.fits(self.store.form()) || saved.bound != self.store.form().empty.cache {
                return invalid("the state is of another model, or has another bound on what attention keeps".into());
            }
            if request.save_as.is_some() {
                return invalid("what goes on from a state without a name gets no name".into());
            }
        }
        let gives_something = request.hidden || request.prompt_logprobs.is_some() || request.keeps_state();
        if request.max_tokens == 0 && !gives_something {
            return invalid("max_tokens is 0: nothing would come of the request".into());
        }
        if let Some(name) = &request.save_as {
            self.store.check_name(name).map_err(|e| Refused::Invalid(e.to_string()))?;
        }
        if let Some(sampler) = &request.sampler {
            return Ok(sampler.clone());
        }
        let options = Sampling { seed: request.seed, ..request.sampling.clone() };
        Sampler::new(options).map_err(|e| Refused::Invalid(e.to_string()))
    }
}
