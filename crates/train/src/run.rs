use crate::events::Events;
use crate::trainer::free_memory;
use crate::{Bptt, Error, ModelConfig, Recompute, RecomputeMode, RunConfig, Settings, StepInfo, Trainer, loss_curve};
use anser_data::needle::{Mix, Needles};
use anser_data::{Batch, Binidx, Built, Dataset, Options, Tokens, bundled, documents};
use anser_formats::{Checkpoint, write_atomic};
use anser_infer::Sampling;
use anser_infer::engine::{self, Engine, EngineOptions, Request};
use anser_model::{Config, Hybrid, Load, Model};
use anser_tensor::{Context, DType, bench};
use anser_tokenizer::{StreamDecoder, Tokenizer};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

/// What happens in a run, for whoever watches it.
#[derive(Clone, Debug)]
pub enum Event {
    /// Before the first step.
    Started {
        /// The model.
        config: Config,
        /// Steps of the run; `None` while the first ones are timed.
        steps: Option<u64>,
        /// Step it goes on from.
        resumed: Option<u64>,
        /// Tokens to train on.
        tokens: usize,
        /// Bytes of memory the run will take.
        memory: usize,
        /// Seconds it will take, roughly.
        seconds: f64,
    },
    /// The number of steps that fit the time is known.
    Planned(u64),
    /// After a step.
    Step {
        /// What it did.
        info: StepInfo,
        /// Tokens a second, held-out evaluation and saving apart.
        tokens_per_second: f64,
        /// Share of the machine's matrix-product peak: 6 x (parameters - embedding) x tokens per second over the peak.
        mfu: f64,
    },
    /// An evaluation.
    HeldOut {
        /// Steps done.
        step: u64,
        /// Mean cross entropy on held-out data, nats a token.
        loss: f64,
    },
    /// Text that the model wrote.
    Sample {
        /// Steps done.
        step: u64,
        /// The text after the prompt.
        text: String,
    },
    /// A checkpoint was written.
    Saved(PathBuf),
    /// Something the user should know.
    Warning(String),
}

/// The end of a run.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Summary {
    /// Steps done.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds of this session.
    pub seconds: f64,
    /// First held-out loss, if there is held-out data.
    pub held_out_loss_before: Option<f64>,
    /// Last held-out loss.
    pub held_out_loss: Option<f64>,
    /// The model.
    pub model: PathBuf,
    /// The picture.
    pub loss_curve: PathBuf,
    /// Whether it was asked to stop.
    pub interrupted: bool,
}

/// Steps that are timed to find how many fit `minutes`; they are in the warm-up, which doesn't depend on the total. The first ones take memory and
/// choose algorithms, so the median counts.
const TIMED: usize = 9;
/// Metadata of the files of a run.
const RECIPE: &str = "anser.recipe";
const TOTAL: &str = "anser.total_steps";
const TOKENIZER: &str = "anser.tokenizer";
const PRODUCTS: &str = "anser.products";

