//! Models of noise, for measurements.

use super::{Load, Values, build, packed_layout};
use crate::{Config, Error, Model};
use anser_tensor::{Context, WeightType};
use std::borrow::Cow;

impl Model {
    /// A model for inference whose matrices are noise of the usual size: for measurements, made in seconds at any size. On a GPU they are kept in the type
    /// of activations, or in 8 bits, elsewhere as `kept` says.
    ///
    /// # Errors
    /// When the configuration is impossible, or device memory runs out.
    pub fn noise(ctx: &Context, config: &Config, kept: impl Into<WeightType>, seed: u64) -> Result<Model, Error> {
        config.validate()?;
        let table = table(seed);
        let values = |name: &str, shape: &[usize]| Cow::Owned(values(&table, name, shape));
        let model = build(ctx, config.clone(), &Values(values), Load::Inference(kept.into()))?;
        ctx.check()?;
        Ok(model)
    }
}

/// Numbers in (-1, 1), of which tensors take pieces.
fn table(seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..1 << 20).map(|_| next()).collect()
}

/// A tensor: weights of norms are 1, matrices have unit variance out where there is unit variance in, vectors half that size.
fn values(table: &[f32], name: &str, shape: &[usize]) -> Vec<f32> {
    let mut out = vec![0.0; shape.iter().product()];
    let layout = packed_layout(name);
    if layout.is_none() && name.contains("ln") && name.ends_with(".weight") {
        out.fill(1.0);
        return out;
    }
    let inputs = match layout {
        Some(in_out) => shape[usize::from(!in_out)],
        None => 1,
    };
    // The embedding is normalised.
    let scale = (3.0 / inputs as f32).sqrt();
    let mut at = name.bytes().fold(0usize, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    for piece in out.chunks_mut(table.len() / 2) {
        at = at.wrapping_mul(25_214_903_917).wrapping_add(11) % (table.len() / 2);
        piece.iter_mut().zip(&table[at..]).for_each(|(o, v)| *o = v * scale);
    }
    if layout.is_none() {
        out.iter_mut().for_each(|v| *v *= 0.5);
    }
    out
}
