use crate::global::{Global, Interrupted, stop};
use crate::source::{ModelFile, Source};
use anser_data::needle::{Needles, Task as Hidden};
use anser_eval::experiment::{Experiment, Run, Tasks};
use anser_eval::text::{Prediction, predict};
use anser_eval::{digits, needle, pairs, recall, states};
use anser_formats::{Checkpoint, writable, write_atomic};
use anser_model::{Load, Model};
use anser_tensor::{Context, DType};
use anser_tokenizer::Tokenizer;
use anser_train::Trainer;
use anyhow::{Context as _, ensure};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Measures what a model can do
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(clap::Subcommand)]
enum Task {
    /// Digit reversal ("123,321#"): trains the 2-layer model of width 32 for it, then tests 1 to 30 digits
    Digits {
        /// Tests this model instead of training one
        #[arg(long)]
        model: Option<PathBuf>,
        /// Training steps
        #[arg(long, default_value_t = 6000)]
        steps: u64,
        /// Rows of 64 tokens in a step
        #[arg(long, default_value_t = 128)]
        rows: usize,
        /// Numbers tested of each length
        #[arg(long, default_value_t = 200)]
        count: usize,
        /// Seed
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Saves the trained model
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// State tracking: products in S5, A5, A4xZ5 and Z60 at every position, by RWKV-7 with and without doubled in-context rate and
    /// by a Transformer
    States {
        /// Experiment in TOML [default: a small one, minutes on a CPU]
        config: Option<PathBuf>,
        /// Results, from which an interrupted experiment goes on; pictures (SVG) beside it
        #[arg(long, default_value = "states.json")]
        out: PathBuf,
        /// Models trained at the same time; two small ones fill a GPU better than one, more gain nothing. On the CPU each takes --threads
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
        jobs: u8,
    },
    /// Associative recall: many keys and values, then the keys again (MQAR)
    Recall {
        /// Experiment in TOML [default: a small one, minutes on a CPU]
        config: Option<PathBuf>,
        /// Results, from which an interrupted experiment goes on; a picture (SVG) beside it
        #[arg(long, default_value = "recall.json")]
        out: PathBuf,
        /// Models trained at the same time; two small ones fill a GPU better than one, more gain nothing. On the CPU each takes --threads
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
        jobs: u8,
    },
    /// A pass key in a long text (Mohtashami and Jaggi; RWKV-X): how often a model finds it again, by length and depth
    Passkey {
        #[command(flatten)]
        needles: Grid,
        /// Results, from which an interrupted test goes on; a picture (SVG) beside it
        #[arg(long, default_value = "passkey.json")]
        out: PathBuf,
    },
    /// The single needles of RULER: a number in sentences that repeat (1), a number (2) or a UUID (3) in a text; with --keys, many of which one is
    /// asked for
    Niah {
        /// 1, 2 or 3
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
        task: u8,
        /// Needles of a prompt under different names, 1 to 1600, of which one is asked for; 4 with task 2 is RULER's MK-NIAH-1
        #[arg(long, default_value_t = 1)]
        keys: usize,
        /// The text of tasks 2 and 3, a text or .jsonl file (also .xz, .zst, .gz) [default: the bundled text]
        #[arg(long)]
        text: Option<PathBuf>,
        #[command(flatten)]
        needles: Grid,
        /// Results, from which an interrupted test goes on; a picture (SVG) beside it [default: niah1.json, niah2.json or niah3.json; with several keys niah2-keys4.json
        /// and so on]
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// How well a model predicts text and .jsonl files (also .xz, .zst, .gz): cross entropy per token, bits per byte. The mark between documents is predicted, too
    Text(Files),
    /// Minimal pairs (BLiMP): how often the right sentence of two is the more probable one. A line of a file is an object with "sentence_good" and
    /// "sentence_bad"
    Pairs {
        #[command(flatten)]
        files: Files,
        /// Adds the log-likelihoods of both sentences of every pair to the JSON, in nats
        #[arg(long)]
        each: bool,
    },
}

/// A model and the files it is measured on.
#[derive(clap::Args)]
struct Files {
    #[command(flatten)]
    model: ModelFile,
    /// Files
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// Which needles a model is to find.
#[derive(clap::Args)]
struct Grid {
    #[command(flatten)]
    source: Source,
    /// Lengths of prompts, in tokens of the model
    #[arg(long, value_delimiter = ',', default_value = "1024,2048,4096")]
    lengths: Vec<usize>,
    /// Number of depths, evenly from 0% to 100%
    #[arg(long, default_value_t = 5)]
    depths: usize,
    /// Samples of each length and depth
    #[arg(long, default_value_t = 5)]
    count: usize,
    /// Seed of the samples
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Files {
    /// In f32 on a CPU, unless `--dtype` says otherwise.
    fn load(&self, ctx: &Context, global: &Global) -> anyhow::Result<(Model, Tokenizer)> {
        let weights = if global.stored.is_some() { global.weights(ctx)? } else { DType::F32.into() };
        self.model.load(ctx, global, weights)
    }
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    match &args.task {
        Task::Digits { .. } => reversal(&args.task, global),
        Task::States { config, out, jobs } => {
            let (e, runs) = experiment(global, config.as_deref(), states::SMALL, out, *jobs)?;
            for (group, svg) in states::pictures(&e.task, &runs) {
                picture(out, &format!("-{group}"), &svg)?;
            }
            global.result(json!({ "runs": runs }), || states::table(&e.task, &runs))
        }
        Task::Recall { config, out, jobs } => {
            let (e, runs) = experiment(global, config.as_deref(), recall::SMALL, out, *jobs)?;
            picture(out, "", &recall::picture(&runs))?;
            global.result(json!({ "runs": runs }), || recall::table(&e.task, &runs))
        }
        Task::Passkey { needles, out } => hidden(Hidden::Passkey, 1, None, needles, out, global),
        Task::Niah { task, keys, text, needles, out } => {
            let task = [Hidden::Niah1, Hidden::Niah2, Hidden::Niah3][usize::from(*task) - 1];
            let several = if *keys == 1 { String::new() } else { format!("-keys{keys}") };
            let out = out.clone().unwrap_or_else(|| format!("{task}{several}.json").into());
            hidden(task, *keys, text.as_deref(), needles, &out, global)
        }
        Task::Text(files) => text(files, global),
        Task::Pairs { files, each } => pairs(files, *each, global),
    }
}

fn pairs(of: &Files, each: bool, global: &Global) -> anyhow::Result<()> {
    let ctx = global.context()?;
    let (model, tokenizer) = of.load(&ctx, global)?;
    let mut all = Vec::new();
    for path in &of.files {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| name.clone())?;
        let pairs = pairs::parse(&text).with_context(|| name.clone())?;
        all.push((name.clone(), pairs::score(&ctx, &model, &tokenizer, &pairs).with_context(|| name)?));
    }
    // As BLiMP does, over all pairs.
    let together: Vec<[f64; 2]> = all.iter().flat_map(|(_, scores)| scores).copied().collect();
    let (count, mean) = (together.len(), pairs::accuracy(&together));
    let file = |(name, scores): &(String, Vec<[f64; 2]>)| {
        let mut json = json!({ "file": name, "pairs": scores.len(), "accuracy": pairs::accuracy(scores) });
        if each {
            json["log_likelihoods"] = scores.iter().map(|s| json!(s.map(|nats| -nats))).collect();
        }
        json
    };
    let files: Vec<_> = all.iter().map(file).collect();
    global.result(json!({ "accuracy": mean, "pairs": count, "files": files }), || {
        let line = |(name, scores): &(String, Vec<[f64; 2]>)| {
            format!("{name}: {:.1}% of {}\n", 100.0 * pairs::accuracy(scores), scores.len())
        };
        all.iter().map(line).collect::<String>() + &format!("{:.2}% of {count} pairs\n", 100.0 * mean)
    })
}

fn hidden(
    task: Hidden, keys: usize, file: Option<&Path>, grid: &Grid, out: &Path, global: &Global,
) -> anyhow::Result<()> {
    let most = task.most_keys();
    ensure!((1..=most).contains(&keys), "--keys: a prompt of {task} can have 1 to {most} needles, not {keys}");
    ensure!(
        file.is_none() || task.takes_text(),
        "--text: the haystack of {task} is not a text; tasks 2 and 3 take one"
    );
    let text = file.map(anser_data::documents).transpose()?.map(|d| d.join("\n"));
    let ctx = global.context()?;
    let (model, tokenizer) = grid.source.load(&ctx, global)?;
    let needles = Needles::new(task, tokenizer, text.as_deref()).with_keys(keys);
    let mut lengths = grid.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    let test = needle::Test {
        task,
        keys,
        lengths,
        depths: grid.depths,
        count: grid.count,
        seed: grid.seed,
        model: model.fingerprint(),
        dtype: global.weights(&ctx)?.to_string(),
        tokenizer: tokenizer.name().into(),
        text: file.map(|f| f.display().to_string()).unwrap_or_default(),
        cache: grid.source.bound(),
    };
    // Whether the bound fits the model is seen here.
    let start = grid.source.begin(&ctx, &model, None)?;
    let engine = grid.source.engine(&ctx, &model.into(), start.bound())?;
    let mut answer = |sample: &_| needle::write(&engine, &start, &tokenizer, sample, stop());
    let cells = test.run(&needles, Some(out), stop(), &|line| global.note(line), &mut answer)?;
    picture(out, "", &test.picture(&cells))?;
    if stop().load(Ordering::SeqCst) {
        return Err(interrupted(global, out));
    }
    let right =
        cells.iter().map(|c| c.right).sum::<usize>() as f64 / cells.iter().map(|c| c.asked).sum::<usize>() as f64;
    global.result(json!({ "accuracy": right, "experiment": test, "runs": cells }), || test.table(&cells))
}

fn text(of: &Files, global: &Global) -> anyhow::Result<()> {
    let ctx = global.context()?;
    let (model, tokenizer) = of.load(&ctx, global)?;
    let mut all = Vec::new();
    for path in &of.files {
        let name = path.display().to_string();
        let documents = anser_data::documents(path)?;
        all.push((name.clone(), predict(&ctx, &model, &tokenizer, &documents).with_context(|| name)?));
    }
    global.result(
        json!({ "files": all.iter().map(|(name, p)| json!({ "file": name, "prediction": p })).collect::<Vec<_>>() }),
        || {
            let line = |(name, p): &(String, Prediction)| {
                let (loss, bits) = (p.loss, p.bits_per_byte);
                format!(
                    "{name}: {loss:.4} nats a token, {bits:.4} bits a byte ({} tokens, {} bytes)\n",
                    p.tokens, p.bytes
                )
            };
            all.iter().map(line).collect()
        },
    )
}

fn reversal(task: &Task, global: &Global) -> anyhow::Result<()> {
    let Task::Digits { model, steps, rows, count, seed, out } = task else { return Ok(()) };
    ensure!(*count > 0 && *rows > 0, "--count and --rows must be at least 1");
    out.as_deref().map_or(Ok(()), writable)?;
    let ctx = global.context_in_floats()?;
    let start = Instant::now();
    let report = |model: &Model| digits::accuracy(&ctx, model, *seed, digits::DIGITS, *count);
    let all = match model {
        Some(path) => {
            let model = Model::load(&ctx, &Checkpoint::open(path)?, Load::Train)?;
            ensure!(
                model.config().vocab_size == anser_data::digits::VOCAB,
                "{}: not a model of digits",
                path.display()
            );
            report(&model)?
        }
        None => {
            let mut losses = 0.0;
            let log = |info: anser_train::StepInfo, t: &Trainer| {
                losses += info.loss;
                const EVERY: u64 = 250;
                if (info.step + 1).is_multiple_of(EVERY) {
                    let loss = losses / EVERY as f64;
                    losses = 0.0;
                    let right = digits::accuracy(&ctx, t.model(), *seed, digits::DIGITS, 20)
                        .map(|a| digits::digit_accuracy(&a));
                    let seconds = start.elapsed().as_secs_f64();
                    global.note(format!(
                        "step {}: loss {loss:.4}, {:.2}% of digits right, {seconds:.0} s",
                        info.step + 1,
                        100.0 * right.unwrap_or(f64::NAN)
                    ));
                }
            };
            let trainer = digits::train(&ctx, *steps, *rows, *seed, stop(), log)?;
            if let Some(path) = out {
                trainer.save_model(path)?;
            }
            if stop().load(Ordering::SeqCst) {
                return Err(Interrupted.into());
            }
            report(trainer.model())?
        }
    };
    let (right, seconds) = (digits::digit_accuracy(&all), start.elapsed().as_secs_f64());
    global.result(json!({ "digit_accuracy": right, "seconds": seconds, "lengths": all }), || {
        let mut text = String::from("digits  digit accuracy  whole numbers\n");
        for a in &all {
            text += &format!("{:6}  {:13.2}%  {:12.2}%\n", a.digits, 100.0 * a.digit, 100.0 * a.number);
        }
        text + &format!("{:.3}% of all digits right; {seconds:.0} s\n", 100.0 * right)
    })
}

/// Runs the experiment of a file, or the one that comes with the program.
fn experiment<T: Tasks>(
    global: &Global, config: Option<&Path>, built_in: &str, out: &Path, jobs: u8,
) -> anyhow::Result<(Experiment<T>, Vec<Run>)> {
    let text = match config {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => built_in.into(),
    };
    let name = config.map_or("built-in configuration".into(), |p| p.display().to_string());
    let e = Experiment::<T>::parse(&text).context(name)?;
    let contexts = (0..jobs).map(|_| global.context_in_floats()).collect::<anyhow::Result<Vec<_>>>()?;
    let runs = e.run(&contexts, Some(out), stop(), &|line| global.note(line))?;
    if stop().load(Ordering::SeqCst) {
        return Err(interrupted(global, out));
    }
    Ok((e, runs))
}

/// Says where the results of interrupted work are.
fn interrupted(global: &Global, out: &Path) -> anyhow::Error {
    global.note(format!("stopped; finished runs are in {}, the same command goes on from there", out.display()));
    Interrupted.into()
}

/// Writes a picture beside `out`.
pub fn picture(out: &Path, suffix: &str, svg: &str) -> anyhow::Result<()> {
    let stem = out.file_stem().unwrap_or_default().to_string_lossy();
    let path = out.with_file_name(format!("{stem}{suffix}.svg"));
    Ok(write_atomic(&path, |f| f.write_all(svg.as_bytes()))?)
}
