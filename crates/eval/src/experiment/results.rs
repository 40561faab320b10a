//! What an experiment found, and the file that keeps it.

use super::{Accuracy, Kind};
use crate::Error;
use anser_formats::write_atomic;
use anser_model::Cache;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Write;
use std::path::Path;

fn json(value: &impl Serialize) -> Result<serde_json::Value, Error> {
    // Through text, as it will be read again.
    let text = serde_json::to_string(value);
    text.and_then(|t| serde_json::from_str(&t)).map_err(|e| Error::Input(e.to_string()))
}

/// What is in a file of results.
#[derive(Serialize, Deserialize)]
pub(crate) struct Results<R> {
    experiment: serde_json::Value,
    pub(crate) runs: Vec<R>,
}

impl<R: Serialize + DeserializeOwned> Results<R> {
    /// The results that `out` has of an experiment, none if there is no such file.
    pub(crate) fn open(experiment: &impl Serialize, out: Option<&Path>) -> Result<Results<R>, Error> {
        let mut results = Results { experiment: json(experiment)?, runs: Vec::new() };
        if let Some(path) = out.filter(|p| p.exists()) {
            let bad = |why: String| Error::Input(format!("{}: {why}; name another file", path.display()));
            let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
            let old: Results<R> = serde_json::from_str(&text).map_err(|e| bad(format!("no results: {e}")))?;
            if old.experiment != results.experiment {
                return Err(bad("it holds the results of another experiment: name another file with --out".into()));
            }
            results = old;
        }
        // What cannot be written is said before the work.
        results.save(out)?;
        Ok(results)
    }

    pub(crate) fn save(&self, out: Option<&Path>) -> Result<(), Error> {
        let Some(path) = out else { return Ok(()) };
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::Input(e.to_string()))?;
        Ok(write_atomic(path, |f| f.write_all(text.as_bytes())).map_err(anser_train::Error::from)?)
    }
}

/// One trained and tested model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Name of the task.
    pub task: String,
    /// Kind of model.
    pub kind: Kind,
    /// Layers.
    pub layers: usize,
    /// Width.
    pub width: usize,
    /// Parameters.
    pub parameters: usize,
    /// Learning rate after the warm-up.
    pub lr: f64,
    /// Seed of weights and rows.
    pub seed: u64,
    /// Steps trained.
    pub steps: u64,
    /// Mean loss of the last 100 steps, nats an answer.
    pub loss: f64,
    /// Seconds of training and testing.
    pub seconds: f64,
    /// Device, type of activations, threads.
    pub device: String,
    /// Why training ended early, if it diverged: the model tested is that of the last good step.
    pub error: Option<String>,
    /// (step, share of right answers on a few rows of the trained length).
    pub curve: Vec<(u64, f64)>,
    /// The test at the end.
    pub accuracy: Vec<Accuracy>,
    /// The same test with each bound of [`super::Models::caches`], for hybrids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bounded: Vec<Bounded>,
}

/// A test with a bound on what attention keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bounded {
    /// The bound.
    pub cache: Cache,
    /// What [`Run::accuracy`] has without one.
    pub accuracy: Vec<Accuracy>,
}

impl Default for Run {
    fn default() -> Run {
        Run {
            task: String::new(),
            kind: Kind::Rwkv7,
            layers: 0,
            width: 0,
            parameters: 0,
            lr: 0.0,
            seed: 0,
            steps: 0,
            loss: f64::NAN,
            seconds: 0.0,
            device: String::new(),
            error: None,
            curve: Vec::new(),
            accuracy: Vec::new(),
            bounded: Vec::new(),
        }
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Run { task, kind, layers, width, lr, seed, .. } = self;
        write!(f, "{task} {kind} L{layers} D{width} lr {lr} seed {seed}")
    }
}

impl Run {
    /// Whether both train the same model in the same way.
    pub(super) fn same(&self, o: &Run) -> bool {
        self.model() == o.model() && self.task == o.task && self.lr == o.lr && self.seed == o.seed
    }

    /// Which model it is.
    pub fn model(&self) -> (Kind, usize, usize) {
        (self.kind, self.layers, self.width)
    }

    /// The test with a bound on what attention keeps, or without one.
    pub fn test(&self, bound: Option<Cache>) -> Option<&[Accuracy]> {
        match bound {
            None => Some(&self.accuracy),
            Some(cache) => self.bounded.iter().find(|b| b.cache == cache).map(|b| &b.accuracy[..]),
        }
    }

    /// The test of `answers` answers.
    pub fn at(&self, answers: usize) -> Option<&Accuracy> {
        self.accuracy.iter().find(|a| a.answers == answers)
    }
}

/// Of the runs that differ in learning rate and seed only the one with the lowest training loss, in the order of the first. One
/// that diverged is the last choice.
pub fn best(runs: &[Run]) -> Vec<&Run> {
    let better = |a: &Run, b: &Run| (a.error.is_some(), a.loss) < (b.error.is_some(), b.loss);
    let mut best: Vec<&Run> = Vec::new();
    for run in runs {
        match best.iter_mut().find(|b| b.model() == run.model() && b.task == run.task) {
            Some(b) if better(run, b) => *b = run,
            Some(_) => {}
            None => best.push(run),
        }
    }
    best
}
