//! The parameters of a model: their names, shapes and order, and the order of the blocks that they are in.

use crate::{Architecture, Config};
use anser_ops::Group;

/// Where a parameter is in a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In block `i` of RWKV-7, or of the control.
    Block(usize),
    /// In attention block `j` of a hybrid.
    Attention(usize),
    /// In no block.
    Outside,
}

/// Where the parameter of this name is, and its name there: `rwkv.blocks.3.att.w0` is `att.w0` in block 3.
pub(crate) fn place(name: &str) -> (Place, &str) {
    let name = name.strip_prefix("rwkv.").unwrap_or(name);
    let numbered = |prefix| {
        let (i, part) = str::strip_prefix(name, prefix)?.split_once('.')?;
        Some((i.parse().ok()?, part))
    };
    if let Some((i, part)) = numbered("blocks.") {
        return (Place::Block(i), part);
    }
    numbered("moba.").map_or((Place::Outside, name), |(j, part)| (Place::Attention(j), part))
}

/// Name and shape of a parameter; in a block, the name there.
type Named = (String, Vec<usize>);

fn named(name: impl Into<String>, shape: &[usize]) -> Named {
    (name.into(), shape.to_vec())
}

/// The optimiser group of a parameter.
fn group(name: &str, shape: &[usize]) -> Group {
    let dimensions = shape.iter().filter(|&&d| d != 1).count();
    match () {
        _ if name.ends_with("att.w0") => Group::Double,
        _ if dimensions >= 2 && name.contains(".weight") => Group::Decay,
        _ => Group::Plain,
    }
}

impl Config {
    /// What the names of parameters there begin with: hybrids keep the two kinds of blocks apart.
    pub(crate) fn prefix(&self, place: Place) -> String {
        let rwkv = if self.hybrid.is_some() { "rwkv." } else { "" };
        match place {
            Place::Block(i) => format!("{rwkv}blocks.{i}."),
            Place::Attention(j) => format!("moba.{j}."),
            Place::Outside => rwkv.into(),
        }
    }

    /// The blocks in the order in which they work: an attention block after every n_layer / M others, rounded down, a single one after all.
    pub(crate) fn order(&self) -> Vec<Place> {
        let attention = self.attention_layers();
        let every = self.n_layer.checked_div(attention).unwrap_or(usize::MAX);
        let mut order = Vec::new();
        for i in 0..self.n_layer {
            order.push(Place::Block(i));
            if (i + 1).is_multiple_of(every) && (i + 1) / every <= attention {
                order.push(Place::Attention((i + 1) / every - 1));
            }
        }
        order
    }

    /// Blocks of RWKV-7 after the last attention block of a hybrid that has several: they work here, and the reference implementation
    /// of RWKV-X leaves them out.
    pub fn left_over(&self) -> usize {
        self.hybrid.filter(|h| h.layers > 1).map_or(0, |h| self.n_layer % h.layers)
    }

