//! The low-rank maps of a step of more than a few sequences (`low_rank.cuh`): how their work is shared, and their launches.

use super::{Run, Step, Through, To};
use crate::gpu::{int, kernel, pointers};
use anser_tensor::cuda::{Arg, DevicePtr};
use anser_tensor::{Buf, Context};

/// Sequences and columns of a block.
const SIDE: usize = 64;
/// Threads of a block.
const THREADS: usize = 256;
/// Bytes of its ring: four steps of two squares with padding, 16 bits.
const RING: usize = 4 * 2 * SIDE * (SIDE + 8) * 2;
/// f32 of a part of a square's sums.
const PART: usize = SIDE * SIDE;

/// Work plans of four maps of one width and the memory between their halves.
pub struct LowRanks {
    downs: Buf,
    ups: Buf,
    squares: usize,
    blocks: usize,
    /// Each map that there is, its rank, its input and its first column of the halves, in the order of first halves.
    maps: Vec<[usize; 4]>,
    /// First halves [batch, 64 squares], each map from a multiple of 64 on, in the type of activations.
    halves: Buf,
    parts: Buf,
    ended: Buf,
    /// Blocks that fill the GPU.
    enough: usize,
}

impl LowRanks {
    /// For steps of up to `batch` sequences of width `c`. `order`: the maps as their first halves lie in memory, each as (map, rank, input); maps of no rank
    /// are left out. `None` without a GPU.
    pub fn new(ctx: &Context, batch: usize, c: usize, order: [(usize, usize, usize); 4]) -> Option<LowRanks> {
        let words = |v: [usize; 4]| v.map(|v| v as i32);
        let (mut downs, mut ups, mut maps, mut first) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (map, rank, input) in order {
            let column = downs.len() * SIDE;
            downs.extend((0..rank).step_by(SIDE).map(|i| words([first + i, (rank - i).min(SIDE), input, map])));
            if rank > 0 {
                ups.push((0..c).step_by(SIDE).map(move |i| words([i, rank, map, column])));
                maps.push([map, rank, input, column]);
            }
            first += rank;
        }
        // Those with most to do first.
        let mut ups: Vec<[i32; 4]> = ups.into_iter().flatten().collect();
        ups.sort_by_key(|work| -work[1]);
        let (squares, enough) = (downs.len(), 2 * ctx.cuda()?.info().multiprocessors as usize);
        let most = squares * batch.div_ceil(SIDE);
        Some(LowRanks {
            downs: ctx.upload_i32(downs.as_flattened())?,
            ups: ctx.upload_i32(ups.as_flattened())?,
            squares,
            blocks: ups.len(),
            maps,
            halves: ctx.zeros(batch * squares * SIDE),
            parts: ctx.alloc_f32(most.max(enough) * PART),
            ended: ctx.zeros_f32(most),
            enough,
        })
    }

    /// The first halves as runs of a matrix, whose results are columns of [`LowRanks::halves`].
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        let through = |map| match map {
            0 => Through::Tanh,
            3 => Through::Sigmoid,
            _ => Through::Identity,
        };
        self.maps.iter().map(move |&[map, rows, input, column]| Run {
            rows,
            input,
            to: To::Column(column, through(map)),
        })
    }

    /// Where first halves lie, [batch, pitch], and the pitch.
    pub fn halves(&self) -> (DevicePtr, usize) {
        (self.halves.ptr(), self.squares * SIDE)
    }
}

impl Step<'_> {
    /// y [4, batch, C] f32: the low-rank maps of x [inputs, batch, C], with the first halves `down` [ranks, C], in the plan's order, and the second ones
    /// `up` [rank, C] of decay, in-context rate, value gate and gate.
    pub fn low_rank(&self, plan: &LowRanks, down: DevicePtr, up: [DevicePtr; 4], x: DevicePtr, y: DevicePtr) {
        let (batch, c, rows) = (self.batch, self.c, self.batch.div_ceil(SIDE));
        // Shares of k, of at least four steps, with which the blocks fill the GPU.
        let shares = (plan.enough / (plan.squares * rows)).clamp(1, c.div_ceil(4 * SIDE));
        let width = c.div_ceil(shares).next_multiple_of(SIDE);
        let shares = c.div_ceil(width);
        let buffers = [down, x, plan.halves.ptr(), plan.parts.ptr(), plan.ended.ptr(), plan.downs.ptr()];
        let sizes = [batch, c, shares, width].map(int);
        let args: Vec<Arg> = buffers.map(Arg::from).into_iter().chain(sizes).collect();
        let name = |half: &str| kernel(self.ctx, half);
        self.launch(&name("decode_downs"), [plan.squares * shares, rows, 1], THREADS, RING, true, &args);
        self.second_halves(plan, up, y);
    }

    /// The same from first halves that are there.
    pub fn second_halves(&self, plan: &LowRanks, up: [DevicePtr; 4], y: DevicePtr) {
        let (batch, c, rows) = (self.batch, self.c, self.batch.div_ceil(SIDE));
        let name = |half: &str| kernel(self.ctx, half);
        let args = [plan.halves.ptr().into(), int(plan.squares * SIDE), pointers(up), y.into(), plan.ups.ptr().into()];
        let args: Vec<Arg> = args.into_iter().chain([int(batch), int(c)]).collect();
        self.launch(&name("decode_ups"), [plan.blocks, rows, 1], THREADS, RING, true, &args);
    }
}
