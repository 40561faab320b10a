//! Products on ARM, by the instruction that adds four products of 8 bits to a sum (`sdot`, ARMv8.2's dot products).

use super::NR;
use super::dot::{HIGH, Panel};
use super::rows::Tile;
use crate::codes::{Code, VALUES};
use std::arch::aarch64::*;
use std::arch::asm;

/// As [`super::dot::dot`], which has checked lengths, for up to 6 rows: whether this machine can.
pub(super) fn dot(panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]]) -> bool {
    if !std::arch::is_aarch64_feature_detected!("dotprod") {
        return false;
    }
    macro_rules! with {
        ($($m:literal)*) => {
            match acc.len() {
                // SAFETY: the feature is there, and lengths were checked.
                $($m => unsafe { rows::<$m>(panel, x, acc) },)*
                _ => return false,
            }
        };
    }
    with!(1 2 3 4 5 6);
    true
}

/// # Safety
/// Dot products are there; acc has M rows, and x the panel's groups of as many.
#[target_feature(enable = "neon,dotprod")]
unsafe fn rows<const M: usize>(panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]]) {
    // SAFETY: by the caller's promise.
    unsafe {
        let even: [i8; 16] = std::array::from_fn(|i| i as i8 - 16);
        let (table, low) = (vld1q_s8(if panel.code == Code::Q5 { &even } else { &VALUES }.as_ptr()), vdupq_n_u8(15));
        let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
        let (fours, bytes, mut scales) = (panel.group / 4, panel.bytes(), x.scales.as_ptr());
        for (g, of) in panel.scales.chunks_exact(NR).enumerate() {
            let mut sums = [[vdupq_n_s32(0); 4]; M];
            let mut four = |i: usize| {
                let (from, codes) = (panel.codes.as_ptr(), x.codes.as_ptr().add(i * 4 * M));
                // Each of four outputs, of each four inputs.
                let (group, q) = (from.add(i / fours * bytes), i % fours);
                let mut weights = if panel.code == Code::Int8 {
                    std::array::from_fn(|half| vld1q_s8(group.add(64 * q + 16 * half).cast()))
                } else {
                    let from = group.add(32 * q);
                    let (a, b) = (vld1q_u8(from), vld1q_u8(from.add(16)));
                    [vandq_u8(a, low), vandq_u8(b, low), vshrq_n_u8::<4>(a), vshrq_n_u8::<4>(b)]
                        .map(|codes| vqtbl1q_s8(table, codes))
                };
                if panel.code == Code::Q5 {
                    for (i, w) in weights.iter_mut().enumerate() {
                        let high = group.add(HIGH + 8 * q + 2 * i);
                        let bits = vcombine_u8(vdup_n_u8(*high), vdup_n_u8(*high.add(1)));
                        let larger = vandq_u8(vtstq_u8(bits, bit), vdupq_n_u8(16));
                        *w = vaddq_s8(*w, vreinterpretq_s8_u8(larger));
                    }
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let four = vdupq_n_s32(codes.add(4 * r).cast::<i32>().read_unaligned());
                    sums.iter_mut().zip(weights).for_each(|(sum, w)| *sum = add(*sum, w, four));
                }
            };
            match x.live {
                Some(live) if M == 1 => live.of(g).for_each(|(i, _)| four(i)),
                _ => (g * fours..(g + 1) * fours).for_each(four),
            }
            let of: [f32; NR] = std::array::from_fn(|i| of[i].to_f32());
            for (r, (acc, sums)) in acc.iter_mut().zip(sums).enumerate() {
                let of_row = vdupq_n_f32(*scales.add(r));
                for (i, sum) in sums.into_iter().enumerate() {
                    let (to, scale) = (acc.as_mut_ptr().add(4 * i), vld1q_f32(of.as_ptr().add(4 * i)));
                    vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(sum), vmulq_f32(scale, of_row)));
                }
            }
            scales = scales.add(M);
        }
    }
}

/// `sum` and in each lane the four products of `a` and `b` there. The intrinsic of that name is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add(mut sum: int32x4_t, a: int8x16_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: the instruction is there, and changes this register alone.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}
