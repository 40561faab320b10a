//! The server as a client meets it, with the bundled model.

mod common;

use anser_infer::EngineOptions;
use anser_serve::load::{self, Arrivals, Lengths, Measured, Target};
use anser_serve::{Keys, Options};
use common::{Server, options};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn completions() {
    let s = Server::plain();
    let ask = json!({ "prompt": "He took her by the", "max_tokens": 12, "temperature": 0 });
    let with = |more: Value| {
        let mut body = ask.clone();
        more.as_object().unwrap().iter().for_each(|(k, v)| body[k] = v.clone());
        body
    };
    let whole = s.post("/v1/completions", ask.clone());
    let text = whole["choices"][0]["text"].as_str().unwrap().to_string();
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");

    // Token ids are the same prompt, and many prompts give what each gives alone.
    let ids = s.post("/tokenize", json!({ "prompt": "He took her by the" }))["tokens"].clone();
    assert_eq!(s.post("/detokenize", json!({ "tokens": ids }))["content"], "He took her by the");
    let many = s.post("/v1/completions", with(json!({ "prompt": [ids, ids], "n": 2 })));
    let texts: Vec<_> = many["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, [&text; 4]);
    assert_eq!(many["choices"][3]["index"], 3);

    // A stream is the same in pieces.
    let events =
        s.events("/v1/completions", with(json!({ "stream": true, "stream_options": { "include_usage": true } })));
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let streamed: String = chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect();
    assert_eq!(streamed, text);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 12);
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "length");

    // A stop text that begins within one token and ends within another.
    let stop: String = text.chars().skip(4).take(9).collect();
    let stopped = s.post("/v1/completions", with(json!({ "stop": ["zzz", stop], "logprobs": 0 })));
    assert_eq!(stopped["choices"][0]["text"], text[..text.find(&stop).unwrap()]);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");

    // A seed repeats, another one doesn't.
    let seeded = |seed: u64| {
        s.post("/v1/completions", with(json!({ "temperature": 1, "seed": seed })))["choices"][0]["text"].clone()
    };
    assert_eq!(seeded(5), seeded(5));
    assert_ne!(seeded(5), seeded(6));
}

#[test]
fn many_answers_have_one_prompt() {
    let s = Server::plain();
    let prompt = "It was a dark night. ".repeat(20);
    let count = s.post("/tokenize", json!({ "prompt": prompt }))["count"].as_u64().unwrap();
    let read = |path: &str, body: Value| {
        let before = s.engine.stats();
        let usage = s.post(path, body)["usage"].clone();
        let after = s.engine.stats();
        (usage, after.tokens_read - before.tokens_read - (after.tokens_written - before.tokens_written - 4))
    };
    let body = json!({ "prompt": prompt, "n": 4, "max_tokens": 8, "ignore_eos": true });
    let (usage, own) = read("/v1/completions", body);
    assert_eq!(own, count);
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(count), &json!(32)));
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    let body =
        json!({ "messages": [{ "role": "user", "content": prompt }], "n": 4, "max_tokens": 8, "ignore_eos": true });
    let (usage, own) = read("/v1/chat/completions", body);
    assert_eq!(usage["prompt_tokens"], own);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
}

