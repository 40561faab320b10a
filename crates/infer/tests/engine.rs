//! The engine as its clients see it, with small random models.

mod common;

use anser_formats::{Dtype, Source, write_pth};
use anser_infer::engine::{Constraint, End, Engine, EngineOptions, Event, Next, Refused, Request, Start, Stream};
use anser_infer::{Decoder, InitialState, Sampler, Sampling, SavedState, Session};
use anser_model::{Cache, Config, Eviction, Init, Model};
use anser_tensor::{Context, DType, Device, WeightType};
use common::{Answer, Folder, alone, answer, engine, hybrid, model, plain, prompt, request};
use std::sync::Arc;
use std::time::Duration;

fn samplings() -> [Sampling; 4] {
    let plain = Sampling::default();
    [
        Sampling { temperature: 0.0, ..plain.clone() },
        Sampling { top_p: 1.0, ..plain.clone() },
        Sampling { temperature: 1.5, top_k: 40, presence_penalty: 0.5, frequency_penalty: 0.5, ..plain.clone() },
        Sampling { temperature: 0.7, min_p: 0.01, ..plain },
    ]
}

#[test]
fn a_sequence_is_the_same_in_any_company() {
    let (ctx, f32) = plain();
    let bf16 = (ctx.clone(), Arc::new(f32.packed(&ctx, DType::BF16)));
    for of in [(ctx, f32), bf16, hybrid()] {
        // Little room and odd pieces, so that sequences wait, join and leave at all times.
        let options = EngineOptions { slots: 5, prefill_piece: 37, stride: 50, ..EngineOptions::default() };
        let engine = engine(&of, options);
        let mut streams = Vec::new();
        for i in 0..24u32 {
            let sampling = samplings()[i as usize % 4].clone();
            let (p, count) = (prompt(i, 1 + i * 53 % 160), 5 + (i as usize * 17) % 40);
            let r = Request { sampling: sampling.clone(), seed: i.into(), ..request(p.clone(), count) };
            streams.push((engine.submit(Request { owner: format!("{}", i % 3), ..r }).unwrap(), p, sampling, count));
            std::thread::sleep(Duration::from_millis(u64::from(i % 5)));
        }
        let mut seen = std::collections::HashSet::new();
        for (i, (stream, p, sampling, count)) in streams.into_iter().enumerate() {
            let a = answer(stream);
            assert_eq!((a.end, a.read), (Some(End::Length), p.len()));
            assert_eq!(a.tokens, alone(&of, &p, &sampling, i as u64, count), "request {i}");
            seen.extend(a.tokens);
        }
        assert!(seen.len() > 50, "the model says more than one thing: {}", seen.len());
        let s = engine.stats();
        assert_eq!((s.running, s.waiting, s.finished, s.failed), (0, 0, 24, 0));
    }
}

#[test]
fn a_dropped_stream_frees_its_slot() {
    let of = plain();
    let engine = engine(&of, EngineOptions { slots: 1, ..EngineOptions::default() });
    let mut endless = engine.submit(request(prompt(1, 10), usize::MAX)).unwrap();
    assert!(matches!(endless.recv(), Some(Event::Prompt { .. })) && matches!(endless.recv(), Some(Event::Token(_))));
    let waits = engine.submit(request(prompt(2, 10), usize::MAX)).unwrap();
    let next = engine.submit(request(prompt(3, 10), 4)).unwrap();
    drop(waits);
    drop(endless);
    assert_eq!(answer(next).tokens.len(), 4);
    assert_eq!((engine.stats().cancelled, engine.stats().finished), (2, 1));
    // The last handle cancels what is left.
    let mut left = engine.submit(request(prompt(1, 10), usize::MAX)).unwrap();
    assert!(left.recv().is_some());
    drop(engine);
    assert_eq!(answer(left).end, Some(End::Cancelled));
}

#[test]
fn a_cached_prefix_gives_the_same_for_less_work() {
    for of in [plain(), hybrid()] {
        let engine = engine(&of, EngineOptions { stride: 64, ..EngineOptions::default() });
        let greedy = samplings()[0].clone();
        let run = |p: &[u32], owner: &str| {
            let before = engine.stats().tokens_read;
            let r = Request { sampling: greedy.clone(), owner: owner.into(), ..request(p.to_vec(), 8) };
            let a = answer(engine.submit(r).unwrap());
            (a.tokens, a.cached, engine.stats().tokens_read - before)
        };
        let p = prompt(5, 300);
        let want = alone(&of, &p, &greedy, 0, 8);
        assert_eq!(run(&p, "a"), (want.clone(), 0, 300 + 7));
        // The whole prompt, then one that goes on from its answer, then one that leaves it between two strides.
        assert_eq!(run(&p, "a"), (want.clone(), 300, 7));
        let longer = [&p[..], &want[..], &[9, 8, 7]].concat();
        assert_eq!(run(&longer, "a"), (alone(&of, &longer, &greedy, 0, 8), 307, 4 + 7));
        let other = [&p[..200], &[9, 8, 7]].concat();
        // Of a hybrid, whose states grow, fewer are kept: after 64, 128 and 256 tokens.
        let kept = if of.1.config().hybrid.is_some() { 128 } else { 192 };
        assert_eq!(run(&other, "a"), (alone(&of, &other, &greedy, 0, 8), kept, 203 - kept as u64 + 7));
        // Nobody else sees any of it.
        assert_eq!(run(&p, "b"), (want, 0, 300 + 7));
    }
}

