use anser_tokenizer::StreamDecoder;

/// Text on its way out: whole characters only, and nothing that may yet become a stop text.
#[derive(Clone, Default)]
pub struct TextStream {
    decoder: StreamDecoder,
    held: String,
    stops: Vec<String>,
    /// The bytes of the tokens since nothing was held back, and where each of these tokens ends in them.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    /// Tokens before these.
    before: usize,
}

/// Where a stop text came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The stop text.
    pub stop: String,
    /// Tokens that end before it.
    pub whole: usize,
    /// Tokens that begin before it: one more, if a token has the last of the text and the beginning of the stop text in it.
    pub begun: usize,
    /// The bytes between the last whole token and the stop text.
    pub rest: Vec<u8>,
}

impl TextStream {
    /// A stream that ends before any of `stops` (empty ones are left out).
    pub fn new(stops: &[String]) -> TextStream {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        TextStream { stops, ..TextStream::default() }
    }

    /// Takes the bytes of a token: the text that is certain now, and whether a stop text came after it.
    pub fn push(&mut self, bytes: &[u8]) -> (String, Option<Cut>) {
        self.bytes.extend(bytes);
        self.ends.push(self.bytes.len());
        self.held += &self.decoder.push(bytes);
        let found = self.stops.iter().filter_map(|s| Some((self.held.find(s.as_str())?, s)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            let stop = stop.clone();
            self.held.truncate(at);
            // There may be bytes before it that are no text.
            let at = self.bytes.windows(stop.len()).position(|w| w == stop.as_bytes()).unwrap_or(self.bytes.len());
            let whole = self.ends.iter().filter(|&&end| end <= at).count();
            let rest = self.bytes[whole.checked_sub(1).map_or(0, |last| self.ends[last])..at].to_vec();
            let begun = whole + usize::from(!rest.is_empty());
            let cut = Cut { stop, whole: self.before + whole, begun: self.before + begun, rest };
            return (std::mem::take(&mut self.held), Some(cut));
        }
        let begun = |n: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[*n..]));
        let safe = self.held.char_indices().map(|(i, _)| i).find(begun).unwrap_or(self.held.len());
        let text = self.held.drain(..safe).collect();
        if self.is_clear() {
            self.before += self.ends.len();
            self.ends.clear();
            self.bytes.clear();
        }
        (text, None)
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
        assert_eq!(t.push(b"a\n"), ("a".into(), None));
        assert!(!t.is_clear());
        assert_eq!(t.push(b"\nUs"), ("".into(), None));
        assert_eq!(t.push(b"ed\xc3"), ("\n\nUsed".into(), None));
        assert!(!t.is_clear());
        assert_eq!(t.push(b"\xa9"), ("".into(), None));
        let cut = Cut { stop: "é!".into(), whole: 2, begun: 3, rest: b"ed".to_vec() };
        assert_eq!(t.push(b"!x"), ("".into(), Some(cut)));
        let mut t = TextStream::new(&["stop".into()]);
        assert_eq!(t.push(b"go st"), ("go ".into(), None));
        let mut lifted = t.clone();
        assert_eq!(t.finish(), "st");
        lifted.lift_stops();
        assert_eq!(lifted.push(b"op x"), ("stop x".into(), None));
    }

    #[test]
    fn tokens_before_a_stop_text() {
        let stops = ["b".to_string(), "END".into()];
        let cut = |pieces: &[&[u8]]| {
            let mut t = TextStream::new(&stops);
            let (last, first) = pieces.split_last().unwrap();
            assert!(first.iter().all(|p| t.push(p).1.is_none()));
            let (text, cut) = t.push(last);
            let cut = cut.unwrap();
            (text, cut.stop, cut.whole, cut.begun, cut.rest)
        };
        let is = |text: &str, stop: &str, whole, begun, rest: &[u8]| {
            (text.to_string(), stop.to_string(), whole, begun, rest.to_vec())
        };
        assert_eq!(cut(&[b"b"]), is("", "b", 0, 0, b""));
        assert_eq!(cut(&[b"ab"]), is("a", "b", 0, 1, b"a"));
        assert_eq!(cut(&[b"a", b"c", b"b"]), is("", "b", 2, 2, b""));
        assert_eq!(cut(&[b"a", b"cE", b"N", b"D and"]), is("", "END", 1, 2, b"c"));
        // The first of two, and a beginning that came to nothing.
        assert_eq!(cut(&[b"EN", b"E", b"NDb"]), is("", "END", 1, 1, b""));
        // What is no text, and tokens of nothing.
        assert_eq!(cut(&[b"x", b"\xff\xe4", b"", b"END"]), is("\u{fffd}", "END", 3, 3, b""));
    }
}
