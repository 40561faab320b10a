//! Random orthogonal matrices.

use super::normal;
use anser_tensor::Context;
use anser_tensor::gemm::{Trans, gemm};
use rand_chacha::ChaCha8Rng;

/// Rows of a block: within one the arithmetic is plain, between blocks it is matrix products.
const BLOCK: usize = 64;

/// A random matrix [rows, cols] whose shorter side is orthonormal, uniformly distributed: the Q of the QR decomposition
/// of a normal matrix with positive diagonal in R. Computed by Cholesky QR, repeated until it holds.
pub(super) fn orthogonal(ctx: &Context, rng: &mut ChaCha8Rng, rows: usize, cols: usize, out: &mut [f32]) {
    let (long, short) = (rows.max(cols), rows.min(cols));
    let mut a = vec![0.0; long * short];
    normal(rng, &mut a);
    for _ in 0..12 {
        let mut gram = vec![0.0; short * short];
        gemm(ctx, Trans::T, Trans::N, short, short, long, &a, &a, false, &mut gram);
        let off = |i: usize| (gram[i] - if i.is_multiple_of(short + 1) { 1.0 } else { 0.0 }).abs();
        let off = (0..short * short).map(off).fold(0.0, f32::max);
        let inverse = Cholesky::of(ctx, &gram, short).inverse(ctx);
        let mut q = vec![0.0; long * short];
        gemm(ctx, Trans::N, Trans::T, long, short, short, &a, &inverse, false, &mut q);
        a = q;
        // What a round leaves is of the order of the square of what was off, and of rounding.
        if off < 1e-3 {
            break;
        }
    }
    if rows >= cols {
        out.copy_from_slice(&a);
    } else {
        for i in 0..rows {
            for j in 0..cols {
                out[i * cols + j] = a[j * short + i];
            }
        }
    }
}

/// L of G + shift = L L^T, lower triangular, in rows of blocks.
struct Cholesky {
    n: usize,
    /// For each block of rows what is left of its diagonal block, [rows, columns before it].
    left: Vec<Vec<f32>>,
    /// The inverse of each diagonal block, [rows, rows].
    diagonal: Vec<Vec<f32>>,
}

impl Cholesky {
    /// The shift (a rounding error of G) keeps the decomposition going where f32 has lost positive definiteness; the next round removes what it left.
    fn of(ctx: &Context, gram: &[f32], n: usize) -> Cholesky {
        let shift = (0..n).map(|i| f64::from(gram[i * n + i])).fold(0.0, f64::max) * 1e-6;
        let mut rest: Vec<f64> = gram.iter().map(|&g| g.into()).collect();
        let blocks = n.div_ceil(BLOCK);
        let mut l = Cholesky { n, left: vec![Vec::new(); blocks], diagonal: Vec::new() };
        for block in 0..blocks {
            let (from, to) = (block * BLOCK, n.min(block * BLOCK + BLOCK));
            let (size, below) = (to - from, n - to);
            let inverse = inverse_of_factor(&rest[from * n + from..], n, size, shift);
            // The rows below, divided by this block, and what their products leave of the rest.
            let rows: Vec<f32> = (to..n).flat_map(|i| rest[i * n + from..][..size].iter().map(|&v| v as f32)).collect();
            let mut column = vec![0.0; below * size];
            gemm(ctx, Trans::N, Trans::T, below, size, size, &rows, &inverse, false, &mut column);
            let mut products = vec![0.0; below * below];
            gemm(ctx, Trans::N, Trans::T, below, below, size, &column, &column, false, &mut products);
            for (i, products) in products.chunks(below.max(1)).enumerate() {
                let rest = &mut rest[(to + i) * n + to..][..=i];
                rest.iter_mut().zip(products).for_each(|(r, &p)| *r -= f64::from(p));
            }
            for (later, rows) in column.chunks(BLOCK * size).enumerate() {
                l.left[block + 1 + later].extend_from_slice(rows);
            }
            l.diagonal.push(inverse);
        }
        // A row of blocks came column by column.
        for (block, left) in l.left.iter_mut().enumerate() {
            *left = joined(left, n.min(block * BLOCK + BLOCK) - block * BLOCK, block);
        }
        l
    }

    /// L^-1 [n, n], block of rows after block of rows.
    fn inverse(&self, ctx: &Context) -> Vec<f32> {
        let n = self.n;
        let mut inverse = vec![0.0; n * n];
        for (block, (left, diagonal)) in self.left.iter().zip(&self.diagonal).enumerate() {
            let before = block * BLOCK;
            let (done, rest) = inverse.split_at_mut(before * n);
            let size = (n - before).min(BLOCK);
            let mut rows = vec![0.0; size * n];
            gemm(ctx, Trans::N, Trans::N, size, n, before, left, done, false, &mut rows);
            rows.iter_mut().for_each(|v| *v = -*v);
            (0..size).for_each(|i| rows[i * n + before + i] += 1.0);
            gemm(ctx, Trans::N, Trans::N, size, n, size, diagonal, &rows, false, &mut rest[..size * n]);
        }
        inverse
    }
}

/// `count` blocks [rows, BLOCK], one after the other, as one matrix [rows, count x BLOCK].
fn joined(blocks: &[f32], rows: usize, count: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(blocks.len());
    for row in 0..rows {
        for block in 0..count {
            out.extend_from_slice(&blocks[(block * rows + row) * BLOCK..][..BLOCK]);
        }
    }
    out
}

/// L^-1 [size, size] for the block [size, size] of a matrix with `pitch` columns, which plus the shift is L L^T.
fn inverse_of_factor(block: &[f64], pitch: usize, size: usize, shift: f64) -> Vec<f32> {
    let n = size;
    let mut l = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = l[i * n..][..j].iter().zip(&l[j * n..][..j]).map(|(a, b)| a * b).sum();
            let v = block[i * pitch + j] - dot;
            l[i * n + j] = if i == j { (v + shift).max(shift).sqrt() } else { v / l[j * n + j] };
        }
    }
    // Forward substitution, row by row.
    let mut inverse = vec![0.0; n * n];
    for i in 0..n {
        let mut row = vec![0.0; n];
        row[i] = 1.0;
        for k in 0..i {
            let f = l[i * n + k];
            row[..=k].iter_mut().zip(&inverse[k * n..][..=k]).for_each(|(r, v)| *r -= f * v);
        }
        inverse[i * n..][..=i].iter_mut().zip(&row).for_each(|(to, r)| *to = r / l[i * n + i]);
    }
    inverse.iter().map(|&v| v as f32).collect()
}
