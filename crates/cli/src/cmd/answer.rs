//! Where answers of `generate` and `chat` end.

use crate::global::stop;
use anser_infer::TextStream;
use anser_infer::engine::{Constraint, Next};
use anser_tokenizer::Tokenizer;
use std::sync::atomic::Ordering;

/// Ends an answer before a stop text, and with the next token after Ctrl-C.
pub struct Ends {
    text: TextStream,
    tokenizer: Tokenizer,
}

impl Ends {
    /// At any of these texts.
    pub fn new(tokenizer: Tokenizer, stops: &[String]) -> Ends {
        Ends { text: TextStream::new(stops), tokenizer }
    }
}

impl Constraint for Ends {
    fn mask(&mut self, _: &mut [f32]) -> Result<(), String> {
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<Next, String> {
        let bytes = self.tokenizer.token(token).map_err(|e| e.to_string())?;
        Ok(match self.text.push(bytes).1 {
            Some(cut) => Next::Cut(cut.whole),
            None if stop().load(Ordering::SeqCst) => Next::End,
            None => Next::More,
        })
    }

    fn masks(&self) -> bool {
        false
    }
}
