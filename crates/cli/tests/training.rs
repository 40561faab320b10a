//! Data sets, training runs, chat and evaluation as a user meets them.

mod common;

use common::{Folder, anser, fixture};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const CONFIG: &str = "[model]\npreset = \"\"\nn_layer = 1\nn_embd = 32\nhead_size = 16\n[data]\npath = \"d\"\n\
    [train]\nctx = 32\nrows = 4\nlr_init = 3e-3\n[output]\nsave_every = 10\neval_every = 25\neval_rows = 4\nsample_every = 0\n";

/// A folder with a data set of bytes and a configuration.
fn prepared(name: &str) -> Folder {
    let f = Folder::new(name);
    let text: String = (0..4000).map(|i| format!("{} geese fly, ", i * i % 97)).collect();
    f.file("t.txt", text.as_bytes());
    f.file("c.toml", CONFIG.as_bytes());
    let (code, out, err) = anser(&f.0, &["data", "build", "t.txt", "--out", "d", "--tokenizer", "bytes", "--json"]);
    assert_eq!(code, 0, "{err}");
    let built: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(built["tokens"].as_u64().unwrap(), text.len() as u64 + 1);
    f
}

fn start(folder: &Path, steps: &str) -> Child {
    let program = assert_cmd::cargo::cargo_bin("anser");
    let mut command = Command::new(program);
    command.current_dir(folder).args(["train", "c.toml", "--set", steps, "--threads", "1"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn steps_logged(folder: &Path) -> usize {
    std::fs::read_to_string(folder.join("run/metrics.jsonl")).unwrap_or_default().lines().count()
}

#[test]
fn the_best_model_is_kept_where_the_last_is_worse() {
    let f = prepared("best");
    let train = |folder: &str, rate: &str| {
        let (folder, rate) = (format!("output.folder=\"{folder}\""), format!("train.lr_init={rate}"));
        let common =
            ["train", "c.toml", "--set", "train.steps=60", "--set", "train.warmup=0", "--set", "output.keep_best=true"];
        let (code, _, err) = anser(&f.0, &[&common[..], &["--set", &folder, "--set", &rate]].concat());
        assert_eq!(code, 0, "{err}");
    };
    let read = |folder: &str, name: &str| std::fs::read(f.0.join(folder).join(name)).unwrap();
    let held_out = |folder: &str| -> Vec<f64> {
        let text = String::from_utf8(read(folder, "metrics.jsonl")).unwrap();
        let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        lines.filter_map(|v| v.get("held_out_loss")?.as_f64()).collect()
    };
    for (folder, rate, last_is_best) in [("good", "3e-3", true), ("bad", "3.0", false)] {
        train(folder, rate);
        // At steps 0, 25, 50 and 60.
        let losses = held_out(folder);
        let lowest = losses.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(losses.len() == 4 && (losses[3] == lowest) == last_is_best, "{losses:?}");
        assert_eq!(read(folder, "best.safetensors") == read(folder, "model.safetensors"), last_is_best);
    }
}

#[test]
#[cfg(unix)]
fn ctrl_c_saves_and_the_same_command_goes_on_to_the_bit() {
    let whole = prepared("whole");
    let (code, out, err) =
        anser(&whole.0, &["train", "c.toml", "--set", "train.steps=120", "--threads", "1", "--json"]);
    assert_eq!(code, 0, "{err}");
    let summary: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(
        summary["held_out_loss"].as_f64().unwrap() < summary["held_out_loss_before"].as_f64().unwrap() - 1.0,
        "{out}"
    );
    let cut = prepared("cut");
    for (signal, after) in [("-INT", 15), ("-TERM", 60)] {
        let child = start(&cut.0, "train.steps=120");
        while steps_logged(&cut.0) < after {
            std::thread::sleep(Duration::from_millis(2));
        }
        // The folder is taken meanwhile.
        let (code, _, err) = anser(&cut.0, &["train", "c.toml"]);
        assert!(code == 1 && err.contains("another run is writing here"), "{err}");
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(130), "{}", String::from_utf8_lossy(&ended.stderr));
        assert!(String::from_utf8_lossy(&ended.stderr).contains("goes on from there"));
    }
    let (code, _, err) = anser(&cut.0, &["train", "c.toml", "--set", "train.steps=120", "--threads", "2"]);
    assert!(code == 0 && err.contains("going on after step"), "{err}");
    let read = |f: &Folder, name: &str| std::fs::read(f.0.join("run").join(name)).unwrap();
    assert!(read(&whole, "model.safetensors") == read(&cut, "model.safetensors"));
    // The curve is whole and has no step twice.
    let losses = |f: &Folder| -> Vec<(u64, f64)> {
        let text = String::from_utf8(read(f, "metrics.jsonl")).unwrap();
        let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        lines.filter_map(|v| Some((v["step"].as_u64()?, v.get("loss")?.as_f64()?))).collect()
    };
    assert!(losses(&whole).len() == 120 && losses(&whole) == losses(&cut));
    assert!(String::from_utf8(read(&cut, "loss.svg")).unwrap().starts_with("<svg"));
    let count = |f: &Folder, part: &str| {
        std::fs::read_dir(f.0.join("run"))
            .unwrap()
            .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains(part))
            .count()
    };
    assert_eq!((count(&whole, "step-"), count(&whole, "tfevents"), count(&cut, ".tmp")), (2, 1, 0));
}

#[test]
#[cfg(unix)]
fn a_full_disk_loses_nothing() {
    let f = prepared("full");
    let (code, _, err) = anser(&f.0, &["train", "c.toml", "--set", "train.steps=10"]);
    assert_eq!(code, 0, "{err}");
    // A limit on the size of files makes every longer write fail, as a full disk does.
    let program = assert_cmd::cargo::cargo_bin("anser");
    let script = format!("trap '' XFSZ; ulimit -f 40; exec {} train c.toml --set train.steps=20", program.display());
    let out = Command::new("sh").current_dir(&f.0).args(["-c", &script]).output().unwrap();
    let err = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{err}");
    assert!(err.contains("step-000000020.safetensors: write"), "{err}");
    let names: Vec<String> =
        std::fs::read_dir(f.0.join("run")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(
        names.contains(&"step-000000010.safetensors".into()) && !names.iter().any(|n| n.ends_with(".tmp")),
        "{names:?}"
    );
    let (code, _, err) = anser(&f.0, &["train", "c.toml", "--set", "train.steps=20"]);
    assert!(code == 0 && err.contains("going on after step 10"), "{err}");
}

#[test]
fn what_cannot_be_trained_is_said_in_one_line() {
    let f = prepared("bad");
    f.file("latin1.txt", b"caf\xe9");
    f.file("empty.txt", b"");
    f.file("short.txt", b"too short");
    assert_eq!(anser(&f.0, &["data", "build", "short.txt", "--out", "short"]).0, 0);
    let train = |set: &[&str]| {
        let mut args = vec!["train", "c.toml"];
        set.iter().for_each(|s| args.extend(["--set", s]));
        anser(&f.0, &args)
    };
    let load = format!("model.load={}", fixture("rwkv7.pth"));
    let hybrid = format!("model.load={}", fixture("rwkvx.pth"));
    for ((code, _, err), says) in [
        (anser(&f.0, &["data", "build", "latin1.txt", "--out", "x"]), "latin1.txt: not UTF-8 at byte 3"),
        (anser(&f.0, &["data", "build", "empty.txt", "--out", "x"]), "no text"),
        (anser(&f.0, &["data", "build", "nowhere.txt", "--out", "x"]), "nowhere.txt"),
        (anser(&f.0, &["data", "build", "t.txt", "--out", "no/such/folder/x"]), "no/such/folder"),
        (anser(&f.0, &["train", "nowhere.toml"]), "nowhere.toml"),
        (train(&["train.stpes=3"]), "did you mean train.steps?"),
        (train(&["model.head_size=64"]), "head_size 64 does not divide n_embd 32"),
        (train(&["data.path=short"]), "too few for samples"),
        (train(&["data.path=t.txt"]), "anser data build"),
        (train(&["data.path=nowhere"]), "nowhere.idx"),
        (train(&["data.tokenizer=world"]), "the data set was built with \"bytes\""),
        (train(&[&load, "data.path=", "data.tokenizer=world"]), "the model has 300 tokens"),
        (train(&["data.path=", "train.ctx=2000000", "model.n_layer=6", "model.n_embd=256"]), "train.micro_rows = 1"),
        (train(&[&hybrid, "model.gate=true", "data.path="]), "model.gate: the model loaded has others"),
        (train(&["model.n_layer=10000", "model.n_embd=8192"]), "train a smaller model"),
        (train(&["model.train_only=[\"haed*\"]"]), "no parameter is named"),
        (train(&["data.needles=0.5"]), "train.ctx: a sample of passkey has at least 253 tokens of bytes"),
        (train(&["data.needles=1", "data.needle_min=40"]), "data.needle_min: a sample of passkey has at least"),
        (train(&["data.needles=1", "data.needle_task=niah4"]), "`niah3`"),
        (train(&["data.needle_keys=2"]), "data.needle_keys"),
        (
            train(&["data.needles=1", "data.needle_task=niah2", "data.needle_keys=9"]),
            "train.ctx: a sample of niah2 with 9 keys has at least",
        ),
        (train(&["data.needles=1", "data.needle_task=niah2", "data.needle_text=no.txt"]), "no.txt"),
        (train(&["train.long_ce_context=16", "train.long_ce_from=8"]), "train.long_ce_from: it must be at least"),
        (train(&["train.long_ce_context=16"]), "no target of a row of train.ctx = 32"),
        (train(&["train.lr_init=1e30", "train.steps=30", "train.grad_clip=0"]), "is not finite"),
    ] {
        assert!(code == 1 && err.contains(says), "{says}: {code} {err}");
        assert_eq!(err.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{err}");
    }
    assert!(!f.0.join("x.bin").exists() && !f.0.join("x.idx").exists());
    let (code, out, _) = anser(&f.0, &["train", "--defaults"]);
    assert!(code == 0 && out.contains("lr_init"));
}

#[test]
fn targets_are_weighted_by_what_a_long_context_tells() {
    let f = prepared("long");
    let sets = ["context=8", "stride=8", "from=16"].map(|s| format!("train.long_ce_{s}"));
    let (code, _, err) = anser(
        &f.0,
        &["train", "c.toml", "--set", &sets[0], "--set", &sets[1], "--set", &sets[2], "--set", "train.steps=20"],
    );
    assert_eq!(code, 0, "{err}");
    let lines = std::fs::read_to_string(f.0.join("run/metrics.jsonl")).unwrap();
    let weights: Vec<f64> = lines
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["mean_weight"].as_f64())
        .collect();
    // A new model says the same with any context.
    assert!(weights.len() == 20 && weights.iter().all(|w| (0.5..2.0).contains(w)), "{weights:?}");
    assert!(weights[0] == 1.0 && weights[19] != 1.0, "{weights:?}");
}

#[test]
fn frozen_parameters_and_packed_documents() {
    let f = prepared("frozen");
    let lines: String = (0..300).map(|i| format!("{{\"text\": \"number {i} {}\"}}\n", "x".repeat(i % 40))).collect();
    f.file("l.jsonl", lines.as_bytes());
    assert_eq!(anser(&f.0, &["data", "build", "l.jsonl", "--out", "l", "--tokenizer", "bytes"]).0, 0);
    let golden = fixture("rwkv7.pth");
    let sets = [
        "data.path=l",
        "data.order=packed",
        "train.steps=3",
        "model.train_only=[\"head.*\"]",
        "train.bptt=8",
        "train.micro_rows=1",
    ];
    let mut args = vec!["train", "c.toml"];
    sets.iter().for_each(|s| args.extend(["--set", s]));
    let load = format!("model.load={golden}");
    args.extend(["--set", &load]);
    let (code, _, err) = anser(&f.0, &args);
    assert_eq!(code, 0, "{err}");
    let open = |p: &Path| anser_formats::Checkpoint::open(p).unwrap();
    let (before, after) = (open(Path::new(&golden)), open(&f.0.join("run/model.safetensors")));
    for name in after.names() {
        let same = before.get(name).unwrap().to_f32_vec().unwrap() == after.get(name).unwrap().to_f32_vec().unwrap();
        assert_eq!(same, name != "head.weight", "{name}");
    }
}

#[test]
fn chat_turns_and_digits() {
    let f = prepared("chat");
    assert_eq!(anser(&f.0, &["train", "c.toml", "--set", "train.steps=5"]).0, 0);
    let chat = |input: &str, more: &[&str]| {
        let mut command = assert_cmd::Command::cargo_bin("anser").unwrap();
        let args = ["chat", "--model", "run/model.safetensors", "--max-tokens", "5", "--json", "--dtype", "f32"];
        let out = command.current_dir(&f.0).args(args).args(more).write_stdin(input).output().unwrap();
        (out.status.code().unwrap(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let turns = |out: &str| -> Vec<serde_json::Value> {
        serde_json::from_str::<serde_json::Value>(out).unwrap()["turns"].as_array().unwrap().clone()
    };
    let (code, out, err) = chat("one\ntwo\n/think long\nthree\n", &["--save-state", "s"]);
    assert!(code == 0 && turns(&out).len() == 3, "{err}");
    // The same conversation in two sittings.
    let (_, first, _) = chat("one\n", &["--save-state", "a", "--temperature", "0"]);
    let (_, second, _) = chat("two\n", &["--load-state", "a", "--temperature", "0"]);
    let (_, both, _) = chat("one\ntwo\n", &["--temperature", "0"]);
    assert_eq!([turns(&first), turns(&second)].concat(), turns(&both));
    let (code, out, _) = chat("one\n/retry\n", &[]);
    assert!(code == 0 && turns(&out).len() == 1);
    let (code, _, err) = chat("/nonsense\n", &[]);
    assert!(code == 1 && err.contains("/nonsense"), "{err}");

    let (code, out, err) = anser(
        &f.0,
        &["eval", "digits", "--steps", "3", "--rows", "2", "--count", "2", "--out", "d.safetensors", "--json"],
    );
    assert_eq!(code, 0, "{err}");
    let result: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(result["lengths"].as_array().unwrap().len(), 30);
    let (code, again, _) = anser(&f.0, &["eval", "digits", "--model", "d.safetensors", "--count", "2", "--json"]);
    let again: serde_json::Value = serde_json::from_str(&again).unwrap();
    assert!(code == 0 && again["lengths"] == result["lengths"]);
}

#[test]
fn experiments_from_files() {
    let f = Folder::new("experiments");
    let rest = "[models]\nkinds = ['rwkv7', 'transformer']\nlayers = [1]\nwidths = [32]\nhead_size = 16\n[train]\nrows = 4\n\
        micro_rows = 4\nsteps = 4\nlr = [1e-3]\nwarmup = 1\nweight_decay = 0.1\nbeta2 = 0.99\ngrad_clip = 1.0\nseeds = [1]\n\
        eval_every = 2\nstop_at = 2.0\ntest_rows = 4\n";
    f.file("s.toml", format!("[task]\ngroups = ['S3']\ntrained = 3\ntested = [2, 6]\n{rest}").as_bytes());
    f.file("r.toml", format!("[task]\nvocab = 32\nrows = [[16, 4]]\n{rest}").as_bytes());
    for (task, config, picture) in [("states", "s.toml", "states-S3.svg"), ("recall", "r.toml", "recall.svg")] {
        let (code, out, err) = anser(&f.0, &["eval", task, config, "--json"]);
        assert_eq!(code, 0, "{err}");
        let result: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(result["runs"].as_array().unwrap().len(), 2);
        assert!(f.0.join(picture).exists() && f.0.join(format!("{task}.json")).exists());
        // Everything is done: the table comes at once.
        let (code, out, err) = anser(&f.0, &["eval", task, config]);
        assert!(code == 0 && out.contains("Transformer") && !err.contains("step"), "{out}{err}");
    }
    let (code, _, err) = anser(&f.0, &["eval", "states", "r.toml"]);
    assert!(code == 1 && err.starts_with("error: r.toml") && err.lines().count() == 1, "{err}");
    let (code, _, err) = anser(&f.0, &["eval", "recall", "r.toml", "--out", "none/recall.json"]);
    assert!(code == 1 && err.contains("none/recall.json") && err.lines().count() == 1, "{err}");
}

#[test]
fn needles_are_trained_on_and_asked_for() {
    let f = prepared("needles");
    let set = ["train.ctx=700", "train.steps=3", "data.needles=0.5", "data.needle_min=340", "output.save_every=0"];
    let set: Vec<&str> = set.iter().flat_map(|s| ["--set", s]).collect();
    let train = |more: &[&str]| {
        let (code, _, err) = anser(&f.0, &[&["train", "c.toml"], &set[..], more].concat());
        assert_eq!(code, 0, "{err}");
        std::fs::read(f.0.join("run/model.safetensors")).unwrap()
    };
    let first = train(&[]);
    assert!(first == train(&[]), "the same rows twice");
    assert!(first != train(&["--set", "data.needles=0.25"]));
    let model = "run/model.safetensors";
    for (task, rest) in [
        (&["passkey"][..], "passkey"),
        (&["niah", "--task", "3", "--text", "t.txt"], "niah3"),
        (&["niah", "--task", "2", "--keys", "4", "--text", "t.txt"], "niah2-keys4"),
    ] {
        let args = ["--model", model, "--lengths", "700,600,700", "--depths", "2", "--count", "2", "--json"];
        let (code, out, err) = anser(&f.0, &[&["eval"], task, &args].concat());
        assert_eq!(code, 0, "{err}");
        let result: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!((result["runs"].as_array().unwrap().len(), &result["accuracy"]), (4, &serde_json::json!(0.0)));
        assert_eq!(err.lines().count(), 4, "{err}");
        assert!(f.0.join(format!("{rest}.json")).exists() && f.0.join(format!("{rest}.svg")).exists());
        // Everything is done: the table comes at once.
        let (code, out, err) = anser(&f.0, &[&["eval"], task, &args[..8]].concat());
        assert!(code == 0 && out.starts_with("| depth | 600 | 700 |\n") && err.is_empty(), "{out}{err}");
    }
    for (args, code, says) in [
        (&["passkey", "--lengths", "20"][..], 1, "has at least 82 tokens of world-4096, not 20: name a greater length"),
        (&["passkey", "--depths", "0"], 1, "depths: there must be at least 1"),
        (&["passkey", "--count", "0"], 1, "count: there must be at least 1"),
        (&["passkey", "--lengths", "90"], 1, "another experiment"),
        (&["niah", "--task", "1", "--text", "t.txt"], 1, "tasks 2 and 3 take one"),
        (&["niah", "--task", "2", "--text", "no.txt"], 1, "no.txt"),
        (&["niah", "--task", "2", "--keys", "0"], 1, "--keys: a prompt of niah2 can have 1 to 1600 needles, not 0"),
        (&["niah", "--task", "2", "--keys", "99"], 1, "a prompt of niah2 with 99 keys has at least"),
        (&["niah", "--task", "4"], 2, "4 is not in 1..=3"),
        (&["niah"], 2, "--task"),
    ] {
        let (got, out, err) = anser(&f.0, &[&["eval"], args].concat());
        assert!(got == code && out.is_empty() && err.contains(says), "{args:?}: {got} {err}");
        assert!(code == 2 || err.lines().count() == 1, "{err}");
    }
}

#[test]
#[cfg(unix)]
fn an_interrupted_search_for_needles_goes_on() {
    let f = Folder::new("search");
    let args = ["eval", "passkey", "--lengths", "90,100", "--depths", "40", "--count", "2", "--threads", "1"];
    let program = assert_cmd::cargo::cargo_bin("anser");
    let mut command = Command::new(program);
    let child = command.current_dir(&f.0).args(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let asked = || -> usize {
        let text = std::fs::read_to_string(f.0.join("passkey.json")).unwrap_or_default();
        text.matches("\"asked\"").count()
    };
    while asked() < 3 {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code() == Some(130) && said.contains("goes on from there"), "{said}");
    let before = asked();
    assert!((3..80).contains(&before) && f.0.join("passkey.svg").exists());
    let (code, out, err) = anser(&f.0, &args);
    assert!(code == 0 && out.contains("| 100% |") && asked() == 80, "{out}{err}");
    // The last cell before may have been whole or in work.
    assert!((80 - before..=81 - before).contains(&err.lines().count()), "{before}: {err}");
}

#[test]
fn a_doubled_rate_goes_where_the_model_goes() {
    let f = prepared("doubled");
    let train = |more: &[&str]| anser(&f.0, &[&["train", "c.toml", "--set", "train.steps=3"], more].concat());
    assert_eq!(train(&["--set", "model.double_rate=true"]).0, 0);
    let (code, _, err) = train(&[]);
    assert!(code == 1 && err.contains("other double_rate"), "{err}");
    let (code, _, err) = anser(&f.0, &["convert", "run/model.safetensors", "m.pth"]);
    assert!(code == 1 && err.contains("write .safetensors") && err.lines().count() == 1, "{err}");
    assert_eq!(anser(&f.0, &["convert", "run/model.safetensors", "m.safetensors", "--dtype", "bf16"]).0, 0);
    let (code, out, _) = anser(&f.0, &["inspect", "m.safetensors"]);
    assert!(code == 0 && out.contains("doubled in-context rate"), "{out}");
}
