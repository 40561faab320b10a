use crate::{Cache, Config};
use anser_ops::Var;
use anser_ops::attention::Past;
use anser_tensor::{Context, DType};

/// The recurrent state of one layer: an arena with one row per slot (sequence).
#[derive(Clone)]
pub struct LayerState {
    /// Last input of time mixing (after ln1): [slots, C].
    pub att_x: Var,
    /// WKV state, value index first: [slots, H x N x N].
    pub wkv: Var,
    /// Last input of channel mixing (after ln2): [slots, C].
    pub ffn_x: Var,
}

/// The state of one attention block of a hybrid.
#[derive(Clone)]
pub struct AttentionState {
    /// Last input of channel mixing (after ln2): [slots, C].
    pub ffn_x: Var,
    /// Keys and values seen, one past per slot.
    pub pasts: Vec<Past>,
}

/// The state of all layers. A forward pass takes one and returns the next; segments say which rows it reads and writes.
#[derive(Clone)]
pub struct State {
    /// One per recurrent layer.
    pub layers: Vec<LayerState>,
    /// One per attention block of a hybrid.
    pub attention: Vec<AttentionState>,
    /// A bound on what attention keeps. Where a sequence is cut decides when it is applied: it is the same for every cut that ends where
    /// [`State::room`] ends.
    pub cache: Option<Cache>,
}

impl Config {
    /// What an attention block keeps before the first token.
    pub fn empty_past(&self, ctx: &Context) -> Past {
        Past::new(ctx, [self.heads(), self.key_heads()], self.head_size)
    }
}

impl State {
    /// Zeros for `slots` sequences.
    pub fn zeros(ctx: &Context, config: &Config, slots: usize) -> State {
        State::zeros_as(ctx, config, slots, DType::F32)
    }

    /// The same with WKV states of a type, f32 or, for [`crate::DecodeStep`] only, f16.
    pub fn zeros_as(ctx: &Context, config: &Config, slots: usize, wkv: DType) -> State {
        let (c, n) = (config.n_embd, config.n_embd * config.head_size);
        let zeros = |cols: usize| Var::constant(slots, cols, ctx.zeros(slots * cols));
        let matrix = || Var::constant(slots, n, ctx.zeros_as(wkv, slots * n));
        let layer = |_| LayerState { att_x: zeros(c), wkv: matrix(), ffn_x: zeros(c) };
        let past = |_| config.empty_past(ctx);
        let attention = |_| AttentionState { ffn_x: zeros(c), pasts: (0..slots).map(past).collect() };
        let layers = (0..config.recurrent_layers()).map(layer).collect();
        let attention = (0..config.attention_layers()).map(attention).collect();
        State { layers, attention, cache: None }
    }

    /// A state whose slots are copies of slots of others, given as (state, slot): sequences join, leave or are kept this way.
    ///
    /// # Panics
    /// If there are none, or a slot doesn't exist.
    pub fn gather(ctx: &Context, slots: &[(&State, usize)]) -> State {
        let rows = |of: &dyn Fn(&State) -> &Var| {
            let (cols, dtype) = (of(slots[0].0).cols(), of(slots[0].0).buf().dtype());
            let mut buf = ctx.alloc_as(dtype, slots.len() * cols);
            for (i, (state, slot)) in slots.iter().enumerate() {
                buf.write_part(i * cols, of(state).buf(), slot * cols, cols);
            }
            Var::constant(slots.len(), cols, buf)
        };
        let layer = |i: usize| LayerState {
            att_x: rows(&|s| &s.layers[i].att_x),
            wkv: rows(&|s| &s.layers[i].wkv),
            ffn_x: rows(&|s| &s.layers[i].ffn_x),
        };
        let attention = |j: usize| AttentionState {
            ffn_x: rows(&|s| &s.attention[j].ffn_x),
            pasts: slots.iter().map(|(s, slot)| s.attention[j].pasts[*slot].clone()).collect(),
        };
        let first = slots[0].0;
        State {
            layers: (0..first.layers.len()).map(layer).collect(),
            attention: (0..first.attention.len()).map(attention).collect(),
            cache: first.cache,
        }
    }

    /// Overwrites a slot with one of another state.
    ///
    /// # Panics
    /// If either doesn't exist.
    pub fn put(&mut self, slot: usize, from: &State, other: usize) {
        for ((_, to), from) in self.named_mut().zip(from.vars()) {
            let cols = to.cols();
            to.buf_mut().write_part(slot * cols, from.buf(), other * cols, cols);
        }
        for (to, from) in self.attention.iter_mut().zip(&from.attention) {
            to.pasts[slot] = from.pasts[other].clone();
        }
    }

    /// The same values, cut off from where they came from: gradients stop here, and can be read here.
    pub fn detached(&self) -> State {
        self.map(Var::detached)
    }

    /// The same values without gradients.
    pub fn constant(&self) -> State {
        self.map(Var::without_grad)
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.layers.first().map_or(0, |l| l.att_x.rows())
    }

    /// Tokens that the sequence in `slot` may grow by until attention gives up a part of its past.
    pub fn room(&self, slot: usize) -> usize {
        let kept = self.attention.first().map_or(0, |a| a.pasts[slot].len());
        self.cache.map_or(usize::MAX, |c| c.most.saturating_sub(kept).max(1))
    }

    /// The matrices in order: att_x, wkv, ffn_x of layer 0, 1, .., then ffn_x of attention blocks.
    pub fn vars(&self) -> impl Iterator<Item = &Var> {
        let layers = self.layers.iter().flat_map(|l| [&l.att_x, &l.wkv, &l.ffn_x]);
        layers.chain(self.attention.iter().map(|a| &a.ffn_x))
    }

    /// The same for writing, each with the name it has in files: `state.0.att_x`, .., `state.moba.0.ffn_x`.
    pub fn named_mut(&mut self) -> impl Iterator<Item = (String, &mut Var)> {
        let layers = self.layers.iter_mut().enumerate().flat_map(|(i, l)| {
            let parts = [("att_x", &mut l.att_x), ("wkv", &mut l.wkv), ("ffn_x", &mut l.ffn_x)];
            parts.map(|(part, v)| (format!("state.{i}.{part}"), v))
        });
        let attention = self.attention.iter_mut().enumerate();
        layers.chain(attention.map(|(j, a)| (format!("state.moba.{j}.ffn_x"), &mut a.ffn_x)))
    }

    fn map(&self, f: impl Fn(&Var) -> Var) -> State {
        let layer = |l: &LayerState| LayerState { att_x: f(&l.att_x), wkv: f(&l.wkv), ffn_x: f(&l.ffn_x) };
        let attention = |a: &AttentionState| AttentionState { ffn_x: f(&a.ffn_x), pasts: a.pasts.clone() };
        State {
            layers: self.layers.iter().map(layer).collect(),
            attention: self.attention.iter().map(attention).collect(),
            cache: self.cache,
        }
    }
}
