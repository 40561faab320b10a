//! What a decoding step on a GPU knows of attention's pasts: where they are and how long, in device memory, so that the step itself stays the same.

use crate::hybrid::HybridBlock;
use crate::{Model, State};
use anser_ops::decode::{Attend, Attended};
use anser_tensor::cuda::DevicePtr;
use anser_tensor::{Buf, Context};

/// Addresses of a past ([`anser_ops::attention::Past::addresses`]).
const ADDRESSES: usize = 5;

/// The attention blocks of a model, each with the number of the recurrent layer before it, and what lies on the device for them.
pub(crate) struct Pasts<'m> {
    ctx: Context,
    blocks: Vec<(&'m HybridBlock, usize)>,
    pub(crate) attend: Attend,
    /// Addresses of every slot's pasts, [slots, blocks, 5], and as they were last put there.
    table: Buf,
    known: Vec<DevicePtr>,
    /// Tokens that the sequences of a step have.
    positions: Buf,
    /// Value and key of the recurrent layer before, [2, batch, C].
    pub(crate) wrote: Buf,
}

impl<'m> Pasts<'m> {
    /// For steps of up to `most` sequences in as many slots. `None` if the kernels don't know the rule.
    pub(crate) fn new(
        ctx: &Context, model: &Model, most: usize, blocks: Vec<(&'m HybridBlock, usize)>,
    ) -> Option<Pasts<'m>> {
        let (config, chunks) = (model.config(), blocks.first()?.0.chunks);
        let attend = Attend::new(ctx, most, [config.heads(), config.key_heads()], config.head_size, chunks)?;
        let addresses = most * blocks.len() * ADDRESSES;
        Some(Pasts {
            ctx: ctx.clone(),
            blocks,
            attend,
            table: ctx.zeros_f32(2 * addresses),
            known: vec![DevicePtr::NULL; addresses],
            positions: ctx.zeros_f32(most),
            wrote: ctx.zeros(2 * most * config.n_embd),
        })
    }

    /// What the kernels of attention block `j` need.
    pub(crate) fn of(&self, j: usize, notes: usize, projected: DevicePtr, slots: DevicePtr) -> Attended {
        Attended {
            projected,
            gated: self.blocks.iter().any(|(b, _)| b.gate.is_some()),
            wrote: self.wrote.ptr(),
            notes,
            kept: self.table.ptr().offset(2 * j * ADDRESSES, self.table.dtype()),
            blocks: self.blocks.len(),
            slots,
            positions: self.positions.ptr(),
        }
    }

    /// Makes room for one token more in some slots, and puts on the device where it is.
    pub(crate) fn prepare(&mut self, state: &mut State, slots: &[usize]) {
        let notes = state.cache.map_or(0, |c| c.notes());
        let mut positions = Vec::with_capacity(slots.len());
        for &slot in slots {
            let mut addresses = Vec::with_capacity(self.blocks.len() * ADDRESSES);
            positions.push(state.attention[0].pasts[slot].len() as i32);
            for a in &mut state.attention {
                a.pasts[slot] = a.pasts[slot].with_room(&self.ctx, notes);
                addresses.extend(a.pasts[slot].addresses());
            }
            let (at, len) = (slot * addresses.len(), addresses.len());
            if self.known[at..at + len] != addresses[..] {
                let bytes: Vec<u8> = addresses.iter().flat_map(|p| p.address().to_le_bytes()).collect();
                self.table.write_raw(2 * at, &bytes);
                self.known[at..at + len].copy_from_slice(&addresses);
            }
        }
        let bytes: Vec<u8> = positions.iter().flat_map(|p| p.to_le_bytes()).collect();
        self.positions.write_raw(0, &bytes);
    }

    /// After a step of these slots: means of chunks that became full, and what a bound gives up.
    pub(crate) fn finish(&mut self, state: &mut State, slots: &[usize]) {
        let (layers, cache) = (&state.layers, state.cache);
        for ((block, layer), a) in self.blocks.iter().zip(&mut state.attention) {
            for &slot in slots {
                let past = &mut a.pasts[slot];
                if past.len() % block.chunks.size == 0 {
                    *past = past.with_means(&self.ctx, block.chunks);
                }
                if let Some(cache) = cache.filter(|c| past.len() >= c.most) {
                    *past = cache.thinned(&self.ctx, past, block.chunks, Some((&layers[*layer].wkv, slot)));
                }
            }
        }
    }
}
