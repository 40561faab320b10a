//! Experiments on synthetic tasks: models of several kinds and sizes are trained on endless random rows of a task, and tested on
//! rows of another seed. A TOML file says which; results go to a JSON file after every run, from which an interrupted experiment
//! goes on.

mod answers;
mod results;

pub use answers::{Accuracy, accuracy, hits};
pub(crate) use results::Results;
pub use results::{Bounded, Run, best};

use crate::Error;
use anser_data::Batch;
use anser_model::{Cache, Config, Hybrid, Init, Model};
use anser_tensor::Context;
use anser_train::{Bptt, Hyper, Recompute, Schedule, Settings, Trainer};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// RWKV-7.
    Rwkv7,
    /// RWKV-7 with [`Config::double_rate`].
    Rwkv7Doubled,
    /// The Transformer with as many parameters, [`Config::control`].
    Transformer,
    /// RWKV-X: so many attention blocks, placed as in the reference, beside the RWKV-7 layers.
    RwkvX {
        /// Attention blocks.
        blocks: usize,
        /// Tokens of a chunk.
        chunk: usize,
        /// Chunks that a token sees, its own counted.
        topk: usize,
    },
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Rwkv7 => f.write_str("RWKV-7"),
            Kind::Rwkv7Doubled => f.write_str("RWKV-7, doubled rate"),
            Kind::Transformer => f.write_str("Transformer"),
            Kind::RwkvX { blocks, chunk, topk } => write!(f, "RWKV-X, {blocks} x {topk} chunks of {chunk}"),
        }
    }
}

/// Section `[models]`: every kind is trained with every number of layers and every width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Models {
    /// Kinds.
    pub kinds: Vec<Kind>,
    /// Numbers of layers.
    pub layers: Vec<usize>,
    /// Widths, D.
    pub widths: Vec<usize>,
    /// Head size, N.
    pub head_size: usize,
    /// Bounds on what attention keeps, with each of which hybrids are tested once more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caches: Vec<Cache>,
}

impl Models {
    fn config(&self, kind: Kind, layers: usize, width: usize, vocab: usize) -> Result<Config, Error> {
        let mut c = Config { head_size: self.head_size, ..Config::new(layers, width, vocab) };
        c.validate()?;
        match kind {
            Kind::Rwkv7 => {}
            Kind::Rwkv7Doubled => c.double_rate = true,
            Kind::Transformer => c = c.control(),
            Kind::RwkvX { blocks, chunk, topk } => {
                c.hybrid = Some(Hybrid { chunk, topk, ..Hybrid::new(blocks) });
                c.validate()?;
                self.caches.iter().try_for_each(|bound| bound.validate(&c))?;
            }
        }
        Ok(c)
    }
}

/// Section `[train]`: how each model is trained and tested. Learning rates and seeds are lists; the best run counts, and all are
/// in the results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Rows of a step.
    pub rows: usize,
    /// Rows that are computed at a time.
    pub micro_rows: usize,
    /// Most steps of a run.
    pub steps: u64,
    /// Learning rates after the warm-up, each a run; a cosine leads to a tenth.
    pub lr: Vec<f64>,
    /// Steps of warm-up.
    pub warmup: u64,
    /// Weight decay of matrices.
    pub weight_decay: f64,
    /// AdamW: decay of the second moment; of the first 0.9.
    pub beta2: f64,
    /// Largest gradient norm; 0: no limit.
    pub grad_clip: f64,
    /// Seeds of weights and rows, each a run.
    pub seeds: Vec<u64>,
    /// Steps between tests on a few rows of the trained length.
    pub eval_every: u64,
    /// A run ends when such a test gives at least this share of right answers; above 1: never before its last step.
    pub stop_at: f64,
    /// Rows tested at the end.
    pub test_rows: usize,
}

impl Recipe {
    fn check(&self) -> Result<(), Error> {
        let at_least_one = [
            ("rows", self.rows),
            ("micro_rows", self.micro_rows),
            ("eval_every", self.eval_every as usize),
            ("test_rows", self.test_rows),
        ];
        for (name, value) in at_least_one {
            if value == 0 {
                return Err(Error::Input(format!("train.{name} must be at least 1")));
            }
        }
        if self.lr.iter().any(|&lr| !(lr.is_finite() && lr > 0.0)) {
            return Err(Error::Input("train.lr must hold numbers above 0".into()));
        }
        Ok(())
    }

