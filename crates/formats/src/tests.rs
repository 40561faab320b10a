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
            let t = c.get(n).unwrap().unwrap();
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
    assert_eq!(half.get("emb.weight").unwrap().unwrap().dtype(), Dtype::BF16);
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
            let bytes = b.get(name).unwrap().unwrap().bytes().unwrap();
            let at = data.windows(bytes.len().min(64)).position(|w| w == &bytes[..bytes.len().min(64)]);
            assert!(at.is_some());
        }
    }
}

/// Every kind of damage is an error or harmless, never a panic.
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
                    let t = c.get(name).unwrap().unwrap();
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
    assert!(matches!(pickle::load(&bomb), Ok(pickle::Value::Tuple(_))));
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
