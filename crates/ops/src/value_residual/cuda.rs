//! Value residual on a GPU.

use crate::gpu::{kernel, size};
use anser_tensor::cuda::{Cuda, Module};
use anser_tensor::{Buf, Context};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

pub(super) fn forward(ctx: &Context, gpu: &Cuda, inputs: [&Buf; 3], y: &Buf) {
    let (grid, block) = gpu.walk(y.len());
    let [v, first, gate] = inputs.map(|b| b.ptr().into());
    gpu.launch(&KERNELS, &kernel(ctx, "value_residual"), grid, block, &[v, first, gate, y.ptr().into(), size(y.len())]);
}

pub(super) fn backward(ctx: &Context, gpu: &Cuda, dy: &Buf, inputs: [&Buf; 3], grads: [&Buf; 3]) {
    let (grid, block) = gpu.walk(dy.len());
    let ([v, first, gate], [a, b, c]) = (inputs.map(|b| b.ptr().into()), grads.map(|b| b.ptr().into()));
    let args = [dy.ptr().into(), v, first, gate, a, b, c, size(dy.len())];
    gpu.launch(&KERNELS, &kernel(ctx, "value_residual_back"), grid, block, &args);
}
