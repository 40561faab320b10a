//! f32 matrix products.

use crate::Context;

/// How an operand is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trans {
    /// As in the formula.
    N,
    /// Transposed.
    T,
}

/// `c = op(a) op(b)` or, with `accumulate`, `c += op(a) op(b)`.
///
/// op(a) is [m, k], op(b) is [k, n], c is [m, n], all row-major and dense; `Trans::T` says that the operand is
/// stored transposed ([k, m] or [n, k]). Each element of c is one chain of fused multiply-adds over k in order, so
/// that its value depends neither on m and n nor on the number of threads.
pub fn gemm(
    _ctx: &Context, ta: Trans, tb: Trans, m: usize, n: usize, k: usize, a: &[f32], b: &[f32], accumulate: bool,
    c: &mut [f32],
) {
    assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
    for i in 0..m {
        for j in 0..n {
            let mut s = if accumulate { c[i * n + j] } else { 0.0 };
            for l in 0..k {
                let x = if ta == Trans::N { a[i * k + l] } else { a[l * m + i] };
                let y = if tb == Trans::N { b[l * n + j] } else { b[j * k + l] };
                s = x.mul_add(y, s);
            }
            c[i * n + j] = s;
        }
    }
}
