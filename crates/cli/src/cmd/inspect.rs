use crate::global::Global;
use anser_formats::{CONFIG_JSON, Checkpoint, Format, Naming};
use anser_model::{Config, Hybrid};
use anyhow::Context as _;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

/// Format, dimensions, parameters, state size and tensors of a checkpoint, and what it lacks
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint: .pth, .safetensors, .st, .gguf or a Hugging Face folder
    model: PathBuf,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let ckpt = Checkpoint::open(&args.model)?;
    let mut types: BTreeMap<&str, usize> = BTreeMap::new();
    for t in ckpt.names().filter_map(|name| ckpt.get(name)) {
        *types.entry(t.dtype().name()).or_default() += 1;
    }
    let mix: Vec<String> = types.iter().map(|(dtype, n)| format!("{n} {dtype}")).collect();
    let kind = format!("{}, {} names, tensors: {}", ckpt.format(), ckpt.naming(), mix.join(", "));
    let config = Config::from_checkpoint(&ckpt).with_context(|| format!("{}: {kind}", args.model.display()))?;
    let missing = missing(&ckpt, &config);
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
        "format": ckpt.format().to_string(),
        "names": ckpt.naming().to_string(),
        "types": types,
        "missing": missing,
        "metadata": ckpt.metadata(),
        "tensors": tensors,
    });
    global.result(json, || {
        let c = &config;
        let mut s = format!(
            "{kind}\n{}: {} layers, width {}, {} heads of {}, vocabulary {}{}\n{} parameters, state of {} numbers per sequence\n",
            c.family(),
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
                "{} attention blocks{}{}, chunks of {} tokens of which {} are seen{}; {} more numbers per token",
                h.layers,
                if h.gate { ", gated" } else { "" },
                h.key_heads.map_or_else(String::new, |k| format!(", {k} heads of keys")),
                h.chunk,
                h.topk,
                always(h),
                c.cache_len()
            );
        }
        for what in &missing {
            let _ = writeln!(s, "missing: {what}");
        }
        for t in &tensors {
            let (name, dtype) = (t["name"].as_str().unwrap_or_default(), t["dtype"].as_str().unwrap_or_default());
            let _ = writeln!(s, "{name:40} {dtype:5} {}", t["shape"]);
        }
        s
    })
}

/// Which chunks a token sees whatever their scores.
fn always(h: Hybrid) -> String {
    match (h.sink, h.window) {
        (0, 0) => String::new(),
        (sink, window) => format!(", among them the first {sink} of the text and the {window} before a token's own"),
    }
}

/// What a model of these dimensions should have and this one lacks.
fn missing(ckpt: &Checkpoint, config: &Config) -> Vec<String> {
    let tensors = config.tensors().into_iter().map(|(name, ..)| name);
    let mut missing: Vec<String> =
        tensors.filter(|name| ckpt.get(name).is_none()).map(|n| format!("tensor {n}")).collect();
    if ckpt.format() == Format::Gguf && ckpt.metadata().get("tokenizer.ggml.model").is_none_or(|m| m != "rwkv") {
        missing.push("a RWKV tokenizer in the metadata (tokenizer.ggml.model)".into());
    }
    if ckpt.naming() == Naming::HuggingFace && ckpt.path().is_dir() {
        if !ckpt.metadata().contains_key(CONFIG_JSON) {
            missing.push(format!("{CONFIG_JSON} (dimensions come from the tensors)"));
        }
        let vocabularies = ["rwkv_vocab_v20230424.txt", "tokenizer.json", "tokenizer_config.json"];
        if !vocabularies.iter().any(|file| ckpt.path().join(file).exists()) {
            missing.push("tokenizer files (World is taken, which is part of the program)".into());
        }
    }
    missing
}