#[test]
fn a_prompt_asked_for_many_times_at_once_is_read_once() {
    for of in [plain(), hybrid()] {
        // Nothing is cached for longer than it is needed.
        let options =
            EngineOptions { slots: 5, prefill_piece: 37, stride: 0, cache_bytes: 0, ..EngineOptions::default() };
        let engine = engine(&of, options);
        let sampling = samplings()[1].clone();
        for first_goes in [false, true] {
            // The engine is busy until all have come.
            let busy = engine.submit(request(prompt(1, 2000), 1)).unwrap();
            let p = prompt(5 + u32::from(first_goes), 300);
            let before = engine.stats().tokens_read;
            let ask =
                |seed| engine.submit(Request { sampling: sampling.clone(), seed, ..request(p.clone(), 8) }).unwrap();
            let mut streams: Vec<(u64, Stream)> = (0..4).map(|seed| (seed, ask(seed))).collect();
            if first_goes {
                // Whoever reads it for the others may go.
                streams.remove(0);
            }
            let all: Vec<(u64, Answer)> = streams.into_iter().map(|(seed, s)| (seed, answer(s))).collect();
            answer(busy);
            for (seed, a) in &all {
                assert_eq!(a.tokens, alone(&of, &p, &sampling, *seed, 8), "{seed}");
            }
            if !first_goes {
                let mut cached: Vec<usize> = all.iter().map(|(_, a)| a.cached).collect();
                cached.sort();
                assert_eq!(cached, [0, 300, 300, 300]);
                let others = 2000 - before;
                assert_eq!(engine.stats().tokens_read - before, others + 300 + 4 * 7);
            }
        }
        // Log probabilities of a prompt come of reading it.
        let both = [Some(0), None]
            .map(|prompt_logprobs| engine.submit(Request { prompt_logprobs, ..request(prompt(6, 300), 1) }).unwrap());
        assert_eq!(both.map(|s| answer(s).prompt.len()), [299, 0]);
    }
}

#[test]
fn memory_of_prefixes_is_bounded() {
    let of = plain();
    let one = Session::new(&of.0, &of.1).bytes() + 300 * 4;
    let engine = engine(&of, EngineOptions { cache_bytes: 3 * one, ..EngineOptions::default() });
    let used = |seed, keep: Option<&str>| {
        let r = Request { save_as: keep.map(String::from), ..request(prompt(seed, 20), 3) };
        let a = answer(engine.submit(r).unwrap());
        assert!(engine.stats().cached_bytes <= 3 * one);
        (a.cached, a.end.unwrap())
    };
    assert_eq!(used(1, None).0, 0);
    assert_eq!(used(1, None).0, 20);
    // Each leaves two states; the third is the one used least recently.
    assert_eq!(used(2, None).0, 0);
    assert_eq!(used(1, None).0, 0);
    // Named states stay, and there is no room for a fourth.
    for (i, name) in ["x", "y", "z"].iter().enumerate() {
        assert_eq!(used(10 + i as u32, Some(name)).1, End::Length);
    }
    let End::Failed(reason) = used(20, Some("w")).1 else { panic!("no room") };
    assert!(reason.contains("no room"), "{reason}");
    assert_eq!(engine.states().list("a").unwrap().len(), 3);
}

#[test]
fn named_states_go_on_and_branch() {
    for of in [plain(), hybrid()] {
        let engine = engine(&of, EngineOptions::default());
        let greedy = samplings()[0].clone();
        let go = |p: Vec<u32>, start: Start, save: Option<&str>, owner: &str| {
            let r = Request { start, sampling: greedy.clone(), save_as: save.map(String::from), ..request(p, 6) };
            engine.submit(Request { owner: owner.into(), ..r })
        };
        let named = |n: &str| Start::Named(n.into());
        let p = prompt(4, 40);
        let first = answer(go(p.clone(), Start::Empty, Some("x"), "a").unwrap());
        assert_eq!(first.end, Some(End::Length));
        let info = engine.states().get("a", "x").unwrap();
        assert_eq!((info.tokens, info.name.as_str()), (46, "x"));
        engine.states().branch("a", "x", "y").unwrap();
        assert!(engine.states().branch("a", "x", "y").unwrap_err().to_string().contains("already"));
        assert!(engine.states().branch("a", "none", "z").unwrap_err().to_string().contains("no state"));
        assert!(engine.states().branch("a", "x", "../z").unwrap_err().to_string().contains("letters"));
        // On from it: without a prompt, with one, and once more from the branch, which the first didn't change.
        let so_far = [&p[..], &first.tokens].concat();
        let on = answer(go(Vec::new(), named("x"), Some("x"), "a").unwrap());
        assert_eq!((&on.tokens, on.read), (&alone(&of, &so_far, &greedy, 0, 6), 0));
        let other = answer(go(vec![5, 6], named("y"), None, "a").unwrap());
        assert_eq!(other.tokens, alone(&of, &[&so_far[..], &[5, 6]].concat(), &greedy, 0, 6));
        assert_eq!(engine.states().get("a", "x").unwrap().tokens, 52);
        let names: Vec<String> = engine.states().list("a").unwrap().into_iter().map(|i| i.name).collect();
        assert_eq!(names, ["x", "y"]);
        // Nobody else's.
        assert!(engine.states().list("b").unwrap().is_empty());
        assert!(matches!(go(vec![1], named("x"), None, "b"), Err(Refused::Invalid(m)) if m.contains("no state")));
        engine.states().delete("a", "x").unwrap();
        assert!(engine.states().delete("a", "x").is_err());
        assert!(matches!(go(vec![1], named("x"), None, "a"), Err(Refused::Invalid(_))));
    }
}

