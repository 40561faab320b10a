use crate::Config;
use anser_ops::Var;
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

/// The recurrent state of all layers. A forward pass takes one and returns the next; segments say which rows it reads and writes.
#[derive(Clone)]
pub struct State {
    /// One per recurrent layer.
    pub layers: Vec<LayerState>,
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
        State { layers: (0..config.recurrent_layers()).map(layer).collect() }
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

    /// The matrices in order: att_x, wkv, ffn_x of layer 0, 1, ..
    pub fn vars(&self) -> impl Iterator<Item = &Var> {
        self.layers.iter().flat_map(|l| [&l.att_x, &l.wkv, &l.ffn_x])
    }

    fn map(&self, f: impl Fn(&Var) -> Var) -> State {
        let layer = |l: &LayerState| LayerState { att_x: f(&l.att_x), wkv: f(&l.wkv), ffn_x: f(&l.ffn_x) };
        State { layers: self.layers.iter().map(layer).collect() }
    }
}
