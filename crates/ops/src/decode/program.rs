//! The operations of a step of few sequences, one after another in one kernel (`program.cuh`): how they are written down, how the rows of their matrices are
//! shared among blocks, and their launch.

use super::{BATCH, Matrix, Norm, Step};
use crate::gpu::kernel;
use anser_tensor::cuda::{Arg, DevicePtr, Launch};
use anser_tensor::{Buf, Context, DType};
use std::ops::Range;

/// Threads of a block that work, their warps, and all threads; rows of a tile.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
const ALL: usize = THREADS + 32;
const TILE: usize = 8;
/// Head size that the kernel has.
const HEAD: usize = 64;
/// Words of eight bytes of an operation, and bytes of a block's share of a matrix.
const OP: usize = 32;
const SHARE: usize = 48;
/// Rows of a low-rank map's second half that a thread takes at once.
const UNIT: usize = 8;

/// Kinds of operations, of which a run may leave some out: bits as the kernel has them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Kinds(i32);

/// The second matrix of channel mixing, in the operation that has the first too.
const VALUES: i32 = 1 << 10;
/// Kinds that wait for all blocks: the one that adds up what the blocks give of that matrix, and the one that chooses tokens.
const WAITING: i32 = 1 << 5 | 1 << 7;

impl Kinds {
    /// [`Listing::embed`].
    pub const EMBED: Kinds = Kinds(1);
    /// [`Listing::mixed`].
    pub const MIXED: Kinds = Kinds(1 << 1);
    /// [`Listing::heads`].
    pub const HEADS: Kinds = Kinds(1 << 2);
    /// [`Listing::add`].
    pub const ADD: Kinds = Kinds(1 << 3);
    /// [`Listing::squared`], and the first matrix of [`Listing::channels`].
    pub const KEYS: Kinds = Kinds(1 << 4 | 1 << 8);
    /// [`Listing::value`], and the second matrix, and what it gives added up. Without the first every other row is read.
    pub const VALUES: Kinds = Kinds(1 << 5 | 1 << 9 | VALUES);
    /// [`Listing::logits`].
    pub const LOGITS: Kinds = Kinds(1 << 6 | 1 << 7);
    /// All of them.
    pub const ALL: Kinds = Kinds((1 << 11) - 1);
}

/// Stages of a block's rings, and bytes of one.
fn stages(ctx: &Context, coded: bool, batch: usize, c: usize) -> (usize, usize) {
    let stages = if !ctx.cuda().is_some_and(|g| g.info().is_hopper()) {
        2
    } else if kernels_batch(batch) * held(c) > 4 {
        if coded { 2 } else { 4 }
    } else {
        if coded && kernels_batch(batch) * held(c) > 1 { 4 } else { 5 }
    };
    let scales = if coded { 4 * 4 } else { 0 };
    (stages, WARPS * TILE * (512 + 64 + scales))
}

/// Vectors of 8 channels that a thread has of one of width `c`.
fn held(c: usize) -> usize {
    c.div_ceil(8 * THREADS)
}

/// Sequences for which there is a kernel.
fn kernels_batch(batch: usize) -> usize {
    if batch == 1 { 1 } else { BATCH }
}

/// What shared memory there must be for.
#[derive(Clone, Copy)]
pub struct Size {
    /// Blocks of the model.
    pub blocks: usize,
    /// Channels.
    pub c: usize,
    /// Hidden channels of channel mixing.
    pub hidden: usize,
    /// Ranks of the low-rank maps, at most.
    pub ranks: [usize; 4],
    /// Whether matrices are in codes.
    pub coded: bool,
    /// Whether the second matrix of channel mixing lies by outputs, as it does in codes.
    pub by_outputs: bool,
}

/// Bytes that operations on `batch` sequences use in turn, with inputs of `k` at most and low-rank maps of these ranks.
fn room(batch: usize, k: usize, ranks: [usize; 4]) -> usize {
    let rows: usize = ranks.iter().sum();
    let (product, heads, values) =
        (batch * (k + 32) * 2 + WARPS * 64 * 4, (rows + (rows / UNIT + 12) * HEAD) * 4, THREADS * 8 * 4);
    product.max(heads).max(values).next_multiple_of(16)
}

/// Bytes of shared memory beside `room` for steps of `batch` sequences, if a block has `hidden` hidden channels at most and a share of `products` matrices.
fn shared(ctx: &Context, coded: bool, batch: usize, c: usize, hidden: usize, products: usize) -> usize {
    let (stages, bytes) = stages(ctx, coded, batch, c);
    let fixed = 4 * BATCH * WARPS * 4 + 2 * OP * 8 + BATCH * 4;
    stages * bytes + BATCH * hidden * 4 + (hidden + 4) / 4 * 16 + fixed + products * SHARE
}

