//! What clients and the engine's thread share: who waits, and what was done.

use super::snapshot::{Form, Snapshot};
use super::store::{Begin, Found, Search, StateStore};
use super::{End, EngineOptions, Event, Refused, Request, Stats};
use crate::{InitialState, Sampler};
use anser_model::Model;
use anser_ops::attention::Past;
use anser_tensor::DType;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;

/// What clients and the thread share.
pub(super) struct Shared {
    pub vocab: usize,
    pub store: StateStore,
    pub size: Size,
    /// Bytes that running sequences may take.
    pub memory: Option<usize>,
    pub slots: usize,
    pub unread: usize,
    most_waiting: usize,
    front: Arc<Front>,
    /// Why nothing can be answered any more, if it is so.
    pub failure: watch::Sender<Option<String>>,
}

/// Where requests are until they run.
struct Front {
    inner: Mutex<Inner>,
    /// Told when somebody waits, was loaded, or nobody runs, and at the end.
    changed: Condvar,
}

pub(super) struct Inner {
    pub queue: Queue,
    /// Requests that have their slots, and what was found for them.
    pub loaded: Vec<(Job, Found)>,
    pub stats: Stats,
    draining: bool,
    pub closed: bool,
    /// Seconds that a request ran, a moving mean.
    pub seconds: f64,
}

/// Bytes that a sequence takes.
#[derive(Clone, Copy)]
pub(super) struct Size {
    /// Of its recurrent state.
    fixed: usize,
    /// What attention keeps of a token.
    token: usize,
    /// Tokens of which attention keeps something at most.
    most: usize,
}

impl Size {
    /// Of states of a form: keys and values, notes, and the mean keys of chunks.
    fn new(form: &Form) -> Size {
        let bound = form.empty.cache;
        let chunk = form.chunks.map_or(1, |c| c.size);
        let token = |past: &Past| {
            let [keys, noted] = past.channels();
            let rows = 2 * keys + bound.map_or(0, |b| b.notes()) * noted;
            rows * form.ctx.dtype().size() + (keys * DType::F32.size()).div_ceil(chunk)
        };
        Size {
            fixed: form.empty.vars().map(|v| v.buf().bytes()).sum(),
            token: form.empty.attention.iter().map(|a| token(&a.pasts[0])).sum(),
            most: bound.map_or(usize::MAX, |b| b.most),
        }
    }

    /// After so many tokens: memory for what attention keeps doubles as it grows.
    pub fn of(&self, tokens: usize) -> usize {
        let rows = tokens.min(self.most).checked_next_power_of_two().unwrap_or(tokens);
        self.fixed.saturating_add(rows.saturating_mul(self.token))
    }
}

/// A request that waits.
pub(super) struct Job {
    pub request: Request,
    /// All tokens since the beginning: those behind a named state, then the prompt.
    pub tokens: Vec<u32>,
    /// Where the prompt begins.
    pub start: usize,
    /// What the tokens begin from.
    pub initial: Option<Arc<InitialState>>,
    /// The state before the prompt, if the request came with it.
    pub given: Option<Arc<Snapshot>>,
    pub sampler: Sampler,
    pub to: Sender<Event>,
}

impl Job {
    pub fn new(mut request: Request, begin: Begin, sampler: Sampler, to: Sender<Event>) -> Job {
        let Begin { initial, history: mut tokens, given } = begin;
        let start = tokens.len();
        tokens.append(&mut request.prompt);
        Job { request, tokens, start, initial, given, sampler, to }
    }

    /// Tokens that need not be read where a state after them is kept. Predictions of the prompt's tokens come of reading them; the hidden vector of
    /// reading the last.
    pub fn most_cached(&self) -> usize {
        match (&self.request.prompt_logprobs, self.request.hidden) {
            (Some(_), _) => self.start,
            (None, true) => self.tokens.len() - 1,
            (None, false) => self.tokens.len(),
        }
    }

    /// Tokens that the sequence has at most.
    pub fn most_tokens(&self) -> usize {
        self.tokens.len().saturating_add(self.request.max_tokens)
    }
}

/// Requests that wait: owners take turns, and those of one owner come in their order.
#[derive(Default)]
pub(super) struct Queue {
    owners: VecDeque<(String, VecDeque<Job>)>,
}

impl Queue {
    fn len(&self) -> usize {
        self.owners.iter().map(|(_, jobs)| jobs.len()).sum()
    }

    fn push(&mut self, job: Job) {
        match self.owners.iter_mut().find(|(owner, _)| *owner == job.request.owner) {
            Some((_, jobs)) => jobs.push_back(job),
            None => self.owners.push_back((job.request.owner.clone(), VecDeque::from([job]))),
        }
    }

    pub fn first(&self) -> Option<&Job> {
        self.owners.front()?.1.front()
    }

    pub fn pop(&mut self) -> Option<Job> {
        let (owner, mut jobs) = self.owners.pop_front()?;
        let job = jobs.pop_front();
        if !jobs.is_empty() {
            self.owners.push_back((owner, jobs));
        }
        job
    }

    /// Takes out those whose clients have gone: how many.
    pub fn purge(&mut self) -> u64 {
        let before = self.len();
        self.owners.iter_mut().for_each(|(_, jobs)| jobs.retain(|j| !j.to.is_closed()));
        self.owners.retain(|(_, jobs)| !jobs.is_empty());
        (before - self.len()) as u64
    }
}

