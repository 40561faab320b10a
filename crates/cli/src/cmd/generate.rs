use crate::cmd::answer::Ends;
use crate::global::{Global, Interrupted, say, stop};
use crate::source::Source;
use anser_formats::writable;
use anser_infer::engine::{End, Event, Request, Start};
use anser_infer::{InitialState, Sampler, SamplerOrder, Sampling, SavedState, TextStream};
use anser_model::Model;
use anser_tensor::Context;
use anyhow::{Context as _, bail};
use serde_json::json;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Continues a text
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub common: Common,
    /// Text to continue; - reads it from stdin
    #[arg(long, default_value = "")]
    prompt: String,
    /// Tokens to write at most
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// Stop before this text (may be given several times)
    #[arg(long)]
    stop: Vec<String>,
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

/// What `generate` and `chat` share: the model and how tokens are chosen.
#[derive(clap::Args)]
pub struct Common {
    #[command(flatten)]
    pub source: Source,
    /// Begin with a tuned initial state: a .pth file of blocks.N.att.time_state
    #[arg(long, value_name = "FILE")]
    initial_state: Option<PathBuf>,
    /// 0: always the most probable token
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Keep the most probable tokens that reach this probability
    #[arg(long, default_value_t = Sampling::default().top_p)]
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
    /// Place of the temperature: rwkv (after top-p) or openai (before)
    #[arg(long, default_value = "rwkv", value_parser = ["rwkv", "openai"])]
    sampler_order: String,
    /// Adds to a token's logit, as in 261=-2.5; -inf bans the token (may be given several times)
    #[arg(long, value_name = "TOKEN=BIAS", allow_hyphen_values = true, value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
}

fn bias(s: &str) -> Result<(u32, f32), String> {
    let (token, bias) = s.split_once('=').ok_or("write TOKEN=BIAS")?;
    Ok((token.parse().map_err(|e| format!("{token}: {e}"))?, bias.parse().map_err(|e| format!("{bias}: {e}"))?))
}

impl Common {
    /// The beginning of a sequence, or what a state file goes on from.
    pub fn begin(&self, ctx: &Context, model: &Model, state: Option<&Path>) -> anyhow::Result<SavedState> {
        let begun = self.source.begin(ctx, model, state)?;
        match &self.initial_state {
            None => Ok(begun),
            Some(_) if state.is_some() => bail!("--initial-state: a saved state has its beginning in it; leave it out"),
            Some(path) => {
                let initial = InitialState::open(model.config(), path)?;
                Ok(SavedState::beginning(ctx, model, begun.bound(), Some(&initial))?)
            }
        }
    }

    /// The sampling options.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            penalty_decay: self.penalty_decay,
            seed: self.seed,
            order: if self.sampler_order == "openai" { SamplerOrder::OpenAi } else { SamplerOrder::Rwkv },
            logit_bias: self.logit_bias.iter().copied().collect(),
        }
    }
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    // Options that make no sense, and a file that can't be written, are found before the model is loaded.
    args.save_state.as_deref().map_or(Ok(()), writable)?;
    let sampler = Sampler::new(args.common.sampling())?;
    let ctx = global.context()?;
    let (model, tokenizer) = args.common.source.load(&ctx, global)?;
    let model = Arc::new(model);

    let mut prompt = args.prompt.clone().into_bytes();
    if args.prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_end(&mut prompt).context("stdin")?;
    }
    let mut tokens = tokenizer.encode(&prompt);
    let begun = args.common.begin(&ctx, &model, args.load_state.as_deref())?;
    if tokens.is_empty() && args.load_state.is_none() {
        // An empty prompt starts a document.
        tokens.push(tokenizer.end_of_document());
    }
    let (prompt_tokens, mut count) = (tokens.len(), 0);
    let engine = args.common.source.engine(&ctx, &model, begun.bound())?;
    let mut start = Instant::now();
    let mut stream = engine.submit(Request {
        prompt: tokens,
        start: Start::State(begun),
        sampler: Some(sampler),
        max_tokens: args.max_tokens,
        stop_tokens: vec![tokenizer.end_of_document()],
        constraint: Some(Box::new(Ends::new(tokenizer, &args.stop))),
        // Without an answer the state is all that comes of it.
        keep_state: args.save_state.is_some() || args.max_tokens == 0,
        ..Request::default()
    })?;
    let (mut out, mut text, mut stopped, mut kept) = (TextStream::new(&args.stop), String::new(), false, None);
    let mut emit = |piece: String| {
        text += &piece;
        global.stream(&piece)
    };
    let mut prefill = None;
    let reason = loop {
        // Until the prompt is read nothing is lost by leaving at once.
        let event = if prefill.is_none() { stream.recv_unless(stop()) } else { stream.recv() };
        match event {
            Some(Event::Prompt { .. }) => {
                prefill = Some(start.elapsed().as_secs_f64());
                start = Instant::now();
            }
            Some(Event::Token(written)) => {
                count += 1;
                let (piece, end) = out.push(tokenizer.token(written.token)?);
                stopped = end.is_some();
                emit(piece)?;
            }
            Some(Event::State(state)) => kept = Some(state),
            Some(Event::End(end)) => match end.checked()? {
                _ if stopped => break "stop",
                End::Stop => break "end of document",
                End::Constraint => break "interrupted",
                _ => break "length",
            },
            None if prefill.is_none() => break "interrupted",
            None => bail!("the engine has ended"),
        }
    };
    if reason != "stop" {
        emit(out.finish())?;
    }
    let decode = start.elapsed().as_secs_f64();
    if let (Some(path), Some(state)) = (&args.save_state, kept) {
        state.save(&ctx, &model, path)?;
    }
    let speeds = [prompt_tokens as f64 / prefill.unwrap_or(f64::INFINITY), count as f64 / decode];
    if args.stats {
        say(format!("prompt: {prompt_tokens} tokens, {:.1}/s; written: {count} tokens, {:.1}/s", speeds[0], speeds[1]));
    }
    let json = json!({
        "text": text,
        "finish_reason": reason,
        "prompt_tokens": prompt_tokens,
        "tokens": count,
        "prefill_tokens_per_second": speeds[0],
        "decode_tokens_per_second": speeds[1],
    });
    global.result(json, || "\n".into())?;
    if reason == "interrupted" { Err(Interrupted.into()) } else { Ok(()) }
}
