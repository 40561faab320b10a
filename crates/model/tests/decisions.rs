//! The design's expensive decisions, each shown to hold on a small model.

use anser_formats::{Checkpoint, Dtype, Source, write_safetensors};
use anser_model::{Config, Init, Load, LoraDims, Model, State};
use anser_ops::{CrossEntropy, Recompute, Segment, Tape, batch};
use anser_tensor::Context;
use std::sync::Arc;

const V: usize = 50;

/// A model in which nothing is zero, so that every path carries signal.
fn model(ctx: &Context) -> Model {
    let lora = LoraDims { decay: 8, rate: 8, value: 8, gate: 16 };
    let config = Config { head_size: 16, lora, ..Config::new(3, 48, V) };
    let config = Config { n_hidden: 4 * config.n_embd, ..config };
    let mut model = Model::init(ctx, &config, Init::Current, 1).unwrap();
    let mut s = 1u32;
    for v in model.params_mut().values_mut() {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        *v += ((s >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.3;
    }
    model
}

fn ids(n: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 7919 + seed * 104729 + i * i * 31) % V) as u32).collect()
}

/// Logits and the final state (all slots) of a list of calls, each (tokens, segments).
fn run(ctx: &Context, m: &Model, slots: usize, calls: &[(Vec<u32>, Vec<Segment>)]) -> (Vec<f32>, Vec<Vec<f32>>) {
    let mut state = State::zeros(ctx, m.config(), slots);
    let mut out = Vec::new();
    for (tokens, segments) in calls {
        let mut t = Tape::inference(ctx, m.params());
        let hidden;
        (hidden, state) = m.forward(&mut t, tokens, &segments.clone().into(), &state, false).unwrap();
        out.extend_from_slice(m.logits(&mut t, &hidden).data());
    }
    (out, state.vars().map(|v| v.data().to_vec()).collect())
}

fn seg(start: usize, len: usize, slot: usize, fresh: bool) -> Segment {
    Segment { start, len, state_in: (!fresh).then_some(slot), state_out: Some(slot) }
}

fn slot_of(state: &[Vec<f32>], slots: usize, slot: usize) -> Vec<Vec<f32>> {
    state.iter().map(|v| v[slot * v.len() / slots..(slot + 1) * v.len() / slots].to_vec()).collect()
}

#[test]
fn splitting_at_block_multiples_is_bitwise() {
    for threads in [1, 2, 3] {
        let ctx = Context::cpu(threads);
        let m = model(&ctx);
        let tokens = ids(77, 1);
        let whole = run(&ctx, &m, 1, &[(tokens.clone(), batch(1, 77, true))]);
        for cut in [16, 32, 64] {
            let calls =
                [(tokens[..cut].to_vec(), batch(1, cut, true)), (tokens[cut..].to_vec(), batch(1, 77 - cut, true))];
            assert!(run(&ctx, &m, 1, &calls) == whole, "cut at {cut}, {threads} threads");
        }
        assert!(whole == run(&Context::cpu(1), &m, 1, &[(tokens.clone(), batch(1, 77, true))]));
    }
}

#[test]
fn neighbours_do_not_matter_bitwise() {
    let ctx = Context::cpu(2);
    let m = model(&ctx);
    let (a, b, c) = (ids(37, 1), ids(1, 2), ids(50, 3));
    let alone = |t: &[u32]| run(&ctx, &m, 1, &[(t.to_vec(), batch(1, t.len(), true))]);
    let all = [a.clone(), b.clone(), c.clone()].concat();
    let segments = vec![seg(0, 37, 2, true), seg(37, 1, 0, true), seg(38, 50, 1, true)];
    let together = run(&ctx, &m, 3, &[(all, segments)]);
    for (t, from, slot) in [(&a, 0, 2), (&b, 37, 0), (&c, 38, 1)] {
        let (logits, state) = alone(t);
        assert!(together.0[from * V..(from + t.len()) * V] == logits);
        assert_eq!(slot_of(&together.1, 3, slot), slot_of(&state, 1, 0));
    }
}

