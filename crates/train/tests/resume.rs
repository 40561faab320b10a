//! Resuming gives the bits of the uninterrupted run, also after a kill at any moment.

use anser_data::{Dataset, Options, Order, Tokens};
use anser_model::{Config, Init, Model};
use anser_tensor::Context;
use anser_train::{Bptt, Error, Hyper, LongCe, Recompute, Schedule, Settings, StepInfo, Trainer};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const STEPS: u64 = 60;

fn settings() -> Settings {
    let schedule = Schedule { init: 3e-3, last: 3e-4, warmup: 5, total: STEPS };
    let hyper = Hyper { eps: 1e-8, ..Hyper::default() };
    Settings {
        ctx: 32,
        schedule,
        hyper,
        grad_clip: 1.0,
        l2wrap: true,
        checkpointing: false,
        recompute: Recompute::Nothing,
        bptt: Bptt::Whole,
        long_ce: None,
    }
}

fn data() -> Dataset {
    let text: Vec<u32> = (0..20_000u32).map(|i| (i * i / 7 + i % 13) % 64).collect();
    let options = Options { ctx: 32, held_out: 0.1, order: Order::Official, resets: false, seed: 0 };
    Dataset::new(Tokens::Memory(text), options).unwrap()
}

fn fresh(ctx: &Context) -> Trainer {
    let config = Config { head_size: 32, ..Config::new(2, 64, 64) };
    Trainer::new(ctx, Model::init(ctx, &config, Init::Current, 5).unwrap(), settings())
}

