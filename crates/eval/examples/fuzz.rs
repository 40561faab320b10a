//! Damages small valid files of every kind that is read and opens them: `cargo run --release -p anser-eval --example fuzz -- [minutes] [seed]`.
//!
//! Whatever a file says, opening it ends in a result or an error: without a panic, within 5 seconds of computing, and without an allocation of more than 8 times the
//! file's size (what 4 bits become in f32) and 1 MiB, the blocks that small matrices share apart. What fails is kept in `fuzz-failures`; an input that ends the process stays in `fuzz-now`.

use anser_data::{Binidx, BinidxWriter};
use anser_formats::gguf::{Value, write_gguf};
use anser_formats::{Checkpoint, Dtype, Source, coded, llama, write_pth, write_safetensors};
use anser_infer::Session;
use anser_model::{Config, Hybrid, Init, Load, LoraDims, Model};
use anser_tensor::{Code, Context, DType, WeightType};
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Counts the largest allocation.
struct Counting;

/// Zeroed memory that a context gives small matrices in large pages; it is as long whatever a file says.
const BLOCK: usize = 32 << 20;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: by the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() != BLOCK {
            LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        }
        // SAFETY: by the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: by the caller's promise.
        unsafe { System.realloc(ptr, layout, size) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: by the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Random numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// What opens a file.
#[derive(Clone, Copy)]
enum Reader {
    Model,
    State,
    Binidx,
}

/// A kind of input: the files of a folder, of which some are damaged, and what is opened.
struct Kind {
    name: &'static str,
    files: Vec<(PathBuf, Vec<u8>)>,
    open: PathBuf,
    reader: Reader,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let minutes: f64 = args.next().map_or(Ok(1.0), |a| a.parse())?;
    let seed: u64 = args.next().map_or(Ok(1), |a| a.parse())?;
    let (ctx, now) = (Context::cpu(1), PathBuf::from("fuzz-now"));
    let kinds = kinds(&ctx, &now)?;
    let reference = model(&ctx, &small(None))?;
    std::panic::set_hook(Box::new(|_| {}));
    let (start, mut tried, mut failed, mut opened) = (Instant::now(), 0u64, 0u64, 0u64);
    while start.elapsed() < Duration::from_secs_f64(60.0 * minutes) {
        let mut random = Random(seed.wrapping_mul(0x1000_0001).wrapping_add(tried));
        let kind = &kinds[random.below(kinds.len())];
        let mut size = 0;
        let damaged = random.below(kind.files.len());
        for (i, (path, bytes)) in kind.files.iter().enumerate() {
            let mut bytes = bytes.clone();
            if i == damaged || random.below(4) == 0 {
                let other = &kinds[random.below(kinds.len())].files[0].1;
                (0..1 + random.below(4)).for_each(|_| damage(&mut random, &mut bytes, other));
            }
            size += bytes.len();
            // Not over the old file, which a map may still have.
            let _ = std::fs::remove_file(path);
            std::fs::write(path, &bytes)?;
        }
        let before = computed();
        LARGEST.store(0, Ordering::Relaxed);
        let result = catch_unwind(AssertUnwindSafe(|| read(&ctx, kind, &reference, &mut random)));
        let (largest, took) = (LARGEST.load(Ordering::Relaxed), computed() - before);
        let why = match result {
            Err(e) => {
                let text = e.downcast_ref::<String>().map(String::as_str).or(e.downcast_ref::<&str>().copied());
                Some(format!("panic: {}", text.unwrap_or("?")))
            }
            _ if largest > 8 * size + (1 << 20) => Some(format!("an allocation of {largest} bytes for {size}")),
            _ if took > Duration::from_secs(5) => Some(format!("{took:?}")),
            Ok(whole) => {
                opened += u64::from(whole);
                None
            }
        };
        if let Some(why) = why {
            failed += 1;
            let to = PathBuf::from(format!("fuzz-failures/{seed}-{tried}"));
            std::fs::create_dir_all(&to)?;
            for (path, _) in &kind.files {
                std::fs::copy(path, to.join(path.file_name().unwrap_or_default()))?;
            }
            println!("{}: {}: {why}", to.display(), kind.name);
        }
        tried += 1;
    }
    println!("{tried} inputs, {opened} of them opened, {failed} failures, {:.0} s", start.elapsed().as_secs_f64());
    std::process::exit(i32::from(failed > 0));
}

/// How long this thread has computed; where the system doesn't say that, a clock.
fn computed() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let said = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = said.and_then(|s| s.split(' ').next()?.parse().ok());
    nanoseconds.map_or_else(|| START.get_or_init(Instant::now).elapsed(), Duration::from_nanos)
}