/// Sequences for which the kernel holds a model of this size with heads of `n`: [`BATCH`], 1 or none.
pub fn program_most(ctx: &Context, size: Size, n: usize) -> usize {
    let Some(gpu) = ctx.cuda() else { return 0 };
    let Size { blocks, c, ranks, coded, by_outputs, .. } = size;
    let here = size.hidden.div_ceil(gpu.info().multiprocessors as usize);
    let (k, hidden, products) =
        if by_outputs { (c.max(size.hidden), 0, 4 * blocks + 1) } else { (c, here, 3 * blocks + 1) };
    let fits = |&batch: &usize| {
        shared(ctx, coded, batch, c, hidden, products) + room(batch, k, ranks) <= gpu.info().block_memory()
    };
    let known = held(c) <= 2
        && (!coded || ctx.dtype() == DType::F16)
        && c.is_multiple_of(HEAD)
        && n == HEAD
        && ranks.iter().all(|r| r.is_multiple_of(UNIT));
    [BATCH, 1].into_iter().find(|batch| known && fits(batch)).unwrap_or(0)
}

/// How the rows of a matrix are shared among the blocks.
pub struct Plan {
    work: Buf,
    rows: usize,
    /// Rows in codes, the first ones.
    coded: usize,
    k: usize,
    /// Warps with the same rows, as a power of two.
    spread: usize,
    /// Rows of a block at most.
    most: usize,
}

impl Plan {
    /// A plan for a matrix [rows, k], whose rows are runs of (rows, input), in order: those in codes, and then those in 16 bits. `None` without a GPU.
    pub fn new(ctx: &Context, k: usize, runs: [&[(usize, usize)]; 2]) -> Option<Plan> {
        let blocks = ctx.cuda()?.info().multiprocessors as usize;
        let sum = |runs: &[(usize, usize)]| runs.iter().map(|r| r.0).sum::<usize>();
        let coded = sum(runs[0]);
        let rows = coded + sum(runs[1]);
        // Beside rows in codes one in 16 bits, which takes twice as long at least, counts four times: all blocks wait for the slowest.
        let weight = if coded > 0 { 4 } else { 1 };
        let runs: Vec<(usize, usize, usize)> = runs
            .iter()
            .zip([1, weight])
            .flat_map(|(runs, w)| runs.iter().map(move |&(n, input)| (n, input, w)))
            .filter(|r| r.0 > 0)
            .collect();
        // The fewest rows a block with which the blocks suffice; a block's rows have one input.
        let needed = |most: usize| runs.iter().map(|&(n, _, weight)| n.div_ceil(most / weight)).sum::<usize>();
        if blocks < runs.len() {
            return None;
        }
        let most = (rows.div_ceil(blocks).max(weight)..).find(|&m| needed(m) <= blocks).unwrap_or(1);
        let (mut work, mut first) = (Vec::new(), 0);
        for (n, input, weight) in runs {
            let parts = n.div_ceil(most / weight);
            let edge = |p: usize| n * p / parts;
            work.extend((0..parts).map(|p| [first + edge(p), edge(p + 1) - edge(p), input, 0].map(|v| v as i32)));
            first += n;
        }
        work.resize(blocks, [0; 4]);
        // Groups of warps with different rows, the warps of one sharing the steps of k; their sums pass through shared memory.
        let groups = most.div_ceil(TILE).next_power_of_two().min(WARPS);
        Some(Plan {
            work: ctx.upload_i32(work.as_flattened())?,
            rows,
            coded,
            k,
            spread: (WARPS / groups).ilog2() as usize,
            most,
        })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// What [`Listing::mixed`] and [`Listing::channels`] interpolate with.
#[derive(Clone, Copy)]
pub struct Mix<const K: usize> {
    /// Weights of the interpolations, in the order of the inputs that the runs of a plan name.
    pub mu: [DevicePtr; K],
    /// Rows [slots, C] of the token before, which a later operation replaces.
    pub last: DevicePtr,
    /// Where LayerNorm(x) [batch, C] waits for that.
    pub now: DevicePtr,
}

impl From<Mix<1>> for Mix<6> {
    fn from(mix: Mix<1>) -> Mix<6> {
        let mut mu = [DevicePtr::NULL; 6];
        mu[0] = mix.mu[0];
        Mix { mu, last: mix.last, now: mix.now }
    }
}

/// The weights and memory of [`Listing::heads`].
#[derive(Clone, Copy)]
pub struct FewHeads<'a> {
    /// The projections of a sequence: r, k, v, and the first halves of the low-rank maps of value gate, decay, in-context rate and gate; f32.
    pub projected: DevicePtr,
    /// Their ranks; the value gate has none in the first layer.
    pub ranks: [usize; 4],
    /// Their second halves, [ranks, C].
    pub up: DevicePtr,
    /// w0, a0, v0, k_k, k_a, r_k, f32.
    pub vectors: [DevicePtr; 6],
    /// GroupNorm.
    pub ln_x: Norm,
    /// Values of layer 0, [batch, C] f32.
    pub first: DevicePtr,
    /// States [slots, heads, N, N], f32 or f16, of which the rows of the sequences are advanced.
    pub state: &'a Buf,
    /// Value and key that the state takes up, [2, batch, C], unless it is null.
    pub wrote: DevicePtr,
    /// What goes to the output matrix, [batch, C].
    pub out: DevicePtr,
}

/// Memory for what operations of a step hand to each other: a place for every vector, which is read as soon as it is there and cleared at the end of a step.
pub struct Flow {
    /// Twice `bytes`: the second time for operations that run alone.
    at: Buf,
    bytes: usize,
    batch: usize,
}

impl Flow {
    /// Bytes between the beginnings of places are multiples of this.
    const LINE: usize = 128;

