//! Running a model: the engine, sampling, state files, and sessions for those who want the logits of one sequence.

pub mod chat;
mod decoder;
pub mod engine;
mod initial;
mod lookup;
mod sampler;
mod session;
mod state_file;
mod text;

pub use decoder::Decoder;
pub use engine::{Engine, EngineOptions, SavedState};
pub use initial::InitialState;
pub use sampler::{Sampler, SamplerOrder, Sampling};
pub use session::Session;
pub use text::{Cut, TextStream};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// From the device.
    #[error(transparent)]
    Device(#[from] anser_tensor::Error),
    /// A sampling option outside its range.
    #[error("{0}")]
    Sampling(String),
    /// The model gave logits that are not numbers.
    #[error("the model's logits are not finite: the weights are damaged or the training run diverged")]
    NotFinite,
    /// Nothing was fed yet.
    #[error("the session has no prediction yet: feed at least one token")]
    Empty,
    /// A state file that doesn't belong to the model.
    #[error("state file: {0}")]
    State(String),
    /// A request that the engine didn't take.
    #[error(transparent)]
    Refused(#[from] engine::Refused),
    /// Why an answer of the engine failed.
    #[error("{0}")]
    Answer(String),
    /// From the model.
    #[error(transparent)]
    Model(#[from] anser_model::Error),
    /// From reading or writing a file.
    #[error(transparent)]
    Format(#[from] anser_formats::Error),
}
