//! Top-k chunk attention.

use crate::{Segment, Tape, Var};
use anser_tensor::{Buf, Context};
use std::sync::Arc;

mod cuda;
#[cfg(test)]
mod device;

/// Which keys a query sees: chunks of `size` tokens, `top` of them counting its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    /// Tokens of a chunk.
    pub size: usize,
    /// Chunks that a query sees.
    pub top: usize,
}

/// The sequences of a training step: keys and values are in the rows of the segments.
fn plan(
    ctx: &Context, segments: &[Segment], heads: usize, chunks: Chunks, [q, k, v]: [&Var; 3], means: &Buf,
) -> cuda::Plan {
    let c = q.cols();
    let mut first = 0;
    let list: Vec<_> = segments
        .iter()
        .map(|s| {
            let means = means.ptr().offset(first * c, anser_tensor::DType::F32);
            first += s.len.div_ceil(chunks.size);
            let at = |x: &Var| x.buf().ptr().offset(s.start * c, ctx.dtype());
            cuda::Sequence { first_row: s.start, len: s.len, past: 0, known: 0, keys: at(k), values: at(v), means }
        })
        .collect();
    cuda::Plan::new(ctx, q.rows(), heads, c / heads, chunks, &list)
}

impl<'p> Tape<'p> {
    /// Top-k chunk attention of q, k, v [tokens, C]: [tokens, C]. On a GPU only.
    pub fn chunk_attention(
        &mut self, q: &Var, k: &Var, v: &Var, segments: &Arc<[Segment]>, heads: usize, chunks: Chunks,
    ) -> Var {
        let (rows, c) = (q.rows(), q.cols());
        let ctx = self.ctx().clone();
        let needs = self.needs_grad(&[q, k, v], &[]);
        let y = ctx.alloc(rows * c);
        let lse = needs.then(|| ctx.alloc_f32(rows * heads));
        let mut saved = None;
        if let Some(gpu) = ctx.cuda() {
            let count: usize = segments.iter().map(|s| s.len.div_ceil(chunks.size)).sum();
            let means = ctx.alloc_f32(count * c);
            let plan = plan(&ctx, segments, heads, chunks, [q, k, v], &means);
            cuda::means(&ctx, gpu, &plan);
            let picks = cuda::select(&ctx, gpu, &plan, q.buf());
            cuda::forward(&ctx, gpu, &plan, q.buf(), &picks, &y, lse.as_ref());
            saved = Some((plan, picks));
        }
        let out = self.output(rows, c, y, needs);
        if let (Some(lse), Some((plan, picks))) = (lse, saved) {
            let (slot, y) = (out.slot(), out.without_grad());
            let x = [q, k, v].map(Var::clone);
            self.record(move |_| {
                let Some(dy) = slot.take() else { return };
                let grads: [Buf; 3] = std::array::from_fn(|_| ctx.alloc(rows * c));
                if let Some(gpu) = ctx.cuda() {
                    cuda::backward(&ctx, gpu, &plan, x[0].buf(), &picks, [y.buf(), &dy, &lse], grads.each_ref());
                }
                x.iter().zip(grads).for_each(|(x, g)| x.add_grad(g));
            });
        }
        out
    }
}
