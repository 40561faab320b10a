//! How time and memory grow with the length of a sequence: for a hybrid (RWKV-X, arXiv 2504.21463, section 4.4), the same with dense
//! attention, and RWKV-7 alone with as many blocks.

use crate::bench::median;
use anser_infer::Session;
use anser_model::{Cache, Config, Hybrid, Model};
use anser_ops::attention::Chunks;
use anser_tensor::{Context, WeightType};
use anser_train::{Line, chart};
use serde::Serialize;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Long {
    /// The hybrid.
    pub config: Config,
    /// How its weights are kept on the CPU.
    pub kept: WeightType,
    /// A bound on what its attention keeps.
    pub cache: Option<Cache>,
    /// Lengths that are read.
    pub lengths: Vec<usize>,
    /// Positions after which single tokens are read, too; empty: all of `lengths`.
    pub decode_at: Vec<usize>,
    /// How many; the median counts.
    pub decode: usize,
    /// Seconds of reading for each model, after which longer lengths are left out.
    pub budget: f64,
}

/// One model after one length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Row {
    /// hybrid, dense or rwkv7.
    pub model: &'static str,
    /// Tokens read.
    pub tokens: usize,
    /// Seconds that took.
    pub prefill_seconds: f64,
    /// Seconds for one token more; `None` where it was not asked for.
    pub decode_seconds: Option<f64>,
    /// Bytes of the state, what attention keeps among it.
    pub bytes: usize,
    /// Tokens that attention keeps.
    pub cached: usize,
    /// Where a GPU's time goes.
    pub shares: Option<Shares>,
}

/// Shares of the time that the kernels take of reading a prompt's next 32,768 tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Shares {
    /// Of attention, without the products before and after it.
    pub attention: f64,
    /// Of scoring and choosing chunks, which is part of that.
    pub choosing: f64,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// By length, then by model.
    pub rows: Vec<Row>,
    /// What the budget left out: model and length.
    pub skipped: Vec<(&'static str, usize)>,
}

/// Tokens that are read on a GPU before anything is measured, at most, and then a piece of every length that is still new: beyond the usual chunks that
/// a query sees.
const WARM: usize = 65536;

/// Tokens between two looks at the clock: as many as a GPU reads at a time at most.
fn stretch(ctx: &Context) -> usize {
    if ctx.cuda().is_some() { 32768 } else { 4096 }
}

impl Long {
    /// The three models.
    fn models(&self) -> [(&'static str, Config, Option<Cache>); 3] {
        let (config, layers) = (&self.config, self.config.hybrid.map_or(0, |h| h.layers));
        let dense = Hybrid { chunk: Chunks::WHOLE.size, topk: Chunks::WHOLE.top, ..Hybrid::new(layers) };
        [
            ("hybrid", config.clone(), self.cache),
            ("dense", Config { hybrid: Some(dense), ..config.clone() }, None),
            ("rwkv7", Config { hybrid: None, n_layer: config.n_layer + layers, ..config.clone() }, None),
        ]
    }

    /// Reads sequences of all lengths with all models, their weights noise. What happens goes to `log`; when `stop` becomes true, what
    /// there is comes back.
    ///
    /// # Errors
    /// When there is nothing to measure, the bound doesn't fit the model, or memory runs out.
    pub fn run(&self, ctx: &Context, stop: &AtomicBool, log: &mut dyn FnMut(String)) -> Result<Measured, crate::Error> {
        let wrong = |what: &str| Err(crate::Error::Input(what.into()));
        let mut positions: Vec<usize> = self.lengths.iter().chain(&self.decode_at).copied().collect();
        positions.sort_unstable();
        positions.dedup();
        match positions[..] {
            [] => return wrong("there must be a length to read"),
            [0, ..] => return wrong("a length must be at least 1"),
            _ => {}
        }
        if self.config.hybrid.is_none_or(|h| h.layers == 0) {
            return wrong("there must be an attention block to compare with others");
        }
        if let Some(cache) = self.cache {
            cache.validate(&self.config)?;
        }
        let variants = self.models();
        let model = |(_, config, _): &(_, Config, _)| Model::noise(ctx, config, self.kept, 1);
        let models = variants.iter().map(model).collect::<Result<Vec<Model>, _>>()?;
        let stretch = stretch(ctx);
        let tokens: Vec<u32> = (0..stretch).map(|i| (i * 7919 % self.config.vocab_size) as u32).collect();
        let mut readers = Vec::new();
        for ((name, _, cache), model) in variants.iter().zip(&models) {
            // Kernels are loaded and memory is taken; a GPU has other ones when not all chunks are seen, and for every length of a piece.
            let (mut warm, mut read, mut seen) = (Session::new(ctx, model), 0, HashSet::new());
            for &piece in pieces(&positions, stretch).iter().take(if ctx.cuda().is_some() { usize::MAX } else { 1 }) {
                if seen.insert(piece) || read < WARM {
                    warm.feed(&tokens[..piece])?;
                    read += piece;
                }
            }
            one_more(&warm, &tokens, 3)?;
            let fresh = Session::new(ctx, model);
            let session = if let Some(cache) = cache { fresh.bounded(*cache)? } else { fresh };
            readers.push(Reader { name, session, read: 0, seconds: 0.0 });
        }
        // Length by length, so that what is compared is measured at about the same time.
        let mut measured = Measured::default();
        for position in positions {
            let decode = self.decode_at.is_empty() || self.decode_at.contains(&position);
            for r in &mut readers {
                while r.read < position && r.seconds < self.budget && !stop.load(Ordering::SeqCst) {
                    r.read(&tokens[..stretch.min(position - r.read)])?;
                }
                if stop.load(Ordering::SeqCst) {
                    return Ok(measured);
                }
                if r.read < position {
                    log(format!("{}: {position} tokens are left out, as {} took {:.0} s", r.name, r.read, r.seconds));
                    measured.skipped.push((r.name, position));
                    continue;
                }
                log(format!("{}: {position} tokens in {:.1} ms", r.name, 1e3 * r.seconds));
                measured.rows.push(Row {
                    model: r.name,
                    tokens: position,
                    prefill_seconds: r.seconds,
                    decode_seconds: if decode { Some(one_more(&r.session, &tokens, self.decode)?) } else { None },
                    bytes: r.session.bytes(),
                    cached: r.session.cached(),
                    shares: shares(ctx, &r.session, &tokens)?,
                });
            }
        }
        Ok(measured)
    }
}

/// How long the pieces are in which a sequence is read that stops at all of these positions.
fn pieces(positions: &[usize], stretch: usize) -> Vec<usize> {
    let (mut pieces, mut read) = (Vec::new(), 0);
    for &position in positions {
        while read < position {
            pieces.push(stretch.min(position - read));
            read += pieces[pieces.len() - 1];
        }
    }
    pieces
}

/// A model on its way through a sequence.
struct Reader<'m> {
    name: &'static str,
    session: Session<'m>,
    read: usize,
    seconds: f64,
}