#[test]
fn decoding_mixed_with_prefill_and_forks() {
    let ctx = Context::cpu(2);
    let m = model(&ctx);
    let (a, b) = (ids(20, 1), ids(33, 5));
    // Slot 0 has read `a`. One call then steps it into slot 1 (a fork: slot 0 stays), and prefills `b` into slot 2.
    let call = (
        [vec![7], b.clone()].concat(),
        vec![Segment { start: 0, len: 1, state_in: Some(0), state_out: Some(1) }, seg(1, 33, 2, true)],
    );
    let first = (a.clone(), vec![seg(0, 20, 0, true)]);
    let (logits, state) = run(&ctx, &m, 3, &[first.clone(), call]);
    let before = run(&ctx, &m, 3, &[first]).1;
    assert_eq!(slot_of(&state, 3, 0), slot_of(&before, 3, 0));
    let stepped = run(&ctx, &m, 1, &[(a, batch(1, 20, true)), (vec![7], batch(1, 1, true))]);
    assert!(logits[20 * V..21 * V] == stepped.0[20 * V..]);
    assert_eq!(slot_of(&state, 3, 1), stepped.1);
    assert!(logits[21 * V..] == run(&ctx, &m, 1, &[(b, batch(1, 33, true))]).0);
}

#[test]
fn recurrent_equals_parallel() {
    let ctx = Context::cpu(2);
    let m = model(&ctx);
    let tokens = ids(40, 4);
    let whole = run(&ctx, &m, 1, &[(tokens.clone(), batch(1, 40, true))]);
    let steps: Vec<_> = tokens.iter().map(|&t| (vec![t], batch(1, 1, true))).collect();
    let stepped = run(&ctx, &m, 1, &steps);
    let norm = |v: &[f32]| v.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
    let diff: Vec<f32> = whole.0.iter().zip(&stepped.0).map(|(a, b)| a - b).collect();
    assert!(norm(&diff) / norm(&whole.0) < 2e-5);
}

/// Gradients for `tokens` (targets: the next token) cut into segments of a row.
fn gradients(ctx: &Context, m: &Model, tokens: &[u32], segments: Vec<Segment>, checkpointing: bool) -> (f64, Vec<f32>) {
    recomputed(ctx, m, tokens, segments, checkpointing, Recompute::Nothing)
}

fn recomputed(
    ctx: &Context, m: &Model, tokens: &[u32], segments: Vec<Segment>, checkpointing: bool, what: Recompute,
) -> (f64, Vec<f32>) {
    let mut grads = ctx.zeros_f32(m.params().values().len());
    let mut t = Tape::recording(ctx, m.params(), &mut grads).recomputing(what);
    let state = State::zeros(ctx, m.config(), 1);
    let targets: Vec<i32> = tokens.iter().map(|&t| ((t + 1) % V as u32) as i32).collect();
    let (hidden, _) = m.forward(&mut t, tokens, &segments.into(), &state, checkpointing).unwrap();
    let opts = CrossEntropy { divisor: tokens.len() as f64, l2wrap: true };
    let loss = m.loss(&mut t, &hidden, &targets, None, opts);
    t.backward();
    (loss.loss(), grads.to_vec())
}

#[test]
fn checkpointing_and_threads_change_no_bit() {
    let ctx = Context::cpu(2);
    let m = model(&ctx);
    let tokens = ids(45, 2);
    let plain = gradients(&ctx, &m, &tokens, batch(1, 45, false), false);
    assert!(plain == gradients(&ctx, &m, &tokens, batch(1, 45, false), true));
    assert!(plain == gradients(&Context::cpu(1), &m, &tokens, batch(1, 45, false), false));
    let peak = |checkpointing: bool, what: Recompute| {
        let (ctx, dry) = (Context::cpu(2), Context::forecast());
        let mut peaks = [0, 0];
        for (ctx, peak) in [&ctx, &dry].into_iter().zip(&mut peaks) {
            let g = recomputed(ctx, &m, &tokens, batch(1, 45, false), checkpointing, what);
            assert!(ctx.is_dry() || g == plain, "{what:?}");
            *peak = ctx.memory().peak;
        }
        assert_eq!(peaks[0], peaks[1], "the forecast with {what:?}");
        peaks[0]
    };
    for checkpointing in [false, true] {
        let peaks = Recompute::LEVELS.map(|what| peak(checkpointing, what));
        assert!(checkpointing || peaks.is_sorted_by(|a, b| a > b), "{peaks:?}");
    }
    assert!(plain.1.iter().all(|g| g.is_finite()) && plain.1.iter().filter(|g| **g != 0.0).count() > plain.1.len() / 2);
}

