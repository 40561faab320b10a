//! What the kernels of chunk attention are told: the shapes of a call, its sequences, and how many pieces of work there are at most (see plan.cuh).

use super::Chunks;
use crate::gpu::fixed;
use anser_tensor::cuda::DevicePtr;
use anser_tensor::{Buf, Context, DType};
use std::ops::Range;

/// Queries of a block that is about queries alone.
pub const QUERIES: usize = 128;
/// Keys of a tile going back to keys; on Hopper.
pub const KEYS: usize = 64;
pub const HOPPER_KEYS: usize = 128;
/// On Hopper, queries of a tile, and going forward of an item where chunks are short: at most so long.
pub const HOPPER_TILE: usize = 192;
pub const ITEM: usize = 512;
pub const SHORT: usize = 256;
/// Rows that are counted together, and longest part of a list that one block takes.
pub const RUN: usize = 128;
const PIECE: usize = 2048;
/// On Hopper, where blocks take pieces as they can: as many times tiles of keys are enough, within these bounds.
const HOPPER_PIECES: usize = 528;
const HOPPER_PIECE: Range<usize> = 512..4096;
/// Of short chunks, least part of all pairs of queries and keys for which those who see all before them are worth a kernel of their own.
const DENSE_SHARE: f64 = 0.05;
/// Bytes between kernels that a group of heads may take: one head may take more.
pub const BETWEEN: usize = 1 << 30;

/// One sequence: `len` queries, in rows `first_row`.. of q, which follow on `past` keys.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
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
pub struct Plan {
    pub rows: usize,
    pub heads: usize,
    pub key_heads: usize,
    pub n: usize,
    pub chunks: Chunks,
    /// Bytes between kernels that a group of heads may take.
    pub between: usize,
    /// Each way, which have tiles of their own.
    pub sequences: [Buf; WAYS],
    pub count: usize,
    /// Totals over the sequences: chunks, counts of a head, runs, tiles, pieces times tiles of keys, blocks of queries.
    pub all: Totals,
    pub most_chunks: usize,
    /// Counts of a head in a sequence at most.
    pub most_counts: usize,
    pub piece: usize,
    /// Whether the kernels for Hopper do it.
    pub hopper: bool,
    /// Positions whose queries see all before them in one piece, without lists.
    pub dense: usize,
    /// How much of all pairs of queries and keys these have.
    pub dense_share: f64,
    /// First tiles, each way, that are taken before others.
    pub ahead: [usize; WAYS],
}

#[derive(Clone, Copy, Default)]
pub struct Totals {
    pub chunks: usize,
    pub counts: usize,
    pub runs: usize,
    /// Each way.
    pub tiles: [usize; WAYS],
    pub pieces: usize,
    pub queries: usize,
}

/// A direction; of short chunks the queries that see all before them go forward on their own.
#[derive(Clone, Copy, PartialEq)]
pub enum Way {
    Forward,
    Backward,
    Dense,
}
const WAYS: usize = 3;

/// Heads in hand.
#[derive(Clone, Copy)]
pub struct Group {
    pub first: usize,
    pub len: usize,
}

impl Plan {
    /// A call for `rows` rows of so many heads of queries and of keys of size `n`, with chunks no longer than a sequence and no more of them than there are.
    pub fn new(ctx: &Context, rows: usize, heads: [usize; 2], n: usize, chunks: Chunks, list: &[Sequence]) -> Plan {
        Plan::within(ctx, rows, heads, n, chunks, list, BETWEEN)
    }

