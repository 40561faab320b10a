//! WKV-7 on a GPU: the recurrence in f32.

use super::{Shape, Wkv7Inputs};
use crate::Var;
use crate::gpu::{int, kernel, pointers, segments};
use anser_tensor::cuda::{Cuda, DevicePtr, Module};
use anser_tensor::{Buf, Context, DType};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Tokens between kept states.
const BLOCK: usize = 8;

/// Number of states kept, of one head each.
pub(super) fn kept(shape: &Shape) -> usize {
    shape.segments.iter().map(|s| s.len.div_ceil(BLOCK) * shape.heads).sum()
}

/// Where each segment's kept states start.
fn offsets(ctx: &Context, shape: &Shape) -> DevicePtr {
    // The number of heads is the same in all layers of a model.
    ctx.table(&shape.segments, "kept states", || {
        let start = |at: &mut usize, s: &crate::Segment| {
            let here = *at;
            *at += s.len.div_ceil(BLOCK) * shape.heads;
            Some(here as i32)
        };
        shape.segments.iter().scan(0, start).collect()
    })
}

fn name(ctx: &Context, base: &str, n: usize) -> String {
    format!("{}_{n}", kernel(ctx, base))
}

pub(super) fn forward(
    ctx: &Context, gpu: &Cuda, shape: &Shape, inputs: Wkv7Inputs<'_>, state: &Var, y: &Buf, new: Option<&Buf>,
    saved: Option<(&Buf, &Buf)>,
) {
    let n = inputs.r.cols() / shape.heads;
    let Wkv7Inputs { r, w, k, v, a, b } = inputs;
    let at = |b: Option<&Buf>| b.map_or(DevicePtr::NULL, Buf::ptr);
    let args = [
        pointers([r, w, k, v, a, b].map(|x| x.buf().ptr())),
        segments(ctx, &shape.segments).into(),
        state.buf().ptr().into(),
        at(new).into(),
        y.ptr().into(),
        at(saved.map(|s| s.0)).into(),
        at(saved.map(|s| s.1)).into(),
        offsets(ctx, shape).into(),
        int(shape.heads),
    ];
    let grid = [shape.segments.len(), shape.heads, 1];
    gpu.launch(&KERNELS, &name(ctx, "wkv7", n), grid, [4 * n, 1, 1], &args);
}

pub(super) fn backward(
    ctx: &Context, gpu: &Cuda, shape: &Shape, inputs: &[Var; 6], (saved, u): (&Buf, &Buf), dy: Option<&Buf>,
    dnew: Option<&Buf>, grads: [&Buf; 6], initial: Option<&Buf>,
) {
    let n = inputs[0].cols() / shape.heads;
    let at = |b: Option<&Buf>| b.map_or(DevicePtr::NULL, Buf::ptr);
    let args = [
        pointers(inputs.each_ref().map(|x| x.buf().ptr())),
        segments(ctx, &shape.segments).into(),
        saved.ptr().into(),
        u.ptr().into(),
        offsets(ctx, shape).into(),
        at(dy).into(),
        at(dnew).into(),
        pointers(grads.map(Buf::ptr)),
        at(initial).into(),
        int(shape.heads),
    ];
    let grid = [shape.segments.len(), shape.heads, 1];
    gpu.launch(&KERNELS, &name(ctx, "wkv7_back", n), grid, [4 * n, 1, 1], &args);
}

/// The gradient of the old arena into `dstate` [slots, row].
pub(super) fn state_grad(
    ctx: &Context, gpu: &Cuda, shape: &Shape, dstate: &Buf, row: usize, dnew: Option<&Buf>, initial: &Buf,
) {
    match dnew {
        Some(d) => gpu.copy(d.ptr(), dstate.ptr(), dstate.bytes()),
        None => gpu.clear(dstate.ptr(), dstate.bytes()),
    }
    debug_assert!(dstate.dtype() == DType::F32);
    let args = [
        dstate.ptr().into(),
        initial.ptr().into(),
        segments(ctx, &shape.segments).into(),
        int(shape.segments.len()),
        int(row),
    ];
    let grid = [row.div_ceil(256), dstate.len() / row.max(1), 1];
    gpu.launch(&KERNELS, "wkv7_state_grad", grid, [256, 1, 1], &args);
}
