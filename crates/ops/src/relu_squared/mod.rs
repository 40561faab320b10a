//! y = max(x, 0)^2. Backward: dx = 2 max(x, 0) dy; on a GPU y takes the place of x, and max(x, 0) is the root of y.

use crate::rows::blocks;
use crate::{Tape, Var};
use anser_tensor::{DisjointMut, simd::vectorize};

mod cuda;
#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// relu(x)^2, elementwise.
    pub fn relu_squared(&mut self, x: Var) -> Var {
        let (rows, c) = (x.rows(), x.cols());
        let needs = self.needs_grad(&[&x], &[]);
        let ctx = self.ctx().clone();
        if let Some(gpu) = ctx.cuda() {
            let dx = x.slot();
            let y = x.into_owned();
            cuda::forward(&ctx, gpu, &y);
            let out = self.output(rows, c, y, needs);
            if needs {
                let y = out.clone();
                self.record(move |_| {
                    let Some(d) = y.take_grad() else { return };
                    if let Some(gpu) = ctx.cuda() {
                        cuda::backward(&ctx, gpu, y.buf(), &d);
                    }
                    dx.add(d);
                });
            }
            return out;
        }
        let mut y = ctx.alloc(rows * c);
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
        let out = self.output(rows, c, y, needs);
        if needs {
            let (d, dx, x) = (out.slot(), x.slot(), x);
            self.record(move |b| {
                let Some(mut d) = d.take() else { return };
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
