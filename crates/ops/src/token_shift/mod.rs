//! Token shift with K interpolations in one pass: y_k = x + (x' - x) mu_k, with x' the token before in the same
//! sequence: row `state_in` of the arena `last` at a segment's start, or 0 there if it has none.
//!
//! Backward: dx_t = sum_k dy_k,t (1 - mu_k) + dy_k,t+1 mu_k, the second part within the segment only; dmu_k = sum_t dy_k,t (x'_t - x_t).

use crate::rows::{blocks, next_arena, param_sums, row};
use crate::{Param, Recompute, Segment, Tape, Var};
use anser_tensor::{Buf, DisjointMut, simd::vectorize};
use std::sync::Arc;

mod cuda;
#[cfg(test)]
mod tests;

/// The row before row i of its segment.
fn previous<'a>(x: &'a [f32], last: &'a [f32], zero: &'a [f32], s: &Segment, i: usize, c: usize) -> &'a [f32] {
    if i > s.start {
        return &x[(i - 1) * c..i * c];
    }
    match s.state_in {
        Some(k) => &last[k * c..(k + 1) * c],
        None => zero,
    }
}

/// y = x + (p - x) mu of one row.
pub(crate) fn interpolate(x: &[f32], p: &[f32], mu: &[f32], y: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (((y, x), p), m) in y.iter_mut().zip(x).zip(p).zip(mu) {
                *y = x + (p - x) * m;
            }
        },
    );
}

/// The index of every row's segment.
pub(crate) fn owner(segments: &[Segment], rows: usize) -> Vec<u32> {
    let mut o = vec![0; rows];
    for (n, s) in segments.iter().enumerate() {
        o[s.start..s.start + s.len].fill(n as u32);
    }
    o
}

