//! From named tensors to a model: every tensor checked, each going straight to its final place.

mod described;
mod device;
mod file;
mod kept;
mod noise;

pub use kept::kept_as;
pub(crate) use kept::packed_layout;

use crate::{Config, Error, Model};
use anser_formats::Checkpoint;
use anser_ops::{ParamSet, Weight};
use anser_tensor::{Context, Packed, WeightType, memory};
use device::{To, to_device};
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

/// What a checkpoint is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// f32 master weights in the parameter arena.
    Train,
    /// Matrices packed for inference in this type ([`kept_as`]), or on a GPU in 8 bits or in the type of activations; vectors stay f32.
    Inference(WeightType),
}

impl Model {
    /// Loads a checkpoint with the official tensor names. Tensors the model doesn't use are ignored.
    ///
    /// # Errors
    /// When a tensor is missing, has a wrong shape or cannot be read; the message names it.
    pub fn load(ctx: &Context, ckpt: &Checkpoint, load: Load) -> Result<Model, Error> {
        Model::load_as(ctx, ckpt, Config::from_checkpoint(ckpt)?, load)
    }

    /// The same with another configuration than the file's own, in what its tensors don't tell.
    ///
    /// # Errors
    /// As [`Model::load`], or when the configuration is impossible.
    pub fn load_as(ctx: &Context, ckpt: &Checkpoint, config: Config, load: Load) -> Result<Model, Error> {
        config.validate()?;
        let needed = match load {
            Load::Train => config.parameters() * 4,
            // On a GPU one matrix after another passes through memory.
            Load::Inference(_) if ctx.cuda().is_some() => config.vocab_size * config.n_embd * 4,
            Load::Inference(kept) => kept.bytes_of(config.parameters()),
        };
        check_memory(needed as u64, memory::available())?;
        ckpt.verify()?;
        let model = build(ctx, config, ckpt, load)?;
        ctx.check()?;
        Ok(model)
    }

    /// The same model for inference, its matrices packed as [`Load::Inference`] says.
    ///
    /// # Panics
    /// When work on a GPU failed before, or its memory runs out.
    pub fn packed(&self, ctx: &Context, kept: impl Into<WeightType>) -> Model {
        let ranges: HashMap<&str, _> = self.params.specs().iter().map(|s| (s.name.as_str(), s.range.clone())).collect();
        // In training on a GPU the values are there.
        let current = self.params.current();
        let values = |name: &str, _: &[usize]| Cow::Borrowed(&current[ranges[name].clone()]);
        build(ctx, self.config.clone(), &Values(values), Load::Inference(kept.into())).unwrap_or_else(|e| panic!("{e}"))
    }
}

/// Where the tensors of a model come from, each asked for by its name and the shape that it must have.
trait Tensors {
    /// Copies a matrix on its way to a GPU.
    fn copy(&self, ctx: &Context, name: &str, shape: &[usize], to: To<'_>) -> Result<(), Error>;

    /// A matrix packed for a CPU, which is stored [out, in] or, with `in_out`, [in, out].
    fn packed(
        &self, ctx: &Context, name: &str, shape: &[usize], kept: WeightType, in_out: bool,
    ) -> Result<Packed, Error>;

    /// Reads what goes to the parameter arena.
    fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<(), Error>;
}

/// Tensors in memory: a function that gives their values.
struct Values<F>(F);

impl<'a, F: Fn(&str, &[usize]) -> Cow<'a, [f32]>> Tensors for Values<F> {
    fn copy(&self, ctx: &Context, name: &str, shape: &[usize], to: To<'_>) -> Result<(), Error> {
        let values = (self.0)(name, shape);
        // What is not finite is so in the model that they come from.
        to.fill(ctx, shape, |start, out| out.copy_from_slice(&values[start..start + out.len()]));
        Ok(())
    }

    fn packed(
        &self, ctx: &Context, name: &str, shape: &[usize], kept: WeightType, in_out: bool,
    ) -> Result<Packed, Error> {
        let values = (self.0)(name, shape);
        Ok(pack(ctx, kept, shape, in_out, |start, out| out.copy_from_slice(&values[start..start + out.len()])))
    }

    fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<(), Error> {
        out.copy_from_slice(&(self.0)(name, shape));
        Ok(())
    }
}

/// A model with these tensors, in the places that they have for training or for inference.
fn build(ctx: &Context, config: Config, tensors: &impl Tensors, load: Load) -> Result<Model, Error> {
    let mut in_arena = config.tensors();
    let mut weights = HashMap::new();
    if let Load::Inference(kept) = load {
        if ctx.cuda().is_some() {
            weights = to_device(ctx, &config, kept, |name, shape, to| tensors.copy(ctx, name, shape, to))?;
        } else {
            for (name, shape, _) in &in_arena {
                let Some(in_out) = packed_layout(name) else { continue };
                let kept = kept_as(kept, name, shape).unwrap_or(kept);
                let packed = tensors.packed(ctx, name, shape, kept, in_out)?;
                weights.insert(name.clone(), Weight::Packed(Arc::new(packed)));
            }
        }
        in_arena.retain(|(name, ..)| packed_layout(name).is_none());
    }
    let (mut params, handles) = ParamSet::new(in_arena);
    for &p in &handles {
        let spec = params.specs()[p.id].clone();
        tensors.read(&spec.name, &spec.shape, params.get_mut(p))?;
    }
    params.to_device(ctx);
    Ok(Model::assemble(config, params, &weights))
}

/// Packs a matrix stored [out, in] or, with `in_out`, [in, out]; see [`Packed::new`].
fn pack(
    ctx: &Context, kept: WeightType, shape: &[usize], in_out: bool, read: impl Fn(usize, &mut [f32]) + Sync,
) -> Packed {
    let (n, k) = if in_out { (shape[1], shape[0]) } else { (shape[0], shape[1]) };
    Packed::new(ctx, kept, n, k, in_out, read)
}

/// An error before a model is read that memory will not hold.
fn check_memory(needed: u64, available: Option<u64>) -> Result<(), Error> {
    match available {
        Some(available) if needed > available => {
            let (needed, left) = (needed >> 20, available >> 20);
            let advice = "close other programs, or choose a type with fewer bytes (--dtype bf16) or a smaller model";
            Err(Error::Checkpoint(format!("the weights need {needed} MB of memory and {left} MB are left: {advice}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exact_fingerprints_tell_matrices_and_their_types_apart() {
        use crate::{Config, Init, Model};
        use anser_tensor::{Context, DType, WeightType};
        let (ctx, config) = (Context::cpu(1), Config::new(2, 64, 300));
        let mut model = Model::init(&ctx, &config, Init::Noise, 1).unwrap();
        let all = [
            DType::F32.into(),
            DType::F16.into(),
            DType::BF16.into(),
            WeightType::Int8,
            WeightType::Q5,
            WeightType::Q4,
        ];
        let print = |m: &Model, kept: WeightType| m.packed(&ctx, kept).exact_fingerprint();
        let mut prints = all.map(|kept| print(&model, kept)).to_vec();
        assert_eq!(prints, all.map(|kept| print(&model, kept)));
        let at = model.params().specs().iter().find(|s| s.name.ends_with("1.ffn.value.weight")).unwrap().range.clone();
        model.params_mut().values_mut()[at].iter_mut().for_each(|v| *v += 0.01);
        prints.extend(all.map(|kept| print(&model, kept)));
        assert!(model.packed(&ctx, DType::F32).fingerprint() == model.packed(&ctx, WeightType::Q4).fingerprint());
        prints.sort();
        prints.dedup();
        assert_eq!(prints.len(), 2 * all.len());
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn exact_fingerprints_on_a_gpu() {
        use crate::{Config, Init, Model};
        use anser_tensor::{Context, DType, Device};
        let config = Config::new(2, 64, 300);
        let host = Context::cpu(1);
        let mut model = Model::init(&host, &config, Init::Noise, 1).unwrap();
        let mut prints = vec![model.packed(&host, DType::F16).exact_fingerprint()];
        let on_gpu = |model: &Model, dtype: DType| {
            let ctx = Context::with_activations(Device::Cuda(0), dtype, 1).unwrap();
            model.packed(&ctx, dtype).exact_fingerprint()
        };
        prints.extend([DType::F32, DType::F16, DType::BF16].map(|dtype| on_gpu(&model, dtype)));
        assert_eq!(prints[2], on_gpu(&model, DType::F16));
        let at = model.params().specs().iter().find(|s| s.name.ends_with("1.att.key.weight")).unwrap().range.clone();
        model.params_mut().values_mut()[at].iter_mut().for_each(|v| *v += 0.01);
        prints.push(on_gpu(&model, DType::F16));
        prints.sort();
        prints.dedup();
        assert_eq!(prints.len(), 5);
    }

    #[test]
    fn too_little_memory_is_said_before_reading() {
        let check = |needed, available| super::check_memory(needed, available).map_err(|e| e.to_string());
        assert_eq!((check(5 << 20, Some(5 << 20)), check(u64::MAX, None)), (Ok(()), Ok(())));
        assert!(check(6 << 20, Some(5 << 20)).unwrap_err().contains("need 6 MB of memory and 5 MB are left"));
    }
}
