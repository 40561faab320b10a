//! The names and layouts of Hugging Face / flash-linear-attention RWKV-7 models, seen as official ones: nothing is
//! copied, the transposed matrices become strides.

use crate::Entry;
use std::collections::BTreeMap;

/// Whether these are such names.
pub(crate) fn is(entries: &BTreeMap<String, Entry>) -> bool {
    entries.keys().any(|n| n.starts_with("model.layers."))
}

/// The same tensors under official names. Tensors with other names keep theirs.
pub(crate) fn to_official(entries: BTreeMap<String, Entry>) -> Result<BTreeMap<String, Entry>, String> {
    let mut out = BTreeMap::new();
    for (name, entry) in entries {
        let mut add = |to: String, entry: Entry| match out.insert(to.clone(), entry) {
            None => Ok(()),
            Some(_) => Err(format!("two tensors stand for {to} (one is {name})")),
        };
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let Some((i, part)) = layer.filter(|(i, _)| i.parse::<usize>().is_ok()) else {
            let to = match name.as_str() {
                "model.embeddings.weight" => "emb.weight",
                "model.norm.weight" => "ln_out.weight",
                "model.norm.bias" => "ln_out.bias",
                "lm_head.weight" => "head.weight",
                other => other,
            };
            add(to.to_string(), entry)?;
            continue;
        };
        let block = |part: &str| format!("blocks.{i}.{part}");
        if part == "attn.x_x" {
            // Before the six token-shift weights got names they were the rows of one tensor.
            for (row, m) in ["r", "w", "k", "v", "a", "g"].iter().enumerate() {
                add(block(&format!("att.x_{m}")), entry.row(row, 6).ok_or(format!("{name}: not six rows"))?)?;
            }
            continue;
        }
        let low_rank = part
            .strip_prefix("attn.")
            .and_then(|p| p.split_once("_lora.lora."))
            .filter(|(m, _)| ["w", "a", "v", "g"].contains(m));
        if let Some((m, which)) = low_rank {
            let (number, transposed) = match which {
                "0.weight" => (1, true),
                "2.weight" => (2, true),
                "2.bias" => (0, false),
                _ => return Err(format!("unknown tensor {name}")),
            };
            let to = block(&format!("att.{m}{number}"));
            add(to, if transposed { entry.transposed().ok_or(format!("{name}: not a matrix"))? } else { entry })?;
            continue;
        }
        let renamed = [
            ("pre_norm.", "ln0."),
            ("attn_norm.", "ln1."),
            ("ffn_norm.", "ln2."),
            ("attn.g_norm.", "att.ln_x."),
            ("attn.r_proj.", "att.receptance."),
            ("attn.k_proj.", "att.key."),
            ("attn.v_proj.", "att.value."),
            ("attn.o_proj.", "att.output."),
            ("attn.", "att."),
        ];
        let to = renamed.iter().find_map(|(from, to)| part.strip_prefix(from).map(|rest| format!("{to}{rest}")));
        add(block(to.as_deref().unwrap_or(part)), entry)?;
    }
    Ok(out)
}
