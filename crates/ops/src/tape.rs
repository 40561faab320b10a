//! The tape: operations run at once and, while recording, note how to go back.
//!
//! An operation is a method on [`Tape`] (written in the operation's own folder): it computes its output and, if
//! a gradient is needed, records one closure holding what the backward pass needs. [`Tape::backward`] runs the
//! closures in reverse. Memory follows ownership: a value lives as long as a [`Var`] or a closure holds it.
//!
//! A closure holds a value as a [`Kept`]. Where the tape computes again instead of keeping ([`Recompute`]), that is a promise: the
//! first closure that asks has the operation's outputs made again from what it keeps of its inputs, and each output lives
//! until the last closure that holds it is done.

use crate::again::{Output, Recompute};
use crate::{Kept, Param, ParamSet};
use anser_tensor::cuda::{DevicePtr, PartialSum};
use anser_tensor::{Buf, Context, DType};
use std::sync::{Arc, Mutex};

/// The place of a gradient. Gradients that several values have in common are shared until one of them is added to.
#[derive(Default)]
struct Place {
    gradient: Mutex<Option<Gradient>>,
    /// Where the gradients of several values lie together, and which of them this is.
    together: Option<(Arc<Together>, usize)>,
}

type Slot = Arc<Place>;

/// A gradient [rows, cols] and, if whoever made it on a GPU summed it too, partial sums over its rows, for the gradient of a bias.
struct Gradient {
    value: Arc<Buf>,
    sums: Option<RowSums>,
}

/// One of several sums over rows in `count` parts, each `stride` elements after the one before.
#[derive(Clone)]
pub(crate) struct RowSums {
    parts: Arc<Buf>,
    first: usize,
    count: usize,
    stride: usize,
}

impl RowSums {
    /// The sums that a kernel wrote as `parts` [count, N, size].
    pub(crate) fn each<const N: usize>(parts: Buf, count: usize, size: usize) -> [RowSums; N] {
        let parts = Arc::new(parts);
        std::array::from_fn(|k| RowSums { parts: parts.clone(), first: k * size, count, stride: N * size })
    }
}

/// Memory for the gradients of `count` values of equal size, at equal distances; taken when the first is written.
struct Together {
    count: usize,
    parts: Mutex<Vec<Option<Buf>>>,
}

impl Together {
    /// Part `i` of `len` elements, unless somebody had it before.
    fn take(&self, ctx: &Context, i: usize, len: usize) -> Option<Buf> {
        let mut parts = self.parts.lock().unwrap_or_else(|e| e.into_inner());
        if parts.is_empty() {
            *parts = ctx.alloc_together(self.count, len).into_iter().map(Some).collect();
        }
        parts[i].take()
    }
}

/// A value on the tape: a matrix [rows, cols] and, if it needs one, the place of its gradient. Cheap to clone.
#[derive(Clone)]
pub struct Var {
    rows: usize,
    cols: usize,
    value: Arc<Buf>,
    /// How to make the value again, if it can be.
    again: Option<Arc<Output>>,
    grad: Option<Slot>,
}

impl Var {
    /// A value without a gradient.
    pub fn constant(rows: usize, cols: usize, value: Buf) -> Var {
        assert_eq!(rows * cols, value.len());
        Var { rows, cols, value: Arc::new(value), again: None, grad: None }
    }

    /// The value for a closure of the backward pass: held, or made again there.
    pub fn keep(&self) -> Kept {
        match &self.again {
            Some(output) => Kept::Again(output.clone()),
            None => Kept::Held(self.value.clone()),
        }
    }

    /// A value whose gradient is wanted: read it with [`Var::take_grad`] after [`Tape::backward`].
    pub fn leaf(rows: usize, cols: usize, value: Buf) -> Var {
        Var { grad: Some(Slot::default()), ..Var::constant(rows, cols, value) }
    }

    /// The same value as a leaf of its own.
    pub fn detached(&self) -> Var {
        Var { grad: Some(Slot::default()), ..self.clone() }
    }

    /// The same value without a gradient.
    pub fn without_grad(&self) -> Var {
        Var { grad: None, ..self.clone() }
    }

