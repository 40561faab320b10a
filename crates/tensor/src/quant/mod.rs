//! Weights of 8, 5 or 4 bits (`codes.rs`), multiplied in integers.
//!
//! Activations are rounded to 8 bits by the same groups, each row by itself. Sums over a
//! group are exact integers, and groups are added in order by fused multiply-adds, so that an element of a product is the same to the bit
//! on every path and for every number of rows.

mod dot;
#[cfg(target_arch = "aarch64")]
mod neon;
mod rows;

use crate::codes::{Code, VALUES};
use crate::pages::Lines;
use crate::{Context, DisjointMut};
use dot::{Panel, dot};
use half::f16;
use rows::Rows;

const NR: usize = crate::gemm::NR;
/// Inputs of which the weights of a panel stay in the first-level cache while all rows pass, whole groups.
const BLOCK: usize = 512;
/// Panels of one task.
const TASK: usize = 8;

impl Code {
    /// Bytes of the codes of a group of a panel.
    const fn bytes(self) -> usize {
        NR * self.group() * self.bits() / 8
    }
}

/// A matrix [n, k] of coded weights in panels of 16 outputs as [`Panel`] says, padded with zeros.
pub(crate) struct Quantised {
    code: Code,
    n: usize,
    k: usize,
    groups: usize,
    /// [n / 16][groups], from a line of the cache on: codes of 8 bits of four inputs are one.
    codes: Lines<u8>,
    /// [n / 16][groups][16].
    scales: Lines<f16>,
}

impl Quantised {
    /// Codes a matrix; `read(output, row)` gives the weights of an output. It is called from several threads.
    pub fn new(ctx: &Context, code: Code, n: usize, k: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Quantised {
        Quantised::from_codes(ctx, code, n, k, |output, codes, scales| {
            let mut row = vec![0.0; k];
            read(output, &mut row);
            code.encode(&row, codes, scales);
        })
    }

    /// A matrix coded already: `read(output, codes, scales)` gives those of an output as [`Code::encode`] does. It is called from several threads.
    pub fn from_codes(
        ctx: &Context, code: Code, n: usize, k: usize, read: impl Fn(usize, &mut [u8], &mut [f16]) + Sync,
    ) -> Quantised {
        let (groups, panels) = (k.div_ceil(code.group()), n.div_ceil(NR));
        let mut codes = ctx.pages().zeros(panels * groups * code.bytes());
        let mut scales = ctx.pages().zeros(panels * groups * NR);
        let (all, of) = (DisjointMut::new(&mut codes), DisjointMut::new(&mut scales));
        ctx.threads().run(panels, |p| {
            let here = p * groups..(p + 1) * groups;
            // SAFETY: each panel is filled by one task.
            let (codes, scales) = unsafe {
                (all.get(here.start * code.bytes()..here.end * code.bytes()), of.get(here.start * NR..here.end * NR))
            };
            let (bytes, outputs) = (code.bytes_of(k), NR.min(n - p * NR));
            let (mut rows, mut of_rows) = (vec![0; NR * bytes], vec![f16::ZERO; NR * groups]);
            for (i, (row, of_row)) in
                rows.chunks_mut(bytes.max(1)).zip(of_rows.chunks_mut(groups.max(1))).take(outputs).enumerate()
            {
                read(p * NR + i, row, of_row);
            }
            // Group by group, so that what is written stays in the first-level cache.
            let group = code.bytes_of(code.group());
            for (g, to) in codes.chunks_exact_mut(code.bytes()).enumerate() {
                for i in 0..outputs {
                    place(code, to, i, &rows[i * bytes..][..bytes][g * group..bytes.min((g + 1) * group)]);
                    scales[g * NR + i] = of_rows[i * groups + g];
                }
            }
        });
        Quantised { code, n, k, groups, codes, scales }
    }

    pub fn code(&self) -> Code {
        self.code
    }

    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    pub fn bytes(&self) -> usize {
        self.codes().len() + 2 * self.scales.len()
    }

    /// Of panel `p` so many groups from the first one on.
    fn some(&self, p: usize, first: usize, groups: usize) -> Panel<'_> {
        let at = p * self.groups + first..p * self.groups + first + groups;
        Panel {
            codes: &self.codes()[at.start * self.code.bytes()..at.end * self.code.bytes()],
            scales: &self.scales[at.start * NR..at.end * NR],
            code: self.code,
            group: self.code.group(),
        }
    }

