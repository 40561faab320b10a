//! Calls of tools, by a model that knows nothing: whatever it writes must be a valid call.

mod common;

use common::Server;
use serde_json::{Value, json};

/// A tool whose arguments are soon at their end.
fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "place": { "$ref": "#/$defs/place" },
            "days": { "type": "integer", "minimum": 1, "maximum": 9 },
            "unit": { "enum": ["C", "F"] },
        },
        "required": ["place", "days"],
        "$defs": { "place": { "type": "string", "maxLength": 6 } },
        "additionalProperties": false,
    })
}

fn chat(more: Value) -> Value {
    let function = json!({ "name": "weather", "description": "Of a place", "parameters": schema() });
    let stop = json!({ "name": "stop", "parameters": { "type": "object", "properties": {} } });
    let tools = json!([{ "type": "function", "function": function }, { "type": "function", "function": stop }]);
    with(json!({ "messages": [{ "role": "user", "content": "Rain?" }], "max_tokens": 600, "tools": tools }), more)
}

fn with(mut body: Value, more: Value) -> Value {
    more.as_object().unwrap().iter().for_each(|(k, v)| body[k] = v.clone());
    body
}

fn check_arguments(name: &str, arguments: &Value) {
    let fields = arguments.as_object().unwrap();
    if name == "stop" {
        return assert!(fields.is_empty());
    }
    assert_eq!(name, "weather");
    assert!(fields["place"].as_str().unwrap().chars().count() <= 6, "{arguments}");
    assert!((1..=9).contains(&fields["days"].as_i64().unwrap()), "{arguments}");
    assert!(fields.get("unit").is_none_or(|u| u == "C" || u == "F") && fields.len() <= 3, "{arguments}");
}

/// The calls of a message, each checked.
fn calls(message: &Value) -> Vec<(String, String)> {
    let all = message["tool_calls"].as_array().unwrap().iter().map(|call| {
        let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
        let (name, arguments) = (name.as_str().unwrap().to_string(), arguments.as_str().unwrap().to_string());
        check_arguments(&name, &serde_json::from_str(&arguments).unwrap_or_else(|e| panic!("{arguments}: {e}")));
        assert!(call["type"] == "function" && call["id"].as_str().unwrap().starts_with("call_"));
        (name, arguments)
    });
    all.collect()
}

#[test]
fn a_model_that_must_call_calls() {
    let s = Server::random();
    let mut most = 0;
    for seed in 0..6 {
        let answer = s.post("/v1/chat/completions", chat(json!({ "seed": seed, "tool_choice": "required" })));
        let choice = &answer["choices"][0];
        // Calls may go on and on; each but one that the limit cuts is whole.
        if choice["finish_reason"] == "tool_calls" {
            most = most.max(calls(&choice["message"]).len());
        }
        assert!(choice["message"]["content"].is_null(), "{answer}");
        let one = json!({ "seed": seed, "tool_choice": "required", "parallel_tool_calls": false, "stop": ["a", "\n"] });
        let answer = s.post("/v1/chat/completions", chat(one));
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{answer}");
        assert_eq!(calls(&answer["choices"][0]["message"]).len(), 1);
        let named = json!({ "seed": seed, "tool_choice": { "type": "function", "function": { "name": "weather" } } });
        let answer = s.post("/v1/chat/completions", chat(named));
        let named = calls(&answer["choices"][0]["message"]);
        assert!(named.len() == 1 && named[0].0 == "weather");
        // Thoughts come before.
        let thinks = json!({ "seed": seed, "tool_choice": "required", "think": "fast", "parallel_tool_calls": false });
        let answer = s.post("/v1/chat/completions", chat(thinks));
        assert_eq!(calls(&answer["choices"][0]["message"]).len(), 1, "{answer}");
    }
    assert!(most > 0);
}

