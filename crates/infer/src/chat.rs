//! The official chat templates of RWKV-7 "G1" models: plain text, no special tokens.

/// Whether and how the model thinks before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Think {
    /// It answers at once.
    #[default]
    Off,
    /// An empty thought is put before the answer: better than `Off` with models trained to think, as fast.
    Fast,
    /// It thinks.
    On,
    /// It thinks a little.
    Short,
    /// It thinks long.
    Long,
}

impl std::str::FromStr for Think {
    type Err = String;
    fn from_str(s: &str) -> Result<Think, String> {
        match s {
            "off" => Ok(Think::Off),
            "fast" => Ok(Think::Fast),
            "on" => Ok(Think::On),
            "short" => Ok(Think::Short),
            "long" => Ok(Think::Long),
            _ => Err(format!("{s:?}: off, fast, on, short or long")),
        }
    }
}

/// Texts before which an answer ends.
pub const STOPS: [&str; 2] = ["\n\nUser:", "\n\nSystem:"];

/// Text as the models were trained on: LF line ends, no empty lines, no space around.
pub fn clean(text: &str) -> String {
    let mut out = String::new();
    for line in text.replace("\r\n", "\n").trim().split('\n').filter(|l| !l.is_empty()) {
        if !out.is_empty() {
            out.push('\n');
        }
        out += line;
    }
    out
}

/// The system prompt as it stands before the first turn.
pub fn system(text: &str) -> String {
    format!("System: {}\n\n", clean(text))
}

/// A user's turn up to where the model goes on.
///
/// ```
/// use anser_infer::chat::{Think, user};
/// assert_eq!(user("hello\n\n", Think::Off), "User: hello\n\nAssistant:");
/// assert_eq!(user("hello", Think::Long), "User: hello (think a lot)\n\nAssistant: <think");
/// ```
pub fn user(text: &str, think: Think) -> String {
    let (effort, start) = match think {
        Think::Off => ("", ""),
        Think::Fast => ("", " <think>\n</think"),
        Think::On => ("", " <think"),
        Think::Short => (" (think a bit)", " <think"),
        Think::Long => (" (think a lot)", " <think"),
    };
    // No space at the end: the model writes it.
    format!("User: {}{effort}\n\nAssistant:{start}", clean(text))
}

/// What stands between an answer and the next turn.
pub const TURN_END: &str = "\n\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates() {
        assert_eq!(clean(" a\r\n\r\n\n b \n"), "a\n b");
        assert_eq!(system("Be brief."), "System: Be brief.\n\n");
        assert_eq!(user("hi", Think::Fast), "User: hi\n\nAssistant: <think>\n</think");
        assert_eq!(user("hi", Think::Short), "User: hi (think a bit)\n\nAssistant: <think");
        assert!("maybe".parse::<Think>().is_err() && "on".parse() == Ok(Think::On));
    }
}
