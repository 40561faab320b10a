use super::hay::sentences;
use super::*;
use crate::{Batch, Dataset, Options, Order, Tokens};
use std::collections::HashSet;

const TEXT: &str = "It was cold. Nobody came! The geese (all \"forty\") had gone south, said the miller. Why? He did not say.\n\n\
    In spring they came back, one after the other, and sat on the pond as if nothing had been.";

fn all(tokenizer: Tokenizer) -> Vec<Needles> {
    Task::ALL.map(|task| Needles::new(task, tokenizer, Some(TEXT))).into()
}

#[test]
fn prompts_have_the_length_and_the_needle_the_depth() {
    for tokenizer in [Tokenizer::bytes(), Tokenizer::world_4096(), Tokenizer::world()] {
        for n in all(tokenizer) {
            let longest = n.hay.sentences().iter().map(|s| tokenizer.encode(s.as_bytes()).len()).max().unwrap();
            for (i, len) in [n.shortest(), n.shortest() + 1, 700, 1500].into_iter().enumerate() {
                for depth in [0.0, 0.3, 0.5, 1.0] {
                    let s = n.sample(Keys::Test, 1, i as u64, len, depth);
                    assert_eq!(s.prompt.len(), len, "{} {}", n.task, tokenizer.name());
                    assert_eq!(s, n.sample(Keys::Test, 1, i as u64, len, depth));
                    let text = |ids: &[u32]| String::from_utf8(tokenizer.decode(ids).unwrap()).unwrap();
                    let (before, after) = (&s.prompt[..s.needle.start], &s.prompt[s.needle.end..]);
                    let (needle, whole) = (text(&s.prompt[s.needle.clone()]), text(&s.prompt));
                    // The needle is whole, and the answer is nowhere else.
                    let times = if n.task == Task::Passkey { 2 } else { 1 };
                    assert_eq!(whole.matches(&format!(" {}", s.answer)).count(), times, "{whole}");
                    assert_eq!(needle.matches(&format!(" {}", s.answer)).count(), times, "{needle}");
                    assert!(needle.ends_with('.') && whole.ends_with(" is"), "{whole}");
                    // Its depth is right within half a sentence.
                    let a = before.len() - 1 - n.frame(&[], &[])[0].len();
                    let asks = |&i: &usize| after[i..].len() < 200 && text(&after[i..]).starts_with("\nWhat is");
                    let room = a + (0..after.len()).rfind(asks).unwrap();
                    if len >= 700 {
                        let off = (a as f64 - depth * room as f64).abs();
                        assert!(off <= longest as f64 / 2.0 + 1.0, "{} {depth}: off by {off}", n.task);
                        assert!((depth > 0.0 || a == 0) && (depth < 1.0 || a == room));
                    }
                }
            }
        }
    }
}

#[test]
fn the_wording_is_the_benchmarks() {
    let tokenizer = Tokenizer::world();
    let text = |task, len| {
        let s = Needles::new(task, tokenizer, Some(TEXT)).sample(Keys::Test, 3, 0, len, 0.5);
        (String::from_utf8(tokenizer.decode(&s.prompt).unwrap()).unwrap(), s.answer)
    };
    let (t, answer) = text(Task::Passkey, 150);
    assert!(t.starts_with("There is an important info hidden inside a lot of irrelevant text."), "{t}");
    let needle =
        format!(" Here we go. The pass key is {answer}. Remember it. {answer} is the pass key. There and back again.");
    assert!(t.contains(&needle), "{t}");
    assert!(t.ends_with("\nWhat is the pass key? The pass key is"));
    for (task, what) in [(Task::Niah1, "number"), (Task::Niah2, "number"), (Task::Niah3, "uuid")] {
        let (t, answer) = text(task, 300);
        assert!(
            t.starts_with(&format!("A special magic {what} is hidden within the following text. Make sure to")),
            "{t}"
        );
        let needle = t.split(&format!("One of the special magic {what}s for ")).nth(1).unwrap();
        let (key, _) = needle.split_once(&format!(" is: {answer}.")).unwrap();
        let asked = format!("special magic {what} for {key} mentioned in the provided text");
        assert!(t.ends_with(&format!("\nWhat is the {asked}? The {asked} is")), "{t}");
        assert_eq!(t.contains("forty"), task.takes_text());
        assert_eq!(t.contains("The grass is green. The sky is blue."), !task.takes_text());
    }
    let (_, uuid) = text(Task::Niah3, 300);
    let parts: Vec<usize> = uuid.split('-').map(str::len).collect();
    assert!(parts == [8, 4, 4, 4, 12] && uuid.as_bytes()[14] == b'4', "{uuid}");
}

