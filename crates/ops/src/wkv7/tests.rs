use super::*;
use crate::{ParamSet, batch};
use safetensors::SafeTensors;

/// y, the new arena, and the gradients of r, w, k, v, a, b and of the old arena.
type Outputs = (Vec<f32>, Vec<f32>, Vec<Vec<f32>>);

fn run(
    threads: usize, n: usize, inputs: &[Vec<f32>; 6], state: &[f32], segments: &[Segment], dy: &[f32], dnew: &[f32],
    heads: usize,
) -> Outputs {
    let ctx = Context::cpu(threads);
    let c = heads * n;
    let leaf = |x: &Vec<f32>| Var::leaf(x.len() / c, c, ctx.copy_of(x));
    let [r, w, k, v, a, b] = inputs.each_ref().map(leaf);
    let s = Var::leaf(state.len() / (c * n), c * n, ctx.copy_of(state));
    let params = ParamSet::default();
    let mut none = ctx.alloc_f32(0);
    let mut t = Tape::recording(&ctx, &params, &mut none);
    let x = Wkv7Inputs { r: &r, w: &w, k: &k, v: &v, a: &a, b: &b };
    let (y, new) = t.wkv7(x, &s, &segments.into(), heads);
    let (values, state) = (y.data().to_vec(), new.data().to_vec());
    y.add_grad(ctx.copy_of(dy));
    if segments.iter().any(|s| s.state_out.is_some()) {
        new.add_grad(ctx.copy_of(dnew));
    }
    t.backward();
    let grad = |v: &Var| v.take_grad().map(|g| g.to_vec()).unwrap_or_default();
    (values, state, [&r, &w, &k, &v, &a, &b, &s].map(grad).to_vec())
}

fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let d: f64 = got.iter().zip(want).map(|(g, w)| (*g as f64 - w).powi(2)).sum();
    (d / want.iter().map(|w| w * w).sum::<f64>().max(1e-60)).sqrt()
}

#[test]
fn golden_vectors() {
    for name in ["typical", "min_decay", "same_key", "odd_length"] {
        let path = format!("{}/../../fixtures/golden/wkv7_{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let get = |n: &str| -> Vec<f32> {
            let t = file.tensor(n).unwrap();
            t.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let want = |n: &str| get(n).iter().map(|&v| v as f64).collect::<Vec<f64>>();
        let [b, t, h, n] = file.tensor("r").unwrap().shape()[..] else { panic!() };
        let inputs = ["r", "om", "k", "v", "a", "b"].map(get);
        let segments = batch(b, t, true);
        let (y, s, grads) = run(2, n, &inputs, &get("s0"), &segments, &get("dy"), &get("dsT"), h);
        let one = run(1, n, &inputs, &get("s0"), &segments, &get("dy"), &get("dsT"), h);
        assert!(one == (y.clone(), s.clone(), grads.clone()), "{name}: threads change bits");
        assert!(error(&y, &want("y")) < 2e-5 && error(&s, &want("sT")) < 2e-5, "{name}");
        for (g, d) in grads.iter().zip(["dr", "dom", "dk", "dv", "da", "db", "ds0"]) {
            let e = error(g, &want(d));
            assert!(e < 1e-4, "{name} {d}: {e:.1e}");
        }
    }
}

struct Noise(u32);

impl Noise {
    fn vec(&mut self, len: usize, scale: f32) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(1664525).wrapping_add(1013904223);
            (self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next() * scale).collect()
    }
}

/// Inputs as the key path makes them; with `rate`, one key repeated at that in-context rate.
fn inputs(tokens: usize, heads: usize, n: usize, rate: Option<f32>) -> [Vec<f32>; 6] {
    let (mut x, c) = (Noise(7), heads * n);
    let mut kk = x.vec(tokens * c, 1.0);
    if rate.is_some() {
        let first = kk[..c].to_vec();
        kk.chunks_mut(c).for_each(|row| row.copy_from_slice(&first));
    }
    for head in kk.chunks_mut(n) {
        let norm = head.iter().map(|v| v * v).sum::<f32>().sqrt();
        head.iter_mut().for_each(|v| *v /= norm);
    }
    let rates = x.vec(tokens * c, 0.5);
    let b = kk.iter().zip(&rates).map(|(k, r)| k * rate.unwrap_or(r + 0.5)).collect();
    let a = kk.iter().map(|k| -k).collect();
    [x.vec(tokens * c, 1.0), x.vec(tokens * c, 4.0), x.vec(tokens * c, 0.5), x.vec(tokens * c, 1.0), a, b]
}

