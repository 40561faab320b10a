//! Embedding: y_t = `table[token_t]`. Backward: `dtable[token_t]` += dy_t, token after token.

use crate::{Tape, Var, Weight};

pub(crate) mod cuda;
#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// Rows of `table` [V, C], a [`Weight::OutIn`] or [`Weight::Packed`]: [tokens, C]. Tokens are below V (the model checks).
    pub fn embedding(&mut self, tokens: &[u32], table: &Weight) -> Var {
        let c = table.inputs();
        let mut y = self.ctx().alloc(tokens.len() * c);
        if let Some(gpu) = self.ctx().cuda() {
            cuda::rows_of(self.ctx(), gpu, table.device(self.params()), tokens, &y, c);
        }
        self.run(|| {
            for (y, &t) in y.chunks_exact_mut(c).zip(tokens) {
                match table {
                    Weight::Packed(w) => w.row(t as usize, y),
                    Weight::Device(_) => unreachable!("device weights are used by kernels"),
                    Weight::OutIn(p) | Weight::InOut(p) => {
                        y.copy_from_slice(&self.param(*p)[t as usize * c..][..c]);
                    }
                }
            }
        });
        let param = table.param();
        let needs = self.needs_grad(&[], param.as_slice());
        let out = self.output(tokens.len(), c, y, needs);
        if let Some(table) = param.filter(|_| needs) {
            let (dy, tokens) = (out.slot(), tokens.to_vec());
            self.record(move |b| {
                let Some(dy) = dy.take() else { return };
                if let (Some(gpu), Some((g, add))) = (b.ctx().cuda(), b.param_grad_ptr(table)) {
                    if !add {
                        gpu.clear(g, table.rows * c * 4);
                    }
                    cuda::backward(b.ctx(), gpu, g, &dy, &tokens, table.rows, c);
                }
                b.run(|b| {
                    if let Some(g) = b.param_grad(table) {
                        for (d, &t) in dy.chunks_exact(c).zip(&tokens) {
                            g[t as usize * c..][..c].iter_mut().zip(d).for_each(|(g, d)| *g += d);
                        }
                    }
                });
            });
        }
        out
    }
}
