//! The configuration of a checkpoint: what the shapes of its tensors tell, and what only its metadata can.

use crate::tensors::{Place, place};
use crate::{Architecture, Config, Error, Hybrid, LoraDims};
use anser_formats::{CONFIG_JSON, Checkpoint};
use serde_json::{Value, json};

/// Key of a model file's metadata with its description.
const DESCRIPTION: &str = "anser.config";

impl Config {
    /// Key and value of the metadata that a model file says its options with: JSON with `version`, `architecture` and `model`.
    pub fn description(&self) -> (String, String) {
        let json = json!({ "version": 1, "architecture": self.architecture, "model": self });
        (DESCRIPTION.into(), json.to_string())
    }

    /// Reads the dimensions from the shapes of a checkpoint's tensors (never from a formula), and what no shape tells from
    /// the description in its metadata, if it has one. A hybrid without one has the chunks of the released models ([`Hybrid::new`]).
    ///
    /// # Errors
    /// When a tensor that tells a dimension is missing or has the wrong rank, the dimensions don't fit together, or the
    /// description is of a newer version.
    pub fn from_checkpoint(ckpt: &Checkpoint) -> Result<Config, Error> {
        check_config_json(ckpt)?;
        let said = said(ckpt)?;
        if let Some(config) = said.iter().find(|c| c.architecture == Architecture::Transformer) {
            // No shape tells its heads. Loading compares every shape with what is said.
            config.validate()?;
            return Ok(config.clone());
        }
        let (n_layer, attention) = blocks(ckpt)?;
        let is_hybrid = attention > 0 || ckpt.names().any(|n| n.starts_with("rwkv."));
        let prefix = if is_hybrid { "rwkv." } else { "" };
        let shape = |name: &str| matrix(ckpt, &format!("{prefix}{name}"));
        let [vocab_size, n_embd] = shape("emb.weight")?;
        let [heads, head_size] = shape("blocks.0.att.r_k")?;
        let rank = |name: &str| Ok::<usize, Error>(shape(name)?[1]);
        // Layer 0 has no value residual; a model of one layer has none at all.
        let value = if n_layer > 1 { rank("blocks.1.att.v1")? } else { 32 };
        let hybrid = is_hybrid.then(|| {
            let said = said.as_ref().and_then(|c| c.hybrid).unwrap_or(Hybrid::new(attention));
            let gate = ckpt.names().any(|n| n.starts_with("moba.") && n.ends_with(".att.gate.weight"));
            // What is no whole number of heads is found when the tensor is read.
            let keys = ckpt.shape("moba.0.att.key.weight").and_then(|s| Some(s.first()?.div_ceil(head_size.max(1))));
            Hybrid { layers: attention, gate, key_heads: keys.filter(|k| *k != heads), ..said }
        });
        let config = Config {
            n_layer,
            n_embd,
            head_size,
            vocab_size,
            n_hidden: shape("blocks.0.ffn.key.weight")?[0],
            lora: LoraDims {
                decay: rank("blocks.0.att.w1")?,
                rate: rank("blocks.0.att.a1")?,
                value,
                gate: rank("blocks.0.att.g1")?,
            },
            double_rate: said.is_some_and(|c| c.double_rate),
            architecture: Architecture::Rwkv7,
            hybrid,
        };
        config.validate()?;
        Ok(config)
    }
}

/// Blocks of RWKV-7 and of attention that the names of tensors tell of.
fn blocks(ckpt: &Checkpoint) -> Result<(usize, usize), Error> {
    let (mut n_layer, mut attention) = (0, 0);
    for name in ckpt.names() {
        match place(name).0 {
            Place::Block(i) => n_layer = n_layer.max(i.saturating_add(1)),
            Place::Attention(j) => attention = attention.max(j.saturating_add(1)),
            Place::Outside => {}
        }
    }
    let most = n_layer.max(attention);
    if most > ckpt.names().count() {
        return Err(Error::Checkpoint(format!("it names a layer {} and has few tensors: it is damaged", most - 1)));
    }
    Ok((n_layer, attention))
}

/// The shape of a matrix.
fn matrix(ckpt: &Checkpoint, name: &str) -> Result<[usize; 2], Error> {
    let shape = ckpt.shape(name).ok_or_else(|| {
        Error::Checkpoint(format!("tensor {name} is missing: this is not a RWKV-7 checkpoint, or it is incomplete"))
    })?;
    shape.try_into().map_err(|_| Error::Checkpoint(format!("tensor {name} has shape {shape:?}; expected 2 dimensions")))
}

/// What a model file written by Anser says of itself.
fn said(ckpt: &Checkpoint) -> Result<Option<Config>, Error> {
    let Some(text) = ckpt.metadata().get(DESCRIPTION) else { return Ok(None) };
    let bad = |e: String| Error::Checkpoint(format!("{DESCRIPTION}: {e}"));
    let mut json: Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    match json["version"].as_u64() {
        Some(1) => serde_json::from_value(json["model"].take()).map(Some).map_err(|e| bad(e.to_string())),
        Some(v) => Err(bad(format!("version {v} is of a newer Anser; this one reads version 1"))),
        None => Err(bad("it has no version".into())),
    }
}

/// A Hugging Face folder may say things that no shape tells; those that would change the result are refused.
fn check_config_json(ckpt: &Checkpoint) -> Result<(), Error> {
    let Some(text) = ckpt.metadata().get(CONFIG_JSON) else { return Ok(()) };
    let config: Value = serde_json::from_str(text).map_err(|e| Error::Checkpoint(format!("config.json: {e}")))?;
    let expected = [
        ("model_type", json!("rwkv7")),
        ("hidden_act", json!("sqrelu")),
        ("norm_eps", json!(1e-5)),
        ("norm_first", json!(true)),
        ("tie_word_embeddings", json!(false)),
    ];
    for (key, value) in expected {
        if let Some(found) = config.get(key).filter(|&found| *found != value) {
            return Err(Error::Checkpoint(format!("config.json: {key} is {found}; RWKV-7 has {value}")));
        }
    }
    match config.get("attn") {
        Some(attn) if !attn.is_null() => {
            Err(Error::Checkpoint("config.json: it mixes attention layers in; only RWKV-7 layers load".into()))
        }
        _ => Ok(()),
    }
}
