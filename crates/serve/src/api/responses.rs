//! `/v1/responses`: conversations in the shape of OpenAI's newer API, which may go on from what the server keeps.

use super::conversation::{Turn, content, effort, role, say, think};
use super::items::Items;
use super::options::Options;
use super::{Usage, id, now};
use crate::App;
use crate::answer::Finish;
use crate::auth::Owner;
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::kept;
use crate::reply::Reply;
use crate::sse;
use crate::template::Message;
use crate::tools::{self, Tools};
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};

/// Answers a conversation.
pub async fn create(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, mut f: Fields,
) -> Result<Response, ApiError> {
    f.refuse(&["n", "background", "conversation", "prompt", "max_tool_calls", "top_logprobs", "response_format"])?;
    if f.text("truncation")?.is_some_and(|t| t != "disabled") {
        return Err(ApiError::field("truncation", "it must be disabled: no context is too long for this model"));
    }
    form(&mut f)?;
    let options = Options::read(&app, &f).map_err(|e| e.renamed("response_format", "text.format"))?;
    let max_tokens = f.whole("max_output_tokens", 1..=app.options.max_tokens)?.unwrap_or(app.options.max_tokens);
    let reasoning = Fields(f.object("reasoning")?.cloned().unwrap_or_default());
    let word = reasoning.text("effort").map_err(|e| e.within("reasoning"))?;
    let think = think(&f, &options, effort(&app, "reasoning.effort", word)?)?;
    let tools = Tools::openai(&f)?;
    let before = match f.text("previous_response_id")? {
        Some(_) if f.get("state").is_some() => {
            return Err(ApiError::field("state", "it goes on from a response or from a state: leave one of them out"));
        }
        Some(id) => Some(app.responses.get(&owner, id)?),
        None => None,
    };
    let text = tools.as_ref().map(Tools::prompt);
    let told = f.get("state").is_some() || before.as_ref().is_some_and(|b| text.is_some() && b.tools == text);
    let turn = Turn::new(&app, conversation(&f)?, think, tools.as_ref(), told, options);
    let mut turn = turn.map_err(|e| e.renamed("messages", "input"))?;
    if let Some(before) = &before {
        turn.prompt = [&before.tokens[..], &turn.prompt].concat();
    }
    // What a state has read is unknown here.
    let store = f.get("store").is_none() || f.flag("store")?;
    let store = store && f.get("state").is_none();
    let head = head(&app, &f, max_tokens, store)?;
    let request = turn.options.request(&owner, turn.prompt.clone(), max_tokens, 0);
    let work = Work {
        reply: Reply::start(&app, request, &turn).await?,
        head,
        prompt: turn.prompt,
        tools: text.or_else(|| before.and_then(|b| b.tools.clone())),
        keep: store.then_some(owner),
        app,
    };
    match turn.options.stream {
        true => Ok(stream(work)),
        false => Ok(Json(work.run(&mut Events::default()).await?).into_response()),
    }
}

/// A stored response.
pub async fn one(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.responses.get(&owner, &id).map(|response| Json(response.json.clone()))
}

/// Deletes one.
pub async fn delete(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.responses.delete(&owner, &id)?;
    Ok(Json(json!({ "id": id, "object": "response", "deleted": true })))
}

/// What `text.format` asks for as chat completions ask for it.
fn form(f: &mut Fields) -> Result<(), ApiError> {
    let text = Fields(f.object("text")?.cloned().unwrap_or_default());
    let Some(format) = text.object("format").map_err(|e| e.within("text"))? else {
        return Ok(());
    };
    let format = match format.get("type").and_then(Value::as_str) {
        Some("json_schema") if format.get("schema").is_some_and(Value::is_object) => {
            json!({ "type": "json_schema", "json_schema": { "schema": format["schema"] } })
        }
        Some("json_schema") => return Err(ApiError::field("text.format.schema", "it must be a JSON schema")),
        Some("text" | "json_object") => json!(format),
        _ => return Err(ApiError::field("text.format.type", "it must be text, json_object or json_schema")),
    };
    f.0.insert("response_format".into(), format);
    Ok(())
}

/// The messages that a request adds.
fn conversation(f: &Fields) -> Result<Vec<Message>, ApiError> {
    let mut all = Vec::new();
    if let Some(instructions) = f.text("instructions")? {
        all.push(Message { role: "system", content: instructions.into() });
    }
    match f.get("input") {
        Some(Value::String(text)) => all.push(Message { role: "user", content: text.clone() }),
        Some(Value::Array(items)) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                add(&mut all, item, &format!("input[{i}]"))?;
            }
        }
        _ => return Err(ApiError::field("input", "it must be a string or a list of at least one item")),
    }
    Ok(all)
}

