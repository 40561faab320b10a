use crate::global::{Chunks, Global, Stored};
use crate::report::Report;
use anser_formats::gguf::{Value, write_gguf};
use anser_formats::{
    CONFIG_JSON, Checkpoint, Dtype, Format, Source, TensorView, coded, llama, write_pth, write_safetensors,
};
use anser_model::{Architecture, Config, kept_as};
use anser_tensor::{Code, Context, DType, DisjointMut, WeightType};
use anser_tokenizer::Tokenizer;
use anyhow::{bail, ensure};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Rewrites a checkpoint as .pth, .safetensors or .gguf (told by OUT's name), with --dtype in another type; int8 and, in .gguf, q8_0 take half the room of f16,
/// q4 a little more than a quarter
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint to read: .pth, .safetensors, .st, .gguf or a Hugging Face folder
    input: PathBuf,
    /// File to write
    out: PathBuf,
    /// Says how much was lost: of every tensor, and of the predictions on a text, beside those of the input in f32
    #[arg(long)]
    report: bool,
    /// The text of the report, a text or .jsonl file (also .xz, .zst, .gz) [default: the first 16 kB of the bundled text]
    #[arg(long, value_name = "FILE", requires = "report")]
    text: Option<PathBuf>,
    #[command(flatten)]
    chunks: Chunks,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let same = std::fs::canonicalize(&args.input).ok() == std::fs::canonicalize(&args.out).ok();
    ensure!(!(same && args.out.exists()), "{}: input and output are the same file; name another", args.out.display());
    let ckpt = Checkpoint::open(&args.input)?;
    ckpt.verify()?;
    let config = args.chunks.apply(Config::from_checkpoint(&ckpt)?)?;
    let ctx = global.exact_context()?;
    let text = args.text.as_deref();
    let reported = if args.report { Some(Report::reading(&ckpt, &config, text)?) } else { None };
    let tensors = match args.out.extension().and_then(|e| e.to_str()) {
        Some("gguf") => to_gguf(args, &ckpt, &config, global)?,
        Some("pth" | "safetensors") => to_official(args, &ckpt, &config, &ctx, global)?,
        _ => bail!("{}: the name must end in .gguf, .pth or .safetensors", args.out.display()),
    };
    let bytes = std::fs::metadata(&args.out)?.len();
    let mut json = json!({ "out": args.out.display().to_string(), "tensors": tensors, "bytes": bytes });
    let mut text = format!("{}: {tensors} tensors, {bytes} bytes\n", args.out.display());
    if let Some(reading) = reported {
        let report = Report::new(&ctx, &ckpt, &config, &args.out, reading, global)?;
        json["report"] = report.json();
        text = format!("{report}{text}");
    }
    global.result(json, || text)
}

/// Writes a .pth or .safetensors file: the number of its tensors.
fn to_official(
    args: &Args, ckpt: &Checkpoint, config: &Config, ctx: &Context, global: &Global,
) -> anyhow::Result<usize> {
    let (mut sources, mut types) = (Vec::new(), Vec::new());
    for name in ckpt.names() {
        let Some(t) = ckpt.get(name) else { continue };
        let dtype = match global.stored {
            Some(Stored::Float(dtype)) => of_float(dtype),
            Some(Stored::Int8) => of_coded(WeightType::Int8, &t),
            Some(Stored::Q4) => of_coded(WeightType::Q4, &t),
            Some(Stored::Q8_0) => bail!("{}: q8_0 is written as .gguf", args.out.display()),
            None if t.coded().is_some() => t.dtype(),
            None => in_floats(&t),
        };
        let code = match dtype {
            Dtype::I8 => Code::Int8,
            Dtype::Q4 => Code::Q4,
            Dtype::Q5 => Code::Q5,
            _ => {
                let values = move || {
                    let values = t.to_f32_vec()?;
                    t.release();
                    Ok(values.into())
                };
                sources.push(Source { name: name.into(), shape: t.shape().into(), dtype, values: Box::new(values) });
                continue;
            }
        };
        types.push(dtype);
        let inputs = t.shape().last().copied().unwrap_or(0);
        sources.extend(coded::sources(t, dtype, move |values| encode(ctx, code, inputs, values))?);
    }
    write(&args.out, ckpt, config, &sources, &types, global)?;
    Ok(sources.len())
}

