//! Linear maps: `y = x W^T` for a weight [out, in] (official `*.weight` matrices) or `y = x W` for one stored
//! [in, out] (the official low-rank matrices).
//!
//! Backward: `dx = dy W`, `dW += dy^T x`.

use crate::gpu::{int, kernel};
use crate::{Backward, GradSlot, Kept, Param, ParamSet, Tape, Var};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Module};
use anser_tensor::gemm::{Trans, gemm};
use anser_tensor::{Buf, Context, DType, DeviceMatrix, Packed};
use std::sync::Arc;

#[cfg(test)]
mod tests;

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// The weight of a linear map. Models call [`Tape::linear`] with one and never look inside.
#[derive(Clone)]
pub enum Weight {
    /// f32 master weights in the arena, [out, in]: trainable.
    OutIn(Param),
    /// f32 master weights in the arena, [in, out]: trainable.
    InOut(Param),
    /// Tiled floats, or 8 or 4 bits: inference only.
    Packed(Arc<Packed>),
    /// On a GPU in the type of activations, or in codes of 8 bits: inference only.
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
    /// Where the weights for products are, or their codes ([`DeviceMatrix::scales`]).
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
        let [(w, _held)] = values(ctx, gpu, params, [self]);
        gpu.gemm_bias(Trans::N, self.stored().0, rows, n, k, x, w, t, false, y, t, bias);
    }

    pub(crate) fn input_grad_cuda(
        &self, ctx: &Context, gpu: &Cuda, params: &ParamSet, dy: DevicePtr, dx: DevicePtr, add: bool, rows: usize,
    ) {
        input_grads_cuda(ctx, gpu, params, [self], [dy], [dx], add, rows);
    }

    pub(crate) fn add_weight_grad_cuda(
        &self, b: &mut Backward<'_>, gpu: &Cuda, x: DevicePtr, dy: DevicePtr, rows: usize,
    ) {
        let Some((dw, add)) = self.param().and_then(|p| b.param_grad_ptr(p)) else { return };
        add_weight_grads_cuda(b.ctx(), gpu, [self], [x], [dy], [dw], add, rows);
    }
}

/// Where the values of weights of one shape are, and the memory of those that are made from codes, in which they lie at equal distances.
fn values<const N: usize>(
    ctx: &Context, gpu: &Cuda, params: &ParamSet, ws: [&Weight; N],
) -> [(DevicePtr, Option<Buf>); N] {
    let scales = |w: &Weight| if let Weight::Device(m) = w { m.scales() } else { None };
    if ws.iter().all(|w| scales(w).is_none()) {
        return ws.map(|w| (w.device(params), None));
    }
    let (n, k) = (ws[0].outputs(), ws[0].inputs());
    let bufs: [Buf; N] = ctx.alloc_each(n * k);
    let mut made = bufs.into_iter();
    ws.map(|w| match (scales(w), made.next()) {
        (Some((at, pitch)), Some(buf)) => {
            let args = [w.device(params), at].map(Arg::from).into_iter();
            let args: Vec<Arg> = args.chain([int(pitch), buf.ptr().into(), int(n), int(k)]).collect();
            let (blocks, threads) = gpu.walk(n * k / 2);
            gpu.launch(&KERNELS, &kernel(ctx, "linear_decoded"), blocks, threads, &args);
            (buf.ptr(), Some(buf))
        }
        _ => (w.device(params), None),
    })
}

/// The gradients of the inputs of several weights of one shape.
fn input_grads_cuda<const N: usize>(
    ctx: &Context, gpu: &Cuda, params: &ParamSet, ws: [&Weight; N], dy: [DevicePtr; N], dx: [DevicePtr; N], add: bool,
    rows: usize,
) {
    let (n, k, t) = (ws[0].outputs(), ws[0].inputs(), ctx.dtype());
    let w = ws.map(|w| w.device(params));
    gpu.gemm_each(Trans::N, ws[0].stored().1, rows, k, n, dy, w, t, add, dx, t);
}

/// The gradients of several weights of one shape.
fn add_weight_grads_cuda<const N: usize>(
    ctx: &Context, gpu: &Cuda, ws: [&Weight; N], x: [DevicePtr; N], dy: [DevicePtr; N], dw: [DevicePtr; N], add: bool,
    rows: usize,
) {
    let (n, k, t) = (ws[0].outputs(), ws[0].inputs(), ctx.dtype());
    match ws[0] {
        Weight::OutIn(_) => gpu.gemm_each(Trans::T, Trans::N, n, k, rows, dy, x, t, add, dw, DType::F32),
        Weight::InOut(_) => gpu.gemm_each(Trans::T, Trans::N, k, n, rows, x, dy, t, add, dw, DType::F32),
        Weight::Packed(_) | Weight::Device(_) => {}
    }
}

/// All of them, or nothing if one is missing.
fn all<T: Copy, const N: usize>(of: [Option<T>; N]) -> Option<[T; N]> {
    of.iter().copied().collect::<Option<Vec<T>>>()?.try_into().ok()
}

/// The addresses, and whether to add there, if that is the same for all.
fn common<const N: usize>(to: [(DevicePtr, bool); N]) -> Option<([DevicePtr; N], bool)> {
    to.iter().all(|t| t.1 == to[0].1).then_some((to.map(|t| t.0), to[0].1))
}

impl<'p> Tape<'p> {
    /// `y = x W^T`: x [tokens, in] to y [tokens, out].
    pub fn linear(&mut self, x: &Var, w: &Weight) -> Var {
        let [y] = self.linears([x], [w]);
        y
    }

