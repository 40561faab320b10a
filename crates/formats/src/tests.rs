use crate::*;
use std::collections::BTreeMap;
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/golden")).join(name)
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("anser-formats-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn all(c: &Checkpoint) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    c.names()
        .map(|n| {
            let t = c.get(n).unwrap();
            let values = t.to_f32_vec().unwrap();
            t.release();
            assert_eq!(values, t.to_f32_vec().unwrap(), "released pages come back");
            (n.to_string(), (t.shape().to_vec(), values))
        })
        .collect()
}

#[test]
fn golden_files_agree() {
    let pth = all(&Checkpoint::open(&fixture("rwkv7.pth")).unwrap());
    let own = all(&Checkpoint::open(&fixture("rwkv7.safetensors")).unwrap());
    assert!(pth == own && pth.len() == 102);
    let bytes = std::fs::read(fixture("rwkv7.safetensors")).unwrap();
    let oracle = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (name, t) in oracle.tensors() {
        let values: Vec<f32> = t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert!(own[&name] == (t.shape().to_vec(), values));
    }
    let half = Checkpoint::open(&fixture("rwkv7_bf16.pth")).unwrap();
    assert_eq!(half.get("emb.weight").unwrap().dtype(), Dtype::BF16);
    for (name, (shape, values)) in all(&half) {
        let rounded: Vec<f32> = pth[&name].1.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
        assert!(pth[&name].0 == shape && rounded == values, "{name}");
    }
}

#[test]
fn what_is_written_reads_back_in_both_formats_and_all_types() {
    let folder = Folder::new("round");
    let golden = Checkpoint::open(&fixture("rwkv7.pth")).unwrap();
    let tensors = all(&golden);
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let sources = || -> Vec<Source<'_>> {
            tensors.iter().map(|(n, (shape, v))| Source::new(n.as_str(), shape, dtype, v)).collect()
        };
        let (a, b) = (folder.0.join("a.safetensors"), folder.0.join("b.pth"));
        let metadata = BTreeMap::from([("anser.config".to_string(), "{}".to_string())]);
        write_safetensors(&a, &sources(), &metadata).unwrap();
        write_pth(&b, &sources()).unwrap();
        let (a, b) = (Checkpoint::open(&a).unwrap(), Checkpoint::open(&b).unwrap());
        assert_eq!(a.metadata(), &metadata);
        let read = all(&a);
        assert!(read == all(&b) && read.len() == tensors.len());
        if dtype == Dtype::F32 {
            assert!(read == tensors);
        }
        let data = std::fs::read(b.path()).unwrap();
        for name in b.names() {
            let bytes = b.get(name).unwrap().bytes().unwrap();
            let at = data.windows(bytes.len().min(64)).position(|w| w == &bytes[..bytes.len().min(64)]);
            assert!(at.is_some());
        }
    }
}

/// Every kind of damage is an error or harmless, never a panic.
#[test]
fn a_checkpoint_in_the_program_reads_like_a_file() {
    let path = fixture("rwkv7.safetensors");
    let bytes: &'static [u8] = std::fs::read(&path).unwrap().leak();
    let (own, file) = (Checkpoint::from_static("own", bytes).unwrap(), Checkpoint::open(&path).unwrap());
    assert!(own.names().eq(file.names()) && own.metadata() == file.metadata());
    for name in own.names() {
        let [own, file] = [&own, &file].map(|c| c.get(name).unwrap());
        assert!(own.shape() == file.shape() && own.to_f32_vec().unwrap() == file.to_f32_vec().unwrap(), "{name}");
        own.release();
    }
    let damaged = Checkpoint::from_static("own", &bytes[..bytes.len() - 1]).err().unwrap().to_string();
    assert!(damaged.starts_with("own: ") && damaged.contains("truncated"), "{damaged}");
}

