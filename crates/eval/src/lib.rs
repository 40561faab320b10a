//! Benchmarks, experiments and comparisons: what is run to find out whether the rest is right and fast.

pub mod bench;
pub mod debug;
pub mod digits;
pub mod experiment;
pub mod flat;
pub mod long;
pub mod needle;
pub mod pairs;
pub mod profile;
pub mod recall;
pub mod states;
pub mod text;

/// What can go wrong in an experiment.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// From the device.
    #[error(transparent)]
    Device(#[from] anser_tensor::Error),
    /// Input that isn't what the experiment takes.
    #[error("{0}")]
    Input(String),
    /// From the model or its checkpoint.
    #[error(transparent)]
    Model(#[from] anser_model::Error),
    /// From training.
    #[error(transparent)]
    Train(#[from] anser_train::Error),
    /// From inference.
    #[error(transparent)]
    Infer(#[from] anser_infer::Error),
}
