//! The engine's thread: who waits, who runs, and what a step does.

use super::batch::{Batch, Output, Rows, Wants, Work};
use super::snapshot::Snapshot;
use super::store::{Prefix, StateStore};
use super::{End, EngineOptions, Event, Refused, Request, Stats, TokenLogprob};
use crate::session::piece;
use crate::{Error, Sampler};
use anser_model::{Config, Model};
use anser_tensor::Context;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// What clients and the thread share.
pub(super) struct Shared {
    pub vocab: usize,
    pub store: StateStore,
    size: Size,
    memory: usize,
    slots: usize,
    most_waiting: usize,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    queue: Queue,
    stats: Stats,
    draining: bool,
    closed: bool,
    /// Seconds that a request ran, a moving mean.
    seconds: f64,
}

/// Bytes that a sequence takes.
#[derive(Clone, Copy)]
struct Size {
    /// Of its recurrent state.
    fixed: usize,
    /// What attention keeps of a token.
    token: usize,
    /// Tokens of which attention keeps something at most.
    most: usize,
}

impl Size {
    fn new(config: &Config, options: &EngineOptions) -> Size {
        let c = config.n_embd;
        let attention = config.hybrid.map_or(0, |h| h.layers);
        let kept = 2 + options.bound.map_or(0, |b| b.notes());
        Size {
            fixed: 4 * c * (config.recurrent_layers() * (2 + config.head_size) + attention),
            token: 4 * c * attention * kept,
            most: options.bound.map_or(usize::MAX, |b| b.most),
        }
    }

    /// After so many tokens: memory for what attention keeps doubles as it grows.
    fn of(&self, tokens: usize) -> usize {
        let rows = tokens.min(self.most).checked_next_power_of_two().unwrap_or(tokens);
        self.fixed.saturating_add(rows.saturating_mul(self.token))
    }
}

/// A request that waits.
pub(super) struct Job {
    request: Request,
    /// All tokens since the beginning: those behind a named state, then the prompt.
    tokens: Vec<u32>,
    /// Where the prompt begins.
    start: usize,
    sampler: Sampler,
    to: UnboundedSender<Event>,
    stop: Arc<AtomicUsize>,
}

impl Job {
    pub fn new(
        mut request: Request, history: Vec<u32>, sampler: Sampler, to: UnboundedSender<Event>, stop: Arc<AtomicUsize>,
    ) -> Job {
        let (start, mut tokens) = (history.len(), history);
        tokens.append(&mut request.prompt);
        Job { request, tokens, start, sampler, to, stop }
    }

    /// Tokens that the sequence has at most.
    fn most_tokens(&self) -> usize {
        self.tokens.len().saturating_add(self.request.max_tokens)
    }
}

/// Requests that wait: owners take turns, and those of one owner come in their order.
#[derive(Default)]
struct Queue {
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

    fn first(&self) -> Option<&Job> {
        self.owners.front()?.1.front()
    }

    fn pop(&mut self) -> Option<Job> {
        let (owner, mut jobs) = self.owners.pop_front()?;
        let job = jobs.pop_front();
        if !jobs.is_empty() {
            self.owners.push_back((owner, jobs));
        }
        job
    }

    /// Takes out those whose clients have gone: how many.
    fn purge(&mut self) -> u64 {
        let before = self.len();
        self.owners.iter_mut().for_each(|(_, jobs)| jobs.retain(|j| !j.to.is_closed()));
        self.owners.retain(|(_, jobs)| !jobs.is_empty());
        (before - self.len()) as u64
    }
}

