use crate::global::{Chunks, Global, Stored};
use anser_formats::gguf::{Value, write_gguf};
use anser_formats::{CONFIG_JSON, Checkpoint, Dtype, Format, Source, int8, llama, write_pth, write_safetensors};
use anser_model::{Architecture, Config};
use anser_tensor::DType;
use anser_tokenizer::Tokenizer;
use anyhow::ensure;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const Q4_IN_FILES: &str =
    "--dtype q4 is a type of weights in memory, made when a file is loaded: convert to int8 or 16 bits";

/// Rewrites a checkpoint as .pth, .safetensors or .gguf (told by OUT's name), with --dtype in another type; int8 and, in .gguf, q8_0 take half the room of f16
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint to read: .pth, .safetensors, .st, .gguf or a Hugging Face folder
    input: PathBuf,
    /// File to write
    out: PathBuf,
    /// With --dtype int8: says for every matrix how much rounding changes it
    #[arg(long)]
    report: bool,
    #[command(flatten)]
    chunks: Chunks,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let same = std::fs::canonicalize(&args.input).ok() == std::fs::canonicalize(&args.out).ok();
    ensure!(!(same && args.out.exists()), "{}: input and output are the same file; name another", args.out.display());
    let ckpt = Checkpoint::open(&args.input)?;
    let config = args.chunks.apply(Config::from_checkpoint(&ckpt)?)?;
    if args.out.extension().is_some_and(|e| e == "gguf") {
        return to_gguf(args, &ckpt, &config, global);
    }
    let known = args.out.extension().is_some_and(|e| e == "pth" || e == "safetensors");
    ensure!(known, "{}: the name must end in .gguf, .pth or .safetensors", args.out.display());
    let mut sources = Vec::new();
    let mut report = Vec::new();
    let (mut small, to_int8) = (false, matches!(global.stored, Some(Stored::Int8)));
    ensure!(!args.report || to_int8, "--report needs --dtype int8");
    for name in ckpt.names() {
        let Some(t) = ckpt.get(name) else { continue };
        let dtype = match global.stored {
            Some(Stored::Float(DType::F32)) => Dtype::F32,
            Some(Stored::Float(DType::F16)) => Dtype::F16,
            Some(Stored::Float(DType::BF16)) => Dtype::BF16,
            Some(Stored::Int8) if int8::is_large(name, t.shape()) => Dtype::I8,
            Some(Stored::Int8) => Dtype::F16,
            Some(Stored::Q8_0) => anyhow::bail!("{}: q8_0 is written as .gguf", args.out.display()),
            Some(Stored::Q4) => anyhow::bail!(Q4_IN_FILES),
            // What has no other file's blocks has 16 bits.
            None if t.dtype().block() != 1 => Dtype::F16,
            None => t.dtype(),
        };
        if dtype == Dtype::I8 {
            small = true;
            if args.report {
                report.push((name, int8::error(&t.to_f32_vec()?, t.shape()[1])));
                t.release();
            }
            sources.extend(int8::sources(t));
            continue;
        }
        let values = move || {
            let values = t.to_f32_vec()?;
            t.release();
            Ok(values.into())
        };
        sources.push(Source { name: name.into(), shape: t.shape().into(), dtype, values: Box::new(values) });
    }
    write(&args.out, &ckpt, &config, &sources, small, global)?;
    let bytes = std::fs::metadata(&args.out)?.len();
    let errors: BTreeMap<&str, f64> = report.iter().copied().collect();
    let mut json = json!({ "out": args.out, "tensors": sources.len(), "bytes": bytes });
    if args.report {
        json["relative_error"] = json!(errors);
    }
    global.result(json, || {
        let line = |(name, e): (&&str, &f64)| format!("{name}: relative error {e:.2e}\n");
        let lines: String = errors.iter().map(line).collect();
        format!("{lines}{}: {} tensors, {bytes} bytes\n", args.out.display(), sources.len())
    })
}

