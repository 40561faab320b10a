//! The backward pass over a chunk of sixteen tokens as matrix products (formulas in the parent module).

use super::{BOUND, Head, decay, lane};
use anser_tensor::math;

/// Tokens of a chunk.
pub(super) const L: usize = 16;

/// Rows of a chunk, [token][channel].
type Rows<const N: usize> = [[f32; N]; L];
/// Two of them, one after the other.
type Pair<const N: usize> = [[f32; N]; 2 * L];
/// Sums over channels between the tokens of a pair and those of a chunk, [token][token].
type Cross = [[f32; L]; 2 * L];

/// `c = a b`, or `c += a b`: c [m, n] and b [k, n] row-major, element (i, l) of a at `a[i * rows + l * cols]`. m is a multiple
/// of 4, n of 16.
#[inline(always)]
fn product(
    (m, n, k): (usize, usize, usize), a: &[f32], (rows, cols): (usize, usize), b: &[f32], c: &mut [f32], add: bool,
) {
    assert!(m % 4 == 0 && n % 16 == 0 && k > 0);
    assert!((m - 1) * rows + (k - 1) * cols < a.len() && k * n <= b.len() && m * n <= c.len());
    for i in (0..m).step_by(4) {
        for j in (0..n).step_by(16) {
            let mut acc = [[0f32; 16]; 4];
            for l in 0..k {
                // SAFETY: l < k and j + 16 <= n, so the row is inside b's k * n elements.
                let b = unsafe { &*b.as_ptr().add(l * n + j).cast::<[f32; 16]>() };
                for (q, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: i + q < m and l < k: within the bound asserted above.
                    let a = unsafe { *a.get_unchecked((i + q) * rows + l * cols) };
                    for x in 0..16 {
                        acc[x] = a.mul_add(b[x], acc[x]);
                    }
                }
            }
            for (q, acc) in acc.iter().enumerate() {
                let c = &mut c[(i + q) * n + j..][..16];
                for x in 0..16 {
                    c[x] = if add { c[x] + acc[x] } else { acc[x] };
                }
            }
        }
    }
}

/// [tokens][channels] to [channels][tokens].
#[inline(always)]
fn transposed<const N: usize>(x: &[[f32; N]], to: &mut [[f32; L]; N]) {
    for j in 0..N {
        for t in 0..L {
            to[j][t] = x[t][j];
        }
    }
}

/// Keeps pairs (t, s) with s <= t in the first half (receptance) and s < t in the second (removal).
#[inline(always)]
fn mask(m: &mut Cross) {
    for t in 0..L {
        m[t][t + 1..].fill(0.0);
        m[L + t][t..].fill(0.0);
    }
}

/// What a head needs to go back through its chunks.
pub(super) struct Workspace<const N: usize> {
    /// Gradient of the state after the chunk, [value][key]; before it when the chunk is done.
    pub(super) d: [[f32; N]; N],
    /// State before the chunk, [value][key].
    pub(super) s: [[f32; N]; N],
    /// `d` transposed.
    dt: [[f32; N]; N],
    /// Decay products: after each token of the chunk, before it, and the inverse of the first.
    p: Rows<N>,
    p_before: Rows<N>,
    p_inverse: Rows<N>,
    /// R~ and A~, K~, B~.
    ra: Pair<N>,
    k: Rows<N>,
    b: Rows<N>,
    /// B^ and K^, and their products with `dt`.
    bk: Pair<N>,
    bk_d: Pair<N>,
    /// dY and Z, and their products with `s`.
    yz: Pair<N>,
    yz_s: Pair<N>,
    /// V and U, and their products with `d`.
    vu: Pair<N>,
    vu_d: Pair<N>,
    /// Transposed rows.
    t: [[f32; L]; N],
    m_k: Cross,
    m_b: Cross,
    dm_k: Cross,
    dm_b: Cross,
    /// Sums over pairs of tokens.
    e: Pair<N>,
}

impl<const N: usize> Workspace<N> {
    /// Zeros, on the heap.
    pub(super) fn new() -> Box<Workspace<N>> {
        let (square, rows, pair, cross) = ([[0.0; N]; N], [[0.0; N]; L], [[0.0; N]; 2 * L], [[0.0; L]; 2 * L]);
        Box::new(Workspace {
            d: square,
            s: square,
            dt: square,
            p: rows,
            p_before: rows,
            p_inverse: rows,
            ra: pair,
            k: rows,
            b: rows,
            bk: pair,
            bk_d: pair,
            yz: pair,
            yz_s: pair,
            vu: pair,
            vu_d: pair,
            t: [[0.0; L]; N],
            m_k: cross,
            m_b: cross,
            dm_k: cross,
            dm_b: cross,
            e: pair,
        })
    }