#[test]
fn tuned_initial_states() {
    let of = plain();
    let path = std::env::temp_dir().join(format!("anser-initial-{}.pth", std::process::id()));
    let values: Vec<f32> = (0..64 * 64).map(|i| (i as f32 * 0.37).sin() * 0.5).collect();
    let write = |layers: usize, shape: &[usize]| {
        let name = |i| format!("blocks.{i}.att.time_state");
        let tensor = |i| Source::new(name(i), shape, Dtype::BF16, &values[..shape.iter().product()]);
        write_pth(&path, &(0..layers).map(tensor).collect::<Vec<_>>()).unwrap();
        InitialState::open(of.1.config(), &path)
    };
    let tuned = write(2, &[1, 64, 64]).unwrap();
    for (layers, shape, what) in [(1, [1, 64, 64], "of 1 layers"), (2, [64, 64, 1], "[64, 64, 1]")] {
        let e = write(layers, &shape).unwrap_err().to_string();
        assert!(e.contains(what) && e.contains("this"), "{e}");
    }
    std::fs::remove_file(&path).unwrap();
    let p = prompt(4, 40);
    let greedy = samplings()[0].clone();
    let begun = |tokens: &[u32]| {
        let mut session = Session::new(&of.0, &of.1).begun(&tuned).unwrap();
        let mut sampler = Sampler::new(greedy.clone()).unwrap();
        let mut out = Vec::new();
        session.feed(tokens).unwrap();
        for _ in 0..6 {
            out.push(sampler.sample(session.logits().unwrap()).unwrap());
            session.feed(&out[out.len() - 1..]).unwrap();
        }
        out
    };
    let folder = Folder::new("initial");
    let options = EngineOptions { initial: vec![("poet".into(), tuned.clone())], ..folder.options() };
    let first = engine(&of, options.clone());
    let go = |engine: &Engine, p: &[u32], from: &str, save: Option<&str>| {
        let start = Start::Named(from.into());
        let r = Request { start, sampling: greedy.clone(), save_as: save.map(String::from), ..request(p.to_vec(), 6) };
        engine.submit(r).map(answer)
    };
    // What was cached without it is not taken, nor the other way round.
    let plainly = |engine: &Engine| {
        let r = Request { sampling: greedy.clone(), ..request(p.clone(), 6) };
        answer(engine.submit(r).unwrap()).tokens
    };
    let want = alone(&of, &p, &greedy, 0, 6);
    assert_eq!(plainly(&first), want);
    let a = go(&first, &p, "poet", Some("talk")).unwrap();
    assert_eq!((&a.tokens, a.cached), (&begun(&p), 0));
    assert_ne!(a.tokens, want);
    assert_eq!(plainly(&first), want);
    assert_eq!(go(&first, &p, "poet", None).unwrap().cached, 40);
    let listed: Vec<_> = first.states().list("a").unwrap().into_iter().map(|i| (i.name, i.tokens, i.initial)).collect();
    assert_eq!(listed, [("poet".to_string(), 0, true), ("talk".into(), 46, false)]);
    assert!(first.states().get("b", "poet").unwrap().initial);
    assert!(first.states().delete("a", "poet").is_err() && first.states().branch("a", "talk", "poet").is_err());
    assert!(matches!(go(&first, &p, "poet", Some("poet")), Err(Refused::Invalid(m)) if m.contains("initial")));
    assert!(matches!(go(&first, &[], "poet", None), Err(Refused::Invalid(m)) if m.contains("empty")));
    drop(first);
    // A state that began from it needs it.
    let so_far = [&p[..], &a.tokens, &[3]].concat();
    assert_eq!(go(&engine(&of, options), &[3], "talk", None).unwrap().tokens, begun(&so_far));
    let without = engine(&of, folder.options());
    assert!(matches!(go(&without, &[3], "talk", None), Err(Refused::Invalid(m)) if m.contains("initial state")));
}

/// Cuts an answer to its first `keep` tokens when there are `at`.
struct CutAt {
    at: usize,
    keep: usize,
    written: usize,
}

impl Constraint for CutAt {
    fn mask(&mut self, _: &mut [f32]) -> Result<(), String> {
        Err("nothing is masked".into())
    }

    fn accept(&mut self, _: u32) -> Result<Next, String> {
        self.written += 1;
        Ok(if self.written == self.at { Next::Cut(self.keep) } else { Next::More })
    }

    fn masks(&self) -> bool {
        false
    }
}

#[test]
fn a_cut_answer_leaves_the_state_before_the_cut() {
    let of = plain();
    let greedy = samplings()[0].clone();
    // Whether or not the last token is the last that there may be; with guesses, too.
    for (most, guesses) in [(12, Some(0)), (100, Some(0)), (100, None), (100, Some(8))] {
        let engine = engine(&of, EngineOptions { guesses, ..EngineOptions::default() });
        let whole = Request { sampling: greedy.clone(), ..request(prompt(4, 40), 20) };
        let whole = answer(engine.submit(whole).unwrap()).tokens;
        for keep in [0, 5, 11, 12] {
            let cut = Box::new(CutAt { at: 12, keep, written: 0 });
            let r = Request { sampling: greedy.clone(), constraint: Some(cut), ..request(prompt(4, 40), most) };
            let a = answer(engine.submit(Request { save_as: Some("x".into()), keep_state: true, ..r }).unwrap());
            assert_eq!((&a.tokens[..], &a.end), (&whole[..12], &Some(End::Constraint)));
            assert_eq!(engine.states().get("a", "x").unwrap().tokens, 40 + keep);
            for start in [Start::Named("x".into()), Start::State(a.state.unwrap())] {
                let r = Request { start, sampling: greedy.clone(), ..request(Vec::new(), 6) };
                assert_eq!(answer(engine.submit(r).unwrap()).tokens, whole[keep..keep + 6]);
            }
        }
    }
}