/// An item of the input. Items of the assistant's one after the other are one turn, as are outputs of functions.
fn add(all: &mut Vec<Message>, item: &Value, at: &str) -> Result<(), ApiError> {
    match item.get("type").map_or(Some("message"), Value::as_str) {
        Some("message") => {
            let (role, text) = (role(item, at)?, content(&item["content"], &format!("{at}.content"))?);
            match role {
                "assistant" => say(all, role, text),
                _ => all.push(Message { role, content: text }),
            }
        }
        Some("function_call") => {
            let (Some(name), Some(arguments)) = (item["name"].as_str(), item["arguments"].as_str()) else {
                return Err(ApiError::field(at, "it must have a name and arguments, strings"));
            };
            say(all, "assistant", tools::call(name, arguments));
        }
        Some("function_call_output") => {
            let text = tools::output(&content(&item["output"], &format!("{at}.output"))?);
            say(all, "user", text);
        }
        // Thoughts of earlier turns are left out, as the models were trained.
        Some("reasoning") => {}
        _ => {
            let why = "it must be message, function_call, function_call_output or reasoning";
            return Err(ApiError::field(&format!("{at}.type"), why));
        }
    }
    Ok(())
}

/// A response that begins.
fn head(app: &App, f: &Fields, max_tokens: usize, store: bool) -> Result<Value, ApiError> {
    let given = |name: &str, default: Value| f.get(name).cloned().unwrap_or(default);
    Ok(json!({
        "id": id("resp_"),
        "object": "response",
        "created_at": now(),
        "status": "in_progress",
        "background": false,
        "error": null,
        "incomplete_details": null,
        "instructions": given("instructions", Value::Null),
        "max_output_tokens": max_tokens,
        "metadata": f.object("metadata")?.cloned().unwrap_or_default(),
        "model": app.options.model,
        "output": [],
        "parallel_tool_calls": given("parallel_tool_calls", json!(true)),
        "previous_response_id": given("previous_response_id", Value::Null),
        "reasoning": given("reasoning", json!({ "effort": null, "summary": null })),
        "store": store,
        "temperature": given("temperature", json!(1.0)),
        "text": given("text", json!({ "format": { "type": "text" } })),
        "tool_choice": given("tool_choice", json!("auto")),
        "tools": given("tools", json!([])),
        "top_p": given("top_p", json!(1.0)),
        "truncation": "disabled",
        "usage": null,
    }))
}

fn usage(u: Usage) -> Value {
    json!({
        "input_tokens": u.prompt,
        "input_tokens_details": { "cached_tokens": u.cached },
        "output_tokens": u.written,
        "output_tokens_details": { "reasoning_tokens": u.reasoning },
        "total_tokens": u.prompt + u.written,
    })
}

/// A response on its way.
struct Work {
    app: App,
    reply: Reply,
    head: Value,
    prompt: Vec<u32>,
    /// What the model was told of tools.
    tools: Option<String>,
    /// Whose it is, where it is kept.
    keep: Option<String>,
}

impl Work {
    /// The response; its events go to `to`.
    async fn run(mut self, to: &mut Events) -> Result<Value, ApiError> {
        let (mut items, mut finish) = (Items::default(), None);
        for kind in ["response.created", "response.in_progress"] {
            to.send(kind, json!({ "response": self.head })).await;
        }
        while let Some(piece) = self.reply.next().await? {
            finish = piece.finish.clone();
            items.add(piece);
            to.all(&mut items).await;
        }
        let cut = finish == Some(Finish::Length);
        items.end(if cut { "incomplete" } else { "completed" });
        to.all(&mut items).await;
        let mut response = self.head;
        response["status"] = json!(if cut { "incomplete" } else { "completed" });
        if cut {
            response["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        response["output"] = json!(items.output);
        response["usage"] = usage(self.reply.usage(self.prompt.len()));
        if let Some(owner) = &self.keep {
            let tokens = [&self.prompt[..], self.reply.tokens()].concat();
            self.app.responses.keep(owner, kept::Response { json: response.clone(), tokens, tools: self.tools });
        }
        let kind = if cut { "response.incomplete" } else { "response.completed" };
        to.send(kind, json!({ "response": response })).await;
        Ok(response)
    }
}

/// Where numbered events go, if anywhere.
#[derive(Default)]
struct Events {
    to: Option<sse::Sender>,
    sent: usize,
}

impl Events {
    async fn send(&mut self, kind: &str, mut event: Value) {
        if let Some(to) = &self.to {
            event["type"] = json!(kind);
            event["sequence_number"] = json!(self.sent);
            self.sent += 1;
            to.named(kind, &event).await;
        }
    }

    async fn all(&mut self, items: &mut Items) {
        for (kind, event) in items.events.drain(..) {
            self.send(kind, event).await;
        }
    }
}

fn stream(work: Work) -> Response {
    sse::send(move |to| async move {
        let (mut events, mut failed) = (Events { to: Some(to), sent: 0 }, work.head.clone());
        if let Err(error) = work.run(&mut events).await {
            failed["status"] = json!("failed");
            failed["error"] = json!({ "code": "server_error", "message": error.message });
            events.send("response.failed", json!({ "response": failed })).await;
        }
        Ok(())
    })
}