    /// Goes back through tokens `first..first + len`: takes `d` from after them to before them and gives the gradients of
    /// r, w, k, v, a, b to `out(which, token, row)`. `u` and `dy` are laid out like the inputs.
    #[inline(always)]
    pub(super) fn back(
        &mut self, head: Head<'_>, first: usize, len: usize, u: &[f32], dy: Option<&[f32]>,
        mut out: impl FnMut(usize, usize, &[f32; N]),
    ) {
        self.load(head, first, len, u, dy);
        let Workspace { d, s, dt, ra, bk, bk_d, yz, yz_s, vu, vu_d, t, m_k, m_b, dm_k, dm_b, .. } = self;
        for i in 0..N {
            for j in 0..N {
                dt[j][i] = d[i][j];
            }
        }
        // M_rk, M_ak and M_rb, M_ab.
        transposed(&self.k, t);
        product((2 * L, L, N), ra.as_flattened(), (N, 1), t.as_flattened(), m_k.as_flattened_mut(), false);
        transposed(&self.b, t);
        product((2 * L, L, N), ra.as_flattened(), (N, 1), t.as_flattened(), m_b.as_flattened_mut(), false);
        mask(m_k);
        mask(m_b);
        // Z by backward substitution: row t needs the rows after it.
        product((2 * L, N, N), bk.as_flattened(), (N, 1), dt.as_flattened(), bk_d.as_flattened_mut(), false);
        let (y, z) = yz.split_at_mut(L);
        product((L, N, L), m_b.as_flattened(), (1, L), y.as_flattened(), z.as_flattened_mut(), false);
        for t in (0..L).rev() {
            let (z, after) = z.split_at_mut(t + 1);
            for j in 0..N {
                z[t][j] += bk_d[t][j];
            }
            for (s, after) in after.iter().enumerate() {
                let m = m_b[L + t + 1 + s][t];
                for j in 0..N {
                    z[t][j] = m.mul_add(after[j], z[t][j]);
                }
            }
        }
        // dV = M_rk^T dY + M_ak^T Z + K^ D^T.
        let dv = &mut bk_d[L..];
        product((L, N, 2 * L), m_k.as_flattened(), (1, L), yz.as_flattened(), dv.as_flattened_mut(), true);
        (0..len).for_each(|t| out(3, t, &dv[t]));
        // dM_rk, dM_ak and dM_rb, dM_ab.
        transposed(&vu[..L], t);
        product((2 * L, L, N), yz.as_flattened(), (N, 1), t.as_flattened(), dm_k.as_flattened_mut(), false);
        transposed(&vu[L..], t);
        product((2 * L, L, N), yz.as_flattened(), (N, 1), t.as_flattened(), dm_b.as_flattened_mut(), false);
        mask(dm_k);
        mask(dm_b);
        product((2 * L, N, N), yz.as_flattened(), (N, 1), s.as_flattened(), yz_s.as_flattened_mut(), false);
        product((2 * L, N, N), vu.as_flattened(), (N, 1), d.as_flattened(), vu_d.as_flattened_mut(), false);
        self.decays_and_receptances(head, first, len, &mut out);
        self.keys(len, &mut out);
        // D = D diag(P_L) + dY^T R~ + Z^T A~.
        let Workspace { d, p, ra, yz, .. } = self;
        for row in d.iter_mut() {
            for j in 0..N {
                row[j] *= p[L - 1][j];
            }
        }
        product((N, N, 2 * L), yz.as_flattened(), (1, N), ra.as_flattened(), d.as_flattened_mut(), true);
    }

    /// Reads a chunk; tokens that are not there neither decay, write nor read.
    #[inline(always)]
    fn load(&mut self, head: Head<'_>, first: usize, len: usize, u: &[f32], dy: Option<&[f32]>) {
        let (none, mut before) = ([0f32; N], [1f32; N]);
        for t in 0..L {
            let there = t < len;
            let [r, w, k, v, a, b] = if there { head.token::<N>(first + t) } else { [&none; 6] };
            let row = (first + t) * head.stride + head.offset;
            let d = if there { decay(w) } else { [1.0; N] };
            for j in 0..N {
                let p = before[j] * d[j];
                (self.p[t][j], self.p_before[t][j], self.p_inverse[t][j]) = (p, before[j], 1.0 / p);
                (self.ra[t][j], self.ra[L + t][j]) = (r[j] * p, a[j] * before[j]);
                (self.k[t][j], self.b[t][j]) = (k[j] / p, b[j] / p);
                before[j] = p;
            }
            self.vu[t] = *v;
            self.vu[L + t] = if there { *lane(&u[row..]) } else { none };
            self.yz[t] = dy.filter(|_| there).map_or(none, |dy| *lane(&dy[row..]));
        }
        for t in 0..L {
            for j in 0..N {
                (self.bk[t][j], self.bk[L + t][j]) = (self.b[t][j] * before[j], self.k[t][j] * before[j]);
            }
        }
    }

