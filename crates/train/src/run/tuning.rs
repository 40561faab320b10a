//! Matrix products of a GPU that are chosen by timing. Checkpoints note what was chosen, so that a run goes on to the bit.

use super::Event;
use crate::{RunConfig, Trainer};
use anser_tensor::{Context, cuda::Cuda};

/// Metadata of the files of a run.
const PRODUCTS: &str = "anser.products";

/// The GPU, if products are chosen so.
pub(super) struct Tuning<'a>(Option<&'a Cuda>);

impl Tuning<'_> {
    /// Starts with what the checkpoint notes.
    pub(super) fn start<'a>(
        ctx: &'a Context, config: &RunConfig, trainer: &Trainer, on: &mut dyn FnMut(Event),
    ) -> Tuning<'a> {
        let gpu = ctx.cuda().filter(|_| config.train.tune);
        if gpu.is_some_and(|gpu| !gpu.tune_products(trainer.description(PRODUCTS).unwrap_or_default())) {
            let what = "matrix products are timed anew, as the GPU or its library is another than before: last bits may differ";
            on(Event::Warning(what.into()));
        }
        Tuning(gpu)
    }

    /// Notes what is chosen by now.
    pub(super) fn note(&self, trainer: &mut Trainer) {
        if let Some(gpu) = self.0 {
            trainer.describe(PRODUCTS, gpu.chosen_products());
        }
    }
}
