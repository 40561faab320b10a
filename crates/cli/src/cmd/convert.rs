use crate::global::{Chunks, Global, Stored};
use anser_formats::{CONFIG_JSON, Checkpoint, Dtype, Source, int8, write_pth, write_safetensors};
use anser_model::{Architecture, Config};
use anser_tensor::DType;
use anyhow::ensure;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Rewrites a checkpoint as .pth or .safetensors (told by OUT's name), with --dtype in another type; int8 takes half the room of f16
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint to read: .pth, .safetensors or a Hugging Face folder
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
    match args.out.extension().and_then(|e| e.to_str()) {
        Some("pth") if config.double_rate || config.architecture != Architecture::Rwkv7 => anyhow::bail!(
            "{}: a .pth file cannot say that a model is a Transformer or has the doubled in-context rate; write .safetensors",
            args.out.display()
        ),
        Some("pth") if small => anyhow::bail!("{}: int8 is written as .safetensors", args.out.display()),
        Some("pth") => {
            if let Some(h) = config.hybrid {
                let (chunk, topk) = (h.chunk, h.topk);
                global.note(format!("a .pth file doesn't say its chunks: load it with --chunk {chunk} --topk {topk}"));
            }
            write_pth(&args.out, &sources)?
        }
        Some("safetensors") => {
            // What a Hugging Face folder says about itself is not true of the file written.
            let mut metadata = ckpt.metadata().clone();
            metadata.remove(CONFIG_JSON);
            metadata.remove(int8::INT8);
            if config.hybrid.is_some() {
                metadata.extend([config.description()]);
            }
            if small {
                metadata.insert(int8::INT8.into(), int8::GROUP.to_string());
            }
            write_safetensors(&args.out, &sources, &metadata)?
        }
        _ => anyhow::bail!("{}: the name must end in .pth or .safetensors", args.out.display()),
    }
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
