//! Where snapshots and names are beyond memory: a folder, and what several servers share.

use super::bytes::{Reader, put_number, seal};
use super::store::{Key, StateError};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A place for snapshots and names of one model. A snapshot may go away at any time, as it can be read again from its tokens. Errors are those of the
/// place: while there are any it is down.
pub(super) trait Tier: Send + Sync {
    /// Bytes of an encoded snapshot at most: one that is larger would count as a failure of the place.
    fn most(&self) -> usize {
        usize::MAX
    }

    /// An encoded snapshot.
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, String>;

    /// Keeps an encoded snapshot.
    fn put(&self, item: &Item<'_>) -> Result<(), String>;

    /// Removes snapshots.
    fn remove(&self, keys: &[Key]) -> Result<(), String>;

    /// What an owner's name stands for.
    fn name(&self, owner: &str, name: &str) -> Result<Option<Named>, String>;

    /// An owner's names, and the heads of what they stand for.
    fn names(&self, owner: &str) -> Result<Vec<(String, Head)>, String>;

    /// Gives a name to a state. It lasts when this returns, as far as anything does there.
    fn put_name(&self, owner: &str, name: &str, named: &Named) -> Result<(), String>;

    /// Removes a name.
    fn remove_name(&self, owner: &str, name: &str) -> Result<(), String>;

    /// After how many tokens there may be snapshots of an owner, where servers share prefixes.
    fn lengths(&self, _owner: &str) -> Result<Vec<usize>, String> {
        Ok(Vec::new())
    }

    /// Which of the snapshots are there.
    fn has(&self, keys: &[Key]) -> Result<Vec<bool>, String> {
        Ok(vec![false; keys.len()])
    }
}

/// A snapshot to keep.
pub(super) struct Item<'a> {
    #[cfg_attr(not(feature = "redis"), expect(dead_code))]
    pub owner: &'a str,
    pub key: Key,
    /// Tokens before it.
    pub len: usize,
    /// Whether it has logits; one without doesn't replace one with them.
    pub logits: bool,
    pub bytes: &'a [u8],
}

/// What a name stands for, but for its tokens.
#[derive(Clone)]
pub(super) struct Head {
    pub key: Key,
    /// Of its snapshot in memory.
    pub bytes: usize,
    pub created: SystemTime,
    /// How many led to it.
    pub tokens: usize,
}

/// What a name stands for.
#[derive(Clone)]
pub(super) struct Named {
    pub key: Key,
    pub bytes: usize,
    pub created: SystemTime,
    /// All that led to it.
    pub tokens: Arc<[u32]>,
    /// Whether another name may stand for the same.
    pub branched: bool,
    /// Hash of the initial state that they begin from.
    pub initial: Option<Key>,
}

impl Head {
    /// Bytes at the beginning of an encoded [`Named`].
    #[cfg(any(feature = "redis", feature = "object-store", test))]
    pub const BYTES: usize = 56;

    #[cfg(any(feature = "redis", feature = "object-store", test))]
    pub fn decode(bytes: &[u8]) -> Option<Head> {
        Head::read(&mut Reader::open(bytes))
    }

    fn read(from: &mut Reader<'_>) -> Option<Head> {
        let key = from.words(8)?.concat().try_into().ok()?;
        let [bytes, created, tokens] = [from.number()?, from.number()?, from.number()?];
        Some(Head { key, bytes, created: UNIX_EPOCH + Duration::from_millis(created as u64), tokens })
    }
}

