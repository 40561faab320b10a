//! Attention on a GPU: in f32 on CUDA cores, and in 16 bits with heads of 64 or 128 on tensor cores; on Hopper, with heads of 64 and chunks of at least 128, by
//! kernels of its own.
//!
//! The kernels work on groups of heads, so that what is between them (lists, and partial results of a row for each of its k chunks) stays
//! below a bound that counts no data.

use super::Chunks;
use crate::gpu::{fixed, int, kernel};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Module};
use anser_tensor::{Buf, Context, DType};
use std::ops::Range;

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Queries of a block that is about queries alone.
const QUERIES: usize = 128;
/// Keys of a tile going back to keys; on Hopper.
const KEYS: usize = 64;
const HOPPER_KEYS: usize = 128;
/// Tokens of a block that looks what a state has forgotten.
const TOKENS: usize = 64;
/// Chunks that are counted, and those that are scored, at a time.
const WINDOW: usize = 8192;
const AT_ONCE: usize = 32;
/// Longest run of rows that is counted together, and longest part of a list that one block takes.
const RUN: usize = 128;
const PIECE: usize = 2048;
/// On Hopper, where blocks take pieces as they can: as many times tiles of keys are enough, within these bounds.
const HOPPER_PIECES: usize = 528;
const HOPPER_PIECE: Range<usize> = 512..4096;
/// Bytes between kernels that a group of heads may take: one head may take more.
pub(super) const BETWEEN: usize = 1 << 30;

/// One sequence: `len` queries, in rows `first_row`.. of q, which follow on `past` keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence {
    pub first_row: usize,
    pub len: usize,
    pub past: usize,
    /// Chunks whose means are known.
    pub known: usize,
    /// Keys and values of position 0, [past + len, key heads x N].
    pub keys: DevicePtr,
    pub values: DevicePtr,
    /// Means of chunks, f32 [chunks, key heads x N].
    pub means: DevicePtr,
}

/// The shapes of a call, and its sequences on the GPU.
pub(super) struct Plan {
    rows: usize,
    heads: usize,
    key_heads: usize,
    n: usize,
    chunks: Chunks,
    /// Bytes between kernels that a group of heads may take.
    between: usize,
    sequences: Buf,
    count: usize,
    /// Totals over the sequences: chunks, counts of a head, runs, tiles, pieces times tiles of keys, blocks of queries.
    all: Totals,
    most_chunks: usize,
    run: usize,
    piece: usize,
    /// Whether the kernels for Hopper do it.
    hopper: bool,
}

#[derive(Clone, Copy, Default)]
struct Totals {
    chunks: usize,
    counts: usize,
    runs: usize,
    tiles: usize,
    pieces: usize,
    queries: usize,
}

/// Heads in hand.
#[derive(Clone, Copy)]
struct Group {
    first: usize,
    len: usize,
}

/// Who chose each chunk, of a group of heads.
struct Lists {
    lists: Buf,
    entries: Buf,
}

impl Plan {
    /// A call for `rows` rows of so many heads of queries and of keys of size `n`, with chunks no longer than a sequence and no more of them than there are.
    pub(super) fn new(
        ctx: &Context, rows: usize, heads: [usize; 2], n: usize, chunks: Chunks, list: &[Sequence],
    ) -> Plan {
        Plan::within(ctx, rows, heads, n, chunks, list, BETWEEN)
    }

