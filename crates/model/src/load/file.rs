//! Tensors of a checkpoint: each is checked and goes straight to its final place.

use super::device::{To, by_output, copy_finite};
use super::{Tensors, pack};
use crate::Error;
use anser_formats::coded::{Coded, NO_CODE};
use anser_formats::{Checkpoint, Dtype, TensorView};
use anser_tensor::{Code, Context, DType, Packed, WeightType};
use half::f16;
use std::sync::atomic::{AtomicUsize, Ordering};

impl Tensors for Checkpoint {
    fn copy(&self, ctx: &Context, name: &str, shape: &[usize], to: To<'_>) -> Result<(), Error> {
        let t = find(self, name, shape)?;
        // An element type that is no float shows at once; after that reading cannot fail.
        t.read_f32_from(0, &mut [])?;
        let stored = t.bytes().filter(|_| is_same(t.dtype(), ctx.dtype()));
        let coded = t.coded().filter(|c| c.dtype == Dtype::I8 && t.shape() == shape);
        let bad = match (to, stored, coded) {
            (To::Values(out), Some(bytes), _) => copy_finite(ctx, bytes, out),
            (To::Codes(codes, scales), _, Some(coded)) => {
                by_output(ctx, shape[1], codes, scales, |o, codes, scales| {
                    copy_coded(&coded, Code::Int8, o, codes, scales)
                })
            }
            (to, ..) => to.fill(ctx, shape, |start, values| {
                if t.read_f32_from(start, values).is_err() {
                    values.fill(f32::NAN);
                }
            }),
        };
        t.release();
        bad.map_or(Ok(()), |i| Err(not_finite(name, i)))
    }

    fn packed(
        &self, ctx: &Context, name: &str, shape: &[usize], kept: WeightType, in_out: bool,
    ) -> Result<Packed, Error> {
        let t = find(self, name, shape)?;
        let bad = AtomicUsize::new(usize::MAX);
        // As above.
        t.read_f32_from(0, &mut [])?;
        let packed = match t.coded().and_then(|c| Some((code(c.dtype)?, c))) {
            Some(((code, as_coded), coded)) if as_coded == kept && t.shape() == shape => {
                Packed::from_codes(ctx, code, shape[0], shape[1], |o, codes, scales| {
                    if let Some(i) = copy_coded(&coded, code, o, codes, scales) {
                        bad.fetch_min(o * shape[1] + i, Ordering::Relaxed);
                    }
                })
            }
            _ => pack(ctx, kept, shape, in_out, |start, out| {
                let read = t.read_f32_from(start, out);
                let found = out.iter().position(|v| !v.is_finite()).map(|i| start + i);
                if let Some(i) = read.map_or(Some(start), |()| found) {
                    bad.fetch_min(i, Ordering::Relaxed);
                }
            }),
        };
        t.release();
        let bad = bad.into_inner();
        if bad < t.elements() { Err(not_finite(name, bad)) } else { Ok(packed) }
    }

    fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<(), Error> {
        let t = find(self, name, shape)?;
        t.read_f32_into(out)?;
        t.release();
        out.iter().position(|v| !v.is_finite()).map_or(Ok(()), |i| Err(not_finite(name, i)))
    }
}

/// A tensor of this shape, but for dimensions of 1.
fn find<'a>(ckpt: &'a Checkpoint, name: &str, shape: &[usize]) -> Result<TensorView<'a>, Error> {
    let t = ckpt.get(name).ok_or_else(|| Error::Checkpoint(format!("tensor {name} is missing")))?;
    let squeezed = |s: &[usize]| s.iter().copied().filter(|&d| d != 1).collect::<Vec<_>>();
    if squeezed(t.shape()) != squeezed(shape) {
        let found = t.shape();
        return Err(Error::Checkpoint(format!("tensor {name} has shape {found:?}; this model needs {shape:?}")));
    }
    Ok(t)
}

/// The code of a coded matrix in a file, and the type of weights that it gives in memory.
fn code(file: Dtype) -> Option<(Code, WeightType)> {
    match file {
        Dtype::I8 => Some((Code::Int8, WeightType::Int8)),
        Dtype::Q4 => Some((Code::Q4, WeightType::Q4)),
        Dtype::Q5 => Some((Code::Q5, WeightType::Q5)),
        _ => None,
    }
}

/// Codes and scales of an output from a file; which weight is none, if there is one.
fn copy_coded(from: &Coded<'_>, code: Code, output: usize, codes: &mut [u8], scales: &mut [f16]) -> Option<usize> {
    let (of, with) = from.row(output);
    codes.copy_from_slice(of);
    scales.iter_mut().zip(with).for_each(|(s, b)| *s = f16::from_le_bytes(*b));
    let scale = scales.iter().position(|s| !s.is_finite()).map(|g| g * code.group());
    scale.or_else(|| codes.iter().position(|c| code == Code::Int8 && *c == NO_CODE))
}

/// Whether a file's type is the type of activations.
fn is_same(file: Dtype, dtype: DType) -> bool {
    matches!((file, dtype), (Dtype::F32, DType::F32) | (Dtype::F16, DType::F16) | (Dtype::BF16, DType::BF16))
}

fn not_finite(name: &str, element: usize) -> Error {
    Error::Checkpoint(format!(
        "tensor {name} is not finite at element {element}: the file is damaged or the training run diverged"
    ))
}
