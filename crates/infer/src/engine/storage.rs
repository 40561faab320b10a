//! Memory and the places beyond it, as what works on them sees them.

use super::EngineOptions;
use super::disk::Disk;
use super::kept::Kept;
use super::snapshot::{Form, Snapshot};
use super::store::{Found, Hit, Key, Prefix, Search, StateError, StateInfo, check_name, hex};
use super::tier::{Guarded, Item, Named, Names};
use crate::InitialState;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

pub(super) struct Storage {
    pub form: Form,
    /// What tells models apart, and bounds on what they keep.
    pub model: String,
    pub most: usize,
    most_on_disk: usize,
    /// Percent of either that named states of one owner may take.
    owner_share: usize,
    /// Tuned initial states, and since when they are here.
    pub initial: BTreeMap<String, Arc<InitialState>>,
    started: SystemTime,
    /// Where names are if nowhere else.
    names: Guarded,
    pub disk: Option<Guarded>,
    pub redis: Option<Guarded>,
    pub objects: Option<Guarded>,
    kept: Mutex<Kept>,
    /// Bytes that wait to be written.
    pub waiting: AtomicUsize,
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
impl Storage {
    /// Empty, or with what the folder holds. `model` tells apart what has other states.
    pub fn open(form: Form, model: String, options: &EngineOptions) -> Result<Storage, String> {
        let disk = options.folder.as_deref().map(|f| Disk::open(f, model.clone())).transpose()?;
        let kept = match &disk {
            None => Kept::default(),
            Some(disk) => Kept::read(disk).map_err(|e| format!("reading the folder of states: {e}"))?,
        };
        let mut initial = BTreeMap::new();
        for (name, state) in &options.initial {
            check_name(name)?;
            if initial.insert(name.clone(), Arc::new(state.clone())).is_some() {
                return Err(format!("there are two initial states {name}"));
            }
        }
        let space = hex(&Sha256::digest(&model)[..16]);
        Ok(Storage {
            form,
            model,
            initial,
            started: SystemTime::now(),
            most: options.cache_bytes,
            most_on_disk: options.disk_bytes,
            owner_share: options.owner_share,
            names: Guarded::new("memory", Names::default()),
            disk: disk.map(|d| Guarded::new("disk", d)),
            redis: redis(options, &space)?,
            objects: objects(options, &space)?,
            kept: Mutex::new(kept),
            waiting: AtomicUsize::new(0),
        })
    }

    pub fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The places beyond memory, the nearest first.
    pub fn tiers(&self) -> impl Iterator<Item = &Guarded> {
        [&self.disk, &self.redis, &self.objects].into_iter().flatten()
    }

    /// Those that other servers use too.
    pub fn shared(&self) -> impl Iterator<Item = &Guarded> {
        [&self.redis, &self.objects].into_iter().flatten()
    }

    pub fn info(&self, name: &str, initial: &InitialState) -> StateInfo {
        StateInfo { name: name.into(), tokens: 0, bytes: initial.bytes(), created: self.started, initial: true }
    }

    pub fn is_shared(&self) -> bool {
        self.shared().next().is_some()
    }

    /// Where names are.
    pub fn home(&self) -> &Guarded {
        self.tiers().last().unwrap_or(&self.names)
    }

    pub fn named(&self, owner: &str, name: &str) -> Result<Named, StateError> {
        let missing = || StateError::Missing(format!("there is no state {name:?}"));
        self.home().call(|t| t.name(owner, name))?.ok_or_else(missing)
    }

