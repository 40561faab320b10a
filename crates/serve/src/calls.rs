//! Tells calls of tools from the text before them, as an answer is written.

use crate::api::id;
use crate::tools::{BEFORE_ARGUMENTS, BEFORE_NAME, MARKER};

/// A piece of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallPart {
    /// A call begins.
    Begin {
        /// New for each call.
        id: String,
        /// Of the tool.
        name: String,
    },
    /// Text of its arguments.
    Arguments(String),
}

/// A call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// New for each call.
    pub id: String,
    /// Of the tool.
    pub name: String,
    /// JSON, unless the answer ended within it.
    pub arguments: String,
}

/// Adds a piece to a list of calls.
pub fn collect(calls: &mut Vec<Call>, part: CallPart) {
    match part {
        CallPart::Begin { id, name } => calls.push(Call { id, name, arguments: String::new() }),
        CallPart::Arguments(text) => calls.last_mut().into_iter().for_each(|call| call.arguments += &text),
    }
}

/// Takes text as it comes, in pieces cut anywhere.
pub struct Reader {
    held: String,
    place: Place,
}

enum Place {
    /// Before a marker.
    Text,
    /// Between a marker and the arguments.
    Head,
    Arguments(Nesting),
    /// After a call.
    After,
}

/// How deep within a JSON object a text is.
#[derive(Default)]
struct Nesting {
    depth: usize,
    string: bool,
    escape: bool,
}

impl Nesting {
    /// Takes a character: whether the object ends with it.
    fn ends(&mut self, c: char) -> bool {
        match c {
            _ if self.escape => self.escape = false,
            '\\' if self.string => self.escape = true,
            '"' => self.string = !self.string,
            _ if self.string => {}
            '{' | '[' => self.depth += 1,
            '}' | ']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.depth == 0
    }
}

impl Reader {
    /// For an answer that begins.
    pub fn new() -> Reader {
        Reader { held: String::new(), place: Place::Text }
    }

    /// Whether a call has begun.
    pub fn called(&self) -> bool {
        !matches!(self.place, Place::Text)
    }

    /// Takes a piece; `end` when none will follow. The text before calls, and pieces of calls.
    pub fn push(&mut self, piece: &str, end: bool) -> (String, Vec<CallPart>) {
        self.held += piece;
        let (mut text, mut parts) = (String::new(), Vec::new());
        while self.step(&mut text, &mut parts, end) {}
        (text, parts)
    }

    /// Whether there may be more to tell.
    fn step(&mut self, text: &mut String, parts: &mut Vec<CallPart>, end: bool) -> bool {
        match &mut self.place {
            Place::Text => {
                if let Some((before, after)) = self.held.split_once(MARKER) {
                    *text += before.trim_end();
                    (self.held, self.place) = (after.into(), Place::Head);
                    return true;
                }
                // What may yet become a marker, and the space before it, is no part of the text.
                let may_begin = |n: &usize| MARKER.starts_with(self.held[*n..].trim_start());
                let sure = self.held.char_indices().map(|(n, _)| n).find(may_begin).filter(|_| !end);
                *text += &self.held.drain(..sure.unwrap_or(self.held.len())).collect::<String>();
                false
            }
            Place::Head => {
                let head = self.held.strip_prefix(BEFORE_NAME).and_then(|h| h.split_once(BEFORE_ARGUMENTS));
                let Some((name, rest)) = head else { return false };
                parts.push(CallPart::Begin { id: id("call_"), name: name.into() });
                (self.held, self.place) = (rest.into(), Place::Arguments(Nesting::default()));
                true
            }
            Place::Arguments(nesting) => {
                let end = self.held.char_indices().find(|&(_, c)| nesting.ends(c)).map(|(n, c)| n + c.len_utf8());
                let piece: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
                if !piece.is_empty() {
                    parts.push(CallPart::Arguments(piece));
                }
                if end.is_some() {
                    self.place = Place::After;
                }
                end.is_some()
            }
            Place::After => {
                let Some((_, rest)) = self.held.split_once(MARKER) else { return false };
                (self.held, self.place) = (rest.into(), Place::Head);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::call;

    fn told(text: &str) -> (String, Vec<(String, String)>) {
        let read = |pieces: Vec<String>| {
            let (mut reader, mut text, mut calls) = (Reader::new(), String::new(), Vec::new());
            let last = [(String::new(), true)];
            for (piece, end) in pieces.into_iter().map(|p| (p, false)).chain(last) {
                let (more, parts) = reader.push(&piece, end);
                text += &more;
                parts.into_iter().for_each(|part| collect(&mut calls, part));
            }
            (text, calls.into_iter().map(|c| (c.name, c.arguments)).collect::<Vec<_>>())
        };
        let whole = read(vec![text.into()]);
        assert_eq!(whole, read(text.chars().map(String::from).collect()));
        whole
    }

    #[test]
    fn texts_and_calls() {
        let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
        assert_eq!(told("Hello **Tool\n"), ("Hello **Tool\n".into(), vec![]));
        let odd = r#"{"a": "}\"{", "b": [{"é": {}}]}"#;
        let text = format!("Let me see.\n\n{}\n{}\n\n", call("look", odd), call("go", ""));
        assert_eq!(told(&text), ("Let me see.".into(), vec![pair("look", odd), pair("go", "{}")]));
        let cut = &text[..text.find("\"b\"").unwrap()];
        assert_eq!(told(cut), ("Let me see.".into(), vec![pair("look", "{\"a\": \"}\\\"{\", ")]));
        assert_eq!(told(&format!(" {MARKER}\n```json\n{{\"na")), ("".into(), vec![]));
    }
}
