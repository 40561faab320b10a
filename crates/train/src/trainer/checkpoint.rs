//! What a trainer leaves in files: models, checkpoints, and the folder that they are in.

use super::{Settings, Trainer};
use crate::Error;
use anser_formats::{Checkpoint, Dtype, Source, write_safetensors};
use anser_model::{Load, Model, ParamSpec};
use anser_tensor::Context;
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

/// Metadata of checkpoints: the number of steps done, and the version of what is in them.
const STEP: &str = "anser.step";
const FORMAT: &str = "anser.checkpoint";

impl Trainer {
    /// Makes `folder` and locks it for this run, for as long as the file lives; what a run that was killed had written half is removed.
    ///
    /// # Errors
    /// When another run has it, or it cannot be made.
    pub fn lock(folder: &Path) -> Result<File, Error> {
        let io = |e: std::io::Error| Error::Checkpoint(format!("{}: {e}", folder.display()));
        fs::create_dir_all(folder).map_err(io)?;
        let file = File::create(folder.join("lock")).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {
                let half = |p: &PathBuf| {
                    p.to_string_lossy().ends_with(".tmp") && p.to_string_lossy().contains(".safetensors.")
                };
                files(folder, half).iter().for_each(|p| drop(fs::remove_file(p)));
                Ok(file)
            }
            Err(TryLockError::WouldBlock) => Err(Error::Locked(folder.display().to_string())),
            Err(TryLockError::Error(e)) => Err(io(e)),
        }
    }

    /// Notes something that is written into the metadata of checkpoints and models, and is there again after [`Trainer::resume`].
    pub fn describe(&mut self, key: &str, value: impl Into<String>) {
        self.metadata.insert(key.into(), value.into());
    }

    /// What was noted under `key`.
    pub fn description(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// Writes the model alone.
    ///
    /// # Errors
    /// When writing fails.
    pub fn save_model(&self, path: &Path) -> Result<(), Error> {
        let values = self.model.params().current();
        Ok(write_safetensors(path, &self.weights(&values), &self.metadata(&[]))?)
    }

    fn weights<'a>(&'a self, values: &'a [f32]) -> Vec<Source<'a>> {
        let p = self.model.params();
        let source = |s: &ParamSpec| Source::new(s.name.as_str(), &s.shape, Dtype::F32, &values[s.range.clone()]);
        p.specs().iter().map(source).collect()
    }

    fn metadata(&self, more: &[(&str, &str)]) -> BTreeMap<String, String> {
        let mut m = self.metadata.clone();
        m.extend([self.model.config().description()]);
        m.extend(more.iter().map(|(k, v)| (k.to_string(), v.to_string())));
        m
    }

    /// Writes `folder/step-N.safetensors`, from which [`Trainer::resume`] goes on to the bit, and removes all but the last `keep`.
    ///
    /// # Errors
    /// When writing fails; the checkpoints before are untouched then.
    pub fn save(&self, folder: &Path, keep: usize) -> Result<PathBuf, Error> {
        let path = folder.join(format!("step-{:09}.safetensors", self.adam.steps));
        let values = self.model.params().current();
        let (m, v) = (self.adam.m.to_vec(), self.adam.v.to_vec());
        self.ctx.check()?;
        let mut sources = self.weights(&values);
        sources.push(Source::new("adam.m", &[m.len()], Dtype::F32, &m));
        sources.push(Source::new("adam.v", &[v.len()], Dtype::F32, &v));
        write_safetensors(&path, &sources, &self.metadata(&[(FORMAT, "1"), (STEP, &self.adam.steps.to_string())]))?;
        for old in checkpoints(folder).iter().rev().skip(keep.max(1)) {
            // One that cannot be removed takes room and does no harm.
            let _ = fs::remove_file(old);
        }
        Ok(path)
    }

    /// Goes on from the newest checkpoint of `folder` that is whole; `None` if there is none. Damaged ones are named to `warn`.
    ///
    /// # Errors
    /// When the checkpoint is of another version, or all are damaged.
    pub fn resume(
        ctx: &Context, folder: &Path, settings: Settings, mut warn: impl FnMut(String),
    ) -> Result<Option<Trainer>, Error> {
        let all = checkpoints(folder);
        for path in all.iter().rev() {
            match Trainer::load(ctx, path, settings) {
                Ok(t) => return Ok(Some(t)),
                Err(e @ Error::Checkpoint(_)) => return Err(e),
                Err(e) => warn(format!("skipping a damaged checkpoint: {e}")),
            }
        }
        match &all[..] {
            [] => Ok(None),
            all => {
                let (folder, n) = (folder.display(), all.len());
                let advice = "remove them to begin anew, or name another folder";
                Err(Error::Checkpoint(format!(
                    "{folder}: none of its checkpoints is whole ({n} of {n} are damaged): {advice}"
                )))
            }
        }
    }

    fn load(ctx: &Context, path: &Path, settings: Settings) -> Result<Trainer, Error> {
        let file = Checkpoint::open(path)?;
        let bad = |what: &str| Error::Checkpoint(format!("{}: {what}", path.display()));
        if file.metadata().get(FORMAT).is_none_or(|v| v != "1") {
            return Err(bad("not a training checkpoint of version 1"));
        }
        let steps = file.metadata().get(STEP).and_then(|s| s.parse().ok());
        let steps = steps.ok_or_else(|| bad("it doesn't say its step"))?;
        let mut t = Trainer::new(ctx, Model::load(ctx, &file, Load::Train)?, settings);
        t.adam.steps = steps;
        t.metadata = file.metadata().clone();
        // What every file says of itself anew.
        [FORMAT, STEP].iter().for_each(|key| drop(t.metadata.remove(*key)));
        for (name, to) in [("adam.m", &mut t.adam.m), ("adam.v", &mut t.adam.v)] {
            let mut values = vec![0.0; to.len()];
            file.get(name).ok_or_else(|| bad("it has no optimiser state"))?.read_f32_into(&mut values)?;
            to.copy_from(&values);
        }
        Ok(t)
    }
}

/// Checkpoints of a folder, oldest first.
fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let named = |p: &PathBuf| {
        let name = p.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        name.starts_with("step-") && name.ends_with(".safetensors")
    };
    files(folder, named)
}

/// Files of a folder, sorted.
fn files(folder: &Path, which: impl FnMut(&PathBuf) -> bool) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).filter(which).collect();
    found.sort();
    found
}
