use super::*;

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize
    }
}

#[test]
fn official_vectors() {
    let t = Tokenizer::world();
    let rows: [(&str, &[u32]); 7] = [
        ("The Eiffel tower is in the city of", &[6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706]),
        (" Eiffel", &[304, 25740, 109]),
        ("\n\n", &[261]),
        ("User: hello\n\nAssistant: <think>", &[24281, 59, 38685, 261, 5585, 41693, 59, 295, 35762, 63]),
        ("Hello, 世界！", &[33155, 45, 33, 10267, 14610, 19126]),
        ("</think>", &[754, 35762, 63]),
        (
            "Today is a beautiful day. 今天是美好的一天。",
            &[33520, 4600, 332, 59219, 21509, 47, 33, 10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 10080],
        ),
    ];
    for (text, ids) in rows {
        assert_eq!(t.encode(text.as_bytes()), ids, "{text:?}");
        assert_eq!(t.decode(ids).unwrap(), text.as_bytes());
    }
}

#[test]
fn equals_naive_longest_match_on_random_bytes_and_tokens() {
    equals_naive_longest_match(Tokenizer::world(), &WORLD.tokens, 65530);
    equals_naive_longest_match(Tokenizer::world_4096(), &WORLD_4096.tokens, 4096);
}

fn equals_naive_longest_match(t: Tokenizer, tokens: &[Vec<u8>], size: usize) {
    assert_eq!(tokens.len(), size);
    let set: std::collections::HashMap<&[u8], u32> =
        tokens.iter().enumerate().skip(1).map(|(i, b)| (&b[..], i as u32)).collect();
    assert_eq!(set.len(), size - 1);
    let naive = |text: &[u8]| {
        let (mut out, mut at) = (Vec::new(), 0);
        while at < text.len() {
            let n = (1..=128.min(text.len() - at)).rev().find(|&n| set.contains_key(&text[at..at + n])).unwrap();
            out.push(set[&text[at..at + n]]);
            at += n;
        }
        out
    };
    let mut noise = Noise(1);
    for round in 0..300 {
        let text: Vec<u8> = match round % 3 {
            0 => (0..noise.next() % 200).map(|_| noise.next() as u8).collect(),
            1 => (0..noise.next() % 200).map(|_| b" aeinrst\n"[noise.next() % 9]).collect(),
            _ => (0..noise.next() % 40).flat_map(|_| &tokens[noise.next() % size]).copied().collect(),
        };
        let ids = t.encode(&text);
        assert_eq!(ids, naive(&text));
        assert_eq!(t.decode(&ids).unwrap(), text);
    }
    for (i, token) in tokens.iter().enumerate().skip(1) {
        assert_eq!(t.encode(token), [i as u32]);
    }
}

#[test]
fn the_subset_is_of_world() {
    let (world, subset) = (Tokenizer::world(), Tokenizer::world_4096());
    let ids: Vec<u32> = (1..4096).map(|id| world.encode(subset.token(id).unwrap())[0]).collect();
    assert!(ids.is_sorted() && ids[..256].iter().copied().eq(1..=256));
    assert_eq!(subset.decode(&[4096]), Err(Error::UnknownToken(4096, "world-4096")));
    assert_eq!(Tokenizer::from_name("world-4096").unwrap().vocab_size(), 4096);
}

#[test]
fn bytes_and_unknown_ids() {
    let t = Tokenizer::bytes();
    assert_eq!(t.encode(b"a\xff"), [97, 255]);
    assert_eq!(t.decode(&[97, 0, 255]).unwrap(), b"a\xff");
    assert_eq!(t.decode(&[256]), Err(Error::UnknownToken(256, "bytes")));
    assert_eq!(Tokenizer::world().decode(&[65530]), Err(Error::UnknownToken(65530, "world")));
    assert!(Tokenizer::from_name("gpt2").is_err());
    assert!(World::parse("1 'a' 2").is_err() && World::parse("2 'a' 1").is_err() && World::parse("1 a 1").is_err());
    assert!(World::parse("1 'a' 1\n2 b'a' 1").is_err());
}

#[test]
fn streaming_equals_lossy_decoding() {
    let mut noise = Noise(5);
    for _ in 0..2000 {
        let text = "aé世🦢\u{7ff}";
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..noise.next() % 4 {
            let i = noise.next() % bytes.len();
            bytes[i] = noise.next() as u8;
        }
        let mut d = StreamDecoder::default();
        let mut out = String::new();
        let mut at = 0;
        while at < bytes.len() {
            let n = (1 + noise.next() % 3).min(bytes.len() - at);
            out += &d.push(&bytes[at..at + n]);
            at += n;
        }
        out += &d.finish();
        assert_eq!(out, String::from_utf8_lossy(&bytes), "{bytes:?}");
    }
}

#[test]
fn the_longest_token_is_as_long_as_said() {
    for t in [Tokenizer::world(), Tokenizer::world_4096(), Tokenizer::bytes()] {
        let longest = (0..t.vocab_size() as u32).filter_map(|i| t.token(i).ok()).map(<[u8]>::len).max();
        assert_eq!(longest, Some(t.max_token_len()));
    }
}
