//! Time per token and memory along one sequence that is read token by token: for a hybrid (RWKV-X, arXiv 2504.21463, section 4.4) whose attention is bounded,
//! and for RWKV-7 alone with as many blocks.

use crate::bench::{median, resident};
use anser_infer::{Decoder, Session};
use anser_model::{Cache, Config, Model};
use anser_ops::attention::Past;
use anser_tensor::{Context, WeightType};
use anser_train::{Line, chart};
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Flat {
    /// The models: name, dimensions, a bound on what attention keeps.
    pub models: Vec<(&'static str, Config, Option<Cache>)>,
    /// How weights are kept on the CPU.
    pub kept: WeightType,
    /// Tokens read, at least 1.
    pub tokens: usize,
}

/// One model after so many tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Row {
    /// hybrid or rwkv7.
    pub model: &'static str,
    /// Tokens read.
    pub tokens: usize,
    /// Seconds a token, median over the last ones: half of all, at most [`WINDOW`].
    pub seconds: f64,
    /// Seconds a token, mean since the row before: whatever happens now and then is in it.
    pub mean_seconds: f64,
    /// Bytes of the state, what attention keeps among it.
    pub bytes: usize,
    /// Tokens that attention keeps.
    pub cached: usize,
    /// Bytes that the context's memory has taken of the device.
    pub reserved: usize,
    /// Bytes of resident memory of the process; 0 where the system doesn't say.
    pub resident: u64,
}

/// Tokens of a median at most.
pub const WINDOW: usize = 4096;
/// From where on time and memory are to be flat.
const FROM: usize = 16384;
/// Tokens that one model reads before the next has its turn.
const STRETCH: usize = 512;

