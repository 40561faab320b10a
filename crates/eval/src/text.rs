//! How well a model predicts a text: cross entropy per token and bits per byte.

use anser_model::{Model, State};
use anser_ops::{CrossEntropy, Segment, Tape, batch};
use anser_tensor::Context;
use anser_tokenizer::Tokenizer;

/// Parts of a text that are read side by side; each begins with an empty state.
const PARTS: usize = 32;
/// Tokens of a part that are read at a time.
const PIECE: usize = 512;
/// Shortest part worth a state of its own, in tokens.
const SHORTEST: usize = 4096;

/// How well a text is predicted.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Prediction {
    /// Tokens predicted: all but the first of each part.
    pub tokens: usize,
    /// Bytes of the text.
    pub bytes: usize,
    /// Mean cross entropy, nats per token.
    pub loss: f64,
    /// Cross entropy of the tokens predicted per byte of the text that they stand for, in bits.
    pub bits_per_byte: f64,
}

/// The tokens of documents, the mark of a document's end between them, and their bytes.
fn tokens(tokenizer: &Tokenizer, documents: &[impl AsRef<[u8]>]) -> Result<(Vec<u32>, usize), crate::Error> {
    let (mut ids, mut bytes) = (Vec::new(), 0);
    for (i, document) in documents.iter().enumerate() {
        if i > 0 {
            ids.push(tokenizer.end_of_document());
        }
        ids.extend(tokenizer.encode(document.as_ref()));
        bytes += document.as_ref().len();
    }
    if ids.len() < 2 {
        return Err(crate::Error::Input("a text to predict needs at least two tokens".into()));
    }
    Ok((ids, bytes))
}

/// Reads documents with `model`, one after the other with the mark of their end between them, as in training; the state goes on through each of up to 32 parts.
///
/// # Errors
/// When the text has fewer than two tokens, a token is outside the model's vocabulary, the model's logits are not finite, or the device fails.
pub fn predict(
    ctx: &Context, model: &Model, tokenizer: &Tokenizer, documents: &[impl AsRef<[u8]>],
) -> Result<Prediction, crate::Error> {
    let (ids, bytes) = tokens(tokenizer, documents)?;
    let parts = PARTS.min(ids.len() / SHORTEST).max(1);
    let len = ids.len().div_ceil(parts);
    let parts: Vec<&[u32]> = ids.chunks(len).filter(|p| p.len() > 1).collect();
    let mut state = State::zeros(ctx, model.config(), parts.len());
    let (mut nats, mut predicted) = (0.0, 0);
    for first in (0..len - 1).step_by(PIECE) {
        let (mut tokens, mut targets, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        for (slot, part) in parts.iter().enumerate() {
            // Inputs are all tokens but the last, which nothing follows.
            let range = first.min(part.len() - 1)..(first + PIECE).min(part.len() - 1);
            if range.is_empty() {
                continue;
            }
            segments.push(Segment {
                start: tokens.len(),
                len: range.len(),
                state_in: Some(slot),
                state_out: Some(slot),
            });
            tokens.extend_from_slice(&part[range.clone()]);
            targets.extend(part[range.start + 1..range.end + 1].iter().map(|&t| t as i32));
        }
        let mut tape = Tape::inference(ctx, model.params());
        let (hidden, next) = model.forward(&mut tape, &tokens, &segments.into(), &state, false)?;
        let opts = CrossEntropy { divisor: 1.0, l2wrap: false };
        nats += model.loss(&mut tape, &hidden, &targets, None, opts).loss();
        predicted += targets.len();
        state = next;
    }
    ctx.check()?;
    if !nats.is_finite() {
        return Err(not_finite());
    }
    let share = predicted as f64 / ids.len() as f64;
    Ok(Prediction {
        tokens: predicted,
        bytes,
        loss: nats / predicted as f64,
        bits_per_byte: nats / std::f64::consts::LN_2 / (bytes as f64 * share),
    })
}

/// How far a model's predictions are from those of the exact one.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Divergence {
    /// Tokens predicted.
    pub tokens: usize,
    /// Mean of the Kullback-Leibler divergence of the exact predictions from the model's, in nats.
    pub kl_mean: f64,
    /// What 99 of 100 tokens stay below.
    pub kl_p99: f64,
    /// The largest.
    pub kl_max: f64,
    /// Mean cross entropy of the exact model, nats per token.
    pub exact_loss: f64,
    /// That of the model.
    pub loss: f64,
}