    fn bytes_of(batch: usize, elements: usize, dtype: DType) -> usize {
        (batch * elements * dtype.size()).next_multiple_of(Self::LINE)
    }

    /// For vectors of these numbers of elements for each of `batch` sequences.
    pub fn new(ctx: &Context, batch: usize, vectors: impl IntoIterator<Item = (usize, DType)>) -> Flow {
        let bytes = vectors.into_iter().map(|(elements, dtype)| Self::bytes_of(batch, elements, dtype)).sum();
        let mut at = ctx.zeros_f32(2 * bytes / 4);
        // Nothing is there yet (`flow.cuh`).
        at.write_raw(0, &vec![0xff; bytes]);
        Flow { at, bytes, batch }
    }
}

/// What [`Listing::mixed`] left in [`Mix::now`], and the rows that it goes to.
#[derive(Clone, Copy)]
pub struct Shift {
    /// LayerNorm(x) [batch, C].
    pub now: DevicePtr,
    /// Rows [slots, C] of the token before.
    pub last: DevicePtr,
}

impl<const K: usize> From<Mix<K>> for Shift {
    fn from(mix: Mix<K>) -> Shift {
        Shift { now: mix.now, last: mix.last }
    }
}

/// Operations that are being written down, each after all before it. Vectors of activations are [batch, C]; x is f32 everywhere. What an operation gives to others is written once in a step: it has a place of its own
/// ([`Listing::place`]), unless a kernel between two runs of operations reads it.
pub struct Listing<'a> {
    flow: &'a Flow,
    /// Bytes of it that have been given out.
    taken: usize,
    words: Vec<u64>,
    kinds: Vec<Kinds>,
    /// Products before each operation.
    before: Vec<usize>,
    products: usize,
    hidden: usize,
    /// Columns of a matrix at most.
    widest: usize,
    ranks: [usize; 4],
    coded: bool,
}

fn two(a: usize, b: usize) -> u64 {
    a as u64 | (b as u64) << 32
}