#[test]
fn damaged_files_are_errors() {
    let folder = Folder::new("damage");
    let values = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
    let sources = || {
        vec![Source::new("a.weight", &[2, 3], Dtype::F32, &values), Source::new("b", &[1, 1, 6], Dtype::BF16, &values)]
    };
    let (safe, pth, bad) = (folder.0.join("a.safetensors"), folder.0.join("b.pth"), folder.0.join("bad"));
    write_safetensors(&safe, &sources(), &BTreeMap::new()).unwrap();
    write_pth(&pth, &sources()).unwrap();
    for path in [safe, pth] {
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&bad, &whole[..cut]).unwrap();
            let e = Checkpoint::open(&bad).err().unwrap_or_else(|| panic!("{path:?} cut at {cut} opens"));
            assert!(e.to_string().contains("bad"), "{e}");
        }
        let mut seed = 1u32;
        for i in 0..whole.len() * 4 {
            let mut file = whole.clone();
            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
            file[i / 4] ^= 1 << (seed >> 16 & 7);
            if i % 4 == 3 {
                file[(seed >> 8) as usize % whole.len()] = (seed >> 3) as u8;
            }
            std::fs::write(&bad, &file).unwrap();
            if let Ok(c) = Checkpoint::open(&bad) {
                for name in c.names() {
                    let t = c.get(name).unwrap();
                    if t.shape().iter().product::<usize>() < 1000 {
                        let _ = t.to_f32_vec();
                    }
                }
            }
        }
    }
}

#[test]
fn hostile_pickles_run_nothing() {
    let e = pickle::load(b"\x80\x02cposix\nsystem\n(X\x02\0\0\0lstR.").unwrap_err();
    assert!(e.contains("posix.system") && e.contains("nothing was executed"), "{e}");
    for code in [
        &b""[..],
        b".",
        b"(",
        b"t.",
        b"R.",
        b"}u.",
        b"h\x05.",
        b"X\xff\xff\xff\xff",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"((((e.",
        b"\x85.",
        b"Q.",
    ] {
        assert!(pickle::load(code).is_err(), "{code:?}");
    }
    // A memo that doubles a tuple again and again stays small: values are shared.
    let mut bomb = b"\x80\x02)q\0".to_vec();
    for _ in 0..100 {
        bomb.extend(b"h\0h\0\x86q\0");
    }
    bomb.push(b'.');
    assert!(matches!(pickle::load(&bomb), Ok(pickle::Value::Tuple(..))));
    // Nor does one that nests end the stack.
    for (inner, outer) in [(&b")"[..], &b"\x85"[..]), (b"]", b"q\0]h\0a"), (b"}", b"q\0}h\0h\0s")] {
        let deep = [inner, &outer.repeat(1_000_000), b"."].concat();
        let e = pickle::load(&deep).unwrap_err();
        assert!(e.contains("nests deeper"), "{e}");
    }
}

#[test]
fn a_flipped_bit_is_seen_by_its_checksum() {
    let path = std::env::temp_dir().join(format!("anser-flipped-{}.pth", std::process::id()));
    let mut whole = std::fs::read(fixture("rwkv7.pth")).unwrap();
    std::fs::write(&path, &whole).unwrap();
    Checkpoint::open(&path).unwrap().verify().unwrap();
    let middle = whole.len() / 2;
    whole[middle] ^= 4;
    std::fs::write(&path, &whole).unwrap();
    let e = Checkpoint::open(&path).unwrap().verify().unwrap_err().to_string();
    assert!(e.contains("/data/") && e.contains("checksum"), "{e}");
    std::fs::remove_file(path).unwrap();
}

#[test]
fn errors_say_what_to_do() {
    let missing = Checkpoint::open(&PathBuf::from("no/such/file.pth")).err().unwrap().to_string();
    assert!(missing.contains("no/such/file.pth: open"), "{missing}");
    let folder = Folder::new("errors");
    let old = folder.0.join("old.pth");
    std::fs::write(&old, b"\x80\x02\x8a\x0a").unwrap();
    assert!(Checkpoint::open(&old).err().unwrap().to_string().contains("old format"));
    let values = [0.0; 3];
    let wrong = write_safetensors(&old, &[Source::new("x", &[2], Dtype::F32, &values)], &BTreeMap::new());
    assert!(wrong.unwrap_err().to_string().contains("x: shape [2] does not fit 3 values"));
    assert_eq!(std::fs::read(&old).unwrap(), b"\x80\x02\x8a\x0a");
}

