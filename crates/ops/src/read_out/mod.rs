//! What leaves time mixing: (GroupNorm(y) weight + bias + (sum_j r_j k_j r_k_j) v) gate, per head, eps 64e-5.
//!
//! Backward, with e = dout gate, z the normalised y, s = sum_j r_j k_j r_k_j, t = sum_j e_j v_j: dy as in LayerNorm with h = e weight; dweight = sum e z;
//! dbias = sum e; dv = s e; dr = t k r_k; dk = t r r_k; dr_k = sum t r k; dgate = dout (z weight + bias + s v).

use crate::rows::{blocks, norm_grad, param_sums, row, stats, sum};
use crate::{Param, Tape, Var};
use anser_tensor::{Buf, DisjointMut, simd::vectorize};

mod cuda;
#[cfg(test)]
mod tests;

/// 1e-5 x 8^2, as the official models have it for every head size.
const EPS: f32 = 64e-5;

impl<'p> Tape<'p> {
    /// GroupNorm of y over heads, bonus and gate; all inputs [tokens, C], r_k [heads, N].
    pub fn read_out(
        &mut self, y: &Var, r: &Var, k: &Var, v: &Var, gate: &Var, r_k: Param, weight: Param, bias: Param, heads: usize,
    ) -> Var {
        let (rows, c) = (y.rows(), y.cols());
        let n = c / heads;
        let ctx = self.ctx().clone();
        let mut o = ctx.alloc(rows * c);
        if let Some(gpu) = ctx.cuda() {
            cuda::forward(self, gpu, [y, r, k, v, gate], [r_k, weight, bias], &o, heads);
        }
        let (rk, w, bi) = (self.param(r_k), self.param(weight), self.param(bias));
        self.run(|| {
            let o = DisjointMut::new(&mut o);
            blocks(&ctx, rows, |_, range| {
                for i in range {
                    let out = row(&o, i, c);
                    for h in 0..heads {
                        let q = h * n..(h + 1) * n;
                        let [y, r, k, v, g] = [y, r, k, v, gate].map(|x| &x.data()[i * c..][q.clone()]);
                        let (rk, w, bi, out) = (&rk[q.clone()], &w[q.clone()], &bi[q.clone()], &mut out[q]);
                        vectorize(
                            #[inline(always)]
                            || {
                                let (mean, inv) = stats(y, EPS);
                                let s = sum(n, |j| r[j] * k[j] * rk[j]);
                                for j in 0..n {
                                    out[j] = ((y[j] - mean) * inv * w[j] + bi[j] + s * v[j]) * g[j];
                                }
                            },
                        );
                    }
                }
            })
        });
        let needs = self.needs_grad(&[y, r, k, v, gate], &[r_k, weight, bias]);
        let out = self.output(rows, c, o, needs);
        if needs {
            let d = out.slot();
            let (ins, to) = ([y, r, k, v, gate].map(Var::keep), [y, r, k, v, gate].map(Var::slot));
            self.record(move |b| {
                let Some(d) = d.take() else { return };
                let ins = ins.each_ref().map(|x| b.value(x));
                let mut gs: [Buf; 5] = to.each_ref().map(|to| to.alloc(&ctx));
                if let Some(gpu) = ctx.cuda() {
                    let ins = ins.each_ref().map(|x| &**x);
                    cuda::backward(b, gpu, &d, ins, [r_k, weight, bias], gs.each_ref(), heads);
                    return to.iter().zip(gs).for_each(|(to, g)| to.add(g));
                }
                let (rk, w, bi) = (b.param(r_k), b.param(weight), b.param(bias));
                let go = gs.each_mut().map(|g| DisjointMut::new(&mut g[..]));
                param_sums(b, [r_k, weight, bias], rows, |range, [drk, dw, db]| {
                    for i in range {
                        let g5 = go.each_ref().map(|g| row(g, i, c));
                        let [gy, gr, gk, gv, gg] = g5;
                        for h in 0..heads {
                            let q = h * n..(h + 1) * n;
                            let [y, r, k, v, g] = ins.each_ref().map(|x| &x[i * c..][q.clone()]);
                            let d = &d[i * c..][q.clone()];
                            let (rk, w, bi) = (&rk[q.clone()], &w[q.clone()], &bi[q.clone()]);
                            let (gy, gr, gk, gv, gg) = (
                                &mut gy[q.clone()],
                                &mut gr[q.clone()],
                                &mut gk[q.clone()],
                                &mut gv[q.clone()],
                                &mut gg[q.clone()],
                            );
                            let (drk, dw, db) = (&mut drk[q.clone()], &mut dw[q.clone()], &mut db[q]);
                            vectorize(
                                #[inline(always)]
                                || {
                                    let (mean, inv) = stats(y, EPS);
                                    let s = sum(n, |j| r[j] * k[j] * rk[j]);
                                    let t = sum(n, |j| d[j] * g[j] * v[j]);
                                    norm_grad(y, mean, inv, |j| d[j] * g[j] * w[j], gy);
                                    for j in 0..n {
                                        let x = (y[j] - mean) * inv;
                                        let e = d[j] * g[j];
                                        gg[j] = d[j] * (x * w[j] + bi[j] + s * v[j]);
                                        gv[j] = s * e;
                                        gr[j] = t * k[j] * rk[j];
                                        gk[j] = t * r[j] * rk[j];
                                        drk[j] += t * r[j] * k[j];
                                        dw[j] += e * x;
                                        db[j] += e;
                                    }
                                },
                            );
                        }
                    }
                });
                to.iter().zip(gs).for_each(|(to, g)| to.add(g));
            });
        }
        out
    }
}
