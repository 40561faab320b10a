use crate::global::{Chunks, Global};
use anser_eval::debug::{self, Mode, Named, Tokens};
use anser_formats::{Checkpoint, Dtype, Source, writable, write_safetensors};
use anser_model::{Config, Load, Model};
use anser_train::{Hyper, Schedule};
use anyhow::{Context as _, ensure};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Logits, gradients and training steps in f32, for comparison with other implementations
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Logits [B, T, V] and final state
    Logits(Logits),
    /// Loss and the gradient of every parameter
    Grads(Grads),
    /// Losses, learning rates and gradient norms of AdamW on given batches
    Trajectory(Trajectory),
}

#[derive(clap::Args)]
struct Input {
    /// Checkpoint
    #[arg(long)]
    model: PathBuf,
    /// JSON file: [[ids...], ...], sequences of one length
    #[arg(long)]
    tokens: PathBuf,
    /// safetensors file to write (replaced if it exists)
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    chunks: Chunks,
}

#[derive(clap::Args)]
struct Logits {
    #[command(flatten)]
    input: Input,
    /// parallel, recurrent or chunked:N (N tokens a call)
    #[arg(long, default_value = "parallel")]
    mode: Mode,
}

#[derive(clap::Args)]
struct Grads {
    #[command(flatten)]
    input: Input,
    /// Add the L2Wrap term to the gradients
    #[arg(long)]
    l2wrap: bool,
}

#[derive(clap::Args)]
struct Trajectory {
    /// Checkpoint to start from
    #[arg(long)]
    model: PathBuf,
    /// safetensors file with `tokens` [steps, B, T + 1]
    #[arg(long)]
    batches: PathBuf,
    /// Learning rate after warm-up
    #[arg(long)]
    lr_init: f64,
    /// Learning rate at the end
    #[arg(long)]
    lr_final: f64,
    /// Steps of warm-up
    #[arg(long)]
    warmup: u64,
    /// Weight decay of the matrices
    #[arg(long)]
    weight_decay: f64,
    #[arg(long, default_value_t = 0.9)]
    beta1: f64,
    #[arg(long, default_value_t = 0.99)]
    beta2: f64,
    #[arg(long, default_value_t = 1e-18)]
    adam_eps: f64,
    /// Largest gradient norm (0: none)
    #[arg(long, default_value_t = 1.0)]
    grad_clip: f64,
    /// Add the L2Wrap term to the gradients
    #[arg(long)]
    l2wrap: bool,
    /// safetensors file for the final weights
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    chunks: Chunks,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    match &args.what {
        What::Logits(a) => {
            let (ckpt, config, tokens) = open(&a.input)?;
            let out = debug::logits(&global.exact_context()?, &ckpt, config, &tokens, a.mode)?;
            write(&a.input.out, &out)?;
            global.result(json!({ "out": a.input.out.display().to_string(), "tensors": out.len() }), String::new)
        }
        What::Grads(a) => {
            let (ckpt, config, tokens) = open(&a.input)?;
            let (loss, out) = debug::grads(&global.exact_context()?, &ckpt, config, &tokens, a.l2wrap)?;
            write(&a.input.out, &out)?;
            let json = json!({ "loss": loss });
            global.result(json.clone(), || format!("{json}\n"))
        }
        What::Trajectory(a) => trajectory(a, global),
    }
}

fn open(input: &Input) -> anyhow::Result<(Checkpoint, Config, Tokens)> {
    let text = std::fs::read_to_string(&input.tokens).with_context(|| format!("{}", input.tokens.display()))?;
    let tokens = Tokens::from_json(&text).with_context(|| format!("{}", input.tokens.display()))?;
    writable(&input.out)?;
    let file = Checkpoint::open(&input.model)?;
    let config = input.chunks.apply(Config::from_checkpoint(&file)?)?;
    Ok((file, config, tokens))
}

fn write(path: &Path, tensors: &[Named]) -> anyhow::Result<()> {
    let sources: Vec<Source<'_>> =
        tensors.iter().map(|t| Source::new(t.name.as_str(), &t.shape, Dtype::F32, &t.data)).collect();
    Ok(write_safetensors(path, &sources, &BTreeMap::new())?)
}

fn trajectory(a: &Trajectory, global: &Global) -> anyhow::Result<()> {
    for (name, value, allowed) in [
        ("--lr-init", a.lr_init, 0.0..f64::INFINITY),
        ("--lr-final", a.lr_final, 0.0..f64::INFINITY),
        ("--weight-decay", a.weight_decay, 0.0..f64::INFINITY),
        ("--beta1", a.beta1, 0.0..1.0),
        ("--beta2", a.beta2, 0.0..1.0),
        ("--adam-eps", a.adam_eps, 0.0..f64::INFINITY),
        ("--grad-clip", a.grad_clip, 0.0..f64::INFINITY),
    ] {
        ensure!(allowed.contains(&value), "{name}: {value} is not from 0 to below {}", allowed.end);
    }
    a.out.as_deref().map_or(Ok(()), writable)?;
    let ctx = global.exact_context()?;
    let batches = Checkpoint::open(&a.batches)?;
    let tokens = batches.get("tokens").with_context(|| format!("{}: no tensor \"tokens\"", a.batches.display()))?;
    let &[steps, b, t1] = tokens.shape() else {
        anyhow::bail!("{}: tokens has shape {:?}; expected [steps, B, T + 1]", a.batches.display(), tokens.shape());
    };
    ensure!(t1 >= 2, "{}: tokens has rows of {t1}; at least 2 are needed", a.batches.display());
    let ids = tokens.to_u32_vec()?;
    let file = Checkpoint::open(&a.model)?;
    let config = a.chunks.apply(Config::from_checkpoint(&file)?)?;
    let mut model = Model::load_as(&ctx, &file, config, Load::Train)?;
    let schedule = Schedule { init: a.lr_init, last: a.lr_final, warmup: a.warmup, total: steps as u64 };
    let hyper = Hyper { beta1: a.beta1, beta2: a.beta2, eps: a.adam_eps, weight_decay: a.weight_decay };
    let got = anser_train::trajectory(&ctx, &mut model, &ids, b, t1 - 1, schedule, hyper, a.grad_clip, a.l2wrap)?;
    if let Some(out) = &a.out {
        let params = model.params();
        let named = |s: &anser_model::ParamSpec| Named {
            name: format!("final.{}", s.name),
            shape: s.shape.clone(),
            data: params.values()[s.range.clone()].to_vec(),
        };
        write(out, &params.specs().iter().map(named).collect::<Vec<_>>())?;
    }
    let json = json!({ "losses": got.losses, "lrs": got.lrs, "grad_norms": got.grad_norms });
    global.result(json.clone(), || format!("{json}\n"))
}
