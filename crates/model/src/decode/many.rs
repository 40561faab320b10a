//! A step of more than a few sequences: products by the matrix library, and kernels between.

use super::{DecodeStep, Part};
use crate::State;
use crate::rwkv7::{Block, ChannelMix};
use anser_ops::decode::{Ahead, Heads, Norm, Step};
use anser_ops::{LowRank, Weight};
use anser_tensor::DType;
use anser_tensor::cuda::DevicePtr;
use anser_tensor::gemm::Trans;

/// One step, or the kernels of one kind.
#[derive(Clone, Copy)]
struct Pass<'a> {
    step: Step<'a>,
    only: Option<Part>,
}

impl Pass<'_> {
    fn on(&self, part: Part) -> bool {
        self.only.is_none_or(|o| o == part)
    }

    /// y [batch, n] (+)= x W^T, or x W for W [k, n].
    fn product(
        &self, w: DevicePtr, trans: Trans, n: usize, k: usize, x: DevicePtr, add: bool, y: DevicePtr, to: DType,
    ) {
        let Step { gpu, batch, ctx, .. } = self.step;
        gpu.gemm(Trans::N, trans, batch, n, k, x, w, ctx.dtype(), add, y, to);
    }
}

fn ahead(at: DevicePtr, rows: usize, cols: usize) -> Ahead {
    Ahead { at, rows, cols, by_inputs: false }
}

impl DecodeStep<'_> {
    /// A step of any number of sequences.
    pub(super) fn run_many(&self, step: Step<'_>, state: &State, only: Option<Part>) {
        let (m, config, dtype) = (self.model, self.model.config(), self.ctx.dtype());
        let Step { gpu, batch, c, .. } = step;
        let (x, mixed, projected, slots) = (self.x.ptr(), self.mixed.ptr(), self.projected.ptr(), self.slots.ptr());
        let (mapped, logits) = (self.mapped.ptr(), self.logits.ptr());
        let pass = Pass { step, only };
        if pass.on(Part::Mix) {
            step.embed(self.matrix(&m.emb), self.tokens.ptr(), x, self.norm(&m.ln0));
        }
        let (mut layers, mut attention) =
            (self.blocks.iter().zip(&state.layers).enumerate(), state.attention.iter().enumerate());
        for (at, (_, block)) in m.blocks.iter().enumerate() {
            if let (Block::Hybrid(block), Some(pasts)) = (block, &self.pasts) {
                let Some((j, s)) = attention.next() else { break };
                let (stacked, wide) = (self.matrix(&block.receptance), config.attention_rows());
                if pass.on(Part::Mix) {
                    let norm = self.norm(&block.ln1);
                    step.mix(x, mixed, DevicePtr::NULL, slots, norm, [], ahead(stacked, wide, c));
                }
                if pass.on(Part::Projections) {
                    pass.product(stacked, Trans::T, wide, c, mixed, false, projected, DType::F32);
                }
                if pass.on(Part::Heads) {
                    let notes = state.cache.map_or(0, |c| c.notes());
                    step.attend(&pasts.attend, pasts.of(j, notes, projected, slots), mixed);
                }
                self.output(&pass, &block.output);
                self.channel_mix(&pass, self.norm(&block.ln2), &block.ffn, s.ffn_x.buf().ptr());
                continue;
            }
            let Some((i, (block, s))) = layers.next() else { break };
            let att = &block.att;
            let stacked = self.matrix(&att.receptance);
            if pass.on(Part::Mix) {
                // In the order of inputs.
                let [mr, mw, mk, mv, ma, mg] = att.mix.map(|p| self.at(p));
                let (mu, next) = ([mr, mk, mv, mw, ma, mg], ahead(stacked, 3 * c, c));
                step.mix(x, mixed, s.att_x.buf().ptr(), slots, self.norm(&block.ln1), mu, next);
            }
            if pass.on(Part::Projections) {
                let each = |p: DevicePtr, apart: usize, t: DType| [0, 1, 2].map(|i| p.offset(i * apart, t));
                let (from, to) = (each(mixed, batch * c, dtype), each(projected, batch * c, DType::F32));
                let matrices = each(stacked, c * c, dtype);
                gpu.gemm_each(Trans::N, Trans::T, batch, c, c, from, matrices, dtype, false, to, DType::F32);
                let down = stacked.offset(3 * c * c, dtype);
                let maps = [Some(&att.decay), Some(&att.rate), att.value_gate.as_ref(), Some(&att.gate)];
                let up = maps.map(|l: Option<&LowRank>| l.map_or(DevicePtr::NULL, |l| self.matrix(&l.up)));
                step.low_rank(&self.low_ranks[i.min(1)], down, up, mixed, mapped);
            }
            if pass.on(Part::Heads) {
                let heads = Heads { vectors: self.vectors(block), ln_x: self.norm(&att.ln_x) };
                let (gated, wrote) = (att.value_gate.is_some(), self.wrote(state, at));
                step.heads([projected, mapped], gated, &heads, self.first.ptr(), s.wkv.buf(), slots, wrote, mixed);
            }
            self.output(&pass, &att.output);
            self.channel_mix(&pass, self.norm(&block.ln2), &block.ffn, s.ffn_x.buf().ptr());
        }
        let (head, vocab) = (self.matrix(&m.head), config.vocab_size);
        if pass.on(Part::Mix) {
            step.mix(x, mixed, DevicePtr::NULL, slots, self.norm(&m.ln_out), [], ahead(head, vocab, c));
        }
        if pass.on(Part::Head) {
            pass.product(head, Trans::T, vocab, c, mixed, false, logits, DType::F32);
            step.argmax(logits, self.tokens.ptr(), vocab);
        }
    }

    /// x += mixed W^T.
    fn output(&self, pass: &Pass<'_>, weight: &Weight) {
        if pass.on(Part::Output) {
            let (w, c) = (self.matrix(weight), pass.step.c);
            pass.product(w, Trans::T, c, c, self.mixed.ptr(), true, self.x.ptr(), DType::F32);
        }
    }

    /// The second half of a block; `last` [slots, C] are its last inputs.
    fn channel_mix(&self, pass: &Pass<'_>, norm: Norm, ffn: &ChannelMix, last: DevicePtr) {
        let (step, x, mixed, hidden) = (pass.step, self.x.ptr(), self.mixed.ptr(), self.hidden.ptr());
        let (c, wide) = (step.c, self.model.config().n_hidden);
        let [key, value] = [&ffn.key, &ffn.value].map(|w| self.matrix(w));
        if pass.on(Part::Mix) {
            step.mix(x, mixed, last, self.slots.ptr(), norm, [self.at(ffn.mix)], ahead(key, wide, c));
        }
        if pass.on(Part::Key) {
            pass.product(key, Trans::T, wide, c, mixed, false, hidden, self.ctx.dtype());
            let ahead = Ahead { at: value, rows: wide, cols: c, by_inputs: true };
            step.relu_squared(hidden, step.batch * wide, ahead);
        }
        if pass.on(Part::Value) {
            pass.product(value, Trans::N, c, wide, hidden, true, x, DType::F32);
        }
    }
}
