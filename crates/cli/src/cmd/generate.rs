use crate::cmd::answer::Ends;
use crate::global::{Bound, Chunks, Global, Interrupted};
use anser_formats::Checkpoint;
use anser_infer::engine::{End, Engine, EngineOptions, Event, Request, Start};
use anser_infer::{InitialState, Sampler, SamplerOrder, Sampling, SavedState, TextStream};
use anser_model::{Cache, Config, Load, Model};
use anser_tensor::Context;
use anser_tokenizer::Tokenizer;
use anyhow::{Context as _, bail, ensure};
use serde_json::json;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// The model that needs no file: 12 million parameters, English and Rust.
static OWN_MODEL: &[u8] = include_bytes!("../../../../models/anser-12m.safetensors");

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

/// A model to be read from and written with.
#[derive(clap::Args)]
pub struct Source {
    /// Checkpoint or Hugging Face folder [default: the small model that is part of this program, see models/README.md]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Tokenizer: world, world-4096 or bytes [default: what the model file says, else world]
    #[arg(long)]
    tokenizer: Option<String>,
    #[command(flatten)]
    chunks: Chunks,
    #[command(flatten)]
    bound: Bound,
    /// On a CPU, for one text at a time: tokens read ahead at most, guessed where it repeats itself, as quotations and edited code do; the output stays the
    /// same [default: 4 at temperature 0, else none]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u8).range(0..=64))]
    speculate: Option<u8>,
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

impl Source {
    /// Loads the model and its tokenizer.
    pub fn load(&self, ctx: &Context, global: &Global) -> anyhow::Result<(Model, Tokenizer)> {
        let ckpt = match &self.model {
            Some(path) => Checkpoint::open(path)?,
            None => Checkpoint::from_static("anser-12m.safetensors", OWN_MODEL)?,
        };
        let path = ckpt.path().display();
        let name = self.tokenizer.as_deref().or(ckpt.metadata().get("anser.tokenizer").map(String::as_str));
        let tokenizer = Tokenizer::from_name(name.unwrap_or("world"))?;
        let config = self.chunks.apply(Config::from_checkpoint(&ckpt)?).with_context(|| path.to_string())?;
        global.remarks(&config);
        let model = Model::load_as(ctx, &ckpt, config, Load::Inference(global.weights(ctx)?))
            .with_context(|| path.to_string())?;
        let (vocab, all) = (model.config().vocab_size, tokenizer.vocab_size());
        ensure!(
            vocab >= all,
            "{path}: the model has {vocab} tokens, the tokenizer {} has {all}: name the model's tokenizer with --tokenizer",
            tokenizer.name()
        );
        Ok((model, tokenizer))
    }
}

impl Source {
    /// The model's name: that of its file.
    pub fn name(&self) -> String {
        let of_file = self.model.as_deref().and_then(Path::file_stem).map(|s| s.to_string_lossy().into_owned());
        of_file.unwrap_or_else(|| "anser-12m".into())
    }

    /// The bound on what attention keeps, if one was asked for.
    pub fn bound(&self) -> Option<Cache> {
        self.bound.cache()
    }

    /// The beginning of a sequence, or what a state file goes on from, which says its own bound.
    pub fn begin(&self, ctx: &Context, model: &Model, state: Option<&Path>) -> anyhow::Result<SavedState> {
        match (state, self.bound()) {
            (Some(path), None) => Ok(SavedState::open(ctx, model, path)?),
            (Some(_), Some(_)) => bail!("--cache: a state file says what it keeps; leave --cache out"),
            (None, bound) => Ok(SavedState::beginning(ctx, model, bound, None)?),
        }
    }

    /// An engine for one sequence, of states with such a bound. It keeps none of its own accord.
    pub fn engine(&self, ctx: &Context, model: &Arc<Model>, bound: Option<Cache>) -> anyhow::Result<Engine> {
        let guesses = self.guesses();
        // Whoever reads the output may take as long as they like.
        let unread = usize::MAX;
        let options = EngineOptions { slots: 1, cache_bytes: 0, unread, guesses, bound, ..EngineOptions::default() };
        Ok(Engine::start(ctx.clone(), model.clone(), options)?)
    }

    /// Tokens read ahead at most.
    pub fn guesses(&self) -> Option<usize> {
        self.speculate.map(usize::from)
    }
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    // Options that make no sense are found before the model is loaded.
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
    let mut prefill = 0.0;
    let reason = loop {
        match stream.recv() {
            Some(Event::Prompt { .. }) => {
                prefill = start.elapsed().as_secs_f64();
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
    let speeds = [prompt_tokens as f64 / prefill, count as f64 / decode];
    if args.stats {
        eprintln!("prompt: {prompt_tokens} tokens, {:.1}/s; written: {count} tokens, {:.1}/s", speeds[0], speeds[1]);
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
