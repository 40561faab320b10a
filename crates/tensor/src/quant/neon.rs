//! Products on ARM, by the instruction that adds four products of 8 bits to a sum (`sdot`, ARMv8.2's dot products).

use super::dot::Panel;
use super::rows::Tile;
use super::{NR, scale};
use crate::codes::VALUES;
use std::arch::aarch64::*;
use std::arch::asm;

/// # Safety
/// Dot products are there; acc has M rows, and x the panel's groups of as many.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn dot<const M: usize, const NIBBLES: bool>(panel: Panel<'_>, x: Tile<'_>, acc: &mut [[f32; NR]]) {
    // SAFETY: by the caller's promise: four inputs of 16 outputs are 64 bytes of 8 bits or 32 of 4.
    unsafe {
        let (table, low) = (vld1q_s8(VALUES.as_ptr()), vdupq_n_u8(15));
        let (mut codes, mut of_rows) = (x.codes.as_ptr(), x.scales.as_ptr());
        for block in panel.blocks.chunks_exact(Panel::bytes(NIBBLES, panel.group)) {
            let mut sums = [[vdupq_n_s32(0); 4]; M];
            let mut from = block.as_ptr().add(2 * NR);
            for _ in 0..panel.group / 4 {
                // Each has four inputs of four outputs.
                let weights = if NIBBLES {
                    let (a, b) = (vld1q_u8(from), vld1q_u8(from.add(16)));
                    [vandq_u8(a, low), vandq_u8(b, low), vshrq_n_u8::<4>(a), vshrq_n_u8::<4>(b)]
                        .map(|codes| vqtbl1q_s8(table, codes))
                } else {
                    std::array::from_fn(|i| vld1q_s8(from.add(16 * i).cast()))
                };
                from = from.add(if NIBBLES { 32 } else { 64 });
                for (r, sums) in sums.iter_mut().enumerate() {
                    let four = vdupq_n_s32(codes.add(4 * r).cast::<i32>().read_unaligned());
                    sums.iter_mut().zip(weights).for_each(|(sum, w)| *sum = products(*sum, w, four));
                }
                codes = codes.add(4 * M);
            }
            let scales: [f32; NR] = std::array::from_fn(|i| scale(block, i));
            for (r, (acc, sums)) in acc.iter_mut().zip(sums).enumerate() {
                let of_row = vdupq_n_f32(*of_rows.add(r));
                for (i, sum) in sums.into_iter().enumerate() {
                    let (to, scale) = (acc.as_mut_ptr().add(4 * i), vld1q_f32(scales.as_ptr().add(4 * i)));
                    vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(sum), vmulq_f32(scale, of_row)));
                }
            }
            of_rows = of_rows.add(M);
        }
    }
}

/// `sum` and in each lane the four products of `a` and `b` there. The intrinsic of that name is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn products(mut sum: int32x4_t, a: int8x16_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: the instruction is there, and changes this register alone.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}
