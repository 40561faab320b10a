//! Linear maps: `y = x W^T` for a weight [out, in] (official `*.weight` matrices) or `y = x W` for one stored
//! [in, out] (the official low-rank matrices).
//!
//! Backward: `dx = dy W`, `dW += dy^T x`.

use crate::{Backward, Param, ParamSet, Tape, Var};
use anser_tensor::cuda::{Cuda, DevicePtr};
use anser_tensor::gemm::{Trans, gemm};
use anser_tensor::{Context, DType, DeviceMatrix, Packed};
use std::sync::Arc;

#[cfg(test)]
mod tests;

/// The weight of a linear map. Models call [`Tape::linear`] with one and never look inside.
#[derive(Clone)]
pub enum Weight {
    /// f32 master weights in the arena, [out, in]: trainable.
    OutIn(Param),
    /// f32 master weights in the arena, [in, out]: trainable.
    InOut(Param),
    /// Tiled f32, f16 or bf16: inference only.
    Packed(Arc<Packed>),
    /// On a GPU in the type of activations: inference only.
    Device(DeviceMatrix),
}

impl Weight {
    /// Outputs.
    pub fn outputs(&self) -> usize {
        match self {
            Weight::OutIn(p) => p.rows,
            Weight::InOut(p) => p.cols,
            Weight::Packed(w) => w.n(),
            Weight::Device(w) => w.outputs(),
        }
    }

    /// Inputs.
    pub fn inputs(&self) -> usize {
        match self {
            Weight::OutIn(p) => p.cols,
            Weight::InOut(p) => p.rows,
            Weight::Packed(w) => w.k(),
            Weight::Device(w) => w.inputs(),
        }
    }

    /// The parameter, if it is one.
    pub fn param(&self) -> Option<Param> {
        match self {
            Weight::OutIn(p) | Weight::InOut(p) => Some(*p),
            Weight::Packed(_) | Weight::Device(_) => None,
        }
    }

    /// `y = x W^T` for x [rows, in], y [rows, out].
    pub(crate) fn product(&self, ctx: &Context, params: &ParamSet, x: &[f32], y: &mut [f32]) {
        let (n, k) = (self.outputs(), self.inputs());
        let rows = y.len() / n;
        match self {
            Weight::OutIn(p) => gemm(ctx, Trans::N, Trans::T, rows, n, k, x, params.get(*p), false, y),
            Weight::InOut(p) => gemm(ctx, Trans::N, Trans::N, rows, n, k, x, params.get(*p), false, y),
            Weight::Packed(w) => w.matmul(ctx, x, y),
            Weight::Device(_) => unreachable!("device weights are used by kernels"),
        }
    }

    /// `dx = dy W` for dy [rows, out], dx [rows, in].
    ///
    /// # Panics
    /// For packed weights, which have no backward pass.
    pub(crate) fn input_grad(&self, ctx: &Context, params: &ParamSet, dy: &[f32], dx: &mut [f32]) {
        let (n, k) = (self.outputs(), self.inputs());
        let rows = dy.len() / n;
        match self {
            Weight::OutIn(p) => gemm(ctx, Trans::N, Trans::N, rows, k, n, dy, params.get(*p), false, dx),
            Weight::InOut(p) => gemm(ctx, Trans::N, Trans::T, rows, k, n, dy, params.get(*p), false, dx),
            Weight::Packed(_) | Weight::Device(_) => {
                panic!("packed weights are for inference: load the model for training")
            }
        }
    }

    /// `dW += dy^T x`; nothing if the weight is frozen.
    pub(crate) fn add_weight_grad(&self, b: &mut Backward<'_>, x: &[f32], dy: &[f32]) {
        let (n, k, ctx) = (self.outputs(), self.inputs(), b.ctx());
        let rows = dy.len() / n;
        match self {
            Weight::OutIn(p) => {
                if let Some(dw) = b.param_grad(*p) {
                    gemm(ctx, Trans::T, Trans::N, n, k, rows, dy, x, true, dw);
                }
            }
            Weight::InOut(p) => {
                if let Some(dw) = b.param_grad(*p) {
                    gemm(ctx, Trans::T, Trans::N, k, n, rows, x, dy, true, dw);
                }
            }
            Weight::Packed(_) | Weight::Device(_) => {}
        }
    }
}

