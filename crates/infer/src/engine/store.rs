use super::EngineOptions;
use super::snapshot::{Form, Snapshot};
use super::storage::Storage;
use super::tier::{Guarded, Head, Named, TierStats};
use super::workers::Workers;
use crate::{Error, InitialState};
use sha2::{Digest, Sha256};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::SystemTime;

/// What names a state: a hash of the model, the owner and all tokens since the beginning. Whoever has the same has the same state.
pub(super) type Key = [u8; 32];

/// The key of a sequence that grows.
#[derive(Clone)]
pub(super) struct Prefix(Sha256);

impl Prefix {
    pub fn push(&mut self, tokens: &[u32]) {
        tokens.iter().for_each(|t| self.0.update(t.to_le_bytes()));
    }

    pub fn key(&self) -> Key {
        self.0.clone().finalize().into()
    }
}

/// In hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// States to go on from: those that clients gave a name, and prefixes of prompts that came before. All belong to an owner.
///
/// A state is kept once whatever names it has, under a hash of the tokens that lead to it, so that to branch copies nothing. When memory runs out the
/// least recently used go to the folder, and when that is full, or there is none, they are dropped. What has a name stays. Redis gets every state too, so that
/// all servers that share it go on from each other's; an object store gets those with names. Names are in one place, the most lasting that there is: the object
/// store, else Redis, the folder, memory. Where names are shared, memory and the folder drop what they have no room for, named or not.
pub struct StateStore {
    store: Arc<Storage>,
    /// One thread that writes, one change after the other.
    writer: Option<Workers<Storage>>,
    /// Threads that look for snapshots outside memory.
    readers: Option<Workers<Storage>>,
}

/// Bytes of snapshots that wait to be written at most; more are dropped.
const MOST_WAITING: usize = 256 << 20;

/// Threads that read.
const READERS: usize = 4;

/// A named state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateInfo {
    /// Its name.
    pub name: String,
    /// Tokens that led to it.
    pub tokens: usize,
    /// Its size in memory.
    pub bytes: usize,
    /// When it was given this name.
    pub created: SystemTime,
    /// Whether it is an initial state, which everybody sees and nobody changes.
    pub initial: bool,
}

/// Why something was not done with a named state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// There is none of this name.
    #[error("{0}")]
    Missing(String),
    /// There is one of this name already.
    #[error("{0}")]
    Taken(String),
    /// It makes no sense, or there is no room.
    #[error("{0}")]
    Refused(String),
    /// Where it is cannot be reached.
    #[error("{0}")]
    Unreachable(String),
}

/// Checks a name: 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if (1..=64).contains(&name.len()) && name.chars().all(good) {
        return Ok(());
    }
    Err(format!("state name {name:?}: use 1 to 64 letters, digits, '.', '_' and '-'"))
}

/// What a request goes on from.
#[derive(Default)]
pub(super) struct Begin {
    pub initial: Option<Arc<InitialState>>,
    /// Tokens since then.
    pub history: Vec<u32>,
    /// The state after them, if the request came with it.
    pub given: Option<Arc<Snapshot>>,
}

/// Where a sequence can go on from.
pub(super) struct Hit {
    /// After how many tokens, and their key.
    pub read: usize,
    pub prefix: Prefix,
    pub snapshot: Arc<Snapshot>,
}

/// What a look into memory gave.
pub(super) enum Look {
    /// The best that there is.
    Here(Option<Hit>),
    /// There may be something better elsewhere.
    Elsewhere(Search),
}

/// A search for the snapshot after most of some tokens.
pub(super) struct Search {
    pub owner: String,
    pub root: Prefix,
    pub tokens: Vec<u32>,
    /// A named state that they go on from: after how many of them.
    pub named: Option<usize>,
}

/// What a search gave.
#[derive(Default)]
pub(super) struct Found {
    pub hit: Option<Hit>,
    /// Not on disk, though they should have been.
    pub lost: Vec<Key>,
}

impl StateStore {
    /// An empty store, or what the folder holds. `model` tells apart what has other states.
    pub(super) fn open(form: Form, model: String, options: &EngineOptions) -> Result<StateStore, Error> {
        let store = Arc::new(Storage::open(form, model, options).map_err(Error::State)?);
        let start = |name, count| {
            let any = store.tiers().next().is_some();
            any.then(|| Workers::start(&store, name, count)).transpose()
        };
        let failed = |e| Error::State(format!("starting a thread: {e}"));
        let (writer, readers) = (start("states", 1).map_err(failed)?, start("states-read", READERS).map_err(failed)?);
        Ok(StateStore { store, writer, readers })
    }

    /// The initial states and an owner's named states, each by name. Waits for where names are.
    ///
    /// # Errors
    /// When that cannot be reached.
    pub fn list(&self, owner: &str) -> Result<Vec<StateInfo>, StateError> {
        let names = self.store.home().call(|t| t.names(owner))?;
        let initial = self.store.initial.iter().map(|(name, initial)| self.store.info(name, initial));
        Ok(initial.chain(names.into_iter().map(|(name, head)| StateInfo::new(&name, head))).collect())
    }

