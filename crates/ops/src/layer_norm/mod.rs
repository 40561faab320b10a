//! LayerNorm: y = (x - mean) / sqrt(variance + 1e-5) * weight + bias over the C channels of a token, population variance.
//!
//! Backward, with z the normalised x and h = dy * weight: dx = (h - mean(h) - z mean(h z)) / sigma, dweight = sum dy z,
//! dbias = sum dy. The statistics are computed again rather than kept.

use crate::rows::{blocks, norm_grad, param_sums, row, stats};
use crate::{Param, Tape, Var};
use anser_tensor::{DisjointMut, simd::vectorize};

mod cuda;
#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// LayerNorm of x [tokens, C].
    pub fn layer_norm(&mut self, x: &Var, weight: Param, bias: Param) -> Var {
        let (rows, c) = (x.rows(), x.cols());
        let ctx = self.ctx().clone();
        let mut y = ctx.alloc(rows * c);
        if let Some(gpu) = ctx.cuda() {
            cuda::forward(self, gpu, x, weight, bias, &y);
        }
        let (w, bi) = (self.param(weight), self.param(bias));
        self.run(|| {
            let (ys, xs) = (DisjointMut::new(&mut y), x.data());
            blocks(&ctx, rows, |_, r| {
                for i in r {
                    let y = row(&ys, i, c);
                    let x = &xs[i * c..(i + 1) * c];
                    vectorize(
                        #[inline(always)]
                        || {
                            let (mean, inv) = stats(x, 1e-5);
                            for j in 0..c {
                                y[j] = (x[j] - mean) * inv * w[j] + bi[j];
                            }
                        },
                    );
                }
            });
        });
        let needs = self.needs_grad(&[x], &[weight, bias]);
        let out = self.output(rows, c, y, needs);
        if needs {
            let (dy, dx, x) = (out.slot(), x.slot(), x.clone());
            self.record(move |b| {
                let Some(dy) = dy.take() else { return };
                if let Some(gpu) = ctx.cuda() {
                    return cuda::backward(b, gpu, &x, &dy, &dx, weight, bias);
                }
                param_sums(b, [weight, bias], rows, |r, [dw, db]| {
                    for i in r {
                        let (x, d) = (&x.data()[i * c..(i + 1) * c], &dy[i * c..(i + 1) * c]);
                        vectorize(
                            #[inline(always)]
                            || {
                                let (mean, inv) = stats(x, 1e-5);
                                for j in 0..c {
                                    dw[j] += d[j] * (x[j] - mean) * inv;
                                    db[j] += d[j];
                                }
                            },
                        );
                    }
                });
                if dx.wanted() {
                    let mut g = ctx.alloc(rows * c);
                    let w = b.param(weight);
                    b.run(|_| {
                        let gs = DisjointMut::new(&mut g);
                        blocks(&ctx, rows, |_, r| {
                            for i in r {
                                let g = row(&gs, i, c);
                                let (x, d) = (&x.data()[i * c..(i + 1) * c], &dy[i * c..(i + 1) * c]);
                                vectorize(
                                    #[inline(always)]
                                    || {
                                        let (mean, inv) = stats(x, 1e-5);
                                        norm_grad(x, mean, inv, |j| d[j] * w[j], g);
                                    },
                                );
                            }
                        });
                    });
                    dx.add(g);
                }
            });
        }
        out
    }
}
