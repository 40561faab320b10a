//! Products of a step on tensor cores (`tiles.cuh`): how their work is shared, and their launches.

use super::{BATCH, Finish, Norm, Step};
use crate::gpu::{int, kernel, pointers};
use anser_tensor::cuda::{Arg, DevicePtr};
use anser_tensor::{Buf, Context};

/// Sequences of a launch at most.
pub const TILE_BATCH: usize = 64;
/// Sequences of a step at most.
pub const MOST: usize = 1024;
/// Bytes that a warp copies in a step.
const STEP_BYTES: usize = 2048;
/// Bytes of shared memory for sums on their way between warps, about.
const SUMS: usize = 16 << 10;

/// Columns of tiles for a batch, in eights: the kernels that there are. Those of one plan sum alike.
fn eights(batch: usize) -> usize {
    if batch <= BATCH { 1 } else { batch.min(TILE_BATCH).div_ceil(8).next_power_of_two().max(2) }
}

/// Rows of x that a block holds.
fn held_rows(batch: usize) -> usize {
    if batch <= BATCH { batch + 1 } else { eights(batch) * 8 }
}

/// Copies ahead, as in the kernel.
fn stages(eights: usize) -> usize {
    if eights > 4 { 4 } else { 5 }
}

/// Bytes of shared memory that a block may have, and warps of a block.
fn limits(ctx: &Context) -> (usize, usize) {
    match ctx.cuda().map_or((8, 0), |g| g.info().capability) {
        (9 | 10, _) => (226 << 10, 8),
        (8, 0) => (162 << 10, 8),
        _ => (98 << 10, 4),
    }
}

/// Whether a block holds interpolations of a few vectors of width `c`; see [`Step::mixed`].
pub(super) fn holds(ctx: &Context, c: usize) -> bool {
    let (most, warps) = limits(ctx);
    shared(ctx.dtype().size(), BATCH, warps, c, SUMS) <= most
}

/// How the rows and columns of a matrix are shared among blocks, for products with up to 4, 32 or 64 sequences.
pub struct Tiles {
    work: Buf,
    ended: Buf,
    blocks: usize,
    rows: usize,
    k: usize,
    /// Columns of a share.
    width: usize,
    shares: usize,
    split: usize,
    warps: usize,
    /// Bytes for sums on their way between warps.
    sums: usize,
    by_inputs: bool,
}

