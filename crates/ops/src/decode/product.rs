//! Products of a weight matrix with few or some dozens of sequences (`product.cuh`): how the matrix is cut into pieces, and their launch.

use super::Step;
use crate::gpu::{int, kernel};
use anser_tensor::cuda::{Arg, DevicePtr};
use anser_tensor::{Buf, Context, DType};

/// Sequences of a launch at most.
const MOST: usize = 64;
/// Outputs of a piece at most, columns of a step, and those with one scale.
const PIECE: usize = 64;
const STEP: usize = 128;
const GROUP: usize = 64;
/// Parts at most into which sums are split.
const PARTS: usize = 8;
/// Words of four bytes of a piece.
const WORDS: usize = 8;

/// How a matrix lies in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// [out, in], in the type of activations.
    Rows,
    /// [in, out].
    Inputs,
    /// [out, in] in codes of 8 bits: see [`anser_tensor::CodedPlaces`].
    Codes,
}

/// Steps of the ring for up to 16, 32 and 64 sequences, as the kernel has them.
fn steps(ctx: &Context, lie: Lie, most: usize) -> usize {
    let hopper = ctx.cuda().is_some_and(|g| g.info().is_hopper());
    let all = match (hopper, lie) {
        (true, Lie::Codes) => [16, 11, 7],
        (true, _) => [10, 7, 5],
        (false, Lie::Codes) => [6, 3, 2],
        (false, _) => [4, 2, 2],
    };
    all[(most / 32).min(2)]
}

/// Bytes of shared memory of a kernel for so many sequences.
fn shared(ctx: &Context, lie: Lie, most: usize) -> usize {
    let weights = if lie == Lie::Codes { STEP + STEP / GROUP * 2 } else { STEP * 2 };
    steps(ctx, lie, most) * (PIECE * weights + most * STEP * 2) + 4 * most.min(32) * (PIECE + 8) * 4
}

/// Sequences of a launch at most for which there is room on this GPU.
fn most(ctx: &Context, lie: Lie) -> usize {
    let limit = ctx.cuda().map_or(0, |g| g.info().block_memory());
    [MOST, 32, 16].into_iter().find(|&most| shared(ctx, lie, most) <= limit).unwrap_or(16)
}

/// Where a run of outputs goes.
#[derive(Clone, Copy)]
pub enum To {
    /// The n-th matrix [batch, ..] of f32, from its first column on.
    Plane(usize),
    /// Activations, from this column on, through a function.
    Column(usize, Through),
}

/// What activations go through.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Through {
    /// Nothing.
    Identity,
    /// relu(.)^2.
    Squared,
    /// Hyperbolic tangent.
    Tanh,
    /// The logistic function.
    Sigmoid,
}

/// Consecutive outputs of a matrix with one input.
#[derive(Clone, Copy)]
pub struct Run {
    /// How many; an even number, but for the last run of a plane of odd width.
    pub rows: usize,
    /// Which of the inputs.
    pub input: usize,
    /// Where they go.
    pub to: To,
}

/// A matrix cut into pieces, which are shared among the multiprocessors.
pub struct Pieces {
    work: Buf,
    len: usize,
    /// Inputs and outputs of the matrix.
    k: usize,
    outputs: usize,
    lie: Lie,
    parts: usize,
}

fn blocks(ctx: &Context) -> Option<usize> {
    Some(ctx.cuda()?.info().multiprocessors as usize)
}

impl Pieces {
    /// Of a matrix [rows, k] that doesn't lie by inputs, whose rows are `runs` in order. `None` without a GPU, or when memory runs out.
    pub fn of_rows(ctx: &Context, lie: Lie, k: usize, runs: &[Run]) -> Option<Pieces> {
        let blocks = blocks(ctx)?;
        let rows: usize = runs.iter().map(|r| r.rows).sum();
        // The fewest rows of a piece with which a round of pieces, or the fewest rounds, suffice.
        let needed = |most: usize| runs.iter().map(|r| r.rows.div_ceil(most)).sum::<usize>();
        let rounds = needed(PIECE).div_ceil(blocks);
        let most = (1..=PIECE / 2).map(|m| 2 * m).find(|&m| needed(m) <= rounds * blocks).unwrap_or(PIECE);
        let (mut work, mut first) = (Vec::new(), 0);
        for run in runs {
            let (plane, column, through) = match run.to {
                To::Plane(plane) => (plane as i32, 0, Through::Identity),
                To::Column(column, f) => (-1, column, f),
            };
            let parts = run.rows.div_ceil(most);
            let edge = |p: usize| if p == parts { run.rows } else { run.rows / 2 * p / parts * 2 };
            for p in 0..parts {
                let (from, to) = (edge(p), edge(p + 1));
                let words = [first + from, to - from, 0, k, run.input].map(|v| v as i32);
                work.extend(words.into_iter().chain([plane, (column + from) as i32, through as i32]));
            }
            first += run.rows;
        }
        Self::new(ctx, work, [k, rows], lie, 1)
    }

