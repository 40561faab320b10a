//! Training: the official optimiser groups, schedule and clipping; the loop, its checkpoints and its figures.

mod optim;
mod schedule;
mod trajectory;

pub use optim::{AdamW, Hyper, clip, grad_norm};
pub use schedule::Schedule;
pub use trajectory::{Trajectory, trajectory};
