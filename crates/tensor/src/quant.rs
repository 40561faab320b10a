//! Weights of 8 or 4 bits (`codes.rs`), multiplied in integers.
//!
//! Activations are rounded to 8 bits by the same groups, each row by itself. Sums over a
//! group are exact integers, and groups are added in order by fused multiply-adds, so that an element of a product is the same to the bit
//! on every path and for every number of rows.

use crate::codes::{Code, VALUES};
use crate::{Context, DisjointMut};
use half::f16;

#[cfg(target_arch = "aarch64")]
mod neon;

const NR: usize = crate::gemm::NR;
const MR: usize = crate::gemm::MR;
/// Inputs whose codes are unpacked at a time.
const BLOCK: usize = 256;
/// Panels of one task.
const TASK: usize = 8;

impl Code {
    /// Bytes of a group of a panel: 16 scales in f16, then the codes.
    const fn bytes(self) -> usize {
        2 * NR
            + match self {
                Code::Int8 => NR * self.group(),
                Code::Q4 => NR * self.group() / 2,
            }
    }
}

/// A matrix [n, k] of coded weights in panels of 16 outputs, [n / 16][k / group], padded with zeros. Codes of a group lie as products take them: of 8 bits for every two
/// inputs those of 16 outputs, [group / 2][16][2]; of 4 bits for every four inputs, in the order 0, 2, 1, 3, the low halves of 32 bytes those of 8 outputs and
/// the high halves those of 8 more, [group / 4][8][4].
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
        let mut codes = [0; NR * 32];
        for (out, block) in out.chunks_mut(group).zip(panel.chunks_exact(size)) {
            let scale = scale(block, i % NR);
            // A row of an embedding has 8 bits.
            if self.code == Code::Int8 {
                for (out, pair) in out.chunks_mut(2).zip(block[2 * NR..].chunks_exact(2 * NR)) {
                    out.iter_mut().zip(&pair[2 * (i % NR)..]).for_each(|(o, c)| *o = f32::from(*c as i8) * scale);
                }
                continue;
            }
            unpack_scalar(self.code, &block[2 * NR..], &mut codes);
            let code = |j: usize| codes[j / 2 * 2 * NR + i % NR * 2 + j % 2];
            out.iter_mut().enumerate().for_each(|(j, o)| *o = f32::from(code(j)) * scale);
        }
    }

    /// `y = x w^T`: x [m, k], y [m, n].
    pub fn matmul(&self, ctx: &Context, x: &[f32], y: &mut [f32]) {
        let m = x.len() / self.k;
        let x = Rows::new(ctx, self.code.group(), self.k, x);
        let panels = self.n.div_ceil(NR);
        let task = TASK.min(panels.div_ceil(2 * ctx.threads().len())).max(1);
        let y = DisjointMut::new(y);
        ctx.threads().run(panels.div_ceil(task), |t| {
            let mut acc = vec![[0.0; NR]; m];
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
        // On ARM all rows go that way.
        if (x.count() <= MR || cfg!(target_arch = "aarch64")) && few(self.code, panel, x, acc) {
            return;
        }
        let at_once = BLOCK / group;
        let (mut codes, mut scales) = ([0i16; NR * BLOCK], [0f32; NR * BLOCK / 32]);
        for (i, blocks) in panel.chunks(at_once * size).enumerate() {
            for (j, block) in blocks.chunks_exact(size).enumerate() {
                let codes = &mut codes[j * NR * group..(j + 1) * NR * group];
                unpack(self.code, block, codes, &mut scales[j * NR..(j + 1) * NR]);
            }
            let here = blocks.len() / size;
            let (codes, scales) = (&codes[..here * NR * group], &scales[..here * NR]);
            for (r, acc) in acc.chunks_mut(MR).enumerate() {
                tile(group, codes, scales, x, r * MR, i * at_once, acc);
            }
        }
    }
}

/// Activations rounded to 8 bits.
struct Rows {
    /// [m, groups, group], padded with zeros.
    codes: Vec<i16>,
    /// [m, groups].
    scales: Vec<f32>,
    groups: usize,
    group: usize,
}

impl Rows {
    fn count(&self) -> usize {
        self.scales.len().checked_div(self.groups).unwrap_or(0)
    }

    fn new(ctx: &Context, group: usize, k: usize, x: &[f32]) -> Rows {
        let (m, groups) = (x.len() / k, k.div_ceil(group));
        let (mut codes, mut scales) = (vec![0; m * groups * group], vec![0.0; m * groups]);
        {
            let (codes, scales) = (DisjointMut::new(&mut codes), DisjointMut::new(&mut scales));
            ctx.threads().run(m, |r| {
                // SAFETY: each row is rounded by one task.
                let (codes, scales) = unsafe {
                    (codes.get(r * groups * group..(r + 1) * groups * group), scales.get(r * groups..(r + 1) * groups))
                };
                crate::simd::vectorize(|| {
                    let groups = x[r * k..(r + 1) * k].chunks(group).zip(codes.chunks_exact_mut(group));
                    groups.zip(scales).for_each(|((x, codes), scale)| *scale = round(x, codes));
                });
            });
        }
        Rows { codes, scales, groups, group }
    }
}

/// Codes of activations, and their scale; NaN if one of them is no finite number, so that products are none either.
#[inline(always)]
fn round(x: &[f32], codes: &mut [i16]) -> f32 {
    let mut largest = [0f32; 8];
    let mut finite = true;
    for x in x.chunks(8) {
        for (l, v) in largest.iter_mut().zip(x) {
            *l = l.max(v.abs());
            finite &= v.is_finite();
        }
    }
    let largest = largest.into_iter().fold(0.0, f32::max);
    if !finite {
        return f32::NAN;
    }
    // Below that its inverse is no number.
    if largest < 1e-30 {
        return 0.0;
    }
    let inverse = 127.0 / largest;
    codes.iter_mut().zip(x).for_each(|(c, v)| *c = (v * inverse).round_ties_even() as i16);
    largest / 127.0
}

fn scale(block: &[u8], output: usize) -> f32 {
    f16::from_le_bytes([block[2 * output], block[2 * output + 1]]).to_f32()
}

/// Puts the codes and the scale of a group of output `i` where a panel has them.
fn place(code: Code, block: &mut [u8], i: usize, from: &[u8], scale: f16) {
    let (scales, codes) = block.split_at_mut(2 * NR);
    scales[2 * i..2 * i + 2].copy_from_slice(&scale.to_le_bytes());
    match code {
        Code::Int8 => from.chunks(2).zip(codes.chunks_exact_mut(2 * NR)).for_each(|(from, codes)| {
            codes[2 * i..2 * i + from.len()].copy_from_slice(from);
        }),
        Code::Q4 => from.chunks(2).zip(codes.chunks_exact_mut(2 * NR)).for_each(|(from, codes)| {
            let from = u32::from(from[0]) | u32::from(*from.get(1).unwrap_or(&0)) << 8;
            // Halves 0, 2, 1 and 3, each in a byte of its own.
            let apart = from & 0x0f0f | (from & 0xf0f0) << 12;
            for (to, code) in codes[i % 8 * 4..].iter_mut().zip(apart.to_le_bytes()) {
                *to |= code << (i / 8 * 4);
            }
        }),
    }
}

/// A group's codes as i16 in the order of products, [group / 2][16][2], and its scales.
fn unpack(code: Code, block: &[u8], codes: &mut [i16], scales: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        assert!(block.len() == code.bytes() && codes.len() == NR * code.group() && scales.len() == NR);
        // SAFETY: the features are there, and the lengths are as they must be.
        return unsafe { unpack_avx2(code, block, codes, scales) };
    }
    unpack_scalar(code, &block[2 * NR..], codes);
    scales.iter_mut().enumerate().for_each(|(i, s)| *s = scale(block, i));
}

