//! LongCE against its definition computed target by target: weights, loss and gradients.

use anser_data::Batch;
use anser_model::{Config, Hybrid, Init, Model, State};
use anser_ops::{CrossEntropy, Segment, Tape, batch};
use anser_tensor::Context;
use anser_train::{Bptt, Hyper, LongCe, Recompute, Schedule, Settings, StepInfo, Trainer};

const T: usize = 48;
const VOCAB: usize = 40;
/// A rate at which the change of a parameter by the first step is far larger than the parameter.
const RATE: f64 = 1e9;
/// The first step of Adam is RATE g / (|g| + EPS).
const EPS: f64 = 1e3;

/// The two definitions, smaller: with the windows of Fang et al. and with those of RWKV-X.
const FANG: LongCe = LongCe { context: 16, stride: 4, from: 16, gamma: 5.0, normalise: false };
const RWKV_X: LongCe = LongCe { context: 10, stride: 10, from: 20, gamma: 1.1, normalise: false };

fn settings(long_ce: Option<LongCe>) -> Settings {
    Settings {
        ctx: T,
        schedule: Schedule { init: RATE, last: RATE, warmup: 0, total: 1 },
        hyper: Hyper { eps: EPS, weight_decay: 0.0, ..Hyper::default() },
        grad_clip: 0.0,
        l2wrap: true,
        checkpointing: false,
        recompute: Recompute::Nothing,
        bptt: Bptt::Whole,
        long_ce,
    }
}

fn plain() -> Config {
    Config { head_size: 16, ..Config::new(2, 32, VOCAB) }
}

fn hybrid() -> Config {
    Config { hybrid: Some(Hybrid { chunk: 4, topk: 2, ..Hybrid::new(1) }), ..plain() }
}

/// A model of noise, no part of it silent, which forgets slowly.
fn model(config: &Config) -> Model {
    let mut m = Model::init(&Context::cpu(1), config, Init::Noise, 5).unwrap();
    let specs = m.params().specs().to_vec();
    for s in specs {
        let values = &mut m.params_mut().values_mut()[s.range];
        match s.name.as_str() {
            "head.weight" | "rwkv.head.weight" => values.iter_mut().for_each(|v| *v *= 3.0),
            name if name.ends_with("att.w0") => values.fill(-8.0),
            _ => {}
        }
    }
    m
}

/// Three rows: one document, several of which some are too short to be weighted, and one with targets that are ignored.
fn data() -> Batch {
    let tokens: Vec<u32> = (0..3 * T as u32).map(|i| (i * i / 7 + i % 13) % VOCAB as u32).collect();
    let mut targets: Vec<i32> = tokens[1..].iter().map(|&t| t as i32).chain([1]).collect();
    targets[2 * T..2 * T + 25].fill(-1);
    targets[2 * T + 30] = -1;
    Batch { tokens, targets, starts: vec![0, T, T + 3, T + 31, 2 * T] }
}

/// -log p of the last target of one sequence that begins from nothing.
fn loss(model: &Model, tokens: &[u32], target: usize) -> f64 {
    let ctx = Context::cpu(1);
    let mut tape = Tape::inference(&ctx, model.params());
    let state = State::zeros(&ctx, model.config(), 0);
    let segments = batch(1, tokens.len(), false).into();
    let (hidden, _) = model.forward(&mut tape, tokens, &segments, &state, false).unwrap();
    let logits = model.logits(&mut tape, &hidden).to_vec();
    let z = &logits[logits.len() - VOCAB..];
    z.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln() - f64::from(z[target])
}

/// The weights by their definition.
fn weights(model: &Model, b: &Batch, l: LongCe) -> Vec<f64> {
    let weight = |i: usize| {
        let start = *b.starts.iter().rfind(|s| **s <= i).unwrap();
        let position = i - start;
        let Ok(target) = usize::try_from(b.targets[i]) else { return 0.0 };
        if position < l.from {
            return 1.0;
        }
        // How far its window begins before it.
        let context = l.context + (position - l.from) % l.stride;
        let short = loss(model, &b.tokens[i - context..=i], target);
        (short - loss(model, &b.tokens[start..=i], target)).exp().min(l.gamma)
    };
    let mut w: Vec<f64> = (0..b.tokens.len()).map(weight).collect();
    if l.normalise {
        let mean = mean(&w, b);
        w.iter_mut().for_each(|w| *w /= mean);
    }
    w
}

fn count(b: &Batch) -> f64 {
    b.targets.iter().filter(|t| **t >= 0).count() as f64
}

fn mean(weights: &[f64], b: &Batch) -> f64 {
    weights.iter().sum::<f64>() / count(b)
}

/// Plain mean cross entropy and the gradient with these weights.
fn gradient(config: &Config, b: &Batch, weights: &[f64]) -> (f64, Vec<f32>) {
    let (ctx, model) = (Context::cpu(1), model(config));
    let mut grads = ctx.zeros_f32(model.params().values().len());
    let bounds: Vec<usize> = b.starts.iter().copied().chain([b.tokens.len()]).collect();
    let segment = |w: &[usize]| Segment { start: w[0], len: w[1] - w[0], state_in: None, state_out: None };
    let mut tape = Tape::recording(&ctx, model.params(), &mut grads);
    let state = State::zeros(&ctx, config, 0);
    let segments = bounds.windows(2).map(segment).collect::<Vec<_>>().into();
    let (hidden, _) = model.forward(&mut tape, &b.tokens, &segments, &state, false).unwrap();
    let weights: Vec<f32> = weights.iter().map(|w| *w as f32).collect();
    let opts = CrossEntropy { divisor: count(b), l2wrap: true };
    let losses = model.loss(&mut tape, &hidden, &b.targets, Some(&weights), opts).per_token();
    drop(hidden);
    tape.backward();
    (losses.iter().map(|l| f64::from(*l)).sum::<f64>() / count(b), grads.to_vec())
}

