//! Samples to train on.

use super::{Keys, Needles};
use crate::random::Random;
use crate::{Batch, Dataset};
use std::ops::Range;

/// Rows of needle samples among rows of text, for training. A sample is its prompt, the answer, a full stop and the end of the
/// document; where several needles are asked for, questions and answers before the last ones are part of the prompt.
pub struct Mix {
    /// The samples.
    pub needles: Needles,
    /// Share of rows that hold them, 0 to 1; they are evenly spread.
    pub share: f64,
    /// Tokens of a sample at least: a row holds samples of random lengths side by side, as packed documents, while another one fits.
    /// 0: a row is one sample.
    pub shortest: usize,
    /// Needles of a sample that are asked for, one after the other, 1 to all of its keys: as many answers to learn from.
    pub asked: usize,
    /// Whether only answers are targets, or prompts too.
    pub answer_only: bool,
    /// Seed of the samples.
    pub seed: u64,
}

impl Mix {
    /// Tokens that a sample has at least in training: the shortest prompt and the longest answer.
    pub fn least(&self) -> usize {
        // A space, the secret, a full stop and the end of the document, which is a target only.
        self.needles.shortest_with(self.asked) + self.needles.task.longest_secret() + 2
    }

    /// Of the first n rows of a run so many are needles.
    fn before(&self, rows: u64) -> u64 {
        (rows as f64 * self.share) as u64
    }

    /// The batch of a step: a function of the step, like [`Dataset::train`]; rows of text come in the order that they have without
    /// needles, and none is left out.
    ///
    /// # Panics
    /// When `shortest` or the rows of the data set are shorter than [`Mix::least`].
    pub fn train(&self, data: &Dataset, step: u64, rows: usize) -> Batch {
        let first = step * rows as u64;
        let all = first..first + rows as u64;
        let is_needle = |row: u64| self.before(row + 1) > self.before(row);
        let texts = all.clone().filter(|&row| !is_needle(row)).count();
        let text = data.rows(first - self.before(first), texts);
        let (ctx, mut taken) = (data.ctx(), 0);
        let mut batch = Batch::default();
        for row in all {
            if is_needle(row) {
                batch.append(self.row(self.before(row), ctx));
            } else {
                batch.append(text.slice(ctx, taken, taken + 1));
                taken += 1;
            }
        }
        batch
    }

    /// The `stream`-th row of samples.
    fn row(&self, stream: u64, ctx: usize) -> Batch {
        let mut random = Random::new(self.seed, stream);
        let mut row = Batch::default();
        let least = if self.shortest == 0 { ctx } else { self.shortest };
        while ctx - row.tokens.len() >= least {
            let len = least + random.below(ctx - row.tokens.len() - least + 1);
            row.append(self.document(&mut random, len));
        }
        row.tokens.resize(ctx, self.needles.tokenizer.end_of_document());
        row.targets.resize(ctx, -1);
        row
    }

    /// A sample of `len` inputs.
    fn document(&self, random: &mut Random, len: usize) -> Batch {
        let Needles { tokenizer, .. } = &self.needles;
        let secret = self.needles.secret(Keys::Train, random);
        let mut answer = self.needles.answer(&secret);
        answer.push(tokenizer.end_of_document());
        let (prompt_len, depth) = (len + 1 - answer.len(), random.unit());
        let (sample, mut answers) = self.needles.hide(secret, random, prompt_len, depth, self.asked);
        answers.push(prompt_len..len + 1);
        let mut tokens = sample.prompt;
        tokens.extend(&answer);
        let mut targets: Vec<i32> = tokens[1..].iter().map(|&t| t as i32).collect();
        if self.answer_only {
            let mut last = 0;
            for Range { start, end } in answers {
                targets[last..start - 1].fill(-1);
                last = end - 1;
            }
        }
        tokens.pop();
        Batch::rows(tokens, targets, len)
    }
}