fn unpack_scalar(code: Code, from: &[u8], codes: &mut [i16]) {
    match code {
        Code::Int8 => codes.iter_mut().zip(from).for_each(|(c, &b)| *c = i16::from(b as i8)),
        Code::Q4 => {
            for (codes, from) in codes.chunks_exact_mut(4 * NR).zip(from.chunks_exact(2 * NR)) {
                for i in 0..NR {
                    for j in 0..4 {
                        let c = from[i % 8 * 4 + [0, 2, 1, 3][j]] >> (i / 8 * 4) & 15;
                        codes[j / 2 * 2 * NR + 2 * i + j % 2] = i16::from(VALUES[c as usize]);
                    }
                }
            }
        }
    }
}

/// # Safety
/// AVX2 and F16C are there; `block` has the code's bytes, `codes` 16 times its group, `scales` 16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack_avx2(code: Code, block: &[u8], codes: &mut [i16], scales: &mut [f32]) {
    use std::arch::x86_64::*;
    // SAFETY: by the caller's promise; prefetching beyond is harmless.
    unsafe {
        let (mut from, mut to) = (block.as_ptr(), codes.as_mut_ptr().cast::<__m256i>());
        for i in 0..2 {
            let s = _mm256_cvtph_ps(_mm_loadu_si128(from.cast()));
            _mm256_storeu_ps(scales.as_mut_ptr().add(8 * i), s);
            from = from.add(16);
        }
        let vectors = (block.len() - 2 * NR) / 32;
        for i in 0..vectors {
            if i % 2 == 0 {
                _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(2048));
            }
            match code {
                Code::Int8 => {
                    for half in 0..2 {
                        let bytes = _mm_loadu_si128(from.add(16 * half).cast());
                        _mm256_storeu_si256(to, _mm256_cvtepi8_epi16(bytes));
                        to = to.add(1);
                    }
                }
                Code::Q4 => {
                    let [first, second] = q4_values(_mm256_loadu_si256(from.cast()));
                    _mm256_storeu_si256(to, first[0]);
                    _mm256_storeu_si256(to.add(1), first[1]);
                    _mm256_storeu_si256(to.add(2), second[0]);
                    _mm256_storeu_si256(to.add(3), second[1]);
                    to = to.add(4);
                }
            }
            from = from.add(32);
        }
    }
}

