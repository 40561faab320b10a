//! Minimal pairs, as BLiMP has them: two sentences that differ in one point of grammar, of which a model should find the right one more probable.

use crate::Error;
use anser_model::{Model, State};
use anser_ops::{CrossEntropy, Segment, Tape};
use anser_tensor::Context;
use anser_tokenizer::Tokenizer;

/// Tokens computed at a time.
const TOKENS: usize = 8192;

/// A pair.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Pair {
    /// The right sentence.
    pub sentence_good: String,
    /// The wrong one.
    pub sentence_bad: String,
}

/// Reads pairs, an object with `sentence_good` and `sentence_bad` a line.
///
/// # Errors
/// At a line that is none, or when there is no line.
pub fn parse(text: &str) -> Result<Vec<Pair>, Error> {
    let line = |(i, line): (usize, &str)| {
        let bad = |e| Error::Input(format!("line {}: not a pair: {e}", i + 1));
        serde_json::from_str(line).map_err(bad)
    };
    let pairs: Vec<Pair> =
        text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(line).collect::<Result<_, _>>()?;
    if pairs.is_empty() { Err(Error::Input("there are no pairs in it".into())) } else { Ok(pairs) }
}

/// Negative log-likelihoods of the right and the wrong sentence of each pair, as a whole and at the beginning of a document, in nats.
///
/// # Errors
/// When a token is outside the model's vocabulary, the model's logits are not finite, or the device fails.
pub fn score(ctx: &Context, model: &Model, tokenizer: &Tokenizer, pairs: &[Pair]) -> Result<Vec<[f64; 2]>, Error> {
    let sentences: Vec<&str> = pairs.iter().flat_map(|p| [&p.sentence_good[..], &p.sentence_bad]).collect();
    let nats = nats(ctx, model, tokenizer, &sentences)?;
    if nats.iter().any(|n| !n.is_finite()) {
        return Err(crate::text::not_finite());
    }
    Ok(nats.as_chunks::<2>().0.to_vec())
}

/// Share of pairs whose right sentence is the more probable one. Equals count half.
pub fn accuracy(scores: &[[f64; 2]]) -> f64 {
    let right = |n: &[f64; 2]| match n[0].total_cmp(&n[1]) {
        std::cmp::Ordering::Less => 1.0,
        std::cmp::Ordering::Equal => 0.5,
        std::cmp::Ordering::Greater => 0.0,
    };
    scores.iter().map(right).sum::<f64>() / scores.len() as f64
}

/// Negative log-likelihood of each sentence after the end of another document, in nats.
fn nats(ctx: &Context, model: &Model, tokenizer: &Tokenizer, sentences: &[&str]) -> Result<Vec<f64>, Error> {
    let ids: Vec<Vec<u32>> = sentences.iter().map(|s| tokenizer.encode(s.as_bytes())).collect();
    let mut all = Vec::with_capacity(ids.len());
    let mut rest = &ids[..];
    while !rest.is_empty() {
        let (mut tokens, mut targets, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        let mut count = 0;
        for sentence in rest {
            if count > 0 && tokens.len() + sentence.len() > TOKENS {
                break;
            }
            let start = tokens.len();
            segments.push(Segment { start, len: sentence.len(), state_in: None, state_out: None });
            // All but the last are read, all are predicted.
            let read = std::iter::once(tokenizer.end_of_document()).chain(sentence.iter().copied());
            tokens.extend(read.take(sentence.len()));
            targets.extend(sentence.iter().map(|&t| t as i32));
            count += 1;
        }
        let lengths: Vec<usize> = segments.iter().map(|s| s.len).collect();
        segments.retain(|s| s.len > 0);
        let mut lost = Vec::new();
        if !tokens.is_empty() {
            let mut tape = Tape::inference(ctx, model.params());
            let state = State::zeros(ctx, model.config(), 0);
            let (hidden, _) = model.forward(&mut tape, &tokens, &segments.into(), &state, false)?;
            let opts = CrossEntropy { divisor: 1.0, l2wrap: false };
            lost = model.loss(&mut tape, &hidden, &targets, None, opts).per_token();
        }
        ctx.check()?;
        let mut at = 0;
        for len in lengths {
            all.push(lost[at..at + len].iter().map(|&n| f64::from(n)).sum());
            at += len;
        }
        rest = &rest[count..];
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anser_model::{Config, Init};

    #[test]
    fn sentences_side_by_side_are_as_probable_as_alone() {
        let ctx = Context::cpu(2);
        let tokenizer = Tokenizer::bytes();
        let model = Model::init(&ctx, &Config::new(1, 64, 256), Init::Noise, 3).unwrap();
        let long = "a very long one ".repeat(300);
        let sentences = ["It is.", "", "They are here.", &long, &long, "I am."];
        let together = nats(&ctx, &model, &tokenizer, &sentences).unwrap();
        for (s, n) in sentences.iter().zip(&together) {
            assert_eq!(nats(&ctx, &model, &tokenizer, &[s]).unwrap(), [*n]);
        }
        // About ln 256 a byte, and nothing for nothing.
        assert!(together[1] == 0.0 && (together[0] / 6.0 - 5.5).abs() < 1.0, "{together:?}");
    }

    #[test]
    fn the_more_probable_sentence_counts() {
        let ctx = Context::cpu(1);
        let model = Model::init(&ctx, &Config::new(1, 64, 256), Init::Noise, 3).unwrap();
        let text = "{\"sentence_good\": \"a\", \"sentence_bad\": \"b\", \"field\": \"x\"}\n\n{\"sentence_good\": \"b\", \"sentence_bad\": \"a\"}\n";
        let pairs = parse(text).unwrap();
        assert_eq!(pairs.len(), 2);
        // Either is wrong in one of them.
        let share = |pairs: &[Pair]| accuracy(&score(&ctx, &model, &Tokenizer::bytes(), pairs).unwrap());
        assert_eq!(share(&pairs), 0.5);
        let one = share(&pairs[..1]);
        assert!(one == 0.0 || one == 1.0);
        assert_eq!(share(&[Pair { sentence_bad: "a".into(), ..pairs[0].clone() }]), 0.5);
        let mut broken = model;
        broken.params_mut().values_mut().fill(f32::NAN);
        assert!(score(&ctx, &broken, &Tokenizer::bytes(), &pairs).is_err());
        assert!(parse("").is_err() && parse("{}").unwrap_err().to_string().starts_with("line 1: not a pair"));
    }
}
