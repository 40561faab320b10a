use super::EngineOptions;
use super::disk::Disk;
use super::kept::Kept;
use super::snapshot::{Form, Snapshot};
use super::tier::{Guarded, Head, Item, Named, Names, TierStats};
use super::workers::Workers;
use crate::{Error, InitialState};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard};
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
    store: Arc<Store>,
    /// One thread that writes, one change after the other.
    writer: Option<Workers<Store>>,
    /// Threads that look for snapshots outside memory.
    readers: Option<Workers<Store>>,
}

/// Bytes of snapshots that wait to be written at most; more are dropped.
const MOST_WAITING: usize = 256 << 20;

/// Threads that read.
const READERS: usize = 4;

struct Store {
    form: Form,
    /// What tells models apart, and bounds on what they keep.
    model: String,
    most: usize,
    most_on_disk: usize,
    /// Tuned initial states, and since when they are here.
    initial: BTreeMap<String, Arc<InitialState>>,
    started: SystemTime,
    /// Where names are if nowhere else.
    names: Guarded,
    disk: Option<Guarded>,
    redis: Option<Guarded>,
    objects: Option<Guarded>,
    kept: Mutex<Kept>,
    /// Bytes that wait to be written.
    waiting: AtomicUsize,
}

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
    /// It makes no sense, or there is no room.
    #[error("{0}")]
    Refused(String),
    /// Where it is cannot be reached.
    #[error("{0}")]
    Unreachable(String),
}

/// Checks a name: 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'.
fn check_name(name: &str) -> Result<(), String> {
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
    owner: String,
    root: Prefix,
    tokens: Vec<u32>,
    /// A named state that they go on from: after how many of them.
    named: Option<usize>,
}

/// What a search gave.
#[derive(Default)]
pub(super) struct Found {
    pub hit: Option<Hit>,
    /// Not on disk, though they should have been.
    lost: Vec<Key>,
}

impl StateStore {
    /// An empty store, or what the folder holds. `model` tells apart what has other states.
    pub(super) fn open(form: Form, model: String, options: &EngineOptions) -> Result<StateStore, Error> {
        let disk = options.folder.as_deref().map(|f| Disk::open(f, model.clone())).transpose().map_err(Error::State)?;
        let kept = match &disk {
            None => Kept::default(),
            Some(disk) => Kept::read(disk).map_err(|e| Error::State(format!("reading the folder of states: {e}")))?,
        };
        let mut initial = BTreeMap::new();
        for (name, state) in &options.initial {
            check_name(name).map_err(Error::State)?;
            if initial.insert(name.clone(), Arc::new(state.clone())).is_some() {
                return Err(Error::State(format!("there are two initial states {name}")));
            }
        }
        let space = hex(&Sha256::digest(&model)[..16]);
        let store = Arc::new(Store {
            form,
            model,
            initial,
            started: SystemTime::now(),
            most: options.cache_bytes,
            most_on_disk: options.disk_bytes,
            names: Guarded::new("memory", Names::default()),
            disk: disk.map(|d| Guarded::new("disk", d)),
            redis: redis(options, &space).map_err(Error::State)?,
            objects: objects(options, &space).map_err(Error::State)?,
            kept: Mutex::new(kept),
            waiting: AtomicUsize::new(0),
        });
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
        Ok(initial.chain(names.into_iter().map(|(name, head)| info(&name, head))).collect())
    }