impl Front {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Shared {
    pub fn new(model: &Model, options: &EngineOptions, store: StateStore) -> Shared {
        let inner = Inner {
            queue: Queue::default(),
            loaded: Vec::new(),
            stats: Stats::default(),
            draining: false,
            closed: false,
            seconds: 1.0,
        };
        Shared {
            vocab: model.config().vocab_size,
            size: Size::new(store.form()),
            store,
            memory: (options.memory > 0).then_some(options.memory),
            slots: options.slots,
            unread: options.unread,
            most_waiting: options.waiting,
            front: Arc::new(Front { inner: Mutex::new(inner), changed: Condvar::new() }),
            failure: watch::Sender::new(None),
        }
    }

    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        self.front.inner()
    }

    pub fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.front.changed.wait(inner).unwrap_or_else(|e| e.into_inner())
    }

    pub fn notify(&self) {
        self.front.changed.notify_all();
    }

    /// Searches for what a request can go on from, in another thread, and puts it among those that were loaded.
    pub fn load(&self, job: Job, search: Search) {
        let front = self.front.clone();
        self.store.search(search, move |found| {
            let mut inner = front.inner();
            if inner.closed {
                let _ = job.to.try_send(Event::End(End::Cancelled));
            } else {
                inner.loaded.push((job, found));
                front.changed.notify_all();
            }
        });
    }

    /// Queues a request that makes sense.
    pub fn queue(&self, job: Job) -> Result<(), Refused> {
        let needed = self.size.of(job.most_tokens());
        if let Some(most) = self.memory.filter(|m| needed > *m) {
            return Err(Refused::Invalid(format!(
                "the request may need {needed} bytes of memory and {most} are set apart: ask for fewer tokens"
            )));
        }
        if let Some(why) = self.failure() {
            return Err(Refused::Failed(why));
        }
        let mut inner = self.inner();
        if inner.draining || inner.closed {
            return Err(Refused::Draining);
        }
        inner.stats.cancelled += inner.queue.purge();
        let waiting = inner.queue.len();
        if waiting + inner.stats.running >= self.slots.saturating_add(self.most_waiting) {
            inner.stats.refused += 1;
            let seconds = (inner.seconds * (waiting + 1) as f64 / self.slots as f64).clamp(1.0, 60.0);
            return Err(Refused::Busy { retry_after: Duration::from_secs_f64(seconds) });
        }
        inner.queue.push(job);
        self.notify();
        Ok(())
    }

    pub fn stats(&self) -> Stats {
        let (cached_states, cached_bytes, disk_bytes) = self.store.size();
        let inner = self.inner();
        Stats { waiting: inner.queue.len(), cached_states, cached_bytes, disk_bytes, ..inner.stats }
    }

    pub fn drain(&self) {
        let mut inner = self.inner();
        inner.draining = true;
        while !inner.closed && inner.stats.running + inner.queue.len() > 0 {
            inner = self.wait(inner);
        }
        drop(inner);
        self.store.flush();
    }

    /// Why nothing can be answered any more, if it is so. The first reason is the one that counts.
    pub fn failure(&self) -> Option<String> {
        self.failure.borrow().clone()
    }

    /// Notes that nothing can be answered any more.
    pub fn fail(&self, why: String) {
        self.failure.send_if_modified(|failure| failure.is_none().then(|| *failure = Some(why)).is_some());
    }

    /// Takes no more requests, and cancels those that are there.
    pub fn close(&self) {
        let mut inner = self.inner();
        inner.closed = true;
        let loaded: Vec<Job> = inner.loaded.drain(..).map(|(job, _)| job).collect();
        for job in loaded.into_iter().chain(std::iter::from_fn(|| inner.queue.pop())) {
            let _ = job.to.try_send(Event::End(End::Cancelled));
        }
        self.notify();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Session;
    use anser_model::{Cache, Config, Eviction, Hybrid, Init};
    use anser_tensor::Context;

    #[test]
    fn a_sequence_takes_what_is_set_apart_for_it() {
        let plain = Config { head_size: 16, ..Config::new(2, 64, 20) };
        let hybrid = |key_heads| Config {
            hybrid: Some(Hybrid { chunk: 8, topk: 2, key_heads, ..Hybrid::new(2) }),
            ..plain.clone()
        };
        let bound = |by| Some(Cache::new(64, by, true));
        for (config, bound) in [
            (plain.clone(), None),
            (hybrid(None), None),
            (hybrid(Some(1)), None),
            (hybrid(Some(1)), bound(Eviction::Attention)),
            (hybrid(Some(2)), bound(Eviction::Error)),
        ] {
            let ctx = Context::cpu(1);
            let model = Model::init(&ctx, &config, Init::Current, 1).unwrap();
            let size = Size::new(&Form::new(&ctx, &config, bound).unwrap());
            let mut session = Session::new(&ctx, &model);
            if let Some(bound) = bound {
                session = session.bounded(bound).unwrap();
            }
            for tokens in 1..=60 {
                session.feed(&[tokens as u32 % 20]).unwrap();
                let (set_apart, taken) = (size.of(tokens), session.bytes());
                assert!(taken <= set_apart, "{tokens} tokens take {taken} bytes, not {set_apart}");
                assert!(set_apart <= taken + taken / 8, "{tokens} tokens take {taken} bytes, far from {set_apart}");
            }
        }
    }
}
