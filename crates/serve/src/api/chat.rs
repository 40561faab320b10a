//! `/v1/chat/completions`.

use super::completions::with;
use super::options::{Options, checked_prompt};
use super::{Usage, id, now};
use crate::App;
use crate::answer::{Answer, Finish, Part, Text, bytes};
use crate::auth::Owner;
use crate::errors::ApiError;
use crate::fields::{Fields, kind};
use crate::sse;
use crate::template::{Message, Template};
use crate::think::{Splitter, Told};
use anser_infer::chat::Think;
use anser_infer::engine::TokenLogprob;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::future::try_join_all;
use serde_json::{Value, json};

/// Answers a conversation.
pub async fn completions(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, f: Fields,
) -> Result<Response, ApiError> {
    f.refuse(&["tools", "functions", "audio", "prediction", "web_search_options"])?;
    let options = Options::read(&app, &f)?;
    let best = f.whole("top_logprobs", 0..=20)?;
    let logprobs = f.flag("logprobs")?;
    if best.is_some() && !logprobs {
        return Err(ApiError::field("top_logprobs", "it is for requests with logprobs: true"));
    }
    let most = 1..=app.options.max_tokens;
    let max_tokens = match f.whole("max_completion_tokens", most.clone())? {
        Some(n) => n,
        None => f.whole("max_tokens", most)?.unwrap_or(app.options.max_tokens),
    };
    let think = match &options.grammar {
        // What may be written begins with the answer.
        Some(_) if f.get("think").is_some_and(|t| t != "off") => {
            return Err(ApiError::field("think", "an answer of a given form has no thoughts: it must be off"));
        }
        Some(_) => Think::Off,
        None => think(&app, &f)?,
    };
    let messages = messages(&f)?;
    let turn = Turn::new(&app, &messages, think, options)?;
    let mut choices = Vec::new();
    for number in 0..turn.options.n {
        let mut request = turn.options.request(&owner, turn.prompt.clone(), max_tokens, number);
        request.logprobs = logprobs.then_some(best.unwrap_or(0));
        let answer = Answer::start(&app, request, &turn.options.stops, app.options.template.turn_end()).await?;
        choices.push(Choice { reply: Reply::new(answer, turn.think), app: app.clone(), index: number, logprobs });
    }
    let usage = Usage { prompt: turn.prompt.len(), ..Usage::default() };
    let head = json!({ "id": id("chatcmpl"), "created": now(), "model": app.options.model });
    if turn.options.stream {
        return Ok(stream(
            choices,
            with(head, [("object", json!("chat.completion.chunk"))]),
            usage,
            turn.options.usage,
        ));
    }
    whole(choices, with(head, [("object", json!("chat.completion"))]), usage).await
}

/// A conversation made ready for the model.
pub struct Turn {
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// How the answer is told from thoughts.
    pub think: Think,
    /// With the template's stop texts.
    pub options: Options,
}

impl Turn {
    /// Applies the template.
    ///
    /// # Errors
    /// When the template doesn't take the messages, or they are too long.
    pub fn new(app: &App, messages: &[Message], think: Think, mut options: Options) -> Result<Turn, ApiError> {
        let template = &app.options.template;
        let prompt = template.prompt(messages, think).map_err(|e| ApiError::field("messages", e))?;
        let prompt = checked_prompt(app, app.tokenizer.encode(prompt.as_bytes()), &options.start, "messages")?;
        options.stops.extend(template.stops().iter().map(|s| s.to_string()));
        // An answer that the client began, or a template of its own, has no thought begun by the prompt.
        let begun = matches!(template, Template::Rwkv) && messages.last().is_some_and(|m| m.role == "user");
        Ok(Turn { prompt, think: if begun { think } else { Think::Off }, options })
    }
}

