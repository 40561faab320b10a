//! States that engines share through Redis and through an object store, and what happens when these fail. ANSER_TEST_OBJECT_STORE, such as s3://BUCKET/FOLDER,
//! names another store to be tried, with AWS_* variables.
#![cfg(all(feature = "redis", feature = "object-store"))]

mod common;

use anser_infer::Sampling;
use anser_infer::engine::{End, Engine, EngineOptions, Refused, Request, Start, StateError};
use common::{Answer, Folder, alone, answer, engine, hybrid, plain, prompt, request};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

/// A prompt of an owner, from a named state or from nothing, kept under a name or not.
fn go(engine: &Engine, p: &[u32], from: Option<&str>, to: Option<&str>) -> Result<Answer, Refused> {
    let start = from.map_or(Start::Empty, |name| Start::Named(name.into()));
    let r = Request { start, sampling: greedy(), save_as: to.map(String::from), ..request(p.to_vec(), 6) };
    engine.submit(r).map(answer)
}

/// The same, and how many tokens were read.
fn count(engine: &Engine, p: &[u32], from: Option<&str>, to: Option<&str>) -> (Answer, u64) {
    let before = engine.stats().tokens_read;
    let a = go(engine, p, from, to).unwrap();
    assert_eq!(a.end, Some(End::Length));
    (a, engine.stats().tokens_read - before)
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "waited for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A Redis of its own that keeps nothing on disk.
struct RedisServer {
    port: u16,
    process: Child,
}

impl RedisServer {
    /// None where the program isn't there.
    fn start() -> Option<RedisServer> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = RedisServer::at(port);
        if server.is_none() {
            eprintln!("there is no redis-server here: this test does nothing");
        }
        server
    }

    fn at(port: u16) -> Option<RedisServer> {
        let args = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port", &port.to_string()];
        let process = Command::new("redis-server").args(args).stdout(Stdio::null()).spawn().ok()?;
        let server = RedisServer { port, process };
        until("Redis", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Some(server)
    }

    fn options(&self) -> EngineOptions {
        EngineOptions { redis: Some(url(self.port)), stride: 64, ..EngineOptions::default() }
    }
}

fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}")
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Everything that engines do with states that they share.
fn go_on_from_each_other(options: &EngineOptions) {
    for of in [plain(), hybrid()] {
        let (a, b) = (engine(&of, options.clone()), engine(&of, options.clone()));
        let p = prompt(4, 40);
        let first = count(&a, &p, None, Some("x")).0;
        let so_far = [&p[..], &first.tokens].concat();
        assert_eq!(first.tokens, alone(&of, &p, &greedy(), 0, 6));
        // The state alone is read: one token, and those that are written but the last.
        let (on, read) = count(&b, &[3], Some("x"), Some("x"));
        assert_eq!((&on.tokens, read), (&alone(&of, &[&so_far[..], &[3]].concat(), &greedy(), 0, 6), 1 + 6));
        let so_far = [&so_far[..], &[3], &on.tokens].concat();
        let (back, read) = count(&a, &[5], Some("x"), None);
        assert_eq!((back.tokens, read), (alone(&of, &[&so_far[..], &[5]].concat(), &greedy(), 0, 6), 1 + 5));
        let names =
            |e: &Engine| e.states().list("a").unwrap().into_iter().map(|i| (i.name, i.tokens)).collect::<Vec<_>>();
        a.states().branch("a", "x", "y").unwrap();
        assert_eq!(names(&b), [("x".to_string(), 53), ("y".into(), 53)]);
        assert!(b.states().list("b").unwrap().is_empty());
        b.states().delete("a", "x").unwrap();
        assert!(matches!(a.states().get("a", "x"), Err(StateError::Missing(_))));
        assert!(matches!(go(&a, &[1], Some("x"), None), Err(Refused::Invalid(m)) if m.contains("no state")));
        // The branch is not gone with it, not even for a server that never saw it.
        drop((a, b));
        let c = engine(&of, options.clone());
        assert_eq!(count(&c, &[6], Some("y"), None).1, 1 + 5);
        assert!(c.tiers_are_up());
        c.states().delete("a", "y").unwrap();
    }
}

trait Up {
    fn tiers_are_up(&self) -> bool;
}

impl Up for Engine {
    fn tiers_are_up(&self) -> bool {
        self.states().tiers().iter().all(|t| t.up && t.errors == 0)
    }
}