    fn settings(&self, ctx: usize, lr: f64) -> Settings {
        Settings {
            ctx,
            schedule: Schedule { init: lr, last: lr / 10.0, warmup: self.warmup, total: self.steps },
            hyper: Hyper { weight_decay: self.weight_decay, beta2: self.beta2, eps: 1e-8, ..Hyper::default() },
            grad_clip: self.grad_clip,
            l2wrap: false,
            checkpointing: false,
            recompute: Recompute::Nothing,
            bptt: Bptt::Whole,
            long_ce: None,
        }
    }
}

/// Rows with answers to be given.
pub struct Task {
    /// Name in tables and results.
    pub name: String,
    /// Tokens.
    pub vocab: usize,
    /// Answers of a row in training.
    pub answers: usize,
    /// Numbers of answers from a row's start that are tested, increasing; more than `answers` tests longer rows.
    pub tested: Vec<usize>,
    /// Gives rows of one length: (seed, stream, rows, answers).
    pub rows: Box<dyn Fn(u64, u64, usize, usize) -> Batch + Send + Sync>,
    /// What training begins with.
    pub lessons: Vec<Lesson>,
}

/// Easier rows for the first steps.
pub struct Lesson {
    /// Steps with them.
    pub steps: u64,
    /// Gives as many tokens as so many rows of the task have: (seed, stream, rows).
    pub rows: Box<dyn Fn(u64, u64, usize) -> Batch + Send + Sync>,
}

impl Task {
    /// What a step is trained on.
    pub fn batch(&self, seed: u64, step: u64, rows: usize) -> Batch {
        let mut before = 0;
        for lesson in &self.lessons {
            before += lesson.steps;
            if step < before {
                return (lesson.rows)(seed, step, rows);
            }
        }
        (self.rows)(seed, step, rows, self.answers)
    }
}

/// Section `[task]` of an experiment.
pub trait Tasks: Serialize + DeserializeOwned + Sync {
    /// The tasks that models are trained for, one after the other.
    ///
    /// # Errors
    /// When the section asks for what cannot be.
    fn tasks(&self) -> Result<Vec<Task>, Error>;
}

/// An experiment as its TOML file says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment<T> {
    /// What is learnt.
    pub task: T,
    /// What learns it.
    pub models: Models,
    /// How.
    pub train: Recipe,
}

impl<T: Tasks> Experiment<T> {
    /// Reads a configuration.
    ///
    /// # Errors
    /// For text that is no TOML, unknown or missing fields, and values that cannot be.
    pub fn parse(text: &str) -> Result<Experiment<T>, Error> {
        let e: Experiment<T> =
            toml::from_str(text).map_err(|e| Error::Input(e.to_string().trim_end().replace('\n', " ")))?;
        e.train.check()?;
        for task in e.task.tasks()? {
            for &width in &e.models.widths {
                for &layers in &e.models.layers {
                    for &kind in &e.models.kinds {
                        e.models.config(kind, layers, width, task.vocab)?;
                    }
                }
            }
        }
        Ok(e)
    }

