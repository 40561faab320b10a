//! Cross entropy on a GPU: chunks of logits in the type of activations, losses and statistics in f32.

use super::{CrossEntropy, Loss, Place};
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
    z: &Buf, chunk: usize, dx: Option<&Buf>, grad: bool,
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
        head.product_cuda(&ctx, gpu, t.params(), xs, z.ptr(), n, None);
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
        // A row of up to 65536 logits in 16 bits stays in the registers of a block.
        let held = size != DType::F32 && vocab.is_multiple_of(8) && vocab <= 1 << 16;
        let name = if held { "cross_entropy_held" } else { "cross_entropy" };
        gpu.launch(&KERNELS, &kernel(&ctx, name), [n, 1, 1], [512, 1, 1], &args);
        if !grad {
            continue;
        }
        // The gradient of x alone has too few tiles, each a long sum, to fill a GPU evenly.
        gpu.beside(2, |i| match (i, dx) {
            (0, Some(dx)) => {
                let dx = dx.ptr().offset(start * cols, size);
                head.input_grad_cuda(&ctx, gpu, t.params(), z.ptr(), dx, false, n);
            }
            (1, _) => drop(t.with_backward(|b| head.add_weight_grad_cuda(b, gpu, xs, z.ptr(), n))),
            _ => {}
        });
    }
    let total = ctx.alloc_f32(2);
    let scales = Arg::Ptr(scales.as_ref().map_or(DevicePtr::NULL, Buf::ptr));
    gpu.launch(
        &KERNELS,
        "total_loss",
        [1, 1, 1],
        [1024, 1, 1],
        &[losses.ptr().into(), scales, total.ptr().into(), int(rows)],
    );
    Loss { place: Place::Device { total, per_token: losses, divisor: opts.divisor }, some: None }
}