/// Trains as `config` says, in its folder; goes on from the newest checkpoint there, to the bit. When `stop` becomes true
/// it saves and returns after the running step.
///
/// # Errors
/// For a configuration, data or checkpoint that doesn't fit; when memory will not do; when a loss is not finite; when
/// writing fails. Checkpoints written before stay.
pub fn run(ctx: &Context, config: &RunConfig, stop: &AtomicBool, on: &mut dyn FnMut(Event)) -> Result<Summary, Error> {
    let folder = &config.output.folder;
    let _lock = Trainer::lock(folder)?;
    let (tokens, tokenizer) = tokens(config)?;
    let options = Options {
        ctx: config.train.ctx,
        held_out: config.data.held_out,
        order: config.data.order,
        resets: config.data.resets,
        seed: config.data.seed,
    };
    let data = Dataset::new(tokens, options)?;
    let held_out = data.held_out(config.output.eval_rows);
    let needles = needles(config, tokenizer.as_ref())?;

    let mut settings = config.settings(config.train.steps);
    let resumed = Trainer::resume(ctx, folder, settings, |w| on(Event::Warning(w)))?;
    let went_on = resumed.as_ref().map(Trainer::steps);
    let mut trainer = match resumed {
        Some(t) => t,
        None => Trainer::new(ctx, model(ctx, config, tokenizer.as_ref())?, settings),
    };
    if let Some(names) = dimensions_differ(config, trainer.model().config()) {
        let folder = folder.display();
        let reason = format!("{folder}: its checkpoints are of a model with other {names}; name another folder");
        return Err(Error::Config(reason));
    }
    if let Some(t) = &tokenizer
        && trainer.model().config().vocab_size < t.vocab_size()
    {
        let (model, name, all) = (trainer.model().config().vocab_size, t.name(), t.vocab_size());
        let reason =
            format!("the model has {model} tokens, the tokenizer {name} has {all}: name the model's tokenizer");
        return Err(Error::Config(reason));
    }
    train_only(&mut trainer, &config.model.train_only)?;
    let recipe = toml::to_string(config).map_err(|e| Error::Config(e.to_string()))?;
    if let Some(before) = trainer.description(RECIPE).filter(|before| *before != recipe && went_on.is_some()) {
        on(Event::Warning(format!("going on with other settings than before: {}", changed(before, &recipe))));
    }
    trainer.describe(RECIPE, recipe);
    if let Some(t) = &tokenizer {
        trainer.describe(TOKENIZER, t.name());
    }

    trainer.record_steps(config.train.record);
    let micro = match config.train.micro_rows {
        0 => config.train.rows,
        n => n.min(config.train.rows),
    };
    let tuned = ctx.cuda().filter(|_| config.train.tune);
    if let Some(gpu) = tuned
        && !gpu.tune_products(trainer.description(PRODUCTS).unwrap_or_default())
    {
        let what =
            "matrix products are timed anew, as the GPU or its library is another than before: last bits may differ";
        on(Event::Warning(what.into()));
    }
    // What is there already counts as room.
    let room = trainer.room();
    let needed = match config.train.recompute {
        RecomputeMode::Auto => trainer.recompute_to_fit(micro, room)?,
        _ => trainer.forecast(micro)?,
    };
    if let Some(room) = room.filter(|&room| needed as u64 > room) {
        let advice = what_fits(&trainer, config, micro, room)?;
        return Err(Error::Memory { needed: needed as u64 >> 20, available: room >> 20, advice });
    }
    if config.train.recompute == RecomputeMode::Auto && trainer.settings().recompute != Recompute::Nothing {
        let what = format!("{:?}", trainer.settings().recompute).to_lowercase();
        on(Event::Warning(format!("to fit into memory, a step runs with train.recompute = \"{what}\"")));
    }

    let peak = bench::gemm_peak(ctx);
    let per_step = (config.train.rows * config.train.ctx) as f64;
    let flops = trainer.model().config().train_flops_per_token();
    // In timed runs the total is known after the first steps, or from the checkpoint.
    let known = trainer.description(TOTAL).and_then(|s| s.parse().ok()).filter(|_| went_on.is_some());
    let mut total = match config.train.steps {
        0 => known,
        n => Some(n),
    };
    // A step of cross entropy is three forward passes.
    let more = 1.0 + settings.long_ce.map_or(0.0, |l| l.passes(settings.ctx)) / 3.0;
    on(Event::Started {
        config: trainer.model().config().clone(),
        steps: total,
        resumed: went_on,
        tokens: data.train_tokens(),
        memory: needed,
        // Matrix products take most of the time; the share is what our benchmark reaches.
        seconds: match total {
            Some(n) => (n - trainer.steps().min(n)) as f64 * per_step * flops * more / (0.42 * peak),
            None => config.train.minutes * 60.0,
        },
    });

    let mut log = Log::open(folder, trainer.steps())?;
    let start = Instant::now();
    let (mut computing, first) = (0.0, trainer.steps());
    let mut times = Vec::new();
    let best = folder.join("best.safetensors");
    let before = if best.exists() { log.curves()?.1 } else { Curve::new() };
    let mut lowest = before.iter().map(|h| h.1).fold(f64::INFINITY, f64::min);
    let mut held = |trainer: &Trainer, log: &mut Log, on: &mut dyn FnMut(Event)| -> Result<(), Error> {
        if held_out.tokens.is_empty() {
            return Ok(());
        }
        let (step, loss) = (trainer.steps(), trainer.evaluate(&held_out)?);
        on(Event::HeldOut { step, loss });
        if config.output.keep_best && loss < lowest {
            trainer.save_model(&best)?;
            lowest = loss;
        }
        log.add(step, json!({ "step": step, "held_out_loss": loss }), &[("loss/held_out", loss)])
    };
    if went_on.is_none() {
        held(&trainer, &mut log, on)?;
    }
    let (out, mut interrupted) = (&config.output, false);
    let every = |n: u64, step: u64| n > 0 && step.is_multiple_of(n);
    // The next batch is read while one is computed.
    let rows = config.train.rows;
    let whole = |step: u64| needles.as_ref().map_or_else(|| data.train(step, rows), |n| n.train(&data, step, rows));
    let read = |step: u64| micro_batches(whole(step), config.train.ctx, micro);
    let mut batch = read(trainer.steps());
    while total.is_none_or(|n| trainer.steps() < n) {
        let timer = Instant::now();
        let step = trainer.steps();
        settings.schedule.total = total.unwrap_or(u64::MAX);
        trainer.settings_mut().schedule = settings.schedule;
        let info = thread::scope(|s| {
            let following = s.spawn(|| read(step + 1));
            let info = trainer.step(&batch);
            batch = following.join().unwrap_or_else(|panic| resume_unwind(panic));
            info
        })?;
        let time = timer.elapsed().as_secs_f64();
        computing += time;
        let done = info.step + 1;
        let speed = (done - first) as f64 * per_step / computing;
        let mfu = flops * speed / peak;
        on(Event::Step { info, tokens_per_second: speed, mfu });
        let mut line = json!({
            "step": info.step, "loss": info.loss, "lr": info.lr, "grad_norm": info.grad_norm,
            "tokens_per_second": speed, "mfu": mfu,
        });
        let mut scalars = vec![
            ("loss/train", info.loss),
            ("lr", info.lr),
            ("grad_norm", info.grad_norm),
            ("speed/tokens_per_second", speed),
            ("speed/mfu", mfu),
        ];
        if settings.long_ce.is_some() {
            line["mean_weight"] = json!(info.mean_weight);
            scalars.push(("loss/mean_weight", info.mean_weight));
        }
        log.add(info.step, line, &scalars)?;
        if total.is_none() {
            times.push(time);
            if times.len() >= TIMED.min(config.train.warmup.max(1) as usize) {
                times.sort_by(f64::total_cmp);
                let rest = (config.train.minutes * 60.0 - computing) / times[times.len() / 2];
                let steps = done + (rest as u64).max(1);
                total = Some(steps);
                trainer.describe(TOTAL, steps.to_string());
                on(Event::Planned(steps));
            }
        }
        interrupted = stop.load(Ordering::SeqCst);
        let last = interrupted || total == Some(done);
        if every(out.eval_every, done) || last {
            held(&trainer, &mut log, on)?;
        }
        if every(out.sample_every, done)
            && !last
            && let Some(t) = &tokenizer
        {
            let text = write_text(ctx, trainer.model(), t, &out.sample_prompt, config.model.seed, out.sample_tokens)?;
            on(Event::Sample { step: done, text });
        }
        if let Some(gpu) = tuned {
            trainer.describe(PRODUCTS, gpu.chosen_products());
        }
        if out.save_every > 0 && (every(out.save_every, done) || last) {
            on(Event::Saved(trainer.save(folder, out.keep)?));
        }
        if interrupted {
            break;
        }
    }
    let model = folder.join("model.safetensors");
    trainer.save_model(&model)?;
    let (train, held) = log.curves()?;
    let picture = folder.join("loss.svg");
    let title = format!("{}: cross entropy, nats per token", folder.display());
    write_atomic(&picture, |f| f.write_all(loss_curve(&title, &train, &held).as_bytes()))?;
    Ok(Summary {
        steps: trainer.steps(),
        tokens: trainer.steps() * per_step as u64,
        seconds: start.elapsed().as_secs_f64(),
        held_out_loss_before: held.first().map(|h| h.1),
        held_out_loss: held.last().map(|h| h.1),
        model,
        loss_curve: picture,
        interrupted,
    })
}

