//! LongCE (Fang et al., arXiv 2410.23771, section 4): targets that only a long context explains count for more.
//!
//! With the loss l_full(t) of the target at position t of a document given all that comes before, and l_short(t) given little of it,
//!
//! ```text
//! w_t = min(exp(l_short(t) - l_full(t)), gamma)    loss = sum_t w_t l_full(t) / number of targets
//! ```
//!
//! where no gradient flows through w_t. Short contexts are windows that begin from an empty state, which is also what an RWKV layer
//! without its past is: window i begins at position s_i = from - context + i stride and gives l_short of the `stride` targets from position
//! s_i + context on, so that a target is predicted from context + 1 to context + stride tokens. Weights are 1 before `from`, and in a window that
//! begins where the document does, since there the short context is the whole one. No window leaves its document.
//!
//! Cost of a step on top of one of cross entropy, which is 3 forward passes: those over the windows, (context + stride) / stride for every token
//! from `from` on, without gradients; and the head once more, as l_full is that of the hidden vectors of the training pass itself. Weights that
//! are divided by their mean must be known before the first gradient: one more forward pass.

use crate::Error;
use anser_data::Batch;
use anser_model::{Model, State};
use anser_ops::{CrossEntropy, Segment, Tape, Var, batch};
use anser_tensor::Context;
use std::ops::Range;
use std::sync::Arc;

/// Which targets are weighted, and how much at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LongCe {
    /// Tokens of a short context at least.
    pub context: usize,
    /// Targets that share a window, at least 1.
    pub stride: usize,
    /// Position in its document of the first target that is weighted, at least `context`.
    pub from: usize,
    /// Largest weight.
    pub gamma: f64,
    /// Whether weights are divided by their mean over the targets of the global batch, so that the loss keeps its scale.
    pub normalise: bool,
}

/// No divisor, no L2Wrap: losses of single targets are wanted.
const EACH: CrossEntropy = CrossEntropy { divisor: 1.0, l2wrap: false };

impl LongCe {
    /// Positions where windows begin in a document of `len` tokens.
    fn starts(&self, len: usize) -> impl Iterator<Item = usize> {
        let first = if self.from > self.context { self.from - self.context } else { self.stride };
        (first..len.saturating_sub(self.context)).step_by(self.stride)
    }

    /// Tokens of a window in rows of `ctx` tokens; `None` if there is no window.
    fn len(&self, ctx: usize) -> Option<usize> {
        Some((self.context + self.stride).min(ctx - self.starts(ctx).next()?))
    }

    /// Whether any target of a document of `ctx` tokens is weighted.
    pub fn reaches(&self, ctx: usize) -> bool {
        self.len(ctx).is_some()
    }

    /// Forward passes over rows of `ctx` tokens that a step takes on top of those of cross entropy.
    pub fn passes(&self, ctx: usize) -> f64 {
        let windows = self.starts(ctx).count() * self.len(ctx).unwrap_or(0);
        windows as f64 / ctx as f64 + f64::from(u8::from(self.normalise))
    }

    /// The loss of every target of a batch of rows of `ctx` tokens given a short context; `None` where its weight is 1. About `most` tokens
    /// are computed at a time, in one shape whatever the documents, so that memory is reused; its segments, too, are those of the call before.
    pub(crate) fn short_losses(
        &self, device: &Context, model: &Model, b: &Batch, ctx: usize, most: usize, segments: &mut Arc<[Segment]>,
    ) -> Result<Vec<Option<f32>>, Error> {
        let mut short = vec![None; b.tokens.len()];
        let Some(len) = self.len(ctx) else { return Ok(short) };
        let ends = b.starts[1..].iter().copied().chain([b.tokens.len()]);
        let documents = b.starts.iter().zip(ends);
        let window = |s: usize, end: usize| s..(s + len).min(end);
        let mut windows: Vec<Range<usize>> =
            documents.flat_map(|(&start, end)| self.starts(end - start).map(move |s| window(start + s, end))).collect();
        windows.retain(|w| b.targets[w.start + self.context..w.end].iter().any(|t| *t >= 0));

        // As many at a time as share those of whole rows evenly; what the last ones leave free is computed and not looked at.
        let whole = b.len(ctx) * self.starts(ctx).count();
        let together = whole.div_ceil(whole.div_ceil((most / len).max(1)).max(1));
        let wanted = batch(together, len, false);
        if segments[..] != wanted {
            *segments = wanted.into();
        }
        let scored = len - self.context;
        for group in windows.chunks(together) {
            let (mut tokens, mut targets) = (vec![0; together * len], vec![-1; together * scored]);
            for (i, w) in group.iter().enumerate() {
                tokens[i * len..][..w.len()].copy_from_slice(&b.tokens[w.clone()]);
                targets[i * scored..][..w.len() - self.context]
                    .copy_from_slice(&b.targets[w.start + self.context..w.end]);
            }
            let mut tape = Tape::inference(device, model.params());
            let empty = State::zeros(device, model.config(), 0);
            let (hidden, _) = model.forward(&mut tape, &tokens, segments, &empty, false)?;
            // The head is for the ends of the windows alone.
            let c = hidden.cols();
            let mut last = device.alloc(together * scored * c);
            for i in 0..together {
                last.write_part(i * scored * c, hidden.buf(), (i * len + self.context) * c, scored * c);
            }
            drop(hidden);
            let last = Var::constant(together * scored, c, last);
            let losses = model.loss(&mut tape, &last, &targets, None, EACH).per_token();
            for (i, w) in group.iter().enumerate() {
                let to = w.start + self.context..w.end;
                let of_window = to.clone().zip(losses.iter().skip(i * scored));
                of_window.filter(|(t, _)| b.targets[*t] >= 0).for_each(|(t, &loss)| short[t] = Some(loss));
            }
        }
        Ok(short)
    }

    /// Weights of targets, from their hidden vectors with the whole context and their losses with a short one.
    pub(crate) fn weights(
        &self, device: &Context, model: &Model, hidden: &Var, targets: &[i32], short: &[Option<f32>],
    ) -> Vec<f32> {
        let mut tape = Tape::inference(device, model.params());
        let full = model.loss(&mut tape, &hidden.without_grad(), targets, None, EACH).per_token();
        let ratio = |short: f32, full: f32| (f64::from(short) - f64::from(full)).exp().min(self.gamma) as f32;
        // There are no losses in a forecast.
        let full = full.into_iter().chain(std::iter::repeat(0.0));
        short.iter().zip(full).map(|(short, full)| short.map_or(1.0, |s| ratio(s, full))).collect()
    }
}