/// Names and secrets of the needles in a text, in order.
fn hidden(text: &str) -> Vec<(&str, &str)> {
    let needles = text.split("One of the special magic numbers for ").skip(1);
    needles.map(|n| n.split_once('.').unwrap().0.split_once(" is: ").unwrap()).collect()
}

#[test]
fn of_many_needles_one_is_asked_for() {
    for tokenizer in [Tokenizer::bytes(), Tokenizer::world_4096()] {
        let text = |ids: &[u32]| String::from_utf8(tokenizer.decode(ids).unwrap()).unwrap();
        for keys in [2, 20] {
            let n = Needles::new(Task::Niah2, tokenizer, Some(TEXT)).with_keys(keys);
            let mut places = HashSet::new();
            for (i, len) in [n.shortest(), n.shortest() + 1, n.shortest() + 2000].into_iter().enumerate() {
                for depth in [0.0, 0.3, 0.5, 1.0] {
                    let s = n.sample(Keys::Test, 1, i as u64, len, depth);
                    assert_eq!(s.prompt.len(), len);
                    assert_eq!(s, n.sample(Keys::Test, 1, i as u64, len, depth));
                    let whole = text(&s.prompt);
                    let all = hidden(&whole);
                    let distinct = |words: Vec<&str>| words.into_iter().collect::<HashSet<_>>().len();
                    assert_eq!(all.len(), keys, "{whole}");
                    assert_eq!(distinct(all.iter().map(|(name, _)| *name).collect()), keys);
                    assert_eq!(distinct(all.iter().map(|(_, secret)| *secret).collect()), keys);
                    assert!(all.iter().all(|(_, secret)| Keys::of(secret) == Keys::Test));
                    // The question is that of the needle at the depth.
                    let needle = text(&s.prompt[s.needle.clone()]);
                    let [(name, secret)] = hidden(&needle)[..] else { panic!("{needle}") };
                    assert_eq!(secret, s.answer);
                    let asked = format!(" {name} mentioned in the provided text is");
                    assert!(whole.ends_with(&asked), "{whole}");
                    assert_eq!(s.judge(&format!(" {secret}.")), Some(true));
                    let wrong = all.iter().find(|(_, other)| *other != secret).unwrap().1;
                    assert_eq!(s.judge(&format!(" {wrong}.")), Some(false));
                    let place = all.iter().position(|(_, s)| *s == secret).unwrap();
                    places.insert(place);
                    assert!((depth > 0.0 || place == 0) && (depth < 1.0 || place == keys - 1), "{depth}: {place}");
                    let off = (s.needle.start as f64 / len as f64 - depth).abs();
                    assert!(depth == 0.0 || depth == 1.0 || len < 2000 || off < 0.1, "{depth}: off by {off}");
                }
            }
            assert!(keys == 2 || places.len() > 3, "{places:?}");
        }
    }
    assert_eq!((Task::Passkey.most_keys(), Task::Niah2.most_keys()), (1, 1600));
    let all = Needles::new(Task::Niah2, Tokenizer::bytes(), Some(TEXT)).with_keys(1600);
    let s = all.sample(Keys::Test, 1, 1, all.shortest(), 0.5);
    let text: Vec<u8> = s.prompt.iter().map(|&t| t as u8).collect();
    assert_eq!(hidden(&String::from_utf8(text).unwrap()).len(), 1600);
}

#[test]
#[should_panic(expected = "has no room for")]
fn a_prompt_too_short_for_its_needles_is_refused() {
    let n = Needles::new(Task::Niah2, Tokenizer::bytes(), Some(TEXT)).with_keys(20);
    n.sample(Keys::Test, 1, 0, n.shortest() - 200, 0.5);
}

