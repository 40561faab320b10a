//! `/v1/chat/completions`.

use super::completions::with;
use super::conversation::{Turn, effort, messages, think};
use super::options::Options;
use super::{Usage, id, now};
use crate::App;
use crate::answer::{Finish, bytes};
use crate::auth::Owner;
use crate::calls::{Call, CallPart, collect};
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::reply::Reply;
use crate::sse;
use crate::tools::Tools;
use anser_infer::engine::{Start, TokenLogprob};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::future::try_join_all;
use serde_json::{Value, json};

/// Answers a conversation.
pub async fn completions(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, f: Fields,
) -> Result<Response, ApiError> {
    f.refuse(&["functions", "function_call", "audio", "prediction", "web_search_options"])?;
    let options = Options::read(&app, &f)?;
    let best = f.whole("top_logprobs", 0..=20)?;
    let logprobs = f.flag("logprobs")?;
    if best.is_some() && !logprobs {
        return Err(ApiError::field("top_logprobs", "it is for requests with logprobs: true"));
    }
    let most = 1..=app.options.max_tokens;
    let max_tokens = f.whole("max_completion_tokens", most.clone())?.or(f.whole("max_tokens", most)?);
    let max_tokens = max_tokens.unwrap_or(app.options.max_tokens);
    let think = think(&f, &options, effort(&app, "reasoning_effort", f.text("reasoning_effort")?)?)?;
    let tools = Tools::openai(&f)?;
    // A state has what was said of them.
    let told = options.start != Start::Empty;
    let turn = Turn::new(&app, messages(&f)?, think, tools.as_ref(), told, options)?;
    let mut choices = Vec::new();
    for number in 0..turn.options.n {
        let mut request = turn.options.request(&owner, turn.prompt.clone(), max_tokens, number);
        request.logprobs = logprobs.then_some(best.unwrap_or(0));
        let reply = Reply::start(&app, request, &turn).await?;
        choices.push(Choice { reply, app: app.clone(), index: number, logprobs });
    }
    let prompt = turn.prompt.len();
    let head = json!({ "id": id("chatcmpl-"), "created": now(), "model": app.options.model });
    if turn.options.stream {
        let head = with(head, [("object", json!("chat.completion.chunk"))]);
        return Ok(stream(choices, head, prompt, turn.options.usage));
    }
    whole(choices, with(head, [("object", json!("chat.completion"))]), prompt).await
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

    /// OpenAI's word for why it ended.
    fn word(&self, finish: &Finish) -> &'static str {
        if self.reply.called() && *finish == Finish::Stop { "tool_calls" } else { finish.word() }
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

fn call(call: &Call) -> Value {
    json!({ "id": call.id, "type": "function", "function": { "name": call.name, "arguments": call.arguments } })
}

/// A piece of the call of this index, counted from 1, in the shape of a delta.
fn call_delta(part: CallPart, index: &mut usize) -> Value {
    let mut json = match part {
        CallPart::Begin { id, name } => {
            *index += 1;
            json!({ "id": id, "type": "function", "function": { "name": name, "arguments": "" } })
        }
        CallPart::Arguments(text) => json!({ "function": { "arguments": text } }),
    };
    json["index"] = json!(index.saturating_sub(1));
    json
}

async fn whole(choices: Vec<Choice>, head: Value, prompt: usize) -> Result<Response, ApiError> {
    let all = choices.into_iter().map(|mut choice| async move {
        let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), Vec::new());
        let (mut listed, mut finish) = (Vec::new(), None);
        while let Some(piece) = choice.reply.next().await? {
            reasoning += &piece.reasoning;
            content += &piece.content;
            piece.calls.into_iter().for_each(|part| collect(&mut calls, part));
            listed.extend(choice.listed(&piece.tokens));
            finish = piece.finish;
        }
        let said = (calls.is_empty() || !content.is_empty()).then_some(content);
        let mut message = json!({ "role": "assistant", "content": said, "refusal": null });
        if !reasoning.is_empty() {
            message["reasoning_content"] = json!(reasoning);
        }
        if !calls.is_empty() {
            message["tool_calls"] = calls.iter().map(call).collect();
        }
        let json = json!({
            "index": choice.index,
            "message": message,
            "logprobs": choice.logprobs.then(|| json!({ "content": listed, "refusal": null })),
            "finish_reason": finish.as_ref().map(|f| choice.word(f)),
        });
        Ok::<_, ApiError>((choice, json))
    });
    let done = try_join_all(all).await?;
    let (usages, choices): (Vec<Usage>, Vec<Value>) =
        done.into_iter().map(|(choice, json)| (choice.reply.usage(prompt), json)).unzip();
    let usage = Usage::total(&usages, usages.len());
    Ok(Json(with(head, [("choices", json!(choices)), ("usage", usage.json())])).into_response())
}

fn stream(choices: Vec<Choice>, head: Value, prompt: usize, with_usage: bool) -> Response {
    sse::send(move |to| async move {
        let all = choices.into_iter().map(|mut choice| {
            let (to, head) = (to.clone(), head.clone());
            async move {
                let index = choice.index;
                let mut calls = 0;
                let chunk = |delta: Value, logprobs: Value, finish: Option<&'static str>| {
                    let choice =
                        json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish });
                    with(head.clone(), [("choices", json!([choice]))])
                };
                to.json(&chunk(json!({ "role": "assistant", "content": "" }), Value::Null, None)).await;
                while let Some(piece) = choice.reply.next().await? {
                    let mut delta = json!({});
                    if !piece.reasoning.is_empty() {
                        delta["reasoning_content"] = json!(piece.reasoning);
                    }
                    if !piece.content.is_empty() {
                        delta["content"] = json!(piece.content);
                    }
                    if !piece.calls.is_empty() {
                        delta["tool_calls"] =
                            piece.calls.into_iter().map(|part| call_delta(part, &mut calls)).collect();
                    }
                    let listed = choice.listed(&piece.tokens);
                    let says = delta != json!({}) || !listed.is_empty();
                    let listed = if choice.logprobs { json!({ "content": listed }) } else { Value::Null };
                    if says {
                        to.json(&chunk(delta, listed, None)).await;
                    }
                    if let Some(finish) = &piece.finish {
                        to.json(&chunk(json!({}), Value::Null, Some(choice.word(finish)))).await;
                    }
                }
                Ok::<_, ApiError>(choice.reply.usage(prompt))
            }
        });
        let usages = try_join_all(all).await?;
        if with_usage {
            let usage = Usage::total(&usages, usages.len());
            to.json(&with(head, [("choices", json!([])), ("usage", usage.json())])).await;
        }
        to.text("[DONE]").await;
        Ok(())
    })
}
