//! The folder of one server's states: an embedded database, in which every change is on disk as a whole or not at all.

use super::store::Key;
use super::tier::{Head, Item, Named, Tier, milliseconds};
use redb::{Database, Error, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use std::path::Path;
use std::time::SystemTime;

/// Encoded snapshots by key.
const SNAPSHOTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("snapshots");
/// Of each: tokens before it, bytes, whether it has logits, milliseconds since 1970 when it was written.
const INDEX: TableDefinition<'_, &[u8], (u64, u64, bool, u64)> = TableDefinition::new("index");
/// By model, owner and name: the key of a state, and the tokens that led to it.
const NAMES: TableDefinition<'_, (&str, &str, &str), &[u8]> = TableDefinition::new("names");

/// Bytes of a value at most.
const MOST: usize = 3 << 30;

/// Memory for pages of the file.
const PAGES: usize = 64 << 20;

pub(super) struct Disk {
    database: Database,
    /// Whose names are seen.
    model: String,
}

/// A snapshot on disk.
pub(super) struct Stored {
    pub key: Key,
    pub len: usize,
    pub bytes: usize,
    pub logits: bool,
    pub written: u64,
}

impl Disk {
    /// Opens the database in a folder, which is made if there is none, with the names of a model.
    pub fn open(folder: &Path, model: String) -> Result<Disk, String> {
        let path = folder.join("states.redb");
        let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        std::fs::create_dir_all(folder).map_err(|e| failed(&e))?;
        let database = Database::builder().set_cache_size(PAGES).create(&path).map_err(|e| failed(&e))?;
        let disk = Disk { database, model };
        // That the tables are there makes reading them simple.
        let tables = disk.change(|t| {
            t.open_table(SNAPSHOTS)?;
            t.open_table(INDEX)?;
            t.open_table(NAMES)?;
            Ok(())
        });
        tables.map_err(|e| failed(&e))?;
        Ok(disk)
    }

    /// All snapshots, the oldest first.
    pub fn stored(&self) -> Result<Vec<Stored>, Error> {
        let mut all = Vec::new();
        for row in self.database.begin_read()?.open_table(INDEX)?.iter()? {
            let (key, value) = row?;
            let (len, bytes, logits, written) = value.value();
            let Ok(key) = key.value().try_into() else { continue };
            all.push(Stored { key, len: len as usize, bytes: bytes as usize, logits, written });
        }
        all.sort_by_key(|s| s.written);
        Ok(all)
    }

    /// The keys that names of any model stand for, one for each name.
    pub fn pinned(&self) -> Result<Vec<Key>, Error> {
        let mut all = Vec::new();
        for row in self.database.begin_read()?.open_table(NAMES)?.iter()? {
            let (name, value) = row?;
            match Named::decode(value.value()) {
                Some(named) => all.push(named.key),
                None => eprintln!("the state {:?} is damaged and left out", name.value().2),
            }
        }
        Ok(all)
    }

    fn change(&self, change: impl FnOnce(&WriteTransaction) -> Result<(), Error>) -> Result<(), String> {
        let all = || {
            let transaction = self.database.begin_write()?;
            change(&transaction)?;
            Ok::<(), Error>(transaction.commit()?)
        };
        all().map_err(|e| format!("writing states: {e}"))
    }

    fn read<T>(&self, read: impl FnOnce(&redb::ReadTransaction) -> Result<T, Error>) -> Result<T, String> {
        let all = || read(&self.database.begin_read()?);
        all().map_err(|e| format!("reading states: {e}"))
    }
}

impl Tier for Disk {
    fn most(&self) -> usize {
        MOST
    }

    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, String> {
        self.read(|t| Ok(t.open_table(SNAPSHOTS)?.get(&key[..])?.map(|bytes| bytes.value().to_vec())))
    }

    fn put(&self, item: &Item<'_>) -> Result<(), String> {
        let row = (item.len as u64, item.bytes.len() as u64, item.logits, milliseconds(SystemTime::now()) as u64);
        self.change(|t| {
            t.open_table(SNAPSHOTS)?.insert(&item.key[..], item.bytes)?;
            t.open_table(INDEX)?.insert(&item.key[..], row)?;
            Ok(())
        })
    }

    fn remove(&self, keys: &[Key]) -> Result<(), String> {
        if keys.is_empty() {
            return Ok(());
        }
        self.change(|t| {
            let (mut snapshots, mut index) = (t.open_table(SNAPSHOTS)?, t.open_table(INDEX)?);
            for key in keys {
                snapshots.remove(&key[..])?;
                index.remove(&key[..])?;
            }
            Ok(())
        })
    }

    fn name(&self, owner: &str, name: &str) -> Result<Option<Named>, String> {
        let at = (&self.model[..], owner, name);
        self.read(|t| Ok(t.open_table(NAMES)?.get(at)?.and_then(|bytes| Named::decode(bytes.value()))))
    }

    fn names(&self, owner: &str) -> Result<Vec<(String, Head)>, String> {
        self.read(|t| {
            let mut all = Vec::new();
            for row in t.open_table(NAMES)?.range((&self.model[..], owner, "")..)? {
                let (at, value) = row?;
                let (model, of, name) = at.value();
                if (model, of) != (&self.model, owner) {
                    break;
                }
                all.extend(Named::decode(value.value()).map(|named| (name.to_string(), named.head())));
            }
            Ok(all)
        })
    }

    fn put_name(&self, owner: &str, name: &str, named: &Named) -> Result<(), String> {
        self.change(|t| {
            t.open_table(NAMES)?.insert((&self.model[..], owner, name), &named.encode()[..])?;
            Ok(())
        })
    }

    fn remove_name(&self, owner: &str, name: &str) -> Result<(), String> {
        self.change(|t| {
            t.open_table(NAMES)?.remove((&self.model[..], owner, name))?;
            Ok(())
        })
    }
}