fn relative(a: &[f32], b: &[f32]) -> f64 {
    let d: f64 = a.iter().zip(b).map(|(a, b)| ((a - b) as f64).powi(2)).sum();
    (d / b.iter().map(|b| (*b as f64).powi(2)).sum::<f64>()).sqrt()
}

#[test]
fn packed_documents_equal_separate_ones() {
    let ctx = Context::cpu(2);
    let m = model(&ctx);
    let tokens = ids(48, 6);
    let cuts = [0usize, 1, 20, 48];
    let packed: Vec<Segment> =
        cuts.windows(2).map(|w| Segment { start: w[0], len: w[1] - w[0], state_in: None, state_out: None }).collect();
    let together = gradients(&ctx, &m, &tokens, packed, false);
    let mut sum = (0.0, vec![0.0; together.1.len()]);
    for w in cuts.windows(2) {
        let part = &tokens[w[0]..w[1]];
        let share = part.len() as f64 / 48.0;
        let one = gradients(&ctx, &m, part, batch(1, part.len(), false), false);
        sum.0 += one.0 * share;
        sum.1.iter_mut().zip(&one.1).for_each(|(s, g)| *s += g * share as f32);
    }
    assert!((together.0 - sum.0).abs() < 1e-6);
    assert!(relative(&together.1, &sum.1) < 1e-5);
}

#[test]
fn back_propagation_over_segments_is_exact() {
    let ctx = Context::cpu(2);
    let m = model(&ctx);
    let tokens = ids(60, 8);
    let want = gradients(&ctx, &m, &tokens, batch(1, 60, false), false);
    // Forward over the pieces, keeping boundary states; then backwards, handing the state's gradient on.
    let cuts = [0usize, 16, 37, 60];
    let pieces: Vec<&[u32]> = cuts.windows(2).map(|w| &tokens[w[0]..w[1]]).collect();
    let mut states = vec![State::zeros(&ctx, m.config(), 1)];
    for p in &pieces {
        let mut t = Tape::inference(&ctx, m.params());
        let segments: Arc<[Segment]> = batch(1, p.len(), true).into();
        states.push(m.forward(&mut t, p, &segments, states.last().unwrap(), false).unwrap().1);
    }
    let mut grads = ctx.zeros_f32(want.1.len());
    let mut loss = 0.0;
    let mut from_future: Vec<Option<anser_tensor::Buf>> = Vec::new();
    for (p, state) in pieces.iter().zip(&states).rev() {
        let mut t = Tape::recording(&ctx, m.params(), &mut grads);
        let state = state.detached();
        let segments: Arc<[Segment]> = batch(1, p.len(), true).into();
        let (hidden, next) = m.forward(&mut t, p, &segments, &state, false).unwrap();
        let targets: Vec<i32> = p.iter().map(|&t| ((t + 1) % V as u32) as i32).collect();
        let opts = CrossEntropy { divisor: 60.0, l2wrap: true };
        loss += m.loss(&mut t, &hidden, &targets, None, opts).loss();
        for (v, g) in next.vars().zip(from_future.drain(..)) {
            if let Some(g) = g {
                v.add_grad(g);
            }
        }
        drop((hidden, next));
        t.backward();
        from_future = state.vars().map(|v| v.take_grad()).collect();
        assert!(from_future.iter().all(Option::is_some));
    }
    assert!((loss - want.0).abs() < 1e-6);
    assert!(relative(&grads, &want.1) < 1e-5, "{}", relative(&grads, &want.1));
}

