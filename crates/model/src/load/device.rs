//! The matrices of a model on their way to a GPU: which of them lie together, in which type and which way round.

use super::{kept_as, packed_layout};
use crate::tensors::{Place, place};
use crate::{Config, Error};
use anser_ops::{Weight, decode};
use anser_tensor::{Code, CodedPlaces, Context, DType, DeviceMatrix, DisjointMut, WeightType};
use half::f16;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The matrices of a layer that read interpolations of one vector, in the order in which they lie one after another on a GPU, all [out, in]; attention blocks have the first three and
/// a gate, if there is one. In codes, the first and the last of these lists lie together, and the second for itself.
const STACK: [&str; 3] = ["att.receptance.weight", "att.key.weight", "att.value.weight"];
/// First halves of low-rank maps.
const STACK_DOWN: [&str; 4] = ["att.v1", "att.w1", "att.a1", "att.g1"];
/// The gate of attention.
const STACK_GATE: [&str; 1] = ["att.gate.weight"];

/// The second halves of the low-rank maps, in the order of their first halves, all [in, out].
const STACK_UP: [&str; 4] = ["att.v2", "att.w2", "att.a2", "att.g2"];

/// What a matrix is read into on its way to a GPU.
pub(super) enum To<'a> {
    /// Values in the type of activations.
    Values(&'a mut [u8]),
    /// Codes of 8 bits of all outputs, and their scales.
    Codes(&'a mut [u8], &'a mut [f16]),
}

impl To<'_> {
    /// From values: `read(start, values)` gives those from the `start`-th on. The first that is not finite.
    pub(super) fn fill(self, ctx: &Context, shape: &[usize], read: impl Fn(usize, &mut [f32]) + Sync) -> Option<usize> {
        match self {
            To::Values(out) => encode(ctx, out, read),
            To::Codes(codes, scales) => {
                let k = shape[1];
                by_output(ctx, k, codes, scales, |o, codes, scales| {
                    let mut values = vec![0.0; k];
                    read(o * k, &mut values);
                    Code::Int8.encode(&values, codes, scales);
                    values.iter().position(|v| !v.is_finite())
                })
            }
        }
    }
}

/// Codes and scales of all outputs of a matrix with k inputs, by `work`, which says which of an output's weights is not finite. The first of these.
pub(super) fn by_output(
    ctx: &Context, k: usize, codes: &mut [u8], scales: &mut [f16],
    work: impl Fn(usize, &mut [u8], &mut [f16]) -> Option<usize> + Sync,
) -> Option<usize> {
    let (outputs, groups) = (codes.len() / k, k.div_ceil(Code::Int8.group()));
    let bad = AtomicUsize::new(usize::MAX);
    let (codes, scales) = (DisjointMut::new(codes), DisjointMut::new(scales));
    ctx.threads().run(outputs, |o| {
        // SAFETY: every task has its own output.
        let (codes, scales) = unsafe { (codes.get(o * k..(o + 1) * k), scales.get(o * groups..(o + 1) * groups)) };
        if let Some(i) = work(o, codes, scales) {
            bad.fetch_min(o * k + i, Ordering::Relaxed);
        }
    });
    Some(bad.into_inner()).filter(|&i| i != usize::MAX)
}

/// Whether a matrix is kept in codes of 8 bits on a GPU: what [`kept_as`] keeps so, but for the embedding, of which a row is read, and matrices whose inputs make no whole
/// groups.
fn coded_on_device(kept: WeightType, name: &str, shape: &[usize]) -> bool {
    kept_as(kept, name, shape) == Some(WeightType::Int8)
        && !name.ends_with("emb.weight")
        && shape[1].is_multiple_of(Code::Int8.group())
}

