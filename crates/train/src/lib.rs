//! Training: the official optimiser groups, schedule and clipping; the trainer and its checkpoints; whole runs from a
//! configuration file, with metrics, samples and a loss curve.

mod config;
mod long_ce;
mod optim;
mod plot;
mod run;
mod schedule;
mod trainer;
mod trajectory;

pub use anser_ops::Recompute;
pub use config::{BpttMode, DataConfig, ModelConfig, OutputConfig, RecomputeMode, RunConfig, TrainConfig};
pub use long_ce::LongCe;
pub use optim::{AdamW, GradNorm, Hyper};
pub use plot::{Line, chart, heat_map, loss_curve};
pub use run::{Event, Summary, run, write_text};
pub use schedule::Schedule;
pub use trainer::{Bptt, Settings, StepInfo, Trainer};
pub use trajectory::{Trajectory, trajectory};

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// From the device.
    #[error(transparent)]
    Device(#[from] anser_tensor::Error),
    /// A loss or gradient that is not a number.
    #[error("step {step}: {what} is not finite: lower the learning rate; a checkpoint before is good to go on from")]
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
    /// A configuration that is wrong.
    #[error("{0}")]
    Config(String),
    /// More memory needed than there is.
    #[error("the run needs {needed} MB of memory and {available} MB are left: {advice}")]
    Memory {
        /// Megabytes forecast.
        needed: u64,
        /// Megabytes there are.
        available: u64,
        /// What to do.
        advice: String,
    },
    /// The operating system said no.
    #[error("{0}: {1}")]
    Io(String, std::io::Error),
    /// From the data.
    #[error(transparent)]
    Data(#[from] anser_data::Error),
    /// From the tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] anser_tokenizer::Error),
    /// From writing a sample.
    #[error(transparent)]
    Infer(#[from] anser_infer::Error),
    /// From the model.
    #[error(transparent)]
    Model(#[from] anser_model::Error),
    /// From reading or writing a file.
    #[error(transparent)]
    Format(#[from] anser_formats::Error),
}
