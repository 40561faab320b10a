use crate::cmd::eval::picture;
use crate::global::{Global, Interrupted, stop};
use crate::source::Source;
use anser_infer::chat::Think;
use anser_infer::{Engine, EngineOptions};
use anser_model::{Config, Model};
use anser_serve::load::{Arrivals, Lengths, Load, Measured, Quantiles, Target};
use anser_serve::{Keys, Options, Shared, Template};
use anser_tensor::Context;
use anser_tokenizer::Tokenizer;
use anser_train::{Line, chart};
use anyhow::{anyhow, ensure};
use serde_json::json;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The environment variable with the key of a server that asks for one.
const KEY: &str = "ANSER_API_KEY";

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// A model of noise of this size instead of a file
    #[arg(long, conflicts_with_all = ["model", "url"])]
    preset: Option<String>,
    /// A server that runs already, as in http://127.0.0.1:8000 (any with OpenAI's API; its key is in ANSER_API_KEY) [default: one in this
    /// process, which shares the machine with this client]
    #[arg(long, conflicts_with = "model")]
    url: Option<String>,
    /// Requests that run at the same time at most, in a server in this process
    #[arg(long, default_value_t = 32, conflicts_with = "url", value_parser = clap::value_parser!(u16).range(1..))]
    slots: u16,
    /// Has its answers be the same to the bit whatever else is asked
    #[arg(long, conflicts_with = "url")]
    deterministic: bool,
    /// MiB that states of its running requests may take [default: half of what is free, on the GPU if there is one, once the model is loaded]
    #[arg(long, conflicts_with = "url", value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    memory: Option<u32>,
    /// MiB of states that it keeps in memory; 0: none
    #[arg(long, default_value_t = 1024, conflicts_with = "url", value_name = "MIB")]
    cache_memory: usize,
    /// Requests a second on average, which come by chance whether or not others have ended (a Poisson process)
    #[arg(long, conflicts_with = "concurrency")]
    rate: Option<f64>,
    /// Requests at any time, each followed by the next when it ends [default: 8, without --rate]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    concurrency: Option<u16>,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_tokens: u32,
    /// Tokens of an answer
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    answer_tokens: u32,
    /// How both numbers vary around what is given: fixed, uniform or exponential
    #[arg(long, default_value = "fixed", value_parser = lengths)]
    lengths: Lengths,
    /// Seconds during which requests come
    #[arg(long, default_value_t = 30.0)]
    seconds: f64,
    /// Seconds after which a request counts as an error
    #[arg(long, default_value_t = 120.0, value_name = "SECONDS")]
    timeout: f64,
    /// 0: always the most probable token
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Seed of arrivals, lengths and prompts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Pictures (SVG) of how many times were how long, with -first, -between and -whole before the extension
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

fn lengths(s: &str) -> Result<Lengths, String> {
    match s {
        "fixed" => Ok(Lengths::Fixed),
        "uniform" => Ok(Lengths::Uniform),
        "exponential" => Ok(Lengths::Exponential),
        _ => Err("use fixed, uniform or exponential".into()),
    }
}

