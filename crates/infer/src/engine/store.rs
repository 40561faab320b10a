use super::EngineOptions;
use super::disk::Disk;
use super::snapshot::{Form, Snapshot};
use crate::Error;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
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

/// States to go on from: those that clients gave a name, and prefixes of prompts that came before. All belong to an owner.
///
/// A state is kept once whatever names it has, under a hash of the tokens that lead to it, so that to branch copies nothing. When memory runs out the
/// least recently used go to the folder, and when that is full, or there is none, they are dropped. What has a name stays.
pub struct StateStore {
    store: Arc<Store>,
    writer: Option<Writer>,
}

/// The thread that writes to disk, one change after the other, so that the engine doesn't wait.
struct Writer {
    jobs: Option<Sender<Job>>,
    waiting: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce(&Store) + Send>;

/// Snapshots that wait for the disk at most; more are dropped.
const MOST_WAITING: usize = 8;

struct Store {
    form: Form,
    /// What tells models apart, and bounds on what they keep.
    model: String,
    most: usize,
    most_on_disk: usize,
    disk: Option<Disk>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    entries: HashMap<Key, Entry>,
    /// Keys by last use.
    uses: BTreeMap<u64, Key>,
    clock: u64,
    /// Bytes in memory and on disk.
    bytes: usize,
    bytes_on_disk: usize,
    /// How many snapshots there are after so many tokens.
    lengths: BTreeMap<usize, usize>,
    /// By owner, then name.
    names: HashMap<String, BTreeMap<String, Named>>,
    /// How many names a state has, for any model.
    pins: HashMap<Key, usize>,
}

/// A snapshot in memory, on disk or both; in neither while it waits for the disk.
struct Entry {
    memory: Option<Arc<Snapshot>>,
    /// Its size there.
    disk: Option<usize>,
    len: usize,
    logits: bool,
    used: u64,
}

/// What a name stands for.
#[derive(Clone)]
pub(super) struct Named {
    pub key: Key,
    pub tokens: Arc<[u32]>,
    pub bytes: usize,
    pub created: SystemTime,
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
}

/// Checks a name: 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if (1..=64).contains(&name.len()) && name.chars().all(good) {
        return Ok(());
    }
    Err(format!("state name {name:?}: use 1 to 64 letters, digits, '.', '_' and '-'"))
}

impl StateStore {
    /// An empty store, or what the folder holds. `model` tells apart what has other states.
    pub(super) fn open(form: Form, model: String, options: &EngineOptions) -> Result<StateStore, Error> {
        let disk = options.folder.as_deref().map(Disk::open).transpose().map_err(Error::State)?;
        let kept = match &disk {
            None => Kept::default(),
            Some(disk) => {
                Kept::read(disk, &model).map_err(|e| Error::State(format!("reading the folder of states: {e}")))?
            }
        };
        let (most, most_on_disk) = (options.cache_bytes, options.disk_bytes);
        let has_disk = disk.is_some();
        let store = Arc::new(Store { form, model, most, most_on_disk, disk, kept: Mutex::new(kept) });
        let start = || Writer::start(store.clone()).map_err(|e| Error::State(format!("starting a thread: {e}")));
        let writer = has_disk.then(start).transpose()?;
        Ok(StateStore { store, writer })
    }

