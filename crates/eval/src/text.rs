//! How well a model predicts a text: cross entropy per token and bits per byte.

use anser_model::{Model, State};
use anser_ops::{CrossEntropy, Segment, Tape};
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

/// Reads `text` with `model`, the state going on through each of up to 32 parts.
///
/// # Errors
/// When the text has fewer than two tokens, a token is outside the model's vocabulary, the model's logits are not finite, or the device fails.
pub fn predict(ctx: &Context, model: &Model, tokenizer: &Tokenizer, text: &[u8]) -> Result<Prediction, crate::Error> {
    let ids = tokenizer.encode(text);
    if ids.len() < 2 {
        return Err(crate::Error::Input("a text to predict needs at least two tokens".into()));
    }
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
        bytes: text.len(),
        loss: nats / predicted as f64,
        bits_per_byte: nats / std::f64::consts::LN_2 / (text.len() as f64 * share),
    })
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
    fn parts_and_pieces_predict_what_a_whole_pass_predicts() {
        let ctx = Context::cpu(2);
        let tokenizer = Tokenizer::from_name("bytes").unwrap();
        let model = Model::init(&ctx, &Config::new(1, 64, tokenizer.vocab_size()), Init::Current, 3).unwrap();
        let text: Vec<u8> = (0..9001u32).map(|i| (i * i % 251) as u8).collect();
        let got = predict(&ctx, &model, &tokenizer, &text).unwrap();
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
        assert!(predict(&ctx, &model, &tokenizer, b"").is_err());
        let mut broken = model;
        broken.params_mut().values_mut().fill(f32::NAN);
        let error = predict(&ctx, &broken, &tokenizer, &text).unwrap_err().to_string();
        assert!(error.contains("no finite probabilities"), "{error}");
    }
}
