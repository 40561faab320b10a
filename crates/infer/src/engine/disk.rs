//! What outlives the program: an embedded database of snapshots and names.

use super::bytes::{Reader, put_number, seal};
use super::store::{Key, Named};
use redb::{Database, Error, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Encoded snapshots by key.
const SNAPSHOTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("snapshots");
/// Of each: tokens before it, bytes, whether it has logits, milliseconds since 1970 when it was written.
const INDEX: TableDefinition<'_, &[u8], (u64, u64, bool, u64)> = TableDefinition::new("index");
/// By model, owner and name: the key of a state, and the tokens that led to it.
const NAMES: TableDefinition<'_, (&str, &str, &str), &[u8]> = TableDefinition::new("names");

/// Memory for pages of the file.
const PAGES: usize = 64 << 20;

pub(super) struct Disk(Database);

/// A snapshot on disk.
pub(super) struct Stored {
    pub key: Key,
    pub len: usize,
    pub bytes: usize,
    pub logits: bool,
    pub written: u64,
}

impl Disk {
    /// Opens the database in a folder, which is made if there is none.
    pub fn open(folder: &Path) -> Result<Disk, String> {
        let path = folder.join("states.redb");
        let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        std::fs::create_dir_all(folder).map_err(|e| failed(&e))?;
        Ok(Disk(Database::builder().set_cache_size(PAGES).create(&path).map_err(|e| failed(&e))?))
    }

    /// Makes a change as a whole or not at all; it is safe when this returns.
    pub fn change(&self, change: impl FnOnce(&Change) -> Result<(), Error>) -> Result<(), String> {
        let all = || {
            let transaction = Change(self.0.begin_write()?);
            change(&transaction)?;
            Ok::<(), Error>(transaction.0.commit()?)
        };
        all().map_err(|e| format!("writing states: {e}"))
    }

    /// An encoded snapshot.
    pub fn read(&self, key: &Key) -> Result<Option<Vec<u8>>, Error> {
        let table = self.0.begin_read()?.open_table(SNAPSHOTS)?;
        Ok(table.get(&key[..])?.map(|bytes| bytes.value().to_vec()))
    }

    /// All snapshots.
    pub fn stored(&self) -> Result<Vec<Stored>, Error> {
        let table = match self.0.begin_read()?.open_table(INDEX) {
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            table => table?,
        };
        let mut all = Vec::new();
        for row in table.iter()? {
            let (key, value) = row?;
            let (len, bytes, logits, written) = value.value();
            let Ok(key) = key.value().try_into() else { continue };
            all.push(Stored { key, len: len as usize, bytes: bytes as usize, logits, written });
        }
        Ok(all)
    }

    /// All names, each with its model and owner. Damaged ones are left out.
    pub fn names(&self) -> Result<Vec<([String; 3], Named)>, Error> {
        let table = match self.0.begin_read()?.open_table(NAMES) {
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            table => table?,
        };
        let mut all = Vec::new();
        for row in table.iter()? {
            let (name, value) = row?;
            let (model, owner, name) = name.value();
            match Named::decode(value.value()) {
                Some(named) => all.push(([model, owner, name].map(String::from), named)),
                None => eprintln!("the state {name:?} is damaged and left out"),
            }
        }
        Ok(all)
    }
}

/// A change being made.
pub(super) struct Change(WriteTransaction);

impl Change {
    /// Writes an encoded snapshot after `len` tokens.
    pub fn put(&self, key: &Key, len: usize, logits: bool, bytes: &[u8]) -> Result<(), Error> {
        let row = (len as u64, bytes.len() as u64, logits, milliseconds(SystemTime::now()) as u64);
        self.0.open_table(SNAPSHOTS)?.insert(&key[..], bytes)?;
        self.0.open_table(INDEX)?.insert(&key[..], row)?;
        Ok(())
    }

    /// Removes snapshots.
    pub fn remove(&self, keys: &[Key]) -> Result<(), Error> {
        let (mut snapshots, mut index) = (self.0.open_table(SNAPSHOTS)?, self.0.open_table(INDEX)?);
        for key in keys {
            snapshots.remove(&key[..])?;
            index.remove(&key[..])?;
        }
        Ok(())
    }

    /// Writes a name: of a model, an owner.
    pub fn put_name(&self, name: (&str, &str, &str), named: &Named) -> Result<(), Error> {
        self.0.open_table(NAMES)?.insert(name, &named.encode()[..])?;
        Ok(())
    }

    /// Removes a name.
    pub fn remove_name(&self, name: (&str, &str, &str)) -> Result<(), Error> {
        self.0.open_table(NAMES)?.remove(name)?;
        Ok(())
    }
}

impl Named {
    /// Key, size, milliseconds since 1970, tokens; a checksum.
    fn encode(&self) -> Vec<u8> {
        let mut out = self.key.to_vec();
        [self.bytes, milliseconds(self.created), self.tokens.len()].iter().for_each(|&n| put_number(&mut out, n));
        self.tokens.iter().for_each(|t| out.extend(t.to_le_bytes()));
        seal(&mut out);
        out
    }

    fn decode(bytes: &[u8]) -> Option<Named> {
        let mut from = Reader::sealed(bytes)?;
        let key = from.words(8)?.concat().try_into().ok()?;
        let [bytes, created, tokens] = [from.number()?, from.number()?, from.number()?];
        let tokens = from.words(tokens)?.iter().map(|t| u32::from_le_bytes(*t)).collect();
        Some(Named { key, tokens, bytes, created: UNIX_EPOCH + Duration::from_millis(created as u64) })
    }
}

fn milliseconds(time: SystemTime) -> usize {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as usize
}