#[test]
fn several_questions_are_several_answers_to_learn() {
    let (ctx, data, tokenizer) = (4000, text(4000), Tokenizer::bytes());
    let mix = |asked, answer_only| {
        let needles = Needles::new(Task::Niah2, tokenizer, Some(TEXT)).with_keys(8);
        let mut m = Mix { needles, share: 1.0, shortest: 0, asked, answer_only, seed: 5 };
        m.shortest = m.least();
        m
    };
    for asked in [1, 3, 8] {
        let m = mix(asked, true);
        let b = m.train(&data, 1, 6);
        assert_eq!((b.tokens.len(), b.targets.len()), (6 * ctx, 6 * ctx));
        for (i, &start) in b.starts.iter().enumerate() {
            let end = b.starts.get(i + 1).copied().unwrap_or(b.tokens.len()).min((start / ctx + 1) * ctx);
            let text: Vec<u8> = b.tokens[start..end].iter().map(|&t| t as u8).collect();
            let text = String::from_utf8(text).unwrap();
            let all = hidden(&text);
            assert_eq!(all.len(), 8);
            // What is learnt is each answer, and the document's end after the last.
            let learnt: Vec<u8> = b.targets[start..end].iter().filter(|&&t| t >= 0).map(|&t| t as u8).collect();
            let learnt = String::from_utf8(learnt).unwrap();
            let learnt: Vec<&str> = learnt.strip_suffix(".\0").unwrap().split('.').collect();
            let questions = text.split("\nWhat is the special magic number for ").skip(1);
            let names: Vec<&str> = questions.map(|q| q.split_once(' ').unwrap().0).collect();
            assert_eq!((learnt.len(), names.len()), (asked, asked));
            assert_eq!(names.iter().collect::<HashSet<_>>().len(), asked);
            for (name, said) in names.iter().zip(learnt) {
                assert!(all.contains(&(name, said.strip_prefix(' ').unwrap())), "{name} {said}");
                assert_eq!(Keys::of(said.trim_start()), Keys::Train);
            }
            // Each is predicted where it is asked for.
            let asks: Vec<usize> =
                (start + 1..end).filter(|&p| b.targets[p] >= 0 && b.targets[p - 1] < 0).map(|p| p + 1).collect();
            assert_eq!(asks.len(), asked);
            let before = |p: usize| b.tokens[start..p].iter().map(|&t| t as u8 as char).collect::<String>();
            assert!(asks.iter().all(|&p| before(p).ends_with("mentioned in the provided text is")));
        }
        let whole = mix(asked, false).train(&data, 1, 6);
        assert_eq!(whole.tokens, b.tokens);
    }
}

#[test]
fn sentences_of_text() {
    let s = sentences(TEXT);
    assert_eq!(s.len(), 6, "{s:?}");
    assert_eq!(s.concat().split_whitespace().collect::<Vec<_>>(), TEXT.split_whitespace().collect::<Vec<_>>());
    assert!(s.iter().all(|s| s.starts_with(' ')) && s[2].ends_with("the miller."));
    assert_eq!(sentences(&"word ".repeat(150)).len(), 3);
    let empty = Needles::new(Task::Niah2, Tokenizer::bytes(), Some(" \n"));
    assert!(empty.hay.sentences().len() > 50_000, "the bundled text instead");
}

#[test]
fn training_and_test_have_no_secret_in_common() {
    for task in Task::ALL {
        let n = Needles::new(task, Tokenizer::bytes(), Some(TEXT));
        let secrets = |keys| -> HashSet<String> { (0..3000).map(|i| n.secret(keys, &mut Random::new(7, i))).collect() };
        let (train, test) = (secrets(Keys::Train), secrets(Keys::Test));
        assert!(train.is_disjoint(&test) && train.len() > 2800 && test.len() > 2800, "{task}");
    }
    // Neither half has digits of its own, the last and the first included.
    let train: Vec<String> = (1..=50_000).map(|i: u32| i.to_string()).filter(|s| Keys::of(s) == Keys::Train).collect();
    assert!((24_500..25_500).contains(&train.len()), "{}", train.len());
    for digit in '0'..='9' {
        let last = train.iter().filter(|s| s.ends_with(digit)).count();
        assert!((2300..2700).contains(&last), "{digit}: {last}");
    }
}

#[test]
fn answers_are_judged() {
    let s = Sample { prompt: vec![], needle: 0..0, answer: "123".into() };
    for (written, right) in [
        ("", None),
        (" 1", None),
        ("\n123", None),
        (" 123.", Some(true)),
        ("123 and", Some(true)),
        ("1234", Some(false)),
        (" 124", Some(false)),
        ("the 123", Some(false)),
    ] {
        assert_eq!(s.judge(written), right, "{written}");
    }
}

