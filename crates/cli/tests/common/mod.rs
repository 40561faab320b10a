//! What the tests of the command line share.

use assert_cmd::Command;
use std::path::{Path, PathBuf};

/// A file of the golden vectors.
pub fn fixture(name: &str) -> String {
    format!("{}/../../fixtures/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A temporary folder.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("anser-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn file(&self, name: &str, contents: &[u8]) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, contents).unwrap();
        path.display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs `anser` in `folder`: exit code, stdout, stderr.
pub fn anser(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let out = Command::cargo_bin("anser").unwrap().current_dir(folder).args(args).output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}
