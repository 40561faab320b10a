//! Dense causal attention inside each segment: per head of size N, with token t of a segment seeing its tokens 0..=t,
//!
//! ```text
//! s_tj = q_t . k_j / sqrt(N)    p_tj = exp(s_tj) / sum_{i <= t} exp(s_ti)    y_t = sum_{j <= t} p_tj v_j
//! ```
//!
//! The softmax is summed tile by tile of keys with a running maximum (FlashAttention, arXiv 2205.14135), so that nothing of size
//! T x T exists; L_t, the logarithm of its denominator, is kept. Positions are not this operation's business: see
//! [`Tape::rotary`].
//!
//! Backward, with D_t = dy_t . y_t: p_tj = exp(s_tj - L_t); ds_tj = p_tj (dy_t . v_j - D_t) / sqrt(N); dq_t = sum_j ds_tj k_j;
//! dk_j = sum_t ds_tj q_t; dv_j = sum_t p_tj dy_t. dq goes by tiles of queries and dk, dv by tiles of keys, each computing p again:
//! every row is summed by one task in a fixed order.

use crate::rows::{blocks, row, sum};
use crate::{Segment, Tape, Var};
use anser_tensor::{Buf, Context, DisjointMut, math, simd::vectorize};
use std::sync::Arc;

mod cuda;
#[cfg(test)]
mod tests;

/// Keys of a tile: the lanes of a vector.
const KEYS: usize = 16;
/// Queries of a tile.
const QUERIES: usize = 32;
/// The largest head.
const WIDEST: usize = 128;

/// One head in one segment.
#[derive(Clone, Copy)]
struct Head {
    /// First row of the segment.
    start: usize,
    /// Tokens of the segment.
    len: usize,
    /// The head's number, and how many there are.
    head: usize,
    heads: usize,
    /// Size of the head.
    n: usize,
}

impl Head {
    /// Place of token `t` in a matrix [tokens, heads].
    fn scalar(&self, t: usize) -> usize {
        (self.start + t) * self.heads + self.head
    }

    /// Token `t` of a matrix [tokens, heads x N].
    #[inline(always)]
    fn row<'a>(&self, x: &'a [f32], t: usize) -> &'a [f32] {
        &x[self.scalar(t) * self.n..][..self.n]
    }

    /// The same for writing.
    fn row_mut<'a>(&self, x: &DisjointMut<'a, f32>, t: usize) -> &'a mut [f32] {
        let at = self.scalar(t) * self.n;
        // SAFETY: within `tiles` a row of a head belongs to one task, which takes it once.
        unsafe { x.get(at..at + self.n) }
    }

    /// The keys (or values) of a tile as columns, [channel][key]; zero where the segment has ended.
    #[inline(always)]
    fn columns(&self, x: &[f32], first: usize) -> [[f32; KEYS]; WIDEST] {
        let mut columns = [[0.0; KEYS]; WIDEST];
        for l in 0..KEYS.min(self.len - first) {
            for (column, &x) in columns.iter_mut().zip(self.row(x, first + l)) {
                column[l] = x;
            }
        }
        columns
    }

    fn scale(&self) -> f32 {
        1.0 / (self.n as f32).sqrt()
    }
}

/// Runs `f(head, first token of the tile)` for all segments, heads and tiles of `size` tokens in parallel.
fn tiles(ctx: &Context, segments: &[Segment], heads: usize, n: usize, size: usize, f: impl Fn(Head, usize) + Sync) {
    let list: Vec<(usize, usize, usize)> =
        segments.iter().flat_map(|s| (0..s.len).step_by(size).map(|first| (s.start, s.len, first))).collect();
    ctx.threads().run(list.len() * heads, |i| {
        let (start, len, first) = list[i / heads];
        f(Head { start, len, head: i % heads, heads, n }, first);
    });
}

/// Products of a row with sixteen columns.
#[inline(always)]
fn dots(x: &[f32], columns: &[[f32; KEYS]; WIDEST]) -> [f32; KEYS] {
    let mut out = [0f32; KEYS];
    for (x, column) in x.iter().zip(columns) {
        for l in 0..KEYS {
            out[l] = x.mul_add(column[l], out[l]);
        }
    }
    out
}