impl Reader<'_> {
    fn read(&mut self, tokens: &[u32]) -> Result<(), crate::Error> {
        let start = Instant::now();
        self.session.feed(tokens)?;
        self.seconds += start.elapsed().as_secs_f64();
        self.read += tokens.len();
        Ok(())
    }
}

/// Seconds for one token more, the median of `count`, after one to warm up. The session stays as it is.
fn one_more(session: &Session<'_>, tokens: &[u32], count: usize) -> Result<f64, crate::Error> {
    let mut fork = session.fork();
    fork.feed(&tokens[..1])?;
    let mut seconds = Vec::new();
    for i in 0..count.max(1) {
        let start = Instant::now();
        fork.feed(&[tokens[i % tokens.len()]])?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(median(seconds))
}

/// Where a GPU's time goes while more tokens are read. The session stays as it is.
fn shares(ctx: &Context, session: &Session<'_>, tokens: &[u32]) -> Result<Option<Shares>, crate::Error> {
    let Some(gpu) = ctx.cuda() else { return Ok(None) };
    let mut fork = session.fork();
    let (read, spans) = gpu.profiled(|| fork.feed(tokens));
    read?;
    let of = |kinds: &[&str]| -> f64 {
        spans.iter().filter(|s| kinds.iter().any(|k| s.name.starts_with(k))).fold(0.0, |sum, s| sum + s.duration)
    };
    let all = of(&[""]);
    let choosing = of(&["chunk_means", "chunk_select"]);
    Ok((all > 0.0).then(|| Shares { attention: of(&["chunk_"]) / all, choosing: choosing / all }))
}

impl Measured {
    /// How many times faster a row is than the model `other` after as many tokens: reading them, and one more.
    pub fn faster_than(&self, other: &str, row: &Row) -> [Option<f64>; 2] {
        let other = self.rows.iter().find(|r| r.model == other && r.tokens == row.tokens);
        let ratio = |of: fn(&Row) -> Option<f64>| Some(of(other?)? / of(row)?);
        [ratio(|r| Some(r.prefill_seconds)), ratio(|r| r.decode_seconds)]
    }

    /// The rows as a table.
    pub fn table(&self) -> String {
        let mut text = String::from(
            "times faster: x      reading                              one token more                       state              attention, of it\n\
             model       tokens          ms  tokens/s  x dense  x rwkv7          ms  x dense  x rwkv7          MB    kept  at its end  choosing\n",
        );
        let or = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.2}"));
        let share = |x: Option<f64>| x.map_or("-".into(), |x| format!("{:.1}%", 100.0 * x));
        for r in &self.rows {
            let [dense, rwkv7] = ["dense", "rwkv7"].map(|other| self.faster_than(other, r).map(or));
            let rate = r.tokens as f64 / r.prefill_seconds;
            text += &format!(
                "{:8} {:9}  {:10.1} {rate:9.0} {:>8} {:>8}  {:>10} {:>8} {:>8}  {:10.2} {:7}  {:>10} {:>9}\n",
                r.model,
                r.tokens,
                1e3 * r.prefill_seconds,
                dense[0],
                rwkv7[0],
                r.decode_seconds.map_or("-".into(), |s| format!("{:.3}", 1e3 * s)),
                dense[1],
                rwkv7[1],
                r.bytes as f64 / 1e6,
                r.cached,
                share(r.shares.map(|s| s.attention)),
                share(r.shares.map(|s| s.choosing)),
            );
        }
        for (model, tokens) in &self.skipped {
            text += &format!("{model:8} {tokens:9}  left out: beyond the budget\n");
        }
        text
    }

    /// Pictures (SVG) of the times over the number of tokens, by name: reading, one token more.
    pub fn pictures(&self) -> [(&'static str, String); 2] {
        let picture = |title: &str, of: fn(&Row) -> Option<f64>| {
            let line = |model: &str| {
                let of_model = self.rows.iter().filter(|r| r.model == model);
                let points = of_model.filter_map(|r| Some((r.tokens as f64, 1e3 * of(r)?))).collect();
                Line { name: model.into(), points }
            };
            chart(title, "tokens", &["hybrid", "dense", "rwkv7"].map(line))
        };
        [
            ("prefill", picture("Reading a prompt, ms", |r| Some(r.prefill_seconds))),
            ("decode", picture("One token more, ms", |r| r.decode_seconds)),
        ]
    }
}
