//! llama.cpp's RWKV-7 in GGUF files, seen as the official one, and the official one as llama.cpp's.
//!
//! What differs beside names: the six token-shift weights of a layer are rows of one tensor, low-rank matrices are transposed, `r_k` is a vector, the
//! first layer has a value residual that nobody reads (with the rank of the in-context rate), vectors are F32.

use crate::gguf::{Metadata, Value};
use crate::{Checkpoint, Dtype, Entry, Error, Source, TensorView, web_rwkv};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Official names and llama.cpp's.
const MODEL: [(&str, &str); 6] = [
    ("emb.weight", "token_embd.weight"),
    ("blocks.0.ln0.weight", "token_embd_norm.weight"),
    ("blocks.0.ln0.bias", "token_embd_norm.bias"),
    ("ln_out.weight", "output_norm.weight"),
    ("ln_out.bias", "output_norm.bias"),
    ("head.weight", "output.weight"),
];

/// The same within a layer.
const LAYER: [(&str, &str); 28] = [
    ("ln1.weight", "attn_norm.weight"),
    ("ln1.bias", "attn_norm.bias"),
    ("ln2.weight", "attn_norm_2.weight"),
    ("ln2.bias", "attn_norm_2.bias"),
    ("att.w0", "time_mix_w0.weight"),
    ("att.w1", "time_mix_w1.weight"),
    ("att.w2", "time_mix_w2.weight"),
    ("att.a0", "time_mix_a0.weight"),
    ("att.a1", "time_mix_a1.weight"),
    ("att.a2", "time_mix_a2.weight"),
    ("att.v0", "time_mix_v0.weight"),
    ("att.v1", "time_mix_v1.weight"),
    ("att.v2", "time_mix_v2.weight"),
    ("att.g1", "time_mix_g1.weight"),
    ("att.g2", "time_mix_g2.weight"),
    ("att.k_k", "time_mix_k_k.weight"),
    ("att.k_a", "time_mix_k_a.weight"),
    ("att.r_k", "time_mix_r_k.weight"),
    ("att.receptance.weight", "time_mix_receptance.weight"),
    ("att.key.weight", "time_mix_key.weight"),
    ("att.value.weight", "time_mix_value.weight"),
    ("att.output.weight", "time_mix_output.weight"),
    ("att.ln_x.weight", "time_mix_ln.weight"),
    ("att.ln_x.bias", "time_mix_ln.bias"),
    ("ffn.x_k", "channel_mix_lerp_k.weight"),
    ("ffn.key.weight", "channel_mix_key.weight"),
    ("ffn.value.weight", "channel_mix_value.weight"),
    // Rows in the order of `SHIFTS`; no official tensor.
    ("", FUSED),
];
const FUSED: &str = "time_mix_lerp_fused.weight";
const SHIFTS: [&str; 6] = ["r", "w", "k", "v", "a", "g"];
const LAYER_NORM_EPS: f32 = 1e-5;

fn low_rank(part: &str) -> bool {
    part.strip_prefix("att.").is_some_and(web_rwkv::is_low_rank)
}