impl<'p> Tape<'p> {
    /// K interpolations of x [tokens, C] with the token before, and the arena [slots, C] with each segment's last token
    /// in its row `state_out`. On a GPU the interpolations, and later their gradients, lie at equal distances in order of `mu`. If no segment has one, the arena comes back as it is.
    pub fn token_shift<const K: usize>(
        &mut self, x: &Var, last: &Var, segments: &Arc<[Segment]>, mu: [Param; K],
    ) -> ([Var; K], Var) {
        let (rows, c) = (x.rows(), x.cols());
        let ctx = self.ctx().clone();
        let ys = self.mix(x.buf(), last.buf(), segments, mu);
        let needs = self.needs_grad(&[x, last], &mu);
        let outs = self.outputs(rows, c, ys, needs);
        let (kept, from) = ((x.keep(), last.keep()), segments.clone());
        let outs = self.again(Recompute::Shifts, outs, move |t| t.mix(&t.value(&kept.0), &t.value(&kept.1), &from, mu));
        let writes = segments.iter().any(|s| s.state_out.is_some());
        let new_last = if writes {
            let mut n = next_arena(&ctx, last, segments);
            if let Some(gpu) = ctx.cuda() {
                cuda::keep_last(&ctx, gpu, x, segments, &n);
            }
            self.run(|| {
                for s in segments.iter() {
                    if let Some(k) = s.state_out {
                        let e = s.start + s.len;
                        n[k * c..(k + 1) * c].copy_from_slice(&x.data()[(e - 1) * c..e * c]);
                    }
                }
            });
            let needs = self.needs_grad(&[x, last], &[]);
            self.output(last.rows(), c, n, needs)
        } else {
            last.clone()
        };
        if needs {
            let (dys, dlast_new, dx, dlast) =
                (outs.each_ref().map(Var::slot), writes.then(|| new_last.slot()), x.slot(), last.slot());
            let (x, last, segments) = (x.keep(), last.keep(), segments.clone());
            self.record(move |b| {
                let d: [Option<Buf>; K] = dys.each_ref().map(|s| s.take());
                let dn = dlast_new.and_then(|s| s.take());
                if dn.is_none() && d.iter().all(Option::is_none) {
                    return;
                }
                let (x, last) = (b.value(&x), b.value(&last));
                if let Some(gpu) = ctx.cuda() {
                    return cuda::backward(b, gpu, &x, &last, &segments, mu, &d, dn.as_ref(), &dx, &dlast);
                }
                let (zero, own) = (vec![0.0; c], owner(&segments, rows));
                let xd = &x[..];
                param_sums(b, mu, rows, |r, mut dm| {
                    for i in r {
                        let p = previous(xd, &last, &zero, &segments[own[i] as usize], i, c);
                        let x = &xd[i * c..(i + 1) * c];
                        for k in 0..K {
                            if let Some(d) = &d[k] {
                                let d = &d[i * c..(i + 1) * c];
                                let m = &mut dm[k];
                                vectorize(
                                    #[inline(always)]
                                    || {
                                        for j in 0..c {
                                            m[j] += d[j] * (p[j] - x[j]);
                                        }
                                    },
                                );
                            }
                        }
                    }
                });
                let m = mu.map(|p| b.param(p));
                let back = |i: usize, g: &mut [f32], prev: bool| {
                    for k in 0..K {
                        if let Some(d) = &d[k] {
                            let (d, m) = (&d[i * c..(i + 1) * c], m[k]);
                            vectorize(
                                #[inline(always)]
                                || {
                                    for j in 0..c {
                                        g[j] += d[j] * if prev { m[j] } else { 1.0 - m[j] };
                                    }
                                },
                            );
                        }
                    }
                };
                if dx.wanted() {
                    let mut g = ctx.zeros(rows * c);
                    b.run(|_| {
                        let gs = DisjointMut::new(&mut g);
                        blocks(&ctx, rows, |_, r| {
                            for i in r {
                                let g = row(&gs, i, c);
                                let s = &segments[own[i] as usize];
                                back(i, g, false);
                                if i + 1 < s.start + s.len {
                                    back(i + 1, g, true);
                                } else if let (Some(dn), Some(k)) = (&dn, s.state_out) {
                                    g.iter_mut().zip(&dn[k * c..(k + 1) * c]).for_each(|(g, d)| *g += d);
                                }
                            }
                        });
                    });
                    dx.add(g);
                }
                if dlast.wanted() {
                    let mut g = ctx.zeros(last.len());
                    b.run(|_| {
                        if let Some(dn) = &dn {
                            g.copy_from_slice(dn);
                            for s in segments.iter() {
                                if let Some(k) = s.state_out {
                                    g[k * c..(k + 1) * c].fill(0.0);
                                }
                            }
                        }
                        for s in segments.iter() {
                            if let Some(k) = s.state_in {
                                back(s.start, &mut g[k * c..(k + 1) * c], true);
                            }
                        }
                    });
                    dlast.add(g);
                }
            });
        }
        (outs, new_last)
    }

    /// The interpolations.
    fn mix<const K: usize>(&self, x: &Buf, last: &Buf, segments: &Arc<[Segment]>, mu: [Param; K]) -> [Buf; K] {
        let (ctx, c) = (self.ctx(), mu[0].cols);
        let mut ys: [Buf; K] = ctx.alloc_each(x.len());
        if let Some(gpu) = ctx.cuda() {
            cuda::forward(self, gpu, x, last, segments, mu, &ys);
        }
        self.run(|| {
            let (m, rows) = (mu.map(|p| self.param(p)), x.len() / c);
            let (zero, own) = (vec![0.0; c], owner(segments, rows));
            let outs = ys.each_mut().map(|y| DisjointMut::new(&mut y[..]));
            blocks(ctx, rows, |_, r| {
                for i in r {
                    let p = previous(x, last, &zero, &segments[own[i] as usize], i, c);
                    let x = &x[i * c..(i + 1) * c];
                    for (out, m) in outs.iter().zip(m) {
                        interpolate(x, p, m, row(out, i, c));
                    }
                }
            });
        });
        ys
    }
}