/// What a step does, and the gradient that it shows by its change of the parameters.
fn step(config: &Config, micro: &[Batch], settings: Settings) -> (StepInfo, Vec<f32>) {
    let mut t = Trainer::new(&Context::cpu(2), model(config), settings);
    let before = t.model().params().values().to_vec();
    let info = t.step(micro).unwrap();
    let params = t.model().params();
    let mut gradient = before.clone();
    for s in params.specs() {
        // The official group of twice the rate.
        let rate = if s.name.ends_with("att.w0") { 2.0 * RATE } else { RATE };
        for (g, after) in gradient[s.range.clone()].iter_mut().zip(&params.values()[s.range.clone()]) {
            let d = (f64::from(*g) - f64::from(*after)) / rate;
            *g = (EPS * d / (1.0 - d.abs())) as f32;
        }
    }
    (info, gradient)
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b))) / norm(&mut b.iter().map(|v| f64::from(*v)))
}

#[test]
fn a_step_is_that_of_the_definition() {
    let b = data();
    for config in [plain(), hybrid()] {
        for l in
            [FANG, RWKV_X, LongCe { normalise: true, ..RWKV_X }, LongCe { context: 13, from: 13, stride: 7, ..FANG }]
        {
            let w = weights(&model(&config), &b, l);
            let raw = weights(&model(&config), &b, LongCe { normalise: false, ..l });
            let clamped = raw.iter().filter(|w| **w == l.gamma).count();
            let spread = raw.iter().filter(|w| **w > 0.0 && (**w - 1.0).abs() > 0.01).count();
            assert!(spread > 10 && (l.gamma > 2.0 || clamped > 2), "{l:?}: {spread} {clamped}");
            let (loss, grads) = gradient(&config, &b, &w);
            let micro = [b.slice(T, 0, 2), b.slice(T, 2, 3)];
            let mut ways = vec![
                (std::slice::from_ref(&b), settings(Some(l))),
                (&micro[..], settings(Some(l))),
                (std::slice::from_ref(&b), Settings { checkpointing: true, ..settings(Some(l)) }),
            ];
            if config.hybrid.is_none() {
                ways.push((&micro[..], Settings { bptt: Bptt::Exact(13), ..settings(Some(l)) }));
            }
            for (micro, settings) in ways {
                let (info, got) = step(&config, micro, settings);
                let apart = distance(&got, &grads);
                assert!(apart < 1e-5, "{settings:?}: {apart}");
                assert!((info.loss - loss).abs() < 1e-6, "{} {loss}", info.loss);
                assert!((info.mean_weight - mean(&raw, &b)).abs() < 1e-5, "{info:?} {}", mean(&raw, &b));
            }
        }
        // It is not the gradient of plain cross entropy.
        let (_, unweighted) = step(&config, std::slice::from_ref(&b), settings(None));
        let (_, weighted) = step(&config, std::slice::from_ref(&b), settings(Some(FANG)));
        assert!(distance(&weighted, &unweighted) > 1e-2);
    }
}

#[test]
fn where_all_weights_are_1_nothing_changes() {
    let b = data();
    let micro = [b.slice(T, 0, 2), b.slice(T, 2, 3)];
    for config in [plain(), hybrid()] {
        let want = step(&config, &micro, settings(None));
        let beyond = LongCe { from: T, ..FANG };
        // The only window begins where the row does.
        let whole = LongCe { context: 16, from: 16, stride: T, ..FANG };
        for l in [beyond, whole, LongCe { normalise: true, ..beyond }] {
            assert!(!l.reaches(T));
            assert!(step(&config, &micro, settings(Some(l))) == want, "{l:?}");
        }
        // Documents that are too short, in rows that are not.
        let mut short = b.clone();
        short.starts = (0..3 * T).step_by(16).collect();
        assert!(step(&config, &[short.clone()], settings(Some(FANG))) == step(&config, &[short], settings(None)));
    }
}

#[test]
fn memory_is_forecast_and_cost_counted() {
    // Many windows, so that they take more memory than the step.
    let l = LongCe { context: 20, stride: 1, from: 20, ..FANG };
    let b = Batch::rows(data().tokens, data().targets, T);
    for l in [FANG, l] {
        for settings in [settings(Some(l)), Settings { checkpointing: true, ..settings(Some(l)) }] {
            let ctx = Context::cpu(2);
            // A second step needs a model that the first has left whole.
            let schedule = Schedule { init: 0.0, last: 0.0, ..settings.schedule };
            let mut t = Trainer::new(&ctx, model(&hybrid()), Settings { schedule, ..settings });
            ctx.trim();
            let forecast = t.forecast(3).unwrap() - 4 * t.model().params().values().len();
            t.step(std::slice::from_ref(&b)).unwrap();
            assert_eq!(ctx.memory().peak, forecast, "{l:?}");
            let reserved = ctx.memory().reserved;
            // Other documents take the same memory.
            t.step(&[data()]).unwrap();
            assert!(ctx.memory().reserved <= reserved + reserved / 8);
        }
    }
    // RWKV-X: 14 windows of 8000 tokens in a row of 64000.
    let l = LongCe { context: 4000, stride: 4000, from: 8000, gamma: 10.0, normalise: false };
    assert_eq!(l.passes(64_000), 1.75);
    assert_eq!(LongCe { normalise: true, ..l }.passes(64_000), 2.75);
    assert!(!l.reaches(8000) && l.reaches(8001));
}