/// What 32 bytes of 4-bit codes stand for: of outputs 0 to 7 and 8 to 15 inputs 0 and 1, then inputs 2 and 3.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn q4_values(bytes: std::arch::x86_64::__m256i) -> [[std::arch::x86_64::__m256i; 2]; 2] {
    use std::arch::x86_64::*;
    // SAFETY: there are 16 values.
    let table = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(VALUES.as_ptr().cast())) };
    let low = _mm256_set1_epi8(15);
    let nibbles = [_mm256_and_si256(bytes, low), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low)];
    let [a, b] = [_mm256_shuffle_epi8(table, nibbles[0]), _mm256_shuffle_epi8(table, nibbles[1])];
    // The low bytes of 16 bits are inputs 0 and 1, the high ones 2 and 3.
    [
        [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(a)), _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(b))],
        [_mm256_srai_epi16::<8>(a), _mm256_srai_epi16::<8>(b)],
    ]
}

/// acc += rows `first`.. of x, as many as acc has, times a panel's groups from `group0` on.
fn tile(group: usize, codes: &[i16], scales: &[f32], x: &Rows, first: usize, group0: usize, acc: &mut [[f32; NR]]) {
    let groups = scales.len() / NR;
    let width = x.groups * x.group;
    let row = |r: usize| &x.codes[(first + r) * width + group0 * group..][..groups * group];
    let row_scales = |r: usize| &x.scales[(first + r) * x.groups + group0..][..groups];
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        assert!(codes.len() == groups * group * NR && acc.len() <= MR);
        let vnni = crate::simd::has_vnni();
        macro_rules! with {
            ($($m:literal)*) => {
                match acc.len() {
                    // SAFETY: the features are there; `row` and `row_scales` have checked that the rows have as many elements.
                    $($m => unsafe {
                        let (x, xs) = (std::array::from_fn(|r| row(r).as_ptr()), std::array::from_fn(|r| row_scales(r).as_ptr()));
                        if vnni {
                            tile_vnni::<$m>(group, codes, scales, x, xs, acc)
                        } else {
                            tile_avx2::<$m>(group, codes, scales, x, xs, acc)
                        }
                    },)*
                    _ => {}
                }
            };
        }
        with!(1 2 3 4 5 6);
        return;
    }
    tile_scalar(group, codes, scales, row, row_scales, acc);
}

