//! The RWKV-7 model and its hybrid with attention, RWKV-X, written once over [`anser_ops`]: the same code trains, prefills and steps; and a
//! Transformer as a control.
//!
//! `time_mix` and `channel_mix` in `rwkv7.rs` read like the equations of the paper (arXiv 2503.14456, section 4).
//! This crate opens no files: it takes named tensors ([`anser_formats::Checkpoint`]) and gives them back.

mod assemble;
mod cache;
mod config;
mod decode;
mod expand;
mod hybrid;
mod init;
mod load;
mod pasts;
mod rwkv7;
mod state;
mod tensors;
mod transformer;

pub use anser_ops::ParamSpec;
pub use cache::{Cache, Eviction};
pub use config::{Architecture, Config, Hybrid, LoraDims, PRESETS};
pub use decode::{DecodeStep, Part};
pub use expand::Expansion;
pub use init::Init;
pub use load::{Load, kept_as};
pub use rwkv7::Model;
pub use state::{AttentionState, LayerState, State};

/// What can be wrong with a model or a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A dimension that no RWKV-7 model can have.
    #[error("model configuration: {0}")]
    Config(String),
    /// A checkpoint that is not a RWKV-7 model.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// A Transformer where a recurrent model is needed.
    #[error(
        "a Transformer reads whole sequences and has no state to go on from: it neither writes text nor trains in pieces"
    )]
    Stateless,
    /// A hybrid that is to be trained in pieces.
    #[error(
        "a hybrid of RWKV-7 and attention trains on whole rows, as no gradient flows to keys and values kept of earlier pieces: set train.bptt = 0"
    )]
    Pieces,
    /// From the device.
    #[error(transparent)]
    Device(#[from] anser_tensor::Error),
    /// A tensor that could not be read.
    #[error(transparent)]
    Format(#[from] anser_formats::Error),
    /// A token that the model has no embedding for.
    #[error(
        "token {token} at position {position} is outside the model's vocabulary of {vocab}: use the tokenizer the model was trained with"
    )]
    Token {
        /// The token.
        token: u32,
        /// Its index in the input.
        position: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
}
