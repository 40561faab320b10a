//! WKV-7 on a GPU: the recurrence in f32, and chunks on tensor cores for activations in 16 bits.

use super::{Saved, Shape, Wkv7Inputs};
use crate::gpu::{int, kernel, pointers, segments};
use crate::{Segment, Var};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Module};
use anser_tensor::{Buf, Context, DType};
use std::sync::Arc;

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Tokens between kept states of the recurrence.
const BLOCK: usize = 8;
/// Tokens of a chunk on tensor cores.
const CHUNK: usize = 16;
/// Blocks that fill a GPU: with a quarter as many sequences times heads or fewer, sequences are cut into pieces. The same for all GPUs, so that
/// all compute the same.
const BLOCKS: usize = 384;
/// Fewest chunks of a piece: each piece costs two passes over the state.
const PIECE: usize = 32;

/// Whether heads of size `n` run on tensor cores. In f16, where a gradient's range would be too short, they do so at inference only.
pub(super) fn on_tensor_cores(ctx: &Context, n: usize, training: bool) -> bool {
    (n == 64 || n == 128) && (ctx.dtype() == DType::BF16 || ctx.dtype() == DType::F16 && !training)
}

/// A part of a sequence that one block goes through.
struct Piece {
    segment: usize,
    /// Number within the sequence.
    number: usize,
    start: usize,
    len: usize,
    /// Its first chunk among all chunks.
    base: usize,
    last: bool,
}

/// Cuts long sequences into pieces of whole chunks, so that pieces times heads fill the GPU.
fn pieces(segments: &[Segment], heads: usize) -> Vec<Piece> {
    let chunks = |len: usize| len.div_ceil(CHUNK);
    let all: usize = segments.iter().map(|s| chunks(s.len)).sum();
    let balanced = (all * heads).div_ceil(BLOCKS).max(PIECE);
    let (mut list, mut base) = (Vec::new(), 0);
    for (segment, s) in segments.iter().enumerate() {
        let total = chunks(s.len);
        // Pieces need their states found first, which doubles the work forward and adds a third backward: on an H100, 128 sequences and heads of 4096
        // tokens are faster whole, 96 in pieces.
        let count = if total >= 4 * balanced { total / balanced } else { 1 };
        for number in 0..count {
            let [from, to] = [number, number + 1].map(|n| n * total / count);
            let (start, end) = ((from * CHUNK).min(s.len), (to * CHUNK).min(s.len));
            list.push(Piece {
                segment,
                number,
                start: s.start + start,
                len: end - start,
                base: base + from,
                last: number + 1 == count,
            });
        }
        base += total;
    }
    list
}

/// The pieces as the kernels have them.
fn piece_table(ctx: &Context, shape: &Shape) -> DevicePtr {
    let slot = |s: Option<usize>| s.map_or(-1, |n| n as i32);
    let words = |p: Piece| {
        let s = &shape.segments[p.segment];
        [p.start as i32, p.len as i32, p.base as i32, slot(s.state_in), slot(s.state_out)].into_iter().chain([
            p.number as i32,
            p.segment as i32,
            p.last as i32,
        ])
    };
    ctx.table(&shape.segments, "pieces", || pieces(&shape.segments, shape.heads).into_iter().flat_map(words).collect())
}

/// First piece and number of pieces of each sequence.
fn range_table(ctx: &Context, segments: &Arc<[Segment]>, heads: usize) -> DevicePtr {
    ctx.table(segments, "ranges of pieces", || {
        let mut ranges = vec![[0i32; 2]; segments.len()];
        for (i, p) in pieces(segments, heads).iter().enumerate() {
            let range = &mut ranges[p.segment];
            if p.number == 0 {
                range[0] = i as i32;
            }
            range[1] += 1;
        }
        ranges.into_iter().flatten().collect()
    })
}

/// Buffers for what the backward pass needs.
pub(super) fn saved(ctx: &Context, shape: &Shape, n: usize, tokens: usize) -> Saved {
    let states = |block: usize| shape.segments.iter().map(|s| s.len.div_ceil(block)).sum::<usize>() * shape.heads;
    if on_tensor_cores(ctx, n, true) {
        let chunks = states(CHUNK);
        let inverses = Some(ctx.alloc(2 * chunks * CHUNK * CHUNK));
        return Saved { states: ctx.alloc(chunks * n * n), u: ctx.alloc(tokens * shape.heads * n), inverses };
    }
    Saved { states: ctx.alloc_f32(states(BLOCK) * n * n), u: ctx.alloc_f32(tokens * shape.heads * n), inverses: None }
}

