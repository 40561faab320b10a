//! Rotary positions (RoFormer, arXiv 2104.09864): in each head of size N, channels j and j + N/2 of the token at position t of its
//! segment turn by the angle t 10000^(-2j/N). Dot products of turned queries and keys depend on the distance only.
//!
//! Backward: the gradient turns back by the same angle.

use crate::rows::{blocks, row};
use crate::{Segment, Tape, Var};
use anser_tensor::{Context, DisjointMut};
use std::sync::Arc;

mod cuda;
#[cfg(test)]
mod tests;

/// Cosine and sine of every position and pair of channels, [longest segment, N/2, 2].
fn table(segments: &[Segment], n: usize) -> Vec<f32> {
    let longest = segments.iter().map(|s| s.len).max().unwrap_or(0);
    let angle = |i: usize| (i / (n / 2)) as f64 * 1e4f64.powf(-2.0 * (i % (n / 2)) as f64 / n as f64);
    (0..longest * n / 2).flat_map(|i| [angle(i).cos() as f32, angle(i).sin() as f32]).collect()
}

/// Turns x into y, both [tokens, heads x N]: forwards with `sign` 1, back with -1.
fn turn(ctx: &Context, segments: &[Segment], x: &[f32], y: &mut [f32], c: usize, heads: usize, sign: f32) {
    let (n, half) = (c / heads, c / heads / 2);
    let table = table(segments, n);
    let positions: Vec<usize> = segments.iter().flat_map(|s| 0..s.len).collect();
    let rows: Vec<usize> = segments.iter().flat_map(|s| s.start..s.start + s.len).collect();
    let y = DisjointMut::new(y);
    blocks(ctx, rows.len(), |_, r| {
        for i in r {
            let (x, y) = (&x[rows[i] * c..][..c], row(&y, rows[i], c));
            let angles = &table[positions[i] * n..][..n];
            for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
                for j in 0..half {
                    let (cos, sin) = (angles[2 * j], sign * angles[2 * j + 1]);
                    y[j] = x[j] * cos - x[j + half] * sin;
                    y[j + half] = x[j] * sin + x[j + half] * cos;
                }
            }
        }
    });
}

impl<'p> Tape<'p> {
    /// x [tokens, C] with C = heads x N turned by its positions: [tokens, C]. Every row belongs to one segment, at whose start
    /// positions begin with 0. N is even.
    pub fn rotary(&mut self, x: &Var, segments: &Arc<[Segment]>, heads: usize) -> Var {
        let (rows, c) = (x.rows(), x.cols());
        assert!(c.is_multiple_of(2 * heads), "{c} channels in {heads} heads");
        let ctx = self.ctx().clone();
        let mut y = ctx.alloc(rows * c);
        if let Some(gpu) = ctx.cuda() {
            cuda::turn(&ctx, gpu, segments, x.buf(), &y, c, heads, 1.0);
        }
        self.run(|| turn(&ctx, segments, x.data(), &mut y, c, heads, 1.0));
        let needs = self.needs_grad(&[x], &[]);
        let out = self.output(rows, c, y, needs);
        if needs {
            let (dy, dx, segments) = (out.slot(), x.slot(), segments.clone());
            self.record(move |b| {
                let Some(dy) = dy.take() else { return };
                let mut g = ctx.alloc(rows * c);
                if let Some(gpu) = ctx.cuda() {
                    cuda::turn(&ctx, gpu, &segments, &dy, &g, c, heads, -1.0);
                }
                b.run(|_| turn(&ctx, &segments, &dy, &mut g, c, heads, -1.0));
                dx.add(g);
            });
        }
        out
    }
}
