//! Conversations as OpenAI's and Anthropic's APIs have them, made ready for the model.

use super::options::{Options, checked_prompt};
use crate::App;
use crate::errors::ApiError;
use crate::fields::{Fields, kind};
use crate::template::{Message, Template};
use crate::tools::{self, Tools};
use anser_infer::chat::Think;
use serde_json::Value;

/// A conversation made ready for the model.
pub struct Turn {
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// How the answer is told from thoughts.
    pub think: Think,
    /// With the template's stop texts.
    pub options: Options,
    /// Whether tools may be called.
    pub tools: bool,
}

impl Turn {
    /// Applies the template. The model is told of the tools, unless what it goes on from has `told` it.
    ///
    /// # Errors
    /// When the template doesn't take the messages, they are too long, or a tool has no valid schema.
    pub fn new(
        app: &App, mut messages: Vec<Message>, think: Think, tools: Option<&Tools>, told: bool, mut options: Options,
    ) -> Result<Turn, ApiError> {
        let template = &app.options.template;
        if let Some(tools) = tools.filter(|_| !told) {
            let text = tools.prompt();
            match messages.first_mut().filter(|m| m.role == "system") {
                Some(system) => system.content += &format!("\n{text}"),
                None => messages.insert(0, Message { role: "system", content: text }),
            }
        }
        let prompt = template.prompt(&messages, think).map_err(|e| ApiError::field("messages", e))?;
        let prompt = checked_prompt(app, app.tokenizer.encode(prompt.as_bytes()), &options.start, "messages")?;
        // An answer that the client began, or a template of its own, has no thought begun by the prompt.
        let begun = matches!(template, Template::Rwkv) && messages.last().is_some_and(|m| m.role == "user");
        let think = if begun { think } else { Think::Off };
        if let Some(tools) = tools {
            if options.grammar.is_some() {
                return Err(ApiError::field("tools", "an answer of a given form calls none: leave one of them out"));
            }
            if tools.must_call() {
                // Nothing but the call is the answer.
                options.stops.clear();
            }
            options.grammar = Some(tools.grammar(&app.grammars, think)?);
        }
        options.stops.extend(template.stops().iter().map(|s| s.to_string()));
        Ok(Turn { prompt, think, options, tools: tools.is_some() })
    }
}

/// How the model is to think in OpenAI's words, from the field `name`.
///
/// # Errors
/// When it is none of them.
pub fn effort(app: &App, name: &str, word: Option<&str>) -> Result<Think, ApiError> {
    match word {
        None => Ok(app.options.think),
        Some("none") => Ok(Think::Off),
        Some("minimal") => Ok(Think::Fast),
        Some("low") => Ok(Think::Short),
        Some("medium") => Ok(Think::On),
        Some("high" | "xhigh") => Ok(Think::Long),
        Some(_) => Err(ApiError::field(name, "it must be none, minimal, low, medium or high")),
    }
}

/// How the model is to think: `think` by our names, or `other`. What a form allows begins with the answer.
///
/// # Errors
/// When it is none of them, or there is a form.
pub fn think(f: &Fields, options: &Options, other: Think) -> Result<Think, ApiError> {
    let think = f.text("think")?.map(str::parse).transpose().map_err(|e| ApiError::field("think", e))?;
    match (think, options.grammar.is_some()) {
        (Some(Think::Off) | None, true) => Ok(Think::Off),
        (Some(_), true) => Err(ApiError::field("think", "an answer of a given form has no thoughts: it must be off")),
        (think, false) => Ok(think.unwrap_or(other)),
    }
}

/// What is said next: parts of one turn, such as calls or their outputs, are one message.
pub fn say(messages: &mut Vec<Message>, role: &'static str, content: String) {
    match messages.last_mut().filter(|m| m.role == role) {
        Some(last) => last.content += &format!("\n{content}"),
        None => messages.push(Message { role, content }),
    }
}

/// The messages of a chat completion.
///
/// # Errors
/// When there are none, or one is wrong.
pub fn messages(f: &Fields) -> Result<Vec<Message>, ApiError> {
    let list = f.list("messages")?.filter(|l| !l.is_empty());
    let list = list.ok_or_else(|| ApiError::field("messages", "there must be at least one"))?;
    let mut all: Vec<Message> = Vec::new();
    let mut after_output = false;
    for (i, value) in list.iter().enumerate() {
        let at = format!("messages[{i}]");
        let is_output = value["role"] == "tool";
        match is_output {
            false => all.push(message(value, &at)?),
            true => {
                let text = tools::output(&content(&value["content"], &format!("{at}.content"))?);
                match after_output {
                    true => say(&mut all, "user", text),
                    false => all.push(Message { role: "user", content: text }),
                }
            }
        }
        after_output = is_output;
    }
    Ok(all)
}

/// A message; `at` is where it stands.
fn message(value: &Value, at: &str) -> Result<Message, ApiError> {
    let role = role(value, at)?;
    let calls = match value.get("tool_calls") {
        Some(Value::Array(calls)) if role == "assistant" => calls,
        None | Some(Value::Null) => &Vec::new(),
        Some(_) => return Err(ApiError::field(&format!("{at}.tool_calls"), "it must be a list, of the assistant's")),
    };
    let mut texts = Vec::new();
    if calls.is_empty() || value.get("content").is_some_and(|c| !c.is_null()) {
        texts.push(content(&value["content"], &format!("{at}.content"))?);
        texts.retain(|text| calls.is_empty() || !text.is_empty());
    }
    for (i, call) in calls.iter().enumerate() {
        let function = &call["function"];
        let is_function = call.get("type").is_none_or(|t| t == "function");
        let (Some(name), Some(arguments), true) =
            (function["name"].as_str(), function["arguments"].as_str(), is_function)
        else {
            let why = "it must be {\"type\": \"function\", \"function\": {\"name\": \"..\", \"arguments\": \"..\"}}";
            return Err(ApiError::field(&format!("{at}.tool_calls[{i}]"), why));
        };
        texts.push(tools::call(name, arguments));
    }
    Ok(Message { role, content: texts.join("\n") })
}

/// Who says a message.
///
/// # Errors
/// When it is nobody known.
pub fn role(value: &Value, at: &str) -> Result<&'static str, ApiError> {
    match value.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => Ok("system"),
        Some("user") => Ok("user"),
        Some("assistant") => Ok("assistant"),
        _ => Err(ApiError::field(
            &format!("{at}.role"),
            "it must be system, developer, user or assistant, and tool in chat completions alone",
        )),
    }
}

/// A text, or a list of parts that are text.
///
/// # Errors
/// When it is something else.
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
