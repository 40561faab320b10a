//! Products of coded weights with rounded activations, by instruction set. All give the same bits.

use super::rows::Tile;
use super::{NR, scale};
use crate::codes::VALUES;

/// Groups of a panel of 16 outputs: of each 16 scales in f16, then for every four inputs the codes of the outputs.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub blocks: &'a [u8],
    /// Whether codes have 4 bits. Those of four inputs are 64 bytes [16][4], or 32 [8][4]: outputs 0 to 7 in the low halves, 8 to 15 in the high ones.
    pub nibbles: bool,
    /// Inputs of a group.
    pub group: usize,
}

impl Panel<'_> {
    /// Bytes of a group.
    pub const fn bytes(nibbles: bool, group: usize) -> usize {
        2 * NR + NR * group / if nibbles { 2 } else { 1 }
    }

    pub fn groups(&self) -> usize {
        self.blocks.len() / Panel::bytes(self.nibbles, self.group)
    }

    /// The same with codes of 8 bits.
    pub fn widen(&self, to: &mut [u8]) {
        let (narrow, wide) = (Panel::bytes(true, self.group), Panel::bytes(false, self.group));
        for (from, to) in self.blocks.chunks_exact(narrow).zip(to.chunks_exact_mut(wide)) {
            let (scales, codes) = to.split_at_mut(2 * NR);
            scales.copy_from_slice(&from[..2 * NR]);
            widen(&from[2 * NR..], codes);
        }
    }
}

fn widen(from: &[u8], to: &mut [u8]) {
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
    assert!(x.codes.len() == groups * panel.group * rows);
    assert!(x.scales.len() == groups * rows && x.offsets.len() == groups * rows);
    #[cfg(target_arch = "x86_64")]
    if crate::simd::has_avx2() {
        let vnni = crate::simd::has_vnni();
        macro_rules! with {
            ($($rows:literal)*) => {
                match rows {
                    // SAFETY: the features are there, and lengths were checked.
                    $($rows => unsafe {
                        match (vnni, panel.nibbles) {
                            (true, true) => x86::vnni::<$rows, true>(panel, x, acc),
                            (true, false) => x86::vnni::<$rows, false>(panel, x, acc),
                            (false, true) => x86::avx2::<$rows, true>(panel, x, acc),
                            (false, false) => x86::avx2::<$rows, false>(panel, x, acc),
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
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        macro_rules! with {
            ($($rows:literal)*) => {
                match rows {
                    // SAFETY: the feature is there, and lengths were checked.
                    $($rows => unsafe {
                        match panel.nibbles {
                            true => super::neon::dot::<$rows, true>(panel, x, acc),
                            false => super::neon::dot::<$rows, false>(panel, x, acc),
                        }
                    },)*
                    _ => scalar(panel, x, acc),
                }
            };
        }
        with!(1 2 3 4 5 6);
        return;
    }
    scalar(panel, x, acc);
}

pub(super) fn scalar(panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]]) {
    let (group, rows) = (panel.group, acc.len());
    let mut wide = vec![0; NR * group];
    for (g, block) in panel.blocks.chunks_exact(Panel::bytes(panel.nibbles, group)).enumerate() {
        match panel.nibbles {
            true => widen_scalar(&block[2 * NR..], &mut wide),
            false => wide.copy_from_slice(&block[2 * NR..]),
        }
        let x_codes = &x.codes[g * group * rows..][..group * rows];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (i, acc) in acc.iter_mut().enumerate() {
                let mut sum = 0;
                for j in 0..group {
                    let (w, x) = (wide[j / 4 * 4 * NR + 4 * i + j % 4] as i8, x_codes[(j / 4 * rows + r) * 4 + j % 4]);
                    sum += i32::from(w) * i32::from(x);
                }
                *acc = (sum as f32).mul_add(scale(block, i) * x.scales[g * rows + r], *acc);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::{NR, Panel, Tile, VALUES};
    use std::arch::x86_64::*;

    /// Bytes ahead of what is read that are fetched: the hardware stops at pages.
    const AHEAD: usize = 2048;

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
    /// AVX2, FMA and F16C are there; acc has M rows, and x the panel's groups of as many.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn avx2<const M: usize, const NIBBLES: bool>(panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]]) {
        // SAFETY: by the caller's promise; prefetching beyond is harmless.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let (mut codes, mut scales) = (x.codes.as_ptr(), x.scales.as_ptr());
            for block in panel.blocks.chunks_exact(Panel::bytes(NIBBLES, panel.group)) {
                let mut sums = [[_mm256_setzero_si256(); 2]; M];
                let mut from = block.as_ptr().add(2 * NR);
                for _ in 0..panel.group / 4 {
                    _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(AHEAD));
                    let w = if NIBBLES {
                        values(_mm256_loadu_si256(from.cast()))
                    } else {
                        [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())]
                    };
                    from = from.add(if NIBBLES { 32 } else { 64 });
                    for half in 0..2 {
                        // No pair of products is beyond 16 bits, because neither side has -128.
                        let size = _mm256_abs_epi8(w[half]);
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let four = _mm256_set1_epi32(codes.add(4 * r).cast::<i32>().read_unaligned());
                            let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four, w[half]));
                            sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
                        }
                    }
                    codes = codes.add(4 * M);
                }
                for half in 0..2 {
                    let scale = _mm256_cvtph_ps(_mm_loadu_si128(block.as_ptr().add(16 * half).cast()));
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
    pub unsafe fn vnni<const M: usize, const NIBBLES: bool>(panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]]) {
        // SAFETY: by the caller's promise; prefetching beyond is harmless.
        unsafe {
            // The instruction takes one side without sign: weights 128 larger, for which sums begin lower.
            let larger = _mm512_set1_epi8(-128);
            let table = _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128(VALUES.as_ptr().cast())), larger);
            let low = _mm512_set1_epi8(15);
            let (mut codes, mut scales, mut offsets) = (x.codes.as_ptr(), x.scales.as_ptr(), x.offsets.as_ptr());
            let mut totals: [__m512; M] = std::array::from_fn(|r| _mm512_loadu_ps(acc[r].as_ptr()));
            for block in panel.blocks.chunks_exact(Panel::bytes(NIBBLES, panel.group)) {
                let mut sums: [__m512i; M] = std::array::from_fn(|r| _mm512_set1_epi32(*offsets.add(r)));
                let mut from = block.as_ptr().add(2 * NR);
                for _ in 0..panel.group / 4 {
                    _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(AHEAD));
                    let w = if NIBBLES {
                        let bytes = _mm256_loadu_si256(from.cast());
                        let high = _mm256_srli_epi16::<4>(bytes);
                        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(bytes), high);
                        _mm512_shuffle_epi8(table, _mm512_and_si512(both, low))
                    } else {
                        _mm512_xor_si512(_mm512_loadu_si512(from.cast()), larger)
                    };
                    from = from.add(if NIBBLES { 32 } else { 64 });
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let four = codes.add(4 * r).cast::<i32>().read_unaligned();
                        *sum = _mm512_dpbusd_epi32(*sum, w, _mm512_set1_epi32(four));
                    }
                    codes = codes.add(4 * M);
                }
                let scale = _mm512_cvtph_ps(_mm256_loadu_si256(block.as_ptr().cast()));
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
