//! `/v1/completions`.

use super::options::{self, MOST_ANSWERS, Options, checked_prompt};
use super::{Usage, id, now};
use crate::App;
use crate::answer::{Answer, Finish, Part, Text, bytes};
use crate::auth::Owner;
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::sse;
use anser_infer::engine::{Request, TokenLogprob};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::future::try_join_all;
use serde_json::{Map, Value, json};

/// The most log probabilities beside each token.
const MOST_LOGPROBS: usize = 20;

/// Continues prompts.
pub async fn completions(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, f: Fields,
) -> Result<Response, ApiError> {
    f.refuse(&["suffix"])?;
    let options = Options::read(&app, &f)?;
    if f.whole("best_of", 1..=MOST_ANSWERS)?.is_some_and(|best| best != options.n) {
        return Err(ApiError::field("best_of", "it must be n, or left out"));
    }
    let echo = f.flag("echo")?;
    let logprobs = f.whole("logprobs", 0..=MOST_LOGPROBS)?;
    let max_tokens = f.whole("max_tokens", 0..=app.options.max_tokens)?.unwrap_or(16.min(app.options.max_tokens));
    let prompts = prompts(&app, &f, &options)?;
    if max_tokens == 0 && !echo {
        return Err(ApiError::field("max_tokens", "0 is for requests with echo: true"));
    }
    let asked = (0..prompts.len() * options.n).map(|number| {
        let prompt = prompts[number / options.n].clone();
        let echoed = if echo { prompt.clone() } else { Vec::new() };
        let mut request = options.request(&owner, prompt, max_tokens, number);
        request.logprobs = logprobs;
        request.prompt_logprobs = logprobs.filter(|_| echo);
        if max_tokens == 0 && logprobs.is_none() {
            // The engine reads a prompt only for something that comes of it.
            request.prompt_logprobs = Some(0);
        }
        if echo && logprobs.is_some() && max_tokens == 1 {
            // Evaluations score prompts so, and count on one token after them.
            request.stop_tokens.clear();
        }
        (request, echoed)
    });
    let mut choices = Vec::new();
    for (index, (request, echoed)) in asked.enumerate() {
        choices.push(Choice::start(&app, request, index, echoed, &options, logprobs).await?);
    }
    let head = json!({ "id": id("cmpl-"), "object": "text_completion", "created": now(), "model": app.options.model });
    if options.stream {
        return Ok(stream(choices, head, options.n, options.usage));
    }
    let done = try_join_all(choices.into_iter().map(Choice::whole)).await?;
    let (usages, choices): (Vec<Usage>, Vec<Value>) = done.into_iter().unzip();
    let usage = Usage::total(&usages, options.n);
    Ok(Json(with(head, [("choices", json!(choices)), ("usage", usage.json())])).into_response())
}

/// An object with more fields.
pub fn with<const N: usize>(mut object: Value, fields: [(&str, Value); N]) -> Value {
    for (name, value) in fields {
        object[name] = value;
    }
    object
}

/// The prompts: a text, token ids, or a list of either.
fn prompts(app: &App, f: &Fields, options: &Options) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = || ApiError::field("prompt", "it must be a string, a list of token ids, or a list of either");
    let one = |v: &Value| match v {
        Value::String(s) => Some(app.tokenizer.encode(s.as_bytes())),
        Value::Array(list) => options::tokens(list),
        _ => None,
    };
    let all: Vec<Vec<u32>> = match f.get("prompt") {
        None => vec![Vec::new()],
        Some(text @ Value::String(_)) => vec![one(text).ok_or_else(wrong)?],
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_number) => {
            vec![options::tokens(list).ok_or_else(wrong)?]
        }
        Some(Value::Array(list)) => list.iter().map(|v| one(v).ok_or_else(wrong)).collect::<Result<_, _>>()?,
        Some(_) => return Err(wrong()),
    };
    if all.is_empty() || all.len() * options.n > MOST_ANSWERS {
        return Err(ApiError::field(
            "prompt",
            format!("from 1 to {MOST_ANSWERS} answers may be asked for in one request"),
        ));
    }
    if all.len() > 1 && options.save_as.is_some() {
        return Err(ApiError::field("save_as", "it keeps the state of one answer: give one prompt"));
    }
    all.into_iter().map(|p| checked_prompt(app, p, &options.start, "prompt")).collect()
}

/// One answer on its way.
struct Choice {
    answer: Answer,
    app: App,
    index: usize,
    /// The prompt, where it is to be sent back.
    echo: Vec<u32>,
    logprobs: Option<usize>,
    /// Characters of text sent, which is what offsets count.
    offset: usize,
    /// Tokens of the prompt, and how many of them were cached.
    prompt: usize,
    cached: usize,
}

impl Choice {
    async fn start(
        app: &App, request: Request, index: usize, echo: Vec<u32>, options: &Options, logprobs: Option<usize>,
    ) -> Result<Choice, ApiError> {
        let prompt = request.prompt.len();
        let answer = Answer::start(app, request, &options.stops, None, "").await?;
        Ok(Choice { answer, app: app.clone(), index, echo, logprobs, offset: 0, prompt, cached: 0 })
    }

