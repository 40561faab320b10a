//! Products of coded weights with rounded activations, by instruction set. All give the same bits.

use super::NR;
use super::rows::Tile;
use crate::codes::Code;
use half::f16;

/// Groups of a panel of 16 outputs.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    /// For every four inputs the codes of the outputs: with 8 bits 64 bytes [16][4], with 4 bits 32 [8][4], outputs 0 to 7 in the low halves, 8 to 15 in
    /// the high ones. With 5 bits a group has the low four of its codes likewise, then for every four inputs 64 bits [16][4], the high ones.
    pub codes: &'a [u8],
    /// [groups][16] in f16.
    pub scales: &'a [f16],
    pub code: Code,
    /// Inputs of a group.
    pub group: usize,
}

impl Panel<'_> {
    fn groups(&self) -> usize {
        self.scales.len() / NR
    }

    /// Bytes of a group's codes.
    pub fn bytes(&self) -> usize {
        NR * self.group * self.code.bits() / 8
    }
}

/// Where the high bits of a group of codes of 5 bits begin.
pub(super) const HIGH: usize = 2 * NR * 8;

/// Whole groups of codes of 4 or 5 bits as what they stand for, in codes of 8.
pub(super) fn widen(code: Code, from: &[u8], to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        let bytes = NR * code.group() * code.bits() / 8;
        assert!(from.len().is_multiple_of(bytes) && to.len() == from.len() / bytes * code.group() * NR);
        // SAFETY: the features are there, and the lengths are as they must be.
        return unsafe {
            match code {
                Code::Q5 => x86::widen::<5>(from, to),
                _ => x86::widen::<4>(from, to),
            }
        };
    }
    widen_scalar(code, from, to);
}

pub(super) fn widen_scalar(code: Code, from: &[u8], to: &mut [u8]) {
    let groups = from.chunks_exact(NR * code.group() * code.bits() / 8);
    for (from, to) in groups.zip(to.chunks_exact_mut(code.group() * NR)) {
        for (i, j) in (0..NR).flat_map(|i| (0..code.group()).map(move |j| (i, j))) {
            to[j / 4 * 4 * NR + 4 * i + j % 4] = super::value(code, from, i, j) as u8;
        }
    }
}

/// Rows that a kernel takes at most.
pub(super) fn most_rows() -> usize {
    if crate::simd::has_vnni() { 12 } else { 6 }
}

/// acc += a panel times the same groups of a tile, for as many rows as acc has.
pub(super) fn dot(panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]]) {
    let (groups, rows) = (panel.groups(), acc.len());
    assert!(panel.codes.len() == groups * panel.bytes() && x.codes.len() == groups * panel.group * rows);
    assert!(x.scales.len() == groups * rows && x.offsets.len() == groups * rows);
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        let (vnni, avx_vnni) = (crate::simd::has_vnni(), crate::simd::has_avx_vnni());
        macro_rules! kernel {
            ($rows:literal, $sparse:literal) => {
                // SAFETY: the features are there, and lengths were checked.
                unsafe {
                    match (panel.code, vnni, avx_vnni) {
                        (Code::Int8, true, _) => x86::vnni::<$rows, 8, $sparse>(panel, x, acc),
                        (Code::Q5, true, _) => x86::vnni::<$rows, 5, $sparse>(panel, x, acc),
                        (Code::Q4, true, _) => x86::vnni::<$rows, 4, $sparse>(panel, x, acc),
                        (Code::Int8, _, true) => x86::avx_vnni::<$rows, 8, $sparse>(panel, x, acc),
                        (Code::Q5, _, true) => x86::avx_vnni::<$rows, 5, $sparse>(panel, x, acc),
                        (Code::Q4, _, true) => x86::avx_vnni::<$rows, 4, $sparse>(panel, x, acc),
                        (Code::Int8, ..) => x86::avx2::<$rows, 8, $sparse>(panel, x, acc),
                        (Code::Q5, ..) => x86::avx2::<$rows, 5, $sparse>(panel, x, acc),
                        (Code::Q4, ..) => x86::avx2::<$rows, 4, $sparse>(panel, x, acc),
                    }
                }
            };
        }
        if let (1, Some(live)) = (rows, x.live) {
            assert!(live.groups() == groups);
            return kernel!(1, true);
        }
        macro_rules! with {
            ($($rows:literal)*) => {
                match rows {
                    $($rows => kernel!($rows, false),)*
                    _ => scalar(panel, x, acc),
                }
            };
        }
        with!(1 2 3 4 5 6 7 8 9 10 11 12);
        return;
    }
    #[cfg(target_arch = "aarch64")]
    if super::neon::dot(panel, x, acc) {
        return;
    }
    scalar(panel, x, acc);
}

