//! Embedding on a GPU. Rows come from the f32 master weights or from a packed table.

use crate::gpu::{int, kernel, table};
use anser_tensor::cuda::{Cuda, DevicePtr, Module};
use anser_tensor::{Buf, Context};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Rows `ids` of `rows`, which are in the type of activations.
pub(crate) fn rows_of(ctx: &Context, gpu: &Cuda, rows: DevicePtr, ids: &[u32], y: &Buf, c: usize) {
    let words: Vec<i32> = ids.iter().map(|&t| t as i32).collect();
    let words = table(ctx, &words);
    let args = [rows.into(), words.ptr().into(), y.ptr().into(), int(c)];
    gpu.launch(&KERNELS, &kernel(ctx, "embedding"), [ids.len(), 1, 1], [128, 1, 1], &args);
}

/// Tokens grouped by id, each group summed in order.
pub(super) fn backward(ctx: &Context, gpu: &Cuda, grad: DevicePtr, dy: &Buf, tokens: &[u32], vocab: usize, c: usize) {
    let mut order: Vec<i32> = (0..tokens.len() as i32).collect();
    order.sort_by_key(|&i| tokens[i as usize]);
    let mut groups: Vec<i32> = Vec::new();
    for (at, &i) in order.iter().enumerate() {
        let id = tokens[i as usize] as i32;
        let n = groups.len();
        if n >= 3 && groups[n - 3] == id {
            groups[n - 1] = at as i32 + 1;
        } else {
            groups.extend([id, at as i32, at as i32 + 1]);
        }
    }
    let (order, count) = (table(ctx, &order), groups.len() / 3);
    // As long for any tokens: a step takes the memory that was forecast.
    groups.resize(3 * tokens.len().min(vocab), 0);
    let groups = table(ctx, &groups);
    let args = [grad.into(), dy.ptr().into(), order.ptr().into(), groups.ptr().into(), int(c)];
    gpu.launch(&KERNELS, &kernel(ctx, "embedding_back"), [count, 1, 1], [128, 1, 1], &args);
}