    /// The weights of output `i`.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        let panel = self.some(i / NR, 0, self.groups);
        let codes = panel.codes.chunks_exact(self.code.bytes());
        for ((out, codes), scales) in out.chunks_mut(self.code.group()).zip(codes).zip(panel.scales.chunks_exact(NR)) {
            let scale = scales[i % NR].to_f32();
            out.iter_mut().enumerate().for_each(|(j, o)| *o = f32::from(value(self.code, codes, i % NR, j)) * scale);
        }
    }

    /// `y = x w^T`: x [m, k], y [m, n].
    pub fn matmul(&self, ctx: &Context, x: &[f32], y: &mut [f32]) {
        let x = Rows::new(ctx, self.code, self.k, dot::most_rows(), x);
        let panels = self.n.div_ceil(NR);
        let task = TASK.min(panels.div_ceil(2 * ctx.threads().len())).max(1);
        let y = DisjointMut::new(y);
        ctx.threads().run(panels.div_ceil(task), |t| {
            let mut acc = vec![[0.0; NR]; x.count()];
            for p in t * task..panels.min((t + 1) * task) {
                self.panel(p, &x, &mut acc);
                let cols = NR.min(self.n - p * NR);
                for (r, acc) in acc.iter().enumerate() {
                    let at = r * self.n + p * NR;
                    // SAFETY: this task alone writes these columns.
                    unsafe { y.get(at..at + cols) }.copy_from_slice(&acc[..cols]);
                }
            }
        });
    }

    /// The products of all rows with a panel.
    fn panel(&self, p: usize, x: &Rows, acc: &mut [[f32; NR]]) {
        acc.fill([0.0; NR]);
        if x.count() <= x.most() {
            return dot(self.some(p, 0, self.groups), x.tile(0, 0, self.groups), acc);
        }
        let at_once = BLOCK / self.code.group();
        // Codes of fewer bits are looked up once for all rows.
        let mut wide = [0; BLOCK * NR];
        for first in (0..self.groups).step_by(at_once) {
            let groups = at_once.min(self.groups - first);
            let mut panel = self.some(p, first, groups);
            if panel.code != Code::Int8 {
                let wide = &mut wide[..groups * panel.group * NR];
                dot::widen(panel.code, panel.codes, wide);
                panel = Panel { codes: wide, code: Code::Int8, ..panel };
            }
            for (t, acc) in acc.chunks_mut(x.most()).enumerate() {
                dot(panel, x.tile(t, first, groups), acc);
            }
        }
    }
}

/// What the code of output `i` and input `j` of a group stands for.
fn value(code: Code, codes: &[u8], i: usize, j: usize) -> i8 {
    match code {
        Code::Int8 => codes[j / 4 * 4 * NR + 4 * i + j % 4] as i8,
        Code::Q4 => VALUES[usize::from(low_bits(codes, i, j))],
        Code::Q5 => {
            let high = codes[dot::HIGH + j / 4 * 8 + i / 2] >> (i % 2 * 4 + j % 4) & 1;
            (low_bits(codes, i, j) | high << 4) as i8 - 16
        }
    }
}

fn low_bits(codes: &[u8], i: usize, j: usize) -> u8 {
    codes[j / 4 * 2 * NR + i % 8 * 4 + j % 4] >> (i / 8 * 4) & 15
}