/// The same three products on a GPU: x and dx [rows, in], y and dy [rows, out] in the type of activations.
impl Weight {
    /// Where the weights for products are.
    pub fn device(&self, params: &ParamSet) -> DevicePtr {
        match self {
            Weight::OutIn(p) | Weight::InOut(p) => params.rounded(*p),
            Weight::Packed(_) => DevicePtr::NULL,
            Weight::Device(w) => w.ptr(),
        }
    }

    /// How the matrix [out, in] is stored.
    fn stored(&self) -> (Trans, Trans) {
        match self {
            Weight::OutIn(_) | Weight::Packed(_) => (Trans::T, Trans::N),
            Weight::Device(w) if !w.in_out() => (Trans::T, Trans::N),
            Weight::InOut(_) | Weight::Device(_) => (Trans::N, Trans::T),
        }
    }

    pub(crate) fn product_cuda(
        &self, ctx: &Context, gpu: &Cuda, params: &ParamSet, x: DevicePtr, y: DevicePtr, rows: usize,
        bias: Option<Param>,
    ) {
        let (n, k, t) = (self.outputs(), self.inputs(), ctx.dtype());
        let bias = bias.map(|b| params.rounded(b));
        gpu.gemm_bias(Trans::N, self.stored().0, rows, n, k, x, self.device(params), t, false, y, t, bias);
    }

    pub(crate) fn input_grad_cuda(
        &self, ctx: &Context, gpu: &Cuda, params: &ParamSet, dy: DevicePtr, dx: DevicePtr, add: bool, rows: usize,
    ) {
        let (n, k, t) = (self.outputs(), self.inputs(), ctx.dtype());
        gpu.gemm(Trans::N, self.stored().1, rows, k, n, dy, self.device(params), t, add, dx, t);
    }

    pub(crate) fn add_weight_grad_cuda(
        &self, b: &mut Backward<'_>, gpu: &Cuda, x: DevicePtr, dy: DevicePtr, rows: usize,
    ) {
        let (n, k, t) = (self.outputs(), self.inputs(), b.ctx().dtype());
        let Some((dw, add)) = self.param().and_then(|p| b.param_grad_ptr(p)) else { return };
        match self {
            Weight::OutIn(_) => gpu.gemm(Trans::T, Trans::N, n, k, rows, dy, x, t, add, dw, DType::F32),
            Weight::InOut(_) => gpu.gemm(Trans::T, Trans::N, k, n, rows, x, dy, t, add, dw, DType::F32),
            Weight::Packed(_) | Weight::Device(_) => {}
        }
    }
}

impl<'p> Tape<'p> {
    /// `y = x W^T`: x [tokens, in] to y [tokens, out].
    pub fn linear(&mut self, x: &Var, w: &Weight) -> Var {
        assert_eq!(x.cols(), w.inputs());
        let mut y = self.ctx().alloc(x.rows() * w.outputs());
        if let Some(gpu) = self.ctx().cuda() {
            w.product_cuda(self.ctx(), gpu, self.params(), x.buf().ptr(), y.ptr(), x.rows(), None);
        }
        self.run(|| w.product(self.ctx(), self.params(), x.data(), &mut y));
        let param = w.param();
        let needs = self.needs_grad(&[x], param.as_slice());
        let out = self.output(x.rows(), w.outputs(), y, needs);
        if needs {
            let (dy, dx, w) = (out.slot(), x.slot(), w.clone());
            // The weight gradient alone needs x.
            let kept = param.is_some_and(|p| self.params().is_trainable(p)).then(|| x.keep());
            self.record(move |b| {
                let Some(dy) = dy.take_shared() else { return };
                let ctx = b.ctx();
                let rows = dy.len() / w.outputs();
                if let Some(gpu) = ctx.cuda() {
                    if let Some(x) = &kept {
                        w.add_weight_grad_cuda(b, gpu, b.value(x).ptr(), dy.ptr(), rows);
                    }
                    return dx.accumulate(ctx, |g, add| {
                        w.input_grad_cuda(ctx, gpu, b.params(), dy.ptr(), g.ptr(), add, rows);
                    });
                }
                if let Some(x) = kept {
                    let x = b.value(&x);
                    b.run(|b| w.add_weight_grad(b, &x, &dy));
                }
                if dx.wanted() {
                    let mut g = ctx.alloc(dx.len());
                    b.run(|b| w.input_grad(ctx, b.params(), &dy, &mut g));
                    dx.add(g);
                }
            });
        }
        out
    }
}