    /// One of them. Waits for where names are.
    ///
    /// # Errors
    /// When there is none of this name, or names cannot be reached.
    pub fn get(&self, owner: &str, name: &str) -> Result<StateInfo, StateError> {
        match self.store.initial.get(name) {
            Some(initial) => Ok(self.store.info(name, initial)),
            None => Ok(StateInfo::new(name, self.store.named(owner, name)?.head())),
        }
    }

    /// Gives a state a second name, to go on from it in two ways. Waits for where names are.
    ///
    /// # Errors
    /// When there is none, the second name is taken or not allowed, or names cannot be reached.
    pub fn branch(&self, owner: &str, from: &str, to: &str) -> Result<StateInfo, StateError> {
        self.check_name(to)?;
        self.not_initial(from)?;
        let (owner, from, to) = (owner.to_string(), from.to_string(), to.to_string());
        self.now(move |store| store.branch(&owner, &from, &to))
    }

    /// Deletes a named state. Waits for where names are.
    ///
    /// # Errors
    /// When there is none of this name, or names cannot be reached.
    pub fn delete(&self, owner: &str, name: &str) -> Result<(), StateError> {
        self.not_initial(name)?;
        let (owner, name) = (owner.to_string(), name.to_string());
        self.now(move |store| store.delete(&owner, &name))
    }

    /// Checks a name to be given.
    pub(super) fn check_name(&self, name: &str) -> Result<(), StateError> {
        check_name(name).map_err(StateError::Refused)?;
        self.not_initial(name)
    }

    fn not_initial(&self, name: &str) -> Result<(), StateError> {
        if !self.store.initial.contains_key(name) {
            return Ok(());
        }
        Err(StateError::Refused(format!("{name} is an initial state, which stays as it is: choose another name")))
    }

    /// How the places beyond memory are.
    pub fn tiers(&self) -> Vec<TierStats> {
        self.store.tiers().map(Guarded::stats).collect()
    }

    /// Waits until everything is written that is to be.
    pub(super) fn flush(&self) {
        // Only a thread that has ended could fail.
        let _ = self.now(|_| Ok(()));
    }

    /// Does something with the store after all changes so far.
    fn later(&self, job: impl FnOnce(&Storage) + Send + 'static) {
        match &self.writer {
            None => job(&self.store),
            Some(writer) => writer.send(job),
        }
    }

    fn now<T: Send + 'static>(
        &self, job: impl FnOnce(&Storage) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, StateError> {
        let (to, result) = channel();
        self.later(move |store| to.send(job(store)).unwrap_or_default());
        let ended = || StateError::Refused("the thread that writes states has ended".into());
        result.recv().unwrap_or_else(|_| Err(ended()))
    }

    /// How states look.
    pub(super) fn form(&self) -> &Form {
        &self.store.form
    }

    /// What a name stands for. Waits for where names are.
    pub(super) fn begin(&self, owner: &str, name: &str) -> Result<Begin, StateError> {
        if let Some(initial) = self.store.initial.get(name) {
            return Ok(Begin { initial: Some(initial.clone()), ..Begin::default() });
        }
        let named = self.store.named(owner, name)?;
        if named.tokens.iter().any(|&t| t as usize >= self.form().vocab) {
            return Err(StateError::Refused(format!("state {name} is damaged: it has tokens that the model hasn't")));
        }
        let of = |hash| self.store.initial.values().find(|i| i.hash() == hash).cloned();
        let gone =
            || StateError::Refused(format!("state {name} began from an initial state that is not here any more"));
        let initial = named.initial.map(|hash| of(hash).ok_or_else(gone)).transpose()?;
        Ok(Begin { initial, history: named.tokens.to_vec(), given: None })
    }

    /// The beginning of an owner's sequences.
    pub(super) fn root(&self, owner: &str, initial: Option<&InitialState>) -> Prefix {
        let mut sha = Sha256::new();
        for part in [&self.store.model, owner] {
            sha.update((part.len() as u64).to_le_bytes());
            sha.update(part);
        }
        // Nothing but an initial state begins with a part of this length.
        if let Some(initial) = initial {
            sha.update(u64::MAX.to_le_bytes());
            sha.update(initial.hash());
        }
        Prefix(sha)
    }

