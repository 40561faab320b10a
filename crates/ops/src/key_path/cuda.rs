//! Keys on a GPU.

use crate::gpu::{channels, int, kernel, runs, size};
use crate::tape::RowSums;
use crate::{Backward, Param, Tape};
use anser_tensor::Buf;
use anser_tensor::cuda::{Arg, Cuda, Module};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

pub(super) fn forward(
    t: &Tape<'_>, gpu: &Cuda, k: &Buf, rate: &Buf, [k_k, k_a]: [Param; 2], out: &[Buf; 3], heads: usize, scale: f32,
) {
    let (n, c, total) = (k_k.cols / heads, k_k.cols, k.len());
    let [ko, ao, bo] = out.each_ref().map(|b| b.ptr().into());
    let (pk, pa) = (t.params().master(k_k).into(), t.params().master(k_a).into());
    let args = [k.ptr().into(), rate.ptr().into(), pk, pa, ko, ao, bo, int(n), int(c), size(total), Arg::F32(scale)];
    let grid = [total.div_ceil(8 * 128), 1, 1];
    gpu.launch(&KERNELS, &kernel(t.ctx(), "key_path"), grid, [128, 1, 1], &args);
}

/// Returns the sums of drate over rows.
pub(super) fn backward(
    b: &mut Backward<'_>, gpu: &Cuda, k: &Buf, rate: &Buf, d: &[Buf; 3], params: [Param; 2], grads: [&Buf; 2],
    heads: usize, scale: f32,
) -> RowSums {
    let c = params[0].cols;
    let rows = k.len() / c;
    let (run, count) = runs(rows, 3);
    let (threads, blocks) = channels(c);
    let parts = b.ctx().alloc_f32(count * 3 * c);
    let [d0, d1, d2] = d.each_ref().map(|b| b.ptr().into());
    let ([pk, pa], [dk, dz]) = (params.map(|p| b.params().master(p).into()), grads.map(|g| g.ptr().into()));
    let args = [
        k.ptr().into(),
        rate.ptr().into(),
        d0,
        d1,
        d2,
        pk,
        pa,
        dk,
        dz,
        parts.ptr().into(),
        int(c / heads),
        int(rows),
        int(c),
        int(run),
        Arg::F32(scale),
    ];
    let name = kernel(b.ctx(), "key_path_back");
    gpu.launch(&KERNELS, &name, [count, blocks, 1], [threads, 1, 1], &args);
    let [dk_k, dk_a, sum] = RowSums::each(parts, count, c);
    params.into_iter().zip([dk_k, dk_a]).for_each(|(p, sums)| b.add_sums(p, sums));
    sum
}