    /// Trains and tests every model on every task, one at a time on each context: a small model leaves a GPU partly idle, so two contexts on one are
    /// faster than one. `note` gets lines of progress. With `out`, results are written there after every run and runs that are there already are not
    /// done again. When `stop` becomes true, the runs done so far come back.
    ///
    /// # Errors
    /// When `out` cannot be written, or holds the results of another experiment.
    pub fn run(
        &self, contexts: &[Context], out: Option<&Path>, stop: &AtomicBool, note: &(dyn Fn(String) + Sync),
    ) -> Result<Vec<Run>, Error> {
        let results = Results::<Run>::open(self, out)?;
        let (tasks, mut plan) = (self.task.tasks()?, Vec::new());
        for task in &tasks {
            for (width, layers, kind, lr, seed) in self.grid() {
                let config = self.models.config(kind, layers, width, task.vocab)?;
                let (parameters, task_name) = (config.parameters(), task.name.clone());
                plan.push((
                    task,
                    config,
                    Run { task: task_name, kind, layers, width, parameters, lr, seed, ..Run::default() },
                ));
            }
        }
        // Where a run stands in the plan, so that results are in that order whichever ends first.
        let place = |run: &Run| plan.iter().position(|(.., p)| p.same(run));
        let (next, results) = (AtomicUsize::new(0), Mutex::new(results));
        let locked = || results.lock().unwrap_or_else(PoisonError::into_inner);
        let work = |ctx: &Context| -> Result<(), Error> {
            while let Some((task, config, run)) = plan.get(next.fetch_add(1, Ordering::SeqCst)) {
                let mut run = run.clone();
                if locked().runs.iter().any(|r| r.same(&run)) {
                    continue;
                }
                self.one(ctx, task, config, &mut run, stop, note)?;
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let mut results = locked();
                results.runs.push(run);
                results.runs.sort_by_key(place);
                results.save(out)?;
            }
            Ok(())
        };
        let done: Vec<Result<(), Error>> = thread::scope(|s| {
            let threads: Vec<_> = contexts
                .iter()
                .map(|ctx| {
                    s.spawn(|| {
                        let done = work(ctx);
                        if done.is_err() {
                            // The others end with the run they are at.
                            next.store(plan.len(), Ordering::SeqCst);
                        }
                        done
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        });
        done.into_iter().collect::<Result<(), Error>>()?;
        Ok(results.into_inner().unwrap_or_else(PoisonError::into_inner).runs)
    }

    /// All (width, layers, kind, learning rate, seed).
    fn grid(&self) -> Vec<(usize, usize, Kind, f64, u64)> {
        let mut all = Vec::new();
        for &width in &self.models.widths {
            for &layers in &self.models.layers {
                for &kind in &self.models.kinds {
                    for &lr in &self.train.lr {
                        all.extend(self.train.seeds.iter().map(|&seed| (width, layers, kind, lr, seed)));
                    }
                }
            }
        }
        all
    }

    fn one(
        &self, ctx: &Context, task: &Task, config: &Config, run: &mut Run, stop: &AtomicBool,
        note: &(dyn Fn(String) + Sync),
    ) -> Result<(), Error> {
        let (recipe, start) = (&self.train, Instant::now());
        let rows = |seed, stream, count, answers| (task.rows)(seed, stream, count, answers);
        // No row tested is one trained on, but for tasks with few rows.
        let test = |count, answers| rows(!run.seed, answers as u64, count, answers);
        let len = rows(0, 0, 1, task.answers).tokens.len();
        let model = Model::init(ctx, config, Init::Current, run.seed)?;
        let mut trainer = Trainer::new(ctx, model, recipe.settings(len, run.lr));
        trainer.record_steps(true);
        let few = test(64.min(recipe.test_rows), task.answers);
        let mut losses = Vec::new();
        let make = |step| {
            let batch = task.batch(run.seed, step, recipe.rows);
            let micro = |r| batch.slice(len, r, (r + recipe.micro_rows).min(recipe.rows));
            (0..recipe.rows).step_by(recipe.micro_rows).map(micro).collect::<Vec<Batch>>()
        };
        let (curve, error) = thread::scope(|s| -> Result<_, Error> {
            // The rows of the next steps are made meanwhile: with small models that takes as long as a step. It ends when nobody wants more.
            let (made, ready) = sync_channel(2);
            s.spawn(move || (0..recipe.steps).all(|step| made.send(make(step)).is_ok()));
            let mut curve = Vec::new();
            for micro in ready {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                match trainer.step(&micro) {
                    Ok(info) => losses.push(info.loss),
                    Err(e @ anser_train::Error::NotFinite { .. }) => return Ok((curve, Some(e.to_string()))),
                    Err(e) => return Err(e.into()),
                }
                let steps = trainer.steps();
                if steps.is_multiple_of(recipe.eval_every) {
                    let right = accuracy(&hits(ctx, trainer.model(), &few, None)?, &[task.answers])[0].right;
                    curve.push((steps, right));
                    let recent = &losses[losses.len() - recipe.eval_every as usize..];
                    let loss = recent.iter().sum::<f64>() / recent.len() as f64;
                    let (percent, seconds) = (100.0 * right, start.elapsed().as_secs_f64());
                    note(format!("{run}: step {steps}, loss {loss:.3}, {percent:.1}% right, {seconds:.0} s"));
                    if right >= recipe.stop_at {
                        break;
                    }
                }
            }
            Ok((curve, None))
        })?;
        (run.curve, run.error) = (curve, error);
        let recent = &losses[losses.len().saturating_sub(100)..];
        (run.steps, run.loss) = (trainer.steps(), recent.iter().sum::<f64>() / recent.len().max(1) as f64);
        let longest = task.tested.iter().copied().max().unwrap_or(task.answers);
        let rows = test(recipe.test_rows, longest);
        let accuracy = |bound| Ok::<_, Error>(accuracy(&hits(ctx, trainer.model(), &rows, bound)?, &task.tested));
        run.accuracy = accuracy(None)?;
        if config.hybrid.is_some() {
            let bounded = |&cache: &Cache| Ok(Bounded { cache, accuracy: accuracy(Some(cache))? });
            run.bounded = self.models.caches.iter().map(bounded).collect::<Result<_, Error>>()?;
        }
        run.seconds = start.elapsed().as_secs_f64();
        run.device = format!("{}, {}, {} threads", ctx.device(), ctx.dtype(), ctx.threads().len());
        Ok(())
    }
}
