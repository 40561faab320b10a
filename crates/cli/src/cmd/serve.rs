use crate::global::{Global, Interrupted};
use crate::source::Source;
use anser_infer::chat::Think;
use anser_infer::{Engine, EngineOptions, InitialState};
use anser_serve::{Keys, Options, Shared, Template, Tls};
use anser_tensor::Context;
use anser_tensor::cuda::Cuda;
use anser_tensor::memory::available;
use anyhow::{Context as _, anyhow, ensure};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Serves a model over HTTP: OpenAI's API, and a page to chat
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Address to listen at; 0.0.0.0 for all, which should have --api-keys
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port; 0: any that is free
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Name under which the model is served [default: that of its file]
    #[arg(long)]
    name: Option<String>,
    /// File of API keys, one a line; the environment variable ANSER_API_KEYS has them too, separated by commas
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// Jinja file that makes prompts of messages [default: RWKV's own template]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// How the model thinks where a request doesn't say: off, fast, on, short or long
    #[arg(long, default_value = "off")]
    think: Think,
    /// Requests that run at the same time at most
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    slots: u16,
    /// Requests that wait at most, before others are refused
    #[arg(long, default_value_t = 256)]
    waiting: usize,
    /// Has answers be the same to the bit whatever else is asked, as they always are on a CPU. On a GPU prompts are read one by one, one
    /// request alone is slower, and no prefixes are kept
    #[arg(long)]
    deterministic: bool,
    /// MiB that states of running requests may take, those of a hybrid with all tokens that each may have; more requests wait [default: half of
    /// what is free, on the GPU if there is one, once the model is loaded]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    memory: Option<u32>,
    /// MiB of states kept in memory, to go on from prompts that begin alike
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    cache_memory: usize,
    /// Folder of named states [default: they are lost at the end]
    #[arg(long, value_name = "FOLDER")]
    states: Option<PathBuf>,
    /// Percent of --cache-memory, or of the folder of states, that named states of one API key may take where there are several keys
    #[arg(long, default_value_t = 25, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    key_share: u8,
    /// Redis in which servers share states and prefixes, such as redis://:PASSWORD@HOST:6379/0, or rediss:// for TLS
    #[arg(long, value_name = "URL", env = "ANSER_REDIS", hide_env_values = true)]
    redis: Option<String>,
    /// Hours after which Redis forgets what nobody used
    #[arg(long, default_value_t = 168, value_name = "HOURS", value_parser = clap::value_parser!(u32).range(1..))]
    redis_expiry: u32,
    /// Object store in which servers share named states: s3://BUCKET/FOLDER, with keys and settings in AWS_* variables, or file:///FOLDER
    #[arg(long, value_name = "URL", env = "ANSER_OBJECT_STORE")]
    object_store: Option<String>,
    /// Tuned initial state that requests may go on from by name: a .pth file of blocks.N.att.time_state (may be given several times)
    #[arg(long, value_name = "NAME=FILE", value_parser = named_file)]
    initial_state: Vec<(String, PathBuf)>,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 4096)]
    max_tokens: usize,
    /// Tokens of a prompt at most
    #[arg(long, default_value_t = 131_072)]
    max_prompt: usize,
    /// MiB of a request at most
    #[arg(long, default_value_t = 4, value_name = "MIB")]
    max_body: usize,
    /// Seconds that an answer may take
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// Seconds that a client may take to send its headers, or the next piece of its request
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    read_timeout: u64,
    /// Seconds that a client may take to read anything of what is sent to it
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    write_timeout: u64,
    /// Certificate in PEM, with those that vouch for it: serves HTTPS; SIGHUP has it and the key read again
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Seconds that running requests have to end after Ctrl-C or SIGTERM
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    grace: u64,
    /// Connections at most
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Requests of one API key (or of all, without keys) that run or wait at the same time at most
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u16).range(1..))]
    per_key: u16,
    /// Origin of web pages that may use the server, as in https://example.org (may be given several times)
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
}

/// Threads for connections, up to eight: thousands of tokens a second of a GPU are as many pieces of answers to send.
pub(super) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()
}

