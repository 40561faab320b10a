//! y = max(x, 0)^2. Backward: dx = 2 max(x, 0) dy.

use crate::rows::blocks;
use crate::{Tape, Var};
use anser_tensor::{DisjointMut, simd::vectorize};

mod cuda;
#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// relu(x)^2, elementwise.
    pub fn relu_squared(&mut self, x: &Var) -> Var {
        let (rows, c) = (x.rows(), x.cols());
        let ctx = self.ctx().clone();
        let mut y = ctx.alloc(rows * c);
        if let Some(gpu) = ctx.cuda() {
            cuda::launch(&ctx, gpu, "relu_squared", x.buf(), &y);
        }
        self.run(|| {
            let (ys, xs) = (DisjointMut::new(&mut y), x.data());
            blocks(&ctx, rows, |_, r| {
                // SAFETY: own rows.
                let y = unsafe { ys.get(r.start * c..r.end * c) };
                let x = &xs[r.start * c..r.end * c];
                vectorize(
                    #[inline(always)]
                    || {
                        for (y, &x) in y.iter_mut().zip(x) {
                            let v = x.max(0.0);
                            *y = v * v;
                        }
                    },
                );
            })
        });
        let needs = self.needs_grad(&[x], &[]);
        let out = self.output(rows, c, y, needs);
        if needs {
            let (d, dx, x) = (out.slot(), x.slot(), x.clone());
            self.record(move |b| {
                let Some(mut d) = d.take() else { return };
                if let Some(gpu) = ctx.cuda() {
                    cuda::launch(&ctx, gpu, "relu_squared_back", x.buf(), &d);
                }
                b.run(|_| {
                    let ds = DisjointMut::new(&mut d);
                    blocks(&ctx, rows, |_, r| {
                        // SAFETY: own rows.
                        let d = unsafe { ds.get(r.start * c..r.end * c) };
                        let x = &x.data()[r.start * c..r.end * c];
                        vectorize(
                            #[inline(always)]
                            || {
                                for (d, &x) in d.iter_mut().zip(x) {
                                    *d *= 2.0 * x.max(0.0);
                                }
                            },
                        );
                    })
                });
                dx.add(d);
            });
        }
        out
    }
}
