//! Value residual: y = v + (v_first - v) s, s = sigmoid(gate).
//!
//! Backward: dv = dy (1 - s), dv_first = dy s, dgate = dy (v_first - v) s (1 - s).

use crate::rows::{blocks, row};
use crate::{Tape, Var};
use anser_tensor::{DisjointMut, math, simd::vectorize};

mod cuda;
#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// Mixes v with the first layer's value, both [tokens, C], by the logits `gate` [tokens, C].
    pub fn value_residual(&mut self, v: &Var, v_first: &Var, gate: &Var) -> Var {
        let (rows, c) = (v.rows(), v.cols());
        let ctx = self.ctx().clone();
        let mut y = ctx.alloc(rows * c);
        if let Some(gpu) = ctx.cuda() {
            cuda::forward(&ctx, gpu, [v, v_first, gate].map(Var::buf), &y);
        }
        self.run(|| {
            let ys = DisjointMut::new(&mut y);
            blocks(&ctx, rows, |_, r| {
                for i in r {
                    let (y, q) = (row(&ys, i, c), i * c..(i + 1) * c);
                    let (v, f, g) = (&v.data()[q.clone()], &v_first.data()[q.clone()], &gate.data()[q]);
                    vectorize(
                        #[inline(always)]
                        || {
                            for j in 0..c {
                                y[j] = v[j] + (f[j] - v[j]) * math::sigmoid(g[j]);
                            }
                        },
                    );
                }
            })
        });
        let needs = self.needs_grad(&[v, v_first, gate], &[]);
        let out = self.output(rows, c, y, needs);
        if needs {
            let (d, v, f, gate) = (out.slot(), v.clone(), v_first.clone(), gate.clone());
            self.record(move |b| {
                let Some(d) = d.take_shared() else { return };
                if let Some(gpu) = ctx.cuda() {
                    return cuda::backward(&ctx, gpu, &d, [&v, &f, &gate]);
                }
                let (mut dv, mut df, mut dg) = (ctx.alloc(rows * c), ctx.alloc(rows * c), ctx.alloc(rows * c));
                b.run(|_| {
                    let o = [DisjointMut::new(&mut dv), DisjointMut::new(&mut df), DisjointMut::new(&mut dg)];
                    blocks(&ctx, rows, |_, r| {
                        for i in r {
                            let q = i * c..(i + 1) * c;
                            let [dv, df, dg] = o.each_ref().map(|o| row(o, i, c));
                            let (d, v, f, g) =
                                (&d[q.clone()], &v.data()[q.clone()], &f.data()[q.clone()], &gate.data()[q]);
                            vectorize(
                                #[inline(always)]
                                || {
                                    for j in 0..c {
                                        let (s, n) = (math::sigmoid(g[j]), math::sigmoid(-g[j]));
                                        dv[j] = d[j] * n;
                                        df[j] = d[j] * s;
                                        dg[j] = d[j] * (f[j] - v[j]) * s * n;
                                    }
                                },
                            );
                        }
                    });
                });
                v.add_grad(dv);
                f.add_grad(df);
                gate.add_grad(dg);
            });
        }
        out
    }
}
