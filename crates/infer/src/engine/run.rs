//! The engine's thread: who runs, and what a step does.

use super::batch::{Batch, Work};
use super::sequence::{Phase, Sequence};
use super::shared::{Inner, Job, Shared};
use super::snapshot::Snapshot;
use super::store::{Found, Hit, Look};
use super::strides::Strides;
use super::{End, EngineOptions, Event, SavedState, StateError, Stats};
use crate::Error;
use crate::session::piece;
use anser_model::Model;
use anser_tensor::Context;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Tokens of prompts that a step reads at most where others wait for it.
const TOGETHER: usize = 4096;

/// Tokens of prompts at most of which a step predicts every one: each is a row of logits, 256 KiB with a vocabulary of 65,536.
const PREDICTED: usize = 512;

/// The thread: until the last handle is gone. Says whether it could start.
pub(super) fn run(
    ctx: &Context, model: &Model, options: &EngineOptions, shared: &Shared, ready: &Sender<Result<(), Error>>,
) {
    /// Whatever happens here, nobody waits for this thread afterwards.
    struct Close<'a>(&'a Shared);
    impl Drop for Close<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.fail("its thread panicked".into());
            }
            self.0.close();
        }
    }
    let _close = Close(shared);
    let batch = match Batch::new(ctx, model, options, shared.store.form().empty.clone()) {
        Ok(batch) => batch,
        Err(e) => {
            let _ = ready.send(Err(e));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let [prefill_piece, alone_piece] = match options.prefill_piece {
        0 => [piece(ctx, model).min(TOGETHER), piece(ctx, model)],
        given => [given; 2],
    };
    let strides = Strides { length: options.stride, bits: if model.config().hybrid.is_some() { 1 } else { 4 } };
    let (running, loading, done) = (Vec::new(), Vec::new(), Stats::default());
    let apart = batch.is_apart();
    // How a prompt is cut must not depend on others then.
    let alone_piece = if apart { prefill_piece } else { alone_piece };
    let mut runner =
        Runner { ctx, shared, batch, prefill_piece, alone_piece, apart, strides, running, loading, turn: 0, done };
    while runner.admit() {
        runner.step();
        // A device's first failure is for good: nothing would come of other requests.
        if let Err(e) = ctx.check() {
            shared.fail(e.to_string());
            runner.fail(&e.into());
            break;
        }
    }
    runner.running.drain(..).for_each(|s| s.end(End::Cancelled));
}

struct Runner<'m> {
    ctx: &'m Context,
    shared: &'m Shared,
    batch: Batch<'m>,
    /// Tokens of prompts that a step reads at most, and of one that is alone.
    prefill_piece: usize,
    alone_piece: usize,
    /// Whether how a prompt is cut must depend on nothing else: see [`Batch::is_apart`].
    apart: bool,
    strides: Strides,
    /// In the order of their slots.
    running: Vec<Sequence>,
    /// Bytes set apart for each request that has a slot and waits for the state that it goes on from.
    loading: Vec<usize>,
    /// Counts pieces of prompts.
    turn: u64,
    /// What was done since the last report to `shared`.
    done: Stats,
}

enum Next {
    Job(Job),
    Loaded(Job, Found),
}

