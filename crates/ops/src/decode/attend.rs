//! Attention of a step (`attend.cuh`): how its work is shared, its memory, and its launches.

use super::{BATCH, Step};
use crate::attention::Chunks;
use crate::gpu::kernel;
use anser_tensor::cuda::{Arg, DevicePtr};
use anser_tensor::{Buf, Context};

/// Blocks at most that share the chunks of a sequence's head.
const SHARES: usize = 8;
/// Past chunks that a token may see at most.
const MOST_WANTED: usize = 256;
/// Warps of a block that attends, and keys that one takes at a time.
const WARPS: usize = 4;
const KEYS: usize = 16;

/// Work shares and memory between the kernels.
pub struct Attend {
    /// Of queries, and of keys.
    heads: [usize; 2],
    size: usize,
    want: usize,
    /// Of the chunks that are wanted, the first and the last of the past that always are.
    always: [usize; 2],
    /// Blocks that share the keys of a head, with up to [`BATCH`] sequences, and all of those that fill the GPU.
    shares: usize,
    enough: usize,
    apart: bool,
    found: Buf,
    picks: Buf,
    parts: Buf,
    /// Of choosing and of attending.
    ended: [Buf; 2],
}

/// What the kernels read and write beside their memory.
#[derive(Clone, Copy)]
pub struct Attended {
    /// q, k and v of the sequences, f32, and behind each one's a gate for each head, if there is one, filled up to a multiple of 8: [batch, channels of all].
    pub projected: DevicePtr,
    /// Whether there is.
    pub gated: bool,
    /// Value and key of the block before [2, batch, C], if they are noted.
    pub wrote: DevicePtr,
    /// Matrices that are noted of every token: none, the query, or those of `wrote`.
    pub notes: usize,
    /// Of the block: addresses of keys, values, means and two notes of the first slot; those of the next are behind those of all `blocks`.
    pub kept: DevicePtr,
    /// Attention blocks.
    pub blocks: usize,
    /// Which slots the sequences have, `int`.
    pub slots: DevicePtr,
    /// Tokens before this one in each sequence, `int`.
    pub positions: DevicePtr,
}

impl Attend {
    /// For steps of up to `batch` sequences with so many heads of queries and of keys. `None` without a GPU, or for a rule that the kernels don't hold.
    pub fn new(ctx: &Context, batch: usize, all: [usize; 2], n: usize, chunks: Chunks) -> Option<Attend> {
        let heads = all[0];
        let (size, want) = (chunks.size.min(i32::MAX as usize), chunks.top - 1);
        if want > MOST_WANTED {
            return None;
        }
        let enough = 2 * ctx.cuda()?.info().multiprocessors as usize;
        let tiles = chunks.top.saturating_mul(size.div_ceil(KEYS));
        let shares = enough.div_ceil(heads).min(tiles.div_ceil(WARPS)).max(1);
        let most = (batch.min(BATCH) * heads * shares).max(enough).max(batch * heads);
        Some(Attend {
            heads: all,
            size,
            want,
            always: [chunks.sink, chunks.window],
            shares,
            enough,
            apart: false,
            found: ctx.alloc_f32(batch * heads * SHARES * want * 2),
            picks: ctx.alloc_f32(batch * heads * want),
            parts: ctx.alloc_f32(most * (n + 2)),
            ended: [0; 2].map(|_| ctx.zeros_f32(batch * heads)),
        })
    }

    /// From now on a sequence's bits don't depend on how many there are, up to `batch`.
    pub fn set_apart(&mut self, ctx: &Context, batch: usize, n: usize) {
        self.apart = true;
        self.parts = ctx.alloc_f32(self.parts.len().max(batch * self.heads[0] * self.shares * (n + 2)));
    }

    /// Blocks that share the keys of a head: the same for few sequences, so that a sequence's bits don't depend on how many there are.
    fn shares(&self, batch: usize) -> usize {
        if self.apart || batch <= BATCH {
            self.shares
        } else {
            (self.enough / (self.heads[0] * batch)).clamp(1, self.shares)
        }
    }
}

impl Step<'_> {
    /// Puts keys, values and notes of the tokens to those of their sequences, and attends: out [batch, C] in the type of activations.
    pub fn attend(&self, plan: &Attend, of: Attended, out: DevicePtr) {
        let ([sink, window], [heads, key_heads]) = (plan.always, plan.heads);
        let (keys, group) = (key_heads * self.n, heads / key_heads);
        let stride = self.c + 2 * keys + if of.gated { heads.next_multiple_of(8) } else { 0 };
        let values = [stride, self.c, keys, group, of.blocks, plan.size, plan.want, of.notes, sink, window];
        let words: Vec<u64> = values.chunks(2).map(|pair| pair[0] as u64 | (pair[1] as u64) << 32).collect();
        let rule = Arg::Struct(&words);
        let name = |base: &str| kernel(self.ctx, &format!("decode_{base}_{}", self.n));
        let sequences = [of.kept, of.slots, of.positions].map(Arg::from);
        let mut args: Vec<Arg> = [of.projected, of.wrote].map(Arg::from).into();
        args.extend(sequences.iter().copied());
        args.extend([plan.found.ptr(), plan.ended[0].ptr(), plan.picks.ptr()].map(Arg::from));
        args.push(rule);
        self.launch(&name("choose"), [SHARES, heads, self.batch], 256, 0, true, &args);
        let mut args = vec![Arg::from(of.projected)];
        args.extend(sequences);
        args.extend([plan.picks.ptr(), plan.parts.ptr(), plan.ended[1].ptr(), out].map(Arg::from));
        args.push(rule);
        let grid = [plan.shares(self.batch), heads, self.batch];
        self.launch(&name("attend"), grid, WARPS * 32, 0, true, &args);
    }
}
