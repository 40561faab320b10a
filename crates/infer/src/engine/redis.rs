//! States that servers share in Redis, or in what speaks its protocol. Everything expires when it wasn't used for a while.
//!
//! Keys begin with `anser:` and a hash of the model: `state:KEY` is a snapshot, `name:OWNER:NAME` what a name stands for, `names:OWNER` an owner's names by the
//! time when they were last used, and `lengths:OWNER` after how many tokens there are snapshots, by the time when they were written.

use super::store::{Key, hex};
use super::tier::{Head, Item, Named, Tier, milliseconds};
use redis::{
    Client, Cmd, Connection, FromRedisValue, IntoConnectionInfo, Pipeline, RedisError, RedisResult, cmd, pipe,
};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

/// For a connection, and for a value on its way.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Bytes of a value at most, of which Redis says 512 MB, and some of it is not ours.
const MOST: usize = (512 << 20) - (1 << 10);

/// Lengths of an owner that are kept.
const LENGTHS: isize = 4096;

pub(super) struct Redis {
    client: Client,
    /// What all keys begin with.
    space: String,
    /// Seconds.
    expiry: u64,
    /// Connections that nobody uses now.
    idle: Mutex<Vec<Connection>>,
}

impl Redis {
    /// For a URL such as `redis://:PASSWORD@HOST:6379/0` or `rediss://..`. Connects when it is asked for something.
    pub fn new(url: &str, model: &str, expiry: Duration) -> Result<Redis, String> {
        super::install_crypto();
        // The URL may have a password, and isn't repeated.
        let wrong = |_| "redis: the URL must be like redis://:PASSWORD@HOST:6379/0".to_string();
        let info = url.into_connection_info().map_err(wrong)?;
        // What it would say of itself is another wait where nobody answers.
        let settings = info.redis_settings().clone().set_skip_set_lib_name();
        let client = Client::open(info.set_redis_settings(settings)).map_err(wrong)?;
        let space = format!("anser:{model}:");
        Ok(Redis { client, space, expiry: expiry.as_secs().max(1), idle: Mutex::default() })
    }

    fn at(&self, key: &Key) -> String {
        format!("{}state:{}", self.space, hex(key))
    }

    fn at_name(&self, owner: &str, name: &str) -> String {
        format!("{}name:{owner}:{name}", self.space)
    }

    /// What belongs to an owner.
    fn of(&self, what: &str, owner: &str) -> String {
        format!("{}{what}:{owner}", self.space)
    }

    /// Reads a value, which then lasts as long again.
    fn read(&self, at: String) -> Cmd {
        let mut read = cmd("GETEX");
        read.arg(at).arg("EX").arg(self.expiry);
        read
    }

    fn one<T: FromRedisValue>(&self, cmd: &Cmd) -> Result<T, String> {
        self.ask(|c| cmd.query(c))
    }

    fn all<T: FromRedisValue>(&self, pipe: &Pipeline) -> Result<T, String> {
        self.ask(|c| pipe.query(c))
    }

    /// Asks over a connection. What is asked for may be asked twice: an idle connection may have been closed at the other end.
    fn ask<T>(&self, ask: impl Fn(&mut Connection) -> RedisResult<T>) -> Result<T, String> {
        let reason = |e: RedisError| match e.is_timeout() {
            true => format!("no answer within {} s", TIMEOUT.as_secs()),
            false => e.to_string(),
        };
        let idle = || self.idle.lock().unwrap_or_else(|e| e.into_inner());
        let old = idle().pop();
        let mut result = None;
        if let Some(mut connection) = old {
            match ask(&mut connection) {
                Err(e) if e.is_io_error() && !e.is_timeout() => idle().clear(),
                done => result = Some((done, connection)),
            }
        }
        let (result, connection) = match result {
            Some(done) => done,
            None => {
                let connect = || {
                    let connection = self.client.get_connection_with_timeout(TIMEOUT)?;
                    connection.set_read_timeout(Some(TIMEOUT))?;
                    connection.set_write_timeout(Some(TIMEOUT))?;
                    Ok(connection)
                };
                let mut connection = connect().map_err(reason)?;
                (ask(&mut connection), connection)
            }
        };
        // After an error nobody knows what is still to come.
        if result.is_ok() {
            idle().push(connection);
        }
        result.map_err(reason)
    }
}