/// Copies the matrices to the GPU, in the type of activations or in codes of 8 bits, one after another; `read` gives a tensor's values or codes. Those of [`STACK`] of a layer share
/// a buffer, and those of [`STACK_UP`]; the second matrix of channel mixing lies [in, out] if it is neither in codes nor of a narrow model ([`decode::WHOLE`]), so that rows under zeros can be skipped.
pub(super) fn to_device(
    ctx: &Context, config: &Config, kept: WeightType, read: impl Fn(&str, &[usize], To<'_>) -> Result<(), Error>,
) -> Result<HashMap<String, Weight>, Error> {
    let list = config.tensors();
    let shapes: HashMap<&str, &[usize]> = list.iter().map(|(name, shape, _)| (name.as_str(), &shape[..])).collect();
    let mut weights = HashMap::new();
    // Outputs, or rows of zeros, behind the gates of attention: what a step computes of them has sequences at aligned places.
    let gated = |names: &[String]| names.iter().any(|name| place(name).1 == STACK_GATE[0]);
    let mut values = Vec::new();
    let mut copy = |names: &[String]| -> Result<(), Error> {
        let size = |name: &String| shapes[name.as_str()].iter().product::<usize>();
        let len: usize = names.iter().map(size).sum();
        let all = if gated(names) { config.attention_rows() * config.n_embd } else { len };
        let mut buf = ctx.alloc(all);
        buf.write_raw(len, &vec![0; (all - len) * ctx.dtype().size()]);
        let (mut start, mut places) = (0, Vec::new());
        for name in names {
            let (shape, stored) = (shapes[name.as_str()], packed_layout(name) == Some(true));
            let (outputs, inputs) = if stored { (shape[1], shape[0]) } else { (shape[0], shape[1]) };
            let skipped = config.n_embd > decode::WHOLE && name.ends_with("ffn.value.weight");
            let in_out = (stored && !STACK_DOWN.contains(&place(name).1)) || skipped;
            values.resize(size(name) * ctx.dtype().size(), 0);
            read(name, shape, To::Values(&mut values))?;
            if stored != in_out {
                let of = (&values[..], shape[0], shape[1]);
                values = if ctx.dtype() == DType::F32 { transposed::<4>(ctx, of) } else { transposed::<2>(ctx, of) };
            }
            buf.write_raw(start, &values);
            let digest = DeviceMatrix::digest_of(ctx.dtype(), &values);
            places.push((name, start, (outputs, inputs), in_out, digest));
            start += size(name);
        }
        ctx.check()?;
        let buf = Arc::new(buf);
        for (name, start, shape, in_out, digest) in places {
            weights.insert(name.clone(), Weight::Device(DeviceMatrix::new(&buf, start, shape, in_out, digest)));
        }
        Ok(())
    };
    let mut coded = HashMap::new();
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    let mut copy_codes = |names: &[String]| -> Result<(), Error> {
        let k = shapes[names[0].as_str()][1];
        let rows: usize = names.iter().map(|name| shapes[name.as_str()][0]).sum();
        let all = if gated(names) { config.attention_rows() } else { rows };
        let mut buf = ctx.alloc_f32(all * k / 4);
        buf.write_raw(rows * k / 4, &vec![0; (all - rows) * k]);
        let mut placed = vec![0u16; CodedPlaces::len(all, k)];
        let (mut first, mut places) = (0, Vec::new());
        for name in names {
            let (shape, groups) = (shapes[name.as_str()], k / Code::Int8.group());
            codes.resize(shape[0] * k, 0);
            scales.resize(shape[0] * groups, f16::ZERO);
            read(name, shape, To::Codes(&mut codes, &mut scales))?;
            buf.write_raw(first * k / 4, &codes);
            for (o, scales) in scales.chunks_exact(groups).enumerate() {
                for (g, s) in scales.iter().enumerate() {
                    placed[CodedPlaces::at(all, first + o, g)] = s.to_bits();
                }
            }
            places.push((name, first, (shape[0], k), DeviceMatrix::digest_of_codes(&codes, &scales)));
            first += shape[0];
        }
        let mut scales = ctx.alloc_f32(placed.len() / 2);
        let bytes: Vec<u8> = placed.iter().flat_map(|s| s.to_le_bytes()).collect();
        scales.write_raw(0, &bytes);
        ctx.check()?;
        let (buf, scales) = (Arc::new(buf), Arc::new(scales));
        for (name, first, shape, digest) in places {
            let places = CodedPlaces { scales: scales.clone(), first, outputs: all };
            coded.insert(name.clone(), Weight::Device(DeviceMatrix::coded(&buf, shape, places, digest)));
        }
        Ok(())
    };
    let (stacked, whole) = ([&STACK[..], &STACK_GATE].concat(), [&STACK[..], &STACK_DOWN, &STACK_GATE].concat());
    let blocks = (0..config.n_layer).map(Place::Block).chain((0..config.attention_layers()).map(Place::Attention));
    for block in blocks.map(|place| config.prefix(place)) {
        let there = |parts: &[&str]| -> Vec<String> {
            let all = parts.iter().map(|m| format!("{block}{m}"));
            all.filter(|name| shapes.contains_key(name.as_str())).collect()
        };
        let first = there(&stacked);
        let all_coded = |names: &[String]| names.iter().all(|n| coded_on_device(kept, n, shapes[n.as_str()]));
        let rest: &[&[&str]] = if !first.is_empty() && all_coded(&first) {
            copy_codes(&first)?;
            &[&STACK_DOWN, &STACK_UP]
        } else {
            &[&whole, &STACK_UP]
        };
        for names in rest.iter().map(|parts| there(parts)).filter(|names| !names.is_empty()) {
            copy(&names)?;
        }
    }
    for (name, shape, _) in &list {
        let (at, part) = place(name);
        let stacked = !matches!(at, Place::Outside) && (whole.contains(&part) || STACK_UP.contains(&part));
        if packed_layout(name).is_some() && !stacked {
            let one = std::slice::from_ref(name);
            if coded_on_device(kept, name, shape) { copy_codes(one)? } else { copy(one)? }
        }
    }
    weights.extend(coded);
    Ok(weights)
}

/// A matrix [rows, cols] of elements of S bytes as [cols, rows].
fn transposed<const S: usize>(ctx: &Context, (x, rows, cols): (&[u8], usize, usize)) -> Vec<u8> {
    const TILE: usize = 32;
    let mut y = vec![0; x.len()];
    let shared = DisjointMut::new(&mut y);
    let x = x.as_chunks::<S>().0;
    ctx.threads().run(cols.div_ceil(TILE), |t| {
        let first = t * TILE;
        let n = TILE.min(cols - first);
        // SAFETY: every task has its own rows of y.
        let to = unsafe { shared.get(first * rows * S..(first + n) * rows * S) };
        let to = to.as_chunks_mut::<S>().0;
        for (r, row) in x.chunks_exact(cols).enumerate() {
            for (j, v) in row[first..first + n].iter().enumerate() {
                to[j * rows + r] = *v;
            }
        }
    });
    y
}

/// Elements that one thread converts at a time.
const PIECE: usize = 1 << 15;

/// Runs `work` on pieces of `out`, values of the type of activations, given with the number of their first one; it says which value is not finite. The first of these.
fn in_pieces(ctx: &Context, out: &mut [u8], work: impl Fn(usize, &mut [u8]) -> Option<usize> + Sync) -> Option<usize> {
    let (size, len) = (ctx.dtype().size(), out.len());
    let bad = AtomicUsize::new(usize::MAX);
    let shared = DisjointMut::new(out);
    ctx.threads().run(len.div_ceil(PIECE * size), |t| {
        // SAFETY: every task has its own piece.
        let to = unsafe { shared.get(t * PIECE * size..len.min((t + 1) * PIECE * size)) };
        if let Some(i) = work(t * PIECE, to) {
            bad.fetch_min(t * PIECE + i, Ordering::Relaxed);
        }
    });
    Some(bad.into_inner()).filter(|&i| i != usize::MAX)
}

/// Puts values into `out` in the type of activations; `read(start, values)` gives those from the `start`-th on. The first that is not finite.
fn encode(ctx: &Context, out: &mut [u8], read: impl Fn(usize, &mut [f32]) + Sync) -> Option<usize> {
    in_pieces(ctx, out, |start, to| {
        let mut values = vec![0.0; to.len() / ctx.dtype().size()];
        read(start, &mut values);
        ctx.dtype().encode(&values, to);
        values.iter().position(|v| !v.is_finite())
    })
}

/// Copies values of the type of activations. The first that is not finite.
pub(super) fn copy_finite(ctx: &Context, from: &[u8], out: &mut [u8]) -> Option<usize> {
    let size = ctx.dtype().size();
    in_pieces(ctx, out, |start, to| {
        to.copy_from_slice(&from[start * size..][..to.len()]);
        let all = |mask: u16| to.as_chunks().0.iter().position(|b| u16::from_le_bytes(*b) & mask == mask);
        match ctx.dtype() {
            DType::F16 => all(0x7c00),
            DType::BF16 => all(0x7f80),
            DType::F32 => to.as_chunks().0.iter().position(|b| !f32::from_le_bytes(*b).is_finite()),
        }
    })
}
