//! `anser serve` as a user meets it: says where it listens, serves, ends on Ctrl-C.

mod common;

use common::{Folder, anser, fixture};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

#[test]
fn serves_until_it_is_told_to_end() {
    let mut server = Command::new(env!("CARGO_BIN_EXE_anser"))
        .args(["serve", "--port", "0", "--json", "--device", "cpu", "--quiet"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(said["model"], "anser-12m");
    let mut socket = TcpStream::connect(said["address"].as_str().unwrap()).unwrap();
    let body = r#"{"prompt": "The", "max_tokens": 3}"#;
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close";
    write!(socket, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"finish_reason\""), "{answer}");

    if cfg!(unix) {
        assert!(Command::new("kill").args(["-INT", &server.id().to_string()]).status().unwrap().success());
    } else {
        server.kill().unwrap();
    }
    let code = server.wait().unwrap().code();
    assert!(cfg!(not(unix)) || code == Some(130), "{code:?}");
}

#[test]
fn what_cannot_be_served_is_said() {
    let f = Folder::new("serve");
    let keys = f.file("keys.txt", b"# none\n");
    let template = f.file("bad.jinja", b"{% for %}");
    let other = fixture("rwkv7.pth");
    for (args, says) in [
        (["--model", &other], "the model has 300 tokens"),
        (["--api-keys", &keys], "the file has no key"),
        (["--chat-template", &template], "bad.jinja"),
        (["--model", "nowhere.pth"], "nowhere.pth"),
        (["--host", "256.0.0.1"], "256.0.0.1"),
        (["--cors", "*"], "one by one"),
    ] {
        let (code, _, err) = anser(&f.0, &["serve", "--port", "0", "--device", "cpu", args[0], args[1]]);
        assert!(code == 1 && err.contains(says) && err.trim_end().lines().count() == 1, "{args:?}: {err}");
    }
}

#[test]
fn a_load_is_measured() {
    let f = Folder::new("load");
    let args =
        ["bench", "serve", "--concurrency", "3", "--seconds", "1", "--prompt-tokens", "20", "--answer-tokens", "7"];
    let (code, out, err) = anser(&f.0, &[&args[..], &["--json", "--device", "cpu", "--plot", "load.svg"]].concat());
    assert_eq!(code, 0, "{err}");
    let said: serde_json::Value = serde_json::from_str(&out).unwrap();
    let number = |name: &str| said[name].as_f64().unwrap();
    assert!(number("answered") >= 3.0 && number("answered") == number("requests"), "{said}");
    let tokens = number("tokens_per_second") * number("seconds");
    assert!((tokens - 7.0 * number("answered")).abs() < 1e-6, "{said}");
    let [first, whole] = ["first_seconds", "whole_seconds"].map(|n| said[n]["p50"].as_f64().unwrap());
    assert!(0.0 < first && first < whole, "{said}");
    for name in ["first", "between", "whole"] {
        assert!(std::fs::read_to_string(f.0.join(format!("load-{name}.svg"))).unwrap().contains("<polyline"));
    }
    for (more, says) in [
        (["--url", "https://localhost"], "http://"),
        (["--url", "http://127.0.0.1:9"], "connecting"),
        (["--rate", "0"], "--rate"),
        (["--lengths", "odd"], "uniform"),
        (["--preset", "none"], "no preset"),
    ] {
        let (code, _, err) = anser(&f.0, &["bench", "serve", "--device", "cpu", more[0], more[1]]);
        assert!(code != 0 && err.contains(says), "{more:?}: {err}");
    }
}
