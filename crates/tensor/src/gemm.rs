//! f32 matrix products.
//!
//! Both operands are packed into panels (A: 6 rows, B: 16 columns, k contiguous), so that one micro-kernel serves all
//! transposes and all edges. Each element of the result is one chain of fused multiply-adds over k in order: blocking over k
//! continues the chain through memory, and edges are padded with zeros in the panels, never in the chain.

use crate::{Context, DisjointMut};

/// How an operand is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trans {
    /// As in the formula.
    N,
    /// Transposed.
    T,
}

pub(crate) const MR: usize = 6;
pub(crate) const NR: usize = 16;
/// k block: a B panel of 16 x KC floats (16 KiB) stays in the first-level cache.
const KC: usize = 256;
/// Row block of one task: 66 x KC floats of A (66 KiB) stay in the second-level cache.
const MC: usize = 11 * MR;
/// Column block of one task.
const NC: usize = 8 * NR;

/// `c = op(a) op(b)` or, with `accumulate`, `c += op(a) op(b)`.
///
/// op(a) is [m, k], op(b) is [k, n], c is [m, n], all row-major and dense; `Trans::T` says that the operand is
/// stored transposed ([k, m] or [n, k]). Each element of c is one chain of fused multiply-adds over k in order, so
/// that its value depends neither on m and n nor on the number of threads.
pub fn gemm(
    ctx: &Context, ta: Trans, tb: Trans, m: usize, n: usize, k: usize, a: &[f32], b: &[f32], accumulate: bool,
    c: &mut [f32],
) {
    assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
    if m == 0 || n == 0 || k == 0 {
        if !accumulate {
            c.fill(0.0);
        }
        return;
    }
    let (mp, np) = (m.div_ceil(MR), n.div_ceil(NR));
    let (len_a, len_b) = (mp * MR * k.min(KC), np * NR * k.min(KC));
    let mut scratch = Scratch::new(len_a + len_b);
    let (pa, pb) = scratch.split_at_mut(len_a);
    let c = DisjointMut::new(c);
    for k0 in (0..k).step_by(KC) {
        let kc = KC.min(k - k0);
        {
            let (da, db) = (DisjointMut::new(pa), DisjointMut::new(pb));
            let (ga, gb) = (mp.div_ceil(16), np.div_ceil(8));
            ctx.threads().run(ga + gb, |t| {
                if t < ga {
                    for p in t * 16..mp.min(t * 16 + 16) {
                        // SAFETY: each panel is packed by one task.
                        let out = unsafe { da.get(p * MR * kc..(p + 1) * MR * kc) };
                        pack::<MR>(a, if ta == Trans::N { (k, 1) } else { (1, m) }, p * MR, m, k0, kc, out);
                    }
                } else {
                    for p in (t - ga) * 8..np.min((t - ga) * 8 + 8) {
                        // SAFETY: as above.
                        let out = unsafe { db.get(p * NR * kc..(p + 1) * NR * kc) };
                        pack::<NR>(b, if tb == Trans::N { (1, n) } else { (k, 1) }, p * NR, n, k0, kc, out);
                    }
                }
            });
        }
        let (tm, tn) = (m.div_ceil(MC), n.div_ceil(NC));
        let (pa, pb) = (&*pa, &*pb);
        ctx.threads().run(tm * tn, |t| {
            let (i0, j0) = (t / tn * MC, t % tn * NC);
            for j in (j0..n.min(j0 + NC)).step_by(NR) {
                for i in (i0..m.min(i0 + MC)).step_by(MR) {
                    let (a, b) = (&pa[i * kc..(i + MR) * kc], &pb[j * kc..(j + NR) * kc]);
                    let (rows, cols) = (MR.min(m - i), NR.min(n - j));
                    // SAFETY: tiles of different tasks do not overlap; rows of a tile are separate ranges.
                    let out: [&mut [f32]; MR] = std::array::from_fn(|r| unsafe {
                        if r < rows { c.get((i + r) * n + j..(i + r) * n + j + cols) } else { c.get(0..0) }
                    });
                    tile(a, b, out, rows, cols, accumulate || k0 > 0);
                }
            }
        });
    }
}

/// Room for packed operands, kept by the thread between calls. It is not part of a context's memory: its size is a
/// few operands, and a forecast runs no products.
pub(crate) struct Scratch {
    data: Vec<f32>,
    len: usize,
}

thread_local! {
    static KEPT: std::cell::Cell<Vec<f32>> = const { std::cell::Cell::new(Vec::new()) };
}

impl Scratch {
    pub(crate) fn new(len: usize) -> Scratch {
        let mut data = KEPT.take();
        if data.len() < len {
            data.resize(len, 0.0);
        }
        Scratch { data, len }
    }
}

impl std::ops::Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data[..self.len]
    }
}

impl std::ops::DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        KEPT.set(std::mem::take(&mut self.data));
    }
}

