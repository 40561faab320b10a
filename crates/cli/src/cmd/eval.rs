use crate::global::{Global, Interrupted, stop};
use anser_eval::digits;
use anser_formats::Checkpoint;
use anser_model::{Load, Model};
use anser_train::Trainer;
use anyhow::ensure;
use serde_json::json;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Measures what a model can do
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(clap::Subcommand)]
enum Task {
    /// Digit reversal ("123,321#"): trains the 2-layer model of width 32 for it, then tests 1 to 30 digits
    Digits {
        /// Tests this model instead of training one
        #[arg(long)]
        model: Option<PathBuf>,
        /// Training steps
        #[arg(long, default_value_t = 6000)]
        steps: u64,
        /// Rows of 64 tokens in a step
        #[arg(long, default_value_t = 128)]
        rows: usize,
        /// Numbers tested of each length
        #[arg(long, default_value_t = 200)]
        count: usize,
        /// Seed
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Saves the trained model
        #[arg(long)]
        out: Option<PathBuf>,
    },
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let Task::Digits { model, steps, rows, count, seed, out } = &args.task;
    ensure!(*count > 0 && *rows > 0, "--count and --rows must be at least 1");
    let ctx = global.context()?;
    let start = Instant::now();
    let report = |model: &Model| digits::accuracy(&ctx, model, *seed, digits::DIGITS, *count);
    let all = match model {
        Some(path) => {
            let model = Model::load(&ctx, &Checkpoint::open(path)?, Load::Train)?;
            ensure!(
                model.config().vocab_size == anser_data::digits::VOCAB,
                "{}: not a model of digits",
                path.display()
            );
            report(&model)?
        }
        None => {
            let mut losses = 0.0;
            let log = |info: anser_train::StepInfo, t: &Trainer| {
                losses += info.loss;
                const EVERY: u64 = 250;
                if (info.step + 1).is_multiple_of(EVERY) {
                    let loss = losses / EVERY as f64;
                    losses = 0.0;
                    let right = digits::accuracy(&ctx, t.model(), *seed, digits::DIGITS, 20)
                        .map(|a| digits::digit_accuracy(&a));
                    let seconds = start.elapsed().as_secs_f64();
                    global.note(format!(
                        "step {}: loss {loss:.4}, {:.2}% of digits right, {seconds:.0} s",
                        info.step + 1,
                        100.0 * right.unwrap_or(f64::NAN)
                    ));
                }
            };
            let trainer = digits::train(&ctx, *steps, *rows, *seed, stop(), log)?;
            if let Some(path) = out {
                trainer.save_model(path)?;
            }
            if stop().load(Ordering::SeqCst) {
                return Err(Interrupted.into());
            }
            report(trainer.model())?
        }
    };
    let (right, seconds) = (digits::digit_accuracy(&all), start.elapsed().as_secs_f64());
    global.result(json!({ "digit_accuracy": right, "seconds": seconds, "lengths": all }), || {
        let mut text = String::from("digits  digit accuracy  whole numbers\n");
        for a in &all {
            text += &format!("{:6}  {:13.2}%  {:12.2}%\n", a.digits, 100.0 * a.digit, 100.0 * a.number);
        }
        text + &format!("{:.3}% of all digits right; {seconds:.0} s\n", 100.0 * right)
    })
}