fn run(t: &mut Trainer, until: u64, mut each: impl FnMut(&Trainer, StepInfo)) {
    let data = data();
    while t.steps() < until {
        let batch = data.train(t.steps(), 4);
        let info = t.step(&[batch]).unwrap();
        each(t, info);
    }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("anser-resume-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Not a test of its own: the process that `kill_at_any_moment` starts and kills.
#[test]
fn child() {
    let Some(folder) = std::env::var_os("ANSER_TEST_FOLDER") else { return };
    let (ctx, folder) = (Context::cpu(1), Path::new(&folder));
    let mut t = Trainer::resume(&ctx, folder, settings(), |_| {}).unwrap().unwrap_or_else(|| fresh(&ctx));
    run(&mut t, STEPS, |t, _| {
        t.save(folder, 2).unwrap();
    });
    t.save_model(&folder.join("final.safetensors")).unwrap();
}

#[test]
fn kill_at_any_moment() {
    let ctx = Context::cpu(2);
    let folder = Folder::new("kill");
    let mut whole = fresh(&ctx);
    run(&mut whole, STEPS, |_, _| {});
    whole.save_model(&folder.0.join("expected.safetensors")).unwrap();
    let start = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child"])
            .env("ANSER_TEST_FOLDER", &folder.0)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut kills = 0;
    for round in 0..12 {
        let mut child = start();
        std::thread::sleep(Duration::from_millis(60 + 37 * round));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
    }
    assert!(kills > 0, "the run was never caught alive");
    assert!(start().wait().unwrap().success());
    let read = |name: &str| std::fs::read(folder.0.join(name)).unwrap();
    assert!(read("final.safetensors") == read("expected.safetensors"), "after {kills} kills");
}

#[test]
fn losses_go_on_and_damaged_checkpoints_are_skipped() {
    let long_ce = LongCe { context: 8, stride: 4, from: 12, gamma: 2.0, normalise: true };
    for settings in [settings(), Settings { long_ce: Some(long_ce), ..settings() }] {
        go_on(settings);
    }
}

fn go_on(settings: Settings) {
    let (ctx, folder) = (Context::cpu(2), Folder::new("skip"));
    let fresh = |ctx: &Context| {
        let mut t = fresh(ctx);
        *t.settings_mut() = settings;
        t
    };
    let mut losses = Vec::new();
    let mut whole = fresh(&ctx);
    run(&mut whole, 20, |_, i| losses.push(i));
    let mut first = fresh(&ctx);
    run(&mut first, 10, |t, _| {
        t.save(&folder.0, 2).unwrap();
    });
    let kept = std::fs::read_dir(&folder.0).unwrap().count();
    assert_eq!(kept, 2);
    let newest = folder.0.join("step-000000010.safetensors");
    let bytes = std::fs::read(&newest).unwrap();
    std::fs::write(&newest, &bytes[..bytes.len() / 2]).unwrap();
    let mut warnings = Vec::new();
    let mut t = Trainer::resume(&ctx, &folder.0, settings, |w| warnings.push(w)).unwrap().unwrap();
    assert!(t.steps() == 9 && warnings.len() == 1, "{warnings:?}");
    let mut rest = Vec::new();
    run(&mut t, 20, |_, i| rest.push(i));
    assert_eq!(rest, losses[9..]);
    assert!(Trainer::resume(&ctx, Path::new("no/such/folder"), settings, |_| {}).unwrap().is_none());
    // Where none is whole, a run doesn't begin anew over them.
    std::fs::write(folder.0.join("step-000000009.safetensors"), b"x").unwrap();
    let e = Trainer::resume(&ctx, &folder.0, settings, |_| {}).err().unwrap().to_string();
    assert!(e.contains("2 of 2 are damaged"), "{e}");
}

#[test]
fn accumulation_equals_one_large_batch() {
    let ctx = Context::cpu(2);
    let data = data();
    let (mut one, mut two) = (fresh(&ctx), fresh(&ctx));
    let whole = data.train(0, 4);
    let half = |r: std::ops::Range<usize>| whole.slice(32, r.start / 32, r.end / 32);
    let a = one.step(std::slice::from_ref(&whole)).unwrap();
    let b = two.step(&[half(0..64), half(64..128)]).unwrap();
    assert!((a.loss - b.loss).abs() < 1e-6 && (a.grad_norm / b.grad_norm - 1.0).abs() < 1e-5);
    // Ignored targets count for nothing.
    let mut ignored = whole.clone();
    ignored.targets[64..].fill(-1);
    let (mut three, mut four) = (fresh(&ctx), fresh(&ctx));
    let a = three.step(&[ignored]).unwrap();
    let b = four.step(&[half(0..64)]).unwrap();
    assert!((a.loss - b.loss).abs() < 1e-6 && (a.grad_norm / b.grad_norm - 1.0).abs() < 1e-5);
}

#[test]
fn rows_in_pieces_have_the_gradients_of_whole_rows() {
    let ctx = Context::cpu(2);
    let mut batch = data().train(0, 3);
    // Sequences that begin at the seam of two pieces, next to one, and inside.
    batch.starts = vec![0, 5, 32, 40, 41, 64, 79];
    let first = |bptt| {
        let mut t = fresh(&ctx);
        // At the very start time mixing is silent and passes no gradient.
        run(&mut t, 5, |_, _| {});
        t.settings_mut().bptt = bptt;
        let info = t.step(std::slice::from_ref(&batch)).unwrap();
        (info.loss, info.grad_norm, t.model().params().values().to_vec())
    };
    let whole = first(Bptt::Whole);
    for n in [1, 8, 13, 31, 32, 100] {
        let (loss, norm, values) = first(Bptt::Exact(n));
        assert!((loss - whole.0).abs() < 1e-6 && (norm / whole.1 - 1.0).abs() < 1e-5, "{n}: {loss} {norm} {whole:?}");
        // Adam's first step is the sign of the gradient: compare what is not near zero.
        let far = values.iter().zip(&whole.2).filter(|(a, b)| (*a - *b).abs() > 1e-4).count();
        assert!(far * 1000 < values.len(), "{n}: {far} of {}", values.len());
        let (loss, truncated, _) = first(Bptt::Truncated(n));
        assert!((loss - whole.0).abs() < 1e-6, "the state goes on");
        // (A last piece of one token has next to nothing to send back.)
        assert!(n > 13 || (truncated / whole.1 - 1.0).abs() > 1e-5, "{n}: the gradient does not");
    }
}

#[test]
fn nan_stops_and_changes_nothing() {
    let ctx = Context::cpu(1);
    let config = Config { head_size: 32, ..Config::new(2, 64, 64) };
    let mut model = Model::init(&ctx, &config, Init::Current, 5).unwrap();
    let at = model.params().specs().iter().find(|s| s.name == "blocks.1.ffn.key.weight").unwrap().range.start;
    model.params_mut().values_mut()[at] = f32::NAN;
    let before: Vec<u32> = model.params().values().iter().map(|v| v.to_bits()).collect();
    let mut t = Trainer::new(&ctx, model, settings());
    let e = t.step(&[data().train(0, 2)]).unwrap_err();
    assert!(matches!(e, Error::NotFinite { step: 0, .. }), "{e}");
    assert!(t.model().params().values().iter().map(|v| v.to_bits()).eq(before) && t.steps() == 0);
}

#[test]
fn a_folder_belongs_to_one_run_and_memory_is_forecast() {
    let folder = Folder::new("lock");
    let lock = Trainer::lock(&folder.0).unwrap();
    assert!(matches!(Trainer::lock(&folder.0), Err(Error::Locked(_))));
    drop(lock);
    std::fs::write(folder.0.join("step-000000007.safetensors.12345.tmp"), b"half").unwrap();
    std::fs::write(folder.0.join("notes.tmp"), b"mine").unwrap();
    Trainer::lock(&folder.0).unwrap();
    let left = std::fs::read_dir(&folder.0).unwrap().map(|f| f.unwrap().file_name()).collect::<Vec<_>>();
    assert!(left.len() == 2 && left.contains(&"notes.tmp".into()), "{left:?}");

    let ctx = Context::cpu(2);
    let mut t = fresh(&ctx);
    ctx.trim();
    // The values are the only part that is not from the context's pool.
    let forecast = t.forecast(4).unwrap() - 4 * t.model().params().values().len();
    t.step(&[data().train(0, 4)]).unwrap();
    assert_eq!(ctx.memory().peak, forecast);
}
