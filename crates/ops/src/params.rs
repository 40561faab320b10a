//! The parameter arena: all f32 master weights in one flat vector, ordered by optimiser group.

use anser_tensor::cuda::DevicePtr;
use anser_tensor::{Buf, Context, DType};
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

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
    device: Option<Arc<OnDevice>>,
    layout: Arc<()>,
}

/// The arena on a GPU: master weights, and a copy in the type of activations if that is not f32.
struct OnDevice {
    master: Buf,
    rounded: Option<Buf>,
}

impl fmt::Debug for OnDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OnDevice({} parameters)", self.master.len())
    }
}

impl ParamSet {
    /// Copies the values to the context's GPU, if it has one, where kernels read them from then on.
    pub fn to_device(&mut self, ctx: &Context) {
        let Some(cuda) = ctx.cuda() else { return };
        let mut master = ctx.alloc_f32(self.values.len());
        master.copy_from(&self.values);
        let rounded = (ctx.dtype() != DType::F32).then(|| ctx.alloc(self.values.len()));
        if let Some(r) = &rounded {
            cuda.round(master.ptr(), r.ptr(), r.len(), r.dtype());
        }
        self.device = Some(Arc::new(OnDevice { master, rounded }));
    }

    /// The current values, from wherever they are.
    pub fn current(&self) -> Cow<'_, [f32]> {
        match &self.device {
            Some(d) => Cow::Owned(d.master.to_vec()),
            None => Cow::Borrowed(&self.values),
        }
    }

    /// Copies the values back from the GPU, if they are on one.
    pub fn to_host(&mut self) {
        if let Some(d) = &self.device {
            self.values = d.master.to_vec();
        }
    }

    /// The arenas on the GPU: f32, and the rounded copy (null if there is none).
    pub fn arenas(&self) -> (DevicePtr, DevicePtr) {
        let Some(d) = &self.device else { return (DevicePtr::NULL, DevicePtr::NULL) };
        (d.master.ptr(), d.rounded.as_ref().map_or(DevicePtr::NULL, Buf::ptr))
    }

    /// Where a parameter's f32 values are on the GPU.
    pub fn master(&self, p: Param) -> DevicePtr {
        self.arenas().0.offset(self.specs[p.id].range.start, DType::F32)
    }

    /// Where a parameter's values for matrix products are on the GPU, in the type of activations.
    pub fn rounded(&self, p: Param) -> DevicePtr {
        let start = self.specs[p.id].range.start;
        match self.device.as_ref().and_then(|d| d.rounded.as_ref()) {
            Some(r) => r.ptr().offset(start, r.dtype()),
            None => self.master(p),
        }
    }

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
        let set = ParamSet { specs, values: vec![0.0; at], device: None, layout: Arc::default() };
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
        self.layout = Arc::default();
    }

    /// Stands for the arena's layout and what of it is trainable: a key for tables made from them ([`Context::table`]).
    pub fn layout(&self) -> &Arc<()> {
        &self.layout
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