/// How the model is to think: `think` by our names, or OpenAI's `reasoning_effort`.
pub fn think(app: &App, f: &Fields) -> Result<Think, ApiError> {
    if let Some(name) = f.text("think")? {
        return name.parse().map_err(|e| ApiError::field("think", e));
    }
    match f.text("reasoning_effort")? {
        None => Ok(app.options.think),
        Some("none") => Ok(Think::Off),
        Some("minimal") => Ok(Think::Fast),
        Some("low") => Ok(Think::Short),
        Some("medium") => Ok(Think::On),
        Some("high" | "xhigh") => Ok(Think::Long),
        Some(_) => Err(ApiError::field("reasoning_effort", "it must be none, minimal, low, medium or high")),
    }
}

fn messages(f: &Fields) -> Result<Vec<Message>, ApiError> {
    let list = f.list("messages")?.ok_or_else(|| ApiError::field("messages", "it is missing"))?;
    if list.is_empty() {
        return Err(ApiError::field("messages", "there must be at least one"));
    }
    list.iter().enumerate().map(|(i, v)| message(v, &format!("messages[{i}]"))).collect()
}

/// A message; `name` is where it stands.
pub fn message(value: &Value, name: &str) -> Result<Message, ApiError> {
    let role = match value.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        _ => return Err(ApiError::field(&format!("{name}.role"), "it must be system, developer, user or assistant")),
    };
    let content = content(value.get("content").unwrap_or(&Value::Null), &format!("{name}.content"))?;
    Ok(Message { role, content })
}

/// A text, or a list of parts that are text.
pub fn content(value: &Value, name: &str) -> Result<String, ApiError> {
    let part = |part: &Value| match part.get("type").and_then(Value::as_str) {
        Some("text" | "input_text" | "output_text") => part.get("text").and_then(Value::as_str).map(String::from),
        _ => None,
    };
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            parts.iter().map(part).collect::<Option<Vec<_>>>().map(|p| p.join("\n")).ok_or_else(|| {
                ApiError::field(
                    name,
                    "its parts must be {\"type\": \"text\", \"text\": ..}: this model reads nothing else",
                )
            })
        }
        other => Err(ApiError::field(name, format!("it must be a string or a list of parts, and is {}", kind(other)))),
    }
}

/// An answer told from thoughts.
pub struct Reply {
    /// The answer.
    pub answer: Answer,
    splitter: Splitter,
    /// Tokens of the thoughts.
    pub reasoning: usize,
    /// Tokens of the prompt that were cached.
    pub cached: usize,
}

/// What a part adds to a reply.
#[derive(Default)]
pub struct Piece {
    /// Thoughts and answer.
    pub told: Told,
    /// The tokens.
    pub tokens: Vec<TokenLogprob>,
    /// Why it ended, with the last one.
    pub finish: Option<Finish>,
}

impl Reply {
    /// Of an answer to a prompt that ends as `think` has it.
    pub fn new(answer: Answer, think: Think) -> Reply {
        Reply { answer, splitter: Splitter::new(think), reasoning: 0, cached: 0 }
    }

    /// The next piece, `None` after the end.
    ///
    /// # Errors
    /// As [`Answer::next`].
    pub async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        loop {
            let (Text { text, tokens }, finish) = match self.answer.next().await? {
                Some(Part::Prompt { cached, .. }) => {
                    self.cached = cached;
                    continue;
                }
                Some(Part::Text(text)) => (text, None),
                Some(Part::End(text, finish)) => (text, Some(finish)),
                None => return Ok(None),
            };
            let thinking = self.splitter.thinking();
            let told = self.splitter.push(&text, finish.is_some());
            if thinking {
                self.reasoning += tokens.len();
            }
            return Ok(Some(Piece { told, tokens, finish }));
        }
    }

    /// Its tokens.
    pub fn usage(&self, prompt: usize) -> Usage {
        Usage { prompt, cached: self.cached, written: self.answer.written, reasoning: self.reasoning }
    }
}

struct Choice {
    reply: Reply,
    app: App,
    index: usize,
    logprobs: bool,
}

