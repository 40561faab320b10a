//! LayerNorm: y = (x - mean) / sqrt(variance + 1e-5) * weight + bias over the C channels of a token, population variance; alone, or
//! together with the residual connection before it.
//!
//! Backward, with z the normalised x and h = dy * weight: dx = (h - mean(h) - z mean(h z)) / sigma, dweight = sum dy z,
//! dbias = sum dy. The statistics are computed again rather than kept.

use crate::rows::{blocks, norm_grad, param_sums, row, stats};
use crate::{Backward, Param, Tape, Var};
use anser_tensor::{Buf, DisjointMut, simd::vectorize};
use std::sync::Arc;

mod cuda;
#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// LayerNorm of x [tokens, C].
    pub fn layer_norm(&mut self, x: &Var, weight: Param, bias: Param) -> Var {
        let mut y = self.ctx().alloc(x.rows() * x.cols());
        if let Some(gpu) = self.ctx().cuda() {
            cuda::forward(self.ctx(), gpu, self.params(), x.buf(), None, &y, weight, bias, x.cols());
        }
        self.run(|| self.normalise(x.data(), weight, bias, &mut y));
        let needs = self.needs_grad(&[x], &[weight, bias]);
        let out = self.output(x.rows(), x.cols(), y, needs);
        if needs {
            let (dy, dx, x) = (out.slot(), x.slot(), x.clone());
            self.record(move |b| {
                let Some(dy) = dy.take_shared() else { return };
                // What has arrived so far is taken up in the same pass.
                let prior = dx.take_shared();
                if let Some(g) = norm_back(b, &x, &dy, prior, dx.wanted(), weight, bias) {
                    dx.add(g);
                }
            });
        }
        out
    }

    /// The residual connection s = x + dx, all [tokens, C], and the LayerNorm of s: returns both.
    pub fn add_norm(&mut self, x: Var, dx: &Var, weight: Param, bias: Param) -> (Var, Var) {
        let (rows, c) = (x.rows(), x.cols());
        let mut sum = self.ctx().alloc(rows * c);
        let mut y = self.ctx().alloc(rows * c);
        if let Some(gpu) = self.ctx().cuda() {
            let residual = Some((dx.buf(), &sum));
            cuda::forward(self.ctx(), gpu, self.params(), x.buf(), residual, &y, weight, bias, c);
        }
        self.run(|| {
            crate::add::sum(x.data(), dx.data(), &mut sum);
            self.normalise(&sum, weight, bias, &mut y);
        });
        let flows = self.needs_grad(&[&x, dx], &[]);
        let needs = flows || self.needs_grad(&[], &[weight, bias]);
        let (gx, gd) = (x.slot(), dx.slot());
        let (sum, y) = (self.output(rows, c, sum, flows), self.output(rows, c, y, needs));
        if needs {
            let (dy, later, s) = (y.slot(), sum.slot(), sum.without_grad());
            self.record(move |b| {
                let (dy, later) = (dy.take_shared(), later.take_shared());
                let g = match dy {
                    Some(dy) => norm_back(b, &s, &dy, later, flows, weight, bias).map(Arc::new),
                    None => later,
                };
                if let Some(g) = g {
                    gd.add(g.clone());
                    gx.add(g);
                }
            });
        }
        (sum, y)
    }

    /// The forward pass on the CPU.
    fn normalise(&self, xs: &[f32], weight: Param, bias: Param, y: &mut [f32]) {
        let (w, bi) = (self.param(weight), self.param(bias));
        let c = w.len();
        let ys = DisjointMut::new(y);
        blocks(self.ctx(), xs.len() / c, |_, r| {
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
    }
}

/// Adds the gradients of weight and bias and, if it is `wanted`, returns `prior` plus the gradient of x.
fn norm_back(
    b: &mut Backward<'_>, x: &Var, dy: &Buf, prior: Option<Arc<Buf>>, wanted: bool, weight: Param, bias: Param,
) -> Option<Buf> {
    let (ctx, rows, c) = (b.ctx(), x.rows(), x.cols());
    if let Some(gpu) = ctx.cuda() {
        let g = wanted.then(|| ctx.alloc(rows * c));
        cuda::backward(b, gpu, x.buf(), dy, prior.as_deref(), g.as_ref(), weight, bias, c);
        return g;
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
    if !wanted {
        return None;
    }
    let mut g = ctx.alloc(rows * c);
    let w = b.param(weight);
    b.run(|_| {
        let gs = DisjointMut::new(&mut g);
        blocks(ctx, rows, |_, r| {
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
    if let Some(prior) = prior {
        g.add(&prior);
    }
    Some(g)
}
