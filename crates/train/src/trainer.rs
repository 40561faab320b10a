use crate::{AdamW, Error, GradNorm, Hyper, LongCe, Schedule};
use anser_data::Batch;
use anser_formats::{Checkpoint, Dtype, Source, write_safetensors};
use anser_model::{Config, Load, Model, State};
use anser_ops::{CrossEntropy, Loss, Recompute, Segment, Tape, Written, batch};
use anser_tensor::{Buf, Context, DType, Pass, Recorded};
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a run does at each step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Tokens of a row.
    pub ctx: usize,
    /// Learning rate.
    pub schedule: Schedule,
    /// Optimiser.
    pub hyper: Hyper,
    /// Largest gradient norm (0: no limit).
    pub grad_clip: f64,
    /// Whether gradients have the L2Wrap term.
    pub l2wrap: bool,
    /// Whether blocks are computed again going back, to save memory.
    pub checkpointing: bool,
    /// What is computed again going back where blocks are not.
    pub recompute: Recompute,
    /// How far gradients go back along a row.
    pub bptt: Bptt,
    /// Weights of targets; `None`: all count the same.
    pub long_ce: Option<LongCe>,
}

/// Back-propagation through time along a row of `ctx` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bptt {
    /// The row at once.
    Whole,
    /// The same gradients in the memory of a piece of so many tokens: the pieces run once to find the states between
    /// them, then again from the last to the first, each getting the gradient of its final state from the next one.
    Exact(usize),
    /// Pieces of so many tokens; the state goes on from piece to piece, the gradient doesn't.
    Truncated(usize),
}

