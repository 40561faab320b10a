//! The control: a pre-LN causal Transformer with rotary positions (arXiv 2104.09864) and an MLP W_v relu(W_k x)^2, that is a
//! RWKV-7 block with attention for time mixing and without token shifts. Embedding, ln0, ln_out and head are those of RWKV-7.

use crate::rwkv7::{Norm, Residual};
use anser_ops::attention::Chunks;
use anser_ops::{Segment, Tape, Weight};
use std::sync::Arc;

pub(crate) struct TransformerBlock {
    pub(crate) ln1: Norm,
    pub(crate) query: Weight,
    pub(crate) key: Weight,
    pub(crate) value: Weight,
    pub(crate) output: Weight,
    pub(crate) heads: usize,
    pub(crate) ln2: Norm,
    /// Matrices of the MLP.
    pub(crate) ffn: [Weight; 2],
}

impl TransformerBlock {
    /// x: [tokens, C] to [tokens, C].
    pub(crate) fn forward(&self, t: &mut Tape<'_>, x: Residual, segments: &Arc<[Segment]>) -> Residual {
        let (x, h) = x.norm(t, &self.ln1);
        let [q, k, v] = [&self.query, &self.key, &self.value].map(|w| t.linear(&h, w));
        let [q, k] = [q, k].map(|x| t.rotary(&x, segments, self.heads));
        let (y, _) = t.attention([&q, &k, &v], segments, self.heads, Chunks::WHOLE, &[]);
        let dx = t.linear(&y, &self.output);
        let (x, h) = t.add_norm(x, &dx, self.ln2.weight, self.ln2.bias);
        let k = t.linear(&h, &self.ffn[0]);
        let k = t.relu_squared(k);
        let dx = t.linear(&k, &self.ffn[1]);
        Residual { x, dx: Some(dx) }
    }
}