impl Choice {
    fn listed(&self, tokens: &[TokenLogprob]) -> Vec<Value> {
        tokens.iter().filter(|_| self.logprobs).map(|t| logprob(&self.app, t)).collect()
    }

    fn add(&self, usage: &mut Usage) {
        let own = self.reply.usage(0);
        usage.cached += own.cached;
        usage.written += own.written;
        usage.reasoning += own.reasoning;
    }
}

/// A token's log probability in the shape of chat completions.
pub fn logprob(app: &App, t: &TokenLogprob) -> Value {
    let entry = |token: u32, logprob: f32| {
        let bytes = bytes(&app.tokenizer, token);
        json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes })
    };
    let best: Vec<Value> = t.best.iter().map(|&(token, logprob)| entry(token, logprob)).collect();
    with(entry(t.token, t.logprob), [("top_logprobs", json!(best))])
}

async fn whole(choices: Vec<Choice>, head: Value, mut usage: Usage) -> Result<Response, ApiError> {
    let all = choices.into_iter().map(|mut choice| async move {
        let (mut told, mut listed, mut finish) = (Told::default(), Vec::new(), None);
        while let Some(piece) = choice.reply.next().await? {
            told.reasoning += &piece.told.reasoning;
            told.content += &piece.told.content;
            listed.extend(choice.listed(&piece.tokens));
            finish = piece.finish;
        }
        let mut message = json!({ "role": "assistant", "content": told.content, "refusal": null });
        if !told.reasoning.is_empty() {
            message["reasoning_content"] = json!(told.reasoning);
        }
        let json = json!({
            "index": choice.index,
            "message": message,
            "logprobs": choice.logprobs.then(|| json!({ "content": listed, "refusal": null })),
            "finish_reason": finish.as_ref().map(Finish::word),
        });
        Ok::<_, ApiError>((choice, json))
    });
    let done = try_join_all(all).await?;
    done.iter().for_each(|(choice, _)| choice.add(&mut usage));
    let choices: Vec<Value> = done.into_iter().map(|(_, json)| json).collect();
    Ok(Json(with(head, [("choices", json!(choices)), ("usage", usage.json())])).into_response())
}

fn stream(choices: Vec<Choice>, head: Value, mut usage: Usage, with_usage: bool) -> Response {
    sse::send(move |to| async move {
        let all = choices.into_iter().map(|mut choice| {
            let (to, head) = (to.clone(), head.clone());
            async move {
                let index = choice.index;
                let chunk = |delta: Value, logprobs: Value, finish: Option<&Finish>| {
                    let finish = finish.map(Finish::word);
                    let choice =
                        json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish });
                    with(head.clone(), [("choices", json!([choice]))])
                };
                to.json(&chunk(json!({ "role": "assistant", "content": "" }), Value::Null, None)).await;
                while let Some(piece) = choice.reply.next().await? {
                    let mut delta = json!({});
                    if !piece.told.reasoning.is_empty() {
                        delta["reasoning_content"] = json!(piece.told.reasoning);
                    }
                    if !piece.told.content.is_empty() {
                        delta["content"] = json!(piece.told.content);
                    }
                    let listed = choice.listed(&piece.tokens);
                    let says = delta != json!({}) || !listed.is_empty();
                    let listed = if choice.logprobs { json!({ "content": listed }) } else { Value::Null };
                    if says {
                        to.json(&chunk(delta, listed, None)).await;
                    }
                    if let Some(finish) = &piece.finish {
                        to.json(&chunk(json!({}), Value::Null, Some(finish))).await;
                    }
                }
                Ok::<_, ApiError>(choice)
            }
        });
        try_join_all(all).await?.iter().for_each(|choice| choice.add(&mut usage));
        if with_usage {
            to.json(&with(head, [("choices", json!([])), ("usage", usage.json())])).await;
        }
        to.text("[DONE]").await;
        Ok(())
    })
}
