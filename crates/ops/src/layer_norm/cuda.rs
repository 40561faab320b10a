//! LayerNorm on a GPU.

use crate::gpu::{int, kernel};
use crate::{Backward, Param, ParamSet};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Module};
use anser_tensor::{Buf, Context};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Blocks of the backward pass, each with runs of rows; fixed, so that sums have a fixed order.
const BLOCKS: usize = 528;

/// Warps that hold a row of `c` channels, and vectors of 8 that a thread holds.
fn shape(c: usize) -> (usize, usize) {
    const SHAPES: [(usize, usize); 7] = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (4, 4), (8, 4)];
    let fits = |s: &(usize, usize)| c <= 256 * s.0 * s.1;
    SHAPES.into_iter().find(fits).unwrap_or_else(|| panic!("LayerNorm on a GPU takes at most 8192 channels, not {c}"))
}

fn name(ctx: &Context, base: &str, (w, h): (usize, usize)) -> String {
    kernel(ctx, &format!("{base}_{w}x{h}"))
}

/// Rows that a block takes at a time, and its threads.
fn block(w: usize) -> (usize, usize) {
    if w == 1 { (4, 128) } else { (1, 32 * w) }
}

fn at(b: Option<&Buf>) -> Arg<'static> {
    Arg::Ptr(b.map_or(DevicePtr::NULL, Buf::ptr))
}

/// y from x or, with `residual` = (dx, sum), from sum = x + dx.
pub(super) fn forward(
    ctx: &Context, gpu: &Cuda, params: &ParamSet, x: &Buf, residual: Option<(&Buf, &Buf)>, y: &Buf, weight: Param,
    bias: Param, c: usize,
) {
    let (rows, shape) = (x.len() / c, shape(c));
    let (each, threads) = block(shape.0);
    let (dx, sum) = (at(residual.map(|r| r.0)), at(residual.map(|r| r.1)));
    let (w, b) = (params.master(weight), params.master(bias));
    let args = [x.ptr().into(), dx, sum, y.ptr().into(), w.into(), b.into(), int(rows), int(c)];
    gpu.launch(&KERNELS, &name(ctx, "layer_norm", shape), [rows.div_ceil(each), 1, 1], [threads, 1, 1], &args);
}

/// The gradient of x plus `prior` into `dx`, and the gradients of weight and bias.
pub(super) fn backward(
    b: &mut Backward<'_>, gpu: &Cuda, x: &Buf, dy: &Buf, prior: Option<&Buf>, dx: Option<&Buf>, weight: Param,
    bias: Param, c: usize,
) {
    let (ctx, rows, shape) = (b.ctx(), x.len() / c, shape(c));
    let (each, threads) = block(shape.0);
    let count = BLOCKS.min(rows.div_ceil(each));
    let parts = ctx.alloc_f32(count * 2 * c);
    let w = b.params().master(weight);
    let args = [x.ptr().into(), dy.ptr().into(), at(prior), at(dx), w.into(), parts.ptr().into(), int(rows), int(c)];
    gpu.launch(&KERNELS, &name(ctx, "layer_norm_back", shape), [count, 1, 1], [threads, 1, 1], &args);
    b.add_param_sums([weight, bias], parts, count, c);
}
