//! A decoding step on a GPU in one kernel or a few a layer, for a model whose matrices are there (see [`anser_ops::decode`]). It is the same model as
//! [`Model::forward`], which a test holds it equal to; what differs is that states are advanced in place, and that the host makes room for what attention keeps
//! before a step and takes means of chunks, or thins a full cache, after it.

use crate::pasts::Pasts;
use crate::rwkv7::{Block, Rwkv7Block};
use crate::{Eviction, Model, State};
use anser_ops::decode::{BATCH, LowRanks, MOST, Matrix, Norm, Step, fits, product_most};
use anser_ops::{LowRank, Param, Weight};
use anser_tensor::cuda::DevicePtr;
use anser_tensor::{Buf, Context, DType, WeightType};
use few::Few;
use products::Products;

mod few;
mod many;
mod products;

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
    /// The second, with skipping where there are few sequences.
    Value,
    /// Logits.
    Head,
}

impl Part {
    /// All of them, in the order of their first use.
    pub const ALL: [Part; 7] =
        [Part::Mix, Part::Projections, Part::Heads, Part::Output, Part::Key, Part::Value, Part::Head];
}

/// Memory and work plans for steps of up to [`DecodeStep::most`] sequences, in f16 or bf16.
///
/// A step goes one of three ways: with 1 to 4 sequences through one kernel, if it holds the model; with up to 64 through products of our own and kernels between;
/// with more through the matrix library. In the first two the bits of a sequence's result don't depend on its neighbours, but are not the same in both; in the third they
/// depend on how many there are. Matrices in codes of 8 bits know the first two ways, the second for any number.
pub struct DecodeStep<'m> {
    ctx: Context,
    model: &'m Model,
    /// The recurrent layers.
    blocks: Vec<&'m Rwkv7Block>,
    /// What a hybrid's attention needs.
    pasts: Option<Pasts<'m>>,
    most: usize,
    /// What steps of few sequences need, if their kernel holds the model.
    few: Option<Few>,
    /// What steps of more need, if its kernels hold the model.
    products: Option<Products>,
    /// Whether matrices are in codes of 8 bits, which the matrix library doesn't know.
    coded: bool,
    /// Whether a sequence's results may not depend on how many there are.
    apart: bool,
    /// Of the first layer, and of the others.
    low_ranks: [LowRanks; 2],
    tokens: Buf,
    slots: Buf,
    x: Buf,
    /// Inputs [6, batch, C] of r, k, v, decay, in-context rate and gate; the first of them also holds what goes to the output matrix and to the head.
    mixed: Buf,
    projected: Buf,
    mapped: Buf,
    /// Values of the first layer.
    first: Buf,
    hidden: Buf,
    logits: Buf,
}

impl<'m> DecodeStep<'m> {
    /// Sequences of a step at most.
    pub const MOST: usize = MOST;

