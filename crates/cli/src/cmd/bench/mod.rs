mod serve;

use crate::cmd::eval::picture;
use crate::global::{Bound, Chunks, Global, Interrupted, NewBlocks, stop};
use anser_eval::bench;
use anser_eval::flat::{self, Flat, Measured};
use anser_eval::long::{Long, Row};
use anser_eval::profile::{chrome_trace, kinds, table};
use anser_formats::Checkpoint;
use anser_model::{Config, Load, Model};
use anser_tensor::{DType, WeightType};
use anser_tokenizer::Tokenizer;
use anyhow::{Context, ensure};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Measures speed, beside what limits it on this machine
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Training steps: tokens/s and share of the matrix-product peak
    Train {
        #[command(flatten)]
        step: Step,
        /// Steps measured
        #[arg(long, default_value_t = 10, value_parser = positive)]
        steps: usize,
    },
    /// Every kernel of a training step on a GPU: its time, and how near it comes to the memory's or the products' limit
    Kernels {
        #[command(flatten)]
        step: Step,
    },
    /// WKV-7 alone, forward and backward, beside the time its bytes take
    Wkv {
        /// Sequences
        #[arg(long, default_value_t = 8, value_parser = positive)]
        rows: usize,
        /// Tokens of a sequence
        #[arg(long, default_value_t = 128, value_parser = positive)]
        ctx: usize,
        /// Heads
        #[arg(long, default_value_t = 4, value_parser = positive)]
        heads: usize,
        /// Size of a head
        #[arg(long, default_value_t = 64, value_parser = positive)]
        head_size: usize,
    },
    /// Top-k chunk attention alone, forward and with the backward pass, kernel by kernel on a GPU
    Attention {
        /// Tokens of the sequence; without it 8192, 32768 and 131072
        #[arg(long, value_parser = positive)]
        ctx: Option<usize>,
        /// Heads; without it 12 and 40
        #[arg(long, value_parser = positive)]
        heads: Option<usize>,
        /// Size of a head
        #[arg(long, default_value_t = 64, value_parser = positive)]
        head_size: usize,
        /// Tokens of a chunk, with --topk; without them 2048 with 3 and 128 with 16
        #[arg(long, requires = "topk", value_parser = positive)]
        chunk: Option<usize>,
        /// Chunks that a query sees, its own included
        #[arg(long, alias = "top", requires = "chunk", value_parser = positive)]
        topk: Option<usize>,
    },
    /// Decoding and prefill: tokens/s and share of the memory bandwidth. A model from a file stands beside random weights of its shape, of which too few
    /// activations are zero to skip weights
    Decode {
        /// Size, of random weights
        #[arg(long, default_value = "0.1b")]
        preset: String,
        /// Checkpoint
        #[arg(long, conflicts_with = "preset")]
        model: Option<PathBuf>,
        /// Tokens measured
        #[arg(long, default_value_t = 64, value_parser = positive)]
        tokens: usize,
        /// Sequences decoded together (on a GPU)
        #[arg(long, default_value_t = 1, value_parser = positive)]
        batch: usize,
        /// How states are kept between steps on a GPU: f32 or f16
        #[arg(long, default_value = "f32")]
        state: DType,
        /// Takes the fastest algorithm of each matrix product instead of the one that cuBLASLt thinks best
        #[arg(long)]
        tune: bool,
    },
    /// Time per token and memory along one long sequence that is read token by token, beside what they were at 16,384 tokens: RWKV-7 keeps both flat, and with
    /// --cache a hybrid does, too
    Flat {
        #[command(flatten)]
        dims: Dims,
        /// Tokens read
        #[arg(long, default_value_t = 100_000, value_parser = positive)]
        tokens: usize,
        /// Of a hybrid and RWKV-7 with as many blocks, both of which are measured if there is attention, this one alone: hybrid or rwkv7
        #[arg(long, value_parser = ["hybrid", "rwkv7"])]
        only: Option<String>,
        /// Pictures (SVG), with -time and -state before the extension
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// How reading a prompt, one token more and the state grow with the length: a hybrid, the same with dense attention, RWKV-7 with as many blocks
    Long {
        #[command(flatten)]
        dims: Dims,
        /// Lengths of prompts [default: powers of two from 1024 to 16384, on a GPU to 131072]
        #[arg(long, value_delimiter = ',')]
        lengths: Vec<usize>,
        /// Positions after which single tokens are timed [default: the lengths]
        #[arg(long, value_delimiter = ',')]
        decode_at: Vec<usize>,
        /// Single tokens timed there; the median counts
        #[arg(long, default_value_t = 16, value_parser = positive)]
        decode: usize,
        /// Seconds of reading for each of the three models, after which longer prompts are left out
        #[arg(long, default_value_t = 60.0)]
        budget: f64,
        /// Pictures (SVG), with -prefill and -decode before the extension
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// A server under load: time to the first token, between tokens and to the end, tokens a second
    Serve(serve::Args),
    /// Encoding the bundled text on one core
    Tokenizer {
        /// world, world-4096 or bytes
        #[arg(long, default_value = "world")]
        tokenizer: String,
    },
}

/// A model of noise: its speed is that of any weights.
#[derive(clap::Args)]
struct Dims {
    /// Size
    #[arg(long, default_value = "tiny")]
    preset: String,
    /// Dimensions of this checkpoint instead; its weights are not read
    #[arg(long, conflicts_with = "preset")]
    model: Option<PathBuf>,
    /// Attention blocks among the RWKV-7 blocks [default: none in flat, one for 4 of them in long]
    #[arg(long)]
    attention: Option<usize>,
    #[command(flatten)]
    blocks: NewBlocks,
    #[command(flatten)]
    chunks: Chunks,
    #[command(flatten)]
    bound: Bound,
}

impl Dims {
    /// The dimensions; `attention` gives the default number of attention blocks among so many others.
    fn config(&self, attention: fn(usize) -> usize) -> anyhow::Result<Config> {
        let mut config = match &self.model {
            Some(path) => Config::from_checkpoint(&Checkpoint::open(path)?)?,
            None => Config::preset(&self.preset)?,
        };
        ensure!(
            config.hybrid.is_none() || self.attention.is_none() && !self.blocks.asked(),
            "--attention, --gate and --key-heads: the model has attention blocks already; leave them out"
        );
        let blocks = self.attention.unwrap_or_else(|| attention(config.n_layer));
        ensure!(blocks > 0 || !self.blocks.asked(), "--gate and --key-heads are of attention: give --attention too");
        if config.hybrid.is_none() && blocks > 0 {
            config.hybrid = Some(self.blocks.hybrid(blocks));
        }
        self.chunks.apply(config)
    }
}

/// A training step.
#[derive(clap::Args)]
struct Step {
    /// Layers
    #[arg(long, default_value_t = 6, value_parser = positive)]
    layers: usize,
    /// Width
    #[arg(long, default_value_t = 256, value_parser = positive)]
    width: usize,
    /// Vocabulary
    #[arg(long, default_value_t = 256, value_parser = positive)]
    vocab: usize,
    /// Rows of a batch
    #[arg(long, default_value_t = 8, value_parser = positive)]
    rows: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 128, value_parser = positive)]
    ctx: usize,
    /// What is computed again going back: auto, nothing, shifts or all
    #[arg(long, default_value = "auto")]
    recompute: String,
    /// Takes the fastest algorithm of each matrix product instead of the one that cuBLASLt thinks best
    #[arg(long)]
    tune: bool,
    /// Times every launch on the GPU in one more step and writes this file, a trace for Chrome or Perfetto
    #[arg(long)]
    profile: Option<PathBuf>,
}

