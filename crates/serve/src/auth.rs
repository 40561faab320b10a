//! API keys, and how many requests of one key run at the same time.

use crate::App;
use crate::errors::ApiError;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The keys that a server knows: only their hashes.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// From keys one a line or separated by commas; `#` at the beginning of a line or after white space begins a remark.
    ///
    /// # Errors
    /// When a key has white space in it or is shorter than 8 characters: in which line, but not the key.
    pub fn parse(text: &str) -> Result<Keys, String> {
        let mut keys = Vec::new();
        for (i, line) in text.lines().enumerate() {
            for key in line[..remark(line)].split(',').map(str::trim).filter(|k| !k.is_empty()) {
                let wrong = |what: &str| Err(format!("line {}: {what}", i + 1));
                if key.contains(char::is_whitespace) {
                    return wrong("an API key has white space in it: put a comma between keys, and # before a remark");
                }
                if key.len() < 8 {
                    return wrong("an API key must have at least 8 characters");
                }
                keys.push(Sha256::digest(key).into());
            }
        }
        Ok(Keys(keys))
    }

    /// Whether none is asked for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds others.
    pub fn extend(&mut self, other: Keys) {
        self.0.extend(other.0);
    }

    /// Who has this key: its hash in hexadecimal. All are compared, each in constant time.
    fn owner(&self, key: &str) -> Option<String> {
        let hash: [u8; 32] = Sha256::digest(key).into();
        let known = self.0.iter().fold(subtle::Choice::from(0), |any, k| any | k.ct_eq(&hash));
        bool::from(known).then(|| hash.iter().map(|b| format!("{b:02x}")).collect())
    }
}

/// Where the remark of a line begins, or the line ends. A key may have a `#` in it.
fn remark(line: &str) -> usize {
    let begins = |at: &usize| line[..*at].chars().next_back().is_none_or(char::is_whitespace);
    line.match_indices('#').map(|(at, _)| at).find(begins).unwrap_or(line.len())
}

/// Whose request it is: the hash of the key, or nobody's where no keys are asked for.
#[derive(Clone)]
pub struct Owner(pub String);

/// How many requests of each owner run.
pub struct PerOwner {
    most: usize,
    owners: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl PerOwner {
    /// At most so many of one owner.
    pub fn new(most: usize) -> PerOwner {
        PerOwner { most, owners: Mutex::default() }
    }

    fn take(&self, owner: &str) -> Result<OwnedSemaphorePermit, ApiError> {
        let mut owners = self.owners.lock().unwrap_or_else(|e| e.into_inner());
        let of_owner = owners.entry(owner.into()).or_insert_with(|| Arc::new(Semaphore::new(self.most))).clone();
        of_owner.try_acquire_owned().map_err(|_| ApiError {
            retry_after: Some(1),
            ..ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!("{} requests with this key are running, which is the most: wait for one to end", self.most),
            )
        })
    }
}

/// Lets requests through that bring a key, and counts them until their response has been sent.
pub async fn check(State(app): State<App>, mut request: Request, next: Next) -> Result<Response, ApiError> {
    let owner = match app.options.keys.is_empty() {
        true => String::new(),
        false => key(request.headers()).and_then(|k| app.options.keys.owner(k)).ok_or_else(|| {
            ApiError::new(StatusCode::UNAUTHORIZED, "no valid API key: send the header Authorization: Bearer KEY")
        })?,
    };
    let permit = app.per_owner.take(&owner)?;
    request.extensions_mut().insert(Owner(owner));
    Ok(next.run(request).await.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _held = &permit;
            frame
        }))
    }))
}

/// OpenAI's header, or Anthropic's.
fn key(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|h| h.to_str().ok()).and_then(|h| h.split_once(' '));
    let bearer = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, key)| key.trim());
    bearer.or_else(|| headers.get("x-api-key").and_then(|h| h.to_str().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let keys = Keys::parse("# mine\nsecret-one, secret-two\n\nsecret-three\n").unwrap();
        assert_eq!(keys.0.len(), 3);
        assert!(keys.owner("secret-two").is_some() && keys.owner("secret-four").is_none() && keys.owner("").is_none());
        assert_ne!(keys.owner("secret-one"), keys.owner("secret-two"));
        assert!(Keys::parse("short").is_err() && Keys::parse("# none").unwrap().is_empty());
    }

    #[test]
    fn remarks_are_no_keys() {
        let keys =
            Keys::parse("k3y-of-alice # Alice, marketing\nk3y#of-bob,\t# Bob, research\n  # secret-key").unwrap();
        assert_eq!(keys.0.len(), 2);
        assert!(keys.owner("k3y-of-alice").is_some() && keys.owner("k3y#of-bob").is_some());
        assert!(keys.owner("marketing").is_none() && keys.owner("research").is_none());
        let e = Keys::parse("secret-one\nsecret-two secret-three").err().unwrap();
        assert!(e.contains("line 2") && e.contains("white space") && !e.contains("secret"), "{e}");
        assert!(Keys::parse("secret-one, short").err().unwrap().contains("line 1"));
    }
}