/// Puts the codes of a group of output `i` where a panel has them.
fn place(code: Code, codes: &mut [u8], i: usize, from: &[u8]) {
    match code {
        Code::Int8 => from.chunks(4).zip(codes.chunks_exact_mut(4 * NR)).for_each(|(from, codes)| {
            codes[4 * i..4 * i + from.len()].copy_from_slice(from);
        }),
        Code::Q4 | Code::Q5 => {
            let (low, high) = from.split_at(from.len().min(16));
            for (from, codes) in low.chunks(2).zip(codes.chunks_exact_mut(2 * NR)) {
                for (j, byte) in from.iter().enumerate() {
                    let at = i % 8 * 4 + 2 * j;
                    codes[at] |= (byte & 15) << (i / 8 * 4);
                    codes[at + 1] |= (byte >> 4) << (i / 8 * 4);
                }
            }
            for (q, byte) in high.iter().flat_map(|byte| [byte & 15, byte >> 4]).enumerate() {
                codes[dot::HIGH + q * 8 + i / 2] |= byte << (i % 2 * 4);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    /// Numbers with a bell-shaped frequency.
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = (seed << 1 | 1).wrapping_mul(0x9e3779b97f4a7c15);
        let mut unit = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| unit() + unit() + unit() + unit()).collect()
    }

    fn weights(q: &Quantised) -> Vec<f32> {
        let mut w = vec![0.0; q.n * q.k];
        w.chunks_mut(q.k).enumerate().for_each(|(i, row)| q.row(i, row));
        w
    }

    fn coded(ctx: &Context, code: Code, n: usize, k: usize, w: &[f32]) -> Quantised {
        Quantised::new(ctx, code, n, k, |i, row| row.copy_from_slice(&w[i * k..(i + 1) * k]))
    }

    fn error(a: &[f32], b: &[f32]) -> f64 {
        let sum = |f: &dyn Fn((&f32, &f32)) -> f64| a.iter().zip(b).map(f).sum::<f64>();
        (sum(&|(a, b)| f64::from(a - b).powi(2)) / sum(&|(_, b)| f64::from(*b).powi(2))).sqrt()
    }

    #[test]
    fn rounding_is_as_fine_as_its_bits_allow() {
        let ctx = Context::cpu(2);
        let (n, k) = (64, 768);
        let w = noise(n * k, 1);
        // Q4_K, with as many bits, is at 0.078 if scales are not searched and cannot be below 0.070.
        for (code, most) in [(Code::Int8, 0.0065), (Code::Q5, 0.04), (Code::Q4, 0.072)] {
            let q = coded(&ctx, code, n, k, &w);
            assert!(error(&weights(&q), &w) < most, "{code:?}: {}", error(&weights(&q), &w));
        }
        // Weights that were coded already stay as they are.
        let q = coded(&ctx, Code::Int8, n, k, &w);
        assert!(weights(&coded(&ctx, Code::Int8, n, k, &weights(&q))) == weights(&q));
    }

    #[test]
    fn every_path_gives_the_same_bits() {
        for (seed, (n, k)) in
            [(1, 1), (16, 64), (17, 65), (40, 300), (3, 31), (130, 96), (33, 1000)].into_iter().enumerate()
        {
            let (w, x) = (noise(n * k, seed as u64), noise(40 * k, 100 + seed as u64));
            for code in Code::ALL {
                let q = coded(&Context::cpu(3), code, n, k, &w);
                // Plainly, from the codes.
                let group = code.group();
                let mut want = vec![0f32; 40 * n];
                for (i, want) in want.iter_mut().enumerate() {
                    let (row, o) = (&x[i / n * k..][..k], i % n);
                    for (g, x) in row.chunks(group).enumerate() {
                        let panel = q.some(o / NR, g, 1);
                        let largest = x.iter().fold(0f32, |l, v| l.max(v.abs()));
                        let rounded = |v: f32| (v * (127.0 / largest)).round_ties_even() as i32;
                        let product =
                            |(j, v): (usize, &f32)| i32::from(value(code, panel.codes, o % NR, j)) * rounded(*v);
                        let sum: i32 = x.iter().enumerate().map(product).sum();
                        let scale = panel.scales[o % NR].to_f32() * (largest / 127.0);
                        *want = (sum as f32).mul_add(scale, *want);
                    }
                }
                for threads in [1, 3] {
                    for m in [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 25, 40] {
                        let mut y = vec![1.0; m * n];
                        q.matmul(&Context::cpu(threads), &x[..m * k], &mut y);
                        assert!(y == want[..m * n], "{code:?} {m} x {n} x {k}, {threads} threads");
                    }
                }
                // As exact as activations of 8 bits are.
                let exact = weights(&q);
                let exact: Vec<f32> = (0..40 * n)
                    .map(|i| {
                        (0..k).map(|j| f64::from(x[i / n * k + j]) * f64::from(exact[i % n * k + j])).sum::<f64>()
                            as f32
                    })
                    .collect();
                assert!(error(&want, &exact) < 0.01, "{code:?} {n} x {k}: {}", error(&want, &exact));
            }
        }
    }

    /// Hands `same` the kernels of 256 bits that this machine has, whichever of all is chosen.
    #[cfg(target_arch = "x86_64")]
    macro_rules! each_of_256_bits {
        ($rows:literal, $sparse:literal, $code:expr, $panel:expr, $tile:expr, $same:expr) => {
            each_of_256_bits!(@ avx2, has_avx2, $rows, $sparse, $code, $panel, $tile, $same);
            each_of_256_bits!(@ avx_vnni, has_avx_vnni, $rows, $sparse, $code, $panel, $tile, $same);
        };
        (@ $kernel:ident, $has:ident, $rows:literal, $sparse:literal, $code:expr, $panel:expr, $tile:expr, $same:expr) => {
            if crate::simd::$has() {
                let kernel = |acc: &mut [[f32; NR]]| {
                    // SAFETY: the features are there, and so are as many rows.
                    unsafe {
                        match $code {
                            Code::Int8 => dot::x86::$kernel::<$rows, 8, $sparse>($panel, $tile, acc),
                            Code::Q4 => dot::x86::$kernel::<$rows, 4, $sparse>($panel, $tile, acc),
                            Code::Q5 => dot::x86::$kernel::<$rows, 5, $sparse>($panel, $tile, acc),
                        }
                    }
                };
                $same(&kernel, stringify!($kernel));
            }
        };
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for (code, m) in Code::ALL.into_iter().flat_map(|c| (1..=12).map(move |m| (c, m))) {
            let k = 3 * code.group() - 5;
            let (ctx, w, x) = (Context::cpu(1), noise(NR * k, 5), noise(m * k, 6));
            let q = coded(&ctx, code, NR, k, &w);
            let rows = Rows::new(&ctx, code, k, 12, &x);
            let (panel, tile) = (q.some(0, 0, 3), rows.tile(0, 0, 3));
            let mut want = vec![[0.5; NR]; m];
            dot::scalar(panel, tile, &mut want);
            assert!(want.iter().flatten().all(|v| v.is_finite() && *v != 0.5));
            let same = |kernel: &dyn Fn(&mut [[f32; NR]]), name: &str| {
                let mut got = vec![[0.5; NR]; m];
                kernel(&mut got);
                assert!(got == want, "{code:?}, {m} rows, {name}");
            };
            same(&|acc| dot(panel, tile, acc), "chosen");
            if code != Code::Int8 {
                let mut wide = [vec![0; 3 * code.group() * NR], vec![0; 3 * code.group() * NR]];
                dot::widen(code, panel.codes, &mut wide[0]);
                dot::widen_scalar(code, panel.codes, &mut wide[1]);
                assert!(wide[0] == wide[1]);
                same(&|acc| dot::scalar(Panel { codes: &wide[0], code: Code::Int8, ..panel }, tile, acc), "widened");
            }
            #[cfg(target_arch = "x86_64")]
            if m == 6 {
                each_of_256_bits!(6, false, code, panel, tile, same);
            }
        }
    }

    #[test]
    fn weights_of_zeros_are_not_read() {
        for code in Code::ALL {
            let k = 5 * code.group() + 7;
            let (ctx, w, mut x) = (Context::cpu(1), noise(20 * k, 5), noise(k, 6));
            x.iter_mut().enumerate().filter(|(j, _)| j % 71 != 0 || j / code.group() == 2).for_each(|(_, v)| *v = 0.0);
            let q = coded(&ctx, code, 20, k, &w);
            let rows = Rows::new(&ctx, code, k, 12, &x);
            let (panel, tile) = (q.some(0, 0, 6), rows.tile(0, 0, 6));
            let live = tile.live.unwrap();
            let count: Vec<usize> = (0..live.groups()).map(|g| live.of(g).count()).collect();
            assert!(count.len() == 6 && count[2] == 0 && count[0] > 0);
            assert!(count.iter().sum::<usize>() < code.group() / 8);
            let mut want = [[0.5; NR]];
            dot::scalar(panel, tile, &mut want);
            let same = |kernel: &dyn Fn(&mut [[f32; NR]]), name: &str| {
                let mut got = [[0.5; NR]];
                kernel(&mut got);
                assert!(got == want, "{code:?}, {name}");
            };
            same(&|acc| dot(panel, tile, acc), "chosen");
            #[cfg(target_arch = "x86_64")]
            each_of_256_bits!(1, true, code, panel, tile, same);
            x.fill(1.0);
            assert!(Rows::new(&ctx, code, k, 12, &x).tile(0, 0, 6).live.is_none());
        }
    }

    #[test]
    fn extreme_weights_and_activations() {
        let ctx = Context::cpu(1);
        for code in Code::ALL {
            for w in [0.0, 1e-12, 6e4, -3e7] {
                let q = coded(&ctx, code, 1, 64, &[w; 64]);
                assert!(weights(&q).iter().all(|v| v.is_finite() && (v - w).abs() <= w.abs()), "{code:?} {w}");
            }
            let q = coded(&ctx, code, 1, 64, &[1.0; 64]);
            for (x, want) in [(0.0, 0.0), (1e-38, 0.0), (1e30, 64e30), (-2.0, -128.0)] {
                let mut y = [1.0];
                q.matmul(&ctx, &[x; 64], &mut y);
                assert!((y[0] - want).abs() <= want.abs() * 0.01, "{code:?} {x}: {}", y[0]);
            }
            for bad in [f32::NAN, f32::INFINITY] {
                let (mut x, mut y) = ([1.0; 64], [1.0]);
                x[40] = bad;
                q.matmul(&ctx, &x, &mut y);
                assert!(y[0].is_nan());
            }
        }
    }
}
