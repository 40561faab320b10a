//! The tasks: what is hidden and asked for, in which words.

use super::names;
use crate::random::Random;
use std::fmt;

/// What is hidden, and in what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// A pass key from 1 to 50000, said twice, in five sentences that repeat.
    Passkey,
    /// RULER's S-NIAH-1: a number of seven digits under a name, in the same sentences.
    Niah1,
    /// S-NIAH-2: such a number in a text.
    Niah2,
    /// S-NIAH-3: a UUID in a text.
    Niah3,
}

impl Task {
    /// All of them.
    pub const ALL: [Task; 4] = [Task::Passkey, Task::Niah1, Task::Niah2, Task::Niah3];

    /// Whether the haystack is a text, not sentences that repeat.
    pub fn takes_text(self) -> bool {
        matches!(self, Task::Niah2 | Task::Niah3)
    }

    /// Needles that a sample can have: as many as there are names. A pass key has none.
    pub fn most_keys(self) -> usize {
        if self == Task::Passkey { 1 } else { names::COUNT }
    }

    /// What it is called with so many needles in a sample.
    pub fn with_keys(self, keys: usize) -> String {
        if keys == 1 { self.to_string() } else { format!("{self} with {keys} keys") }
    }

    /// Instruction, needle and question. Between bars stand the key, by which the secret is asked for, and the value, which is the
    /// secret; the needle is without the white space before it.
    pub(super) fn wording(self) -> [String; 3] {
        if self == Task::Passkey {
            return [
                "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about \
                 the important information there.",
                "The pass key is|value|. Remember it.|value| is the pass key.",
                "\nWhat is the pass key? The pass key is",
            ]
            .map(String::from);
        }
        let what = if self == Task::Niah3 { "uuid" } else { "number" };
        [
            format!(
                "A special magic {what} is hidden within the following text. Make sure to memorize it. I will quiz you about the \
                 {what} afterwards."
            ),
            format!("One of the special magic {what}s for|key| is:|value|."),
            format!(
                "\nWhat is the special magic {what} for|key| mentioned in the provided text? The special magic {what} for|key| \
                 mentioned in the provided text is"
            ),
        ]
    }

    /// A random secret.
    pub(super) fn secret(self, random: &mut Random) -> String {
        match self {
            Task::Passkey => (1 + random.below(50_000)).to_string(),
            Task::Niah1 | Task::Niah2 => (1_000_000 + random.below(9_000_000)).to_string(),
            Task::Niah3 => {
                // Version 4: all bits are random but those that say so.
                let digits: String = (0..32)
                    .map(|i| match i {
                        12 => '4',
                        16 => char::from(b"89ab"[random.below(4)]),
                        _ => char::from(b"0123456789abcdef"[random.below(16)]),
                    })
                    .collect();
                [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
            }
        }
    }

    /// Bytes of the longest secret.
    pub(super) fn longest_secret(self) -> usize {
        match self {
            Task::Passkey => 5,
            Task::Niah1 | Task::Niah2 => 7,
            Task::Niah3 => 36,
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Task::Passkey => "passkey",
            Task::Niah1 => "niah1",
            Task::Niah2 => "niah2",
            Task::Niah3 => "niah3",
        })
    }
}

/// The secrets are in two halves with none in common: what a model is asked in a test it has never seen in training. A hash of the
/// secret's text decides, so that neither half has digits of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// Those with an even hash.
    Train,
    /// Those with an odd hash.
    Test,
}

impl Keys {
    /// The half that a secret is in.
    pub fn of(secret: &str) -> Keys {
        // FNV-1a, then a step of mixing, as its lowest bit knows the lowest bits of the text only.
        let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let hash = secret.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
        let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        if (mixed ^ (mixed >> 33)) & 1 == 0 { Keys::Train } else { Keys::Test }
    }
}
