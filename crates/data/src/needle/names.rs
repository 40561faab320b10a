//! What secrets go by where they have names: two words, as in `amber-anchor`.

use crate::random::Random;

const ADJECTIVES: [&str; 40] = [
    "able", "amber", "bitter", "brisk", "calm", "careful", "clever", "cold", "curious", "distant", "eager", "early",
    "fancy", "gentle", "golden", "happy", "hollow", "honest", "idle", "jolly", "keen", "lively", "lonely", "loud",
    "mellow", "narrow", "noble", "odd", "patient", "plain", "proud", "quick", "quiet", "rough", "silent", "slow",
    "steady", "tender", "warm", "young",
];
const NOUNS: [&str; 40] = [
    "anchor", "apple", "barrel", "basket", "bridge", "candle", "castle", "clock", "cloud", "copper", "desert",
    "engine", "feather", "field", "forest", "garden", "hammer", "harbor", "island", "kettle", "ladder", "lantern",
    "market", "meadow", "mirror", "mountain", "needle", "ocean", "orchard", "paper", "pencil", "river", "saddle",
    "shadow", "stone", "table", "tunnel", "valley", "window", "winter",
];

/// Names that there are.
pub(super) const COUNT: usize = ADJECTIVES.len() * NOUNS.len();

/// A random one.
pub(super) fn name(random: &mut Random) -> String {
    format!("{}-{}", ADJECTIVES[random.below(ADJECTIVES.len())], NOUNS[random.below(NOUNS.len())])
}

/// Bytes of the longest one.
pub(super) fn longest() -> usize {
    let most = |words: &[&str]| words.iter().map(|w| w.len()).max().unwrap_or(0);
    most(&ADJECTIVES) + "-".len() + most(&NOUNS)
}
