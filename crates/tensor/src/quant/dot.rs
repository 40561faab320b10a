//! Products of coded weights with rounded activations, by instruction set. All give the same bits.

use super::NR;
use super::rows::Tile;
use crate::codes::VALUES;
use half::f16;

/// Groups of a panel of 16 outputs.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    /// For every four inputs the codes of the outputs: with 8 bits 64 bytes [16][4], with 4 bits 32 [8][4], outputs 0 to 7 in the low halves, 8 to 15 in
    /// the high ones.
    pub codes: &'a [u8],
    /// [groups][16] in f16.
    pub scales: &'a [f16],
    pub nibbles: bool,
    /// Inputs of a group.
    pub group: usize,
}

impl Panel<'_> {
    fn groups(&self) -> usize {
        self.scales.len() / NR
    }

    /// Bytes of a group's codes.
    fn bytes(&self) -> usize {
        NR * self.group / if self.nibbles { 2 } else { 1 }
    }
}

/// Codes of 4 bits as what they stand for, in codes of 8.
pub(super) fn widen(from: &[u8], to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        assert!(to.len() == 2 * from.len() && from.len().is_multiple_of(32));
        // SAFETY: the features are there, and the lengths are as they must be.
        return unsafe { x86::widen(from, to) };
    }
    widen_scalar(from, to);
}

