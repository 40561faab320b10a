//! Files of a sequence's state and prediction, safetensors with every matrix of the state under its name.

use crate::Error;
use anser_formats::{Checkpoint, Dtype, Source, write_safetensors};
use anser_model::{Model, State};
use anser_ops::Var;
use anser_ops::attention::{Chunks, Past};
use anser_tensor::{Buf, Context};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

const FORMAT: &str = "anser.state";

/// Key of the metadata with the bound on what attention keeps.
const CACHE: &str = "anser.cache";

/// The name of the i-th matrix that attention block `j` keeps: keys, values, what its bound notes.
fn past_name(j: usize, i: usize) -> String {
    format!("state.moba.{j}.{}", ["keys", "values", "notes.0", "notes.1"][i])
}

/// An empty past filled with what is kept of so many tokens: keys, values, notes ([`Past::to_vecs`]).
pub(crate) fn filled(ctx: &Context, empty: &Past, rows: &[Buf], tokens: usize, chunks: Chunks) -> Past {
    let past = empty.append(ctx, [&rows[0], &rows[1]], 0, tokens, chunks);
    past.noting(ctx, &rows[2..].iter().collect::<Vec<_>>(), 0, tokens)
}

/// Writes a state of one slot and the logits after it.
pub(crate) fn write(ctx: &Context, model: &Model, mut state: State, logits: &[f32], path: &Path) -> Result<(), Error> {
    let mut tensors: Vec<(String, usize, Vec<f32>)> =
        state.named_mut().map(|(name, v)| (name, v.rows(), v.to_vec())).collect();
    for (j, a) in state.attention.iter().enumerate() {
        let past = &a.pasts[0];
        for (i, rows) in past.to_vecs().into_iter().enumerate() {
            tensors.push((past_name(j, i), past.len(), rows));
        }
    }
    ctx.check()?;
    let shapes: Vec<[usize; 2]> =
        tensors.iter().map(|(_, rows, data)| [*rows, data.len().checked_div(*rows).unwrap_or(0)]).collect();
    let mut sources: Vec<Source<'_>> = tensors
        .iter()
        .zip(&shapes)
        .map(|((name, _, data), shape)| Source::new(name.as_str(), shape, Dtype::F32, data))
        .collect();
    let shape = [logits.len()];
    sources.push(Source::new("logits", &shape, Dtype::F32, logits));
    let mut metadata =
        BTreeMap::from([(FORMAT.to_string(), "1".to_string()), ("anser.model".to_string(), model.fingerprint())]);
    if let Some(cache) = state.cache {
        metadata.insert(CACHE.into(), json!(cache).to_string());
    }
    Ok(write_safetensors(path, &sources, &metadata)?)
}

/// Reads what [`write`] wrote with the same model.
pub(crate) fn open(ctx: &Context, model: &Model, path: &Path) -> Result<(State, Vec<f32>), Error> {
    let file = Checkpoint::open(path)?;
    let wrong = |what: String| Error::State(format!("{}{what}", path.display()));
    match file.metadata().get(FORMAT).map(String::as_str) {
        Some("1") => {}
        Some(v) => return Err(wrong(format!(" has version {v}; this program reads 1"))),
        None => return Err(wrong(" is not a state file".into())),
    }
    if file.metadata().get("anser.model") != Some(&model.fingerprint()) {
        return Err(wrong(" was saved with another model; load that model".into()));
    }
    let read = |name: &str, len: usize| -> Result<Vec<f32>, Error> {
        let t = file.get(name).ok_or_else(|| wrong(format!(": no tensor {name}")))?;
        if t.elements() != len {
            return Err(wrong(format!(": {name} has {} elements, not {len}", t.elements())));
        }
        let mut values = vec![0.0; len];
        t.read_f32_into(&mut values)?;
        Ok(values)
    };
    let mut state = State::zeros(ctx, model.config(), 1);
    for (name, v) in state.named_mut() {
        let mut buf = v.buf().duplicate();
        buf.copy_from(&read(&name, v.rows() * v.cols())?);
        *v = Var::constant(v.rows(), v.cols(), buf);
    }
    if let Some(text) = file.metadata().get(CACHE) {
        let cache: anser_model::Cache = serde_json::from_str(text).map_err(|e| wrong(format!(": {CACHE}: {e}")))?;
        cache.validate(model.config())?;
        state.cache = Some(cache);
    }
    if let Some(chunks) = model.config().hybrid.map(|h| h.chunks()) {
        let notes = state.cache.map_or(0, |cache| cache.notes());
        let tokens = file.shape(&past_name(0, 0)).and_then(|s| s.first().copied()).unwrap_or(0);
        for (j, a) in state.attention.iter_mut().enumerate() {
            let [keys, noted] = a.pasts[0].channels();
            let len = |i| tokens.saturating_mul(if i < 2 { keys } else { noted });
            let rows = (0..2 + notes).map(|i| Ok(ctx.copy_of(&read(&past_name(j, i), len(i))?)));
            let rows = rows.collect::<Result<Vec<_>, Error>>()?;
            a.pasts[0] = filled(ctx, &a.pasts[0], &rows, tokens, chunks);
        }
    }
    let len = file.shape("logits").map_or(0, |s| s.iter().product());
    Ok((state, read("logits", len)?))
}
