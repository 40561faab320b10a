//! Tools that a model may call: what a request says of them, how they stand in a prompt, and what may be written.
//!
//! All templates have them in the same words, which every model can read, and which RWKV's "G1" models were trained on among others. The
//! system message ends with
//!
//! ````text
//! Tools:
//! {"name": "weather", "description": "Of a city", "parameters": {"type": "object", ..}}
//! To call a tool, write:
//! **Tool Call:**
//! ```json
//! {"name": "..", "arguments": {..}}
//! ```
//! ````
//!
//! A call in an answer looks the same, and what came of it is a message of the user's, `Function output:` and a line with the output. A grammar
//! lets nothing but a call follow the words `**Tool Call:**`.

use crate::constraint::{Grammar, Grammars};
use crate::errors::ApiError;
use crate::fields::{Fields, kind};
use anser_infer::chat::Think;
use serde_json::{Map, Value, json};

/// What a call begins with.
pub const MARKER: &str = "**Tool Call:**";
/// What stands between the marker and the name.
pub const BEFORE_NAME: &str = "\n```json\n{\"name\": \"";
/// What stands between the name and the arguments.
pub const BEFORE_ARGUMENTS: &str = "\", \"arguments\": ";
const AFTER_ARGUMENTS: &str = "}\n```";

/// The most tools in a request.
const MOST: usize = 128;

/// The tools of a request and how they may be called.
pub struct Tools {
    list: Vec<Tool>,
    choice: Choice,
    parallel: bool,
}

/// A tool.
pub struct Tool {
    name: String,
    description: Option<String>,
    /// The schema of the arguments.
    parameters: Map<String, Value>,
    /// Whether parts of the schema that no grammar has are an error; else they are left out.
    strict: bool,
}

/// Whether a tool must be called.
#[derive(Debug, PartialEq, Eq)]
pub enum Choice {
    /// The model chooses between a text and calls.
    Auto,
    /// It must call one.
    Any,
    /// It must call this one.
    Named(String),
    /// It cannot.
    None,
}

impl Tools {
    /// OpenAI's fields `tools`, `tool_choice` and `parallel_tool_calls`, of chat completions, where what is of a function is in an object
    /// `function`, or of responses, where it isn't. None where no tool may be called.
    ///
    /// # Errors
    /// When one is wrong.
    pub fn openai(f: &Fields) -> Result<Option<Tools>, ApiError> {
        let wrong = || {
            ApiError::field("tool_choice", "it must be none, auto, required or {\"type\": \"function\", \"name\": ..}")
        };
        let choice = match f.get("tool_choice") {
            None => Choice::Auto,
            Some(Value::String(word)) => match word.as_str() {
                "none" => Choice::None,
                "auto" => Choice::Auto,
                "required" => Choice::Any,
                _ => return Err(wrong()),
            },
            Some(object) if object["type"] == "function" => {
                let function = object.get("function").unwrap_or(object);
                Choice::Named(function["name"].as_str().ok_or_else(wrong)?.into())
            }
            Some(_) => return Err(wrong()),
        };
        let parallel = f.get("parallel_tool_calls").is_none() || f.flag("parallel_tool_calls")?;
        let tool = |value: &Value, at: &str| {
            if value["type"] != "function" {
                return Err(ApiError::field(
                    &format!("{at}.type"),
                    "it must be function: this server has no tools of its own",
                ));
            }
            let function = value.get("function").unwrap_or(value);
            Tool::read(function, "parameters", at)
        };
        Tools::new(f, tool, choice, parallel)
    }

    /// Anthropic's fields `tools` and `tool_choice`.
    ///
    /// # Errors
    /// When one is wrong.
    pub fn anthropic(f: &Fields) -> Result<Option<Tools>, ApiError> {
        let fields = Fields(f.object("tool_choice")?.cloned().unwrap_or_default());
        let inner = |e: ApiError| e.within("tool_choice");
        let choice = match fields.text("type").map_err(inner)?.unwrap_or("auto") {
            "none" => Choice::None,
            "auto" => Choice::Auto,
            "any" => Choice::Any,
            "tool" => match fields.text("name").map_err(inner)? {
                Some(name) => Choice::Named(name.into()),
                None => return Err(ApiError::field("tool_choice.name", "it is missing")),
            },
            _ => return Err(ApiError::field("tool_choice.type", "it must be auto, any, tool or none")),
        };
        let parallel = !fields.flag("disable_parallel_tool_use").map_err(inner)?;
        let tool = |value: &Value, at: &str| match value.get("type").and_then(Value::as_str) {
            None | Some("custom") => Tool::read(value, "input_schema", at),
            Some(_) => {
                Err(ApiError::field(&format!("{at}.type"), "it must be custom: this server has no tools of its own"))
            }
        };
        Tools::new(f, tool, choice, parallel)
    }

