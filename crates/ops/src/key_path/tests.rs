use crate::testing::{check, matrix};
use crate::{Group, ParamSet, Tape, Var};
use anser_tensor::Context;

const HEADS: usize = 2;

fn reference(x: &[Vec<f64>]) -> Vec<Vec<f64>> {
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
        out[2][i] = u * a;
    }
    out
}

#[test]
fn values_and_gradients() {
    for (rows, n, k, rate) in [(0, 4, 1.0, 1.0), (1, 4, 1.0, 1.0), (70, 4, 1.0, 3.0), (3, 17, 1e4, 40.0)] {
        let c = HEADS * n;
        check(
            &[matrix(rows, c, 1, k), matrix(rows, c, 2, rate)],
            &[matrix(1, c, 3, 1.0), matrix(1, c, 4, 1.0)],
            |t, x, p| {
                let key = t.key_path(&x[0], &x[1], p[0], p[1], HEADS);
                vec![key.k, key.a, key.b]
            },
            reference,
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
    let key = t.key_path(&k, &rate, p[0], p[1], HEADS);
    assert!(key.a.data().iter().chain(key.b.data()).all(|&x| x == 0.0));
    for out in [&key.k, &key.a, &key.b] {
        out.add_grad(ctx.copy_of(&[1.0; 8]));
    }
    t.backward();
    let (dk, drate) = (k.take_grad().unwrap(), rate.take_grad().unwrap());
    assert!(dk.iter().chain(drate.iter()).chain(grads.iter()).all(|g| g.is_finite()));
}
