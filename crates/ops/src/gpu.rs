//! What the operations' GPU sides share: names of kernels by type, runs of rows, sums over rows, segment tables.

use crate::Segment;
use anser_tensor::cuda::{Arg, DevicePtr};
use anser_tensor::{Buf, Context};
use std::sync::Arc;

/// The kernel `base` for activations of the context's type.
pub(crate) fn kernel(ctx: &Context, base: &str) -> String {
    format!("{base}_{}", ctx.dtype())
}

/// An `int` argument.
pub(crate) fn int(n: usize) -> Arg<'static> {
    Arg::I32(n as i32)
}

/// A `size_t` argument.
pub(crate) fn size(n: usize) -> Arg<'static> {
    Arg::Size(n as u64)
}

/// A struct of addresses.
pub(crate) fn pointers<const K: usize>(p: [DevicePtr; K]) -> Arg<'static> {
    let mut all = [DevicePtr::NULL; 6];
    all[..K].copy_from_slice(&p);
    Arg::Ptrs(all)
}

/// Rows that one thread walks over where `sums` sums over rows are wanted, and the number of such runs: many, so that enough loads are
/// under way, but not so many that their sums take longer than the rows. They depend on numbers alone, so that sums have a fixed order.
pub(crate) fn runs(rows: usize, sums: usize) -> (usize, usize) {
    let run = match rows {
        16384.. if sums > 3 => 64,
        16384.. => 32,
        2048.. => 16,
        _ => 4,
    };
    (run, rows.div_ceil(run))
}

/// Threads of a block, and blocks, that cover `c` channels 8 at a time.
pub(crate) fn channels(c: usize) -> (usize, usize) {
    let vectors = c.div_ceil(8);
    let blocks = vectors.div_ceil(128);
    (vectors.div_ceil(blocks).next_multiple_of(32), blocks)
}

/// The segments as the kernels have them: {start, len, state_in, state_out}, -1 for none.
pub(crate) fn segments(ctx: &Context, segments: &Arc<[Segment]>) -> DevicePtr {
    let slot = |s: Option<usize>| s.map_or(-1, |n| n as i32);
    let words = |s: &Segment| [s.start as i32, s.len as i32, slot(s.state_in), slot(s.state_out)];
    ctx.table(segments, "segments", || segments.iter().flat_map(words).collect())
}

/// Integers on the GPU.
pub(crate) fn table(ctx: &Context, words: &[i32]) -> Buf {
    ctx.upload_i32(words).unwrap_or_else(|| ctx.alloc_f32(words.len()))
}

/// The same of integers that are no inputs, but shapes and addresses.
pub(crate) fn fixed(ctx: &Context, words: &[i32]) -> Buf {
    ctx.upload_fixed(words).unwrap_or_else(|| ctx.alloc_f32(words.len()))
}
