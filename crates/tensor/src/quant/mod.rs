//! Weights of 8 or 4 bits (`codes.rs`), multiplied in integers.
//!
//! Activations are rounded to 8 bits by the same groups, each row by itself. Sums over a
//! group are exact integers, and groups are added in order by fused multiply-adds, so that an element of a product is the same to the bit
//! on every path and for every number of rows.

mod dot;
#[cfg(target_arch = "aarch64")]
mod neon;
mod rows;

use crate::codes::{Code, VALUES};
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
    fn panel(self, blocks: &[u8]) -> Panel<'_> {
        Panel { blocks, nibbles: self == Code::Q4, group: self.group() }
    }

    /// Bytes of a group of a panel.
    const fn bytes(self) -> usize {
        Panel::bytes(matches!(self, Code::Q4), self.group())
    }
}

/// A matrix [n, k] of coded weights in panels of 16 outputs, [n / 16][k / group] as [`Panel`] says, padded with zeros.
pub(crate) struct Quantised {
    code: Code,
    n: usize,
    k: usize,
    groups: usize,
    blocks: Vec<u8>,
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
        let mut blocks = vec![0; panels * groups * code.bytes()];
        let shared = DisjointMut::new(&mut blocks);
        let size = groups * code.bytes();
        ctx.threads().run(panels, |p| {
            // SAFETY: each panel is filled by one task.
            let panel = unsafe { shared.get(p * size..(p + 1) * size) };
            let (mut codes, mut scales) = (vec![0; code.bytes_of(k)], vec![f16::ZERO; groups]);
            for i in 0..NR.min(n - p * NR) {
                read(p * NR + i, &mut codes, &mut scales);
                let of = codes.chunks(code.bytes_of(code.group())).zip(&scales);
                panel.chunks_exact_mut(code.bytes()).zip(of).for_each(|(b, (c, s))| place(code, b, i, c, *s));
            }
        });
        Quantised { code, n, k, groups, blocks }
    }

    pub fn code(&self) -> Code {
        self.code
    }

    /// Its bytes.
    pub fn data(&self) -> &[u8] {
        &self.blocks
    }

    /// The weights of output `i`.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        let (size, group) = (self.code.bytes(), self.code.group());
        let panel = &self.blocks[i / NR * self.groups * size..][..self.groups * size];
        for (out, block) in out.chunks_mut(group).zip(panel.chunks_exact(size)) {
            let scale = scale(block, i % NR);
            out.iter_mut().enumerate().for_each(|(j, o)| *o = f32::from(value(self.code, block, i % NR, j)) * scale);
        }
    }

    /// `y = x w^T`: x [m, k], y [m, n].
    pub fn matmul(&self, ctx: &Context, x: &[f32], y: &mut [f32]) {
        let x = Rows::new(ctx, self.code.group(), self.k, dot::most_rows(), x);
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
        let (size, group) = (self.code.bytes(), self.code.group());
        let panel = &self.blocks[p * self.groups * size..][..self.groups * size];
        acc.fill([0.0; NR]);
        if x.count() <= x.most() {
            return dot(self.code.panel(panel), x.tile(0, 0, self.groups), acc);
        }
        let at_once = BLOCK / group;
        // Codes of 4 bits are looked up once for all rows.
        let mut wide = [0; BLOCK / 32 * Panel::bytes(false, 32)];
        for (i, blocks) in panel.chunks(at_once * size).enumerate() {
            let mut here = self.code.panel(blocks);
            let groups = here.groups();
            if here.nibbles {
                let wide = &mut wide[..groups * Panel::bytes(false, group)];
                here.widen(wide);
                here = Panel { blocks: wide, nibbles: false, group };
            }
            for (t, acc) in acc.chunks_mut(x.most()).enumerate() {
                dot(here, x.tile(t, i * at_once, groups), acc);
            }
        }
    }
}

/// What the code of output `i` and input `j` of a group stands for.
fn value(code: Code, block: &[u8], i: usize, j: usize) -> i8 {
    let codes = &block[2 * NR..];
    match code {
        Code::Int8 => codes[j / 4 * 4 * NR + 4 * i + j % 4] as i8,
        Code::Q4 => VALUES[usize::from(codes[j / 4 * 2 * NR + i % 8 * 4 + j % 4] >> (i / 8 * 4) & 15)],
    }
}