#[test]
fn frozen_parameters_get_nothing_and_stop_the_backward_pass() {
    let ctx = Context::cpu(1);
    let mut m = model(&ctx);
    let tokens = ids(20, 3);
    let all = gradients(&ctx, &m, &tokens, batch(1, 20, false), false).1;
    m.params_mut().set_trainable(|n| n.starts_with("blocks.2.ffn") || n.starts_with("head"));
    for checkpointing in [false, true] {
        let before = ctx.memory();
        let some = gradients(&ctx, &m, &tokens, batch(1, 20, false), checkpointing).1;
        assert_eq!(ctx.memory().in_use, before.in_use);
        for s in m.params().specs() {
            let (got, want) = (&some[s.range.clone()], &all[s.range.clone()]);
            match s.trainable {
                true => assert_eq!(got, want, "{}", s.name),
                false => assert!(got.iter().all(|&g| g == 0.0), "{}", s.name),
            }
        }
    }
    // Only the last block's channel mixing and the head keep anything: far less than the whole.
    let peak = |m: &Model| {
        let ctx = Context::cpu(1);
        gradients(&ctx, m, &tokens, batch(1, 20, false), false);
        ctx.memory().peak - 4 * m.params().values().len() // the gradients themselves
    };
    let some = peak(&m);
    m.params_mut().set_trainable(|_| true);
    assert!(some * 2 < peak(&m));
}

#[test]
fn a_step_has_a_fixed_allocation_plan_and_the_forecast_is_exact() {
    let tokens = ids(40, 3);
    for checkpointing in [false, true] {
        let (ctx, dry) = (Context::cpu(2), Context::forecast());
        let m = model(&ctx);
        ctx.trim();
        let base = ctx.memory();
        gradients(&ctx, &m, &tokens, batch(2, 20, false), checkpointing);
        let first = ctx.memory();
        gradients(&ctx, &m, &tokens, batch(2, 20, false), checkpointing);
        assert_eq!(ctx.memory(), first, "the second step allocates nothing new");
        gradients(&dry, &m, &tokens, batch(2, 20, false), checkpointing);
        assert_eq!(dry.memory().peak, first.peak - base.in_use);
    }
}

#[test]
fn tokens_outside_the_vocabulary_are_an_error() {
    let ctx = Context::cpu(1);
    let m = model(&ctx);
    let mut t = Tape::inference(&ctx, m.params());
    let e = m.forward(&mut t, &[1, 50], &batch(1, 2, false).into(), &State::zeros(&ctx, m.config(), 0), false);
    assert!(e.err().unwrap().to_string().contains("token 50 at position 1"));
}

#[test]
fn a_model_file_says_that_its_rate_is_doubled() {
    let ctx = Context::cpu(1);
    let plain = model(&ctx);
    let doubled = Config { double_rate: true, ..plain.config().clone() };
    let values = plain.params().values();
    let tensors: Vec<Source<'_>> = plain
        .params()
        .specs()
        .iter()
        .map(|s| Source::new(s.name.as_str(), &s.shape, Dtype::F32, &values[s.range.clone()]))
        .collect();
    let path = std::env::temp_dir().join(format!("anser-rate-{}.safetensors", std::process::id()));
    let load = |description: Option<(String, String)>| {
        write_safetensors(&path, &tensors, &description.into_iter().collect()).unwrap();
        Model::load(&ctx, &Checkpoint::open(&path).unwrap(), Load::Train)
    };
    let logits = |m: &Model| run(&ctx, m, 0, &[(ids(9, 1), batch(1, 9, false))]).0;
    let [old, same, other] = [None, Some(plain.config().description()), Some(doubled.description())].map(load);
    let (old, same, other) = (old.unwrap(), same.unwrap(), other.unwrap());
    assert!(logits(&old) == logits(&plain) && logits(&same) == logits(&plain) && !same.config().double_rate);
    assert!(other.config() == &doubled && logits(&other) != logits(&plain));
    assert_ne!(other.fingerprint(), plain.fingerprint());
    let (key, text) = doubled.description();
    for (from, to, want) in [("\"version\":1", "\"version\":2", "newer"), ("double_rate", "triple_rate", "triple_rate")]
    {
        let e = load(Some((key.clone(), text.replace(from, to)))).err().unwrap().to_string();
        assert!(e.contains(want), "{e}");
    }
    std::fs::remove_file(path).unwrap();
}