/// Writes a .pth or .safetensors file, told by its name, of tensors made from those of `from`; `small`: some are int8.
pub fn write(
    out: &Path, from: &Checkpoint, config: &Config, sources: &[Source<'_>], small: bool, global: &Global,
) -> anyhow::Result<()> {
    let name = out.display();
    match out.extension().and_then(|e| e.to_str()) {
        Some("pth") if config.double_rate || config.architecture != Architecture::Rwkv7 => anyhow::bail!(
            "{name}: a .pth file cannot say that a model is a Transformer or has the doubled in-context rate; write .safetensors"
        ),
        Some("pth") if small => anyhow::bail!("{name}: int8 is written as .safetensors"),
        Some("pth") => {
            if let Some(h) = config.hybrid {
                let (chunk, topk) = (h.chunk, h.topk);
                global.note(format!("a .pth file doesn't say its chunks: load it with --chunk {chunk} --topk {topk}"));
            }
            Ok(write_pth(out, sources)?)
        }
        Some("safetensors") => {
            // What a Hugging Face folder or a GGUF file says about itself is not true of the file written.
            let mut metadata = from.metadata().clone();
            metadata.remove(CONFIG_JSON);
            metadata.retain(|key, _| from.format() != Format::Gguf || key.starts_with("anser."));
            metadata.remove(int8::INT8);
            if config.hybrid.is_some() {
                metadata.extend([config.description()]);
            }
            if small {
                metadata.insert(int8::INT8.into(), int8::GROUP.to_string());
            }
            Ok(write_safetensors(out, sources, &metadata)?)
        }
        _ => anyhow::bail!("{name}: the name must end in .pth or .safetensors"),
    }
}

/// Writes what llama.cpp loads.
fn to_gguf(args: &Args, ckpt: &Checkpoint, config: &Config, global: &Global) -> anyhow::Result<()> {
    let out = args.out.display();
    ensure!(
        config.architecture == Architecture::Rwkv7 && !config.double_rate && config.hybrid.is_none(),
        "{out}: llama.cpp has no RWKV-X, no Transformer of this kind and no doubled in-context rate; write .safetensors"
    );
    let dtype = match global.stored {
        Some(Stored::Float(DType::F32)) => Some(Dtype::F32),
        Some(Stored::Float(DType::F16)) => Some(Dtype::F16),
        Some(Stored::Float(DType::BF16)) => Some(Dtype::BF16),
        Some(Stored::Q8_0) => Some(Dtype::Q8_0),
        Some(Stored::Q4) => anyhow::bail!(Q4_IN_FILES),
        Some(Stored::Int8) => anyhow::bail!("{out}: int8 is written as .safetensors; a .gguf file has q8_0"),
        None => None,
    };
    ensure!(!args.report, "--report needs --dtype int8");
    let (sources, mut metadata) = llama::from_official(ckpt, dtype)?;
    let mut text = |key: &str, value: &str| metadata.push((key.into(), Value::Text(value.into())));
    text("general.name", &args.out.file_stem().unwrap_or_default().to_string_lossy());
    for (key, value) in ckpt.metadata().iter().filter(|(key, _)| key.starts_with("anser.") && *key != int8::INT8) {
        text(key, value);
    }
    let name = ckpt.metadata().get("anser.tokenizer").map_or("world", String::as_str);
    let tokenizer = Tokenizer::from_name(name)?;
    let fits = tokenizer.vocab_size() <= config.vocab_size;
    if !fits {
        global.note(format!("{out}: a vocabulary of {} is not {name}'s; the file has no tokenizer", config.vocab_size));
    }
    let tokens = (0..).map_while(|id| tokenizer.token(id).ok()).filter(|_| fits);
    // Chats in the World format end a turn with an empty line.
    let end_of_turn = (name == "world").then_some(261);
    metadata.extend(llama::tokenizer(tokens, config.vocab_size, end_of_turn));
    write_gguf(&args.out, &sources, &metadata)?;
    let bytes = std::fs::metadata(&args.out)?.len();
    let json = json!({ "out": args.out, "tensors": sources.len(), "bytes": bytes });
    global.result(json, || format!("{out}: {} tensors, {bytes} bytes\n", sources.len()))
}
