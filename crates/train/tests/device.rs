//! Training steps on a GPU: against the CPU, twice with the same bits, stopped by what is not finite, in the memory forecast.
//!
//! Needs a GPU: `cargo test -p anser-train --test device -- --ignored` (the device is cuda:0).

use anser_data::{Dataset, Options, Order, Tokens};
use anser_formats::Checkpoint;
use anser_model::{Config, Hybrid, Init, Load, Model};
use anser_tensor::{Context, DType, Device};
use anser_train::{Bptt, Error, Hyper, LongCe, Recompute, Schedule, Settings, StepInfo, Trainer};

fn settings() -> Settings {
    let schedule = Schedule { init: 3e-3, last: 3e-4, warmup: 2, total: 10 };
    let hyper = Hyper { eps: 1e-8, ..Hyper::default() };
    Settings {
        ctx: 32,
        schedule,
        hyper,
        grad_clip: 0.5,
        l2wrap: true,
        checkpointing: false,
        recompute: Recompute::Nothing,
        bptt: Bptt::Whole,
        long_ce: None,
    }
}

const LONG_CE: Option<LongCe> = Some(LongCe { context: 8, stride: 4, from: 12, gamma: 2.0, normalise: true });

fn data() -> Dataset {
    let text: Vec<u32> = (0..20_000u32).map(|i| (i * i / 7 + i % 13) % 64).collect();
    let options = Options { ctx: 32, held_out: 0.1, order: Order::Official, resets: false, seed: 0 };
    Dataset::new(Tokens::Memory(text), options).unwrap()
}

fn model() -> Model {
    model_of(&Config { head_size: 32, ..Config::new(2, 64, 64) })
}

fn model_of(config: &Config) -> Model {
    let mut m = Model::init(&Context::cpu(1), config, Init::Current, 5).unwrap();
    // Fresh models have zeros where gradients then don't flow.
    m.params_mut().values_mut().iter_mut().enumerate().for_each(|(i, v)| *v += 0.02 * (i as f32 * 0.7).sin());
    m
}

fn gpu(dtype: DType) -> Context {
    Context::with_activations(Device::Cuda(0), dtype, 1).unwrap()
}

/// Three steps of two micro-batches each, the second with the head frozen.
fn steps(ctx: &Context, settings: Settings) -> (Vec<StepInfo>, Vec<f32>) {
    let mut t = Trainer::new(ctx, model(), settings);
    let step = |t: &mut Trainer| t.step(&[data().train(t.steps(), 2), data().train(t.steps() + 9, 1)]).unwrap();
    let mut infos = vec![step(&mut t)];
    t.set_trainable(|name| name != "head.weight");
    infos.push(step(&mut t));
    t.set_trainable(|_| true);
    infos.push(step(&mut t));
    (infos, t.model().params().current().into_owned())
}

