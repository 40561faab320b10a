//! Guessing what comes next by looking up where the last tokens stood before.

use std::collections::HashMap;

/// Tokens that must have stood there alike.
const MATCH: usize = 3;

/// The tokens of a sequence, and guesses of the next ones: what followed the last three where they stood before.
pub(crate) struct Lookup {
    tokens: Vec<u32>,
    /// For every three tokens the place after where they stood last.
    after: HashMap<[u32; MATCH], usize>,
    /// Tokens of a guess at most.
    most: usize,
    /// The same now: less after wrong guesses, more after right ones.
    reach: usize,
}

impl Lookup {
    /// Guesses of up to `most` tokens.
    pub fn new(most: usize) -> Lookup {
        Lookup { tokens: Vec::new(), after: HashMap::new(), most, reach: most.div_ceil(2) }
    }

    /// How many tokens it has seen.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The next token of the sequence.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if let Some(last) = self.tokens.last_chunk() {
            self.after.insert(*last, self.tokens.len());
        }
    }

    /// What may follow `token`, which is pushed later: up to `room` tokens.
    pub fn guess(&self, token: u32, room: usize) -> Vec<u32> {
        let Some(&[a, b]) = self.tokens.last_chunk() else { return Vec::new() };
        let Some(&at) = self.after.get(&[a, b, token]) else { return Vec::new() };
        let mut guess = Vec::new();
        for i in at..at + self.reach.min(room) {
            // A text that repeats itself goes on into `token` and the guess.
            guess.push(match i.checked_sub(self.tokens.len()) {
                None => self.tokens[i],
                Some(0) => token,
                Some(n) => guess[n - 1],
            });
        }
        guess
    }

    /// Of a guess of `length` tokens the first `right` came true.
    pub fn learn(&mut self, right: usize, length: usize) {
        self.reach = if right == length { self.most.min(2 * self.reach) } else { right.max(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_last_time_is_guessed() {
        let mut l = Lookup::new(8);
        [1, 2, 3, 4, 5, 6, 7, 1, 2].iter().for_each(|&t| l.push(t));
        assert!(l.guess(9, 9).is_empty());
        assert_eq!(l.guess(3, 9), [4, 5, 6, 7]);
        assert_eq!(l.guess(3, 2), [4, 5]);
        l.learn(4, 4);
        // Beyond what is there it repeats itself.
        assert_eq!(l.guess(3, 9), [4, 5, 6, 7, 1, 2, 3, 4]);
        l.learn(1, 8);
        assert_eq!(l.guess(3, 9), [4]);
        [3, 8, 1, 2].iter().for_each(|&t| l.push(t));
        assert_eq!(l.guess(3, 9), [8]);
    }
}