/// Names the settings with which micro-batches fit into `room` bytes, when those of `micro` rows don't.
fn what_fits(trainer: &Trainer, config: &RunConfig, micro: usize, room: u64) -> Result<String, Error> {
    let given = *trainer.settings();
    let fits = |rows: usize, settings: Settings| -> Result<bool, Error> {
        Ok(trainer.forecast_with(rows, settings)? as u64 <= room)
    };
    let less = || std::iter::successors(Some(micro / 2), |n| Some(n / 2)).take_while(|&n| n > 0);
    let most = |settings: Settings| -> Result<Option<usize>, Error> {
        for rows in less() {
            if fits(rows, settings)? {
                return Ok(Some(rows));
            }
        }
        Ok(None)
    };
    let mut ways = Vec::new();
    if !given.checkpointing && fits(micro, Settings { recompute: Recompute::All, ..given })? {
        ways.push("train.recompute = \"all\"".to_string());
    }
    let checkpointing = Settings { checkpointing: true, ..given };
    if !given.checkpointing && fits(micro, checkpointing)? {
        ways.push("train.checkpointing = true".into());
    }
    if let Some(rows) = most(given)? {
        ways.push(format!("train.micro_rows = {rows}"));
    }
    if ways.is_empty()
        && let Some(rows) = most(checkpointing)?
    {
        ways.push(format!("train.checkpointing = true and train.micro_rows = {rows}"));
    }
    // At last, a piece of a row at a time.
    let mut piece = config.train.ctx / 2;
    while ways.is_empty() && piece >= 16 {
        if fits(1, Settings { bptt: Bptt::Exact(piece), ..checkpointing })? {
            ways.push(format!("train.checkpointing = true, train.micro_rows = 1 and train.bptt = {piece}"));
        }
        piece /= 2;
    }
    Ok(if ways.is_empty() { "train a smaller model".into() } else { format!("set {}", ways.join(", or ")) })
}