    /// For steps of up to `batch` sequences. `None` if the model's matrices are not on a GPU in 16 or 8 bits or are too wide for the kernels, its heads are not of 64 or 128, or if
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
        if !fits(c, config.head_size) {
            return None;
        }
        let low_ranks = |layer| {
            let [w, a, v, g] = ranks(layer)?;
            LowRanks::new(ctx, most, c, [(2, v, 2), (0, w, 3), (1, a, 4), (3, g, 5)])
        };
        let coded = blocks.iter().any(|b| products::coded(&b.att.receptance));
        let few = Few::new(ctx, model, most, [ranks(0)?, ranks(1)?]);
        let low_ranks = [low_ranks(0)?, low_ranks(1)?];
        let wide = config.attention_rows().max(3 * c);
        let pasts = match attention.is_empty() {
            true => None,
            false => Some(Pasts::new(ctx, model, most, attention)?),
        };
        let products = Products::new(ctx, model, most, &low_ranks);
        if coded && products.is_none() {
            return None;
        }
        Some(DecodeStep {
            pasts,
            products,
            coded,
            apart: false,
            low_ranks,
            tokens: ctx.zeros_f32(most),
            slots: ctx.zeros_f32(most),
            x: ctx.zeros_f32(most * c),
            mixed: ctx.zeros(6 * most * c),
            projected: ctx.zeros_f32((most.min(BATCH) * few.as_ref().map_or(0, Few::widest)).max(most * wide)),
            few,
            mapped: ctx.zeros_f32(4 * most * c),
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

    /// From now on each sequence of a step gives the same to the bit as alone, whatever the others are: how many there may be in a step for that.
    pub fn set_apart(&mut self) -> usize {
        self.apart = true;
        if let (Some(pasts), Some(_)) = (&mut self.pasts, &self.products) {
            pasts.attend.set_apart(&self.ctx, self.most, self.model.config().head_size);
        }
        match (&self.products, &self.few) {
            (Some(_), _) => self.most,
            (None, Some(few)) => few.most(),
            _ => 1,
        }
    }

    /// Our own products, if steps of so many sequences have them.
    fn products(&self, batch: usize) -> Option<&Products> {
        self.products.as_ref().filter(|_| self.coded || self.apart || batch <= product_most(&self.ctx))
    }

    /// Whether steps of so many sequences are one kernel.
    fn is_few(&self, batch: usize) -> bool {
        self.few.as_ref().is_some_and(|few| batch <= few.most()) && !(self.apart && self.products.is_some())
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
        let few = self.few.as_ref().filter(|_| self.is_few(1));
        let read = few.and_then(Few::rows_needed).map_or(rows as f64, f64::from);
        if rows == 0 { 0.0 } else { 1.0 - read / rows as f64 }
    }

    /// Whether there is attention, whose pasts [`DecodeStep::prepare`] and [`DecodeStep::finish`] look after.
    pub fn attends(&self) -> bool {
        self.pasts.is_some()
    }

    /// Before a step of sequences in these slots of `state`, in their order: writes the step down for this state if another was before, and makes room for what
    /// attention keeps of one token more.
    pub fn prepare(&mut self, state: &mut State, slots: &[usize]) {
        if self.is_few(slots.len())
            && let Some(mut few) = self.few.take()
        {
            if !few.is_for(state) {
                let written = self.write(&few, state);
                few.set(state, written);
            }
            self.few = Some(few);
        }
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

    /// Enqueues a step of `batch` sequences, which has been prepared: their tokens and slots are read, their rows of `state` advanced in place.
    ///
    /// # Panics
    /// If there are more than [`DecodeStep::most`].
    pub fn run(&self, state: &State, batch: usize) {
        self.run_only(state, batch, None);
    }

    /// The same, or only the kernels of one kind: their results mean nothing, their time does.
    pub fn run_only(&self, state: &State, batch: usize, only: Option<Part>) {
        assert!(batch <= self.most);
        let (Some(gpu), config) = (self.ctx.cuda(), self.model.config()) else { return };
        let step = Step { ctx: &self.ctx, gpu, batch, c: config.n_embd, n: config.head_size };
        match &self.few {
            Some(few) if self.is_few(batch) => self.run_few(few, step, state, only),
            _ => self.run_many(step, state, only),
        }
    }

    /// Where a parameter is, in f32.
    fn at(&self, param: Param) -> DevicePtr {
        self.model.params.master(param)
    }

    fn norm(&self, n: &crate::rwkv7::Norm) -> Norm {
        [self.at(n.weight), self.at(n.bias)]
    }

    fn matrix(&self, w: &Weight) -> DevicePtr {
        w.device(&self.model.params)
    }

    /// The same with the scales of its codes, if it has some.
    fn weights(&self, w: &Weight) -> Matrix {
        let at = self.matrix(w);
        match w {
            Weight::Device(m) => m.scales().map_or(at.into(), |(scales, pitch)| Matrix { at, scales, pitch }),
            _ => at.into(),
        }
    }

    /// Where the value and key that the recurrent layer before block `at + 1` takes up go: null unless its attention notes them.
    fn wrote(&self, state: &State, at: usize) -> DevicePtr {
        let noted = state.cache.is_some_and(|c| c.by == Eviction::Error);
        let before_attention = self.model.blocks.get(at + 1).is_some_and(|(_, b)| matches!(b, Block::Hybrid(_)));
        match &self.pasts {
            Some(pasts) if before_attention && noted => pasts.wrote.ptr(),
            _ => DevicePtr::NULL,
        }
    }

    /// w0, a0, v0, k_k, k_a, r_k of a layer.
    fn vectors(&self, block: &Rwkv7Block) -> [DevicePtr; 6] {
        let att = &block.att;
        let bias = |l: Option<&LowRank>| l.and_then(|l| l.bias).map_or(DevicePtr::NULL, |p| self.at(p));
        let [w, a, v] = [Some(&att.decay), Some(&att.rate), att.value_gate.as_ref()].map(bias);
        [w, a, v, self.at(att.k_k), self.at(att.k_a), self.at(att.r_k)]
    }

    /// Bytes that the kernels of one kind, or all, move at least in a step of `batch` sequences: every matrix but the embedding once, the second ones of
    /// channel mixing without the share `zero` of their rows where these are not read, states, kept as `kept`, in and out; not what attention keeps.
    pub fn bytes(&self, batch: usize, kept: DType, zero: f64, part: Option<Part>) -> f64 {
        let config = self.model.config();
        let (c, h) = (config.n_embd, config.n_hidden);
        let blocks = self.model.blocks.len();
        let rank = |l: &LowRank| l.down.outputs();
        let ranks = |b: &&Rwkv7Block| {
            let att = &b.att;
            rank(&att.decay) + rank(&att.rate) + rank(&att.gate) + att.value_gate.as_ref().map_or(0, rank)
        };
        let ranks: usize = self.blocks.iter().map(ranks).sum();
        let many = !self.is_few(batch);
        let skips = self.few.as_ref().is_some_and(|few| !many && few.skips());
        let rows = 3 * c * self.blocks.len() + config.attention_rows() * (blocks - self.blocks.len());
        // Elements of matrices that may be in codes, and of low-rank maps. The second halves of these are read with the heads, or by a kernel of their own before it that counts
        // among projections.
        let elements = |part| match part {
            Part::Mix => (0, 0),
            Part::Projections if many => (rows * c, 2 * ranks * c),
            Part::Heads if many => (0, 0),
            Part::Projections => (rows * c, ranks * c),
            Part::Heads => (0, ranks * c),
            Part::Output => (blocks * c * c, 0),
            Part::Key | Part::Value => (blocks * c * h, 0),
            Part::Head => (config.vocab_size * c, 0),
        };
        let states = (2 * config.state_len() * kept.size() * batch) as f64;
        let size = self.ctx.dtype().size();
        let of = |part: Part| {
            let (matrices, maps) = elements(part);
            let matrices = if self.coded { WeightType::Int8.bytes_of(matrices) } else { matrices * size };
            let matrices = (matrices + maps * size) as f64;
            match part {
                Part::Heads => matrices + states,
                Part::Value if skips => matrices * (1.0 - zero),
                _ => matrices,
            }
        };
        part.map_or_else(|| Part::ALL.into_iter().map(of).sum(), of)
    }
}
