//! What a response puts out: items of thoughts, text and calls, and the events that tell of them.

use super::id;
use crate::calls::CallPart;
use crate::reply::Piece;
use serde_json::{Value, json};

/// The items so far. The last one is open until the next one begins.
#[derive(Default)]
pub struct Items {
    /// As they are sent.
    pub output: Vec<Value>,
    /// Events that were not sent yet, by their names.
    pub events: Vec<(&'static str, Value)>,
    open: Option<Kind>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
    Call,
}

impl Items {
    /// Takes the next piece of the answer.
    pub fn add(&mut self, piece: Piece) {
        self.text(Kind::Reasoning, &piece.reasoning);
        self.text(Kind::Message, &piece.content);
        for part in piece.calls {
            match part {
                CallPart::Begin { id: call, name } => {
                    let item = json!({ "type": "function_call", "id": id("fc_"), "call_id": call, "name": name, "arguments": "" });
                    self.begin(Kind::Call, item);
                }
                CallPart::Arguments(text) => {
                    self.append(&text, |item| &mut item["arguments"]);
                    self.event("response.function_call_arguments.delta", json!({ "delta": text }));
                }
            }
        }
    }

    /// Nothing more will come; a complete answer that calls nothing has a text, if an empty one.
    pub fn end(&mut self, status: &str) {
        if status == "completed" && !self.output.iter().any(|item| item["type"] != "reasoning") {
            self.begin_text(Kind::Message);
        }
        self.close(status);
    }

    fn text(&mut self, kind: Kind, text: &str) {
        if text.is_empty() {
            return;
        }
        if self.open != Some(kind) {
            self.begin_text(kind);
        }
        self.append(text, |item| &mut item["content"][0]["text"]);
        match kind {
            Kind::Reasoning => {
                self.event("response.reasoning_text.delta", json!({ "content_index": 0, "delta": text }));
            }
            _ => {
                let event = json!({ "content_index": 0, "delta": text, "logprobs": [] });
                self.event("response.output_text.delta", event);
            }
        }
    }

    fn begin_text(&mut self, kind: Kind) {
        let (item, part) = match kind {
            Kind::Reasoning => (
                json!({ "type": "reasoning", "id": id("rs_"), "summary": [], "content": [] }),
                json!({ "type": "reasoning_text", "text": "" }),
            ),
            _ => (
                json!({ "type": "message", "id": id("msg_"), "role": "assistant", "content": [] }),
                json!({ "type": "output_text", "text": "", "annotations": [], "logprobs": [] }),
            ),
        };
        self.begin(kind, item);
        if let Some(item) = self.output.last_mut() {
            item["content"] = json!([part]);
        }
        self.event("response.content_part.added", json!({ "content_index": 0, "part": part }));
    }

    fn begin(&mut self, kind: Kind, mut item: Value) {
        self.close("completed");
        item["status"] = json!("in_progress");
        self.events.push(("response.output_item.added", json!({ "output_index": self.output.len(), "item": item })));
        self.output.push(item);
        self.open = Some(kind);
    }

    /// The open item ends.
    fn close(&mut self, status: &str) {
        let (Some(kind), Some(item)) = (self.open.take(), self.output.last_mut()) else { return };
        item["status"] = json!(status);
        let item = item.clone();
        let text = &item["content"][0]["text"];
        match kind {
            Kind::Reasoning => self.event("response.reasoning_text.done", json!({ "content_index": 0, "text": text })),
            Kind::Message => {
                let event = json!({ "content_index": 0, "text": text, "logprobs": [] });
                self.event("response.output_text.done", event);
            }
            Kind::Call => {
                let event = json!({ "name": item["name"], "arguments": item["arguments"] });
                self.event("response.function_call_arguments.done", event);
            }
        }
        if kind != Kind::Call {
            let event = json!({ "content_index": 0, "part": item["content"][0] });
            self.event("response.content_part.done", event);
        }
        let index = self.output.len() - 1;
        self.events.push(("response.output_item.done", json!({ "output_index": index, "item": item })));
    }

    /// A text of the open item grows.
    fn append(&mut self, text: &str, place: impl Fn(&mut Value) -> &mut Value) {
        if let Some(Value::String(whole)) = self.output.last_mut().map(place) {
            *whole += text;
        }
    }

    /// An event of the last item.
    fn event(&mut self, kind: &'static str, mut event: Value) {
        if let Some(item) = self.output.last() {
            event["item_id"] = item["id"].clone();
            event["output_index"] = json!(self.output.len() - 1);
            self.events.push((kind, event));
        }
    }
}