    /// The same with a bound of bytes between kernels.
    pub(super) fn within(
        ctx: &Context, rows: usize, [heads, key_heads]: [usize; 2], n: usize, chunks: Chunks, list: &[Sequence],
        between: usize,
    ) -> Plan {
        let k = chunks.top - 1;
        assert!(rows * 4 * chunks.top < 1 << 31, "{rows} rows of {} chunks are too many for one call", chunks.top);
        let run = (rows / 128).next_power_of_two().clamp(64, RUN);
        let piece = (rows * k / 64).next_multiple_of(64).clamp(64, PIECE);
        let tile = tile(n);
        let capability = ctx.cuda().map(|g| g.info().capability);
        let hopper = capability == Some((9, 0)) && ctx.dtype() != DType::F32 && n == 64 && chunks.size >= HOPPER_KEYS;
        let keys = if hopper { HOPPER_KEYS } else { KEYS };
        let piece = if hopper {
            let most = (rows * k * heads * chunks.size.div_ceil(keys) / HOPPER_PIECES)
                .clamp(HOPPER_PIECE.start, HOPPER_PIECE.end);
            most.next_multiple_of(64)
        } else {
            piece
        };
        let (mut all, mut most_chunks, mut words) = (Totals::default(), 0, Vec::new());
        for s in list {
            let count = (s.past + s.len).div_ceil(chunks.size);
            let runs = s.len.div_ceil(run);
            let ints = [
                s.first_row,
                s.len,
                s.past,
                count,
                s.known,
                all.chunks,
                all.counts,
                all.runs,
                all.tiles,
                all.pieces,
                all.queries,
                0,
            ];
            words.extend(ints.map(|i| i as i32));
            for p in [s.keys, s.values, s.means] {
                words.extend([p.address() as i32, (p.address() >> 32) as i32]);
            }
            // A list of n queries has n.div_ceil(tile) tiles; all lists of the sequence together have at most len * k queries.
            let lists = if k > 0 { s.len * k / tile + count } else { 0 };
            all.chunks += count;
            all.counts += runs * count;
            all.runs += runs;
            all.tiles += s.len.div_ceil(tile) + lists;
            all.pieces += (count + s.len * k / piece) * chunks.size.div_ceil(keys);
            all.queries += s.len.div_ceil(QUERIES);
            most_chunks = most_chunks.max(count);
        }
        let sequences = fixed(ctx, &words);
        let count = list.len();
        Plan { rows, heads, key_heads, n, chunks, between, sequences, count, all, most_chunks, run, piece, hopper }
    }

    /// The same as the kernels have it, for a group of heads.
    fn words(&self, group: Group) -> [u64; 11] {
        let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        [
            self.sequences.ptr().address(),
            pair(self.count, self.heads),
            pair(group.first, group.len),
            pair(self.chunks.top, self.chunks.size),
            pair(self.rows, self.all.chunks),
            pair(self.all.counts, self.run),
            pair(self.piece, self.pieces()),
            pair(self.all.tiles, self.together()),
            pair(self.bits(), self.key_tile()),
            pair(self.chunks.sink, self.chunks.window),
            pair(self.key_heads, self.heads / self.key_heads),
        ]
    }

    /// Pieces of lists of a head.
    fn pieces(&self) -> usize {
        self.all.pieces / self.chunks.size.div_ceil(self.key_tile())
    }

    fn key_tile(&self) -> usize {
        if self.hopper { HOPPER_KEYS } else { KEYS }
    }

    /// Bits of an entry that are the row; the slot is above them, the sign stays free.
    fn bits(&self) -> usize {
        (usize::BITS - self.rows.leading_zeros()) as usize
    }

    /// Tiles that a block of queries takes, one after the other, so that those of short chunks begin while others end; on Hopper, those it takes at a time.
    fn together(&self) -> usize {
        if self.hopper { (1024 / self.chunks.size).clamp(1, 8) } else { (512 / self.chunks.size).clamp(1, 4) }
    }

    fn picks(&self) -> usize {
        self.chunks.top - 1
    }

    fn all_heads(&self) -> Group {
        Group { first: 0, len: self.heads }
    }

    /// Whether tensor cores do it.
    fn on_tensor_cores(&self, ctx: &Context) -> bool {
        ctx.dtype() != DType::F32 && (self.n == 64 || self.n == 128)
    }

