//! Speed of the engine with a random model of 0.1B's dimensions on the CPU: tokens a second that are written by so many requests at
//! the same time, and how long those that write wait while a long prompt is read.
//!
//! `cargo run --release -p anser-infer --example engine_speed [bf16|int8|q4|..] [requests ..]`
//!
//! With `prefix` instead of numbers: how much sooner a prompt is answered that begins as another one did, and what a branch costs, with the model
//! that comes with the program.

use anser_formats::Checkpoint;
use anser_infer::engine::{Engine, EngineOptions, Event, Request, Start, Stream};
use anser_infer::{Sampler, Sampling, Session};
use anser_model::{Config, Init, Load, Model};
use anser_tensor::{Context, DType, WeightType, bench};
use std::sync::Arc;
use std::time::{Duration, Instant};

const TOKENS: usize = 48;
const RUNS: usize = 5;

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

/// Seconds that this process has had of all cores (Linux): what other work on the machine takes doesn't count.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = stat.rsplit(") ").next().into_iter().flat_map(|s| s.split(' ')).skip(11).take(2);
    ticks.filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn request(i: usize, prompt: usize, max_tokens: usize, greedy: bool) -> Request {
    let prompt = (0..prompt).map(|t| ((t * 7919 + i * 104_729) % 65_000) as u32 + 1).collect();
    let sampling = Sampling { temperature: if greedy { 0.0 } else { 1.0 }, ..Sampling::default() };
    Request { prompt, max_tokens, sampling, seed: i as u64, ..Request::default() }
}

/// Waits for the next token: none at the end.
fn token(stream: &mut Stream) -> Option<Instant> {
    loop {
        match stream.recv()? {
            Event::Token(_) => return Some(Instant::now()),
            Event::End(_) => return None,
            Event::Prompt { .. } | Event::State(_) => {}
        }
    }
}

/// Milliseconds that something takes.
fn milliseconds<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let done = work();
    (start.elapsed().as_secs_f64() * 1e3, done)
}

