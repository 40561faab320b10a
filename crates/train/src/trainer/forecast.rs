//! The memory that training takes, before it takes it.

use super::gradients::short_losses;
use super::{Settings, Trainer};
use crate::Error;
use anser_data::Batch;
use anser_model::State;
use anser_ops::{CrossEntropy, Recompute, Tape, batch};
use anser_tensor::{Context, DType, memory};

/// Bytes that can still be used on the device; `None` where the system doesn't say.
pub(crate) fn free_memory(ctx: &Context) -> Option<u64> {
    ctx.cuda().map_or_else(memory::available, |gpu| Some(gpu.free_memory() as u64))
}

impl Trainer {
    /// Bytes that training may take: those still free on the device, and those of parameters, gradients and moments. `None` where the
    /// system doesn't say.
    pub fn room(&self) -> Option<u64> {
        free_memory(&self.ctx).map(|free| free + self.resident() as u64)
    }

    /// Bytes of parameters, gradients and moments, which are there already.
    pub fn resident(&self) -> usize {
        let rounded = if self.ctx.dtype() == DType::F32 { 0 } else { self.ctx.dtype().size() };
        (4 * 4 + rounded) * self.grads.len()
    }

    /// Bytes that training takes: parameters, gradients and moments, and what a micro-batch of `rows` rows needs on top.
    ///
    /// # Errors
    /// Never for a model that exists; the forward pass checks tokens.
    pub fn forecast(&self, rows: usize) -> Result<usize, Error> {
        self.forecast_with(rows, self.settings)
    }

    /// [`Trainer::forecast`] with other settings.
    ///
    /// # Errors
    /// As there.
    pub fn forecast_with(&self, rows: usize, settings: Settings) -> Result<usize, Error> {
        let dry = self.ctx.dry();
        let (t, piece) = (settings.ctx, settings.piece());
        let n = rows * piece;
        let (zeros, mut windows) = (Batch::rows(vec![0; rows * t], vec![0; rows * t], t), self.windows.clone());
        let short = short_losses(&dry, &self.model, &settings, &zeros, &mut windows)?;
        let cut = piece < t;
        let segments = batch(rows, piece, cut).into();
        let mut none = dry.alloc_f32(0);
        let mut tape = Tape::recording(&dry, self.model.params(), &mut none).recomputing(settings.recompute);
        let state = State::zeros(&dry, self.model.config(), if cut { rows } else { 0 });
        let (hidden, _) = self.model.forward(&mut tape, &vec![0; n], &segments, &state, settings.checkpointing)?;
        let opts = CrossEntropy { divisor: 1.0, l2wrap: false };
        let targets = vec![0; n];
        let weights = settings.long_ce.map(|l| l.weights(&dry, &self.model, &hidden, &targets, &short[..n]));
        let _kept = self.model.loss(&mut tape, &hidden, &targets, weights.as_deref(), opts);
        drop(hidden);
        tape.backward();
        // Exact back-propagation keeps the states between the pieces.
        let states = if cut { t.div_ceil(piece) * rows * self.model.config().state_len() * 4 } else { 0 };
        Ok(self.resident() + dry.memory().peak + states)
    }

    /// Chooses what is computed again going back: the least with which micro-batches of `rows` rows fit into `available` bytes, or
    /// all there is. Returns the forecast.
    ///
    /// # Errors
    /// As [`Trainer::forecast`].
    pub fn recompute_to_fit(&mut self, rows: usize, available: Option<u64>) -> Result<usize, Error> {
        let mut needed = 0;
        for recompute in Recompute::LEVELS {
            self.settings.recompute = recompute;
            needed = self.forecast(rows)?;
            if self.settings.checkpointing || available.is_none_or(|a| needed as u64 <= a) {
                break;
            }
        }
        Ok(needed)
    }
}