impl Divergence {
    /// By how much the perplexity is higher, relative to the exact model's.
    pub fn perplexity_change(&self) -> f64 {
        (self.loss - self.exact_loss).exp_m1()
    }
}

/// Compares the predictions of `other` with those of `exact`, token by token of documents that both read as one sequence, as [`predict`] does.
///
/// # Errors
/// As [`predict`].
pub fn compare(
    ctx: &Context, exact: &Model, other: &Model, tokenizer: &Tokenizer, documents: &[impl AsRef<[u8]>],
) -> Result<Divergence, crate::Error> {
    /// Of each token there are two rows of logits in memory.
    const PIECE: usize = 128;
    let (ids, _) = tokens(tokenizer, documents)?;
    let mut states = [exact, other].map(|m| State::zeros(ctx, m.config(), 1));
    let mut all = Vec::with_capacity(ids.len());
    for first in (0..ids.len() - 1).step_by(PIECE) {
        let tokens = &ids[first..ids.len().min(first + PIECE + 1)];
        let (inputs, targets) = (&tokens[..tokens.len() - 1], &tokens[1..]);
        let mut logits = Vec::new();
        for (model, state) in [exact, other].into_iter().zip(&mut states) {
            let mut tape = Tape::inference(ctx, model.params());
            let (hidden, next) =
                model.forward(&mut tape, inputs, &batch(1, inputs.len(), true).into(), state, false)?;
            logits.push(model.logits(&mut tape, &hidden).to_vec());
            *state = next;
        }
        let rows: Vec<_> = logits.iter().map(|l| l.chunks_exact(l.len() / inputs.len()).collect::<Vec<_>>()).collect();
        all.extend(targets.iter().enumerate().map(|(i, &target)| differ(rows[0][i], rows[1][i], target as usize)));
    }
    ctx.check()?;
    if all.iter().any(|d| d.iter().any(|v| !v.is_finite())) {
        return Err(not_finite());
    }
    let mean = |i: usize| all.iter().map(|d| d[i]).sum::<f64>() / all.len() as f64;
    let mut kl: Vec<f64> = all.iter().map(|d| d[0]).collect();
    kl.sort_by(f64::total_cmp);
    Ok(Divergence {
        tokens: all.len(),
        kl_mean: mean(0),
        kl_p99: kl[(kl.len() * 99).div_ceil(100) - 1],
        kl_max: kl[kl.len() - 1],
        exact_loss: mean(1),
        loss: mean(2),
    })
}

/// The divergence of two rows of logits, and what each says of the target, all in nats.
fn differ(exact: &[f32], other: &[f32], target: usize) -> [f64; 3] {
    let normal = |logits: &[f32]| -> f64 {
        let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        most + logits.iter().map(|l| (f64::from(*l) - most).exp()).sum::<f64>().ln()
    };
    let (p, q) = (normal(exact), normal(other));
    let kl = |(a, b): (&f32, &f32)| {
        let a = f64::from(*a) - p;
        a.exp() * (a - (f64::from(*b) - q))
    };
    [exact.iter().zip(other).map(kl).sum(), p - f64::from(exact[target]), q - f64::from(other[target])]
}

