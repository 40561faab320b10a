//! `/v1/messages`: the same conversations in Anthropic's shape.

use super::chat::{Reply, Turn, content, message};
use super::options::{self, Options};
use super::{Usage, id};
use crate::App;
use crate::answer::{Answer, Finish};
use crate::auth::Owner;
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::sse;
use crate::template::Message;
use anser_infer::chat::Think;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};

/// Answers a conversation.
pub async fn messages(State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, f: Fields) -> Response {
    match answer(app, owner, f).await {
        Ok(response) => response,
        Err(error) => {
            // Anthropic's shape of the same.
            let mut response = error.clone().into_response();
            let body = Json(shaped(&error)).into_response().into_body();
            response.headers_mut().remove(axum::http::header::CONTENT_LENGTH);
            *response.body_mut() = body;
            response
        }
    }
}

fn shaped(error: &ApiError) -> Value {
    json!({ "type": "error", "error": { "type": error.kind(), "message": error.message } })
}

async fn answer(app: App, owner: String, f: Fields) -> Result<Response, ApiError> {
    f.refuse(&["tools", "n", "stop"])?;
    let max_tokens = f.whole("max_tokens", 1..=app.options.max_tokens)?;
    let max_tokens = max_tokens.ok_or_else(|| ApiError::field("max_tokens", "it is missing"))?;
    let mut options = Options::read(&app, &f)?;
    options.stops = options::stops(&f, "stop_sequences")?;
    let own_stops = options.stops.clone();
    let turn = Turn::new(&app, &conversation(&f)?, think(&app, &f)?, options)?;
    let request = turn.options.request(&owner, turn.prompt.clone(), max_tokens, 0);
    let answer = Answer::start(&app, request, &turn.options.stops, app.options.template.turn_end()).await?;
    let reply = Reply::new(answer, turn.think);
    let mut head = json!({
        "id": id("msg"), "type": "message", "role": "assistant", "model": app.options.model, "content": [],
        "stop_reason": null, "stop_sequence": null, "usage": usage(Usage { prompt: turn.prompt.len(), ..Usage::default() }),
    });
    if turn.options.stream {
        return Ok(stream(reply, head, own_stops, turn.prompt.len()));
    }
    let (mut reply, mut thoughts, mut text, mut finish) = (reply, String::new(), String::new(), None);
    while let Some(piece) = reply.next().await? {
        thoughts += &piece.told.reasoning;
        text += &piece.told.content;
        finish = piece.finish;
    }
    let mut content = Vec::new();
    if !thoughts.is_empty() {
        content.push(json!({ "type": "thinking", "thinking": thoughts, "signature": "" }));
    }
    content.push(json!({ "type": "text", "text": text }));
    (head["stop_reason"], head["stop_sequence"]) = reason(finish.as_ref(), &own_stops);
    head["content"] = json!(content);
    head["usage"] = usage(reply.usage(turn.prompt.len()));
    Ok(Json(head).into_response())
}

fn conversation(f: &Fields) -> Result<Vec<Message>, ApiError> {
    let mut all = Vec::new();
    if let Some(system) = f.get("system") {
        all.push(Message { role: "system", content: content(system, "system")? });
    }
    let list = f.list("messages")?.filter(|l| !l.is_empty());
    let list = list.ok_or_else(|| ApiError::field("messages", "there must be at least one"))?;
    for (i, value) in list.iter().enumerate() {
        all.push(message(value, &format!("messages[{i}]"))?);
    }
    Ok(all)
}

fn think(app: &App, f: &Fields) -> Result<Think, ApiError> {
    let Some(thinking) = f.object("thinking")? else { return Ok(app.options.think) };
    match thinking.get("type").and_then(Value::as_str) {
        Some("enabled" | "adaptive") => Ok(Think::On),
        Some("disabled") => Ok(Think::Off),
        _ => Err(ApiError::field("thinking.type", "it must be enabled, adaptive or disabled")),
    }
}

fn usage(u: Usage) -> Value {
    json!({
        "input_tokens": u.prompt - u.cached.min(u.prompt), "cache_read_input_tokens": u.cached,
        "cache_creation_input_tokens": 0, "output_tokens": u.written,
    })
}

/// Anthropic's words for the end; a stop text of the template is an end of the model's own.
fn reason(finish: Option<&Finish>, own: &[String]) -> (Value, Value) {
    match finish {
        Some(Finish::Length) => (json!("max_tokens"), Value::Null),
        Some(Finish::StopText(stop)) if own.contains(stop) => (json!("stop_sequence"), json!(stop)),
        _ => (json!("end_turn"), Value::Null),
    }
}

/// Thoughts and the answer are blocks that are opened and closed.
struct Blocks {
    to: sse::Sender,
    open: Option<&'static str>,
    index: usize,
}

impl Blocks {
    async fn open(&mut self, kind: &'static str) {
        if self.open == Some(kind) {
            return;
        }
        self.close().await;
        let block = match kind {
            "text" => json!({ "type": "text", "text": "" }),
            _ => json!({ "type": "thinking", "thinking": "", "signature": "" }),
        };
        self.open = Some(kind);
        self.send("content_block_start", json!({ "index": self.index, "content_block": block })).await;
    }

    async fn close(&mut self) {
        if self.open.take().is_some() {
            self.send("content_block_stop", json!({ "index": self.index })).await;
            self.index += 1;
        }
    }

    async fn text(&mut self, kind: &'static str, text: &str) {
        if !text.is_empty() {
            self.open(kind).await;
            let mut delta = json!({ "type": format!("{kind}_delta") });
            delta[kind] = json!(text);
            self.send("content_block_delta", json!({ "index": self.index, "delta": delta })).await;
        }
    }

    async fn send(&self, kind: &str, mut value: Value) {
        value["type"] = json!(kind);
        self.to.named(kind, &value).await;
    }
}

fn stream(mut reply: Reply, head: Value, own_stops: Vec<String>, prompt: usize) -> Response {
    sse::send(move |to| async move {
        let mut blocks = Blocks { to, open: None, index: 0 };
        blocks.send("message_start", json!({ "message": head })).await;
        let mut finish = None;
        loop {
            match reply.next().await {
                Ok(Some(piece)) => {
                    blocks.text("thinking", &piece.told.reasoning).await;
                    blocks.text("text", &piece.told.content).await;
                    finish = piece.finish;
                }
                Ok(None) => break,
                Err(error) => {
                    blocks.send("error", shaped(&error)).await;
                    return Ok(());
                }
            }
        }
        if blocks.index == 0 {
            // An answer has a text, if an empty one.
            blocks.open("text").await;
        }
        blocks.close().await;
        let (reason, sequence) = reason(finish.as_ref(), &own_stops);
        let delta = json!({ "stop_reason": reason, "stop_sequence": sequence });
        blocks.send("message_delta", json!({ "delta": delta, "usage": usage(reply.usage(prompt)) })).await;
        blocks.send("message_stop", json!({})).await;
        Ok(())
    })
}
