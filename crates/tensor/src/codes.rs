//! Rounding weights to codes of 8 or 4 bits.
//!
//! A weight is a code times the scale of its group: 64 inputs of an output with 8 bits, 32 with 4. Codes of 8 bits are -127 to 127; those of 4 bits
//! stand for 16 values that lie closer where weights are frequent.

use half::f16;

/// What the codes of 4 bits stand for, times the scale: values with the least square error for normal weights, scaled so that the
/// one farthest from zero in a group of 32 is the first.
pub(crate) const VALUES: [i8; 16] = [-127, -101, -79, -61, -46, -32, -19, -7, 5, 17, 29, 42, 56, 72, 90, 112];
/// The scales that are tried for a group of 4 bits, relative to that.
const TRIED: [f32; 9] = [0.85, 0.8875, 0.925, 0.9625, 1.0, 1.0375, 1.075, 1.1125, 1.15];

/// How weights are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// A byte a weight, from -127 to 127.
    Int8,
    /// Two weights a byte, the first one in the low half.
    Q4,
}

impl Code {
    /// Inputs of a group.
    pub const fn group(self) -> usize {
        match self {
            Code::Int8 => 64,
            Code::Q4 => 32,
        }
    }

    /// Bytes of so many codes.
    pub const fn bytes_of(self, codes: usize) -> usize {
        match self {
            Code::Int8 => codes,
            Code::Q4 => codes.div_ceil(2),
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
                Code::Q4 => {
                    let mut whole = [0.0; 32];
                    whole[..weights.len()].copy_from_slice(weights);
                    let (best, of) = best(&whole);
                    *scale = best;
                    codes.iter_mut().zip(of.as_chunks::<2>().0).for_each(|(to, c)| *to = c[0] | c[1] << 4);
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

/// For every whole number from -128 to 127 the code of the nearest value.
static NEAREST: [u8; 256] = nearest();

const fn nearest() -> [u8; 256] {
    let (mut table, mut i, mut code) = ([0; 256], 0, 0);
    while i < 256 {
        let v = i as i32 - 128;
        while code < 15 && 2 * v > VALUES[code] as i32 + VALUES[code + 1] as i32 {
            code += 1;
        }
        table[i] = code as u8;
        i += 1;
    }
    table
}

/// The scale and codes of 32 weights with the least square error among those tried, each scale then the best for its codes.
fn best(weights: &[f32; 32]) -> (f16, [u8; 32]) {
    let largest = weights.iter().fold(0f32, |l, &w| if w.abs() > l.abs() { w } else { l });
    let base = -largest / 127.0;
    let mut found = (f32::INFINITY, f16::ZERO, [NEAREST[128]; 32]);
    for factor in TRIED {
        let inverse = (base * factor).recip();
        if !inverse.is_finite() {
            continue;
        }
        let mut codes = [0; 32];
        let (mut wv, mut vv) = (0f32, 0f32);
        for (c, w) in codes.iter_mut().zip(weights) {
            *c = NEAREST[((w * inverse).round_ties_even().clamp(-128.0, 127.0) as i32 + 128) as usize];
            let v = f32::from(VALUES[*c as usize]);
            wv += w * v;
            vv += v * v;
        }
        let scale = rounded(wv / vv);
        let off = |(c, w): (&u8, &f32)| (w - scale.to_f32() * f32::from(VALUES[*c as usize])).powi(2);
        let error = codes.iter().zip(weights).map(off).sum();
        if error < found.0 {
            found = (error, scale, codes);
        }
    }
    (found.1, found.2)
}
