//! Rounding weights to codes of 8, 5 or 4 bits.
//!
//! A weight is a code times the scale of its group: 64 inputs of an output with 8 bits, 32 with fewer. Codes of 8 bits are -127 to 127; those of 4 bits
//! stand for 16 values that lie closer where weights are frequent, those of 5 bits for -16 to 15.

use half::f16;

/// What the codes of 4 bits stand for, times the scale: values with the least square error for normal weights, scaled so that the
/// one farthest from zero in a group of 32 is the first.
pub(crate) const VALUES: [i8; 16] = [-127, -101, -79, -61, -46, -32, -19, -7, 5, 17, 29, 42, 56, 72, 90, 112];
/// What the codes of 5 bits stand for.
const EVEN: [i8; 32] = {
    let (mut values, mut i) = ([0; 32], 0);
    while i < 32 {
        values[i] = i as i8 - 16;
        i += 1;
    }
    values
};
/// The scales that are tried for a group, relative to one that puts the largest weight at an end.
const TRIED: [f32; 9] = [0.85, 0.8875, 0.925, 0.9625, 1.0, 1.0375, 1.075, 1.1125, 1.15];

/// How often codes, and then their scale, are made anew.
const ROUNDS: usize = 2;

/// How weights are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// A byte a weight, from -127 to 127.
    Int8,
    /// Two weights a byte, the first one in the low half.
    Q4,
    /// 32 weights in 20 bytes: their low bits as in `Q4`, then the high bits, the first one lowest.
    Q5,
}

impl Code {
    /// All of them.
    pub const ALL: [Code; 3] = [Code::Int8, Code::Q5, Code::Q4];

    /// Bits of a code.
    pub const fn bits(self) -> usize {
        match self {
            Code::Int8 => 8,
            Code::Q4 => 4,
            Code::Q5 => 5,
        }
    }

    /// Inputs of a group.
    pub const fn group(self) -> usize {
        match self {
            Code::Int8 => 64,
            Code::Q4 | Code::Q5 => 32,
        }
    }

    /// Bytes of so many codes.
    pub const fn bytes_of(self, codes: usize) -> usize {
        match self {
            Code::Int8 => codes,
            Code::Q4 => codes.div_ceil(2),
            Code::Q5 => codes.div_ceil(32) * 20,
        }
    }

    /// Codes of the weights of an output, and the scales of its groups. The last group may be shorter.
    ///
    /// # Panics
    /// If there is not the room of as many.
    pub fn encode(self, weights: &[f32], codes: &mut [u8], scales: &mut [f16]) {
        let group = self.group();
        assert!(codes.len() == self.bytes_of(weights.len()) && scales.len() == weights.len().div_ceil(group));
        for ((weights, codes), scale) in weights.chunks(group).zip(codes.chunks_mut(self.bytes_of(group))).zip(scales) {
            match self {
                Code::Int8 => *scale = int8(weights, codes),
                Code::Q4 | Code::Q5 => {
                    let mut whole = [0.0; 32];
                    whole[..weights.len()].copy_from_slice(weights);
                    let (best, of) = crate::simd::vectorize(
                        #[inline(always)]
                        || if self == Code::Q4 { best(&whole, &VALUES) } else { best(&whole, &EVEN) },
                    );
                    *scale = best;
                    codes.iter_mut().zip(of.as_chunks::<2>().0).for_each(|(to, c)| *to = c[0] & 15 | c[1] << 4);
                    if self == Code::Q5 {
                        let high = of.iter().rev().fold(0, |bits, c| bits << 1 | u32::from(c >> 4));
                        codes[16..].copy_from_slice(&high.to_le_bytes());
                    }
                }
            }
        }
    }
}

fn int8(weights: &[f32], codes: &mut [u8]) -> f16 {
    let largest = weights.iter().fold(0f32, |l, w| l.max(w.abs()));
    let scale = rounded(largest / 127.0);
    let inverse = scale.to_f32().recip();
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let code = |(c, w): (&mut u8, &f32)| *c = (w * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
    codes.iter_mut().zip(weights).for_each(code);
    scale
}

/// The nearest number of type f16, the largest one instead of infinity.
fn rounded(v: f32) -> f16 {
    f16::from_f32(v.clamp(-65504.0, 65504.0))
}

/// The scale and codes of 32 weights with the least square error among those found: from each scale tried, which puts the weight farthest from zero at
/// one end or the other, codes and the best scale for them are made in turn.
#[inline(always)]
fn best<const N: usize>(weights: &[f32; 32], values: &[i8; N]) -> (f16, [u8; 32]) {
    let largest = weights.iter().fold(0f32, |l, &w| if w.abs() > l.abs() { w } else { l });
    let mut found = (f32::INFINITY, f16::ZERO, 0.0);
    for end in [values[0], values[N - 1]] {
        for factor in TRIED {
            let mut scale = largest / f32::from(end) * factor;
            let (mut inverse, mut near) = (0.0, [0.0; 32]);
            for _ in 0..ROUNDS {
                inverse = scale.recip();
                near = nearest(weights.map(|w| w * inverse), values);
                scale = dot(weights, &near) / dot(&near, &near);
            }
            let scale = rounded(scale);
            let mut off = *weights;
            off.iter_mut().zip(near).for_each(|(w, v)| *w -= scale.to_f32() * v);
            let error = dot(&off, &off);
            // Not if something was no number.
            if error < found.0 && inverse.is_finite() {
                found = (error, scale, inverse);
            }
        }
    }
    let code = |w: &f32| values.windows(2).map(|two| u8::from(w * found.2 > middle(two))).sum();
    let mut codes = [0; 32];
    codes.iter_mut().zip(weights).for_each(|(c, w)| *c = code(w));
    (found.1, codes)
}

/// The nearest of the values, which ascend, to each of some numbers.
#[inline(always)]
fn nearest<const N: usize>(of: [f32; 32], values: &[i8; N]) -> [f32; 32] {
    let mut near = [f32::from(values[0]); 32];
    for two in values.windows(2) {
        let (middle, step) = (middle(two), f32::from(i16::from(two[1]) - i16::from(two[0])));
        for i in 0..32 {
            near[i] += if of[i] > middle { step } else { 0.0 };
        }
    }
    near
}

#[inline(always)]
fn middle(two: &[i8]) -> f32 {
    0.5 * f32::from(i16::from(two[0]) + i16::from(two[1]))
}

/// The sum of products, in eight sums.
#[inline(always)]
fn dot(a: &[f32; 32], b: &[f32; 32]) -> f32 {
    let mut sums = [0f32; 8];
    for (a, b) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.into_iter().sum()
}
