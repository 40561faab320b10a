use super::*;
use crate::{Group, ParamSet};
use anser_tensor::Context;

/// The loss and its gradients in f64, from the formula.
fn reference(
    x: &[f32], w: &[f32], cols: usize, targets: &[i32], weights: Option<&[f32]>, opts: CrossEntropy,
) -> (f64, Vec<f64>, Vec<f64>) {
    let vocab = w.len() / cols;
    let (mut loss, mut dx, mut dw) = (0.0, vec![0.0; x.len()], vec![0.0; w.len()]);
    for (i, &t) in targets.iter().enumerate().filter(|(_, t)| **t >= 0) {
        let x = &x[i * cols..(i + 1) * cols];
        let dot = |v: usize| (0..cols).map(|c| x[c] as f64 * w[v * cols + c] as f64).sum::<f64>();
        let z: Vec<f64> = (0..vocab).map(dot).collect();
        let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = z.iter().map(|v| (v - max).exp()).sum();
        let weight = weights.map_or(1.0, |w| w[i] as f64);
        loss += weight * (max + sum.ln() - z[t as usize]) / opts.divisor;
        let first = z.iter().position(|&v| v == max).unwrap();
        for v in 0..vocab {
            let onehot = if v == t as usize { 1.0 } else { 0.0 };
            let mut d = weight * ((z[v] - max).exp() / sum - onehot) / opts.divisor;
            if opts.l2wrap && v == first {
                d += 1e-4 * max / opts.divisor;
            }
            for c in 0..cols {
                dx[i * cols + c] += d * w[v * cols + c] as f64;
                dw[v * cols + c] += d * x[c] as f64;
            }
        }
    }
    (loss, dx, dw)
}

fn noise(n: usize, scale: f32, seed: u32) -> Vec<f32> {
    let mut s = seed;
    let mut next = || {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * scale).collect()
}

fn error(got: &[f32], want: &[f64]) -> f64 {
    let d: f64 = got.iter().zip(want).map(|(g, w)| (*g as f64 - w).powi(2)).sum();
    (d / want.iter().map(|w| w * w).sum::<f64>().max(1e-30)).sqrt()
}

#[derive(Debug, Default, PartialEq)]
struct Values {
    loss: f64,
    unweighted: f64,
    per_token: Vec<f32>,
}

struct Case {
    set: ParamSet,
    head: Weight,
    x: Vec<f32>,
    cols: usize,
}

fn case(rows: usize, cols: usize, vocab: usize) -> Case {
    let (mut set, p) = ParamSet::new(vec![("head.weight".into(), vec![vocab, cols], Group::Decay)]);
    set.values_mut().copy_from_slice(&noise(vocab * cols, 1.0, 5));
    Case { set, head: Weight::OutIn(p[0]), x: noise(rows * cols, 2.0, 9), cols }
}

fn run(
    c: &Case, threads: usize, targets: &[i32], weights: Option<&[f32]>, opts: CrossEntropy,
) -> (Values, Vec<f32>, Vec<f32>) {
    let ctx = Context::cpu(threads);
    let mut grads = ctx.zeros_f32(c.set.values().len());
    let mut t = Tape::recording(&ctx, &c.set, &mut grads);
    let x = Var::leaf(targets.len(), c.cols, ctx.copy_of(&c.x));
    let loss = t.cross_entropy(&x, &c.head, targets, weights, opts);
    t.backward();
    let values = Values { loss: loss.loss(), unweighted: loss.unweighted(), per_token: loss.per_token() };
    (values, x.take_grad().unwrap().to_vec(), grads.to_vec())
}

#[test]
fn equals_the_formula() {
    for (rows, cols, vocab) in [(1, 3, 2), (7, 5, 33), (3, 4, 300)] {
        let c = case(rows, cols, vocab);
        let targets: Vec<i32> = (0..rows).map(|i| if i == 1 { -1 } else { (i * 7 % vocab) as i32 }).collect();
        let weights = noise(rows, 2.0, 3);
        for (weights, l2wrap) in [(None, false), (None, true), (Some(&weights[..]), true)] {
            let opts = CrossEntropy { divisor: 5.0, l2wrap };
            let (loss, dx, dw) = run(&c, 2, &targets, weights, opts);
            let want = reference(&c.x, c.set.values(), cols, &targets, weights, opts);
            assert!((loss.loss - want.0).abs() < 1e-5 * want.0.abs().max(1.0), "{} {}", loss.loss, want.0);
            assert!(error(&dx, &want.1) < 1e-5 && error(&dw, &want.2) < 1e-5);
            assert!(rows < 2 || loss.per_token[1] == 0.0);
            assert_eq!(loss.unweighted, run(&c, 2, &targets, None, opts).0.loss);
        }
    }
}

