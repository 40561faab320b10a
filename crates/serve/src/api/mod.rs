//! The routes, one file for each family.

pub mod chat;
pub mod completions;
pub mod conversation;
pub mod embeddings;
pub mod items;
pub mod messages;
pub mod models;
pub mod options;
pub mod responses;
pub mod states;
pub mod tokens;

use serde_json::{Value, json};

/// Tokens of a request.
#[derive(Clone, Copy, Default)]
pub struct Usage {
    /// Of the prompts.
    pub prompt: usize,
    /// Of these, not read again.
    pub cached: usize,
    /// Written.
    pub written: usize,
    /// Of these, thoughts.
    pub reasoning: usize,
}

impl Usage {
    /// Of answers of which `n` at a time have the same prompt, which is read once.
    pub fn total(each: &[Usage], n: usize) -> Usage {
        let mut all = Usage::default();
        for (i, u) in each.iter().enumerate() {
            if i % n == 0 {
                all.prompt += u.prompt;
                all.cached += each[i..].iter().take(n).map(|u| u.cached).min().unwrap_or(0);
            }
            all.written += u.written;
            all.reasoning += u.reasoning;
        }
        all
    }

    /// In OpenAI's shape.
    pub fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
            "prompt_tokens_details": { "cached_tokens": self.cached },
            "completion_tokens_details": { "reasoning_tokens": self.reasoning },
        })
    }
}

/// A new id that begins with `prefix`.
pub fn id(prefix: &str) -> String {
    format!("{prefix}{}", uuid::Uuid::new_v4().simple())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
