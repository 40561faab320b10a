//! The operations of RWKV-7 and of its controls and hybrids, and the tape that differentiates them.
//!
//! One folder per operation: its formula with shapes, the forward and backward pass side by side, the slow
//! reference and the tests. This crate knows nothing of layers or checkpoints.
//!
//! Sequences are **ragged**: activations are matrices `[tokens, channels]`, and a list of [`Segment`]s says which
//! rows form a sequence and where its recurrent state comes from and goes to. `[B, T]` batches, packed documents,
//! pieces of back-propagation through time and single decoding steps are all this one form.

mod again;
mod gpu;
mod params;
mod rows;
mod segment;
mod tape;
#[cfg(test)]
mod testing;

pub mod add;
pub mod attention;
pub mod choose;
pub mod cross_entropy;
pub mod decode;
pub mod embedding;
pub mod head_gate;
pub mod key_path;
pub mod layer_norm;
pub mod linear;
pub mod low_rank;
pub mod norm_shift;
pub mod read_out;
pub mod relu_squared;
pub mod rotary;
pub mod select;
pub mod token_shift;
pub mod value_residual;

pub mod wkv7;

pub use again::{Kept, Output, Recompute};
pub use params::{Group, Param, ParamSet, ParamSpec};
pub use segment::{Segment, batch};
pub use tape::{Backward, GradSlot, Tape, Var, Written};

pub use cross_entropy::{CrossEntropy, Loss, log_sum_exp};
pub use linear::Weight;
pub use low_rank::{Activation, LowRank};