#[test]
#[ignore = "needs a GPU"]
fn recorded_steps_are_the_same() {
    // In the second half of the steps answers alone count, and the head is frozen; tokens are ever others.
    let run = |config: &Config, dtype, record, checkpointing| {
        let mut t = Trainer::new(&gpu(dtype), model_of(config), Settings { checkpointing, ..settings() });
        t.record_steps(record);
        let (mut infos, mut recorded) = (Vec::new(), 0);
        for step in 0..8 {
            if step == 4 {
                t.set_trainable(|name| name != "head.weight");
            }
            let mut micro = [data().train(3 * step, 2), data().train(3 * step + 2, 2)];
            for b in micro.iter_mut().filter(|_| step >= 4) {
                b.targets.iter_mut().enumerate().filter(|(i, _)| i % 5 != 2).for_each(|(_, t)| *t = -1);
            }
            infos.push(t.step(&micro).unwrap());
            recorded += u32::from(t.is_recorded());
            // Work in between has its own memory.
            infos.last_mut().unwrap().lr += t.evaluate(&data().train(90 + step, 3)).unwrap();
        }
        (infos, t.model().params().current().into_owned(), recorded)
    };
    let plain = Config { head_size: 32, ..Config::new(2, 64, 64) };
    let hybrid = Config { hybrid: Some(Hybrid { chunk: 8, topk: 2, ..Hybrid::new(1) }), ..plain.clone() };
    for (config, dtype, checkpointing) in [
        (&plain, DType::F32, true),
        (&plain, DType::BF16, false),
        (&plain.clone().control(), DType::BF16, false),
        (&hybrid, DType::BF16, false),
    ] {
        let (want, got) = (run(config, dtype, false, checkpointing), run(config, dtype, true, checkpointing));
        assert!(want.0 == got.0, "{dtype}: {:?}, not {:?}", got.0, want.0);
        let same = want.1.iter().zip(&got.1).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same && want.2 == 0 && got.2 == 4, "{dtype}: {} steps were recorded", got.2);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_step_is_the_cpus() {
    for checkpointing in [false, true] {
        for (bptt, long_ce) in
            [(Bptt::Whole, None), (Bptt::Exact(11), LONG_CE), (Bptt::Truncated(16), None), (Bptt::Whole, LONG_CE)]
        {
            let settings = Settings { checkpointing, bptt, long_ce, ..settings() };
            let want = steps(&Context::cpu(2), settings);
            for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 2e-2)] {
                let got = steps(&gpu(dtype), settings);
                for (g, w) in got.0.iter().zip(&want.0) {
                    let (loss, norm) = ((g.loss - w.loss).abs() / w.loss, (g.grad_norm / w.grad_norm - 1.0).abs());
                    assert!(loss < tolerance && norm < tolerance, "{dtype} {bptt:?}: {g:?}, not {w:?}");
                }
                if dtype == DType::F32 {
                    let distance =
                        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (*a - *b).abs()).fold(0.0, f32::max);
                    assert!(distance(&got.1, &want.1) < 2e-3, "{bptt:?}: {}", distance(&got.1, &want.1));
                }
                assert!(got == steps(&gpu(dtype), settings), "{dtype} {bptt:?}: two runs differ");
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_model_in_training_is_packed_as_it_is_now() {
    let ctx = gpu(DType::F32);
    let mut t = Trainer::new(&ctx, model(), settings());
    let print = |t: &Trainer| t.model().packed(&ctx, DType::F32).exact_fingerprint();
    let before = print(&t);
    t.step(&[data().train(0, 2)]).unwrap();
    let path = std::env::temp_dir().join(format!("anser-packed-{}.safetensors", std::process::id()));
    t.save_model(&path).unwrap();
    let load = Load::Inference(DType::F32.into());
    let saved = Model::load(&ctx, &Checkpoint::open(&path).unwrap(), load).unwrap().exact_fingerprint();
    std::fs::remove_file(path).unwrap();
    assert!(print(&t) != before && print(&t) == saved);
}

#[test]
#[ignore = "needs a GPU"]
fn nan_stops_and_changes_nothing_and_a_good_step_follows() {
    let at = model().params().specs().iter().find(|s| s.name == "blocks.1.ffn.key.weight").unwrap().range.start;
    let mut bad = model();
    bad.params_mut().values_mut()[at] = f32::NAN;
    let bits = |m: &Model| m.params().current().iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    let before = bits(&bad);
    let mut t = Trainer::new(&gpu(DType::BF16), bad, settings());
    let e = t.step(&[data().train(0, 2)]).unwrap_err();
    assert!(matches!(&e, Error::NotFinite { step: 0, what } if what.starts_with("the gradient of ")), "{e}");
    assert!(bits(t.model()) == before && t.steps() == 0);

    // A token outside the vocabulary is found in the second micro-batch, when the first has left gradients.
    let mut t = Trainer::new(&gpu(DType::BF16), model(), settings());
    let mut wrong = data().train(1, 2);
    wrong.tokens[3] = 64;
    assert!(t.step(&[data().train(0, 2), wrong]).is_err());
    let after = t.step(&[data().train(0, 2)]).unwrap();
    assert_eq!(after, Trainer::new(&gpu(DType::BF16), model(), settings()).step(&[data().train(0, 2)]).unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn what_is_computed_again_changes_no_bit() {
    for dtype in [DType::F32, DType::BF16] {
        let [nothing, shifts, all] =
            Recompute::LEVELS.map(|recompute| steps(&gpu(dtype), Settings { recompute, ..settings() }));
        assert!(nothing == shifts && nothing == all, "{dtype}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn activations_are_few() {
    let ctx = gpu(DType::BF16);
    let (c, rows, t) = (128, 4, 256);
    // What one layer more takes, its parameters apart, in bytes a token and channel.
    let layer = |recompute| {
        let [less, more] = [2, 3].map(|layers| {
            let m = Model::init(&Context::cpu(1), &Config::new(layers, c, 64), Init::Current, 5).unwrap();
            let t = Trainer::new(&ctx, m, Settings { ctx: t, recompute, ..settings() });
            (t.forecast(rows).unwrap() - t.resident()) as f64
        });
        (more - less) / (rows * t * c) as f64
    };
    let bytes = Recompute::LEVELS.map(layer);
    println!("bytes a token, channel and layer: {bytes:?}");
    assert!(bytes.iter().zip([70.0, 56.0, 46.0]).all(|(b, most)| *b <= most), "{bytes:?}");
}

#[test]
#[ignore = "needs a GPU"]
fn memory_is_forecast_and_launches_are_counted() {
    let ways = [(true, Recompute::Nothing)].into_iter().chain(Recompute::LEVELS.map(|what| (false, what)));
    let ways = ways.flat_map(|way| [(way, None), (way, LONG_CE)]);
    for ((checkpointing, recompute), long_ce) in ways {
        let ctx = gpu(DType::BF16);
        let settings = Settings { checkpointing, recompute, long_ce, ..settings() };
        let mut t = Trainer::new(&ctx, model(), settings);
        ctx.trim();
        let forecast = t.forecast(4).unwrap();
        t.step(&[data().train(0, 4)]).unwrap();
        assert_eq!(ctx.memory().peak, forecast);
        let reserved = ctx.memory().reserved;
        let (done, spans) = ctx.cuda().unwrap().profiled(|| t.step(&[data().train(1, 4)]));
        done.unwrap();
        assert_eq!(ctx.memory().reserved, reserved, "the second step allocated");
        assert!(spans.iter().any(|s| s.name.starts_with("gemm ") && s.flops > 0.0 && s.bytes > 0));
        assert!(spans.iter().any(|s| s.name == "adamw_bf16" && s.bytes > 0));
        println!("{} launches a step", spans.len());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn receptance_key_and_value_are_one_product() {
    let ctx = gpu(DType::BF16);
    let mut t = Trainer::new(&ctx, model(), settings());
    let (_, spans) = ctx.cuda().unwrap().profiled(|| t.step(&[data().train(0, 2)]).unwrap());
    let together = spans.iter().filter(|s| s.name.contains(" x3 by ")).count();
    // Forward, gradients of weights and of inputs in both layers.
    assert_eq!(together, 6);
}
