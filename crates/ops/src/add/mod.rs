//! Residual connection: y = x + dx. Backward: the gradient goes to both.

use crate::{Tape, Var};
use anser_tensor::simd::vectorize;

#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// x + y.
    pub fn add(&mut self, x: Var, y: &Var) -> Var {
        let (rows, c) = (x.rows(), x.cols());
        let needs = self.needs_grad(&[&x, y], &[]);
        let (dx, dy) = (x.slot(), y.slot());
        let mut out = self.ctx().alloc(rows * c);
        self.run(|| {
            vectorize(
                #[inline(always)]
                || {
                    for ((o, a), b) in out.iter_mut().zip(x.data()).zip(y.data()) {
                        *o = a + b;
                    }
                },
            )
        });
        let out = self.output(rows, c, out, needs);
        if needs {
            let d = out.slot();
            let ctx = self.ctx().clone();
            self.record(move |b| {
                let Some(d) = d.take() else { return };
                if dy.wanted() {
                    let mut g = ctx.alloc(rows * c);
                    b.run(|_| g.copy_from_slice(&d));
                    dy.add(g);
                }
                dx.add(d);
            });
        }
        out
    }
}
