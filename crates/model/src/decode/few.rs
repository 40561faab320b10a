//! A step of few sequences: a program that stops only for attention.

use super::products::{by_inputs, coded};
use super::{DecodeStep, Part};
use crate::rwkv7::{Block, ChannelMix};
use crate::{Model, State};
use anser_ops::decode::{BATCH, FewHeads, Flow, Kinds, Listing, Mix, Plan, Program, Size, Step, program_most};
use anser_ops::{LowRank, Param, Weight};
use anser_tensor::cuda::DevicePtr;
use anser_tensor::{Buf, Context, DType};
use std::ops::Range;

/// Plans and memory for up to [`Few::most`] sequences, and the program that was written for a state.
pub(super) struct Few {
    most: usize,
    /// Projections of the first layer, and of the others.
    projections: [Plan; 2],
    /// q, k, v and gates of attention.
    attention: Plan,
    output: Plan,
    key: Plan,
    /// Of the second matrix of channel mixing, if it lies by outputs.
    value: Option<Plan>,
    head: Plan,
    /// What each block gives of channel mixing otherwise.
    parts: Buf,
    /// Everything else that operations hand to each other.
    flow: Flow,
    blocks: usize,
    /// Rows of the second matrix of channel mixing under something else than zeros.
    read: Buf,
    /// Whether they are counted.
    counts: bool,
    /// The largest logits of each block.
    found: Buf,
    program: Option<(Key, Written)>,
}

/// What of a state is part of a program: where it is, and whether attention notes what it takes up.
#[derive(PartialEq)]
struct Key(Option<DevicePtr>, bool);

/// A program, and its parts between attention: operations, and the attention block after them.
pub(super) struct Written {
    program: Program,
    parts: Vec<(Range<usize>, Option<usize>)>,
}

fn key(state: &State) -> Key {
    Key(state.layers.first().map(|l| l.wkv.buf().ptr()), state.cache.is_some_and(|c| c.by == crate::Eviction::Error))
}

impl Few {
    /// For steps of up to `most` sequences; ranks of decay, in-context rate, value gate and gate of the first layer and of others. `None` if the kernel does not
    /// hold the model.
    pub fn new(ctx: &Context, model: &Model, most: usize, ranks: [[usize; 4]; 2]) -> Option<Few> {
        let config = model.config();
        let (c, hidden) = (config.n_embd, config.n_hidden);
        // All matrices are in codes, or none.
        let weights = model.blocks.iter().flat_map(|(_, block)| match block {
            Block::Rwkv7(b) => vec![&b.att.receptance, &b.att.output, &b.ffn.key, &b.ffn.value],
            Block::Hybrid(b) => vec![&b.receptance, &b.output, &b.ffn.key, &b.ffn.value],
            Block::Transformer(_) => Vec::new(),
        });
        let weights: Vec<&Weight> = weights.chain([&model.head]).collect();
        let in_codes = coded(&model.head);
        if weights.iter().any(|w| coded(w) != in_codes) {
            return None;
        }
        let by_outputs = !weights.iter().any(|w| by_inputs(w));
        let ranks_at_most = std::array::from_fn(|i| ranks[0][i].max(ranks[1][i]));
        let size = Size { blocks: model.blocks.len(), c, hidden, ranks: ranks_at_most, coded: in_codes, by_outputs };
        let most = most.min(program_most(ctx, size, config.head_size));
        if most == 0 {
            return None;
        }
        // In the order of `load::device::STACK`; the value gate has the input of v.
        let projections = |[w, a, v, g]: [usize; 4]| {
            let (vectors, halves) = ([(c, 0), (c, 1), (c, 2)], [(v, 2), (w, 3), (a, 4), (g, 5)]);
            match in_codes {
                true => Plan::new(ctx, c, [&vectors, &halves]),
                false => Plan::new(ctx, c, [&[], &[(c, 0), (c, 1), (c + v, 2), (w, 3), (a, 4), (g, 5)]]),
            }
        };
        let plan = |k, rows| {
            let runs = [(rows, 0)];
            Plan::new(ctx, k, if in_codes { [&runs, &[]] } else { [&[], &runs] })
        };
        let blocks = ctx.cuda()?.info().multiprocessors as usize;
        let projections = [projections(ranks[0])?, projections(ranks[1])?];
        let (widest, dtype) = (projections.iter().map(Plan::rows).max().unwrap_or(0), ctx.dtype());
        // Of a layer what `write` takes for it.
        let layer = [
            (c, DType::F32),
            (c, DType::F32),
            (c, dtype),
            (c, dtype),
            (c, dtype),
            (if by_outputs { hidden } else { 0 }, dtype),
            (widest, DType::F32),
        ];
        let vectors = model.blocks.iter().flat_map(|_| layer).chain([(c, DType::F32)]);
        Some(Few {
            flow: Flow::new(ctx, most, vectors),
            projections,
            attention: plan(c, config.attention_rows())?,
            output: plan(c, c)?,
            key: plan(c, hidden)?,
            value: if by_outputs { Some(plan(hidden, c)?) } else { None },
            head: plan(c, config.vocab_size)?,
            parts: ctx.alloc_f32(if by_outputs { 0 } else { blocks * most * c }),
            counts: !in_codes,
            blocks,
            most,
            read: ctx.zeros_f32(1),
            found: ctx.alloc_f32(blocks * BATCH * 2),
            program: None,
        })
    }