/// What the model writes after `prompt`, at most `count` tokens.
///
/// # Errors
/// When the model gives no finite logits.
pub fn write_text(
    ctx: &Context, model: &Model, tokenizer: &Tokenizer, prompt: &str, seed: u64, count: usize,
) -> Result<String, Error> {
    let model = Arc::new(model.packed(ctx, DType::F32));
    let mut prompt = tokenizer.encode(prompt.as_bytes());
    if prompt.is_empty() {
        prompt.push(tokenizer.end_of_document());
    }
    let options = EngineOptions { slots: 1, cache_bytes: 0, ..EngineOptions::default() };
    let engine = Engine::start(ctx.clone(), model, options)?;
    let sampling = Sampling { top_p: 0.7, ..Sampling::default() };
    let stop_tokens = vec![tokenizer.end_of_document()];
    // Without an answer the prompt's state is all that comes of it.
    let keep_state = count == 0;
    let request = Request { prompt, sampling, seed, max_tokens: count, stop_tokens, keep_state, ..Request::default() };
    let mut stream = engine.submit(request).map_err(anser_infer::Error::from)?;
    let (mut decoder, mut text) = (StreamDecoder::default(), String::new());
    while let Some(event) = stream.recv() {
        match event {
            engine::Event::Token(token) => match tokenizer.token(token.token) {
                Ok(bytes) => text += &decoder.push(bytes),
                // A vocabulary may have ids that stand for nothing.
                Err(_) => break,
            },
            engine::Event::End(end) => drop(end.checked()?),
            engine::Event::Prompt { .. } | engine::Event::State(_) => {}
        }
    }
    Ok(text + &decoder.finish())
}