fn of_float(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

/// The type of a tensor in a file whose matrices are coded: the one it has in memory, so that loading is copying and gives the same bits as coding there. Vectors keep theirs.
fn of_coded(kept: WeightType, t: &TensorView<'_>) -> Dtype {
    match kept_as(kept, t.name(), t.shape()) {
        Some(WeightType::Int8) => Dtype::I8,
        Some(WeightType::Q4) => Dtype::Q4,
        Some(WeightType::Q5) => Dtype::Q5,
        Some(WeightType::Float(dtype)) => of_float(dtype),
        None => in_floats(t),
    }
}

/// The type of a tensor that is no longer coded: what has blocks or codes gets 16 bits.
fn in_floats(t: &TensorView<'_>) -> Dtype {
    if t.dtype().block() != 1 || t.coded().is_some() { Dtype::F16 } else { t.dtype() }
}

/// Codes and scales of a matrix, in the layout of files.
fn encode(ctx: &Context, code: Code, inputs: usize, values: &[f32]) -> coded::Codes {
    let (rows, bytes, groups) =
        (values.len().checked_div(inputs).unwrap_or(0), code.bytes_of(inputs), inputs.div_ceil(code.group()));
    let (mut codes, mut scales) = (vec![0; rows * bytes], vec![Default::default(); rows * groups]);
    {
        let (codes, scales) = (DisjointMut::new(&mut codes), DisjointMut::new(&mut scales));
        ctx.threads().run(rows, |r| {
            // SAFETY: each row is coded by one task.
            let (codes, scales) =
                unsafe { (codes.get(r * bytes..(r + 1) * bytes), scales.get(r * groups..(r + 1) * groups)) };
            code.encode(&values[r * inputs..(r + 1) * inputs], codes, scales);
        });
    }
    (codes, scales)
}

/// Writes a .pth or .safetensors file, told by its name, of tensors made from those of `from`, some of which are coded
/// as these types.
pub fn write(
    out: &Path, from: &Checkpoint, config: &Config, sources: &[Source<'_>], codes: &[Dtype], global: &Global,
) -> anyhow::Result<()> {
    let name = out.display();
    match out.extension().and_then(|e| e.to_str()) {
        Some("pth") if config.double_rate || config.architecture != Architecture::Rwkv7 => bail!(
            "{name}: a .pth file cannot say that a model is a Transformer or has the doubled in-context rate; write .safetensors"
        ),
        Some("pth") if !codes.is_empty() => {
            bail!("{name}: int8 and q4 are written as .safetensors; a .pth file has f32, f16 or bf16: --dtype f16")
        }
        Some("pth") => {
            if let Some(h) = config.hybrid {
                let (chunk, topk) = (h.chunk, h.topk);
                let option = |name: &str, n: usize| if n == 0 { String::new() } else { format!(" --{name} {n}") };
                let always = option("sink", h.sink) + &option("window", h.window);
                global.note(format!(
                    "a .pth file doesn't say its chunks: load it with --chunk {chunk} --topk {topk}{always}"
                ));
            }
            if let Some(tokenizer) = from.metadata().get("anser.tokenizer").filter(|t| *t != "world") {
                global.note(format!("a .pth file doesn't say its tokenizer: load it with --tokenizer {tokenizer}"));
            }
            Ok(write_pth(out, sources)?)
        }
        Some("safetensors") => {
            // What a Hugging Face folder or a GGUF file says about itself is not true of the file written.
            let mut metadata = from.metadata().clone();
            metadata.remove(CONFIG_JSON);
            metadata.retain(|key, _| from.format() != Format::Gguf || key.starts_with("anser."));
            metadata.retain(|key, _| !coded::is_key(key));
            if config.hybrid.is_some() {
                metadata.extend([config.description()]);
            }
            metadata.extend(coded::metadata(codes));
            Ok(write_safetensors(out, sources, &metadata)?)
        }
        _ => bail!("{name}: the name must end in .pth or .safetensors"),
    }
}

/// Writes what llama.cpp loads: the number of its tensors.
fn to_gguf(args: &Args, ckpt: &Checkpoint, config: &Config, global: &Global) -> anyhow::Result<usize> {
    let out = args.out.display();
    ensure!(
        config.architecture == Architecture::Rwkv7 && !config.double_rate && config.hybrid.is_none(),
        "{out}: llama.cpp has no RWKV-X, no Transformer of this kind and no doubled in-context rate; write .safetensors"
    );
    let dtype = match global.stored {
        Some(Stored::Float(dtype)) => Some(of_float(dtype)),
        Some(Stored::Q8_0) => Some(Dtype::Q8_0),
        Some(Stored::Int8 | Stored::Q4) => {
            bail!("{out}: int8 and q4 are written as .safetensors; a .gguf file has q8_0: --dtype q8_0")
        }
        None => None,
    };
    let (sources, mut metadata) = llama::from_official(ckpt, dtype)?;
    let mut text = |key: &str, value: &str| metadata.push((key.into(), Value::Text(value.into())));
    text("general.name", &args.out.file_stem().unwrap_or_default().to_string_lossy());
    for (key, value) in ckpt.metadata().iter().filter(|(key, _)| key.starts_with("anser.") && !coded::is_key(key)) {
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
    Ok(sources.len())
}
