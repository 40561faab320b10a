//! Block expansion: a RWKV-7 model becomes a hybrid (RWKV-X, arXiv 2504.21463, section 3.3).

use crate::tensors::{Place, place};
use crate::{Config, Error, Hybrid};
use anser_formats::{Checkpoint, Dtype, Source};

/// What an inserted block begins as. In both ways its matrices are those of the RWKV-7 block before it (receptance for queries; means where heads share keys), its
/// norms are 1 and 0, its token shift is that of a new block, and a gate lets half through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Expansion {
    /// The two output projections are zero, so that the hybrid gives the logits of the model it was made of.
    #[default]
    Identity,
    /// The output projections are copied too, as the code released with the paper does: the hybrid begins as another, worse model.
    Copy,
}

/// The mean of every `share` heads of a matrix, each of `head` elements.
fn shared(values: &[f32], head: usize, share: usize) -> Vec<f32> {
    let mean = |group: &[f32]| -> Vec<f32> {
        (0..head).map(|i| group.iter().skip(i).step_by(head).sum::<f32>() / share as f32).collect()
    };
    values.chunks_exact(head * share).flat_map(mean).collect()
}

impl Hybrid {
    /// The checkpoint of a RWKV-7 model as one of a hybrid: its configuration, and tensors in the types of the file, f16 for those quantised.
    ///
    /// # Errors
    /// When the checkpoint is no RWKV-7 model or a tensor is missing, or the hybrid is impossible.
    pub fn expand(self, ckpt: &Checkpoint, how: Expansion) -> Result<(Config, Vec<Source<'_>>), Error> {
        let plain = Config::from_checkpoint(ckpt)?;
        if plain.hybrid.is_some() || plain.recurrent_layers() == 0 {
            return Err(Error::Config("only a model of RWKV-7 blocks alone can be expanded".into()));
        }
        if self.layers == 0 {
            return Err(Error::Config("there must be at least 1 attention block to insert".into()));
        }
        let config = Config { hybrid: Some(self), ..plain };
        config.validate()?;
        // What is quantised comes as f16.
        let float = |dtype: Dtype| if dtype == Dtype::I8 || dtype.block() > 1 { Dtype::F16 } else { dtype };
        let before = |j: usize| (j + 1) * (config.n_layer / self.layers) - 1;
        let heads = config.heads();
        let mut sources = Vec::new();
        for (name, shape, _) in config.tensors() {
            let (at, part) = place(&name);
            let output = matches!(part, "att.output.weight" | "ffn.value.weight");
            let gate = part == "att.gate.weight";
            let inherited = part.ends_with("weight") && !part.starts_with("ln") && !gate;
            let from = match at {
                Place::Attention(_) if !inherited || output && how == Expansion::Identity => None,
                Place::Attention(j) => Some(format!("blocks.{}.{part}", before(j))),
                _ => name.strip_prefix("rwkv.").map(str::to_string),
            };
            sources.push(match from {
                Some(from) => {
                    let t = ckpt.get(&from).ok_or_else(|| Error::Checkpoint(format!("tensor {from} is missing")))?;
                    let share = match (at, part) {
                        (Place::Attention(_), "att.key.weight" | "att.value.weight") => heads / config.key_heads(),
                        _ => 1,
                    };
                    let head = config.head_size * config.n_embd;
                    if share > 1 && t.elements() != heads * head {
                        let found = t.shape();
                        return Err(Error::Checkpoint(format!("tensor {from} has shape {found:?}; it must be square")));
                    }
                    let values = Box::new(move || {
                        let values = t.to_f32_vec()?;
                        t.release();
                        Ok(if share > 1 { shared(&values, head, share) } else { values }.into())
                    });
                    let shape = if share > 1 { shape } else { t.shape().to_vec() };
                    Source { name, shape, dtype: float(t.dtype()), values }
                }
                None => {
                    let dtype = ckpt.get("head.weight").map_or(Dtype::F32, |t| float(t.dtype()));
                    let values = if output || gate { vec![0.0; shape.iter().product()] } else { config.vector(&name) };
                    Source { name, shape, dtype, values: Box::new(move || Ok(values.clone().into())) }
                }
            });
        }
        Ok((config, sources))
    }
}
