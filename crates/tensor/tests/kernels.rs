//! The embedded fatbins are those of the sources beside them: otherwise run `tools/build-kernels`.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn fatbins_are_of_their_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let mut files = Vec::new();
    walk(&root.join("crates"), &mut files);
    let headers = root.join("crates/tensor/src/cuda");
    let kernels: Vec<&PathBuf> = files.iter().filter(|p| p.ends_with("kernel.cu")).collect();
    assert!(kernels.len() >= 10, "only {} kernels found", kernels.len());
    let mut settings = Vec::new();
    for source in kernels {
        let mut inputs = vec![source.clone()];
        let mut next = 0;
        while let Some(path) = inputs.get(next).cloned() {
            for line in fs::read_to_string(&path).unwrap().lines() {
                let Some(name) = line.strip_prefix("#include \"").and_then(|l| l.strip_suffix('"')) else { continue };
                let found = [path.parent().unwrap(), &headers].map(|d| d.join(name)).into_iter().find(|p| p.exists());
                let found = found.unwrap_or_else(|| panic!("{}: no {name}", path.display()));
                if !inputs.contains(&found) {
                    inputs.push(found);
                }
            }
            next += 1;
        }
        let name = |p: PathBuf| (p.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/"), p);
        let inputs: BTreeMap<String, PathBuf> = inputs.into_iter().map(name).collect();
        let mut hash = Sha256::new();
        for (name, path) in inputs {
            hash.update(name + "\0");
            hash.update(fs::read(path).unwrap());
            hash.update("\0");
        }
        let want: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let noted = fs::read_to_string(source.with_extension("hash")).unwrap();
        let (found, flags) = noted.trim().split_once('\n').unwrap();
        assert_eq!(found, want, "{} changed without its fatbin: run tools/build-kernels", source.display());
        settings.push(flags.to_string());
        assert!(fs::metadata(source.with_extension("fatbin")).unwrap().len() > 1000);
    }
    assert!(settings.iter().all(|s| *s == settings[0]), "fatbins of different compilers or flags");
}