impl Tier for Redis {
    fn most(&self) -> usize {
        MOST
    }

    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, String> {
        self.one(&self.read(self.at(key)))
    }

    fn put(&self, item: &Item<'_>) -> Result<(), String> {
        let mut set = cmd("SET");
        set.arg(self.at(&item.key)).arg(item.bytes).arg("EX").arg(self.expiry);
        if !item.logits {
            set.arg("NX");
        }
        let lengths = self.of("lengths", item.owner);
        let mut all = pipe();
        all.add_command(set).ignore();
        all.cmd("ZADD").arg(&lengths).arg(milliseconds(SystemTime::now())).arg(item.len).ignore();
        all.cmd("ZREMRANGEBYRANK").arg(&lengths).arg(0).arg(-LENGTHS - 1).ignore();
        all.cmd("EXPIRE").arg(&lengths).arg(self.expiry).ignore();
        self.all(&all)
    }

    fn remove(&self, keys: &[Key]) -> Result<(), String> {
        let keys: Vec<String> = keys.iter().map(|k| self.at(k)).collect();
        if keys.is_empty() { Ok(()) } else { self.one(cmd("UNLINK").arg(keys)) }
    }

    fn name(&self, owner: &str, name: &str) -> Result<Option<Named>, String> {
        let index = self.of("names", owner);
        let mut all = pipe();
        all.add_command(self.read(self.at_name(owner, name)));
        all.cmd("ZADD").arg(&index).arg("XX").arg(milliseconds(SystemTime::now())).arg(name).ignore();
        all.cmd("EXPIRE").arg(&index).arg(self.expiry).ignore();
        let (bytes,): (Option<Vec<u8>>,) = self.all(&all)?;
        Ok(bytes.and_then(|bytes| Named::decode(&bytes)))
    }

    fn names(&self, owner: &str) -> Result<Vec<(String, Head)>, String> {
        let index = self.of("names", owner);
        let mut names: Vec<String> = self.one(cmd("ZRANGE").arg(&index).arg(0).arg(-1))?;
        names.sort();
        let mut heads = pipe();
        for name in &names {
            heads.cmd("GETRANGE").arg(self.at_name(owner, name)).arg(0).arg(Head::BYTES - 1);
        }
        let heads: Vec<Vec<u8>> = if names.is_empty() { Vec::new() } else { self.all(&heads)? };
        // Some have expired.
        let there = names.into_iter().zip(heads).filter_map(|(name, head)| Some((name, Head::decode(&head)?)));
        Ok(there.collect())
    }

    fn put_name(&self, owner: &str, name: &str, named: &Named) -> Result<(), String> {
        let index = self.of("names", owner);
        let mut all = pipe();
        all.atomic();
        all.cmd("SET").arg(self.at_name(owner, name)).arg(named.encode()).arg("EX").arg(self.expiry).ignore();
        let now = milliseconds(SystemTime::now());
        all.cmd("ZADD").arg(&index).arg(now).arg(name).ignore();
        // Those that have expired.
        let gone = now.saturating_sub(self.expiry as usize * 1000);
        all.cmd("ZREMRANGEBYSCORE").arg(&index).arg("-inf").arg(format!("({gone}")).ignore();
        all.cmd("EXPIRE").arg(&index).arg(self.expiry).ignore();
        self.all(&all)
    }

    fn remove_name(&self, owner: &str, name: &str) -> Result<(), String> {
        let mut all = pipe();
        all.atomic();
        all.cmd("UNLINK").arg(self.at_name(owner, name)).ignore();
        all.cmd("ZREM").arg(self.of("names", owner)).arg(name).ignore();
        self.all(&all)
    }

    fn lengths(&self, owner: &str) -> Result<Vec<usize>, String> {
        self.one(cmd("ZRANGE").arg(self.of("lengths", owner)).arg(0).arg(-1))
    }

    fn has(&self, keys: &[Key]) -> Result<Vec<bool>, String> {
        let mut all = pipe();
        keys.iter().for_each(|key| {
            all.cmd("EXISTS").arg(self.at(key));
        });
        if keys.is_empty() { Ok(Vec::new()) } else { self.all(&all) }
    }
}
