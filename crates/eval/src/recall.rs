//! Multi-query associative recall over a grid of rows ([`anser_data::recall`]), as in the paper's table 6 (arXiv 2503.14456).

use crate::Error;
use crate::experiment::{Lesson, Run, Task, Tasks, best};
use anser_data::recall::Recall;
use anser_model::Cache;
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
    /// (tokens of a row, pairs, steps): what training begins with where a task's rows have more pairs, as many of them side by side as a row of the task
    /// has room for. With many pairs from the start models learn to say any of the values, and no further.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lessons: Vec<(usize, usize, u64)>,
}

fn name(&(len, pairs): &(usize, usize)) -> String {
    format!("{len},{pairs}")
}

impl Tasks for Grid {
    fn tasks(&self) -> Result<Vec<Task>, Error> {
        let recall = |field, row: &(usize, usize)| {
            let task = Recall { len: row.0, pairs: row.1, vocab: self.vocab };
            task.validate().map_err(|e| Error::Input(format!("task.{field} ({}): {e}", name(row))))?;
            Ok::<_, Error>(task)
        };
        let task = |row: &(usize, usize)| {
            let task = recall("rows", row)?;
            let mut lessons = Vec::new();
            for &(len, pairs, steps) in self.lessons.iter().filter(|l| l.1 < row.1) {
                let easier = recall("lessons", &(len, pairs))?;
                if !task.len.is_multiple_of(len) {
                    return Err(Error::Input(format!("task.lessons: rows of {len} don't fill rows of {}", task.len)));
                }
                let rows = move |seed, stream, rows| easier.batch(seed, stream, rows * (task.len / len));
                lessons.push(Lesson { steps, rows: Box::new(rows) });
            }
            Ok(Task {
                name: name(row),
                vocab: self.vocab,
                answers: row.1,
                tested: vec![row.1],
                rows: Box::new(move |seed, stream, rows, _| task.batch(seed, stream, rows)),
                lessons,
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
    widths.sort_unstable();
    widths.dedup();
    for width in widths {
        let mut models: Vec<&Run> = Vec::new();
        for r in best.iter().filter(|r| r.width == width) {
            if !models.iter().any(|m| m.model() == r.model()) {
                models.push(r);
            }
        }
        for m in models {
            let of = |row: &(usize, usize)| best.iter().find(|r| r.model() == m.model() && r.task == name(row));
            let mut line = |bound: Option<Cache>| {
                let kept = bound.map_or(String::new(), |c| {
                    let each = if c.whole_chunks { "whole chunks" } else { "single tokens" };
                    format!(", {} kept by {}, {each}", c.most, c.by)
                });
                let _ = write!(text, "\n| {}{kept} | {} | {width} | {} |", m.kind, m.layers, m.parameters);
                for row in &grid.rows {
                    let right = of(row).and_then(|r| r.test(bound)?.iter().find(|a| a.answers == row.1));
                    let cell = right.map_or("not run".into(), |a| format!("{:.2}", 100.0 * a.right));
                    let _ = write!(text, " {cell} |");
                }
            };
            line(None);
            let bounds: Vec<Cache> =
                grid.rows.iter().find_map(of).iter().flat_map(|r| &r.bounded).map(|b| b.cache).collect();
            bounds.into_iter().for_each(|bound| line(Some(bound)));
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
    use crate::experiment::{Accuracy, Bounded, Experiment, Kind};
    use anser_model::Eviction;
    use anser_tensor::Context;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn configurations_are_whole() {
        for text in [SMALL, include_str!("../configs/recall.toml"), include_str!("../configs/recall-hybrids.toml")] {
            Experiment::<Grid>::parse(text).unwrap();
        }
        let e = Experiment::<Grid>::parse(include_str!("../configs/recall.toml")).unwrap();
        let grid = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64), (512, 64), (1024, 128), (2048, 256)];
        assert_eq!((e.task.rows, e.task.vocab, e.models.widths), (grid.to_vec(), 8192, vec![64, 128, 256, 512]));
        let e = Experiment::<Grid>::parse(&SMALL.replace("[64, 4]", "[64, 17]")).unwrap_err().to_string();
        assert!(e.contains("64,17") && e.contains("68 tokens"), "{e}");
        let e = Experiment::<Grid>::parse(&SMALL.replace("[task]", "[task]\nlessons = [[24, 2, 10]]"))
            .unwrap_err()
            .to_string();
        assert!(e.contains("24 don't fill rows of 64"), "{e}");
    }

    #[test]
    fn lessons_come_first_and_are_as_long() {
        let lessons = vec![(16, 2, 3), (32, 4, 2), (32, 8, 5)];
        let tasks = Grid { vocab: 64, rows: vec![(32, 8)], lessons }.tasks().unwrap();
        let (easy, harder) = (Recall { len: 16, pairs: 2, vocab: 64 }, Recall { len: 32, pairs: 4, vocab: 64 });
        for step in 0..8 {
            let expected = match step {
                0..3 => easy.batch(7, step, 10),
                3..5 => harder.batch(7, step, 5),
                _ => Recall { len: 32, pairs: 8, vocab: 64 }.batch(7, step, 5),
            };
            let batch = tasks[0].batch(7, step, 5);
            assert!(batch == expected && batch.tokens.len() == 160, "step {step}");
        }
    }

    #[test]
    fn hybrids_are_tested_with_bounds_too() {
        let e = Experiment::<Grid>::parse(
            "[task]\nvocab = 32\nrows = [[32, 4]]\n\
             [models]\nkinds = ['rwkv7', { rwkv-x = { blocks = 1, chunk = 4, topk = 2 } }]\nlayers = [1]\nwidths = [32]\nhead_size = 16\n\
             caches = [{ most = 64, keep = 48, window = 8, by = 'error', whole_chunks = true },\
                       { most = 20, keep = 16, window = 4, by = 'recent', whole_chunks = true }]\n\
             [train]\nrows = 32\nmicro_rows = 32\nsteps = 60\nlr = [1e-2]\nwarmup = 5\nweight_decay = 0.0\nbeta2 = 0.99\n\
             grad_clip = 1.0\nseeds = [1]\neval_every = 30\nstop_at = 2.0\ntest_rows = 100\n",
        )
        .unwrap();
        let runs = e.run(&[Context::cpu(1)], None, &AtomicBool::new(false), &|_| ()).unwrap();
        let [plain, hybrid] = &runs[..] else { panic!("{} runs", runs.len()) };
        assert!(plain.bounded.is_empty() && hybrid.bounded.len() == 2);
        // A bound that no row reaches changes nothing; one that some reach is applied, in the middle of rows.
        assert_eq!(hybrid.bounded[0].accuracy, hybrid.accuracy);
        assert_ne!(hybrid.bounded[1].accuracy, hybrid.accuracy);
        assert!(hybrid.at(4).unwrap().right > 0.1, "{:?}", hybrid.accuracy);
        assert_eq!(table(&e.task, &runs).lines().count(), 6, "a line for each model and bound");
        let small =
            include_str!("../configs/recall-hybrids.toml").replace("most = 256, keep = 192", "most = 128, keep = 64");
        assert!(Experiment::<Grid>::parse(&small).unwrap_err().to_string().contains("cache of 128"));
    }

    #[test]
    fn the_table_has_a_place_for_every_point() {
        let accuracy = vec![Accuracy { answers: 4, right: 0.5, last: 0.5, rows: 0.1 }];
        let run = Run { task: "64,4".into(), layers: 2, width: 64, accuracy: accuracy.clone(), ..Run::default() };
        let bounded = vec![Bounded { cache: Cache::new(32, Eviction::Error, true), accuracy }];
        let hybrid =
            Run { kind: Kind::RwkvX { blocks: 1, chunk: 4, topk: 2 }, accuracy: vec![], bounded, ..run.clone() };
        let grid = Grid { vocab: 8192, rows: vec![(64, 4), (256, 32), (2048, 256)], lessons: Vec::new() };
        let wide = Run { width: 128, ..run.clone() };
        let other = Run { task: "256,32".into(), ..run.clone() };
        assert_eq!(table(&grid, &[run.clone(), wide, other]).matches("*paper").count(), 2, "each width once");
        let text = table(&grid, &[run, hybrid]);
        assert!(text.contains("| RWKV-7 | 2 | 64 | 0 | 50.00 | not run | not run |"), "{text}");
        assert!(text.contains("| > 99 | - | 72.93 |"), "{text}");
        let line =
            "| RWKV-X, 1 x 2 chunks of 4, 32 kept by error, whole chunks | 2 | 64 | 0 | 50.00 | not run | not run |";
        assert!(text.contains(line), "{text}");
    }
}
