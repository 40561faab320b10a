//! `/tokenize`, `/detokenize` and `/tokenizer_info`.

use super::options;
use crate::App;
use crate::errors::ApiError;
use crate::fields::Fields;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

/// The token ids of a text.
pub async fn tokenize(State(app): State<App>, f: Fields) -> Result<Json<Value>, ApiError> {
    // vLLM's and llama.cpp's names for it.
    let text = f.text("prompt")?.or(f.text("content")?).ok_or_else(|| ApiError::field("prompt", "it is missing"))?;
    let tokens = app.tokenizer.encode(text.as_bytes());
    Ok(Json(json!({ "count": tokens.len(), "tokens": tokens })))
}

/// The text of token ids.
pub async fn detokenize(State(app): State<App>, f: Fields) -> Result<Json<Value>, ApiError> {
    f.list("tokens")?.ok_or_else(|| ApiError::field("tokens", "it is missing"))?;
    let bytes = app.tokenizer.decode(&options::token_list(&f, "tokens")?).map_err(|e| ApiError::field("tokens", e))?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(Json(json!({ "prompt": text, "content": text })))
}

/// What the tokenizer is; lm-evaluation-harness asks before it uses the routes above. The end of a document is a token without a text.
pub async fn info(State(app): State<App>) -> Json<Value> {
    let (name, end) = (app.tokenizer.name(), app.tokenizer.end_of_document());
    Json(json!({
        "tokenizer": name,
        "vocab_size": app.tokenizer.vocab_size(),
        "eos_token_id": end,
        "eos_token": null,
        "bos_token": null,
    }))
}
