//! How many answers of a model are right.

use crate::Error;
use anser_data::Batch;
use anser_model::{Cache, Model, State};
use anser_ops::{Tape, batch};
use anser_tensor::Context;
use serde::{Deserialize, Serialize};

/// How well the first answers of rows were given.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// How many of each row.
    pub answers: usize,
    /// Share that is right.
    pub right: f64,
    /// Share of rows whose last of them is right.
    pub last: f64,
    /// Share of rows of which all are right.
    pub rows: f64,
}

/// Accuracy of the first n answers of rows, for every n of `counts`.
///
/// # Panics
/// When a row has fewer answers.
pub fn accuracy(hits: &[Vec<bool>], counts: &[usize]) -> Vec<Accuracy> {
    let share = |n: usize, of: usize| n as f64 / of.max(1) as f64;
    let one = |&answers: &usize| {
        let count = |f: &dyn Fn(&[bool]) -> usize| hits.iter().map(|h| f(&h[..answers])).sum::<usize>();
        Accuracy {
            answers,
            right: share(count(&|h| h.iter().filter(|h| **h).count()), hits.len() * answers),
            last: share(count(&|h| h.last().is_some_and(|h| *h).into()), hits.len()),
            rows: share(count(&|h| h.iter().all(|h| *h).into()), hits.len()),
        }
    };
    counts.iter().map(one).collect()
}

/// Tokens computed at a time in tests.
const TOKENS: usize = 16384;

/// For each row of a batch of equally long rows, each one sequence, whether its answers (targets that are not ignored) are the
/// most probable tokens after the right ones before them; with a bound on what attention keeps, if one is given.
///
/// # Errors
/// When a token is outside the model's vocabulary.
pub fn hits(ctx: &Context, model: &Model, b: &Batch, bound: Option<Cache>) -> Result<Vec<Vec<bool>>, Error> {
    let vocab = model.config().vocab_size;
    let len = b.tokens.len() / b.starts.len().max(1);
    let at_once = (TOKENS / len.max(1)).max(1) * len.max(1);
    let mut out = Vec::with_capacity(b.starts.len());
    for (tokens, targets) in b.tokens.chunks(at_once).zip(b.targets.chunks(at_once)) {
        let (rows, first) = (tokens.len() / len, out.len());
        out.resize(first + rows, Vec::new());
        let mut state = State::zeros(ctx, model.config(), if bound.is_some() { rows } else { 0 });
        state.cache = bound;
        let mut from = 0;
        while from < len {
            // A bound is applied between two calls, at the same place of all rows.
            let n = bound.map_or(len, |_| state.room(0)).min(len - from);
            let segments = batch(rows, n, bound.is_some()).into();
            let mut tape = Tape::inference(ctx, model.params());
            let hidden;
            (hidden, state) = model.forward(&mut tape, &columns(tokens, len, from, n), &segments, &state, false)?;
            let targets = columns(targets, len, from, n);
            let answers: Vec<u32> = (0..targets.len() as u32).filter(|&i| targets[i as usize] >= 0).collect();
            from += n;
            if answers.is_empty() {
                continue;
            }
            let hidden = tape.select(&hidden, &answers, answers.len());
            let logits = model.logits(&mut tape, &hidden).to_vec();
            ctx.check()?;
            for (row, &at) in logits.chunks_exact(vocab).zip(&answers) {
                let best = (0..row.len()).fold(0, |b, i| if row[i] > row[b] { i } else { b });
                out[first + at as usize / n].push(best as i32 == targets[at as usize]);
            }
        }
    }
    Ok(out)
}

/// `n` columns from `from` on of rows of `len`.
fn columns<T: Copy>(rows: &[T], len: usize, from: usize, n: usize) -> Vec<T> {
    rows.chunks_exact(len).flat_map(|row| &row[from..from + n]).copied().collect()
}
