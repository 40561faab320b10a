//! Attention on a GPU: the same tiles, in f32 on CUDA cores.

use crate::gpu::{int, kernel, segments as table};
use crate::{Segment, Var};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Module};
use anser_tensor::{Buf, Context};
use std::sync::Arc;

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Tokens of a tile for heads of size `n`, as in the kernel; four threads each.
fn tile(n: usize) -> usize {
    if n <= 64 { 32 } else { 16 }
}

/// A block for each segment, head and tile of the longest segment.
fn grid(segments: &[Segment], heads: usize, n: usize) -> [usize; 3] {
    let longest = segments.iter().map(|s| s.len).max().unwrap_or(0);
    [segments.len(), heads, longest.div_ceil(tile(n))]
}

pub(super) fn forward(
    ctx: &Context, gpu: &Cuda, segments: &Arc<[Segment]>, heads: usize, x: [&Var; 3], y: &Buf, lse: Option<&Buf>,
) {
    let n = x[0].cols() / heads;
    let [q, k, v] = x.map(|x| x.buf().ptr().into());
    let lse = lse.map_or(DevicePtr::NULL, Buf::ptr);
    let args = [q, k, v, table(ctx, segments).into(), y.ptr().into(), lse.into(), int(heads)];
    let name = format!("{}_{n}", kernel(ctx, "attention"));
    gpu.launch(&KERNELS, &name, grid(segments, heads, n), [4 * tile(n), 1, 1], &args);
}

pub(super) fn backward(
    ctx: &Context, gpu: &Cuda, segments: &Arc<[Segment]>, heads: usize, x: &[Var; 3], [y, dy, lse, delta]: [&Buf; 4],
    grads: [&Buf; 3],
) {
    let (rows, n) = (x[0].rows(), x[0].cols() / heads);
    let args = [dy.ptr().into(), y.ptr().into(), delta.ptr().into(), int(rows * heads), int(n)];
    gpu.launch(&KERNELS, &kernel(ctx, "attention_delta"), [(rows * heads).div_ceil(4), 1, 1], [128, 1, 1], &args);
    let [q, k, v] = x.each_ref().map(|x| Arg::Ptr(x.buf().ptr()));
    let saved = [dy, lse, delta].map(|b| Arg::Ptr(b.ptr()));
    let [dq, dk, dv] = grads.map(|b| Arg::Ptr(b.ptr()));
    let mut args = vec![q, k, v, table(ctx, segments).into()];
    args.extend(saved);
    args.push(int(heads));
    for (base, out) in [("attention_dq", vec![dq]), ("attention_dkv", vec![dk, dv])] {
        let args: Vec<_> = args.iter().copied().chain(out).collect();
        let name = format!("{}_{n}", kernel(ctx, base));
        gpu.launch(&KERNELS, &name, grid(segments, heads, n), [4 * tile(n), 1, 1], &args);
    }
}
