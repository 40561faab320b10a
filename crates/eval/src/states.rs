//! State tracking: products in a group, which a state has to carry exactly ([`anser_data::groups`]).
//!
//! The paper's figure 8 (arXiv 2503.14456) counts the layers that models need for such products of up to 20 elements. Here all
//! rows of training have one length, but for lessons with shorter ones, and every position is labelled; longer rows are tested too.

use crate::Error;
use crate::experiment::{Lesson, Run, Task, Tasks, best};
use anser_data::groups::Group;
use anser_train::{Line, chart};
use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// An experiment that takes no more than minutes on a CPU.
pub const SMALL: &str = include_str!("../configs/states-small.toml");

/// Section `[task]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct States {
    /// Groups, each a task.
    pub groups: Vec<Group>,
    /// Inputs are swaps of two things alone: what one head can track in one layer if rates are doubled (appendix D of the paper).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub swaps: bool,
    /// Elements of a row in training.
    pub trained: usize,
    /// Lengths tested.
    pub tested: Vec<usize>,
    /// (elements of a row, steps): what training begins with, as many of these rows side by side as a row of the task has room for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lessons: Vec<(usize, u64)>,
}

impl Tasks for States {
    fn tasks(&self) -> Result<Vec<Task>, Error> {
        if self.trained == 0 || self.tested.contains(&0) {
            return Err(Error::Input("task.trained and task.tested must be at least 1".into()));
        }
        // A row is a beginning and its elements.
        let len = self.trained + 1;
        for (elements, _) in &self.lessons {
            if *elements == 0 || !len.is_multiple_of(elements + 1) {
                return Err(Error::Input(format!(
                    "task.lessons: beginnings with {elements} elements don't fill rows of {len} tokens"
                )));
            }
        }
        let task = |&group: &Group| {
            let table = match self.swaps {
                true => group.swaps().ok_or_else(|| {
                    Error::Input(format!("task.swaps is for groups of all permutations, S5 and S3, not for {group}"))
                })?,
                false => group.table(),
            };
            let lesson = |&(elements, steps): &(usize, u64)| {
                let (table, side_by_side) = (table.clone(), len / (elements + 1));
                let rows = move |seed, stream, rows| table.batch(seed, stream, rows * side_by_side, elements);
                Lesson { steps, rows: Box::new(rows) }
            };
            Ok(Task {
                name: self.name(group),
                vocab: table.vocab(),
                answers: self.trained,
                tested: self.tested.clone(),
                lessons: self.lessons.iter().map(lesson).collect(),
                rows: Box::new(move |seed, stream, rows, len| table.batch(seed, stream, rows, len)),
            })
        };
        self.groups.iter().map(task).collect()
    }
}

impl States {
    fn name(&self, group: Group) -> String {
        if self.swaps { format!("{group} by swaps") } else { group.to_string() }
    }
}

/// Percentages of right products at each tested position, the best run of each model, as a table in Markdown.
pub fn table(states: &States, runs: &[Run]) -> String {
    let mut text = String::from("| group | model | layers | width | parameters | steps | lr |");
    for n in &states.tested {
        let _ = write!(text, " {n} |");
    }
    text += "\n|---|---|---|---|---|---|---|";
    text += &"---|".repeat(states.tested.len());
    for r in best(runs) {
        let Run { task, kind, layers, width, parameters, steps, lr, .. } = r;
        let _ = write!(text, "\n| {task} | {kind} | {layers} | {width} | {parameters} | {steps} | {lr} |");
        for &n in &states.tested {
            let _ = write!(text, " {:.1} |", r.at(n).map_or(f64::NAN, |a| 100.0 * a.last));
        }
    }
    text + "\n"
}