/// Packs rows i0..i0+W (beyond `limit`: zeros) of a matrix with element (i, l) at i * strides.0 + l * strides.1,
/// l from k0, into out[l][W].
pub(crate) fn pack<const W: usize>(
    src: &[f32], (si, sl): (usize, usize), i0: usize, limit: usize, k0: usize, kc: usize, out: &mut [f32],
) {
    let w = W.min(limit - i0);
    if sl == 1 {
        if w < W {
            out.fill(0.0);
        }
        let mut rows = [&src[..0]; W];
        for (r, row) in rows.iter_mut().enumerate().take(w) {
            *row = &src[(i0 + r) * si + k0..][..kc];
        }
        if w == W {
            for (l, o) in out.chunks_exact_mut(W).enumerate() {
                for r in 0..W {
                    o[r] = rows[r][l];
                }
            }
        } else {
            for (l, o) in out.chunks_exact_mut(W).enumerate() {
                for r in 0..w {
                    o[r] = rows[r][l];
                }
            }
        }
    } else {
        for (l, o) in out.as_chunks_mut::<W>().0.iter_mut().enumerate() {
            let s = &src[(k0 + l) * sl + i0..][..w];
            match s.first_chunk::<W>() {
                Some(s) => *o = *s,
                None => {
                    o[..w].copy_from_slice(s);
                    o[w..].fill(0.0);
                }
            }
        }
    }
}

/// c = a b, or c += a b if `accumulate`, for one tile: a [kc][MR], b [kc][NR], c `rows` slices of `cols`.
pub(crate) fn tile(a: &[f32], b: &[f32], mut c: [&mut [f32]; MR], rows: usize, cols: usize, accumulate: bool) {
    if rows == MR && cols == NR {
        return chain(a, b, &mut c, accumulate);
    }
    let mut edge = [[0f32; NR]; MR];
    if accumulate {
        edge.iter_mut().zip(&c).take(rows).for_each(|(e, c)| e[..cols].copy_from_slice(c));
    }
    chain(a, b, &mut edge.each_mut().map(|e| &mut e[..]), true);
    c.iter_mut().zip(&edge).take(rows).for_each(|(c, e)| c.copy_from_slice(&e[..cols]));
}

/// [`tile`] for a whole tile: every row of c has 16 elements.
fn chain(a: &[f32], b: &[f32], c: &mut [&mut [f32]; MR], accumulate: bool) {
    let kc = a.len() / MR;
    assert!(b.len() == kc * NR && c.iter().all(|c| c.len() == NR));
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        // SAFETY: the features are there and the lengths are as asserted.
        return unsafe { chain_avx2(a, b, c, accumulate) };
    }
    if !accumulate {
        c.iter_mut().for_each(|c| c.fill(0.0));
    }
    for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
        for (a, c) in a.iter().zip(c.iter_mut()) {
            c.iter_mut().zip(b).for_each(|(c, b)| *c = a.mul_add(*b, *c));
        }
    }
}

/// # Safety
/// AVX2 and FMA are there; a is [kc][MR], b [kc][NR], and each row of c has NR elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn chain_avx2(a: &[f32], b: &[f32], c: &mut [&mut [f32]; MR], accumulate: bool) {
    use std::arch::x86_64::*;
    // SAFETY: all loads and stores are inside a, b and the rows of c.
    unsafe {
        let mut s = [[_mm256_setzero_ps(); 2]; MR];
        if accumulate {
            for (s, c) in s.iter_mut().zip(c.iter()) {
                *s = [_mm256_loadu_ps(c.as_ptr()), _mm256_loadu_ps(c.as_ptr().add(8))];
            }
        }
        let (mut pa, mut pb) = (a.as_ptr(), b.as_ptr());
        for _ in 0..a.len() / MR {
            let b0 = _mm256_loadu_ps(pb);
            let b1 = _mm256_loadu_ps(pb.add(8));
            for (r, s) in s.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*pa.add(r));
                s[0] = _mm256_fmadd_ps(x, b0, s[0]);
                s[1] = _mm256_fmadd_ps(x, b1, s[1]);
            }
            pa = pa.add(MR);
            pb = pb.add(NR);
        }
        for (s, c) in s.iter().zip(c.iter_mut()) {
            _mm256_storeu_ps(c.as_mut_ptr(), s[0]);
            _mm256_storeu_ps(c.as_mut_ptr().add(8), s[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_chain_per_element_whatever_the_shape_and_threads() {
        let value = |i: usize| ((i * 7919 % 1009) as f32 - 504.0) / 300.0;
        let sizes = [(1, 1, 1), (7, 17, 3), (6, 16, 256), (13, 50, 700), (150, 33, 5), (0, 4, 4), (4, 0, 4), (3, 5, 0)];
        for (m, n, k) in sizes {
            for (ta, tb) in [(Trans::N, Trans::N), (Trans::N, Trans::T), (Trans::T, Trans::N), (Trans::T, Trans::T)] {
                let a: Vec<f32> = (0..m * k).map(value).collect();
                let b: Vec<f32> = (0..n * k).map(|i| value(i + 5)).collect();
                for accumulate in [false, true] {
                    let start: Vec<f32> = (0..m * n).map(|i| value(i + 9)).collect();
                    let mut want = start.clone();
                    for i in 0..m {
                        for j in 0..n {
                            let mut s = if accumulate { want[i * n + j] } else { 0.0 };
                            for l in 0..k {
                                let x = if ta == Trans::N { a[i * k + l] } else { a[l * m + i] };
                                let y = if tb == Trans::N { b[l * n + j] } else { b[j * k + l] };
                                s = x.mul_add(y, s);
                            }
                            want[i * n + j] = s;
                        }
                    }
                    for threads in [1, 2, 3] {
                        let mut c = start.clone();
                        gemm(&Context::cpu(threads), ta, tb, m, n, k, &a, &b, accumulate, &mut c);
                        assert!(c == want, "{m} x {n} x {k} {ta:?}{tb:?} {threads} threads");
                    }
                }
            }
        }
    }
}