    /// Groups of about as many heads each, of `bytes` bytes a head.
    fn groups(&self, bytes: usize) -> impl Iterator<Item = Group> + use<> {
        let most = (self.between / bytes.max(1)).clamp(1, self.heads);
        let len = self.heads.div_ceil(self.heads.div_ceil(most));
        let heads = self.heads;
        (0..heads).step_by(len).map(move |first| Group { first, len: len.min(heads - first) })
    }

    /// Bytes of a head's lists and counts.
    fn list_bytes(&self) -> usize {
        4 * (self.rows * self.picks() + self.all.counts + 4 * self.all.chunks)
    }
}

/// Queries of a tile on tensor cores.
fn tile(n: usize) -> usize {
    if n == 64 { 128 } else { 64 }
}

/// Keys of a step there, and queries of a step going back to keys.
fn step(n: usize) -> usize {
    if n == 64 { 64 } else { 32 }
}

/// Bytes of tiles of `rows` rows in shared memory, which are 1024 bytes aligned.
fn shared(rows: usize, n: usize) -> usize {
    1024 + 2 * rows * if n == 64 { 64 } else { n + 8 }
}

/// Means of the chunks that are full and not known.
pub(super) fn means(ctx: &Context, gpu: &Cuda, plan: &Plan) {
    let words = plan.words(plan.all_heads());
    let args = [Arg::Struct(&words), int(plan.n)];
    gpu.launch(&KERNELS, &kernel(ctx, "chunk_means"), [plan.all.chunks, plan.key_heads, 1], [256, 1, 1], &args);
}

/// The picks, i32 [rows, heads, k - 1]: past chunks in ascending order, then -1.
pub(super) fn select(ctx: &Context, gpu: &Cuda, plan: &Plan, q: &Buf, picks: &Buf) {
    if plan.picks() == 0 {
        return;
    }
    let words = plan.words(plan.all_heads());
    let (head, grid) = (Arg::Struct(&words), [plan.all.queries, plan.heads, 1]);
    if !plan.on_tensor_cores(ctx) {
        let args = [head, q.ptr().into(), picks.ptr().into(), int(plan.n)];
        return gpu.launch(&KERNELS, &kernel(ctx, "chunk_select"), grid, [QUERIES, 1, 1], &args);
    }
    let parts = ctx.alloc(plan.all.chunks * plan.key_heads * 2 * plan.n);
    let args = [head, parts.ptr().into(), int(plan.n)];
    gpu.launch(&KERNELS, &kernel(ctx, "chunk_split"), [plan.all.chunks, 1, 1], [128, 1, 1], &args);
    let at_once = if plan.picks() <= 2 { 2 } else { 16 };
    let name = format!("{}_{}", kernel(ctx, &format!("chunk_select_{at_once}")), plan.n);
    let bytes = 4 * AT_ONCE * (QUERIES + 4) + 2 * QUERIES * (plan.n + 8);
    let args = [head, q.ptr().into(), parts.ptr().into(), picks.ptr().into()];
    gpu.launch_with(&KERNELS, &name, grid, [QUERIES, 1, 1], bytes, &args);
}

/// errors [heads, count] f32: how badly the state [heads, N, N] f32 gives back each of `count` values under its key, both [count, heads x N].
pub(super) fn forgotten(
    ctx: &Context, gpu: &Cuda, [values, keys]: [DevicePtr; 2], state: &Buf, errors: &Buf, of: [usize; 3],
) {
    let [count, heads, n] = of;
    let name = format!("{}_{n}", kernel(ctx, "chunk_forgotten"));
    let args = [values, keys, state.ptr(), errors.ptr()].map(Arg::from).into_iter().chain([int(count)]);
    let args: Vec<Arg> = args.collect();
    gpu.launch(&KERNELS, &name, [count.div_ceil(TOKENS), heads, 1], [n.max(32), 1, 1], &args);
}

