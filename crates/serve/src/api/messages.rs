//! `/v1/messages`: the same conversations in Anthropic's shape.

use super::conversation::{Turn, content, role, think};
use super::options::{self, Options};
use super::{Usage, id};
use crate::App;
use crate::answer::Finish;
use crate::auth::Owner;
use crate::calls::{Call, CallPart, collect};
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::reply::Reply;
use crate::sse;
use crate::template::Message;
use crate::tools::{self, Tools};
use anser_infer::chat::Think;
use anser_infer::engine::Start;
use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};

/// Gives errors of this route Anthropic's shape, wherever they come from.
pub async fn errors(request: Request, next: Next) -> Response {
    let ours = request.uri().path() == "/v1/messages";
    let mut response = next.run(request).await;
    if let Some(error) = response.extensions().get::<ApiError>().filter(|_| ours) {
        *response.body_mut() = Json(shaped(error)).into_response().into_body();
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    response
}

fn shaped(error: &ApiError) -> Value {
    json!({ "type": "error", "error": { "type": error.kind(), "message": error.message } })
}

/// Answers a conversation.
pub async fn messages(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, f: Fields,
) -> Result<Response, ApiError> {
    f.refuse(&["n", "stop"])?;
    let max_tokens = f.whole("max_tokens", 1..=app.options.max_tokens)?;
    let max_tokens = max_tokens.ok_or_else(|| ApiError::field("max_tokens", "it is missing"))?;
    let mut options = Options::read(&app, &f)?;
    options.stops = options::stops(&f, "stop_sequences")?;
    let own_stops = options.stops.clone();
    let tools = Tools::anthropic(&f)?;
    let told = options.start != Start::Empty;
    let think = think(&f, &options, thinking(&app, &f)?)?;
    let turn = Turn::new(&app, conversation(&f)?, think, tools.as_ref(), told, options)?;
    let request = turn.options.request(&owner, turn.prompt.clone(), max_tokens, 0);
    let reply = Reply::start(&app, request, &turn).await?;
    let mut head = json!({
        "id": id("msg_"), "type": "message", "role": "assistant", "model": app.options.model, "content": [],
        "stop_reason": null, "stop_sequence": null, "usage": usage(Usage { prompt: turn.prompt.len(), ..Usage::default() }),
    });
    if turn.options.stream {
        return Ok(stream(reply, head, own_stops, turn.prompt.len()));
    }
    let (mut reply, mut thoughts, mut text) = (reply, String::new(), String::new());
    let (mut calls, mut finish) = (Vec::new(), None);
    while let Some(piece) = reply.next().await? {
        thoughts += &piece.reasoning;
        text += &piece.content;
        piece.calls.into_iter().for_each(|part| collect(&mut calls, part));
        finish = piece.finish;
    }
    let mut content = Vec::new();
    if !thoughts.is_empty() {
        content.push(json!({ "type": "thinking", "thinking": thoughts, "signature": "" }));
    }
    if !text.is_empty() || calls.is_empty() {
        content.push(json!({ "type": "text", "text": text }));
    }
    content.extend(calls.iter().map(call));
    (head["stop_reason"], head["stop_sequence"]) = reason(finish.as_ref(), &own_stops, reply.called());
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
        turn(&mut all, value, &format!("messages[{i}]"))?;
    }
    Ok(all)
}

/// A message: a text, or blocks of texts, calls and their outputs. Thoughts of earlier turns are left out, as the models were trained.
fn turn(all: &mut Vec<Message>, value: &Value, at: &str) -> Result<(), ApiError> {
    let (role, at) = (role(value, at)?, format!("{at}.content"));
    let Value::Array(blocks) = &value["content"] else {
        all.push(Message { role, content: content(&value["content"], &at)? });
        return Ok(());
    };
    let mut texts = Vec::new();
    for (i, block) in blocks.iter().enumerate() {
        let at = format!("{at}[{i}]");
        match (block["type"].as_str(), role) {
            (Some("thinking" | "redacted_thinking"), "assistant") => {}
            (Some("tool_use"), "assistant") => {
                let (Some(name), Some(input)) = (block["name"].as_str(), block["input"].as_object()) else {
                    return Err(ApiError::field(&at, "it must have a name and an input, an object"));
                };
                texts.push(tools::call(name, &tools::line(&json!(input))));
            }
            (Some("tool_result"), "user") => {
                let output = match &block["content"] {
                    Value::Null => String::new(),
                    output => content(output, &format!("{at}.content"))?,
                };
                texts.push(tools::output(&output));
            }
            _ => texts.push(content(&json!([block]), &at)?),
        }
    }
    if !texts.is_empty() || blocks.is_empty() {
        all.push(Message { role, content: texts.join("\n") });
    }
    Ok(())
}

/// A call as a block. One that the answer ended within has no input.
fn call(call: &Call) -> Value {
    let input: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
    json!({ "type": "tool_use", "id": call.id, "name": call.name, "input": input })
}

fn thinking(app: &App, f: &Fields) -> Result<Think, ApiError> {
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
fn reason(finish: Option<&Finish>, own: &[String], called: bool) -> (Value, Value) {
    match finish {
        Some(Finish::Stop) if called => (json!("tool_use"), Value::Null),
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
        let block = match kind {
            "text" => json!({ "type": "text", "text": "" }),
            _ => json!({ "type": "thinking", "thinking": "", "signature": "" }),
        };
        self.begin(kind, block).await;
    }

    async fn begin(&mut self, kind: &'static str, block: Value) {
        self.close().await;
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
            self.delta(delta).await;
        }
    }

    async fn call(&mut self, part: CallPart) {
        match part {
            CallPart::Begin { id, name } => {
                self.begin("tool_use", json!({ "type": "tool_use", "id": id, "name": name, "input": {} })).await;
            }
            CallPart::Arguments(text) => {
                self.delta(json!({ "type": "input_json_delta", "partial_json": text })).await;
            }
        }
    }

    async fn delta(&self, delta: Value) {
        self.send("content_block_delta", json!({ "index": self.index, "delta": delta })).await;
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
                    blocks.text("thinking", &piece.reasoning).await;
                    blocks.text("text", &piece.content).await;
                    for part in piece.calls {
                        blocks.call(part).await;
                    }
                    finish = piece.finish;
                }
                Ok(None) => break,
                Err(error) => {
                    blocks.send("error", shaped(&error)).await;
                    return Ok(());
                }
            }
        }
        if blocks.index == 0 && blocks.open != Some("tool_use") {
            // An answer that calls nothing has a text, if an empty one.
            blocks.open("text").await;
        }
        blocks.close().await;
        let (reason, sequence) = reason(finish.as_ref(), &own_stops, reply.called());
        let delta = json!({ "stop_reason": reason, "stop_sequence": sequence });
        blocks.send("message_delta", json!({ "delta": delta, "usage": usage(reply.usage(prompt)) })).await;
        blocks.send("message_stop", json!({})).await;
        Ok(())
    })
}
