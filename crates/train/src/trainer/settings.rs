//! What a trainer does at each step.

use crate::{Hyper, LongCe, Schedule};
use anser_ops::Recompute;

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

impl Settings {
    /// Tokens of a row that are computed at once.
    pub(crate) fn piece(&self) -> usize {
        match self.bptt {
            Bptt::Whole => self.ctx,
            Bptt::Exact(n) | Bptt::Truncated(n) => n.clamp(1, self.ctx),
        }
    }
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
