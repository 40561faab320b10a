use crate::global::{Global, Interrupted, stop};
use anser_data::{Official, build};
use anser_tensor::memory;
use anser_tokenizer::Tokenizer;
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Prepares data sets
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Turns text into the official binidx format
    Build {
        /// Text files (each one document) and .jsonl files (each line an object with "text"), also as .xz, .zst or .gz
        #[arg(required = true)]
        inputs: Vec<PathBuf>,
        /// Writes PREFIX.bin, PREFIX.idx and PREFIX.json
        #[arg(long, value_name = "PREFIX")]
        out: PathBuf,
        /// world, world-4096 or bytes
        #[arg(long, default_value = "world")]
        tokenizer: String,
    },
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let What::Build { inputs, out, tokenizer } = &args.what;
    let tokenizer = Tokenizer::from_name(tokenizer)?;
    let mut total = 0;
    for path in inputs {
        total += std::fs::metadata(path).with_context(|| path.display().to_string())?.len();
    }
    // A line is held as bytes, as text and as tokens.
    let max_line = memory::available().map_or(usize::MAX / 2, |b| b as usize / 8);
    let bar = if global.quiet { ProgressBar::hidden() } else { ProgressBar::new(total) };
    bar.set_style(ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left")?);
    let progress = |read: u64| {
        bar.set_position(read);
        if stop().load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let built = build(inputs, out, &tokenizer, max_line, progress)?.ok_or(Interrupted)?;
    bar.finish_and_clear();
    // The official trainer wants to be told its prime.
    let primes: Vec<(usize, u64)> = [512, 1024, 2048, 4096, 8192]
        .into_iter()
        .filter_map(|ctx| Some((ctx, Official::new(built.tokens, ctx).ok()?.prime())))
        .collect();
    let json = json!({
        "documents": built.documents,
        "tokens": built.tokens,
        "bytes": built.bytes,
        "tokenizer": built.tokenizer,
        "magic_primes": primes.iter().map(|(ctx, p)| (ctx.to_string(), json!(p))).collect::<serde_json::Map<_, _>>(),
    });
    global.result(json, || {
        let mut text = format!(
            "{}: {} documents, {} bytes, {} tokens ({:.2} bytes a token)\n",
            out.display(),
            built.documents,
            built.bytes,
            built.tokens,
            built.bytes as f64 / built.tokens as f64
        );
        for (ctx, prime) in primes {
            text += &format!("magic prime for context {ctx}: {prime}\n");
        }
        text
    })
}