    /// Looks for the snapshot after most of the tokens, which after all of them must have logits. `named`: a named state is after so many of them.
    pub(super) fn look(&self, owner: &str, root: Prefix, tokens: &[u32], named: Option<usize>) -> Look {
        let mut kept = self.store.kept();
        let mut along = kept.along(&root, tokens);
        let best = along.iter().rposition(|(.., in_memory)| *in_memory);
        let on_disk = best.map_or(!along.is_empty(), |best| best + 1 < along.len());
        let hit = best.and_then(|i| {
            let (read, prefix, _) = along.swap_remove(i);
            Some(Hit { read, snapshot: kept.touch(&prefix.key())?, prefix })
        });
        drop(kept);
        let read = hit.as_ref().map_or(0, |h| h.read);
        let open = |tier: &Option<Guarded>| tier.as_ref().is_some_and(Guarded::is_open);
        let in_redis = read < tokens.len() && open(&self.store.redis);
        let in_objects = named.is_some_and(|named| read < named) && open(&self.store.objects);
        if on_disk || in_redis || in_objects {
            return Look::Elsewhere(Search { owner: owner.into(), root, tokens: tokens.to_vec(), named });
        }
        Look::Here(hit)
    }

    /// Searches in another thread, and calls `then` there.
    pub(super) fn search(&self, search: Search, then: impl FnOnce(Found) + Send + 'static) {
        // Whatever happens the request goes on.
        let found = move |store: &Storage| {
            then(catch_unwind(AssertUnwindSafe(|| store.search(&search))).unwrap_or_default());
        };
        match &self.readers {
            Some(readers) => readers.send(found),
            None => found(&self.store),
        }
    }

    /// Takes note of what was found.
    pub(super) fn note(&self, found: &Found) {
        if !found.lost.is_empty() {
            let lost = found.lost.clone();
            self.later(move |store| lost.iter().for_each(|key| store.kept().leave_disk(key)));
        }
        if let Some(hit) = &found.hit {
            self.keep(hit.prefix.key(), hit.read, hit.snapshot.clone());
        }
    }

    /// Whether there is room for anything that has no name.
    pub(super) fn keeps(&self) -> bool {
        self.store.most > 0 || self.store.disk.is_some() || self.store.redis.is_some()
    }

    /// Keeps a snapshot of an owner after `len` tokens for a while.
    pub(super) fn insert(&self, owner: &str, key: Key, len: usize, snapshot: Arc<Snapshot>) {
        let new = self.keep(key, len, snapshot.clone());
        if new && self.store.redis.as_ref().is_some_and(Guarded::is_open) {
            let owner = owner.to_string();
            self.write(snapshot, move |store, snapshot| store.share(&owner, key, len, &snapshot));
        }
    }

    /// Puts a snapshot into memory, and what memory has no more room for to disk: whether it is new.
    fn keep(&self, key: Key, len: usize, snapshot: Arc<Snapshot>) -> bool {
        let mut kept = self.store.kept();
        let new = kept.insert(key, len, snapshot);
        let out = kept.shrink(self.store.most);
        drop(kept);
        for (key, len, snapshot) in out {
            let waits = self.store.disk.is_some()
                && self.write(snapshot, move |store, snapshot| store.spill(key, len, &snapshot));
            if !waits {
                self.store.kept().forget(&key);
            }
        }
        new
    }

    /// Has a snapshot written, unless too much waits already.
    fn write(&self, snapshot: Arc<Snapshot>, write: impl FnOnce(&Storage, Arc<Snapshot>) + Send + 'static) -> bool {
        let bytes = snapshot.bytes();
        let before = self.store.waiting.fetch_add(bytes, Ordering::Relaxed);
        let room = before == 0 || before + bytes <= MOST_WAITING;
        if room {
            self.later(move |store| {
                write(store, snapshot);
                store.waiting.fetch_sub(bytes, Ordering::Relaxed);
            });
        } else {
            self.store.waiting.fetch_sub(bytes, Ordering::Relaxed);
        }
        room
    }

    /// Gives a snapshot a name, which is taken from what had it; calls `done` when that is safe. It is after these tokens from an initial state.
    pub(super) fn save(
        &self, owner: &str, name: &str, key: Key, (initial, tokens): (Option<Arc<InitialState>>, &[u32]),
        snapshot: Arc<Snapshot>, done: impl FnOnce(Result<(), StateError>) + Send + 'static,
    ) {
        let (bytes, created, initial) = (snapshot.bytes(), SystemTime::now(), initial.map(|i| i.hash()));
        let named = Named { key, tokens: tokens.into(), bytes, created, branched: false, initial };
        self.keep(key, tokens.len(), snapshot.clone());
        let (owner, name) = (owner.to_string(), name.to_string());
        self.later(move |store| done(store.save(&owner, &name, named, &snapshot)));
    }

    /// How many snapshots there are, and their bytes in memory and on disk.
    pub(super) fn size(&self) -> (usize, usize, usize) {
        let kept = self.store.kept();
        (kept.entries.len(), kept.bytes, kept.bytes_on_disk)
    }
}

impl StateInfo {
    /// Of a named state.
    pub(super) fn new(name: &str, head: Head) -> StateInfo {
        StateInfo { name: name.into(), tokens: head.tokens, bytes: head.bytes, created: head.created, initial: false }
    }
}
