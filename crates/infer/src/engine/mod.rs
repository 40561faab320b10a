//! The engine: requests, one or many, in one batch.
//!
//! One thread owns the model's batch. Between two steps sequences join and leave it; a step reads one token of every sequence that
//! writes, and of those that still read their prompt pieces in turn, of a bounded number of tokens in all, so that nobody waits long
//! for anybody's prompt. A row's result depends on its own sequence only, so that on the CPU a request's tokens are the same to the
//! bit whatever else runs; on a GPU they are with [`EngineOptions::deterministic`].
//!
//! ```
//! use anser_infer::engine::{Engine, EngineOptions, Event, Request};
//! use anser_model::{Config, Init, Model};
//! use anser_tensor::Context;
//!
//! let ctx = Context::cpu(1);
//! let model = Model::init(&ctx, &Config::new(1, 64, 100), Init::Current, 1)?;
//! let engine = Engine::start(ctx, model.into(), EngineOptions::default())?;
//! let mut stream = engine.submit(Request { prompt: vec![1, 2, 3], max_tokens: 5, ..Request::default() })?;
//! let mut tokens = Vec::new();
//! while let Some(event) = stream.recv() {
//!     if let Event::Token(token) = event {
//!         tokens.push(token.token);
//!     }
//! }
//! assert_eq!(tokens.len(), 5);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batch;
mod bytes;
mod disk;
mod guess;
mod kept;
#[cfg(feature = "object-store")]
mod object;
#[cfg(feature = "redis")]
mod redis;
mod request;
mod run;
mod saved;
mod sequence;
mod shared;
mod snapshot;
mod storage;
mod store;
mod strides;
mod tier;
mod workers;

pub use request::{Constraint, End, Event, Next, Refused, Request, Start, Stream, TokenLogprob};
pub use saved::SavedState;
pub use store::{StateError, StateInfo, StateStore};
pub use tier::TierStats;

use crate::{Decoder, Error, InitialState};
use anser_model::{Architecture, Cache, Model};
use anser_tensor::Context;
use serde_json::json;
use shared::{Job, Shared};
use snapshot::Form;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use store::Begin;
use tokio::sync::{Semaphore, mpsc};

/// Runs a model for many clients. A clone is another handle on the same; when the last one is dropped the requests that are left are
/// cancelled and the thread ends.
#[derive(Clone)]
pub struct Engine {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// How an [`Engine`] runs.
#[derive(Clone)]
pub struct EngineOptions {
    /// Sequences that run at the same time at most, up to [`Decoder::MOST_SLOTS`].
    pub slots: usize,
    /// Requests that wait for a slot at most.
    pub waiting: usize,
    /// Bytes of states kept in memory to go on from: cached prefixes and, unless there is a folder, named states.
    pub cache_bytes: usize,
    /// Bytes that the states of running sequences may take; 0: no bound. What a hybrid's attention keeps is counted before a request starts, for all tokens that
    /// it may have, with the room that doubles as it grows.
    pub memory: usize,
    /// Tokens that may wait for a client to read them; the answer to one that lets more wait fails.
    pub unread: usize,
    /// Tokens of prompts that a step reads at most; 0: what suits the device, more for a request that is alone.
    pub prefill_piece: usize,
    /// Tokens read ahead at most for a sequence that is alone on a CPU, guessed where its text repeats itself: nothing but time changes. `None`: as many as
    /// pay, for requests that take the most probable token; drawn tokens are seldom the guessed ones.
    pub guesses: Option<usize>,
    /// Has a request's tokens and log probabilities be the same to the bit whatever else runs. On a CPU they always are. On a GPU, whose products of more rows may add
    /// in another order, steps go through those that don't then, prompts are read one by one in pieces of `prefill_piece`, and nothing but named states is kept
    /// to go on from, as after other pieces a state is another to the bit.
    pub deterministic: bool,
    /// Tokens of a prompt after which its state is kept for others that begin alike, and after multiples of these, which become rarer; 0: only at its end.
    pub stride: usize,
    /// Where named states and what memory has no room for are kept; without one everything is lost at the end.
    pub folder: Option<PathBuf>,
    /// Bytes of states in the folder at most.
    pub disk_bytes: usize,
    /// Percent of the memory for cached states, or of the folder if there is one, that named states of one owner may take, so that there is room for others';
    /// where names are shared nothing is counted.
    pub owner_share: usize,
    /// URL of a Redis in which servers share states and prefixes; it may be down at any time. See [`StateStore`].
    pub redis: Option<String>,
    /// How long Redis keeps what nobody uses.
    pub redis_expiry: Duration,
    /// URL of an object store for named states, shared by servers.
    pub object_store: Option<String>,
    /// Tuned initial states by name, for all owners.
    pub initial: Vec<(String, InitialState)>,
    /// A bound on what attention keeps of each sequence of a hybrid. States saved with another one are not seen.
    pub bound: Option<Cache>,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            slots: 32,
            waiting: 256,
            cache_bytes: 1 << 30,
            memory: 0,
            unread: 1 << 14,
            prefill_piece: 0,
            guesses: None,
            deterministic: false,
            stride: 512,
            folder: None,
            disk_bytes: 16 << 30,
            owner_share: 100,
            redis: None,
            redis_expiry: Duration::from_secs(7 * 24 * 3600),
            object_store: None,
            initial: Vec::new(),
            bound: None,
        }
    }
}

