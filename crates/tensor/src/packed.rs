//! Weights repacked for inference: f32, f16 or bf16, in panels of 16 outputs with k contiguous, so that a product with 1 or
//! 1000 rows streams them once and in order; or coded in fewer bits (`quant/`).

use crate::gemm::{MR, Scratch, pack, tile};
use crate::pages::{Lines, Plain};
use crate::quant::Quantised;
use crate::{Code, Context, DType, DisjointMut, WeightType};
use half::{bf16, f16};

const NR: usize = crate::gemm::NR;
/// k block of products with many rows: 16 x KC f32 (16 KiB) are converted at a time.
const KC: usize = 256;
/// Panels of one task.
const GROUP: usize = 8;

/// A weight matrix [n, k] (outputs x inputs) in tiles.
pub struct Packed {
    n: usize,
    k: usize,
    data: Data,
}

/// Floats are [n / 16][k][16], padded with zeros.
enum Data {
    F32(Lines<f32>),
    F16(Lines<u16>),
    BF16(Lines<u16>),
    Coded(Quantised),
}

impl Packed {
    /// Packs a matrix of n outputs and k inputs, rounding to `to` (floats to nearest, ties to even). `read(start, out)` gives the
    /// elements from the `start`-th on of the matrix as it is stored, row-major: [n, k], or [k, n] if `in_out`. It is
    /// called for a row at a time at most, from several threads.
    pub fn new(
        ctx: &Context, to: impl Into<WeightType>, n: usize, k: usize, in_out: bool,
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Packed {
        fn fill<T: Plain + Send>(
            ctx: &Context, (n, k): (usize, usize), in_out: bool, read: impl Fn(usize, &mut [f32]) + Sync,
            round: impl Fn(f32) -> T + Sync,
        ) -> Lines<T> {
            let panels = n.div_ceil(NR);
            let mut out = ctx.pages().zeros(panels * k * NR);
            let shared = DisjointMut::new(&mut out);
            ctx.threads().run(panels, |p| {
                // SAFETY: each panel is filled by one task.
                let panel = unsafe { shared.get(p * k * NR..(p + 1) * k * NR) };
                let outputs = NR.min(n - p * NR);
                if in_out {
                    let mut row = [0.0; NR];
                    for j in 0..k {
                        read(j * n + p * NR, &mut row[..outputs]);
                        panel[j * NR..][..outputs].iter_mut().zip(&row).for_each(|(to, v)| *to = round(*v));
                    }
                } else {
                    let mut row = vec![0.0; k];
                    for i in 0..outputs {
                        read((p * NR + i) * k, &mut row);
                        panel.chunks_exact_mut(NR).zip(&row).for_each(|(to, v)| to[i] = round(*v));
                    }
                }
            });
            out
        }
        let coded = |code, read: &(dyn Fn(usize, &mut [f32]) + Sync)| {
            let row = |i: usize, row: &mut [f32]| match in_out {
                false => read(i * k, row),
                true => row.iter_mut().enumerate().for_each(|(j, w)| read(j * n + i, std::slice::from_mut(w))),
            };
            Data::Coded(Quantised::new(ctx, code, n, k, row))
        };
        let data = match to.into() {
            WeightType::Float(DType::F32) => Data::F32(fill(ctx, (n, k), in_out, read, |v| v)),
            WeightType::Float(DType::F16) => Data::F16(fill(ctx, (n, k), in_out, read, |v| f16::from_f32(v).to_bits())),
            WeightType::Float(DType::BF16) => {
                Data::BF16(fill(ctx, (n, k), in_out, read, |v| bf16::from_f32(v).to_bits()))
            }
            WeightType::Int8 => coded(Code::Int8, &read),
            WeightType::Q4 => coded(Code::Q4, &read),
            WeightType::Q5 => coded(Code::Q5, &read),
        };
        Packed { n, k, data }
    }

    /// A matrix of n outputs and k inputs that is coded already: `read(output, codes, scales)` gives those of an output as
    /// [`Code::encode`] does. It is called from several threads.
    pub fn from_codes(
        ctx: &Context, code: Code, n: usize, k: usize, read: impl Fn(usize, &mut [u8], &mut [f16]) + Sync,
    ) -> Packed {
        Packed { n, k, data: Data::Coded(Quantised::from_codes(ctx, code, n, k, read)) }
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How weights are kept.
    pub fn kept(&self) -> WeightType {
        match &self.data {
            Data::F32(_) => DType::F32.into(),
            Data::F16(_) => DType::F16.into(),
            Data::BF16(_) => DType::BF16.into(),
            Data::Coded(w) => match w.code() {
                Code::Int8 => WeightType::Int8,
                Code::Q4 => WeightType::Q4,
                Code::Q5 => WeightType::Q5,
            },
        }
    }

    /// Bytes of the packed form.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(w) => 4 * w.len(),
            Data::F16(w) | Data::BF16(w) => 2 * w.len(),
            Data::Coded(w) => w.bytes(),
        }
    }

