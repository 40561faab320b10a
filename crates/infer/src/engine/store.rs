use super::snapshot::Snapshot;
use crate::Error;
use crate::engine::EngineOptions;
use anser_model::Model;
use anser_tensor::Context;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
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

/// States to go on from: those that clients gave a name, and prefixes of prompts that came before. All belong to an owner.
///
/// A state is kept once whatever names it has, under a hash of the tokens that lead to it, so that to branch copies nothing. Prefixes
/// are dropped when memory runs out, the least recently used first.
pub struct StateStore {
    fingerprint: String,
    most: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    snapshots: HashMap<Key, Entry>,
    /// Keys by last use.
    uses: BTreeMap<u64, Key>,
    clock: u64,
    bytes: usize,
    /// How many snapshots there are after so many tokens.
    lengths: BTreeMap<usize, usize>,
    /// By owner, then name.
    names: HashMap<String, BTreeMap<String, Named>>,
}

struct Entry {
    snapshot: Arc<Snapshot>,
    len: usize,
    used: u64,
    /// Names that it has: it stays.
    names: usize,
}

#[derive(Clone)]
struct Named {
    key: Key,
    tokens: Arc<[u32]>,
    bytes: usize,
    created: SystemTime,
}

/// A named state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateInfo {
    /// Its name.
    pub name: String,
    /// Tokens that led to it.
    pub tokens: usize,
    /// Its size.
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
    pub(super) fn open(_ctx: &Context, model: &Model, options: &EngineOptions) -> Result<StateStore, Error> {
        Ok(StateStore { fingerprint: model.fingerprint(), most: options.cache_bytes, kept: Mutex::default() })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The beginning of an owner's sequences.
    pub(super) fn root(&self, owner: &str) -> Prefix {
        let mut sha = Sha256::new();
        for part in [&self.fingerprint, owner] {
            sha.update((part.len() as u64).to_le_bytes());
            sha.update(part);
        }
        Prefix(sha)
    }

    /// The snapshot after most of the tokens, which after all of them must have logits: how many tokens it is after, and their key.
    pub(super) fn longest(&self, owner: &str, tokens: &[u32]) -> Option<(usize, Arc<Snapshot>, Prefix)> {
        let mut kept = self.kept();
        let (mut prefix, mut at, mut best) = (self.root(owner), 0, None);
        for &len in kept.lengths.range(..=tokens.len()).map(|(len, _)| len) {
            prefix.push(&tokens[at..len]);
            at = len;
            let key = prefix.key();
            let usable = |e: &Entry| len < tokens.len() || !e.snapshot.logits.is_empty();
            if kept.snapshots.get(&key).is_some_and(usable) {
                best = Some((len, key, prefix.clone()));
            }
        }
        let (len, key, prefix) = best?;
        Some((len, kept.touch(&key)?, prefix))
    }

    /// Keeps a snapshot after `len` tokens for a while.
    pub(super) fn insert(&self, key: Key, len: usize, snapshot: Arc<Snapshot>) {
        let mut kept = self.kept();
        kept.insert(key, len, snapshot);
        kept.shrink(self.most);
    }

    /// Keeps a snapshot under a name, in the place of what had it before.
    pub(super) fn save(
        &self, owner: &str, name: &str, key: Key, tokens: &[u32], snapshot: Arc<Snapshot>,
    ) -> Result<(), String> {
        let mut kept = self.kept();
        let bytes = snapshot.bytes();
        let named = Named { key, tokens: tokens.into(), bytes, created: SystemTime::now() };
        kept.insert(key, tokens.len(), snapshot);
        kept.name(owner, name, named);
        kept.shrink(self.most);
        if kept.bytes > self.most {
            kept.unname(owner, name);
            kept.shrink(self.most);
            return Err(format!("state {name}: there is no room for its {bytes} bytes; delete others"));
        }
        Ok(())
    }

    /// The tokens that led to a named state.
    pub(super) fn tokens(&self, owner: &str, name: &str) -> Result<Vec<u32>, String> {
        self.kept().named(owner, name).map(|n| n.tokens.to_vec())
    }

    /// An owner's named states, by name.
    pub fn list(&self, owner: &str) -> Vec<StateInfo> {
        let kept = self.kept();
        kept.names.get(owner).into_iter().flatten().map(|(name, named)| named.info(name)).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn get(&self, owner: &str, name: &str) -> Result<StateInfo, String> {
        self.kept().named(owner, name).map(|n| n.info(name))
    }

    /// Gives a state a second name, to go on from it in two ways.
    ///
    /// # Errors
    /// When there is none, or the second name is taken or none at all.
    pub fn branch(&self, owner: &str, from: &str, to: &str) -> Result<StateInfo, String> {
        check_name(to)?;
        let mut kept = self.kept();
        let named = Named { created: SystemTime::now(), ..kept.named(owner, from)?.clone() };
        if kept.named(owner, to).is_ok() {
            return Err(format!("there is a state {to} already: delete it or choose another name"));
        }
        kept.name(owner, to, named.clone());
        Ok(named.info(to))
    }

    /// Deletes a named state.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn delete(&self, owner: &str, name: &str) -> Result<(), String> {
        let mut kept = self.kept();
        kept.named(owner, name)?;
        kept.unname(owner, name);
        kept.shrink(self.most);
        Ok(())
    }

    /// How many states are in memory, and their bytes.
    pub(super) fn size(&self) -> (usize, usize) {
        let kept = self.kept();
        (kept.snapshots.len(), kept.bytes)
    }
}