/// The tokens and what made them (`None`: nothing is said of it, and no text can be written).
fn tokens(config: &RunConfig) -> Result<(Tokens, Option<Tokenizer>), Error> {
    let (path, said) = (&config.data.path, config.data.tokenizer.as_str());
    let named = |name: &str| match name {
        "none" => Ok(None),
        name => Tokenizer::from_name(name).map(Some),
    };
    if path.as_os_str().is_empty() {
        let tokenizer = Tokenizer::from_name(if said.is_empty() { "bytes" } else { said })?;
        return Ok((Tokens::Memory(tokenizer.encode(bundled::corpus().as_bytes())), Some(tokenizer)));
    }
    if path.is_file() && path.extension().is_none_or(|e| e != "bin" && e != "idx") {
        let (path, hint) = (path.display(), "anser data build");
        return Err(Error::Config(format!(
            "data.path: {path} is not a data set; make one with `{hint} {path} --out PREFIX`"
        )));
    }
    let tokens = Tokens::Binidx(Binidx::open(path)?);
    let built = Built::read(path).map(|b| b.tokenizer);
    let name = match (said, built) {
        ("", Some(built)) => built,
        ("", None) => {
            let reason = "data.tokenizer: the data set doesn't say what made it; name \"world\", \"bytes\" or \"none\"";
            return Err(Error::Config(reason.into()));
        }
        (said, Some(built)) if said != built => {
            return Err(Error::Config(format!("data.tokenizer = {said:?}, but the data set was built with {built:?}")));
        }
        (said, _) => said.to_string(),
    };
    Ok((tokens, named(&name)?))
}

/// The rows of needles among those of the data set, if any are wanted.
fn needles(config: &RunConfig, tokenizer: Option<&Tokenizer>) -> Result<Option<Mix>, Error> {
    let (d, ctx) = (&config.data, config.train.ctx);
    if d.needles == 0.0 {
        return Ok(None);
    }
    let unknown = || Error::Config("data.needles: samples are text, and data.tokenizer is \"none\": name one".into());
    let tokenizer = *tokenizer.ok_or_else(unknown)?;
    let text = match (d.needle_task.takes_text(), d.needle_text.as_os_str().is_empty()) {
        (false, _) => None,
        (true, false) => Some(documents(&d.needle_text)?.join("\n")),
        (true, true) => {
            let mut text = bundled::corpus();
            let mut end = (text.len() as f64 * (1.0 - d.held_out)) as usize;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
            Some(text)
        }
    };
    let (share, shortest, answer_only, seed) = (d.needles, d.needle_min, d.needle_answer_only, d.seed);
    let needles = Needles::new(d.needle_task, tokenizer, text.as_deref()).with_keys(d.needle_keys);
    let mix = Mix { needles, share, shortest, asked: d.needle_asked, answer_only, seed };
    let (task, name, least) = (d.needle_task.with_keys(d.needle_keys), tokenizer.name(), mix.least());
    if shortest > 0 && shortest < least {
        return Err(Error::Config(format!(
            "data.needle_min: a sample of {task} has at least {least} tokens of {name}"
        )));
    }
    if ctx < least.max(shortest) {
        let least = least.max(shortest);
        return Err(Error::Config(format!("train.ctx: a sample of {task} has at least {least} tokens of {name}")));
    }
    Ok(Some(mix))
}