    /// A hash of how weights are kept and of some thousands of them, from everywhere: matrices of which most weights differ differ in it.
    pub fn digest(&self) -> u64 {
        match &self.data {
            Data::F32(w) => hash_some(w, f32::to_bits, 1),
            Data::F16(w) => hash_some(w, u32::from, 2),
            Data::BF16(w) => hash_some(w, u32::from, 3),
            Data::Coded(w) => hash_some(w.codes(), u32::from, 4 + w.code() as u64),
        }
    }

    /// Row `i` of the [n, k] matrix into `out`: a row of an embedding.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n && out.len() == self.k);
        let at = i / NR * NR * self.k + i % NR;
        fn copy<S: Stored>(panel: &[S::Bits], out: &mut [f32]) {
            out.iter_mut().zip(panel.iter().step_by(NR)).for_each(|(o, b)| *o = S::one(*b));
        }
        match &self.data {
            Data::F32(w) => copy::<F32>(&w[at.min(w.len())..], out),
            Data::F16(w) => copy::<F16>(&w[at.min(w.len())..], out),
            Data::BF16(w) => copy::<BF16>(&w[at.min(w.len())..], out),
            Data::Coded(w) => w.row(i, out),
        }
    }

    /// `y = x w^T`: x [m, k], y [m, n]. A row of y is bitwise the same for every m, and with floats the same as
    /// [`crate::gemm::gemm`] gives for the rounded weights.
    pub fn matmul(&self, ctx: &Context, x: &[f32], y: &mut [f32]) {
        let m = y.len().checked_div(self.n).unwrap_or(0);
        assert!(x.len() == m * self.k && y.len() == m * self.n);
        if self.k == 0 {
            return y.fill(0.0);
        }
        match &self.data {
            Data::F32(w) => product::<F32>(ctx, w, (m, self.n, self.k), x, y),
            Data::F16(w) => product::<F16>(ctx, w, (m, self.n, self.k), x, y),
            Data::BF16(w) => product::<BF16>(ctx, w, (m, self.n, self.k), x, y),
            Data::Coded(w) => w.matmul(ctx, x, y),
        }
    }
}

/// A stored type: how sixteen of them become f32.
trait Stored {
    type Bits: Copy + Sync;
    fn one(bits: Self::Bits) -> f32;
    /// # Safety
    /// `p` points to 16 elements; AVX2, FMA and F16C are there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn sixteen(p: *const Self::Bits) -> [std::arch::x86_64::__m256; 2];
}

struct F32;
struct F16;
struct BF16;