    /// An owner's named states, by name.
    pub fn list(&self, owner: &str) -> Vec<StateInfo> {
        let kept = self.store.kept();
        kept.names.get(owner).into_iter().flatten().map(|(name, named)| named.info(name)).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn get(&self, owner: &str, name: &str) -> Result<StateInfo, String> {
        self.store.kept().named(owner, name).map(|n| n.info(name))
    }

    /// Gives a state a second name, to go on from it in two ways. Waits for the disk.
    ///
    /// # Errors
    /// When there is none, the second name is taken or not allowed, or writing fails.
    pub fn branch(&self, owner: &str, from: &str, to: &str) -> Result<StateInfo, String> {
        check_name(to)?;
        let (owner, from, to) = (owner.to_string(), from.to_string(), to.to_string());
        self.now(move |store| store.branch(&owner, &from, &to))
    }

    /// Deletes a named state. Waits for the disk.
    ///
    /// # Errors
    /// When there is none of this name, or writing fails.
    pub fn delete(&self, owner: &str, name: &str) -> Result<(), String> {
        let (owner, name) = (owner.to_string(), name.to_string());
        self.now(move |store| store.delete(&owner, &name))
    }

    /// Waits until everything is on disk that is to go there.
    pub(super) fn flush(&self) {
        // Only a thread that has ended could fail.
        let _ = self.now(|_| Ok(()));
    }

    /// Does something with the store after all changes so far.
    fn later(&self, job: impl FnOnce(&Store) + Send + 'static) {
        match self.writer.as_ref().and_then(|w| Some((w, w.jobs.as_ref()?))) {
            None => job(&self.store),
            Some((writer, jobs)) => {
                writer.waiting.fetch_add(1, Ordering::Relaxed);
                // A thread that has ended has said why.
                let _ = jobs.send(Box::new(job));
            }
        }
    }

    fn now<T: Send + 'static>(
        &self, job: impl FnOnce(&Store) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let (to, result) = channel();
        self.later(move |store| to.send(job(store)).unwrap_or_default());
        result.recv().unwrap_or_else(|_| Err("the thread that writes states has ended".into()))
    }

    /// How states look.
    pub(super) fn form(&self) -> &Form {
        &self.store.form
    }

    /// The tokens that led to a named state.
    pub(super) fn tokens(&self, owner: &str, name: &str) -> Result<Vec<u32>, String> {
        self.store.kept().named(owner, name).map(|n| n.tokens.to_vec())
    }

    /// The beginning of an owner's sequences.
    pub(super) fn root(&self, owner: &str) -> Prefix {
        let mut sha = Sha256::new();
        for part in [&self.store.model, owner] {
            sha.update((part.len() as u64).to_le_bytes());
            sha.update(part);
        }
        Prefix(sha)
    }

    /// The snapshot after most of the tokens, which after all of them must have logits: how many tokens it is after, and their key.
    pub(super) fn longest(&self, owner: &str, tokens: &[u32]) -> Option<(usize, Arc<Snapshot>, Prefix)> {
        let (mut prefix, mut at, mut found) = (self.root(owner), 0, Vec::new());
        let kept = self.store.kept();
        for &len in kept.lengths.range(..=tokens.len()).map(|(len, _)| len) {
            prefix.push(&tokens[at..len]);
            at = len;
            let usable = |e: &Entry| e.is_there() && (len < tokens.len() || e.logits);
            if kept.entries.get(&prefix.key()).is_some_and(usable) {
                found.push((len, prefix.clone()));
            }
        }
        drop(kept);
        found.into_iter().rev().find_map(|(len, prefix)| Some((len, self.fetch(prefix.key(), len)?, prefix)))
    }

    /// A snapshot from memory or disk.
    fn fetch(&self, key: Key, len: usize) -> Option<Arc<Snapshot>> {
        if let Some(snapshot) = self.store.kept().touch(&key) {
            return Some(snapshot);
        }
        match self.store.read(&key) {
            Ok(snapshot) => {
                self.insert(key, len, snapshot.clone());
                Some(snapshot)
            }
            Err(reason) => {
                // Its tokens are read again instead.
                eprintln!("a state on disk cannot be used: {reason}");
                self.later(move |store| store.kept().leave_disk(&key));
                None
            }
        }
    }

    /// Keeps a snapshot after `len` tokens for a while.
    pub(super) fn insert(&self, key: Key, len: usize, snapshot: Arc<Snapshot>) {
        let mut kept = self.store.kept();
        kept.insert(key, len, snapshot);
        for (key, len, snapshot) in kept.shrink(self.store.most) {
            let waiting = self.writer.as_ref().map_or(MOST_WAITING, |w| w.waiting.load(Ordering::Relaxed));
            if waiting < MOST_WAITING {
                self.later(move |store| store.spill(key, len, &snapshot));
            } else {
                kept.forget(&key);
            }
        }
    }

