//! relu(x)^2 on a GPU.

use crate::gpu::{kernel, size};
use anser_tensor::cuda::{Cuda, Module};
use anser_tensor::{Buf, Context};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// In place.
pub(super) fn forward(ctx: &Context, gpu: &Cuda, x: &Buf) {
    let (grid, block) = gpu.walk(x.len());
    gpu.launch(&KERNELS, &kernel(ctx, "relu_squared"), grid, block, &[x.ptr().into(), size(x.len())]);
}

/// From the output y, in place of its gradient.
pub(super) fn backward(ctx: &Context, gpu: &Cuda, y: &Buf, d: &Buf) {
    let (grid, block) = gpu.walk(y.len());
    gpu.launch(
        &KERNELS,
        &kernel(ctx, "relu_squared_back"),
        grid,
        block,
        &[y.ptr().into(), d.ptr().into(), size(y.len())],
    );
}