/// Bytes that states of running requests may take: what is asked for, or half of what is free where the model is. The rest is for cached states
/// and for the work itself. No bound (0) where nothing says what is free.
pub(super) fn memory(mib: Option<u32>, ctx: &Context) -> usize {
    let free = || ctx.cuda().map_or_else(|| available().map_or(0, |b| b as usize), Cuda::free_memory);
    mib.map_or_else(|| free() / 2, |mib| (mib as usize) << 20)
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let options = args.options()?;
    let model_name = options.model.clone();
    let tls = args.tls_cert.as_deref().zip(args.tls_key.as_deref()).map(|(cert, key)| Tls::open(cert, key));
    let tls = tls.transpose().map_err(anyhow::Error::msg)?;
    // A port that is taken is found before the model is loaded.
    let runtime = runtime()?;
    let at = (args.host.as_str(), args.port);
    let listener = runtime.block_on(tokio::net::TcpListener::bind(at));
    let listener = listener.with_context(|| format!("listening at {}:{}", args.host, args.port))?;
    let address = listener.local_addr()?;
    if options.keys.is_empty() && !address.ip().is_loopback() {
        global.note("anybody who reaches this address may use the server: --api-keys FILE asks for keys");
    }

    let ctx = global.context()?;
    let (model, tokenizer) = args.source.load(&ctx, global)?;
    let initial = |(name, path): &(String, PathBuf)| {
        Ok::<_, anser_infer::Error>((name.clone(), InitialState::open(model.config(), path)?))
    };
    let engine = EngineOptions {
        initial: args.initial_state.iter().map(initial).collect::<Result<_, _>>()?,
        slots: args.slots.into(),
        waiting: args.waiting,
        memory: memory(args.memory, &ctx),
        cache_bytes: args.cache_memory << 20,
        folder: args.states.clone(),
        owner_share: if options.keys.len() > 1 { args.key_share.into() } else { 100 },
        redis: args.redis.clone(),
        redis_expiry: Duration::from_secs(u64::from(args.redis_expiry) * 3600),
        object_store: args.object_store.clone(),
        bound: args.source.bound(),
        guesses: args.source.guesses(),
        deterministic: args.deterministic,
        ..EngineOptions::default()
    };
    let engine = Engine::start(ctx, Arc::new(model), engine)?;
    let app = Shared::new(engine, tokenizer, options);
    let scheme = if tls.is_some() { "https" } else { "http" };
    global.note(format!("serving {model_name} at {scheme}://{address}"));
    global.result(json!({ "model": model_name, "address": address.to_string() }), String::new)?;
    let grace = Duration::from_secs(args.grace);
    runtime.block_on(async {
        let mut interrupted = false;
        let stop = async { interrupted = stop().await };
        tokio::spawn(reload(tls.clone()));
        let served = anser_serve::serve(app, listener, tls, stop, grace).await;
        served.map_err(|why| anyhow!("the engine has failed and must be started again: {why}"))?;
        global.note("stopped");
        if interrupted { Err(Interrupted.into()) } else { Ok(()) }
    })
}

impl Args {
    fn options(&self) -> anyhow::Result<Options> {
        let mut keys = match &self.api_keys {
            Some(path) => Keys::parse(&read(path)?).map_err(|e| anyhow!("{}: {e}", path.display()))?,
            None => Keys::default(),
        };
        ensure!(self.api_keys.is_none() || !keys.is_empty(), "--api-keys: the file has no key");
        if let Ok(text) = std::env::var("ANSER_API_KEYS") {
            keys.extend(Keys::parse(&text).map_err(|e| anyhow!("ANSER_API_KEYS: {e}"))?);
        }
        let template = match &self.chat_template {
            Some(path) => Template::jinja(read(path)?).map_err(|e| anyhow!("{}: {e}", path.display()))?,
            None => Template::Rwkv,
        };
        let cors = self.cors.iter().map(|o| o.parse().with_context(|| format!("--cors {o}")));
        ensure!(!self.cors.iter().any(|o| o == "*"), "--cors: name the origins one by one");
        ensure!(self.max_tokens > 0 && self.max_prompt > 0, "--max-tokens and --max-prompt must be at least 1");
        ensure!(self.cache_memory < 1 << 30 && self.max_body < 1 << 20, "--cache-memory and --max-body are in MiB");
        Ok(Options {
            model: self.name.clone().unwrap_or_else(|| self.source.name()),
            keys,
            template,
            think: self.think,
            max_tokens: self.max_tokens,
            max_prompt: self.max_prompt,
            max_body: self.max_body << 20,
            timeout: Duration::from_secs(self.timeout),
            read_timeout: Duration::from_secs(self.read_timeout),
            write_timeout: Duration::from_secs(self.write_timeout),
            connections: self.connections.into(),
            per_key: self.per_key.into(),
            cors: cors.collect::<anyhow::Result<_>>()?,
        })
    }
}

fn named_file(s: &str) -> Result<(String, PathBuf), String> {
    let (name, file) = s.split_once('=').ok_or("write NAME=FILE")?;
    Ok((name.into(), file.into()))
}

fn read(path: &PathBuf) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// Reads the certificate again at every SIGHUP, which without one does nothing.
async fn reload(tls: Option<Tls>) {
    #[cfg(unix)]
    if let Ok(mut hangup) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()) {
        while hangup.recv().await.is_some() {
            match tls.as_ref().map(Tls::reload) {
                Some(Ok(())) => eprintln!("the certificate was read again"),
                Some(Err(e)) => eprintln!("the certificate stays: {e}"),
                None => {}
            }
        }
    }
    #[cfg(not(unix))]
    let _ = tls;
}

/// Waits for Ctrl-C (true) or SIGTERM (false).
async fn stop() -> bool {
    let ctrl_c = async {
        while !crate::global::stop().load(std::sync::atomic::Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    #[cfg(unix)]
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminated = std::future::pending::<()>();
    tokio::select! {
        () = ctrl_c => true,
        () = terminated => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_get_what_is_asked_for_or_half_of_what_is_free() {
        let ctx = Context::cpu(1);
        assert_eq!(memory(Some(3), &ctx), 3 << 20);
        let all = available().map_or(0, |b| b as usize);
        assert!(memory(None, &ctx) < all || all == 0);
    }
}
