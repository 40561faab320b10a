//! Text that a model in training writes.

use crate::Error;
use anser_infer::Sampling;
use anser_infer::engine::{Engine, EngineOptions, Event, Request};
use anser_model::Model;
use anser_tensor::{Context, DType};
use anser_tokenizer::{StreamDecoder, Tokenizer};
use std::sync::Arc;

/// What the model writes after `prompt`, at most `count` tokens.
///
/// # Errors
/// When the model gives no finite logits.
pub fn write_text(
    ctx: &Context, model: &Model, tokenizer: &Tokenizer, prompt: &str, seed: u64, count: usize,
) -> Result<String, Error> {
    let model = Arc::new(model.packed(ctx, DType::F32));
    let mut prompt = tokenizer.encode(prompt.as_bytes());
    if prompt.is_empty() {
        prompt.push(tokenizer.end_of_document());
    }
    let options = EngineOptions { slots: 1, cache_bytes: 0, ..EngineOptions::default() };
    let engine = Engine::start(ctx.clone(), model, options)?;
    let sampling = Sampling::default();
    let stop_tokens = vec![tokenizer.end_of_document()];
    // Without an answer the prompt's state is all that comes of it.
    let keep_state = count == 0;
    let request = Request { prompt, sampling, seed, max_tokens: count, stop_tokens, keep_state, ..Request::default() };
    let mut stream = engine.submit(request).map_err(anser_infer::Error::from)?;
    let (mut decoder, mut text) = (StreamDecoder::default(), String::new());
    while let Some(event) = stream.recv() {
        match event {
            Event::Token(token) => match tokenizer.token(token.token) {
                Ok(bytes) => text += &decoder.push(bytes),
                // A vocabulary may have ids that stand for nothing.
                Err(_) => break,
            },
            Event::End(end) => drop(end.checked()?),
            Event::Prompt { .. } | Event::State(_) => {}
        }
    }
    Ok(text + &decoder.finish())
}
