//! Residual connection: y = x + dx. Backward: the gradient goes to both.

use crate::{Tape, Var};
use anser_tensor::simd::vectorize;

#[cfg(test)]
mod tests;

/// out = x + y.
pub(crate) fn sum(x: &[f32], y: &[f32], out: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for ((o, a), b) in out.iter_mut().zip(x).zip(y) {
                *o = a + b;
            }
        },
    );
}

impl<'p> Tape<'p> {
    /// x + y.
    pub fn add(&mut self, x: Var, y: &Var) -> Var {
        let (rows, c) = (x.rows(), x.cols());
        let needs = self.needs_grad(&[&x, y], &[]);
        let (dx, dy) = (x.slot(), y.slot());
        let mut out = self.ctx().alloc(rows * c);
        if let Some(gpu) = self.ctx().cuda() {
            gpu.copy(x.buf().ptr(), out.ptr(), out.bytes());
            gpu.add(out.ptr(), y.buf().ptr(), rows * c, out.dtype());
        }
        self.run(|| sum(x.data(), y.data(), &mut out));
        let out = self.output(rows, c, out, needs);
        if needs {
            let d = out.slot();
            self.record(move |_| {
                let Some(d) = d.take_shared() else { return };
                dy.add(d.clone());
                dx.add(d);
            });
        }
        out
    }
}
