//! The dimensions of a model.

use crate::Error;
use anser_ops::attention::Chunks;
use serde::{Deserialize, Serialize};

/// Ranks of the low-rank maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraDims {
    /// Decay (w1, w2).
    pub decay: usize,
    /// In-context learning rate (a1, a2).
    pub rate: usize,
    /// Value residual (v1, v2).
    pub value: usize,
    /// Gate (g1, g2).
    pub gate: usize,
}

impl LoraDims {
    /// The ranks that the current official trainer gives a new model of width `n_embd`. Never used to load one.
    pub fn for_width(n_embd: usize) -> LoraDims {
        // Python's round(): halves go to the even neighbour.
        let dim = |f: f64| ((f * (n_embd as f64).sqrt() / 32.0).round_ties_even() as usize * 32).max(32);
        LoraDims { decay: dim(2.5), rate: dim(2.5), value: dim(1.7), gate: dim(5.0) }
    }
}

/// What the blocks of a model are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// RWKV-7 blocks.
    #[default]
    Rwkv7,
    /// Blocks of causal attention with rotary positions and an MLP: the control that experiments compare RWKV-7 with. It has no
    /// recurrent state, so that it reads whole sequences only.
    Transformer,
}

impl Architecture {
    fn is_default(&self) -> bool {
        *self == Architecture::default()
    }
}

/// Attention blocks between the RWKV-7 blocks (RWKV-X, arXiv 2504.21463), each attention and channel mixing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hybrid {
    /// Attention blocks, M.
    pub layers: usize,
    /// Tokens of a chunk of attention, B.
    pub chunk: usize,
    /// Chunks a token sees, k, its own counted.
    pub topk: usize,
    /// Of these the first ones of the sequence that every token sees, whatever their scores; a cache keeps them. No released model has any, and
    /// small ones gained nothing by it, as by `window` and `gate` (docs/hybrids.md).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sink: usize,
    /// Of these the ones just before the own chunk that every token sees, so that it sees at least so many chunks of tokens before it. No
    /// released model has any.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub window: usize,
    /// Whether what attention gives is multiplied by sigmoid(W_g x), one number for each head; the tensors att.gate.weight [H, C]. No
    /// released model has it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gate: bool,
    /// Heads of keys and values, of which each serves as many heads of queries in a row; `None`: one for each. What is kept of a token is as
    /// much smaller. No released model has fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_heads: Option<usize>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Hybrid {
    /// `layers` blocks with chunks of 2048 tokens, of which 3 are seen: those of the released models.
    pub fn new(layers: usize) -> Hybrid {
        Hybrid { layers, chunk: 2048, topk: 3, sink: 0, window: 0, gate: false, key_heads: None }
    }

    /// The rule of attention.
    pub fn chunks(&self) -> Chunks {
        Chunks { size: self.chunk, top: self.topk, sink: self.sink, window: self.window }
    }
}

/// The dimensions of a model.
///
/// ```
/// use anser_model::Config;
/// let c = Config::preset("0.1b").unwrap();
/// assert_eq!((c.parameters(), c.state_len()), (191_034_624, 608_256));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Layers, L.
    pub n_layer: usize,
    /// Width, D or C.
    pub n_embd: usize,
    /// Head size, N.
    pub head_size: usize,
    /// Vocabulary, V.
    pub vocab_size: usize,
    /// Hidden width of channel mixing; 4 D in every official model.
    pub n_hidden: usize,
    /// Ranks of the low-rank maps.
    pub lora: LoraDims,
    /// Whether the in-context learning rate reaches 2 instead of 1 (the paper's appendix D.1), so that a transition can have the
    /// eigenvalue -1 and one token can swap two entries of the state. No released model has it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub double_rate: bool,
    /// What the blocks are. A Transformer has no low-rank maps: `lora` and `double_rate` mean nothing there.
    #[serde(default, skip_serializing_if = "Architecture::is_default")]
    pub architecture: Architecture,
    /// Attention blocks of a hybrid. The layers counted above are those of RWKV-7.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hybrid: Option<Hybrid>,
}

