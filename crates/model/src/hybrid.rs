//! The attention block of RWKV-X (arXiv 2504.21463): chunk sparse attention without positions, if so wanted with a gate for each head (arXiv
//! 2505.06708), then RWKV-7's channel mixing.

use crate::Cache;
use crate::cache::Written;
use crate::rwkv7::{ChannelMix, Norm, Residual};
use crate::state::AttentionState;
use anser_ops::attention::Chunks;
use anser_ops::{Segment, Tape, Weight};
use std::sync::Arc;

pub(crate) struct HybridBlock {
    pub(crate) ln1: Norm,
    /// Of queries, as RWKV names them.
    pub(crate) receptance: Weight,
    pub(crate) key: Weight,
    pub(crate) value: Weight,
    /// Logits of a gate for each head.
    pub(crate) gate: Option<Weight>,
    pub(crate) output: Weight,
    pub(crate) heads: usize,
    pub(crate) chunks: Chunks,
    pub(crate) ln2: Norm,
    pub(crate) ffn: ChannelMix,
}

impl HybridBlock {
    /// x: [tokens, C]. Returns (x, state). With a bound on the cache, `written` is what the block before wrote.
    pub(crate) fn forward(
        &self, t: &mut Tape<'_>, x: Residual, state: &AttentionState, segments: &Arc<[Segment]>,
        bound: Option<(&Cache, Option<Written>)>,
    ) -> (Residual, AttentionState) {
        let (x, h) = x.norm(t, &self.ln1);
        let [q, k, v] = [&self.receptance, &self.key, &self.value].map(|w| t.linear(&h, w));
        let (y, mut pasts) = t.attention([&q, &k, &v], segments, self.heads, self.chunks, &state.pasts);
        if let Some((cache, written)) = &bound {
            for (s, slot) in segments.iter().filter_map(|s| Some((s, s.state_out?))) {
                pasts[slot] = cache.bound(t.ctx(), &pasts[slot], self.chunks, (s, slot), &q, written.as_ref());
            }
        }
        let y = match &self.gate {
            Some(gate) => {
                let gate = t.linear(&h, gate);
                t.head_gate(&y, &gate)
            }
            None => y,
        };
        let dx = t.linear(&y, &self.output);
        let x = Residual { x, dx: Some(dx) };
        let (x, ffn_x) = self.ffn.forward(t, x, &self.ln2, &state.ffn_x, segments);
        (x, AttentionState { ffn_x, pasts })
    }
}