pub(super) fn scalar(panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]]) {
    let (group, rows) = (panel.group, acc.len());
    let mut wide = vec![0; NR * group];
    for (g, codes) in panel.codes.chunks_exact(panel.bytes()).enumerate() {
        match panel.code {
            Code::Int8 => wide.copy_from_slice(codes),
            code => widen_scalar(code, codes, &mut wide),
        }
        let x_codes = &x.codes[g * group * rows..][..group * rows];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (i, acc) in acc.iter_mut().enumerate() {
                let mut sum = 0;
                for j in 0..group {
                    let (w, x) = (wide[j / 4 * 4 * NR + 4 * i + j % 4] as i8, x_codes[(j / 4 * rows + r) * 4 + j % 4]);
                    sum += i32::from(w) * i32::from(x);
                }
                *acc = (sum as f32).mul_add(panel.scales[g * NR + i].to_f32() * x.scales[g * rows + r], *acc);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::super::rows::Live;
    use super::{Code, HIGH, NR, Panel, Tile};
    use crate::codes::VALUES;
    use std::arch::x86_64::*;

    /// Bytes ahead of what is read that are fetched: the hardware stops at pages.
    const AHEAD: usize = 2048;

    /// Calls `add` for every four inputs of group `g` that are not all zero, by their place in the group, and fetches weights of later ones.
    #[inline(always)]
    fn each(live: &Live, panel: &Panel<'_>, g: usize, mut add: impl FnMut(usize)) {
        let (of, bytes) = (panel.group / 4, if panel.code == Code::Int8 { 64 } else { 32 });
        for (four, ahead) in live.of(g) {
            let ahead = panel.codes.as_ptr().wrapping_add(ahead / of * panel.bytes() + ahead % of * bytes);
            // SAFETY: prefetching is harmless anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
            add(four - g * of);
        }
    }

    /// Values of the low four bits of codes.
    const fn table<const BITS: usize>() -> [i8; 16] {
        let (mut values, mut i) = (VALUES, 0);
        while BITS == 5 && i < 16 {
            values[i] = i as i8 - 16;
            i += 1;
        }
        values
    }

    /// What the codes of four inputs, number `q` of a group of 4 or 5 bits, stand for: those of outputs 0 to 7, and 8 to 15.
    ///
    /// # Safety
    /// The group is there.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn values<const BITS: usize>(group: *const u8, q: usize) -> [__m256i; 2] {
        // SAFETY: there are 16 values, and the group has as many bytes.
        let (table, bytes) = unsafe {
            let table = _mm_loadu_si128(const { table::<BITS>() }.as_ptr().cast());
            (_mm256_broadcastsi128_si256(table), _mm256_loadu_si256(group.add(32 * q).cast()))
        };
        let low = _mm256_set1_epi8(15);
        let values =
            [bytes, _mm256_srli_epi16::<4>(bytes)].map(|b| _mm256_shuffle_epi8(table, _mm256_and_si256(b, low)));
        if BITS == 4 {
            return values;
        }
        // SAFETY: likewise.
        let high = unsafe { group.add(HIGH + 8 * q).cast::<[i32; 2]>().read_unaligned() };
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let byte = _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
        std::array::from_fn(|i| {
            let bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(high[i]), byte), bit);
            let larger = _mm256_and_si256(_mm256_cmpeq_epi8(bits, bit), _mm256_set1_epi8(16));
            _mm256_add_epi8(values[i], larger)
        })
    }

    /// # Safety
    /// AVX2 is there, and `to` has 16 x 32 bytes for every group of `from`.
    #[target_feature(enable = "avx2")]
    pub unsafe fn widen<const BITS: usize>(from: &[u8], to: &mut [u8]) {
        for (from, to) in from.chunks_exact(64 * BITS).zip(to.chunks_exact_mut(512)) {
            for (q, to) in to.chunks_exact_mut(64).enumerate() {
                // SAFETY: the slices have as many bytes; prefetching beyond is harmless.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().cast::<i8>().wrapping_add(8 * BITS * q + AHEAD));
                    let [low, high] = values::<BITS>(from.as_ptr(), q);
                    _mm256_storeu_si256(to.as_mut_ptr().cast(), low);
                    _mm256_storeu_si256(to.as_mut_ptr().add(32).cast(), high);
                }
            }
        }
    }

    /// # Safety
    /// AVX2, FMA and F16C are there; acc has M rows, and x the panel's groups of as many. If SPARSE, M is 1, and only what is live in x is read.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn avx2<const M: usize, const BITS: usize, const SPARSE: bool>(
        panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]],
    ) {
        // No pair of products is beyond 16 bits, because neither side has -128.
        let add = |sum, size, four| {
            _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(size, four), _mm256_set1_epi16(1)))
        };
        // SAFETY: by the caller's promise.
        unsafe { halves::<M, BITS, SPARSE>(panel, x, acc, add) }
    }

    /// # Safety
    /// As [`avx2`], with AVX-VNNI.
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    pub unsafe fn avx_vnni<const M: usize, const BITS: usize, const SPARSE: bool>(
        panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]],
    ) {
        // SAFETY: by the caller's promise.
        unsafe { halves::<M, BITS, SPARSE>(panel, x, acc, |sum, size, four| _mm256_dpbusd_avx_epi32(sum, size, four)) }
    }

    /// Eight outputs at a time; `sum_of(sum, a, b)` adds to each lane of a sum the products of four numbers without and with sign.
    ///
    /// # Safety
    /// As [`avx2`]; it becomes part of what calls it.
    #[inline(always)]
    unsafe fn halves<const M: usize, const BITS: usize, const SPARSE: bool>(
        panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]], sum_of: impl Fn(__m256i, __m256i, __m256i) -> __m256i,
    ) {
        // SAFETY: by the caller's promise; prefetching beyond is harmless.
        unsafe {
            let (mut from, mut codes, mut scales) = (panel.codes.as_ptr(), x.codes.as_ptr(), x.scales.as_ptr());
            for (g, of) in panel.scales.chunks_exact(NR).enumerate() {
                let mut sums = [[_mm256_setzero_si256(); 2]; M];
                let add = |q: usize| {
                    if !SPARSE {
                        _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(8 * BITS * q + AHEAD));
                    }
                    let w = if BITS == 8 {
                        [0, 32].map(|half| _mm256_loadu_si256(from.add(64 * q + half).cast()))
                    } else {
                        values::<BITS>(from, q)
                    };
                    for half in 0..2 {
                        let size = _mm256_abs_epi8(w[half]);
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let four = _mm256_set1_epi32(codes.add(4 * (q * M + r)).cast::<i32>().read_unaligned());
                            sums[half] = sum_of(sums[half], size, _mm256_sign_epi8(four, w[half]));
                        }
                    }
                };
                match x.live {
                    Some(live) if SPARSE => each(live, &panel, g, add),
                    _ => (0..panel.group / 4).for_each(add),
                }
                from = from.add(panel.bytes());
                codes = codes.add(panel.group * M);
                for half in 0..2 {
                    let scale = _mm256_cvtph_ps(_mm_loadu_si128(of.as_ptr().add(8 * half).cast()));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let to = acc.as_mut_ptr().add(8 * half);
                        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*scales.add(r)));
                        let sum = _mm256_cvtepi32_ps(sums[r][half]);
                        _mm256_storeu_ps(to, _mm256_fmadd_ps(sum, scale, _mm256_loadu_ps(to)));
                    }
                }
                scales = scales.add(M);
            }
        }
    }

    /// # Safety
    /// As [`avx2`], with AVX-512's VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vl,avx2,f16c")]
    pub unsafe fn vnni<const M: usize, const BITS: usize, const SPARSE: bool>(
        panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]],
    ) {
        // SAFETY: by the caller's promise; prefetching beyond is harmless.
        unsafe {
            // The instruction takes one side without sign: weights 128 larger, for which sums begin lower.
            let larger = _mm512_set1_epi8(-128);
            let table = _mm512_xor_si512(
                _mm512_broadcast_i32x4(_mm_loadu_si128(const { table::<BITS>() }.as_ptr().cast())),
                larger,
            );
            let low = _mm512_set1_epi8(15);
            let (mut from, mut codes) = (panel.codes.as_ptr(), x.codes.as_ptr());
            let (mut scales, mut offsets) = (x.scales.as_ptr(), x.offsets.as_ptr());
            let mut totals: [__m512; M] = std::array::from_fn(|r| _mm512_loadu_ps(acc[r].as_ptr()));
            for (g, of) in panel.scales.chunks_exact(NR).enumerate() {
                let mut sums: [__m512i; M] = std::array::from_fn(|r| _mm512_set1_epi32(*offsets.add(r)));
                let add = |q: usize| {
                    if !SPARSE {
                        _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(8 * BITS * q + AHEAD));
                    }
                    let w = if BITS == 8 {
                        _mm512_xor_si512(_mm512_loadu_si512(from.add(64 * q).cast()), larger)
                    } else {
                        let bytes = _mm256_loadu_si256(from.add(32 * q).cast());
                        let high = _mm256_srli_epi16::<4>(bytes);
                        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(bytes), high);
                        let w = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
                        if BITS == 4 {
                            w
                        } else {
                            let high = from.add(HIGH + 8 * q).cast::<u64>().read_unaligned();
                            _mm512_mask_add_epi8(w, high, w, _mm512_set1_epi8(16))
                        }
                    };
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let four = codes.add(4 * (q * M + r)).cast::<i32>().read_unaligned();
                        *sum = _mm512_dpbusd_epi32(*sum, w, _mm512_set1_epi32(four));
                    }
                };
                match x.live {
                    Some(live) if SPARSE => each(live, &panel, g, add),
                    _ => (0..panel.group / 4).for_each(add),
                }
                from = from.add(panel.bytes());
                codes = codes.add(panel.group * M);
                let scale = _mm512_cvtph_ps(_mm256_loadu_si256(of.as_ptr().cast()));
                for r in 0..M {
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*scales.add(r)));
                    totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), scale, totals[r]);
                }
                scales = scales.add(M);
                offsets = offsets.add(M);
            }
            for (total, acc) in totals.iter().zip(acc) {
                _mm512_storeu_ps(acc.as_mut_ptr(), *total);
            }
        }
    }
}