/// y += a x.
#[inline(always)]
fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

/// y [tokens, heads x N] and, if wanted, L [tokens, heads].
fn forward(
    ctx: &Context, segments: &[Segment], heads: usize, [q, k, v]: [&[f32]; 3], y: &mut [f32], lse: Option<&mut [f32]>,
    n: usize,
) {
    let (y, lse) = (DisjointMut::new(y), lse.map(DisjointMut::new));
    tiles(ctx, segments, heads, n, QUERIES, |h, first| {
        let end = h.len.min(first + QUERIES);
        let (mut top, mut total) = ([f32::NEG_INFINITY; QUERIES], [0f32; QUERIES]);
        let mut out = [[0f32; WIDEST]; QUERIES];
        vectorize(
            #[inline(always)]
            || {
                for key in (0..end).step_by(KEYS) {
                    let columns = h.columns(k, key);
                    for t in first.max(key)..end {
                        let (i, seen) = (t - first, KEYS.min(t + 1 - key));
                        let mut p = dots(h.row(q, t), &columns);
                        let mut new = top[i];
                        for (l, s) in p.iter_mut().enumerate() {
                            *s = if l < seen { *s * h.scale() } else { f32::NEG_INFINITY };
                            new = new.max(*s);
                        }
                        let keep = math::exp(top[i] - new);
                        p.iter_mut().for_each(|s| *s = math::exp(*s - new));
                        total[i] = total[i] * keep + p.iter().sum::<f32>();
                        top[i] = new;
                        out[i][..n].iter_mut().for_each(|o| *o *= keep);
                        for (l, p) in p[..seen].iter().enumerate() {
                            add_scaled(&mut out[i], *p, h.row(v, key + l));
                        }
                    }
                }
            },
        );
        for t in first..end {
            let i = t - first;
            h.row_mut(&y, t).iter_mut().zip(&out[i]).for_each(|(y, o)| *y = o / total[i]);
            if let Some(lse) = &lse {
                let at = h.scalar(t);
                // SAFETY: as for rows.
                let to = unsafe { lse.get(at..at + 1) };
                to[0] = top[i] + total[i].ln();
            }
        }
    });
}

/// What the backward pass reads: q, k, v, dy [tokens, heads x N]; L and D [tokens, heads].
#[derive(Clone, Copy)]
struct Saved<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    dy: &'a [f32],
    lse: &'a [f32],
    delta: &'a [f32],
}

impl Saved<'_> {
    /// p and ds of query `t` with the keys of the tile from `key` on, of which these are the keys' and values' columns.
    #[inline(always)]
    fn weights(
        &self, h: Head, t: usize, key: usize, keys: &[[f32; KEYS]; WIDEST], values: &[[f32; KEYS]; WIDEST],
    ) -> ([f32; KEYS], [f32; KEYS]) {
        let (mut p, mut ds) = (dots(h.row(self.q, t), keys), dots(h.row(self.dy, t), values));
        let (lse, delta) = (self.lse[h.scalar(t)], self.delta[h.scalar(t)]);
        for l in 0..KEYS {
            p[l] = if key + l <= t { math::exp(p[l] * h.scale() - lse) } else { 0.0 };
            ds[l] = p[l] * (ds[l] - delta) * h.scale();
        }
        (p, ds)
    }
}