    /// `y_i = x_i W_i^T` for N inputs [tokens, in] and weights of one shape and layout; on a GPU one product instead of N where inputs,
    /// weights, and in the backward pass gradients, lie at equal distances.
    pub fn linears<const N: usize>(&mut self, xs: [&Var; N], ws: [&Weight; N]) -> [Var; N] {
        let (rows, n, k) = (xs[0].rows(), ws[0].outputs(), ws[0].inputs());
        let alike = |w: &Weight| (w.outputs(), w.inputs(), w.stored()) == (n, k, ws[0].stored());
        assert!(ws.iter().all(|w| alike(w)) && xs.iter().all(|x| (x.rows(), x.cols()) == (rows, k)));
        let mut ys: [Buf; N] = self.ctx().alloc_each(rows * n);
        if let Some(gpu) = self.ctx().cuda() {
            let (x, y) = (xs.map(|x| x.buf().ptr()), ys.each_ref().map(Buf::ptr));
            let (w, t) = (values(self.ctx(), gpu, self.params(), ws), self.ctx().dtype());
            gpu.gemm_each(Trans::N, ws[0].stored().0, rows, n, k, x, w.each_ref().map(|w| w.0), t, false, y, t);
        }
        for ((y, x), w) in ys.iter_mut().zip(xs).zip(ws) {
            self.run(|| w.product(self.ctx(), self.params(), x.data(), y));
        }
        let params: Vec<Param> = ws.iter().filter_map(|w| w.param()).collect();
        let needs = self.needs_grad(&xs, &params);
        let outs = self.outputs(rows, n, ys, needs);
        if needs {
            let (dys, dxs) = (outs.each_ref().map(Var::slot), xs.map(Var::slot));
            // The weight gradient alone needs x.
            let trains = |w: &Weight| w.param().is_some_and(|p| self.params().is_trainable(p));
            let kept: [Option<Kept>; N] = std::array::from_fn(|i| trains(ws[i]).then(|| xs[i].keep()));
            let ws = ws.map(Weight::clone);
            self.record(move |b| {
                let dys = dys.each_ref().map(GradSlot::take_shared);
                if let Some(gpu) = b.ctx().cuda() {
                    return back_cuda(b, gpu, ws.each_ref(), dys, kept, &dxs, rows);
                }
                for (((dy, w), x), dx) in dys.into_iter().zip(&ws).zip(kept).zip(&dxs) {
                    let Some(dy) = dy else { continue };
                    let ctx = b.ctx();
                    if let Some(x) = x {
                        let x = b.value(&x);
                        b.run(|b| w.add_weight_grad(b, &x, &dy));
                    }
                    if dx.wanted() {
                        let mut g = ctx.alloc(dx.len());
                        b.run(|b| w.input_grad(ctx, b.params(), &dy, &mut g));
                        dx.add(g);
                    }
                }
            });
        }
        outs
    }
}

/// The backward pass of [`Tape::linears`] on a GPU. The gradients of weights and of inputs go side by side: one fills the multiprocessors
/// that the other leaves idle at its end.
fn back_cuda<const N: usize>(
    b: &mut Backward<'_>, gpu: &Cuda, ws: [&Weight; N], dys: [Option<Arc<Buf>>; N], kept: [Option<Kept>; N],
    dxs: &[GradSlot; N], rows: usize,
) {
    let (ctx, params) = (b.ctx(), b.params());
    let dy = dys.each_ref().map(|dy| dy.as_ref().map(|dy| dy.ptr()));
    let xs = std::array::from_fn::<_, N, _>(|i| kept[i].as_ref().filter(|_| dy[i].is_some()).map(|x| b.value(x)));
    let x = xs.each_ref().map(|x| x.as_ref().map(|x| x.ptr()));
    let dw = std::array::from_fn(|i| x[i].and(ws[i].param()).and_then(|p| b.param_grad_ptr(p)));
    let dx: [Option<(Buf, bool)>; N] = std::array::from_fn(|i| dy[i].and_then(|_| dxs[i].begin(ctx)));
    let to = dx.each_ref().map(|dx| dx.as_ref().map(|(g, add)| (g.ptr(), *add)));
    let weights = || match (all(x), all(dy), all(dw).and_then(common)) {
        (Some(x), Some(dy), Some((dw, add))) => add_weight_grads_cuda(ctx, gpu, ws, x, dy, dw, add, rows),
        _ => (0..N).for_each(|i| {
            if let (Some(x), Some(dy), Some((dw, add))) = (x[i], dy[i], dw[i]) {
                add_weight_grads_cuda(ctx, gpu, [ws[i]], [x], [dy], [dw], add, rows);
            }
        }),
    };
    let inputs = || match (all(dy), all(to).and_then(common)) {
        (Some(dy), Some((to, add))) => input_grads_cuda(ctx, gpu, params, ws, dy, to, add, rows),
        _ => (0..N).for_each(|i| {
            if let (Some(dy), Some((to, add))) = (dy[i], to[i]) {
                input_grads_cuda(ctx, gpu, params, [ws[i]], [dy], [to], add, rows);
            }
        }),
    };
    gpu.beside(2, |i| if i == 0 { weights() } else { inputs() });
    for (slot, dx) in dxs.iter().zip(dx) {
        dx.into_iter().for_each(|(g, _)| slot.add(g));
    }
}
