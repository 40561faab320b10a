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
    // Stable, by counting: `ends` becomes where the rows of each id end.
    let mut ends = vec![0u32; vocab + 1];
    tokens.iter().for_each(|&t| ends[t as usize + 1] += 1);
    (0..vocab).for_each(|id| ends[id + 1] += ends[id]);
    let mut order = vec![0i32; tokens.len()];
    for (i, &t) in tokens.iter().enumerate() {
        let at = &mut ends[t as usize];
        order[*at as usize] = i as i32;
        *at += 1;
    }
    let mut groups: Vec<i32> = Vec::with_capacity(3 * tokens.len().min(vocab));
    let (mut first, mut absent) = (0, 0);
    for (id, &end) in ends[..vocab].iter().enumerate() {
        if end > first {
            groups.extend([id as i32, first as i32, end as i32]);
        } else {
            absent = id as i32;
        }
        first = end;
    }
    let (order, mut count, most) = (table(ctx, &order), groups.len() / 3, tokens.len().min(vocab));
    // As long for any tokens: a step takes the memory that was forecast, and a launch that is repeated has room for others. A block that is left
    // over writes the row of an id that no token has as it is.
    (count..most).for_each(|_| groups.extend([absent, 0, 0]));
    if ctx.is_repeated() {
        count = most;
    }
    let groups = table(ctx, &groups);
    let args = [grad.into(), dy.ptr().into(), order.ptr().into(), groups.ptr().into(), int(c)];
    gpu.launch(&KERNELS, &kernel(ctx, "embedding_back"), [count, 1, 1], [128, 1, 1], &args);
}
