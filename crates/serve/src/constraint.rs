//! Answers of a given form: JSON, a JSON schema, a regular expression or a grammar, by llguidance.

use crate::errors::ApiError;
use crate::fields::Fields;
use anser_infer::engine::{Constraint, Next};
use anser_tokenizer::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::sync::{Arc, OnceLock};

/// Makes grammars over a tokenizer's vocabulary, which is prepared when the first one is asked for.
pub struct Grammars {
    tokenizer: Tokenizer,
    factory: OnceLock<Result<ParserFactory, String>>,
}

/// A form that answers may have.
pub struct Grammar(Matcher);

struct Vocabulary {
    tokenizer: Tokenizer,
    trie: TokTrie,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, s: &[u8]) -> Vec<TokenId> {
        self.tokenizer.encode(s)
    }
}

impl Grammars {
    /// Over this vocabulary.
    pub fn new(tokenizer: Tokenizer) -> Grammars {
        Grammars { tokenizer, factory: OnceLock::new() }
    }

    /// What a request asks for: `response_format`, `guided_json`, `guided_regex` or `guided_grammar` (Lark).
    ///
    /// # Errors
    /// When there are several, or it is no valid grammar.
    pub fn read(&self, f: &Fields) -> Result<Option<Grammar>, ApiError> {
        let mut asked = Vec::new();
        if let Some(schema) = response_format(f)? {
            asked.push(("response_format", of_schema(schema)));
        }
        match f.get("guided_json") {
            None => {}
            Some(schema @ Value::Object(_)) => asked.push(("guided_json", of_schema(schema.clone()))),
            Some(_) => return Err(ApiError::field("guided_json", "it must be a JSON schema")),
        }
        if let Some(regex) = f.text("guided_regex")? {
            asked.push(("guided_regex", TopLevelGrammar::from_regex(regex)));
        }
        if let Some(lark) = f.text("guided_grammar")? {
            asked.push(("guided_grammar", TopLevelGrammar::from_lark(lark.into())));
        }
        match asked.len() {
            0 => Ok(None),
            1 => asked.pop().map(|(name, grammar)| self.compile(name, grammar)).transpose(),
            _ => Err(ApiError::field(asked[1].0, format!("an answer has one form, and {} is given too", asked[0].0))),
        }
    }

    /// What a Lark grammar of our own allows; `name` is the field that it was made of.
    ///
    /// # Errors
    /// When a schema in it is none.
    pub fn lark(&self, name: &str, grammar: String) -> Result<Grammar, ApiError> {
        self.compile(name, TopLevelGrammar::from_lark(grammar))
    }

    fn compile(&self, name: &str, grammar: TopLevelGrammar) -> Result<Grammar, ApiError> {
        // A large schema takes long, which other requests are not to wait for.
        tokio::task::block_in_place(|| {
            let factory = self.factory.get_or_init(|| factory(self.tokenizer));
            let factory = factory.as_ref().map_err(ApiError::internal)?;
            let parser = factory.create_parser(grammar).map_err(|e| ApiError::field(name, format!("{e:#}")))?;
            let mut matcher = Matcher::new(Ok(parser));
            match matcher.compute_mask() {
                Ok(_) => Ok(Grammar(matcher)),
                Err(e) => Err(ApiError::field(name, format!("{e:#}"))),
            }
        })
    }
}

fn factory(tokenizer: Tokenizer) -> Result<ParserFactory, String> {
    let ids = 0..tokenizer.vocab_size() as u32;
    let words: Vec<Vec<u8>> = ids.map(|id| tokenizer.token(id).unwrap_or_default().to_vec()).collect();
    let info = TokRxInfo::new(words.len() as u32, tokenizer.end_of_document());
    let env: TokEnv = Arc::new(Vocabulary { tokenizer, trie: TokTrie::from(&info, &words) });
    let mut factory = ParserFactory::new_simple(&env).map_err(|e| e.to_string())?;
    factory.quiet();
    Ok(factory)
}

