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
pub struct Responses(Mutex<HashMap<String, OfOwner>>);

/// Those of an owner, the oldest first, each with its bytes.
#[derive(Default)]
struct OfOwner {
    all: VecDeque<(usize, Arc<Response>)>,
    bytes: usize,
}

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
    fn bytes(&self) -> usize {
        // What is not text is about a kilobyte.
        1024 + 4 * self.tokens.len() + self.json["output"].to_string().len() + self.json["tools"].to_string().len()
    }
}

impl OfOwner {
    fn place(&self, id: &str) -> Result<usize, ApiError> {
        self.all.iter().position(|(_, r)| r.json["id"] == id).ok_or_else(|| none(id))
    }

    fn remove(&mut self, place: usize) {
        self.bytes -= self.all.remove(place).map_or(0, |(bytes, _)| bytes);
    }
}

impl Responses {
    fn owners(&self) -> MutexGuard<'_, HashMap<String, OfOwner>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Keeps one.
    pub fn keep(&self, owner: &str, response: Response) {
        let bytes = response.bytes();
        let mut owners = self.owners();
        let of_owner = owners.entry(owner.into()).or_default();
        of_owner.bytes += bytes;
        of_owner.all.push_back((bytes, Arc::new(response)));
        while of_owner.all.len() > MOST || (of_owner.bytes > MOST_BYTES && of_owner.all.len() > 1) {
            of_owner.remove(0);
        }
    }

    /// The owner's of this id.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, owner: &str, id: &str) -> Result<Arc<Response>, ApiError> {
        let owners = self.owners();
        let of_owner = owners.get(owner).ok_or_else(|| none(id))?;
        Ok(of_owner.all[of_owner.place(id)?].1.clone())
    }

    /// Drops it.
    ///
    /// # Errors
    /// When there is none.
    pub fn delete(&self, owner: &str, id: &str) -> Result<(), ApiError> {
        let mut owners = self.owners();
        let of_owner = owners.get_mut(owner).ok_or_else(|| none(id))?;
        let place = of_owner.place(id)?;
        of_owner.remove(place);
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