    /// Name, shape and optimiser group of every parameter, in the official order. Layer 0 has no v0, v1, v2: the
    /// model does not use them there, and checkpoints with and without them both load.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>, Group)> {
        let mut all = Vec::new();
        let mut add = |place: Place, tensors: Vec<Named>| {
            let prefix = self.prefix(place);
            all.extend(tensors.into_iter().map(|(name, shape)| {
                let name = format!("{prefix}{name}");
                let group = group(&name, &shape);
                (name, shape, group)
            }));
        };
        let vocabulary = [self.vocab_size, self.n_embd];
        add(Place::Outside, vec![named("emb.weight", &vocabulary)]);
        for i in 0..self.n_layer {
            let block = match self.architecture {
                Architecture::Rwkv7 => self.rwkv7_block(i),
                Architecture::Transformer => self.transformer_block(),
            };
            // The norm of the embedding belongs to the first block.
            add(Place::Block(i), if i == 0 { self.norms(&["ln0"]) } else { Vec::new() });
            add(Place::Block(i), block);
        }
        add(Place::Outside, [self.norms(&["ln_out"]), vec![named("head.weight", &vocabulary)]].concat());
        (0..self.attention_layers()).for_each(|j| add(Place::Attention(j), self.attention_block()));
        all
    }

    /// Block `i` of RWKV-7.
    fn rwkv7_block(&self, i: usize) -> Vec<Named> {
        let (c, rank) = (self.n_embd, self.lora);
        let vector = |name: &str| named(name, &[1, 1, c]);
        let low_rank =
            |m: &str, rank: usize| [named(format!("att.{m}1"), &[c, rank]), named(format!("att.{m}2"), &[rank, c])];
        let mut block = self.norms(&["ln1", "ln2"]);
        block.extend(["r", "w", "k", "v", "a", "g"].map(|m| vector(&format!("att.x_{m}"))));
        for (m, rank) in [("w", rank.decay), ("a", rank.rate), ("v", rank.value)] {
            if m == "v" && i == 0 {
                continue;
            }
            block.push(vector(&format!("att.{m}0")));
            block.extend(low_rank(m, rank));
        }
        block.extend(low_rank("g", rank.gate));
        block.extend(["att.k_k", "att.k_a"].map(vector));
        block.push(named("att.r_k", &[self.heads(), self.head_size]));
        block.extend(["receptance", "key", "value", "output"].map(|m| named(format!("att.{m}.weight"), &[c, c])));
        block.extend(self.norms(&["att.ln_x"]));
        block.push(vector("ffn.x_k"));
        block.extend(self.mlp());
        block
    }

    /// An attention block of a hybrid.
    fn attention_block(&self) -> Vec<Named> {
        let (c, keys) = (self.n_embd, self.key_heads() * self.head_size);
        let mut block = self.norms(&["ln1", "ln2"]);
        let outputs = [("receptance", c), ("key", keys), ("value", keys), ("output", c)];
        block.extend(outputs.map(|(m, outputs)| named(format!("att.{m}.weight"), &[outputs, c])));
        if self.hybrid.is_some_and(|h| h.gate) {
            block.push(named("att.gate.weight", &[self.heads(), c]));
        }
        block.push(named("ffn.x_k", &[1, 1, c]));
        block.extend(self.mlp());
        block
    }

    /// A block of the control.
    fn transformer_block(&self) -> Vec<Named> {
        let c = self.n_embd;
        let mut block = self.norms(&["ln1", "ln2"]);
        block.extend(["query", "key", "value", "output"].map(|m| named(format!("att.{m}.weight"), &[c, c])));
        block.extend(self.mlp());
        block
    }

    /// Weights and biases of norms.
    fn norms(&self, names: &[&str]) -> Vec<Named> {
        let of = |n: &&str| ["weight", "bias"].map(|part| named(format!("{n}.{part}"), &[self.n_embd]));
        names.iter().flat_map(of).collect()
    }

    /// The matrices of channel mixing, or of the control's MLP.
    fn mlp(&self) -> [Named; 2] {
        let (c, h) = (self.n_embd, self.n_hidden);
        [named("ffn.key.weight", &[h, c]), named("ffn.value.weight", &[c, h])]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Hybrid, LoraDims};

    #[test]
    fn groups_are_the_official_ones() {
        let mut c = Config::new(3, 128, 300);
        c.lora = LoraDims { decay: 32, rate: 32, value: 32, gate: 64 };
        let count = |g| c.tensors().iter().filter(|t| t.2 == g).count();
        assert_eq!((count(Group::Double), count(Group::Decay), count(Group::Plain)), (3, 20, 79));
    }

    #[test]
    fn blocks_are_in_the_order_of_the_reference() {
        let order = |n_layer, layers| {
            let c = Config { hybrid: Some(Hybrid::new(layers)), ..Config::new(n_layer, 64, 8) };
            let letter = |p: &Place| match p {
                Place::Attention(j) => format!("a{j}"),
                Place::Block(i) => i.to_string(),
                Place::Outside => unreachable!(),
            };
            (c.order().iter().map(letter).collect::<Vec<_>>().join(" "), c.left_over())
        };
        assert_eq!(order(6, 2), ("0 1 2 a0 3 4 5 a1".into(), 0));
        assert_eq!(order(5, 2), ("0 1 a0 2 3 a1 4".into(), 1));
        assert_eq!((order(3, 1), order(3, 0)), (("0 1 2 a0".into(), 0), ("0 1 2".into(), 0)));
        assert_eq!(order(7, 3), ("0 1 a0 2 3 a1 4 5 a2 6".into(), 1));
        assert_eq!(place("rwkv.blocks.12.att.w0"), (Place::Block(12), "att.w0"));
        assert_eq!(place("blocks.0.ln0.bias"), (Place::Block(0), "ln0.bias"));
        assert_eq!(place("moba.3.ffn.x_k"), (Place::Attention(3), "ffn.x_k"));
        assert_eq!(place("rwkv.head.weight"), (Place::Outside, "head.weight"));
    }
}
