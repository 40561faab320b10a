use crate::testing::{check, matrix, noise};
use crate::{ParamSet, Segment, Tape, Var, batch};
use anser_tensor::Context;
use std::sync::Arc;

fn ragged(lengths: &[usize]) -> Vec<Segment> {
    let piece = |start: &mut usize, &len: &usize| {
        *start += len;
        Some(Segment { start: *start - len, len, state_in: None, state_out: None })
    };
    lengths.iter().scan(0, piece).collect()
}

/// The definition, with the whole matrix of weights of each head.
fn reference(x: &[Vec<f64>], segments: &[Segment], heads: usize, n: usize) -> Vec<Vec<f64>> {
    let c = heads * n;
    let mut y = vec![0.0; x[0].len()];
    for s in segments {
        for h in 0..heads {
            let row = |m: usize, t: usize| &x[m][(s.start + t) * c + h * n..][..n];
            for t in 0..s.len {
                let dot = |j: usize| row(0, t).iter().zip(row(1, j)).map(|(q, k)| q * k).sum::<f64>();
                let scores: Vec<f64> = (0..=t).map(|j| dot(j) / (n as f64).sqrt()).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let p: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                let total: f64 = p.iter().sum();
                for e in 0..n {
                    y[(s.start + t) * c + h * n + e] = (0..=t).map(|j| p[j] / total * row(2, j)[e]).sum();
                }
            }
        }
    }
    vec![y]
}

#[test]
fn values_and_gradients() {
    // No tokens, one token, lengths on both sides of a tile of keys and of queries, scores far apart.
    let cases: [(&[usize], usize, usize, f32); 6] = [
        (&[], 1, 4, 1.0),
        (&[1], 2, 4, 1.0),
        (&[3, 1, 18], 2, 4, 1.0),
        (&[16, 17], 1, 5, 3.0),
        (&[35], 1, 4, 2.0),
        (&[2, 4], 1, 128, 1.0),
    ];
    for (lengths, heads, n, scale) in cases {
        let segments = ragged(lengths);
        let rows = lengths.iter().sum();
        let shared: Arc<[Segment]> = segments.clone().into();
        check(
            &[1, 2, 3].map(|seed| matrix(rows, heads * n, seed, scale)),
            &[],
            |t, x, _| vec![t.attention(&x[0], &x[1], &x[2], &shared, heads)],
            |x| reference(x, &segments, heads, n),
        );
    }
}

#[test]
fn large_scores_do_not_overflow_and_neighbours_do_not_matter() {
    let (heads, n, len) = (2, 16, 50);
    let c = heads * n;
    let run = |copies: usize| {
        let (ctx, set) = (Context::cpu(2), ParamSet::default());
        let mut t = Tape::inference(&ctx, &set);
        let var = |seed| {
            let x: Vec<f32> = noise(len * c, seed).iter().map(|v| v * 100.0).collect::<Vec<_>>().repeat(copies);
            Var::constant(copies * len, c, ctx.copy_of(&x))
        };
        t.attention(&var(1), &var(2), &var(3), &batch(copies, len, false).into(), heads).to_vec()
    };
    let one = run(1);
    assert!(one.iter().all(|y| y.is_finite() && y.abs() <= 100.0));
    assert!(run(3) == one.repeat(3));
}