#[test]
fn log_probabilities_and_hidden_vectors() {
    let of = plain();
    let engine = engine(&of, EngineOptions { prefill_piece: 16, ..EngineOptions::default() });
    let p = prompt(6, 50);
    let all = || Request { logprobs: Some(3), prompt_logprobs: Some(2), hidden: true, ..request(p.clone(), 4) };
    let a = answer(engine.submit(all()).unwrap());
    assert_eq!((a.prompt.len(), a.logprobs.len(), a.hidden.as_ref().map(Vec::len)), (49, 4, Some(64)));
    let mut session = Session::new(&of.0, &of.1);
    let tokens = [&p[..], &a.tokens].concat();
    for (i, got) in a.prompt.iter().chain(&a.logprobs).enumerate() {
        session.feed(&tokens[i..i + 1]).unwrap();
        let logits = session.logits().unwrap();
        let total = logits.iter().map(|l| (*l as f64).exp()).sum::<f64>().ln();
        assert_eq!(got.token, tokens[i + 1]);
        assert!((got.logprob as f64 - (logits[tokens[i + 1] as usize] as f64 - total)).abs() < 1e-5);
        assert_eq!(got.best.len(), if i < 49 { 2 } else { 3 });
        let top = (0..300).fold(0, |b, j| if logits[j] > logits[b] { j } else { b });
        assert!(got.best[0].0 as usize == top && got.best.is_sorted_by(|a, b| a.1 >= b.1));
    }
    // The same when the prompt is cached, which doesn't have them; and with nothing to write.
    assert_eq!(answer(engine.submit(all()).unwrap()), a);
    let r = Request { logprobs: None, ..all() };
    let nothing = answer(engine.submit(Request { max_tokens: 0, ..r }).unwrap());
    assert_eq!((nothing.prompt, nothing.hidden, nothing.end), (a.prompt, a.hidden, Some(End::Length)));
}

#[test]
fn a_prompt_with_log_probabilities_is_read_in_small_pieces() {
    let of = plain();
    let read = |prefill_piece, prompt_logprobs| {
        let engine =
            engine(&of, EngineOptions { prefill_piece, stride: 0, cache_bytes: 0, ..EngineOptions::default() });
        let r = |seed| Request { prompt_logprobs, ..request(prompt(seed, 1100), 1) };
        // One alone, then two, the second of which goes on where the first leaves no room.
        let first = answer(engine.submit(r(3)).unwrap());
        let steps = engine.stats().steps;
        let two = [r(5), r(7)].map(|r| engine.submit(r).unwrap()).map(answer);
        assert!(engine.stats().steps - steps >= steps);
        (steps, std::iter::once(first).chain(two).collect::<Vec<_>>())
    };
    // Logits of every row would be gigabytes with a large vocabulary.
    let (steps, large) = read(4096, Some(1));
    assert_eq!((steps, read(4096, None).0), (3, 1));
    assert_eq!(large.iter().map(|a| a.prompt.len()).collect::<Vec<_>>(), [1099; 3]);
    assert_eq!(large, read(100, Some(1)).1);
}

/// Only even tokens, four of them.
struct Even(usize);

impl Constraint for Even {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        logits.iter_mut().skip(1).step_by(2).for_each(|l| *l = f32::NEG_INFINITY);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<Next, String> {
        self.0 += 1;
        match self.0 {
            _ if !token.is_multiple_of(2) => Err(format!("{token} is odd")),
            4 => Ok(Next::End),
            _ => Ok(Next::More),
        }
    }
}

/// Nothing at all, or a mistake.
struct Nothing {
    panics: bool,
}

impl Constraint for Nothing {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        logits.fill(f32::NEG_INFINITY);
        if !self.panics { Ok(()) } else { panic!("this constraint panics, as a test") }
    }

    fn accept(&mut self, _: u32) -> Result<Next, String> {
        Ok(Next::End)
    }
}

/// Panics where nobody expects it.
struct Fatal;

impl Constraint for Fatal {
    fn mask(&mut self, _: &mut [f32]) -> Result<(), String> {
        Ok(())
    }

    fn accept(&mut self, _: u32) -> Result<Next, String> {
        Ok(Next::End)
    }
}

impl Drop for Fatal {
    fn drop(&mut self) {
        panic!("this constraint ends the engine, as a test");
    }
}

#[test]
fn an_engine_says_that_it_has_failed() {
    let engine = engine(&plain(), EngineOptions::default());
    assert_eq!(engine.failure(), None);
    let r = Request { constraint: Some(Box::new(Fatal)), ..request(prompt(1, 9), 1) };
    let mut stream = engine.submit(r).unwrap();
    while stream.recv().is_some() {}
    // It says so to whoever asks for more, and nobody waits for it.
    while engine.failure().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    engine.drain();
    let why = engine.failure().unwrap();
    assert!(why.contains("panicked"), "{why}");
    assert_eq!(engine.submit(request(prompt(1, 9), 1)).err(), Some(Refused::Failed(why)));
}

#[test]
fn constraints_and_stop_tokens_end_answers() {
    let engine = engine(&plain(), EngineOptions::default());
    for sampling in samplings() {
        let r = Request { sampling, constraint: Some(Box::new(Even(0))), ..request(prompt(1, 9), 100) };
        let a = answer(engine.submit(r).unwrap());
        assert_eq!((a.tokens.len(), a.end), (4, Some(End::Constraint)));
        assert!(a.tokens.iter().all(|t| t % 2 == 0));
    }
    for (panics, what) in [(true, "panicked"), (false, "allows no token")] {
        let r = Request { constraint: Some(Box::new(Nothing { panics })), ..request(prompt(1, 9), 100) };
        let Some(End::Failed(reason)) = answer(engine.submit(r).unwrap()).end else { panic!("nothing is allowed") };
        assert!(reason.contains(what), "{reason}");
    }
    let free = answer(engine.submit(request(prompt(1, 9), 30)).unwrap()).tokens;
    let stop = free[20];
    let first = free.iter().position(|t| *t == stop).unwrap();
    let r = Request { stop_tokens: vec![stop], ..request(prompt(1, 9), 30) };
    let a = answer(engine.submit(r).unwrap());
    assert_eq!((&a.tokens[..], a.end), (&free[..first], Some(End::Stop)));
}