/// sums [heads, count] f32: the shares of `asking` queries' softmax, [.., heads x N], over `count` keys, [.., key heads x N], that each key has.
pub(super) fn asked(ctx: &Context, gpu: &Cuda, [queries, keys]: [DevicePtr; 2], sums: &Buf, of: [usize; 5]) {
    let [asking, count, heads, key_heads, n] = of;
    let lse = ctx.alloc_f32(heads * asking);
    let launch = |name: &str, rows: usize, args: &[Arg<'_>]| {
        let name = format!("{}_{n}", kernel(ctx, name));
        gpu.launch(&KERNELS, &name, [rows.div_ceil(128), heads, 1], [128, 1, 1], args);
    };
    let (wide, narrow) = (int(heads), int(key_heads));
    let args = [queries.into(), keys.into(), lse.ptr().into(), int(asking), int(count), wide, narrow];
    launch("chunk_ask", asking, &args);
    let [lse, sums] = [&lse, sums].map(|b| Arg::Ptr(b.ptr()));
    let args = [keys.into(), queries.into(), lse, sums, int(count), int(asking), narrow, wide];
    launch("chunk_asked", count, &args);
}

/// Turns the picks of a group of heads round; `None` where there are none.
fn lists(ctx: &Context, gpu: &Cuda, plan: &Plan, group: Group, picks: &Buf) -> Option<Lists> {
    (plan.picks() > 0).then(|| {
        let counts = ctx.alloc_f32(group.len * plan.all.counts);
        let lists = ctx.alloc_f32(group.len * plan.all.chunks * 4);
        let entries = ctx.alloc_f32(group.len * plan.rows * plan.picks());
        let words = plan.words(group);
        let head = Arg::Struct(&words);
        let [p, c, l, e] = [picks, &counts, &lists, &entries].map(|b| Arg::Ptr(b.ptr()));
        let (runs, window) = ([plan.all.runs, group.len, 1], 4 * plan.most_chunks.min(WINDOW));
        gpu.launch_with(&KERNELS, "chunk_count", runs, [256, 1, 1], window, &[head, p, c]);
        let grid = [plan.all.chunks.div_ceil(32), group.len, 1];
        gpu.launch(&KERNELS, "chunk_total", grid, [1024, 1, 1], &[head, c, l]);
        let grid = [plan.count, group.len, 1];
        gpu.launch(&KERNELS, "chunk_scan", grid, [256, 1, 1], &[head, l, int(tile(plan.n))]);
        gpu.launch_with(&KERNELS, "chunk_fill", runs, [32, 1, 1], window, &[head, p, c, l, e]);
        Lists { lists, entries }
    })
}

/// Addresses of lists and entries, null where there are none.
fn addresses(lists: Option<&Lists>) -> [Arg<'static>; 2] {
    lists.map_or([DevicePtr::NULL.into(); 2], |l| [l.lists.ptr().into(), l.entries.ptr().into()])
}

