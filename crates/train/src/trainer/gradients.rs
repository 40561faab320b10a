//! The gradients of a step: losses and weights of targets, and the way back through pieces in time.

use super::pieces::{Piece, Pieces};
use super::{Bptt, Settings, Trainer};
use crate::{Error, LongCe};
use anser_data::Batch;
use anser_model::{Model, State};
use anser_ops::{CrossEntropy, Loss, Segment, Tape, Written};
use anser_tensor::{Buf, Context};
use std::sync::Arc;

/// What a step computes the gradients of.
pub(super) struct Work {
    /// Its micro-batches.
    pub(super) micro: Vec<Pieces>,
    /// Targets that are not ignored, at least 1.
    pub(super) targets: f64,
    /// What the weights of targets are multiplied by.
    factor: f64,
    opts: CrossEntropy,
}

/// What the gradients leave beside themselves.
pub(super) struct Found {
    /// Parts of the loss.
    pub(super) losses: Arc<Vec<Loss>>,
    /// The sum of the weights of targets before they are multiplied by a factor.
    pub(super) weight: f64,
}

impl Trainer {
    /// What a step on these micro-batches has to do.
    pub(super) fn work(&mut self, batches: &[Batch]) -> Result<Work, Error> {
        let settings = self.settings;
        let targets = batches.iter().map(Batch::counted).sum::<usize>().max(1) as f64;
        let mut micro = Vec::new();
        for b in batches {
            let short = short_losses(&self.ctx, &self.model, &settings, b, &mut self.windows)?;
            let mut pieces = Pieces::new(b, &short, settings.ctx, settings.piece());
            pieces.share(&mut self.segments);
            micro.push(pieces);
        }
        let factor = match settings.long_ce {
            Some(l) if l.normalise && micro.iter().flat_map(|m| &m.all).any(Piece::is_weighted) => {
                targets / self.sum_of_weights(l, &micro)?.max(f64::MIN_POSITIVE)
            }
            _ => 1.0,
        };
        Ok(Work { micro, targets, factor, opts: CrossEntropy { divisor: targets, l2wrap: settings.l2wrap } })
    }

    /// The sum of the weights of all targets.
    fn sum_of_weights(&self, long_ce: LongCe, micro: &[Pieces]) -> Result<f64, Error> {
        let mut sum = 0.0;
        for pieces in micro {
            let mut state = pieces.state(&self.ctx, self.model.config());
            for piece in &pieces.all {
                let mut tape = Tape::inference(&self.ctx, self.model.params());
                let hidden;
                (hidden, state) = self.model.forward(&mut tape, &piece.tokens, &piece.segments, &state, false)?;
                let weights = long_ce.weights(&self.ctx, &self.model, &hidden, &piece.targets, &piece.short);
                sum += piece.sum(&weights);
            }
        }
        Ok(sum)
    }

    /// Enqueues the gradients of a step.
    pub(super) fn back_propagate(&mut self, ctx: &Context, work: &Work) -> Result<Found, Error> {
        // A GPU overwrites them with the first gradients of the step.
        let written = ctx.cuda().map(|_| Written::nothing(self.model.params()));
        if written.is_none() {
            self.grads.clear();
        }
        let (model, grads, losses) = (&self.model, &mut self.grads, Vec::new());
        let mut back = Back { ctx, model, settings: self.settings, work, grads, written, losses };
        let mut weight = 0.0;
        for pieces in &work.micro {
            weight += back.micro_batch(pieces)?;
        }
        let Back { written, losses, .. } = back;
        if let Some(w) = written {
            w.clear_others(ctx, self.model.params(), &self.grads);
        }
        Ok(Found { losses: losses.into(), weight })
    }
}

/// Losses of a batch with a short context, if targets are to be weighted by them; `windows` are the segments of the call before.
pub(super) fn short_losses(
    ctx: &Context, model: &Model, settings: &Settings, b: &Batch, windows: &mut Arc<[Segment]>,
) -> Result<Vec<Option<f32>>, Error> {
    let Settings { ctx: t, long_ce: Some(long_ce), .. } = *settings else { return Ok(Vec::new()) };
    long_ce.short_losses(ctx, model, b, t, b.len(t) * settings.piece(), windows)
}

/// The gradients of a step in the making.
struct Back<'a> {
    ctx: &'a Context,
    model: &'a Model,
    settings: Settings,
    work: &'a Work,
    grads: &'a mut Buf,
    /// On a GPU, which gradients there are.
    written: Option<Written>,
    losses: Vec<Loss>,
}

impl Back<'_> {
    /// Adds the gradients of a micro-batch and its parts of the loss. Returns the sum of the weights of its targets before they are
    /// multiplied by the factor.
    fn micro_batch(&mut self, pieces: &Pieces) -> Result<f64, Error> {
        let (mut state, mut sum) = (pieces.state(self.ctx, self.model.config()), 0.0);
        if !matches!(self.settings.bptt, Bptt::Exact(_)) {
            for piece in &pieces.all {
                let weight;
                (state, weight) = self.piece(piece, &state, Vec::new())?;
                sum += weight;
            }
            return Ok(sum);
        }
        let mut states = vec![state];
        for piece in &pieces.all[..pieces.all.len().saturating_sub(1)] {
            let mut tape = Tape::inference(self.ctx, self.model.params());
            let last = &states[states.len() - 1];
            let (_, next) = self.model.forward(&mut tape, &piece.tokens, &piece.segments, last, false)?;
            states.push(next);
        }
        let mut from_next = Vec::new();
        for (piece, state) in pieces.all.iter().zip(&states).rev() {
            let state = state.detached();
            let (_, weight) = self.piece(piece, &state, from_next)?;
            sum += weight;
            from_next = state.vars().map(|v| v.take_grad()).collect();
        }
        Ok(sum)
    }

    /// The same of a piece that starts from `state`, given the gradients of the state after it. Returns that state too.
    fn piece(&mut self, piece: &Piece, state: &State, from_next: Vec<Option<Buf>>) -> Result<(State, f64), Error> {
        let (ctx, model, Work { factor, opts, .. }) = (self.ctx, self.model, self.work);
        let Settings { checkpointing, recompute, long_ce, .. } = self.settings;
        let tape = Tape::recording(ctx, model.params(), self.grads);
        let mut tape = tape.noting(self.written.as_mut()).recomputing(recompute);
        let (hidden, next) = model.forward(&mut tape, &piece.tokens, &piece.segments, state, checkpointing)?;
        let mut sum = piece.counted() as f64;
        let weights = long_ce.filter(|_| *factor != 1.0 || piece.is_weighted()).map(|l| {
            let mut weights = l.weights(ctx, model, &hidden, &piece.targets, &piece.short);
            sum = piece.sum(&weights);
            weights.iter_mut().for_each(|w| *w = (f64::from(*w) * factor) as f32);
            weights
        });
        self.losses.push(model.loss(&mut tape, &hidden, &piece.targets, weights.as_deref(), *opts));
        for (v, g) in next.vars().zip(from_next) {
            g.into_iter().for_each(|g| v.add_grad(g));
        }
        let next = next.constant();
        drop(hidden);
        tape.backward();
        Ok((next, sum))
    }
}