impl Stored for F32 {
    type Bits = f32;
    fn one(bits: f32) -> f32 {
        bits
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(p: *const f32) -> [std::arch::x86_64::__m256; 2] {
        use std::arch::x86_64::*;
        // SAFETY: by the caller's promise.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
}

impl Stored for F16 {
    type Bits = u16;
    fn one(bits: u16) -> f32 {
        f16::from_bits(bits).to_f32()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(p: *const u16) -> [std::arch::x86_64::__m256; 2] {
        use std::arch::x86_64::*;
        // SAFETY: by the caller's promise.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))] }
    }
}

impl Stored for BF16 {
    type Bits = u16;
    fn one(bits: u16) -> f32 {
        bf16::from_bits(bits).to_f32()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(p: *const u16) -> [std::arch::x86_64::__m256; 2] {
        use std::arch::x86_64::*;
        // SAFETY: by the caller's promise.
        let widen = |q: *const u16| unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(q.cast()))))
        };
        // SAFETY: the second half of 16 elements.
        [widen(p), widen(unsafe { p.add(8) })]
    }
}

fn product<S: Stored>(ctx: &Context, w: &[S::Bits], (m, n, k): (usize, usize, usize), x: &[f32], y: &mut [f32]) {
    let panels = n.div_ceil(NR);
    let y = DisjointMut::new(y);
    // Two tasks a thread even for narrow matrices.
    let group = GROUP.min(panels.div_ceil(2 * ctx.threads().len())).max(1);
    if m <= MR {
        let pairs = if m == 1 { pairs(x) } else { None };
        ctx.threads().run(panels.div_ceil(group), |t| {
            for p in t * group..panels.min((t + 1) * group) {
                let panel = &w[p * k * NR..(p + 1) * k * NR];
                let mut acc = [[0.0; NR]; MR];
                match &pairs {
                    Some(pairs) => one::<S>(panel, x, pairs, &mut acc[0]),
                    None => few::<S>(panel, x, m, k, &mut acc),
                }
                for (r, acc) in acc.iter().enumerate().take(m) {
                    let cols = NR.min(n - p * NR);
                    // SAFETY: this task alone writes these columns.
                    unsafe { y.get(r * n + p * NR..r * n + p * NR + cols) }.copy_from_slice(&acc[..cols]);
                }
            }
        });
        return;
    }
    // Many rows: pack x once, convert each panel once per k block.
    let tiles = m.div_ceil(MR);
    let mut px = Scratch::new(tiles * MR * k);
    {
        let px = DisjointMut::new(&mut px);
        ctx.threads().run(tiles, |i| {
            for k0 in (0..k).step_by(KC) {
                let kc = KC.min(k - k0);
                let at = tiles * MR * k0 + i * MR * kc;
                // SAFETY: each tile is packed by one task.
                pack::<MR>(x, (k, 1), i * MR, m, k0, kc, unsafe { px.get(at..at + MR * kc) });
            }
        });
    }
    ctx.threads().run(panels.div_ceil(group), |t| {
        let mut b = [0f32; KC * NR];
        for p in t * group..panels.min((t + 1) * group) {
            let cols = NR.min(n - p * NR);
            for k0 in (0..k).step_by(KC) {
                let kc = KC.min(k - k0);
                convert::<S>(&w[(p * k + k0) * NR..][..kc * NR], &mut b[..kc * NR]);
                for i in 0..tiles {
                    let a = &px[tiles * MR * k0 + i * MR * kc..][..MR * kc];
                    let rows = MR.min(m - i * MR);
                    // SAFETY: this task alone writes these columns; rows are separate ranges.
                    let out: [&mut [f32]; MR] = std::array::from_fn(|r| unsafe {
                        let at = (i * MR + r) * n + p * NR;
                        if r < rows { y.get(at..at + cols) } else { y.get(0..0) }
                    });
                    tile(a, &b[..kc * NR], out, rows, cols, k0 > 0);
                }
            }
        }
    });
}

fn convert<S: Stored>(from: &[S::Bits], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn fast<S: Stored>(from: &[S::Bits], to: &mut [f32]) {
            for (f, t) in from.chunks_exact(NR).zip(to.chunks_exact_mut(NR)) {
                // SAFETY: both have 16 elements, and the features are there.
                unsafe {
                    let [a, b] = S::sixteen(f.as_ptr());
                    std::arch::x86_64::_mm256_storeu_ps(t.as_mut_ptr(), a);
                    std::arch::x86_64::_mm256_storeu_ps(t.as_mut_ptr().add(8), b);
                }
            }
        }
        // SAFETY: the features are there.
        return unsafe { fast::<S>(from, to) };
    }
    from.iter().zip(to).for_each(|(f, t)| *t = S::one(*f));
}