    /// Rows (tokens, or state slots).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (channels).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values, row-major, on the CPU. Empty in a forecast and on a GPU: see [`Var::to_vec`].
    pub fn data(&self) -> &[f32] {
        &self.value
    }

    /// A copy of the values, wherever they are; waits for the device.
    pub fn to_vec(&self) -> Vec<f32> {
        self.value.to_vec()
    }

    /// The buffer of the values.
    pub fn buf(&self) -> &Buf {
        &self.value
    }

    /// The buffer for writing, a copy of it if somebody else holds it.
    pub fn buf_mut(&mut self) -> &mut Buf {
        if Arc::get_mut(&mut self.value).is_none() {
            self.value = Arc::new(self.value.duplicate());
        }
        Arc::get_mut(&mut self.value).unwrap_or_else(|| unreachable!("nobody else has it yet"))
    }

    /// Whether a gradient flows here.
    pub fn needs_grad(&self) -> bool {
        self.grad.is_some()
    }

    /// Takes the gradient, if one arrived.
    pub fn take_grad(&self) -> Option<Buf> {
        self.slot().take()
    }

    /// Adds `g` to the gradient (nothing happens if none is needed).
    pub fn add_grad(&self, g: impl Into<Arc<Buf>>) {
        self.slot().add(g);
    }

    /// The gradient slot without the value, for closures that do not need the value: keeping it would keep its memory.
    pub fn slot(&self) -> GradSlot {
        GradSlot(self.grad.clone(), self.rows * self.cols)
    }

    /// The buffer itself, or a copy of it if somebody else holds it.
    pub fn into_owned(self) -> Buf {
        owned(self.value)
    }

    /// The buffer itself, if nobody else holds it.
    pub fn into_buf(self) -> Option<Buf> {
        Arc::try_unwrap(self.value).ok()
    }
}

/// The place of a gradient, without the value it belongs to.
#[derive(Clone)]
pub struct GradSlot(Option<Slot>, usize);

impl GradSlot {
    /// Whether a gradient is wanted.
    pub fn wanted(&self) -> bool {
        self.0.is_some()
    }

    /// Number of elements of the gradient.
    #[allow(clippy::len_without_is_empty)] // "empty" would read as "no gradient"
    pub fn len(&self) -> usize {
        self.1
    }

    /// Takes the gradient, if one arrived.
    pub fn take(&self) -> Option<Buf> {
        self.take_shared().map(owned)
    }

    /// Takes the gradient, if one arrived, to read it: other values may have the same.
    pub fn take_shared(&self) -> Option<Arc<Buf>> {
        self.take_summed().map(|(g, _)| g)
    }

    /// Takes the gradient, if one arrived, with its sums over rows, if it came with them.
    pub(crate) fn take_summed(&self) -> Option<(Arc<Buf>, Option<RowSums>)> {
        self.0.as_ref().and_then(|s| lock(s).take()).map(|g| (g.value, g.sums))
    }

    /// [`GradSlot::add`] of a gradient with its sums over rows, which are kept as long as nothing else is added.
    pub(crate) fn add_summed(&self, g: Buf, sums: RowSums) {
        self.put(g.into(), Some(sums));
    }

    /// Adds `g` to the gradient (nothing happens if none is wanted).
    pub fn add(&self, g: impl Into<Arc<Buf>>) {
        self.put(g.into(), None);
    }

    fn put(&self, g: Arc<Buf>, sums: Option<RowSums>) {
        let Some(slot) = &self.0 else { return };
        assert_eq!(g.len(), self.1);
        let mut slot = lock(slot);
        *slot = Some(match slot.take() {
            None => Gradient { value: g, sums },
            Some(before) => {
                let mut sum = owned(before.value);
                sum.add(&g);
                Gradient { value: sum.into(), sums: None }
            }
        });
    }

    /// A buffer for a gradient that is going to be added here, where those of the values made together with this one want it.
    pub fn alloc(&self, ctx: &Context) -> Buf {
        let together = self.0.as_ref().and_then(|s| s.together.as_ref());
        together.and_then(|(all, i)| all.take(ctx, *i, self.1)).unwrap_or_else(|| ctx.alloc(self.1))
    }

