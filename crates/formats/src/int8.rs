//! Matrices in 8 bits, in safetensors files.
//!
//! A matrix `<name>` [out, in] is stored as I8 of that shape beside `<name>.scale` F16 [out, ceil(in / 64)]: element (o, i) is
//! `q[o, i] * scale[o, i / 64]`, with q in -127..=127. The metadata says `anser.int8 = "64"`, the number of inputs that share a scale.
//! Large matrices are stored so ([`is_large`]); everything else, low-rank matrices and vectors too, stays in F16. [`crate::Checkpoint`] shows the
//! pair as one tensor, whose values it gives multiplied.

use crate::{Dtype, Entry, Error, Source, TensorView};
use half::f16;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Inputs that share a scale.
pub const GROUP: usize = 64;
/// Key of the metadata that says so.
pub const INT8: &str = "anser.int8";
const SCALE: &str = ".scale";

/// Whether a tensor of this name and shape is stored in 8 bits: the matrices of a model, the embedding too, but for the low-rank ones.
pub fn is_large(name: &str, shape: &[usize]) -> bool {
    shape.len() == 2 && shape[1] >= GROUP && name.ends_with(".weight")
}

/// Rounds a matrix [out, inputs]: q as whole numbers, and the scales.
pub fn quantise(values: &[f32], inputs: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut q, mut scales) = (Vec::with_capacity(values.len()), Vec::new());
    for row in values.chunks(inputs.max(1)) {
        for group in row.chunks(GROUP) {
            let most = group.iter().fold(0f32, |m, v| m.max(v.abs()));
            let scale = f16::from_f32(most / 127.0).to_f32();
            scales.push(scale);
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            q.extend(group.iter().map(|v| (v * inverse).round_ties_even().clamp(-127.0, 127.0)));
        }
    }
    (q, scales)
}

/// What is lost: |rounded - values| / |values|, of all elements together.
pub fn error(values: &[f32], inputs: usize) -> f64 {
    let (q, scales) = quantise(values, inputs);
    let per_row = inputs.div_ceil(GROUP);
    let (mut lost, mut all) = (0f64, 0f64);
    for (i, (v, q)) in values.iter().zip(&q).enumerate() {
        let back = q * scales[i / inputs * per_row + i % inputs / GROUP];
        lost += f64::from(v - back).powi(2);
        all += f64::from(*v).powi(2);
    }
    if all > 0.0 { (lost / all).sqrt() } else { 0.0 }
}

/// The two tensors in which `t` is stored.
pub fn sources<'a>(t: TensorView<'a>) -> [Source<'a>; 2] {
    let (inputs, shape) = (t.shape()[1], t.shape().to_vec());
    let part = move |scales: bool| {
        let (q, s) = quantise(&t.to_f32_vec()?, inputs);
        t.release();
        Ok(Cow::Owned(if scales { s } else { q }))
    };
    let scale_shape = vec![shape[0], inputs.div_ceil(GROUP)];
    [
        Source { name: t.name().into(), shape, dtype: Dtype::I8, values: Box::new(move || part(false)) },
        Source {
            name: format!("{}{SCALE}", t.name()),
            shape: scale_shape,
            dtype: Dtype::F16,
            values: Box::new(move || part(true)),
        },
    ]
}

/// Takes the scales out of the tensors of a file that has matrices in 8 bits: by the names of their matrices.
pub(crate) fn scales(
    entries: &mut BTreeMap<String, Entry>, metadata: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Entry>, String> {
    match metadata.get(INT8).map(String::as_str) {
        None => return Ok(BTreeMap::new()),
        Some("64") => {}
        Some(other) => {
            return Err(format!("its int8 matrices have groups of {other}; this program reads groups of 64"));
        }
    }
    let mut scales = BTreeMap::new();
    let names: Vec<String> = entries.iter().filter(|(_, e)| e.dtype == Dtype::I8).map(|(n, _)| n.clone()).collect();
    for name in names {
        let scale = entries.remove(&format!("{name}{SCALE}"));
        let scale = scale.ok_or_else(|| format!("tensor {name}{SCALE} is missing: the file is incomplete"))?;
        let &[out, inputs] = &entries[&name].shape[..] else {
            return Err(format!("tensor {name} of I8 is no matrix"));
        };
        if scale.dtype != Dtype::F16 || scale.shape != [out, inputs.div_ceil(GROUP)] {
            return Err(format!(
                "tensor {name}{SCALE} is {} {:?} and does not fit its matrix",
                scale.dtype, scale.shape
            ));
        }
        scales.insert(name, scale);
    }
    Ok(scales)
}

/// `out.len()` elements from the `start`-th on of the matrix `q` [.., inputs] with its scales, both as bytes.
pub(crate) fn read(q: &[u8], scales: &[u8], inputs: usize, start: usize, out: &mut [f32]) {
    let (scales, per_row) = (scales.as_chunks::<2>().0, inputs.div_ceil(GROUP));
    let mut done = 0;
    while done < out.len() {
        let (row, col) = ((start + done) / inputs, (start + done) % inputs);
        // To the end of the group or of the row.
        let n = (GROUP - col % GROUP).min(inputs - col).min(out.len() - done);
        let scale = f16::from_le_bytes(scales[row * per_row + col / GROUP]).to_f32();
        let from = &q[start + done..][..n];
        out[done..done + n].iter_mut().zip(from).for_each(|(o, q)| *o = f32::from(*q as i8) * scale);
        done += n;
    }
}

/// Why a tensor of I8 without scales is no weight.
pub(crate) fn missing(name: &str) -> Error {
    let reason = format!("it holds I8 and the file does not say {INT8}; weights must be floating-point numbers");
    Error::Tensor { name: name.into(), reason }
}