/// A hash of some thousands of elements, from everywhere.
pub(crate) fn hash_some<T: Copy>(of: &[T], bits: impl Fn(T) -> u32, seed: u64) -> u64 {
    let add = |hash: u64, v: &T| (hash ^ u64::from(bits(*v))).wrapping_mul(0x0100_0000_01b3);
    // An odd step, so that all places of a panel are met.
    of.iter().step_by((of.len() / 4096) | 1).fold(0xcbf2_9ce4_8422_2325 ^ seed, add)
}

/// The even inputs that are not zero together with the next one, if they are few: weights of the others needn't be read. Those of two inputs in
/// 16 bits are a line of the cache.
fn pairs(x: &[f32]) -> Option<Vec<u32>> {
    let zeros = x.iter().filter(|v| **v == 0.0).count();
    if zeros < x.len() / 2 {
        return None;
    }
    let live = |(i, pair): (usize, &[f32])| pair.iter().any(|v| *v != 0.0).then_some(2 * i as u32);
    let pairs: Vec<u32> = x.chunks(2).enumerate().filter_map(live).collect();
    (pairs.len() < x.len() / 2 * 3 / 4).then_some(pairs)
}

/// acc = x panel for one row, of which only the inputs of `pairs` are not zero. Those left out would add zeros.
fn one<S: Stored>(panel: &[S::Bits], x: &[f32], pairs: &[u32], acc: &mut [f32; NR]) {
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx2,fma,f16c")]
        fn fast<S: Stored>(panel: &[S::Bits], x: &[f32], pairs: &[u32], acc: &mut [f32; NR]) {
            let mut s = [_mm256_setzero_ps(); 2];
            for &at in pairs {
                let at = at as usize;
                let two = panel[at * NR..].chunks_exact(NR).zip(&x[at..]).take(2);
                for (w, x) in two {
                    // SAFETY: the chunk has 16 elements, and the features are there.
                    let w = unsafe { S::sixteen(w.as_ptr()) };
                    let x = _mm256_set1_ps(*x);
                    s = [_mm256_fmadd_ps(x, w[0], s[0]), _mm256_fmadd_ps(x, w[1], s[1])];
                }
            }
            for (s, acc) in s.into_iter().zip(acc.chunks_exact_mut(8)) {
                // SAFETY: the chunk has 8 elements.
                unsafe { _mm256_storeu_ps(acc.as_mut_ptr(), s) };
            }
        }
        // SAFETY: the features are there.
        return unsafe { fast::<S>(panel, x, pairs, acc) };
    }
    acc.fill(0.0);
    for at in pairs.iter().map(|at| *at as usize) {
        for (w, x) in panel[at * NR..].chunks_exact(NR).zip(&x[at..]).take(2) {
            acc.iter_mut().zip(w).for_each(|(acc, w)| *acc = x.mul_add(S::one(*w), *acc));
        }
    }
}

/// acc[r] = x[r] panel for m <= 6 rows.
fn few<S: Stored>(panel: &[S::Bits], x: &[f32], m: usize, k: usize, acc: &mut [[f32; NR]; MR]) {
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        // SAFETY: the features are there; the panel holds k x 16 elements and x m x k.
        return unsafe {
            match m {
                0 => {}
                1 => few_avx2::<S, 1>(panel, x, k, acc),
                2 => few_avx2::<S, 2>(panel, x, k, acc),
                3 => few_avx2::<S, 3>(panel, x, k, acc),
                4 => few_avx2::<S, 4>(panel, x, k, acc),
                5 => few_avx2::<S, 5>(panel, x, k, acc),
                _ => few_avx2::<S, 6>(panel, x, k, acc),
            }
        };
    }
    for (l, w) in panel.chunks_exact(NR).enumerate() {
        for r in 0..m {
            for j in 0..NR {
                acc[r][j] = x[r * k + l].mul_add(S::one(w[j]), acc[r][j]);
            }
        }
    }
}

