//! From text to batches: the bundled corpus, the official sample order, held-out data.

pub mod bundled;
mod order;
mod stream;

pub use order::Official;
pub use stream::{Batch, TokenStream};

/// What can be wrong with data.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Not enough tokens for one sample.
    #[error("the data has {tokens} tokens, too few for samples of {ctx} + 1: give more text or a shorter context")]
    TooShort {
        /// Tokens there are.
        tokens: usize,
        /// Context length.
        ctx: usize,
    },
}