impl Step {
    fn measure(&self, ctx: &anser_tensor::Context, steps: usize, profiled: bool) -> anyhow::Result<bench::Train> {
        let Step { layers, width, vocab, rows, ctx: t, recompute, tune, profile } = self;
        let profiled = profiled || profile.is_some();
        ensure!(!profiled || ctx.cuda().is_some(), "launches are timed on a GPU only: --device cuda");
        let recompute = serde_json::from_value(json!(recompute)).context("--recompute")?;
        let r = bench::train(ctx, *layers, *width, *vocab, *rows, *t, steps, profiled, recompute, *tune)?;
        if let (Some(path), Some((spans, _))) = (profile, &r.profile) {
            let trace = chrome_trace(spans).to_string();
            std::fs::write(path, trace).with_context(|| path.display().to_string())?;
        }
        Ok(r)
    }
}

/// A line for the operation and one for each kernel.
fn attention(a: &bench::Attention) -> String {
    let mut text = format!(
        "chunk {} top {}, T{} H{} N{}: forward {:.3} ms = {:.0} TFLOP/s, with backward {:.3} ms = {:.0} TFLOP/s\n",
        a.chunk,
        a.top,
        a.tokens,
        a.heads,
        a.head_size,
        1e3 * a.forward,
        a.flops / a.forward / 1e12,
        1e3 * a.both,
        3.5 * a.flops / a.both / 1e12,
    );
    let all: f64 = a.kernels.iter().map(|k| k.1).sum();
    for (name, seconds) in &a.kernels {
        text += &format!("  {name:28} {:9.3} ms {:5.1}%\n", 1e3 * seconds, 100.0 * seconds / all);
    }
    text
}

