//! Rotary positions on a GPU.

use super::table;
use crate::Segment;
use crate::gpu::{int, kernel, segments as places};
use anser_tensor::cuda::{Arg, Cuda, Module};
use anser_tensor::{Buf, Context};
use std::sync::Arc;

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

pub(super) fn turn(
    ctx: &Context, gpu: &Cuda, segments: &Arc<[Segment]>, x: &Buf, y: &Buf, c: usize, heads: usize, sign: f32,
) {
    let n = c / heads;
    // The head size is the same in all layers of a model.
    let angles = ctx.table(segments, "rotary", || table(segments, n).iter().map(|a| a.to_bits() as i32).collect());
    let args = [
        x.ptr().into(),
        y.ptr().into(),
        places(ctx, segments).into(),
        angles.into(),
        int(heads),
        int(n),
        Arg::F32(sign),
    ];
    gpu.launch(&KERNELS, &kernel(ctx, "rotary"), [segments.len(), heads, 1], [128, 1, 1], &args);
}
