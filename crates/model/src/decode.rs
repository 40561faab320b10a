//! A decoding step on a GPU in a few kernels a layer, for a model whose matrices are there (see [`anser_ops::decode`]). It is the same model as
//! [`Model::forward`], which a test holds it equal to; what differs is that states are advanced in place, and that the host makes room for what attention keeps
//! before a step and takes means of chunks, or thins a full cache, after it.

use crate::pasts::Pasts;
use crate::rwkv7::{Block, ChannelMix, Rwkv7Block};
use crate::{Eviction, Model, State};
use anser_ops::decode::{Ahead, BATCH, Finish, Heads, LowRanks, MOST, Mix, Norm, Projected, Skip, Step, Tiles, fits};
use anser_ops::{LowRank, Param, Weight};
use anser_tensor::cuda::DevicePtr;
use anser_tensor::gemm::Trans;
use anser_tensor::{Buf, Context, DType};

/// A kind of kernel of a step, to measure one alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Normalisation, token shift, interpolations.
    Mix,
    /// r, k, v and the first halves of the low-rank maps; q, k and v of attention.
    Projections,
    /// Everything of a head, attention among it.
    Heads,
    /// The output matrix of time mixing and of attention.
    Output,
    /// The first matrix of channel mixing.
    Key,
    /// The second, with skipping.
    Value,
    /// Logits.
    Head,
}

impl Part {
    /// All of them, in the order of their first use.
    pub const ALL: [Part; 7] =
        [Part::Mix, Part::Projections, Part::Heads, Part::Output, Part::Key, Part::Value, Part::Head];
}

/// Work plans for up to [`BATCH`] sequences.
struct Few {
    /// Projections of the first layer, and of the others.
    projections: [Tiles; 2],
    /// q, k and v of attention.
    attention: Tiles,
    output: Tiles,
    key: Tiles,
    head: Tiles,
}

/// Memory and work plans for steps of up to [`DecodeStep::most`] sequences, in f16 or bf16.
///
/// Products go one of two ways: with 1 to 4 sequences through kernels made for it, where the bits of a sequence's result don't depend on its neighbours; with
/// more through the matrix library, where they depend on how many there are.
pub struct DecodeStep<'m> {
    ctx: Context,
    model: &'m Model,
    /// The recurrent layers.
    blocks: Vec<&'m Rwkv7Block>,
    /// What a hybrid's attention needs.
    pasts: Option<Pasts<'m>>,
    most: usize,
    few: Few,
    skip: Skip,
    /// Of the first layer, and of the others.
    low_ranks: [LowRanks; 2],
    tokens: Buf,
    slots: Buf,
    x: Buf,
    /// Inputs [6, batch, C] of r, k, v, decay, in-context rate and gate; the first of them also holds what goes to the output matrix and to the head.
    mixed: Buf,
    projected: Buf,
    mapped: Buf,
    /// LayerNorm(x) of few sequences, on its way to the state.
    now: Buf,
    first: Buf,
    hidden: Buf,
    logits: Buf,
}

/// What the kernels of one step have in common.
#[derive(Clone, Copy)]
struct Pass<'a> {
    step: Step<'a>,
    only: Option<Part>,
    few: Option<&'a Few>,
    now: DevicePtr,
    slots: DevicePtr,
    x: DevicePtr,
    mixed: DevicePtr,
    hidden: DevicePtr,
}

impl Pass<'_> {
    fn on(&self, part: Part) -> bool {
        self.only.is_none_or(|o| o == part)
    }

    /// By the matrix library: y [batch, n] (+)= x W^T, or x W for W [k, n].
    fn library(
        &self, w: DevicePtr, trans: Trans, n: usize, k: usize, x: DevicePtr, add: bool, y: DevicePtr, to: DType,
    ) {
        let Step { gpu, batch, ctx, .. } = self.step;
        gpu.gemm(Trans::N, trans, batch, n, k, x, w, ctx.dtype(), add, y, to);
    }
}

impl<'m> DecodeStep<'m> {
    /// Sequences of a step at most.
    pub const MOST: usize = MOST;
    /// Sequences at most of which each gives the same to the bit as alone: the kernels for so few add in one order, whatever the others are.
    pub const APART: usize = BATCH;