/// The golden model as Hugging Face files: other names, low-rank matrices transposed, in two shards.
fn write_huggingface(folder: &std::path::Path, old_shift: bool) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let official = all(&Checkpoint::open(&fixture("rwkv7.pth")).unwrap());
    let mut out: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let mut fused: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for (name, (shape, values)) in &official {
        let (name, turned) = match name.strip_prefix("blocks.").and_then(|r| r.split_once('.')) {
            None => match name.as_str() {
                "emb.weight" => ("model.embeddings.weight".to_string(), false),
                "head.weight" => ("lm_head.weight".to_string(), false),
                other => (other.replace("ln_out", "model.norm"), false),
            },
            Some((i, part)) => {
                let mut turned = false;
                let part = match part {
                    "att.w0" | "att.a0" | "att.v0" => format!("attn.{}_lora.lora.2.bias", &part[4..5]),
                    p if p.len() == 6 && p.ends_with('1') => {
                        turned = true;
                        format!("attn.{}_lora.lora.0.weight", &p[4..5])
                    }
                    p if p.len() == 6 && p.ends_with('2') => {
                        turned = true;
                        format!("attn.{}_lora.lora.2.weight", &p[4..5])
                    }
                    p if old_shift && p.starts_with("att.x_") => {
                        // Alphabetical order of names here; the rows are in the order r, w, k, v, a, g.
                        fused.entry(format!("{i}.{p}")).or_insert(values.clone());
                        continue;
                    }
                    p => p
                        .replace("ln0", "pre_norm")
                        .replace("ln1", "attn_norm")
                        .replace("ln2", "ffn_norm")
                        .replace("att.ln_x", "attn.g_norm")
                        .replace("att.receptance", "attn.r_proj")
                        .replace("att.key", "attn.k_proj")
                        .replace("att.value", "attn.v_proj")
                        .replace("att.output", "attn.o_proj")
                        .replace("att.", "attn."),
                };
                (format!("model.layers.{i}.{part}"), turned)
            }
        };
        if turned {
            let (r, c) = (shape[0], shape[1]);
            let t = (0..r * c).map(|i| values[i % r * c + i / r]).collect();
            out.push((name, vec![c, r], t));
        } else {
            out.push((name, shape.clone(), values.clone()));
        }
    }
    let layers = official.keys().filter(|n| n.ends_with("att.k_k")).count();
    for i in (0..layers).filter(|_| old_shift) {
        let rows: Vec<f32> =
            ["r", "w", "k", "v", "a", "g"].iter().flat_map(|m| fused[&format!("{i}.att.x_{m}")].clone()).collect();
        out.push((format!("model.layers.{i}.attn.x_x"), vec![6, rows.len() / 6], rows));
    }
    let half = out.len() / 2;
    let mut map = BTreeMap::new();
    for (k, part) in [&out[..half], &out[half..]].iter().enumerate() {
        let file = format!("model-{k}.safetensors");
        let sources: Vec<Source<'_>> = part.iter().map(|(n, s, v)| Source::new(n.as_str(), s, Dtype::F32, v)).collect();
        write_safetensors(&folder.join(&file), &sources, &BTreeMap::new()).unwrap();
        map.extend(part.iter().map(|(n, ..)| (n.clone(), file.clone())));
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::write(folder.join("config.json"), r#"{"model_type": "rwkv7"}"#).unwrap();
    official
}

#[test]
fn huggingface_folders_show_the_official_tensors() {
    for old_shift in [false, true] {
        let folder = Folder::new(&format!("hf-{old_shift}"));
        let official = write_huggingface(&folder.0, old_shift);
        let ckpt = Checkpoint::open(&folder.0).unwrap();
        assert_eq!(ckpt.naming(), Naming::HuggingFace);
        let seen = all(&ckpt);
        assert_eq!(seen.keys().collect::<Vec<_>>(), official.keys().collect::<Vec<_>>());
        for (name, (shape, values)) in &official {
            let squeezed: Vec<usize> = shape.iter().copied().filter(|&d| d != 1).collect();
            let found: Vec<usize> = seen[name].0.iter().copied().filter(|&d| d != 1).collect();
            assert!(squeezed == found && values == &seen[name].1, "{name}");
            // Any piece of a strided tensor reads as that piece of the whole.
            let (from, to) = (values.len() / 3, values.len() / 3 + values.len() / 2);
            let mut piece = vec![0.0; to - from];
            ckpt.get(name).unwrap().read_f32_from(from, &mut piece).unwrap();
            assert_eq!(piece, values[from..to]);
        }
        assert!(ckpt.metadata()[CONFIG_JSON].contains("rwkv7"));
        // A shard that is missing, a shard elsewhere, no weights at all.
        std::fs::remove_file(folder.0.join("model-1.safetensors")).unwrap();
        assert!(Checkpoint::open(&folder.0).err().unwrap().to_string().contains("model-1.safetensors"));
        let evil = r#"{"weight_map": {"a": "../x.safetensors"}}"#;
        std::fs::write(folder.0.join("model.safetensors.index.json"), evil).unwrap();
        assert!(Checkpoint::open(&folder.0).err().unwrap().to_string().contains("not a file of this folder"));
        std::fs::remove_file(folder.0.join("model.safetensors.index.json")).unwrap();
        assert!(Checkpoint::open(&folder.0).err().unwrap().to_string().contains("no model.safetensors"));
    }
}

/// A small file of each kind, to be damaged.
fn small_files() -> &'static [Vec<u8>; 4] {
    static FILES: std::sync::OnceLock<[Vec<u8>; 4]> = std::sync::OnceLock::new();
    FILES.get_or_init(|| {
        let folder = Folder::new("small");
        let values = [1.5, -2.0, 3.0, 4.0, 5.0, 6.0];
        let sources = [
            Source::new("emb.weight", &[2, 3], Dtype::F32, &values),
            Source::new("blocks.0.att.r_k", &[1, 6], Dtype::BF16, &values),
        ];
        let (pth, safe) = (folder.0.join("a.pth"), folder.0.join("a.safetensors"));
        write_pth(&pth, &sources).unwrap();
        write_safetensors(&safe, &sources, &BTreeMap::from([("k".into(), "v".into())])).unwrap();
        let hf = folder.0.join("hf.safetensors");
        let sources = [
            Source::new("model.layers.0.attn.w_lora.lora.0.weight", &[2, 3], Dtype::F16, &values),
            Source::new("model.layers.0.attn.x_x", &[6, 1], Dtype::F32, &values),
        ];
        write_safetensors(&hf, &sources, &BTreeMap::new()).unwrap();
        let gguf = folder.0.join("a.gguf");
        write_small_gguf(&gguf);
        [pth, safe, hf, gguf].map(|p| std::fs::read(p).unwrap())
    })
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 3000, failure_persistence: None, ..Default::default() })]

    /// Whatever is changed in a file, reading it ends in tensors that can be read or in an error, never in a panic.
    #[test]
    fn damaged_files_are_errors_or_readable(
        which in 0usize..4,
        edits in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), proptest::prelude::any::<u8>()), 0..12),
        cut in proptest::option::of(proptest::prelude::any::<proptest::sample::Index>()),
        insert in proptest::option::of((proptest::prelude::any::<proptest::sample::Index>(), proptest::collection::vec(proptest::prelude::any::<u8>(), 1..40))),
    ) {
        let mut bytes = small_files()[which].clone();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some((at, more)) = insert {
            let at = at.index(bytes.len());
            bytes.splice(at..at, more);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let path = std::env::temp_dir().join(format!("anser-fuzz-{}-{which}", std::process::id()));
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(c) = Checkpoint::open(&path) {
            for name in c.names() {
                let t = c.get(name).unwrap();
                // Nothing larger than the file can come out of it; a byte holds two values at most.
                proptest::prop_assert!(t.elements() <= 2 * bytes.len());
                let _ = t.to_f32_vec();
                let _ = t.to_u32_vec();
            }
        }
        let _ = std::fs::remove_file(&path);
    }
}