fn prefixes() -> Result<(), Box<dyn std::error::Error>> {
    const PROMPT: usize = 4000;
    let ctx = Context::cpu(0);
    let file = Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/anser-12m.safetensors").as_ref())?;
    let config = Config::from_checkpoint(&file)?;
    let vocab = config.vocab_size as u32;
    let model = Arc::new(Model::load_as(&ctx, &file, config, Load::Inference(DType::BF16.into()))?);
    let engine = Engine::start(ctx, model, EngineOptions::default())?;
    let request = |run: usize, more: usize| {
        let mut r = request(run, PROMPT, 1, true);
        r.prompt.extend(request(RUNS + run, more, 1, true).prompt);
        r.prompt.iter_mut().for_each(|t| *t = *t % (vocab - 1) + 1);
        r
    };
    // Until the first token.
    let answer = |r: Request| -> Result<f64, Box<dyn std::error::Error>> {
        let (time, token) = milliseconds(|| engine.submit(r).map(|mut s| (token(&mut s), token(&mut s))));
        token?.0.ok_or("no token")?;
        Ok(time)
    };
    let mut times: [Vec<f64>; 4] = Default::default();
    for run in 0..RUNS {
        times[0].push(answer(request(run, 0))?);
        times[1].push(answer(request(run, 0))?);
        times[2].push(answer(request(run, 16))?);
        // A turn of a conversation.
        let talk = Request { save_as: Some("talk".into()), ..request(run, 0) };
        answer(talk)?;
        let prompt = request(run, 16).prompt[PROMPT..].to_vec();
        times[3].push(answer(Request { start: Start::Named("talk".into()), prompt, ..request(run, 0) })?);
    }
    let [first, again, longer, turn] = times.map(median);
    println!(
        "a prompt of {PROMPT} tokens: first {first:.1} ms; again {again:.2} ms, {:.0} times sooner",
        first / again
    );
    println!(
        "with 16 other tokens behind it {longer:.2} ms, {:.0} times sooner; these from a named state {turn:.2} ms",
        first / longer
    );
    let size = engine.states().get("", "talk")?.bytes;
    let before = engine.stats();
    let branches = (0..20).map(|i| milliseconds(|| engine.states().branch("", "talk", &format!("branch-{i}"))));
    let branches = branches.map(|(time, done)| done.map(|_| time)).collect::<Result<_, _>>()?;
    let bytes = engine.stats().cached_bytes - before.cached_bytes;
    let state = vec![1u8; size];
    let copy = median((0..20).map(|_| milliseconds(|| std::hint::black_box(state.clone())).0).collect());
    println!(
        "a branch {:.4} ms and {} bytes; a copy of the {size} bytes of its state {copy:.4} ms",
        median(branches),
        bytes / 20
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args().nth(1).as_deref() == Some("prefix") {
        return prefixes();
    }
    let mut args = std::env::args().skip(1).peekable();
    let kept = match args.next_if(|a| a.parse::<usize>().is_err()).as_deref() {
        Some("int8") => WeightType::Int8,
        Some("q4") => WeightType::Q4,
        Some(dtype) => dtype.parse::<DType>()?.into(),
        None => DType::BF16.into(),
    };
    let mut counts: Vec<usize> = args.map(|a| a.parse()).collect::<Result<_, _>>()?;
    if counts.is_empty() {
        counts = vec![1, 8, 32];
    }
    let (ctx, config) = (Context::cpu(0), Config::new(12, 768, 65_536));
    let model = Arc::new(Model::init(&ctx, &config, Init::Current, 1)?.packed(&ctx, kept));
    println!("{kept}, {} threads, memory {:.1} GB/s", ctx.threads().len(), bench::read_bandwidth(&ctx) / 1e9);
    for greedy in [true, false] {
        let mut session = Session::new(&ctx, &model);
        session.feed(&request(0, 8, 1, greedy).prompt)?;
        let mut sampler = Sampler::new(request(0, 8, 1, greedy).sampling)?;
        let rate = |_| {
            let start = Instant::now();
            for _ in 0..TOKENS {
                let token = sampler.sample(session.logits()?)?;
                session.feed(&[token])?;
            }
            Ok::<f64, anser_infer::Error>(TOKENS as f64 / start.elapsed().as_secs_f64())
        };
        println!("greedy {greedy}: a session {:.1} tokens/s", median((0..RUNS).map(rate).collect::<Result<_, _>>()?));
        for &n in &counts {
            let engine =
                Engine::start(ctx.clone(), model.clone(), EngineOptions { slots: n, ..EngineOptions::default() })?;
            let rate = |run: usize| {
                let submit = |i| engine.submit(request(run * n + i, 8, TOKENS, greedy));
                let mut streams = (0..n).map(submit).collect::<Result<Vec<Stream>, _>>()?;
                // All write from here on.
                let start = streams.iter_mut().filter_map(token).max().ok_or("no token")?;
                let mut last = start;
                for s in &mut streams {
                    while let Some(at) = token(s) {
                        last = last.max(at);
                    }
                }
                Ok::<f64, Box<dyn std::error::Error>>((n * (TOKENS - 1)) as f64 / (last - start).as_secs_f64())
            };
            let used = processor_seconds();
            let rates = (0..RUNS).map(rate).collect::<Result<_, _>>()?;
            let each = (RUNS * n * TOKENS) as f64 / (processor_seconds() - used);
            println!("greedy {greedy}: {n} requests {:.1} tokens/s, {each:.1} a core-second", median(rates));
        }
    }
    let engine = Engine::start(ctx, model, EngineOptions::default())?;
    let mut writer = engine.submit(request(0, 8, usize::MAX, true))?;
    let mut longest = |count: usize| {
        let mut last = token(&mut writer);
        let mut longest = Duration::ZERO;
        for _ in 0..count {
            let now = token(&mut writer);
            longest = longest.max(now.zip(last).map_or(Duration::ZERO, |(now, last)| now - last));
            last = now;
        }
        longest
    };
    let alone = longest(30);
    let start = Instant::now();
    let mut reader = engine.submit(request(1, 4096, 1, true))?;
    let read = std::thread::spawn(move || token(&mut reader).map(|at| at - start));
    let mut beside = Duration::ZERO;
    while !read.is_finished() {
        beside = beside.max(longest(1));
    }
    println!(
        "a prompt of 4096 tokens is read in {:?}; another request's tokens are {alone:.0?} apart at most before, {beside:.0?} meanwhile",
        read.join()
    );
    Ok(())
}
