//! Digit reversal: whether a small model learns to carry 1 to 30 digits in its state and to read them back in reverse.

use crate::experiment::hits;
use anser_data::digits::{VOCAB, batch, exact};
use anser_model::{Config, Init, LoraDims, Model};
use anser_tensor::Context;
use anser_train::{Bptt, Hyper, Recompute, Schedule, Settings, StepInfo, Trainer};
use std::sync::atomic::{AtomicBool, Ordering};

/// Tokens of a training row: a number of 30 digits, a comma, its reverse and the end mark fit.
const CTX: usize = 64;
/// Most digits.
pub const DIGITS: usize = 30;

/// How well numbers of one length are reversed.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Accuracy {
    /// Digits of a number.
    pub digits: usize,
    /// Share of answer digits that are right.
    pub digit: f64,
    /// Share of numbers of which every digit and the end mark are right.
    pub number: f64,
}

/// The model: 2 layers, width 32, heads of 16, 12 tokens, low-rank maps of 8.
pub fn config() -> Config {
    let lora = LoraDims { decay: 8, rate: 8, value: 8, gate: 8 };
    Config { head_size: 16, lora, ..Config::new(2, 32, VOCAB) }
}

/// Trains for `steps` steps of `rows` rows; `on` sees each step. Stops early when `stop` becomes true.
///
/// # Errors
/// When a loss is not finite.
pub fn train(
    ctx: &Context, steps: u64, rows: usize, seed: u64, stop: &AtomicBool, mut on: impl FnMut(StepInfo, &Trainer),
) -> Result<Trainer, crate::Error> {
    let schedule = Schedule { init: 4e-3, last: 1e-6, warmup: 10, total: steps };
    let hyper = Hyper { weight_decay: 0.1, eps: 1e-8, ..Hyper::default() };
    let settings = Settings {
        ctx: CTX,
        schedule,
        hyper,
        grad_clip: 1.0,
        l2wrap: false,
        checkpointing: false,
        recompute: Recompute::Nothing,
        bptt: Bptt::Whole,
        long_ce: None,
    };
    let mut trainer = Trainer::new(ctx, Model::init(ctx, &config(), Init::Current, seed)?, settings);
    while trainer.steps() < steps && !stop.load(Ordering::SeqCst) {
        let info = trainer.step(&[batch(seed, trainer.steps(), rows, CTX, DIGITS)])?;
        on(info, &trainer);
    }
    Ok(trainer)
}

/// Tests `count` numbers of each length from 1 to `max` digits, none of which training could see: they come from another
/// seed. Each answer token is the most probable one after the right tokens before it.
///
/// # Errors
/// Never for a model of [`config`]'s vocabulary.
pub fn accuracy(
    ctx: &Context, model: &Model, seed: u64, max: usize, count: usize,
) -> Result<Vec<Accuracy>, crate::Error> {
    let mut out = Vec::new();
    for digits in 1..=max {
        let b = exact(!seed, digits, count);
        let answers = hits(ctx, model, &b, None)?;
        let share = |n: usize, of: usize| n as f64 / of as f64;
        out.push(Accuracy {
            digits,
            digit: share(answers.iter().map(|a| a[..digits].iter().filter(|h| **h).count()).sum(), digits * count),
            number: share(answers.iter().filter(|a| a.iter().all(|h| *h)).count(), count),
        });
    }
    Ok(out)
}

/// Share of right digits over all lengths together.
pub fn digit_accuracy(all: &[Accuracy]) -> f64 {
    let (right, of) = all.iter().fold((0.0, 0.0), |(r, o), a| (r + a.digit * a.digits as f64, o + a.digits as f64));
    right / of
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_untrained_model_guesses_and_a_little_training_helps() {
        let ctx = Context::cpu(2);
        let run = |steps| {
            let t = train(&ctx, steps, 16, 1, &AtomicBool::new(false), |_, _| {}).unwrap();
            digit_accuracy(&accuracy(&ctx, t.model(), 1, 3, 50).unwrap())
        };
        let (before, after) = (run(0), run(150));
        assert!(before < 0.3 && after > before + 0.05, "{before} {after}");
    }
}