/// y [rows, heads x N] and, if wanted, lse [rows, heads].
pub(super) fn forward(ctx: &Context, gpu: &Cuda, plan: &Plan, q: &Buf, picks: &Buf, y: &Buf, lse: Option<&Buf>) {
    let (n, heads, slots) = (plan.n, plan.heads, plan.chunks.top);
    let null = DevicePtr::NULL;
    let lse = lse.map_or(null, Buf::ptr);
    if !plan.on_tensor_cores(ctx) {
        let words = plan.words(plan.all_heads());
        let args = [Arg::Struct(&words), q.ptr().into(), picks.ptr().into(), y.ptr().into(), lse.into(), int(n)];
        let grid = [plan.all.queries, heads, 1];
        return gpu.launch(&KERNELS, &kernel(ctx, "chunk_forward"), grid, [128, 1, 1], &args);
    }
    let name = |base: &str| format!("{}_{n}", kernel(ctx, base));
    let bytes = shared(tile(n) + 4 * step(n), n);
    let attend = |group: Group, lists: Option<&Lists>, out: DevicePtr, lse: DevicePtr| {
        let words = plan.words(group);
        let [l, e] = addresses(lists);
        if plan.hopper {
            let args = [Arg::Struct(&words), q.ptr().into(), out.into(), lse.into()];
            return hopper(ctx, gpu, "attend", plan.all.tiles * group.len, 3 * 128 + 4 * 2 * 128, [l, e], &args);
        }
        let args = [Arg::Struct(&words), q.ptr().into(), l, e, out.into(), lse.into()];
        let grid = [plan.all.tiles.div_ceil(plan.together()), group.len, 1];
        gpu.launch_with(&KERNELS, &name("chunk_attend"), grid, [128, 1, 1], bytes, &args);
    };
    if slots == 1 {
        return attend(plan.all_heads(), None, y.ptr(), lse);
    }
    for group in plan.groups(plan.list_bytes() + plan.rows * slots * (2 * n + 4)) {
        let lists = lists(ctx, gpu, plan, group, picks);
        let parts = ctx.alloc(plan.rows * group.len * slots * n);
        let part_lse = ctx.alloc_f32(plan.rows * group.len * slots);
        attend(group, lists.as_ref(), parts.ptr(), part_lse.ptr());
        let words = plan.words(group);
        let [p, o, l] = [picks, &parts, &part_lse].map(|b| Arg::Ptr(b.ptr()));
        let grid = [(plan.rows * group.len * n / 8).div_ceil(128), 1, 1];
        let args = [Arg::Struct(&words), p, o, l, y.ptr().into(), lse.into()];
        gpu.launch(&KERNELS, &name("chunk_merge"), grid, [128, 1, 1], &args);
    }
}

/// Launches a kernel for Hopper on `work` pieces of work: a block a multiprocessor, with `rows` rows of shared memory for heads of tiles and steps. The
/// kernel takes the lists and a counter of pieces first.
fn hopper(ctx: &Context, gpu: &Cuda, name: &str, work: usize, rows: usize, [l, e]: [Arg<'_>; 2], args: &[Arg<'_>]) {
    let counter = ctx.alloc_f32(1);
    gpu.clear(counter.ptr(), 4);
    let args = [&[l, e, counter.ptr().into()], args].concat();
    let grid = [work.min(gpu.info().multiprocessors as usize), 1, 1];
    let name = kernel(ctx, &format!("chunk_hopper_{name}"));
    gpu.launch_with(&KERNELS, &name, grid, [384, 1, 1], shared(rows, 64), &args);
}

/// dq [rows, heads x N] and dk, dv [rows, key heads x N] of sequences without a past.
pub(super) fn backward(
    ctx: &Context, gpu: &Cuda, plan: &Plan, q: &Buf, picks: &Buf, of: [&Buf; 3], [dq, dk, dv]: [&Buf; 3],
) {
    let share = plan.heads / plan.key_heads;
    if share == 1 {
        return each_head_back(ctx, gpu, plan, q, picks, of, [dq, dk, dv]);
    }
    // Those of each head of queries first.
    let parts: [Buf; 2] = std::array::from_fn(|_| ctx.alloc(plan.rows * plan.heads * plan.n));
    each_head_back(ctx, gpu, plan, q, picks, of, [dq, &parts[0], &parts[1]]);
    for (from, to) in parts.iter().zip([dk, dv]) {
        let threads = plan.rows * plan.key_heads * plan.n / 8;
        let args = [from.ptr().into(), to.ptr().into(), int(threads), int(plan.n / 8), int(share)];
        gpu.launch(&KERNELS, &kernel(ctx, "chunk_join"), [threads.div_ceil(256), 1, 1], [256, 1, 1], &args);
    }
}