/// dq, dk and dv [tokens, heads x N].
fn backward(ctx: &Context, segments: &[Segment], heads: usize, x: Saved<'_>, [dq, dk, dv]: [&mut [f32]; 3], n: usize) {
    let (dq, dk, dv) = (DisjointMut::new(dq), DisjointMut::new(dk), DisjointMut::new(dv));
    tiles(ctx, segments, heads, n, QUERIES, |h, first| {
        let end = h.len.min(first + QUERIES);
        let mut sums = [[0f32; WIDEST]; QUERIES];
        vectorize(
            #[inline(always)]
            || {
                for key in (0..end).step_by(KEYS) {
                    let (keys, values) = (h.columns(x.k, key), h.columns(x.v, key));
                    for t in first.max(key)..end {
                        let (_, ds) = x.weights(h, t, key, &keys, &values);
                        for l in 0..KEYS.min(t + 1 - key) {
                            add_scaled(&mut sums[t - first], ds[l], h.row(x.k, key + l));
                        }
                    }
                }
            },
        );
        (first..end).for_each(|t| h.row_mut(&dq, t).copy_from_slice(&sums[t - first][..n]));
    });
    tiles(ctx, segments, heads, n, KEYS, |h, key| {
        let (keys, values) = (h.columns(x.k, key), h.columns(x.v, key));
        let mut sums = [[[0f32; WIDEST]; KEYS]; 2];
        vectorize(
            #[inline(always)]
            || {
                for t in key..h.len {
                    let (p, ds) = x.weights(h, t, key, &keys, &values);
                    for l in 0..KEYS.min(t + 1 - key) {
                        add_scaled(&mut sums[0][l], ds[l], h.row(x.q, t));
                        add_scaled(&mut sums[1][l], p[l], h.row(x.dy, t));
                    }
                }
            },
        );
        for l in 0..KEYS.min(h.len - key) {
            h.row_mut(&dk, key + l).copy_from_slice(&sums[0][l][..n]);
            h.row_mut(&dv, key + l).copy_from_slice(&sums[1][l][..n]);
        }
    });
}

impl<'p> Tape<'p> {
    /// Causal attention of q, k, v [tokens, C] with C = heads x N, N at most 128 (on a GPU 16, 32, 64 or 128): [tokens, C]. Every
    /// row belongs to one segment; attention sees nothing before its start, whatever the segment's state.
    pub fn attention(&mut self, q: &Var, k: &Var, v: &Var, segments: &Arc<[Segment]>, heads: usize) -> Var {
        let (rows, c) = (q.rows(), q.cols());
        let n = c / heads;
        assert!(n * heads == c && n <= WIDEST, "{c} channels in {heads} heads");
        let ctx = self.ctx().clone();
        let needs = self.needs_grad(&[q, k, v], &[]);
        let mut y = ctx.alloc(rows * c);
        let mut lse = needs.then(|| ctx.alloc_f32(rows * heads));
        if let Some(gpu) = ctx.cuda() {
            cuda::forward(&ctx, gpu, segments, heads, [q, k, v], &y, lse.as_ref());
        }
        self.run(|| {
            forward(&ctx, segments, heads, [q, k, v].map(Var::data), &mut y, lse.as_deref_mut(), n);
        });
        let out = self.output(rows, c, y, needs);
        if let Some(lse) = lse {
            let (slot, y, segments) = (out.slot(), out.without_grad(), segments.clone());
            let x = [q, k, v].map(Var::clone);
            self.record(move |b| {
                let Some(dy) = slot.take() else { return };
                let mut delta = ctx.alloc_f32(rows * heads);
                let mut grads: [Buf; 3] = std::array::from_fn(|_| ctx.alloc(rows * c));
                if let Some(gpu) = ctx.cuda() {
                    cuda::backward(&ctx, gpu, &segments, heads, &x, [y.buf(), &dy, &lse, &delta], grads.each_ref());
                }
                b.run(|_| {
                    let shared = DisjointMut::new(&mut delta);
                    blocks(&ctx, rows, |_, r| {
                        for i in r {
                            for (h, d) in row(&shared, i, heads).iter_mut().enumerate() {
                                let at = i * c + h * n;
                                *d = sum(n, |j| dy[at + j] * y.data()[at + j]);
                            }
                        }
                    });
                    let [q, k, v] = x.each_ref().map(Var::data);
                    let saved = Saved { q, k, v, dy: &dy, lse: &lse, delta: &delta };
                    backward(&ctx, &segments, heads, saved, grads.each_mut().map(|g| &mut g[..]), n);
                });
                x.iter().zip(grads).for_each(|(x, g)| x.add_grad(g));
            });
        }
        out
    }
}
