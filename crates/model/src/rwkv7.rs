//! RWKV-7 "Goose": the equations of arXiv 2503.14456 section 4, in the form of the released code.

use crate::cache::Written;
use crate::hybrid::HybridBlock;
use crate::transformer::TransformerBlock;
use crate::{Architecture, AttentionState, Config, Error, Eviction, LayerState, State};
use anser_ops::wkv7::Wkv7Inputs;
use anser_ops::{CrossEntropy, Loss, LowRank, Param, ParamSet, Segment, Tape, Var, Weight};
use std::sync::Arc;

/// Weight and bias of a LayerNorm or GroupNorm.
#[derive(Clone, Copy)]
pub(crate) struct Norm {
    pub(crate) weight: Param,
    pub(crate) bias: Param,
}

/// Time mixing: the recurrent half of a block.
pub(crate) struct TimeMix {
    /// Token-shift weights x_r, x_w, x_k, x_v, x_a, x_g.
    pub(crate) mix: [Param; 6],
    pub(crate) decay: LowRank,
    pub(crate) rate: LowRank,
    /// Value residual; layer 0 has none.
    pub(crate) value_gate: Option<LowRank>,
    pub(crate) gate: LowRank,
    pub(crate) k_k: Param,
    pub(crate) k_a: Param,
    pub(crate) r_k: Param,
    pub(crate) receptance: Weight,
    pub(crate) key: Weight,
    pub(crate) value: Weight,
    pub(crate) output: Weight,
    pub(crate) ln_x: Norm,
    pub(crate) heads: usize,
    /// Of the in-context learning rate in the removal: 1, or 2 for [`Config::double_rate`].
    pub(crate) rate_scale: f32,
}

impl TimeMix {
    /// x: [tokens, C]. Returns (x + output, v_first, new att_x arena, new wkv arena, the value and key that were written).
    fn forward(
        &self, t: &mut Tape<'_>, x: Residual, norm: &Norm, v_first: Option<&Var>, state: &LayerState,
        segments: &Arc<[Segment]>,
    ) -> (Residual, Var, Var, Var, [Var; 2]) {
        // r, k and v side by side, for one product; their gradients come first going back, those of the low-rank maps are added.
        let [mr, mw, mk, mv, ma, mg] = self.mix;
        let (x, [xr, xk, xv, xw, xa, xg], att_x) =
            x.norm_shift(t, norm, &state.att_x, segments, [mr, mk, mv, mw, ma, mg]);
        let mut maps = vec![(&xg, &self.gate), (&xa, &self.rate), (&xw, &self.decay)];
        maps.extend(self.value_gate.as_ref().map(|m| (&xv, m)));
        let mut mapped = t.low_ranks(&maps);
        let value_gate = self.value_gate.as_ref().and_then(|_| mapped.pop());
        let [gate, rate, w] = <[Var; 3]>::try_from(mapped).unwrap_or_else(|_| unreachable!("there are three others"));
        let [r, k, mut v] = t.linears([&xr, &xk, &xv], [&self.receptance, &self.key, &self.value]);
        drop((xr, xw, xk, xv, xa, xg));
        let v_first = v_first.cloned().unwrap_or_else(|| v.clone());
        if let Some(gate) = value_gate {
            v = t.value_residual(&v, &v_first, &gate);
        }
        let key = t.key_path(&k, &rate, self.k_k, self.k_a, self.heads, self.rate_scale);
        drop((k, rate));
        let inputs = Wkv7Inputs { r: &r, w: &w, k: &key.k, v: &v, a: &key.a, b: &key.b };
        let (y, wkv) = t.wkv7(inputs, &state.wkv, segments, self.heads);
        let y = t.read_out(&y, &r, &key.k, &v, &gate, self.r_k, self.ln_x.weight, self.ln_x.bias, self.heads);
        let dx = t.linear(&y, &self.output);
        (Residual { x, dx: Some(dx) }, v_first, att_x, wkv, [v, key.k])
    }
}

/// Channel mixing: the MLP half of a block, W_v relu(W_k x_k)^2.
pub(crate) struct ChannelMix {
    pub(crate) mix: Param,
    pub(crate) key: Weight,
    pub(crate) value: Weight,
}

impl ChannelMix {
    /// x: [tokens, C]. Returns (x + output, new ffn_x arena).
    pub(crate) fn forward(
        &self, t: &mut Tape<'_>, x: Residual, norm: &Norm, last: &Var, segments: &Arc<[Segment]>,
    ) -> (Residual, Var) {
        let (x, [xk], ffn_x) = x.norm_shift(t, norm, last, segments, [self.mix]);
        let k = t.linear(&xk, &self.key);
        let k = t.relu_squared(k);
        let dx = t.linear(&k, &self.value);
        (Residual { x, dx: Some(dx) }, ffn_x)
    }
}

