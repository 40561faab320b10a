//! Training: the official optimiser groups, schedule and clipping; the trainer, its checkpoints and its figures.

mod optim;
mod plot;
mod schedule;
mod trainer;
mod trajectory;

pub use optim::{AdamW, Hyper, clip, grad_norm};
pub use plot::loss_curve;
pub use schedule::Schedule;
pub use trainer::{Bptt, Settings, StepInfo, Trainer};
pub use trajectory::{Trajectory, trajectory};

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A loss or gradient that is not a number.
    #[error(
        "step {step}: {what} is not finite; the last checkpoint is good: lower the learning rate and resume from it"
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// The loss, or the gradient of a named tensor.
        what: String,
    },
    /// The folder is in use.
    #[error("{0}: another run is writing here; give this one a folder of its own")]
    Locked(String),
    /// A checkpoint that cannot be resumed from.
    #[error("{0}")]
    Checkpoint(String),
    /// From the model.
    #[error(transparent)]
    Model(#[from] anser_model::Error),
    /// From reading or writing a file.
    #[error(transparent)]
    Format(#[from] anser_formats::Error),
}