#[test]
fn log_probabilities() {
    let s = Server::plain();
    // As lm-evaluation-harness scores a text.
    let body =
        json!({ "prompt": "He took her by the hand", "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0 });
    let scored = s.post("/v1/completions", body);
    let l = &scored["choices"][0]["logprobs"];
    let n = s.post("/tokenize", json!({ "prompt": "He took her by the hand" }))["count"].as_u64().unwrap() as usize;
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(l[list].as_array().unwrap().len(), n + 1, "{list}");
    }
    assert!(l["token_logprobs"][0].is_null());
    let joined: String = l["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(scored["choices"][0]["text"], joined);
    // The prompt alone gives the same.
    let body = json!({ "prompt": "He took her by the hand", "max_tokens": 0, "echo": true, "logprobs": 1 });
    let alone = s.post("/v1/completions", body);
    assert_eq!(
        alone["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap()[..],
        l["token_logprobs"].as_array().unwrap()[..n]
    );
    assert_eq!(alone["choices"][0]["text"], "He took her by the hand");
    // " hand" is what follows: the best token has the log probability that is the highest.
    let best = l["top_logprobs"][n - 1].as_object().unwrap();
    assert!(best.values().next().unwrap().as_f64() >= l["token_logprobs"][n - 1].as_f64());

    let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 5, "logprobs": true, "top_logprobs": 3, "temperature": 0 });
    let chat = s.post("/v1/chat/completions", body);
    let content = chat["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(!content.is_empty() && content.iter().all(|t| t["top_logprobs"].as_array().unwrap().len() == 3));
    assert!(content.iter().all(|t| t["top_logprobs"][0]["logprob"] == t["logprob"]));
}

#[test]
fn chat_and_states() {
    let s = Server::plain();
    let user = |text: &str| json!([{ "role": "user", "content": text }]);
    let talk = |more: Value| {
        let mut body = json!({ "messages": user("Who are you?"), "max_tokens": 16, "temperature": 0 });
        more.as_object().unwrap().iter().for_each(|(k, v)| body[k] = v.clone());
        body
    };
    let whole = s.post("/v1/chat/completions", talk(json!({ "save_as": "talk" })));
    let answer = whole["choices"][0]["message"]["content"].as_str().unwrap().to_string();
    let events = s.events("/v1/chat/completions", talk(json!({ "stream": true })));
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let streamed: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(streamed, answer);

    // To go on from a state gives what the whole conversation gives.
    let listed = s.get("/v1/states");
    assert_eq!(listed["data"][0]["id"], "talk");
    assert!(listed["data"][0]["tokens"].as_u64().unwrap() > 16);
    let next = s.post("/v1/chat/completions", talk(json!({ "messages": user("Why?"), "state": "talk" })));
    let prompt = format!("User: Who are you?\n\nAssistant: {answer}\n\nUser: Why?\n\nAssistant:");
    let all = s.post(
        "/v1/completions",
        json!({ "prompt": prompt, "max_tokens": 16, "temperature": 0, "stop": ["\n\nUser:"] }),
    );
    assert_eq!(next["choices"][0]["message"]["content"], all["choices"][0]["text"].as_str().unwrap().trim_start());

    // The end of a turn that the model has written is not written again.
    for (regex, more) in [(" yes", 1), (" yes\n\n", 0)] {
        let ended = s.post("/v1/chat/completions", talk(json!({ "guided_regex": regex, "save_as": "ended" })));
        let count = |kind: &str| ended["usage"][kind].as_u64().unwrap();
        let read = count("prompt_tokens") + count("completion_tokens") + more;
        assert_eq!(s.get("/v1/states/ended")["tokens"], read, "{regex:?} {ended}");
    }

    let branch = s.post("/v1/states/talk/branch", json!({ "to": "other" }));
    assert_eq!(branch["tokens"], listed["data"][0]["tokens"]);
    let (status, said) = s.refused("/v1/states/talk/branch", r#"{"to": "other"}"#);
    assert_eq!((status, &said["error"]["param"]), (409, &json!("to")), "{said}");
    assert_eq!(s.call("DELETE", "/v1/states/talk", None, "").status(), 200);
    assert_eq!(s.call("DELETE", "/v1/states/talk", None, "").status(), 404);
    let gone = s.refused("/v1/chat/completions", &talk(json!({ "state": "talk" })).to_string());
    assert_eq!(gone.0, 400);
    let again = s.post("/v1/chat/completions", talk(json!({ "messages": user("Why?"), "state": "other" })));
    assert_eq!(again["choices"][0]["message"], next["choices"][0]["message"]);
}

#[test]
fn answers_of_a_given_form() {
    let s = Server::plain();
    let schema = json!({
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 12 }, "age": { "type": "integer", "minimum": 0, "maximum": 99 } },
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "person", "schema": schema } });
    for seed in 0..4 {
        let body = json!({ "messages": [{ "role": "user", "content": "Who?" }], "max_tokens": 400, "seed": seed, "response_format": format });
        let chat = s.post("/v1/chat/completions", body);
        let text = chat["choices"][0]["message"]["content"].as_str().unwrap();
        let person: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!(person["name"].is_string() && person["age"].is_u64(), "{text}");
        assert_eq!(chat["choices"][0]["finish_reason"], "stop");
    }
    let body = json!({ "prompt": "The year", "max_tokens": 40, "guided_regex": " [0-9]{4}-(am|pm)", "n": 3 });
    for choice in s.post("/v1/completions", body)["choices"].as_array().unwrap() {
        let text = choice["text"].as_str().unwrap();
        assert!(text.len() == 8 && text[1..5].bytes().all(|b| b.is_ascii_digit()) && text.ends_with('m'), "{text}");
    }
    let (status, error) = s.refused("/v1/completions", r#"{"prompt": "a", "guided_regex": "("}"#);
    assert_eq!((status, error["error"]["param"].as_str()), (400, Some("guided_regex")));
}

#[test]
fn the_document_and_the_page() {
    let s = Server::plain();
    let document = s.get("/openapi.json");
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, about) in methods.as_object().unwrap() {
            let at = path.replace("{name}", "anser-12m").replace("{id}", "none");
            let status = s.call(&method.to_uppercase(), &at, None, "{}").status().as_u16();
            let kept = path.starts_with("/v1/states/") || path.ends_with("{id}");
            assert!(status != 405 && (status != 404 || kept), "{method} {path}");
            // Whoever must send fields is told so.
            let schema = about["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str();
            if let Some(name) = schema.and_then(|r| r.rsplit('/').next()) {
                let needs = document["components"]["schemas"][name]["required"].is_array();
                assert!(!needs || status == 400, "{method} {path} {status}");
            }
        }
    }
    let page = s.call("GET", "/", None, "").body_mut().read_to_string().unwrap();
    for file in ["page.css", "page.js"] {
        assert!(page.contains(file) && s.call("GET", &format!("/{file}"), None, "").status() == 200);
    }
    let docs = s.call("GET", "/docs", None, "").body_mut().read_to_string().unwrap();
    for file in ["docs.css", "docs.js", "openapi.json"] {
        assert!(docs.contains(file) && s.call("GET", &format!("/{file}"), None, "").status() == 200);
    }
    assert_eq!(s.call("GET", "/markdown.js", None, "").headers()["x-content-type-options"], "nosniff");
}

