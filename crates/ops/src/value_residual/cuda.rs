//! Value residual on a GPU.

use crate::Var;
use crate::gpu::{kernel, size};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Module};
use anser_tensor::{Buf, Context};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

pub(super) fn forward(ctx: &Context, gpu: &Cuda, inputs: [&Buf; 3], y: &Buf) {
    let (grid, block) = gpu.walk(y.len());
    let [v, first, gate] = inputs.map(|b| b.ptr().into());
    gpu.launch(&KERNELS, &kernel(ctx, "value_residual"), grid, block, &[v, first, gate, y.ptr().into(), size(y.len())]);
}

/// inputs: v, v_first, gate. What has arrived for v_first, which all layers use, is read and written in the same pass.
pub(super) fn backward(ctx: &Context, gpu: &Cuda, dy: &Buf, inputs: [&Var; 3]) {
    let (grid, block) = gpu.walk(dy.len());
    let prior = inputs[1].slot().take_shared();
    let grads = inputs.map(|_| ctx.alloc(dy.len()));
    let ([v, first, gate], [a, b, c]) =
        (inputs.map(|x| x.buf().ptr().into()), grads.each_ref().map(|g| Arg::Ptr(g.ptr())));
    let prior = Arg::Ptr(prior.as_ref().map_or(DevicePtr::NULL, |p| p.ptr()));
    let args = [dy.ptr().into(), v, first, gate, prior, a, b, c, size(dy.len())];
    gpu.launch(&KERNELS, &kernel(ctx, "value_residual_back"), grid, block, &args);
    inputs.into_iter().zip(grads).for_each(|(x, g)| x.add_grad(g));
}