/// Runs the subcommand.
pub fn run(args: &Args, ctx: &Context, global: &Global) -> anyhow::Result<()> {
    let load = args.load()?;
    let runtime = crate::cmd::serve::runtime()?;
    let key = std::env::var(KEY).ok();
    let (target, _server) = match &args.url {
        Some(url) => (Target::new(url, key).map_err(|e| anyhow!("--url: {e}"))?, None),
        None => {
            let (address, server) = args.start(&runtime, ctx, global)?;
            (Target::new(&format!("http://{address}"), None).map_err(anyhow::Error::msg)?, Some(server))
        }
    };
    let interrupted = async {
        while !stop().load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let measured = runtime.block_on(load.run(&target, interrupted)).map_err(anyhow::Error::msg)?;
    if let Some(out) = &args.plot {
        for (name, times) in measured.times() {
            picture(out, &format!("-{name}"), &shares(name, times))?;
        }
    }
    let [tokens, answers] = measured.throughput();
    let quantiles = measured.times().map(|(name, times)| (name, Quantiles::of(times)));
    let result = json!({
        "arrivals": match load.arrivals {
            Arrivals::Poisson(rate) => json!({ "rate": rate }),
            Arrivals::Concurrent(count) => json!({ "concurrency": count }),
        },
        "prompt_tokens": load.prompt,
        "answer_tokens": load.answer,
        "lengths": format!("{:?}", load.lengths).to_lowercase(),
        "seconds": measured.seconds,
        "requests": measured.samples.len(),
        "answered": measured.answered().count(),
        "errors": measured.errors(),
        "tokens_per_second": tokens,
        "answers_per_second": answers,
        "first_seconds": quantiles[0].1,
        "between_seconds": quantiles[1].1,
        "whole_seconds": quantiles[2].1,
    });
    global.result(result, || table(&load, &measured, &quantiles))?;
    if stop().load(Ordering::SeqCst) { Err(Interrupted.into()) } else { Ok(()) }
}

impl Args {
    fn load(&self) -> anyhow::Result<Load> {
        let some = |name: &str, x: f64| match x > 0.0 && x < 1e6 {
            true => Ok(x),
            false => Err(anyhow!("{name} {x}: it must be above 0 and below a million")),
        };
        let arrivals = match self.rate {
            Some(rate) => Arrivals::Poisson(some("--rate", rate)?),
            None => Arrivals::Concurrent(self.concurrency.unwrap_or(8).into()),
        };
        ensure!((0.0..=2.0).contains(&self.temperature), "--temperature must be from 0 to 2");
        Ok(Load {
            arrivals,
            duration: Duration::from_secs_f64(some("--seconds", self.seconds)?),
            prompt: self.prompt_tokens as usize,
            answer: self.answer_tokens as usize,
            lengths: self.lengths,
            temperature: self.temperature,
            seed: self.seed,
            timeout: Duration::from_secs_f64(some("--timeout", self.timeout)?),
        })
    }

    /// A server on a free port, for as long as the sender lives.
    fn start(
        &self, runtime: &tokio::runtime::Runtime, ctx: &Context, global: &Global,
    ) -> anyhow::Result<(SocketAddr, tokio::sync::oneshot::Sender<()>)> {
        let (name, model, tokenizer) = match &self.preset {
            Some(preset) => {
                let model = Model::noise(ctx, &Config::preset(preset)?, global.weights(ctx)?, 1)?;
                (preset.clone(), model, Tokenizer::world())
            }
            None => {
                let (model, tokenizer) = self.source.load(ctx, global)?;
                (self.source.name(), model, tokenizer)
            }
        };
        let engine = EngineOptions {
            slots: self.slots.into(),
            memory: crate::cmd::serve::memory(self.memory, ctx),
            cache_bytes: self.cache_memory << 20,
            deterministic: self.deterministic,
            bound: self.source.bound(),
            guesses: self.source.guesses(),
            ..EngineOptions::default()
        };
        let engine = Engine::start(ctx.clone(), Arc::new(model), engine)?;
        // Limits that no load reaches: the engine's queue is what refuses.
        let options = Options {
            model: name,
            keys: Keys::default(),
            template: Template::Rwkv,
            think: Think::Off,
            max_tokens: usize::MAX,
            max_prompt: usize::MAX,
            max_body: 1 << 30,
            timeout: Duration::from_secs(1 << 20),
            read_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            connections: 4096,
            per_key: 4096,
            cors: Vec::new(),
        };
        let app = Shared::new(engine, tokenizer, options);
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let ended = async {
            let _ = ended.await;
        };
        runtime.spawn(anser_serve::serve(app, listener, None, ended, Duration::ZERO));
        Ok((address, end))
    }
}

fn table(load: &Load, measured: &Measured, quantiles: &[(&str, Quantiles); 3]) -> String {
    let arrivals = match load.arrivals {
        Arrivals::Poisson(rate) => format!("{rate} requests/s"),
        Arrivals::Concurrent(count) => format!("{count} requests at any time"),
    };
    let lengths = format!("{:?}", load.lengths).to_lowercase();
    let (requests, answered) = (measured.samples.len(), measured.answered().count());
    let mut text = format!(
        "{arrivals}, prompts of {} tokens, answers of {} ({lengths}): {answered} of {requests} answered in {:.1} s\n",
        load.prompt, load.answer, measured.seconds
    );
    text += "ms                p50       p90       p99       max\n";
    for (label, (_, q)) in ["first token", "between tokens", "whole answer"].iter().zip(quantiles) {
        let [a, b, c, d] = [q.p50, q.p90, q.p99, q.max].map(|s| 1e3 * s);
        text += &format!("{label:14} {a:9.1} {b:9.1} {c:9.1} {d:9.1}\n");
    }
    let [tokens, answers] = measured.throughput();
    text += &format!("{tokens:.1} tokens/s, {answers:.2} answers/s\n");
    for (why, count) in measured.errors() {
        text += &format!("{count} failed: {why}\n");
    }
    text
}

/// A picture of which share of times was at most so long.
fn shares(name: &str, mut times: Vec<f64>) -> String {
    times.sort_by(f64::total_cmp);
    // As many points as a picture shows.
    let (n, step) = (times.len(), times.len().div_ceil(1000).max(1));
    let point = |i: usize| (1e3 * times[i], 100.0 * (i + 1) as f64 / n as f64);
    let points = (0..n).step_by(step).chain(n.checked_sub(1)).map(point).collect();
    let title = match name {
        "first" => "Time to the first token",
        "between" => "Time between tokens",
        _ => "Time of a whole answer",
    };
    chart(title, "ms at most", &[Line { name: "% of times".into(), points }])
}
