//! Products of a step of few sequences on tensor cores (`tiles.cuh`): how their work is shared, and their launches.

use super::{BATCH, Finish, Norm, Step};
use crate::gpu::{kernel, pointers};
use anser_tensor::cuda::{Arg, DevicePtr};
use anser_tensor::{Buf, Context};

/// Bytes that a warp copies in a step, and steps ahead.
const RING: [usize; 2] = [2048, 5];
/// Rows of a tile.
const TILE: usize = 16;
/// Bytes of sums on their way between the warps of a tile.
const SUMS: usize = TILE * 8 * 4;

/// Bytes of shared memory that a block may have, and warps of a block.
fn limits(ctx: &Context) -> (usize, usize) {
    match ctx.cuda().map_or((8, 0), |g| g.info().capability) {
        (9 | 10, _) => (226 << 10, 8),
        (8, 0) => (162 << 10, 8),
        _ => (98 << 10, 4),
    }
}

/// Bytes of shared memory of a launch.
fn shared(batch: usize, warps: usize, k: usize) -> usize {
    RING[0] * RING[1] * warps + (batch + 1) * (k.next_multiple_of(64) + 32) * 2 + warps * SUMS
}

/// Whether a block holds vectors of width `c` of as many sequences as there may be.
pub(super) fn holds(ctx: &Context, c: usize) -> bool {
    let (most, warps) = limits(ctx);
    shared(BATCH, warps, c) <= most
}

/// How the rows of a matrix are shared among blocks, for products with up to [`BATCH`] sequences.
pub struct Tiles {
    work: Buf,
    blocks: usize,
    rows: usize,
    k: usize,
    split: usize,
    warps: usize,
}

impl Tiles {
    /// A plan for a matrix [rows, k], whose rows are runs of (rows, input), in order. `None` without a GPU.
    pub fn new(ctx: &Context, k: usize, runs: &[(usize, usize)]) -> Option<Tiles> {
        let blocks = ctx.cuda()?.info().multiprocessors as usize;
        let warps = limits(ctx).1;
        let rows: usize = runs.iter().map(|r| r.0).sum();
        // The fewest rows a block with which the blocks suffice; a block's rows have one input.
        let needed = |most: usize| runs.iter().map(|r| r.0.div_ceil(most)).sum::<usize>();
        let most = (rows.div_ceil(blocks).max(1)..).find(|&m| needed(m) <= blocks.max(runs.len())).unwrap_or(1);
        let (mut work, mut first) = (Vec::new(), 0);
        for &(n, input) in runs.iter().filter(|r| r.0 > 0) {
            let parts = n.div_ceil(most);
            let edge = |p: usize| n * p / parts;
            work.extend((0..parts).map(|p| [first + edge(p), edge(p + 1) - edge(p), input, 0].map(|v| v as i32)));
            first += n;
        }
        // Groups of warps with different rows, the warps of one sharing the steps of k; their sums pass through shared memory.
        let groups = most.div_ceil(TILE).next_power_of_two().min(warps);
        let (uploaded, split) = (ctx.upload_i32(work.as_flattened())?, warps / groups);
        Some(Tiles { work: uploaded, blocks: work.len(), rows, k, split, warps })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

impl Step<'_> {
    fn launch_tiles(&self, name: &str, plan: &Tiles, mut args: Vec<Arg>) {
        assert!(self.batch <= BATCH);
        let mut words = [0; 8];
        words.iter_mut().zip([self.batch, plan.rows, plan.k, plan.split]).for_each(|(to, v)| *to = v as i32);
        args.push(Arg::Words(words));
        let shared = shared(self.batch, plan.warps, plan.k);
        self.launch(&kernel(self.ctx, name), [plan.blocks, 1, 1], plan.warps * 32, shared, true, &args);
    }

    /// y [batch, rows] f32 += x W^T for W [rows, k] and x [batch, k], both in the type of activations, for up to [`BATCH`] sequences.
    pub fn add(&self, plan: &Tiles, w: DevicePtr, x: DevicePtr, y: DevicePtr) {
        self.launch_tiles("decode_output", plan, [w, x, y, plan.work.ptr()].map(Arg::from).into());
    }

    /// y [batch, rows] = m W^T finished as `finish` says, for inputs m that are interpolations of LayerNorm(x), x [batch, C] f32, and the rows of `mix.last`,
    /// of which a row of W takes the one that its run names, or are LayerNorm(x) itself: [`Step::mix`] within the product. y is
    /// f32, but in the type of activations with [`Finish::ReluSquared`].
    pub fn mixed(&self, finish: Finish, plan: &Tiles, w: DevicePtr, x: DevicePtr, y: DevicePtr, norm: Norm, mix: Mix) {
        let kind = if finish == Finish::Store { "rows" } else { "key" };
        let name = format!("decode_mixed_{kind}_{}", self.held(plan.warps * 32));
        let mut args: Vec<Arg> = [w, x, y, plan.work.ptr()].map(Arg::from).into();
        args.extend([pointers(norm), pointers(mix.mu)]);
        args.extend([mix.last, mix.slots, mix.now].map(Arg::from));
        self.launch_tiles(&name, plan, args);
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
