//! web-rwkv's and ai00's `.st` files: safetensors with the official names, all F16, whose low-rank matrices are transposed.

use crate::Entry;
use std::collections::BTreeMap;

/// Whether this is such a file: the first low-rank matrix that is not square has its inputs last.
pub(crate) fn is(entries: &BTreeMap<String, Entry>) -> bool {
    let shape = |name: &str| entries.get(name).and_then(|e| <[usize; 2]>::try_from(&e.shape[..]).ok());
    let Some([_, width]) = shape("emb.weight") else { return false };
    let first = ["w1", "a1", "g1"].iter().filter_map(|m| shape(&format!("blocks.0.att.{m}"))).find(|[r, c]| r != c);
    first.is_some_and(|[_, inputs]| inputs == width)
}

/// The same tensors as official ones.
pub(crate) fn to_official(entries: BTreeMap<String, Entry>) -> BTreeMap<String, Entry> {
    let seen = |(name, entry): (String, Entry)| {
        let low_rank = name.split_once(".att.").is_some_and(|(_, part)| is_low_rank(part));
        let entry = if low_rank { entry.clone().transposed().unwrap_or(entry) } else { entry };
        (name, entry)
    };
    entries.into_iter().map(seen).collect()
}

/// Whether a tensor of time mixing is a low-rank matrix: `w1` to `g2`.
pub(crate) fn is_low_rank(part: &str) -> bool {
    matches!(part.as_bytes(), [b'w' | b'a' | b'v' | b'g', b'1' | b'2'])
}
