//! The binary as a user meets it: exit codes, where output goes, bad input.

mod common;

use anser_formats::{Dtype, Source, write_pth, write_safetensors};
use anser_model::{Config, Init, Model};
use anser_tensor::Context;
use common::{Folder, anser, fixture};
use std::path::Path;
use std::process::Stdio;

#[test]
fn wrong_usage_is_2() {
    let f = Folder::new("usage");
    for args in [&["--bad"][..], &["debug"], &["debug", "logits"], &["generate", "--threads", "0"], &["inspect"]] {
        let (code, out, err) = anser(&f.0, args);
        assert!(code == 2 && out.is_empty() && !err.is_empty(), "{args:?}: {code}");
    }
    for (args, says) in [
        (&["generate", "--max-tokens", "-1"][..], "--max-tokens"),
        (&["bench", "train", "--ctx", "0"], "at least 1"),
        (&["bench", "attention", "--heads", "0"], "at least 1"),
        (&["generate", "--dtype", "f64"], "int8"),
    ] {
        let (code, _, err) = anser(&f.0, args);
        assert!(code == 2 && err.contains(says), "{args:?}: {code} {err}");
    }
    let (code, out, _) = anser(&f.0, &["--version"]);
    assert!(code == 0 && out.starts_with("anser "));
}