/// What `bench decode` measures: its name, the model, on a CPU beside one from a file random weights of its shape, and text in the tokens of both.
fn subjects(
    preset: &str, model: Option<&Path>, ctx: &anser_tensor::Context, global: &Global,
) -> anyhow::Result<(String, Vec<Model>, Vec<u32>)> {
    let kept = global.weights(ctx)?;
    let (name, mut models, config, tokenizer) = match model {
        None => (preset.into(), Vec::new(), Config::preset(preset)?, "world".into()),
        Some(path) => {
            let file = Checkpoint::open(path)?;
            let loaded = Model::load(ctx, &file, Load::Inference(kept)).with_context(|| path.display().to_string())?;
            let config = loaded.config().clone();
            let tokenizer = file.metadata().get("anser.tokenizer").cloned().unwrap_or_else(|| "world".into());
            (path.display().to_string(), vec![loaded], config, tokenizer)
        }
    };
    let text = Tokenizer::from_name(&tokenizer)?.encode(anser_data::bundled::corpus().as_bytes());
    if models.is_empty() || ctx.cuda().is_none() {
        models.push(Model::noise(ctx, &config, kept, 1)?);
    }
    Ok((name, models, text))
}

/// A number of things of which there must be one.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        number => number.map_err(|e: std::num::ParseIntError| e.to_string()),
    }
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let coded = matches!(args.what, What::Serve(_) | What::Decode { .. } | What::Flat { .. } | What::Long { .. });
    let ctx = if coded { global.context()? } else { global.context_in_floats()? };
    match &args.what {
        What::Serve(args) => serve::run(args, &ctx, global),
        What::Kernels { step } => {
            let Some((spans, limits)) = step.measure(&ctx, 2, true)?.profile else { return Ok(()) };
            global.result(json!({ "limits": limits, "kernels": kinds(&spans) }), || table(&spans, limits))
        }
        What::Train { step, steps } => {
            let r = step.measure(&ctx, *steps, false)?;
            let Step { layers, width, vocab, rows, ctx: t, .. } = step;
            let json = json!({
                "tokens_per_second": r.tokens_per_second,
                "gflops": r.flops / 1e9,
                "gemm_peak_gflops": r.peak / 1e9,
                "nominal_peak_gflops": r.nominal.map(|p| p / 1e9),
                "mfu": r.flops / r.peak,
                "wkv_share": r.wkv_share,
                "peak_bytes": r.peak_bytes,
                "forecast_bytes": r.forecast_bytes,
                "recompute": format!("{:?}", r.recompute).to_lowercase(),
                "threads": ctx.threads().len(),
            });
            global.result(json, || {
                format!(
                    "training L{layers} D{width} V{vocab} B{rows} T{t}, {}, {} threads: {:.0} tokens/s, {:.1} GFLOP/s = {:.1}% of the measured GEMM peak {:.0}{}{}; {:.1} GB, {:.1} forecast, recompute {}\n",
                    ctx.dtype(),
                    ctx.threads().len(),
                    r.tokens_per_second,
                    r.flops / 1e9,
                    100.0 * r.flops / r.peak,
                    r.peak / 1e9,
                    r.nominal.map_or(String::new(), |p| format!(" (at the nominal clock {:.0})", p / 1e9)),
                    r.wkv_share.map_or(String::new(), |s| format!("; WKV-7 {:.1}% of the step", 100.0 * s)),
                    r.peak_bytes as f64 / 1e9,
                    r.forecast_bytes as f64 / 1e9,
                    format!("{:?}", r.recompute).to_lowercase(),
                )
            })
        }
        What::Decode { preset, model, tokens, batch, state, tune } if ctx.cuda().is_some() => {
            ensure!(*state != DType::BF16, "--state must be f32 or f16");
            let (name, models, _) = subjects(preset, model.as_deref(), &ctx, global)?;
            let r = bench::decode_batch(&ctx, &models[0], *batch, *tokens, *state, *tune)?;
            let kept = match global.weights(&ctx)? {
                kept @ WeightType::Int8 => format!("{kept}, activations {}", ctx.dtype()),
                _ => ctx.dtype().to_string(),
            };
            let rate = r.decode * r.bytes / *batch as f64;
            let part = |(name, seconds, bytes): &(String, f64, f64)| json!({ "part": name, "microseconds": seconds * 1e6, "bytes": bytes, "share_of_bandwidth": bytes / seconds / r.bandwidth });
            let json = json!({
                "decode_tokens_per_second": r.decode,
                "with_logits_tokens_per_second": r.with_logits,
                "prefill_tokens_per_second": r.prefill,
                "bytes_per_step": r.bytes,
                "bandwidth": r.bandwidth,
                "share_of_bandwidth": rate / r.bandwidth,
                "zero_share": r.zero_share,
                "memory": r.memory,
                "parts": r.parts.iter().map(part).collect::<Vec<_>>(),
            });
            global.result(json, || {
                let mut text = format!(
                    "{name} {kept}, batch {batch}, states {state}: decode {:.0} tokens/s = {:.0} GB/s of {:.0} measured ({:.0}%), {:.1} MB a step, {:.0}% of relu^2 zero; {:.0} tokens/s with logits on the host; prefill of {} tokens {:.0} tokens/s; {:.2} GB of device memory\n",
                    r.decode,
                    rate / 1e9,
                    r.bandwidth / 1e9,
                    100.0 * rate / r.bandwidth,
                    r.bytes / 1e6,
                    100.0 * r.zero_share,
                    r.with_logits,
                    bench::PROMPT,
                    r.prefill,
                    r.memory as f64 / 1e9,
                );
                for (name, seconds, bytes) in &r.parts {
                    let (us, share) = (seconds * 1e6, 100.0 * bytes / seconds / r.bandwidth);
                    text += &format!("  {name:12} {us:8.1} us a step alone, {:.1} MB, {share:.0}%\n", bytes / 1e6);
                }
                text
            })
        }
        What::Wkv { rows, ctx: t, heads, head_size } => {
            ensure!([16, 32, 64, 128].contains(head_size), "--head-size must be 16, 32, 64 or 128");
            let r = bench::wkv(&ctx, *rows, *t, *heads, *head_size);
            global.result(serde_json::to_value(r)?, || {
                let floor = r.bytes / r.bandwidth;
                format!(
                    "WKV-7 B{rows} T{t} H{heads} N{head_size}, {}: forward {:.3} ms, for training {:.3} ms, with backward {:.3} ms; its bytes take {:.3} ms at {:.0} GB/s ({:.0}%)\n",
                    ctx.dtype(),
                    1e3 * r.forward,
                    1e3 * r.recording,
                    1e3 * r.both,
                    1e3 * floor,
                    r.bandwidth / 1e9,
                    100.0 * floor / r.both,
                )
            })
        }
        What::Attention { ctx: tokens, heads, head_size, chunk, topk } => {
            ensure!([16, 32, 64, 128].contains(head_size), "--head-size must be 16, 32, 64 or 128");
            let shapes = match (chunk, topk) {
                (Some(size), Some(top)) => vec![[*size, *top]],
                _ => vec![[2048, 3], [128, 16]],
            };
            let mut all = Vec::new();
            for chunks in shapes {
                for heads in heads.map_or(vec![12, 40], |h| vec![h]) {
                    for tokens in tokens.map_or(vec![8192, 32768, 131072], |t| vec![t]) {
                        all.push(bench::attention(&ctx, tokens, heads, *head_size, chunks));
                        ctx.check()?;
                    }
                }
            }
            global.result(json!({ "runs": all }), || all.iter().map(attention).collect())
        }
        What::Decode { batch, state, tune, .. } if *batch != 1 || *state != DType::F32 || *tune => {
            anyhow::bail!("--batch, --state and --tune need --device cuda")
        }
        What::Decode { preset, model, tokens, .. } => {
            let dtype = global.weights(&ctx)?;
            let (name, models, text) = subjects(preset, model.as_deref(), &ctx, global)?;
            let measured = bench::decode(&ctx, &models, dtype, &text, *tokens)?;
            let json = |r: &bench::Decode| {
                json!({
                    "decode_tokens_per_second": r.decode,
                    "prefill_256_tokens_per_second": r.prefill,
                    "bytes_per_token": r.bytes,
                    "bandwidth": r.bandwidth,
                    "share_of_bandwidth": r.decode * r.bytes / r.bandwidth,
                    "threads": ctx.threads().len(),
                })
            };
            let mut all = json(&measured[0]);
            if let Some(random) = measured.get(1) {
                all["random_weights"] = json(random);
            }
            global.result(all, || {
                let line = |name: &str, r: &bench::Decode| {
                    format!(
                        "{name} {dtype}, {} threads: decode {:.1} tokens/s = {:.1} GB/s of {:.1} measured ({:.0}%); prefill of 256 tokens {:.0} tokens/s\n",
                        ctx.threads().len(),
                        r.decode,
                        r.decode * r.bytes / 1e9,
                        r.bandwidth / 1e9,
                        100.0 * r.decode * r.bytes / r.bandwidth,
                        r.prefill,
                    )
                };
                let mut text = line(&name, &measured[0]);
                if let Some(random) = measured.get(1) {
                    text += &line("random weights of its shape", random);
                    text += &format!(
                        "{:.2} times the tokens/s of random weights: lines of weights under zeros of relu^2 are left out where that pays\n",
                        measured[0].decode / random.decode
                    );
                }
                text
            })
        }
        What::Flat { dims, tokens, only, out } => {
            let (config, dtype) = (dims.config(|_| 0)?, global.weights(&ctx)?);
            let (attention, cache) = (config.hybrid.map_or(0, |h| h.layers), dims.bound.cache());
            if let Some(cache) = cache {
                cache.validate(&config)?;
            }
            let plain = Config { hybrid: None, n_layer: config.n_layer + attention, ..config.clone() };
            let mut models = vec![("hybrid", config, cache), ("rwkv7", plain, None)];
            models.retain(|(name, ..)| (attention > 0 || *name == "rwkv7") && only.as_ref().is_none_or(|o| o == name));
            ensure!(!models.is_empty(), "--only hybrid: the model has no attention; add --attention");
            let test = Flat { models, kept: dtype, tokens: *tokens };
            let mut told = global.stream(Measured::HEAD);
            let mut tell = |measured: &Measured| {
                if told.is_ok() {
                    told = global.stream(&measured.line());
                }
            };
            let measured = test.run(&ctx, stop(), &mut tell)?;
            told?;
            if let Some(out) = out {
                for (name, svg) in measured.pictures() {
                    picture(out, &format!("-{name}"), &svg)?;
                }
            }
            let row = |r: &flat::Row| {
                let mut json = json!(r);
                if let Some([time, state, memory]) = measured.against_16k(r) {
                    json["times_16k"] = json!({ "seconds": time, "bytes": state, "memory": memory });
                }
                json
            };
            let json = json!({ "cache": cache, "rows": measured.rows.iter().map(row).collect::<Vec<_>>() });
            global.result(json, String::new)?;
            if stop().load(Ordering::SeqCst) { Err(Interrupted.into()) } else { Ok(()) }
        }
        What::Long { dims, lengths, decode_at, decode, budget, out } => {
            let config = dims.config(|blocks| (blocks / 4).max(1))?;
            global.remarks(&config);
            let longest = if ctx.cuda().is_some() { 17 } else { 14 };
            let powers = (10..=longest).map(|i| 1 << i).collect();
            let test = Long {
                config,
                kept: global.weights(&ctx)?,
                cache: dims.bound.cache(),
                lengths: if lengths.is_empty() { powers } else { lengths.clone() },
                decode_at: decode_at.clone(),
                decode: *decode,
                budget: *budget,
            };
            let measured = test.run(&ctx, stop(), &mut |line| global.note(line))?;
            if let Some(out) = out {
                for (name, svg) in measured.pictures() {
                    picture(out, &format!("-{name}"), &svg)?;
                }
            }
            let row = |r: &Row| {
                let [dense, rwkv7] = ["dense", "rwkv7"].map(|other| measured.faster_than(other, r));
                let mut json = json!(r);
                json["prefill_tokens_per_second"] = json!(r.tokens as f64 / r.prefill_seconds);
                json["times_faster_than_dense"] = json!({ "prefill": dense[0], "decode": dense[1] });
                json["times_faster_than_rwkv7"] = json!({ "prefill": rwkv7[0], "decode": rwkv7[1] });
                json
            };
            let rows: Vec<_> = measured.rows.iter().map(row).collect();
            let skipped: Vec<_> =
                measured.skipped.iter().map(|(model, tokens)| json!({ "model": model, "tokens": tokens })).collect();
            let json = json!({ "config": test.config, "cache": test.cache, "rows": rows, "skipped": skipped });
            global.result(json, || measured.table())?;
            if stop().load(Ordering::SeqCst) { Err(Interrupted.into()) } else { Ok(()) }
        }
        What::Tokenizer { tokenizer } => {
            let r = bench::tokenize(&Tokenizer::from_name(tokenizer)?);
            let json = json!({ "bytes_per_second": r.bytes_per_second, "bytes": r.bytes, "tokens": r.tokens });
            global.result(json, || {
                format!("{tokenizer}: {:.1} MB/s, {} bytes, {} tokens\n", r.bytes_per_second / 1e6, r.bytes, r.tokens)
            })
        }
    }
}
