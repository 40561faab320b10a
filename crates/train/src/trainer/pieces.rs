//! Rows of a batch, cut into pieces in time.

use anser_data::Batch;
use anser_model::{Config, State};
use anser_ops::Segment;
use anser_tensor::Context;
use std::sync::Arc;

/// The same time range of all rows of a batch.
pub(super) struct Piece {
    pub(super) tokens: Vec<u32>,
    pub(super) targets: Vec<i32>,
    /// Losses of the targets with a short context, or nothing.
    pub(super) short: Vec<Option<f32>>,
    pub(super) segments: Arc<[Segment]>,
}

impl Piece {
    /// Whether there is a target whose weight is not 1.
    pub(super) fn is_weighted(&self) -> bool {
        self.short.iter().any(Option::is_some)
    }

    /// Targets that are not ignored.
    pub(super) fn counted(&self) -> usize {
        self.targets.iter().filter(|t| **t >= 0).count()
    }

    /// The sum of the targets' weights, those apart that are ignored.
    pub(super) fn sum(&self, weights: &[f32]) -> f64 {
        weights.iter().zip(&self.targets).filter(|(_, t)| **t >= 0).map(|(w, _)| f64::from(*w)).sum()
    }
}

/// The pieces of a batch, in time.
pub(super) struct Pieces {
    rows: usize,
    pub(super) all: Vec<Piece>,
}

impl Pieces {
    /// Cuts rows of `ctx` tokens into pieces of `len`, with the losses that their targets have with a short context, if there are any. Where
    /// a sequence goes on from one piece to the next, its state does so in the slot with the number of the row.
    pub(super) fn new(b: &Batch, short: &[Option<f32>], ctx: usize, len: usize) -> Pieces {
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
        let all = (0..ctx).step_by(len).map(cut).filter(|p| !p.tokens.is_empty()).collect();
        Pieces { rows, all }
    }

    /// Takes the segments of the batch before where they are the same, and leaves its own to the next. The same again are the same key for
    /// tables on a GPU ([`Context::table`]), so that a step makes none.
    pub(super) fn share(&mut self, before: &mut Vec<Arc<[Segment]>>) {
        for p in &mut self.all {
            if let Some(same) = before.iter().find(|s| **s == p.segments) {
                p.segments = same.clone();
            }
        }
        *before = self.all.iter().map(|p| p.segments.clone()).collect();
    }

    /// The state that the first piece starts from.
    pub(super) fn state(&self, ctx: &Context, config: &Config) -> State {
        let slots = if self.all.len() > 1 { self.rows } else { 0 };
        State::zeros(ctx, config, slots)
    }
}
