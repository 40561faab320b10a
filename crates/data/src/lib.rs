//! From text to batches: binidx files and how they are built, the bundled corpus, sample orders, held-out data, and synthetic
//! tasks: digit reversal, products in groups, associative recall, needles in haystacks.

mod binidx;
mod build;
pub mod bundled;
mod dataset;
pub mod digits;
mod documents;
pub mod groups;
pub mod needle;
mod order;
mod random;
pub mod recall;

pub use binidx::{Binidx, BinidxWriter};
pub use build::{Built, build};
pub use dataset::{Batch, Dataset, Options, Order, Tokens};
pub use documents::documents;
pub use order::Official;

use std::path::{Path, PathBuf};

/// What can be wrong with data.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not enough tokens for one sample.
    #[error("the data has {tokens} tokens, too few for samples of {ctx} + 1: give more text or a shorter context")]
    TooShort {
        /// Tokens there are.
        tokens: usize,
        /// Context length.
        ctx: usize,
    },
    /// Nothing at all to build a data set from.
    #[error("the input holds no text: there is nothing to build")]
    Empty,
    /// The operating system said no.
    #[error("{path}: {cause}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        cause: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// From writing a file.
    #[error(transparent)]
    Format(#[from] anser_formats::Error),
}

impl Error {
    fn io(path: &Path, cause: std::io::Error) -> Error {
        Error::Io { path: path.into(), cause }
    }

    fn malformed(path: &Path, reason: impl Into<String>) -> Error {
        Error::Malformed { path: path.into(), reason: reason.into() }
    }
}