impl Named {
    fn info(&self, name: &str) -> StateInfo {
        StateInfo { name: name.into(), tokens: self.tokens.len(), bytes: self.bytes, created: self.created }
    }
}

impl Kept {
    fn named(&self, owner: &str, name: &str) -> Result<&Named, String> {
        self.names.get(owner).and_then(|n| n.get(name)).ok_or_else(|| format!("there is no state {name:?}"))
    }

    fn touch(&mut self, key: &Key) -> Option<Arc<Snapshot>> {
        let entry = self.snapshots.get_mut(key)?;
        self.uses.remove(&entry.used);
        self.clock += 1;
        entry.used = self.clock;
        self.uses.insert(self.clock, *key);
        Some(entry.snapshot.clone())
    }

    /// A snapshot that is there stays, unless it had no logits.
    fn insert(&mut self, key: Key, len: usize, snapshot: Arc<Snapshot>) {
        if let Some(old) = self.snapshots.get_mut(&key) {
            if old.snapshot.logits.is_empty() {
                self.bytes = self.bytes - old.snapshot.bytes() + snapshot.bytes();
                old.snapshot = snapshot;
            }
        } else {
            self.bytes += snapshot.bytes();
            *self.lengths.entry(len).or_default() += 1;
            self.snapshots.insert(key, Entry { snapshot, len, used: 0, names: 0 });
        }
        self.touch(&key);
    }

    fn name(&mut self, owner: &str, name: &str, named: Named) {
        self.unname(owner, name);
        if let Some(entry) = self.snapshots.get_mut(&named.key) {
            entry.names += 1;
        }
        self.names.entry(owner.into()).or_default().insert(name.into(), named);
    }

    fn unname(&mut self, owner: &str, name: &str) {
        let Some(names) = self.names.get_mut(owner) else { return };
        let old = names.remove(name);
        if names.is_empty() {
            self.names.remove(owner);
        }
        if let Some(entry) = old.and_then(|old| self.snapshots.get_mut(&old.key)) {
            entry.names -= 1;
        }
    }

    /// Drops the least recently used snapshots without names until `most` bytes are left.
    fn shrink(&mut self, most: usize) {
        while self.bytes > most {
            let unnamed = |key: &&Key| self.snapshots.get(*key).is_some_and(|e| e.names == 0);
            let Some(key) = self.uses.values().find(unnamed).copied() else { return };
            let Some(entry) = self.snapshots.remove(&key) else { return };
            self.uses.remove(&entry.used);
            self.bytes -= entry.snapshot.bytes();
            if let Some(count) = self.lengths.get_mut(&entry.len) {
                *count -= 1;
                if *count == 0 {
                    self.lengths.remove(&entry.len);
                }
            }
        }
    }
}