    /// Elements of the projections of a sequence, at most.
    pub fn widest(&self) -> usize {
        self.projections.iter().chain([&self.attention]).map(Plan::rows).max().unwrap_or(0)
    }

    /// Sequences of a step at most.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Whether rows of the second matrices of channel mixing under zeros are not read.
    pub fn skips(&self) -> bool {
        self.value.is_none()
    }

    /// Rows of second matrices of channel mixing under something else than zeros since the beginning, if they are counted; waits for the device.
    pub fn rows_needed(&self) -> Option<u32> {
        let read = || self.read.to_vec().first().map_or(0, |v| v.to_bits());
        self.counts.then(read)
    }

    /// Whether the program is for this state.
    pub fn is_for(&self, state: &State) -> bool {
        self.program.as_ref().is_some_and(|(of, _)| *of == key(state))
    }

    /// Takes the program for this state.
    pub fn set(&mut self, state: &State, written: Option<Written>) {
        self.program = written.map(|w| (key(state), w));
    }
}

impl DecodeStep<'_> {
    /// Writes down the step for a state. `None` when memory runs out.
    pub(super) fn write(&self, few: &Few, state: &State) -> Option<Written> {
        let (m, c) = (self.model, self.model.config().n_embd);
        let (mixed, projected, dtype) = (self.mixed.ptr(), self.projected.ptr(), self.ctx.dtype());
        let (mut list, mut parts, mut begin) = (Listing::new(&few.flow), Vec::new(), 0);
        let mut x = list.place(c, DType::F32);
        list.embed(self.matrix(&m.emb), self.tokens.ptr(), x, self.norm(&m.ln0));
        let (mut layers, mut attention) =
            (self.blocks.iter().zip(&state.layers).enumerate(), state.attention.iter().enumerate());
        let channels = |list: &mut Listing, x: &mut DevicePtr, norm, ffn: &ChannelMix, last| {
            let mix = Mix { mu: [self.at(ffn.mix)], last, now: list.place(c, dtype) };
            let xy = [*x, list.place(c, DType::F32)];
            *x = xy[1];
            if let Some(plan) = &few.value {
                let hidden = list.place(m.config().n_hidden, dtype);
                list.squared(&few.key, self.weights(&ffn.key), xy[0], norm, mix, hidden);
                let read = if few.counts { few.read.ptr() } else { DevicePtr::NULL };
                return list.value(plan, self.weights(&ffn.value), hidden, mix, xy, read);
            }
            let matrices = [&ffn.key, &ffn.value].map(|w| self.matrix(w));
            list.channels(&few.key, matrices, xy, norm, mix, few.parts.ptr(), few.read.ptr(), few.blocks);
        };
        for (at, (_, block)) in m.blocks.iter().enumerate() {
            if let Block::Hybrid(block) = block {
                let (j, s) = attention.next()?;
                list.mixed(
                    &few.attention,
                    [self.weights(&block.receptance); 2],
                    x,
                    self.norm(&block.ln1),
                    None,
                    projected,
                );
                parts.push((begin..list.len(), Some(j)));
                begin = list.len();
                let y = list.place(c, DType::F32);
                list.add(&few.output, self.weights(&block.output), mixed, None, [x, y]);
                x = y;
                channels(&mut list, &mut x, self.norm(&block.ln2), &block.ffn, s.ffn_x.buf().ptr());
                continue;
            }
            let (i, (block, s)) = layers.next()?;
            let att = &block.att;
            let [mr, mw, mk, mv, ma, mg] = att.mix.map(|p: Param| self.at(p));
            // In the order of inputs.
            let mix = Mix { mu: [mr, mk, mv, mw, ma, mg], last: s.att_x.buf().ptr(), now: list.place(c, dtype) };
            let (plan, vectors) = (&few.projections[i.min(1)], self.weights(&att.receptance));
            // The first halves of low-rank maps lie behind, or elsewhere.
            let halves = match coded(&att.receptance) {
                true => self.matrix(&att.value_gate.as_ref().unwrap_or(&att.decay).down).into(),
                false => vectors,
            };
            let (projected, out) = (list.place(plan.rows(), DType::F32), list.place(c, dtype));
            list.mixed(plan, [vectors, halves], x, self.norm(&block.ln1), Some(mix), projected);
            let rank = |l: Option<&LowRank>| l.map_or(0, |l| l.down.outputs());
            let heads = FewHeads {
                projected,
                ranks: [att.value_gate.as_ref(), Some(&att.decay), Some(&att.rate), Some(&att.gate)].map(rank),
                up: self.matrix(&att.value_gate.as_ref().unwrap_or(&att.decay).up),
                vectors: self.vectors(block),
                ln_x: self.norm(&att.ln_x),
                first: self.first.ptr(),
                state: s.wkv.buf(),
                wrote: self.wrote(state, at),
                out,
            };
            list.heads(c, heads);
            let y = list.place(c, DType::F32);
            list.add(&few.output, self.weights(&att.output), out, Some(mix.into()), [x, y]);
            x = y;
            channels(&mut list, &mut x, self.norm(&block.ln2), &block.ffn, s.ffn_x.buf().ptr());
        }
        let norm = self.norm(&m.ln_out);
        list.logits(&few.head, self.weights(&m.head), x, norm, self.logits.ptr(), few.found.ptr(), self.tokens.ptr());
        parts.push((begin..list.len(), None));
        Some(Written { program: list.finish(&self.ctx)?, parts })
    }

    /// A step of up to [`BATCH`] sequences.
    pub(super) fn run_few(&self, few: &Few, step: Step<'_>, state: &State, only: Option<Part>) {
        let Some((_, written)) = &few.program else { return };
        let kinds = match only {
            None => Kinds::ALL,
            Some(Part::Mix) => Kinds::EMBED,
            Some(Part::Projections) => Kinds::MIXED,
            Some(Part::Heads) => Kinds::HEADS,
            Some(Part::Output) => Kinds::ADD,
            Some(Part::Key) => Kinds::KEYS,
            Some(Part::Value) => Kinds::VALUES,
            Some(Part::Head) => Kinds::LOGITS,
        };
        let (slots, notes) = (self.slots.ptr(), state.cache.map_or(0, |c| c.notes()));
        for (ops, attention) in &written.parts {
            written.program.run(&step, ops.clone(), kinds, slots, &few.flow);
            if let (Some(j), Some(pasts), None | Some(Part::Heads)) = (attention, &self.pasts, only) {
                step.attend(&pasts.attend, pasts.of(*j, notes, self.projected.ptr(), slots), self.mixed.ptr());
            }
        }
    }
}
