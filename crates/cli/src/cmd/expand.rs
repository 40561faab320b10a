use crate::cmd::convert;
use crate::global::Global;
use anser_formats::Checkpoint;
use anser_model::{Expansion, Hybrid};
use anyhow::ensure;
use serde_json::json;
use std::path::PathBuf;

/// Inserts attention blocks into a RWKV-7 model: a RWKV-X hybrid with the same logits, to be trained on
#[derive(clap::Args)]
pub struct Args {
    /// RWKV-7 checkpoint: .pth, .safetensors, .st, .gguf or a Hugging Face folder
    input: PathBuf,
    /// File to write, .pth or .safetensors
    out: PathBuf,
    /// Attention blocks, one after every so many RWKV-7 blocks [default: one for 4 of them]
    #[arg(long)]
    layers: Option<usize>,
    /// Tokens of a chunk of attention
    #[arg(long, default_value_t = 2048)]
    chunk: usize,
    /// Chunks that a token sees, its own counted
    #[arg(long, default_value_t = 3)]
    topk: usize,
    /// identity: the new blocks change nothing at first; copy: they begin as copies of the blocks before them, as in the released code
    #[arg(long, default_value = "identity", value_parser = ["identity", "copy"])]
    init: String,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let same = std::fs::canonicalize(&args.input).ok() == std::fs::canonicalize(&args.out).ok();
    ensure!(!(same && args.out.exists()), "{}: input and output are the same file; name another", args.out.display());
    let ckpt = Checkpoint::open(&args.input)?;
    let blocks = anser_model::Config::from_checkpoint(&ckpt)?.n_layer;
    let hybrid = Hybrid { layers: args.layers.unwrap_or((blocks / 4).max(1)), chunk: args.chunk, topk: args.topk };
    let how = if args.init == "copy" { Expansion::Copy } else { Expansion::Identity };
    let (config, sources) = hybrid.expand(&ckpt, how)?;
    global.remarks(&config);
    convert::write(&args.out, &ckpt, &config, &sources, &[], global)?;
    let Hybrid { layers, chunk, topk } = hybrid;
    let json = json!({ "out": args.out, "attention": layers, "chunk": chunk, "topk": topk, "parameters": config.parameters() });
    global.result(json, || {
        format!(
            "{}: {layers} attention blocks among {blocks} others, {} parameters\n",
            args.out.display(),
            config.parameters()
        )
    })
}
