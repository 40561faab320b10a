use super::*;
use crate::{Group, ParamSet, Var};
use anser_tensor::Context;

const C: usize = 5;
const R: usize = 3;

/// sum(y * dy) in f64; `p` is A, B, bias one after the other.
fn projected(x: &[f64], p: &[f64], dy: &[f32], f: Activation) -> f64 {
    let (a, rest) = p.split_at(C * R);
    let (b, bias) = rest.split_at(R * C);
    let mut sum = 0.0;
    for (x, dy) in x.chunks(C).zip(dy.chunks(C)) {
        let h: Vec<f64> = (0..R)
            .map(|r| (0..C).map(|c| x[c] * a[c * R + r]).sum::<f64>())
            .map(|z| match f {
                Activation::Identity => z,
                Activation::Tanh => z.tanh(),
                Activation::Sigmoid => 1.0 / (1.0 + (-z).exp()),
            })
            .collect();
        for c in 0..C {
            let y = bias.get(c).copied().unwrap_or(0.0) + (0..R).map(|r| h[r] * b[r * C + c]).sum::<f64>();
            sum += y * dy[c] as f64;
        }
    }
    sum
}

fn slope(v: &mut [f64], i: usize, f: impl Fn(&[f64]) -> f64) -> f64 {
    let (x, h) = (v[i], 1e-5);
    v[i] = x + h;
    let up = f(v);
    v[i] = x - h;
    let down = f(v);
    v[i] = x;
    (up - down) / (2.0 * h)
}

#[test]
fn gradients_equal_finite_differences() {
    for f in [Activation::Identity, Activation::Tanh, Activation::Sigmoid] {
        for (rows, biased) in [(1, true), (4, true), (4, false), (0, true)] {
            let mut list = vec![("a".into(), vec![C, R], Group::Plain), ("b".into(), vec![R, C], Group::Plain)];
            if biased {
                list.push(("bias".into(), vec![1, 1, C], Group::Plain));
            }
            let (mut set, p) = ParamSet::new(list);
            let wave = |i: usize, s: f32| ((i as f32 + 1.0) * s).sin();
            set.values_mut().iter_mut().enumerate().for_each(|(i, v)| *v = wave(i, 1.3));
            let x: Vec<f32> = (0..rows * C).map(|i| wave(i, 2.1)).collect();
            let dy: Vec<f32> = (0..rows * C).map(|i| wave(i, 0.7)).collect();
            let w = LowRank {
                down: Weight::InOut(p[0]),
                up: Weight::InOut(p[1]),
                bias: biased.then(|| p[2]),
                activation: f,
            };
            let run = |threads| {
                let ctx = Context::cpu(threads);
                let mut grads = ctx.zeros_f32(set.values().len());
                let mut t = Tape::recording(&ctx, &set, &mut grads);
                let xv = Var::leaf(rows, C, ctx.copy_of(&x));
                let y = t.low_rank(&xv, &w);
                let value: f64 = y.data().iter().zip(&dy).map(|(y, d)| (y * d) as f64).sum();
                y.add_grad(ctx.copy_of(&dy));
                t.backward();
                (value, xv.take_grad().unwrap().to_vec(), grads.to_vec())
            };
            let (value, dx, dp) = run(2);
            assert_eq!((value, dx.clone(), dp.clone()), run(1));
            let mut x64: Vec<f64> = x.iter().map(|&v| v as f64).collect();
            let mut p64: Vec<f64> = set.values().iter().map(|&v| v as f64).collect();
            assert!((value - projected(&x64, &p64, &dy, f)).abs() < 1e-5);
            for i in 0..x.len() {
                let p = p64.clone();
                let want = slope(&mut x64, i, |x| projected(x, &p, &dy, f));
                assert!((dx[i] as f64 - want).abs() < 1e-5, "{f:?} dx[{i}] {} {want}", dx[i]);
            }
            for i in 0..dp.len() {
                let want = slope(&mut p64, i, |p| projected(&x64, p, &dy, f));
                assert!((dp[i] as f64 - want).abs() < 1e-5, "{f:?} dp[{i}] {} {want}", dp[i]);
            }
        }
    }
}
