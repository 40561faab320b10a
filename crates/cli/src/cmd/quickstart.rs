use crate::cmd::train::watched;
use crate::global::{Global, Interrupted};
use anser_formats::Checkpoint;
use anser_model::{Load, Model};
use anser_tokenizer::Tokenizer;
use anser_train::{RunConfig, write_text};
use serde_json::json;
use std::path::Path;

/// Trains a small RWKV-7 on the bundled text on this machine, draws its loss curve and writes with it
#[derive(clap::Args)]
pub struct Args {
    /// Time for training
    #[arg(long, default_value_t = 2.3)]
    minutes: f64,
    /// Steps, instead of as many as fit the time
    #[arg(long)]
    steps: Option<u64>,
    /// Seed of the initial weights and of the text it writes
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

const FOLDER: &str = "anser-quickstart";
const PROMPT: &str = "Fellow-Citizens of the Senate and House of Representatives: ";

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let mut config = RunConfig::default();
    config.model.preset = String::new();
    (config.model.n_layer, config.model.n_embd, config.model.head_size) = (4, 128, 32);
    config.model.seed = args.seed;
    (config.train.ctx, config.train.rows) = (128, 8);
    (config.train.steps, config.train.minutes) = (args.steps.unwrap_or(0), args.minutes);
    (config.train.lr_init, config.train.lr_final) = (4e-3, 4e-4);
    config.output.folder = FOLDER.into();
    // A run of two minutes needs no checkpoints; it begins anew each time.
    config.output.save_every = 0;
    (config.output.eval_every, config.output.sample_every) = (200, 200);
    config.output.sample_prompt = PROMPT.into();
    let config = RunConfig::parse(&toml::to_string(&config)?, &[])?;

    let summary = watched(global, &config)?;
    if summary.interrupted {
        global.note(format!("stopped at step {}; the model is in {}", summary.steps, summary.model.display()));
        return Err(Interrupted.into());
    }
    let ctx = global.context()?;
    let model = Model::load(&ctx, &Checkpoint::open(Path::new(&summary.model))?, Load::Train)?;
    let text = write_text(&ctx, &model, &Tokenizer::bytes(), PROMPT, args.seed, 600)?;
    let mut json = serde_json::to_value(&summary)?;
    json["sample"] = json!(text);
    global.result(json, || {
        let loss = |l: Option<f64>| l.unwrap_or(f64::NAN);
        format!(
            "Held-out loss {:.3} -> {:.3} nats per byte in {:.0} s. Loss curve: {}\n\n{PROMPT}{text}\n\nGo on with: anser generate --model {} --prompt \"...\"\n",
            loss(summary.held_out_loss_before),
            loss(summary.held_out_loss),
            summary.seconds,
            summary.loss_curve.display(),
            summary.model.display(),
        )
    })
}