    /// What a part adds, in the shape of a choice: text, and before it the prompt with the log probabilities of its tokens.
    fn json(&mut self, text: Text, echoed: Vec<TokenLogprob>, echo: Vec<u32>, finish: Option<&Finish>) -> Value {
        let mut listed = Logprobs::default();
        let mut whole = String::new();
        if !echo.is_empty() {
            whole = String::from_utf8_lossy(&self.app.tokenizer.decode(&echo).unwrap_or_default()).into_owned();
            let mut at = self.offset;
            // Nothing predicts the first token, unless a state stands before it.
            let unknown = echo.len() - echoed.len().min(echo.len());
            for token in &echo[..unknown] {
                listed.push(&self.app, *token, None, &mut at);
            }
            echoed.iter().for_each(|t| listed.push(&self.app, t.token, Some(t), &mut at));
        }
        let mut at = self.offset + whole.chars().count();
        text.tokens.iter().for_each(|t| listed.push(&self.app, t.token, Some(t), &mut at));
        whole += &text.text;
        self.offset += whole.chars().count();
        json!({
            "index": self.index,
            "text": whole,
            "logprobs": self.logprobs.map(|_| listed.json()),
            "finish_reason": finish.map(Finish::word),
        })
    }

    /// The next piece in the shape of a choice.
    async fn next(&mut self) -> Result<Option<Value>, ApiError> {
        let (text, echoed, echo, finish) = match self.answer.next().await? {
            Some(Part::Prompt { cached, logprobs, .. }) => {
                self.cached = cached;
                (Text::default(), logprobs, std::mem::take(&mut self.echo), None)
            }
            Some(Part::Text(text)) => (text, Vec::new(), Vec::new(), None),
            Some(Part::End(text, finish)) => (text, Vec::new(), Vec::new(), Some(finish)),
            None => return Ok(None),
        };
        Ok(Some(self.json(text, echoed, echo, finish.as_ref())))
    }

    fn usage(&self) -> Usage {
        Usage { prompt: self.prompt, cached: self.cached, written: self.answer.written, reasoning: 0 }
    }

    async fn whole(mut self) -> Result<(Usage, Value), ApiError> {
        let mut whole = Value::Null;
        while let Some(piece) = self.next().await? {
            if whole.is_null() {
                whole = piece;
            } else {
                append(&mut whole, piece);
            }
        }
        Ok((self.usage(), whole))
    }
}

/// Texts and lists grow, objects field by field; anything else is replaced.
fn append(whole: &mut Value, piece: Value) {
    match (whole, piece) {
        (Value::String(a), Value::String(b)) => *a += &b,
        (Value::Array(a), Value::Array(b)) => a.extend(b),
        (Value::Object(a), Value::Object(b)) => b.into_iter().for_each(|(k, v)| append(&mut a[&k], v)),
        (a, b) => *a = b,
    }
}

/// The log probabilities of tokens in the shape of completions.
#[derive(Default)]
struct Logprobs {
    tokens: Vec<String>,
    logprobs: Vec<Option<f32>>,
    best: Vec<Option<Map<String, Value>>>,
    offsets: Vec<usize>,
}

impl Logprobs {
    fn push(&mut self, app: &App, token: u32, known: Option<&TokenLogprob>, at: &mut usize) {
        let text = name(app, token);
        self.offsets.push(*at);
        // A token that ends within a character counts where it begins.
        *at += bytes(&app.tokenizer, token).iter().filter(|b| (**b as i8) >= -64).count();
        self.tokens.push(text);
        self.logprobs.push(known.map(|t| t.logprob));
        self.best.push(known.map(|t| {
            let mut map = Map::new();
            for (token, logprob) in &t.best {
                map.entry(name(app, *token)).or_insert(json!(logprob));
            }
            map
        }));
    }

    fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.logprobs,
            "top_logprobs": self.best,
            "text_offset": self.offsets,
        })
    }
}

/// A token as text; one that is not whole characters as `bytes:\xe4\xbd`, as OpenAI writes it.
pub fn name(app: &App, token: u32) -> String {
    let bytes = bytes(&app.tokenizer, token);
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => bytes.iter().fold("bytes:".into(), |s, b| format!("{s}\\x{b:02x}")),
    }
}

fn stream(choices: Vec<Choice>, head: Value, n: usize, with_usage: bool) -> Response {
    sse::send(move |to| async move {
        let all = choices.into_iter().map(|mut choice| {
            let (to, head) = (to.clone(), head.clone());
            async move {
                while let Some(piece) = choice.next().await? {
                    let empty = piece["text"] == "" && piece["finish_reason"].is_null() && choice.offset == 0;
                    if !empty && !to.json(&with(head.clone(), [("choices", json!([piece]))])).await {
                        break;
                    }
                }
                Ok::<_, ApiError>(choice.usage())
            }
        });
        let usages = try_join_all(all).await?;
        if with_usage {
            let usage = Usage::total(&usages, n);
            to.json(&with(head, [("choices", json!([])), ("usage", usage.json())])).await;
        }
        to.text("[DONE]").await;
        Ok(())
    })
}
