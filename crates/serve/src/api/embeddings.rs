//! `/v1/embeddings`: the model's last hidden vector after the text, scaled to length 1.
//!
//! RWKV models are trained to write, not to compare texts: a vector says what may come next, and is good for near duplicates and for
//! classifiers trained on it, less so for search.

use super::options::{self, MOST_ANSWERS, check_model, checked_prompt};
use crate::App;
use crate::answer::{Answer, Part};
use crate::auth::Owner;
use crate::errors::ApiError;
use crate::fields::Fields;
use anser_infer::engine::{Request, Start};
use axum::extract::State;
use axum::{Extension, Json};
use futures_util::future::try_join_all;
use serde_json::{Value, json};

/// The vectors of texts.
pub async fn embeddings(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, f: Fields,
) -> Result<Json<Value>, ApiError> {
    check_model(&app, &f)?;
    f.refuse(&["dimensions"])?;
    let base64 = match f.text("encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::field("encoding_format", "it must be float or base64")),
    };
    let inputs = inputs(&app, &f)?;
    let read: usize = inputs.iter().map(Vec::len).sum();
    let mut answers = Vec::new();
    for prompt in inputs {
        let request = Request { prompt, owner: owner.clone(), max_tokens: 0, hidden: true, ..Request::default() };
        answers.push(Answer::start(&app, request, &[], None, "").await?);
    }
    let vectors = try_join_all(answers.into_iter().map(vector)).await?;
    let data: Vec<Value> = vectors
        .iter()
        .enumerate()
        .map(|(index, v)| {
            let embedding = if base64 { json!(encoded(v)) } else { json!(v) };
            json!({ "object": "embedding", "index": index, "embedding": embedding })
        })
        .collect();
    let usage = json!({ "prompt_tokens": read, "total_tokens": read });
    Ok(Json(json!({ "object": "list", "data": data, "model": app.options.model, "usage": usage })))
}

fn inputs(app: &App, f: &Fields) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = || {
        ApiError::field(
            "input",
            format!("it must be a text, a list of token ids, or a list of at most {MOST_ANSWERS} of either"),
        )
    };
    let one = |v: &Value| match v {
        Value::String(s) => Some(app.tokenizer.encode(s.as_bytes())),
        Value::Array(list) => options::tokens(list),
        _ => None,
    };
    let all: Vec<Vec<u32>> = match f.get("input") {
        Some(text @ Value::String(_)) => one(text).into_iter().collect(),
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_number) => {
            options::tokens(list).into_iter().collect()
        }
        Some(Value::Array(list)) if list.len() <= MOST_ANSWERS => {
            list.iter().map(one).collect::<Option<_>>().ok_or_else(wrong)?
        }
        _ => return Err(wrong()),
    };
    if all.is_empty() || all.iter().any(Vec::is_empty) {
        return Err(wrong());
    }
    all.into_iter().map(|p| checked_prompt(app, p, &Start::Empty, "input")).collect()
}

async fn vector(mut answer: Answer) -> Result<Vec<f32>, ApiError> {
    let mut found = None;
    while let Some(part) = answer.next().await? {
        if let Part::Prompt { hidden, .. } = part {
            found = hidden;
        }
    }
    let mut v = found.ok_or_else(|| ApiError::internal("the engine gave no hidden vector"))?;
    let length = v.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    v.iter_mut().for_each(|x| *x /= length);
    Ok(v)
}

/// Little-endian f32 in base64, which OpenAI's Python client asks for.
fn encoded(vector: &[f32]) -> String {
    use base64::Engine as _;
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