#[test]
fn busy_and_drain() {
    let of = plain();
    let engine = engine(&of, EngineOptions { slots: 1, waiting: 1, ..EngineOptions::default() });
    let mut first = engine.submit(request(prompt(1, 5), usize::MAX)).unwrap();
    assert!(first.recv().is_some());
    let second = engine.submit(request(prompt(2, 5), 5)).unwrap();
    let Err(Refused::Busy { retry_after }) = engine.submit(request(prompt(3, 5), 5)) else { panic!("it is full") };
    assert!(retry_after >= Duration::from_secs(1));
    assert_eq!(engine.stats().refused, 1);
    let drain = std::thread::spawn({
        let engine = engine.clone();
        move || engine.drain()
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!drain.is_finished());
    assert_eq!(engine.submit(request(prompt(3, 5), 5)).err(), Some(Refused::Draining));
    drop(first);
    drain.join().unwrap();
    assert_eq!(answer(second).tokens.len(), 5);
}

#[test]
fn hybrids_are_admitted_by_memory() {
    let of = hybrid();
    let engine = engine(&of, EngineOptions { memory: 1 << 20, ..EngineOptions::default() });
    let Err(Refused::Invalid(m)) = engine.submit(request(prompt(1, 5), 10_000)) else { panic!("too long") };
    assert!(m.contains("memory"), "{m}");
    // 512 tokens of two layers take 512 KiB and the rest, so that two don't fit together.
    let streams: Vec<Stream> = (0..3).map(|i| engine.submit(request(prompt(i, 300), 60)).unwrap()).collect();
    let mut most = 0;
    while engine.stats().finished < 3 {
        most = most.max(engine.stats().running);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(most, 1);
    assert!(streams.into_iter().all(|s| answer(s).tokens.len() == 60));
}

#[test]
fn nobody_waits_for_a_client_that_does_not_read() {
    let engine = engine(&plain(), EngineOptions { slots: 2, ..EngineOptions::default() });
    let slow = engine.submit(request(prompt(1, 5), 3000)).unwrap();
    assert_eq!(answer(engine.submit(request(prompt(2, 5), 1000)).unwrap()).tokens.len(), 1000);
    engine.drain();
    assert_eq!(answer(slow).tokens.len(), 3000);
    // But what waits for one that reads nothing has an end.
    let options = EngineOptions { unread: 50, ..EngineOptions::default() };
    let engine = common::engine(&plain(), options);
    let slow = engine.submit(request(prompt(1, 5), usize::MAX)).unwrap();
    engine.drain();
    let a = answer(slow);
    let Some(End::Failed(why)) = a.end else { panic!("{:?}", a.end) };
    assert!((49..=50).contains(&a.tokens.len()) && why.contains("isn't read"), "{} {why}", a.tokens.len());
}

#[test]
fn owners_take_turns() {
    let of = plain();
    let engine = engine(&of, EngineOptions { slots: 1, ..EngineOptions::default() });
    let mut first = engine.submit(request(prompt(1, 5), usize::MAX)).unwrap();
    assert!(first.recv().is_some());
    let many: Vec<Stream> = (0..5).map(|i| engine.submit(request(prompt(i, 5), 500)).unwrap()).collect();
    let one = engine.submit(Request { owner: "b".into(), ..request(prompt(9, 5), 5) }).unwrap();
    drop(first);
    assert_eq!(answer(one).tokens.len(), 5);
    let finished = engine.stats().finished;
    assert!(finished <= 3, "b waited for {finished} of a");
    assert!(many.into_iter().all(|s| answer(s).tokens.len() == 500));
}

#[test]
fn requests_that_make_no_sense() {
    let engine = engine(&plain(), EngineOptions::default());
    let bad = |r: Request, what: &str| match engine.submit(r) {
        Err(Refused::Invalid(m)) => assert!(m.contains(what), "{m}"),
        _ => panic!("{what}"),
    };
    let good = || request(vec![1, 2], 4);
    bad(request(Vec::new(), 4), "prompt is empty");
    bad(request(vec![1, 300], 4), "token 300 is outside");
    bad(Request { stop_tokens: vec![300], ..good() }, "token 300 is outside");
    bad(request(vec![1], 0), "max_tokens is 0");
    bad(Request { sampling: Sampling { temperature: f32::NAN, ..Sampling::default() }, ..good() }, "temperature");
    bad(Request { start: Start::Named("x".into()), ..good() }, "no state \"x\"");
    bad(Request { save_as: Some("a/b".into()), ..good() }, "state name");
    bad(Request { save_as: Some(String::new()), ..good() }, "state name");
    assert!(Engine::start(plain().0, plain().1, EngineOptions { slots: 0, ..EngineOptions::default() }).is_err());
    assert_eq!(answer(engine.submit(good()).unwrap()).tokens.len(), 4);
}

#[test]
fn states_outlive_the_engine() {
    for of in [plain(), hybrid()] {
        let folder = Folder::new("restart");
        let greedy = samplings()[0].clone();
        let save = |engine: &Engine, seed: u32, name: &str| {
            let r = Request { sampling: greedy.clone(), save_as: Some(name.into()), ..request(prompt(seed, 40), 6) };
            let a = answer(engine.submit(r).unwrap());
            assert_eq!(a.end, Some(End::Length));
            [prompt(seed, 40), a.tokens].concat()
        };
        let go = |engine: &Engine, name: &str| {
            let before = engine.stats().tokens_read;
            let r = Request { start: Start::Named(name.into()), sampling: greedy.clone(), ..request(vec![3], 6) };
            let a = answer(engine.submit(r).unwrap());
            (a.tokens, engine.stats().tokens_read - before)
        };
        let names =
            |engine: &Engine| engine.states().list("a").unwrap().into_iter().map(|i| i.name).collect::<Vec<_>>();
        let first = engine(&of, folder.options());
        let tokens: Vec<Vec<u32>> = (0..4).map(|i| save(&first, i, &format!("s{i}"))).collect();
        first.states().branch("a", "s1", "branch").unwrap();
        first.states().delete("a", "s1").unwrap();
        first.states().delete("a", "s2").unwrap();
        let replaced = save(&first, 7, "s3");
        let infos = first.states().list("a").unwrap();
        drop(first);
        let second = engine(&of, folder.options());
        assert_eq!(names(&second), ["branch", "s0", "s3"]);
        for (a, b) in second.states().list("a").unwrap().iter().zip(infos) {
            assert_eq!((&a.name, a.tokens, a.bytes), (&b.name, b.tokens, b.bytes));
        }
        // One token is read, and all that are written but the last.
        for (name, tokens) in [("s0", &tokens[0]), ("branch", &tokens[1]), ("s3", &replaced)] {
            let want = alone(&of, &[&tokens[..], &[3]].concat(), &greedy, 0, 6);
            assert_eq!(go(&second, name), (want, 1 + 5), "{name}");
        }
        let busy = Engine::start(of.0.clone(), of.1.clone(), folder.options()).err().unwrap().to_string();
        assert!(busy.contains("states.redb"), "{busy}");
        drop(second);
        // Another model sees nothing, and takes nothing away.
        let other = Model::init(&of.0, of.1.config(), Init::Current, 2).unwrap();
        let other = Engine::start(of.0.clone(), Arc::new(other), folder.options()).unwrap();
        assert!(names(&other).is_empty());
        drop(other);
        assert_eq!(names(&engine(&of, folder.options())), ["branch", "s0", "s3"]);
    }
}

#[test]
fn what_memory_has_no_room_for_goes_to_disk() {
    let (of, folder) = (plain(), Folder::new("spill"));
    let one = Session::new(&of.0, &of.1).bytes() + 300 * 4;
    let options = EngineOptions { cache_bytes: 2 * one, disk_bytes: 9 * one, stride: 0, ..folder.options() };
    let engine = engine(&of, options);
    let greedy = samplings()[0].clone();
    let run = |seed, keep: Option<&str>| {
        let r = Request { sampling: greedy.clone(), save_as: keep.map(String::from), ..request(prompt(seed, 40), 3) };
        let a = answer(engine.submit(r).unwrap());
        // Whatever fails waits for the disk too; nothing is dropped then because too much waits.
        assert!(engine.states().branch("a", "none", "nothing").is_err());
        let s = engine.stats();
        assert!(s.cached_bytes <= 2 * one && s.disk_bytes <= 9 * one, "{s:?}");
        (a.tokens, a.cached, a.end.unwrap())
    };
    let first = run(0, None);
    assert_eq!(first.1, 0);
    (1..4).for_each(|i| assert_eq!(run(i, None).1, 0));
    assert!(engine.stats().disk_bytes >= 6 * one);
    assert_eq!(run(0, None), (first.0.clone(), 40, End::Length));
    // There is room for nine, of which the least recently used go.
    (10..20).for_each(|i| assert_eq!(run(i, None).1, 0));
    assert_eq!(run(0, None), (first.0, 0, End::Length));
    // Named ones stay.
    for i in 0..8 {
        assert_eq!(run(30 + i, Some(&format!("n{i}"))).2, End::Length, "{i}");
    }
    let End::Failed(reason) = run(40, Some("n8")).2 else { panic!("no room") };
    assert!(reason.contains("no room"), "{reason}");
    assert_eq!(engine.states().list("a").unwrap().len(), 8);
    engine.states().delete("a", "n0").unwrap();
    assert_eq!(run(40, Some("n8")).2, End::Length);
    for i in 1..9 {
        let r = Request { start: Start::Named(format!("n{i}")), max_tokens: 1, ..request(Vec::new(), 1) };
        let before = engine.stats().tokens_read;
        assert_eq!(answer(engine.submit(r).unwrap()).end, Some(End::Length));
        assert_eq!(engine.stats().tokens_read, before, "it is there");
    }
}

/// Run by the test below in a process of its own: saves states for ever, and says so on every one.
#[test]
fn saves_until_it_is_killed() {
    let Ok(folder) = std::env::var("ANSER_TEST_FOLDER") else { return };
    let of = plain();
    let engine = engine(&of, EngineOptions { folder: Some(folder.into()), ..EngineOptions::default() });
    for i in 0.. {
        let name = format!("s{i}");
        let r = Request { save_as: Some(name.clone()), seed: 1, ..request(prompt(i, 20 + i % 50), 4) };
        let a = answer(engine.submit(r).unwrap());
        assert_eq!(a.end, Some(End::Length));
        println!("saved {name} {i} {:?}", a.tokens);
    }
}

#[test]
fn states_outlive_a_killed_process() {
    use std::io::{BufRead, BufReader};
    let (of, folder) = (plain(), Folder::new("killed"));
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["saves_until_it_is_killed", "--exact", "--nocapture", "--test-threads=1"])
        .env("ANSER_TEST_FOLDER", &folder.0)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let saved = lines.filter_map(|l| l.split_once("saved ").map(|(_, l)| l.to_string())).take(30);
    let saved: Vec<String> = saved.collect();
    // It goes on saving meanwhile.
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(saved.len(), 30);
    let engine = engine(&of, folder.options());
    assert!(engine.states().list("a").unwrap().len() >= 30);
    for line in saved {
        let (name, rest) = line.split_once(' ').unwrap();
        let (i, tokens) = rest.split_once(' ').unwrap();
        let i: u32 = i.parse().unwrap();
        let said: Vec<u32> = tokens.trim_matches(['[', ']']).split(", ").map(|t| t.parse().unwrap()).collect();
        let so_far = [prompt(i, 20 + i % 50), said].concat();
        let r = Request { start: Start::Named(name.into()), seed: 5, ..request(Vec::new(), 8) };
        let a = answer(engine.submit(r).unwrap());
        assert_eq!(a.tokens, alone(&of, &so_far, &Sampling::default(), 5, 8), "{name}");
    }
}

/// On a GPU, in a decoder's slots. In steps of up to 4 sequences a row's bits don't depend on its neighbours there either; prompts that are read together differ in
/// the last bits, which no token here hangs on.
#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_a_sequence_is_the_same_in_any_company() {
    let ctx = Context::with_activations(Device::Cuda(0), DType::F16, 2).unwrap();
    let of = model(&Config::new(2, 128, 200));
    let of = (ctx.clone(), Arc::new(of.1.packed(&ctx, DType::F16)));
    let engine = engine(&of, EngineOptions { slots: 3, stride: 0, ..EngineOptions::default() });
    let greedy = samplings()[0].clone();
    let short = |i: u32| prompt(i, 1 + i * 3 % 9).iter().map(|t| t % 200).collect::<Vec<u32>>();
    let go = |i: u32, start: Start, count: usize| {
        let p = if start == Start::Empty { short(i) } else { Vec::new() };
        let save_as = (i == 4).then(|| "x".into());
        engine.submit(Request { start, sampling: greedy.clone(), save_as, ..request(p, count) }).unwrap()
    };
    let streams: Vec<Stream> = (0..6).map(|i| go(i, Start::Empty, 2 + i as usize)).collect();
    let answers: Vec<Answer> = streams.into_iter().map(answer).collect();
    let alone = |i: u32, count: usize| {
        let mut decoder = Decoder::new(&of.0, &of.1, 1).unwrap().expect("the kernels know this model");
        let mut logits = decoder.prefill(0, &short(i)).unwrap();
        let mut sampler = Sampler::new(greedy.clone()).unwrap();
        let mut tokens = Vec::new();
        for _ in 0..count {
            tokens.push(sampler.sample(&logits).unwrap());
            logits = decoder.step(&[(0, tokens[tokens.len() - 1])]).unwrap().to_vec();
        }
        tokens
    };
    for (i, a) in (0..).zip(&answers) {
        assert_eq!((&a.tokens, &a.end), (&alone(i, 2 + i as usize), &Some(End::Length)), "{i}");
    }
    // What was chosen on the device leaves a state with its logits, which are there when the same text comes as a prompt.
    let (text, last) = answers[3].tokens.split_at(4);
    let r = Request { sampling: greedy.clone(), ..request([&short(3), text].concat(), 1) };
    let a = answer(engine.submit(r).unwrap());
    assert_eq!((a.tokens, a.cached), (last.to_vec(), short(3).len() + 4));
    // Drawn by the device, or the same request where the host draws because logprobs are wanted: each repeats itself in any company.
    let drawn = |logprobs: Option<usize>| {
        let sampling = Sampling { top_p: 0.9, seed: 3, ..Sampling::default() };
        engine.submit(Request { sampling, logprobs, ..request(short(1), 12) }).unwrap()
    };
    for logprobs in [None, Some(2)] {
        let alone = answer(drawn(logprobs));
        let company = [drawn(logprobs), go(2, Start::Empty, 20), drawn(logprobs)].map(answer);
        assert!(alone.tokens.len() == 12 && company[0].tokens == alone.tokens && company[2].tokens == alone.tokens);
    }
    // From a cached prefix and from a named state.
    let again = answer(go(4, Start::Empty, 6));
    assert_eq!((again.tokens, again.cached), (answers[4].tokens.clone(), short(4).len()));
    assert_eq!(answer(go(0, Start::Named("x".into()), 3)).tokens, alone(4, 9)[6..]);
    let r = Request { prompt_logprobs: Some(1), hidden: true, ..request(short(5), 1) };
    let a = answer(engine.submit(r).unwrap());
    assert_eq!((a.prompt.len(), a.hidden.map(|h| h.len())), (short(5).len() - 1, Some(128)));
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_deterministic_answers_are_the_same_to_the_bit_in_any_company() {
    // By products whose sums are the same for any number of sequences in f16, and in f32 by the model's own pass.
    for dtype in [DType::F16, DType::F32] {
        let ctx = Context::with_activations(Device::Cuda(0), dtype, 2).unwrap();
        let of = model(&Config::new(2, 128, 200));
        let of = (ctx.clone(), Arc::new(of.1.packed(&ctx, dtype)));
        let engine = engine(
            &of,
            EngineOptions { slots: 11, prefill_piece: 16, deterministic: true, ..EngineOptions::default() },
        );
        // Log probabilities keep the choice of tokens on the host.
        let ask = |i: u32, save_as: Option<&str>, logprobs: Option<usize>| {
            let p = prompt(i, 1 + i * 13 % 50).iter().map(|t| t % 200).collect();
            let sampling = samplings()[i as usize % 4].clone();
            let r = Request { sampling, save_as: save_as.map(String::from), ..request(p, 9 + i as usize) };
            engine.submit(Request { logprobs, seed: i.into(), ..r }).unwrap()
        };
        let go = |i: u32, save_as: Option<&str>| ask(i, save_as, Some(2));
        let after = |name: &str| {
            let r = Request { start: Start::Named(name.into()), logprobs: Some(1), ..request(vec![3, 4], 8) };
            answer(engine.submit(r).unwrap())
        };
        let alone: Vec<Answer> = (0..14).map(|i| answer(go(i, (i == 5).then_some("alone")))).collect();
        let streams: Vec<Stream> = (0..14).map(|i| go(i, (i == 5).then_some("together"))).collect();
        let together: Vec<Answer> = streams.into_iter().map(answer).collect();
        assert!(alone.iter().enumerate().all(|(i, a)| a.tokens.len() == 9 + i));
        assert!(alone == together && alone.iter().all(|a| a.cached == 0) && after("alone") == after("together"));
        let alone: Vec<Answer> = (2..6).map(|i| answer(ask(i, None, None))).collect();
        let streams: Vec<Stream> = (2..6).map(|i| ask(i, None, None)).collect();
        assert!(alone == streams.into_iter().map(answer).collect::<Vec<_>>());
    }
}

/// Twelve tokens again and again, with others now and then, from where a guess may be wrong.
struct Repeats(u32);

impl Constraint for Repeats {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let next = if self.0 % 29 < 2 { self.0 * 7 % 40 } else { self.0 % 12 };
        logits.iter_mut().enumerate().filter(|(t, _)| *t != next as usize).for_each(|(_, l)| *l = f32::NEG_INFINITY);
        Ok(())
    }

    fn accept(&mut self, _: u32) -> Result<Next, String> {
        self.0 += 1;
        Ok(Next::More)
    }
}

