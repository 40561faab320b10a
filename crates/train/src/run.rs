//! A whole run, as a configuration says it.

mod data;
mod events;
mod held_out;
mod log;
mod memory;
mod model;
mod pace;
mod sample;
mod start;
mod tuning;

pub use sample::write_text;

use crate::{Error, RunConfig, StepInfo, Trainer, loss_curve};
use anser_formats::write_atomic;
use anser_model::Config;
use anser_tensor::Context;
use data::Data;
use held_out::HeldOut;
use log::Log;
use pace::Pace;
use std::io::Write;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;
use tuning::Tuning;

/// What happens in a run, for whoever watches it.
#[derive(Clone, Debug)]
pub enum Event {
    /// Before the first step.
    Started {
        /// The model.
        config: Config,
        /// Steps of the run; `None` while the first ones are timed.
        steps: Option<u64>,
        /// Step it goes on from.
        resumed: Option<u64>,
        /// Tokens to train on.
        tokens: usize,
        /// Bytes of memory the run will take.
        memory: usize,
        /// Seconds it will take, roughly.
        seconds: f64,
    },
    /// The number of steps that fit the time is known.
    Planned(u64),
    /// After a step.
    Step {
        /// What it did.
        info: StepInfo,
        /// Tokens a second, held-out evaluation and saving apart.
        tokens_per_second: f64,
        /// Share of the machine's matrix-product peak: 6 x (parameters - embedding) x tokens per second over the peak.
        mfu: f64,
    },
    /// An evaluation.
    HeldOut {
        /// Steps done.
        step: u64,
        /// Mean cross entropy on held-out data, nats a token.
        loss: f64,
    },
    /// Text that the model wrote.
    Sample {
        /// Steps done.
        step: u64,
        /// The text after the prompt.
        text: String,
    },
    /// A checkpoint was written.
    Saved(PathBuf),
    /// Something the user should know.
    Warning(String),
}

/// The end of a run.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Summary {
    /// Steps done.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds of this session.
    pub seconds: f64,
    /// First held-out loss, if there is held-out data.
    pub held_out_loss_before: Option<f64>,
    /// Last held-out loss.
    pub held_out_loss: Option<f64>,
    /// The model.
    pub model: PathBuf,
    /// The picture.
    pub loss_curve: PathBuf,
    /// Whether it was asked to stop.
    pub interrupted: bool,
}

/// Trains as `config` says, in its folder; goes on from the newest checkpoint there, to the bit. When `stop` becomes true
/// it saves and returns after the running step.
///
/// # Errors
/// For a configuration, data or checkpoint that doesn't fit; when memory will not do; when a loss is not finite; when
/// writing fails. Checkpoints written before stay.
pub fn run(ctx: &Context, config: &RunConfig, stop: &AtomicBool, on: &mut dyn FnMut(Event)) -> Result<Summary, Error> {
    let out = &config.output;
    let _lock = Trainer::lock(&out.folder)?;
    let data = Data::open(config)?;
    let (mut trainer, resumed) = start::start(ctx, config, data.tokenizer.as_ref(), on)?;
    let tuning = Tuning::start(ctx, config, &trainer, on);
    let memory = memory::fit(&mut trainer, config, on)?;
    let mut pace = Pace::new(ctx, config, &trainer);
    on(Event::Started {
        config: trainer.model().config().clone(),
        steps: pace.total,
        resumed,
        tokens: data.train_tokens(),
        memory,
        seconds: pace.forecast(trainer.steps()),
    });

    let mut log = Log::open(config, trainer.steps())?;
    let start = Instant::now();
    let mut held_out = HeldOut::new(data.held_out(out.eval_rows), out, &log)?;
    if resumed.is_none() {
        held_out.measure(&trainer, &mut log, on)?;
    }
    let mut interrupted = false;
    let mut batch = data.train(trainer.steps());
    while !interrupted && pace.total.is_none_or(|n| trainer.steps() < n) {
        let timer = Instant::now();
        trainer.settings_mut().schedule.total = pace.total.unwrap_or(u64::MAX);
        // The next batch is read while one is computed.
        let next = trainer.steps() + 1;
        let info = thread::scope(|s| {
            let following = s.spawn(|| data.train(next));
            let info = trainer.step(&batch);
            batch = following.join().unwrap_or_else(|panic| resume_unwind(panic));
            info
        })?;
        let (tokens_per_second, mfu) = pace.step(timer.elapsed().as_secs_f64());
        on(Event::Step { info, tokens_per_second, mfu });
        log.step(&info, tokens_per_second, mfu)?;
        if let Some(steps) = pace.plan(&mut trainer) {
            on(Event::Planned(steps));
        }

        let done = trainer.steps();
        interrupted = stop.load(Ordering::SeqCst);
        let last = interrupted || pace.total == Some(done);
        let due = |every: u64| every > 0 && done.is_multiple_of(every);
        if due(out.eval_every) || last {
            held_out.measure(&trainer, &mut log, on)?;
        }
        if due(out.sample_every)
            && !last
            && let Some(t) = &data.tokenizer
        {
            let text = write_text(ctx, trainer.model(), t, &out.sample_prompt, config.model.seed, out.sample_tokens)?;
            on(Event::Sample { step: done, text });
        }
        tuning.note(&mut trainer);
        if due(out.save_every) || (out.save_every > 0 && last) {
            on(Event::Saved(trainer.save(&out.folder, out.keep)?));
        }
    }

    let (model, picture) = (out.folder.join("model.safetensors"), out.folder.join("loss.svg"));
    trainer.save_model(&model)?;
    let (train, held_out) = log.curves()?;
    let title = format!("{}: cross entropy, nats per token", out.folder.display());
    write_atomic(&picture, |f| f.write_all(loss_curve(&title, &train, &held_out).as_bytes()))?;
    Ok(Summary {
        steps: trainer.steps(),
        tokens: trainer.steps() * pace.tokens as u64,
        seconds: start.elapsed().as_secs_f64(),
        held_out_loss_before: held_out.first().map(|h| h.1),
        held_out_loss: held_out.last().map(|h| h.1),
        model,
        loss_curve: picture,
        interrupted,
    })
}
