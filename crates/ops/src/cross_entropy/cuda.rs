//! Cross entropy on a GPU: chunks of logits in the type of activations, losses and statistics in f32.

use super::{CrossEntropy, Loss};
use crate::gpu::{int, kernel, table};
use crate::linear::Weight;
use crate::{Tape, Var};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Module};
use anser_tensor::{Buf, DType};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Logits held at a time: 512 MiB in 16 bits.
pub(super) const CHUNK: usize = 1 << 28;

pub(super) fn run(
    t: &mut Tape<'_>, gpu: &Cuda, x: &Var, head: &Weight, targets: &[i32], weights: Option<&[f32]>, opts: CrossEntropy,
    z: &Buf, chunk: usize, mut dx: Option<&mut Buf>, grad: bool,
) -> Loss {
    let ctx = t.ctx().clone();
    let (rows, cols, vocab) = (x.rows(), x.cols(), head.outputs());
    let (size, t32) = (ctx.dtype(), DType::F32);
    let ids = table(&ctx, targets);
    let scales = weights.map(|w| {
        let mut b = ctx.alloc_f32(rows);
        b.copy_from(w);
        b
    });
    let losses = ctx.alloc_f32(rows);
    for start in (0..rows).step_by(chunk) {
        let n = chunk.min(rows - start);
        let xs = x.buf().ptr().offset(start * cols, size);
        head.product_cuda(&ctx, gpu, t.params(), xs, z.ptr(), n);
        let args = [
            z.ptr().into(),
            ids.ptr().offset(start, t32).into(),
            Arg::Ptr(scales.as_ref().map_or(DevicePtr::NULL, |s| s.ptr().offset(start, t32))),
            losses.ptr().offset(start, t32).into(),
            ((1.0 / opts.divisor) as f32).into(),
            int(opts.l2wrap.into()),
            int(grad.into()),
            int(vocab),
        ];
        gpu.launch(&KERNELS, &kernel(&ctx, "cross_entropy"), [n, 1, 1], [512, 1, 1], &args);
        if let Some(dx) = &mut dx {
            head.input_grad_cuda(&ctx, gpu, t.params(), z.ptr(), dx.ptr().offset(start * cols, size), n);
        }
        if grad {
            t.with_backward(|b| head.add_weight_grad_cuda(b, gpu, xs, z.ptr(), n));
        }
    }
    let per_token = losses.to_vec();
    let weighted = |(i, &l): (usize, &f32)| weights.map_or(1.0, |w| w[i] as f64) * l as f64;
    let loss = per_token.iter().enumerate().map(weighted).sum::<f64>() / opts.divisor;
    Loss { loss, per_token }
}
