//! A gate for each head: y_h = x_h s_h, s = sigmoid(gate), with a logit for each of H heads of size N.
//!
//! Backward: dx_h = dy_h s_h, dgate_h = s_h (1 - s_h) sum_n dy_hn x_hn.

use crate::rows::{blocks, row, sum};
use crate::{Tape, Var};
use anser_tensor::{DisjointMut, math};

mod cuda;
#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// Gates the heads of x [tokens, H x N] by the logits `gate` [tokens, H]: [tokens, H x N]. On a GPU N is 16, 32, 64 or 128.
    pub fn head_gate(&mut self, x: &Var, gate: &Var) -> Var {
        let (rows, c, heads) = (x.rows(), x.cols(), gate.cols());
        let n = c / heads;
        assert_eq!((n * heads, gate.rows()), (c, rows));
        let ctx = self.ctx().clone();
        let mut y = ctx.alloc(rows * c);
        if let Some(gpu) = ctx.cuda() {
            cuda::forward(&ctx, gpu, [x.buf(), gate.buf(), &y], n);
        }
        self.run(|| {
            let ys = DisjointMut::new(&mut y);
            blocks(&ctx, rows, |_, r| {
                for i in r {
                    let y = row(&ys, i, c);
                    for (h, (y, x)) in y.chunks_exact_mut(n).zip(x.data()[i * c..][..c].chunks_exact(n)).enumerate() {
                        let s = math::sigmoid(gate.data()[i * heads + h]);
                        y.iter_mut().zip(x).for_each(|(y, x)| *y = x * s);
                    }
                }
            })
        });
        let needs = self.needs_grad(&[x, gate], &[]);
        let out = self.output(rows, c, y, needs);
        if needs {
            let (dy, x, gate) = (out.slot(), x.clone(), gate.clone());
            self.record(move |b| {
                let Some(dy) = dy.take() else { return };
                let (mut dx, mut dgate) = (ctx.alloc(rows * c), ctx.alloc(rows * heads));
                if let Some(gpu) = ctx.cuda() {
                    cuda::backward(&ctx, gpu, [&dy, x.buf(), gate.buf(), &dx, &dgate], n);
                }
                b.run(|_| {
                    let (dxs, dgates) = (DisjointMut::new(&mut dx), DisjointMut::new(&mut dgate));
                    blocks(&ctx, rows, |_, r| {
                        for i in r {
                            let (dx, dgate) = (row(&dxs, i, c), row(&dgates, i, heads));
                            for h in 0..heads {
                                let at = i * c + h * n..i * c + (h + 1) * n;
                                let (dy, x, g) = (&dy[at.clone()], &x.data()[at], gate.data()[i * heads + h]);
                                let s = math::sigmoid(g);
                                dx[h * n..][..n].iter_mut().zip(dy).for_each(|(dx, dy)| *dx = dy * s);
                                dgate[h] = s * math::sigmoid(-g) * sum(n, |j| dy[j] * x[j]);
                            }
                        }
                    });
                });
                x.add_grad(dx);
                gate.add_grad(dgate);
            });
        }
        out
    }
}
