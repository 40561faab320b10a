//! A decoding step on a GPU in a few kernels a layer, for a model whose matrices are there (see [`anser_ops::decode`]). It is the same model as
//! [`Model::forward`], which a test holds it equal to; what differs is that states are advanced in place.

use crate::{Model, State};
use anser_ops::decode::{BATCH, Finish, Heads, Norm, Plan, Skip, Step, fits};
use anser_ops::{LowRank, Param, Weight};
use anser_tensor::cuda::DevicePtr;
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

/// Memory and work plans for steps of up to [`DecodeStep::MOST`] sequences.
pub struct DecodeStep<'m> {
    ctx: Context,
    model: &'m Model,
    /// Projections: of the first layer, and of the others, which have a value gate.
    projections: [Plan; 2],
    output: Plan,
    key: Plan,
    value: Skip,
    head: Plan,
    tokens: Buf,
    slots: Buf,
    x: Buf,
    /// Interpolated inputs [6, batch, C]; the first of them also holds what goes to the output matrix and to the head.
    mixed: Buf,
    projected: Buf,
    first: Buf,
    hidden: Buf,
    logits: Buf,
}

impl<'m> DecodeStep<'m> {
    /// Sequences of a step at most.
    pub const MOST: usize = BATCH;

    /// `None` if the model's matrices are not on a GPU, or are too wide for the kernels.
    pub fn new(ctx: &Context, model: &'m Model) -> Option<DecodeStep<'m>> {
        let on_device = |w: &Weight| matches!(w, Weight::Device(_));
        if !on_device(&model.head) || ctx.cuda().is_none() {
            return None;
        }
        let (config, batch) = (model.config(), BATCH);
        let (c, vocab) = (config.n_embd, config.vocab_size);
        let ranks = |layer: usize| {
            let att = &model.blocks.get(layer).or(model.blocks.first())?.att;
            let rank = |l: &LowRank| l.down.outputs();
            let v = att.value_gate.as_ref().map_or(0, rank);
            Some([rank(&att.decay), rank(&att.rate), v, rank(&att.gate)])
        };
        if !(0..config.n_layer.min(2)).all(|i| ranks(i).is_some_and(|r| fits(ctx, c, config.head_size, r))) {
            return None;
        }
        // The order of `load::STACK`; inputs in the order r, w, k, v, a, g.
        let runs = |[w, a, v, g]: [usize; 4]| [(c, 0), (c, 2), (c + v, 3), (w, 1), (a, 4), (g, 5)];
        let projections = [Plan::new(ctx, c, &runs(ranks(0)?))?, Plan::new(ctx, c, &runs(ranks(1)?))?];
        let most = projections.iter().map(Plan::rows).max()?;
        Some(DecodeStep {
            projections,
            output: Plan::new(ctx, c, &[(c, 0)])?,
            key: Plan::new(ctx, c, &[(config.n_hidden, 0)])?,
            value: Skip::new(ctx, batch, config.n_hidden, c)?,
            head: Plan::new(ctx, c, &[(vocab, 0)])?,
            tokens: ctx.zeros_f32(batch),
            slots: ctx.zeros_f32(batch),
            x: ctx.zeros_f32(batch * c),
            mixed: ctx.zeros(6 * batch * c),
            projected: ctx.zeros_f32(batch * most),
            first: ctx.zeros_f32(batch * c),
            hidden: ctx.zeros_f32(batch * config.n_hidden),
            logits: ctx.zeros_f32(batch * vocab),
            ctx: ctx.clone(),
            model,
        })
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

    /// Share of the entries of relu(.)^2 that were zero for all sequences of a step, over `steps` steps since the beginning.
    pub fn zero_share(&self, steps: usize) -> f64 {
        let rows = steps * self.model.blocks.len() * self.model.config().n_hidden;
        1.0 - f64::from(self.value.rows_read()) / rows.max(1) as f64
    }

    /// Enqueues a step of `batch` sequences: their tokens and slots are read, their rows of `state` advanced in place.
    ///
    /// # Panics
    /// If there are more than [`DecodeStep::MOST`].
    pub fn run(&self, state: &State, batch: usize) {
        self.run_only(state, batch, None);
    }

    /// The same, or only the kernels of one kind: their results mean nothing, their time does.
    pub fn run_only(&self, state: &State, batch: usize, only: Option<Part>) {
        assert!(batch <= BATCH);
        let on = |part| only.is_none_or(|o| o == part);
        let Some(gpu) = self.ctx.cuda() else { return };
        let (m, config) = (self.model, self.model.config());
        let p = |param: Param| m.params.master(param);
        let norm = |n: &crate::rwkv7::Norm| -> Norm { [p(n.weight), p(n.bias)] };
        let w = |weight: &Weight| weight.device(&m.params);
        let c = config.n_embd;
        let step = Step { ctx: &self.ctx, gpu, batch, c, n: config.head_size };
        let (x, mixed, projected, slots) = (self.x.ptr(), self.mixed.ptr(), self.projected.ptr(), self.slots.ptr());
        if on(Part::Mix) {
            step.embed(w(&m.emb), self.tokens.ptr(), x, norm(&m.ln0));
        }
        for (i, (block, s)) in m.blocks.iter().zip(&state.layers).enumerate() {
            let (att, plan) = (&block.att, &self.projections[i.min(1)]);
            if on(Part::Mix) {
                step.mix(x, mixed, s.att_x.buf().ptr(), slots, norm(&block.ln1), att.mix.map(p));
            }
            if on(Part::Projections) {
                step.product(Finish::Store, plan, w(&att.receptance), mixed, projected);
            }
            let maps = [Some(&att.decay), Some(&att.rate), att.value_gate.as_ref(), Some(&att.gate)];
            let rank = |l: Option<&LowRank>| l.map_or(0, |l| l.down.outputs());
            let [dw, da, dv, _] = maps.map(rank);
            let bias = |l: Option<&LowRank>| l.and_then(|l| l.bias).map_or(DevicePtr::NULL, p);
            let heads = Heads {
                up: maps.map(|l| l.map_or(DevicePtr::NULL, |l| w(&l.up))),
                ranks: maps.map(rank),
                at: [3 * c + dv, 3 * c + dv + dw, 3 * c, 3 * c + dv + dw + da],
                vectors: [bias(maps[0]), bias(maps[1]), bias(maps[2]), p(att.k_k), p(att.k_a), p(att.r_k)],
                ln_x: norm(&att.ln_x),
            };
            if on(Part::Heads) {
                step.heads(projected, plan.rows(), &heads, self.first.ptr(), s.wkv.buf().ptr(), slots, mixed);
            }
            if on(Part::Output) {
                step.product(Finish::Add, &self.output, w(&att.output), mixed, x);
            }
            if on(Part::Mix) {
                step.mix(x, mixed, s.ffn_x.buf().ptr(), slots, norm(&block.ln2), [p(block.ffn.mix)]);
            }
            if on(Part::Key) {
                step.product(Finish::ReluSquared, &self.key, w(&block.ffn.key), mixed, self.hidden.ptr());
            }
            if on(Part::Value) {
                step.skip(w(&block.ffn.value), self.hidden.ptr(), x, &self.value);
            }
        }
        if on(Part::Mix) {
            step.mix(x, mixed, DevicePtr::NULL, slots, norm(&m.ln_out), []);
        }
        if on(Part::Head) {
            step.product(Finish::Store, &self.head, w(&m.head), mixed, self.logits.ptr());
        }
        if on(Part::Head) {
            step.argmax(self.logits.ptr(), self.tokens.ptr(), config.vocab_size);
        }
    }

    /// Bytes that the kernels of one kind, or all, move at least in a step of `batch` sequences: every matrix but the embedding once, the second ones of
    /// channel mixing without the share `zero` of their rows, states in and out.
    pub fn bytes(&self, batch: usize, zero: f64, part: Option<Part>) -> f64 {
        let config = self.model.config();
        let (c, h, layers) = (config.n_embd, config.n_hidden, config.n_layer);
        let down: usize = self.projections[0].rows() + (layers - 1) * self.projections[1].rows();
        let elements = |part| match part {
            Part::Mix => 0,
            Part::Projections => down * c,
            Part::Heads => (down - 3 * c * layers) * c,
            Part::Output => layers * c * c,
            Part::Key | Part::Value => layers * c * h,
            Part::Head => config.vocab_size * c,
        };
        let states = (2 * config.state_len() * DType::F32.size() * batch) as f64;
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
