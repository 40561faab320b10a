//! Responses that clients may ask for again and go on from.
//!
//! A client stores them without being asked and hardly ever deletes one, so that they must not hold the states of the model: they hold the
//! tokens, by which the engine finds the state while it has room for it, and reads again what it has dropped.

use crate::errors::ApiError;
use serde_json::Value;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

/// The most responses of one owner, and about the most bytes of them; the oldest are dropped.
const MOST: usize = 1000;
const MOST_BYTES: usize = 64 << 20;

/// All of them, until the server ends.
#[derive(Default)]
pub struct Responses(Mutex<HashMap<String, VecDeque<Arc<Response>>>>);

/// One of them.
pub struct Response {
    /// As it was sent.
    pub json: Value,
    /// All tokens up to the end of its turn.
    pub tokens: Vec<u32>,
    /// What the model was told of tools.
    pub tools: Option<String>,
}

impl Response {
    fn is(&self, id: &str) -> bool {
        self.json["id"] == id
    }

    fn bytes(&self) -> usize {
        // What is not text is about a kilobyte.
        1024 + 4 * self.tokens.len() + self.json["output"].to_string().len() + self.json["tools"].to_string().len()
    }
}

impl Responses {
    fn all(&self) -> MutexGuard<'_, HashMap<String, VecDeque<Arc<Response>>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Keeps one.
    pub fn keep(&self, owner: &str, response: Response) {
        let mut all = self.all();
        let of_owner = all.entry(owner.into()).or_default();
        of_owner.push_back(Arc::new(response));
        let mut bytes: usize = of_owner.iter().map(|r| r.bytes()).sum();
        while of_owner.len() > MOST || (bytes > MOST_BYTES && of_owner.len() > 1) {
            bytes -= of_owner.pop_front().map_or(0, |r| r.bytes());
        }
    }

    /// The owner's of this id.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, owner: &str, id: &str) -> Result<Arc<Response>, ApiError> {
        let found = self.all().get(owner).and_then(|all| all.iter().find(|r| r.is(id)).cloned());
        found.ok_or_else(|| none(id))
    }

    /// Drops it.
    ///
    /// # Errors
    /// When there is none.
    pub fn delete(&self, owner: &str, id: &str) -> Result<(), ApiError> {
        let mut all = self.all();
        let of_owner = all.get_mut(owner).ok_or_else(|| none(id))?;
        let at = of_owner.iter().position(|r| r.is(id)).ok_or_else(|| none(id))?;
        of_owner.remove(at);
        Ok(())
    }
}

fn none(id: &str) -> ApiError {
    ApiError::not_found(format!(
        "there is no response {id:?}: it was not stored, was deleted, or made room for newer ones"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_oldest_make_room() {
        let responses = Responses::default();
        let keep = |owner: &str, id: usize, tokens: usize| {
            let json = json!({ "id": id.to_string() });
            responses.keep(owner, Response { json, tokens: vec![0; tokens], tools: None });
        };
        (0..MOST + 2).for_each(|id| keep("a", id, 1));
        let has = |owner: &str, id: usize| responses.get(owner, &id.to_string()).is_ok();
        assert!(!has("a", 1) && has("a", 2) && !has("b", 2));
        keep("b", 0, 10);
        keep("b", 1, MOST_BYTES / 4);
        assert!(!has("b", 0) && has("b", 1) && has("a", 2));
        assert!(responses.delete("b", "2").is_err() && responses.delete("b", "1").is_ok() && !has("b", 1));
    }
}