/// Opens an input and reads all of it: whether there was no error.
fn read(ctx: &Context, kind: &Kind, reference: &Model, random: &mut Random) -> bool {
    match kind.reader {
        Reader::State => Session::load(ctx, reference, &kind.open).is_ok_and(|mut s| s.feed(&[1, 2]).is_ok()),
        Reader::Binidx => Binidx::open(&kind.open).is_ok_and(|data| {
            let mut tokens = vec![0; data.len()];
            data.read(0, &mut tokens);
            let [starts @ .., _] = data.starts() else { return false };
            starts.iter().all(|&s| s <= data.len())
        }),
        Reader::Model => {
            let Ok(ckpt) = Checkpoint::open(&kind.open) else { return false };
            let mut whole = true;
            for t in ckpt.names().filter_map(|n| ckpt.get(n)) {
                whole &= t.to_f32_vec().is_ok();
                let _ = (t.to_u32_vec(), t.bytes());
                if let (Some(coded), &[rows, _]) = (t.coded(), t.shape()) {
                    (0..rows).for_each(|o| whole &= !coded.row(o).1.is_empty());
                }
            }
            let kept = [DType::F32.into(), DType::F16.into(), WeightType::Int8, WeightType::Q4][random.below(4)];
            let model = Config::from_checkpoint(&ckpt).and_then(|_| Model::load(ctx, &ckpt, Load::Inference(kept)));
            whole && model.is_ok_and(|m| Session::new(ctx, &m).feed(&[1, 2]).is_ok())
        }
    }
}

/// One damage; half of them are near the ends, where headers are.
fn damage(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    const NUMBERS: [u64; 12] =
        [0, 1, 2, 127, 255, 65_535, 1 << 31, u32::MAX as u64, 1 << 32, 1 << 62, i64::MAX as u64, u64::MAX];
    let near = |random: &mut Random, len: usize| match random.below(4) {
        0 => random.below(len.min(512)),
        1 => random.below(len.min(8192)),
        2 => len.saturating_sub(1 + random.below(len.min(1024))),
        _ => random.below(len),
    };
    if bytes.is_empty() {
        return bytes.push(random.next() as u8);
    }
    let at = near(random, bytes.len());
    let some = (1 + random.below(64)).min(bytes.len() - at);
    match random.below(9) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..at + some)),
        4 => {
            let from = near(random, bytes.len());
            let copy = bytes[from..(from + some).min(bytes.len())].to_vec();
            drop(bytes.splice(at..at, copy));
        }
        5 => {
            let from = near(random, other.len());
            let copy = other[from..(from + some).min(other.len())].to_vec();
            drop(bytes.splice(at..(at + copy.len()).min(bytes.len()), copy));
        }
        // A number of 4 or 8 bytes.
        6 => {
            let number = (NUMBERS[random.below(NUMBERS.len())].wrapping_add(random.below(3) as u64)).to_le_bytes();
            let width = [4, 8][random.below(2)].min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&number[..width]);
        }
        // A number or a word of a text.
        _ => {
            let texts = [
                "0",
                "1",
                "-1",
                "64",
                "4294967296",
                "9223372036854775807",
                "18446744073709551615",
                "1e9",
                "null",
                "[]",
                "{}",
                "\"I8\"",
                "\"U8\"",
            ];
            let is = |b: &u8| b.is_ascii_digit();
            let Some(first) = bytes[at..].iter().position(is).map(|i| at + i) else { return };
            let end = bytes[first..].iter().position(|b| !is(b)).map_or(bytes.len(), |i| first + i);
            drop(bytes.splice(first..end, texts[random.below(texts.len())].bytes()));
        }
    }
}

fn small(hybrid: Option<Hybrid>) -> Config {
    let lora = LoraDims { decay: 4, rate: 4, value: 4, gate: 4 };
    Config { head_size: 16, n_hidden: 64, lora, hybrid, ..Config::new(2, 64, 16) }
}

fn model(ctx: &Context, config: &Config) -> Result<Model, anser_model::Error> {
    Model::init(ctx, config, Init::Noise, 1)
}