/// JSON in one line with single spaces, unless the schema says otherwise: small models like to write space without end.
fn of_schema(mut schema: Value) -> TopLevelGrammar {
    if let Value::Object(fields) = &mut schema {
        let line = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
        fields.entry("x-guidance").or_insert(line);
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// The schema that OpenAI's field asks for.
fn response_format(f: &Fields) -> Result<Option<Value>, ApiError> {
    let Some(format) = f.object("response_format")? else { return Ok(None) };
    if format.get("json_schema").is_some_and(|s| !s.is_object() && !s.is_null()) {
        return Err(ApiError::field("response_format.json_schema", "it must be an object"));
    }
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({ "type": "object" }))),
        Some("json_schema") => match format.get("json_schema").and_then(|s| s.get("schema")) {
            Some(schema @ Value::Object(_)) => Ok(Some(schema.clone())),
            _ => Err(ApiError::field("response_format.json_schema.schema", "it must be a JSON schema")),
        },
        _ => Err(ApiError::field("response_format.type", "it must be text, json_object or json_schema")),
    }
}

impl Grammar {
    /// For an answer that begins.
    pub fn begin(&self) -> Box<dyn Constraint> {
        Box::new(Grammar(self.0.deep_clone()))
    }
}

#[cfg(test)]
impl Grammar {
    /// Whether an answer may be this text.
    pub fn takes(&self, tokenizer: Tokenizer, text: &str) -> bool {
        let mut constraint = self.begin();
        let tokens = tokenizer.encode(text.as_bytes());
        for (i, token) in tokens.iter().enumerate() {
            let mut logits = vec![0.0; tokenizer.vocab_size() + 7];
            constraint.mask(&mut logits).unwrap();
            assert!(logits.contains(&0.0) && logits.ends_with(&[f32::NEG_INFINITY; 7]));
            if logits[*token as usize] != 0.0 {
                return false;
            }
            if constraint.accept(*token).unwrap() == Next::End {
                return i + 1 == tokens.len();
            }
        }
        let mut logits = vec![0.0; tokenizer.vocab_size()];
        constraint.mask(&mut logits).unwrap();
        logits[0] == 0.0
    }
}

impl Constraint for Grammar {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = self.0.compute_mask_or_eos().map_err(|e| e.to_string())?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if token >= allowed.len() || !allowed.is_allowed(token as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<Next, String> {
        self.0.consume_token(token).map_err(|e| e.to_string())?;
        Ok(if self.0.is_stopped() { Next::End } else { Next::More })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Option<Grammar>, ApiError> {
        Grammars::new(Tokenizer::world_4096()).read(&Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    fn takes(body: Value, text: &str) -> bool {
        read(body).unwrap().unwrap().takes(Tokenizer::world_4096(), text)
    }

    #[test]
    fn forms() {
        let schema = json!({ "type": "object", "properties": { "age": { "type": "integer" } }, "required": ["age"], "additionalProperties": false });
        let format =
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "a", "schema": schema } } });
        assert!(takes(format.clone(), r#"{"age": 41}"#));
        assert!(!takes(format.clone(), r#"{"age": "é"}"#) && !takes(format, r#"{"age": 4"#));
        assert!(takes(json!({ "guided_regex": "a+é" }), "aaaaé") && !takes(json!({ "guided_regex": "a+é" }), "b"));
        let lark = json!({ "guided_grammar": "start: \"yes\" | \"no\"" });
        assert!(takes(lark.clone(), "no") && !takes(lark, "maybe"));
        assert!(read(json!({ "response_format": { "type": "text" } })).unwrap().is_none());
    }

    #[test]
    fn what_is_no_grammar_is_said() {
        for (body, name) in [
            (json!({ "guided_regex": "a(" }), "guided_regex"),
            (json!({ "guided_grammar": "start: missing" }), "guided_grammar"),
            (json!({ "guided_json": 5 }), "guided_json"),
            (json!({ "guided_json": { "type": "nothing" } }), "guided_json"),
            (json!({ "guided_regex": "a", "guided_json": {} }), "guided_regex"),
            (json!({ "response_format": { "type": "xml" } }), "response_format.type"),
            (json!({ "response_format": { "type": "json_schema" } }), "response_format.json_schema.schema"),
            (json!({ "response_format": { "type": "text", "json_schema": 5 } }), "response_format.json_schema"),
        ] {
            let error = read(body.clone()).err().unwrap_or_else(|| panic!("{body}"));
            assert_eq!(error.param.as_deref(), Some(name));
        }
    }
}
