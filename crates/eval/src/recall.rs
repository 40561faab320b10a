//! Multi-query associative recall over a grid of rows ([`anser_data::recall`]), as in the paper's table 6 (arXiv 2503.14456).

use crate::Error;
use crate::experiment::{Run, Task, Tasks, best};
use anser_data::recall::Recall;
use anser_train::{Line, chart};
use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// An experiment that takes no more than minutes on a CPU.
pub const SMALL: &str = include_str!("../configs/recall-small.toml");

/// What the paper reports for RWKV-7 with 2 layers, as recalled and not checked against it: for each width the percentages at
/// [`POINTS`]; 99 stands for "more than 99".
const PAPER: [(usize, [f64; 6]); 4] = [
    (64, [99.0, 99.0, 99.0, 98.43, 95.01, 72.93]),
    (128, [99.0, 99.0, 99.0, 99.0, 99.0, 94.97]),
    (256, [99.0, 99.0, 99.0, 99.0, 99.0, 98.97]),
    (512, [99.0; 6]),
];

/// The paper's (tokens of a row, pairs).
const POINTS: [(usize, usize); 6] = [(64, 4), (128, 8), (256, 16), (512, 64), (1024, 128), (2048, 256)];

/// Section `[task]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// Tokens: half keys, half values.
    pub vocab: usize,
    /// (tokens of a row, pairs), each a task.
    pub rows: Vec<(usize, usize)>,
}

fn name(&(len, pairs): &(usize, usize)) -> String {
    format!("{len},{pairs}")
}

impl Tasks for Grid {
    fn tasks(&self) -> Result<Vec<Task>, Error> {
        let task = |row: &(usize, usize)| {
            let task = Recall { len: row.0, pairs: row.1, vocab: self.vocab };
            task.validate().map_err(|e| Error::Input(format!("task.rows ({}): {e}", name(row))))?;
            Ok(Task {
                name: name(row),
                vocab: self.vocab,
                answers: row.1,
                tested: vec![row.1],
                rows: Box::new(move |seed, stream, rows, _| task.batch(seed, stream, rows)),
            })
        };
        self.rows.iter().map(task).collect()
    }
}

/// Percentages of right answers, the best run of each model, as a table in Markdown; below each width what the paper has.
pub fn table(grid: &Grid, runs: &[Run]) -> String {
    let mut text = String::from("| model | layers | width | parameters |");
    for row in &grid.rows {
        let _ = write!(text, " {} |", name(row));
    }
    text += "\n|---|---|---|---|";
    text += &"---|".repeat(grid.rows.len());
    let best = best(runs);
    let mut widths: Vec<usize> = best.iter().map(|r| r.width).collect();
    widths.dedup();
    for width in widths {
        let mut models: Vec<&Run> = Vec::new();
        for r in best.iter().filter(|r| r.width == width) {
            if !models.iter().any(|m| m.model() == r.model()) {
                models.push(r);
            }
        }
        for m in models {
            let _ = write!(text, "\n| {} | {} | {width} | {} |", m.kind, m.layers, m.parameters);
            for row in &grid.rows {
                let run = best.iter().find(|r| r.model() == m.model() && r.task == name(row));
                let right = run.and_then(|r| r.at(row.1)).map(|a| format!("{:.2}", 100.0 * a.right));
                let _ = write!(text, " {} |", right.as_deref().unwrap_or("not run"));
            }
        }
        if let Some((_, percents)) = PAPER.iter().find(|p| p.0 == width) {
            let _ = write!(text, "\n| *paper (recalled, vocabulary 8192)* | 2 | {width} | |");
            for row in &grid.rows {
                let cell = match POINTS.iter().position(|p| p == row).map(|i| percents[i]) {
                    Some(99.0) => "> 99".into(),
                    Some(percent) => format!("{percent:.2}"),
                    None => "-".into(),
                };
                let _ = write!(text, " {cell} |");
            }
        }
    }
    text + "\n"
}

/// A picture (SVG) of accuracy during training.
pub fn picture(runs: &[Run]) -> String {
    let line = |r: &&Run| Line {
        name: format!("{} {} D{}", r.task, r.kind, r.width),
        points: r.curve.iter().map(|&(step, right)| (step as f64, 100.0 * right)).collect(),
    };
    chart("Associative recall: right answers, %", "step", &best(runs).iter().map(line).collect::<Vec<Line>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::{Accuracy, Experiment, Kind};

    #[test]
    fn configurations_are_whole() {
        for text in [SMALL, include_str!("../configs/recall.toml")] {
            Experiment::<Grid>::parse(text).unwrap();
        }
        let e = Experiment::<Grid>::parse(include_str!("../configs/recall.toml")).unwrap();
        let grid = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64), (512, 64), (1024, 128), (2048, 256)];
        assert_eq!((e.task.rows, e.task.vocab, e.models.widths), (grid.to_vec(), 8192, vec![64, 128, 256, 512]));
        let e = Experiment::<Grid>::parse(&SMALL.replace("[64, 4]", "[64, 17]")).unwrap_err().to_string();
        assert!(e.contains("64,17") && e.contains("68 tokens"), "{e}");
    }

    #[test]
    fn the_table_has_a_place_for_every_point() {
        let accuracy = vec![Accuracy { answers: 4, right: 0.5, last: 0.5, rows: 0.1 }];
        let run = Run { task: "64,4".into(), kind: Kind::Rwkv7, layers: 2, width: 64, accuracy, ..Run::default() };
        let grid = Grid { vocab: 8192, rows: vec![(64, 4), (256, 32), (2048, 256)] };
        let text = table(&grid, &[run]);
        assert!(text.contains("| RWKV-7 | 2 | 64 | 0 | 50.00 | not run | not run |"), "{text}");
        assert!(text.contains("| > 99 | - | 72.93 |"), "{text}");
    }
}