/// For each group a picture (SVG) of accuracy over positions: (group, picture).
pub fn pictures(states: &States, runs: &[Run]) -> Vec<(String, String)> {
    let picture = |&group: &Group| {
        let name = states.name(group);
        let line = |r: &&Run| Line {
            name: format!("{}, {} layers", r.kind, r.layers),
            points: r.accuracy.iter().map(|a| (a.answers as f64, 100.0 * a.last)).collect(),
        };
        let lines: Vec<Line> =
            best(runs).iter().filter(|r| r.task == name).map(line).filter(|l| !l.points.is_empty()).collect();
        let title = format!("{name}: right products, % (trained on {} elements)", states.trained);
        (name.replace(' ', "-"), chart(&title, "position", &lines))
    };
    states.groups.iter().map(picture).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::{Experiment, Kind};
    use anser_tensor::Context;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[test]
    fn configurations_are_whole() {
        for text in [
            SMALL,
            include_str!("../configs/states-32.toml"),
            include_str!("../configs/states-swaps.toml"),
            include_str!("../configs/states-s5.toml"),
            include_str!("../configs/states-lessons.toml"),
            include_str!("../configs/states.toml"),
        ] {
            let e = Experiment::<States>::parse(text).unwrap();
            assert!(e.task.tested.contains(&e.task.trained) && e.models.kinds.contains(&Kind::Rwkv7Doubled));
        }
        let wrong =
            |from: &str, to: &str| Experiment::<States>::parse(&SMALL.replace(from, to)).unwrap_err().to_string();
        assert!(wrong("\"Z2\"", "\"Z61\"").contains("Z61"));
        assert!(wrong("head_size = ", "head_size = 1").contains("head_size"));
        assert!(wrong("[task]", "[task]\nswaps = true").contains("not for Z2"));
        assert!(wrong("[task]", "[task]\nlessons = [[5, 10]]").contains("with 5 elements don't fill rows of 13"));
        assert!(wrong("\nrows = ", "\nrow = ").contains("row"));
    }

    #[test]
    fn lessons_come_first_and_are_as_long() {
        let lessons = vec![(1, 3), (3, 2)];
        let states = States { groups: vec![Group::S3], swaps: true, trained: 7, tested: vec![7], lessons };
        let (tasks, table) = (states.tasks().unwrap(), Group::S3.swaps().unwrap());
        for step in 0..7 {
            let (rows, elements) = match step {
                0..3 => (20, 1),
                3..5 => (10, 3),
                _ => (5, 7),
            };
            let batch = tasks[0].batch(9, step, 5);
            assert!(batch == table.batch(9, step, rows, elements) && batch.tokens.len() == 40, "step {step}");
        }
    }

    #[test]
    fn a_small_model_learns_short_products_and_results_go_on() {
        let e = Experiment::<States>::parse(
            "[task]\ngroups = ['Z60']\ntrained = 2\ntested = [1, 2, 3]\n\
             [models]\nkinds = ['rwkv7-doubled', 'transformer']\nlayers = [1]\nwidths = [32]\nhead_size = 16\n\
             [train]\nrows = 64\nmicro_rows = 40\nsteps = 60\nlr = [5e-3]\nwarmup = 5\nweight_decay = 0.0\nbeta2 = 0.99\n\
             grad_clip = 1.0\nseeds = [1]\neval_every = 20\nstop_at = 2.0\ntest_rows = 100\n",
        )
        .unwrap();
        let go = AtomicBool::new(false);
        let path = std::env::temp_dir().join(format!("anser-states-{}.json", std::process::id()));
        let notes = AtomicUsize::new(0);
        let note = |_| {
            notes.fetch_add(1, Ordering::SeqCst);
        };
        let contexts = [Context::cpu(1), Context::cpu(1)];
        let runs = e.run(&contexts, Some(&path), &go, &note).unwrap();
        assert_eq!((runs.len(), notes.load(Ordering::SeqCst), runs[1].kind), (2, 6, Kind::Transformer));
        for r in &runs {
            // The first product is the element itself: any model can learn that, and none can by chance.
            assert!(r.at(1).unwrap().last > 0.9, "{r}: {:?}", r.accuracy);
            assert!(r.error.is_none() && r.steps == 60 && r.curve.len() == 3);
        }
        // What is done is not done again, and another experiment's file is left alone.
        let again = e.run(&contexts[..1], Some(&path), &go, &note).unwrap();
        assert!(notes.load(Ordering::SeqCst) == 6 && again[0].accuracy == runs[0].accuracy);
        let mut other = e.clone();
        other.train.steps = 61;
        assert!(other.run(&contexts, Some(&path), &go, &note).unwrap_err().to_string().contains("another experiment"));
        std::fs::remove_file(path).unwrap();
        assert_eq!(table(&e.task, &runs).lines().count(), 4);
        assert!(pictures(&e.task, &runs)[0].1.contains("Transformer, 1 layers"));
    }
}