fn tile_scalar<'a>(
    group: usize, codes: &[i16], scales: &[f32], row: impl Fn(usize) -> &'a [i16],
    row_scales: impl Fn(usize) -> &'a [f32], acc: &mut [[f32; NR]],
) {
    for (r, acc) in acc.iter_mut().enumerate() {
        for (g, codes) in codes.chunks_exact(group * NR).enumerate() {
            let mut sums = [0i32; NR];
            let x = &row(r)[g * group..][..group];
            for (w, x) in codes.chunks_exact(2 * NR).zip(x.chunks_exact(2)) {
                for (sum, w) in sums.iter_mut().zip(w.chunks_exact(2)) {
                    *sum += i32::from(w[0]) * i32::from(x[0]) + i32::from(w[1]) * i32::from(x[1]);
                }
            }
            for ((acc, sum), scale) in acc.iter_mut().zip(sums).zip(&scales[g * NR..]) {
                *acc = (sum as f32).mul_add(scale * row_scales(r)[g], *acc);
            }
        }
    }
}

/// # Safety
/// AVX2 and FMA are there; with the groups that `scales` has, 16 each, `codes` has 16 times and every row of x once a group's elements, every
/// row of scales one for each; `acc` has M rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_avx2<const M: usize>(
    group: usize, codes: &[i16], scales: &[f32], x: [*const i16; M], x_scales: [*const f32; M], acc: &mut [[f32; NR]],
) {
    use std::arch::x86_64::*;
    // SAFETY: by the caller's promise.
    unsafe {
        let mut w = codes.as_ptr().cast::<__m256i>();
        for g in 0..scales.len() / NR {
            let mut sums = [[_mm256_setzero_si256(); 2]; M];
            for j in 0..group / 2 {
                let (w0, w1) = (_mm256_loadu_si256(w), _mm256_loadu_si256(w.add(1)));
                for r in 0..M {
                    let pair = x[r].add(g * group + 2 * j).cast::<i32>().read_unaligned();
                    let pair = _mm256_set1_epi32(pair);
                    sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(w0, pair));
                    sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(w1, pair));
                }
                w = w.add(2);
            }
            for i in 0..2 {
                let scale = _mm256_loadu_ps(scales.as_ptr().add(g * NR + 8 * i));
                for r in 0..M {
                    let to = acc[r].as_mut_ptr().add(8 * i);
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*x_scales[r].add(g)));
                    _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][i]), scale, _mm256_loadu_ps(to)));
                }
            }
        }
    }
}

/// # Safety
/// As [`tile_avx2`], with AVX-512's VNNI.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn tile_vnni<const M: usize>(
    group: usize, codes: &[i16], scales: &[f32], x: [*const i16; M], x_scales: [*const f32; M], acc: &mut [[f32; NR]],
) {
    use std::arch::x86_64::*;
    // SAFETY: by the caller's promise.
    unsafe {
        let mut w = codes.as_ptr().cast::<__m512i>();
        for g in 0..scales.len() / NR {
            let mut sums = [_mm512_setzero_si512(); M];
            for j in 0..group / 2 {
                let weights = _mm512_loadu_si512(w);
                for r in 0..M {
                    let pair = x[r].add(g * group + 2 * j).cast::<i32>().read_unaligned();
                    sums[r] = _mm512_dpwssd_epi32(sums[r], weights, _mm512_set1_epi32(pair));
                }
                w = w.add(1);
            }
            let scale = _mm512_loadu_ps(scales.as_ptr().add(g * NR));
            for r in 0..M {
                let (to, scale) = (acc[r].as_mut_ptr(), _mm512_mul_ps(scale, _mm512_set1_ps(*x_scales[r].add(g))));
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), scale, _mm512_loadu_ps(to)));
            }
        }
    }
}