#[test]
fn calls_in_pieces() {
    let s = Server::random();
    let one = json!({ "seed": 3, "tool_choice": { "type": "function", "function": { "name": "weather" } } });
    let whole = s.post("/v1/chat/completions", chat(one.clone()));
    let events = s.events("/v1/chat/completions", chat(with(one, json!({ "stream": true }))));
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let deltas: Vec<&Value> =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"]["tool_calls"].as_array()).flatten().collect();
    assert!(deltas.len() > 2 && deltas.iter().all(|d| d["index"] == 0));
    assert!(deltas[0]["id"].is_string() && deltas[0]["type"] == "function" && deltas[1].get("id").is_none());
    let arguments: String = deltas.iter().map(|d| d["function"]["arguments"].as_str().unwrap()).collect();
    let call = (deltas[0]["function"]["name"].as_str().unwrap().to_string(), arguments);
    assert_eq!(vec![call], calls(&whole["choices"][0]["message"]));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn a_limit_within_a_call_is_said() {
    let s = Server::random();
    let answer =
        s.post("/v1/chat/completions", chat(json!({ "tool_choice": "required", "max_tokens": 25, "seed": 1 })));
    assert_eq!(answer["choices"][0]["finish_reason"], "length", "{answer}");
    let message = &answer["choices"][0]["message"];
    let cut = message["tool_calls"][0]["function"]["arguments"].as_str().unwrap_or_default();
    assert!(serde_json::from_str::<Value>(cut).is_err(), "{answer}");
}

#[test]
fn a_model_that_may_call_may_write() {
    let s = Server::random();
    let free = s.post("/v1/chat/completions", chat(json!({ "max_tokens": 40, "seed": 1 })));
    assert!(free["choices"][0]["message"]["content"].as_str().is_some_and(|c| !c.is_empty()), "{free}");
    assert!(free["choices"][0]["message"].get("tool_calls").is_none());
}

#[test]
fn a_model_that_begins_a_call_ends_it() {
    let s = Server::plain();
    // A small model does once more what was done all the time.
    let call = json!({ "type": "function", "function": { "name": "stop", "arguments": "{}" } });
    let turn = [
        json!({ "role": "user", "content": "Again." }),
        json!({ "role": "assistant", "content": null, "tool_calls": [call] }),
    ];
    let messages: Vec<&Value> = turn.iter().cycle().take(41).collect();
    // A stop text within the call doesn't end it.
    let more = json!({ "messages": messages, "temperature": 0, "parallel_tool_calls": false, "stop": ["}"] });
    let answer = s.post("/v1/chat/completions", chat(more));
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{answer}");
    assert_eq!(calls(&answer["choices"][0]["message"]).len(), 1, "{answer}");
}

#[test]
fn anthropic_calls() {
    let s = Server::random();
    let weather = json!({ "name": "weather", "input_schema": schema() });
    let choice = json!({ "type": "any", "disable_parallel_tool_use": true });
    let messages = json!([{ "role": "user", "content": "Rain?" }]);
    let ask = json!({ "messages": messages, "max_tokens": 600, "seed": 5, "tools": [weather], "tool_choice": choice });
    let whole = s.post("/v1/messages", ask.clone());
    assert_eq!((&whole["stop_reason"], whole["content"].as_array().unwrap().len()), (&json!("tool_use"), 1), "{whole}");
    let call = &whole["content"][0];
    assert_eq!(call["type"], "tool_use");
    check_arguments(call["name"].as_str().unwrap(), &call["input"]);
    let events = s.events("/v1/messages", with(ask.clone(), json!({ "stream": true })));
    let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    assert_eq!(
        events[1]["content_block"],
        json!({ "type": "tool_use", "id": events[1]["content_block"]["id"], "name": "weather", "input": {} })
    );
    let input: String = events.iter().filter_map(|e| e["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&input).unwrap(), call["input"]);
    let kinds: Vec<_> =
        events.iter().map(|e| e["type"].as_str().unwrap()).filter(|k| *k != "content_block_delta").collect();
    assert_eq!(kinds, ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]);
    assert_eq!(events[events.len() - 2]["delta"]["stop_reason"], "tool_use");

    // What came of the call goes back.
    let output =
        json!({ "type": "tool_result", "tool_use_id": call["id"], "content": [{ "type": "text", "text": "Sun" }] });
    let more = json!([
        messages[0], { "role": "assistant", "content": whole["content"] }, { "role": "user", "content": [output] },
    ]);
    s.post("/v1/messages", with(ask, json!({ "messages": more, "tool_choice": { "type": "none" } })));
}

#[test]
fn a_conversation_with_calls_is_one_prompt() {
    let s = Server::random();
    let call = |id: &str, city: &str| {
        let arguments = format!("{{\"place\": \"{city}\", \"days\": 1}}");
        json!({ "id": id, "type": "function", "function": { "name": "weather", "arguments": arguments } })
    };
    let messages = json!([
        { "role": "user", "content": "Rain?" },
        { "role": "assistant", "content": null, "tool_calls": [call("a", "Rome"), call("b", "Oslo")] },
        { "role": "tool", "tool_call_id": "a", "content": "Sun" },
        { "role": "tool", "tool_call_id": "b", "content": "Snow" },
    ]);
    let read = |body: Value| s.post("/v1/chat/completions", body)["usage"]["prompt_tokens"].as_u64().unwrap();
    let one = |city: &str| {
        format!(
            "**Tool Call:**\n```json\n{{\"name\": \"weather\", \"arguments\": {{\"place\": \"{city}\", \"days\": 1}}}}\n```"
        )
    };
    let prompt = format!(
        "User: Rain?\n\nAssistant: {}\n{}\n\nUser: Function output:\nSun\nFunction output:\nSnow\n\nAssistant:",
        one("Rome"),
        one("Oslo")
    );
    let count = s.post("/tokenize", json!({ "prompt": prompt }))["count"].as_u64().unwrap();
    assert_eq!(read(json!({ "messages": messages, "max_tokens": 1 })), count);
    // The tools stand before it, unless none may be called.
    assert!(read(chat(json!({ "messages": messages, "max_tokens": 1 }))) > count + 50);
    assert_eq!(read(chat(json!({ "messages": messages, "max_tokens": 1, "tool_choice": "none" }))), count);
}

#[test]
fn what_is_wrong_with_tools_is_said() {
    let s = Server::random();
    let tools = |value: Value| json!({ "tools": value });
    for (more, param) in [
        (tools(json!([5])), "tools[0].type"),
        (tools(json!([{ "type": "web_search" }])), "tools[0].type"),
        (tools(json!([{ "type": "function", "function": { "name": "a b" } }])), "tools[0].name"),
        (
            tools(json!([{ "type": "function", "function": { "name": "a", "parameters": { "type": "array" } } }])),
            "tools[0].parameters",
        ),
        (
            tools(json!([{ "type": "function", "function": { "name": "a", "parameters": { "properties": 5 } } }])),
            "tools",
        ),
        (json!({ "tool_choice": "always" }), "tool_choice"),
        (json!({ "tool_choice": { "type": "function", "function": { "name": "other" } } }), "tool_choice"),
        (json!({ "tools": [], "tool_choice": "required" }), "tool_choice"),
        (json!({ "parallel_tool_calls": 1 }), "parallel_tool_calls"),
        (json!({ "guided_regex": "a" }), "tools"),
        (json!({ "messages": [{ "role": "user", "content": "a", "tool_calls": [] }] }), "messages[0].tool_calls"),
        (json!({ "messages": [{ "role": "assistant", "tool_calls": [{}] }] }), "messages[0].tool_calls[0]"),
        (json!({ "messages": [{ "role": "tool" }] }), "messages[0].content"),
    ] {
        let (status, error) = s.refused("/v1/chat/completions", &chat(more.clone()).to_string());
        assert_eq!((status, error["error"]["param"].as_str()), (400, Some(param)), "{more} {error}");
    }
}
