use crate::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file that appears under its name only when it is complete: written beside it, synced, renamed. Dropped without
/// [`AtomicFile::commit`] it leaves nothing.
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Starts writing what will be `path`.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub fn create(path: &Path) -> Result<AtomicFile, Error> {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(name);
        let file = File::create(&temporary).map_err(|e| Error::io(&temporary, "create", e))?;
        Ok(AtomicFile { path: path.into(), temporary, file: Some(BufWriter::new(file)) })
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// When anything fails; an older file of that name is then untouched.
    pub fn commit(mut self) -> Result<(), Error> {
        let Some(writer) = self.file.take() else { return Ok(()) };
        let file = writer.into_inner().map_err(|e| Error::io(&self.path, "write", e.into_error()))?;
        file.sync_all().map_err(|e| Error::io(&self.path, "sync", e))?;
        drop(file);
        fs::rename(&self.temporary, &self.path).map_err(|e| Error::io(&self.path, "rename into place", e))?;
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // The rename itself must reach the disk; not every file system lets a folder be opened.
        if let Ok(folder) = File::open(folder) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match &mut self.file {
            Some(file) => file.write(bytes),
            None => Ok(0),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        // Renamed already, or to be thrown away.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Writes `path` atomically with `write`.
///
/// # Errors
/// When writing fails (a full disk, for instance): nothing of the new file stays, the old one is untouched.
pub fn write_atomic(path: &Path, write: impl FnOnce(&mut AtomicFile) -> std::io::Result<()>) -> Result<(), Error> {
    let mut file = AtomicFile::create(path)?;
    write(&mut file).map_err(|e| Error::io(path, "write", e))?;
    file.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("anser-atomic-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("x");
        write_atomic(&path, |f| f.write_all(b"old")).unwrap();
        let full = |f: &mut AtomicFile| {
            f.write_all(b"half")?;
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull))
        };
        let e = write_atomic(&path, full).unwrap_err().to_string();
        assert!(e.contains("x: write"), "{e}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(&folder).unwrap();
    }
}