/// Codes of 8 or 4 bits that differ everywhere, whatever the values, and scales.
fn some_codes(dtype: Dtype, values: usize) -> coded::Codes {
    let byte =
        |i: usize| if dtype == Dtype::I8 { ((i * 37 % 255) as i32 - 127) as i8 as u8 } else { (i * 89 % 256) as u8 };
    let (bytes, scales) = match dtype {
        Dtype::I8 => (values, 2 * values.div_ceil(100)),
        _ => (values / dtype.block() * dtype.size(), values / 32),
    };
    ((0..bytes).map(byte).collect(), (0..scales).map(|i| half::f16::from_f32(0.25 * (i as f32 - 1.5))).collect())
}

#[test]
fn coded_matrices_are_one_tensor_with_values() {
    let folder = std::env::temp_dir().join(format!("anser-coded-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let [plain, small, again] = ["a", "b", "c"].map(|n| folder.join(format!("{n}.safetensors")));
    // With 8 bits groups of 64 and a shorter one.
    for (dtype, inputs, key, group) in
        [(Dtype::I8, 100, "anser.int8", 64), (Dtype::Q4, 96, "anser.q4", 32), (Dtype::Q5, 96, "anser.q5", 32)]
    {
        let values = vec![1.0; 3 * inputs];
        let source = Source::new("head.weight", &[3, inputs], Dtype::F32, &values);
        write_safetensors(&plain, &[source], &BTreeMap::new()).unwrap();
        let ckpt = Checkpoint::open(&plain).unwrap();
        let sources = |t, dtype| coded::sources(t, dtype, move |v| some_codes(dtype, v.len())).unwrap();
        let metadata: BTreeMap<_, _> = coded::metadata(&[dtype]).collect();
        assert_eq!(metadata, BTreeMap::from([(key.to_string(), group.to_string())]));
        write_safetensors(&small, &sources(ckpt.get("head.weight").unwrap(), dtype), &metadata).unwrap();
        let ckpt = Checkpoint::open(&small).unwrap();
        assert_eq!(ckpt.names().collect::<Vec<_>>(), ["head.weight"]);
        let view = ckpt.get("head.weight").unwrap();
        assert_eq!((view.dtype(), view.shape()), (dtype, &[3, inputs][..]));
        let (codes, scales) = some_codes(dtype, 3 * inputs);
        let want = |i: usize| {
            let half = |codes: &[u8], i: usize| usize::from(codes[i / 2] >> (i % 2 * 4) & 15);
            let code = match dtype {
                Dtype::I8 => codes[i] as i8,
                Dtype::Q4 => coded::VALUES[half(&codes, i)],
                _ => {
                    let of = &codes[i / 32 * 20..][..20];
                    let high = u32::from_le_bytes(*of.last_chunk().unwrap()) >> (i % 32) & 1;
                    half(of, i % 32) as i8 + 16 * high as i8 - 16
                }
            };
            f32::from(code) * scales[i / inputs * inputs.div_ceil(group) + i % inputs / group].to_f32()
        };
        let back = view.to_f32_vec().unwrap();
        assert!(back.iter().enumerate().all(|(i, b)| *b == want(i)));
        let mut part = [0.0; 71];
        view.read_f32_from(151, &mut part).unwrap();
        assert_eq!(part, back[151..222]);
        let (row, of) = view.coded().unwrap().row(2);
        assert!(codes.ends_with(row) && row.len() == codes.len() / 3 && of.len() == scales.len() / 3);
        // What is coded so already is copied.
        write_safetensors(&again, &sources(view, dtype), &metadata).unwrap();
        assert_eq!(std::fs::read(&small).unwrap(), std::fs::read(&again).unwrap());
        // Without the word in the metadata it is a matrix of whole numbers, and no weight.
        write_safetensors(&again, &sources(view, dtype), &BTreeMap::new()).unwrap();
        let e = Checkpoint::open(&again).unwrap().get("head.weight").unwrap().to_f32_vec().unwrap_err().to_string();
        assert!(e.contains("head.weight") && e.contains("floating-point"), "{e}");
        let other = BTreeMap::from([(key.to_string(), "16".to_string())]);
        write_safetensors(&again, &sources(view, dtype), &other).unwrap();
        let e = Checkpoint::open(&again).err().unwrap().to_string();
        assert!(e.contains("groups of 16"), "{e}");
        write_safetensors(&again, &sources(view, dtype)[..1], &metadata).unwrap();
        let e = Checkpoint::open(&again).err().unwrap().to_string();
        assert!(e.contains("head.weight.scale is missing"), "{e}");
        assert!(
            coded::sources(
                TensorView { entry: &Entry { shape: vec![3 * inputs], ..view.entry.clone() }, ..view },
                dtype,
                |_| unreachable!()
            )
            .is_err()
        );
    }
    // 40 inputs would end within a group.
    let metadata: BTreeMap<_, _> = coded::metadata(&[Dtype::Q4]).collect();
    let ones = [1.0; 60];
    let wrong = [
        Source::new("a.weight", &[3, 20], Dtype::U8, &ones),
        Source::new("a.weight.scale", &[3, 2], Dtype::F16, &ones[..6]),
    ];
    write_safetensors(&again, &wrong, &metadata).unwrap();
    assert!(Checkpoint::open(&again).err().unwrap().to_string().contains("multiple of 32"));
    std::fs::remove_dir_all(folder).unwrap();
}

/// Metadata of every kind that is written and tensors of all that a GGUF file changes.
fn write_small_gguf(path: &std::path::Path) {
    let values: Vec<f32> = (0..192).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.02).collect();
    let sources = [
        Source::new("token_embd.weight", &[2, 32], Dtype::Q8_0, &values[..64]),
        Source::new("blk.0.time_mix_lerp_fused.weight", &[6, 1, 1, 32], Dtype::F32, &values),
        Source::new("blk.0.time_mix_w1.weight", &[3, 32], Dtype::Q8_0, &values[..96]),
        Source::new("blk.0.time_mix_r_k.weight", &[32], Dtype::F16, &values[..32]),
        Source::new("blk.0.time_mix_v1.weight", &[3, 1], Dtype::BF16, &values[..3]),
    ];
    let text = |key: &str, v: &str| (key.to_string(), gguf::Value::Text(v.into()));
    let metadata = [
        text("general.architecture", "rwkv7"),
        text("anser.tokenizer", "bytes"),
        ("rwkv7.wkv.head_size".into(), gguf::Value::U32(16)),
        ("rwkv7.attention.layer_norm_epsilon".into(), gguf::Value::F32(1e-5)),
        ("tokens".into(), gguf::Value::Texts(vec!["a".into(), "bc".into()])),
        ("types".into(), gguf::Value::I32s(vec![1, -2, 3])),
    ];
    gguf::write_gguf(path, &sources, &metadata).unwrap();
}

#[test]
fn gguf_shows_the_official_tensors() {
    let folder = Folder::new("gguf");
    let path = folder.0.join("a.gguf");
    write_small_gguf(&path);
    let ckpt = Checkpoint::open(&path).unwrap();
    assert_eq!((ckpt.format(), ckpt.naming()), (Format::Gguf, Naming::LlamaCpp));
    let said = |key: &str| ckpt.metadata()[key].as_str();
    assert_eq!((said("anser.tokenizer"), said("rwkv7.wkv.head_size")), ("bytes", "16"));
    assert_eq!((said("tokens"), said("types")), ("[2 values]", "[3 values]"));
    let seen = all(&ckpt);
    let shifts = ["a", "g", "k", "r", "v", "w"].map(|m| format!("blocks.0.att.x_{m}"));
    let others = ["blocks.0.att.r_k", "blocks.0.att.w1", "emb.weight"].map(String::from);
    let mut names = [&others[..1], &others[1..2], &shifts[..], &others[2..]].concat();
    names.sort();
    // The first layer's value residual is a placeholder.
    assert_eq!(seen.keys().cloned().collect::<Vec<_>>(), names);
    assert_eq!((&seen["blocks.0.att.r_k"].0[..], &seen["blocks.0.att.w1"].0[..]), (&[2, 16][..], &[32, 3][..]));
    let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) * 0.02;
    for (row, m) in ["r", "w", "k", "v", "a", "g"].iter().enumerate() {
        let expected: Vec<f32> = (0..32).map(|i| value(32 * row + i)).collect();
        assert_eq!(seen[&format!("blocks.0.att.x_{m}")].1, expected);
    }
    // Transposed blocks: element (i, j) was (j, i).
    let (emb, w1) = (&seen["emb.weight"].1, &seen["blocks.0.att.w1"].1);
    for i in 0..32 {
        for j in 0..3 {
            let v = w1[3 * i + j];
            assert!((v - value(32 * j + i)).abs() <= 0.5 / 127.0 && (j == 2 || v == emb[32 * j + i]));
        }
    }
    let view = ckpt.get("blocks.0.att.w1").unwrap();
    let mut part = [0.0; 17];
    view.read_f32_from(41, &mut part).unwrap();
    assert!(view.bytes().is_none() && part == w1[41..58]);
}

