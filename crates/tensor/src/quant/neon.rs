//! Products on ARM, by the instruction that adds four products of 8 bits to a sum (`sdot`, ARMv8.2's dot products).

use super::{MR, NR, Rows, scale};
use crate::codes::{Code, VALUES};
use std::arch::aarch64::*;
use std::arch::asm;

/// The products of a panel with rows of x, as many as `acc` has: whether this machine can.
pub(super) fn product(code: Code, panel: &[u8], x: &Rows, acc: &mut [[f32; NR]]) -> bool {
    if !std::arch::is_aarch64_feature_detected!("dotprod") {
        return false;
    }
    assert!(panel.len() == x.groups * code.bytes() && acc.len() == x.count() && x.group == code.group());
    for (first, acc) in acc.chunks_mut(MR).enumerate().map(|(i, acc)| (i * MR, acc)) {
        macro_rules! with {
            ($($m:literal)*) => {
                match acc.len() {
                    // SAFETY: the feature is there, and lengths were checked.
                    $($m => unsafe { rows::<$m>(code, panel, x, first, acc) },)*
                    _ => {}
                }
            };
        }
        with!(1 2 3 4 5 6);
    }
    true
}

/// # Safety
/// Dot products are there; `panel` has as many groups as x, of `code`; x has M rows from `first` on, `acc` M.
#[target_feature(enable = "neon,dotprod")]
unsafe fn rows<const M: usize>(code: Code, panel: &[u8], x: &Rows, first: usize, acc: &mut [[f32; NR]]) {
    // SAFETY: by the caller's promise: four inputs of 16 outputs are 64 bytes of 8 bits or 32 of 4.
    unsafe {
        let (table, low, width) = (vld1q_s8(VALUES.as_ptr()), vdupq_n_u8(15), x.groups * x.group);
        for (g, block) in panel.chunks_exact(code.bytes()).enumerate() {
            let mut sums = [[vdupq_n_s32(0); 4]; M];
            let mut from = block.as_ptr().add(2 * NR);
            for j in (0..x.group).step_by(4) {
                // Each of four outputs, of each four inputs: in order, or 0, 2, 1, 3.
                let weights = match code {
                    Code::Int8 => {
                        let [a, b, c, d] = std::array::from_fn(|i| vld1q_s16(from.add(16 * i).cast()));
                        from = from.add(64);
                        [vzip1q_s16(a, c), vzip2q_s16(a, c), vzip1q_s16(b, d), vzip2q_s16(b, d)]
                            .map(|w| vreinterpretq_s8_s16(w))
                    }
                    Code::Q4 => {
                        let (a, b) = (vld1q_u8(from), vld1q_u8(from.add(16)));
                        from = from.add(32);
                        [vandq_u8(a, low), vandq_u8(b, low), vshrq_n_u8::<4>(a), vshrq_n_u8::<4>(b)]
                            .map(|codes| vqtbl1q_s8(table, codes))
                    }
                };
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = x.codes.as_ptr().add((first + r) * width + g * x.group + j);
                    let four = match code {
                        Code::Int8 => [0, 1, 2, 3],
                        Code::Q4 => [0, 2, 1, 3],
                    };
                    let four = vdupq_n_s32(i32::from_le_bytes(four.map(|i| *x.add(i) as i8 as u8)));
                    sums.iter_mut().zip(weights).for_each(|(sum, w)| *sum = dot(*sum, w, four));
                }
            }
            let scales: [f32; NR] = std::array::from_fn(|i| scale(block, i));
            for (r, (acc, sums)) in acc.iter_mut().zip(sums).enumerate() {
                let of_row = vdupq_n_f32(x.scales[(first + r) * x.groups + g]);
                for (i, sum) in sums.into_iter().enumerate() {
                    let (to, scale) = (acc.as_mut_ptr().add(4 * i), vld1q_f32(scales.as_ptr().add(4 * i)));
                    vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(sum), vmulq_f32(scale, of_row)));
                }
            }
        }
    }
}

/// `sum` and in each lane the four products of `a` and `b` there. The intrinsic of that name is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sum: int32x4_t, a: int8x16_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: the instruction is there, and changes this register alone.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}