/// The tensors of a GGUF file under official names. Tensors with other names keep theirs.
pub(crate) fn to_official(
    entries: BTreeMap<String, Entry>, metadata: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Entry>, String> {
    let said = |key: &str| metadata.get(key).map_or("", String::as_str);
    match said("general.architecture") {
        "rwkv7" => {}
        "" => return Err("its metadata does not say general.architecture; GGUF files of rwkv7 load".into()),
        other => return Err(format!("it holds a model of the architecture {other}; GGUF files of rwkv7 load")),
    }
    if !matches!(said("split.count"), "" | "0" | "1") {
        return Err("it is one part of a model in several files; join them with `llama-gguf-split --merge`".into());
    }
    // llama.cpp has no other one for the heads' norm than the official 64e-5.
    let eps = said("rwkv7.attention.layer_norm_epsilon");
    if !eps.is_empty() && eps.parse() != Ok(LAYER_NORM_EPS) {
        return Err(format!("its norms have the epsilon {eps}; RWKV-7 has {LAYER_NORM_EPS}"));
    }
    let head_size: usize = said("rwkv7.wkv.head_size").parse().unwrap_or(0);
    let mut out = BTreeMap::new();
    for (name, entry) in entries {
        let wrong = || format!("tensor {name} of {:?} does not fit a RWKV-7 model", entry.shape);
        let mut put = |to: String, entry: Option<Entry>| match out.insert(to.clone(), entry.ok_or_else(wrong)?) {
            None => Ok(()),
            Some(_) => Err(format!("two tensors stand for {to} (one is {name})")),
        };
        if let Some((to, _)) = MODEL.iter().find(|(_, llama)| *llama == name) {
            put(to.to_string(), Some(entry.clone()))?;
            continue;
        }
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let layer = layer.and_then(|(i, part)| Some((i.parse::<usize>().ok()?, part)));
        let known = layer.and_then(|(i, part)| Some((i, LAYER.iter().find(|(_, llama)| *llama == part)?)));
        let Some((i, &(part, llama))) = known else {
            put(name.clone(), Some(entry.clone()))?;
            continue;
        };
        let to = format!("blocks.{i}.{part}");
        match part {
            _ if llama == FUSED => {
                for (row, m) in SHIFTS.iter().enumerate() {
                    put(format!("blocks.{i}.att.x_{m}"), entry.row(row, SHIFTS.len()))?;
                }
            }
            "att.v0" | "att.v1" | "att.v2" if i == 0 => {}
            "att.r_k" => {
                let heads =
                    entry.elements().checked_div(head_size).filter(|heads| heads * head_size == entry.elements());
                put(to, heads.map(|heads| Entry { shape: vec![heads, head_size], ..entry.clone() }))?;
            }
            _ if low_rank(part) => put(to, entry.clone().transposed())?,
            _ => put(to, Some(entry.clone()))?,
        }
    }
    Ok(out)
}

/// The tensors and the metadata with which llama.cpp loads this RWKV-7 model, but for the tokenizer ([`tokenizer`]). Large matrices are stored as
/// `dtype` (F32, F16, BF16 or Q8_0), or in their own type; low-rank ones at least in 16 bits.
///
/// # Errors
/// When a tensor is missing or has another shape than RWKV-7 has.
pub fn from_official(ckpt: &Checkpoint, dtype: Option<Dtype>) -> Result<(Vec<Source<'_>>, Metadata), Error> {
    let find = |name: &str| {
        let missing = || Error::Tensor { name: name.into(), reason: "it is missing".into() };
        ckpt.get(name).ok_or_else(missing)
    };
    let matrix = |name: &str| {
        let t = find(name)?;
        let no =
            || Error::Tensor { name: name.into(), reason: format!("it has shape {:?} and is no matrix", t.shape()) };
        <[usize; 2]>::try_from(t.shape()).map_err(|_| no())
    };
    let layer = |n: &str| n.strip_prefix("blocks.")?.split('.').next()?.parse::<usize>().ok();
    let layers = ckpt.names().filter_map(layer).max().map_or(0, |l| l.saturating_add(1));
    let mut sources = Vec::new();
    for (official, llama) in MODEL {
        sources.push(source(llama.into(), official, find(official)?, dtype));
    }
    for i in 0..layers {
        for (part, llama) in LAYER {
            let name = format!("blk.{i}.{llama}");
            if llama == FUSED {
                let rows: Result<Vec<_>, Error> =
                    SHIFTS.iter().map(|m| find(&format!("blocks.{i}.att.x_{m}"))).collect();
                sources.push(fused(name, rows?));
                continue;
            }
            // Something must stand where the first layer has no value residual.
            let from = match part {
                "att.v0" if i == 0 => "att.a0",
                "att.v1" if i == 0 => "att.a1",
                "att.v2" if i == 0 => "att.a2",
                _ => part,
            };
            sources.push(source(name, part, find(&format!("blocks.{i}.{from}"))?, dtype));
        }
    }
    let rank = |name: &str| Ok::<u32, Error>(matrix(name)?[1] as u32);
    let value_rank = if layers > 1 { rank("blocks.1.att.v1")? } else { rank("blocks.0.att.a1")? };
    let quantised = sources.iter().any(|s| s.dtype == Dtype::Q8_0);
    let file_type = match sources[0].dtype {
        Dtype::F32 => 0,
        Dtype::Q8_0 => 7,
        Dtype::BF16 => 32,
        _ => 1,
    };
    let mut metadata = vec![("general.architecture".to_string(), Value::Text("rwkv7".into()))];
    let mut number = |key: &str, v: u32| metadata.push((key.into(), Value::U32(v)));
    number("general.file_type", file_type);
    if quantised {
        number("general.quantization_version", 2);
    }
    // The state has no bound; this is what others write.
    number("rwkv7.context_length", 1 << 20);
    number("rwkv7.vocab_size", matrix("emb.weight")?[0] as u32);
    number("rwkv7.embedding_length", rank("emb.weight")?);
    number("rwkv7.block_count", layers as u32);
    number("rwkv7.feed_forward_length", matrix("blocks.0.ffn.key.weight")?[0] as u32);
    number("rwkv7.wkv.head_size", rank("blocks.0.att.r_k")?);
    // Asked for, and not used.
    number("rwkv7.attention.head_count", 0);
    number("rwkv7.attention.decay_lora_rank", rank("blocks.0.att.w1")?);
    number("rwkv7.attention.iclr_lora_rank", rank("blocks.0.att.a1")?);
    number("rwkv7.attention.value_residual_mix_lora_rank", value_rank);
    number("rwkv7.attention.gate_lora_rank", rank("blocks.0.att.g1")?);
    metadata.push(("rwkv7.attention.layer_norm_epsilon".into(), Value::F32(LAYER_NORM_EPS)));
    Ok((sources, metadata))
}

/// A tensor in llama.cpp's layout.
fn source<'a>(name: String, part: &str, t: TensorView<'a>, dtype: Option<Dtype>) -> Source<'a> {
    let mut shape: Vec<usize> = t.shape().to_vec();
    let turned = low_rank(part) && shape.len() == 2;
    match part {
        _ if turned => shape.reverse(),
        "ffn.x_k" => shape = vec![1, 1, t.elements()],
        "att.r_k" => shape = vec![t.elements()],
        _ if shape.iter().filter(|&&d| d != 1).count() < 2 => shape = vec![t.elements()],
        _ => {}
    }
    let wanted = match (dtype.unwrap_or(t.dtype()), &shape[..]) {
        // Vectors, and the two of the decay, whose rounding every later token feels.
        (_, [_] | [1, 1, _]) => Dtype::F32,
        _ if matches!(part, "att.w1" | "att.w2") => Dtype::F32,
        (Dtype::Q8_0, [.., row]) if !turned && row.is_multiple_of(Dtype::Q8_0.block()) => Dtype::Q8_0,
        (plain @ (Dtype::F32 | Dtype::BF16), _) => plain,
        _ => Dtype::F16,
    };
    let values = move || {
        let values = t.to_f32_vec()?;
        t.release();
        Ok(Cow::Owned(if turned { transposed(&values, t.shape()[1]) } else { values }))
    };
    Source { name, shape, dtype: wanted, values: Box::new(values) }
}