/// What pieces need where sequences are cut: how each changes its state ([pieces, heads, 2, N, N]) and the states between them
/// ([pieces, heads, N, N]).
pub(super) struct Cuts {
    map: Buf,
    between: Buf,
}

impl Cuts {
    /// `None` if no sequence is cut, or nothing runs on tensor cores.
    pub(super) fn new(ctx: &Context, shape: &Shape, n: usize, training: bool) -> Option<Cuts> {
        let count = if on_tensor_cores(ctx, n, training) { pieces(&shape.segments, shape.heads).len() } else { 0 };
        let size = count * shape.heads * n * n;
        (count > shape.segments.len()).then(|| Cuts { map: ctx.alloc_f32(2 * size), between: ctx.alloc_f32(size) })
    }
}

/// Where each segment's kept states of the recurrence start.
fn offsets(ctx: &Context, shape: &Shape) -> DevicePtr {
    // The number of heads is the same in all layers of a model.
    ctx.table(&shape.segments, "kept states", || {
        let start = |at: &mut usize, s: &Segment| {
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

fn at(b: Option<&Buf>) -> DevicePtr {
    b.map_or(DevicePtr::NULL, Buf::ptr)
}

/// Dynamic shared memory of the kernels on tensor cores, in bytes: `ForwardShared` and `BackShared` of tensor.cuh.
fn shared(n: usize, back: bool) -> usize {
    let (tile, small) = (2 * CHUNK * (n + 8), 2 * CHUNK * 24);
    if back {
        (2 * 8 + 8) * tile + 2 * n * (n + 8) + (2 * 2 + 4) * small + 4 * ((CHUNK + 1) * (n + 8) + n)
    } else {
        (2 * 6 + 7) * tile + 6 * small + 4 * (CHUNK * 20 + 4 * n + 2 * n)
    }
}

pub(super) fn forward(
    ctx: &Context, gpu: &Cuda, shape: &Shape, inputs: Wkv7Inputs<'_>, state: &Var, y: &Buf, new: Option<&Buf>,
    saved: Option<&Saved>, cuts: Option<&Cuts>,
) {
    let n = inputs.r.cols() / shape.heads;
    let Wkv7Inputs { r, w, k, v, a, b } = inputs;
    let inputs = pointers([r, w, k, v, a, b].map(|x| x.buf().ptr()));
    let heads = int(shape.heads);
    if !on_tensor_cores(ctx, n, saved.is_some()) {
        let args = [
            inputs,
            segments(ctx, &shape.segments).into(),
            state.buf().ptr().into(),
            at(new).into(),
            y.ptr().into(),
            at(saved.map(|s| &s.states)).into(),
            at(saved.map(|s| &s.u)).into(),
            offsets(ctx, shape).into(),
            heads,
        ];
        let grid = [shape.segments.len(), shape.heads, 1];
        return gpu.launch(&KERNELS, &name(ctx, "wkv7", n), grid, [4 * n, 1, 1], &args);
    }
    let table: Arg = piece_table(ctx, shape).into();
    let grid = [pieces(&shape.segments, shape.heads).len(), shape.heads, 1];
    let launch = |what: &str, args: &[Arg]| {
        gpu.launch_with(&KERNELS, &name(ctx, what, n), grid, [2 * n, 1, 1], shared(n, false), args)
    };
    if let Some(cuts) = cuts {
        let map = cuts.map.ptr().into();
        launch("wkv7_tensor_scan", &[inputs, table, state.buf().ptr().into(), map, heads]);
        let ranges = range_table(ctx, &shape.segments, shape.heads).into();
        combine(gpu, "entries", shape, n, &[ranges, map, cuts.between.ptr().into(), heads]);
    }
    let kept = saved.map_or([DevicePtr::NULL; 3], Saved::pointers);
    let entry = at(cuts.map(|c| &c.between));
    launch(
        "wkv7_tensor",
        &[inputs, table, state.buf().ptr().into(), at(new).into(), entry.into(), y.ptr().into(), pointers(kept), heads],
    );
}

/// Launches the sum over the pieces of each sequence.
fn combine(gpu: &Cuda, what: &str, shape: &Shape, n: usize, args: &[Arg]) {
    let grid = [shape.segments.len(), shape.heads, 1];
    gpu.launch_with(&KERNELS, &format!("wkv7_tensor_{what}_{n}"), grid, [256, 1, 1], 2 * 4 * n * (n + 4), args);
}

impl Saved {
    fn pointers(&self) -> [DevicePtr; 3] {
        [self.states.ptr(), at(self.inverses.as_ref()), self.u.ptr()]
    }
}

/// Gradients of the inputs into `grads`; where `add` says so, to what is there.
pub(super) fn backward(
    ctx: &Context, gpu: &Cuda, shape: &Shape, inputs: [&Buf; 6], saved: &Saved, cuts: Option<&Cuts>, dy: Option<&Buf>,
    dnew: Option<&Buf>, grads: [&Buf; 6], add: [bool; 6], initial: Option<&Buf>, n: usize,
) {
    let heads = int(shape.heads);
    let values = pointers(inputs.map(Buf::ptr));
    let add = int(add.iter().enumerate().map(|(i, &add)| usize::from(add) << i).sum());
    if !on_tensor_cores(ctx, n, true) {
        let args = [
            values,
            segments(ctx, &shape.segments).into(),
            saved.states.ptr().into(),
            saved.u.ptr().into(),
            offsets(ctx, shape).into(),
            at(dy).into(),
            at(dnew).into(),
            pointers(grads.map(Buf::ptr)),
            add,
            at(initial).into(),
            heads,
        ];
        let grid = [shape.segments.len(), shape.heads, 1];
        return gpu.launch(&KERNELS, &name(ctx, "wkv7_back", n), grid, [4 * n, 1, 1], &args);
    }
    // Where the gradient comes through the state alone, that of y is zero.
    let zeros = dy.is_none().then(|| ctx.zeros(inputs[0].len()));
    let dy = at(dy.or(zeros.as_ref()));
    let table: Arg = piece_table(ctx, shape).into();
    let kept = pointers(saved.pointers());
    let grid = [pieces(&shape.segments, shape.heads).len(), shape.heads, 1];
    let launch = |what: &str, args: &[Arg]| {
        gpu.launch_with(&KERNELS, &format!("wkv7_tensor_back{what}_{n}"), grid, [2 * n, 1, 1], shared(n, true), args)
    };
    // The states between the pieces are not needed any more: their gradients take the place.
    let exit = at(cuts.map(|c| &c.between));
    if let Some(cuts) = cuts {
        let own = ctx.alloc_f32(cuts.between.len());
        launch("_scan", &[values, table, kept, dy.into(), at(dnew).into(), own.ptr().into(), heads]);
        let ranges = range_table(ctx, &shape.segments, shape.heads).into();
        combine(gpu, "exits", shape, n, &[ranges, cuts.map.ptr().into(), own.ptr().into(), exit.into(), heads]);
    }
    launch(
        "",
        &[
            values,
            table,
            kept,
            dy.into(),
            at(dnew).into(),
            exit.into(),
            pointers(grads.map(Buf::ptr)),
            add,
            at(initial).into(),
            heads,
        ],
    );
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_sequence_once() {
        let lens = [0, 1, 16, 17, 5000, 65536];
        let mut start = 0;
        let segments: Vec<Segment> = lens
            .iter()
            .map(|&len| {
                start += len;
                Segment { start: start - len, len, state_in: None, state_out: None }
            })
            .collect();
        for heads in [1, 12, 64, 1000] {
            let list = pieces(&segments, heads);
            let mut next = 0;
            for (i, s) in segments.iter().enumerate() {
                let mine: Vec<&Piece> = list.iter().filter(|p| p.segment == i).collect();
                let mut at = s.start;
                for (number, p) in mine.iter().enumerate() {
                    assert!(
                        p.number == number && p.start == at && p.base == next && p.last == (number + 1 == mine.len())
                    );
                    assert!(p.last || p.len % CHUNK == 0 && p.len > 0);
                    at += p.len;
                    next += p.len.div_ceil(CHUNK);
                }
                assert!(!mine.is_empty() && at == s.start + s.len);
            }
            assert!(heads < 1000 || list.len() == segments.len());
        }
    }
}