    fn new(
        f: &Fields, tool: impl Fn(&Value, &str) -> Result<Tool, ApiError>, choice: Choice, parallel: bool,
    ) -> Result<Option<Tools>, ApiError> {
        let given = f.list("tools")?.map_or(&[][..], |list| list);
        if given.len() > MOST {
            return Err(ApiError::field(
                "tools",
                format!("there may be {MOST} at most, and there are {}", given.len()),
            ));
        }
        let list = given.iter().enumerate().map(|(i, value)| tool(value, &format!("tools[{i}]")));
        let list: Vec<Tool> = list.collect::<Result<_, _>>()?;
        let names: std::collections::BTreeSet<&str> = list.iter().map(|t| t.name.as_str()).collect();
        if names.len() < list.len() {
            return Err(ApiError::field("tools", "two of them have the same name"));
        }
        match &choice {
            Choice::Named(name) if !names.contains(name.as_str()) => {
                Err(ApiError::field("tool_choice", format!("there is no tool {name:?} among the tools")))
            }
            Choice::Any if list.is_empty() => Err(ApiError::field("tool_choice", "there are no tools to call")),
            Choice::None => Ok(None),
            _ if list.is_empty() => Ok(None),
            _ => Ok(Some(Tools { list, choice, parallel })),
        }
    }

    /// What stands at the end of the system message.
    pub fn prompt(&self) -> String {
        let mut text = String::from("Tools:\n");
        for tool in &self.list {
            let mut about = json!({ "name": tool.name });
            if let Some(description) = &tool.description {
                about["description"] = json!(description);
            }
            about["parameters"] = json!(tool.parameters);
            text += &(line(&about) + "\n");
        }
        text + "To call a tool, write:\n" + &call("..", "{..}")
    }

    /// Whether an answer is a call whatever the model.
    pub fn must_call(&self) -> bool {
        matches!(self.choice, Choice::Any | Choice::Named(_))
    }

    /// What may be written after a prompt that ends as `think` has it.
    ///
    /// # Errors
    /// When a schema is none.
    pub fn grammar(&self, grammars: &Grammars, think: Think) -> Result<Grammar, ApiError> {
        grammars.lark("tools", self.lark(think))
    }

    fn lark(&self, think: Think) -> String {
        let marker = "\\*\\*Tool Call:\\*\\*";
        // The prompt has begun thoughts, which end before anything else.
        let (thoughts, rest) = match think {
            Think::Off => ("", ""),
            Think::Fast => ("", ">"),
            Think::On | Think::Short | Think::Long => ("thoughts ", ""),
        };
        let (text, lead) = match self.must_call() {
            true => ("", format!("lead: /{rest}[ \\n]{{0,2}}{marker}/")),
            false => ("text | ", format!("lead[lazy]: /(.|\\n)*{marker}/")),
        };
        // A model ends its turn with an empty line, which must not have to be another call.
        let calls = match self.parallel && !matches!(self.choice, Choice::Named(_)) {
            true => "call (\"\\n\" MARKER call)* \"\\n\\n\"?",
            false => "call",
        };
        let callable = |t: &&Tool| !matches!(&self.choice, Choice::Named(name) if *name != t.name);
        let callable: Vec<&Tool> = self.list.iter().filter(callable).collect();
        let names: Vec<String> = (0..callable.len()).map(|i| format!("tool_{i}")).collect();
        let mut lark = format!(
            "start: {thoughts}({text}lead {calls})\nthoughts[lazy]: /(.|\\n)*<\\/think>/\ntext: /(.|\\n)*/\n{lead}\n\
             MARKER: \"{MARKER}\"\ncall: {}\n",
            names.join(" | ")
        );
        for (tool, name) in callable.iter().zip(names) {
            let before = json!(format!("{BEFORE_NAME}{}{BEFORE_ARGUMENTS}", tool.name));
            lark += &format!("{name}: {before} %json {} {}\n", tool.schema(), json!(AFTER_ARGUMENTS));
        }
        lark
    }
}

impl Tool {
    fn read(value: &Value, schema: &str, at: &str) -> Result<Tool, ApiError> {
        let Value::Object(fields) = value else {
            return Err(ApiError::field(at, format!("it must be an object, and is {}", kind(value))));
        };
        let fields = Fields(fields.clone());
        let inner = |e: ApiError| e.within(at);
        let name = fields.text("name").map_err(inner)?.unwrap_or_default();
        let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if !(1..=128).contains(&name.len()) || !name.chars().all(good) {
            let why = format!("{name:?}: use 1 to 128 letters, digits, '_' and '-'");
            return Err(ApiError::field(&format!("{at}.name"), why));
        }
        let parameters = fields.object(schema).map_err(inner)?.cloned().unwrap_or_default();
        if parameters.get("type").is_some_and(|t| t != "object") {
            let why = "arguments are an object: its type must be object";
            return Err(ApiError::field(&format!("{at}.{schema}"), why));
        }
        let description = fields.text("description").map_err(inner)?.map(String::from);
        Ok(Tool { name: name.into(), description, parameters, strict: fields.flag("strict").map_err(inner)? })
    }

