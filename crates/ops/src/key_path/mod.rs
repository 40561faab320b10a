//! The removal and replacement keys. With a = sigmoid(rate) the in-context learning rate, per head
//! u = k k_k / max(||k k_k||, 1e-12): replacement key k (1 + (a - 1) k_a), and the removal pair (-u, s a u) for WKV-7.
//! s is 1, or 2 for the doubled in-context rate: at a decay of 1 the transition I - s a u u^T then has eigenvalues down to -1,
//! so that one token can negate or swap (the paper's appendix D.1).
//!
//! Backward, with gradients dk~, da~, db~ of the three, the last times s: d = a db~ - da~; dz = (d - u (u . d)) / ||k k_k|| (without the projection below
//! the floor); dk = dk~ (1 - (1 - a) k_a) + dz k_k; drate = (dk~ k k_a + db~ u) a (1 - a); dk_k = sum dz k; dk_a = -sum dk~ k (1 - a).

use crate::rows::{blocks, param_sums, row, sum};
use crate::{Param, Recompute, Tape, Var};
use anser_tensor::{Buf, DisjointMut, math, simd::vectorize};

mod cuda;
#[cfg(test)]
mod tests;

/// What [`Tape::key_path`] gives, each [tokens, C].
pub struct KeyPath {
    /// Replacement key.
    pub k: Var,
    /// Minus the removal key.
    pub a: Var,
    /// Removal key times the in-context learning rate times `scale`.
    pub b: Var,
}

impl<'p> Tape<'p> {
    /// Keys from k [tokens, C] and the logits `rate` [tokens, C] of the in-context learning rate, which the removal has `scale`
    /// times (1, or 2 for the doubled rate) and the replacement key once.
    pub fn key_path(&mut self, k: &Var, rate: &Var, k_k: Param, k_a: Param, heads: usize, scale: f32) -> KeyPath {
        let (rows, c) = (k.rows(), k.cols());
        let n = c / heads;
        let ctx = self.ctx().clone();
        let o = self.keys(k.buf(), rate.buf(), k_k, k_a, heads, scale);
        let needs = self.needs_grad(&[k, rate], &[k_k, k_a]);
        let (from, outs) = ((k.keep(), rate.keep()), o.map(|o| self.output(rows, c, o, needs)));
        let make = move |t: &Tape<'_>| t.keys(&t.value(&from.0), &t.value(&from.1), k_k, k_a, heads, scale);
        let [ko, ao, bo] = self.again(Recompute::All, outs, make);
        let out = KeyPath { k: ko, a: ao, b: bo };
        if needs {
            let slots = [out.k.slot(), out.a.slot(), out.b.slot()];
            let (gk, gz, k, rate) = (k.slot(), rate.slot(), k.keep(), rate.keep());
            self.record(move |b| {
                let d = slots.map(|s| s.take().unwrap_or_else(|| ctx.zeros(rows * c)));
                let (mut dk, mut dz) = (gk.alloc(&ctx), gz.alloc(&ctx));
                let (k, rate) = (b.value(&k), b.value(&rate));
                if let Some(gpu) = ctx.cuda() {
                    let sums = cuda::backward(b, gpu, &k, &rate, &d, [k_k, k_a], [&dk, &dz], heads, scale);
                    gk.add(dk);
                    return gz.add_summed(dz, sums);
                }
                let (pk, pa) = (b.param(k_k), b.param(k_a));
                let (to_k, to_z) = (DisjointMut::new(&mut dk), DisjointMut::new(&mut dz));
                param_sums(b, [k_k, k_a], rows, |r, [dkk, dka]| {
                    for i in r {
                        let (gk, gz) = (row(&to_k, i, c), row(&to_z, i, c));
                        for h in 0..heads {
                            let q = h * n..(h + 1) * n;
                            let (k, z) = (&k[i * c..][q.clone()], &rate[i * c..][q.clone()]);
                            let [d0, d1, d2] = d.each_ref().map(|d| &d[i * c..][q.clone()]);
                            let (pk, pa) = (&pk[q.clone()], &pa[q.clone()]);
                            let (gk, gz, dkk, dka) =
                                (&mut gk[q.clone()], &mut gz[q.clone()], &mut dkk[q.clone()], &mut dka[q]);
                            vectorize(
                                #[inline(always)]
                                || {
                                    let norm = sum(n, |j| k[j] * pk[j] * (k[j] * pk[j])).sqrt();
                                    let inv = 1.0 / norm.max(1e-12);
                                    let along = if norm > 1e-12 {
                                        sum(n, |j| k[j] * pk[j] * inv * (math::sigmoid(z[j]) * scale * d2[j] - d1[j]))
                                    } else {
                                        0.0
                                    };
                                    for j in 0..n {
                                        let (a, na) = (math::sigmoid(z[j]), math::sigmoid(-z[j]));
                                        let u = k[j] * pk[j] * inv;
                                        let db = scale * d2[j];
                                        let du = (a * db - d1[j] - u * along) * inv;
                                        gk[j] = d0[j] * (1.0 - na * pa[j]) + du * pk[j];
                                        gz[j] = (d0[j] * k[j] * pa[j] + db * u) * a * na;
                                        dkk[j] += du * k[j];
                                        dka[j] -= d0[j] * k[j] * na;
                                    }
                                },
                            );
                        }
                    }
                });
                gk.add(dk);
                gz.add(dz);
            });
        }
        out
    }

    /// The three keys.
    fn keys(&self, k: &Buf, rate: &Buf, k_k: Param, k_a: Param, heads: usize, scale: f32) -> [Buf; 3] {
        let (ctx, c) = (self.ctx(), k_k.cols);
        let (n, rows) = (c / heads, k.len() / c);
        let mut o: [Buf; 3] = std::array::from_fn(|_| ctx.alloc(k.len()));
        if let Some(gpu) = ctx.cuda() {
            cuda::forward(self, gpu, k, rate, [k_k, k_a], &o, heads, scale);
        }
        let (pk, pa) = (self.param(k_k), self.param(k_a));
        self.run(|| {
            let o = o.each_mut().map(|o| DisjointMut::new(&mut o[..]));
            blocks(ctx, rows, |_, r| {
                for i in r {
                    let [ko, ao, bo] = o.each_ref().map(|o| row(o, i, c));
                    for h in 0..heads {
                        let q = h * n..(h + 1) * n;
                        let (k, z) = (&k[i * c..][q.clone()], &rate[i * c..][q.clone()]);
                        let (pk, pa, ko, ao, bo) =
                            (&pk[q.clone()], &pa[q.clone()], &mut ko[q.clone()], &mut ao[q.clone()], &mut bo[q]);
                        vectorize(
                            #[inline(always)]
                            || {
                                let inv = 1.0 / sum(n, |j| k[j] * pk[j] * (k[j] * pk[j])).sqrt().max(1e-12);
                                for j in 0..n {
                                    let (u, a) = (k[j] * pk[j] * inv, math::sigmoid(z[j]));
                                    ko[j] = k[j] * (1.0 + (a - 1.0) * pa[j]);
                                    ao[j] = -u;
                                    bo[j] = u * a * scale;
                                }
                            },
                        );
                    }
                }
            })
        });
        o
    }
}
