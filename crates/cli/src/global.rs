//! What all subcommands share: global flags, output, Ctrl-C.

use anser_model::{Cache, Config, Eviction, Hybrid};
use anser_tensor::{Context, DType, Device, WeightType};
use anyhow::ensure;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// Flags that every subcommand takes, before or after its name.
#[derive(clap::Args)]
pub struct Global {
    /// Where to compute: cpu, cuda, cuda:N, or best: the first NVIDIA GPU that can be used, else the CPU [default: best; cpu for debug]
    #[arg(long, global = true)]
    device: Option<Place>,
    /// CPU threads [default: as many as this process may use]
    #[arg(long, global = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Type of weights: f32, f16, bf16, int8, on a CPU q4; for convert q8_0 too [default: bf16; for convert the file's]
    #[arg(long = "dtype", global = true, value_name = "DTYPE")]
    pub stored: Option<Stored>,
    /// One JSON object on stdout, everything else on stderr
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress and no remarks
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

/// Where to compute.
#[derive(Clone, Copy)]
enum Place {
    /// The first GPU if it can be used, else the CPU.
    Best,
    On(Device),
}

impl std::str::FromStr for Place {
    type Err = String;
    fn from_str(s: &str) -> Result<Place, String> {
        match s {
            "best" => Ok(Place::Best),
            _ => s.parse().map(Place::On).map_err(|_| format!("unknown device {s:?}: use best, cpu, cuda or cuda:N")),
        }
    }
}

/// A type that weights have in files or in memory.
#[derive(Clone, Copy)]
pub enum Stored {
    /// One that computations have too.
    Float(DType),
    /// 8 bits and scales.
    Int8,
    /// 4 bits and scales.
    Q4,
    /// llama.cpp's 8 bits and scales.
    Q8_0,
}

impl std::str::FromStr for Stored {
    type Err = String;
    fn from_str(s: &str) -> Result<Stored, String> {
        match s {
            "int8" => Ok(Stored::Int8),
            "q4" => Ok(Stored::Q4),
            "q8_0" => Ok(Stored::Q8_0),
            _ => s
                .parse()
                .map(Stored::Float)
                .map_err(|_| "use f32, bf16, f16, int8, q4 or, to write a .gguf file, q8_0".into()),
        }
    }
}

impl Global {
    /// How weights are kept: as `--dtype` says, or bf16.
    pub fn weights(&self, ctx: &Context) -> anyhow::Result<WeightType> {
        let coded = match self.stored {
            None => return Ok(DType::BF16.into()),
            Some(Stored::Float(dtype)) => return Ok(dtype.into()),
            Some(Stored::Int8) => WeightType::Int8,
            Some(Stored::Q4) => WeightType::Q4,
            Some(Stored::Q8_0) => anyhow::bail!(
                "--dtype q8_0 is a type for files: write one with `anser convert IN OUT.gguf --dtype q8_0` and load that"
            ),
        };
        ensure!(
            ctx.cuda().is_none() || coded == WeightType::Int8,
            "--dtype {coded} keeps weights on the CPU only: use int8, f16 or bf16, or --device cpu"
        );
        Ok(coded)
    }

    /// The same for work that isn't done with coded weights, such as training.
    pub fn context_in_floats(&self) -> anyhow::Result<Context> {
        let coded = self.stored.is_some_and(|s| !matches!(s, Stored::Float(_)));
        ensure!(
            !coded,
            "--dtype: this computes in f32, bf16 or f16; int8, q4 and q8_0 are for models that are read with"
        );
        self.context()
    }

    /// The device and threads asked for; activations on a GPU are of `--dtype`, f16 beside int8, or bf16.
    pub fn context(&self) -> anyhow::Result<Context> {
        let activations = match self.stored {
            Some(Stored::Float(dtype)) => dtype,
            Some(Stored::Int8) => DType::F16,
            _ => DType::BF16,
        };
        self.open(self.device.unwrap_or(Place::Best), activations)
    }

    /// The same with activations in f32, whatever `--dtype` says, and on the CPU unless another device is asked for.
    pub fn exact_context(&self) -> anyhow::Result<Context> {
        self.open(self.device.unwrap_or(Place::On(Device::Cpu)), DType::F32)
    }

    fn open(&self, place: Place, activations: DType) -> anyhow::Result<Context> {
        let threads = self.threads.unwrap_or(0) as usize;
        match place {
            Place::On(device) => Ok(Context::with_activations(device, activations, threads)?),
            Place::Best => Ok(Context::with_activations(Device::Cuda(0), activations, threads).unwrap_or_else(|why| {
                // Without a driver there is nothing to remark unless it was asked for.
                if self.device.is_some() || anser_tensor::cuda::driver_found() {
                    self.note(format!("computing on the CPU: {why}"));
                }
                Context::cpu(threads)
            })),
        }
    }

    /// A remark on stderr.
    pub fn note(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            say(text);
        }
    }

    /// What is unusual about a model.
    pub fn remarks(&self, config: &Config) {
        if config.left_over() > 0 {
            self.note(format!(
                "the last {} RWKV-7 blocks follow the last attention block: they work here, the reference implementation of RWKV-X leaves them out",
                config.left_over()
            ));
        }
    }