/// # Safety
/// AVX2, FMA and F16C are there; `panel` holds k x 16 elements, `x` at least M x k.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn few_avx2<S: Stored, const M: usize>(panel: &[S::Bits], x: &[f32], k: usize, acc: &mut [[f32; NR]; MR]) {
    use std::arch::x86_64::*;
    debug_assert!(panel.len() == k * NR && x.len() >= M * k);
    // SAFETY: all loads are inside panel and x; prefetching beyond is harmless.
    unsafe {
        let mut s = [[_mm256_setzero_ps(); 2]; M];
        let (mut p, x) = (panel.as_ptr(), x.as_ptr());
        for l in 0..k {
            // 2 KiB ahead: the hardware prefetcher stops at page boundaries.
            _mm_prefetch::<_MM_HINT_T0>(p.cast::<i8>().wrapping_add(2048));
            let w = S::sixteen(p);
            for (r, s) in s.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*x.add(r * k + l));
                s[0] = _mm256_fmadd_ps(x, w[0], s[0]);
                s[1] = _mm256_fmadd_ps(x, w[1], s[1]);
            }
            p = p.add(NR);
        }
        for (s, acc) in s.iter().zip(acc) {
            _mm256_storeu_ps(acc.as_mut_ptr(), s[0]);
            _mm256_storeu_ps(acc.as_mut_ptr().add(8), s[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::{Trans, gemm};

    #[test]
    fn every_row_count_equals_gemm_bitwise() {
        let value = |i: usize| ((i * 7919 % 1009) as f32 - 504.0) / 300.0;
        for (n, k) in [(1, 1), (16, 3), (37, 300), (130, 64), (5, 0)] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let round = |v: f32| match dtype {
                    DType::F32 => v,
                    DType::F16 => f16::from_f32(v).to_f32(),
                    DType::BF16 => bf16::from_f32(v).to_f32(),
                };
                let w: Vec<f32> = (0..n * k).map(|i| round(value(i))).collect();
                for threads in [1, 3] {
                    let ctx = Context::cpu(threads);
                    let packed = Packed::new(&ctx, dtype, n, k, false, |at, out| {
                        out.iter_mut().zip(at..).for_each(|(o, i)| *o = value(i))
                    });
                    let turned = Packed::new(&ctx, dtype, n, k, true, |at, out| {
                        out.iter_mut().zip(at..).for_each(|(o, i)| *o = value(i % n.max(1) * k + i / n.max(1)))
                    });
                    for i in 0..n {
                        let (mut a, mut b) = (vec![0.0; k], vec![0.0; k]);
                        packed.row(i, &mut a);
                        turned.row(i, &mut b);
                        assert!(a == w[i * k..(i + 1) * k] && a == b);
                    }
                    assert_eq!((packed.n(), packed.k(), packed.kept()), (n, k, dtype.into()));
                    for (m, zeros) in [(0, 0), (1, 0), (1, 7), (1, 9), (2, 9), (5, 0), (6, 0), (7, 0), (12, 9), (40, 0)]
                    {
                        let x = |i: usize| if i * i % 11 < zeros { 0.0 } else { value(i + 11) * 0.7 };
                        let x: Vec<f32> = (0..m * k).map(x).collect();
                        let (mut y, mut want) = (vec![1.0; m * n], vec![2.0; m * n]);
                        packed.matmul(&ctx, &x, &mut y);
                        gemm(&ctx, Trans::N, Trans::T, m, n, k, &x, &w, false, &mut want);
                        assert!(y == want, "{m} x {n} x {k} {dtype}");
                    }
                }
            }
        }
    }
}