    /// A buffer for the gradient, and whether it holds what has arrived so far, to be added to and given back with [`GradSlot::add`].
    /// `None` if no gradient is wanted.
    pub fn begin(&self, ctx: &Context) -> Option<(Buf, bool)> {
        self.0.as_ref()?;
        Some(self.take().map_or_else(|| (self.alloc(ctx), false), |sum| (sum, true)))
    }

    /// Lets `f(buffer, add)` write a gradient of activations into a new buffer, or add it to what has arrived so far: one pass
    /// less than [`GradSlot::add`]. Nothing happens if none is wanted.
    pub fn accumulate(&self, ctx: &Context, f: impl FnOnce(&Buf, bool)) {
        let Some((g, add)) = self.begin(ctx) else { return };
        f(&g, add);
        self.add(g);
    }
}

/// The buffer, or a copy of it if it is shared.
fn owned(b: Arc<Buf>) -> Buf {
    Arc::try_unwrap(b).unwrap_or_else(|b| b.duplicate())
}

fn lock(slot: &Slot) -> std::sync::MutexGuard<'_, Option<Gradient>> {
    slot.gradient.lock().unwrap_or_else(|e| e.into_inner())
}

/// Which parameters have a gradient so far. On a GPU the first of a step overwrites what the arena holds, which need not be cleared.
pub struct Written(Vec<bool>);

impl Written {
    /// None yet.
    pub fn nothing(params: &ParamSet) -> Written {
        Written(vec![false; params.specs().len()])
    }

    /// At the end of a step on a GPU: zeros for the parameters to which no gradient came.
    pub fn clear_others(&self, ctx: &Context, params: &ParamSet, grads: &Buf) {
        let Some(gpu) = ctx.cuda() else { return };
        for (s, _) in params.specs().iter().zip(&self.0).filter(|(s, written)| s.trainable && !**written) {
            gpu.clear(grads.ptr().offset(s.range.start, DType::F32), s.range.len() * DType::F32.size());
        }
    }
}

/// What a backward closure works with.
pub struct Backward<'a> {
    ctx: &'a Context,
    params: &'a ParamSet,
    grads: &'a mut Buf,
    written: Option<&'a mut Written>,
    /// Partial sums that wait to be added up in one launch, with their parameters and their memory.
    sums: Vec<(Param, PartialSum, Arc<Buf>)>,
}

impl<'a> Backward<'a> {
    /// The context.
    pub fn ctx(&self) -> &'a Context {
        self.ctx
    }

    /// The parameters.
    pub fn params(&self) -> &'a ParamSet {
        self.params
    }

    /// A value that was kept, or that is made again now.
    pub fn value(&self, kept: &Kept) -> Arc<Buf> {
        kept.value(self.ctx, self.params)
    }

    /// Runs `compute` on the CPU; nothing in a forecast and on a GPU.
    pub fn run(&mut self, compute: impl FnOnce(&mut Self)) {
        if !self.ctx.is_dry() && self.ctx.cuda().is_none() {
            compute(self);
        }
    }

    /// The values of a parameter.
    pub fn param(&self, p: Param) -> &'a [f32] {
        self.params.get(p)
    }

    /// Where the gradient of a parameter is on the GPU, and whether the caller adds to it or, being the first of the step, overwrites
    /// it; `None` if it is frozen.
    pub fn param_grad_ptr(&mut self, p: Param) -> Option<(DevicePtr, bool)> {
        let s = &self.params.specs()[p.id];
        let add = |w: &mut Written| std::mem::replace(&mut w.0[p.id], true);
        s.trainable
            .then(|| (self.grads.ptr().offset(s.range.start, DType::F32), self.written.as_deref_mut().is_none_or(add)))
    }

    /// Adds partial sums [count, K, size] on the GPU to the gradients of K parameters, later, many in one launch.
    pub(crate) fn add_param_sums<const K: usize>(&mut self, params: [Param; K], parts: Buf, count: usize, size: usize) {
        params.into_iter().zip(RowSums::each::<K>(parts, count, size)).for_each(|(p, sums)| self.add_sums(p, sums));
    }

    /// The same for one parameter.
    pub(crate) fn add_sums(&mut self, p: Param, sums: RowSums) {
        let again = self.sums.iter().any(|s| s.0.id == p.id);
        if again || self.sums.len() == PartialSum::MOST {
            self.flush();
        }
        let Some((to, add)) = self.param_grad_ptr(p) else { return };
        let RowSums { parts, first, count, stride } = sums;
        let from = parts.ptr().offset(first, DType::F32);
        self.sums.push((p, PartialSum { to, add, parts: from, count, stride, cols: p.rows * p.cols }, parts));
    }

    /// Adds up the partial sums that wait.
    fn flush(&mut self) {
        let sums: Vec<PartialSum> = self.sums.iter().map(|s| s.1).collect();
        if let Some(gpu) = self.ctx.cuda() {
            gpu.add_partial_sums(&sums);
        }
        self.sums.clear();
    }

    /// The gradient of a parameter, to be added to; `None` if it is frozen.
    pub fn param_grad(&mut self, p: Param) -> Option<&mut [f32]> {
        let s = &self.params.specs()[p.id];
        s.trainable.then(|| &mut self.grads[s.range.clone()])
    }
}

