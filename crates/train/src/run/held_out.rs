//! Losses on data that a run doesn't train on, and the best model by them.

use super::Event;
use super::log::Log;
use crate::{Error, OutputConfig, Trainer};
use anser_data::Batch;
use std::path::PathBuf;

/// Held-out data and what came of it so far.
pub(super) struct HeldOut {
    /// Empty where there is none.
    batch: Batch,
    keep_best: bool,
    best: PathBuf,
    /// The loss of the best model, in the sessions before too.
    lowest: f64,
}

impl HeldOut {
    /// Goes on with the best model that is there.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub(super) fn new(batch: Batch, out: &OutputConfig, log: &Log) -> Result<HeldOut, Error> {
        let best = out.folder.join("best.safetensors");
        let before = if best.exists() { log.curves()?.1 } else { Vec::new() };
        let lowest = before.iter().map(|h| h.1).fold(f64::INFINITY, f64::min);
        Ok(HeldOut { batch, keep_best: out.keep_best, best, lowest })
    }

    /// Measures the loss, if there is data, and keeps the model if it is the best.
    ///
    /// # Errors
    /// When the model or the log cannot be written.
    pub(super) fn measure(&mut self, trainer: &Trainer, log: &mut Log, on: &mut dyn FnMut(Event)) -> Result<(), Error> {
        if self.batch.tokens.is_empty() {
            return Ok(());
        }
        let (step, loss) = (trainer.steps(), trainer.evaluate(&self.batch)?);
        on(Event::HeldOut { step, loss });
        if self.keep_best && loss < self.lowest {
            trainer.save_model(&self.best)?;
            self.lowest = loss;
        }
        log.held_out(step, loss)
    }
}
