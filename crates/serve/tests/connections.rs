//! Connections: TLS, clients that are slow or do nothing.

mod common;

use anser_infer::EngineOptions;
use anser_serve::{Options, Tls};
use common::Server;
use rustls::pki_types::CertificateDer;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn options() -> Options {
    Options { max_tokens: 100_000, write_timeout: Duration::from_secs(1), ..common::options() }
}

fn start(options: Options, tls: Option<Tls>) -> Server {
    Server::over(options, EngineOptions::default(), tls)
}

/// The answer to a request for `/health` over a connection.
fn health(mut connection: impl Read + Write) -> std::io::Result<String> {
    connection.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A request for a stream that never ends.
const ENDLESS: &str =
    r#"{"prompt": "He", "stream": true, "max_tokens": 100000, "logprobs": 5, "n": 2, "logit_bias": {"0": -100}}"#;

fn post(body: &str) -> String {
    format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn until(what: &str, most: Duration, condition: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < most, "waited for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    start.elapsed()
}

/// Certificates in a folder that goes away at the end.
struct Certificates(PathBuf);

impl Certificates {
    fn new() -> Certificates {
        let folder = std::env::temp_dir().join(format!("anser-tls-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Certificates(folder)
    }

    fn files(&self) -> [PathBuf; 2] {
        ["cert.pem", "key.pem"].map(|name| self.0.join(name))
    }

    /// Writes a new one.
    fn make(&self) -> CertificateDer<'static> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
        let [cert, key] = self.files();
        std::fs::write(cert, made.cert.pem()).unwrap();
        std::fs::write(key, made.signing_key.serialize_pem()).unwrap();
        made.cert.der().clone()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The same over TLS, by a client that trusts one certificate.
fn secure_health(socket: TcpStream, trusted: &CertificateDer<'static>) -> std::io::Result<String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
    let client = rustls::ClientConnection::new(config, "localhost".try_into().unwrap()).unwrap();
    health(rustls::StreamOwned::new(client, socket))
}

#[test]
fn tls_and_its_certificate_are_renewed() {
    let folder = Certificates::new();
    let [cert, key] = folder.files();
    assert!(Tls::open(&cert, &key).err().unwrap().contains("cert.pem"));
    let first = folder.make();
    assert!(Tls::open(&key, &cert).is_err());
    let tls = Tls::open(&cert, &key).unwrap();
    let s = start(options(), Some(tls.clone()));
    assert!(secure_health(s.connect(), &first).unwrap().contains("200 OK"));
    let second = folder.make();
    assert!(secure_health(s.connect(), &first).is_ok() && secure_health(s.connect(), &second).is_err());
    tls.reload().unwrap();
    assert!(secure_health(s.connect(), &first).is_err());
    assert!(secure_health(s.connect(), &second).unwrap().contains("200 OK"));
    // What cannot be read leaves it as it is.
    std::fs::write(&key, "nothing").unwrap();
    assert!(tls.reload().unwrap_err().contains("key.pem"));
    assert!(secure_health(s.connect(), &second).is_ok());
    // Plain text is no handshake, and neither is silence for longer than a client may take.
    assert!(health(s.connect()).map_or(true, |answer| !answer.contains("200 OK")));
    let (start, mut silent) = (Instant::now(), s.connect());
    let _ = silent.read(&mut [0]);
    assert!(start.elapsed() > Duration::from_secs(1) && start.elapsed() < Duration::from_secs(8));
}

#[test]
fn a_client_that_never_reads_is_dropped() {
    let s = start(options(), None);
    let mut socket = s.connect();
    socket.write_all(post(ENDLESS).as_bytes()).unwrap();
    until("it to run", Duration::from_secs(10), || s.engine.stats().running == 2);
    // What the system holds for it fills up first.
    until("it to be dropped", Duration::from_secs(40), || s.engine.stats().cancelled == 2);
    assert_eq!(s.engine.stats().running, 0);
    // One that reads slowly is not.
    let mut socket = s.connect();
    socket.write_all(post(ENDLESS).as_bytes()).unwrap();
    for _ in 0..40 {
        std::thread::sleep(Duration::from_millis(100));
        assert!(socket.read(&mut [0; 16 << 10]).unwrap() > 0);
    }
    assert_eq!(s.engine.stats().cancelled, 2);
    drop(socket);
    until("it to be cancelled", Duration::from_secs(20), || s.engine.stats().cancelled == 4);
}

#[test]
fn headers_byte_by_byte_are_cut_off() {
    let s = start(options(), None);
    let (mut socket, start) = (s.connect(), Instant::now());
    // It would take more than a minute.
    let sent = "GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".bytes().chain(std::iter::repeat_n(b'a', 600));
    for byte in sent {
        if socket.write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

/// Run by the test below in a process of its own, as both ends of a connection are files: opens connections, says so, and holds them.
#[test]
fn holds_connections_until_it_is_told() {
    let Ok(told) = std::env::var("ANSER_TEST_CONNECTIONS") else { return };
    let (address, count) = told.split_once(' ').unwrap();
    let count: usize = count.parse().unwrap();
    rlimit::increase_nofile_limit(count as u64 + 100).unwrap();
    let idle: Vec<TcpStream> = (0..count).map(|_| TcpStream::connect(address).unwrap()).collect();
    println!("holding {}", idle.len());
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[test]
fn ten_thousand_idle_connections_keep_nobody_out() {
    use std::io::{BufRead, BufReader};
    // What else runs in this process has files, too.
    let files = rlimit::increase_nofile_limit(12_000).unwrap();
    let count = files.saturating_sub(1000).min(10_000);
    assert!(count == 10_000 || files < 11_000, "{files} files");
    let many = Options { connections: 20_000, read_timeout: Duration::from_secs(120), ..options() };
    let s = start(many, None);
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["holds_connections_until_it_is_told", "--exact", "--nocapture"])
        .env("ANSER_TEST_CONNECTIONS", format!("{} {count}", s.address))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|l| l.contains(&format!("holding {count}"))));
    eprintln!("{count} idle connections");
    let start = Instant::now();
    assert!(health(s.connect()).unwrap().contains("200 OK"));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(child.try_wait().unwrap().is_none(), "they are still there");
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_server_whose_engine_has_failed_ends() {
    let server = start(options(), None);
    assert!(health(server.connect()).unwrap().contains("200 OK"));
    let mut stream = server.engine.submit(common::fatal()).unwrap();
    while stream.recv().is_some() {}
    let (address, ended) = (server.address, server.ended());
    assert!(ended.is_err_and(|why| why.contains("panicked")));
    assert!(TcpStream::connect(address).is_err());
}