type Step<'p> = Box<dyn FnOnce(&mut Backward<'_>) + 'p>;

/// Runs operations and, when recording, remembers how to differentiate them.
pub struct Tape<'p> {
    ctx: Context,
    params: &'p ParamSet,
    grads: Option<&'p mut Buf>,
    written: Option<&'p mut Written>,
    steps: Vec<Step<'p>>,
    recompute: Recompute,
}

impl<'p> Tape<'p> {
    /// A tape that only computes: inference.
    pub fn inference(ctx: &Context, params: &'p ParamSet) -> Tape<'p> {
        Tape { ctx: ctx.clone(), params, grads: None, written: None, steps: Vec::new(), recompute: Recompute::Nothing }
    }

    /// A tape that records; parameter gradients are added to `grads`, laid out like the arena of `params`.
    pub fn recording(ctx: &Context, params: &'p ParamSet, grads: &'p mut Buf) -> Tape<'p> {
        assert!(ctx.is_dry() || grads.len() == params.values().len());
        Tape { grads: Some(grads), ..Tape::inference(ctx, params) }
    }

    /// The tape with a note of what has been written to the gradients in this step, which saves clearing them on a GPU; on the CPU
    /// gradients are always added.
    pub fn noting(self, written: Option<&'p mut Written>) -> Tape<'p> {
        Tape { written, ..self }
    }

    /// The tape with the choice of what is computed again going back.
    pub fn recomputing(self, recompute: Recompute) -> Tape<'p> {
        Tape { recompute, ..self }
    }

    /// Lets closures make `outputs` again with `make` instead of keeping them, if this tape computes `what` again. `make` gives the
    /// bits of the forward pass; it holds its inputs as [`Kept`].
    pub(crate) fn again<const N: usize>(
        &self, what: Recompute, outputs: [Var; N], make: impl Fn(&Tape<'_>) -> [Buf; N] + Send + Sync + 'static,
    ) -> [Var; N] {
        if !self.is_recording() || self.recompute < what {
            return outputs;
        }
        let make = Output::group(N, move |ctx, params| make(&Tape::inference(ctx, params)).into());
        let mut made = make.into_iter();
        outputs.map(|v| Var { again: made.next(), ..v })
    }

    /// A value that an operation kept.
    pub(crate) fn value(&self, kept: &Kept) -> Arc<Buf> {
        kept.value(&self.ctx, self.params)
    }

    /// The context.
    pub fn ctx(&self) -> &Context {
        &self.ctx
    }

    /// The parameters.
    pub fn params(&self) -> &'p ParamSet {
        self.params
    }

