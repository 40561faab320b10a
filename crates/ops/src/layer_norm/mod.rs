//! LayerNorm: y = (x - mean) / sqrt(variance + 1e-5) * weight + bias over the C channels of a token, population variance; alone, or
//! together with the residual connection before it.
//!
//! Backward, with z the normalised x and h = dy * weight: dx = (h - mean(h) - z mean(h z)) / sigma, dweight = sum dy z,
//! dbias = sum dy. The statistics are computed again rather than kept.

use crate::rows::{blocks, norm_grad, param_sums, row, stats};
use crate::{Backward, Param, Recompute, Tape, Var};
use anser_tensor::{Buf, DisjointMut, simd::vectorize};
use std::sync::Arc;

mod cuda;
#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// LayerNorm of x [tokens, C].
    pub fn layer_norm(&mut self, x: &Var, weight: Param, bias: Param) -> Var {
        let y = self.norm(x.buf(), weight, bias);
        let needs = self.needs_grad(&[x], &[weight, bias]);
        let [out] = self.normed(self.output(x.rows(), x.cols(), y, needs), x, weight, bias);
        if needs {
            let (dy, dx, x) = (out.slot(), x.slot(), x.keep());
            self.record(move |b| {
                let Some(dy) = dy.take_shared() else { return };
                // What has arrived so far is taken up in the same pass.
                let prior = dx.take_shared();
                if let Some(g) = norm_back(b, &b.value(&x), &dy, prior, dx.wanted(), weight, bias) {
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
        let sum = self.output(rows, c, sum, flows);
        let [y] = self.normed(self.output(rows, c, y, needs), &sum, weight, bias);
        if needs {
            let (dy, later, s) = (y.slot(), sum.slot(), sum.keep());
            self.record(move |b| {
                let (dy, later) = (dy.take_shared(), later.take_shared());
                let g = match dy {
                    Some(dy) => norm_back(b, &b.value(&s), &dy, later, flows, weight, bias).map(Arc::new),
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

    /// y, which can be made again from x.
    fn normed(&self, y: Var, x: &Var, weight: Param, bias: Param) -> [Var; 1] {
        let x = x.keep();
        self.again(Recompute::All, [y], move |t| [t.norm(&t.value(&x), weight, bias)])
    }

    /// The forward pass without a residual connection.
    fn norm(&self, x: &Buf, weight: Param, bias: Param) -> Buf {
        let mut y = self.ctx().alloc(x.len());
        if let Some(gpu) = self.ctx().cuda() {
            cuda::forward(self.ctx(), gpu, self.params(), x, None, &y, weight, bias, weight.cols);
        }
        self.run(|| self.normalise(x, weight, bias, &mut y));
        y
    }

    /// The forward pass on the CPU.
    fn normalise(&self, xs: &[f32], weight: Param, bias: Param, y: &mut [f32]) {
        let (w, bi) = (self.param(weight), self.param(bias));
        let c = w.len();
        let ys = DisjointMut::new(y);
        blocks(self.ctx(), xs.len() / c, |_, r| {
            for i in r {
                normalise(&xs[i * c..(i + 1) * c], w, bi, row(&ys, i, c));
            }
        });
    }
}

/// LayerNorm of one row.
pub(crate) fn normalise(x: &[f32], weight: &[f32], bias: &[f32], y: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            let (mean, inv) = stats(x, 1e-5);
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                *y = (x - mean) * inv * w + b;
            }
        },
    );
}

/// Adds the gradients of weight and bias and, if it is `wanted`, returns `prior` plus the gradient of x.
fn norm_back(
    b: &mut Backward<'_>, x: &Buf, dy: &Buf, prior: Option<Arc<Buf>>, wanted: bool, weight: Param, bias: Param,
) -> Option<Buf> {
    let (ctx, c) = (b.ctx(), weight.cols);
    let rows = x.len() / c;
    if let Some(gpu) = ctx.cuda() {
        let g = wanted.then(|| ctx.alloc(rows * c));
        cuda::backward(b, gpu, x, dy, prior.as_deref(), g.as_ref(), weight, bias, c);
        return g;
    }
    param_sums(b, [weight, bias], rows, |r, [dw, db]| {
        for i in r {
            let (x, d) = (&x[i * c..(i + 1) * c], &dy[i * c..(i + 1) * c]);
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
                let (x, d) = (&x[i * c..(i + 1) * c], &dy[i * c..(i + 1) * c]);
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
