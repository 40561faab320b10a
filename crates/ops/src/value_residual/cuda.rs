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
    let slots = inputs.map(Var::slot);
    let (dv, dgate) = (slots[0].alloc(ctx), slots[2].alloc(ctx));
    let (first, add) = slots[1].begin(ctx).unwrap_or_else(|| (ctx.alloc(dy.len()), false));
    let prior = if add { first.ptr() } else { DevicePtr::NULL };
    let mut args = vec![Arg::Ptr(dy.ptr())];
    args.extend(inputs.map(|x| Arg::Ptr(x.buf().ptr())));
    args.extend([prior, dv.ptr(), first.ptr(), dgate.ptr()].map(Arg::Ptr));
    args.push(size(dy.len()));
    gpu.launch(&KERNELS, &kernel(ctx, "value_residual_back"), grid, block, &args);
    slots.iter().zip([dv, first, dgate]).for_each(|(slot, g)| slot.add(g));
}