/// What a model with a NaN somewhere is told.
pub(crate) fn not_finite() -> crate::Error {
    crate::Error::Input(
        "the model gives no finite probabilities: its file is damaged, or --dtype f16 is too narrow for it".into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use anser_model::{Config, Init};

    #[test]
    fn divergence_of_rows_and_of_models() {
        // Probabilities 1/2, 1/4, 1/4 and 1/4, 1/2, 1/4, of logits whose sums are anything.
        let row = |p: [f32; 3], add: f32| p.map(|p| p.ln() + add);
        let [kl, exact, loss] = differ(&row([0.5, 0.25, 0.25], 7.0), &row([0.25, 0.5, 0.25], -3.0), 1);
        let ln2 = std::f64::consts::LN_2;
        assert!([kl - 0.25 * ln2, exact - 2.0 * ln2, loss - ln2].iter().all(|d| d.abs() < 1e-6));
        let ctx = Context::cpu(2);
        let tokenizer = Tokenizer::from_name("bytes").unwrap();
        let model = Model::init(&ctx, &Config::new(1, 64, tokenizer.vocab_size()), Init::Noise, 3).unwrap();
        let text: Vec<u8> = (0..600u32).map(|i| (i * i % 251) as u8).collect();
        let of = |other: &Model| compare(&ctx, &model, other, &tokenizer, &[&text]).unwrap();
        let same = of(&model);
        assert_eq!((same.kl_max, same.loss, same.tokens), (0.0, same.exact_loss, tokenizer.encode(&text).len() - 1));
        let whole = predict(&ctx, &model, &tokenizer, &[&text]).unwrap();
        assert!((same.loss - whole.loss).abs() < 1e-5);
        let coded = of(&model.packed(&ctx, anser_tensor::WeightType::Q4));
        assert!(0.0 < coded.kl_mean && coded.kl_mean < coded.kl_p99 && coded.kl_p99 < coded.kl_max);
    }

    #[test]
    fn parts_and_pieces_predict_what_a_whole_pass_predicts() {
        let ctx = Context::cpu(2);
        let tokenizer = Tokenizer::from_name("bytes").unwrap();
        let model = Model::init(&ctx, &Config::new(1, 64, tokenizer.vocab_size()), Init::Current, 3).unwrap();
        let text: Vec<u8> = (0..9001u32).map(|i| (i * i % 251) as u8).collect();
        let got = predict(&ctx, &model, &tokenizer, &[&text]).unwrap();
        let ids = tokenizer.encode(&text);
        let mut nats = 0.0;
        for part in ids.chunks(ids.len().div_ceil(2)) {
            let mut tape = Tape::inference(&ctx, model.params());
            let n = part.len() - 1;
            let segments = anser_ops::batch(1, n, false).into();
            let state = State::zeros(&ctx, model.config(), 0);
            let (hidden, _) = model.forward(&mut tape, &part[..n], &segments, &state, false).unwrap();
            let targets: Vec<i32> = part[1..].iter().map(|&t| t as i32).collect();
            nats += model.loss(&mut tape, &hidden, &targets, None, CrossEntropy { divisor: 1.0, l2wrap: false }).loss();
        }
        assert_eq!(got.tokens, ids.len() - 2);
        assert!((got.loss - nats / got.tokens as f64).abs() < 1e-5, "{got:?}");
        assert!((got.bits_per_byte * 2f64.ln() - got.loss).abs() < 1e-9, "one byte a token");
        assert!(predict(&ctx, &model, &tokenizer, &[b""]).is_err());
        // Documents are apart, and the end of one is predicted.
        let end = tokenizer.end_of_document();
        let apart = [tokenizer.encode(b"a goo"), vec![end], tokenizer.encode(b"se")].concat();
        assert_eq!(tokens(&tokenizer, &["a goo", "se"]).unwrap(), (apart, 7));
        let two = predict(&ctx, &model, &tokenizer, &["a goo", "se"]).unwrap();
        assert_eq!((two.tokens, two.bytes), (7, 7));
        let mut broken = model;
        broken.params_mut().values_mut().fill(f32::NAN);
        let error = predict(&ctx, &broken, &tokenizer, &[&text]).unwrap_err().to_string();
        assert!(error.contains("no finite probabilities"), "{error}");
    }
}
