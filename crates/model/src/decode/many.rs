//! A step of more than a few sequences: products, of our own or for many of the matrix library, and kernels between.

use super::products::{Products, by_inputs};
use super::{DecodeStep, Part};
use crate::State;
use crate::rwkv7::{Block, ChannelMix};
use anser_ops::decode::{Ahead, Heads, Norm, Step};
use anser_ops::{LowRank, Weight};
use anser_tensor::DType;
use anser_tensor::cuda::DevicePtr;
use anser_tensor::gemm::Trans;

/// One step, or the kernels of one kind.
struct Pass<'a> {
    step: Step<'a>,
    only: Option<Part>,
    /// Our own products, if they are for so many sequences.
    own: Option<&'a Products>,
    /// Parts of sums that the residual stream hasn't taken up.
    parts: (DevicePtr, usize),
}

impl Pass<'_> {
    fn on(&self, part: Part) -> bool {
        self.only.is_none_or(|o| o == part)
    }

    /// y [batch, n] (+)= x W^T, or x W for W [k, n], by the library.
    fn product(
        &self, w: DevicePtr, trans: Trans, n: usize, k: usize, x: DevicePtr, add: bool, y: DevicePtr, to: DType,
    ) {
        let Step { gpu, batch, ctx, .. } = self.step;
        gpu.gemm(Trans::N, trans, batch, n, k, x, w, ctx.dtype(), add, y, to);
    }

    /// Interpolations `to` of the normalised residual stream `x`, which takes up what is left of sums before; `next` [rows, C] is multiplied with them.
    fn mix<const K: usize>(
        &mut self, x: DevicePtr, to: DevicePtr, last: DevicePtr, slots: DevicePtr, norm: Norm, mu: [DevicePtr; K],
        (next, rows): (DevicePtr, usize),
    ) {
        if self.on(Part::Mix) {
            let library = Ahead { at: next, rows, cols: self.step.c, by_inputs: false };
            let ahead = if self.own.is_some() { None } else { Some(library) };
            self.step.mix(x, self.parts, to, last, slots, norm, mu, ahead);
        }
        self.parts = (DevicePtr::NULL, 0);
    }
}