    /// The values of a parameter.
    pub fn param(&self, p: Param) -> &'p [f32] {
        self.params.get(p)
    }

    /// Whether operations record.
    pub fn is_recording(&self) -> bool {
        self.grads.is_some()
    }

    /// Whether an operation on these inputs and parameters must record a backward step.
    pub fn needs_grad(&self, inputs: &[&Var], params: &[Param]) -> bool {
        self.is_recording()
            && (inputs.iter().any(|v| v.needs_grad()) || params.iter().any(|&p| self.params.is_trainable(p)))
    }

    /// The output of an operation: with a gradient slot if `needs_grad`.
    pub fn output(&self, rows: usize, cols: usize, value: Buf, needs_grad: bool) -> Var {
        if needs_grad { Var::leaf(rows, cols, value) } else { Var::constant(rows, cols, value) }
    }

    /// The outputs of an operation that one product takes up: on a GPU their gradients lie at equal distances, as their values should
    /// ([`Context::alloc_each`]).
    pub(crate) fn outputs<const K: usize>(
        &self, rows: usize, cols: usize, values: [Buf; K], needs_grad: bool,
    ) -> [Var; K] {
        let mut vars = values.map(|value| self.output(rows, cols, value, needs_grad));
        if needs_grad && K > 1 && self.ctx.cuda().is_some() {
            let together = Arc::new(Together { count: K, parts: Mutex::default() });
            for (i, v) in vars.iter_mut().enumerate() {
                v.grad = Some(Arc::new(Place { together: Some((together.clone(), i)), ..Place::default() }));
            }
        }
        vars
    }

    /// Records a backward step. It is run after those of all later operations.
    pub fn record(&mut self, step: impl FnOnce(&mut Backward<'_>) + 'p) {
        self.steps.push(Box::new(step));
    }

    /// Runs `compute` on the CPU; nothing in a forecast, in which buffers have no memory, and on a GPU, which has kernels.
    pub fn run(&self, compute: impl FnOnce()) {
        if !self.ctx.is_dry() && self.ctx.cuda().is_none() {
            compute();
        }
    }

    /// Parameter gradients during the forward pass, for an operation at the root (the loss) that makes its gradients at once.
    pub fn with_backward<R>(&mut self, f: impl FnOnce(&mut Backward<'_>) -> R) -> Option<R> {
        let grads = self.grads.as_deref_mut()?;
        let written = self.written.as_deref_mut();
        let mut b = Backward { ctx: &self.ctx, params: self.params, grads, written, sums: Vec::new() };
        let result = f(&mut b);
        b.flush();
        Some(result)
    }

    /// Back-propagates from the gradients already placed (by a loss, or with [`Var::add_grad`]).
    pub fn backward(self) {
        let Tape { ctx, params, grads, written, steps, .. } = self;
        let Some(grads) = grads else { return };
        let mut b = Backward { ctx: &ctx, params, grads, written, sums: Vec::new() };
        for step in steps.into_iter().rev() {
            step(&mut b);
        }
        b.flush();
    }

    /// Runs `f` without keeping anything but its inputs and outputs, and runs it again when going back
    /// (gradient checkpointing). `f` must be deterministic.
    pub fn checkpoint(&mut self, inputs: &[&Var], f: impl Fn(&mut Tape<'_>, &[Var]) -> Vec<Var> + 'p) -> Vec<Var> {
        let inputs: Vec<Var> = inputs.iter().map(|&v| v.clone()).collect();
        if !self.is_recording() {
            return f(self, &inputs);
        }
        let plain = f(&mut Tape::inference(&self.ctx, self.params), &inputs);
        let outputs: Vec<Var> = plain.iter().map(Var::detached).collect();
        let slots: Vec<GradSlot> = outputs.iter().map(Var::slot).collect();
        self.record(move |b| {
            let grads: Vec<Option<Arc<Buf>>> = slots.iter().map(GradSlot::take_shared).collect();
            if grads.iter().all(Option::is_none) {
                return;
            }
            let leaves: Vec<Var> =
                inputs.iter().map(|v| if v.needs_grad() { v.detached() } else { v.clone() }).collect();
            b.flush();
            let mut tape = Tape::recording(b.ctx, b.params, b.grads).noting(b.written.as_deref_mut());
            for (out, g) in f(&mut tape, &leaves).iter().zip(grads) {
                if let Some(g) = g {
                    out.add_grad(g);
                }
            }
            tape.backward();
            for (leaf, v) in leaves.iter().zip(&inputs) {
                if let Some(g) = leaf.slot().take_shared() {
                    v.add_grad(g);
                }
            }
        });
        outputs
    }
}