#[test]
fn engines_share_named_states() {
    let folder = Folder::new("objects");
    let object_store = Some(format!("file://{}", folder.0.display()));
    go_on_from_each_other(&EngineOptions { object_store: object_store.clone(), ..EngineOptions::default() });
    if let Ok(url) = std::env::var("ANSER_TEST_OBJECT_STORE") {
        go_on_from_each_other(&EngineOptions { object_store: Some(url), ..EngineOptions::default() });
    }
    let Some(redis) = RedisServer::start() else { return };
    go_on_from_each_other(&redis.options());
    let Some(redis) = RedisServer::start() else { return };
    go_on_from_each_other(&EngineOptions { object_store, ..redis.options() });
    // What one server has in memory doesn't matter, nor what is in its folder.
    let Some(redis) = RedisServer::start() else { return };
    go_on_from_each_other(&EngineOptions { cache_bytes: 0, ..redis.options() });
    let below = Folder::new("below");
    let (of, mut options) = (plain(), EngineOptions { folder: Some(below.0.clone()), ..redis.options() });
    count(&engine(&of, options.clone()), &prompt(9, 40), None, Some("x"));
    options.folder = None;
    assert_eq!(count(&engine(&of, options), &[1], Some("x"), None).1, 1 + 5);
}

#[test]
fn engines_share_prefixes_in_redis() {
    let Some(redis) = RedisServer::start() else { return };
    for of in [plain(), hybrid()] {
        let (a, b) = (engine(&of, redis.options()), engine(&of, redis.options()));
        let p = prompt(5, 300);
        let (first, read) = count(&a, &p, None, None);
        assert_eq!(read, 300 + 5);
        // All is written when a change that comes after it is.
        assert!(a.states().delete("a", "nothing").is_err());
        let (second, read) = count(&b, &p, None, None);
        assert_eq!((&second.tokens, second.cached, read), (&first.tokens, 300, 5));
        // On from the other's answer, and away from its prompt between two strides.
        let longer = [&p[..], &first.tokens[..5], &[9, 8, 7]].concat();
        assert_eq!(count(&b, &longer, None, None).0.cached, 305);
        let other = [&p[..200], &[9, 8, 7]].concat();
        let kept = if of.1.config().hybrid.is_some() { 128 } else { 192 };
        let (third, _) = count(&b, &other, None, None);
        assert_eq!((third.cached, third.tokens), (kept, alone(&of, &other, &greedy(), 0, 6)));
        let r = Request { owner: "b".into(), sampling: greedy(), ..request(p, 6) };
        assert_eq!(answer(b.submit(r).unwrap()).cached, 0, "it is another owner's");
    }
}

#[test]
fn redis_forgets_what_nobody_uses() {
    let Some(redis) = RedisServer::start() else { return };
    let of = plain();
    let options = EngineOptions { redis_expiry: Duration::from_secs(1), ..redis.options() };
    let (a, b) = (engine(&of, options.clone()), engine(&of, options));
    count(&a, &prompt(1, 100), None, Some("x"));
    assert_eq!(b.states().list("a").unwrap().len(), 1);
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(b.states().list("a").unwrap().len(), 0);
    assert_eq!(count(&b, &prompt(1, 100), None, None).0.cached, 0);
}

#[test]
fn requests_go_on_while_redis_is_down() {
    let Some(mut redis) = RedisServer::start() else { return };
    let of = plain();
    let a = engine(&of, redis.options());
    count(&a, &prompt(1, 100), None, Some("x"));
    std::thread::scope(|scope| {
        let ask = |i: u32| {
            for j in 0..30 {
                let p = prompt(100 * i + j, 20 + j);
                assert_eq!(go(&a, &p, None, None).unwrap().tokens, alone(&of, &p, &greedy(), 0, 6));
            }
        };
        let asking: Vec<_> = (0..4).map(|i| scope.spawn(move || ask(i))).collect();
        std::thread::sleep(Duration::from_millis(50));
        redis.process.kill().unwrap();
        redis.process.wait().unwrap();
        asking.into_iter().for_each(|a| a.join().unwrap());
    });
    let tiers = || a.states().tiers().pop().unwrap();
    assert!(!tiers().up && tiers().errors > 0);
    assert!(matches!(go(&a, &[1], Some("x"), None), Err(Refused::Unreachable(m)) if m.contains("redis")));
    assert!(matches!(a.states().list("a"), Err(StateError::Unreachable(_))));
    let end = go(&a, &prompt(2, 50), None, Some("y")).unwrap().end;
    assert!(matches!(end, Some(End::Unreachable(_))), "{end:?}");
    // It comes back empty, and is used again.
    redis = RedisServer::at(redis.port).unwrap();
    until("it to be used again", || go(&a, &prompt(2, 50), None, Some("y")).unwrap().end == Some(End::Length));
    assert!(tiers().up);
    assert_eq!(count(&engine(&of, redis.options()), &[1], Some("y"), None).1, 1 + 5);
}