/// dq, dk, dv [rows, heads x N], as if every head had keys of its own.
fn each_head_back(
    ctx: &Context, gpu: &Cuda, plan: &Plan, q: &Buf, picks: &Buf, [y, dy, lse]: [&Buf; 3], grads: [&Buf; 3],
) {
    let (n, heads, slots) = (plan.n, plan.heads, plan.chunks.top);
    let stats = ctx.alloc_f32(plan.rows * heads * 2);
    let [dq, dk, dv] = grads.map(|b| Arg::Ptr(b.ptr()));
    let [q, y, dy, lse, s, p] = [q, y, dy, lse, &stats, picks].map(|b| Arg::Ptr(b.ptr()));
    let grid = [(plan.rows * heads * n / 8).div_ceil(256), 1, 1];
    let args = [dy, y, lse, s, int(plan.rows * heads), int(n)];
    gpu.launch(&KERNELS, &kernel(ctx, "chunk_stats"), grid, [256, 1, 1], &args);
    if !plan.on_tensor_cores(ctx) {
        let lists = lists(ctx, gpu, plan, plan.all_heads(), picks);
        let words = plan.words(plan.all_heads());
        let ([l, e], head) = (addresses(lists.as_ref()), Arg::Struct(&words));
        let grid = [plan.all.queries, heads, 1];
        gpu.launch(&KERNELS, &kernel(ctx, "chunk_dq"), grid, [128, 1, 1], &[head, q, dy, p, s, dq, int(n)]);
        let grid = [plan.all.chunks, heads, 1];
        let args = [head, q, dy, s, l, e, dk, dv, int(n)];
        return gpu.launch(&KERNELS, &kernel(ctx, "chunk_dkv"), grid, [128, 1, 1], &args);
    }
    let name = |base: &str| format!("{}_{n}", kernel(ctx, base));
    // A head's sums of pieces of lists, which only lists of several need.
    let sums = if slots > 1 { plan.pieces() * 2 * plan.chunks.size * n } else { 0 };
    let bytes = if slots > 1 { plan.list_bytes() + plan.rows * slots * 2 * n + 4 * sums } else { 0 };
    for group in plan.groups(bytes) {
        let words = plan.words(group);
        let head = Arg::Struct(&words);
        let lists = lists(ctx, gpu, plan, group, picks);
        let [l, e] = addresses(lists.as_ref());
        let attend = |out: Arg<'_>| {
            if plan.hopper {
                let work = plan.all.tiles * group.len;
                return hopper(ctx, gpu, "dq", work, 2 * 2 * 128 + 8 * 2 * 64, [l, e], &[head, q, dy, s, out]);
            }
            let bytes = shared(2 * tile(n) + 4 * step(n), n);
            let grid = [plan.all.tiles.div_ceil(plan.together()), group.len, 1];
            gpu.launch_with(&KERNELS, &name("chunk_dq"), grid, [128, 1, 1], bytes, &[head, q, dy, s, l, e, out]);
        };
        if slots == 1 {
            attend(dq);
        } else {
            let parts = ctx.alloc(plan.rows * group.len * slots * n);
            attend(parts.ptr().into());
            let grid = [(plan.rows * group.len * n / 8).div_ceil(128), 1, 1];
            gpu.launch(&KERNELS, &name("chunk_merge_dq"), grid, [128, 1, 1], &[head, p, parts.ptr().into(), dq]);
        }
        let sums = ctx.alloc_f32(group.len * sums);
        if plan.hopper {
            let args = [head, q, dy, s, sums.ptr().into(), dk, dv];
            hopper(ctx, gpu, "dkv", plan.all.pieces * group.len, 2 * 2 * 128 + 8 * 2 * 64, [l, e], &args);
        } else {
            let bytes = shared(2 * KEYS + 4 * step(n), n) + 2 * step(n) * 8;
            let args = [head, q, dy, s, l, e, sums.ptr().into(), dk, dv];
            let grid = [plan.all.pieces, group.len, 1];
            gpu.launch_with(&KERNELS, &name("chunk_dkv"), grid, [2 * KEYS, 1, 1], bytes, &args);
        }
        if slots > 1 {
            let grid = [plan.all.chunks * plan.chunks.size.div_ceil(16), group.len, 1];
            let args = [head, l, sums.ptr().into(), dk, dv];
            gpu.launch(&KERNELS, &name("chunk_add_pieces"), grid, [2 * n, 1, 1], &args);
        }
    }
}