    /// Gives a snapshot a name, which is taken from what had it; calls `done` when that is safe.
    pub(super) fn save(
        &self, owner: &str, name: &str, key: Key, tokens: &[u32], snapshot: Arc<Snapshot>,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) {
        let named = Named { key, tokens: tokens.into(), bytes: snapshot.bytes(), created: SystemTime::now() };
        self.insert(key, tokens.len(), snapshot.clone());
        let (owner, name) = (owner.to_string(), name.to_string());
        self.later(move |store| done(store.save(&owner, &name, named, &snapshot)));
    }

    /// How many snapshots there are, and their bytes in memory and on disk.
    pub(super) fn size(&self) -> (usize, usize, usize) {
        let kept = self.store.kept();
        (kept.entries.len(), kept.bytes, kept.bytes_on_disk)
    }
}

impl Writer {
    fn start(store: Arc<Store>) -> std::io::Result<Writer> {
        let (jobs, queue) = channel::<Job>();
        let waiting = Arc::new(AtomicUsize::new(0));
        let counted = waiting.clone();
        let work = move || {
            for job in queue {
                job(&store);
                counted.fetch_sub(1, Ordering::Relaxed);
            }
        };
        let thread = std::thread::Builder::new().name("states".into()).spawn(work)?;
        Ok(Writer { jobs: Some(jobs), waiting, thread: Some(thread) })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // What it panicked with was printed there.
            let _ = thread.join();
        }
    }
}

/// Changes. With a folder the writer alone makes them: what is on disk changes nowhere else.
impl Store {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn read(&self, key: &Key) -> Result<Arc<Snapshot>, String> {
        let disk = self.disk.as_ref().ok_or("there is no folder")?;
        let bytes = disk.read(key).map_err(|e| e.to_string())?.ok_or("it is gone")?;
        Ok(Arc::new(Snapshot::decode(&self.form, &bytes).ok_or("it is damaged")?))
    }

    /// Writes a snapshot that memory had no room for.
    fn spill(&self, key: Key, len: usize, snapshot: &Snapshot) {
        let Some(disk) = &self.disk else { return };
        if self.kept().entries.get(&key).is_none_or(|e| e.disk.is_some()) {
            return;
        }
        let bytes = snapshot.encode();
        let dropped = self.kept().make_room(bytes.len(), self.most_on_disk, None);
        let result = match &dropped {
            Some(dropped) => disk.change(|t| {
                t.remove(dropped)?;
                t.put(&key, len, !snapshot.logits.is_empty(), &bytes)
            }),
            None => Err("the folder of states is full of named ones".into()),
        };
        let mut kept = self.kept();
        match result {
            Ok(()) => kept.reach_disk(key, len, !snapshot.logits.is_empty(), bytes.len()),
            Err(e) => {
                eprintln!("a state is dropped: {e}");
                kept.leave_disk(&key);
            }
        }
    }

    fn save(&self, owner: &str, name: &str, named: Named, snapshot: &Arc<Snapshot>) -> Result<(), String> {
        let (key, len) = (named.key, named.tokens.len());
        let no_room = || format!("state {name}: there is no room for its {} bytes; delete others", named.bytes);
        let mut kept = self.kept();
        let Some(disk) = &self.disk else {
            // There again if it was dropped meanwhile.
            kept.insert(key, len, snapshot.clone());
            let before = kept.name(owner, name, Some(named.clone()));
            kept.shrink(self.most).iter().for_each(|(key, ..)| kept.forget(key));
            if kept.bytes > self.most {
                kept.name(owner, name, before);
                kept.shrink(self.most).iter().for_each(|(key, ..)| kept.forget(key));
                return Err(no_room());
            }
            return Ok(());
        };
        let written = kept.entries.get(&key).is_some_and(|e| e.disk.is_some());
        let old = kept.last_name(owner, name).filter(|old| *old != key);
        drop(kept);
        let bytes = if written { Vec::new() } else { snapshot.encode() };
        let dropped = self.kept().make_room(bytes.len(), self.most_on_disk, old).ok_or_else(no_room)?;
        disk.change(|t| {
            t.remove(&dropped)?;
            if !written {
                t.put(&key, len, true, &bytes)?;
            }
            t.put_name((&self.model, owner, name), &named)
        })?;
        let mut kept = self.kept();
        if !written {
            kept.reach_disk(key, len, true, bytes.len());
        }
        kept.name(owner, name, Some(named));
        Ok(())
    }

