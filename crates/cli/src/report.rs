//! What a conversion has changed: `anser convert --report`.

use crate::global::{Global, Stored};
use anser_eval::text::{Divergence, compare};
use anser_formats::Checkpoint;
use anser_model::{Architecture, Config, Load, Model};
use anser_tensor::{Context, DType, WeightType};
use anser_tokenizer::Tokenizer;
use anyhow::ensure;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Bytes of the bundled text that are read.
const BUNDLED: usize = 16_384;

/// What is lost of a tensor, relative to the root mean square of its values.
struct Lost {
    dtype: String,
    /// The root mean square of the differences.
    relative_error: f64,
    /// The largest difference.
    largest: f64,
}

/// How a converted file differs from its source.
pub struct Report {
    tensors: BTreeMap<String, Lost>,
    /// None for a Transformer, which reads no text in pieces.
    text: Option<Divergence>,
}

/// What both models read: documents, and the tokenizer that they are read with.
pub struct Reading {
    documents: Vec<Vec<u8>>,
    tokenizer: Tokenizer,
}

impl Report {
    /// What is read of a text, or of the bundled one; nothing by a Transformer.
    pub fn reading(from: &Checkpoint, config: &Config, text: Option<&Path>) -> anyhow::Result<Option<Reading>> {
        if config.architecture == Architecture::Transformer {
            return Ok(None);
        }
        let documents = match text {
            Some(path) => anser_data::documents(path)?.into_iter().map(String::into_bytes).collect(),
            None => vec![anser_data::bundled::corpus().as_bytes()[..BUNDLED].to_vec()],
        };
        let name = from.metadata().get("anser.tokenizer").map_or("world", String::as_str);
        let tokenizer = Tokenizer::from_name(name)?;
        ensure!(
            tokenizer.vocab_size() <= config.vocab_size,
            "--report: the file doesn't say its tokenizer, and {name} has {} tokens, the model {}: convert the file that this one was made from",
            tokenizer.vocab_size(),
            config.vocab_size
        );
        Ok(Some(Reading { documents, tokenizer }))
    }

    /// Compares a file's tensors with those of the checkpoint it was made from, and what it predicts, loaded as `--dtype` says, with what the checkpoint predicts in f32.
    pub fn new(
        ctx: &Context, from: &Checkpoint, config: &Config, file: &Path, reading: Option<Reading>, global: &Global,
    ) -> anyhow::Result<Report> {
        let to = Checkpoint::open(file)?;
        let mut tensors = BTreeMap::new();
        for (before, after) in from.names().filter_map(|name| Some((from.get(name)?, to.get(name)?))) {
            if before.elements() == after.elements() {
                let dtype = after.dtype().to_string();
                let (relative_error, largest) = lost(&before.to_f32_vec()?, &after.to_f32_vec()?);
                tensors.insert(before.name().into(), Lost { dtype, relative_error, largest });
            }
        }
        let text = match reading {
            None => None,
            Some(reading) => {
                let kept = match global.stored {
                    Some(Stored::Int8) => WeightType::Int8,
                    Some(Stored::Q4) => WeightType::Q4,
                    Some(Stored::Float(dtype)) => dtype.into(),
                    // The values that the file has.
                    Some(Stored::Q8_0) | None => DType::F32.into(),
                };
                let load = |ckpt, kept| Model::load_as(ctx, ckpt, config.clone(), Load::Inference(kept));
                let (exact, other) = (load(from, DType::F32.into())?, load(&to, kept)?);
                Some(compare(ctx, &exact, &other, &reading.tokenizer, &reading.documents)?)
            }
        };
        Ok(Report { tensors, text })
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let tensor = |(name, l): (&String, &Lost)| {
            (name.clone(), json!({ "dtype": l.dtype, "relative_error": l.relative_error, "largest": l.largest }))
        };
        let tensors: Map<String, Value> = self.tensors.iter().map(tensor).collect();
        let change = self.text.map(|d| d.perplexity_change());
        json!({ "tensors": tensors, "text": self.text, "perplexity_change": change })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "differences relative to the root mean square of a tensor: theirs, the largest")?;
        for (name, l) in &self.tensors {
            writeln!(f, "{name:40} {:5} {:.2e} {:.2e}", l.dtype, l.relative_error, l.largest)?;
        }
        let Some(d) = &self.text else { return Ok(()) };
        writeln!(
            f,
            "predictions of {} tokens beside those in f32: divergence {:.2e} nats in the mean, {:.2e} at 99%, {:.2e} at most; {:.4} nats a token after {:.4}, perplexity {:+.2}%",
            d.tokens,
            d.kl_mean,
            d.kl_p99,
            d.kl_max,
            d.loss,
            d.exact_loss,
            100.0 * d.perplexity_change()
        )
    }
}

/// The root mean square of the differences and the largest, relative to the root mean square of the values before.
fn lost(before: &[f32], after: &[f32]) -> (f64, f64) {
    let (mut all, mut sum, mut largest) = (0.0, 0.0, 0f64);
    for (b, a) in before.iter().zip(after) {
        let difference = f64::from(a - b).abs();
        all += f64::from(*b).powi(2);
        sum += difference.powi(2);
        largest = largest.max(difference);
    }
    let size = (all / before.len().max(1) as f64).sqrt();
    if size > 0.0 { ((sum / all).sqrt(), largest / size) } else { (0.0, largest) }
}