impl DecodeStep<'_> {
    /// A step of any number of sequences.
    pub(super) fn run_many(&self, step: Step<'_>, state: &State, only: Option<Part>) {
        let (m, config, dtype) = (self.model, self.model.config(), self.ctx.dtype());
        let Step { gpu, batch, c, .. } = step;
        let (x, mixed, projected, slots) = (self.x.ptr(), self.mixed.ptr(), self.projected.ptr(), self.slots.ptr());
        let (mapped, logits) = (self.mapped.ptr(), self.logits.ptr());
        let own = self.products(batch);
        let mut pass = Pass { step, only, own, parts: (DevicePtr::NULL, 0) };
        if pass.on(Part::Mix) {
            step.embed(self.matrix(&m.emb), self.tokens.ptr(), x, self.norm(&m.ln0));
        }
        let (mut layers, mut attention) =
            (self.blocks.iter().zip(&state.layers).enumerate(), state.attention.iter().enumerate());
        for (at, (_, block)) in m.blocks.iter().enumerate() {
            if let (Block::Hybrid(block), Some(pasts)) = (block, &self.pasts) {
                let Some((j, s)) = attention.next() else { break };
                let (stacked, wide) = (self.matrix(&block.receptance), config.attention_rows());
                pass.mix(x, mixed, DevicePtr::NULL, slots, self.norm(&block.ln1), [], (stacked, wide));
                if pass.on(Part::Projections) {
                    match own.and_then(|own| own.attention.as_ref()) {
                        Some(pieces) => {
                            let w = self.weights(&block.receptance);
                            step.product(w, pieces, mixed, [projected, DevicePtr::NULL], [wide, 0]);
                        }
                        None => pass.product(stacked, Trans::T, wide, c, mixed, false, projected, DType::F32),
                    }
                }
                if pass.on(Part::Heads) {
                    let notes = state.cache.map_or(0, |c| c.notes());
                    step.attend(&pasts.attend, pasts.of(j, notes, projected, slots), mixed);
                }
                self.output(&mut pass, &block.output);
                self.channel_mix(&mut pass, self.norm(&block.ln2), &block.ffn, s.ffn_x.buf().ptr());
                continue;
            }
            let Some((i, (block, s))) = layers.next() else { break };
            let (att, low_ranks) = (&block.att, &self.low_ranks[i.min(1)]);
            let stacked = self.matrix(&att.receptance);
            // In the order of inputs.
            let [mr, mw, mk, mv, ma, mg] = att.mix.map(|p| self.at(p));
            let mu = [mr, mk, mv, mw, ma, mg];
            pass.mix(x, mixed, s.att_x.buf().ptr(), slots, self.norm(&block.ln1), mu, (stacked, 3 * c));
            if pass.on(Part::Projections) {
                let maps = [Some(&att.decay), Some(&att.rate), att.value_gate.as_ref(), Some(&att.gate)];
                let up = maps.map(|l: Option<&LowRank>| l.map_or(DevicePtr::NULL, |l| self.matrix(&l.up)));
                if let Some(own) = own {
                    let (pieces, (halves, pitch)) = (&own.projections[i.min(1)], low_ranks.halves());
                    let w = self.weights(&att.receptance);
                    step.product(w, &pieces.vectors, mixed, [projected, halves], [c, pitch]);
                    if let Some(pieces) = &pieces.halves {
                        let down = self.matrix(&att.value_gate.as_ref().unwrap_or(&att.decay).down);
                        step.product(down, pieces, mixed, [projected, halves], [c, pitch]);
                    }
                    step.second_halves(low_ranks, up, mapped);
                } else {
                    let each = |p: DevicePtr, apart: usize, t: DType| [0, 1, 2].map(|i| p.offset(i * apart, t));
                    let (from, to) = (each(mixed, batch * c, dtype), each(projected, batch * c, DType::F32));
                    let matrices = each(stacked, c * c, dtype);
                    gpu.gemm_each(Trans::N, Trans::T, batch, c, c, from, matrices, dtype, false, to, DType::F32);
                    step.low_rank(low_ranks, stacked.offset(3 * c * c, dtype), up, mixed, mapped);
                }
            }
            if pass.on(Part::Heads) {
                let heads = Heads { vectors: self.vectors(block), ln_x: self.norm(&att.ln_x) };
                let (gated, wrote) = (att.value_gate.is_some(), self.wrote(state, at));
                step.heads([projected, mapped], gated, &heads, self.first.ptr(), s.wkv.buf(), slots, wrote, mixed);
            }
            self.output(&mut pass, &att.output);
            self.channel_mix(&mut pass, self.norm(&block.ln2), &block.ffn, s.ffn_x.buf().ptr());
        }
        let (head, vocab) = (self.matrix(&m.head), config.vocab_size);
        pass.mix(x, mixed, DevicePtr::NULL, slots, self.norm(&m.ln_out), [], (head, vocab));
        if pass.on(Part::Head) {
            match own {
                Some(own) => {
                    step.product(self.weights(&m.head), &own.head, mixed, [logits, DevicePtr::NULL], [vocab, 0]);
                }
                None => pass.product(head, Trans::T, vocab, c, mixed, false, logits, DType::F32),
            }
            step.argmax(logits, self.tokens.ptr(), vocab);
        }
    }

    /// x += mixed W^T.
    fn output(&self, pass: &mut Pass<'_>, weight: &Weight) {
        let (w, c, mixed) = (self.weights(weight), pass.step.c, self.mixed.ptr());
        if let Some(own) = pass.own {
            let parts = own.parts.ptr();
            if pass.on(Part::Output) {
                pass.step.product(w, &own.output, mixed, [parts, DevicePtr::NULL], [c, 0]);
            }
            pass.parts = (parts, own.output.parts());
        } else if pass.on(Part::Output) {
            pass.product(w.at, Trans::T, c, c, mixed, true, self.x.ptr(), DType::F32);
        }
    }

    /// The second half of a block; `last` [slots, C] are its last inputs.
    fn channel_mix(&self, pass: &mut Pass<'_>, norm: Norm, ffn: &ChannelMix, last: DevicePtr) {
        let (step, x, mixed, hidden) = (pass.step, self.x.ptr(), self.mixed.ptr(), self.hidden.ptr());
        let (c, wide) = (step.c, self.model.config().n_hidden);
        let [key, value] = [&ffn.key, &ffn.value].map(|w| self.matrix(w));
        let by_inputs = by_inputs(&ffn.value);
        pass.mix(x, mixed, last, self.slots.ptr(), norm, [self.at(ffn.mix)], (key, wide));
        if let Some(own) = pass.own {
            let parts = own.parts.ptr();
            if pass.on(Part::Key) {
                step.product(self.weights(&ffn.key), &own.key, mixed, [DevicePtr::NULL, hidden], [0, wide]);
            }
            if pass.on(Part::Value) {
                step.product(self.weights(&ffn.value), &own.value, hidden, [parts, DevicePtr::NULL], [c, 0]);
            }
            pass.parts = (parts, own.value.parts());
            return;
        }
        if pass.on(Part::Key) {
            pass.product(key, Trans::T, wide, c, mixed, false, hidden, self.ctx.dtype());
            let (rows, cols) = if by_inputs { (wide, c) } else { (c, wide) };
            let ahead = Ahead { at: value, rows, cols, by_inputs };
            step.relu_squared(hidden, step.batch * wide, ahead);
        }
        if pass.on(Part::Value) {
            let trans = if by_inputs { Trans::N } else { Trans::T };
            pass.product(value, trans, c, wide, hidden, true, x, DType::F32);
        }
    }
}
