//! llama.cpp's quantised blocks, as its files hold them.
//!
//! A value is `q * d`, `q * d + m` or `q * (d * scale) - m * min`, with d and m in f16 for a block. Whatever the type, 32 values lie together; q of
//! value l of these, with `low` and `high` for the halves of a byte:
//!
//! | type | block | bytes of a block | q |
//! | --- | --- | --- | --- |
//! | Q8_0 | 32 | d, 32 q | whole number |
//! | Q4_0, Q4_1 | 32 | d, (Q4_1: m), 16 of q | low of byte l, from 16 on high of l - 16; Q4_0 less 8 |
//! | Q5_0, Q5_1 | 32 | d, (Q5_1: m), 4 of fifth bits, 16 of q | the same with bit l as the fifth; Q5_0 less 16 |
//! | Q4_K | 256 | d, m, 12 of 6-bit scales and mins, 128 of q | groups 2i and 2i + 1 are low and high of bytes 32i.. |
//! | Q5_K | 256 | d, m, 12 as in Q4_K, 32 of fifth bits, 128 of q | the same with bit g of byte l as the fifth |
//! | Q6_K | 256 | 128 of q, 64 of high bits, 16 scales, d | four bits and two bits, less 32; a scale for every 16 |

use crate::Dtype;
use half::f16;

/// Values that are decoded together.
const GROUP: usize = 32;

/// `out.len()` values from the `start`-th on.
pub(crate) fn read(dtype: Dtype, data: &[u8], start: usize, out: &mut [f32]) {
    let mut done = 0;
    while done < out.len() {
        let at = start + done;
        let n = (GROUP - at % GROUP).min(out.len() - done);
        out[done..done + n].copy_from_slice(&group(dtype, data, at / GROUP)[at % GROUP..][..n]);
        done += n;
    }
}

/// One value.
pub(crate) fn value(dtype: Dtype, data: &[u8], i: usize) -> f32 {
    group(dtype, data, i / GROUP)[i % GROUP]
}

/// The `i`-th 32 values.
fn group(dtype: Dtype, data: &[u8], i: usize) -> [f32; GROUP] {
    let groups = dtype.block() / GROUP;
    let (block, g) = (&data[i / groups * dtype.size()..][..dtype.size()], i % groups);
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    match dtype {
        Dtype::Q8_0 => {
            let d = half(0);
            std::array::from_fn(|l| f32::from(block[2 + l] as i8) * d)
        }
        Dtype::Q4_0 => {
            let (d, q) = (half(0), halves(&block[2..]));
            q.map(|q| (f32::from(q) - 8.0) * d)
        }
        Dtype::Q4_1 => {
            let (d, m, q) = (half(0), half(2), halves(&block[4..]));
            q.map(|q| f32::from(q) * d + m)
        }
        Dtype::Q5_0 => {
            let (d, q) = (half(0), with_fifth(&block[2..6], halves(&block[6..])));
            q.map(|q| (f32::from(q) - 16.0) * d)
        }
        Dtype::Q5_1 => {
            let (d, m, q) = (half(0), half(2), with_fifth(&block[4..8], halves(&block[8..])));
            q.map(|q| f32::from(q) * d + m)
        }
        Dtype::Q4K => {
            let (d, m) = scale_and_min(&block[4..16], g);
            let (d, m, q) = (half(0) * d, half(2) * m, &block[16 + g / 2 * 32..]);
            std::array::from_fn(|l| f32::from(q[l] >> (g % 2 * 4) & 15) * d - m)
        }
        Dtype::Q5K => {
            let (d, m) = scale_and_min(&block[4..16], g);
            let (d, m, fifth, q) = (half(0) * d, half(2) * m, &block[16..48], &block[48 + g / 2 * 32..]);
            std::array::from_fn(|l| f32::from(q[l] >> (g % 2 * 4) & 15 | (fifth[l] >> g & 1) << 4) * d - m)
        }
        Dtype::Q6K => {
            // Two halves of 128 values, each with four groups.
            let (n, g) = (g / 4, g % 4);
            let (q, high, scales) =
                (&block[n * 64 + g % 2 * 32..], &block[128 + n * 32..], &block[192 + n * 8 + g * 2..]);
            let d = [0, 1].map(|i| half(208) * f32::from(scales[i] as i8));
            std::array::from_fn(|l| {
                let q = q[l] >> (g / 2 * 4) & 15 | (high[l] >> (g * 2) & 3) << 4;
                (f32::from(q) - 32.0) * d[l / 16]
            })
        }
        // No other type has blocks.
        _ => [f32::NAN; GROUP],
    }
}

/// The low halves of 16 bytes, then the high ones.
fn halves(bytes: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|l| if l < 16 { bytes[l] & 15 } else { bytes[l - 16] >> 4 })
}

/// Adds bit l of four bytes to value l as its fifth.
fn with_fifth(bits: &[u8], q: [u8; GROUP]) -> [u8; GROUP] {
    std::array::from_fn(|l| q[l] | (bits[l / 8] >> (l % 8) & 1) << 4)
}

/// The scale and the minimum of a group, both of 6 bits: whole bytes for the first four groups, whose two spare bits each complete the other four.
fn scale_and_min(s: &[u8], g: usize) -> (f32, f32) {
    let (scale, min) = match g {
        0..4 => (s[g] & 63, s[g + 4] & 63),
        _ => (s[g + 4] & 15 | s[g - 4] >> 6 << 4, s[g + 4] >> 4 | s[g] >> 6 << 4),
    };
    (scale.into(), min.into())
}

/// Appends the values, a multiple of 32, as Q8_0: to the bit what llama.cpp makes of them.
pub(crate) fn write_q8_0(values: &[f32], out: &mut Vec<u8>) {
    for group in values.chunks(GROUP) {
        let d = group.iter().fold(0f32, |most, v| most.max(v.abs())) / 127.0;
        let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
        out.extend(f16::from_f32(d).to_le_bytes());
        out.extend(group.iter().map(|v| (v * inverse).round() as i8 as u8));
    }
}
