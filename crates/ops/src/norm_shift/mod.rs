//! What stands before every mixing of a block, in one call: the residual connection s = x + dx, h = LayerNorm(s) and the token shift of
//! h with K interpolations. See [`Tape::add_norm`] and [`Tape::token_shift`] for their formulas.
//!
//! Where a gradient is recorded, in a forecast and on a GPU it is these two. Inference on a CPU makes one pass over each row: h is never a
//! matrix, but two rows that stay in the nearest cache. The results are the same bits.

use crate::layer_norm::normalise;
use crate::rows::{blocks, next_arena, row};
use crate::{Param, Segment, Tape, Var, token_shift};
use anser_tensor::{Buf, DisjointMut};
use std::sync::Arc;

#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// From x and, if there is something to add, dx, both [tokens, C], and weight and bias of the norm: s [tokens, C], the K
    /// interpolations [tokens, C] of h, and the arena [slots, C] that follows `last`.
    pub fn norm_shift<const K: usize>(
        &mut self, x: Var, dx: Option<&Var>, [weight, bias]: [Param; 2], last: &Var, segments: &Arc<[Segment]>,
        mu: [Param; K],
    ) -> (Var, [Var; K], Var) {
        let ctx = self.ctx().clone();
        if self.is_recording() || ctx.is_dry() || ctx.cuda().is_some() {
            let (s, h) = match dx {
                Some(dx) => self.add_norm(x, dx, weight, bias),
                None => {
                    let h = self.layer_norm(&x, weight, bias);
                    (x, h)
                }
            };
            let (ys, last) = self.token_shift(&h, last, segments, mu);
            return (s, ys, last);
        }
        let (rows, c) = (x.rows(), x.cols());
        let (w, b, m) = (self.param(weight), self.param(bias), mu.map(|p| self.param(p)));
        let mut sum = dx.map(|_| ctx.alloc(rows * c));
        let mut ys: [Buf; K] = ctx.alloc_each(rows * c);
        let mut next = segments.iter().any(|s| s.state_out.is_some()).then(|| next_arena(&ctx, last, segments));
        {
            let add = |i: usize, to: &mut [f32]| {
                let dx = dx.map_or(&[][..], Var::data);
                crate::add::sum(&x.data()[i * c..(i + 1) * c], &dx[i * c..(i + 1) * c], to);
            };
            let sums = sum.as_mut().map(|s| DisjointMut::new(&mut s[..]));
            let outs = ys.each_mut().map(|y| DisjointMut::new(&mut y[..]));
            let arena = next.as_mut().map(|n| DisjointMut::new(&mut n[..]));
            let own = token_shift::owner(segments, rows);
            let zero = vec![0.0; c];
            blocks(&ctx, rows, |_, range| {
                // h of the row before and of this one.
                let mut h = vec![0.0; 2 * c];
                let (mut before, mut now) = h.split_at_mut(c);
                let first = range.start;
                for i in range {
                    let s = &segments[own[i] as usize];
                    if i == first && i > s.start {
                        // The row before is another task's: it is made here once more.
                        match dx {
                            Some(_) => {
                                add(i - 1, now);
                                normalise(now, w, b, before);
                            }
                            None => normalise(&x.data()[(i - 1) * c..i * c], w, b, before),
                        }
                    }
                    match &sums {
                        Some(sums) => {
                            let sum = row(sums, i, c);
                            add(i, sum);
                            normalise(sum, w, b, now);
                        }
                        None => normalise(&x.data()[i * c..(i + 1) * c], w, b, now),
                    }
                    let previous = match s.state_in {
                        _ if i > s.start => &*before,
                        Some(k) => &last.data()[k * c..(k + 1) * c],
                        None => &zero,
                    };
                    for (out, m) in outs.iter().zip(m) {
                        token_shift::interpolate(now, previous, m, row(out, i, c));
                    }
                    if let (Some(arena), Some(k)) = (&arena, s.state_out)
                        && i + 1 == s.start + s.len
                    {
                        // A row of the arena is the last row of one segment, and so one task's.
                        row(arena, k, c).copy_from_slice(now);
                    }
                    std::mem::swap(&mut before, &mut now);
                }
            });
        }
        let s = sum.map_or(x, |s| Var::constant(rows, c, s));
        let next = next.map_or_else(|| last.clone(), |n| Var::constant(last.rows(), c, n));
        (s, ys.map(|y| Var::constant(rows, c, y)), next)
    }
}