/// Without addresses, which may have a password in them.
impl fmt::Debug for EngineOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("EngineOptions");
        f.field("slots", &self.slots).field("waiting", &self.waiting).field("deterministic", &self.deterministic);
        f.field("cache_bytes", &self.cache_bytes).field("memory", &self.memory).field("folder", &self.folder);
        f.finish_non_exhaustive()
    }
}

/// What an engine has done and is doing. Counts are since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences in the batch, and those whose states are on their way from elsewhere.
    pub running: usize,
    /// Requests that wait for a slot.
    pub waiting: usize,
    /// Requests that came to their end.
    pub finished: u64,
    /// Requests whose stream was dropped before.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests refused because too many waited.
    pub refused: u64,
    /// Tokens that the model has read, written ones included.
    pub tokens_read: u64,
    /// Tokens that were written.
    pub tokens_written: u64,
    /// Requests that went on from a cached prefix.
    pub prefix_hits: u64,
    /// Tokens of prompts that were not read, as a state after them was cached.
    pub tokens_cached: u64,
    /// Steps of the model.
    pub steps: u64,
    /// Bytes of the states of running sequences.
    pub running_bytes: usize,
    /// Bytes of states kept in memory to go on from.
    pub cached_bytes: usize,
    /// The same on disk.
    pub disk_bytes: usize,
    /// States kept in memory or on disk.
    pub cached_states: usize,
}

impl Engine {
    /// Starts a thread that runs `model` on `ctx`.
    ///
    /// # Errors
    /// When the model has no state, an option is out of its range, memory runs out, or the folder cannot be used.
    pub fn start(ctx: Context, model: Arc<Model>, options: EngineOptions) -> Result<Engine, Error> {
        if model.config().architecture == Architecture::Transformer {
            return Err(anser_model::Error::Stateless.into());
        }
        if !(1..=Decoder::MOST_SLOTS).contains(&options.slots) {
            return Err(Error::State(format!("{} slots: there must be 1 to {}", options.slots, Decoder::MOST_SLOTS)));
        }
        let form = Form::new(&ctx, model.config(), options.bound)?;
        // States under a bound are not those without.
        let fingerprint = model.exact_fingerprint() + &options.bound.map_or_else(String::new, |b| json!(b).to_string());
        let store = StateStore::open(form, fingerprint, &options)?;
        let shared = Arc::new(Shared::new(&model, &options, store));
        let (ready, started) = std::sync::mpsc::channel();
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || run::run(&ctx, &model, &options, &of_thread, &ready))
            .map_err(|e| Error::State(format!("starting the engine's thread: {e}")))?;
        let handle = Arc::new(Handle { shared, thread: Mutex::new(Some(thread)) });
        started.recv().unwrap_or_else(|_| Err(Error::State("the engine's thread ended".into())))?;
        Ok(Engine { handle })
    }

    /// Queues a request. Dropping the stream cancels it. To go on from a named state waits for where names are; otherwise it returns at once.
    ///
    /// # Errors
    /// When it makes no sense, too many wait, the engine is ending or has failed, or names cannot be reached.
    pub fn submit(&self, request: Request) -> Result<Stream, Refused> {
        let shared = &self.handle.shared;
        let sampler = shared.check(&request)?;
        let begin = match &request.start {
            Start::Empty => Begin::default(),
            Start::State(saved) => {
                Begin { initial: None, history: saved.tokens.to_vec(), given: Some(saved.snapshot.clone()) }
            }
            Start::Named(name) => shared.store.begin(&request.owner, name).map_err(|e| match e {
                StateError::Unreachable(why) => Refused::Unreachable(why),
                e => Refused::Invalid(e.to_string()),
            })?,
        };
        let predicts = match &begin.given {
            Some(given) => !given.logits.is_empty(),
            None => !begin.history.is_empty(),
        };
        if !predicts && request.prompt.is_empty() {
            return Err(Refused::Invalid("the prompt is empty: give at least one token".into()));
        }
        // The prompt, the state and the end come besides.
        let (to, events) = mpsc::channel(shared.unread.saturating_add(3).min(Semaphore::MAX_PERMITS));
        shared.queue(Job::new(request, begin, sampler, to))?;
        Ok(Stream::new(events))
    }

    /// What it has done and is doing.
    pub fn stats(&self) -> Stats {
        self.handle.shared.stats()
    }

    /// The states that it keeps.
    pub fn states(&self) -> &StateStore {
        &self.handle.shared.store
    }

    /// Why it can answer nothing any more, if it is so: its device has failed, which is for good, or its thread has ended.
    pub fn failure(&self) -> Option<String> {
        self.handle.shared.failure()
    }

    /// Waits until it can answer nothing any more: why.
    pub async fn failed(&self) -> String {
        let mut failure = self.handle.shared.failure.subscribe();
        let why = failure.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        why.unwrap_or_default()
    }

    /// Refuses new requests and returns when those that it has taken, running and waiting, have ended.
    pub fn drain(&self) {
        self.handle.shared.drain();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close();
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(thread) = thread {
            // What it panicked with was printed there.
            let _ = thread.join();
        }
    }
}

/// Encryption of connections to shared states, of the same library for all.
#[cfg(any(feature = "redis", feature = "object-store"))]
fn install_crypto() {
    // It is there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
