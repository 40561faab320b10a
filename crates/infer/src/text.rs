use anser_tokenizer::StreamDecoder;

/// Text on its way out: whole characters only, and nothing that may yet become a stop text.
#[derive(Clone, Default)]
pub struct TextStream {
    decoder: StreamDecoder,
    held: String,
    stops: Vec<String>,
}

impl TextStream {
    /// A stream that ends before any of `stops` (empty ones are left out).
    pub fn new(stops: &[String]) -> TextStream {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        TextStream { stops, ..TextStream::default() }
    }

    /// Takes the bytes of a token: the text that is certain now, and whether a stop text came after it.
    pub fn push(&mut self, bytes: &[u8]) -> (String, bool) {
        self.held += &self.decoder.push(bytes);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begun = |n: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[*n..]));
        let safe = self.held.char_indices().map(|(i, _)| i).find(begun).unwrap_or(self.held.len());
        (self.held.drain(..safe).collect(), false)
    }

    /// No stop text ends what comes from now on.
    pub fn lift_stops(&mut self) {
        self.stops.clear();
    }

    /// Whether nothing is held back.
    pub fn is_clear(&self) -> bool {
        self.held.is_empty() && self.decoder.is_empty()
    }

    /// What was held back, at the end.
    pub fn finish(mut self) -> String {
        self.held + &self.decoder.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_across_tokens_and_characters() {
        let mut t = TextStream::new(&["\n\nUser:".into(), "é!".into(), String::new()]);
        assert_eq!(t.push(b"a\n"), ("a".into(), false));
        assert!(!t.is_clear());
        assert_eq!(t.push(b"\nUs"), ("".into(), false));
        assert_eq!(t.push(b"ed\xc3"), ("\n\nUsed".into(), false));
        assert!(!t.is_clear());
        assert_eq!(t.push(b"\xa9"), ("".into(), false));
        assert_eq!(t.push(b"!x"), ("".into(), true));
        let mut t = TextStream::new(&["stop".into()]);
        assert_eq!(t.push(b"go st"), ("go ".into(), false));
        let mut lifted = t.clone();
        assert_eq!(t.finish(), "st");
        lifted.lift_stops();
        assert_eq!(lifted.push(b"op x"), ("stop x".into(), false));
    }
}
