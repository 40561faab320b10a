use crate::global::Global;
use anser_formats::{Checkpoint, Naming};
use anser_model::{Architecture, Config};
use serde_json::json;
use std::fmt::Write;
use std::path::PathBuf;

/// Dimensions, parameters, state size and tensors of a checkpoint
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint: .pth, .safetensors or a Hugging Face folder
    model: PathBuf,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let ckpt = Checkpoint::open(&args.model)?;
    let config = Config::from_checkpoint(&ckpt)?;
    global.remarks(&config);
    let mut tensors = Vec::new();
    for name in ckpt.names() {
        if let Some(t) = ckpt.get(name) {
            tensors.push(json!({ "name": name, "dtype": t.dtype().to_string(), "shape": t.shape() }));
        }
    }
    let json = json!({
        "architecture": config.architecture,
        "config": config,
        "parameters": config.parameters(),
        "state": config.state_len(),
        "names": match ckpt.naming() {
            Naming::Official => "official",
            Naming::HuggingFace => "huggingface",
        },
        "metadata": ckpt.metadata(),
        "tensors": tensors,
    });
    global.result(json, || {
        let c = &config;
        let mut s = format!(
            "{}: {} layers, width {}, {} heads of {}, vocabulary {}{}\n{} parameters, state of {} numbers per sequence\n",
            match c.architecture {
                Architecture::Rwkv7 if c.hybrid.is_some() => "RWKV-X",
                Architecture::Rwkv7 => "RWKV-7",
                Architecture::Transformer => "Transformer",
            },
            c.n_layer,
            c.n_embd,
            c.heads(),
            c.head_size,
            c.vocab_size,
            if c.double_rate { ", doubled in-context rate" } else { "" },
            c.parameters(),
            c.state_len(),
        );
        if let Some(h) = c.hybrid {
            let _ = writeln!(
                s,
                "{} attention blocks, chunks of {} tokens of which {} are seen; {} more numbers per token",
                h.layers,
                h.chunk,
                h.topk,
                c.cache_len()
            );
        }
        for t in &tensors {
            let (name, dtype) = (t["name"].as_str().unwrap_or_default(), t["dtype"].as_str().unwrap_or_default());
            let _ = writeln!(s, "{name:40} {dtype:5} {}", t["shape"]);
        }
        s
    })
}
