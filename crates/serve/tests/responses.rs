//! `/v1/responses` as a client meets it.

mod common;

use common::Server;
use serde_json::{Value, json};

fn ask(more: Value) -> Value {
    let mut body = json!({ "input": "Who are you?", "max_output_tokens": 16, "temperature": 0 });
    more.as_object().unwrap().iter().for_each(|(k, v)| body[k] = v.clone());
    body
}

fn text(response: &Value) -> String {
    let content = &response["output"].as_array().unwrap().last().unwrap()["content"][0];
    assert_eq!(content["type"], "output_text", "{response}");
    content["text"].as_str().unwrap().into()
}

#[test]
fn a_response_is_a_chat_completion() {
    let s = Server::plain();
    let user = json!({ "role": "user", "content": "Who are you?" });
    let system = json!({ "role": "system", "content": "Be brief." });
    let body = json!({ "messages": [system, user], "max_tokens": 16, "temperature": 0 });
    let chat = s.post("/v1/chat/completions", body);
    let parts =
        json!([{ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "Who are you?" }] }]);
    for input in [json!("Who are you?"), json!([user]), parts] {
        let response = s.post("/v1/responses", ask(json!({ "input": input, "instructions": "Be brief." })));
        assert_eq!(text(&response), chat["choices"][0]["message"]["content"]);
        assert_eq!(response["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
        assert_eq!(
            (&response["status"], &response["incomplete_details"]["reason"]),
            (&json!("incomplete"), &json!("max_output_tokens"))
        );
    }
    let schema = json!({ "type": "object", "properties": { "a": { "type": "boolean" } }, "required": ["a"], "additionalProperties": false });
    let format = json!({ "format": { "type": "json_schema", "name": "x", "schema": schema } });
    let response = s.post("/v1/responses", ask(json!({ "text": format })));
    assert!(serde_json::from_str::<Value>(&text(&response)).unwrap()["a"].is_boolean());
    assert_eq!((&response["status"], &response["error"]), (&json!("completed"), &Value::Null));
}

#[test]
fn conversations_go_on() {
    let s = Server::plain();
    let first = s.post("/v1/responses", ask(json!({ "metadata": { "a": "b" } })));
    let id = first["id"].as_str().unwrap();
    assert_eq!(s.get(&format!("/v1/responses/{id}")), first);
    // What was said is not read again, but for the answer's last token and the end of its turn.
    let before = s.engine.stats();
    let next = s.post("/v1/responses", ask(json!({ "input": "Why?", "previous_response_id": id })));
    let read = s.engine.stats().tokens_read - before.tokens_read - 15;
    let prompt = format!("User: Who are you?\n\nAssistant: {}\n\nUser: Why?\n\nAssistant:", text(&first));
    let whole = json!({ "prompt": prompt, "max_tokens": 16, "temperature": 0, "stop": ["\n\nUser:"] });
    assert_eq!(text(&next), s.post("/v1/completions", whole)["choices"][0]["text"].as_str().unwrap().trim_start());
    let cached = next["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached > 15 && read <= 12 && next["usage"]["input_tokens"] == cached + read, "{read} {next}");

    let path = format!("/v1/responses/{id}");
    assert_eq!(s.call("DELETE", &path, None, "").body_mut().read_json::<Value>().unwrap()["deleted"], true);
    assert_eq!(
        (s.call("GET", &path, None, "").status(), s.call("DELETE", &path, None, "").status()),
        (404.try_into().unwrap(), 404.try_into().unwrap())
    );
    assert_eq!(s.refused("/v1/responses", &ask(json!({ "previous_response_id": id })).to_string()).0, 404);
    let unkept = s.post("/v1/responses", ask(json!({ "store": false })));
    assert_eq!(s.call("GET", &format!("/v1/responses/{}", unkept["id"].as_str().unwrap()), None, "").status(), 404);
}

#[test]
fn functions_are_called() {
    let s = Server::random();
    let properties = json!({ "place": { "type": "string", "maxLength": 6 } });
    let parameters =
        json!({ "type": "object", "properties": properties, "required": ["place"], "additionalProperties": false });
    let tool = json!({ "type": "function", "name": "weather", "parameters": parameters, "strict": true });
    let choice = json!({ "type": "function", "name": "weather" });
    let with = json!({ "tools": [tool], "tool_choice": choice, "max_output_tokens": 300, "seed": 2, "temperature": 1 });
    let first = s.post("/v1/responses", ask(with.clone()));
    let call = &first["output"][0];
    assert_eq!(
        (&call["type"], &call["name"], &call["status"]),
        (&json!("function_call"), &json!("weather"), &json!("completed")),
        "{first}"
    );
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["place"].is_string());
    // The output alone goes on from it, and the model isn't told of the tools again.
    let output = json!({ "type": "function_call_output", "call_id": call["call_id"], "output": "Sun" });
    let mut more = with.clone();
    more["input"] = json!([output]);
    more["previous_response_id"] = first["id"].clone();
    let next = s.post("/v1/responses", ask(more.clone()));
    let read = |r: &Value| r["usage"]["input_tokens"].as_u64().unwrap();
    assert!(read(&next) - read(&first) < 80, "{next}");
    // Others are told.
    more["tools"][0]["description"] = json!("Of a place, as it was yesterday");
    assert!(read(&s.post("/v1/responses", ask(more))) > read(&next) + 80);
    // The same conversation in one piece.
    let user = json!({ "role": "user", "content": "Who are you?" });
    let reasoning = json!({ "type": "reasoning", "summary": [], "id": "rs_1" });
    let mut all = with;
    all["input"] = json!([user, reasoning, call, output]);
    let all = s.post("/v1/responses", ask(all));
    assert!(read(&all).abs_diff(read(&next)) <= 2, "{all} {next}");
}

#[test]
fn events_tell_the_response() {
    let s = Server::plain();
    for more in [json!({}), json!({ "reasoning": { "effort": "medium" }, "seed": 4, "temperature": 1 })] {
        let whole = s.post("/v1/responses", ask(more.clone()));
        let mut streamed = ask(more);
        streamed["stream"] = json!(true);
        let events = s.events("/v1/responses", streamed);
        let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
        assert!(events.iter().enumerate().all(|(i, e)| e["sequence_number"] == i));
        let kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
        assert_eq!(
            kinds[..4],
            ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
        );
        let of_text = kinds[4].strip_suffix(".delta").unwrap();
        let done = format!("{of_text}.done");
        assert_eq!(
            kinds[kinds.len() - 4..],
            [&done, "response.content_part.done", "response.output_item.done", "response.incomplete"]
        );
        let last = &events.last().unwrap()["response"];
        let kept = s.get(&format!("/v1/responses/{}", last["id"].as_str().unwrap()));
        assert_eq!(&kept, last);
        let said = |r: &Value| {
            r["output"]
                .as_array()
                .unwrap()
                .iter()
                .map(|i| (i["type"].clone(), i["content"][0]["text"].clone()))
                .collect::<Vec<_>>()
        };
        assert_eq!(said(last), said(&whole));
        let deltas: String = events.iter().filter_map(|e| e["delta"].as_str()).collect();
        assert_eq!(said(last).iter().map(|t| t.1.as_str().unwrap()).collect::<String>(), deltas);
    }
}

#[test]
fn what_is_wrong_is_said() {
    let s = Server::random();
    for (more, param) in [
        (json!({ "input": null }), "input"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": [{ "role": "user", "content": [{ "type": "input_image" }] }] }), "input[0].content"),
        (json!({ "input": [{ "type": "item_reference", "id": "a" }] }), "input[0].type"),
        (json!({ "input": [{ "type": "function_call" }] }), "input[0]"),
        (json!({ "text": { "format": { "type": "json_schema" } } }), "text.format.schema"),
        (json!({ "text": { "format": { "type": "xml" } } }), "text.format.type"),
        (json!({ "text": { "format": { "type": "json_schema", "schema": { "type": "x" } } } }), "text.format"),
        (json!({ "input": "word ".repeat(5000) }), "input"),
        (json!({ "truncation": "auto" }), "truncation"),
        (json!({ "background": true }), "background"),
        (json!({ "reasoning": { "effort": "much" } }), "reasoning.effort"),
        (json!({ "tools": [{ "type": "web_search" }] }), "tools[0].type"),
        (json!({ "max_output_tokens": 0 }), "max_output_tokens"),
    ] {
        let (status, error) = s.refused("/v1/responses", &ask(more.clone()).to_string());
        assert_eq!((status, error["error"]["param"].as_str()), (400, Some(param)), "{more} {error}");
    }
}