/// The model to begin with.
fn model(ctx: &Context, config: &RunConfig, tokenizer: Option<&Tokenizer>) -> Result<Model, Error> {
    let m = &config.model;
    // Weights, gradients and two moments in f32, before any of them is made.
    let fits = |dims: &Config| {
        let (needed, room) = (4 * 4 * dims.parameters() as u64, free_memory(ctx).unwrap_or(u64::MAX));
        let advice = "train a smaller model".into();
        if needed > room { Err(Error::Memory { needed: needed >> 20, available: room >> 20, advice }) } else { Ok(()) }
    };
    if !m.load.as_os_str().is_empty() {
        let file = Checkpoint::open(&m.load)?;
        let mut dims = Config::from_checkpoint(&file)?;
        dims.hybrid = chunks(m, dims.hybrid)?;
        fits(&dims)?;
        return Ok(Model::load_as(ctx, &file, dims, Load::Train)?);
    }
    let vocab = match (m.vocab_size, tokenizer) {
        (0, Some(t)) => t.vocab_size(),
        (0, None) => return Err(Error::Config("model.vocab_size: give it, as data.tokenizer is \"none\"".into())),
        (n, _) => n,
    };
    let mut dims = match m.preset.as_str() {
        "" => Config::new(m.n_layer, m.n_embd, vocab),
        name => Config { vocab_size: vocab, ..Config::preset(name)? },
    };
    if m.head_size > 0 {
        dims.head_size = m.head_size;
    }
    dims.double_rate = m.double_rate;
    let key_heads = Some(m.key_heads).filter(|k| *k > 0 && *k != dims.heads());
    let new = Hybrid { gate: m.gate, key_heads, ..Hybrid::new(m.attention) };
    dims.hybrid = chunks(m, (m.attention > 0).then_some(new))?;
    dims.validate()?;
    fits(&dims)?;
    Ok(Model::init(ctx, &dims, m.init, m.seed)?)
}

/// A hybrid with the chunks that the configuration names.
fn chunks(m: &ModelConfig, hybrid: Option<Hybrid>) -> Result<Option<Hybrid>, Error> {
    let all = [
        ("chunk", m.chunk),
        ("topk", m.topk),
        ("sink", m.sink),
        ("window", m.window),
        ("gate", m.gate.into()),
        ("key_heads", m.key_heads),
    ];
    if let Some((name, _)) = all.iter().find(|(_, n)| hybrid.is_none() && *n > 0) {
        return Err(Error::Config(format!("model.{name} is of attention: set model.attention too")));
    }
    let or = |asked: usize, found: usize| if asked == 0 { found } else { asked };
    Ok(hybrid.map(|h| Hybrid {
        chunk: or(m.chunk, h.chunk),
        topk: or(m.topk, h.topk),
        sink: or(m.sink, h.sink),
        window: or(m.window, h.window),
        ..h
    }))
}

/// Names of the dimensions in which a checkpoint's model is not the configured one.
fn dimensions_differ(config: &RunConfig, found: &Config) -> Option<String> {
    let m = &config.model;
    if !m.load.as_os_str().is_empty() {
        return None;
    }
    let (layers, width) = match m.preset.as_str() {
        "" => (m.n_layer, m.n_embd),
        name => Config::preset(name).map_or((0, 0), |c| (c.n_layer, c.n_embd)),
    };
    let of = |f: fn(Hybrid) -> usize| found.hybrid.map_or(0, f);
    let wanted = [
        ("n_layer", layers, found.n_layer),
        ("n_embd", width, found.n_embd),
        ("head_size", if m.head_size == 0 { found.head_size } else { m.head_size }, found.head_size),
        ("vocab_size", if m.vocab_size == 0 { found.vocab_size } else { m.vocab_size }, found.vocab_size),
        ("double_rate", m.double_rate.into(), found.double_rate.into()),
        ("attention", m.attention, of(|h| h.layers)),
        ("chunk", if m.chunk == 0 { of(|h| h.chunk) } else { m.chunk }, of(|h| h.chunk)),
        ("topk", if m.topk == 0 { of(|h| h.topk) } else { m.topk }, of(|h| h.topk)),
        ("sink", if m.sink == 0 { of(|h| h.sink) } else { m.sink }, of(|h| h.sink)),
        ("gate", m.gate.into(), found.hybrid.is_some_and(|h| h.gate).into()),
        ("key_heads", if m.key_heads == 0 { found.heads() } else { m.key_heads }, found.key_heads()),
        ("window", if m.window == 0 { of(|h| h.window) } else { m.window }, of(|h| h.window)),
    ];
    let names: Vec<&str> = wanted.iter().filter(|w| w.1 != w.2).map(|w| w.0).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// Lets only the parameters train that match a pattern.
fn train_only(trainer: &mut Trainer, patterns: &[String]) -> Result<(), Error> {
    if patterns.is_empty() {
        return Ok(());
    }
    let specs = trainer.model().params().specs();
    if let Some(p) = patterns.iter().find(|p| !specs.iter().any(|s| matches(p, &s.name))) {
        return Err(Error::Config(format!("model.train_only: no parameter is named {p:?} (see `anser inspect`)")));
    }
    trainer.set_trainable(|name| patterns.iter().any(|p| matches(p, name)));
    Ok(())
}

/// Whether `name` is `pattern`, in which * stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name
            .strip_prefix(head)
            .is_some_and(|tail| (0..=tail.len()).any(|i| tail.is_char_boundary(i) && matches(rest, &tail[i..]))),
    }
}