impl Named {
    /// Key, size, milliseconds since 1970, how many tokens, these; whether it was branched; the initial state, if there is one; a checksum.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.key.to_vec();
        [self.bytes, milliseconds(self.created), self.tokens.len()].iter().for_each(|&n| put_number(&mut out, n));
        self.tokens.iter().for_each(|t| out.extend(t.to_le_bytes()));
        put_number(&mut out, self.branched.into());
        out.extend(self.initial.iter().flatten());
        seal(&mut out);
        out
    }

    pub fn decode(bytes: &[u8]) -> Option<Named> {
        let mut from = Reader::sealed(bytes)?;
        let Head { key, bytes, created, tokens } = Head::read(&mut from)?;
        let tokens = from.words(tokens)?.iter().map(|t| u32::from_le_bytes(*t)).collect();
        let branched = from.number().is_some_and(|n| n != 0);
        let initial = from.words(8).and_then(|words| words.concat().try_into().ok());
        Some(Named { key, bytes, created, tokens, branched, initial })
    }

    pub fn head(&self) -> Head {
        Head { key: self.key, bytes: self.bytes, created: self.created, tokens: self.tokens.len() }
    }
}

pub(super) fn milliseconds(time: SystemTime) -> usize {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as usize
}

/// How a tier is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierStats {
    /// `memory`, `disk`, `redis` or `object_store`.
    pub tier: &'static str,
    /// Whether it worked when it was last asked.
    pub up: bool,
    /// How often it failed.
    pub errors: u64,
    /// States that were left out as they are larger than what it takes.
    pub too_large: u64,
}

/// A tier that may be down: then nobody waits for it, but for one who tries it again after a while.
pub(super) struct Guarded {
    label: &'static str,
    tier: Box<dyn Tier>,
    /// See [`Tier::most`].
    pub most: usize,
    health: Mutex<Health>,
    errors: AtomicU64,
    too_large: AtomicU64,
}

/// `None`: it is up.
type Health = Option<Outage>;

struct Outage {
    pause: Duration,
    again: Instant,
}

/// Pauses before a tier that is down is tried again: the first, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(8)];

impl Guarded {
    pub fn new(label: &'static str, tier: impl Tier + 'static) -> Guarded {
        let (errors, too_large) = (AtomicU64::new(0), AtomicU64::new(0));
        Guarded { label, most: tier.most(), tier: Box::new(tier), health: Mutex::new(None), errors, too_large }
    }

    /// Checks that a snapshot of so many bytes is not larger than what the tier takes, and counts those that are.
    ///
    /// # Errors
    /// That it is, for whoever wants it kept.
    pub fn check_size(&self, bytes: usize) -> Result<(), StateError> {
        if bytes <= self.most {
            return Ok(());
        }
        self.too_large.fetch_add(1, Ordering::Relaxed);
        let Guarded { label, most, .. } = self;
        Err(StateError::Refused(format!("its {bytes} bytes are more than the {most} that {label} takes of a state")))
    }

    /// Asks the tier for something, unless it is down.
    ///
    /// # Errors
    /// That it cannot be reached.
    pub fn call<T>(&self, ask: impl FnOnce(&dyn Tier) -> Result<T, String>) -> Result<T, StateError> {
        let unreachable =
            || StateError::Unreachable(format!("the states in {} cannot be reached now: try again later", self.label));
        let mut tries_again = false;
        if let Some(outage) = &mut *self.health() {
            let now = Instant::now();
            if now < outage.again {
                return Err(unreachable());
            }
            // The others don't try at the same time.
            outage.again = now + PAUSES[1];
            tries_again = true;
        }
        let result = ask(&*self.tier);
        let mut health = self.health();
        match &result {
            Ok(_) => {
                if health.take().is_some() {
                    eprintln!("states in {} can be reached again", self.label);
                }
            }
            Err(why) => {
                self.errors.fetch_add(1, Ordering::Relaxed);
                let pause = match &*health {
                    None => {
                        eprintln!("states in {} cannot be reached; requests go on without: {why}", self.label);
                        Some(PAUSES[0])
                    }
                    Some(outage) => tries_again.then(|| (outage.pause * 2).min(PAUSES[1])),
                };
                if let Some(pause) = pause {
                    *health = Some(Outage { pause, again: Instant::now() + pause });
                }
            }
        }
        result.map_err(|_| unreachable())
    }

