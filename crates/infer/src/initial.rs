use crate::Error;
use anser_formats::Checkpoint;
use anser_model::{Config, State};
use anser_ops::Var;
use anser_tensor::Context;
use sha2::{Digest, Sha256};
use std::path::Path;

/// A tuned initial state: what a sequence begins from instead of zeros.
///
/// Files of state tuning have a tensor `blocks.N.att.time_state` for every layer, of heads x values x keys as RWKV-7's own state is: nothing is transposed,
/// unlike in files for RWKV-5 and 6. What token shift remembers begins as zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct InitialState {
    /// Of each recurrent layer: [H, N, N].
    layers: Vec<Vec<f32>>,
    hash: [u8; 32],
}

impl InitialState {
    /// Reads a file, in any format of checkpoints, for a model of this configuration.
    ///
    /// # Errors
    /// When it is no such file, or was tuned for a model of other dimensions.
    pub fn open(config: &Config, path: &Path) -> Result<InitialState, Error> {
        let file = Checkpoint::open(path)?;
        let wrong = |what: String| Error::State(format!("{}: {what}", path.display()));
        let found = file.names().filter(|name| name.ends_with("att.time_state")).count();
        if found == 0 {
            return Err(wrong("it has no tensors blocks.N.att.time_state: it is no tuned initial state".into()));
        }
        let (heads, n, count) = (config.heads(), config.head_size, config.recurrent_layers());
        if found != count {
            return Err(wrong(format!("it was tuned for a model of {found} layers, and this one has {count}")));
        }
        let (mut layers, mut sha) = (Vec::new(), Sha256::new());
        for i in 0..count {
            let name = format!("blocks.{i}.att.time_state");
            let t = file.get(&name).ok_or_else(|| wrong(format!("there is no tensor {name}")))?;
            if t.shape() != [heads, n, n] {
                let shape = t.shape();
                return Err(wrong(format!("{name} is {shape:?}, and this model's states are [{heads}, {n}, {n}]")));
            }
            let mut values = vec![0.0; heads * n * n];
            t.read_f32_into(&mut values)?;
            if values.iter().any(|v| !v.is_finite()) {
                return Err(wrong(format!("{name} has values that are not finite")));
            }
            values.iter().for_each(|v| sha.update(v.to_le_bytes()));
            layers.push(values);
        }
        Ok(InitialState { layers, hash: sha.finalize().into() })
    }

    /// What tells it apart from others.
    pub(crate) fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.len() * 4).sum()
    }

    /// Begins a state of one slot, which is still empty, with it.
    pub(crate) fn begin(&self, ctx: &Context, state: &mut State) {
        for (layer, values) in state.layers.iter_mut().zip(&self.layers) {
            let mut buf = ctx.alloc_as(layer.wkv.buf().dtype(), values.len());
            buf.copy_from(values);
            layer.wkv = Var::constant(1, values.len(), buf);
        }
    }
}