#[test]
fn bad_input_is_1_with_one_line() {
    let f = Folder::new("bad");
    let whole = std::fs::read(fixture("rwkv7.pth")).unwrap();
    let short = f.file("short.pth", &whole[..whole.len() / 2]);
    let noise = f.file("noise.safetensors", &[7; 1000]);
    let tokens = f.file("t.json", b"[[1, 2, 3]]");
    let far = f.file("far.json", b"[[1, 300]]");
    let ragged = f.file("ragged.json", b"[[1, 2], [3]]");
    let text = f.file("text.json", b"hello");
    let good = fixture("rwkv7.pth");
    let out = f.0.join("out.safetensors").display().to_string();
    let logits = |model: &str, tokens: &str| {
        anser(&f.0, &["debug", "logits", "--model", model, "--tokens", tokens, "--out", &out])
    };
    for ((code, stdout, err), says) in [
        (logits("nowhere.pth", &tokens), "nowhere.pth: open"),
        (logits(&short, &tokens), "truncated"),
        (logits(&noise, &tokens), "neither a .pth nor"),
        (logits(&good, &far), "token 300 at position 1 is outside the model's vocabulary of 300"),
        (logits(&good, &ragged), "sequence 1 has 1 tokens, the first has 2"),
        (logits(&good, &text), "expected [[ids...], ...]"),
        (logits(&fixture("rwkv7_expected.safetensors"), &tokens), "not a RWKV-7 checkpoint"),
        (anser(&f.0, &["generate", "--model", "nowhere.pth"]), "nowhere.pth: open"),
        (anser(&f.0, &["generate", "--model", &good, "--prompt", "The Eiffel tower"]), "the model has 300 tokens"),
        (anser(&f.0, &["generate", "--top-p", "2"]), "top-p = 2"),
        (anser(&f.0, &["generate", "--top-p", "-2"]), "top-p = -2"),
        (anser(&f.0, &["generate", "--save-state", "none/s"]), "none/s"),
        (anser(&f.0, &["eval", "digits", "--out", "none/m"]), "none/m"),
        (anser(&f.0, &["bench", "train", "--dtype", "q4"]), "--dtype"),
        (anser(&f.0, &["convert", &good, "x.txt"]), ".pth or .safetensors"),
        (anser(&f.0, &["convert", &good, &good]), "same file"),
        (anser(&f.0, &["inspect", "--device", "cuda", &noise]), "noise"),
        (anser(&f.0, &["bench", "train", "--device", "cuda:999"]), "cuda:999 is not available"),
        (anser(&f.0, &["bench", "long", "--preset", "huge"]), "no preset \"huge\""),
        (anser(&f.0, &["bench", "long", "--lengths", "0,64"]), "a length must be at least 1"),
        (anser(&f.0, &["bench", "long", "--attention", "0"]), "there must be an attention block"),
        (anser(&f.0, &["bench", "long", "--cache", "64"]), "a cache of 64 tokens is too small for chunks of 2048"),
        (anser(&f.0, &["bench", "long", "--model", &fixture("rwkvx.pth"), "--attention", "1"]), "--attention"),
        (anser(&f.0, &["bench", "flat", "--cache", "64"]), "this model doesn't have"),
        (anser(&f.0, &["bench", "flat", "--chunk", "64"]), "are of attention, which"),
    ] {
        assert!(code == 1 && stdout.is_empty(), "{says}: {code} {stdout}");
        assert!(err.starts_with("error: ") && err.lines().count() == 1 && err.contains(says), "{says}: {err}");
    }
    assert!(!Path::new(&out).exists());
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_what_has_nothing_to_save_at_once() {
    let f = Folder::new("at-once");
    f.file("long.txt", "all work and no play ".repeat(200_000).as_bytes());
    for args in [&["eval", "text", "long.txt"][..], &["generate", "--prompt", "-"], &["chat"]] {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("anser"));
        command.current_dir(&f.0).args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let _nobody_types = child.stdin.take();
        std::thread::sleep(std::time::Duration::from_millis(1500));
        let pid = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        let asked = std::time::Instant::now();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{args:?}");
        assert!(asked.elapsed() < std::time::Duration::from_secs(10), "{args:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn remarks_that_cannot_be_written_end_nothing() {
    let f = Folder::new("remarks");
    f.file(
        "c.toml",
        b"model.preset = \"tiny\"\ntrain.ctx = 16\ntrain.rows = 1\ntrain.steps = 2\noutput.folder = \"run\"\n",
    );
    for (args, code) in [(&["train", "c.toml"][..], 0), (&["inspect", "nowhere"], 1)] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("anser"));
        let status = command.current_dir(&f.0).args(args).stdout(Stdio::null()).stderr(full).status();
        assert_eq!(status.unwrap().code(), Some(code), "{args:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn names_need_not_be_text() {
    use std::os::unix::ffi::OsStrExt;
    let f = Folder::new("names");
    let out = std::ffi::OsStr::from_bytes(b"\xfe.pth");
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("anser"));
    let ended = command.current_dir(&f.0).args(["convert", &fixture("rwkv7.pth")]).arg(out).output().unwrap();
    assert!(ended.status.success() && f.0.join(out).exists(), "{}", String::from_utf8_lossy(&ended.stderr));
}

#[test]
fn reports_are_refused_before_anything_is_written_and_a_transformer_has_no_text() {
    let f = Folder::new("reports");
    let report = |from: &str, to: &str| anser(&f.0, &["convert", from, to, "--dtype", "f16", "--report", "--json"]);
    // Its tokenizer, of 65,536 tokens, is that of a file that names none; the model has 300.
    let (code, _, err) = report(&fixture("rwkv7.pth"), "x.safetensors");
    assert!(code == 1 && err.contains("tokenizer") && !f.0.join("x.safetensors").exists(), "{err}");
    let config = Config { head_size: 32, ..Config::new(1, 64, 20) }.control();
    let model = Model::init(&Context::cpu(1), &config, Init::Current, 1).unwrap();
    let values = model.params().values();
    let sources: Vec<Source<'_>> = (model.params().specs().iter())
        .map(|s| Source::new(s.name.as_str(), &s.shape, Dtype::F32, &values[s.range.clone()]))
        .collect();
    write_safetensors(&f.0.join("t.safetensors"), &sources, &[config.description()].into()).unwrap();
    let (code, out, err) = report("t.safetensors", "half.safetensors");
    assert_eq!(code, 0, "{err}");
    let v: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(v["report"]["text"].is_null() && v["report"]["tensors"]["emb.weight"].is_object(), "{out}");
}

#[test]
fn decoding_of_a_file_is_measured_beside_random_weights() {
    let f = Folder::new("decode");
    let model = format!("{}/../../models/anser-12m.safetensors", env!("CARGO_MANIFEST_DIR"));
    let run = |model: &str| {
        anser(
            &f.0,
            &["bench", "decode", "--device", "cpu", "--tokens", "3", "--dtype", "int8", "--json", "--model", model],
        )
    };
    let (code, out, err) = run(&model);
    assert!(code == 0, "{err}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    for of in [&json, &json["random_weights"]] {
        for key in ["decode_tokens_per_second", "prefill_256_tokens_per_second", "bytes_per_token"] {
            assert!(of[key].as_f64().unwrap() > 0.0, "{key}: {json}");
        }
    }
    assert_eq!(json["bytes_per_token"], json["random_weights"]["bytes_per_token"]);
    let (code, _, err) = run("no.pth");
    assert!(code == 1 && err.contains("no.pth"), "{err}");
}

#[test]
fn long_sequences_are_measured() {
    let f = Folder::new("long");
    let model = fixture("rwkv7.safetensors");
    let of = ["--model", &model, "--json", "--device", "cpu", "--attention", "1", "--chunk", "16"];
    let json = |args: &[&str]| -> serde_json::Value {
        let (code, out, err) = anser(&f.0, &[args, &of].concat());
        assert!(code == 0, "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let bound = ["--cache", "96", "--evict", "recent"];
    let long =
        json(&[&["bench", "long", "--lengths", "100,50", "--decode-at", "100", "--out", "l.svg"][..], &bound].concat());
    let rows = long["rows"].as_array().unwrap();
    let seen: Vec<_> = rows.iter().map(|r| (r["model"].as_str().unwrap(), r["tokens"].as_u64().unwrap())).collect();
    assert_eq!(seen, [50, 100].map(|n| ["hybrid", "dense", "rwkv7"].map(|m| (m, n))).concat());
    for r in rows {
        assert!(r["prefill_seconds"].as_f64().unwrap() > 0.0);
        assert_eq!(r["decode_seconds"].is_null(), r["tokens"] == 50, "{r}");
        let dense = &r["times_faster_than_dense"];
        assert!(dense["prefill"].as_f64().unwrap() > 0.0 && dense["decode"].is_null() == (r["tokens"] == 50), "{r}");
        assert!(r["model"] != "rwkv7" || r["times_faster_than_rwkv7"]["prefill"] == 1.0);
    }
    // A bound keeps less, dense attention all, RWKV-7 a state of one size.
    let kept: Vec<_> = rows.iter().map(|r| r["cached"].as_u64().unwrap()).collect();
    assert_eq!(kept, [50, 50, 0, 68, 100, 0]);
    let bytes: Vec<_> = rows.iter().map(|r| r["bytes"].as_u64().unwrap()).collect();
    assert!(bytes[4] > bytes[1] && bytes[2] == bytes[5]);
    for name in ["l-prefill.svg", "l-decode.svg"] {
        assert!(std::fs::read_to_string(f.0.join(name)).unwrap().starts_with("<svg"));
    }
    // No time for anything.
    let none = json(&["bench", "long", "--lengths", "64", "--budget", "0"]);
    assert!(none["rows"].as_array().unwrap().is_empty() && none["skipped"].as_array().unwrap().len() == 3, "{none}");

    let bytes = |args: &[&str], count: usize| -> Vec<[u64; 2]> {
        let flat = json(&[&["bench", "flat", "--tokens", "2100"][..], args].concat());
        let rows = flat["rows"].as_array().unwrap();
        assert!(rows.len() == count && rows[count - 1]["tokens"] == 2100, "{flat:?}");
        rows.iter().map(|r| ["bytes", "cached"].map(|key| r[key].as_u64().unwrap())).collect()
    };
    // After 1024, 2048 and 2100 tokens, the hybrid and RWKV-7 in turns; the first two are as far from when the cache was full.
    let flat = bytes(&bound, 6);
    assert!(flat[4][0] * 64 < flat[0][0] * 100, "{flat:?}");
    assert!(flat[0] == flat[2] && flat[4][1] < 100 && flat[1] == flat[5] && flat[5][1] == 0, "{flat:?}");
    let grows = bytes(&["--only", "hybrid", "--out", "f.svg"], 3);
    assert!(grows[2][0] > grows[0][0] && grows[2][1] == 2100, "{grows:?}");
    assert!(std::fs::read_to_string(f.0.join("f-state.svg")).unwrap().starts_with("<svg"));
    let (code, out, _) = anser(&f.0, &["bench", "flat", "--model", &model, "--tokens", "20", "--device", "cpu"]);
    assert!(code == 0 && out.lines().count() == 2 && out.contains("state MB") && out.contains("rwkv7"), "{out}");
    assert_eq!(anser(&f.0, &["bench", "long", "--evict", "recent"]).0, 2);
}

#[test]
fn tokens_and_back() {
    let f = Folder::new("tokens");
    let (code, out, _) = anser(&f.0, &["tokenize", " Eiffel"]);
    assert!(code == 0 && out == "304 25740 109\n");
    let (code, out, _) = anser(&f.0, &["detokenize", "304", "25740", "109", "--json"]);
    assert!(code == 0 && out.contains("\" Eiffel\""), "{out}");
    let (code, _, err) = anser(&f.0, &["detokenize", "65535"]);
    assert!(code == 1 && err.contains("token 65535"), "{err}");
    let (code, _, err) = anser(&f.0, &["tokenize", "x", "--tokenizer", "gpt2"]);
    assert!(code == 1 && err.contains("world, world-4096 or bytes"), "{err}");
}

#[test]
fn debug_json_and_conversion() {
    let f = Folder::new("debug");
    let tokens = f.file("t.json", b"[[1, 2, 3], [4, 5, 6]]");
    let (pth, safe) = (f.0.join("c.pth").display().to_string(), f.0.join("c.safetensors").display().to_string());
    let json = |args: &[&str]| -> serde_json::Value {
        let (code, out, err) = anser(&f.0, args);
        assert!(code == 0, "{err}");
        serde_json::from_str(&out).unwrap()
    };
    json(&["convert", &fixture("rwkv7.safetensors"), &pth, "--json"]);
    json(&["--json", "convert", &pth, &safe, "--dtype", "f32"]);
    let mut outputs = Vec::new();
    for model in [&fixture("rwkv7.pth"), &pth, &safe] {
        let out = f.0.join("o.safetensors").display().to_string();
        json(&[
            "debug",
            "logits",
            "--json",
            "--model",
            model,
            "--tokens",
            &tokens,
            "--out",
            &out,
            "--mode",
            "chunked:2",
            "--threads",
            "2",
        ]);
        outputs.push(std::fs::read(&out).unwrap());
        let loss = json(&["debug", "grads", "--model", model, "--tokens", &tokens, "--out", &out]);
        outputs.push(std::fs::read(&out).unwrap());
        assert!(loss["loss"].as_f64().unwrap() > 1.0);
    }
    assert!(outputs[0] == outputs[2] && outputs[2] == outputs[4]);
    assert!(outputs[1] == outputs[3] && outputs[3] == outputs[5]);
    let info = json(&["inspect", &pth, "--json"]);
    assert_eq!((info["parameters"].as_u64(), info["config"]["n_layer"].as_u64()), (Some(788992), Some(3)));
}

#[test]
fn a_hybrid_is_expanded_bounded_and_goes_on_from_its_state() {
    let f = Folder::new("hybrid");
    let run = |args: &[&str]| {
        let (code, out, err) = anser(&f.0, args);
        assert!(code == 0, "{args:?}: {err}");
        out
    };
    let fails = |args: &[&str], why: &str| {
        let (code, _, err) = anser(&f.0, args);
        assert!(code == 1 && err.lines().count() == 1 && err.contains(why), "{args:?}: {err}");
    };
    let plain = fixture("rwkv7.safetensors");
    let out = run(&["expand", &plain, "x.safetensors", "--layers", "3", "--chunk", "4", "--topk", "2", "--json"]);
    assert!(out.contains("\"attention\":3"), "{out}");
    let info: serde_json::Value = serde_json::from_str(&run(&["inspect", "x.safetensors", "--json"])).unwrap();
    assert_eq!(info["config"]["hybrid"], serde_json::json!({ "layers": 3, "chunk": 4, "topk": 2 }));
    let (code, _, err) = anser(&f.0, &["expand", &plain, "y.pth", "--chunk", "4", "--topk", "2"]);
    assert!(code == 0 && err.contains("--chunk 4 --topk 2"), "{err}");
    let always = ["--chunk", "4", "--topk", "4", "--sink", "1", "--window", "2"];
    let (code, _, err) = anser(&f.0, &[&["expand", &plain, "z.pth"], &always[..]].concat());
    assert!(code == 0 && err.contains("--topk 4 --sink 1 --window 2"), "{err}");
    run(&[&["expand", &plain, "z.safetensors", "--layers", "3", "--gate", "--key-heads", "1"], &always[..]].concat());
    let info: serde_json::Value = serde_json::from_str(&run(&["inspect", "z.safetensors", "--json"])).unwrap();
    let hybrid =
        serde_json::json!({ "layers": 3, "chunk": 4, "topk": 4, "sink": 1, "window": 2, "gate": true, "key_heads": 1 });
    assert_eq!(info["config"]["hybrid"], hybrid);
    let text = run(&["inspect", "z.safetensors"]);
    assert!(
        text.contains("3 attention blocks, gated, 1 heads of keys, ")
            && text.contains("the first 1 of the text and the 2 before")
    );
    fails(&["expand", &plain, "y.pth", "--key-heads", "3"], "3 heads of keys don't divide");
    fails(&["expand", &plain, "y.pth", "--sink", "2", "--window", "1"], "sink 2 and window 1: of topk 3");
    // It says what the model said that it was made of, in every type of file.
    let tokens = f.file("t.json", b"[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]");
    let logits = |model: &str, more: &[&str]| {
        run(&[&["debug", "logits", "--model", model, "--tokens", &tokens, "--out", "o"], more].concat());
        let bytes = std::fs::read(f.0.join("o")).unwrap();
        safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor("logits").unwrap().data().to_vec()
    };
    run(&["convert", "x.safetensors", "x.pth"]);
    run(&["convert", "z.safetensors", "z8.safetensors", "--dtype", "int8"]);
    assert!(run(&["inspect", "z8.safetensors"]).contains("3 attention blocks, gated, "));
    assert!(logits("z.safetensors", &[]) == logits(&plain, &[]));
    for model in ["x.safetensors", "x.pth"] {
        assert!(logits(model, &["--chunk", "3", "--topk", "1"]) == logits(&plain, &[]));
    }
    let golden = fixture("rwkvx.pth");
    assert!(logits(&golden, &["--chunk", "2", "--topk", "2"]) != logits(&golden, &[]));
    let few = ["--chunk", "2", "--topk", "3"];
    assert!(logits(&golden, &[&few[..], &["--sink", "1", "--window", "1"]].concat()) != logits(&golden, &few));
    fails(&["debug", "logits", "--model", &golden, "--tokens", &tokens, "--out", "o", "--chunk", "0"], "chunk = 0");
    fails(&["debug", "logits", "--model", &plain, "--tokens", &tokens, "--out", "o", "--topk", "2"], "doesn't have");
    fails(&["expand", &golden, "y.pth"], "RWKV-7 blocks alone");
    fails(&["expand", &plain, "y.pth", "--layers", "9"], "9 attention blocks");
    fails(&["convert", &golden, "y.gguf"], "llama.cpp has no RWKV-X");

    let config = "[model]\npreset = \"\"\nn_layer = 2\nn_embd = 64\nattention = 1\nchunk = 8\ntopk = 2\n[train]\nctx = 64\nrows = 2\nsteps = 3\n[output]\nfolder = \"run\"\nsample_every = 0\n";
    f.file("run.toml", config.as_bytes());
    run(&["train", "run.toml", "--device", "cpu"]);
    const MODEL: &str = "run/model.safetensors";
    let text = |args: &[&str]| {
        let all = [&["generate", "--model", MODEL, "--dtype", "f32", "--temperature", "0", "--json"], args].concat();
        serde_json::from_str::<serde_json::Value>(&run(&all)).unwrap()["text"].as_str().unwrap().to_string()
    };
    let bound = ["--cache", "32", "--evict", "attention"];
    let long = "It was a long way to the sea, and the road went up and down. ".repeat(3);
    let whole = text(&[&["--prompt", &long, "--max-tokens", "20"], &bound[..]].concat());
    let first = text(&[&["--prompt", &long, "--max-tokens", "8", "--save-state", "s"], &bound[..]].concat());
    let second = text(&["--max-tokens", "12", "--load-state", "s"]);
    assert_eq!(first + &second, whole);
    let saved = std::fs::read(f.0.join("s")).unwrap();
    let saved = safetensors::SafeTensors::deserialize(&saved).unwrap();
    assert!(saved.tensor("state.moba.0.keys").unwrap().shape()[0] < 32);
    let generate = |more: &[&'static str]| [&["generate", "--model", MODEL, "--max-tokens", "1"], more].concat();
    fails(&generate(&["--load-state", "s", "--chunk", "4"]), "another model");
    fails(&generate(&["--load-state", "s", "--cache", "64"]), "leave --cache out");
    fails(&generate(&["--cache", "16"]), "too small for chunks of 8");
    fails(
        &["generate", "--model", &plain, "--tokenizer", "bytes", "--cache", "999", "--max-tokens", "1"],
        "doesn't have",
    );
}

#[test]
fn quickstart_then_generate_and_go_on_from_a_state() {
    let f = Folder::new("quick");
    let (code, out, err) = anser(&f.0, &["quickstart", "--steps", "12", "--json"]);
    assert!(code == 0, "{err}");
    let result: serde_json::Value = serde_json::from_str(&out).unwrap();
    let loss = |k: &str| result[k].as_f64().unwrap();
    assert!(loss("held_out_loss") < loss("held_out_loss_before") - 0.5, "{out}");
    assert!(std::fs::read_to_string(f.0.join("anser-quickstart/loss.svg")).unwrap().starts_with("<svg"));
    assert!(std::fs::read_to_string(f.0.join("anser-quickstart/metrics.jsonl")).unwrap().lines().count() > 12);

    const MODEL: &str = "anser-quickstart/model.safetensors";
    let text = |args: &[&str]| {
        let (code, out, err) = anser(
            &f.0,
            &[&["generate", "--model", MODEL, "--dtype", "f32", "--temperature", "0", "--json"], args].concat(),
        );
        assert!(code == 0, "{err}");
        serde_json::from_str::<serde_json::Value>(&out).unwrap()["text"].as_str().unwrap().to_string()
    };
    let whole = text(&["--prompt", "The people", "--max-tokens", "20"]);
    let first = text(&["--prompt", "The people", "--max-tokens", "8", "--save-state", "s"]);
    let second = text(&["--max-tokens", "12", "--load-state", "s"]);
    assert_eq!(first + &second, whole);
    let mark: String = whole.chars().skip(3).take(2).collect();
    let stopped = text(&["--prompt", "The people", "--max-tokens", "20", "--stop", &mark]);
    assert_eq!(stopped, whole[..whole.find(&mark).unwrap()]);
    let (code, _, err) =
        anser(&f.0, &["generate", "--model", &fixture("rwkv7.pth"), "--tokenizer", "bytes", "--load-state", "s"]);
    assert!(code == 1 && err.contains("another model"), "{err}");
}

#[test]
fn without_a_model_the_programs_own_one_writes_and_is_measured() {
    let f = Folder::new("own");
    let prompt = ["generate", "--device", "cpu", "--temperature", "0", "--max-tokens", "24", "--prompt"];
    let write = |text: &str| {
        let (code, out, err) = anser(&f.0, &[&prompt[..], &[text]].concat());
        assert!(code == 0, "{err}");
        out
    };
    assert!(write("He took her by the").starts_with(" arm, and with a gesture"));
    assert!(write("    for i in 0..").contains("{"));
    // Tokens read ahead change nothing, drawn ones either.
    for sampling in [&["--temperature", "0"][..], &["--seed", "7", "--dtype", "int8"]] {
        let with = |more: &[&str]| {
            let text = "let a = read(&path)?;\nlet b = read(&path)?;\nlet c =";
            let args =
                [&["generate", "--device", "cpu", "--max-tokens", "60", "--prompt", text], sampling, more].concat();
            let (code, out, err) = anser(&f.0, &args);
            assert!(code == 0, "{err}");
            out
        };
        let without = with(&["--speculate", "0"]);
        assert!(with(&["--speculate", "8"]) == without && with(&[]) == without);
    }

    let model = format!("{}/../../models/anser-12m.safetensors", env!("CARGO_MANIFEST_DIR"));
    let pairs = [
        ("The cats annoy Tim.", "The cats annoys Tim."),
        ("Mary hurts herself.", "Mary hurts himself."),
        ("This woman is tall.", "These woman is tall."),
    ];
    let line = |(good, bad): &(&str, &str)| format!("{{\"sentence_good\": \"{good}\", \"sentence_bad\": \"{bad}\"}}\n");
    std::fs::write(f.0.join("pairs.jsonl"), pairs.iter().map(line).collect::<String>()).unwrap();
    let (code, out, err) = anser(&f.0, &["eval", "pairs", "--device", "cpu", "--model", &model, "pairs.jsonl"]);
    assert!(code == 0 && out.ends_with("100.00% of 3 pairs\n"), "{out}{err}");
    let (code, _, err) = anser(&f.0, &["eval", "pairs", "--model", &model, "nothing.jsonl"]);
    assert!(code == 1 && err.contains("nothing.jsonl"), "{err}");
}

#[test]
fn a_tuned_initial_state_changes_what_is_written() {
    let f = Folder::new("initial");
    let names: Vec<String> = (0..7).map(|i| format!("blocks.{i}.att.time_state")).collect();
    let write = |file: &str, values: &[f32]| {
        let tensor = |name: &String| Source::new(name.as_str(), &[5, 64, 64], Dtype::F32, values);
        write_pth(&f.0.join(file), &names.iter().map(tensor).collect::<Vec<_>>()).unwrap();
    };
    write("zeros.pth", &[0.0; 5 * 64 * 64]);
    write("waves.pth", &(0..5 * 64 * 64).map(|i| (i as f32 * 0.37).sin() * 10.0).collect::<Vec<_>>());
    let run = |more: &[&str]| {
        let prompt =
            ["generate", "--device", "cpu", "--temperature", "0", "--max-tokens", "12", "--prompt", "He took her by"];
        anser(&f.0, &[&prompt[..], more].concat())
    };
    let plain = run(&[]);
    assert_eq!(plain.0, 0, "{}", plain.2);
    assert_eq!(run(&["--initial-state", "zeros.pth"]).1, plain.1);
    let waves = run(&["--initial-state", "waves.pth", "--save-state", "s"]);
    assert!(waves.0 == 0 && waves.1 != plain.1, "{}", waves.2);
    let (code, _, err) = run(&["--initial-state", "waves.pth", "--load-state", "s"]);
    assert!(code == 1 && err.contains("--initial-state"), "{err}");
}

/// What the real `torch.load` and `rwkv` package were shown to accept (`tools/rwkv_roundtrip.py`) is what is written today,
/// and the package's logits are ours.
#[test]
fn converted_files_are_those_the_official_package_loads() {
    let f = Folder::new("official");
    let proven = std::fs::read(format!("{}/../../fixtures/rwkv-package/roundtrip.json", env!("CARGO_MANIFEST_DIR")));
    let proven: serde_json::Value = serde_json::from_slice(&proven.unwrap()).unwrap();
    for dtype in ["f32", "f16", "bf16"] {
        let out = format!("{dtype}.pth");
        let (code, _, err) = anser(&f.0, &["convert", &fixture("rwkv7.pth"), &out, "--dtype", dtype]);
        assert_eq!(code, 0, "{err}");
        let bytes = std::fs::read(f.0.join(out)).unwrap();
        let found = serde_json::json!({ "crc32": crc32fast::hash(&bytes), "bytes": bytes.len() });
        assert_eq!(found, proven["files"][dtype], "{dtype}: the writer changed; prove it with tools/rwkv_roundtrip.py");
    }
    let tokens = f.file("t.json", serde_json::json!([proven["tokens"]]).to_string().as_bytes());
    let (code, _, err) =
        anser(&f.0, &["debug", "logits", "--model", "f32.pth", "--tokens", &tokens, "--out", "o.safetensors"]);
    assert_eq!(code, 0, "{err}");
    let out = anser_formats::Checkpoint::open(&f.0.join("o.safetensors")).unwrap();
    let logits = out.get("logits").unwrap().to_f32_vec().unwrap();
    let want: Vec<f64> = serde_json::from_value(proven["logits"].clone()).unwrap();
    let last = &logits[logits.len() - want.len()..];
    let square = |x: f64| x * x;
    let error: f64 = last.iter().zip(&want).map(|(a, b)| square(*a as f64 - b)).sum();
    let size: f64 = want.iter().map(|b| square(*b)).sum();
    assert!((error / size).sqrt() < 2e-5, "{}", (error / size).sqrt());
}

/// What llama.cpp was shown to load (`tools/llama_roundtrip.py`) is what is written today, and its logits are ours.
#[test]
fn gguf_files_are_those_that_llama_cpp_loads() {
    let f = Folder::new("llama");
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let proven = std::fs::read(format!("{root}/fixtures/llama.cpp/roundtrip.json"));
    let proven: serde_json::Value = serde_json::from_slice(&proven.unwrap()).unwrap();
    let run = |args: &[&str]| {
        let (code, out, err) = anser(&f.0, args);
        assert_eq!(code, 0, "{err}");
        out
    };
    for dtype in ["f32", "f16", "bf16", "q8_0"] {
        let out = format!("anser-12m-{dtype}.gguf");
        run(&["convert", &format!("{root}/models/anser-12m.safetensors"), &out, "--dtype", dtype]);
        let bytes = std::fs::read(f.0.join(&out)).unwrap();
        let found = serde_json::json!({ "crc32": crc32fast::hash(&bytes), "bytes": bytes.len() });
        assert_eq!(found, proven["files"][&out], "{dtype}: the writer changed; prove it with tools/llama_roundtrip.py");
    }
    let tokens = f.file("t.json", serde_json::json!([proven["tokens"]]).to_string().as_bytes());
    run(&["debug", "logits", "--model", "anser-12m-f32.gguf", "--tokens", &tokens, "--out", "o.safetensors"]);
    let out = anser_formats::Checkpoint::open(&f.0.join("o.safetensors")).unwrap();
    let logits = out.get("logits").unwrap().to_f32_vec().unwrap();
    let last: Vec<(usize, f32)> = logits[logits.len() - 4096..].iter().copied().enumerate().collect();
    let mut best = last.clone();
    best.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (i, (id, logit)) in best[..10].iter().enumerate() {
        assert_eq!(proven["top_10"]["ids"][i], *id);
        assert!((proven["top_10"]["logits"][i].as_f64().unwrap() - f64::from(*logit)).abs() < 2e-4);
    }
    // The file knows its tokenizer.
    let text =
        run(&["generate", "--model", "anser-12m-q8_0.gguf", "--prompt", "The", "--max-tokens", "3", "--device", "cpu"]);
    assert!(!text.is_empty());
}

#[test]
fn inspect_names_formats_and_what_is_missing() {
    let f = Folder::new("formats");
    let json = |args: &[&str]| -> serde_json::Value {
        let (code, out, err) = anser(&f.0, args);
        assert!(code == 0, "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let (code, _, err) = anser(&f.0, &["convert", &fixture("rwkv7.pth"), "a.gguf", "--dtype", "f32"]);
    assert!(code == 0 && err.contains("a vocabulary of 300 is not world's; the file has no tokenizer"), "{err}");
    let info = json(&["inspect", "a.gguf", "--json"]);
    assert_eq!((info["format"].as_str(), info["names"].as_str()), (Some("GGUF"), Some("llama.cpp")));
    assert_eq!(info["parameters"].as_u64(), Some(788992));
    assert!(info["missing"][0].as_str().unwrap().contains("tokenizer.ggml.model"), "{info}");
    // The same model: the same logits, to the bit, and the same values when it goes back.
    let tokens = f.file("t.json", b"[[1, 2, 3]]");
    json(&["convert", "a.gguf", "back.safetensors", "--json"]);
    let logits = |model: &str| {
        json(&["debug", "logits", "--model", model, "--tokens", &tokens, "--out", "o.safetensors", "--json"]);
        std::fs::read(f.0.join("o.safetensors")).unwrap()
    };
    let official = logits(&fixture("rwkv7.pth"));
    assert!(official == logits("a.gguf") && official == logits("back.safetensors"));
    let info = json(&["inspect", "back.safetensors", "--json"]);
    assert_eq!((info["format"].as_str(), info["names"].as_str()), (Some("safetensors"), Some("official")));
    assert_eq!((info["missing"].as_array().unwrap().len(), info["metadata"].as_object().unwrap().len()), (0, 0));
    let info = json(&["inspect", &fixture("../huggingface"), "--json"]);
    assert_eq!((info["names"].as_str(), info["missing"].as_array().unwrap().len()), (Some("huggingface"), 1));
    assert!(info["missing"][0].as_str().unwrap().starts_with("tokenizer files"), "{info}");
    let (code, out, _) = anser(&f.0, &["inspect", "a.gguf"]);
    assert!(
        code == 0 && out.starts_with("GGUF, llama.cpp names, tensors: ") && out.contains("missing: a RWKV tokenizer")
    );
    for (args, why) in [
        (&["convert", "a.gguf", "b.pth", "--dtype", "q8_0"][..], "q8_0 is written as .gguf"),
        (&["convert", "a.gguf", "b.gguf", "--dtype", "int8"], "int8 and q4 are written as .safetensors"),
        (&["generate", "--model", "a.gguf", "--dtype", "q8_0"], "--dtype q8_0 is a type for files"),
        (&["convert", "a.gguf", "b.pth", "--dtype", "q4"], "int8 and q4 are written as .safetensors"),
        (&["convert", "a.gguf", "b.bin"], "must end in .gguf, .pth or .safetensors"),
    ] {
        let (code, _, err) = anser(&f.0, args);
        assert!(code == 1 && err.contains(why), "{err}");
    }
    // A file without a tensor that tells a dimension: the format is named, and the tensor.
    let values = [0.0; 64];
    let sources = [anser_formats::Source::new("emb.weight", &[8, 8], anser_formats::Dtype::F16, &values)];
    anser_formats::write_safetensors(&f.0.join("part.st"), &sources, &Default::default()).unwrap();
    let (code, _, err) = anser(&f.0, &["inspect", "part.st"]);
    assert!(
        code == 1 && err.contains("safetensors, official names, tensors: 1 F16") && err.contains("is missing"),
        "{err}"
    );
}

#[test]
fn weights_of_8_and_4_bits_predict_nearly_as_well() {
    let f = Folder::new("coded");
    let text = "It was the best of times, it was the worst of times; and the old man, who had come from the village that morning, sat down by \
                the fire and said nothing for a long while. ";
    std::fs::write(f.0.join("text.txt"), text.repeat(3)).unwrap();
    let model = format!("{}/../../models/anser-12m.safetensors", env!("CARGO_MANIFEST_DIR"));
    let json = |args: &[&str]| -> serde_json::Value {
        let (code, out, err) = anser(&f.0, &[&["--json", "--device", "cpu"], args].concat());
        assert_eq!(code, 0, "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let loss = |model: &str, dtype: &str| {
        let v = json(&["eval", "text", "--model", model, "--dtype", dtype, "text.txt"]);
        v["files"][0]["prediction"]["loss"].as_f64().unwrap()
    };
    let (exact, int8, q4) = (loss(&model, "f32"), loss(&model, "int8"), loss(&model, "q4"));
    assert!(int8 != exact && (int8 - exact).abs() < 0.003 * exact, "int8 {int8}, f32 {exact}");
    assert!(q4 != int8 && (q4 - exact).abs() < 0.03 * exact, "q4 {q4}, f32 {exact}");
    // A file of codes gives what coding at loading gives, and in other types its values.
    let mut sizes = vec![json(&["convert", &model, "f32.safetensors", "--dtype", "f32"])["bytes"].as_f64().unwrap()];
    for (dtype, coded) in [("int8", int8), ("q4", q4)] {
        let file = format!("{dtype}.safetensors");
        let v = json(&["convert", "f32.safetensors", &file, "--dtype", dtype, "--report", "--text", "text.txt"]);
        sizes.push(v["bytes"].as_f64().unwrap());
        assert_eq!(loss(&file, dtype), coded);
        let values = loss(&file, "f32");
        assert!((values - coded).abs() < 0.002 * coded && values != coded, "{dtype}: {values}, in its type {coded}");
        let text = &v["report"]["text"];
        assert_eq!(
            text["tokens"],
            json(&["eval", "text", "--model", &model, "text.txt"])["files"][0]["prediction"]["tokens"]
        );
        let most = if dtype == "q4" { 0.1 } else { 1e-3 };
        let kl = ["kl_mean", "kl_p99", "kl_max"].map(|k| text[k].as_f64().unwrap());
        assert!(0.0 < kl[0] && kl[0] < most && kl[0] < kl[1] && kl[1] <= kl[2], "{dtype}: {kl:?}");
        assert!((text["loss"].as_f64().unwrap() - coded).abs() < 1e-5);
        let of = |name: &str| v["report"]["tensors"][name].clone();
        let (matrix, vector) = (of("blocks.1.ffn.key.weight"), of("blocks.0.att.x_r"));
        let error = matrix["relative_error"].as_f64().unwrap();
        let head = of("head.weight")["relative_error"].as_f64().unwrap();
        // The values were codes of 8 bits; with 4 the head has 5.
        let as_meant = match dtype {
            "q4" => (0.05..0.1).contains(&error) && (0.02..0.05).contains(&head),
            _ => error == 0.0 && head == 0.0,
        };
        assert!(as_meant, "{dtype}: {error}, head {head}");
        assert_eq!((vector["dtype"].as_str(), vector["largest"].as_f64()), (Some("F32"), Some(0.0)));
    }
    assert!(sizes[1] < 0.28 * sizes[0] && sizes[2] < 0.2 * sizes[0], "{sizes:?}");
    // Without --dtype codes stay as they are.
    json(&["convert", "q4.safetensors", "again.safetensors"]);
    assert!(
        std::fs::read(f.0.join("q4.safetensors")).unwrap() == std::fs::read(f.0.join("again.safetensors")).unwrap()
    );
}