    /// Whether a call would be tried now.
    pub fn is_open(&self) -> bool {
        self.health().as_ref().is_none_or(|outage| Instant::now() >= outage.again)
    }

    pub fn stats(&self) -> TierStats {
        let [errors, too_large] = [&self.errors, &self.too_large].map(|n| n.load(Ordering::Relaxed));
        TierStats { tier: self.label, up: self.health().is_none(), errors, too_large }
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Names in memory, where nothing outlives the program. The snapshots are in memory anyway.
#[derive(Default)]
pub(super) struct Names(Mutex<BTreeMap<(String, String), Named>>);

impl Names {
    fn names(&self) -> MutexGuard<'_, BTreeMap<(String, String), Named>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Tier for Names {
    fn get(&self, _: &Key) -> Result<Option<Vec<u8>>, String> {
        Ok(None)
    }

    fn put(&self, _: &Item<'_>) -> Result<(), String> {
        Ok(())
    }

    fn remove(&self, _: &[Key]) -> Result<(), String> {
        Ok(())
    }

    fn name(&self, owner: &str, name: &str) -> Result<Option<Named>, String> {
        Ok(self.names().get(&(owner.into(), name.into())).cloned())
    }

    fn names(&self, owner: &str) -> Result<Vec<(String, Head)>, String> {
        let names = self.names();
        let of_owner = names.range((owner.into(), String::new())..).take_while(|((o, _), _)| o == owner);
        Ok(of_owner.map(|((_, name), named)| (name.clone(), named.head())).collect())
    }

    fn put_name(&self, owner: &str, name: &str, named: &Named) -> Result<(), String> {
        self.names().insert((owner.into(), name.into()), named.clone());
        Ok(())
    }

    fn remove_name(&self, owner: &str, name: &str) -> Result<(), String> {
        self.names().remove(&(owner.into(), name.into()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_that_is_down_is_left_alone_for_a_while() {
        let tier = Guarded::new("test", Names::default());
        let (works, fails) = (|_: &dyn Tier| Ok(1), |_: &dyn Tier| Err::<i32, _>("it is broken".to_string()));
        assert!(tier.call(works) == Ok(1) && tier.stats().up);
        assert!(matches!(tier.call(fails), Err(StateError::Unreachable(_))));
        // Not even one that works is asked now.
        assert!(tier.call(works).is_err() && !tier.is_open());
        assert_eq!(tier.stats(), TierStats { tier: "test", up: false, errors: 1, too_large: 0 });
        std::thread::sleep(PAUSES[0] + Duration::from_millis(20));
        assert!(tier.is_open() && tier.call(fails).is_err());
        std::thread::sleep(PAUSES[0] + Duration::from_millis(20));
        assert!(tier.call(works).is_err(), "the pause has doubled");
        std::thread::sleep(PAUSES[0] + Duration::from_millis(20));
        assert_eq!((tier.call(works), tier.stats().up, tier.stats().errors), (Ok(1), true, 2));
    }

    #[test]
    fn names_are_read_back_or_not_at_all() {
        let created = UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        let tokens = (0..50).collect();
        let named = Named { key: [7; 32], bytes: 99, created, tokens, branched: true, initial: Some([9; 32]) };
        let without = Named { initial: None, ..named.clone() };
        assert_eq!(Named::decode(&without.encode()).unwrap().initial, None);
        let bytes = named.encode();
        let back = Named::decode(&bytes).unwrap();
        assert_eq!((back.key, back.bytes, back.created, back.branched), ([7; 32], 99, created, true));
        assert_eq!((back.tokens, back.initial), (named.tokens.clone(), named.initial));
        let head = Head::decode(&bytes[..Head::BYTES]).unwrap();
        assert_eq!((head.key, head.bytes, head.created, head.tokens), ([7; 32], 99, created, 50));
        for i in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[i] ^= 4;
            assert!(Named::decode(&damaged).is_none() && Named::decode(&bytes[..i]).is_none());
        }
    }
}