/// The token-shift weights of a layer.
fn fused<'a>(name: String, rows: Vec<TensorView<'a>>) -> Source<'a> {
    let shape = vec![rows.len(), 1, 1, rows[0].elements()];
    let values = move || {
        let rows: Result<Vec<_>, Error> = rows.iter().map(TensorView::to_f32_vec).collect();
        Ok(Cow::Owned(rows?.concat()))
    };
    Source { name, shape, dtype: Dtype::F32, values: Box::new(values) }
}

fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|c| values[c..].iter().step_by(cols).copied()).collect()
}

/// The metadata of a RWKV tokenizer. `tokens` are the bytes of ids 0 to the last one, of which there are `vocab_size` in the model; id 0 ends a
/// document. `end_of_turn` is what a chat stops at. Without tokens the file says that it has none.
pub fn tokenizer<'a>(
    tokens: impl IntoIterator<Item = &'a [u8]>, vocab_size: usize, end_of_turn: Option<u32>,
) -> Metadata {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    let mut texts: Vec<String> = tokens.into_iter().map(escaped).collect();
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    if texts.is_empty() {
        return vec![(key("model"), Value::Text("none".into()))];
    }
    texts[0] = "<s>".into();
    let mut types = vec![NORMAL; texts.len()];
    types[0] = CONTROL;
    for i in texts.len()..vocab_size {
        texts.push(format!("[PAD{i}]"));
        types.push(UNUSED);
    }
    let mut out = vec![
        (key("model"), Value::Text("rwkv".into())),
        (key("tokens"), Value::Texts(texts)),
        (key("token_type"), Value::I32s(types)),
        (key("bos_token_id"), Value::U32(0)),
        (key("eos_token_id"), Value::U32(0)),
    ];
    if let Some(id) = end_of_turn {
        out.push((key("eot_token_id"), Value::U32(id)));
        out.push(("tokenizer.chat_template".into(), Value::Text("rwkv-world".into())));
    }
    out
}

/// Bytes as Python writes them between the quotes of `b'..'`, which is what llama.cpp undoes.
fn escaped(bytes: &[u8]) -> String {
    // Python changes the quotes when there are single ones only.
    let single = bytes.contains(&b'\'') && bytes.contains(&b'"');
    let one = |&b: &u8| match b {
        b'\\' => "\\\\".into(),
        b'\'' if single => "\\'".into(),
        b'\t' => "\\t".into(),
        b'\n' => "\\n".into(),
        b'\r' => "\\r".into(),
        b' '..=b'~' => char::from(b).to_string(),
        _ => format!("\\x{b:02x}"),
    };
    bytes.iter().map(one).collect()
}