    /// The snapshot after most of the tokens, wherever it is.
    pub fn search(&self, search: &Search) -> Found {
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

    /// A snapshot as it is kept in a tier.
    fn encoded(&self, snapshot: &Snapshot, tier: &Guarded) -> Result<Vec<u8>, StateError> {
        tier.check_size(snapshot.encoded_bytes(&self.form))?;
        snapshot.encode(&self.form).map_err(|e| StateError::Refused(e.to_string()))
    }

    /// Writes a snapshot that memory had no room for to disk.
    pub fn spill(&self, key: Key, len: usize, snapshot: &Snapshot) {
        let Some(disk) = &self.disk else { return };
        if self.kept().entries.get(&key).is_none_or(|e| e.disk.is_some()) {
            return;
        }
        let Ok(bytes) = self.encoded(snapshot, disk) else { return self.kept().leave_disk(&key) };
        let logits = !snapshot.logits.is_empty();
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
    pub fn share(&self, owner: &str, key: Key, len: usize, snapshot: &Snapshot) {
        let Some(redis) = self.redis.as_ref().filter(|r| r.is_open()) else { return };
        let Ok(bytes) = self.encoded(snapshot, redis) else { return };
        // Who fails is down, which is said elsewhere; nothing else is lost.
        let _ = redis.call(|t| t.put(&Item { owner, key, len, logits: !snapshot.logits.is_empty(), bytes: &bytes }));
    }

    pub fn save(&self, owner: &str, name: &str, mut named: Named, snapshot: &Arc<Snapshot>) -> Result<(), StateError> {
        let old = self.home().call(|t| t.name(owner, name))?;
        named.branched = old.as_ref().is_some_and(|old| old.key == named.key && old.branched);
        if self.is_shared() {
            return self.save_shared((owner, name), &named, old, snapshot);
        }
        self.check_share(owner, name, &named)?;
        let old = old.map(|old| old.key);
        match &self.disk {
            Some(disk) => self.save_on_disk(disk, (owner, name), &named, old, snapshot),
            None => self.save_in_memory((owner, name), &named, old, snapshot),
        }
    }

    fn save_shared(
        &self, (owner, name): (&str, &str), named: &Named, old: Option<Named>, snapshot: &Snapshot,
    ) -> Result<(), StateError> {
        let bytes = self.encoded(snapshot, self.home()).map_err(|e| of_state(name, e))?;
        let item = Item { owner, key: named.key, len: named.tokens.len(), logits: true, bytes: &bytes };
        self.home().call(|t| t.put(&item).and_then(|()| t.put_name(owner, name, named)))?;
        if let (Some(redis), Some(_)) = (&self.redis, &self.objects) {
            // The other servers get it sooner from there, if it takes it.
            let _ = redis.check_size(bytes.len()).and_then(|()| redis.call(|t| t.put(&item)));
        }
        old.filter(|old| old.key != named.key).iter().for_each(|old| self.unshare(old));
        Ok(())
    }

    /// Whether a state that is to have a name leaves room for those of other owners. States with several names count once.
    fn check_share(&self, owner: &str, name: &str, named: &Named) -> Result<(), StateError> {
        if self.owner_share >= 100 {
            return Ok(());
        }
        let all = if self.disk.is_some() { self.most_on_disk } else { self.most };
        let most = all / 100 * self.owner_share;
        let mut keys = BTreeSet::from([named.key]);
        let mut names = self.home().call(|t| t.names(owner))?;
        names.retain(|(other, head)| other != name && keys.insert(head.key));
        let taken: usize = names.iter().map(|(_, head)| head.bytes).sum();
        if taken + named.bytes <= most {
            return Ok(());
        }
        Err(StateError::Refused(format!(
            "state {name}: of the {most} bytes that one API key's states may take {taken} are taken, and it needs {}; delete others",
            named.bytes
        )))
    }

    fn save_on_disk(
        &self, disk: &Guarded, (owner, name): (&str, &str), named: &Named, old: Option<Key>, snapshot: &Snapshot,
    ) -> Result<(), StateError> {
        let (key, len) = (named.key, named.tokens.len());
        let kept = self.kept();
        let written = kept.entries.get(&key).is_some_and(|e| e.disk.is_some());
        let last = old.filter(|old| *old != key && kept.has_one_name(old));
        drop(kept);
        let bytes = match written {
            true => Vec::new(),
            false => self.encoded(snapshot, disk).map_err(|e| of_state(name, e))?,
        };
        let dropped =
            self.kept().make_room(bytes.len(), self.most_on_disk, last).ok_or_else(|| no_room(name, named))?;
        // In this order nothing is lost whenever it ends.
        disk.call(|t| {
            if !written {
                t.put(&Item { owner, key, len, logits: true, bytes: &bytes })?;
            }
            t.put_name(owner, name, named)?;
            t.remove(&dropped)
        })?;
        let mut kept = self.kept();
        if !written {
            kept.reach_disk(key, len, true, bytes.len());
        }
        kept.move_name(old, Some(key));
        Ok(())
    }

    fn save_in_memory(
        &self, (owner, name): (&str, &str), named: &Named, old: Option<Key>, snapshot: &Arc<Snapshot>,
    ) -> Result<(), StateError> {
        let mut kept = self.kept();
        // There again if it was dropped meanwhile.
        kept.insert(named.key, named.tokens.len(), snapshot.clone());
        kept.move_name(old, Some(named.key));
        kept.shrink(self.most).iter().for_each(|(key, ..)| kept.forget(key));
        if kept.bytes > self.most {
            kept.move_name(Some(named.key), old);
            kept.shrink(self.most).iter().for_each(|(key, ..)| kept.forget(key));
            return Err(no_room(name, named));
        }
        drop(kept);
        self.names.call(|t| t.put_name(owner, name, named))
    }

    pub fn branch(&self, owner: &str, from: &str, to: &str) -> Result<StateInfo, StateError> {
        let named = self.named(owner, from)?;
        if self.home().call(|t| t.name(owner, to))?.is_some() {
            return Err(StateError::Taken(format!("there is a state {to} already: delete it or choose another name")));
        }
        let branch = Named { created: SystemTime::now(), branched: true, ..named.clone() };
        self.home().call(|t| {
            if !named.branched {
                t.put_name(owner, from, &Named { branched: true, ..named.clone() })?;
            }
            t.put_name(owner, to, &branch)
        })?;
        if !self.is_shared() {
            self.kept().move_name(None, Some(branch.key));
        }
        Ok(StateInfo::new(to, branch.head()))
    }

    pub fn delete(&self, owner: &str, name: &str) -> Result<(), StateError> {
        let old = self.named(owner, name)?;
        self.home().call(|t| t.remove_name(owner, name))?;
        if self.is_shared() {
            self.unshare(&old);
        } else if self.kept().move_name(Some(old.key), None) {
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
        for tier in self.tiers() {
            let _ = tier.call(|t| t.remove(&[old.key]));
        }
        self.kept().forget(&old.key);
    }
}

fn of_state(name: &str, e: StateError) -> StateError {
    StateError::Refused(format!("state {name}: {e}"))
}

fn no_room(name: &str, named: &Named) -> StateError {
    StateError::Refused(format!("state {name}: there is no room for its {} bytes; delete others", named.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Session;
    use anser_model::{Config, Init, Model};
    use anser_tensor::Context;
    use std::time::Duration;

    /// A store of a small model, and a state of it after three tokens.
    fn store(options: &EngineOptions) -> (Storage, Arc<Snapshot>) {
        let (ctx, config) = (Context::cpu(1), Config::new(1, 64, 20));
        let model = Model::init(&ctx, &config, Init::Current, 1).unwrap();
        let mut session = Session::new(&ctx, &model);
        session.feed(&[1, 2, 3]).unwrap();
        let snapshot = Snapshot::new(&session.state().unwrap(), session.logits().unwrap().to_vec());
        let form = Form::new(&ctx, &config, None).unwrap();
        (Storage::open(form, "test".into(), options).unwrap(), Arc::new(snapshot))
    }

    /// What a name would stand for.
    fn named(key: u8, snapshot: &Snapshot) -> Named {
        let (key, bytes, created) = ([key; 32], snapshot.bytes(), SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        Named { key, bytes, created, tokens: [1, 2, 3].into(), branched: false, initial: None }
    }

    #[test]
    fn what_is_too_large_for_a_tier_is_left_out_and_the_tier_stays_up() {
        let folder = std::env::temp_dir().join(format!("anser-too-large-{}", std::process::id()));
        let (mut store, snapshot) = store(&EngineOptions { folder: Some(folder.clone()), ..EngineOptions::default() });
        let size = snapshot.encoded_bytes(&store.form);
        let disk = store.disk.as_mut().unwrap();
        disk.most = size - 1;
        let Err(StateError::Refused(why)) = store.save("a", "x", named(1, &snapshot), &snapshot) else { panic!() };
        assert!(why.contains("state x") && why.contains(&size.to_string()) && why.contains("disk"), "{why}");
        // A prefix goes without a word.
        store.kept().insert([2; 32], 3, snapshot.clone());
        let out = store.kept().shrink(0);
        out.iter().for_each(|(key, len, snapshot)| store.spill(*key, *len, snapshot));
        assert!(out.len() == 1 && store.kept().entries.is_empty());
        let stats = store.disk.as_ref().unwrap().stats();
        assert!(stats.up && (stats.errors, stats.too_large) == (0, 2), "{stats:?}");
        // As large as may be.
        store.disk.as_mut().unwrap().most = size;
        store.save("a", "x", named(1, &snapshot), &snapshot).unwrap();
        assert_eq!(store.named("a", "x").unwrap().key, [1; 32]);
        drop(store);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn an_owner_leaves_room_for_others() {
        let folder = std::env::temp_dir().join(format!("anser-share-{}", std::process::id()));
        let bytes = store(&EngineOptions::default()).1.bytes();
        for folder in [None, Some(folder.clone())] {
            // Ten states, of which an owner may have four.
            let (cache_bytes, disk_bytes) = (10 * bytes + 1000, 10 * bytes + 1000);
            let options =
                EngineOptions { cache_bytes, disk_bytes, owner_share: 40, folder, ..EngineOptions::default() };
            let (store, snapshot) = store(&options);
            let save = |owner: &str, name: &str, key| store.save(owner, name, named(key, &snapshot), &snapshot);
            (1..=4).for_each(|i| save("a", &i.to_string(), i).unwrap());
            let Err(StateError::Refused(why)) = save("a", "5", 5) else { panic!("it is one too many") };
            assert!(why.contains("state 5") && why.contains("delete"), "{why}");
            // Another name of the same takes nothing, nor does another state under an old name; and others have room.
            store.branch("a", "1", "again").unwrap();
            save("a", "4", 6).unwrap();
            (11..=14).for_each(|i| save("b", &i.to_string(), i).unwrap());
            store.delete("a", "2").unwrap();
            save("a", "5", 5).unwrap();
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
