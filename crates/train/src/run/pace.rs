//! How many steps a run has, and how fast they are.

use crate::{RunConfig, Trainer};
use anser_tensor::{Context, bench};

/// Steps that are timed to find how many fit `minutes`; they are in the warm-up, which doesn't depend on the total. The first ones take memory and
/// choose algorithms, so the median counts.
const TIMED: usize = 9;
/// Metadata of the files of a timed run: its steps.
const TOTAL: &str = "anser.total_steps";

/// The steps of a run and the time that they take.
pub(super) struct Pace {
    /// Steps of the run; `None` while the first ones are timed.
    pub(super) total: Option<u64>,
    /// Seconds of a run whose steps are as many as fit, and the steps that tell.
    time: f64,
    timed: usize,
    /// Tokens of a step.
    pub(super) tokens: usize,
    /// Floating-point operations of a token, and at most of the machine in a second.
    flops: f64,
    peak: f64,
    /// What a step takes in terms of one of cross entropy.
    cost: f64,
    /// Seconds of each step of this session, held-out evaluation and saving apart, and of all.
    steps: Vec<f64>,
    seconds: f64,
}

impl Pace {
    /// Measures the machine, and knows the steps of a run that was planned before.
    pub(super) fn new(ctx: &Context, config: &RunConfig, trainer: &Trainer) -> Pace {
        let (train, settings) = (&config.train, trainer.settings());
        Pace {
            total: match train.steps {
                0 => trainer.description(TOTAL).and_then(|s| s.parse().ok()),
                n => Some(n),
            },
            time: train.minutes * 60.0,
            timed: TIMED.min(train.warmup.max(1) as usize),
            tokens: train.rows * train.ctx,
            flops: trainer.model().config().train_flops_per_token(),
            peak: bench::gemm_peak(ctx),
            // That is three forward passes.
            cost: 1.0 + settings.long_ce.map_or(0.0, |l| l.passes(settings.ctx)) / 3.0,
            steps: Vec::new(),
            seconds: 0.0,
        }
    }

    /// Seconds that the run will take after `done` steps, roughly.
    pub(super) fn forecast(&self, done: u64) -> f64 {
        match self.total {
            // Matrix products take most of the time; the share is what our benchmark reaches.
            Some(n) => (n - done.min(n)) as f64 * self.tokens as f64 * self.flops * self.cost / (0.42 * self.peak),
            None => self.time,
        }
    }

    /// Takes a step's seconds. Returns tokens a second, and the share of the machine's peak that they are.
    pub(super) fn step(&mut self, seconds: f64) -> (f64, f64) {
        self.steps.push(seconds);
        self.seconds += seconds;
        let speed = (self.steps.len() * self.tokens) as f64 / self.seconds;
        (speed, self.flops * speed / self.peak)
    }

    /// After a step: how many steps fit the time, if that is known from now on. It is noted in the files of the run.
    pub(super) fn plan(&mut self, trainer: &mut Trainer) -> Option<u64> {
        if self.total.is_some() || self.steps.len() < self.timed {
            return None;
        }
        let mut steps = self.steps.clone();
        steps.sort_by(f64::total_cmp);
        let rest = (self.time - self.seconds) / steps[steps.len() / 2];
        let total = trainer.steps() + (rest as u64).max(1);
        trainer.describe(TOTAL, total.to_string());
        self.total = Some(total);
        self.total
    }
}