#[test]
fn anthropic_messages() {
    let s = Server::plain();
    let ask =
        json!({ "messages": [{ "role": "user", "content": "Who are you?" }], "max_tokens": 16, "temperature": 0 });
    let whole = s.post("/v1/messages", ask.clone());
    let chat = s.post("/v1/chat/completions", ask.clone());
    assert_eq!(whole["content"][0]["text"], chat["choices"][0]["message"]["content"]);
    let mut streamed = ask.clone();
    streamed["stream"] = json!(true);
    let events: Vec<Value> =
        s.events("/v1/messages", streamed).iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let text: String = events.iter().filter_map(|e| e["delta"]["text"].as_str()).collect();
    assert_eq!(whole["content"][0]["text"], text);
    let kinds: Vec<_> =
        events.iter().map(|e| e["type"].as_str().unwrap()).filter(|k| *k != "content_block_delta").collect();
    assert_eq!(kinds, ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]);
    let word: String = text.chars().skip(2).take(3).collect();
    let mut stopped = ask.clone();
    stopped["stop_sequences"] = json!([word]);
    let stopped = s.post("/v1/messages", stopped);
    assert_eq!((&stopped["stop_reason"], &stopped["stop_sequence"]), (&json!("stop_sequence"), &json!(word)));
    let (status, error) = s.refused("/v1/messages", r#"{"messages": [{"role": "user", "content": "a"}]}"#);
    assert_eq!((status, error["type"].as_str()), (400, Some("error")));
    let (status, error) = s.refused("/v1/messages", "no JSON");
    assert_eq!((status, error["type"].as_str()), (400, Some("error")));
}

