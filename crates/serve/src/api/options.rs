//! What requests for text have in common: how tokens are chosen, how many, where an answer ends, states.

use crate::App;
use crate::constraint::Grammar;
use crate::errors::ApiError;
use crate::fields::{Fields, whole};
use anser_infer::engine::{Request, Start};
use anser_infer::{SamplerOrder, Sampling};
use serde_json::Value;
use std::collections::BTreeMap;

/// The most answers to one request, and the most prompts in it.
pub const MOST_ANSWERS: usize = 128;
/// The most stop texts.
const MOST_STOPS: usize = 16;

/// The common fields.
pub struct Options {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Seed of the first answer; the next ones count up.
    pub seed: u64,
    /// Answers to each prompt.
    pub n: usize,
    /// Texts before which an answer ends.
    pub stops: Vec<String>,
    /// Tokens that end it.
    pub stop_tokens: Vec<u32>,
    /// Whether it is sent as it is written.
    pub stream: bool,
    /// Whether the stream ends with the usage.
    pub usage: bool,
    /// Where it begins.
    pub start: Start,
    /// The name under which its state is kept.
    pub save_as: Option<String>,
    /// What may be written.
    pub grammar: Option<Grammar>,
}

impl Options {
    /// Reads them.
    ///
    /// # Errors
    /// When one is wrong.
    pub fn read(app: &App, f: &Fields) -> Result<Options, ApiError> {
        check_model(app, f)?;
        let n = f.whole("n", 1..=MOST_ANSWERS)?.unwrap_or(1);
        let stream = f.flag("stream")?;
        let usage = match f.object("stream_options")? {
            Some(_) if !stream => {
                return Err(ApiError::field("stream_options", "it is for requests with stream: true"));
            }
            Some(options) => Fields(options.clone()).flag("include_usage")?,
            None => false,
        };
        let save_as = f.text("save_as")?.map(String::from);
        if save_as.is_some() && n > 1 {
            return Err(ApiError::field("save_as", "it keeps the state of one answer: leave n out"));
        }
        let mut stop_tokens = token_list(f, "stop_token_ids")?;
        if !f.flag("ignore_eos")? {
            stop_tokens.push(app.tokenizer.end_of_document());
        }
        Ok(Options {
            sampling: sampling(f)?,
            seed: seed(f)?,
            n,
            stops: stops(f, "stop")?,
            stop_tokens,
            stream,
            usage,
            start: f.text("state")?.map_or(Start::Empty, |name| Start::Named(name.into())),
            save_as,
            grammar: app.grammars.read(f)?,
        })
    }

    /// A request for the answer of this number.
    pub fn request(&self, owner: &str, prompt: Vec<u32>, max_tokens: usize, number: usize) -> Request {
        Request {
            prompt,
            start: self.start.clone(),
            owner: owner.into(),
            sampling: self.sampling.clone(),
            seed: self.seed.wrapping_add(number as u64),
            max_tokens,
            stop_tokens: self.stop_tokens.clone(),
            save_as: self.save_as.clone(),
            constraint: self.grammar.as_ref().map(Grammar::begin),
            ..Request::default()
        }
    }
}

/// The model named must be the one that is served.
pub fn check_model(app: &App, f: &Fields) -> Result<(), ApiError> {
    match f.text("model")? {
        Some(name) if name != app.options.model => {
            let message = format!("model {name:?} is not served here: the model is {:?}", app.options.model);
            Err(ApiError { param: Some("model".into()), ..ApiError::not_found(message) })
        }
        _ => Ok(()),
    }
}

fn sampling(f: &Fields) -> Result<Sampling, ApiError> {
    Ok(Sampling {
        temperature: f.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        top_p: f.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
        top_k: f.whole("top_k", 0..=1 << 20)?.unwrap_or(0),
        min_p: f.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        presence_penalty: f.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: f.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        // OpenAI's counts don't decay.
        penalty_decay: f.number("penalty_decay", 0.0..=1.0)?.unwrap_or(1.0),
        seed: 0,
        order: match f.text("sampler_order")? {
            Some("rwkv") => SamplerOrder::Rwkv,
            Some("openai") | None => SamplerOrder::OpenAi,
            Some(_) => return Err(ApiError::field("sampler_order", "it must be rwkv or openai")),
        },
        logit_bias: bias(f)?,
    })
}

fn bias(f: &Fields) -> Result<BTreeMap<u32, f32>, ApiError> {
    let wrong = || ApiError::field("logit_bias", "it must map token ids to numbers from -100 to 100");
    let Some(map) = f.object("logit_bias")? else { return Ok(BTreeMap::new()) };
    let pair = |(token, bias): (&String, &Value)| {
        let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b))? as f32;
        Some((token.parse().ok()?, bias))
    };
    map.iter().map(|entry| pair(entry).ok_or_else(wrong)).collect()
}

fn seed(f: &Fields) -> Result<u64, ApiError> {
    match f.get("seed") {
        None => Ok(uuid::Uuid::new_v4().as_u64_pair().0),
        Some(v) => v
            .as_u64()
            .or(whole(v).map(|i| i as u64))
            .ok_or_else(|| ApiError::field("seed", "it must be a whole number of 64 bits")),
    }
}

/// One stop text or a list of them.
pub fn stops(f: &Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let wrong =
        || ApiError::field(name, format!("it must be a string or a list of at most {MOST_STOPS}, none of them empty"));
    let texts: Vec<&Value> = match f.get(name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= MOST_STOPS => list.iter().collect(),
        Some(one @ Value::String(_)) => vec![one],
        Some(_) => return Err(wrong()),
    };
    texts.iter().map(|v| v.as_str().filter(|s| !s.is_empty()).map(String::from).ok_or_else(wrong)).collect()
}

/// A list of token ids.
pub fn token_list(f: &Fields, name: &str) -> Result<Vec<u32>, ApiError> {
    let ids = f.list(name)?.map(|list| tokens(list));
    ids.unwrap_or(Some(Vec::new())).ok_or_else(|| ApiError::field(name, "it must be a list of token ids"))
}

/// Token ids; none if one isn't.
pub fn tokens(list: &[Value]) -> Option<Vec<u32>> {
    list.iter().map(|v| whole(v).and_then(|t| u32::try_from(t).ok())).collect()
}

/// Checks a prompt's length. An empty one begins a document, unless it goes on from a state.
pub fn checked_prompt(app: &App, mut prompt: Vec<u32>, start: &Start, name: &str) -> Result<Vec<u32>, ApiError> {
    if prompt.is_empty() && *start == Start::Empty {
        prompt.push(app.tokenizer.end_of_document());
    }
    let most = app.options.max_prompt;
    match prompt.len() > most {
        true => Err(ApiError::field(
            name,
            format!("it has {} tokens, more than this server takes ({most}, --max-prompt)", prompt.len()),
        )),
        false => Ok(prompt),
    }
}
