//! What one server knows of its snapshots: those in memory and in its folder.

use super::disk::Disk;
use super::snapshot::Snapshot;
use super::store::{Key, Prefix};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

#[derive(Default)]
pub(super) struct Kept {
    pub entries: HashMap<Key, Entry>,
    /// Keys by last use.
    uses: BTreeMap<u64, Key>,
    clock: u64,
    /// Bytes in memory and on disk.
    pub bytes: usize,
    pub bytes_on_disk: usize,
    /// How many snapshots there are after so many tokens.
    pub lengths: BTreeMap<usize, usize>,
    /// How many names a snapshot has, for any model, where names are here too.
    pins: HashMap<Key, usize>,
}

/// A snapshot in memory, on disk or both; in neither while it waits for the disk.
pub(super) struct Entry {
    pub memory: Option<Arc<Snapshot>>,
    /// Its size there.
    pub disk: Option<usize>,
    len: usize,
    logits: bool,
    used: u64,
}

impl Entry {
    pub fn is_there(&self) -> bool {
        self.memory.is_some() || self.disk.is_some()
    }
}

impl Kept {
    /// What is on disk.
    pub fn read(disk: &Disk) -> Result<Kept, redb::Error> {
        let mut kept = Kept::default();
        disk.stored()?.into_iter().for_each(|s| kept.reach_disk(s.key, s.len, s.logits, s.bytes));
        disk.pinned()?.into_iter().for_each(|key| _ = kept.move_name(None, Some(key)));
        Ok(kept)
    }

    /// Notes that a name stands for a snapshot, or for nothing, and no longer for another: whether that has no name any more.
    pub fn move_name(&mut self, from: Option<Key>, to: Option<Key>) -> bool {
        if let Some(key) = to {
            *self.pins.entry(key).or_default() += 1;
        }
        let Some((key, count)) = from.and_then(|key| Some((key, self.pins.get_mut(&key)?))) else { return false };
        *count -= 1;
        let last = *count == 0;
        if last {
            self.pins.remove(&key);
        }
        last
    }

    /// Whether one name alone stands for it.
    pub fn has_one_name(&self, key: &Key) -> bool {
        self.pins.get(key) == Some(&1)
    }

    /// The places where snapshots after the first of these tokens are, the shortest first: after how many tokens, their key, and whether it is
    /// in memory. One after all tokens has logits.
    pub fn along(&self, root: &Prefix, tokens: &[u32]) -> Vec<(usize, Prefix, bool)> {
        let (mut prefix, mut at, mut found) = (root.clone(), 0, Vec::new());
        for &len in self.lengths.range(..=tokens.len()).map(|(len, _)| len) {
            prefix.push(&tokens[at..len]);
            at = len;
            let usable = |e: &&Entry| e.is_there() && (len < tokens.len() || e.logits);
            if let Some(entry) = self.entries.get(&prefix.key()).filter(usable) {
                found.push((len, prefix.clone(), entry.memory.is_some()));
            }
        }
        found
    }

    /// The snapshot if it is in memory, as the one used last.
    pub fn touch(&mut self, key: &Key) -> Option<Arc<Snapshot>> {
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

    /// Puts a snapshot into memory: whether it is new. One that is there stays, unless it has no logits.
    pub fn insert(&mut self, key: Key, len: usize, snapshot: Arc<Snapshot>) -> bool {
        let entry = self.entry(key, len);
        let better = !entry.logits && !snapshot.logits.is_empty();
        let new_here = better || !entry.is_there();
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
        new_here
    }

    /// Takes the least recently used snapshots out of memory until `most` bytes are left: those of them that are not on disk.
    pub fn shrink(&mut self, most: usize) -> Vec<(Key, usize, Arc<Snapshot>)> {
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
    pub fn make_room(&mut self, bytes: usize, most: usize, old: Option<Key>) -> Option<Vec<Key>> {
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

    pub fn reach_disk(&mut self, key: Key, len: usize, logits: bool, bytes: usize) {
        let entry = self.entry(key, len);
        let old = entry.disk.replace(bytes);
        entry.logits |= logits;
        self.bytes_on_disk = self.bytes_on_disk + bytes - old.unwrap_or(0);
    }

    pub fn leave_disk(&mut self, key: &Key) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        self.bytes_on_disk -= entry.disk.take().unwrap_or(0);
        if entry.memory.is_none() {
            self.forget(key);
        }
    }

    pub fn forget(&mut self, key: &Key) {
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
