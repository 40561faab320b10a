//! The function, the bias and its gradient of a low-rank map on a GPU.

use super::Activation;
use crate::gpu::{channels, int, kernel, runs, size};
use anser_tensor::cuda::{Cuda, Module};
use anser_tensor::{Buf, Context};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

fn kind(a: Activation) -> Option<usize> {
    match a {
        Activation::Identity => None,
        Activation::Tanh => Some(1),
        Activation::Sigmoid => Some(2),
    }
}

pub(super) fn apply(ctx: &Context, gpu: &Cuda, a: Activation, h: &Buf) {
    let Some(kind) = kind(a) else { return };
    let (grid, block) = gpu.walk(h.len());
    gpu.launch(&KERNELS, &kernel(ctx, "activate"), grid, block, &[h.ptr().into(), int(kind), size(h.len())]);
}

pub(super) fn scale_by_derivative(ctx: &Context, gpu: &Cuda, a: Activation, h: &Buf, d: &Buf) {
    let Some(kind) = kind(a) else { return };
    let (grid, block) = gpu.walk(h.len());
    let args = [h.ptr().into(), d.ptr().into(), int(kind), size(h.len())];
    gpu.launch(&KERNELS, &kernel(ctx, "activate_back"), grid, block, &args);
}

/// Room for the partial sums of a bias gradient.
pub(super) fn bias_parts(ctx: &Context, dy: &Buf, c: usize) -> Buf {
    ctx.alloc_f32(runs(dy.len() / c, 1).1 * c)
}

pub(super) fn sum_bias_grad(ctx: &Context, gpu: &Cuda, dy: &Buf, parts: &Buf, c: usize) {
    let (run, count) = runs(dy.len() / c, 1);
    let (threads, blocks) = channels(c);
    let args = [dy.ptr().into(), parts.ptr().into(), int(dy.len() / c), int(c), int(run)];
    gpu.launch(&KERNELS, &kernel(ctx, "column_sums"), [count, blocks, 1], [threads, 1, 1], &args);
}