/// Which fields two recipes differ in.
fn changed(before: &str, now: &str) -> String {
    let flat = |text: &str| -> Vec<(String, String)> {
        let table: toml::Table = toml::from_str(text).unwrap_or_default();
        let fields = |(s, f): (String, toml::Value)| match f {
            toml::Value::Table(f) => f.into_iter().map(|(k, v)| (format!("{s}.{k}"), v.to_string())).collect(),
            other => vec![(s, other.to_string())],
        };
        table.into_iter().flat_map(fields).collect()
    };
    let before = flat(before);
    let now: Vec<String> =
        flat(now).into_iter().filter(|f| !before.contains(f)).map(|(k, v)| format!("{k} = {v}")).collect();
    now.join(", ")
}

fn micro_batches(batch: Batch, ctx: usize, rows: usize) -> Vec<Batch> {
    let all = batch.len(ctx);
    if rows >= all {
        return vec![batch];
    }
    (0..all).step_by(rows).map(|from| batch.slice(ctx, from, from + rows)).collect()
}

/// `metrics.jsonl` and TensorBoard's file.
struct Log {
    path: PathBuf,
    lines: File,
    events: Events,
}

/// Points (step, loss) of a curve.
type Curve = Vec<(u64, f64)>;

impl Log {
    /// Goes on with the lines of the steps before `step`.
    fn open(folder: &Path, step: u64) -> Result<Log, Error> {
        let path = folder.join("metrics.jsonl");
        let io = |e| Error::Io(path.display().to_string(), e);
        let before = fs::read_to_string(&path).unwrap_or_default();
        let earlier = |line: &&str| {
            serde_json::from_str::<Value>(line).ok().is_some_and(|v| {
                let at = v["step"].as_u64().unwrap_or(u64::MAX);
                // A held-out loss at a step was measured after it.
                at < step || (at == step && step > 0 && v.get("held_out_loss").is_some())
            })
        };
        let kept: String = before.lines().filter(earlier).flat_map(|l| [l, "\n"]).collect();
        write_atomic(&path, |f| f.write_all(kept.as_bytes()))?;
        let lines = OpenOptions::new().append(true).open(&path).map_err(io)?;
        Ok(Log { lines, events: Events::create(folder, step == 0).map_err(io)?, path: path.clone() })
    }

    fn add(&mut self, step: u64, line: Value, scalars: &[(&str, f64)]) -> Result<(), Error> {
        let written = writeln!(self.lines, "{line}").and_then(|()| self.events.scalars(step, scalars));
        written.map_err(|e| Error::Io(self.path.display().to_string(), e))
    }

    /// The training and held-out curves.
    fn curves(&self) -> Result<(Curve, Curve), Error> {
        let text = fs::read_to_string(&self.path).map_err(|e| Error::Io(self.path.display().to_string(), e))?;
        let values: Vec<Value> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
        let curve =
            |key: &str| values.iter().filter_map(|v| Some((v["step"].as_u64()?, v.get(key)?.as_f64()?))).collect();
        Ok((curve("loss"), curve("held_out_loss")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name, is) in [
            ("*", "head.weight", true),
            ("head.weight", "head.weight", true),
            ("blocks.*.att.w*", "blocks.12.att.w0", true),
            ("blocks.*.att.w*", "blocks.12.ffn.key.weight", false),
            ("*.weight", "ln_out.bias", false),
            ("", "x", false),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
    }
}