/// `fixtures/llama.cpp` holds random blocks of every type and the values that llama.cpp and gguf-py give them.
#[test]
fn blocks_have_the_values_that_llama_cpp_gives_them() {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/llama.cpp"));
    let blocks = Checkpoint::open(&folder.join("blocks.gguf")).unwrap();
    let expected = Checkpoint::open(&folder.join("blocks.safetensors")).unwrap();
    assert_eq!(blocks.metadata()["a.list"], "[2 values]");
    let kinds = ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"];
    assert_eq!(blocks.names().collect::<Vec<_>>(), kinds);
    for kind in kinds {
        let t = blocks.get(kind).unwrap();
        let values = expected.get(kind).unwrap().to_f32_vec().unwrap();
        assert_eq!((t.dtype().name(), t.shape()), (kind, expected.shape(kind).unwrap()));
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&t.to_f32_vec().unwrap()), bits(&values), "{kind}");
        // Reading may start and end anywhere.
        for start in 0..values.len() {
            for len in [1, 2, 31, 33, 70] {
                let mut part = vec![0.0; len.min(values.len() - start)];
                t.read_f32_from(start, &mut part).unwrap();
                assert_eq!(bits(&part), bits(&values[start..start + part.len()]), "{kind} from {start}");
            }
        }
    }
    let plain = expected.get("rounded").unwrap().to_f32_vec().unwrap();
    let mut out = Vec::new();
    blocks::write_q8_0(&plain, &mut out);
    assert_eq!(out, expected.get("rounded.Q8_0").unwrap().bytes().unwrap());
}