/// The product of a panel with all of up to 6 rows, unpacked in registers: whether this machine can.
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(unused_variables))]
fn few(code: Code, panel: &[u8], x: &Rows, acc: &mut [[f32; NR]]) -> bool {
    #[cfg(target_arch = "aarch64")]
    if neon::product(code, panel, x, acc) {
        return true;
    }
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        assert!(panel.len() == x.groups * code.bytes() && acc.len() == x.count() && x.group == code.group());
        let vnni = crate::simd::has_vnni();
        macro_rules! with {
            ($($m:literal)*) => {
                match acc.len() {
                    // SAFETY: the features are there, and lengths were checked.
                    $($m => unsafe {
                        if vnni { few_vnni::<$m>(code, panel, x, acc) } else { few_avx2::<$m>(code, panel, x, acc) }
                    },)*
                    _ => {}
                }
            };
        }
        with!(1 2 3 4 5 6);
        return true;
    }
    false
}

/// # Safety
/// AVX2, FMA and F16C are there; `panel` has as many groups as x, of `code`; x and `acc` have M rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn few_avx2<const M: usize>(code: Code, panel: &[u8], x: &Rows, acc: &mut [[f32; NR]]) {
    use std::arch::x86_64::*;
    // SAFETY: by the caller's promise; prefetching beyond is harmless.
    unsafe {
        let width = x.groups * x.group;
        for (g, block) in panel.chunks_exact(code.bytes()).enumerate() {
            let mut sums = [[_mm256_setzero_si256(); 2]; M];
            let mut add = |at: usize, w: [__m256i; 2]| {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let pair = x.codes.as_ptr().add(r * width + g * x.group + at).cast::<i32>().read_unaligned();
                    let pair = _mm256_set1_epi32(pair);
                    sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(w[0], pair));
                    sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(w[1], pair));
                }
            };
            for (i, bytes) in block[2 * NR..].chunks_exact(32).enumerate() {
                let from = bytes.as_ptr();
                _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(2048));
                match code {
                    Code::Int8 => {
                        let wide = |half: usize| _mm256_cvtepi8_epi16(_mm_loadu_si128(from.add(16 * half).cast()));
                        add(2 * i, [wide(0), wide(1)]);
                    }
                    Code::Q4 => {
                        let [first, second] = q4_values(_mm256_loadu_si256(from.cast()));
                        add(4 * i, first);
                        add(4 * i + 2, second);
                    }
                }
            }
            for half in 0..2 {
                let scale = _mm256_cvtph_ps(_mm_loadu_si128(block.as_ptr().add(16 * half).cast()));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let to = acc.as_mut_ptr().add(8 * half);
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[r * x.groups + g]));
                    let sum = _mm256_cvtepi32_ps(sums[r][half]);
                    _mm256_storeu_ps(to, _mm256_fmadd_ps(sum, scale, _mm256_loadu_ps(to)));
                }
            }
        }
    }
}

