//! One check for every operation: values and gradients against a slow reference in f64, on any number of threads,
//! with frozen parameters and in a forecast.

use crate::{Group, Param, ParamSet, Tape, Var};
use anser_tensor::Context;

/// Numbers in (-1, 1).
pub(crate) fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed;
    let mut next = || {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A matrix [rows, cols] of noise times `scale`.
pub(crate) fn matrix(rows: usize, cols: usize, seed: u32, scale: f32) -> (usize, usize, Vec<f32>) {
    (rows, cols, noise(rows * cols, seed).iter().map(|x| x * scale).collect())
}

struct Run {
    outputs: Vec<Vec<f32>>,
    dleaves: Vec<Vec<f32>>,
    dparams: Vec<Vec<f32>>,
}

/// Checks `op` on leaves and parameters [rows, cols] against `reference`, which gets the values of both, in order, in f64.
/// Gradients are those of the outputs' dot product with noise, against central differences of the reference. Errors
/// are relative to the largest element of their matrix (or 1).
pub(crate) fn check(
    leaves: &[(usize, usize, Vec<f32>)], params: &[(usize, usize, Vec<f32>)],
    op: impl Fn(&mut Tape<'_>, &[Var], &[Param]) -> Vec<Var>, reference: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>,
) {
    let spec = |(i, p): (usize, &(usize, usize, Vec<f32>))| (i.to_string(), vec![p.0, p.1], Group::Plain);
    let (mut set, handles) = ParamSet::new(params.iter().enumerate().map(spec).collect());
    for (&h, p) in handles.iter().zip(params) {
        set.get_mut(h).copy_from_slice(&p.2);
    }
    let run = |ctx: &Context, set: &ParamSet, differentiable: bool| {
        let mut grads = ctx.zeros_f32(set.values().len());
        let mut t = Tape::recording(ctx, set, &mut grads);
        let vars: Vec<Var> = leaves
            .iter()
            .map(|(r, c, x)| {
                let mut value = ctx.alloc(r * c);
                t.run(|| value.copy_from_slice(x));
                if differentiable { Var::leaf(*r, *c, value) } else { Var::constant(*r, *c, value) }
            })
            .collect();
        let outputs = op(&mut t, &vars, &handles);
        for (i, y) in outputs.iter().enumerate() {
            let mut g = ctx.alloc(y.rows() * y.cols());
            t.run(|| g.copy_from_slice(&projection(i, y.data().len())));
            y.add_grad(g);
        }
        t.backward();
        let result = Run {
            outputs: outputs.iter().map(|y| y.data().to_vec()).collect(),
            dleaves: vars.iter().map(|v| v.take_grad().map_or(Vec::new(), |g| g.to_vec())).collect(),
            dparams: handles
                .iter()
                .map(|h| grads.get(set.specs()[h.id].range.clone()).unwrap_or_default().to_vec())
                .collect(),
        };
        (result, outputs.iter().any(Var::needs_grad))
    };
    let (got, _) = run(&Context::cpu(1), &set, true);
    for threads in [2, 3] {
        let (other, _) = run(&Context::cpu(threads), &set, true);
        for (a, b) in [(&got.outputs, &other.outputs), (&got.dleaves, &other.dleaves), (&got.dparams, &other.dparams)] {
            assert!(bits(a) == bits(b), "{threads} threads give other bits");
        }
    }

    let mut inputs: Vec<Vec<f64>> =
        leaves.iter().chain(params).map(|(_, _, x)| x.iter().map(|&x| x as f64).collect()).collect();
    let want = reference(&inputs);
    assert_eq!(want.len(), got.outputs.len());
    got.outputs.iter().zip(&want).enumerate().for_each(|(i, (g, w))| close(&format!("output {i}"), g, w));
    let projected = |x: &[Vec<f64>]| -> f64 {
        let dot = |(i, y): (usize, &Vec<f64>)| -> f64 {
            y.iter().zip(projection(i, y.len())).map(|(y, d)| y * d as f64).sum()
        };
        reference(x).iter().enumerate().map(dot).sum()
    };
    for i in 0..inputs.len() {
        let gradient = got.dleaves.iter().chain(&got.dparams).nth(i).unwrap();
        let slopes: Vec<f64> = (0..inputs[i].len())
            .map(|j| {
                let x = inputs[i][j];
                let h = 1e-5 * x.abs().max(1e-2);
                inputs[i][j] = x + h;
                let up = projected(&inputs);
                inputs[i][j] = x - h;
                let down = projected(&inputs);
                inputs[i][j] = x;
                (up - down) / (2.0 * h)
            })
            .collect();
        close(&format!("gradient {i}"), gradient, &slopes);
    }

    let forecast = Context::forecast();
    let real = Context::cpu(2);
    run(&forecast, &set, true);
    run(&real, &set, true);
    assert_eq!(forecast.memory(), real.memory(), "the forecast differs");

    set.set_trainable(|_| false);
    let (frozen, _) = run(&Context::cpu(2), &set, true);
    assert!(bits(&frozen.dleaves) == bits(&got.dleaves) && frozen.dparams.iter().flatten().all(|&g| g == 0.0));
    assert!(!run(&Context::cpu(2), &set, false).1, "nothing needs a gradient, yet an output has one");
}

fn projection(i: usize, n: usize) -> Vec<f32> {
    noise(n, 1000 + i as u32)
}

fn bits(x: &[Vec<f32>]) -> Vec<Vec<u32>> {
    x.iter().map(|x| x.iter().map(|x| x.to_bits()).collect()).collect()
}

fn close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1.0, |m: f64, w| m.max(w.abs()));
    for (i, (&g, w)) in got.iter().zip(want).enumerate() {
        assert!((g as f64 - w).abs() <= 2e-5 * scale, "{what}[{i}]: {g}, not {w} (scale {scale})");
    }
}
