use crate::global::Global;
use anser_formats::{CONFIG_JSON, Checkpoint, Dtype, Source, write_pth, write_safetensors};
use anser_model::{Architecture, Config};
use anser_tensor::DType;
use anyhow::ensure;
use serde_json::json;
use std::path::PathBuf;

/// Rewrites a checkpoint as .pth or .safetensors (told by OUT's name), with --dtype in another type
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint to read: .pth, .safetensors or a Hugging Face folder
    input: PathBuf,
    /// File to write
    out: PathBuf,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let same = std::fs::canonicalize(&args.input).ok() == std::fs::canonicalize(&args.out).ok();
    ensure!(!(same && args.out.exists()), "{}: input and output are the same file; name another", args.out.display());
    let ckpt = Checkpoint::open(&args.input)?;
    let config = Config::from_checkpoint(&ckpt)?;
    let mut sources = Vec::new();
    for name in ckpt.names() {
        let Some(t) = ckpt.get(name) else { continue };
        let dtype = match global.dtype {
            Some(DType::F32) => Dtype::F32,
            Some(DType::F16) => Dtype::F16,
            Some(DType::BF16) => Dtype::BF16,
            None => t.dtype(),
        };
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
        Some("pth") => write_pth(&args.out, &sources)?,
        Some("safetensors") => {
            // What a Hugging Face folder says about itself is not true of the file written.
            let mut metadata = ckpt.metadata().clone();
            metadata.remove(CONFIG_JSON);
            write_safetensors(&args.out, &sources, &metadata)?
        }
        _ => anyhow::bail!("{}: the name must end in .pth or .safetensors", args.out.display()),
    }
    let bytes = std::fs::metadata(&args.out)?.len();
    global.result(json!({ "out": args.out, "tensors": sources.len(), "bytes": bytes }), || {
        format!("{}: {} tensors, {bytes} bytes\n", args.out.display(), sources.len())
    })
}
