//! What operations on rows share: fixed blocks of rows as tasks, sums over rows in a fixed order, sums within a row.

use crate::{Backward, Param, Segment, Var};
use anser_tensor::{Buf, Context, DisjointMut};
use std::ops::Range;

/// Rows of one task. Fixed, so that sums over rows do not depend on the number of threads.
const BLOCK: usize = 32;

/// Runs `f(block, rows of the block)` for all blocks of rows in parallel.
pub(crate) fn blocks(ctx: &Context, rows: usize, f: impl Fn(usize, Range<usize>) + Sync) {
    ctx.threads().run(rows.div_ceil(BLOCK), |b| f(b, b * BLOCK..rows.min((b + 1) * BLOCK)));
}

/// Row `i` of a matrix with `cols` columns that tasks write row by row.
pub(crate) fn row<'a>(m: &DisjointMut<'a, f32>, i: usize, cols: usize) -> &'a mut [f32] {
    // SAFETY: within `blocks` every row belongs to one task, which takes it once.
    unsafe { m.get(i * cols..(i + 1) * cols) }
}

/// Adds to the gradients of K parameters of equal size what `f(rows, partial sums)` sums over each block of rows,
/// block after block.
pub(crate) fn param_sums<const K: usize>(
    b: &mut Backward<'_>, params: [Param; K], rows: usize, f: impl Fn(Range<usize>, [&mut [f32]; K]) + Sync,
) {
    let ctx = b.ctx();
    let size = params[0].rows * params[0].cols;
    let n = rows.div_ceil(BLOCK);
    let mut partial = ctx.alloc(n * K * size);
    b.run(|b| {
        partial.fill(0.0);
        let shared = DisjointMut::new(&mut partial);
        blocks(ctx, rows, |i, range| {
            let mut mine = row(&shared, i, K * size).chunks_exact_mut(size);
            f(range, std::array::from_fn(|_| mine.next().unwrap_or_default()));
        });
        for (k, p) in params.into_iter().enumerate() {
            let Some(grad) = b.param_grad(p) else { continue };
            for part in partial.chunks_exact(size).skip(k).step_by(K) {
                grad.iter_mut().zip(part).for_each(|(g, s)| *g += s);
            }
        }
    });
}

/// The arena that follows one, for segments to write their rows: the other ones are copied.
pub(crate) fn next_arena(ctx: &Context, arena: &Var, segments: &[Segment]) -> Buf {
    let mut left = vec![true; arena.rows()];
    segments.iter().filter_map(|s| s.state_out).for_each(|row| left[row] = false);
    let mut next = ctx.alloc_as(arena.buf().dtype(), arena.buf().len());
    let (cols, mut row) = (arena.cols(), 0);
    for run in left.chunk_by(|a, b| a == b) {
        if run[0] {
            next.write_part(row * cols, arena.buf(), row * cols, run.len() * cols);
        }
        row += run.len();
    }
    next
}

/// f(0) + .. + f(n - 1) in sixteen partial sums: vectorised, in a fixed order.
#[inline(always)]
pub(crate) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut parts = [0f32; 16];
    let full = n / 16 * 16;
    for i in (0..full).step_by(16) {
        for (l, part) in parts.iter_mut().enumerate() {
            *part += f(i + l);
        }
    }
    let mut total = 0.0;
    for part in parts {
        total += part;
    }
    for i in full..n {
        total += f(i);
    }
    total
}

/// Mean and 1 / sqrt(variance + eps), population variance.
#[inline(always)]
pub(crate) fn stats(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x.len(), |j| x[j]) / n;
    let variance = sum(x.len(), |j| (x[j] - mean) * (x[j] - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// The gradient of x under a normalisation: with z the normalised x and h the gradient of z,
/// dx = (h - mean(h) - z mean(h z)) / sigma.
#[inline(always)]
pub(crate) fn norm_grad(x: &[f32], mean: f32, inv: f32, h: impl Fn(usize) -> f32, dx: &mut [f32]) {
    let n = x.len() as f32;
    let a = sum(x.len(), &h) / n;
    let b = sum(x.len(), |j| h(j) * (x[j] - mean) * inv) / n;
    for j in 0..x.len() {
        dx[j] = inv * (h(j) - a - (x[j] - mean) * inv * b);
    }
}
