use crate::cmd::convert;
use crate::global::{Chunks, Global, NewBlocks};
use anser_formats::Checkpoint;
use anser_model::Expansion;
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
    #[command(flatten)]
    chunks: Chunks,
    #[command(flatten)]
    blocks: NewBlocks,
    /// identity: the new blocks change nothing at first; copy: they begin as copies of the blocks before them, as in the released code
    #[arg(long, default_value = "identity", value_parser = ["identity", "copy"])]
    init: String,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let same = std::fs::canonicalize(&args.input).ok() == std::fs::canonicalize(&args.out).ok();
    ensure!(!(same && args.out.exists()), "{}: input and output are the same file; name another", args.out.display());
    let ckpt = Checkpoint::open(&args.input)?;
    ckpt.verify()?;
    let blocks = anser_model::Config::from_checkpoint(&ckpt)?.n_layer;
    let hybrid = args.chunks.of(args.blocks.hybrid(args.layers.unwrap_or((blocks / 4).max(1))));
    let how = if args.init == "copy" { Expansion::Copy } else { Expansion::Identity };
    let (config, sources) = hybrid.expand(&ckpt, how)?;
    global.remarks(&config);
    convert::write(&args.out, &ckpt, &config, &sources, &[], global)?;
    let layers = hybrid.layers;
    let mut json =
        json!({ "out": args.out.display().to_string(), "attention": layers, "parameters": config.parameters() });
    if let (Some(json), serde_json::Value::Object(options)) = (json.as_object_mut(), json!(hybrid)) {
        json.extend(options.into_iter().filter(|(name, _)| name != "layers"));
    }
    global.result(json, || {
        format!(
            "{}: {layers} attention blocks among {blocks} others, {} parameters\n",
            args.out.display(),
            config.parameters()
        )
    })
}
