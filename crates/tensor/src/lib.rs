//! Device memory, dtypes, the CPU thread pool and matrix products: everything below the operations.
//!
//! This crate knows nothing of models. Its one central type is [`Context`]: the device that work runs on, its
//! memory pool and its threads. All higher crates get memory and parallelism from a `Context` and from nowhere
//! else, which is what makes the memory forecast ([`Context::forecast`]) and a second device possible.

pub mod bench;
mod buf;
mod codes;
mod context;
pub mod cuda;
mod dtype;
pub mod gemm;
pub mod math;
mod matrix;
pub mod memory;
pub mod packed;
mod pages;
mod quant;
mod recorded;
mod rows;
pub mod simd;
mod threads;

pub use buf::{Buf, MemoryStats};
pub use codes::Code;
pub use context::{Context, Device};
pub use dtype::{DType, WeightType};
pub use matrix::{CodedPlaces, DeviceMatrix};
pub use packed::Packed;
pub use recorded::{Pass, Recorded};
pub use rows::{GrowingRows, Guard};
pub use threads::{DisjointMut, ThreadPool};

/// What can go wrong below the operations.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The requested device does not exist or this build cannot use it.
    #[error("device {0} is not available: {1}")]
    Device(String, String),
    /// A device or dtype name that is not one of the known ones.
    #[error("{0}")]
    Parse(String),
}
