use crate::global::{Global, Interrupted, stop};
use anser_formats::Checkpoint;
use anser_infer::{Sampler, Sampling, Session};
use anser_model::{Load, Model};
use anser_tensor::DType;
use anser_tokenizer::{StreamDecoder, Tokenizer};
use anyhow::{Context as _, ensure};
use serde_json::json;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Continues a text
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint [default: what quickstart trained]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Text to continue; - reads it from stdin
    #[arg(long, default_value = "")]
    prompt: String,
    /// Tokens to write at most
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// 0: always the most probable token
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Keep the most probable tokens that reach this probability
    #[arg(long, default_value_t = 0.7)]
    top_p: f32,
    /// Keep this many tokens (0: all)
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Drop tokens below this share of the highest probability
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Subtracted from the logits of tokens that occurred
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtracted times the token's decayed count
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Factor on the counts at each token
    #[arg(long, default_value_t = 0.996)]
    penalty_decay: f32,
    /// Seed of the random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Stop before this text (may be given several times)
    #[arg(long)]
    stop: Vec<String>,
    /// Tokenizer: world or bytes [default: what the model file says, else world]
    #[arg(long)]
    tokenizer: Option<String>,
    /// Go on from a saved state
    #[arg(long)]
    load_state: Option<PathBuf>,
    /// Save the state at the end
    #[arg(long)]
    save_state: Option<PathBuf>,
    /// Speeds, on stderr
    #[arg(long)]
    stats: bool,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let options = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        min_p: args.min_p,
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        penalty_decay: args.penalty_decay,
        seed: args.seed,
    };
    let mut sampler = Sampler::new(options)?;
    let path = match &args.model {
        Some(path) => path.clone(),
        None => {
            let path = PathBuf::from("anser-quickstart/model.safetensors");
            ensure!(path.exists(), "no model: run `anser quickstart` here first, or name one with --model");
            path
        }
    };
    let ctx = global.context()?;
    let ckpt = Checkpoint::open(&path)?;
    let name = args.tokenizer.as_deref().or(ckpt.metadata().get("anser.tokenizer").map(String::as_str));
    let tokenizer = Tokenizer::from_name(name.unwrap_or("world"))?;
    let model = Model::load(&ctx, &ckpt, Load::Inference(global.dtype.unwrap_or(DType::BF16)))
        .with_context(|| format!("{}", path.display()))?;

    let mut prompt = args.prompt.clone().into_bytes();
    if args.prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_end(&mut prompt).context("stdin")?;
    }
    let mut tokens = tokenizer.encode(&prompt);
    let mut session = match &args.load_state {
        Some(path) => Session::load(&ctx, &model, path)?,
        None => Session::new(&ctx, &model),
    };
    if tokens.is_empty() && args.load_state.is_none() {
        // An empty prompt starts a document.
        tokens.push(tokenizer.end_of_document());
    }
    let start = Instant::now();
    session.feed(&tokens)?;
    let prefill = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let mut out = Text { decoder: StreamDecoder::default(), held: String::new(), all: String::new(), args, global };
    let mut count = 0;
    let mut reason = "length";
    while count < args.max_tokens {
        if stop().load(Ordering::SeqCst) {
            reason = "interrupted";
            break;
        }
        let token = sampler.sample(session.logits()?)?;
        if token == tokenizer.end_of_document() {
            reason = "end of document";
            break;
        }
        session.feed(&[token])?;
        count += 1;
        if out.push(tokenizer.token(token)?)? {
            reason = "stop";
            break;
        }
    }
    if reason != "stop" {
        out.finish()?;
    }
    let decode = start.elapsed().as_secs_f64();
    if let Some(path) = &args.save_state {
        session.save(path)?;
    }
    let speeds = [tokens.len() as f64 / prefill, count as f64 / decode];
    if args.stats {
        eprintln!("prompt: {} tokens, {:.1}/s; written: {count} tokens, {:.1}/s", tokens.len(), speeds[0], speeds[1]);
    }
    let json = json!({
        "text": out.all,
        "finish_reason": reason,
        "prompt_tokens": tokens.len(),
        "tokens": count,
        "prefill_tokens_per_second": speeds[0],
        "decode_tokens_per_second": speeds[1],
    });
    global.result(json, || "\n".into())?;
    if reason == "interrupted" { Err(Interrupted.into()) } else { Ok(()) }
}

/// Text on its way out: whole characters, and nothing that may yet become a stop text.
struct Text<'a> {
    decoder: StreamDecoder,
    held: String,
    all: String,
    args: &'a Args,
    global: &'a Global,
}

impl Text<'_> {
    /// Takes a token's bytes; true at a stop text.
    fn push(&mut self, bytes: &[u8]) -> anyhow::Result<bool> {
        self.held += &self.decoder.push(bytes);
        let stops = || self.args.stop.iter().filter(|s| !s.is_empty());
        if let Some(at) = stops().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            self.emit(at)?;
            return Ok(true);
        }
        let begun = |n: &usize| stops().any(|s| s.starts_with(&self.held[*n..]));
        let safe = self.held.char_indices().map(|(i, _)| i).find(begun).unwrap_or(self.held.len());
        self.emit(safe)?;
        Ok(false)
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        self.held += &self.decoder.finish();
        self.emit(self.held.len())
    }

    fn emit(&mut self, n: usize) -> anyhow::Result<()> {
        let text: String = self.held.drain(..n).collect();
        if !self.global.json {
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
        self.all += &text;
        Ok(())
    }
}
