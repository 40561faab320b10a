//! Token shift on a GPU.

use crate::gpu::{channels, int, kernel, pointers, runs};
use crate::{Backward, GradSlot, Param, Segment, Tape, Var};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Module};
use anser_tensor::{Buf, Context};
use std::sync::Arc;

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// {row before, row after} of every row; -1 for none, -2 - s for row s of the arena.
fn links(ctx: &Context, segments: &Arc<[Segment]>, rows: usize) -> DevicePtr {
    ctx.table(segments, "links", || {
        let arena = |s: Option<usize>| s.map_or(-1, |s| -2 - s as i32);
        let mut words = vec![-1; rows * 2];
        for s in segments.iter() {
            let end = s.start + s.len - 1;
            for i in s.start..=end {
                words[i * 2] = if i > s.start { i as i32 - 1 } else { arena(s.state_in) };
                words[i * 2 + 1] = if i < end { i as i32 + 1 } else { arena(s.state_out) };
            }
        }
        words
    })
}

pub(super) fn forward<const K: usize>(
    t: &Tape<'_>, gpu: &Cuda, x: &Buf, last: &Buf, segments: &Arc<[Segment]>, mu: [Param; K], ys: &[Buf; K],
) {
    let (ctx, c) = (t.ctx(), mu[0].cols);
    let rows = x.len() / c;
    let (run, count) = runs(rows, K);
    let (threads, blocks) = channels(c);
    let args = [
        x.ptr().into(),
        last.ptr().into(),
        links(ctx, segments, rows).into(),
        pointers(ys.each_ref().map(Buf::ptr)),
        pointers(mu.map(|p| t.params().master(p))),
        int(rows),
        int(c),
        int(run),
    ];
    let name = kernel(ctx, &format!("token_shift{K}"));
    gpu.launch(&KERNELS, &name, [count, blocks, 1], [threads, 1, 1], &args);
}

/// Copies each segment's last row to its row of the new arena.
pub(super) fn keep_last(ctx: &Context, gpu: &Cuda, x: &Var, segments: &Arc<[Segment]>, arena: &Buf) {
    let count = segments.iter().filter(|s| s.state_out.is_some()).count();
    let pair = |s: &Segment| Some([(s.start + s.len - 1) as i32, s.state_out? as i32]);
    let pairs = ctx.table(segments, "ends", || segments.iter().filter_map(pair).flatten().collect());
    let args = [x.buf().ptr().into(), arena.ptr().into(), pairs.into(), int(x.cols())];
    gpu.launch(&KERNELS, &kernel(ctx, "keep_last"), [count, 1, 1], [256, 1, 1], &args);
}

pub(super) fn backward<const K: usize>(
    b: &mut Backward<'_>, gpu: &Cuda, x: &Buf, last: &Buf, segments: &Arc<[Segment]>, mu: [Param; K],
    dy: &[Option<Buf>; K], dnew: Option<&Buf>, dx: &GradSlot, dlast: &GradSlot,
) {
    let (ctx, c) = (b.ctx(), mu[0].cols);
    let rows = x.len() / c;
    let (run, count) = runs(rows, K);
    let (threads, blocks) = channels(c);
    let parts = ctx.alloc_f32(count * K * c);
    let g = dx.wanted().then(|| ctx.alloc(rows * c));
    let at = |b: Option<&Buf>| b.map_or(DevicePtr::NULL, Buf::ptr);
    let (dys, mus) = (dy.each_ref().map(|d| at(d.as_ref())), mu.map(|p| b.params().master(p)));
    let args = [
        x.ptr().into(),
        last.ptr().into(),
        at(dnew).into(),
        links(ctx, segments, rows).into(),
        pointers(dys),
        pointers(mus),
        Arg::Ptr(at(g.as_ref())),
        parts.ptr().into(),
        int(rows),
        int(c),
        int(run),
    ];
    let name = kernel(ctx, &format!("token_shift{K}_back"));
    gpu.launch(&KERNELS, &name, [count, blocks, 1], [threads, 1, 1], &args);
    b.add_param_sums(mu, parts, count, c);
    if let Some(g) = g {
        dx.add(g);
    }
    if !dlast.wanted() {
        return;
    }
    let g = match dnew {
        Some(d) => d.duplicate(),
        None => ctx.zeros(dlast.len()),
    };
    for k in segments.iter().filter_map(|s| s.state_out) {
        gpu.clear(g.ptr().offset(k * c, g.dtype()), c * g.dtype().size());
    }
    let start = |s: &Segment| Some([s.start as i32, s.state_in? as i32]);
    let starts = ctx.table(segments, "starts", || segments.iter().filter_map(start).flatten().collect());
    let from = segments.iter().filter(|s| s.state_in.is_some()).count();
    let args = [g.ptr().into(), starts.into(), int(from), pointers(dys), pointers(mus), int(c)];
    let name = kernel(ctx, &format!("token_shift{K}_last_grad"));
    gpu.launch(&KERNELS, &name, [dlast.len() / c, 1, 1], [256, 1, 1], &args);
    dlast.add(g);
}
