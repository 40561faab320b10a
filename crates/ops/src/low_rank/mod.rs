//! Low-rank maps: `y = f(x A) B + bias`, with A [C, rank], B [rank, C] stored input-major and f = tanh (decay),
//! sigmoid (gate) or the identity (in-context rate, value residual). Paper section 4.1, "loramlp".
//!
//! Backward, with h = f(x A): `dB += h^T dy`, `dbias += sum dy`, `dh = dy B^T`, `dz = dh f'`, `dA += x^T dz`, `dx = dz A^T`,
//! where f' is computed from h: 1 - h^2 for tanh, h (1 - h) for sigmoid.

use crate::linear::Weight;
use crate::{Param, Tape, Var};
use anser_tensor::{math, simd::vectorize};

mod cuda;
#[cfg(test)]
mod tests;

/// The function between the two matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// None.
    Identity,
    /// Hyperbolic tangent.
    Tanh,
    /// Logistic function.
    Sigmoid,
}

impl Activation {
    fn apply(self, h: &mut [f32]) {
        match self {
            Activation::Identity => {}
            Activation::Tanh => vectorize(
                #[inline(always)]
                || h.iter_mut().for_each(|h| *h = math::tanh(*h)),
            ),
            Activation::Sigmoid => vectorize(
                #[inline(always)]
                || h.iter_mut().for_each(|h| *h = math::sigmoid(*h)),
            ),
        }
    }

    /// Multiplies `d` by f', given h = f(z).
    fn scale_by_derivative(self, h: &[f32], d: &mut [f32]) {
        let pairs = d.iter_mut().zip(h);
        match self {
            Activation::Identity => {}
            Activation::Tanh => pairs.for_each(|(d, &h)| *d *= 1.0 - h * h),
            Activation::Sigmoid => pairs.for_each(|(d, &h)| *d *= h * (1.0 - h)),
        }
    }
}

/// The weights of a low-rank map.
#[derive(Clone)]
pub struct LowRank {
    /// A: C to rank.
    pub down: Weight,
    /// B: rank to C.
    pub up: Weight,
    /// Bias `[C]`, if any.
    pub bias: Option<Param>,
    /// The function between.
    pub activation: Activation,
}

impl<'p> Tape<'p> {
    /// `f(x A) B + bias` for x [tokens, C].
    pub fn low_rank(&mut self, x: &Var, w: &LowRank) -> Var {
        let (rows, rank, cols) = (x.rows(), w.down.outputs(), w.up.outputs());
        let ctx = self.ctx().clone();
        let mut h = ctx.alloc(rows * rank);
        let mut y = ctx.alloc(rows * cols);
        if let Some(gpu) = ctx.cuda() {
            w.down.product_cuda(&ctx, gpu, self.params(), x.buf().ptr(), h.ptr(), rows, None);
            cuda::apply(&ctx, gpu, w.activation, &h);
            w.up.product_cuda(&ctx, gpu, self.params(), h.ptr(), y.ptr(), rows, w.bias);
        }
        self.run(|| {
            w.down.product(&ctx, self.params(), x.data(), &mut h);
            w.activation.apply(&mut h);
            w.up.product(&ctx, self.params(), &h, &mut y);
            if let Some(bias) = w.bias {
                let bias = self.param(bias);
                y.chunks_exact_mut(cols).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
            }
        });
        let params: Vec<Param> = [w.down.param(), w.up.param(), w.bias].into_iter().flatten().collect();
        let needs = self.needs_grad(&[x], &params);
        let out = self.output(rows, cols, y, needs);
        if needs {
            let (dy, dx, w, x) = (out.slot(), x.slot(), w.clone(), x.clone());
            self.record(move |b| {
                let Some(dy) = dy.take_shared() else { return };
                let mut dh = ctx.alloc(rows * rank);
                if let Some(gpu) = ctx.cuda() {
                    if let Some(bias) = w.bias.filter(|&p| b.params().is_trainable(p)) {
                        cuda::add_bias_grad(b, gpu, &dy, bias, cols);
                    }
                    w.up.add_weight_grad_cuda(b, gpu, h.ptr(), dy.ptr(), rows);
                    w.up.input_grad_cuda(&ctx, gpu, b.params(), dy.ptr(), dh.ptr(), false, rows);
                    cuda::scale_by_derivative(&ctx, gpu, w.activation, &h, &dh);
                    w.down.add_weight_grad_cuda(b, gpu, x.buf().ptr(), dh.ptr(), rows);
                    return dx.accumulate(&ctx, |g, add| {
                        w.down.input_grad_cuda(&ctx, gpu, b.params(), dh.ptr(), g.ptr(), add, rows);
                    });
                }
                b.run(|b| {
                    if let Some(db) = w.bias.and_then(|p| b.param_grad(p)) {
                        dy.chunks_exact(cols).for_each(|dy| db.iter_mut().zip(dy).for_each(|(b, d)| *b += d));
                    }
                    w.up.add_weight_grad(b, &h, &dy);
                    w.up.input_grad(&ctx, b.params(), &dy, &mut dh);
                    w.activation.scale_by_derivative(&h, &mut dh);
                    w.down.add_weight_grad(b, x.data(), &dh);
                });
                if dx.wanted() {
                    let mut g = ctx.alloc(dx.len());
                    b.run(|b| w.down.input_grad(&ctx, b.params(), &dh, &mut g));
                    dx.add(g);
                }
            });
        }
        out
    }
}