fn text(ctx: usize) -> Dataset {
    // Text has tokens from 1000 on, which bytes have not.
    let options = Options { ctx, held_out: 0.1, order: Order::Shuffled, resets: false, seed: 3 };
    Dataset::new(Tokens::Memory((1000..30_000).collect()), options).unwrap()
}

#[test]
fn rows_of_samples_stand_among_rows_of_text() {
    let (ctx, data) = (500, text(500));
    let mix = |share, shortest, answer_only| {
        let needles = Needles::new(Task::Passkey, Tokenizer::bytes(), None);
        Mix { needles, share, shortest, asked: 1, answer_only, seed: 5 }
    };
    let none = mix(0.0, 0, true);
    assert_eq!(none.train(&data, 3, 4), data.train(3, 4));
    for share in [0.25, 0.3, 0.5, 1.0] {
        let m = mix(share, 0, true);
        let one = m.train(&data, 0, 40);
        let parts: Vec<Batch> = (0..10).map(|step| m.train(&data, step, 4)).collect();
        let mut joined = Batch::default();
        parts.into_iter().for_each(|b| joined.append(b));
        assert_eq!(one, joined, "a row is a function of its number");
        let rows: Vec<&[u32]> = one.tokens.chunks(ctx).collect();
        let needles = rows.iter().filter(|r| r[0] == 0).count();
        assert_eq!(needles, (40.0 * share) as usize);
        let texts: Vec<u32> = rows.iter().filter(|r| r[0] >= 1000).map(|r| r[0]).collect();
        let alone = data.train(0, 40 - needles);
        assert!(texts.iter().eq(alone.tokens.chunks(ctx).map(|r| &r[0])), "no text is left out");
    }
    // Whole prompts are targets, or answers alone: the secret, a full stop, the end.
    let (prompts, answers) = (mix(1.0, 0, false).train(&data, 0, 8), mix(1.0, 0, true).train(&data, 0, 8));
    assert_eq!((&prompts.tokens, prompts.starts.len()), (&answers.tokens, 8));
    assert!(prompts.targets.iter().all(|&t| t >= 0));
    for (x, y) in answers.tokens.chunks(ctx).zip(answers.targets.chunks(ctx)) {
        let from = y.iter().position(|&t| t >= 0).unwrap();
        let answer: Vec<u8> = y[from..].iter().map(|&t| t as u8).collect();
        let said = String::from_utf8(answer).unwrap();
        let secret = said.strip_prefix(' ').and_then(|s| s.strip_suffix(".\0")).unwrap();
        assert_eq!(Keys::of(secret), Keys::Train);
        let prompt: Vec<u8> = x[..=from].iter().map(|&t| t as u8).collect();
        assert!(String::from_utf8(prompt).unwrap().contains(&format!("The pass key is {secret}.")));
    }
}

#[test]
fn samples_of_several_lengths_share_a_row() {
    let (ctx, data) = (2000, text(2000));
    let needles = Needles::new(Task::Passkey, Tokenizer::bytes(), None);
    let mut m = Mix { needles, share: 1.0, shortest: 0, asked: 1, answer_only: true, seed: 5 };
    m.shortest = m.least();
    let b = m.train(&data, 1, 30);
    assert_eq!((b.tokens.len(), b.targets.len(), b.len(ctx)), (30 * ctx, 30 * ctx, 30));
    let mut lengths = Vec::new();
    for (i, &start) in b.starts.iter().enumerate() {
        let end = b.starts.get(i + 1).copied().unwrap_or(b.tokens.len()).min((start / ctx + 1) * ctx);
        let last = (start..end).rfind(|&i| b.targets[i] >= 0).unwrap();
        assert_eq!((b.tokens[start], b.targets[last]), (0, 0), "from one end of a document to the next");
        lengths.push(last + 1 - start);
    }
    assert!(b.starts.is_sorted() && (0..30).all(|row| b.starts.contains(&(row * ctx))));
    assert!(lengths.iter().all(|&l| (m.shortest..=ctx).contains(&l)), "{lengths:?}");
    assert!(lengths.iter().any(|&l| l < ctx / 2) && lengths.iter().any(|&l| l > ctx / 2));
}
