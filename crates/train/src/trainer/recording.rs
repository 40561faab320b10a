//! Steps that a GPU does again and again: recorded once, then launched as one piece of work.

use super::gradients::{Found, Work};
use super::{Bptt, Settings, Trainer};
use crate::Error;
use anser_ops::{Loss, Recompute, Segment};
use anser_tensor::{Pass, Recorded};
use std::sync::Arc;

/// What is known for recording steps.
#[derive(Default)]
pub(super) struct Recording {
    /// Whether steps are recorded.
    wanted: bool,
    /// The last step's shape.
    shape: Option<Shape>,
    /// What was recorded, or is going to be, with the losses that it fills.
    recorded: Option<(Recorded, Arc<Vec<Loss>>)>,
}

/// What steps have in common that are the same work on other tokens.
#[derive(PartialEq)]
struct Shape {
    /// Of each piece: tokens, targets that count, sequences.
    pieces: Vec<(usize, usize, Arc<[Segment]>)>,
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

impl Trainer {
    /// Whether, on a GPU, steps like the one before are recorded and launched as one piece of work, with the same results to the bit: faster where
    /// kernels are so short that launching them takes longer. It takes the activations' memory for as long as it is on. Not with
    /// [`LongCe`](crate::LongCe), nor where rows are cut into pieces.
    pub fn record_steps(&mut self, record: bool) {
        self.recording = Recording { wanted: record, ..Recording::default() };
    }

    /// Whether the last step was launched as one.
    pub fn is_recorded(&self) -> bool {
        self.recording.recorded.as_ref().is_some_and(|(recorded, _)| recorded.is_recorded())
    }

    /// The gradients of a step, by recorded work where that is wanted and possible.
    pub(super) fn gradients(&mut self, work: &Work) -> Result<Found, Error> {
        if let Some((mut recorded, mut losses)) = self.again(work) {
            let found = match recorded.run(|ctx| self.back_propagate(ctx, work))? {
                Pass::Done(found) => Some(found),
                Pass::Recorded(found) => {
                    losses = found.losses.clone();
                    Some(found)
                }
                Pass::Again => Some(Found { losses: losses.clone(), weight: work.targets }),
                Pass::Impossible => None,
            };
            if let Some(found) = found {
                self.recording.recorded = Some((recorded, losses));
                return Ok(found);
            }
            self.recording.wanted = false;
        }
        let ctx = self.ctx.clone();
        self.back_propagate(&ctx, work)
    }

    /// What was recorded, or is going to be, of a step like the one before; it is put back when it went well.
    fn again(&mut self, work: &Work) -> Option<(Recorded, Arc<Vec<Loss>>)> {
        let Settings { ctx, l2wrap, checkpointing, recompute, bptt, long_ce, .. } = self.settings;
        let recording = &mut self.recording;
        if !recording.wanted || bptt != Bptt::Whole || long_ce.is_some() {
            return None;
        }
        let pieces = work.micro.iter().flat_map(|m| &m.all);
        let shape = Shape {
            pieces: pieces.map(|p| (p.tokens.len(), p.counted(), p.segments.clone())).collect(),
            settings: (ctx, l2wrap, checkpointing, recompute),
            layout: Layout(self.model.params().layout().clone()),
        };
        let recorded = recording.recorded.take();
        if recording.shape.as_ref() != Some(&shape) {
            recording.shape = Some(shape);
            return None;
        }
        recorded.or_else(|| {
            let new = Recorded::new(&self.ctx)?;
            // Steps take their memory there from now on.
            self.ctx.trim();
            Some((new, Arc::default()))
        })
    }
}