#[test]
fn nobody_waits_for_another_ones_state() {
    // It takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let redis = Some(url(silent.local_addr().unwrap().port()));
    let engine = engine(&plain(), EngineOptions { redis, ..EngineOptions::default() });
    let mut endless = engine.submit(request(prompt(1, 10), usize::MAX)).unwrap();
    assert!(endless.recv().is_some());
    // After a while the next request tries it again.
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    let waits = std::thread::spawn({
        let engine = engine.clone();
        move || (go(&engine, &prompt(2, 10), None, None).unwrap().end, start.elapsed())
    });
    let mut last = Instant::now();
    while !waits.is_finished() {
        assert!(endless.recv().is_some());
        assert!(last.elapsed() < Duration::from_millis(1000), "a token after {:?}", last.elapsed());
        last = Instant::now();
    }
    let (end, waited) = waits.join().unwrap();
    assert_eq!(end, Some(End::Length));
    assert!(waited > Duration::from_secs(2) && waited < Duration::from_secs(6), "{waited:?}");
}

#[test]
fn an_object_store_keeps_no_more_than_it_must() {
    let folder = Folder::new("one-object");
    let files = |of: &str| {
        let models = std::fs::read_dir(&folder.0).unwrap().map(|e| e.unwrap().path());
        models.flat_map(|m| std::fs::read_dir(m.join(of)).unwrap().map(|e| e.unwrap().path())).collect::<Vec<_>>()
    };
    let of = plain();
    let options =
        EngineOptions { object_store: Some(format!("file://{}", folder.0.display())), ..EngineOptions::default() };
    let a = engine(&of, options.clone());
    let first = count(&a, &prompt(1, 30), None, Some("x")).0;
    let so_far = [&prompt(1, 30)[..], &first.tokens].concat();
    count(&a, &[7], Some("x"), Some("y"));
    assert_eq!(files("states").len(), 2);
    count(&a, &[8], Some("x"), Some("y"));
    assert_eq!(files("states").len(), 2);
    a.states().delete("a", "y").unwrap();
    assert_eq!(files("states").len(), 1);
    // A damaged snapshot is read again from its tokens.
    let path = files("states").pop().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (on, read) = count(&engine(&of, options.clone()), &[3], Some("x"), None);
    assert_eq!((on.tokens, read), (alone(&of, &[&so_far[..], &[3]].concat(), &greedy(), 0, 6), 36 + 1 + 5));
    // And one that cannot be written to is down.
    std::fs::remove_dir_all(&folder.0).unwrap();
    std::fs::write(&folder.0, "in the way").unwrap();
    let end = go(&a, &prompt(2, 30), None, Some("x")).unwrap().end;
    assert!(matches!(end, Some(End::Unreachable(_))), "{end:?}");
    assert_eq!(go(&a, &prompt(3, 30), None, None).unwrap().end, Some(End::Length));
    std::fs::remove_file(&folder.0).unwrap();
    until("it to be used again", || go(&a, &prompt(2, 30), None, Some("x")).unwrap().end == Some(End::Length));
}

#[test]
fn urls_that_make_no_sense() {
    let of = plain();
    let start = |options| Engine::start(of.0.clone(), of.1.clone(), options).err().unwrap().to_string();
    let e = start(EngineOptions { redis: Some("http://:secret@x".into()), ..EngineOptions::default() });
    assert!(e.contains("redis://") && !e.contains("secret"), "{e}");
    let e = start(EngineOptions { object_store: Some("bucket".into()), ..EngineOptions::default() });
    assert!(e.contains("s3://"), "{e}");
}