#[test]
fn a_model_comes_back_from_llama_cpp_layout_to_the_bit() {
    let folder = Folder::new("llama");
    let golden = Checkpoint::open(&fixture("rwkv7.pth")).unwrap();
    let official = all(&golden);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::Q8_0] {
        let (path, again) = (folder.0.join("a.gguf"), folder.0.join("b.gguf"));
        let (sources, mut metadata) = llama::from_official(&golden, Some(dtype)).unwrap();
        metadata.extend(llama::tokenizer([], 0, None));
        gguf::write_gguf(&path, &sources, &metadata).unwrap();
        let ckpt = Checkpoint::open(&path).unwrap();
        let seen = all(&ckpt);
        assert!(seen.keys().eq(official.keys().filter(|n| !n.starts_with("blocks.0.att.v") || n.contains("value"))));
        let mut kinds = std::collections::BTreeSet::new();
        for (name, (shape, values)) in &seen {
            let stored = ckpt.get(name).unwrap().dtype();
            kinds.insert(stored.name());
            let squeezed = |s: &[usize]| s.iter().copied().filter(|&d| d != 1).collect::<Vec<_>>();
            assert_eq!(squeezed(shape), squeezed(&official[name].0), "{name}");
            for (v, was) in values.iter().zip(&official[name].1) {
                match stored {
                    Dtype::F16 => assert_eq!(*v, half::f16::from_f32(*was).to_f32(), "{name}"),
                    Dtype::BF16 => assert_eq!(*v, half::bf16::from_f32(*was).to_f32(), "{name}"),
                    Dtype::F32 => assert_eq!(v, was, "{name}"),
                    _ => {}
                }
            }
        }
        let expected: &[&str] = match dtype {
            Dtype::F32 => &["F32"],
            Dtype::F16 => &["F16", "F32"],
            Dtype::BF16 => &["BF16", "F32"],
            _ => &["F16", "F32", "Q8_0"],
        };
        assert!(kinds.iter().eq(expected), "{kinds:?}");
        // What was written once is written the same again, in its own types.
        let (sources, mut metadata) = llama::from_official(&ckpt, None).unwrap();
        metadata.extend(llama::tokenizer([], 0, None));
        gguf::write_gguf(&again, &sources, &metadata).unwrap();
        assert!(std::fs::read(&path).unwrap() == std::fs::read(&again).unwrap(), "{dtype}");
    }
    let small = folder.0.join("small.safetensors");
    let values = [0.0; 4];
    write_safetensors(&small, &[Source::new("emb.weight", &[2, 2], Dtype::F32, &values)], &BTreeMap::new()).unwrap();
    let small = Checkpoint::open(&small).unwrap();
    let e = llama::from_official(&small, None).err().unwrap().to_string();
    assert!(e.contains("blocks.0.ln0.weight: it is missing"), "{e}");
}

