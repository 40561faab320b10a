//! relu(x)^2 on a GPU.

use crate::gpu::{kernel, size};
use anser_tensor::cuda::{Cuda, Module};
use anser_tensor::{Buf, Context};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// `relu_squared` from x to y, or `relu_squared_back` from x and the gradient in place.
pub(super) fn launch(ctx: &Context, gpu: &Cuda, name: &str, x: &Buf, y: &Buf) {
    let (grid, block) = gpu.walk(x.len());
    gpu.launch(&KERNELS, &kernel(ctx, name), grid, block, &[x.ptr().into(), y.ptr().into(), size(x.len())]);
}