/// A named size: (name, layers, width, ranks of released checkpoints: decay, rate, value, gate).
type Preset = (&'static str, usize, usize, Option<[usize; 4]>);

/// The named sizes: the released World models, and small ones for a CPU.
pub const PRESETS: [Preset; 8] = [
    ("tiny", 4, 128, None),
    ("small", 6, 256, None),
    ("medium", 8, 512, None),
    ("0.1b", 12, 768, Some([64, 64, 32, 128])),
    ("0.4b", 24, 1024, Some([64, 64, 32, 128])),
    ("1.5b", 24, 2048, Some([96, 96, 64, 256])),
    ("2.9b", 32, 2560, Some([96, 96, 64, 320])),
    ("7.2b", 32, 4096, Some([128, 128, 96, 480])),
];

impl Config {
    /// A model with the official proportions: head size 64, hidden width 4 D, ranks of the current trainer.
    pub fn new(n_layer: usize, n_embd: usize, vocab_size: usize) -> Config {
        let lora = LoraDims::for_width(n_embd);
        let (head_size, n_hidden, architecture) = (64, 4 * n_embd, Architecture::Rwkv7);
        Config {
            n_layer,
            n_embd,
            head_size,
            vocab_size,
            n_hidden,
            lora,
            double_rate: false,
            architecture,
            hybrid: None,
        }
    }

    /// The Transformer to compare this model with: the same layers, width, heads and vocabulary, and an MLP just wide enough (in
    /// eights) that it has at least as many parameters.
    ///
    /// ```
    /// use anser_model::Config;
    /// let (a, b) = (Config::new(2, 128, 64), Config::new(2, 128, 64).control());
    /// assert!(b.parameters() >= a.parameters() && b.parameters() < a.parameters() + 2 * 2 * 128 * 8);
    /// ```
    pub fn control(&self) -> Config {
        let architecture = Architecture::Transformer;
        let bare = Config { architecture, double_rate: false, n_hidden: 0, hybrid: None, ..self.clone() };
        let per_unit = 2 * self.n_embd * self.n_layer;
        let n_hidden = (self.parameters() - bare.parameters()).div_ceil(per_unit).next_multiple_of(8);
        Config { n_hidden, ..bare }
    }

    /// A named size ([`PRESETS`]) with the World vocabulary of 65536.
    ///
    /// # Errors
    /// When there is no such size; the message lists them.
    pub fn preset(name: &str) -> Result<Config, Error> {
        let lower = name.to_ascii_lowercase();
        let Some(&(_, n_layer, n_embd, ranks)) = PRESETS.iter().find(|p| p.0 == lower) else {
            let names: Vec<&str> = PRESETS.iter().map(|p| p.0).collect();
            return Err(Error::Config(format!("no preset {name:?}; there are {}", names.join(", "))));
        };
        let mut c = Config::new(n_layer, n_embd, 65536);
        if let Some([decay, rate, value, gate]) = ranks {
            c.lora = LoraDims { decay, rate, value, gate };
        }
        Ok(c)
    }

    /// What such models are called.
    pub fn family(&self) -> &'static str {
        match self.architecture {
            Architecture::Rwkv7 if self.hybrid.is_some() => "RWKV-X",
            Architecture::Rwkv7 => "RWKV-7",
            Architecture::Transformer => "Transformer",
        }
    }

    /// Heads, H.
    pub fn heads(&self) -> usize {
        self.n_embd / self.head_size
    }

    /// Heads of keys and values of attention blocks.
    pub fn key_heads(&self) -> usize {
        self.hybrid.and_then(|h| h.key_heads).unwrap_or(self.heads())
    }

    /// Rows of the matrices that read the input of attention: of queries, keys, values and gates, which on a GPU are filled up to a multiple of 8.
    pub(crate) fn attention_rows(&self) -> usize {
        let gates = if self.hybrid.is_some_and(|h| h.gate) { self.heads() } else { 0 };
        self.n_embd + 2 * self.key_heads() * self.head_size + gates.next_multiple_of(8)
    }

    /// Checks that such a model can exist.
    ///
    /// # Errors
    /// Names the dimension that is wrong.
    pub fn validate(&self) -> Result<(), Error> {
        let err = |m: String| Err(Error::Config(m));
        let l = self.lora;
        let dims = [
            ("n_layer", self.n_layer),
            ("n_embd", self.n_embd),
            ("head_size", self.head_size),
            ("vocab_size", self.vocab_size),
            ("n_hidden", self.n_hidden),
            ("lora.decay", l.decay),
            ("lora.rate", l.rate),
            ("lora.value", l.value),
            ("lora.gate", l.gate),
        ];
        for (name, v) in dims {
            if v == 0 || v > 1 << 24 {
                return err(format!("{name} = {v}: it must be between 1 and {}", 1 << 24));
            }
        }
        if !self.n_embd.is_multiple_of(self.head_size) {
            return err(format!("head_size {} does not divide n_embd {}", self.head_size, self.n_embd));
        }
        if let Some(h) = self.hybrid {
            for (name, v) in [("chunk", h.chunk), ("topk", h.topk)] {
                if v == 0 {
                    return err(format!("{name} = 0: attention sees at least 1 chunk of at least 1 token"));
                }
            }
            if h.sink.saturating_add(h.window) >= h.topk {
                let Hybrid { topk, sink, window, .. } = h;
                return err(format!(
                    "sink {sink} and window {window}: of topk {topk} chunks one is a token's own, and these are among the others"
                ));
            }
            if h.key_heads.is_some_and(|k| k == 0 || !self.heads().is_multiple_of(k)) {
                return err(format!("{} heads of keys don't divide {} heads", self.key_heads(), self.heads()));
            }
            if h.layers > self.n_layer {
                return err(format!("{} attention blocks don't fit between {} others", h.layers, self.n_layer));
            }
        }
        if ![16, 32, 64, 128].contains(&self.head_size) {
            return err(format!("head_size {}: it must be 16, 32, 64 or 128", self.head_size));
        }
        Ok(())
    }

    /// Number of parameters the model uses.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape, _)| shape.iter().product::<usize>()).sum()
    }

    /// Number of parameters counting layer 0's unused value-residual tensors, as some checkpoints have them.
    pub fn parameters_with_unused(&self) -> usize {
        self.parameters() + self.n_embd * (1 + 2 * self.lora.value)
    }

    /// Blocks that have a recurrent state.
    pub fn recurrent_layers(&self) -> usize {
        if self.architecture == Architecture::Rwkv7 { self.n_layer } else { 0 }
    }

    /// Attention blocks of a hybrid.
    pub fn attention_layers(&self) -> usize {
        self.hybrid.map_or(0, |h| h.layers)
    }

    /// Numbers in the recurrent state of one sequence; attention blocks have one token's shift and, per token seen, [`Config::cache_len`].
    pub fn state_len(&self) -> usize {
        (self.recurrent_layers() * (2 + self.head_size) + self.attention_layers()) * self.n_embd
    }

    /// Numbers that attention blocks keep of every token: keys and values.
    pub fn cache_len(&self) -> usize {
        2 * self.key_heads() * self.head_size * self.attention_layers()
    }

    /// Floating-point operations to train on one token: 6 x (parameters - embedding), the project's convention for MFU.
    pub fn train_flops_per_token(&self) -> f64 {
        6.0 * (self.parameters() - self.vocab_size * self.n_embd) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_exact() {
        let rows = [
            ("0.1b", 191_034_624, 191_084_544, 608_256),
            ("0.4b", 450_767_872, 450_834_432, 1_622_016),
            ("1.5b", 1_527_404_544, 1_527_668_736, 3_244_032),
            ("2.9b", 2_947_735_040, 2_948_065_280, 5_406_720),
        ];
        for (name, used, all, state) in rows {
            let c = Config::preset(name).unwrap();
            assert_eq!((c.parameters(), c.parameters_with_unused(), c.state_len()), (used, all, state), "{name}");
        }
        let c = Config::preset("7.2B").unwrap();
        assert_eq!((c.parameters(), c.state_len()), (7_199_141_888, 8_650_752));
        let pile = |name, params| {
            let c = Config { vocab_size: 50304, ..Config::preset(name).unwrap() };
            assert_eq!(c.parameters(), params);
        };
        pile("0.1b", 167_638_272);
        pile("1.5b", 1_465_014_272);
    }

    #[test]
    fn ranks_follow_the_current_trainer() {
        for (c, d) in [(768, [64, 64, 32, 128]), (1024, [64, 64, 64, 160]), (2048, [128, 128, 64, 224])] {
            let l = LoraDims::for_width(c);
            assert_eq!([l.decay, l.rate, l.value, l.gate], d, "width {c}");
        }
        assert_eq!(LoraDims::for_width(2560).gate, 256);
        assert_eq!(LoraDims::for_width(4096).decay, 160);
    }

    #[test]
    fn hybrids_count_like_the_reference() {
        let hybrid = |preset, layers| Config { hybrid: Some(Hybrid::new(layers)), ..Config::preset(preset).unwrap() };
        let (small, large) = (hybrid("0.1b", 4), hybrid("2.9b", 8));
        assert_eq!((small.parameters(), large.parameters()), (219_361_536, 3_576_983_040));
        // In 16 bits 12,288 and 81,920 bytes a token.
        assert_eq!((2 * small.cache_len(), 2 * large.cache_len()), (12_288, 81_920));
    }

    #[test]
    fn impossible_models_are_named() {
        let check = |hybrid| {
            let c = Config { hybrid: Some(hybrid), ..Config::new(2, 64, 8) };
            c.validate().map_err(|e| e.to_string())
        };
        let hybrid = |layers, chunk, topk| check(Hybrid { chunk, topk, ..Hybrid::new(layers) });
        let always = |sink, window| check(Hybrid { sink, window, ..Hybrid::new(1) });
        assert!(always(1, 1).is_ok() && always(2, 0).is_ok());
        assert!(always(1, 2).unwrap_err().contains("sink 1 and window 2: of topk 3"));
        assert!(always(usize::MAX, 1).is_err());
        let shared = |k| {
            let c = Config {
                head_size: 16,
                hybrid: Some(Hybrid { key_heads: Some(k), ..Hybrid::new(1) }),
                ..Config::new(2, 64, 8)
            };
            c.validate().map(|()| c.cache_len()).map_err(|e| e.to_string())
        };
        assert_eq!((shared(4), shared(2), shared(1)), (Ok(128), Ok(64), Ok(32)));
        assert!(shared(3).unwrap_err().contains("3 heads of keys don't divide 4 heads") && shared(0).is_err());
        assert!(
            hybrid(1, 0, 3).unwrap_err().contains("chunk = 0") && hybrid(1, 8, 0).unwrap_err().contains("topk = 0")
        );
        assert!(hybrid(3, 8, 1).unwrap_err().contains("3 attention blocks") && hybrid(2, 1, 1).is_ok());
        let mut c = Config::new(2, 100, 256);
        assert!(c.validate().unwrap_err().to_string().contains("head_size 64 does not divide n_embd 100"));
        c.n_embd = 96;
        c.head_size = 48;
        assert!(c.validate().is_err());
        assert!(Config::preset("9b").unwrap_err().to_string().contains("0.1b"));
    }
}