#[test]
fn damaged_gguf_files_are_errors() {
    let folder = Folder::new("gguf-damage");
    let bad = folder.0.join("bad.gguf");
    let whole = &small_files()[3];
    let open = |bytes: &[u8]| {
        std::fs::write(&bad, bytes).unwrap();
        Checkpoint::open(&bad)
    };
    let error = |bytes: &[u8]| open(bytes).err().map(|e| e.to_string()).unwrap_or_default();
    // The last tensor has 6 bytes, after which the file is filled up.
    for cut in 0..whole.len() - 26 {
        let e = error(&whole[..cut]);
        assert!(e.contains("bad.gguf: "), "cut at {cut}: {e}");
    }
    for i in 0..whole.len() * 8 {
        let mut file = whole.clone();
        file[i / 8] ^= 1 << (i % 8);
        if let Ok(ckpt) = open(&file) {
            ckpt.names().for_each(|n| drop(ckpt.get(n).unwrap().to_f32_vec()));
        }
    }
    // Counts and sizes beyond all bounds, at every place where there is one or not.
    for at in 4..whole.len() - 8 {
        for n in [u64::MAX, 1 << 63, 1 << 40, u64::from(u32::MAX)] {
            let mut file = whole.clone();
            file[at..at + 8].copy_from_slice(&n.to_le_bytes());
            if let Ok(ckpt) = open(&file) {
                assert!(ckpt.names().all(|n| ckpt.get(n).unwrap().elements() <= 2 * file.len()));
            }
        }
    }
    let replaced = |from: &[u8], to: &[u8]| {
        let at = whole.windows(from.len()).position(|w| w == from).unwrap();
        [&whole[..at], to, &whole[at + from.len()..]].concat()
    };
    let e = error(&replaced(b"rwkv7", b"llama"));
    assert!(e.contains("architecture llama; GGUF files of rwkv7 load"), "{e}");
    let e = error(&replaced(b"general.architecture", b"general.a_chitecture"));
    assert!(e.contains("does not say general.architecture"), "{e}");
    let e = error(&replaced(&1e-5f32.to_le_bytes(), &1e-6f32.to_le_bytes()));
    assert!(e.contains("epsilon 0.000001; RWKV-7 has 0.00001"), "{e}");
    let e = error(&replaced(&[3, 0, 0, 0], &[1, 0, 0, 0]));
    assert!(e.contains("GGUF version 1; versions 2 and 3 load"), "{e}");
    let e = error(&replaced(&[3, 0, 0, 0], &[0, 0, 0, 3]));
    assert!(e.contains("big-endian"), "{e}");
    // A type that is not read: the embedding's, after its two dimensions.
    let head = |kind: u32| [&32u64.to_le_bytes()[..], &2u64.to_le_bytes(), &kind.to_le_bytes()].concat();
    for (kind, name) in [(16, "IQ2_XXS"), (20, "IQ4_NL"), (10, "Q2_K"), (99, "unknown type 99")] {
        let e = error(&replaced(&head(8), &head(kind)));
        assert!(e.contains("tensor token_embd.weight") && e.contains(name), "{e}");
    }
    let e = error(&replaced(&head(8), &head(12)));
    assert!(e.contains("[2, 32] are no multiple of the 256 values"), "{e}");
    let values = [0.0; 30];
    let odd = gguf::write_gguf(&bad, &[Source::new("x", &[30], Dtype::Q8_0, &values)], &[]);
    assert!(odd.unwrap_err().to_string().contains("tensor x: rows of [30] are no multiple of the 32 values"));
    let no = write_safetensors(&bad, &[Source::new("x", &[32], Dtype::Q8_0, &values)], &BTreeMap::new());
    assert!(no.unwrap_err().to_string().contains("tensor x: a safetensors file cannot hold Q8_0"));
}

