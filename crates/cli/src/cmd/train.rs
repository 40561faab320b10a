use crate::global::{Global, Interrupted, catch_termination, stop};
use anser_train::{Event, RunConfig, Summary, run};
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

/// Trains as a TOML file says; goes on where an interrupted run of the same folder stopped
#[derive(clap::Args)]
pub struct Args {
    /// Configuration
    #[arg(required_unless_present = "defaults")]
    config: Option<PathBuf>,
    /// Sets one field, as in --set train.steps=500 (may be given several times)
    #[arg(long)]
    set: Vec<String>,
    /// Prints a configuration with every field, its meaning and its default
    #[arg(long)]
    defaults: bool,
}

/// Runs the subcommand.
pub fn execute(args: &Args, global: &Global) -> anyhow::Result<()> {
    let Some(path) = args.config.as_ref().filter(|_| !args.defaults) else {
        return global.result(serde_json::to_value(RunConfig::default())?, || RunConfig::DOCUMENTED.into());
    };
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let config = RunConfig::parse(&text, &args.set).with_context(|| path.display().to_string())?;
    let summary = watched(global, &config)?;
    if summary.interrupted {
        global.note(format!("stopped after step {}; the same command goes on from there", summary.steps));
        return Err(Interrupted.into());
    }
    global.result(serde_json::to_value(&summary)?, || {
        let loss = |l: Option<f64>| l.map_or("-".into(), |l| format!("{l:.3}"));
        format!(
            "{} steps, {} tokens in {:.0} s; held-out loss {} -> {}\nmodel: {}\nloss curve: {}\n",
            summary.steps,
            summary.tokens,
            summary.seconds,
            loss(summary.held_out_loss_before),
            loss(summary.held_out_loss),
            summary.model.display(),
            summary.loss_curve.display(),
        )
    })
}

/// Runs with a progress bar.
pub fn watched(global: &Global, config: &RunConfig) -> anyhow::Result<Summary> {
    let ctx = global.context_in_floats()?;
    catch_termination();
    let bar = if global.quiet { ProgressBar::hidden() } else { ProgressBar::no_length() };
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")?);
    let line = |text: String| if bar.is_hidden() { global.note(text) } else { bar.println(text) };
    let mut held = String::new();
    let mut watch = |event: Event| match event {
        Event::Started { config, steps, resumed, tokens, memory, seconds } => {
            line(format!(
                "{}: {} layers, width {}, {} parameters; {} threads; {tokens} tokens of text",
                config.family(),
                config.n_layer,
                config.n_embd,
                config.parameters(),
                ctx.threads().len(),
            ));
            let steps_text = steps.map_or("as many steps as fit".into(), |n| format!("{n} steps"));
            line(format!("{steps_text}, about {}, {} MB of memory", human(seconds), memory >> 20));
            if let Some(step) = resumed {
                line(format!("going on after step {step}"));
                bar.set_position(step);
                bar.reset_eta();
            }
            steps.into_iter().for_each(|n| bar.set_length(n));
        }
        Event::Planned(steps) => {
            bar.set_length(steps);
            line(format!("{steps} steps fit the time"));
        }
        Event::Step { info, tokens_per_second, mfu } => {
            bar.set_position(info.step + 1);
            bar.set_message(format!(
                "loss {:.3}{held}, {tokens_per_second:.0} tokens/s, MFU {:.0}%",
                info.loss,
                100.0 * mfu
            ));
        }
        Event::HeldOut { step, loss } => {
            held = format!(" (held out {loss:.3})");
            line(format!("step {step}: held-out loss {loss:.4}"));
        }
        Event::Sample { step, text } => line(format!("step {step} writes: {text:?}")),
        Event::Saved(path) => line(format!("saved {}", path.display())),
        Event::Warning(text) => line(format!("note: {text}")),
    };
    let summary = run(&ctx, config, stop(), &mut watch)?;
    bar.finish_and_clear();
    Ok(summary)
}

fn human(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} minutes", s / 60.0),
        s => format!("{:.1} hours", s / 3600.0),
    }
}
