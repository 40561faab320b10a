use super::snapshot::{Form, Snapshot};
use crate::{Error, InitialState, state_file};
use anser_model::{Cache, Model, State};
use anser_tensor::Context;
use anser_tensor::cuda::Cuda;
use std::path::Path;
use std::sync::Arc;

/// Where a sequence is: its state, the prediction after it, and the tokens that led to it as far as they are known. It comes of a request
/// ([`super::Request::keep_state`]) or a file, and others go on from it ([`super::Start::State`]). A clone is the same one.
#[derive(Clone)]
pub struct SavedState {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) tokens: Arc<[u32]>,
    pub(super) bound: Option<Cache>,
}

impl SavedState {
    /// The beginning of a sequence, with a bound on what attention keeps or a tuned initial state.
    ///
    /// # Errors
    /// When the bound doesn't fit the model, the model has no state, or the device fails.
    pub fn beginning(
        ctx: &Context, model: &Model, bound: Option<Cache>, initial: Option<&InitialState>,
    ) -> Result<SavedState, Error> {
        let _aside = ctx.cuda().map(Cuda::aside);
        let mut state = Form::new(ctx, model.config(), bound)?.empty;
        initial.iter().for_each(|initial| initial.begin(ctx, &mut state));
        SavedState::new(ctx, &state, Vec::new())
    }

    /// From a file of [`SavedState::save`] or [`crate::Session::save`] with the same model. Its tokens are not in it.
    ///
    /// # Errors
    /// When the file is no state file, or of another version or model.
    pub fn open(ctx: &Context, model: &Model, path: &Path) -> Result<SavedState, Error> {
        let _aside = ctx.cuda().map(Cuda::aside);
        let (state, logits) = state_file::open(ctx, model, path)?;
        SavedState::new(ctx, &state, logits)
    }

    fn new(ctx: &Context, state: &State, logits: Vec<f32>) -> Result<SavedState, Error> {
        let snapshot = Snapshot::new(state, logits);
        ctx.check()?;
        Ok(SavedState { snapshot: snapshot.into(), tokens: [].into(), bound: state.cache })
    }

    /// Writes a file with everything that is needed to go on later.
    ///
    /// # Errors
    /// When writing fails.
    pub fn save(&self, ctx: &Context, model: &Model, path: &Path) -> Result<(), Error> {
        let _aside = ctx.cuda().map(Cuda::aside);
        let state = self.snapshot.state(&Form::new(ctx, model.config(), self.bound)?);
        state_file::write(ctx, model, state, &self.snapshot.logits, path)
    }

    /// The bound on what attention keeps, which an engine that goes on from it must have ([`super::EngineOptions::bound`]).
    pub fn bound(&self) -> Option<Cache> {
        self.bound
    }
}

impl PartialEq for SavedState {
    /// Whether it is the same one.
    fn eq(&self, other: &SavedState) -> bool {
        Arc::ptr_eq(&self.snapshot, &other.snapshot)
    }
}

impl Eq for SavedState {}

impl std::fmt::Debug for SavedState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SavedState({} bytes)", self.snapshot.bytes())
    }
}