pub(super) fn widen_scalar(from: &[u8], to: &mut [u8]) {
    for (from, to) in from.chunks_exact(2 * NR).zip(to.chunks_exact_mut(4 * NR)) {
        let (low, high) = to.split_at_mut(2 * NR);
        for ((b, low), high) in from.iter().zip(low).zip(high) {
            *low = VALUES[usize::from(b & 15)] as u8;
            *high = VALUES[usize::from(b >> 4)] as u8;
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
        let vnni = crate::simd::has_vnni();
        if let (1, Some(live)) = (rows, x.live) {
            assert!(live.groups() == groups);
            // SAFETY: the features are there, and lengths were checked.
            return unsafe {
                match (vnni, panel.nibbles) {
                    (true, true) => x86::vnni::<1, true, true>(panel, x, acc),
                    (true, false) => x86::vnni::<1, false, true>(panel, x, acc),
                    (false, true) => x86::avx2::<1, true, true>(panel, x, acc),
                    (false, false) => x86::avx2::<1, false, true>(panel, x, acc),
                }
            };
        }
        macro_rules! with {
            ($($rows:literal)*) => {
                match rows {
                    // SAFETY: the features are there, and lengths were checked.
                    $($rows => unsafe {
                        match (vnni, panel.nibbles) {
                            (true, true) => x86::vnni::<$rows, true, false>(panel, x, acc),
                            (true, false) => x86::vnni::<$rows, false, false>(panel, x, acc),
                            (false, true) => x86::avx2::<$rows, true, false>(panel, x, acc),
                            (false, false) => x86::avx2::<$rows, false, false>(panel, x, acc),
                        }
                    },)*
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
        match panel.nibbles {
            true => widen_scalar(codes, &mut wide),
            false => wide.copy_from_slice(codes),
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
    use super::{NR, Panel, Tile, VALUES};
    use std::arch::x86_64::*;

    /// Bytes ahead of what is read that are fetched: the hardware stops at pages.
    const AHEAD: usize = 2048;

    /// Calls `add` for every four inputs of group `g` that are not all zero, by their place in the group, and fetches weights of later ones.
    #[inline(always)]
    fn each(live: &Live, panel: &Panel<'_>, g: usize, mut add: impl FnMut(usize)) {
        let (of, bytes) = (panel.group / 4, 4 * NR / if panel.nibbles { 2 } else { 1 });
        for (four, ahead) in live.of(g) {
            let ahead = panel.codes.as_ptr().wrapping_add(ahead * bytes);
            // SAFETY: prefetching is harmless anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
            add(four - g * of);
        }
    }

    /// What 32 bytes of 4-bit codes stand for: those of outputs 0 to 7, and 8 to 15.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn values(bytes: __m256i) -> [__m256i; 2] {
        // SAFETY: there are 16 values.
        let table = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(VALUES.as_ptr().cast())) };
        let low = _mm256_set1_epi8(15);
        [bytes, _mm256_srli_epi16::<4>(bytes)].map(|b| _mm256_shuffle_epi8(table, _mm256_and_si256(b, low)))
    }

    /// # Safety
    /// AVX2 is there, `to` has twice as many bytes as `from`, which has a multiple of 32.
    #[target_feature(enable = "avx2")]
    pub unsafe fn widen(from: &[u8], to: &mut [u8]) {
        for (from, to) in from.chunks_exact(32).zip(to.chunks_exact_mut(64)) {
            // SAFETY: the slices have as many bytes; prefetching beyond is harmless.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().cast::<i8>().wrapping_add(AHEAD));
                let [low, high] = values(_mm256_loadu_si256(from.as_ptr().cast()));
                _mm256_storeu_si256(to.as_mut_ptr().cast(), low);
                _mm256_storeu_si256(to.as_mut_ptr().add(32).cast(), high);
            }
        }
    }

    /// # Safety
    /// AVX2, FMA and F16C are there; acc has M rows, and x the panel's groups of as many. If SPARSE, M is 1, and only what is live in x is read.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn avx2<const M: usize, const NIBBLES: bool, const SPARSE: bool>(
        panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]],
    ) {
        // SAFETY: by the caller's promise; prefetching beyond is harmless.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let (mut from, mut codes, mut scales) = (panel.codes.as_ptr(), x.codes.as_ptr(), x.scales.as_ptr());
            for (g, of) in panel.scales.chunks_exact(NR).enumerate() {
                let mut sums = [[_mm256_setzero_si256(); 2]; M];
                let add = |q: usize| {
                    let from = from.add(q * if NIBBLES { 32 } else { 64 });
                    if !SPARSE {
                        _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(AHEAD));
                    }
                    let w = if NIBBLES {
                        values(_mm256_loadu_si256(from.cast()))
                    } else {
                        [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())]
                    };
                    for half in 0..2 {
                        // No pair of products is beyond 16 bits, because neither side has -128.
                        let size = _mm256_abs_epi8(w[half]);
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let four = _mm256_set1_epi32(codes.add(4 * (q * M + r)).cast::<i32>().read_unaligned());
                            let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four, w[half]));
                            sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
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
    pub unsafe fn vnni<const M: usize, const NIBBLES: bool, const SPARSE: bool>(
        panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]],
    ) {
        // SAFETY: by the caller's promise; prefetching beyond is harmless.
        unsafe {
            // The instruction takes one side without sign: weights 128 larger, for which sums begin lower.
            let larger = _mm512_set1_epi8(-128);
            let table = _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128(VALUES.as_ptr().cast())), larger);
            let low = _mm512_set1_epi8(15);
            let (mut from, mut codes) = (panel.codes.as_ptr(), x.codes.as_ptr());
            let (mut scales, mut offsets) = (x.scales.as_ptr(), x.offsets.as_ptr());
            let mut totals: [__m512; M] = std::array::from_fn(|r| _mm512_loadu_ps(acc[r].as_ptr()));
            for (g, of) in panel.scales.chunks_exact(NR).enumerate() {
                let mut sums: [__m512i; M] = std::array::from_fn(|r| _mm512_set1_epi32(*offsets.add(r)));
                let add = |q: usize| {
                    let from = from.add(q * if NIBBLES { 32 } else { 64 });
                    if !SPARSE {
                        _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(AHEAD));
                    }
                    let w = if NIBBLES {
                        let bytes = _mm256_loadu_si256(from.cast());
                        let high = _mm256_srli_epi16::<4>(bytes);
                        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(bytes), high);
                        _mm512_shuffle_epi8(table, _mm512_and_si512(both, low))
                    } else {
                        _mm512_xor_si512(_mm512_loadu_si512(from.cast()), larger)
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
