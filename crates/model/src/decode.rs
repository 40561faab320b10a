//! A decoding step on a GPU in a few kernels a layer, for a model whose matrices are there (see [`anser_ops::decode`]). It is the same model as
//! [`Model::forward`], which a test holds it equal to; what differs is that states are advanced in place.

use crate::rwkv7::{Block, Rwkv7Block};
use crate::{Model, State};
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
    /// r, k, v and the first halves of the low-rank maps.
    Projections,
    /// Everything of a head.
    Heads,
    /// The output matrix of time mixing.
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
    blocks: Vec<&'m Rwkv7Block>,
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

impl<'m> DecodeStep<'m> {
    /// Sequences of a step at most.
    pub const MOST: usize = MOST;

    /// For steps of up to `batch` sequences. `None` if the model's matrices are not on a GPU in 16 bits or are too wide for the kernels, or if
    /// it has what they don't know: the doubled in-context rate, other blocks than those of RWKV-7.
    pub fn new(ctx: &Context, model: &'m Model, batch: usize) -> Option<DecodeStep<'m>> {
        let on_device = |w: &Weight| matches!(w, Weight::Device(_));
        if !on_device(&model.head) || ctx.cuda().is_none() || ctx.dtype() == DType::F32 || model.config().double_rate {
            return None;
        }
        let recurrent = |(_, block): &'m (String, Block)| match block {
            Block::Rwkv7(block) => Some(&**block),
            _ => None,
        };
        let blocks: Vec<&Rwkv7Block> = model.blocks.iter().map(recurrent).collect::<Option<_>>()?;
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
            output: Tiles::new(ctx, c, &[(c, 0)])?,
            key: Tiles::new(ctx, c, &[(hidden, 0)])?,
            head: Tiles::new(ctx, c, &[(vocab, 0)])?,
        };
        let widest = few.projections.iter().map(Tiles::rows).max()?;
        Some(DecodeStep {
            few,
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
        let (c, wide) = (config.n_embd, config.n_hidden);
        let step = Step { ctx: &self.ctx, gpu, batch, c, n: config.head_size };
        let (x, mixed, projected, slots) = (self.x.ptr(), self.mixed.ptr(), self.projected.ptr(), self.slots.ptr());
        let (mapped, hidden, logits) = (self.mapped.ptr(), self.hidden.ptr(), self.logits.ptr());
        let (few, now) = (Some(&self.few).filter(|_| batch <= BATCH), self.now.ptr());
        // By the matrix library: y [batch, n] (+)= x W^T, or x W for W [k, n].
        let library = |w, trans, n, k, x, add, y, to| gpu.gemm(Trans::N, trans, batch, n, k, x, w, dtype, add, y, to);
        let ahead = |at, rows, cols| Ahead { at, rows, cols, by_inputs: false };
        if on(Part::Mix) {
            step.embed(w(&m.emb), self.tokens.ptr(), x, norm(&m.ln0));
        }
        for (i, (block, s)) in self.blocks.iter().zip(&state.layers).enumerate() {
            let (att, kind) = (&block.att, i.min(1));
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
                step.heads(from, &heads, self.first.ptr(), s.wkv.buf(), slots, [now, s.att_x.buf().ptr()], mixed);
            }
            if on(Part::Output) {
                match few {
                    Some(few) => step.add(&few.output, w(&att.output), mixed, x),
                    None => library(w(&att.output), Trans::T, c, c, mixed, true, x, DType::F32),
                }
            }
            if on(Part::Mix) && few.is_none() {
                step.mix(
                    x,
                    mixed,
                    s.ffn_x.buf().ptr(),
                    slots,
                    norm(&block.ln2),
                    [p(block.ffn.mix)],
                    ahead(w(&block.ffn.key), wide, c),
                );
            }
            let ffn = &block.ffn;
            if on(Part::Key) {
                match few {
                    Some(few) => {
                        let mut mu = [DevicePtr::NULL; 6];
                        mu[0] = p(ffn.mix);
                        let mix = Mix { mu, last: s.ffn_x.buf().ptr(), slots, now };
                        step.mixed(Finish::ReluSquared, &few.key, w(&ffn.key), x, hidden, norm(&block.ln2), mix);
                    }
                    None => {
                        library(w(&ffn.key), Trans::T, wide, c, mixed, false, hidden, dtype);
                        let value = Ahead { at: w(&ffn.value), rows: wide, cols: c, by_inputs: true };
                        step.relu_squared(hidden, batch * wide, value);
                    }
                }
            }
            if on(Part::Value) {
                match few {
                    Some(_) => {
                        let shift = [now, s.ffn_x.buf().ptr()];
                        step.skip(w(&ffn.value), hidden, x, &self.skip, shift, slots);
                    }
                    None => library(w(&ffn.value), Trans::N, c, wide, hidden, true, x, DType::F32),
                }
            }
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

    /// Bytes that the kernels of one kind, or all, move at least in a step of `batch` sequences: every matrix but the embedding once, the second ones of
    /// channel mixing without the share `zero` of their rows, states, kept as `kept`, in and out.
    pub fn bytes(&self, batch: usize, kept: DType, zero: f64, part: Option<Part>) -> f64 {
        let config = self.model.config();
        let (c, h, layers) = (config.n_embd, config.n_hidden, config.n_layer);
        let down = self.few.projections[0].rows() + layers.saturating_sub(1) * self.few.projections[1].rows();
        let elements = |part| match part {
            Part::Mix => 0,
            // The second halves of the low-rank maps are in the heads' kernel, or a product of their own before it.
            Part::Projections if batch > BATCH => (2 * down - 3 * c * layers) * c,
            Part::Heads if batch > BATCH => 0,
            Part::Projections => down * c,
            Part::Heads => (down - 3 * c * layers) * c,
            Part::Output => layers * c * c,
            Part::Key | Part::Value => layers * c * h,
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