    /// One of them. Waits for where names are.
    ///
    /// # Errors
    /// When there is none of this name, or names cannot be reached.
    pub fn get(&self, owner: &str, name: &str) -> Result<StateInfo, StateError> {
        match self.store.initial.get(name) {
            Some(initial) => Ok(self.store.info(name, initial)),
            None => Ok(info(name, self.store.named(owner, name)?.head())),
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
    fn later(&self, job: impl FnOnce(&Store) + Send + 'static) {
        match &self.writer {
            None => job(&self.store),
            Some(writer) => writer.send(job),
        }
    }

    fn now<T: Send + 'static>(
        &self, job: impl FnOnce(&Store) -> Result<T, StateError> + Send + 'static,
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
            return Ok(Begin { initial: Some(initial.clone()), history: Vec::new() });
        }
        let named = self.store.named(owner, name)?;
        let of = |hash| self.store.initial.values().find(|i| i.hash() == hash).cloned();
        let gone =
            || StateError::Refused(format!("state {name} began from an initial state that is not here any more"));
        let initial = named.initial.map(|hash| of(hash).ok_or_else(gone)).transpose()?;
        Ok(Begin { initial, history: named.tokens.to_vec() })
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
        match &self.readers {
            Some(readers) => readers.send(move |store| then(store.search(&search))),
            None => then(self.store.search(&search)),
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
    fn write(&self, snapshot: Arc<Snapshot>, write: impl FnOnce(&Store, Arc<Snapshot>) + Send + 'static) -> bool {
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

fn info(name: &str, head: Head) -> StateInfo {
    StateInfo { name: name.into(), tokens: head.tokens, bytes: head.bytes, created: head.created, initial: false }
}

#[cfg(feature = "redis")]
fn redis(options: &EngineOptions, space: &str) -> Result<Option<Guarded>, String> {
    let redis = options.redis.as_ref().map(|url| super::redis::Redis::new(url, space, options.redis_expiry));
    Ok(redis.transpose()?.map(|r| Guarded::new("redis", r)))
}

#[cfg(not(feature = "redis"))]
fn redis(options: &EngineOptions, _: &str) -> Result<Option<Guarded>, String> {
    options.redis.as_ref().map_or(Ok(None), |_| Err("this program was built without Redis".into()))
}

#[cfg(feature = "object-store")]
fn objects(options: &EngineOptions, space: &str) -> Result<Option<Guarded>, String> {
    let objects = options.object_store.as_ref().map(|url| super::object::Objects::new(url, space));
    Ok(objects.transpose()?.map(|o| Guarded::new("object_store", o)))
}

#[cfg(not(feature = "object-store"))]
fn objects(options: &EngineOptions, _: &str) -> Result<Option<Guarded>, String> {
    options.object_store.as_ref().map_or(Ok(None), |_| Err("this program was built without object stores".into()))
}

/// With a folder or something that is shared the writer alone makes changes: what is on disk changes nowhere else.
impl Store {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The places beyond memory, the nearest first.
    fn tiers(&self) -> impl Iterator<Item = &Guarded> {
        [&self.disk, &self.redis, &self.objects].into_iter().flatten()
    }

    /// Those that other servers use too.
    fn shared(&self) -> impl Iterator<Item = &Guarded> {
        [&self.redis, &self.objects].into_iter().flatten()
    }

    fn info(&self, name: &str, initial: &InitialState) -> StateInfo {
        StateInfo { name: name.into(), tokens: 0, bytes: initial.bytes(), created: self.started, initial: true }
    }

    fn is_shared(&self) -> bool {
        self.shared().next().is_some()
    }

    /// Where names are.
    fn home(&self) -> &Guarded {
        self.tiers().last().unwrap_or(&self.names)
    }

    fn named(&self, owner: &str, name: &str) -> Result<Named, StateError> {
        let missing = || StateError::Missing(format!("there is no state {name:?}"));
        self.home().call(|t| t.name(owner, name))?.ok_or_else(missing)
    }

    /// The snapshot after most of the tokens, wherever it is.
    fn search(&self, search: &Search) -> Found {
        let Search { owner, root, tokens, named } = search;
        // After how many tokens there may be one.
        let mut lengths: BTreeSet<usize> = self.kept().lengths.keys().chain(named).copied().collect();
        let redis = self.redis.as_ref();
        lengths.extend(redis.and_then(|r| r.call(|t| t.lengths(owner)).ok()).into_iter().flatten());
        let (mut prefix, mut at) = (root.clone(), 0);
        let candidate = |len: usize| {
            prefix.push(&tokens[at..len]);
            at = len;
            (len, prefix.clone(), prefix.key())
        };
        let candidates: Vec<(usize, Prefix, Key)> = lengths.range(1..=tokens.len()).copied().map(candidate).collect();
        let keys: Vec<Key> = candidates.iter().map(|c| c.2).collect();
        let in_redis = redis.and_then(|r| r.call(|t| t.has(&keys)).ok()).unwrap_or_else(|| vec![false; keys.len()]);
        let mut found = Found::default();
        for ((read, prefix, key), in_redis) in candidates.into_iter().zip(in_redis).rev() {
            let in_memory = self.kept().touch(&key);
            let snapshot = in_memory.or_else(|| self.read(&key, in_redis, *named == Some(read), &mut found.lost));
            // After all tokens a prediction is wanted.
            if let Some(snapshot) = snapshot.filter(|s| read < tokens.len() || !s.logits.is_empty()) {
                found.hit = Some(Hit { read, prefix, snapshot });
                break;
            }
        }
        found
    }

    /// A snapshot from beyond memory. One that is damaged is as good as none: its tokens are read again.
    fn read(&self, key: &Key, in_redis: bool, named: bool, lost: &mut Vec<Key>) -> Option<Arc<Snapshot>> {
        let on_disk = self.kept().entries.get(key).is_some_and(|e| e.disk.is_some());
        let tiers = [(on_disk, &self.disk), (in_redis, &self.redis), (named, &self.objects)];
        for tier in tiers.into_iter().filter(|(wanted, _)| *wanted).filter_map(|(_, tier)| tier.as_ref()) {
            let Ok(bytes) = tier.call(|t| t.get(key)) else { continue };
            if let Some(bytes) = bytes {
                if let Some(snapshot) = Snapshot::decode(&self.form, &bytes) {
                    return Some(Arc::new(snapshot));
                }
                eprintln!("a state in {} is damaged", tier.stats().tier);
            }
            if self.disk.as_ref().is_some_and(|disk| std::ptr::eq(disk, tier)) {
                lost.push(*key);
            }
        }
        None
    }

    /// Writes a snapshot that memory had no room for to disk.
    fn spill(&self, key: Key, len: usize, snapshot: &Snapshot) {
        let Some(disk) = &self.disk else { return };
        if self.kept().entries.get(&key).is_none_or(|e| e.disk.is_some()) {
            return;
        }
        let (bytes, logits) = (snapshot.encode(), !snapshot.logits.is_empty());
        // Named states may have taken all of it.
        let dropped = self.kept().make_room(bytes.len(), self.most_on_disk, None);
        let written = dropped.is_some_and(|dropped| {
            let item = Item { owner: "", key, len, logits, bytes: &bytes };
            disk.call(|t| t.remove(&dropped).and_then(|()| t.put(&item))).is_ok()
        });
        let mut kept = self.kept();
        if written {
            kept.reach_disk(key, len, logits, bytes.len());
        } else {
            kept.leave_disk(&key);
        }
    }

    /// Writes a prefix to where other servers find it.
    fn share(&self, owner: &str, key: Key, len: usize, snapshot: &Snapshot) {
        let Some(redis) = self.redis.as_ref().filter(|r| r.is_open()) else { return };
        let bytes = snapshot.encode();
        // Who fails is down, which is said elsewhere; nothing else is lost.
        let _ = redis.call(|t| t.put(&Item { owner, key, len, logits: !snapshot.logits.is_empty(), bytes: &bytes }));
    }

    fn save(&self, owner: &str, name: &str, mut named: Named, snapshot: &Arc<Snapshot>) -> Result<(), StateError> {
        let old = self.home().call(|t| t.name(owner, name))?;
        named.branched = old.as_ref().is_some_and(|old| old.key == named.key && old.branched);
        let no_room = || {
            StateError::Refused(format!("state {name}: there is no room for its {} bytes; delete others", named.bytes))
        };
        let (key, len) = (named.key, named.tokens.len());
        if self.is_shared() {
            let bytes = snapshot.encode();
            let item = Item { owner, key, len, logits: true, bytes: &bytes };
            self.home().call(|t| t.put(&item).and_then(|()| t.put_name(owner, name, &named)))?;
            if let (Some(redis), Some(_)) = (&self.redis, &self.objects) {
                let _ = redis.call(|t| t.put(&item));
            }
            if let Some(old) = old.filter(|old| old.key != key) {
                self.unshare(&old);
            }
            return Ok(());
        }
        if let Some(disk) = &self.disk {
            let kept = self.kept();
            let written = kept.entries.get(&key).is_some_and(|e| e.disk.is_some());
            let last = old.as_ref().map(|old| old.key).filter(|old| *old != key && kept.has_one_name(old));
            drop(kept);
            let bytes = if written { Vec::new() } else { snapshot.encode() };
            let dropped = self.kept().make_room(bytes.len(), self.most_on_disk, last).ok_or_else(no_room)?;
            // In this order nothing is lost whenever it ends.
            disk.call(|t| {
                if !written {
                    t.put(&Item { owner, key, len, logits: true, bytes: &bytes })?;
                }
                t.put_name(owner, name, &named)?;
                t.remove(&dropped)
            })?;
            let mut kept = self.kept();
            if !written {
                kept.reach_disk(key, len, true, bytes.len());
            }
            kept.pin(key);
            if let Some(old) = &old {
                kept.unpin(&old.key);
            }
            return Ok(());
        }
        let mut kept = self.kept();
        // There again if it was dropped meanwhile.
        kept.insert(key, len, snapshot.clone());
        kept.pin(key);
        if let Some(old) = &old {
            kept.unpin(&old.key);
        }
        kept.shrink(self.most).iter().for_each(|(key, ..)| kept.forget(key));
        if kept.bytes > self.most {
            old.iter().for_each(|old| kept.pin(old.key));
            kept.unpin(&key);
            kept.shrink(self.most).iter().for_each(|(key, ..)| kept.forget(key));
            return Err(no_room());
        }
        drop(kept);
        self.names.call(|t| t.put_name(owner, name, &named))
    }

    fn branch(&self, owner: &str, from: &str, to: &str) -> Result<StateInfo, StateError> {
        let named = self.named(owner, from)?;
        if self.home().call(|t| t.name(owner, to))?.is_some() {
            return Err(StateError::Refused(format!(
                "there is a state {to} already: delete it or choose another name"
            )));
        }
        let branch = Named { created: SystemTime::now(), branched: true, ..named.clone() };
        self.home().call(|t| {
            if !named.branched {
                t.put_name(owner, from, &Named { branched: true, ..named.clone() })?;
            }
            t.put_name(owner, to, &branch)
        })?;
        if !self.is_shared() {
            self.kept().pin(branch.key);
        }
        Ok(info(to, branch.head()))
    }

    fn delete(&self, owner: &str, name: &str) -> Result<(), StateError> {
        let old = self.named(owner, name)?;
        self.home().call(|t| t.remove_name(owner, name))?;
        if self.is_shared() {
            self.unshare(&old);
        } else if self.kept().unpin(&old.key) {
            self.disk.as_ref().map_or(Ok(()), |disk| disk.call(|t| t.remove(&[old.key])))?;
            self.kept().forget(&old.key);
        }
        Ok(())
    }

    /// Removes the snapshot of a name that is gone, unless another name may stand for it: then Redis lets it expire, and what rules an object store has.
    fn unshare(&self, old: &Named) {
        if old.branched {
            return;
        }
        self.kept().forget(&old.key);
        for tier in self.shared() {
            let _ = tier.call(|t| t.remove(&[old.key]));
        }
    }
}
