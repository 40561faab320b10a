//! Value residual on a GPU.

use crate::Var;
use crate::gpu::{channels, int, kernel, runs, size};
use crate::tape::RowSums;
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
    let c = inputs[0].cols();
    let (run, count) = runs(dy.len() / c, 1);
    let (threads, blocks) = channels(c);
    let parts = ctx.alloc_f32(count * c);
    let slots = inputs.map(Var::slot);
    let (dv, dgate) = (slots[0].alloc(ctx), slots[2].alloc(ctx));
    let (first, add) = slots[1].begin(ctx).unwrap_or_else(|| (ctx.alloc(dy.len()), false));
    let prior = if add { first.ptr() } else { DevicePtr::NULL };
    let mut args = vec![Arg::Ptr(dy.ptr())];
    args.extend(inputs.map(|x| Arg::Ptr(x.buf().ptr())));
    args.extend([prior, dv.ptr(), first.ptr(), dgate.ptr()].map(Arg::Ptr));
    args.extend([parts.ptr().into(), int(dy.len() / c), int(c), int(run)]);
    gpu.launch(&KERNELS, &kernel(ctx, "value_residual_back"), [count, blocks, 1], [threads, 1, 1], &args);
    let [sums] = RowSums::each(parts, count, c);
    slots[0].add(dv);
    slots[1].add(first);
    slots[2].add_summed(dgate, sums);
}
