use super::*;
use crate::Group;
use crate::testing::{check, matrix};

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed;
    let mut next = || {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// y, dx and dW for x [rows, k], W [n, k] and dy [rows, n], by the formula in f64.
fn reference(x: &[f32], w: &[f32], dy: &[f32], n: usize, k: usize) -> [Vec<f64>; 3] {
    let rows = x.len() / k;
    let (mut y, mut dx, mut dw) = (vec![0.0; rows * n], vec![0.0; rows * k], vec![0.0; n * k]);
    for i in 0..rows {
        for o in 0..n {
            for j in 0..k {
                let (a, b, d) = (x[i * k + j] as f64, w[o * k + j] as f64, dy[i * n + o] as f64);
                y[i * n + o] += a * b;
                dx[i * k + j] += d * b;
                dw[o * k + j] += d * a;
            }
        }
    }
    [y, dx, dw]
}

fn close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((*g as f64 - w).abs() < 1e-4, "{g} {w}");
    }
}

#[test]
fn both_layouts_equal_the_formula() {
    for (rows, n, k) in [(1, 1, 1), (5, 7, 3), (0, 4, 4), (33, 20, 17)] {
        let (x, w, dy) = (noise(rows * k, 1), noise(n * k, 2), noise(rows * n, 3));
        let want = reference(&x, &w, &dy, n, k);
        for in_out in [false, true] {
            let shape = if in_out { vec![k, n] } else { vec![n, k] };
            let (mut set, p) = ParamSet::new(vec![("w".into(), shape, Group::Decay)]);
            let stored = |i: usize| if in_out { w[(i % n) * k + i / n] } else { w[i] };
            set.values_mut().iter_mut().enumerate().for_each(|(i, v)| *v = stored(i));
            let weight = if in_out { Weight::InOut(p[0]) } else { Weight::OutIn(p[0]) };
            let ctx = Context::cpu(2);
            let mut grads = ctx.zeros_f32(n * k);
            let mut t = Tape::recording(&ctx, &set, &mut grads);
            let xv = Var::leaf(rows, k, ctx.copy_of(&x));
            let y = t.linear(&xv, &weight);
            close(y.data(), &want[0]);
            y.add_grad(ctx.copy_of(&dy));
            t.backward();
            close(&xv.take_grad().unwrap(), &want[1]);
            let dw: Vec<f64> =
                (0..n * k).map(|i| if in_out { want[2][(i % n) * k + i / n] } else { want[2][i] }).collect();
            close(&grads, &dw);
        }
        let packed =
            Weight::Packed(Arc::new(Packed::new(&Context::cpu(1), anser_tensor::DType::F32, n, k, false, |at, o| {
                o.copy_from_slice(&w[at..at + o.len()])
            })));
        let (ctx, set) = (Context::cpu(1), ParamSet::default());
        let y = Tape::inference(&ctx, &set).linear(&Var::constant(rows, k, ctx.copy_of(&x)), &packed);
        close(y.data(), &want[0]);
    }
}

#[test]
fn several_at_once_equal_the_formula() {
    let (rows, n, k) = (5, 3, 4);
    check(
        &[matrix(rows, k, 1, 1.0), matrix(rows, k, 2, 1.0)],
        &[matrix(n, k, 3, 1.0), matrix(n, k, 4, 1.0)],
        |t, x, p| t.linears([&x[0], &x[1]], [&Weight::OutIn(p[0]), &Weight::OutIn(p[1])]).into(),
        |x| {
            let y = |x: &[f64], w: &[f64]| {
                let dot = |i: usize| (0..k).map(|j| x[i / n * k + j] * w[i % n * k + j]).sum();
                (0..rows * n).map(dot).collect()
            };
            vec![y(&x[0], &x[2]), y(&x[1], &x[3])]
        },
    );
}

#[test]
fn frozen_weights_record_only_what_flows_on() {
    let (mut set, p) = ParamSet::new(vec![("w".into(), vec![2, 2], Group::Decay)]);
    set.set_trainable(|_| false);
    let ctx = Context::cpu(1);
    let mut grads = ctx.zeros_f32(4);
    let mut t = Tape::recording(&ctx, &set, &mut grads);
    let constant = Var::constant(1, 2, ctx.zeros(2));
    assert!(!t.linear(&constant, &Weight::OutIn(p[0])).needs_grad());
    let leaf = Var::leaf(1, 2, ctx.copy_of(&[1.0, 1.0]));
    let y = t.linear(&leaf, &Weight::OutIn(p[0]));
    y.add_grad(ctx.copy_of(&[1.0, 1.0]));
    t.backward();
    assert!(leaf.take_grad().is_some());
    assert_eq!(grads[..], [0.0; 4]);
}
