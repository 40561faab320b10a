//! LayerNorm on a GPU.

use crate::gpu::{add_param_sums, int, kernel};
use crate::{Backward, GradSlot, Param, Tape, Var};
use anser_tensor::Buf;
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Module};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Blocks of the backward pass, each a run of rows; fixed, so that sums have a fixed order.
const BLOCKS: usize = 528;

/// Threads of a block: each holds at most four vectors of 8 channels.
fn threads(c: usize) -> usize {
    assert!(c <= 8192, "LayerNorm on a GPU takes at most 8192 channels, not {c}");
    c.div_ceil(8).next_multiple_of(32).min(256)
}

pub(super) fn forward(t: &Tape<'_>, gpu: &Cuda, x: &Var, weight: Param, bias: Param, y: &Buf) {
    let (x, none) = (x.buf().ptr(), DevicePtr::NULL);
    let (w, b) = (t.params().master(weight), t.params().master(bias));
    let (rows, c) = (y.len() / t.params().specs()[weight.id].range.len(), t.params().specs()[weight.id].range.len());
    let args = [x.into(), none.into(), none.into(), y.ptr().into(), w.into(), b.into(), int(c)];
    gpu.launch(&KERNELS, &kernel(t.ctx(), "layer_norm"), [rows, 1, 1], [threads(c), 1, 1], &args);
}

pub(super) fn backward(b: &Backward<'_>, gpu: &Cuda, x: &Var, dy: &Buf, dx: &GradSlot, weight: Param, bias: Param) {
    let (ctx, rows, c) = (b.ctx(), x.rows(), x.cols());
    let count = BLOCKS.min(rows);
    let parts = ctx.alloc_f32(count * 2 * c);
    // What has arrived so far is read and written in the same pass.
    let prior = dx.take();
    let g = dx.wanted().then(|| ctx.alloc(rows * c));
    let at = |b: &Option<Buf>| Arg::Ptr(b.as_ref().map_or(DevicePtr::NULL, Buf::ptr));
    let w = b.params().master(weight);
    let args =
        [x.buf().ptr().into(), dy.ptr().into(), at(&prior), at(&g), w.into(), parts.ptr().into(), int(rows), int(c)];
    gpu.launch(&KERNELS, &kernel(ctx, "layer_norm_back"), [count, 1, 1], [threads(c), 1, 1], &args);
    add_param_sums(b, gpu, [weight, bias], &parts, count, c);
    if let Some(g) = g {
        dx.add(g);
    }
}