impl<'a> Listing<'a> {
    /// Without operations.
    pub fn new(flow: &'a Flow) -> Listing<'a> {
        Listing {
            flow,
            taken: 0,
            words: Vec::new(),
            kinds: Vec::new(),
            before: Vec::new(),
            products: 0,
            hidden: 0,
            widest: 0,
            ranks: [0; 4],
            coded: false,
        }
    }

    /// A place for a vector of every sequence.
    ///
    /// # Panics
    /// If there is none left.
    pub fn place(&mut self, elements: usize, dtype: DType) -> DevicePtr {
        let at = self.flow.at.ptr().offset(self.taken / 4, DType::F32);
        self.taken += Flow::bytes_of(self.flow.batch, elements, dtype);
        assert!(self.taken <= self.flow.bytes);
        at
    }

    /// Operations so far.
    pub fn len(&self) -> usize {
        self.before.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn push(&mut self, kind: u64, words: impl IntoIterator<Item = u64>) {
        self.before.push(self.products);
        let bit = 1 << kind;
        self.kinds.push(Kinds(if kind == 4 { bit | VALUES } else { bit }));
        let start = self.words.len();
        self.words.push(kind);
        self.words.extend(words);
        assert!(self.words.len() <= start + OP);
        self.words.resize(start + OP, 0);
    }

    fn product(
        &mut self, kind: u64, plan: &Plan, [w, plain]: [Matrix; 2], x: DevicePtr, norm: Norm, mix: Option<Mix<6>>,
        y: DevicePtr, rest: [DevicePtr; 3],
    ) {
        let mix = mix.unwrap_or(Mix { mu: [DevicePtr::NULL; 6], last: DevicePtr::NULL, now: DevicePtr::NULL });
        let at = |p: DevicePtr| p.address();
        let sizes = [two(plan.rows, plan.k), two(plan.spread, self.products), two(plan.coded, w.pitch)];
        let words = [at(w.at), at(plain.at), at(w.scales), at(plan.work.ptr())].into_iter().chain(sizes).chain([at(x)]);
        let words = words.chain(norm.map(at)).chain(mix.mu.map(at));
        self.push(kind, words.chain([mix.last, mix.now, y].map(at)).chain(rest.map(at)));
        self.products += 1;
        self.widest = self.widest.max(plan.k);
        self.coded |= plan.coded > 0;
    }

    /// x = LayerNorm of the tokens' rows of `table` [V, C].
    pub fn embed(&mut self, table: DevicePtr, tokens: DevicePtr, x: DevicePtr, norm: Norm) {
        self.push(0, [table, tokens, x, norm[0], norm[1]].map(|p| p.address()));
    }

    /// y [batch, rows] f32 = m W^T, for interpolations m between LayerNorm(x) and the token before, of which a row of W takes the one that its run names, or
    /// LayerNorm(x) itself. `w` are the plan's rows in codes and those in 16 bits.
    pub fn mixed(&mut self, plan: &Plan, w: [Matrix; 2], x: DevicePtr, norm: Norm, mix: Option<Mix<6>>, y: DevicePtr) {
        self.product(1, plan, w, x, norm, mix, y, [DevicePtr::NULL; 3]);
    }

    /// Everything between the projections and the output matrix of a layer.
    pub fn heads(&mut self, c: usize, h: FewHeads<'_>) {
        let mut ends = h.ranks;
        (1..4).for_each(|i| ends[i] += ends[i - 1]);
        self.ranks.iter_mut().zip(h.ranks).for_each(|(most, rank)| *most = rank.max(*most));
        let at = |p: DevicePtr| p.address();
        let kept16 = usize::from(h.state.dtype() == DType::F16);
        let ints = [3 * c + ends[3], ends[0], ends[1], ends[2], ends[3], kept16];
        let ints = ints.chunks(2).map(|pair| two(pair[0], pair[1]));
        let words =
            [at(h.projected)].into_iter().chain(ints).chain([at(h.up)]).chain(h.vectors.map(at)).chain(h.ln_x.map(at));
        self.push(2, words.chain([h.first, h.state.ptr(), h.wrote, h.out].map(at)));
    }

    fn added(
        &mut self, kind: u64, plan: &Plan, w: Matrix, m: DevicePtr, shift: Option<Shift>, [x, y]: [DevicePtr; 2],
        read: DevicePtr,
    ) {
        let mix = shift.map(|s| Mix { mu: [DevicePtr::NULL; 6], last: s.last, now: s.now });
        let null = DevicePtr::NULL;
        self.product(kind, plan, [w; 2], m, [null; 2], mix, y, [null, read, x]);
    }

    /// y [batch, rows] f32 = x + m W^T for activations m, and what is left of a [`Listing::mixed`] on which all of m depends.
    pub fn add(&mut self, plan: &Plan, w: Matrix, m: DevicePtr, shift: Option<Shift>, [x, y]: [DevicePtr; 2]) {
        self.added(3, plan, w, m, shift, [x, y], DevicePtr::NULL);
    }

    /// Activations y [batch, rows] = relu(m W^T)^2 for interpolations m between LayerNorm(x) and the token before.
    pub fn squared(&mut self, plan: &Plan, w: Matrix, x: DevicePtr, norm: Norm, mix: Mix<1>, y: DevicePtr) {
        self.product(8, plan, [w; 2], x, norm, Some(mix.into()), y, [DevicePtr::NULL; 3]);
    }

    /// As [`Listing::add`], after [`Listing::squared`] with `mix`. `read` counts the entries of m that are not zero for all sequences, unless it is null.
    pub fn value(&mut self, plan: &Plan, w: Matrix, m: DevicePtr, mix: Mix<1>, xy: [DevicePtr; 2], read: DevicePtr) {
        self.added(9, plan, w, m, Some(mix.into()), xy, read);
    }

    /// y = x + relu(m W^T)^2 V for matrices W and V [hidden, C], without the rows of V under zeros of all sequences, of which `read` counts the others. `parts` has
    /// [blocks, batch, C] f32.
    pub fn channels(
        &mut self, plan: &Plan, [key, value]: [DevicePtr; 2], [x, y]: [DevicePtr; 2], norm: Norm, mix: Mix<1>,
        parts: DevicePtr, read: DevicePtr, blocks: usize,
    ) {
        self.product(4, plan, [key.into(); 2], x, norm, Some(mix.into()), parts, [value, read, DevicePtr::NULL]);
        self.hidden = self.hidden.max(plan.most);
        let working = plan.rows.div_ceil(plan.most).min(blocks);
        let at = |p: DevicePtr| p.address();
        self.push(5, [at(parts), at(x), at(mix.now), at(mix.last), working as u64, at(y)]);
    }

    /// y [batch, rows] f32 = LayerNorm(x) W^T, and `tokens` the index of the largest of each sequence, the first of equals. `found` has [blocks, 4, 2] words.
    pub fn logits(
        &mut self, plan: &Plan, w: Matrix, x: DevicePtr, norm: Norm, y: DevicePtr, found: DevicePtr, tokens: DevicePtr,
    ) {
        self.product(6, plan, [w; 2], x, norm, None, y, [DevicePtr::NULL, found, DevicePtr::NULL]);
        self.push(7, [found.address(), tokens.address(), plan.rows as u64]);
    }

    /// As the kernel reads it. `None` without a GPU.
    pub fn finish(mut self, ctx: &Context) -> Option<Program> {
        self.before.push(self.products);
        let halves: Vec<i32> = self.words.iter().flat_map(|w| [*w as i32, (w >> 32) as i32]).collect();
        Some(Program {
            ops: ctx.upload_i32(&halves)?,
            arrived: ctx.zeros_f32(2),
            kinds: self.kinds,
            before: self.before,
            hidden: self.hidden,
            widest: self.widest,
            ranks: self.ranks,
            coded: self.coded,
        })
    }
}

/// Operations on the device.
pub struct Program {
    ops: Buf,
    arrived: Buf,
    /// Of each operation the bits of which one makes it run.
    kinds: Vec<Kinds>,
    before: Vec<usize>,
    hidden: usize,
    widest: usize,
    ranks: [usize; 4],
    coded: bool,
}

impl Program {
    /// Runs some of the operations, those of some kinds, for sequences whose states are the rows `slots`; `flow` is that of the [`Listing`].
    pub fn run(&self, step: &Step, ops: Range<usize>, kinds: Kinds, slots: DevicePtr, flow: &Flow) {
        assert!(step.batch <= BATCH.min(flow.batch));
        let (first, room) = (self.before[ops.start], room(step.batch, self.widest, self.ranks));
        let products = self.before[ops.end] - first;
        let all = kinds == Kinds::ALL;
        let waits = self.kinds[ops.clone()].iter().filter(|k| (if all { WAITING } else { kinds.0 }) & k.0 != 0).count();
        let run = [ops.start, ops.end, kinds.0 as usize, first, products, step.batch, step.c, waits];
        let args = [self.ops.ptr(), slots, self.arrived.ptr(), flow.at.ptr()].map(Arg::from).into_iter();
        let sizes = [room, self.hidden, flow.bytes / 16, usize::from(all), 0, 0, 0, 0];
        let (run, sizes) = (run.map(|v| v as i32), sizes.map(|v| v as i32));
        let args: Vec<Arg> = args.chain([Arg::Words(run), Arg::Words(sizes)]).collect();
        let how = if self.coded { "codes" } else { "rows" };
        let name = format!("decode_program_{how}_{}_{}", kernels_batch(step.batch), held(step.c));
        let how = Launch {
            grid: [step.gpu.info().multiprocessors as usize, 1, 1],
            block: [ALL, 1, 1],
            shared: room + shared(step.ctx, self.coded, step.batch, step.c, self.hidden, products),
            overlap: false,
            together: true,
        };
        step.gpu.launch_as(&super::KERNELS, &kernel(step.ctx, &name), how, &args);
    }
}