impl Tiles {
    /// A plan for steps of up to `batch` sequences and a matrix [rows, k], whose rows are runs of (rows, input), in order, or with `by_inputs` [k, rows].
    /// With `shared`, columns are shared too even where x fits a block, which loads less of it at the price of partial sums. `None` without a GPU.
    pub fn new(
        ctx: &Context, batch: usize, k: usize, runs: &[(usize, usize)], by_inputs: bool, shared: bool,
    ) -> Option<Tiles> {
        let processors = ctx.cuda()?.info().multiprocessors as usize;
        let (most_shared, warps) = limits(ctx);
        let eights = eights(batch);
        let left = most_shared - stages(eights) * warps * STEP_BYTES - SUMS;
        let rows: usize = runs.iter().map(|r| r.0).sum();
        // x of a share with padding.
        let fits = (left / (held_rows(batch) * 2) - 32) / 64 * 64;
        let wanted = if by_inputs { 1024 } else { (k / 4).clamp(512, 1024) };
        let most = if shared { fits.min(wanted) } else { fits };
        let shares = k.div_ceil(most);
        let width = k.div_ceil(shares).next_multiple_of(64);
        let shares = k.div_ceil(width);
        // The fewest rows a block with which the blocks suffice; a block's rows have one input and, by inputs, come in 64s.
        let (unit, blocks) = (if by_inputs { 64 } else { 1 }, (processors / shares).max(1));
        let needed = |most: usize| runs.iter().map(|r| r.0.div_ceil(most)).sum::<usize>();
        let units = rows.div_ceil(blocks).div_ceil(unit).max(1);
        let most = (units..).map(|u| u * unit).find(|&m| needed(m) <= blocks.max(runs.len())).unwrap_or(unit);
        let (mut work, mut first) = (Vec::new(), 0);
        for &(n, input) in runs.iter().filter(|r| r.0 > 0) {
            let parts = n.div_ceil(most);
            let edge = |p: usize| (n.div_ceil(unit) * p / parts * unit).min(n);
            work.extend((0..parts).map(|p| [first + edge(p), edge(p + 1) - edge(p), input]));
            first += n;
        }
        let all = (0..shares).flat_map(|s| work.iter().flat_map(move |&[a, n, i]| [a, n, i, s].map(|v| v as i32)));
        let all: Vec<i32> = all.collect();
        // Groups of warps with different rows, the warps of one sharing the steps of k; their sums pass through shared memory.
        let tile = match (by_inputs, eights) {
            (true, _) => 64,
            (false, 1) => 16,
            (false, _) => 32,
        };
        let wanted = most.div_ceil(tile).next_power_of_two().min(warps);
        let bytes = tile * eights * 8 * 4;
        let groups = if wanted == warps { warps } else { wanted.min((SUMS / bytes).max(1)) };
        let sums = if groups == warps { 0 } else { groups * bytes };
        Some(Tiles {
            work: ctx.upload_i32(&all)?,
            ended: ctx.zeros_f32(work.len() * MOST.div_ceil(TILE_BATCH)),
            blocks: shares * work.len(),
            rows,
            k,
            width,
            shares,
            split: warps / groups,
            warps,
            sums,
            by_inputs,
        })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Partial sums of one sequence that lie in memory between the blocks.
    pub fn parts(&self) -> usize {
        if self.shares > 1 { self.shares * self.rows } else { 0 }
    }
}

/// Bytes of shared memory of a launch.
fn shared(size: usize, batch: usize, warps: usize, width: usize, sums: usize) -> usize {
    let held = held_rows(batch) * (width.next_multiple_of(64) + 32) * size;
    stages(eights(batch)) * warps * STEP_BYTES + held + sums
}

/// The second halves of low-rank maps as one product, for any number of sequences.
pub struct Ups {
    work: Buf,
    blocks: usize,
    warps: usize,
    most: usize,
}

impl Ups {
    /// For maps of `ranks`, of which the ones with no rank are left out, to `c` channels. `None` without a GPU.
    pub fn new(ctx: &Context, ranks: [usize; 4], c: usize) -> Option<Ups> {
        let tiles = |m: usize| (0..c.div_ceil(64)).map(move |i| [i * 64, (c - i * 64).min(64), m, 0].map(|v| v as i32));
        let work: Vec<i32> = (0..4).filter(|&m| ranks[m] > 0).flat_map(tiles).flatten().collect();
        let most = ranks.into_iter().max().unwrap_or(0);
        let (warps, blocks) = (limits(ctx).1, work.len() / 4);
        Some(Ups { work: ctx.upload_i32(&work)?, blocks, warps, most })
    }
}

impl Step<'_> {
    /// The plan as the kernels have it.
    fn share(&self, plan: &Tiles) -> Arg<'static> {
        let share = [self.batch, plan.rows, plan.k, plan.width, plan.split, plan.shares];
        let mut words = [0; 8];
        words.iter_mut().zip(share).for_each(|(to, v)| *to = v as i32);
        Arg::Words(words)
    }

    fn launch_tiles(&self, name: &str, plan: &Tiles, args: &[Arg]) {
        let shared = shared(self.ctx.dtype().size(), self.batch, plan.warps, plan.width, plan.sums);
        let grid = [plan.blocks, self.batch.div_ceil(TILE_BATCH), 1];
        self.launch(&kernel(self.ctx, name), grid, plan.warps * 32, shared, true, args);
    }

    /// y [batch, rows] = x W^T finished as `finish` says, for W [rows, k] and x [inputs, batch, k] in the type of activations, of which a row of W takes the
    /// one that its run names. Every weight is read once for every [`TILE_BATCH`] sequences. y is f32, but in the type of activations
    /// with [`Finish::ReluSquared`]. `parts` holds [`Tiles::parts`] f32 for every sequence.
    pub fn tiles(&self, finish: Finish, plan: &Tiles, w: DevicePtr, x: DevicePtr, y: DevicePtr, parts: DevicePtr) {
        let name = match finish {
            Finish::Store => "rows",
            Finish::ReluSquared => "key",
            Finish::Add if plan.by_inputs => "value",
            Finish::Add => "output",
        };
        let args = [w, x, y, parts, plan.ended.ptr(), plan.work.ptr()].map(Arg::from).into_iter();
        let args: Vec<Arg> = args.chain([self.share(plan)]).collect();
        self.launch_tiles(&format!("decode_tiles_{name}_{}", eights(self.batch)), plan, &args);
    }

    /// The same for up to [`BATCH`] sequences and inputs that are interpolations of LayerNorm(x), x [batch, C] f32, and the rows of `mix.last`, or
    /// LayerNorm(x) itself: [`Step::mix`] within the product.
    pub fn mixed(&self, finish: Finish, plan: &Tiles, w: DevicePtr, x: DevicePtr, y: DevicePtr, norm: Norm, mix: Mix) {
        assert!(self.batch <= BATCH && plan.shares == 1 && finish != Finish::Add);
        let name = if finish == Finish::Store { "rows" } else { "key" };
        let mut args: Vec<Arg> = [w, x, y, plan.work.ptr()].map(Arg::from).into();
        args.extend([pointers(norm), pointers(mix.mu)]);
        args.extend([mix.last, mix.slots, mix.now].map(Arg::from));
        args.push(self.share(plan));
        self.launch_tiles(&format!("decode_mixed_{name}"), plan, &args);
    }

    /// y [4, batch, C] f32: the second halves `up` [rank, C] of the low-rank maps, of the first halves at `proj` + `at`, `stride` f32 from one sequence
    /// to the next.
    pub fn ups(
        &self, plan: &Ups, proj: DevicePtr, stride: usize, up: [DevicePtr; 4], ranks: [usize; 4], at: [usize; 4],
        y: DevicePtr,
    ) {
        let mut words = [0; 8];
        words.iter_mut().zip(ranks.into_iter().chain(at)).for_each(|(to, v)| *to = v as i32);
        let args = [proj.into(), int(stride), pointers(up), Arg::Words(words), y.into(), plan.work.ptr().into()];
        let args: Vec<Arg> = args.into_iter().chain([int(self.batch), int(self.c)]).collect();
        let eights = eights(self.batch);
        let shared = shared(self.ctx.dtype().size(), self.batch, plan.warps, plan.most, 64 * eights * 8 * 4);
        let grid = [plan.blocks, self.batch.div_ceil(TILE_BATCH), 1];
        self.launch(&kernel(self.ctx, &format!("decode_ups_{eights}")), grid, plan.warps * 32, shared, true, &args);
    }
}

/// What [`Step::mixed`] interpolates with.
#[derive(Clone, Copy)]
pub struct Mix {
    /// Weights of the interpolations, in the order of the inputs that runs name.
    pub mu: [DevicePtr; 6],
    /// Rows [slots, C] of the token before, which stay; null: no interpolation.
    pub last: DevicePtr,
    /// Which of them the sequences have.
    pub slots: DevicePtr,
    /// Where LayerNorm(x) [batch, C] goes, for a later kernel to put into `last`.
    pub now: DevicePtr,
}