    /// Of a matrix with these outputs and k inputs, whose sums over k are split into parts, [`Pieces::parts`] matrices [batch, outputs] to be added up.
    /// `None` as before.
    pub fn in_parts(ctx: &Context, lie: Lie, k: usize, outputs: usize) -> Option<Pieces> {
        let blocks = blocks(ctx)?;
        // The least time: rounds of pieces, each with its weights and as many bytes again of the sequences'.
        let unit = if lie == Lie::Inputs { 16 } else { 8 };
        let time = |(rows, parts): (usize, usize)| {
            let rounds = (outputs.div_ceil(rows) * parts).div_ceil(blocks);
            rounds * (rows + PIECE / 4) * k.div_ceil(parts).next_multiple_of(STEP)
        };
        let cuts = (1..=PIECE / unit).rev().flat_map(|r| (1..=PARTS).map(move |parts| (r * unit, parts)));
        let (rows, parts) = cuts.filter(|&(_, parts)| parts == 1 || k / parts >= STEP).min_by_key(|&c| time(c))?;
        let width = k.div_ceil(parts).next_multiple_of(STEP);
        let parts = k.div_ceil(width);
        let mut work = Vec::new();
        for part in 0..parts {
            let from = part * width;
            for first in (0..outputs).step_by(rows) {
                let words = [first, rows.min(outputs - first), from, width.min(k - from), 0, part, first, 0];
                work.extend(words.map(|v| v as i32));
            }
        }
        Self::new(ctx, work, [k, outputs], lie, parts)
    }

    fn new(ctx: &Context, work: Vec<i32>, [k, outputs]: [usize; 2], lie: Lie, parts: usize) -> Option<Pieces> {
        let len = work.len() / WORDS;
        Some(Pieces { work: ctx.upload_i32(&work)?, len, k, outputs, lie, parts })
    }

    /// Parts of each sum.
    pub fn parts(&self) -> usize {
        self.parts
    }
}

/// Where a matrix is; with codes their scales, and the outputs from those of a step of columns to the next ones.
#[derive(Clone, Copy)]
pub struct Matrix {
    /// The matrix.
    pub at: DevicePtr,
    /// Scales, or null.
    pub scales: DevicePtr,
    /// See above.
    pub pitch: usize,
}

impl From<DevicePtr> for Matrix {
    fn from(at: DevicePtr) -> Matrix {
        Matrix { at, scales: DevicePtr::NULL, pitch: 0 }
    }
}

impl Step<'_> {
    /// x W^T for x [inputs, batch, k], as the runs of a matrix say: to `y` [planes, batch, `y_pitch`] f32 and `z` [batch, `z_pitch`] of activations. Whatever the other
    /// sequences are and how many, a sequence's results are the same bits. More than 64 take as many launches as there are 64.
    pub fn product(
        &self, w: impl Into<Matrix>, pieces: &Pieces, x: DevicePtr, [y, z]: [DevicePtr; 2],
        [y_pitch, z_pitch]: [usize; 2],
    ) {
        let (w, lie, most, t) = (w.into(), pieces.lie, most(self.ctx, pieces.lie), self.ctx.dtype());
        let how = match lie {
            Lie::Rows => "rows",
            Lie::Inputs => "inputs",
            Lie::Codes => "codes",
        };
        let grid = [pieces.len.min(self.gpu.info().multiprocessors as usize), 1, 1];
        for first in (0..self.batch).step_by(most) {
            let count = (self.batch - first).min(most);
            let wide = count.next_power_of_two().max(16);
            let mut args = vec![w.at.into(), w.scales.into(), int(w.pitch)];
            let x = x.offset(first * pieces.k, t);
            args.extend([x, y.offset(first * y_pitch, DType::F32), z.offset(first * z_pitch, t)].map(Arg::from));
            args.push(pieces.work.ptr().into());
            args.extend([pieces.len, self.batch, count, pieces.k, pieces.outputs, y_pitch, z_pitch].map(int));
            let name = kernel(self.ctx, &format!("decode_product_{how}_{wide}"));
            self.launch(&name, grid, 256, shared(self.ctx, lie, wide), true, &args);
        }
    }
}

/// Sequences of a step at most for which these products are as fast as the library's.
pub fn product_most(ctx: &Context) -> usize {
    most(ctx, Lie::Rows)
}
