//! What attention keeps of a sequence.

use super::Chunks;
use crate::{Segment, Var};
use anser_tensor::{Buf, Context, DType, GrowingRows, Guard};

/// Keys and values [tokens, C] that one layer's attention has seen of one sequence, and the mean key of every full chunk. Clones share
/// memory ([`GrowingRows`]), so that a state can be kept or forked at no cost.
#[derive(Clone)]
pub struct Past {
    pub(super) keys: GrowingRows,
    pub(super) values: GrowingRows,
    /// f32 [chunks, C].
    pub(super) means: GrowingRows,
}

impl Past {
    /// Nothing seen, for keys of `c` channels.
    pub fn new(ctx: &Context, c: usize) -> Past {
        let rows = |dtype| GrowingRows::new(ctx, c, dtype);
        Past { keys: rows(ctx.dtype()), values: rows(ctx.dtype()), means: rows(DType::F32) }
    }

    /// Tokens seen.
    #[allow(clippy::len_without_is_empty)] // nobody asks
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        [&self.keys, &self.values, &self.means].iter().map(|r| r.bytes()).sum()
    }

    /// Copies of keys and values [tokens, C] as f32; waits for the device.
    pub fn to_vecs(&self) -> [Vec<f32>; 2] {
        [self.keys.to_vec(), self.values.to_vec()]
    }

    /// Keys, values and means for reading.
    pub(super) fn read(&self) -> [Guard<'_>; 3] {
        [&self.keys, &self.values, &self.means].map(GrowingRows::read)
    }

    /// The same and then `count` rows of keys and values, from row `first` on.
    pub fn append(&self, ctx: &Context, [k, v]: [&Buf; 2], first: usize, count: usize, chunks: Chunks) -> Past {
        let keys = self.keys.append(ctx, k, first, count);
        let values = self.values.append(ctx, v, first, count);
        let (known, full) = (self.means.len(), keys.len() / chunks.size);
        let means = match full - known {
            0 => self.means.clone(),
            new => self.means.append_with(ctx, new, |to, at| {
                let c = keys.cols();
                if !ctx.is_dry() {
                    super::means(ctx, &keys.read(), known..full, chunks.size, &mut to[at..at + new * c]);
                }
            }),
        };
        Past { keys, values, means }
    }

    /// What segments see: for each the past that its rows of `k` and `v` were appended to; `None` where it starts from nothing and
    /// leaves nothing. And the pasts by slot afterwards.
    pub(super) fn advance(
        ctx: &Context, pasts: &[Past], [k, v]: [&Var; 2], segments: &[Segment], chunks: Chunks,
    ) -> (Vec<Option<Past>>, Vec<Past>) {
        let mut next = pasts.to_vec();
        let seen = segments.iter().map(|s| {
            s.state_in.or(s.state_out)?;
            let before = s.state_in.map_or_else(|| Past::new(ctx, k.cols()), |slot| pasts[slot].clone());
            let after = before.append(ctx, [k.buf(), v.buf()], s.start, s.len, chunks);
            if let Some(slot) = s.state_out {
                next[slot] = after.clone();
            }
            Some(after)
        });
        (seen.collect(), next)
    }
}
