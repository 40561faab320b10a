//! What a run writes down as it goes: `metrics.jsonl`, which the loss curve is drawn from, and TensorBoard's file.

use super::events::Events;
use crate::{Error, RunConfig, StepInfo};
use anser_formats::write_atomic;
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

/// The log of a run.
pub(super) struct Log {
    path: PathBuf,
    lines: File,
    events: Events,
    /// Whether targets have weights.
    weighted: bool,
}

/// Points (step, loss) of a curve.
pub(super) type Curve = Vec<(u64, f64)>;

impl Log {
    /// Goes on with the lines of the steps before `step`.
    ///
    /// # Errors
    /// When writing fails.
    pub(super) fn open(config: &RunConfig, step: u64) -> Result<Log, Error> {
        let folder = &config.output.folder;
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
        let events = Events::create(folder, step == 0).map_err(io)?;
        Ok(Log { path, lines, events, weighted: config.train.long_ce().is_some() })
    }

    /// Adds a step, with its speed: tokens a second, and share of the machine's peak.
    ///
    /// # Errors
    /// When writing fails.
    pub(super) fn step(&mut self, info: &StepInfo, speed: f64, mfu: f64) -> Result<(), Error> {
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
        if self.weighted {
            line["mean_weight"] = json!(info.mean_weight);
            scalars.push(("loss/mean_weight", info.mean_weight));
        }
        self.add(info.step, &line, &scalars)
    }

    /// Adds a held-out loss after `step` steps.
    ///
    /// # Errors
    /// When writing fails.
    pub(super) fn held_out(&mut self, step: u64, loss: f64) -> Result<(), Error> {
        self.add(step, &json!({ "step": step, "held_out_loss": loss }), &[("loss/held_out", loss)])
    }

    fn add(&mut self, step: u64, line: &Value, scalars: &[(&str, f64)]) -> Result<(), Error> {
        let written = writeln!(self.lines, "{line}").and_then(|()| self.events.scalars(step, scalars));
        written.map_err(|e| Error::Io(self.path.display().to_string(), e))
    }

    /// The training and held-out curves, the sessions before included.
    ///
    /// # Errors
    /// When reading fails.
    pub(super) fn curves(&self) -> Result<(Curve, Curve), Error> {
        let text = fs::read_to_string(&self.path).map_err(|e| Error::Io(self.path.display().to_string(), e))?;
        let values: Vec<Value> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
        let curve =
            |key: &str| values.iter().filter_map(|v| Some((v["step"].as_u64()?, v.get(key)?.as_f64()?))).collect();
        Ok((curve("loss"), curve("held_out_loss")))
    }
}