    /// The schema of arguments in one line. Properties that it doesn't name could go on without end, so there are none where it can be seen that it
    /// does well without.
    fn schema(&self) -> Value {
        let mut schema = self.parameters.clone();
        schema.insert("type".into(), json!("object"));
        let whole = |key: &str| !["allOf", "anyOf", "oneOf", "$ref", "patternProperties"].contains(&key);
        if schema.keys().all(|key| whole(key)) {
            schema.entry("additionalProperties").or_insert(json!(false));
        }
        let line = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ", "lenient": !self.strict });
        schema.insert("x-guidance".into(), line);
        Value::Object(schema)
    }
}

/// A call as it stands in an answer.
pub fn call(name: &str, arguments: &str) -> String {
    let arguments = if arguments.trim().is_empty() { "{}" } else { arguments.trim() };
    format!("{MARKER}{BEFORE_NAME}{name}{BEFORE_ARGUMENTS}{arguments}{AFTER_ARGUMENTS}")
}

/// JSON in one line with single spaces, as calls have it.
pub fn line(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let fields: Vec<String> = fields.iter().map(|(k, v)| format!("{}: {}", json!(k), line(v))).collect();
            format!("{{{}}}", fields.join(", "))
        }
        Value::Array(list) => format!("[{}]", list.iter().map(line).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}

/// What came of a call as it stands in the user's message.
pub fn output(text: &str) -> String {
    format!("Function output:\n{text}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anser_tokenizer::Tokenizer;

    fn tools(more: Value) -> Tools {
        let pattern = json!({ "type": "object", "properties": { "at": { "type": "string", "pattern": "^[0-9]+$" } } });
        let tool = |name: &str| json!({ "type": "function", "name": name, "parameters": pattern });
        let mut body = json!({ "tools": [tool("rain"), tool("snow")] });
        more.as_object().unwrap().iter().for_each(|(k, v)| body[k] = v.clone());
        Tools::openai(&Fields::parse(body.to_string().as_bytes()).unwrap()).unwrap().unwrap()
    }

    fn takes(more: Value, think: Think, text: &str) -> bool {
        let tokenizer = Tokenizer::world_4096();
        tools(more).grammar(&Grammars::new(tokenizer), think).unwrap().takes(tokenizer, text)
    }

    #[test]
    fn what_may_be_written() {
        let (rain, bad) = (call("rain", "{\"at\": \"5\"}"), call("rain", "{\"at\": \"x\"}"));
        let auto = |text: &str| takes(json!({}), Think::Off, text);
        assert!(auto("It **may** rain.\n\nOr ``` not") && auto(&format!(" Let me see.\n{rain}")));
        assert!(auto(&format!("{rain}\n{}\n\n", call("snow", "{}"))));
        assert!(!auto(&format!("Well. {bad}")) && !auto("A **Tool Call:** is") && !auto(&call("hail", "{}")));
        assert!(!auto(&format!("{rain}\nAnd so")));
        let must = |text: &str| takes(json!({ "tool_choice": "required" }), Think::Off, text);
        assert!(must(&format!(" {rain}")) && must(&format!("{rain}\n{rain}")) && !must("Well. ") && !must(&bad));
        let one = |text: &str| takes(json!({ "parallel_tool_calls": false }), Think::Off, text);
        assert!(one(&rain) && !one(&format!("{rain}\n{rain}")) && one("Well."));
        let named = json!({ "tool_choice": { "type": "function", "name": "snow" } });
        assert!(takes(named.clone(), Think::Off, &call("snow", "{}")) && !takes(named, Think::Off, &rain));
        // Thoughts may speak of calls.
        for choice in ["auto", "required"] {
            let takes = |think: Think, text: String| takes(json!({ "tool_choice": choice }), think, &text);
            assert!(takes(Think::On, format!(">\nA **Tool Call:** may do.</think>\n\n{rain}")));
            assert!(takes(Think::Fast, format!(">\n{rain}")) && !takes(Think::On, format!(">No.</think>{bad}")));
        }
    }

    #[test]
    fn schemas_of_arguments() {
        let tool = |parameters: Value, strict: bool| {
            let body =
                json!({ "tools": [{ "type": "function", "name": "a", "strict": strict, "parameters": parameters }] });
            let tools = Tools::openai(&Fields::parse(body.to_string().as_bytes()).unwrap())?.unwrap();
            tools.grammar(&Grammars::new(Tokenizer::world_4096()), Think::Off)
        };
        let odd = json!({ "type": "object", "properties": { "a": { "type": "string", "format": "colour" } } });
        assert!(tool(odd.clone(), false).is_ok() && tool(odd, true).is_err());
        let takes = |parameters: Value, arguments: &str| {
            tool(parameters, false).unwrap().takes(Tokenizer::world_4096(), &call("a", arguments))
        };
        let known = json!({ "properties": { "a": {} } });
        assert!(takes(known.clone(), "{\"a\": 1}") && !takes(known, "{\"b\": 1}"));
        assert!(takes(json!({ "anyOf": [{ "required": ["b"] }] }), "{\"b\": 1}") && takes(json!({}), "{}"));
        assert_eq!(
            line(&json!({ "a": [1, { "b": "c:d,e" }], "f": {} })),
            "{\"a\": [1, {\"b\": \"c:d,e\"}], \"f\": {}}"
        );
    }
}
