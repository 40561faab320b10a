use crate::testing::{check, matrix};
use crate::wkv7::Wkv7Inputs;
use crate::{Group, ParamSet, Tape, Var, batch};
use anser_tensor::Context;

const HEADS: usize = 2;

fn reference(x: &[Vec<f64>], scale: f64) -> Vec<Vec<f64>> {
    let c = x[2].len();
    let n = c / HEADS;
    let mut out = vec![vec![0.0; x[0].len()]; 3];
    for i in 0..x[0].len() {
        let (j, head) = (i % c, i / n * n);
        let norm = (0..n).map(|l| (x[0][head + l] * x[2][head % c + l]).powi(2)).sum::<f64>().sqrt();
        let a = 1.0 / (1.0 + (-x[1][i]).exp());
        let u = x[0][i] * x[2][j] / norm.max(1e-12);
        out[0][i] = x[0][i] * (1.0 + (a - 1.0) * x[3][j]);
        out[1][i] = -u;
        out[2][i] = u * a * scale;
    }
    out
}

#[test]
fn values_and_gradients() {
    let cases = [(0, 4, 1.0, 1.0), (1, 4, 1.0, 1.0), (70, 4, 1.0, 3.0), (3, 17, 1e4, 40.0)];
    for ((rows, n, k, rate), scale) in cases.into_iter().flat_map(|c| [(c, 1.0), (c, 2.0)]) {
        let c = HEADS * n;
        check(
            &[matrix(rows, c, 1, k), matrix(rows, c, 2, rate)],
            &[matrix(1, c, 3, 1.0), matrix(1, c, 4, 1.0)],
            |t, x, p| {
                let key = t.key_path(&x[0], &x[1], p[0], p[1], HEADS, scale as f32);
                vec![key.k, key.a, key.b]
            },
            |x| reference(x, scale),
        );
    }
}

#[test]
fn a_zero_key_has_finite_gradients() {
    let vector = |name: &str| (name.to_string(), vec![8], Group::Plain);
    let (mut set, p) = ParamSet::new(vec![vector("k_k"), vector("k_a")]);
    set.values_mut().fill(0.7);
    let ctx = Context::cpu(1);
    let mut grads = ctx.zeros_f32(16);
    let mut t = Tape::recording(&ctx, &set, &mut grads);
    let (k, rate) = (Var::leaf(1, 8, ctx.zeros(8)), Var::leaf(1, 8, ctx.copy_of(&[0.5; 8])));
    let key = t.key_path(&k, &rate, p[0], p[1], HEADS, 1.0);
    assert!(key.a.data().iter().chain(key.b.data()).all(|&x| x == 0.0));
    for out in [&key.k, &key.a, &key.b] {
        out.add_grad(ctx.copy_of(&[1.0; 8]));
    }
    t.backward();
    let (dk, drate) = (k.take_grad().unwrap(), rate.take_grad().unwrap());
    assert!(dk.iter().chain(drate.iter()).chain(grads.iter()).all(|g| g.is_finite()));
}

#[test]
fn the_doubled_rate_swaps_two_entries_of_a_state() {
    // The paper's appendix D.1: at decay 1 and rate 1 with a removal key (e_1 - e_3) / sqrt 2 a token swaps columns 1 and 3.
    let n = 16;
    let (mut set, p) = ParamSet::new(["k_k", "k_a"].map(|name| (name.to_string(), vec![n], Group::Plain)).to_vec());
    set.values_mut().fill(1.0);
    let ctx = Context::cpu(1);
    let mut t = Tape::inference(&ctx, &set);
    let row = |x: &[f32]| Var::constant(1, n, ctx.copy_of(x));
    let mut k = vec![0.0; n];
    (k[1], k[3]) = (1.0, -1.0);
    let key = t.key_path(&row(&k), &row(&[40.0; 16]), p[0], p[1], 1, 2.0);
    let old: Vec<f32> = (0..n * n).map(|i| i as f32 / 64.0).collect();
    let state = Var::constant(1, n * n, ctx.copy_of(&old));
    let (zero, keep) = (row(&[0.0; 16]), row(&[-80.0; 16]));
    let x = Wkv7Inputs { r: &zero, w: &keep, k: &zero, v: &zero, a: &key.a, b: &key.b };
    let (_, new) = t.wkv7(x, &state, &batch(1, 1, true).into(), 1);
    for (old, new) in old.chunks(n).zip(new.data().chunks(n)) {
        let mut want = old.to_vec();
        want.swap(1, 3);
        assert!(want.iter().zip(new).all(|(w, g)| (w - g).abs() < 1e-5), "{want:?} {new:?}");
    }
}