    /// A piece of the result on stdout at once; nothing with --json.
    pub fn stream(&self, text: &str) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if !self.json {
            out.write_all(text.as_bytes())?;
        }
        Ok(out.flush()?)
    }

    /// The result: JSON or text, on stdout.
    pub fn result(&self, json: serde_json::Value, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{json}")?
        } else {
            out.write_all(text().as_bytes())?
        }
        Ok(out.flush()?)
    }
}

/// The rule of a hybrid's attention, where its file doesn't say it or something else is wanted.
#[derive(clap::Args)]
pub struct Chunks {
    /// Tokens of a chunk of a hybrid's attention [default: what the model file says, else 2048]
    #[arg(long)]
    chunk: Option<usize>,
    /// Chunks that a token of a hybrid sees, its own counted [default: what the model file says, else 3]
    #[arg(long)]
    topk: Option<usize>,
    /// Of these the first chunks of a text, so many of which every token sees [default: what the model file says, else 0]
    #[arg(long)]
    sink: Option<usize>,
    /// Of these the chunks just before a token's own, so many of which it always sees [default: what the model file says, else 0]
    #[arg(long)]
    window: Option<usize>,
}

impl Chunks {
    /// A hybrid with what was asked for.
    pub fn of(&self, h: Hybrid) -> Hybrid {
        Hybrid {
            chunk: self.chunk.unwrap_or(h.chunk),
            topk: self.topk.unwrap_or(h.topk),
            sink: self.sink.unwrap_or(h.sink),
            window: self.window.unwrap_or(h.window),
            ..h
        }
    }

    /// The configuration with what was asked for.
    pub fn apply(&self, mut config: Config) -> anyhow::Result<Config> {
        let asked = [self.chunk, self.topk, self.sink, self.window].iter().any(Option::is_some);
        ensure!(
            config.hybrid.is_some() || !asked,
            "--chunk, --topk, --sink and --window are of attention, which this model doesn't have"
        );
        config.hybrid = config.hybrid.map(|h| self.of(h));
        config.validate()?;
        Ok(config)
    }
}

/// What new attention blocks have beside a rule.
#[derive(clap::Args)]
pub struct NewBlocks {
    /// Gates what attention gives, each head by itself
    #[arg(long)]
    gate: bool,
    /// Heads of keys and values of attention, of which each serves as many heads of queries [default: one for each]
    #[arg(long, value_name = "HEADS")]
    key_heads: Option<usize>,
}

impl NewBlocks {
    /// Whether anything was asked for.
    pub fn asked(&self) -> bool {
        self.gate || self.key_heads.is_some()
    }

    /// A hybrid with so many of them.
    pub fn hybrid(&self, layers: usize) -> Hybrid {
        Hybrid { gate: self.gate, key_heads: self.key_heads, ..Hybrid::new(layers) }
    }
}

/// A bound on what a hybrid's attention keeps.
#[derive(clap::Args)]
pub struct Bound {
    /// Tokens that each attention block of a hybrid keeps at most, so that memory and time per token stay bounded [default: all]
    #[arg(long, value_name = "TOKENS")]
    cache: Option<usize>,
    /// What stays in a full cache beside the most recent tokens: recent (more of them), attention (what recent queries looked at) or error
    /// (what the state has forgotten)
    #[arg(long, default_value = "attention", requires = "cache")]
    evict: Eviction,
    /// Single tokens stay, not whole chunks
    #[arg(long, requires = "cache")]
    evict_tokens: bool,
}

impl Bound {
    /// The bound, if one was asked for.
    pub fn cache(&self) -> Option<Cache> {
        self.cache.map(|most| Cache::new(most, self.evict, !self.evict_tokens))
    }
}

/// Ctrl-C was pressed; what could be saved is saved.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// A line on stderr. Where nobody can read that, as on a full disk, work goes on all the same.
pub fn say(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

static STOP: AtomicBool = AtomicBool::new(false);
/// Whether the work at hand looks at [`STOP`].
static HEEDED: AtomicBool = AtomicBool::new(false);

/// Whether Ctrl-C was pressed. Whoever asks has something to save, and ends soon after.
pub fn stop() -> &'static AtomicBool {
    HEEDED.store(true, Ordering::SeqCst);
    &STOP
}

/// Waits for a person with `wait`, meanwhile with nothing to save.
pub fn idle<T>(wait: impl FnOnce() -> T) -> T {
    HEEDED.store(false, Ordering::SeqCst);
    wait()
}

/// The first Ctrl-C asks the work to stop and save, if it has anything to save; otherwise, and the second time, the process ends.
pub fn catch_ctrl_c() {
    let _ = ctrlc::set_handler(interrupt);
}

/// SIGTERM, by which machines take back what they lent, is as Ctrl-C from now on.
pub fn catch_termination() {
    #[cfg(unix)]
    if let Ok(mut signals) = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM]) {
        std::thread::spawn(move || signals.forever().for_each(|_| interrupt()));
    }
}

fn interrupt() {
    if STOP.swap(true, Ordering::SeqCst) || !HEEDED.load(Ordering::SeqCst) {
        anser_formats::abandon_writes();
        std::process::exit(130);
    }
}
