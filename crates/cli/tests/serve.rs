//! `anser serve` as a user meets it: says where it listens, serves, ends on Ctrl-C, keeps states whatever ends it.

mod common;

use common::{Folder, anser, fixture};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// A server that runs, with the model that comes with the program.
struct Server {
    process: Child,
    model: String,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Server {
        let mut process = Command::new(env!("CARGO_BIN_EXE_anser"))
            .args(["serve", "--port", "0", "--json", "--device", "cpu", "--quiet"])
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        let text = |name: &str| said[name].as_str().unwrap().to_string();
        Server { process, model: text("model"), address: text("address") }
    }

    /// What it answers with status 200; nothing if the connection breaks.
    fn call(&self, request: &str, body: &Value) -> Option<Value> {
        let mut socket = TcpStream::connect(&self.address).ok()?;
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = format!("{request} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {}", body.len());
        write!(socket, "{head}\r\n\r\n{body}").ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        assert!(head.contains(" 200 "), "{request}: {answer}");
        serde_json::from_str(body).ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn serves_until_it_is_told_to_end() {
    let mut server = Server::start(&[]);
    assert_eq!(server.model, "anser-12m");
    let answer = server.call("POST /v1/completions", &json!({ "prompt": "The", "max_tokens": 3 })).unwrap();
    assert!(answer["choices"][0]["finish_reason"].is_string(), "{answer}");
    if cfg!(unix) {
        assert!(Command::new("kill").args(["-INT", &server.process.id().to_string()]).status().unwrap().success());
    } else {
        server.process.kill().unwrap();
    }
    let code = server.process.wait().unwrap().code();
    assert!(cfg!(not(unix)) || code == Some(130), "{code:?}");
}

#[test]
fn a_text_is_as_probable_as_eval_says() {
    let f = Folder::new("probable");
    let pairs = [("The cats annoy Tim.", "The cats annoys Tim."), ("Mary hurts herself.", "Mary hurts himself.")];
    let lines = pairs.map(|(good, bad)| json!({ "sentence_good": good, "sentence_bad": bad }).to_string() + "\n");
    f.file("pairs.jsonl", lines.concat().as_bytes());
    let model = format!("{}/../../models/anser-12m.safetensors", env!("CARGO_MANIFEST_DIR"));
    let args =
        ["eval", "pairs", "--each", "--json", "--device", "cpu", "--dtype", "f32", "--model", &model, "pairs.jsonl"];
    let (code, out, err) = anser(&f.0, &args);
    assert_eq!(code, 0, "{err}");
    let scored: Value = serde_json::from_str(&out).unwrap();
    let server = Server::start(&["--dtype", "f32"]);
    for (i, (good, bad)) in pairs.iter().enumerate() {
        for (j, text) in [good, bad].into_iter().enumerate() {
            // As lm-evaluation-harness asks: the end of a document, the text, and one token more.
            let mut ids = server.call("POST /tokenize", &json!({ "prompt": text })).unwrap()["tokens"].take();
            ids.as_array_mut().unwrap().insert(0, json!(0));
            let ask = json!({ "prompt": ids, "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0 });
            let said = server.call("POST /v1/completions", &ask).unwrap();
            let each = said["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
            let sum: f64 = each[1..each.len() - 1].iter().map(|l| l.as_f64().unwrap()).sum();
            // To the bit.
            assert_eq!(json!(sum), scored["files"][0]["log_likelihoods"][i][j], "{text}");
        }
    }
}

#[test]
fn it_says_what_the_command_line_says() {
    let (f, server) = (Folder::new("same"), Server::start(&[]));
    let args = ["generate", "--device", "cpu", "--prompt", "He took her by the", "--max-tokens", "40", "--seed", "5"];
    let (code, out, err) = anser(&f.0, &args);
    assert_eq!(code, 0, "{err}");
    let ask = json!({
        "prompt": "He took her by the",
        "max_tokens": 40,
        "seed": 5,
        "top_p": 0.7,
        "penalty_decay": 0.996,
        "sampler_order": "rwkv",
    });
    let written = server.call("POST /v1/completions", &ask).unwrap();
    assert_eq!(format!("{}\n", written["choices"][0]["text"].as_str().unwrap()), out);

    let args = ["chat", "--device", "cpu", "--json", "--temperature", "0", "--max-tokens", "24"];
    let mut chat = assert_cmd::Command::cargo_bin("anser").unwrap();
    let out = chat.args(args).write_stdin("Who are you?\nWhy?\n").output().unwrap();
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();
    let mut messages = Vec::new();
    for turn in said["turns"].as_array().unwrap() {
        messages.push(json!({ "role": "user", "content": turn["user"] }));
        let ask = json!({ "messages": messages, "temperature": 0, "max_tokens": 24 });
        let mut answer = server.call("POST /v1/chat/completions", &ask).unwrap()["choices"][0]["message"].take();
        assert_eq!(answer["content"].as_str().unwrap().trim(), turn["assistant"], "{messages:?}");
        messages.push(json!({ "role": "assistant", "content": answer["content"].take() }));
    }
    assert_eq!(messages.len(), 4);
}

const TALKS: usize = 4;
const TURNS: usize = 24;

/// Turn `turn` of a conversation, which goes on from the state of the turn before and keeps its own under the same name.
fn turn(server: &Server, talk: usize, turn: usize) -> Option<Value> {
    let name = format!("talk-{talk}");
    let ask = json!({
        "prompt": format!("\n\nQuestion {turn} of {talk}:"),
        "max_tokens": 6,
        "ignore_eos": true,
        "logprobs": 0,
        "seed": talk * 1000 + turn,
        "state": if turn == 0 { Value::Null } else { json!(name) },
        "save_as": name,
    });
    Some(server.call("POST /v1/completions", &ask)?["choices"][0].take())
}

/// How many tokens each conversation has that is kept.
fn kept(server: &Server) -> Vec<u64> {
    let all = server.call("GET /v1/states", &Value::Null).unwrap();
    let all = all["data"].as_array().unwrap();
    let of = |talk| all.iter().find(|s| s["id"] == format!("talk-{talk}")).map_or(0, |s| s["tokens"].as_u64().unwrap());
    (0..TALKS).map(of).collect()
}

#[test]
fn conversations_outlive_servers_that_are_killed() {
    // Nothing happens to this one: what each turn says, and how many tokens its conversation has then.
    let calm = Server::start(&[]);
    let talks: Vec<Vec<(Value, u64)>> = (0..TALKS)
        .map(|talk| (0..TURNS).map(|t| (turn(&calm, talk, t).unwrap(), kept(&calm)[talk])).collect())
        .collect();
    drop(calm);

    let f = Folder::new("killed");
    let mut acknowledged = [0; TALKS];
    for round in 0..5 {
        let server = Server::start(&["--states", &f.0.display().to_string()]);
        // A state is that after the turn that was acknowledged, or after the next, whose answer may not have come.
        let next: Vec<usize> = kept(&server)
            .into_iter()
            .zip(acknowledged)
            .enumerate()
            .map(|(talk, (tokens, acknowledged))| {
                let known = |n: &usize| tokens == if *n == 0 { 0 } else { talks[talk][n - 1].1 };
                let turns = (acknowledged..=acknowledged + 1).find(known);
                turns.unwrap_or_else(|| panic!("talk {talk}: {tokens} tokens after {acknowledged} turns"))
            })
            .collect();
        let last = round == 4;
        let said = AtomicUsize::new(0);
        let pid = server.process.id();
        std::thread::scope(|threads| {
            for (talk, count) in acknowledged.iter_mut().enumerate() {
                let (server, said, talks, next) = (&server, &said, &talks, next[talk]);
                threads.spawn(move || {
                    *count = next;
                    while *count < TURNS {
                        let Some(answer) = turn(server, talk, *count) else { break };
                        assert_eq!(answer, talks[talk][*count].0, "talk {talk}, turn {count}");
                        *count += 1;
                        said.fetch_add(1, Ordering::SeqCst);
                    }
                    said.fetch_add(1000, Ordering::SeqCst);
                });
            }
            // In the midst of whatever it does after some turns, at a moment that differs.
            while said.load(Ordering::SeqCst) < if last { 1000 * TALKS } else { 9 } {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !last {
                std::thread::sleep(Duration::from_millis(7 * round));
                kill(pid);
            }
        });
    }
    assert_eq!(acknowledged, [TURNS; TALKS]);
}

/// Ends a process at once, without a word to it.
fn kill(pid: u32) {
    let (name, args) = match cfg!(unix) {
        true => ("kill", vec!["-KILL".into(), pid.to_string()]),
        false => ("taskkill", vec!["/F".into(), "/PID".into(), pid.to_string()]),
    };
    assert!(Command::new(name).args(args).status().unwrap().success());
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
        (["--redis", "http://localhost"], "redis://"),
        (["--object-store", "bucket"], "s3://"),
        (["--initial-state", "poet=nowhere.pth"], "nowhere.pth"),
        (["--initial-state", &format!("poet={other}")], "no tuned initial state"),
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
    let said: Value = serde_json::from_str(&out).unwrap();
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