#[test]
fn embeddings() {
    let s = Server::plain();
    let many = s.post("/v1/embeddings", json!({ "input": ["a cat", "a dog"] }));
    let one = s.post("/v1/embeddings", json!({ "input": "a dog" }));
    assert_eq!(many["data"][1]["embedding"], one["data"][0]["embedding"]);
    assert_ne!(many["data"][0]["embedding"], many["data"][1]["embedding"]);
    let v: Vec<f64> = serde_json::from_value(one["data"][0]["embedding"].clone()).unwrap();
    assert!((v.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-4);
}

#[test]
fn what_is_wrong_is_said() {
    let s = Server::plain();
    for (body, status, says) in [
        ("{", 400, "not a JSON object"),
        (r#"{"prompt": "a", "temperature": NaN}"#, 400, "not a JSON object"),
        (r#"{"prompt": "a", "temperature": -1}"#, 400, "temperature"),
        (r#"{"prompt": "a", "temperature": "hot"}"#, 400, "temperature"),
        (r#"{"prompt": "a", "top_p": 1.5}"#, 400, "top_p"),
        (r#"{"prompt": "a", "n": 1000000}"#, 400, "n: "),
        (r#"{"prompt": "a", "n": 0}"#, 400, "n: "),
        (r#"{"prompt": "a", "max_tokens": -5}"#, 400, "max_tokens"),
        (r#"{"prompt": "a", "max_tokens": 0}"#, 400, "max_tokens"),
        (r#"{"prompt": "a", "max_tokens": 1e300}"#, 400, "max_tokens"),
        (r#"{"prompt": "a", "logprobs": 100}"#, 400, "logprobs"),
        (r#"{"prompt": 5}"#, 400, "prompt"),
        (r#"{"prompt": []}"#, 400, "prompt"),
        (r#"{"prompt": [99999999]}"#, 400, "token 99999999"),
        (r#"{"prompt": [1, "a"]}"#, 400, "prompt"),
        (r#"{"prompt": "a", "stop": ""}"#, 400, "stop"),
        (r#"{"prompt": "a", "stop": [1]}"#, 400, "stop"),
        (r#"{"prompt": "a", "logit_bias": {"x": 1}}"#, 400, "logit_bias"),
        (r#"{"prompt": "a", "seed": 0.5}"#, 400, "seed"),
        (r#"{"prompt": "a", "suffix": "b"}"#, 400, "suffix"),
        (r#"{"prompt": "a", "stream": 1}"#, 400, "stream"),
        (r#"{"prompt": "a", "stream_options": {}}"#, 400, "stream_options"),
        (r#"{"prompt": "a", "save_as": "../x"}"#, 400, ""),
        (r#"{"prompt": "a", "save_as": "x", "n": 2}"#, 400, "save_as"),
        (r#"{"prompt": "a", "state": "none"}"#, 400, "none"),
        (r#"{"prompt": "a", "model": "gpt-4"}"#, 404, "gpt-4"),
    ] {
        let (got, error) = s.refused("/v1/completions", body);
        assert_eq!(got, status, "{body} {error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(says), "{body} {error}");
    }
    for (body, says) in [
        (r#"{}"#, "messages"),
        (r#"{"messages": []}"#, "messages"),
        (r#"{"messages": ["hi"]}"#, "messages[0].role"),
        (r#"{"messages": [{"role": "user"}]}"#, "messages[0].content"),
        (r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#, "messages[0].content"),
        (r#"{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}"#, "top_logprobs"),
        (r#"{"messages": [{"role": "user", "content": "a"}], "think": "deep"}"#, "think"),
    ] {
        let (status, error) = s.refused("/v1/chat/completions", body);
        assert_eq!((status, error["error"]["param"].as_str().unwrap()), (400, says), "{body}");
    }
    let long = json!({ "prompt": "word ".repeat(3000) }).to_string();
    assert!(s.refused("/v1/completions", &long).1["error"]["message"].as_str().unwrap().contains("--max-prompt"));
    // A body that is refused before all of it is sent: more than sockets hold.
    assert_eq!(s.refused("/v1/completions", &json!({ "prompt": "a".repeat(1 << 25) }).to_string()).0, 413);
    assert_eq!(s.refused("/v1/nothing", "{}").0, 404);
    let mut get = s.call("GET", "/v1/completions", None, "");
    assert_eq!(get.status(), 405);
    assert!(get.headers().contains_key("x-request-id"));
    assert!(get.body_mut().read_json::<Value>().unwrap()["error"]["message"].is_string());
    assert_eq!(s.get("/v1/models")["data"][0]["id"], "anser-12m");
    assert_eq!(s.get("/v1/models/anser-12m")["object"], "model");
    assert_eq!(s.get("/ready")["status"], "ready");
    let metrics = s.call("GET", "/metrics", None, "").body_mut().read_to_string().unwrap();
    assert!(metrics.contains(r#"anser_http_requests_total{path="/v1/completions",status="413"} 1"#), "{metrics}");
    assert!(metrics.contains("anser_requests_running 0"));
}

#[test]
fn keys_keep_owners_apart() {
    let options = Options { keys: Keys::parse("key-of-one,key-of-two").unwrap(), per_key: 1, ..options() };
    let s = Server::start(options, EngineOptions::default());
    let body = json!({ "prompt": "a", "max_tokens": 2, "save_as": "mine" }).to_string();
    assert_eq!(s.call("POST", "/v1/completions", None, &body).status(), 401);
    assert_eq!(s.call("GET", "/v1/models", Some("key-of-three"), "").status(), 401);
    assert_eq!(s.call("GET", "/health", None, "").status(), 200);
    assert_eq!(s.call("POST", "/v1/completions", Some("key-of-one"), &body).status(), 200);
    let names =
        |key| s.call("GET", "/v1/states", Some(key), "").body_mut().read_json::<Value>().unwrap()["data"].clone();
    assert_eq!(names("key-of-one").as_array().unwrap().len(), 1);
    assert_eq!(names("key-of-two"), json!([]));
    // One request of a key at a time, for as long as its answer is being sent.
    let endless = json!({ "prompt": "a", "max_tokens": 4000, "stream": true, "ignore_eos": true }).to_string();
    let running = s.call("POST", "/v1/completions", Some("key-of-one"), &endless);
    let refused = s.call("POST", "/v1/completions", Some("key-of-one"), &body);
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (429, "1"));
    assert_eq!(s.call("POST", "/v1/completions", Some("key-of-two"), &body).status(), 200);
    drop(running);
    until("the place of a client that has gone", || {
        s.call("POST", "/v1/completions", Some("key-of-one"), &body).status() == 200
    });
}

#[test]
fn clients_that_go_are_cancelled() {
    let s = Server::plain();
    for stream in [true, false] {
        let before = s.engine.stats().cancelled;
        let body = json!({ "prompt": "a", "max_tokens": 4000, "stream": stream, "ignore_eos": true }).to_string();
        let mut socket = TcpStream::connect(s.address).unwrap();
        write!(
            socket,
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        until("a running request", || s.engine.stats().running == 1);
        drop(socket);
        until("its end", || s.engine.stats().cancelled == before + 1 && s.engine.stats().running == 0);
    }
}

#[test]
fn pages_of_others_are_refused() {
    let s = Server::start(
        Options { cors: vec!["https://mine.example".parse().unwrap()], ..options() },
        EngineOptions::default(),
    );
    let ask = |host: &str, origin: &str| {
        let mut socket = TcpStream::connect(s.address).unwrap();
        write!(socket, "GET /health HTTP/1.1\r\nHost: {host}\r\n{origin}Connection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer.to_lowercase()
    };
    assert!(ask("localhost", "").contains(" 200 "));
    assert!(ask("rebound.example", "").contains(" 403 "));
    assert!(ask("localhost", "Origin: https://evil.example\r\n").contains(" 403 "));
    let allowed = ask("localhost", "Origin: https://mine.example\r\n");
    assert!(
        allowed.contains(" 200 ") && allowed.contains("access-control-allow-origin: https://mine.example"),
        "{allowed}"
    );
}

#[test]
fn slow_clients_are_cut_off() {
    let s = Server::plain();
    for begin in ["POST /v1/compl", "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"]
    {
        let mut socket = TcpStream::connect(s.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.write_all(begin.as_bytes()).unwrap();
        let start = Instant::now();
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer);
        assert!(start.elapsed() < Duration::from_secs(8), "{begin}: {answer}");
    }
    // So is who has an answer and goes on to send what it refused.
    let mut socket = s.connect();
    let begin = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n";
    socket.write_all(format!("{begin}{}", " ".repeat(1 << 17)).as_bytes()).unwrap();
    let start = Instant::now();
    while socket.write_all(b"   ").is_ok() {
        assert!(start.elapsed() < Duration::from_secs(8));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_full_queue_refuses_and_an_end_lets_answers_end() {
    let mut s = Server::start(options(), EngineOptions { slots: 1, waiting: 1, ..EngineOptions::default() });
    let body = |n: usize| json!({ "prompt": "a", "max_tokens": n, "stream": true, "ignore_eos": true }).to_string();
    let mut first = s.call("POST", "/v1/completions", None, &body(300));
    until("a running request", || s.engine.stats().running == 1);
    let _second = s.call("POST", "/v1/completions", None, &body(5));
    let third = s.call("POST", "/v1/completions", None, &body(5));
    assert_eq!(third.status(), 429);
    assert!(third.headers().contains_key("retry-after"));
    let (stop, _) = tokio::sync::oneshot::channel();
    s.stop.replace(stop).unwrap().send(()).unwrap();
    until("the port is closed", || TcpStream::connect(s.address).is_err());
    let text = first.body_mut().read_to_string().unwrap();
    assert!(text.trim_end().ends_with("[DONE]"), "{text}");
}

#[test]
fn states_that_cannot_be_reached() {
    // Nothing listens at this port any more.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let redis = Some(format!("redis://127.0.0.1:{port}"));
    let s = Server::start(options(), EngineOptions { redis, ..EngineOptions::default() });
    let ask = |more: Value| {
        let mut body = json!({ "prompt": "He took her by the", "max_tokens": 4 });
        more.as_object().unwrap().iter().for_each(|(k, v)| body[k] = v.clone());
        s.call("POST", "/v1/completions", None, &body.to_string())
    };
    assert_eq!(ask(json!({})).status(), 200);
    for more in [json!({ "state": "x" }), json!({ "save_as": "x" })] {
        let mut response = ask(more);
        assert_eq!(response.status(), 503);
        assert!(response.headers().contains_key("retry-after"));
        let error: Value = response.body_mut().read_json().unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains("redis"), "{error}");
    }
    assert_eq!(s.call("GET", "/v1/states", None, "").status(), 503);
    assert_eq!(s.call("GET", "/v1/states/x", None, "").status(), 503);
    assert_eq!(s.call("GET", "/ready", None, "").status(), 200);
    let metrics = s.call("GET", "/metrics", None, "").body_mut().read_to_string().unwrap();
    assert!(metrics.contains("anser_state_tier_up{tier=\"redis\"} 0"), "{metrics}");
    let errors = metrics.lines().find_map(|l| l.strip_prefix("anser_state_tier_errors_total{tier=\"redis\"} "));
    assert!(errors.unwrap().parse::<u64>().unwrap() > 0);
}

fn measure(address: SocketAddr, load: &load::Load) -> Measured {
    let target = Target::new(&format!("http://{address}"), None).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(load.run(&target, std::future::pending())).unwrap()
}

fn come(arrivals: Arrivals, milliseconds: u64) -> load::Load {
    load::Load {
        arrivals,
        duration: Duration::from_millis(milliseconds),
        prompt: 12,
        answer: 6,
        lengths: Lengths::Exponential,
        temperature: 0.0,
        seed: 1,
        timeout: Duration::from_secs(20),
    }
}

#[test]
fn a_load_is_answered_or_its_errors_are_counted() {
    let s = Server::plain();
    let many = measure(s.address, &come(Arrivals::Concurrent(6), 1000));
    assert!(many.samples.len() > 6 && many.errors().is_empty(), "{:?}", many.errors());
    assert!(many.samples.iter().all(|s| s.first <= Some(s.total) && s.gaps.len() < s.tokens));
    let written: usize = many.samples.iter().map(|s| s.tokens).sum();
    assert_eq!(written as u64, s.engine.stats().tokens_written);

    let s = Server::start(options(), EngineOptions { slots: 1, waiting: 0, ..EngineOptions::default() });
    let refused = measure(s.address, &load::Load { answer: 60, ..come(Arrivals::Poisson(60.0), 1000) });
    assert!(refused.errors()["status 429"] > 0 && refused.answered().count() > 0, "{:?}", refused.errors());
    assert!((30..100).contains(&refused.samples.len()));
}

#[test]
fn a_server_that_holds_up_its_clients_is_seen_to() {
    // One request after the other, each for 50 ms, of which 50 come a second: the last ones wait for all before them.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map(Result::unwrap) {
            let mut lines = BufReader::new(&stream).lines().map(Result::unwrap);
            let is_load = lines.next().unwrap().starts_with("POST");
            lines.find(String::is_empty);
            let body = if is_load {
                std::thread::sleep(Duration::from_millis(50));
                "data: {\"choices\": [{\"text\": \"a\"}]}\n\ndata: [DONE]\n\n"
            } else {
                r#"{"data": [{"id": "slow"}]}"#
            };
            let _ = write!(&stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
    });
    let measured = measure(address, &come(Arrivals::Poisson(50.0), 1000));
    let [count, first] =
        [measured.answered().count() as f64, measured.answered().filter_map(|s| s.first).fold(0.0, f64::max)];
    assert!(count > 30.0 && measured.errors().is_empty(), "{:?}", measured.errors());
    assert!(first > 0.05 * count - 1.2, "{count} {first}");
}
