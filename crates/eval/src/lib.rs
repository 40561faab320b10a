//! Benchmarks, experiments and comparisons: what is run to find out whether the rest is right and fast.

pub mod debug;

/// What can go wrong in an experiment.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Input that isn't what the experiment takes.
    #[error("{0}")]
    Input(String),
    /// From the model or its checkpoint.
    #[error(transparent)]
    Model(#[from] anser_model::Error),
}
