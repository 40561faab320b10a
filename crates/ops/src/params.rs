//! The parameter arena: all f32 master weights in one flat vector, ordered by optimiser group.

use std::ops::Range;

/// The three groups of the official optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// Matrices named `*.weight`: learning rate 1x, with weight decay.
    Decay,
    /// Everything else: 1x, no weight decay.
    Plain,
    /// `att.w0`: 2x, no weight decay.
    Double,
}

/// Name, shape and place of one parameter.
#[derive(Clone, Debug)]
pub struct ParamSpec {
    /// Official name, as in the checkpoint.
    pub name: String,
    /// Shape as in the checkpoint, for instance [1, 1, C].
    pub shape: Vec<usize>,
    /// Optimiser group.
    pub group: Group,
    /// Place in the arena.
    pub range: Range<usize>,
    /// Frozen parameters get no gradient.
    pub trainable: bool,
}

/// A handle to one parameter, seen as a matrix (vectors have one row).
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// Index of its [`ParamSpec`].
    pub id: usize,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// All parameters of a model: specifications and the arena of values.
#[derive(Clone, Debug, Default)]
pub struct ParamSet {
    specs: Vec<ParamSpec>,
    values: Vec<f32>,
}

impl ParamSet {
    /// Lays out an arena of zeros for parameters (name, shape, group); the order within a group is kept. Handles
    /// come back in the order given.
    pub fn new(list: Vec<(String, Vec<usize>, Group)>) -> (ParamSet, Vec<Param>) {
        let mut order: Vec<usize> = (0..list.len()).collect();
        order.sort_by_key(|&i| list[i].2);
        let mut starts = vec![0; list.len()];
        let mut at = 0;
        for &i in &order {
            starts[i] = at;
            at += list[i].1.iter().product::<usize>();
        }
        let spec = |(start, (name, shape, group)): (usize, (String, Vec<usize>, Group))| {
            let range = start..start + shape.iter().product::<usize>();
            ParamSpec { name, shape, group, range, trainable: true }
        };
        let specs: Vec<ParamSpec> = starts.into_iter().zip(list).map(spec).collect();
        let set = ParamSet { specs, values: vec![0.0; at] };
        let handles = (0..set.specs.len()).map(|id| set.handle(id)).collect();
        (set, handles)
    }

    /// Specifications, in the order given to [`ParamSet::new`]; `specs()[p.id]` belongs to handle `p`.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// The handle of the parameter with index `id`.
    pub fn handle(&self, id: usize) -> Param {
        let shape = &self.specs[id].shape;
        let cols = shape.last().copied().unwrap_or(1).max(1);
        Param { id, rows: self.specs[id].range.len() / cols, cols }
    }

    /// Freezes or frees the parameters for which `f(name)` decides.
    pub fn set_trainable(&mut self, f: impl Fn(&str) -> bool) {
        for s in &mut self.specs {
            s.trainable = f(&s.name);
        }
    }

    /// The arena.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The arena, mutable.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// The values of one parameter.
    pub fn get(&self, p: Param) -> &[f32] {
        &self.values[self.specs[p.id].range.clone()]
    }

    /// The values of one parameter, mutable.
    pub fn get_mut(&mut self, p: Param) -> &mut [f32] {
        &mut self.values[self.specs[p.id].range.clone()]
    }

    /// Whether the parameter gets a gradient.
    pub fn is_trainable(&self, p: Param) -> bool {
        self.specs[p.id].trainable
    }
}