fn scale(block: &[u8], output: usize) -> f32 {
    f16::from_le_bytes([block[2 * output], block[2 * output + 1]]).to_f32()
}

/// Puts the codes and the scale of a group of output `i` where a panel has them.
fn place(code: Code, block: &mut [u8], i: usize, from: &[u8], scale: f16) {
    let (scales, codes) = block.split_at_mut(2 * NR);
    scales[2 * i..2 * i + 2].copy_from_slice(&scale.to_le_bytes());
    match code {
        Code::Int8 => from.chunks(4).zip(codes.chunks_exact_mut(4 * NR)).for_each(|(from, codes)| {
            codes[4 * i..4 * i + from.len()].copy_from_slice(from);
        }),
        Code::Q4 => from.chunks(2).zip(codes.chunks_exact_mut(2 * NR)).for_each(|(from, codes)| {
            let halves = from.iter().flat_map(|b| [b & 15, b >> 4]);
            codes[i % 8 * 4..].iter_mut().zip(halves).for_each(|(to, code)| *to |= code << (i / 8 * 4));
        }),
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
        for (code, most) in [(Code::Int8, 0.0065), (Code::Q4, 0.075)] {
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
            for code in [Code::Int8, Code::Q4] {
                let q = coded(&Context::cpu(3), code, n, k, &w);
                // Plainly, from the codes.
                let group = code.group();
                let mut want = vec![0f32; 40 * n];
                for (i, want) in want.iter_mut().enumerate() {
                    let (row, o) = (&x[i / n * k..][..k], i % n);
                    for (g, x) in row.chunks(group).enumerate() {
                        let block = &q.blocks[(o / NR * q.groups + g) * code.bytes()..][..code.bytes()];
                        let largest = x.iter().fold(0f32, |l, v| l.max(v.abs()));
                        let rounded = |v: f32| (v * (127.0 / largest)).round_ties_even() as i32;
                        let product = |(j, v): (usize, &f32)| i32::from(value(code, block, o % NR, j)) * rounded(*v);
                        let sum: i32 = x.iter().enumerate().map(product).sum();
                        *want = (sum as f32).mul_add(scale(block, o % NR) * (largest / 127.0), *want);
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

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for (code, m) in [Code::Int8, Code::Q4].into_iter().flat_map(|c| (1..=12).map(move |m| (c, m))) {
            let k = 3 * code.group() - 5;
            let (ctx, w, x) = (Context::cpu(1), noise(NR * k, 5), noise(m * k, 6));
            let q = coded(&ctx, code, NR, k, &w);
            let rows = Rows::new(&ctx, code.group(), k, 12, &x);
            let (panel, tile) = (code.panel(&q.blocks), rows.tile(0, 0, 3));
            let mut want = vec![[0.5; NR]; m];
            dot::scalar(panel, tile, &mut want);
            assert!(want.iter().flatten().all(|v| v.is_finite() && *v != 0.5));
            let same = |kernel: &dyn Fn(&mut [[f32; NR]]), name: &str| {
                let mut got = vec![[0.5; NR]; m];
                kernel(&mut got);
                assert!(got == want, "{code:?}, {m} rows, {name}");
            };
            same(&|acc| dot(panel, tile, acc), "chosen");
            let mut wide = vec![0; 3 * Panel::bytes(false, code.group())];
            if code == Code::Q4 {
                panel.widen(&mut wide);
                let panel = Panel { blocks: &wide, nibbles: false, group: 32 };
                same(&|acc| dot::scalar(panel, tile, acc), "widened");
                let mut plain = vec![0; NR * 32];
                dot::widen_scalar(&q.blocks[2 * NR..code.bytes()], &mut plain);
                assert!(plain == wide[2 * NR..][..NR * 32]);
            }
            #[cfg(target_arch = "x86_64")]
            if m == 6 && crate::simd::has_avx2() {
                let avx2 = |acc: &mut [[f32; NR]]| {
                    // SAFETY: the features are there; there are six rows.
                    unsafe {
                        match code {
                            Code::Int8 => dot::x86::avx2::<6, false>(panel, tile, acc),
                            Code::Q4 => dot::x86::avx2::<6, true>(panel, tile, acc),
                        }
                    }
                };
                same(&avx2, "AVX2");
            }
        }
    }

    #[test]
    fn extreme_weights_and_activations() {
        let ctx = Context::cpu(1);
        for code in [Code::Int8, Code::Q4] {
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