#[test]
fn few_targets_that_count() {
    for (rows, every) in [(40, 8), (40, 3), (33, 33), (5, 2)] {
        let c = case(rows, 4, 50);
        let target = |i: usize| if i % every == every - 1 { (i * 7 % 50) as i32 } else { -1 };
        let targets: Vec<i32> = (0..rows).map(target).collect();
        assert!(some(&targets).is_some());
        let weights = noise(rows, 2.0, 3);
        for weights in [None, Some(&weights[..])] {
            let opts = CrossEntropy { divisor: 5.0, l2wrap: true };
            let (loss, dx, dw) = run(&c, 2, &targets, weights, opts);
            let want = reference(&c.x, c.set.values(), 4, &targets, weights, opts);
            assert!((loss.loss - want.0).abs() < 1e-5 * want.0.abs().max(1.0), "{} {}", loss.loss, want.0);
            assert!(error(&dx, &want.1) < 1e-5 && error(&dw, &want.2) < 1e-5);
            for (i, target) in targets.iter().enumerate() {
                assert_eq!(loss.per_token[i] == 0.0, *target < 0);
            }
            assert_eq!(loss.unweighted, run(&c, 2, &targets, None, opts).0.loss);
        }
    }
    // Nearly all count, or none at all.
    assert!(some(&[1, 2, 3, 4, -1]).is_none() && some(&[-1; 9]).is_none() && some(&[]).is_none());
}

#[test]
fn l2wrap_is_the_gradient_of_half_1e_4_mean_squared_max() {
    let c = case(4, 3, 10);
    let targets = [1, 2, 3, 4];
    let opts = |l2wrap| CrossEntropy { divisor: 4.0, l2wrap };
    let (with, without) = (run(&c, 1, &targets, None, opts(true)), run(&c, 1, &targets, None, opts(false)));
    assert_eq!(with.0, without.0);
    let penalty = |w: &[f64]| -> f64 {
        let z = |i: usize, v: usize| (0..3).map(|j| c.x[i * 3 + j] as f64 * w[v * 3 + j]).sum::<f64>();
        let max = |i| (0..10).map(|v| z(i, v)).fold(f64::NEG_INFINITY, f64::max);
        (0..4).map(|i| 0.5e-4 * max(i).powi(2)).sum::<f64>() / 4.0
    };
    let mut w: Vec<f64> = c.set.values().iter().map(|&v| v as f64).collect();
    for i in 0..30 {
        let (v, h) = (w[i], 1e-5);
        w[i] = v + h;
        let up = penalty(&w);
        w[i] = v - h;
        let slope = (up - penalty(&w)) / (2.0 * h);
        w[i] = v;
        assert!(((with.2[i] - without.2[i]) as f64 - slope).abs() < 1e-6 * slope.abs().max(0.1));
    }
}

#[test]
fn chunks_threads_and_extreme_logits() {
    // 70000 x 100 logits are two chunks of 59 rows.
    let c = case(100, 2, 70000);
    let targets: Vec<i32> = (0..100).map(|i| i * 600).collect();
    let opts = CrossEntropy { divisor: 100.0, l2wrap: true };
    let one = run(&c, 1, &targets, None, opts);
    assert_eq!(one, run(&c, 3, &targets, None, opts));
    let want = reference(&c.x, c.set.values(), 2, &targets, None, opts);
    assert!((one.0.loss - want.0).abs() < 1e-5 && error(&one.1, &want.1) < 1e-5 && error(&one.2, &want.2) < 1e-5);

    let mut c = case(1, 1, 3);
    c.set.values_mut().copy_from_slice(&[1e4, -1e4, 0.0]);
    c.x = vec![1.0];
    let (loss, dx, _) = run(&c, 1, &[1], None, CrossEntropy { divisor: 1.0, l2wrap: false });
    assert!((loss.loss - 2e4).abs() < 1e-2 && dx[0].is_finite());
}

#[test]
fn frozen_head_and_no_rows() {
    let mut c = case(2, 3, 4);
    c.set.set_trainable(|_| false);
    let opts = CrossEntropy { divisor: 2.0, l2wrap: false };
    let (_, dx, dw) = run(&c, 1, &[0, 1], None, opts);
    assert!(dx.iter().any(|&d| d != 0.0) && dw.iter().all(|&d| d == 0.0));
    c.x.clear();
    assert_eq!(run(&c, 1, &[], None, opts).0, Values::default());
}

#[test]
fn a_loss_that_is_not_finite_makes_gradients_that_are_not() {
    // The target's logit is minus infinity: softmax minus onehot alone would be finite.
    let mut c = case(1, 1, 3);
    c.set.values_mut().copy_from_slice(&[1.0, f32::MIN, 0.0]);
    c.x = vec![2.0];
    let (loss, dx, dw) = run(&c, 1, &[1], None, CrossEntropy { divisor: 1.0, l2wrap: false });
    assert!(loss.loss.is_infinite() && dx[0].is_nan() && dw.iter().all(|d| d.is_nan()));
}