    /// dR, dA and dw. The log decay g_t gets exactly the terms whose decay interval contains t: the whole chunk (S to D), from
    /// the start (S to a reader), to the end (a writer to D), and between a writer l < t and a reader s >= t.
    #[inline(always)]
    fn decays_and_receptances(
        &mut self, head: Head<'_>, first: usize, len: usize, out: &mut impl FnMut(usize, usize, &[f32; N]),
    ) {
        let Workspace { d, s, p, p_before, ra, k, b, bk, yz_s, vu_d, dm_k, dm_b, e, .. } = self;
        let mut whole = [0f32; N];
        for (d, s) in d.iter().zip(s.iter()) {
            for j in 0..N {
                whole[j] = d[j].mul_add(s[j], whole[j]);
            }
        }
        // Readers at or after t: R~ . dY S from t on, A~ . Z S after t.
        let (mut readers, mut writers) = ([0f32; N], [0f32; N]);
        for t in 0..L {
            for j in 0..N {
                readers[j] += ra[t][j] * yz_s[t][j] + ra[L + t][j] * yz_s[L + t][j];
            }
        }
        *e = [[0.0; N]; 2 * L];
        for t in 0..len {
            let mut g = [0f32; N];
            for j in 0..N {
                // A removal reads the state before its own token's decay.
                readers[j] -= ra[L + t][j] * yz_s[L + t][j];
                g[j] = p[L - 1][j].mul_add(whole[j], writers[j]) + readers[j];
                readers[j] -= ra[t][j] * yz_s[t][j];
                writers[j] += bk[L + t][j] * vu_d[t][j] + bk[t][j] * vu_d[L + t][j];
            }
            for s in t..L {
                for j in 0..N {
                    g[j] = ra[s][j].mul_add(e[s][j], g[j]);
                }
            }
            for s in t + 1..L {
                for j in 0..N {
                    g[j] = ra[L + s][j].mul_add(e[L + s][j], g[j]);
                }
            }
            for s in t..L {
                let (mk, mb) = (dm_k[s][t], dm_b[s][t]);
                for j in 0..N {
                    e[s][j] = mk.mul_add(k[t][j], mb.mul_add(b[t][j], e[s][j]));
                }
            }
            for s in t + 1..L {
                let (mk, mb) = (dm_k[L + s][t], dm_b[L + s][t]);
                for j in 0..N {
                    e[L + s][j] = mk.mul_add(k[t][j], mb.mul_add(b[t][j], e[L + s][j]));
                }
            }
            let w = head.token::<N>(first + t)[1];
            let (mut dr, mut dw, mut da) = ([0f32; N], [0f32; N], [0f32; N]);
            for j in 0..N {
                dr[j] = p[t][j] * (e[t][j] + yz_s[t][j]);
                da[j] = p_before[t][j] * (e[L + t][j] + yz_s[L + t][j]);
                dw[j] = -BOUND * math::sigmoid(w[j]) * math::sigmoid(-w[j]) * g[j];
            }
            out(0, t, &dr);
            out(1, t, &dw);
            out(4, t, &da);
        }
    }

    /// dK and dB.
    #[inline(always)]
    fn keys(&mut self, len: usize, out: &mut impl FnMut(usize, usize, &[f32; N])) {
        let Workspace { p, p_inverse, ra, vu_d, dm_k, dm_b, .. } = self;
        for row in vu_d.iter_mut() {
            for j in 0..N {
                row[j] *= p[L - 1][j];
            }
        }
        let (k, b) = vu_d.split_at_mut(L);
        product((L, N, 2 * L), dm_k.as_flattened(), (1, L), ra.as_flattened(), k.as_flattened_mut(), true);
        product((L, N, 2 * L), dm_b.as_flattened(), (1, L), ra.as_flattened(), b.as_flattened_mut(), true);
        for (which, rows) in [(2, k), (5, b)] {
            for (t, row) in rows.iter_mut().enumerate().take(len) {
                for j in 0..N {
                    row[j] *= p_inverse[t][j];
                }
                out(which, t, row);
            }
        }
    }
}
