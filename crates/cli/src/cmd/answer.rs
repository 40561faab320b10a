//! Where answers of `generate` and `chat` end.

use crate::global::stop;
use anser_infer::TextStream;
use anser_infer::engine::Constraint;
use anser_tokenizer::Tokenizer;
use std::sync::atomic::Ordering;

/// Ends an answer with the token that completes a stop text, or with the next one after Ctrl-C: in the engine, which would otherwise be
/// further on by the time that its reader asks it to stop.
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

    fn accept(&mut self, token: u32) -> Result<bool, String> {
        let bytes = self.tokenizer.token(token).map_err(|e| e.to_string())?;
        Ok(self.text.push(bytes).1 || stop().load(Ordering::SeqCst))
    }

    fn masks(&self) -> bool {
        false
    }
}
