//! Python string and bytes literals, as the official vocabulary file has them.

/// The bytes of `'..'`, `".."` (as UTF-8) or `b'..'`, `b".."`.
pub(crate) fn parse(text: &str) -> Option<Vec<u8>> {
    let (is_bytes, quoted) = match text.strip_prefix('b') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let quote = quoted.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let body = quoted.strip_prefix(quote)?.strip_suffix(quote)?;
    let mut out = Vec::new();
    let mut chars = body.chars();
    while let Some(c) = chars.next() {
        let c = if c == '\\' { escape(&mut chars)? } else { c };
        if is_bytes {
            out.push(u8::try_from(c).ok()?);
        } else {
            out.extend(c.encode_utf8(&mut [0; 4]).bytes());
        }
    }
    Some(out)
}

/// The character of an escape sequence, after the backslash.
fn escape(chars: &mut std::str::Chars<'_>) -> Option<char> {
    let digits = match chars.next()? {
        c @ ('\\' | '\'' | '"') => return Some(c),
        'n' => return Some('\n'),
        'r' => return Some('\r'),
        't' => return Some('\t'),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => return None,
    };
    let hex: String = chars.by_ref().take(digits).collect();
    (hex.len() == digits).then(|| u32::from_str_radix(&hex, 16).ok())?.and_then(char::from_u32)
}