#[test]
fn guesses_change_nothing_but_the_number_of_rows() {
    let bound = Cache::new(96, Eviction::Error, false);
    for (of, bound) in [(plain(), None), (hybrid(), None), (hybrid(), Some(bound))] {
        for kept in [DType::F32.into(), DType::BF16.into(), WeightType::Int8, WeightType::Q4] {
            let of = (of.0.clone(), Arc::new(of.1.packed(&of.0, kept)));
            let run = |guesses: Option<usize>, company: bool| {
                let engine = engine(&of, EngineOptions { guesses, bound, cache_bytes: 0, ..EngineOptions::default() });
                let start = Start::State(SavedState::beginning(&of.0, &of.1, bound, None).unwrap());
                let constraint: Option<Box<dyn Constraint>> = Some(Box::new(Repeats(10)));
                let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
                let first = Request { start, constraint, sampling, ..request(prompt(3, 10), 200) };
                let first = Request { logprobs: Some(2), keep_state: true, ..first };
                let stream = engine.submit(first).unwrap();
                // Others come and go meanwhile.
                for seed in 0..if company { 3 } else { 0 } {
                    answer(engine.submit(request(prompt(seed, 20), 4)).unwrap());
                }
                let first = answer(stream);
                let start = Start::State(first.state.clone().unwrap());
                let constraint: Option<Box<dyn Constraint>> = Some(Box::new(Repeats(210)));
                let r = Request { start, constraint, logprobs: Some(2), ..request(vec![5], 60) };
                (first.logprobs, answer(engine.submit(r).unwrap()).logprobs)
            };
            let want = run(Some(0), false);
            assert!(want.0.len() == 200 && want.1.len() == 60);
            for guesses in [None, Some(1), Some(3), Some(8)] {
                assert!(run(guesses, false) == want && run(guesses, true) == want, "{kept} {guesses:?}");
            }
        }
    }
}

