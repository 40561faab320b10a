//! What attention keeps of a sequence.

use super::plan::{self, Plan};
use super::{Chunks, cuda};
use crate::{Segment, Var};
use anser_tensor::cuda::DevicePtr;
use anser_tensor::{Buf, Context, DType, GrowingRows, Guard};

/// Keys and values [tokens, key heads x N] that one layer's attention has seen of one sequence, and the mean key of every full chunk. Clones share
/// memory ([`GrowingRows`]), so that a state can be kept or forked at no cost.
#[derive(Clone)]
pub struct Past {
    /// Of queries, and of keys.
    heads: [usize; 2],
    pub(super) keys: GrowingRows,
    pub(super) values: GrowingRows,
    /// f32 [chunks, key heads x N].
    pub(super) means: GrowingRows,
    /// Whatever else is kept of every token, [tokens, heads x N].
    notes: Vec<GrowingRows>,
}

impl Past {
    /// Nothing seen, for so many heads of queries and of keys of size `n`.
    pub fn new(ctx: &Context, heads: [usize; 2], n: usize) -> Past {
        let rows = |dtype| GrowingRows::new(ctx, heads[1] * n, dtype);
        let [keys, values] = [ctx.dtype(); 2].map(rows);
        Past { heads, keys, values, means: rows(DType::F32), notes: Vec::new() }
    }

