//! Read-out on a GPU.

use crate::gpu::{channels, int, kernel, runs, size};
use crate::{Backward, Param, Tape, Var};
use anser_tensor::Buf;
use anser_tensor::cuda::{Arg, Cuda, Module};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// inputs: y, r, k, v, gate; params: r_k, weight, bias.
pub(super) fn forward(t: &Tape<'_>, gpu: &Cuda, inputs: [&Var; 5], params: [Param; 3], out: &Buf, heads: usize) {
    let c = inputs[0].cols();
    let mut args: Vec<Arg> = inputs.map(|x| x.buf().ptr().into()).to_vec();
    args.extend(params.map(|p| Arg::Ptr(t.params().master(p))));
    args.extend([out.ptr().into(), int(c / heads), int(c), size(out.len())]);
    let grid = [out.len().div_ceil(8 * 128), 1, 1];
    gpu.launch(&KERNELS, &kernel(t.ctx(), "read_out"), grid, [128, 1, 1], &args);
}

pub(super) fn backward(
    b: &mut Backward<'_>, gpu: &Cuda, d: &Buf, inputs: [&Buf; 5], params: [Param; 3], grads: [&Buf; 5], heads: usize,
) {
    let c = params[1].cols;
    let rows = d.len() / c;
    let (run, count) = runs(rows, 3);
    let (threads, blocks) = channels(c);
    let parts = b.ctx().alloc_f32(count * 3 * c);
    let mut args: Vec<Arg> = vec![d.ptr().into()];
    args.extend(inputs.map(|x| Arg::Ptr(x.ptr())));
    args.extend(params.map(|p| Arg::Ptr(b.params().master(p))));
    args.extend(grads.map(|g| Arg::Ptr(g.ptr())));
    args.extend([parts.ptr().into(), int(c / heads), int(rows), int(c), int(run)]);
    let name = kernel(b.ctx(), "read_out_back");
    gpu.launch(&KERNELS, &name, [count, blocks, 1], [threads, 1, 1], &args);
    b.add_param_sums(params, parts, count, c);
}