#[test]
fn a_given_state_goes_on_in_memory_and_from_a_file() {
    for of in [plain(), hybrid()] {
        let engine = engine(&of, EngineOptions { cache_bytes: 0, ..EngineOptions::default() });
        let begin = SavedState::beginning(&of.0, &of.1, None, None).unwrap();
        let ask = |from: &SavedState, prompt: Vec<u32>, sampler: &Sampler, count| {
            let (start, sampler) = (Start::State(from.clone()), Some(sampler.clone()));
            answer(engine.submit(Request { start, sampler, keep_state: true, ..request(prompt, count) }).unwrap())
        };
        let mut sampler = Sampler::new(Sampling { presence_penalty: 0.5, ..Sampling::default() }).unwrap();
        let whole = ask(&begin, prompt(5, 40), &sampler, 20).tokens;
        assert_eq!(
            whole,
            alone(&of, &prompt(5, 40), &Sampling { presence_penalty: 0.5, ..Sampling::default() }, 0, 20)
        );
        let first = ask(&begin, prompt(5, 40), &sampler, 8);
        assert_eq!(first.tokens, whole[..8]);
        first.tokens.iter().for_each(|&t| sampler.follow(t));
        let (folder, state) = (Folder::new("given"), first.state.unwrap());
        std::fs::create_dir_all(&folder.0).unwrap();
        let path = folder.0.join("s");
        state.save(&of.0, &of.1, &path).unwrap();
        let file = SavedState::open(&of.0, &of.1, &path).unwrap();
        for from in [&state, &file] {
            assert_eq!(ask(from, Vec::new(), &sampler, 12).tokens, whole[8..]);
        }
        // A session reads the same file.
        let mut session = Session::load(&of.0, &of.1, &path).unwrap();
        assert_eq!(sampler.sample(session.logits().unwrap()).unwrap(), whole[8]);
        session.feed(&whole[8..9]).unwrap();
        assert_eq!(sampler.sample(session.logits().unwrap()).unwrap(), whole[9]);
        let refused = |r: Request| engine.submit(r).err().unwrap().to_string();
        let start = || Start::State(begin.clone());
        assert!(refused(Request { start: start(), ..request(Vec::new(), 3) }).contains("prompt is empty"));
        assert!(refused(Request { start: start(), save_as: Some("x".into()), ..request(vec![1], 3) }).contains("name"));
        let other = SavedState::beginning(&of.0, &model(&Config::new(1, 64, 300)).1, None, None).unwrap();
        assert!(refused(Request { start: Start::State(other), ..request(vec![1], 3) }).contains("another model"));
    }
}
