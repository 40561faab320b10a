//! A model in training, and its step.

mod checkpoint;
mod forecast;
mod gradients;
mod pieces;
mod recording;
mod settings;

pub(crate) use forecast::free_memory;
pub use settings::{Bptt, Settings};

use crate::{AdamW, Error, GradNorm};
use anser_data::Batch;
use anser_model::{Model, State};
use anser_ops::{CrossEntropy, Loss, Segment, Tape};
use anser_tensor::{Buf, Context};
use pieces::Pieces;
use recording::Recording;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepInfo {
    /// Number of the step, from 0.
    pub step: u64,
    /// Mean cross entropy before it, nats a token, whatever the weights of targets.
    pub loss: f64,
    /// Mean weight of the targets before it is made 1: see [`LongCe`](crate::LongCe), 1 without.
    pub mean_weight: f64,
    /// Learning rate of the 1x groups.
    pub lr: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
}

/// A model in training: parameters, moments and the step number, which together are all there is to resume.
pub struct Trainer {
    ctx: Context,
    model: Model,
    adam: AdamW,
    grads: Buf,
    settings: Settings,
    /// What files say beside the model, by key.
    metadata: BTreeMap<String, String>,
    /// Of the micro-batch before: see [`Pieces::share`].
    segments: Vec<Arc<[Segment]>>,
    /// The same of windows ([`LongCe`](crate::LongCe)).
    windows: Arc<[Segment]>,
    recording: Recording,
}

/// Rows of a batch that are evaluated at a time.
const EVALUATED: usize = 8;

impl Trainer {
    /// Starts training `model`.
    pub fn new(ctx: &Context, mut model: Model, settings: Settings) -> Trainer {
        model.params_mut().to_device(ctx);
        let n = model.params().values().len();
        Trainer {
            ctx: ctx.clone(),
            model,
            adam: AdamW::new(ctx, n),
            grads: ctx.zeros_f32(n),
            settings,
            metadata: BTreeMap::new(),
            segments: Vec::new(),
            windows: Arc::new([]),
            recording: Recording::default(),
        }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Freezes the parameters for which `f` is false and lets the others train.
    pub fn set_trainable(&mut self, f: impl Fn(&str) -> bool) {
        self.model.params_mut().set_trainable(f);
    }

    /// Number of steps done.
    pub fn steps(&self) -> u64 {
        self.adam.steps
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The settings; the schedule may be set anew between steps.
    pub fn settings_mut(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// Trains on one global batch, given as micro-batches: the loss is the mean over all their targets that are not ignored.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, or the loss or a gradient is not finite: nothing is changed then.
    pub fn step(&mut self, micro: &[Batch]) -> Result<StepInfo, Error> {
        let work = self.work(micro)?;
        let found = self.gradients(&work)?;
        let (step, settings) = (self.adam.steps, self.settings);
        let lr = settings.schedule.at(step);
        let norm = GradNorm::new(&self.ctx, self.model.params(), &self.grads, settings.grad_clip);
        self.adam.step(&self.ctx, self.model.params_mut(), &self.grads, settings.hyper, lr, &norm);
        // All work is under way; here the device is waited for.
        let (grad_norm, mean_weight) = (norm.norm(), found.weight / work.targets);
        let part = if settings.long_ce.is_some() { Loss::unweighted } else { Loss::loss };
        let loss = found.losses.iter().map(part).sum::<f64>();
        self.ctx.check()?;
        if !(loss.is_finite() && grad_norm.is_finite()) {
            self.adam.steps = step;
            return Err(Error::NotFinite { step, what: self.not_finite() });
        }
        Ok(StepInfo { step, loss, mean_weight, lr, grad_norm })
    }

    /// What is not finite in a step.
    fn not_finite(&self) -> String {
        let grads = self.grads.to_vec();
        let specs = self.model.params().specs();
        match specs.iter().find(|s| grads[s.range.clone()].iter().any(|g| !g.is_finite())) {
            Some(s) => format!("the gradient of {}", s.name),
            None => "the loss".into(),
        }
    }

    /// Mean cross entropy on a batch without training on it.
    ///
    /// # Errors
    /// When a token is outside the vocabulary.
    pub fn evaluate(&self, b: &Batch) -> Result<f64, Error> {
        let t = self.settings.ctx;
        let opts = CrossEntropy { divisor: b.counted().max(1) as f64, l2wrap: false };
        let mut loss = 0.0;
        for first in (0..b.len(t)).step_by(EVALUATED) {
            for piece in Pieces::new(&b.slice(t, first, first + EVALUATED), &[], t, t).all {
                let mut tape = Tape::inference(&self.ctx, self.model.params());
                let state = State::zeros(&self.ctx, self.model.config(), 0);
                let (hidden, _) = self.model.forward(&mut tape, &piece.tokens, &piece.segments, &state, false)?;
                loss += self.model.loss(&mut tape, &hidden, &piece.targets, None, opts).loss();
            }
        }
        Ok(loss)
    }
}