/// The residual stream between two blocks, x + dx: the addition waits for the norm that follows, which does both in one pass.
pub(crate) struct Residual {
    pub(crate) x: Var,
    pub(crate) dx: Option<Var>,
}

impl Residual {
    /// The sum and its norm.
    pub(crate) fn norm(self, t: &mut Tape<'_>, n: &Norm) -> (Var, Var) {
        match self.dx {
            Some(dx) => t.add_norm(self.x, &dx, n.weight, n.bias),
            None => {
                let h = t.layer_norm(&self.x, n.weight, n.bias);
                (self.x, h)
            }
        }
    }

    /// The sum and the token shift of its norm: see [`Tape::norm_shift`].
    fn norm_shift<const K: usize>(
        self, t: &mut Tape<'_>, n: &Norm, last: &Var, segments: &Arc<[Segment]>, mu: [Param; K],
    ) -> (Var, [Var; K], Var) {
        t.norm_shift(self.x, self.dx.as_ref(), [n.weight, n.bias], last, segments, mu)
    }

    pub(crate) fn sum(self, t: &mut Tape<'_>) -> Var {
        match self.dx {
            Some(dx) => t.add(self.x, &dx),
            None => self.x,
        }
    }
}

/// One layer.
pub(crate) enum Block {
    Rwkv7(Box<Rwkv7Block>),
    Hybrid(Box<HybridBlock>),
    Transformer(Box<TransformerBlock>),
}

pub(crate) struct Rwkv7Block {
    pub(crate) ln1: Norm,
    pub(crate) att: TimeMix,
    pub(crate) ln2: Norm,
    pub(crate) ffn: ChannelMix,
}

impl Rwkv7Block {
    /// x: [tokens, C]. Returns (x, v_first, state), and what was written into `written` if it is wanted.
    fn forward(
        &self, t: &mut Tape<'_>, x: Residual, v_first: Option<&Var>, state: &LayerState, segments: &Arc<[Segment]>,
        written: Option<&mut Option<Written>>,
    ) -> (Residual, Var, LayerState) {
        let (x, v_first, att_x, wkv, rows) = self.att.forward(t, x, &self.ln1, v_first, state, segments);
        match written {
            Some(to) => *to = Some(Written { rows, states: wkv.clone() }),
            None => drop(rows),
        }
        let (x, ffn_x) = self.ffn.forward(t, x, &self.ln2, &state.ffn_x, segments);
        (x, v_first, LayerState { att_x, wkv, ffn_x })
    }
}

/// A model: its dimensions, its parameters and the equations over them.
pub struct Model {
    pub(crate) config: Config,
    pub(crate) params: ParamSet,
    pub(crate) emb: Weight,
    pub(crate) ln0: Norm,
    /// In the order in which they work, each with what the names of its parameters begin with.
    pub(crate) blocks: Vec<(String, Block)>,
    pub(crate) ln_out: Norm,
    pub(crate) head: Weight,
    /// Of its matrices that are packed or lie on a GPU.
    pub(crate) packed: u64,
}

