//! Named states that servers share in an object store: Amazon's S3 or what speaks its protocol, or a folder. Slow and lasting; nothing expires by itself.
//!
//! Below the URL and a hash of the model `states/KEY` is a snapshot, and `names/OWNER/NAME` what a name stands for.

use super::store::{Key, hex};
use super::tier::{Head, Item, Named, Tier};
use futures_util::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt};
use std::ffi::OsString;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use url::Url;

/// For a request with its repetitions.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of an object at most: what a network of 1 Gbit/s takes in that time, and some.
const MOST: usize = 1 << 30;

/// Heads of names that are read at the same time.
const AT_ONCE: usize = 16;

pub(super) struct Objects {
    store: Box<dyn ObjectStore>,
    root: Path,
    /// There until it is dropped.
    runtime: Option<Runtime>,
}

/// The variables that set up a store. Others may have any name and value: the store would take `TOKEN` or `REGION` for its own, too.
fn settings(variables: impl Iterator<Item = (OsString, OsString)>) -> impl Iterator<Item = (String, String)> {
    let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    variables.filter_map(text).filter(|(name, _)| name.starts_with("AWS_"))
}

impl Objects {
    /// For a URL such as `s3://BUCKET/FOLDER`, with keys and settings from environment variables `AWS_*`, or `file:///FOLDER`.
    pub fn new(url: &str, model: &str) -> Result<Objects, String> {
        super::install_crypto();
        let failed = |e: &dyn std::fmt::Display| format!("object store {url}: {e}; it must be like s3://BUCKET/FOLDER");
        let parsed = Url::parse(url).map_err(|e| failed(&e))?;
        let (store, root) =
            object_store::parse_url_opts(&parsed, settings(std::env::vars_os())).map_err(|e| failed(&e))?;
        let store = match parsed.scheme() {
            "file" => Box::new(LocalFileSystem::new().with_fsync(true)),
            _ => store,
        };
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("objects").enable_all().build();
        let runtime = runtime.map_err(|e| format!("starting a thread: {e}"))?;
        Ok(Objects { store, root: root.join(model), runtime: Some(runtime) })
    }

    fn at(&self, key: &Key) -> Path {
        self.root.clone().join("states").join(hex(key))
    }

    fn of(&self, owner: &str) -> Path {
        // An empty part would vanish.
        self.root.clone().join("names").join(format!("of-{owner}"))
    }

    /// Waits for a request: nothing where there is no such object.
    fn wait<T>(&self, request: impl Future<Output = Result<T, Error>>) -> Result<Option<T>, String> {
        let Some(runtime) = &self.runtime else { return Err("it is closed".into()) };
        match runtime.block_on(async { tokio::time::timeout(TIMEOUT, request).await }) {
            Ok(Ok(done)) => Ok(Some(done)),
            Ok(Err(Error::NotFound { .. })) => Ok(None),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(format!("no answer within {} s", TIMEOUT.as_secs())),
        }
    }

    fn read(&self, at: &Path) -> Result<Option<Vec<u8>>, String> {
        self.wait(async { Ok(self.store.get(at).await?.bytes().await?.to_vec()) })
    }

    fn write(&self, at: &Path, bytes: &[u8]) -> Result<(), String> {
        self.wait(self.store.put(at, bytes.to_vec().into())).map(drop)
    }

    fn delete(&self, at: &Path) -> Result<(), String> {
        self.wait(self.store.delete(at)).map(drop)
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        // It may not be waited for where async code drops this.
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl Tier for Objects {
    fn most(&self) -> usize {
        MOST
    }

    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, String> {
        self.read(&self.at(key))
    }

    fn put(&self, item: &Item<'_>) -> Result<(), String> {
        self.write(&self.at(&item.key), item.bytes)
    }

    fn remove(&self, keys: &[Key]) -> Result<(), String> {
        keys.iter().try_for_each(|key| self.delete(&self.at(key)))
    }

    fn name(&self, owner: &str, name: &str) -> Result<Option<Named>, String> {
        Ok(self.read(&self.of(owner).join(name))?.and_then(|bytes| Named::decode(&bytes)))
    }

    fn names(&self, owner: &str) -> Result<Vec<(String, Head)>, String> {
        let folder = self.of(owner);
        let head = |meta: object_store::ObjectMeta| async move {
            let end = meta.size.min(Head::BYTES as u64);
            match self.store.get_range(&meta.location, 0..end).await {
                Ok(head) => Ok(meta.location.filename().map(String::from).zip(Head::decode(&head))),
                // Somebody has removed it meanwhile.
                Err(Error::NotFound { .. }) => Ok(None),
                Err(e) => Err(e),
            }
        };
        let all = self.store.list(Some(&folder)).map_ok(head).try_buffered(AT_ONCE).try_collect();
        let all: Vec<Option<(String, Head)>> = self.wait(all)?.unwrap_or_default();
        let mut all: Vec<_> = all.into_iter().flatten().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    fn put_name(&self, owner: &str, name: &str, named: &Named) -> Result<(), String> {
        self.write(&self.of(owner).join(name), &named.encode())
    }

    fn remove_name(&self, owner: &str, name: &str) -> Result<(), String> {
        self.delete(&self.of(owner).join(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_variables_of_the_store_are_settings() {
        let variables = ["AWS_REGION", "TOKEN", "REGION", "bucket", "ENDPOINT", "AWS_ENDPOINT"];
        let all = variables.map(|name| (OsString::from(name), OsString::from(format!("of {name}"))));
        let kept = |name: &str| (name.to_string(), format!("of {name}"));
        assert_eq!(settings(all.into_iter()).collect::<Vec<_>>(), [kept("AWS_REGION"), kept("AWS_ENDPOINT")]);
        #[cfg(unix)]
        {
            use std::os::unix::ffi::OsStringExt;
            let bytes = || OsString::from_vec(vec![b'A', b'W', b'S', b'_', 0xff]);
            let odd = [(bytes(), "x".into()), ("AWS_REGION".into(), bytes()), ("LS_COLORS".into(), bytes())];
            assert_eq!(settings(odd.into_iter()).count(), 0);
        }
    }
}