/// A model on its way: on a GPU through a [`Decoder`], whose logits stay where they are.
enum Reader<'m> {
    Host(Box<Session<'m>>),
    Gpu(Box<Decoder<'m>>),
}

impl<'m> Reader<'m> {
    fn new(ctx: &Context, model: &'m Model, cache: Option<Cache>) -> Result<Reader<'m>, crate::Error> {
        if let Some(mut decoder) = Decoder::new(ctx, model, 1)? {
            let mut empty = decoder.state(0)?;
            if let Some(cache) = cache {
                cache.validate(model.config())?;
                empty.cache = Some(cache);
            }
            decoder.set_state(0, &empty)?;
            return Ok(Reader::Gpu(Box::new(decoder)));
        }
        let session = Session::new(ctx, model);
        Ok(Reader::Host(Box::new(if let Some(cache) = cache { session.bounded(cache)? } else { session })))
    }

    fn read(&mut self, token: u32) -> Result<(), crate::Error> {
        match self {
            Reader::Host(session) => session.feed(&[token])?,
            Reader::Gpu(decoder) => drop(decoder.greedy(&[(0, token)], 1)?),
        }
        Ok(())
    }

    /// Bytes of the state, and tokens that attention keeps.
    fn kept(&self, config: &Config) -> (usize, usize) {
        match self {
            Reader::Host(session) => (session.bytes(), session.cached()),
            Reader::Gpu(decoder) => {
                let pasts: usize = decoder.pasts(0).map(Past::bytes).sum();
                (4 * config.state_len() + pasts, decoder.pasts(0).next().map_or(0, Past::len))
            }
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// In the order in which they were measured.
    pub rows: Vec<Row>,
}

impl Flat {
    /// Reads the tokens with all models, in turns, their weights noise; looks at 1024, 2048, 4096 .. tokens and at the end. Rows go to `on` at once; when `stop`
    /// becomes true, those that there are come back.
    ///
    /// # Errors
    /// When there is nothing to measure, a bound doesn't fit its model, or memory runs out.
    pub fn run(
        &self, ctx: &Context, stop: &AtomicBool, on: &mut dyn FnMut(&Measured),
    ) -> Result<Measured, crate::Error> {
        if self.models.is_empty() || self.tokens == 0 {
            return Err(crate::Error::Input("there must be a model and a token to read".into()));
        }
        let model = |(_, config, _): &(_, Config, _)| Model::noise(ctx, config, self.kept, 1);
        let models = self.models.iter().map(model).collect::<Result<Vec<Model>, _>>()?;
        let readers = self.models.iter().zip(&models).map(|((_, _, cache), model)| Reader::new(ctx, model, *cache));
        let mut readers = readers.collect::<Result<Vec<_>, _>>()?;
        let mut positions: Vec<usize> = (10..).map(|i| 1 << i).take_while(|p| *p < self.tokens).collect();
        positions.push(self.tokens);
        let mut measured = Measured::default();
        let mut read = 0;
        for position in positions {
            let window = (position / 2).clamp(1, WINDOW).min(position - read);
            let before = read;
            let mut times = vec![(Vec::new(), 0.0); readers.len()];
            while read < position {
                let now = STRETCH.min(position - read);
                for (reader, (last, all)) in readers.iter_mut().zip(&mut times) {
                    for i in read..read + now {
                        let start = Instant::now();
                        reader.read((i * 7919 % self.models[0].1.vocab_size) as u32)?;
                        let seconds = start.elapsed().as_secs_f64();
                        *all += seconds;
                        if i + window >= position {
                            last.push(seconds);
                        }
                        if stop.load(Ordering::SeqCst) {
                            return Ok(measured);
                        }
                    }
                }
                read += now;
            }
            for (((model, config, _), reader), (last, all)) in self.models.iter().zip(&readers).zip(times) {
                let (bytes, cached) = reader.kept(config);
                measured.rows.push(Row {
                    model,
                    tokens: position,
                    seconds: median(last),
                    mean_seconds: all / (position - before) as f64,
                    bytes,
                    cached,
                    reserved: ctx.memory().reserved,
                    resident: resident(),
                });
                on(&measured);
            }
        }
        Ok(measured)
    }
}

impl Measured {
    /// How many times what it was at 16,384 tokens a row's time, state and memory, of device and host together, are.
    pub fn against_16k(&self, row: &Row) -> Option<[f64; 3]> {
        let from = self.rows.iter().find(|r| r.model == row.model && r.tokens == FROM)?;
        let memory = |r: &Row| (r.reserved as u64 + r.resident) as f64;
        Some([row.seconds / from.seconds, row.bytes as f64 / from.bytes as f64, memory(row) / memory(from)])
    }

    /// The head of a table of rows.
    pub const HEAD: &str = "model        tokens  ms a token   x 16K      mean   state MB   x 16K    kept  reserved MB  resident MB   x 16K\n";

    /// The last row as a line of it. Memory is of all models of the run together.
    pub fn line(&self) -> String {
        let Some(r) = self.rows.last() else { return String::new() };
        let times = self.against_16k(r).map(|t| t.map(|t| format!("{t:.3}")));
        let [time, state, memory] = times.unwrap_or(["-", "-", "-"].map(String::from));
        format!(
            "{:8} {:10}  {:10.4} {time:>7} {:9.4} {:10.2} {state:>7} {:7}  {:11.1}  {:11.1} {memory:>7}\n",
            r.model,
            r.tokens,
            1e3 * r.seconds,
            1e3 * r.mean_seconds,
            r.bytes as f64 / 1e6,
            r.cached,
            r.reserved as f64 / 1e6,
            r.resident as f64 / 1e6,
        )
    }

    /// Pictures (SVG) over the number of tokens, by name: milliseconds a token, megabytes of the state.
    pub fn pictures(&self) -> [(&'static str, String); 2] {
        let picture = |title: &str, of: fn(&Row) -> f64| {
            let line = |model: &str| {
                let points = self.rows.iter().filter(|r| r.model == model).map(|r| (r.tokens as f64, of(r)));
                // From 0, so that what is flat looks flat.
                Line { name: model.into(), points: points.collect() }
            };
            let floor = Line { name: String::new(), points: vec![(0.0, 0.0)] };
            let mut models: Vec<&str> = self.rows.iter().map(|r| r.model).collect();
            models.dedup();
            models.truncate(models.iter().skip(1).position(|m| *m == models[0]).map_or(models.len(), |i| i + 1));
            chart(title, "tokens", &models.into_iter().map(line).chain([floor]).collect::<Vec<_>>())
        };
        [
            ("time", picture("Milliseconds a token", |r| 1e3 * r.seconds)),
            ("state", picture("Megabytes of the state", |r| r.bytes as f64 / 1e6)),
        ]
    }
}