impl Shared {
    pub fn new(model: &Model, options: &EngineOptions, store: StateStore) -> Shared {
        let inner =
            Inner { queue: Queue::default(), stats: Stats::default(), draining: false, closed: false, seconds: 1.0 };
        Shared {
            vocab: model.config().vocab_size,
            store,
            size: Size::new(model.config(), options),
            memory: if options.memory == 0 { usize::MAX } else { options.memory },
            slots: options.slots,
            most_waiting: options.waiting,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed.wait(inner).unwrap_or_else(|e| e.into_inner())
    }

    /// Queues a request that makes sense.
    pub fn queue(&self, job: Job) -> Result<(), Refused> {
        let needed = self.size.of(job.most_tokens());
        if needed > self.memory {
            let most = self.memory;
            return Err(Refused::Invalid(format!(
                "the request may need {needed} bytes of memory and {most} are set apart: ask for fewer tokens"
            )));
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
        self.changed.notify_all();
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

    /// Takes no more requests, and cancels those that are there.
    pub fn close(&self) {
        let mut inner = self.inner();
        inner.closed = true;
        while let Some(job) = inner.queue.pop() {
            let _ = job.to.send(Event::End(End::Cancelled));
        }
        self.changed.notify_all();
    }
}

/// The thread: until the last handle is gone. Says whether it could start.
pub(super) fn run(
    ctx: &Context, model: &Model, options: &EngineOptions, shared: &Shared, ready: &Sender<Result<(), Error>>,
) {
    /// Whatever happens here, nobody waits for this thread afterwards.
    struct Close<'a>(&'a Shared);
    impl Drop for Close<'_> {
        fn drop(&mut self) {
            self.0.close();
        }
    }
    let _close = Close(shared);
    let batch = match Batch::new(ctx, model, options.slots, shared.store.form().empty.clone()) {
        Ok(batch) => batch,
        Err(e) => {
            let _ = ready.send(Err(e));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let prefill_piece = if options.prefill_piece == 0 { piece(ctx) } else { options.prefill_piece };
    let (stride, running) = (options.stride, Vec::new());
    let mut runner = Runner { ctx, shared, batch, prefill_piece, stride, running, turn: 0, done: Stats::default() };
    while runner.admit() {
        runner.step();
    }
    runner.running.drain(..).for_each(|s| s.end(End::Cancelled));
}

struct Runner<'m> {
    ctx: &'m Context,
    shared: &'m Shared,
    batch: Batch<'m>,
    prefill_piece: usize,
    stride: usize,
    /// In the order of their slots.
    running: Vec<Sequence>,
    /// Counts pieces of prompts.
    turn: u64,
    /// What was done since the last report to `shared`.
    done: Stats,
}

/// A request that runs.
struct Sequence {
    request: Request,
    sampler: Sampler,
    to: UnboundedSender<Event>,
    stop: Arc<AtomicUsize>,
    /// All tokens since the beginning, those not read yet last.
    tokens: Vec<u32>,
    /// Where the prompt begins and ends in them.
    prompt: std::ops::Range<usize>,
    /// How many of them the state is after, and their key.
    read: usize,
    prefix: Prefix,
    /// After the tokens read, if they were all that there were.
    logits: Vec<f32>,
    /// Tokens of the prompt that were not read.
    cached: usize,
    prompt_logprobs: Vec<TokenLogprob>,
    hidden: Option<Vec<f32>>,
    phase: Phase,
    /// After the prompt, to go back to.
    after_prompt: Option<(Arc<Snapshot>, Prefix)>,
    /// When it last had a piece of its prompt read.
    turn: u64,
    began: Instant,
    /// Bytes set apart for it.
    needed: usize,
}

#[derive(Clone)]
enum Phase {
    Prompt,
    Answer,
    /// It ends when everything that the state to keep is after has been read.
    Closing(End),
}

impl Runner<'_> {
    /// Lets requests join the batch, and waits for one if there are none: whether to go on.
    fn admit(&mut self) -> bool {
        loop {
            let mut inner = self.shared.inner();
            self.report(&mut inner);
            let job = loop {
                if inner.closed {
                    return false;
                }
                inner.stats.cancelled += inner.queue.purge();
                let used: usize = self.running.iter().map(|s| s.needed).sum();
                let room = self.shared.memory.saturating_sub(used);
                let fits = |job: &Job| self.shared.size.of(job.most_tokens()) <= room;
                if self.running.len() < self.shared.slots && inner.queue.first().is_some_and(fits) {
                    break inner.queue.pop();
                }
                if !self.running.is_empty() {
                    return true;
                }
                self.shared.changed.notify_all();
                inner = self.shared.wait(inner);
            };
            inner.stats.running += 1;
            drop(inner);
            if let Some(job) = job {
                self.start(job);
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
        stats.running = self.running.len();
        stats.running_bytes = self.running.iter().map(|s| self.shared.size.of(s.read)).sum();
    }

    /// Puts a request into the batch, as far on as a cached prefix is.
    fn start(&mut self, job: Job) {
        let Job { request, tokens, start, sampler, to, stop } = job;
        // Predictions of the prompt's tokens come of reading them; the hidden vector of reading the last.
        let most = match (&request.prompt_logprobs, request.hidden) {
            (Some(_), _) => start,
            (None, true) => tokens.len() - 1,
            (None, false) => tokens.len(),
        };
        let needed = self.shared.size.of(tokens.len().saturating_add(request.max_tokens));
        let mut sequence = Sequence {
            prompt: start..tokens.len(),
            read: 0,
            prefix: self.shared.store.root(&request.owner),
            logits: Vec::new(),
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
            stop,
            tokens,
        };
        let state = match self.shared.store.longest(&sequence.request.owner, &sequence.tokens[..most]) {
            Some((read, snapshot, prefix)) => {
                (sequence.read, sequence.prefix) = (read, prefix);
                sequence.logits = snapshot.logits.clone();
                sequence.cached = read.saturating_sub(start);
                self.done.prefix_hits += u64::from(sequence.cached > 0);
                self.done.tokens_cached += sequence.cached as u64;
                snapshot.state(self.shared.store.form())
            }
            None => self.shared.store.form().empty.clone(),
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
        if lengths.iter().any(|&n| n > 0) {
            let all = lengths.iter().zip(&self.running).enumerate();
            let work: Vec<Work<'_>> =
                all.filter(|(_, (n, _))| **n > 0).map(|(slot, (n, s))| s.work(slot, *n)).collect();
            let outputs = match self.batch.step(&work) {
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

    /// Those whose clients have gone leave; those told to stop go back to where they are to stop.
    fn take_leave(&mut self) {
        for slot in (0..self.running.len()).rev() {
            if self.running[slot].to.is_closed() {
                self.done.cancelled += 1;
                self.remove(slot);
                continue;
            }
            let s = &mut self.running[slot];
            let keep = s.stop.load(Ordering::Acquire);
            if keep == usize::MAX || matches!(s.phase, Phase::Prompt) {
                continue;
            }
            s.stop.store(usize::MAX, Ordering::Release);
            s.phase = Phase::Closing(End::Stop);
            if s.request.save_as.is_none() {
                continue;
            }
            s.tokens.truncate(s.prompt.end.saturating_add(keep));
            if s.read > s.tokens.len() {
                let Some((snapshot, prefix)) = &s.after_prompt else { continue };
                (s.read, s.prefix, s.logits) = (s.prompt.end, prefix.clone(), snapshot.logits.clone());
                let state = snapshot.state(self.shared.store.form());
                if let Err(e) = self.batch.set_state(slot, state) {
                    s.phase = Phase::Closing(End::Failed(e.to_string()));
                }
            }
        }
    }

    /// How many tokens each sequence reads in the next step: the one of each that writes, and of prompts a piece in all, in turn.
    fn plan(&mut self) -> Vec<usize> {
        let mut lengths: Vec<usize> = self.running.iter().map(|s| usize::from(s.left() == 1)).collect();
        let mut reading: Vec<usize> = (0..lengths.len()).filter(|&i| self.running[i].left() > 1).collect();
        reading.sort_by_key(|&i| self.running[i].turn);
        let mut piece = self.prefill_piece;
        for slot in reading {
            let s = &mut self.running[slot];
            // A snapshot is taken at the end of every stride.
            let stride = if self.stride == 0 { usize::MAX } else { self.stride - s.read % self.stride };
            let bounds = [s.prompt.start, s.prompt.end];
            let bound = bounds.into_iter().find(|&b| b > s.read).map_or(usize::MAX, |b| b - s.read);
            lengths[slot] = [s.left(), piece, stride, bound, self.batch.room(slot)].into_iter().min().unwrap_or(0);
            piece -= lengths[slot];
            if lengths[slot] > 0 {
                self.turn += 1;
                s.turn = self.turn;
            }
        }
        lengths
    }

    /// Keeps the state at the end of a stride of the prompt.
    fn keep(&mut self, slot: usize) -> Result<(), Error> {
        let s = &self.running[slot];
        if s.read.is_multiple_of(self.stride) && s.read < s.prompt.end {
            let snapshot = Snapshot::new(&self.batch.state(slot)?, Vec::new());
            self.shared.store.insert(s.prefix.key(), s.read, Arc::new(snapshot));
        }
        Ok(())
    }

    /// Tells the client that its prompt was read, if it was.
    fn prompt_end(&mut self, slot: usize) -> Result<(), Error> {
        let s = &mut self.running[slot];
        if !matches!(s.phase, Phase::Prompt) || s.left() > 0 {
            return Ok(());
        }
        let snapshot = Arc::new(Snapshot::new(&self.batch.state(slot)?, s.logits.clone()));
        self.shared.store.insert(s.prefix.key(), s.read, snapshot.clone());
        if s.request.save_as.is_some() {
            s.after_prompt = Some((snapshot, s.prefix.clone()));
        }
        let (logprobs, hidden) = (std::mem::take(&mut s.prompt_logprobs), s.hidden.take());
        let tokens = s.prompt.len();
        let _ = s.to.send(Event::Prompt { tokens, cached: s.cached, logprobs, hidden });
        s.phase = if s.request.max_tokens == 0 { Phase::Closing(End::Length) } else { Phase::Answer };
        Ok(())
    }

    /// The next token of all that have a prediction, on all threads.
    fn choose(&mut self) {
        let writes = |s: &&mut Sequence| matches!(s.phase, Phase::Answer) && s.left() == 0;
        let each: Vec<Mutex<&mut Sequence>> = self.running.iter_mut().filter(writes).map(Mutex::new).collect();
        let written = AtomicU64::new(0);
        self.ctx.threads().run(each.len(), |i| {
            let mut s = each[i].lock().unwrap_or_else(|e| e.into_inner());
            let before = s.tokens.len();
            if let Err(reason) = s.choose() {
                s.phase = Phase::Closing(End::Failed(reason));
            }
            written.fetch_add((s.tokens.len() - before) as u64, Ordering::Relaxed);
        });
        self.done.tokens_written += written.into_inner();
    }

    /// Ends a sequence: its state is kept.
    fn finish(&mut self, slot: usize, end: End) -> Result<(), Error> {
        let failed = matches!(end, End::Failed(_));
        let state = if failed { None } else { Some(self.batch.state(slot)?) };
        let mut s = self.remove(slot);
        *if failed { &mut self.done.failed } else { &mut self.done.finished } += 1;
        // What a client reads after the end counts its request.
        let shared = self.shared;
        let mut inner = shared.inner();
        inner.seconds += 0.1 * (s.began.elapsed().as_secs_f64() - inner.seconds);
        self.report(&mut inner);
        drop(inner);
        let Some(state) = state else {
            s.end(end);
            return Ok(());
        };
        let (key, snapshot) = (s.prefix.key(), Arc::new(Snapshot::new(&state, std::mem::take(&mut s.logits))));
        match s.request.save_as.take() {
            Some(name) => {
                let (owner, tokens) = (std::mem::take(&mut s.request.owner), std::mem::take(&mut s.tokens));
                let done = |result: Result<(), String>| s.end(result.map_or_else(End::Failed, |()| end));
                shared.store.save(&owner, &name, key, &tokens, snapshot, done);
            }
            None => {
                shared.store.insert(key, s.read, snapshot);
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

impl Sequence {
    /// Tokens that were not read yet.
    fn left(&self) -> usize {
        self.tokens.len() - self.read
    }

    /// Reading the next `count` tokens.
    fn work(&self, slot: usize, count: usize) -> Work<'_> {
        let end = self.read + count;
        let in_prompt = self.read < self.prompt.end;
        let logits = match self.request.prompt_logprobs {
            Some(_) if in_prompt && self.read >= self.prompt.start => Rows::All,
            Some(_) if end == self.prompt.start => Rows::Last,
            _ if end == self.tokens.len() => Rows::Last,
            _ => Rows::None,
        };
        let hidden = self.request.hidden && in_prompt && end == self.prompt.end;
        Work { slot, tokens: &self.tokens[self.read..end], wants: Wants { logits, hidden } }
    }

    /// Takes what came of reading `count` tokens.
    fn take(&mut self, count: usize, output: Output) {
        let now = self.read..self.read + count;
        self.prefix.push(&self.tokens[now.clone()]);
        self.read = now.end;
        self.hidden = output.hidden.or(self.hidden.take());
        let Some(rows) = output.logits.len().checked_div(now.len()) else { return };
        match self.request.prompt_logprobs {
            Some(best) if now.start < self.prompt.end && now.start >= self.prompt.start => {
                // What comes before a token predicts it.
                let before = [&self.logits[..]].into_iter().chain(output.logits.chunks_exact(rows));
                for (token, logits) in self.tokens[now].iter().zip(before).filter(|(_, l)| !l.is_empty()) {
                    self.prompt_logprobs.push(logprob(*token, logits, best));
                }
                self.logits = output.logits[output.logits.len() - rows..].to_vec();
            }
            _ => self.logits = output.logits,
        }
    }

    /// Chooses the next token.
    fn choose(&mut self) -> Result<(), String> {
        if self.logits.iter().any(|l| !l.is_finite()) {
            return Err(Error::NotFinite.to_string());
        }
        let mut allowed;
        let logits = match &mut self.request.constraint {
            None => &self.logits,
            Some(constraint) => {
                allowed = self.logits.clone();
                constraint.mask(&mut allowed)?;
                if allowed.iter().all(|&l| l == f32::NEG_INFINITY) {
                    return Err("the constraint allows no token here".into());
                }
                // Far below whatever bias and penalties can make of a logit, and a number, as the sampler wants.
                allowed.iter_mut().filter(|l| **l == f32::NEG_INFINITY).for_each(|l| *l = -1e30);
                &allowed
            }
        };
        let token = self.sampler.sample(logits).map_err(|e| e.to_string())?;
        if self.request.stop_tokens.contains(&token) {
            self.phase = Phase::Closing(End::Stop);
            return Ok(());
        }
        let written = match self.request.logprobs {
            Some(best) => logprob(token, &self.logits, best),
            None => TokenLogprob { token, logprob: f32::NAN, best: Vec::new() },
        };
        self.tokens.push(token);
        let _ = self.to.send(Event::Token(written));
        if let Some(constraint) = &mut self.request.constraint
            && constraint.accept(token)?
        {
            self.phase = Phase::Closing(End::Constraint);
        } else if self.tokens.len() - self.prompt.end == self.request.max_tokens {
            self.phase = Phase::Closing(End::Length);
        }
        Ok(())
    }

    /// How it ended, if it did: a state that is kept is after all tokens.
    fn ended(&self) -> Option<End> {
        match &self.phase {
            Phase::Closing(end) if self.left() == 0 || self.request.save_as.is_none() => Some(end.clone()),
            Phase::Closing(end @ End::Failed(_)) => Some(end.clone()),
            _ => None,
        }
    }

    fn end(self, end: End) {
        let _ = self.to.send(Event::End(end));
    }
}

/// The log probability of a token and the `count` best.
fn logprob(token: u32, logits: &[f32], count: usize) -> TokenLogprob {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|l| ((l - max) as f64).exp()).sum();
    let of = |i: usize| ((logits[i] - max) as f64 - total.ln()) as f32;
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let count = count.min(order.len());
    let by_logit = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, by_logit);
    }
    order.truncate(count);
    order.sort_unstable_by(by_logit);
    let best = order.into_iter().map(|i| (i as u32, of(i))).collect();
    TokenLogprob { token, logprob: of(token as usize), best }
}