/// The recurrence in f64; loss = sum(y dy) + sum(S_T dS_T) for one sequence.
fn loss(x: &[Vec<f64>], s0: &[f64], dy: &[f32], ds: &[f32], heads: usize, n: usize) -> f64 {
    let c = heads * n;
    let mut out = 0.0;
    for h in 0..heads {
        let mut s = s0[h * n * n..(h + 1) * n * n].to_vec();
        for t in 0..x[0].len() / c {
            let [r, w, k, v, a, b] = [0, 1, 2, 3, 4, 5].map(|i: usize| &x[i][t * c + h * n..][..n]);
            for i in 0..n {
                let u: f64 = (0..n).map(|j| s[i * n + j] * a[j]).sum();
                for j in 0..n {
                    let d = (-(-0.5f64).exp() / (1.0 + (-w[j]).exp())).exp();
                    s[i * n + j] = s[i * n + j] * d + u * b[j] + v[i] * k[j];
                    out += s[i * n + j] * r[j] * dy[t * c + h * n + i] as f64;
                }
            }
        }
        out += s.iter().zip(&ds[h * n * n..]).map(|(s, d)| s * *d as f64).sum::<f64>();
    }
    out
}

#[test]
fn gradients_equal_finite_differences() {
    // The last at the doubled rate.
    for (tokens, rate) in [(1, None), (18, None), (40, Some(0.999)), (18, Some(1.999))] {
        let (heads, n) = (1, 16);
        let x = inputs(tokens, heads, n, rate);
        let mut noise = Noise(3);
        let (s0, dy, ds) = (noise.vec(256, 0.3), noise.vec(tokens * n, 1.0), noise.vec(256, 1.0));
        let (_, _, grads) = run(2, n, &x, &s0, &batch(1, tokens, true), &dy, &ds, heads);
        let mut all: Vec<Vec<f64>> = x.iter().chain([&s0]).map(|v| v.iter().map(|&v| v as f64).collect()).collect();
        for which in 0..7 {
            for i in (0..all[which].len()).step_by(7) {
                let (value, h) = (all[which][i], 1e-5);
                let mut at = |v: f64| {
                    all[which][i] = v;
                    loss(&all[..6], &all[6], &dy, &ds, heads, n)
                };
                let slope = (at(value + h) - at(value - h)) / (2.0 * h);
                at(value);
                let got = grads[which][i] as f64;
                assert!((got - slope).abs() < 2e-4 * (1.0 + slope.abs()), "{tokens} {which} {i}: {got} {slope}");
            }
        }
    }
}

#[test]
fn head_sizes_resets_and_cuts_are_bitwise() {
    for (n, heads) in [(16, 3), (32, 2), (64, 1), (128, 1)] {
        let (tokens, c) = (40, heads * n);
        let x = inputs(tokens, heads, n, None);
        let mut noise = Noise(11);
        let (state, dy) = (noise.vec(2 * c * n, 0.3), noise.vec(tokens * c, 1.0));
        let dnew = noise.vec(2 * c * n, 1.0);
        // Three documents in one row, of 1, 22 and 17 tokens; the last goes on from slot 1.
        let seg = |start, len, state_in, state_out| Segment { start, len, state_in, state_out };
        let packed = [seg(0, 1, None, None), seg(1, 22, None, Some(0)), seg(23, 17, Some(1), Some(1))];
        let whole = run(2, n, &x, &state, &packed, &dy, &dnew, heads);
        for s in packed {
            let rows = s.start * c..(s.start + s.len) * c;
            let part = x.each_ref().map(|x| x[rows.clone()].to_vec());
            let alone = [Segment { start: 0, ..s }];
            let one = run(1, n, &part, &state, &alone, &dy[rows.clone()], &dnew, heads);
            assert!(one.0 == whole.0[rows.clone()]);
            (0..6).for_each(|i| assert!(one.2[i] == whole.2[i][rows.clone()], "head size {n}, input {i}"));
            if let Some(slot) = s.state_out {
                let slot = slot * c * n..(slot + 1) * c * n;
                assert!(one.1[slot.clone()] == whole.1[slot]);
            }
        }
        // Nothing reads slot 0, which is replaced: no gradient reaches its old value.
        assert!(whole.2[6][..c * n].iter().all(|&g| g == 0.0) && whole.2[6][c * n..].iter().any(|&g| g != 0.0));
        assert!(run(2, n, &inputs(0, heads, n, None), &state, &[], &[], &[], heads).0.is_empty());
    }
}