/// Small files of every kind.
fn kinds(ctx: &Context, now: &Path) -> Result<Vec<Kind>, Box<dyn std::error::Error>> {
    std::fs::create_dir_all(now)?;
    let mut kinds: Vec<Kind> = Vec::new();
    let mut add = |name: &'static str, open: &str, files: &[&str], reader: Reader| -> std::io::Result<()> {
        let files =
            files.iter().map(|f| Ok((now.join(f), std::fs::read(now.join(f))?))).collect::<std::io::Result<_>>()?;
        kinds.push(Kind { name, files, open: now.join(open), reader });
        Ok(())
    };
    let none = BTreeMap::new();
    let hybrid = small(Some(Hybrid { chunk: 8, topk: 2, ..Hybrid::new(1) }));
    for (config, f32s, f16s, pth) in [
        (&small(None), "a.safetensors", "b.safetensors", "c.pth"),
        (&hybrid, "d.safetensors", "e.safetensors", "f.pth"),
    ] {
        let model = model(ctx, config)?;
        let (specs, values) = (model.params().specs(), model.params().values());
        let of = |dtype| -> Vec<Source<'_>> {
            specs.iter().map(|s| Source::new(s.name.as_str(), &s.shape, dtype, &values[s.range.clone()])).collect()
        };
        write_safetensors(&now.join(f32s), &of(Dtype::F32), &BTreeMap::from([config.description()]))?;
        write_safetensors(&now.join(f16s), &of(Dtype::F16), &none)?;
        write_pth(&now.join(pth), &of(Dtype::BF16))?;
        add("safetensors F32", f32s, &[f32s], Reader::Model)?;
        add("safetensors F16", f16s, &[f16s], Reader::Model)?;
        add("pth", pth, &[pth], Reader::Model)?;
        let mut session = Session::new(ctx, &model);
        session.feed(&[1, 2, 3, 4, 5])?;
        if config.hybrid.is_none() {
            session.save(&now.join("g.state"))?;
            add("state", "g.state", &["g.state"], Reader::State)?;
        }
    }
    let ckpt = Checkpoint::open(&now.join("a.safetensors"))?;
    for (dtype, code, name) in [
        (Dtype::I8, Code::Int8, "h.safetensors"),
        (Dtype::Q4, Code::Q4, "i.safetensors"),
        (Dtype::Q5, Code::Q5, "j.safetensors"),
    ] {
        let mut sources = Vec::new();
        for t in ckpt.names().filter_map(|n| ckpt.get(n)) {
            match t.shape() {
                [_, k] if k.is_multiple_of(32) && t.name().ends_with(".weight") => {
                    let k = *k;
                    sources.extend(coded::sources(t, dtype, move |v| {
                        let rows = v.len() / k;
                        let (bytes, groups) = (code.bytes_of(k), k.div_ceil(code.group()));
                        let (mut codes, mut scales) = (vec![0; rows * bytes], vec![Default::default(); rows * groups]);
                        for r in 0..rows {
                            let to = (&mut codes[r * bytes..][..bytes], &mut scales[r * groups..][..groups]);
                            code.encode(&v[r * k..][..k], to.0, to.1);
                        }
                        (codes, scales)
                    })?);
                }
                shape => {
                    let values = Box::new(move || Ok(t.to_f32_vec()?.into()));
                    sources.push(Source { name: t.name().into(), shape: shape.into(), dtype: Dtype::F16, values });
                }
            }
        }
        write_safetensors(&now.join(name), &sources, &coded::metadata(&[dtype]).collect())?;
        add("safetensors, coded", name, &[name], Reader::Model)?;
    }
    // web-rwkv's: the low-rank matrices turned.
    let turned = |name: &str| {
        matches!(name.rsplit('.').next().map(str::as_bytes), Some([b'w' | b'a' | b'v' | b'g', b'1' | b'2']))
    };
    let mut sources = Vec::new();
    for t in ckpt.names().filter_map(|n| ckpt.get(n)) {
        let (mut shape, mut values) = (t.shape().to_vec(), t.to_f32_vec()?);
        if let (true, &[rows, cols]) = (turned(t.name()), &shape[..]) {
            values = (0..values.len()).map(|i| values[i % rows * cols + i / rows]).collect();
            shape.reverse();
        }
        let values = Box::new(move || Ok(values.clone().into()));
        sources.push(Source { name: t.name().into(), shape, dtype: Dtype::F16, values });
    }
    write_safetensors(&now.join("j.st"), &sources, &none)?;
    add("st", "j.st", &["j.st"], Reader::Model)?;
    for (dtype, name) in [(Dtype::F16, "k.gguf"), (Dtype::Q8_0, "l.gguf")] {
        let (sources, mut metadata) = llama::from_official(&ckpt, Some(dtype))?;
        metadata.push(("anser.tokenizer".into(), Value::Text("bytes".into())));
        metadata.extend(llama::tokenizer((0..4).map(|_| &b"ab"[..]), 16, Some(1)));
        write_gguf(&now.join(name), &sources, &metadata)?;
        add("gguf", name, &[name], Reader::Model)?;
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    // Every quantisation of llama.cpp; a folder of shards; a file that torch wrote.
    std::fs::copy(fixtures.join("llama.cpp/blocks.gguf"), now.join("m.gguf"))?;
    add("gguf blocks", "m.gguf", &["m.gguf"], Reader::Model)?;
    std::fs::copy(fixtures.join("golden/rwkv7_bf16.pth"), now.join("n.pth"))?;
    add("pth of torch", "n.pth", &["n.pth"], Reader::Model)?;
    std::fs::create_dir_all(now.join("o"))?;
    let folder = [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    for file in folder {
        std::fs::copy(fixtures.join("huggingface").join(file), now.join("o").join(file))?;
    }
    let files = folder.map(|f| format!("o/{f}"));
    add("folder", "o", &files.each_ref().map(String::as_str), Reader::Model)?;
    let mut data = BinidxWriter::create(&now.join("p"))?;
    for document in [&[1, 2, 3][..], &[], &[4; 50], &[5, 6]] {
        data.push(document)?;
        data.end_document()?;
    }
    data.finish()?;
    add("binidx", "p", &["p.idx", "p.bin"], Reader::Binidx)?;
    Ok(kinds)
}