    fn branch(&self, owner: &str, from: &str, to: &str) -> Result<StateInfo, String> {
        let kept = self.kept();
        let named = Named { created: SystemTime::now(), ..kept.named(owner, from)?.clone() };
        if kept.named(owner, to).is_ok() {
            return Err(format!("there is a state {to} already: delete it or choose another name"));
        }
        drop(kept);
        if let Some(disk) = &self.disk {
            disk.change(|t| t.put_name((&self.model, owner, to), &named))?;
        }
        let info = named.info(to);
        self.kept().name(owner, to, Some(named));
        Ok(info)
    }

    fn delete(&self, owner: &str, name: &str) -> Result<(), String> {
        self.kept().named(owner, name)?;
        let old = self.kept().last_name(owner, name);
        if let Some(disk) = &self.disk {
            disk.change(|t| {
                t.remove(old.as_slice())?;
                t.remove_name((&self.model, owner, name))
            })?;
        }
        let mut kept = self.kept();
        kept.name(owner, name, None);
        old.iter().for_each(|key| kept.forget(key));
        Ok(())
    }
}

impl Named {
    fn info(&self, name: &str) -> StateInfo {
        StateInfo { name: name.into(), tokens: self.tokens.len(), bytes: self.bytes, created: self.created }
    }
}

impl Entry {
    fn is_there(&self) -> bool {
        self.memory.is_some() || self.disk.is_some()
    }
}

impl Kept {
    /// What is on disk, with the names of a model.
    fn read(disk: &Disk, model: &str) -> Result<Kept, redb::Error> {
        let mut kept = Kept::default();
        let mut stored = disk.stored()?;
        stored.sort_by_key(|s| s.written);
        stored.into_iter().for_each(|s| kept.reach_disk(s.key, s.len, s.logits, s.bytes));
        for ([of, owner, name], named) in disk.names()? {
            if of == model {
                kept.name(&owner, &name, Some(named));
            } else {
                *kept.pins.entry(named.key).or_default() += 1;
            }
        }
        Ok(kept)
    }

    fn named(&self, owner: &str, name: &str) -> Result<&Named, String> {
        self.names.get(owner).and_then(|n| n.get(name)).ok_or_else(|| format!("there is no state {name:?}"))
    }

    /// The key of a named state that has no other name.
    fn last_name(&self, owner: &str, name: &str) -> Option<Key> {
        self.named(owner, name).ok().map(|n| n.key).filter(|key| self.pins.get(key) == Some(&1))
    }

    /// Gives a name to something else, or to nothing: what had it.
    fn name(&mut self, owner: &str, name: &str, named: Option<Named>) -> Option<Named> {
        let names = self.names.entry(owner.into()).or_default();
        let old = match &named {
            Some(named) => names.insert(name.into(), named.clone()),
            None => names.remove(name),
        };
        if names.is_empty() {
            self.names.remove(owner);
        }
        if let Some(new) = &named {
            *self.pins.entry(new.key).or_default() += 1;
        }
        if let Some(key) = old.as_ref().map(|old| old.key)
            && let Some(count) = self.pins.get_mut(&key)
        {
            *count -= 1;
            if *count == 0 {
                self.pins.remove(&key);
            }
        }
        old
    }

    /// The snapshot if it is in memory, as the one used last.
    fn touch(&mut self, key: &Key) -> Option<Arc<Snapshot>> {
        let entry = self.entries.get_mut(key)?;
        self.uses.remove(&entry.used);
        self.clock += 1;
        entry.used = self.clock;
        self.uses.insert(self.clock, *key);
        entry.memory.clone()
    }