impl Model {
    /// The dimensions.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The parameters. A model loaded for inference has its matrices elsewhere, packed.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// The parameters, mutable.
    pub fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    /// Runs the blocks over ragged sequences: tokens `[n]` to hidden vectors [n, C] after ln_out, and the next state.
    /// With `checkpointing`, a recording tape keeps only each block's input and computes the block again going back.
    ///
    /// # Errors
    /// When a token is outside the vocabulary; when a segment of a Transformer, or of a hybrid while recording, goes on from a state or
    /// wants one.
    pub fn forward<'p>(
        &'p self, t: &mut Tape<'p>, tokens: &[u32], segments: &Arc<[Segment]>, state: &State, checkpointing: bool,
    ) -> Result<(Var, State), Error> {
        let vocab = self.config.vocab_size;
        if let Some(position) = tokens.iter().position(|&t| t as usize >= vocab) {
            return Err(Error::Token { token: tokens[position], position, vocab });
        }
        if segments.iter().any(|s| s.state_in.or(s.state_out).is_some()) {
            if self.config.architecture == Architecture::Transformer {
                return Err(Error::Stateless);
            }
            if self.config.hybrid.is_some() && t.is_recording() {
                return Err(Error::Pieces);
            }
        }
        let x = t.embedding(tokens, &self.emb);
        let mut x = Residual { x: t.layer_norm(&x, self.ln0.weight, self.ln0.bias), dx: None };
        let mut v_first: Option<Var> = None;
        let mut next = State { layers: Vec::new(), attention: Vec::new(), cache: state.cache };
        let mut written = None;
        for (prefix, block) in &self.blocks {
            // Below the lowest trainable parameter there is nothing to go back for.
            let trainable = || self.params.specs().iter().any(|p| p.trainable && p.name.starts_with(prefix));
            let again = checkpointing && t.is_recording() && (x.x.needs_grad() || trainable());
            let segments = segments.clone();
            // A checkpoint keeps one tensor of each block: the sum.
            let whole = |x: Var| Residual { x, dx: None };
            match block {
                Block::Rwkv7(block) => {
                    let s = &state.layers[next.layers.len()];
                    let (next_v, next_s);
                    (x, next_v, next_s) = if again {
                        let sum = x.sum(t);
                        let mut inputs = vec![&sum, &s.att_x, &s.wkv, &s.ffn_x];
                        inputs.extend(v_first.as_ref());
                        let out = t.checkpoint(&inputs, move |t, i| {
                            let s = LayerState { att_x: i[1].clone(), wkv: i[2].clone(), ffn_x: i[3].clone() };
                            let (x, v, s) = block.forward(t, whole(i[0].clone()), i.get(4), &s, &segments, None);
                            vec![x.sum(t), v, s.att_x, s.wkv, s.ffn_x]
                        });
                        let [x, v, att_x, wkv, ffn_x] = <[Var; 5]>::try_from(out).unwrap_or_else(|_| unreachable!());
                        (whole(x), v, LayerState { att_x, wkv, ffn_x })
                    } else {
                        let wanted = state.cache.filter(|c| c.by == Eviction::Error).map(|_| &mut written);
                        block.forward(t, x, v_first.as_ref(), s, &segments, wanted)
                    };
                    // Only the first block's value is v_first; later blocks hand it on.
                    v_first = Some(v_first.unwrap_or(next_v));
                    next.layers.push(next_s);
                }
                Block::Hybrid(block) => {
                    let s = &state.attention[next.attention.len()];
                    let next_s;
                    (x, next_s) = if again {
                        let (sum, pasts) = (x.sum(t), s.pasts.clone());
                        let out = t.checkpoint(&[&sum, &s.ffn_x], move |t, i| {
                            let s = AttentionState { ffn_x: i[1].clone(), pasts: pasts.clone() };
                            let (x, s) = block.forward(t, whole(i[0].clone()), &s, &segments, None);
                            vec![x.sum(t), s.ffn_x]
                        });
                        let [x, ffn_x] = <[Var; 2]>::try_from(out).unwrap_or_else(|_| unreachable!());
                        (whole(x), AttentionState { ffn_x, pasts: s.pasts.clone() })
                    } else {
                        let bound = state.cache.as_ref().map(|c| (c, written.take()));
                        block.forward(t, x, s, &segments, bound)
                    };
                    next.attention.push(next_s);
                }
                Block::Transformer(block) if again => {
                    let sum = x.sum(t);
                    let out = t
                        .checkpoint(&[&sum], move |t, i| vec![block.forward(t, whole(i[0].clone()), &segments).sum(t)]);
                    let [sum] = <[Var; 1]>::try_from(out).unwrap_or_else(|_| unreachable!());
                    x = whole(sum);
                }
                Block::Transformer(block) => x = block.forward(t, x, &segments),
            }
        }
        let (_, hidden) = x.norm(t, &self.ln_out);
        Ok((hidden, next))
    }

    /// Logits of hidden vectors: [n, C] to [n, V].
    pub fn logits(&self, t: &mut Tape<'_>, hidden: &Var) -> Var {
        t.linear(hidden, &self.head)
    }

    /// Cross entropy of hidden vectors [n, C] against targets `[n]` (negative: ignored); see [`Tape::cross_entropy`].
    pub fn loss(
        &self, t: &mut Tape<'_>, hidden: &Var, targets: &[i32], weights: Option<&[f32]>, opts: CrossEntropy,
    ) -> Loss {
        t.cross_entropy(hidden, &self.head, targets, weights, opts)
    }
}

impl Model {
    /// A number that tells models apart: a hash of the dimensions and of the parameters kept in the arena.
    pub fn fingerprint(&self) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut add = |word: u64| hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
        let c = &self.config;
        [c.n_layer, c.n_embd, c.head_size, c.vocab_size, c.n_hidden].iter().for_each(|&d| add(d as u64));
        if c.double_rate {
            add(2);
        }
        c.hybrid.iter().for_each(|h| [h.layers, h.chunk, h.topk].iter().for_each(|&d| add(d as u64)));
        // What no released model has, each with its number.
        if let Some(h) = c.hybrid {
            let more = [h.sink, h.window, h.gate.into(), h.key_heads.unwrap_or(0)];
            more.iter().enumerate().filter(|(_, d)| **d > 0).flat_map(|(i, d)| [i, *d]).for_each(|d| add(d as u64));
        }
        self.params.values().iter().for_each(|v| add(v.to_bits().into()));
        format!("{hash:016x}")
    }

    /// The same with how and what the matrices are that are packed on a CPU or lie on a GPU: on a CPU, states of models that agree in it go on alike to
    /// the bit.
    pub fn exact_fingerprint(&self) -> String {
        format!("{}-{:016x}", self.fingerprint(), self.packed)
    }
}