    /// The same with a bound of bytes between kernels.
    pub fn within(
        ctx: &Context, rows: usize, [heads, key_heads]: [usize; 2], n: usize, chunks: Chunks, list: &[Sequence],
        between: usize,
    ) -> Plan {
        let k = chunks.top - 1;
        assert!(rows * 4 * chunks.top < 1 << 31, "{rows} rows of {} chunks are too many for one call", chunks.top);
        let piece = (rows * k / 64).next_multiple_of(64).clamp(64, PIECE);
        let hopper = ctx.cuda().is_some_and(|g| g.info().is_hopper());
        let hopper = hopper && ctx.dtype() != DType::F32 && n == 64 && chunks.size >= HOPPER_KEYS;
        let keys = if hopper { HOPPER_KEYS } else { KEYS };
        let piece = if hopper {
            let most = (rows * k * heads * chunks.size.div_ceil(keys) / HOPPER_PIECES)
                .clamp(HOPPER_PIECE.start, HOPPER_PIECE.end);
            most.next_multiple_of(64)
        } else {
            piece
        };
        let short = hopper && k > 0 && chunks.size <= SHORT;
        let ordered = list.windows(2).all(|w| w[0].first_row <= w[1].first_row);
        let dense = if hopper && k > 0 && ordered { chunks.top * chunks.size } else { 0 };
        let rows_below = |dense: usize, s: &Sequence| dense.saturating_sub(s.past).min(s.len);
        let (mut pairs, mut dense_pairs) = (0.0, 0.0);
        for s in list {
            let rows = rows_below(dense, s);
            dense_pairs += rows as f64 * (s.past as f64 + rows as f64 / 2.0);
            pairs += (s.len - rows) as f64 * (chunks.top as f64 - 0.5) * chunks.size as f64;
        }
        let dense_share = dense_pairs / (dense_pairs + pairs).max(1.0);
        let dense = if short && dense_share < DENSE_SHARE { 0 } else { dense };
        let dense_rows = |s: &Sequence| rows_below(dense, s);
        let ahead = match list {
            [s] if hopper => {
                let own = if k == 0 { s.len } else { dense_rows(s) }.div_ceil(HOPPER_TILE);
                [if short { 0 } else { own }, own, own]
            }
            _ => [0; WAYS],
        };
        let (mut all, mut most_chunks, mut most_counts, mut words) =
            (Totals::default(), 0, 0, [const { Vec::new() }; WAYS]);
        for s in list {
            let count = (s.past + s.len).div_ceil(chunks.size);
            let runs = s.len.div_ceil(RUN);
            for (way, words) in words.iter_mut().enumerate() {
                let ints = [
                    s.first_row,
                    if way == Way::Dense as usize { dense_rows(s) } else { s.len },
                    s.past,
                    count,
                    s.known,
                    all.chunks,
                    all.counts,
                    all.runs,
                    all.tiles[way],
                    all.pieces,
                    all.queries,
                    0,
                ];
                words.extend(ints.map(|i| i as i32));
                for p in [s.keys, s.values, s.means] {
                    words.extend([p.address() as i32, (p.address() >> 32) as i32]);
                }
            }
            let dense_rows = dense_rows(s);
            let tiles = |tile: usize, own: usize| {
                // A list of n queries has n.div_ceil(tile) tiles; all lists of the sequence together have at most k for each query.
                let lists = if k > 0 { (s.len - dense_rows) * k / tile + count } else { 0 };
                own + lists
            };
            all.chunks += count;
            all.counts += runs * count;
            all.runs += runs;
            let rows = if hopper { HOPPER_TILE } else { tile(n) };
            let by_rows = tiles(rows, s.len.div_ceil(rows));
            let own = count.saturating_sub(s.past.max(dense) / chunks.size);
            all.tiles[Way::Forward as usize] += if short { tiles(ITEM, own) } else { by_rows };
            all.tiles[Way::Backward as usize] += by_rows;
            all.tiles[Way::Dense as usize] += dense_rows.div_ceil(rows);
            all.pieces += (count + s.len * k / piece) * chunks.size.div_ceil(keys);
            all.queries += s.len.div_ceil(QUERIES);
            most_chunks = most_chunks.max(count);
            most_counts = most_counts.max(runs * count);
        }
        let sequences = words.map(|w| fixed(ctx, &w));
        let count = list.len();
        Plan {
            rows,
            heads,
            key_heads,
            n,
            chunks,
            between,
            sequences,
            count,
            all,
            most_chunks,
            most_counts,
            piece,
            hopper,
            dense,
            dense_share,
            ahead,
        }
    }

    /// The same as the kernels have it, for a group of heads.
    pub fn words(&self, way: Way, group: Group) -> [u64; 12] {
        let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        [
            self.sequences[way as usize].ptr().address(),
            pair(self.count, self.heads),
            pair(group.first, group.len),
            pair(self.chunks.top, self.chunks.size),
            pair(self.rows, self.all.chunks),
            pair(self.all.counts, RUN),
            pair(self.piece, self.pieces()),
            pair(self.all.tiles[way as usize], if way == Way::Dense { 1 } else { self.together() }),
            pair(self.bits(), self.key_tile()),
            pair(self.chunks.sink, self.chunks.window),
            pair(self.key_heads, self.heads / self.key_heads),
            pair(self.dense, self.ahead[way as usize]),
        ]
    }

    /// Whether chunks are short enough for a kernel that keeps their keys.
    pub fn short(&self) -> bool {
        self.hopper && self.picks() > 0 && self.chunks.size <= SHORT
    }

    /// Queries of a tile.
    pub fn tile(&self, way: Way) -> usize {
        match way {
            Way::Forward if self.short() => ITEM,
            _ if self.hopper => HOPPER_TILE,
            _ => tile(self.n),
        }
    }

    /// Pieces of lists of a head.
    pub fn pieces(&self) -> usize {
        self.all.pieces / self.chunks.size.div_ceil(self.key_tile())
    }

    pub fn key_tile(&self) -> usize {
        if self.hopper { HOPPER_KEYS } else { KEYS }
    }

    /// Bits of an entry that are the row; the slot is above them, the sign stays free.
    pub fn bits(&self) -> usize {
        (usize::BITS - self.rows.leading_zeros()) as usize
    }

    /// Tiles that a block of queries takes, one after the other, so that those of short chunks begin while others end; on Hopper, those it takes at a time.
    pub fn together(&self) -> usize {
        if self.hopper { (1024 / self.chunks.size).clamp(1, 8) } else { (512 / self.chunks.size).clamp(1, 4) }
    }

    pub fn picks(&self) -> usize {
        self.chunks.top - 1
    }

    pub fn all_heads(&self) -> Group {
        Group { first: 0, len: self.heads }
    }

    /// Whether tensor cores do it.
    pub fn on_tensor_cores(&self, ctx: &Context) -> bool {
        ctx.dtype() != DType::F32 && (self.n == 64 || self.n == 128)
    }

    /// Groups of about as many heads each, of `bytes` bytes a head.
    pub fn groups(&self, bytes: usize) -> impl Iterator<Item = Group> + use<> {
        let most = (self.between / bytes.max(1)).clamp(1, self.heads);
        let len = self.heads.div_ceil(self.heads.div_ceil(most));
        let heads = self.heads;
        (0..heads).step_by(len).map(move |first| Group { first, len: len.min(heads - first) })
    }
}

/// Queries of a tile on tensor cores.
pub fn tile(n: usize) -> usize {
    if n == 64 { 128 } else { 64 }
}
