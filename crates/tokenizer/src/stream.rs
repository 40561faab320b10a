/// Bytes to text as they come, never half a character; what is not UTF-8 becomes U+FFFD, as in [`String::from_utf8_lossy`].
///
/// ```
/// let mut d = anser_tokenizer::StreamDecoder::default();
/// assert_eq!(d.push(&[0xE4, 0xB8]), "");
/// assert_eq!(d.push(&[0x96, b'!']), "世!");
/// assert_eq!(d.finish(), "");
/// ```
#[derive(Clone, Debug, Default)]
pub struct StreamDecoder {
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// Takes more bytes and gives the text that is complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let keep = match std::str::from_utf8(&self.pending) {
            Ok(_) => 0,
            // Looks at the last three bytes only through the error: an unfinished character is at the end.
            Err(_) => unfinished(&self.pending),
        };
        let complete = self.pending.len() - keep;
        let text = String::from_utf8_lossy(&self.pending[..complete]).into_owned();
        self.pending.drain(..complete);
        text
    }

    /// Whether no bytes wait for the rest of their character.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// The end: what is left is no character.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Bytes at the end that could become a character.
fn unfinished(bytes: &[u8]) -> usize {
    for n in 1..=3.min(bytes.len()) {
        let tail = &bytes[bytes.len() - n..];
        if let Err(e) = std::str::from_utf8(tail)
            && e.valid_up_to() == 0
            && e.error_len().is_none()
        {
            return n;
        }
    }
    0
}
