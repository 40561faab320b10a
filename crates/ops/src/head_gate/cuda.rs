//! The gate on a GPU.

use crate::gpu::{int, kernel};
use anser_tensor::cuda::{Arg, Cuda, Module};
use anser_tensor::{Buf, Context};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Of heads of size `n`: x, gate, y.
pub(super) fn forward(ctx: &Context, gpu: &Cuda, of: [&Buf; 3], n: usize) {
    launch(ctx, gpu, "head_gate", &of, n);
}

/// dy, x, gate, dx, dgate.
pub(super) fn backward(ctx: &Context, gpu: &Cuda, of: [&Buf; 5], n: usize) {
    launch(ctx, gpu, "head_gate_back", &of, n);
}

/// A thread for every 8 channels of the first matrix.
fn launch(ctx: &Context, gpu: &Cuda, name: &str, of: &[&Buf], n: usize) {
    let threads = of[0].len() / 8;
    let mut args: Vec<Arg> = of.iter().map(|b| b.ptr().into()).collect();
    args.extend([int(threads), int(n / 8)]);
    gpu.launch(&KERNELS, &kernel(ctx, name), [threads.div_ceil(256), 1, 1], [256, 1, 1], &args);
}