    /// For steps of up to `batch` sequences. `None` if the model's matrices are not on a GPU in 16 bits or are too wide for the kernels, or if
    /// it has what they don't know: the doubled in-context rate, a Transformer's blocks, attention to hundreds of chunks.
    pub fn new(ctx: &Context, model: &'m Model, batch: usize) -> Option<DecodeStep<'m>> {
        let on_device = |w: &Weight| matches!(w, Weight::Device(_));
        if !on_device(&model.head) || ctx.cuda().is_none() || ctx.dtype() == DType::F32 || model.config().double_rate {
            return None;
        }
        let (mut blocks, mut attention) = (Vec::new(), Vec::new());
        for (_, block) in &model.blocks {
            match block {
                Block::Rwkv7(block) => blocks.push(&**block),
                Block::Hybrid(block) => attention.push((&**block, blocks.len().checked_sub(1)?)),
                Block::Transformer(_) => return None,
            }
        }
        let (config, most) = (model.config(), batch.min(MOST));
        let (c, hidden, vocab) = (config.n_embd, config.n_hidden, config.vocab_size);
        let ranks = |layer: usize| {
            let att = &blocks.get(layer).or(blocks.first())?.att;
            let rank = |l: &LowRank| l.down.outputs();
            let v = att.value_gate.as_ref().map_or(0, rank);
            Some([rank(&att.decay), rank(&att.rate), v, rank(&att.gate)])
        };
        if !(0..config.n_layer.min(2)).all(|i| ranks(i).is_some_and(|r| fits(ctx, c, config.head_size, r))) {
            return None;
        }
        // In the order of `load::STACK`; the value gate has the input of v.
        let projections = |layer| {
            let [w, a, v, g] = ranks(layer)?;
            Tiles::new(ctx, c, &[(c, 0), (c, 1), (c + v, 2), (w, 3), (a, 4), (g, 5)])
        };
        let low_ranks = |layer| {
            let [w, a, v, g] = ranks(layer)?;
            LowRanks::new(ctx, most, c, [(2, v, 2), (0, w, 3), (1, a, 4), (3, g, 5)])
        };
        let few = Few {
            projections: [projections(0)?, projections(1)?],
            attention: Tiles::new(ctx, c, &[(3 * c, 0)])?,
            output: Tiles::new(ctx, c, &[(c, 0)])?,
            key: Tiles::new(ctx, c, &[(hidden, 0)])?,
            head: Tiles::new(ctx, c, &[(vocab, 0)])?,
        };
        let widest = few.projections.iter().map(Tiles::rows).max()?;
        let pasts = match attention.is_empty() {
            true => None,
            false => Some(Pasts::new(ctx, model, most, attention)?),
        };
        Some(DecodeStep {
            few,
            pasts,
            skip: Skip::new(ctx, most.min(BATCH), hidden, c)?,
            low_ranks: [low_ranks(0)?, low_ranks(1)?],
            tokens: ctx.zeros_f32(most),
            slots: ctx.zeros_f32(most),
            x: ctx.zeros_f32(most * c),
            mixed: ctx.zeros(6 * most * c),
            projected: ctx.zeros_f32((most.min(BATCH) * widest).max(most * 3 * c)),
            mapped: ctx.zeros_f32(4 * most * c),
            now: ctx.zeros(most.min(BATCH) * c),
            first: ctx.zeros_f32(most * c),
            hidden: ctx.zeros(most * hidden),
            logits: ctx.zeros_f32(most * vocab),
            ctx: ctx.clone(),
            model,
            blocks,
            most,
        })
    }

    /// Sequences of a step at most.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Where the tokens of a step are put, as `int`; after it they are the most probable next ones.
    pub fn tokens(&self) -> DevicePtr {
        self.tokens.ptr()
    }

    /// Where the rows of the state that a step's sequences have are put, as `int`, all different.
    pub fn slots(&self) -> DevicePtr {
        self.slots.ptr()
    }

    /// Logits [batch, V] of the last step, f32.
    pub fn logits(&self) -> DevicePtr {
        self.logits.ptr()
    }

    /// Share of the entries of relu(.)^2 that were zero for all sequences of a step, over `steps` steps of up to 4 sequences since the beginning.
    pub fn zero_share(&self, steps: usize) -> f64 {
        let rows = steps * self.model.blocks.len() * self.model.config().n_hidden;
        if rows == 0 { 0.0 } else { 1.0 - f64::from(self.skip.rows_read()) / rows as f64 }
    }

    /// Whether there is attention, whose pasts [`DecodeStep::prepare`] and [`DecodeStep::finish`] look after.
    pub fn attends(&self) -> bool {
        self.pasts.is_some()
    }

    /// Before a step of sequences in these slots, in their order: makes room for what attention keeps of one token more.
    pub fn prepare(&mut self, state: &mut State, slots: &[usize]) {
        if let Some(pasts) = &mut self.pasts {
            pasts.prepare(state, slots);
        }
    }

    /// After it: means of chunks that became full; where a bound is reached, attention gives up a part of its past, which waits for the device.
    pub fn finish(&mut self, state: &mut State, slots: &[usize]) {
        if let Some(pasts) = &mut self.pasts {
            pasts.finish(state, slots);
        }
    }

    /// Enqueues a step of `batch` sequences: their tokens and slots are read, their rows of `state` advanced in place.
    ///
    /// # Panics
    /// If there are more than [`DecodeStep::most`].
    pub fn run(&self, state: &State, batch: usize) {
        self.run_only(state, batch, None);
    }

    /// The same, or only the kernels of one kind: their results mean nothing, their time does.
    pub fn run_only(&self, state: &State, batch: usize, only: Option<Part>) {
        assert!(batch <= self.most);
        let on = |part| only.is_none_or(|o| o == part);
        let Some(gpu) = self.ctx.cuda() else { return };
        let (m, config, dtype) = (self.model, self.model.config(), self.ctx.dtype());
        let p = |param: Param| m.params.master(param);
        let norm = |n: &crate::rwkv7::Norm| -> Norm { [p(n.weight), p(n.bias)] };
        let w = |weight: &Weight| weight.device(&m.params);
        let c = config.n_embd;
        let step = Step { ctx: &self.ctx, gpu, batch, c, n: config.head_size };
        let (x, mixed, projected, slots) = (self.x.ptr(), self.mixed.ptr(), self.projected.ptr(), self.slots.ptr());
        let (mapped, hidden, logits) = (self.mapped.ptr(), self.hidden.ptr(), self.logits.ptr());
        let (few, now) = (Some(&self.few).filter(|_| batch <= BATCH), self.now.ptr());
        let ahead = |at, rows, cols| Ahead { at, rows, cols, by_inputs: false };
        if on(Part::Mix) {
            step.embed(w(&m.emb), self.tokens.ptr(), x, norm(&m.ln0));
        }
        let pass = Pass { step, only, few, now, slots, x, mixed, hidden };
        let library = |w, trans, n, k, x, add, y, to| pass.library(w, trans, n, k, x, add, y, to);
        let noted = state.cache.filter(|c| c.by == Eviction::Error);
        let (mut layers, mut attention) =
            (self.blocks.iter().zip(&state.layers).enumerate(), state.attention.iter().enumerate());
        for (at, (_, block)) in m.blocks.iter().enumerate() {
            if let (Block::Hybrid(block), Some(pasts)) = (block, &self.pasts) {
                let Some((j, s)) = attention.next() else { break };
                let stacked = w(&block.receptance);
                if on(Part::Mix) && few.is_none() {
                    step.mix(x, mixed, DevicePtr::NULL, slots, norm(&block.ln1), [], ahead(stacked, 3 * c, c));
                }
                if on(Part::Projections) {
                    match few {
                        Some(few) => {
                            let none = Mix { mu: [DevicePtr::NULL; 6], last: DevicePtr::NULL, slots, now };
                            step.mixed(Finish::Store, &few.attention, stacked, x, projected, norm(&block.ln1), none);
                        }
                        None => library(stacked, Trans::T, 3 * c, c, mixed, false, projected, DType::F32),
                    }
                }
                if on(Part::Heads) {
                    let notes = state.cache.map_or(0, |c| c.notes());
                    step.attend(&pasts.attend, pasts.of(j, notes, projected, slots), mixed);
                }
                self.output(&pass, &block.output);
                self.channel_mix(&pass, norm(&block.ln2), &block.ffn, s.ffn_x.buf().ptr());
                continue;
            }
            let Some((i, (block, s))) = layers.next() else { break };
            let (att, kind) = (&block.att, i.min(1));
            let before_attention = m.blocks.get(at + 1).is_some_and(|(_, b)| matches!(b, Block::Hybrid(_)));
            let wrote = match &self.pasts {
                Some(pasts) if before_attention && noted.is_some() => pasts.wrote.ptr(),
                _ => DevicePtr::NULL,
            };
            let stacked = w(&att.receptance);
            // In the order of inputs.
            let [mr, mw, mk, mv, ma, mg] = att.mix.map(p);
            let mu = [mr, mk, mv, mw, ma, mg];
            // With few sequences the products do this, and leave what is kept of this token to a kernel after them.
            if on(Part::Mix) && few.is_none() {
                step.mix(x, mixed, s.att_x.buf().ptr(), slots, norm(&block.ln1), mu, ahead(stacked, 3 * c, c));
            }
            let maps = [Some(&att.decay), Some(&att.rate), att.value_gate.as_ref(), Some(&att.gate)];
            let rank = |l: Option<&LowRank>| l.map_or(0, |l| l.down.outputs());
            let [dw, da, dv, dg] = maps.map(rank);
            let bias = |l: Option<&LowRank>| l.and_then(|l| l.bias).map_or(DevicePtr::NULL, p);
            // Where the first halves are, from the first of them on.
            let at = [dv, dv + dw, 0, dv + dw + da];
            let heads = Heads {
                up: maps.map(|l| l.map_or(DevicePtr::NULL, |l| w(&l.up))),
                ranks: maps.map(rank),
                at: at.map(|a| 3 * c + a),
                vectors: [bias(maps[0]), bias(maps[1]), bias(maps[2]), p(att.k_k), p(att.k_a), p(att.r_k)],
                ln_x: norm(&att.ln_x),
            };
            let (stride, apart, mapped) = match few {
                Some(_) => (3 * c + dw + da + dv + dg, c, None),
                None => (c, batch * c, Some(mapped)),
            };
            let from = Projected { at: projected, stride, apart, mapped };
            if on(Part::Projections) {
                if let Some(few) = few {
                    let mix = Mix { mu, last: s.att_x.buf().ptr(), slots, now };
                    step.mixed(Finish::Store, &few.projections[kind], stacked, x, projected, norm(&block.ln1), mix);
                }
                if let Some(mapped) = mapped {
                    let each = |p: DevicePtr, apart: usize, t: DType| [0, 1, 2].map(|i| p.offset(i * apart, t));
                    let (from, to) = (each(mixed, batch * c, dtype), each(projected, batch * c, DType::F32));
                    let matrices = each(stacked, c * c, dtype);
                    gpu.gemm_each(Trans::N, Trans::T, batch, c, c, from, matrices, dtype, false, to, DType::F32);
                    let down = stacked.offset(3 * c * c, dtype);
                    step.low_rank(&self.low_ranks[kind], down, heads.up, mixed, mapped);
                }
            }
            if on(Part::Heads) {
                let shift = [now, s.att_x.buf().ptr()];
                step.heads(from, &heads, self.first.ptr(), s.wkv.buf(), slots, shift, wrote, mixed);
            }
            self.output(&pass, &att.output);
            self.channel_mix(&pass, norm(&block.ln2), &block.ffn, s.ffn_x.buf().ptr());
        }
        if on(Part::Mix) && few.is_none() {
            step.mix(x, mixed, DevicePtr::NULL, slots, norm(&m.ln_out), [], ahead(w(&m.head), config.vocab_size, c));
        }
        if on(Part::Head) {
            let vocab = config.vocab_size;
            match few {
                Some(few) => {
                    let none = [DevicePtr::NULL; 6];
                    let mix = Mix { mu: none, last: DevicePtr::NULL, slots, now };
                    step.mixed(Finish::Store, &few.head, w(&m.head), x, logits, norm(&m.ln_out), mix);
                }
                None => library(w(&m.head), Trans::T, vocab, c, mixed, false, logits, DType::F32),
            }
            step.argmax(logits, self.tokens.ptr(), vocab);
        }
    }

    /// x += mixed W^T.
    fn output(&self, pass: &Pass<'_>, weight: &Weight) {
        let Pass { step, x, mixed, .. } = *pass;
        if pass.on(Part::Output) {
            match pass.few {
                Some(few) => step.add(&few.output, weight.device(&self.model.params), mixed, x),
                None => pass.library(
                    weight.device(&self.model.params),
                    Trans::T,
                    step.c,
                    step.c,
                    mixed,
                    true,
                    x,
                    DType::F32,
                ),
            }
        }
    }

    /// The second half of a block; `last` [slots, C] are its last inputs.
    fn channel_mix(&self, pass: &Pass<'_>, norm: Norm, ffn: &ChannelMix, last: DevicePtr) {
        let Pass { step, few, now, slots, x, mixed, hidden, .. } = *pass;
        let (c, wide, batch) = (step.c, self.model.config().n_hidden, step.batch);
        let [key, value] = [&ffn.key, &ffn.value].map(|w| w.device(&self.model.params));
        let mix = self.model.params.master(ffn.mix);
        if pass.on(Part::Mix) && few.is_none() {
            step.mix(x, mixed, last, slots, norm, [mix], Ahead { at: key, rows: wide, cols: c, by_inputs: false });
        }
        if pass.on(Part::Key) {
            match few {
                Some(few) => {
                    let mut mu = [DevicePtr::NULL; 6];
                    mu[0] = mix;
                    step.mixed(Finish::ReluSquared, &few.key, key, x, hidden, norm, Mix { mu, last, slots, now });
                }
                None => {
                    pass.library(key, Trans::T, wide, c, mixed, false, hidden, self.ctx.dtype());
                    let ahead = Ahead { at: value, rows: wide, cols: c, by_inputs: true };
                    step.relu_squared(hidden, batch * wide, ahead);
                }
            }
        }
        if pass.on(Part::Value) {
            match few {
                Some(_) => step.skip(value, hidden, x, &self.skip, [now, last], slots),
                None => pass.library(value, Trans::N, c, wide, hidden, true, x, DType::F32),
            }
        }
    }

    /// Bytes that the kernels of one kind, or all, move at least in a step of `batch` sequences: every matrix but the embedding once, the second ones of
    /// channel mixing without the share `zero` of their rows, states, kept as `kept`, in and out; not what attention keeps.
    pub fn bytes(&self, batch: usize, kept: DType, zero: f64, part: Option<Part>) -> f64 {
        let config = self.model.config();
        let (c, h, layers) = (config.n_embd, config.n_hidden, config.n_layer);
        let blocks = self.model.blocks.len();
        let down = self.few.projections[0].rows() + layers.saturating_sub(1) * self.few.projections[1].rows();
        let elements = |part| match part {
            Part::Mix => 0,
            // The second halves of the low-rank maps are in the heads' kernel, or a product of their own before it.
            Part::Projections if batch > BATCH => (2 * down + 3 * c * blocks - 6 * c * layers) * c,
            Part::Heads if batch > BATCH => 0,
            Part::Projections => (down + 3 * c * (blocks - layers)) * c,
            Part::Heads => (down - 3 * c * layers) * c,
            Part::Output => blocks * c * c,
            Part::Key | Part::Value => blocks * c * h,
            Part::Head => config.vocab_size * c,
        };
        let states = (2 * config.state_len() * kept.size() * batch) as f64;
        let of = |part: Part| {
            let matrices = (elements(part) * self.ctx.dtype().size()) as f64;
            match part {
                Part::Heads => matrices + states,
                Part::Value => matrices * (1.0 - zero),
                _ => matrices,
            }
        };
        part.map_or_else(|| Part::ALL.into_iter().map(of).sum(), of)
    }
}