impl Runner<'_> {
    /// Lets requests join the batch, and waits for one if there are none: whether to go on.
    fn admit(&mut self) -> bool {
        loop {
            let mut inner = self.shared.inner();
            self.report(&mut inner);
            let next = loop {
                if inner.closed {
                    return false;
                }
                if let Some((job, found)) = inner.loaded.pop() {
                    break Next::Loaded(job, found);
                }
                inner.stats.cancelled += inner.queue.purge();
                let needed = self.running.iter().map(|s| s.needed).chain(self.loading.iter().copied());
                let used = needed.fold(0, usize::saturating_add);
                let room = self.shared.memory.map_or(usize::MAX, |most| most.saturating_sub(used));
                let fits = |job: &Job| self.shared.size.of(job.most_tokens()) <= room;
                let taken = self.running.len() + self.loading.len();
                if taken < self.shared.slots
                    && inner.queue.first().is_some_and(fits)
                    && let Some(job) = inner.queue.pop()
                {
                    inner.stats.running += 1;
                    break Next::Job(job);
                }
                if !self.running.is_empty() {
                    return true;
                }
                self.shared.notify();
                inner = self.shared.wait(inner);
            };
            drop(inner);
            match next {
                Next::Job(job) => self.begin(job),
                Next::Loaded(job, found) => {
                    let needed = self.shared.size.of(job.most_tokens());
                    if let Some(i) = self.loading.iter().position(|n| *n == needed) {
                        self.loading.swap_remove(i);
                    }
                    self.shared.store.note(&found);
                    self.start(job, found.hit);
                }
            }
        }
    }

    fn report(&mut self, inner: &mut Inner) {
        let (stats, done) = (&mut inner.stats, std::mem::take(&mut self.done));
        stats.finished += done.finished;
        stats.cancelled += done.cancelled;
        stats.failed += done.failed;
        stats.tokens_read += done.tokens_read;
        stats.tokens_written += done.tokens_written;
        stats.prefix_hits += done.prefix_hits;
        stats.tokens_cached += done.tokens_cached;
        stats.steps += done.steps;
        stats.running = self.running.len() + self.loading.len();
        stats.running_bytes = self.running.iter().map(|s| self.shared.size.of(s.read)).sum();
    }

    /// Lets a request start, or wait for what it goes on from while others run.
    fn begin(&mut self, job: Job) {
        if job.given.is_some() {
            return self.start(job, None);
        }
        let named = (job.start > 0).then_some(job.start);
        let store = &self.shared.store;
        let root = store.root(&job.request.owner, job.initial.as_deref());
        let most = if self.apart { job.start } else { job.most_cached() };
        match store.look(&job.request.owner, root, &job.tokens[..most], named) {
            Look::Here(hit) => self.start(job, hit),
            Look::Elsewhere(search) => {
                self.loading.push(self.shared.size.of(job.most_tokens()));
                self.shared.load(job, search);
            }
        }
    }

    /// Puts a request into the batch, as far on as what was found.
    fn start(&mut self, job: Job, hit: Option<Hit>) {
        let needed = self.shared.size.of(job.most_tokens());
        let Job { request, tokens, start, initial, given, sampler, to } = job;
        let mut sequence = Sequence {
            prompt: start..tokens.len(),
            read: 0,
            prefix: self.shared.store.root(&request.owner, initial.as_deref()),
            initial,
            given,
            logits: Vec::new(),
            chosen: None,
            said: None,
            cached: 0,
            prompt_logprobs: Vec::new(),
            hidden: None,
            phase: Phase::Prompt,
            after_prompt: None,
            turn: self.turn,
            began: Instant::now(),
            needed,
            request,
            sampler,
            to,
            tokens,
        };
        let state = match (hit, &sequence.given) {
            (None, Some(given)) => {
                (sequence.read, sequence.logits) = (start, given.logits.clone());
                given.state(self.shared.store.form())
            }
            (Some(Hit { read, prefix, snapshot }), _) => {
                (sequence.read, sequence.prefix) = (read, prefix);
                sequence.logits = snapshot.logits.clone();
                sequence.cached = read.saturating_sub(start);
                self.done.prefix_hits += u64::from(sequence.cached > 0);
                self.done.tokens_cached += sequence.cached as u64;
                snapshot.state(self.shared.store.form())
            }
            (None, None) => {
                let mut state = self.shared.store.form().empty.clone();
                sequence.initial.iter().for_each(|initial| initial.begin(self.ctx, &mut state));
                state
            }
        };
        match self.batch.push(state) {
            Ok(()) => self.running.push(sequence),
            Err(e) => sequence.end(End::Failed(e.to_string())),
        }
    }

    /// One step of everybody.
    fn step(&mut self) {
        self.take_leave();
        let lengths = self.plan();
        let said = |s: &mut Sequence| s.said.take().map(|event| (s.to.clone(), event));
        let said: Vec<_> = self.running.iter_mut().filter_map(said).collect();
        // Thousands of tokens a second: they are told of while a GPU is at work.
        let tell = || said.into_iter().for_each(|(to, event)| drop(to.try_send(event)));
        if lengths.iter().all(|&n| n == 0) {
            tell();
        } else {
            let (all, choosing) = (lengths.iter().zip(&mut self.running).enumerate(), self.batch.chooses());
            let work: Vec<Work<'_>> =
                all.filter(|(_, (n, _))| **n > 0).map(|(slot, (n, s))| s.work(slot, *n, choosing)).collect();
            let outputs = match self.batch.step(&work, tell) {
                Ok(outputs) => outputs,
                Err(e) => return self.fail(&e),
            };
            let done: Vec<(usize, usize)> = work.iter().map(|w| (w.slot, w.tokens.len())).collect();
            self.done.steps += 1;
            self.done.tokens_read += done.iter().map(|d| d.1 as u64).sum::<u64>();
            for ((slot, count), output) in done.into_iter().zip(outputs) {
                self.running[slot].take(count, output);
                if let Err(e) = self.keep(slot) {
                    return self.fail(&e);
                }
            }
        }
        for slot in 0..self.running.len() {
            if let Err(e) = self.prompt_end(slot) {
                return self.fail(&e);
            }
        }
        self.choose();
        for slot in (0..self.running.len()).rev() {
            if let Some(end) = self.running[slot].ended()
                && let Err(e) = self.finish(slot, end)
            {
                return self.fail(&e);
            }
        }
    }

    /// Those whose clients have gone leave; those that were cut go back to the end of their prompt.
    fn take_leave(&mut self) {
        for slot in (0..self.running.len()).rev() {
            let s = &mut self.running[slot];
            if s.to.is_closed() {
                self.done.cancelled += 1;
                self.remove(slot);
            } else if s.is_beyond()
                && let Some((snapshot, prefix)) = &s.after_prompt
            {
                (s.read, s.prefix, s.logits) = (s.prompt.end, prefix.clone(), snapshot.logits.clone());
                let state = snapshot.state(self.shared.store.form());
                if let Err(e) = self.batch.set_state(slot, state) {
                    s.phase = Phase::Closing(End::Failed(e.to_string()));
                }
            }
        }
    }

    /// Whether another sequence, that is ahead, reads the same prompt.
    fn waits(&self, slot: usize) -> bool {
        let s = &self.running[slot];
        let ahead = |(i, other): (usize, &Sequence)| (other.read, slot) > (s.read, i) && s.may_follow(other);
        matches!(s.phase, Phase::Prompt) && self.running.iter().enumerate().any(ahead)
    }

    /// How many tokens each sequence reads in the next step: the one of each that writes, and of prompts a piece in all, in turn.
    fn plan(&mut self) -> Vec<usize> {
        let waits: Vec<bool> = (0..self.running.len()).map(|i| self.waits(i)).collect();
        let mut lengths: Vec<usize> =
            self.running.iter().zip(&waits).map(|(s, waits)| usize::from(s.left() == 1 && !waits)).collect();
        let mut reading: Vec<usize> = (0..lengths.len()).filter(|&i| self.running[i].left() > 1 && !waits[i]).collect();
        reading.sort_by_key(|&i| self.running[i].turn);
        let mut piece = if lengths.len() == 1 { self.alone_piece } else { self.prefill_piece };
        let mut predicted = PREDICTED;
        for slot in reading {
            let s = &mut self.running[slot];
            let stride = self.strides.next(s.read) - s.read;
            let bounds = [s.prompt.start, s.prompt.end];
            let bound = bounds.into_iter().find(|&b| b > s.read).map_or(usize::MAX, |b| b - s.read);
            let (most_rows, rows) = if s.predicts() { (PREDICTED, predicted) } else { (usize::MAX, usize::MAX) };
            let most = [s.left(), bound, self.batch.room(slot), most_rows].into_iter().min().unwrap_or(0);
            lengths[slot] = if self.apart {
                // A whole piece or none.
                Some(most.min(self.prefill_piece)).filter(|&n| n <= piece.min(rows)).unwrap_or(0)
            } else {
                [most, piece, stride, rows].into_iter().min().unwrap_or(0)
            };
            piece -= lengths[slot];
            predicted -= if s.predicts() { lengths[slot] } else { 0 };
            if lengths[slot] > 0 {
                self.turn += 1;
                s.turn = self.turn;
            }
        }
        lengths
    }

    /// Whether states of the sequence are kept for others: what a given state is after has no name.
    fn caches(&self, s: &Sequence) -> bool {
        s.given.is_none() && self.shared.store.keeps() && !self.apart
    }

    /// Keeps the state at the end of a stride of the prompt.
    fn keep(&mut self, slot: usize) -> Result<(), Error> {
        let s = &self.running[slot];
        if self.strides.is_end(s.read) && s.read < s.prompt.end && self.caches(s) {
            let snapshot = self.batch.snapshot(slot, Vec::new())?;
            self.shared.store.insert(&s.request.owner, s.prefix.key(), s.read, Arc::new(snapshot));
        }
        Ok(())
    }

    /// Tells the client that its prompt was read, if it was.
    fn prompt_end(&mut self, slot: usize) -> Result<(), Error> {
        let s = &mut self.running[slot];
        if !matches!(s.phase, Phase::Prompt) || s.left() > 0 {
            return Ok(());
        }
        // A constraint may cut the answer anywhere.
        let goes_back = s.request.keeps_state() && s.request.constraint.is_some();
        let keeps = self.caches(&self.running[slot]);
        let followers = self.followers(slot);
        if goes_back || keeps || !followers.is_empty() {
            let s = &self.running[slot];
            let snapshot = Arc::new(self.batch.snapshot(slot, s.logits.clone())?);
            if keeps {
                self.shared.store.insert(&s.request.owner, s.prefix.key(), s.read, snapshot.clone());
            }
            self.follow(slot, &followers, &snapshot)?;
            if goes_back {
                let s = &mut self.running[slot];
                s.after_prompt = Some((snapshot, s.prefix.clone()));
            }
        }
        let s = &mut self.running[slot];
        let (logprobs, hidden) = (std::mem::take(&mut s.prompt_logprobs), s.hidden.take());
        let tokens = s.prompt.len();
        let _ = s.to.try_send(Event::Prompt { tokens, cached: s.cached, logprobs, hidden });
        s.phase = if s.request.max_tokens == 0 { Phase::Closing(End::Length) } else { Phase::Answer };
        Ok(())
    }

    /// Those that wait for the prompt in `slot`.
    fn followers(&self, slot: usize) -> Vec<usize> {
        let first = &self.running[slot];
        (0..self.running.len()).filter(|&i| i != slot && self.running[i].may_follow(first)).collect()
    }

    /// They go on from its end.
    fn follow(&mut self, slot: usize, followers: &[usize], snapshot: &Snapshot) -> Result<(), Error> {
        let first = &self.running[slot];
        let (read, prefix) = (first.read, first.prefix.clone());
        for &i in followers {
            self.batch.set_state(i, snapshot.state(self.shared.store.form()))?;
            let s = &mut self.running[i];
            self.done.prefix_hits += u64::from(s.cached == 0);
            self.done.tokens_cached += (s.prompt.len() - s.cached) as u64;
            (s.read, s.prefix, s.logits) = (read, prefix.clone(), snapshot.logits.clone());
            s.cached = s.prompt.len();
        }
        Ok(())
    }

    /// The next token of all that have a prediction, on all threads.
    fn choose(&mut self) {
        let writes = |s: &&mut Sequence| matches!(s.phase, Phase::Answer) && s.left() == 0;
        let each: Vec<Mutex<&mut Sequence>> = self.running.iter_mut().filter(writes).map(Mutex::new).collect();
        let written = AtomicU64::new(0);
        self.ctx.threads().run(each.len(), |i| {
            let mut s = each[i].lock().unwrap_or_else(|e| e.into_inner());
            // A constraint is not ours: its panic ends one answer.
            let result = catch_unwind(AssertUnwindSafe(|| s.choose()));
            if let Err(reason) = result.unwrap_or_else(|_| Err("choosing a token panicked".into())) {
                s.phase = Phase::Closing(End::Failed(reason));
            }
            written.fetch_add(u64::from(s.said.is_some()), Ordering::Relaxed);
        });
        self.done.tokens_written += written.into_inner();
    }

    /// Ends a sequence: its state is kept.
    fn finish(&mut self, slot: usize, end: End) -> Result<(), Error> {
        let failed = matches!(end, End::Failed(_));
        let caches = self.caches(&self.running[slot]);
        let s = &mut self.running[slot];
        let save = s.request.keeps_state();
        let mut snapshot = None;
        if !failed && (save || caches) {
            let here = std::mem::take(&mut s.logits);
            let logits = if here.is_empty() { self.batch.logits(slot)? } else { here };
            snapshot = Some(Arc::new(self.batch.snapshot(slot, logits)?));
        }
        let mut s = self.remove(slot);
        *if failed { &mut self.done.failed } else { &mut self.done.finished } += 1;
        // What a client reads after the end counts its request.
        let shared = self.shared;
        let mut inner = shared.inner();
        inner.seconds += 0.1 * (s.began.elapsed().as_secs_f64() - inner.seconds);
        self.report(&mut inner);
        drop(inner);
        let Some(snapshot) = snapshot else {
            s.end(end);
            return Ok(());
        };
        if s.request.keep_state {
            // Where the answer is cut before its last token there was no step that told of it.
            s.tell();
            let (tokens, bound) = (s.tokens[..].into(), shared.store.form().empty.cache);
            let _ = s.to.try_send(Event::State(SavedState { snapshot: snapshot.clone(), tokens, bound }));
        }
        let key = s.prefix.key();
        match s.request.save_as.take() {
            Some(name) => {
                let (owner, tokens) = (std::mem::take(&mut s.request.owner), std::mem::take(&mut s.tokens));
                let initial = s.initial.take();
                let done = |result: Result<(), StateError>| {
                    s.end(match result {
                        Ok(()) => end,
                        Err(StateError::Unreachable(why)) => End::Unreachable(why),
                        Err(e) => End::Failed(e.to_string()),
                    });
                };
                shared.store.save(&owner, &name, key, (initial, &tokens), snapshot, done);
            }
            None => {
                if caches {
                    shared.store.insert(&s.request.owner, key, s.read, snapshot);
                }
                s.end(end);
            }
        }
        Ok(())
    }

    fn remove(&mut self, slot: usize) -> Sequence {
        if let Err(e) = self.batch.swap_remove(slot) {
            // The device has failed, which the next step tells everybody.
            eprintln!("a sequence leaves: {e}");
        }
        self.running.swap_remove(slot)
    }

    /// Ends all sequences: the step that failed was everybody's.
    fn fail(&mut self, e: &Error) {
        for slot in (0..self.running.len()).rev() {
            self.done.failed += 1;
            self.remove(slot).end(End::Failed(e.to_string()));
        }
    }
}
