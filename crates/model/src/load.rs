//! From named tensors to a model: dimensions from shapes, every tensor checked, each going straight to its final place.

use crate::config::{Place, place};
use crate::hybrid::HybridBlock;
use crate::rwkv7::{Block, ChannelMix, Norm, Rwkv7Block, TimeMix};
use crate::transformer::TransformerBlock;
use crate::{Architecture, Config, Error, Hybrid, LoraDims, Model};
use anser_formats::coded::{Coded, NO_CODE};
use anser_formats::{CONFIG_JSON, Checkpoint, Dtype, TensorView};
use anser_ops::attention::Chunks;
use anser_ops::{Activation, LowRank, Param, ParamSet, Weight};
use anser_tensor::{Code, Context, DType, Packed, WeightType, memory};
use device::{To, by_output, copy_finite, to_device};
use half::f16;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

mod device;

/// What a checkpoint is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// f32 master weights in the parameter arena.
    Train,
    /// Matrices packed for inference in this type ([`kept_as`]), or on a GPU in 8 bits or in the type of activations; vectors stay f32.
    Inference(WeightType),
}

impl Config {
    /// Reads the dimensions from the shapes of a checkpoint's tensors (never from a formula), and what no shape tells from
    /// the description in its metadata, if it has one. A hybrid without one has the chunks of the released models ([`Hybrid::new`]).
    ///
    /// # Errors
    /// When a tensor that tells a dimension is missing or has the wrong rank, the dimensions don't fit together, or the
    /// description is of a newer version.
    pub fn from_checkpoint(ckpt: &Checkpoint) -> Result<Config, Error> {
        let shape = |name: &str, rank: usize| -> Result<Vec<usize>, Error> {
            let shape = ckpt.shape(name).ok_or_else(|| {
                Error::Checkpoint(format!(
                    "tensor {name} is missing: this is not a RWKV-7 checkpoint, or it is incomplete"
                ))
            })?;
            if shape.len() != rank {
                return Err(Error::Checkpoint(format!(
                    "tensor {name} has shape {shape:?}; expected {rank} dimensions"
                )));
            }
            Ok(shape.to_vec())
        };
        check_config_json(ckpt)?;
        let said = said(ckpt)?;
        if let Some(config) = said.iter().find(|c| c.architecture == Architecture::Transformer) {
            // No shape tells its heads. Loading compares every shape with what is said.
            config.validate()?;
            return Ok(config.clone());
        }
        let (mut n_layer, mut attention) = (0, 0);
        for name in ckpt.names() {
            match place(name).0 {
                Place::Block(i) => n_layer = n_layer.max(i.saturating_add(1)),
                Place::Attention(j) => attention = attention.max(j.saturating_add(1)),
                Place::Outside => {}
            }
        }
        if n_layer.max(attention) > ckpt.names().count() {
            return Err(Error::Checkpoint(format!(
                "it names a layer {} and has few tensors: it is damaged",
                n_layer.max(attention) - 1
            )));
        }
        let hybrid = (attention > 0 || ckpt.names().any(|n| n.starts_with("rwkv."))).then(|| {
            let said = said.as_ref().and_then(|c| c.hybrid);
            let gate = ckpt.names().any(|n| n.starts_with("moba.") && n.ends_with(".att.gate.weight"));
            Hybrid { layers: attention, gate, key_heads: None, ..said.unwrap_or(Hybrid::new(attention)) }
        });
        let prefix = if hybrid.is_some() { "rwkv." } else { "" };
        let shape = |name: &str, rank: usize| shape(&format!("{prefix}{name}"), rank);
        let emb = shape("emb.weight", 2)?;
        let heads = shape("blocks.0.att.r_k", 2)?;
        let rank = |name: &str| Ok::<usize, Error>(shape(name, 2)?[1]);
        // Layer 0 has no value residual; a model of one layer has none at all.
        let value = if n_layer > 1 { rank("blocks.1.att.v1")? } else { 32 };
        // What is no whole number of heads is found when the tensor is read.
        let keys = ckpt.shape("moba.0.att.key.weight").and_then(|s| Some(s.first()?.div_ceil(heads[1].max(1))));
        let hybrid = hybrid.map(|h| Hybrid { key_heads: keys.filter(|k| *k != heads[0]), ..h });
        let config = Config {
            n_layer,
            n_embd: emb[1],
            head_size: heads[1],
            vocab_size: emb[0],
            n_hidden: shape("blocks.0.ffn.key.weight", 2)?[0],
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

/// Key of a model file's metadata with its description.
const DESCRIPTION: &str = "anser.config";

impl Config {
    /// Key and value of the metadata that a model file says its options with: JSON with `version`, `architecture` and `model`.
    pub fn description(&self) -> (String, String) {
        let json = serde_json::json!({ "version": 1, "architecture": self.architecture, "model": self });
        (DESCRIPTION.into(), json.to_string())
    }
}

/// What a model file written by Anser says of itself.
fn said(ckpt: &Checkpoint) -> Result<Option<Config>, Error> {
    let Some(text) = ckpt.metadata().get(DESCRIPTION) else { return Ok(None) };
    let bad = |e: String| Error::Checkpoint(format!("{DESCRIPTION}: {e}"));
    let mut json: serde_json::Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    match json["version"].as_u64() {
        Some(1) => serde_json::from_value(json["model"].take()).map(Some).map_err(|e| bad(e.to_string())),
        Some(v) => Err(bad(format!("version {v} is of a newer Anser; this one reads version 1"))),
        None => Err(bad("it has no version".into())),
    }
}

/// A Hugging Face folder may say things that no shape tells; those that would change the result are refused.
fn check_config_json(ckpt: &Checkpoint) -> Result<(), Error> {
    let Some(text) = ckpt.metadata().get(CONFIG_JSON) else { return Ok(()) };
    let config: serde_json::Value =
        serde_json::from_str(text).map_err(|e| Error::Checkpoint(format!("config.json: {e}")))?;
    let expected = [
        ("model_type", serde_json::json!("rwkv7")),
        ("hidden_act", serde_json::json!("sqrelu")),
        ("norm_eps", serde_json::json!(1e-5)),
        ("norm_first", serde_json::json!(true)),
        ("tie_word_embeddings", serde_json::json!(false)),
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

/// Whether inference packs this tensor, and if so whether it is stored [in, out].
fn packed_layout(name: &str) -> Option<bool> {
    match place(name).1 {
        "emb.weight" | "head.weight" | "ffn.key.weight" | "ffn.value.weight" => Some(false),
        "att.query.weight" | "att.receptance.weight" | "att.key.weight" | "att.value.weight" | "att.output.weight" => {
            Some(false)
        }
        "att.gate.weight" => Some(false),
        "att.w1" | "att.w2" | "att.a1" | "att.a2" | "att.v1" | "att.v2" | "att.g1" | "att.g2" => Some(true),
        _ => None,
    }
}

/// How a tensor is kept in memory when matrices are kept in this type; `None` for a vector, which stays f32. With 8 bits and fewer the low-rank maps are f16: there is little of
/// them. The embedding, of which a row is read, has 8 bits at least, and so have matrices whose inputs make no whole groups of 4 bits. With 4 bits the head has 5: a third of what
/// 4 would change in the predictions is of that one matrix.
pub fn kept_as(kept: WeightType, name: &str, shape: &[usize]) -> Option<WeightType> {
    let in_out = packed_layout(name)?;
    let whole = shape.last().is_some_and(|k| k.is_multiple_of(Code::Q4.group()));
    Some(match kept {
        WeightType::Float(_) => kept,
        _ if in_out => DType::F16.into(),
        WeightType::Q4 | WeightType::Q5 if !whole || name.ends_with("emb.weight") => WeightType::Int8,
        WeightType::Q4 if name.ends_with("head.weight") => WeightType::Q5,
        _ => kept,
    })
}

impl Model {
    /// Loads a checkpoint with the official tensor names. Tensors the model doesn't use are ignored.
    ///
    /// # Errors
    /// When a tensor is missing, has a wrong shape or cannot be read; the message names it.
    pub fn load(ctx: &Context, ckpt: &Checkpoint, load: Load) -> Result<Model, Error> {
        Model::load_as(ctx, ckpt, Config::from_checkpoint(ckpt)?, load)
    }

    /// The same with another configuration than the file's own, in what its tensors don't tell.
    ///
    /// # Errors
    /// As [`Model::load`], or when the configuration is impossible.
    pub fn load_as(ctx: &Context, ckpt: &Checkpoint, config: Config, load: Load) -> Result<Model, Error> {
        config.validate()?;
        let needed = match load {
            Load::Train => config.parameters() * 4,
            // On a GPU one matrix after another passes through memory.
            Load::Inference(_) if ctx.cuda().is_some() => config.vocab_size * config.n_embd * 4,
            Load::Inference(kept) => kept.bytes_of(config.parameters()),
        };
        check_memory(needed as u64, memory::available())?;
        let find = |name: &str, shape: &[usize]| -> Result<TensorView<'_>, Error> {
            let t = ckpt.get(name).ok_or_else(|| Error::Checkpoint(format!("tensor {name} is missing")))?;
            let squeezed = |s: &[usize]| s.iter().copied().filter(|&d| d != 1).collect::<Vec<_>>();
            if squeezed(t.shape()) != squeezed(shape) {
                let found = t.shape();
                return Err(Error::Checkpoint(format!(
                    "tensor {name} has shape {found:?}; this model needs {shape:?}"
                )));
            }
            Ok(t)
        };
        let mut weights = HashMap::new();
        let mut list = config.tensors();
        if let Load::Inference(kept) = load {
            if ctx.cuda().is_some() {
                weights = to_device(ctx, &config, kept, |name, shape, out| {
                    let t = find(name, shape)?;
                    // An element type that is no float shows at once; after that reading cannot fail.
                    t.read_f32_from(0, &mut [])?;
                    let stored = t.bytes().filter(|_| same(t.dtype(), ctx.dtype()));
                    let coded = t.coded().filter(|c| c.dtype == Dtype::I8 && t.shape() == shape);
                    let bad = match (out, stored, coded) {
                        (To::Values(out), Some(bytes), _) => copy_finite(ctx, bytes, out),
                        (To::Codes(codes, scales), _, Some(coded)) => {
                            by_output(ctx, shape[1], codes, scales, |o, to, scales| {
                                copy_coded(&coded, Code::Int8, o, to, scales)
                            })
                        }
                        (out, ..) => out.fill(ctx, shape, |start, values| {
                            if t.read_f32_from(start, values).is_err() {
                                values.fill(f32::NAN);
                            }
                        }),
                    };
                    t.release();
                    bad.map_or(Ok(()), |i| Err(not_finite(name, i)))
                })?;
            }
            for (name, shape, _) in &list {
                let Some(in_out) = packed_layout(name).filter(|_| ctx.cuda().is_none()) else { continue };
                let t = find(name, shape)?;
                let bad = AtomicUsize::new(usize::MAX);
                // An element type that is no float shows at once; after that reading cannot fail.
                t.read_f32_from(0, &mut [])?;
                let kept = kept_as(kept, name, shape).unwrap_or(kept);
                let weight = match t.coded().and_then(|c| Some((c, code(c.dtype)?))) {
                    Some((coded, (code, as_coded))) if as_coded == kept && t.shape() == &shape[..] => {
                        Packed::from_codes(ctx, code, shape[0], shape[1], |o, codes, scales| {
                            if let Some(i) = copy_coded(&coded, code, o, codes, scales) {
                                bad.fetch_min(o * shape[1] + i, Ordering::Relaxed);
                            }
                        })
                    }
                    _ => pack(ctx, kept, shape, in_out, |start, out| {
                        let read = t.read_f32_from(start, out);
                        let found = out.iter().position(|v| !v.is_finite()).map(|i| start + i);
                        if let Some(i) = read.map_or(Some(start), |()| found) {
                            bad.fetch_min(i, Ordering::Relaxed);
                        }
                    }),
                };
                t.release();
                if bad.load(Ordering::Relaxed) < t.elements() {
                    return Err(not_finite(name, bad.into_inner()));
                }
                weights.insert(name.clone(), Weight::Packed(Arc::new(weight)));
            }
            list.retain(|(name, ..)| packed_layout(name).is_none());
        }
        let (mut params, handles) = ParamSet::new(list);
        for &p in &handles {
            let spec = params.specs()[p.id].clone();
            let t = find(&spec.name, &spec.shape)?;
            t.read_f32_into(params.get_mut(p))?;
            t.release();
            if let Some(i) = params.get(p).iter().position(|v| !v.is_finite()) {
                return Err(not_finite(&spec.name, i));
            }
        }
        params.to_device(ctx);
        ctx.check()?;
        Ok(Model::build(config, params, &weights))
    }

    /// The same model for inference, its matrices packed as [`Load::Inference`] says.
    pub fn packed(&self, ctx: &Context, kept: impl Into<WeightType>) -> Model {
        let kept = kept.into();
        let mut weights = HashMap::new();
        let mut list = self.config.tensors();
        let from = |name: &str| {
            let spec = self.params.specs().iter().find(|s| s.name == name);
            spec.map(|s| &self.params.values()[s.range.clone()]).unwrap_or_default()
        };
        if ctx.cuda().is_some() {
            let copied = to_device(ctx, &self.config, kept, |name, shape, out| {
                let m = from(name);
                out.fill(ctx, shape, |start, values| values.copy_from_slice(&m[start..start + values.len()]));
                Ok(())
            });
            weights = copied.unwrap_or_default();
        }
        for (name, shape, _) in &list {
            if let Some(in_out) = packed_layout(name).filter(|_| ctx.cuda().is_none()) {
                let m = from(name);
                let copy = |start: usize, out: &mut [f32]| out.copy_from_slice(&m[start..start + out.len()]);
                let kept = kept_as(kept, name, shape).unwrap_or(kept);
                weights.insert(name.clone(), Weight::Packed(Arc::new(pack(ctx, kept, shape, in_out, copy))));
            }
        }
        list.retain(|(name, ..)| packed_layout(name).is_none());
        let (mut params, handles) = ParamSet::new(list);
        for &p in &handles {
            let name = params.specs()[p.id].name.clone();
            params.get_mut(p).copy_from_slice(from(&name));
        }
        params.to_device(ctx);
        Model::build(self.config.clone(), params, &weights)
    }

    /// A trainable model over an arena laid out by [`Config::tensors`].
    pub(crate) fn assemble(config: Config, params: ParamSet) -> Model {
        Model::build(config, params, &HashMap::new())
    }

    /// A model for inference whose matrices are noise of the usual size: for measurements, made in seconds at any size. On a GPU they are kept in the type
    /// of activations, or in 8 bits, elsewhere as `kept` says.
    ///
    /// # Errors
    /// When the configuration is impossible, or device memory runs out.
    pub fn noise(ctx: &Context, config: &Config, kept: impl Into<WeightType>, seed: u64) -> Result<Model, Error> {
        let kept = kept.into();
        config.validate()?;
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = move || {
            s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let table: Vec<f32> = (0..1 << 20).map(|_| next()).collect();
        let fill = |name: &str, shape: &[usize], out: &mut [f32]| {
            let k = shape.get(usize::from(packed_layout(name) == Some(false))).copied().unwrap_or(1);
            // Unit variance in, unit variance out; the embedding is normalised.
            let scale = (3.0 / k as f32).sqrt();
            let mut at = name.bytes().fold(0usize, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
            for piece in out.chunks_mut(table.len() / 2) {
                at = at.wrapping_mul(25_214_903_917).wrapping_add(11) % (table.len() / 2);
                piece.iter_mut().zip(&table[at..]).for_each(|(o, v)| *o = v * scale);
            }
        };
        let filled = |name: &str, shape: &[usize]| {
            let mut m = vec![0.0; shape.iter().product()];
            fill(name, shape, &mut m);
            m
        };
        let mut weights = HashMap::new();
        let mut list = config.tensors();
        if ctx.cuda().is_some() {
            weights = to_device(ctx, config, kept, |name, shape, out| {
                let m = filled(name, shape);
                out.fill(ctx, shape, |start, values| values.copy_from_slice(&m[start..start + values.len()]));
                Ok(())
            })?;
        }
        for (name, shape, _) in &list {
            if let Some(in_out) = packed_layout(name).filter(|_| ctx.cuda().is_none()) {
                let m = filled(name, shape);
                let copy = |start: usize, out: &mut [f32]| out.copy_from_slice(&m[start..start + out.len()]);
                let weight = pack(ctx, kept_as(kept, name, shape).unwrap_or(kept), shape, in_out, copy);
                weights.insert(name.clone(), Weight::Packed(Arc::new(weight)));
            }
        }
        list.retain(|(name, ..)| packed_layout(name).is_none());
        let (mut params, handles) = ParamSet::new(list);
        for &p in &handles {
            let name = params.specs()[p.id].name.clone();
            let norm = name.contains("ln") && name.ends_with(".weight");
            let out = params.get_mut(p);
            fill(&name, &[1], out);
            out.iter_mut().for_each(|v| *v = if norm { 1.0 } else { *v * 0.5 });
        }
        params.to_device(ctx);
        ctx.check()?;
        Ok(Model::build(config.clone(), params, &weights))
    }

    fn build(config: Config, params: ParamSet, weights: &HashMap<String, Weight>) -> Model {
        let handles: HashMap<&str, Param> =
            params.specs().iter().enumerate().map(|(id, s)| (s.name.as_str(), params.handle(id))).collect();
        let param = |name: &str| handles[name];
        let weight = |name: &str| match weights.get(name) {
            Some(w) => w.clone(),
            None if packed_layout(name) == Some(true) => Weight::InOut(param(name)),
            None => Weight::OutIn(param(name)),
        };
        let norm = |name: &str| Norm { weight: param(&format!("{name}.weight")), bias: param(&format!("{name}.bias")) };
        let heads = config.heads();
        let block = |place: Place| {
            let prefix = match place {
                Place::Attention(j) => format!("moba.{j}."),
                Place::Block(i) => config.block(i),
                Place::Outside => unreachable!("blocks are in order"),
            };
            let p = |part: &str| param(&format!("{prefix}{part}"));
            let w = |part: &str| weight(&format!("{prefix}{part}"));
            let low_rank = |m: &str, biased: bool, activation| LowRank {
                down: w(&format!("att.{m}1")),
                up: w(&format!("att.{m}2")),
                bias: biased.then(|| p(&format!("att.{m}0"))),
                activation,
            };
            let [ln1, ln2] = ["ln1", "ln2"].map(|n| norm(&format!("{prefix}{n}")));
            let [key, value, output] = ["key", "value", "output"].map(|m| w(&format!("att.{m}.weight")));
            let ffn = ["key", "value"].map(|m| w(&format!("ffn.{m}.weight")));
            if config.architecture == Architecture::Transformer {
                let query = w("att.query.weight");
                let block = TransformerBlock { ln1, query, key, value, output, heads, ln2, ffn };
                return (prefix, Block::Transformer(Box::new(block)));
            }
            let receptance = w("att.receptance.weight");
            let [ffn_key, ffn_value] = ffn;
            let ffn = ChannelMix { mix: p("ffn.x_k"), key: ffn_key, value: ffn_value };
            let Place::Block(i) = place else {
                let chunks = config.hybrid.map_or(Chunks::WHOLE, |h| h.chunks());
                let gate = config.hybrid.filter(|h| h.gate).map(|_| w("att.gate.weight"));
                let block = HybridBlock { ln1, receptance, key, value, gate, output, heads, chunks, ln2, ffn };
                return (prefix, Block::Hybrid(Box::new(block)));
            };
            let block = Rwkv7Block {
                ln1,
                att: TimeMix {
                    mix: ["r", "w", "k", "v", "a", "g"].map(|m| p(&format!("att.x_{m}"))),
                    decay: low_rank("w", true, Activation::Tanh),
                    rate: low_rank("a", true, Activation::Identity),
                    value_gate: (i > 0).then(|| low_rank("v", true, Activation::Identity)),
                    gate: low_rank("g", false, Activation::Sigmoid),
                    k_k: p("att.k_k"),
                    k_a: p("att.k_a"),
                    r_k: p("att.r_k"),
                    receptance,
                    key,
                    value,
                    output,
                    ln_x: norm(&format!("{prefix}att.ln_x")),
                    heads,
                    rate_scale: if config.double_rate { 2.0 } else { 1.0 },
                },
                ln2,
                ffn,
            };
            (prefix, Block::Rwkv7(Box::new(block)))
        };
        let blocks = config.order().into_iter().map(block).collect();
        let outside = |name: &str| format!("{}{name}", config.prefix());
        let [emb, head] = ["emb.weight", "head.weight"].map(|m| weight(&outside(m)));
        let (ln0, ln_out) = (norm(&outside("blocks.0.ln0")), norm(&outside("ln_out")));
        let names: BTreeMap<_, _> = weights.iter().collect();
        let digests = names.values().filter_map(|w| match w {
            Weight::Packed(w) => Some(w.digest()),
            Weight::Device(w) => Some(w.digest()),
            Weight::OutIn(_) | Weight::InOut(_) => None,
        });
        let packed = digests.fold(0, |hash: u64, d| (hash.rotate_left(5) ^ d).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Model { emb, ln0, blocks, ln_out, head, packed, config, params }
    }
}

/// The code of a coded matrix in a file, and the type of weights that it gives in memory.
fn code(file: Dtype) -> Option<(Code, WeightType)> {
    match file {
        Dtype::I8 => Some((Code::Int8, WeightType::Int8)),
        Dtype::Q4 => Some((Code::Q4, WeightType::Q4)),
        Dtype::Q5 => Some((Code::Q5, WeightType::Q5)),
        _ => None,
    }
}

/// Codes and scales of an output from a file; which weight is none, if there is one.
fn copy_coded(from: &Coded<'_>, code: Code, output: usize, codes: &mut [u8], scales: &mut [f16]) -> Option<usize> {
    let (of, with) = from.row(output);
    codes.copy_from_slice(of);
    scales.iter_mut().zip(with).for_each(|(s, b)| *s = f16::from_le_bytes(*b));
    let scale = scales.iter().position(|s| !s.is_finite()).map(|g| g * code.group());
    scale.or_else(|| codes.iter().position(|c| code == Code::Int8 && *c == NO_CODE))
}

/// Whether a file's type is the type of activations.
fn same(file: Dtype, dtype: DType) -> bool {
    matches!((file, dtype), (Dtype::F32, DType::F32) | (Dtype::F16, DType::F16) | (Dtype::BF16, DType::BF16))
}

/// An error before a model is read that memory will not hold.
fn check_memory(needed: u64, available: Option<u64>) -> Result<(), Error> {
    match available {
        Some(available) if needed > available => {
            let (needed, left) = (needed >> 20, available >> 20);
            let advice = "close other programs, or choose a type with fewer bytes (--dtype bf16) or a smaller model";
            Err(Error::Checkpoint(format!("the weights need {needed} MB of memory and {left} MB are left: {advice}")))
        }
        _ => Ok(()),
    }
}

fn not_finite(name: &str, element: usize) -> Error {
    Error::Checkpoint(format!(
        "tensor {name} is not finite at element {element}: the file is damaged or the training run diverged"
    ))
}

/// Packs a matrix stored [out, in] or, with `in_out`, [in, out]; see [`Packed::new`].
fn pack(
    ctx: &Context, kept: WeightType, shape: &[usize], in_out: bool, read: impl Fn(usize, &mut [f32]) + Sync,
) -> Packed {
    let (n, k) = if in_out { (shape[1], shape[0]) } else { (shape[0], shape[1]) };
    Packed::new(ctx, kept, n, k, in_out, read)
}

#[cfg(test)]
mod tests {
    #[test]
    fn exact_fingerprints_tell_matrices_and_their_types_apart() {
        use crate::{Config, Init, Model};
        use anser_tensor::{Context, DType, WeightType};
        let (ctx, config) = (Context::cpu(1), Config::new(2, 64, 300));
        let mut model = Model::init(&ctx, &config, Init::Noise, 1).unwrap();
        let all = [
            DType::F32.into(),
            DType::F16.into(),
            DType::BF16.into(),
            WeightType::Int8,
            WeightType::Q5,
            WeightType::Q4,
        ];
        let print = |m: &Model, kept: WeightType| m.packed(&ctx, kept).exact_fingerprint();
        let mut prints = all.map(|kept| print(&model, kept)).to_vec();
        assert_eq!(prints, all.map(|kept| print(&model, kept)));
        let at = model.params().specs().iter().find(|s| s.name.ends_with("1.ffn.value.weight")).unwrap().range.clone();
        model.params_mut().values_mut()[at].iter_mut().for_each(|v| *v += 0.01);
        prints.extend(all.map(|kept| print(&model, kept)));
        assert!(model.packed(&ctx, DType::F32).fingerprint() == model.packed(&ctx, WeightType::Q4).fingerprint());
        prints.sort();
        prints.dedup();
        assert_eq!(prints.len(), 2 * all.len());
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn exact_fingerprints_on_a_gpu() {
        use crate::{Config, Init, Model};
        use anser_tensor::{Context, DType, Device};
        let config = Config::new(2, 64, 300);
        let host = Context::cpu(1);
        let mut model = Model::init(&host, &config, Init::Noise, 1).unwrap();
        let mut prints = vec![model.packed(&host, DType::F16).exact_fingerprint()];
        let on_gpu = |model: &Model, dtype: DType| {
            let ctx = Context::with_activations(Device::Cuda(0), dtype, 1).unwrap();
            model.packed(&ctx, dtype).exact_fingerprint()
        };
        prints.extend([DType::F32, DType::F16, DType::BF16].map(|dtype| on_gpu(&model, dtype)));
        assert_eq!(prints[2], on_gpu(&model, DType::F16));
        let at = model.params().specs().iter().find(|s| s.name.ends_with("1.att.key.weight")).unwrap().range.clone();
        model.params_mut().values_mut()[at].iter_mut().for_each(|v| *v += 0.01);
        prints.push(on_gpu(&model, DType::F16));
        prints.sort();
        prints.dedup();
        assert_eq!(prints.len(), 5);
    }

    #[test]
    fn too_little_memory_is_said_before_reading() {
        let check = |needed, available| super::check_memory(needed, available).map_err(|e| e.to_string());
        assert_eq!((check(5 << 20, Some(5 << 20)), check(u64::MAX, None)), (Ok(()), Ok(())));
        assert!(check(6 << 20, Some(5 << 20)).unwrap_err().contains("need 6 MB of memory and 5 MB are left"));
    }
}
