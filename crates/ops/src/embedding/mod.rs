//! Embedding: y_t = `table[token_t]`. Backward: `dtable[token_t]` += dy_t, token after token.

use crate::{Param, Tape, Var};

#[cfg(test)]
mod tests;

impl<'p> Tape<'p> {
    /// Rows of `table` [V, C]: [tokens, C]. Tokens are below V (the model checks).
    pub fn embedding(&mut self, tokens: &[u32], table: Param) -> Var {
        let c = table.cols;
        let mut y = self.ctx().alloc(tokens.len() * c);
        let w = self.param(table);
        self.run(|| {
            for (y, &t) in y.chunks_exact_mut(c).zip(tokens) {
                y.copy_from_slice(&w[t as usize * c..][..c]);
            }
        });
        let needs = self.needs_grad(&[], &[table]);
        let out = self.output(tokens.len(), c, y, needs);
        if needs {
            let (dy, tokens) = (out.slot(), tokens.to_vec());
            self.record(move |b| {
                let Some(dy) = dy.take() else { return };
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