/// # Safety
/// As [`few_avx2`], with AVX-512's VNNI.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vl,avx2,f16c")]
unsafe fn few_vnni<const M: usize>(code: Code, panel: &[u8], x: &Rows, acc: &mut [[f32; NR]]) {
    use std::arch::x86_64::*;
    // SAFETY: by the caller's promise; prefetching beyond is harmless.
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(VALUES.as_ptr().cast()));
        let (table, low) = (_mm512_inserti64x4::<1>(_mm512_castsi256_si512(table), table), _mm512_set1_epi8(15));
        let width = x.groups * x.group;
        for (g, block) in panel.chunks_exact(code.bytes()).enumerate() {
            let mut sums = [_mm512_setzero_si512(); M];
            let mut add = |at: usize, w: __m512i| {
                for (r, sum) in sums.iter_mut().enumerate() {
                    let pair = x.codes.as_ptr().add(r * width + g * x.group + at).cast::<i32>().read_unaligned();
                    *sum = _mm512_dpwssd_epi32(*sum, w, _mm512_set1_epi32(pair));
                }
            };
            for (i, bytes) in block[2 * NR..].chunks_exact(32).enumerate() {
                let from = bytes.as_ptr();
                _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(2048));
                let bytes = _mm256_loadu_si256(from.cast());
                match code {
                    Code::Int8 => add(2 * i, _mm512_cvtepi8_epi16(bytes)),
                    Code::Q4 => {
                        // Outputs 0 to 7 below, 8 to 15 above.
                        let high = _mm256_srli_epi16::<4>(bytes);
                        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(bytes), high);
                        let v = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
                        add(4 * i, _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(v)));
                        add(4 * i + 2, _mm512_srai_epi16::<8>(v));
                    }
                }
            }
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(block.as_ptr().cast()));
            for (r, acc) in acc.iter_mut().enumerate() {
                let to = acc.as_mut_ptr();
                let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[r * x.groups + g]));
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), scale, _mm512_loadu_ps(to)));
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
                let rows = Rows::new(&Context::cpu(1), group, k, &x);
                let mut want = vec![0f32; 40 * n];
                for (i, want) in want.iter_mut().enumerate() {
                    let (r, o) = (i / n, i % n);
                    for g in 0..q.groups {
                        let block = &q.blocks[(o / NR * q.groups + g) * code.bytes()..][..code.bytes()];
                        let mut codes = vec![0; NR * group];
                        unpack_scalar(code, &block[2 * NR..], &mut codes);
                        let code = |j: usize| i32::from(codes[j / 2 * 2 * NR + o % NR * 2 + j % 2]);
                        let x = &rows.codes[(r * q.groups + g) * group..][..group];
                        let sum: i32 = x.iter().enumerate().map(|(j, x)| i32::from(*x) * code(j)).sum();
                        *want = (sum as f32).mul_add(scale(block, o % NR) * rows.scales[r * q.groups + g], *want);
                    }
                }
                for threads in [1, 3] {
                    for m in [0, 1, 2, 3, 4, 5, 6, 7, 13, 40] {
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
    fn scalar_code_equals_vector_code() {
        for code in [Code::Int8, Code::Q4] {
            let (k, group) = (2 * code.group(), code.group());
            let (ctx, w, x) = (Context::cpu(1), noise(16 * k, 5), noise(6 * k, 6));
            let q = coded(&ctx, code, 16, k, &w);
            let (mut codes, mut plain, mut scales) = (vec![0; NR * k], vec![0; NR * k], vec![0.0; 2 * NR]);
            for (g, block) in q.blocks.chunks_exact(code.bytes()).enumerate() {
                let at = g * NR * group..(g + 1) * NR * group;
                unpack(code, block, &mut codes[at.clone()], &mut scales[g * NR..(g + 1) * NR]);
                unpack_scalar(code, &block[2 * NR..], &mut plain[at]);
                (0..NR).for_each(|i| assert_eq!(scales[g * NR + i], scale(block, i)));
            }
            assert_eq!(codes, plain);
            let x = Rows::new(&ctx, group, k, &x);
            let (mut fast, mut slow) = ([[0.5; NR]; 6], [[0.5; NR]; 6]);
            tile(group, &codes, &scales, &x, 0, 0, &mut fast);
            let (row, row_scales) = (|r: usize| &x.codes[r * k..(r + 1) * k], |r: usize| &x.scales[2 * r..2 * r + 2]);
            tile_scalar(group, &codes, &scales, row, row_scales, &mut slow);
            assert_eq!(fast, slow);
            #[cfg(target_arch = "x86_64")]
            if crate::simd::has_avx2() {
                let mut few = [[0.0; NR]; 6];
                let mut want = few;
                tile_scalar(group, &codes, &scales, row, row_scales, &mut want);
                // SAFETY: the features are there; there are two groups and six rows.
                unsafe { few_avx2::<6>(code, &q.blocks, &x, &mut few) };
                assert_eq!(few, want);
                let mut tiled = [[0.0; NR]; 6];
                let (x, xs) =
                    (std::array::from_fn(|r| row(r).as_ptr()), std::array::from_fn(|r| row_scales(r).as_ptr()));
                // SAFETY: as above.
                unsafe { tile_avx2::<6>(group, &codes, &scales, x, xs, &mut tiled) };
                assert_eq!(tiled, want);
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
