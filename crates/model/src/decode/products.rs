//! The products of a step of more than a few sequences: their matrices cut into pieces.

use crate::Model;
use crate::rwkv7::{Block, ChannelMix};
use anser_ops::Weight;
use anser_ops::decode::{Lie, LowRanks, Pieces, Run, Through, To};
use anser_tensor::{Buf, Context};

/// Pieces of all matrices, and the parts of sums that the residual stream takes up.
pub(super) struct Products {
    /// Of the first recurrent layer, and of the others.
    pub projections: [Projections; 2],
    /// q, k, v and gates of attention.
    pub attention: Option<Pieces>,
    pub output: Pieces,
    pub key: Pieces,
    pub value: Pieces,
    pub head: Pieces,
    pub parts: Buf,
}

/// What reads the interpolations of a recurrent layer.
pub(super) struct Projections {
    /// r, k and v, planes of f32, and if all are in 16 bits the first halves of the low-rank maps, which lie behind them.
    pub vectors: Pieces,
    /// These halves, if they lie elsewhere.
    pub halves: Option<Pieces>,
}

fn lie(w: &Weight) -> Lie {
    match w {
        Weight::Device(m) if m.scales().is_some() => Lie::Codes,
        Weight::Device(m) if m.in_out() => Lie::Inputs,
        _ => Lie::Rows,
    }
}

/// Whether a matrix is in codes of 8 bits.
pub(super) fn coded(w: &Weight) -> bool {
    lie(w) == Lie::Codes
}

/// Whether it lies [in, out].
pub(super) fn by_inputs(w: &Weight) -> bool {
    lie(w) == Lie::Inputs
}

impl Projections {
    fn new(ctx: &Context, c: usize, coded: bool, maps: &LowRanks) -> Option<Projections> {
        let vectors: Vec<Run> = (0..3).map(|input| Run { rows: c, input, to: To::Plane(input) }).collect();
        let halves: Vec<Run> = maps.runs().collect();
        if halves.iter().any(|r| r.rows % 2 != 0) {
            return None;
        }
        Some(match coded {
            true => Projections {
                vectors: Pieces::of_rows(ctx, Lie::Codes, c, &vectors)?,
                halves: Some(Pieces::of_rows(ctx, Lie::Rows, c, &halves)?),
            },
            false => {
                Projections { vectors: Pieces::of_rows(ctx, Lie::Rows, c, &[vectors, halves].concat())?, halves: None }
            }
        })
    }
}

impl Products {
    /// For steps of up to `batch` sequences. `None` if the kernels don't hold the model, or when memory runs out.
    pub fn new(ctx: &Context, model: &Model, batch: usize, low_ranks: &[LowRanks; 2]) -> Option<Products> {
        let config = model.config();
        let (c, hidden) = (config.n_embd, config.n_hidden);
        let (block, ffn, output) = model.blocks.iter().find_map(|(_, b)| match b {
            Block::Rwkv7(b) => Some((b, &b.ffn, &b.att.output)),
            _ => None,
        })?;
        let whole = |w: &Weight, rows| Pieces::of_rows(ctx, lie(w), c, &[Run { rows, input: 0, to: To::Plane(0) }]);
        let projections = |maps| Projections::new(ctx, c, coded(&block.att.receptance), maps);
        let squared = Run { rows: hidden, input: 0, to: To::Column(0, Through::Squared) };
        let ChannelMix { key, value, .. } = ffn;
        let (output, value) =
            (Pieces::in_parts(ctx, lie(output), c, c)?, Pieces::in_parts(ctx, lie(value), hidden, c)?);
        let attention =
            match model.blocks.iter().find_map(|(_, b)| if let Block::Hybrid(b) = b { Some(b) } else { None }) {
                Some(block) => Some(whole(&block.receptance, config.attention_rows())?),
                None => None,
            };
        if hidden % 8 != 0 {
            return None;
        }
        Some(Products {
            projections: [projections(&low_ranks[0])?, projections(&low_ranks[1])?],
            attention,
            key: Pieces::of_rows(ctx, lie(key), c, &[squared])?,
            head: whole(&model.head, config.vocab_size)?,
            parts: ctx.alloc_f32(output.parts().max(value.parts()) * batch * c),
            output,
            value,
        })
    }
}