    fn entry(&mut self, key: Key, len: usize) -> &mut Entry {
        if !self.entries.contains_key(&key) {
            *self.lengths.entry(len).or_default() += 1;
            self.clock += 1;
            self.uses.insert(self.clock, key);
        }
        let used = self.clock;
        self.entries.entry(key).or_insert(Entry { memory: None, disk: None, len, logits: false, used })
    }

    /// Puts a snapshot into memory. One that is there stays, unless it has no logits.
    fn insert(&mut self, key: Key, len: usize, snapshot: Arc<Snapshot>) {
        let entry = self.entry(key, len);
        let better = !entry.logits && !snapshot.logits.is_empty();
        if entry.memory.is_none() || better {
            let old = entry.memory.as_ref().map_or(0, |s| s.bytes());
            let new = snapshot.bytes();
            entry.logits |= better;
            entry.memory = Some(snapshot);
            // What is on disk doesn't have them; it is written over.
            let gone = if better { entry.disk.take() } else { None };
            self.bytes = self.bytes - old + new;
            self.bytes_on_disk -= gone.unwrap_or(0);
        }
        self.touch(&key);
    }

    /// Takes the least recently used snapshots out of memory until `most` bytes are left: those of them that are not on disk.
    fn shrink(&mut self, most: usize) -> Vec<(Key, usize, Arc<Snapshot>)> {
        let mut out = Vec::new();
        while self.bytes > most {
            let may_go = |key: &&Key| {
                let entry = self.entries.get(*key);
                entry.is_some_and(|e| e.memory.is_some() && (e.disk.is_some() || !self.pins.contains_key(*key)))
            };
            let Some(key) = self.uses.values().find(may_go).copied() else { break };
            let Some(entry) = self.entries.get_mut(&key) else { break };
            let Some(snapshot) = entry.memory.take() else { break };
            self.bytes -= snapshot.bytes();
            if entry.disk.is_none() {
                out.push((key, entry.len, snapshot));
            }
        }
        out
    }

    /// Makes room for `bytes` on disk in `most`: what is to be removed there, `old` and then the least recently used without names. `None` if
    /// that is not enough.
    fn make_room(&mut self, bytes: usize, most: usize, old: Option<Key>) -> Option<Vec<Key>> {
        let size = |key: &Key| self.entries.get(key).and_then(|e| e.disk);
        let unnamed = self.uses.values().filter(|key| !self.pins.contains_key(*key)).copied();
        let (mut left, mut out) = (self.bytes_on_disk.saturating_add(bytes), Vec::new());
        for (i, key) in old.into_iter().chain(unnamed).enumerate() {
            if left <= most && (i > 0 || old.is_none()) {
                break;
            }
            if let Some(size) = size(&key) {
                left -= size;
                out.push(key);
            }
        }
        if left > most {
            return None;
        }
        out.iter().for_each(|key| self.leave_disk(key));
        Some(out)
    }

    fn reach_disk(&mut self, key: Key, len: usize, logits: bool, bytes: usize) {
        let entry = self.entry(key, len);
        let old = entry.disk.replace(bytes);
        entry.logits |= logits;
        self.bytes_on_disk = self.bytes_on_disk + bytes - old.unwrap_or(0);
    }

    fn leave_disk(&mut self, key: &Key) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        self.bytes_on_disk -= entry.disk.take().unwrap_or(0);
        if entry.memory.is_none() {
            self.forget(key);
        }
    }

    fn forget(&mut self, key: &Key) {
        let Some(entry) = self.entries.remove(key) else { return };
        self.uses.remove(&entry.used);
        self.bytes -= entry.memory.map_or(0, |s| s.bytes());
        self.bytes_on_disk -= entry.disk.unwrap_or(0);
        if let Some(count) = self.lengths.get_mut(&entry.len) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&entry.len);
            }
        }
    }
}
