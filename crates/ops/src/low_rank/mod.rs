//! Low-rank maps: `y = f(x A) B + bias`, with A [C, rank], B [rank, C] stored input-major and f = tanh (decay),
//! sigmoid (gate) or the identity (in-context rate, value residual). Paper section 4.1, "loramlp".
//!
//! Backward, with h = f(x A): `dB += h^T dy`, `dbias += sum dy`, `dh = dy B^T`, `dz = dh f'`, `dA += x^T dz`, `dx = dz A^T`,
//! where f' is computed from h: 1 - h^2 for tanh, h (1 - h) for sigmoid.

use crate::linear::Weight;
use crate::tape::RowSums;
use crate::{Backward, GradSlot, Kept, Param, Tape, Var};
use anser_tensor::cuda::Cuda;
use anser_tensor::{Buf, Context, math, simd::vectorize};
use std::sync::Arc;

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

/// Where the gradient of a bias comes from.
enum Bias {
    Came(RowSums),
    ToSum(Buf),
}

/// What the backward pass of one map on a GPU works with.
struct Back {
    map: usize,
    dy: Arc<Buf>,
    x: Arc<Buf>,
    dh: Buf,
    dx: Option<(Buf, bool)>,
    /// The bias and the sums that are its gradient, unless they came with dy: then here is room for them.
    bias: Option<(Param, Bias)>,
}

impl<'p> Tape<'p> {
    /// `f(x A) B + bias` for x [tokens, C].
    pub fn low_rank(&mut self, x: &Var, w: &LowRank) -> Var {
        let mut ys = self.low_ranks(&[(x, w)]);
        ys.swap_remove(0)
    }

    /// Several maps. Their products are small: a GPU works on them side by side.
    pub fn low_ranks(&mut self, maps: &[(&Var, &LowRank)]) -> Vec<Var> {
        let ctx = self.ctx().clone();
        let size = |(x, w): &(&Var, &LowRank)| [w.down.outputs(), w.up.outputs()].map(|n| x.rows() * n);
        let mut made: Vec<[Buf; 2]> = maps.iter().map(|m| size(m).map(|n| ctx.alloc(n))).collect();
        if let Some(gpu) = ctx.cuda() {
            gpu.beside(maps.len(), |i| {
                let ((x, w), [h, y]) = (maps[i], &made[i]);
                w.down.product_cuda(&ctx, gpu, self.params(), x.buf().ptr(), h.ptr(), x.rows(), None);
                cuda::apply(&ctx, gpu, w.activation, h);
                w.up.product_cuda(&ctx, gpu, self.params(), h.ptr(), y.ptr(), x.rows(), w.bias);
            });
        }
        for ((x, w), [h, y]) in maps.iter().zip(&mut made) {
            self.run(|| {
                w.down.product(&ctx, self.params(), x.data(), h);
                w.activation.apply(h);
                w.up.product(&ctx, self.params(), h, y);
                if let Some(bias) = w.bias {
                    let bias = self.param(bias);
                    y.chunks_exact_mut(bias.len()).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
                }
            });
        }
        let (mut outs, mut back) = (Vec::new(), Vec::new());
        for ((x, w), [h, y]) in maps.iter().zip(made) {
            let params: Vec<Param> = [w.down.param(), w.up.param(), w.bias].into_iter().flatten().collect();
            let needs = self.needs_grad(&[x], &params);
            let out = self.output(x.rows(), w.up.outputs(), y, needs);
            if needs {
                back.push((out.slot(), x.slot(), LowRank::clone(w), x.keep(), h));
            }
            outs.push(out);
        }
        if back.is_empty() {
            return outs;
        }
        self.record(move |b| {
            if let Some(gpu) = ctx.cuda() {
                return back_cuda(b, &ctx, gpu, &back);
            }
            for (dy, dx, w, x, h) in back.into_iter().rev() {
                let Some(dy) = dy.take_shared() else { continue };
                let x = b.value(&x);
                let mut dh = ctx.alloc(h.len());
                b.run(|b| {
                    if let Some(db) = w.bias.and_then(|p| b.param_grad(p)) {
                        dy.chunks_exact(db.len()).for_each(|dy| db.iter_mut().zip(dy).for_each(|(b, d)| *b += d));
                    }
                    w.up.add_weight_grad(b, &h, &dy);
                    w.up.input_grad(&ctx, b.params(), &dy, &mut dh);
                    w.activation.scale_by_derivative(&h, &mut dh);
                    w.down.add_weight_grad(b, &x, &dh);
                });
                if dx.wanted() {
                    let mut g = ctx.alloc(dx.len());
                    b.run(|b| w.down.input_grad(&ctx, b.params(), &dh, &mut g));
                    dx.add(g);
                }
            }
        });
        outs
    }
}

/// The backward pass of [`Tape::low_ranks`] on a GPU: memory first, which all hold until the end, then the work side by side.
fn back_cuda(b: &mut Backward<'_>, ctx: &Context, gpu: &Cuda, maps: &[(GradSlot, GradSlot, LowRank, Kept, Buf)]) {
    let mut tasks: Vec<Back> = Vec::new();
    for (map, (dy, dx, w, x, h)) in maps.iter().enumerate() {
        let Some((dy, sums)) = dy.take_summed() else { continue };
        let bias = w.bias.filter(|&p| b.params().is_trainable(p));
        let to_sum = || Bias::ToSum(cuda::bias_parts(ctx, &dy, w.up.outputs()));
        let bias = bias.map(|p| (p, sums.map_or_else(to_sum, Bias::Came)));
        tasks.push(Back { map, x: b.value(x), dh: ctx.alloc(h.len()), dx: dx.begin(ctx), dy, bias });
    }
    gpu.beside(tasks.len(), |i| {
        let Back { map, dy, x, dh, dx, bias } = &tasks[i];
        let (_, _, w, _, h) = &maps[*map];
        let rows = h.len() / w.up.inputs();
        if let Some((_, Bias::ToSum(parts))) = bias {
            cuda::sum_bias_grad(ctx, gpu, dy, parts, w.up.outputs());
        }
        w.up.add_weight_grad_cuda(b, gpu, h.ptr(), dy.ptr(), rows);
        w.up.input_grad_cuda(ctx, gpu, b.params(), dy.ptr(), dh.ptr(), false, rows);
        cuda::scale_by_derivative(ctx, gpu, w.activation, h, dh);
        w.down.add_weight_grad_cuda(b, gpu, x.ptr(), dh.ptr(), rows);
        if let Some((g, add)) = dx {
            w.down.input_grad_cuda(ctx, gpu, b.params(), dh.ptr(), g.ptr(), *add, rows);
        }
    });
    for task in tasks {
        match task.bias {
            Some((p, Bias::ToSum(parts))) => {
                let count = parts.len() / p.cols;
                b.add_param_sums([p], parts, count, p.cols);
            }
            Some((p, Bias::Came(sums))) => b.add_sums(p, sums),
            None => {}
        }
        task.dx.into_iter().for_each(|(g, _)| maps[task.map].1.add(g));
    }
}
