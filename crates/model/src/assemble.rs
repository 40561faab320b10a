//! From parameters and weights by name to the blocks of a model.

use crate::hybrid::HybridBlock;
use crate::load::packed_layout;
use crate::rwkv7::{Block, ChannelMix, Norm, Rwkv7Block, TimeMix};
use crate::tensors::Place;
use crate::transformer::TransformerBlock;
use crate::{Architecture, Config, Model};
use anser_ops::attention::Chunks;
use anser_ops::{Activation, LowRank, Param, ParamSet, Weight};
use std::collections::{BTreeMap, HashMap};

impl Model {
    /// A model of the parameters that [`Config::tensors`] lists: those in `weights`, and all others in the arena.
    pub(crate) fn assemble(config: Config, params: ParamSet, weights: &HashMap<String, Weight>) -> Model {
        let specs = params.specs().iter().enumerate();
        let handles = specs.map(|(id, s)| (s.name.as_str(), params.handle(id))).collect();
        let at = |place: Place| Parts { handles: &handles, weights, prefix: config.prefix(place) };
        let block = |place: Place| {
            let parts = at(place);
            let block = match place {
                _ if config.architecture == Architecture::Transformer => Block::Transformer(parts.transformer(&config)),
                Place::Block(i) => Block::Rwkv7(parts.rwkv7(&config, i)),
                Place::Attention(_) => Block::Hybrid(parts.hybrid(&config)),
                Place::Outside => unreachable!("it is no block"),
            };
            (parts.prefix, block)
        };
        let blocks = config.order().into_iter().map(block).collect();
        let (ln0, outside) = (at(Place::Block(0)).norm("ln0"), at(Place::Outside));
        let [emb, head] = ["emb.weight", "head.weight"].map(|name| outside.weight(name));
        let ln_out = outside.norm("ln_out");
        let packed = digest(weights);
        Model { emb, ln0, blocks, ln_out, head, packed, config, params }
    }
}

/// What tells weights apart that are packed on a CPU or lie on a GPU.
fn digest(weights: &HashMap<String, Weight>) -> u64 {
    let in_order: BTreeMap<_, _> = weights.iter().collect();
    let digests = in_order.values().filter_map(|w| match w {
        Weight::Packed(w) => Some(w.digest()),
        Weight::Device(w) => Some(w.digest()),
        Weight::OutIn(_) | Weight::InOut(_) => None,
    });
    digests.fold(0, |hash: u64, d| (hash.rotate_left(5) ^ d).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The parts of a block, or what is outside of blocks, by the names that they have there.
struct Parts<'a> {
    handles: &'a HashMap<&'a str, Param>,
    weights: &'a HashMap<String, Weight>,
    prefix: String,
}

impl Parts<'_> {
    fn param(&self, name: &str) -> Param {
        self.handles[format!("{}{name}", self.prefix).as_str()]
    }

    fn weight(&self, name: &str) -> Weight {
        match self.weights.get(&format!("{}{name}", self.prefix)) {
            Some(w) => w.clone(),
            None if packed_layout(name) == Some(true) => Weight::InOut(self.param(name)),
            None => Weight::OutIn(self.param(name)),
        }
    }

    fn norm(&self, name: &str) -> Norm {
        Norm { weight: self.param(&format!("{name}.weight")), bias: self.param(&format!("{name}.bias")) }
    }

    /// Matrices of attention, or of time mixing.
    fn att<const N: usize>(&self, names: [&str; N]) -> [Weight; N] {
        names.map(|m| self.weight(&format!("att.{m}.weight")))
    }

    /// The matrices of channel mixing, or of the control's MLP.
    fn mlp(&self) -> [Weight; 2] {
        ["ffn.key.weight", "ffn.value.weight"].map(|name| self.weight(name))
    }

    fn channel_mix(&self) -> ChannelMix {
        let [key, value] = self.mlp();
        ChannelMix { mix: self.param("ffn.x_k"), key, value }
    }

    fn low_rank(&self, m: &str, biased: bool, activation: Activation) -> LowRank {
        LowRank {
            down: self.weight(&format!("att.{m}1")),
            up: self.weight(&format!("att.{m}2")),
            bias: biased.then(|| self.param(&format!("att.{m}0"))),
            activation,
        }
    }

    /// Block `i` of RWKV-7.
    fn rwkv7(&self, config: &Config, i: usize) -> Box<Rwkv7Block> {
        let [receptance, key, value, output] = self.att(["receptance", "key", "value", "output"]);
        let att = TimeMix {
            mix: ["r", "w", "k", "v", "a", "g"].map(|m| self.param(&format!("att.x_{m}"))),
            decay: self.low_rank("w", true, Activation::Tanh),
            rate: self.low_rank("a", true, Activation::Identity),
            value_gate: (i > 0).then(|| self.low_rank("v", true, Activation::Identity)),
            gate: self.low_rank("g", false, Activation::Sigmoid),
            k_k: self.param("att.k_k"),
            k_a: self.param("att.k_a"),
            r_k: self.param("att.r_k"),
            receptance,
            key,
            value,
            output,
            ln_x: self.norm("att.ln_x"),
            heads: config.heads(),
            rate_scale: if config.double_rate { 2.0 } else { 1.0 },
        };
        Box::new(Rwkv7Block { ln1: self.norm("ln1"), att, ln2: self.norm("ln2"), ffn: self.channel_mix() })
    }

    /// An attention block of a hybrid.
    fn hybrid(&self, config: &Config) -> Box<HybridBlock> {
        let [receptance, key, value, output] = self.att(["receptance", "key", "value", "output"]);
        Box::new(HybridBlock {
            ln1: self.norm("ln1"),
            receptance,
            key,
            value,
            gate: config.hybrid.filter(|h| h.gate).map(|_| self.weight("att.gate.weight")),
            output,
            heads: config.heads(),
            chunks: config.hybrid.map_or(Chunks::WHOLE, |h| h.chunks()),
            ln2: self.norm("ln2"),
            ffn: self.channel_mix(),
        })
    }

    /// A block of the control.
    fn transformer(&self, config: &Config) -> Box<TransformerBlock> {
        let [query, key, value, output] = self.att(["query", "key", "value", "output"]);
        let (ln1, ln2, heads, ffn) = (self.norm("ln1"), self.norm("ln2"), config.heads(), self.mlp());
        Box::new(TransformerBlock { ln1, query, key, value, output, heads, ln2, ffn })
    }
}
