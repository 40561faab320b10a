//! How each tensor of a model for inference is kept in memory.

use crate::tensors::place;
use anser_tensor::{Code, DType, WeightType};

/// Whether inference packs this tensor, and if so whether it is stored [in, out].
pub(crate) fn packed_layout(name: &str) -> Option<bool> {
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