    /// Tokens kept.
    #[allow(clippy::len_without_is_empty)] // nobody asks
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.rows().chain([&self.means]).map(GrowingRows::bytes).sum()
    }

    /// What is kept of every token: keys, values, notes.
    fn rows(&self) -> impl Iterator<Item = &GrowingRows> {
        [&self.keys, &self.values].into_iter().chain(&self.notes)
    }

    /// Heads of queries, and of keys.
    pub fn heads(&self) -> [usize; 2] {
        self.heads
    }

    /// Channels of keys and values, and of notes.
    pub fn channels(&self) -> [usize; 2] {
        let [heads, key_heads] = self.heads;
        [self.keys.cols(), self.keys.cols() / key_heads * heads]
    }

    /// Copies of what is kept of every token, matrices of so many tokens as f32: keys, values, then notes; waits for the device.
    pub fn to_vecs(&self) -> Vec<Vec<f32>> {
        self.rows().map(GrowingRows::to_vec).collect()
    }

    /// A copy of the keys, [tokens, key heads x N] as f32; waits for the device.
    pub fn keys(&self) -> Vec<f32> {
        self.keys.to_vec()
    }

    /// Copies of the notes, likewise.
    pub fn notes(&self) -> Vec<Vec<f32>> {
        self.notes.iter().map(GrowingRows::to_vec).collect()
    }

    /// How badly a state [H, N, N], f32, gives back each of the first `count` tokens' values under its key, which are the notes, the mean over heads:
    /// |v - S k / |k|^2|^2 / |v|^2. `None` on a CPU.
    pub fn forgotten(&self, ctx: &Context, count: usize, state: &Buf) -> Option<Vec<f32>> {
        let (gpu, [values, keys]) = (ctx.cuda()?, &self.notes[..]) else { return None };
        let heads = self.heads[0];
        let errors = ctx.alloc_f32(heads * count);
        let of = [count, heads, self.channels()[1] / heads];
        cuda::forgotten(ctx, gpu, [values, keys].map(|n| n.read().ptr()), state, &errors, of);
        let errors = errors.to_vec();
        let mean = |t: usize| (0..heads).map(|h| errors[h * count + t]).sum::<f32>() / heads as f32;
        Some((0..count).map(mean).collect())
    }

    /// The attention that the queries of the last `asking` tokens, which are the notes, pay to each of the first `count` tokens: a softmax over these, summed over
    /// queries and heads. `None` on a CPU.
    pub fn asked(&self, ctx: &Context, asking: usize, count: usize) -> Option<Vec<f32>> {
        let (gpu, [queries]) = (ctx.cuda()?, &self.notes[..]) else { return None };
        let ([_, c], [heads, key_heads]) = (self.channels(), self.heads);
        let sums = ctx.alloc_f32(heads * count);
        let last = queries.read().ptr().offset((self.len() - asking) * c, queries.dtype());
        let of = [asking, count, heads, key_heads, c / heads];
        cuda::asked(ctx, gpu, [last, self.keys.read().ptr()], &sums, of);
        let sums = sums.to_vec();
        Some((0..count).map(|t| (0..heads).map(|h| sums[h * count + t]).sum()).collect())
    }

    /// The same with notes of the last `count` tokens: rows of `notes`, as many matrices every time, from row `first` on.
    pub fn noting(&self, ctx: &Context, notes: &[&Buf], first: usize, count: usize) -> Past {
        let c = self.channels()[1];
        let add = |(i, from): (usize, &&Buf)| {
            let before = self.notes.get(i).cloned().unwrap_or_else(|| GrowingRows::new(ctx, c, ctx.dtype()));
            before.append(ctx, from, first, count)
        };
        Past { notes: notes.iter().enumerate().map(add).collect(), ..self.clone() }
    }

    /// The tokens of these numbers alone, ascending, as if nothing else had been seen.
    pub fn keep(&self, ctx: &Context, tokens: &[usize], chunks: Chunks) -> Past {
        let gather = |rows: &GrowingRows| {
            let (from, c) = (rows.read(), rows.cols());
            GrowingRows::new(ctx, c, rows.dtype()).append_with(ctx, tokens.len(), |to, at| {
                let mut done = 0;
                for run in tokens.chunk_by(|a, b| a + 1 == *b) {
                    to.write_part(at + done * c, &from, run[0] * c, run.len() * c);
                    done += run.len();
                }
            })
        };
        let (keys, values) = (gather(&self.keys), gather(&self.values));
        let none = GrowingRows::new(ctx, self.keys.cols(), DType::F32);
        let means = grown(ctx, &none, &keys, self.heads, chunks);
        Past { heads: self.heads, keys, values, means, notes: self.notes.iter().map(gather).collect() }
    }

    /// Forgets what was appended to it, where nobody has that any more ([`GrowingRows::reclaim`]).
    pub fn reclaim(&self) {
        self.rows().chain([&self.means]).for_each(GrowingRows::reclaim);
    }

    /// The same with room for the rows of one token more, with `notes` notes, which somebody else writes; the mean of a chunk that they fill comes with
    /// [`Past::with_means`].
    pub fn with_room(&self, ctx: &Context, notes: usize) -> Past {
        let room = |rows: &GrowingRows| rows.append_with(ctx, self.len() + 1 - rows.len(), |_, _| ());
        let c = self.channels()[1];
        let note = |i: usize| room(self.notes.get(i).unwrap_or(&GrowingRows::new(ctx, c, ctx.dtype())));
        let (keys, values) = (room(&self.keys), room(&self.values));
        Past { heads: self.heads, keys, values, means: self.means.clone(), notes: (0..notes).map(note).collect() }
    }

    /// The same with the means of all full chunks.
    pub fn with_means(&self, ctx: &Context, chunks: Chunks) -> Past {
        Past { means: grown(ctx, &self.means, &self.keys, self.heads, chunks), ..self.clone() }
    }

    /// Where keys, values, means and up to two notes begin on the device; null where there are none.
    pub fn addresses(&self) -> [DevicePtr; 5] {
        let at = |rows: &GrowingRows| rows.read().ptr();
        let note = |i: usize| self.notes.get(i).map_or(DevicePtr::NULL, at);
        [at(&self.keys), at(&self.values), at(&self.means), note(0), note(1)]
    }

    /// Keys, values and means for reading.
    pub(super) fn read(&self) -> [Guard<'_>; 3] {
        [&self.keys, &self.values, &self.means].map(GrowingRows::read)
    }

    /// The same and then `count` rows of keys and values, from row `first` on.
    pub fn append(&self, ctx: &Context, [k, v]: [&Buf; 2], first: usize, count: usize, chunks: Chunks) -> Past {
        let keys = self.keys.append(ctx, k, first, count);
        let values = self.values.append(ctx, v, first, count);
        let means = grown(ctx, &self.means, &keys, self.heads, chunks);
        Past { heads: self.heads, keys, values, means, notes: self.notes.clone() }
    }

    /// What segments see: for each the past that its rows of `k` and `v` were appended to; `None` where it starts from nothing and
    /// leaves nothing. And the pasts by slot afterwards.
    pub(super) fn advance(
        ctx: &Context, pasts: &[Past], [k, v]: [&Var; 2], segments: &[Segment], heads: [usize; 2], chunks: Chunks,
    ) -> (Vec<Option<Past>>, Vec<Past>) {
        let mut next = pasts.to_vec();
        let seen = segments.iter().map(|s| {
            s.state_in.or(s.state_out)?;
            let before =
                s.state_in.map_or_else(|| Past::new(ctx, heads, k.cols() / heads[1]), |slot| pasts[slot].clone());
            let after = before.append(ctx, [k.buf(), v.buf()], s.start, s.len, chunks);
            if let Some(slot) = s.state_out {
                next[slot] = after.clone();
            }
            Some(after)
        });
        (seen.collect(), next)
    }
}

/// The means with those of chunks that have become full.
fn grown(
    ctx: &Context, means: &GrowingRows, keys: &GrowingRows, [heads, key_heads]: [usize; 2], chunks: Chunks,
) -> GrowingRows {
    let (known, full) = (means.len(), keys.len() / chunks.size);
    if full == known {
        return means.clone();
    }
    means.append_with(ctx, full - known, |to, at| {
        let rows = keys.read();
        if let Some(gpu) = ctx.cuda() {
            let (len, none) = (full * chunks.size, DevicePtr::NULL);
            let (at, to) = (rows.ptr(), to.ptr());
            let sequence = plan::Sequence { first_row: 0, len, past: 0, known, keys: at, values: none, means: to };
            let n = keys.cols() / key_heads;
            let plan = Plan::new(ctx, 0, [heads, key_heads], n, chunks, &[sequence]);
            cuda::means(ctx, gpu, &plan);
        } else if !ctx.is_dry() {
            super::means(ctx, &rows, known..full, chunks.size, &mut to[at..at + (full - known) * keys.cols()]);
        }
    })
}