#[test]
fn web_rwkv_files_show_the_official_tensors() {
    let folder = Folder::new("st");
    let path = folder.0.join("a.st");
    let official = all(&Checkpoint::open(&fixture("rwkv7.pth")).unwrap());
    let turned: Vec<(&String, Vec<usize>, Vec<f32>)> = official
        .iter()
        .map(|(name, (shape, v))| match name.split_once(".att.").map(|(_, part)| part) {
            Some(part) if web_rwkv::is_low_rank(part) => {
                let (rows, cols) = (shape[0], shape[1]);
                (name, vec![cols, rows], (0..rows * cols).map(|i| v[i % rows * cols + i / rows]).collect())
            }
            _ => (name, shape.clone(), v.clone()),
        })
        .collect();
    let sources: Vec<Source<'_>> =
        turned.iter().map(|(n, shape, v)| Source::new(n.as_str(), shape, Dtype::F16, v)).collect();
    write_safetensors(&path, &sources, &BTreeMap::new()).unwrap();
    let ckpt = Checkpoint::open(&path).unwrap();
    assert_eq!((ckpt.format(), ckpt.naming()), (Format::Safetensors, Naming::WebRwkv));
    let seen = all(&ckpt);
    assert_eq!(seen.len(), official.len());
    for (name, (shape, values)) in &official {
        let rounded: Vec<f32> = values.iter().map(|v| half::f16::from_f32(*v).to_f32()).collect();
        assert!(seen[name] == (shape.clone(), rounded), "{name}");
    }
}

#[test]
fn tokens_are_written_as_python_does() {
    let tokens: [&[u8]; 6] = [b"", b"\\\n'", b"'\"", "\u{e9}".as_bytes(), b"\x00\xff ~", b"a"];
    let metadata = llama::tokenizer(tokens, 8, Some(5));
    let expected = ["<s>", "\\\\\\n'", "\\'\"", "\\xc3\\xa9", "\\x00\\xff ~", "a", "[PAD6]", "[PAD7]"];
    assert_eq!(metadata[1].1, gguf::Value::Texts(expected.map(String::from).to_vec()));
    assert_eq!(metadata[2].1, gguf::Value::I32s(vec![3, 1, 1, 1, 1, 1, 5, 5]));
}