impl Bptt {
    fn piece(self, ctx: usize) -> usize {
        match self {
            Bptt::Whole => ctx,
            Bptt::Exact(n) | Bptt::Truncated(n) => n.clamp(1, ctx),
        }
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepInfo {
    /// Number of the step, from 0.
    pub step: u64,
    /// Mean cross entropy before it, nats a token, whatever the weights of targets.
    pub loss: f64,
    /// Mean weight of the targets before it is made 1: see [`LongCe`], 1 without.
    pub mean_weight: f64,
    /// Learning rate of the 1x groups.
    pub lr: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
}

/// A model in training: parameters, moments and the step number, which together are all there is to resume.
pub struct Trainer {
    ctx: Context,
    model: Model,
    adam: AdamW,
    grads: Buf,
    /// Of the micro-batch before: the same again are the same key for tables on a GPU ([`Context::table`]), so that a step makes none.
    segments: Vec<Arc<[Segment]>>,
    /// The same of windows ([`LongCe`]).
    windows: Arc<[Segment]>,
    settings: Settings,
    metadata: BTreeMap<String, String>,
    /// Whether steps are recorded, the last step's shape, and what was recorded with the losses that it fills.
    record: bool,
    shape: Option<Shape>,
    recorded: Option<(Recorded, Vec<Loss>)>,
}

/// What steps have in common that are the same work on other tokens.
#[derive(PartialEq)]
struct Shape {
    /// Of each micro-batch: tokens, targets that count, beginnings of sequences.
    micro: Vec<(usize, usize, Vec<usize>)>,
    settings: (usize, bool, bool, Recompute),
    layout: Layout,
}

/// The parameters' layout, which is the same or another.
struct Layout(Arc<()>);

impl PartialEq for Layout {
    fn eq(&self, other: &Layout) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Rows of a batch that are evaluated at a time.
const EVALUATED: usize = 8;

/// The same time range of all rows of a batch.
struct Piece {
    tokens: Vec<u32>,
    targets: Vec<i32>,
    /// Losses with a short context.
    short: Vec<Option<f32>>,
    segments: Arc<[Segment]>,
}

/// Cuts rows of `ctx` tokens into pieces of `len`, with the losses that their targets have with a short context, if there are any. Where
/// a sequence goes on from one piece to the next, its state does so in the slot with the number of the row.
fn pieces(b: &Batch, short: &[Option<f32>], ctx: usize, len: usize) -> Vec<Piece> {
    let rows = b.len(ctx);
    let cut = |from: usize| {
        let to = (from + len).min(ctx);
        let (mut tokens, mut targets, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        let mut losses = Vec::new();
        for row in 0..rows {
            let range = row * ctx + from..row * ctx + to;
            // Beginnings of sequences inside the piece; what comes before the first goes on from the piece before.
            let first = b.starts.partition_point(|&s| s < range.start);
            let inside: Vec<usize> =
                b.starts[first..].iter().copied().take_while(|&s| s < range.end).map(|s| s - range.start).collect();
            let mut bounds = inside.clone();
            if bounds.first() != Some(&0) {
                bounds.insert(0, 0);
            }
            bounds.push(range.len());
            for (i, w) in bounds.windows(2).enumerate() {
                let goes_on = w[1] == range.len() && to < ctx;
                segments.push(Segment {
                    start: tokens.len() + w[0],
                    len: w[1] - w[0],
                    state_in: (i == 0 && inside.first() != Some(&0)).then_some(row),
                    state_out: goes_on.then_some(row),
                });
            }
            tokens.extend_from_slice(&b.tokens[range.clone()]);
            losses.extend_from_slice(short.get(range.clone()).unwrap_or_default());
            targets.extend_from_slice(&b.targets[range]);
        }
        Piece { tokens, targets, short: losses, segments: segments.into() }
    };
    (0..ctx).step_by(len).map(cut).filter(|p| !p.tokens.is_empty()).collect()
}

/// The sum of weights over the targets that are not ignored.
fn of_targets(weights: &[f32], targets: &[i32]) -> f64 {
    weights.iter().zip(targets).filter(|(_, t)| **t >= 0).map(|(w, _)| f64::from(*w)).sum()
}

const STEP: &str = "anser.step";
const FORMAT: &str = "anser.checkpoint";

impl Trainer {
    /// Starts training `model`.
    pub fn new(ctx: &Context, mut model: Model, settings: Settings) -> Trainer {
        model.params_mut().to_device(ctx);
        let n = model.params().values().len();
        Trainer {
            ctx: ctx.clone(),
            model,
            adam: AdamW::new(ctx, n),
            grads: ctx.zeros_f32(n),
            segments: Vec::new(),
            windows: Arc::new([]),
            settings,
            metadata: BTreeMap::new(),
            record: false,
            shape: None,
            recorded: None,
        }
    }

    /// Whether, on a GPU, steps like the one before are recorded and launched as one piece of work, with the same results to the bit: faster where
    /// kernels are so short that launching them takes longer. It takes the activations' memory for as long as it is on. Not with [`LongCe`], nor
    /// where rows are cut into pieces.
    pub fn record_steps(&mut self, record: bool) {
        (self.record, self.shape, self.recorded) = (record, None, None);
    }

    /// Whether the last step was launched as one.
    pub fn is_recorded(&self) -> bool {
        self.recorded.as_ref().is_some_and(|(recorded, _)| recorded.is_recorded())
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Freezes the parameters for which `f` is false and lets the others train.
    pub fn set_trainable(&mut self, f: impl Fn(&str) -> bool) {
        self.model.params_mut().set_trainable(f);
    }

    /// Number of steps done.
    pub fn steps(&self) -> u64 {
        self.adam.steps
    }

    /// The settings; the schedule may be set anew between steps.
    pub fn settings_mut(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// Trains on one global batch, given as micro-batches: the loss is the mean over all their targets that are not ignored.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, or the loss or a gradient is not finite: nothing is changed then.
    pub fn step(&mut self, micro: &[Batch]) -> Result<StepInfo, Error> {
        let targets: usize = micro.iter().flat_map(|b| &b.targets).filter(|t| **t >= 0).count();
        let targets = targets.max(1) as f64;
        let opts = CrossEntropy { divisor: targets, l2wrap: self.settings.l2wrap };
        let mut windows = self.windows.clone();
        let short = |b| self.short_losses(&self.ctx, b, self.settings, &mut windows);
        let short = micro.iter().map(short).collect::<Result<Vec<_>, _>>()?;
        self.windows = windows;
        let factor = match self.settings.long_ce {
            Some(l) if l.normalise && short.iter().flatten().any(Option::is_some) => {
                targets / self.sum_of_weights(l, micro, &short)?.max(f64::MIN_POSITIVE)
            }
            _ => 1.0,
        };
        let mut done = None;
        if let Some(mut recorded) = self.again(micro) {
            match recorded.0.run(|ctx| self.gradients(ctx, micro, &short, factor, opts))? {
                Pass::Done((losses, weight)) => done = Some((Some(losses), weight)),
                Pass::Recorded((losses, weight)) => {
                    recorded.1 = losses;
                    done = Some((None, weight));
                }
                Pass::Again => done = Some((None, targets)),
                Pass::Impossible => self.record = false,
            }
            self.recorded = Some(recorded).filter(|_| done.is_some());
        }
        let (losses, weight) = match done {
            Some(done) => done,
            None => {
                let ctx = self.ctx.clone();
                let (losses, weight) = self.gradients(&ctx, micro, &short, factor, opts)?;
                (Some(losses), weight)
            }
        };
        let (step, settings) = (self.adam.steps, self.settings);
        let lr = settings.schedule.at(step);
        let norm = GradNorm::new(&self.ctx, self.model.params(), &self.grads, settings.grad_clip);
        self.adam.step(&self.ctx, self.model.params_mut(), &self.grads, settings.hyper, lr, &norm);
        // All work is under way; here the device is waited for.
        let (norm, mean_weight) = (norm.norm(), weight / targets);
        let unweighted = if settings.long_ce.is_some() { Loss::unweighted } else { Loss::loss };
        let losses = losses.as_ref().or(self.recorded.as_ref().map(|(_, losses)| losses));
        let loss = losses.into_iter().flatten().map(unweighted).sum::<f64>();
        self.ctx.check()?;
        if !(loss.is_finite() && norm.is_finite()) {
            self.adam.steps = step;
            let grads = self.grads.to_vec();
            let bad = |s: &&anser_model::ParamSpec| grads[s.range.clone()].iter().any(|g| !g.is_finite());
            let what = match self.model.params().specs().iter().find(bad) {
                Some(s) => format!("the gradient of {}", s.name),
                None => "the loss".into(),
            };
            return Err(Error::NotFinite { step, what });
        }
        Ok(StepInfo { step, loss, mean_weight, lr, grad_norm: norm })
    }

    /// What was recorded, or is going to be, of a step like the one before; it is put back when it went well.
    fn again(&mut self, micro: &[Batch]) -> Option<(Recorded, Vec<Loss>)> {
        let Settings { ctx, l2wrap, checkpointing, recompute, bptt, long_ce, .. } = self.settings;
        if !self.record || bptt != Bptt::Whole || long_ce.is_some() {
            return None;
        }
        let counted = |b: &Batch| b.targets.iter().filter(|t| **t >= 0).count();
        let shape = Shape {
            micro: micro.iter().map(|b| (b.tokens.len(), counted(b), b.starts.clone())).collect(),
            settings: (ctx, l2wrap, checkpointing, recompute),
            layout: Layout(self.model.params().layout().clone()),
        };
        let recorded = self.recorded.take();
        if self.shape.as_ref() != Some(&shape) {
            self.shape = Some(shape);
            return None;
        }
        recorded.or_else(|| {
            let new = Recorded::new(&self.ctx)?;
            // Steps take their memory there from now on.
            self.ctx.trim();
            Some((new, Vec::new()))
        })
    }

    /// Enqueues the gradients of a step: its parts of the loss, and the sum of the weights of its targets.
    fn gradients(
        &mut self, ctx: &Context, micro: &[Batch], short: &[Vec<Option<f32>>], factor: f64, opts: CrossEntropy,
    ) -> Result<(Vec<Loss>, f64), Error> {
        // A GPU overwrites them with the first gradients of the step.
        let mut written = ctx.cuda().map(|_| Written::nothing(self.model.params()));
        if written.is_none() {
            self.grads.clear();
        }
        let (mut losses, mut weight) = (Vec::new(), 0.0);
        for (b, short) in micro.iter().zip(short) {
            weight += self.back_propagate(ctx, b, short, factor, opts, written.as_mut(), &mut losses)?;
        }
        if let Some(w) = written {
            w.clear_others(ctx, self.model.params(), &self.grads);
        }
        Ok((losses, weight))
    }

    /// Losses of a micro-batch with a short context, if targets are to be weighted by them.
    fn short_losses(
        &self, ctx: &Context, b: &Batch, settings: Settings, windows: &mut Arc<[Segment]>,
    ) -> Result<Vec<Option<f32>>, Error> {
        let Settings { ctx: t, bptt, long_ce: Some(long_ce), .. } = settings else { return Ok(Vec::new()) };
        long_ce.short_losses(ctx, &self.model, b, t, b.len(t) * bptt.piece(t), windows)
    }

    /// The pieces of a micro-batch, with the segments of the one before where they are the same.
    fn pieces(&self, b: &Batch, short: &[Option<f32>]) -> Vec<Piece> {
        let t = self.settings.ctx;
        let mut pieces = pieces(b, short, t, self.settings.bptt.piece(t));
        for p in &mut pieces {
            if let Some(before) = self.segments.iter().find(|s| **s == p.segments) {
                p.segments = before.clone();
            }
        }
        pieces
    }

    /// The sum of the weights of all targets.
    fn sum_of_weights(&self, long_ce: LongCe, micro: &[Batch], short: &[Vec<Option<f32>>]) -> Result<f64, Error> {
        let mut sum = 0.0;
        for (b, short) in micro.iter().zip(short) {
            let pieces = self.pieces(b, short);
            let slots = if pieces.len() > 1 { b.len(self.settings.ctx) } else { 0 };
            let mut state = State::zeros(&self.ctx, self.model.config(), slots);
            for piece in &pieces {
                let mut tape = Tape::inference(&self.ctx, self.model.params());
                let hidden;
                (hidden, state) = self.model.forward(&mut tape, &piece.tokens, &piece.segments, &state, false)?;
                let weights = long_ce.weights(&self.ctx, &self.model, &hidden, &piece.targets, &piece.short);
                sum += of_targets(&weights, &piece.targets);
            }
        }
        Ok(sum)
    }

    /// Adds the gradients of a micro-batch, and its parts of the loss to `losses`. Targets with a loss in `short` are weighted, all weights
    /// multiplied by `factor`; returns the sum of the weights before that.
    fn back_propagate(
        &mut self, ctx: &Context, b: &Batch, short: &[Option<f32>], factor: f64, opts: CrossEntropy,
        mut written: Option<&mut Written>, losses: &mut Vec<Loss>,
    ) -> Result<f64, Error> {
        let Settings { ctx: t, checkpointing, recompute, bptt, long_ce, .. } = self.settings;
        let pieces = self.pieces(b, short);
        let mut sum = 0.0;
        self.segments = pieces.iter().map(|p| p.segments.clone()).collect();
        let slots = if pieces.len() > 1 { b.len(t) } else { 0 };
        let mut state = State::zeros(ctx, self.model.config(), slots);
        let mut record = |piece: &Piece, state: &State, from_next: Vec<Option<Buf>>| -> Result<State, Error> {
            let tape = Tape::recording(ctx, self.model.params(), &mut self.grads);
            let mut tape = tape.noting(written.as_deref_mut()).recomputing(recompute);
            let (hidden, next) = self.model.forward(&mut tape, &piece.tokens, &piece.segments, state, checkpointing)?;
            let weighted = factor != 1.0 || piece.short.iter().any(Option::is_some);
            let weights = long_ce.filter(|_| weighted).map(|l| {
                let mut weights = l.weights(ctx, &self.model, &hidden, &piece.targets, &piece.short);
                sum += of_targets(&weights, &piece.targets);
                weights.iter_mut().for_each(|w| *w = (f64::from(*w) * factor) as f32);
                weights
            });
            if weights.is_none() {
                sum += piece.targets.iter().filter(|t| **t >= 0).count() as f64;
            }
            losses.push(self.model.loss(&mut tape, &hidden, &piece.targets, weights.as_deref(), opts));
            for (v, g) in next.vars().zip(from_next) {
                g.into_iter().for_each(|g| v.add_grad(g));
            }
            let next = next.constant();
            drop(hidden);
            tape.backward();
            Ok(next)
        };
        if !matches!(bptt, Bptt::Exact(_)) {
            for piece in &pieces {
                state = record(piece, &state, Vec::new())?;
            }
            return Ok(sum);
        }
        let mut states = vec![state];
        for piece in &pieces[..pieces.len().saturating_sub(1)] {
            let mut tape = Tape::inference(ctx, self.model.params());
            let last = &states[states.len() - 1];
            let (_, next) = self.model.forward(&mut tape, &piece.tokens, &piece.segments, last, false)?;
            states.push(next);
        }
        let mut from_next = Vec::new();
        for (piece, state) in pieces.iter().zip(&states).rev() {
            let state = state.detached();
            record(piece, &state, from_next)?;
            from_next = state.vars().map(|v| v.take_grad()).collect();
        }
        Ok(sum)
    }

    /// Mean cross entropy on a batch without training on it.
    ///
    /// # Errors
    /// When a token is outside the vocabulary.
    pub fn evaluate(&self, b: &Batch) -> Result<f64, Error> {
        let t = self.settings.ctx;
        let count = b.targets.iter().filter(|t| **t >= 0).count().max(1) as f64;
        let opts = CrossEntropy { divisor: count, l2wrap: false };
        let mut loss = 0.0;
        for first in (0..b.len(t)).step_by(EVALUATED) {
            for piece in pieces(&b.slice(t, first, first + EVALUATED), &[], t, t) {
                let mut tape = Tape::inference(&self.ctx, self.model.params());
                let state = State::zeros(&self.ctx, self.model.config(), 0);
                let (hidden, _) = self.model.forward(&mut tape, &piece.tokens, &piece.segments, &state, false)?;
                loss += self.model.loss(&mut tape, &hidden, &piece.targets, None, opts).loss();
            }
        }
        Ok(loss)
    }

    /// Bytes that training takes: parameters, gradients and moments, and what a micro-batch of `rows` rows needs on top.
    ///
    /// # Errors
    /// Never for a model that exists; the forward pass checks tokens.
    pub fn forecast(&self, rows: usize) -> Result<usize, Error> {
        self.forecast_with(rows, self.settings)
    }

    /// Chooses what is computed again going back: the least with which micro-batches of `rows` rows fit into `available` bytes, or
    /// all there is. Returns the forecast.
    ///
    /// # Errors
    /// As [`Trainer::forecast`].
    pub fn recompute_to_fit(&mut self, rows: usize, available: Option<u64>) -> Result<usize, Error> {
        let mut needed = 0;
        for recompute in Recompute::LEVELS {
            self.settings.recompute = recompute;
            needed = self.forecast(rows)?;
            if self.settings.checkpointing || available.is_none_or(|a| needed as u64 <= a) {
                break;
            }
        }
        Ok(needed)
    }

    /// [`Trainer::forecast`] with other settings.
    ///
    /// # Errors
    /// As there.
    pub fn forecast_with(&self, rows: usize, settings: Settings) -> Result<usize, Error> {
        let dry = self.ctx.dry();
        let (t, piece) = (settings.ctx, settings.bptt.piece(settings.ctx));
        let n = rows * piece;
        let (zeros, mut windows) = (Batch::rows(vec![0; rows * t], vec![0; rows * t], t), self.windows.clone());
        let short = self.short_losses(&dry, &zeros, settings, &mut windows)?;
        let cut = piece < t;
        let segments = batch(rows, piece, cut).into();
        let mut none = dry.alloc_f32(0);
        let mut tape = Tape::recording(&dry, self.model.params(), &mut none).recomputing(settings.recompute);
        let state = State::zeros(&dry, self.model.config(), if cut { rows } else { 0 });
        let (hidden, _) = self.model.forward(&mut tape, &vec![0; n], &segments, &state, settings.checkpointing)?;
        let opts = CrossEntropy { divisor: 1.0, l2wrap: false };
        let targets = vec![0; n];
        let weights = settings.long_ce.map(|l| l.weights(&dry, &self.model, &hidden, &targets, &short[..n]));
        let _kept = self.model.loss(&mut tape, &hidden, &targets, weights.as_deref(), opts);
        drop(hidden);
        tape.backward();
        // Exact back-propagation keeps the states between the pieces.
        let states = if cut { t.div_ceil(piece) * rows * self.model.config().state_len() * 4 } else { 0 };
        Ok(self.resident() + dry.memory().peak + states)
    }

    /// Bytes of parameters, gradients and moments, which are there already.
    pub fn resident(&self) -> usize {
        let rounded = if self.ctx.dtype() == DType::F32 { 0 } else { self.ctx.dtype().size() };
        (4 * 4 + rounded) * self.grads.len()
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
        let source =
            |s: &anser_model::ParamSpec| Source::new(s.name.as_str(), &s.shape, Dtype::F32, &values[s.range.clone()]);
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
    /// When the checkpoint is of another version.
    pub fn resume(
        ctx: &Context, folder: &Path, settings: Settings, mut warn: impl FnMut(String),
    ) -> Result<Option<Trainer>, Error> {
        for path in checkpoints(folder).iter().rev() {
            match Trainer::load(ctx, path, settings) {
                Ok(t) => return Ok(Some(t)),
                Err(e @ Error::Checkpoint(_)) => return Err(e),
                Err(e) => warn(format!("skipping a damaged checkpoint: {e}")),
            }
        }
        Ok(None)
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

    /// The configuration a model file was trained with.
    pub fn config(&self) -> &Config {
        self.model.config()
    }

    /// Makes `folder` and locks it for this run, for as long as the file lives.
    ///
    /// # Errors
    /// When another run has it, or it cannot be made.
    pub fn lock(folder: &Path) -> Result<File, Error> {
        let io = |e: std::io::Error| Error::Checkpoint(format!("{}: {e}", folder.display()));
        fs::create_dir_all(folder).map_err(io)?;
        let file = File::create(folder.join("lock")).map_err(io)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(Error::Locked(folder.display().to_string())),
            Err(TryLockError::Error(e)) => Err(io(e)),
        }
    }
}

/// Checkpoints of a folder, oldest first.
fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let named = |p: &PathBuf| {
        let name = p.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        name.starts_with("step-") && name.ends_with(".safetensors")
    };
    let mut found: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).filter(named).collect();
    found.sort();
    found
}