/// The forward pass of one head in chunks of `l` tokens, as matrix products with the inverse of I - M_ab by substitution, in f32.
fn chunked(n: usize, inputs: &[Vec<f32>; 6], s: &mut [f32], l: usize) -> Vec<f32> {
    let tokens = inputs[0].len() / n;
    let mut y = Vec::new();
    for first in (0..tokens).step_by(l) {
        let len = l.min(tokens - first);
        let at = |x: usize, t: usize, j: usize| inputs[x][(first + t) * n + j];
        let d = |t: usize, j: usize| (-BOUND * math::sigmoid(at(1, t, j))).exp();
        // Decay products before each token and after the last: [len + 1][n].
        let mut p = vec![vec![1f32; n]];
        for t in 0..len {
            p.push((0..n).map(|j| p[t][j] * d(t, j)).collect());
        }
        let r = |t: usize, j: usize| at(0, t, j) * p[t + 1][j];
        let k = |t: usize, j: usize| at(2, t, j) / p[t + 1][j];
        let a = |t: usize, j: usize| at(4, t, j) * p[t][j];
        let b = |t: usize, j: usize| at(5, t, j) / p[t + 1][j];
        let pair = |x: &dyn Fn(usize, usize) -> f32, t, z: &dyn Fn(usize, usize) -> f32, u| -> f32 {
            (0..n).map(|j| x(t, j) * z(u, j)).sum()
        };
        let read =
            |x: &dyn Fn(usize, usize) -> f32, t, i: usize| -> f32 { (0..n).map(|j| x(t, j) * s[i * n + j]).sum() };
        let mut inverse = vec![vec![0f32; len]; len];
        for t in 0..len {
            inverse[t][t] = 1.0;
            for u in 0..t {
                let m = pair(&a, t, &b, u);
                for c in 0..=u {
                    inverse[t][c] += m * inverse[u][c];
                }
            }
        }
        let removed =
            |t: usize, i: usize| (0..t).map(|u| pair(&a, t, &k, u) * at(3, u, i)).sum::<f32>() + read(&a, t, i);
        let before: Vec<Vec<f32>> = (0..len).map(|t| (0..n).map(|i| removed(t, i)).collect()).collect();
        let us: Vec<Vec<f32>> =
            (0..len).map(|t| (0..n).map(|i| (0..=t).map(|c| inverse[t][c] * before[c][i]).sum()).collect()).collect();
        for t in 0..len {
            for i in 0..n {
                let written: f32 =
                    (0..=t).map(|u| pair(&r, t, &k, u) * at(3, u, i) + pair(&r, t, &b, u) * us[u][i]).sum();
                y.push(read(&r, t, i) + written);
            }
        }
        let mut next = vec![0f32; n * n];
        for i in 0..n {
            for j in 0..n {
                let written: f32 = (0..len).map(|t| at(3, t, i) * k(t, j) + us[t][i] * b(t, j)).sum();
                next[i * n + j] = (s[i * n + j] + written) * p[len][j];
            }
        }
        s.copy_from_slice(&next);
    }
    y
}

#[test]
fn recurrent_equals_chunked() {
    let (n, t) = (16, 43);
    // Typical, one key all along, decay at its floor.
    for (rate, floor) in [(None, false), (Some(0.9), false), (None, true)] {
        let mut x = inputs(t, 1, n, rate);
        if floor {
            x[1].fill(30.0);
        }
        let state = Noise(11).vec(n * n, 0.5);
        let zeros = vec![0.0; t * n];
        let (y, s, _) = run(1, n, &x, &state, &batch(1, t, true), &zeros, &state, 1);
        for l in [1, 5, 16] {
            let mut end = state.clone();
            let chunked: Vec<f64> = chunked(n, &x, &mut end, l).iter().map(|&v| v.into()).collect();
            let end: Vec<f64> = end.iter().map(|&v| v.into()).collect();
            assert!(
                error(&y, &chunked) < 2e-5 && error(&s, &end) < 2e-5,
                "{rate:?} {floor} {l}: {:.1e}",
                error(&y, &chunked)
            );
        }
    }
}
