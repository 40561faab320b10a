use crate::Error;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The temporary files that this process is writing.
static WRITING: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn writing() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    WRITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what is written half, for a process that is about to end without unwinding.
pub fn abandon_writes() {
    writing().iter().for_each(|path| drop(fs::remove_file(path)));
}

/// A file that appears under its name only when it is complete: written beside it, synced, renamed. Dropped without
/// [`AtomicFile::commit`] it leaves nothing. A link stays one, to what is written now; what is no file, such as a device or a pipe, is written to as it is.
pub struct AtomicFile {
    path: PathBuf,
    temporary: Option<PathBuf>,
    file: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Starts writing what will be `path`.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub fn create(path: &Path) -> Result<AtomicFile, Error> {
        let linked = fs::symlink_metadata(path).is_ok_and(|about| about.is_symlink());
        let path = if linked { fs::canonicalize(path).unwrap_or(path.into()) } else { path.into() };
        let kind = fs::metadata(&path).ok().map(|about| about.file_type());
        let Some(name) = path.file_name().filter(|_| !kind.is_some_and(|k| k.is_dir())) else {
            let e = std::io::Error::from(std::io::ErrorKind::IsADirectory);
            return Err(Error::io(&path, "create", e));
        };
        let failed = |e| Error::io(&path, "create", e);
        if kind.is_some_and(|k| !k.is_file()) {
            let file = File::options().write(true).open(&path).map_err(failed)?;
            return Ok(AtomicFile { temporary: None, file: Some(BufWriter::new(file)), path });
        }
        let mut name = name.to_os_string();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(name);
        let file = File::create(&temporary).map_err(failed)?;
        writing().insert(temporary.clone());
        Ok(AtomicFile { path, temporary: Some(temporary), file: Some(BufWriter::new(file)) })
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// When anything fails; an older file of that name is then untouched.
    pub fn commit(mut self) -> Result<(), Error> {
        let Some(writer) = self.file.take() else { return Ok(()) };
        let file = writer.into_inner().map_err(|e| Error::io(&self.path, "write", e.into_error()))?;
        let Some(temporary) = &self.temporary else { return Ok(()) };
        file.sync_all().map_err(|e| Error::io(&self.path, "sync", e))?;
        drop(file);
        fs::rename(temporary, &self.path).map_err(|e| Error::io(&self.path, "rename into place", e))?;
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
        if let Some(temporary) = &self.temporary {
            // Renamed already, or to be thrown away.
            let _ = fs::remove_file(temporary);
            writing().remove(temporary);
        }
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

/// Sees whether `path` can be written, before the work whose result it is to hold.
///
/// # Errors
/// When it can't.
pub fn writable(path: &Path) -> Result<(), Error> {
    match fs::metadata(path) {
        Ok(about) if !about.is_file() && !about.is_dir() => Ok(()),
        _ => AtomicFile::create(path).map(drop),
    }
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
        let half = AtomicFile::create(&path).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
        abandon_writes();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        drop(half);
        assert!(writable(&path).is_ok() && writable(&folder.join("new")).is_ok());
        assert!(writable(&folder.join("none/x")).is_err());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        assert!(AtomicFile::create(&folder).err().unwrap().to_string().contains("create"));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn links_and_devices_stay_what_they_are() {
        let folder = std::env::temp_dir().join(format!("anser-links-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (file, link, pipe) = (folder.join("x"), folder.join("link"), folder.join("pipe"));
        fs::write(&file, b"old").unwrap();
        std::os::unix::fs::symlink("x", &link).unwrap();
        write_atomic(&link, |f| f.write_all(b"new")).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::read(pipe).unwrap()
        });
        write_atomic(&pipe, |f| f.write_all(b"through")).unwrap();
        assert_eq!(reader.join().unwrap(), b"through");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
        fs::remove_dir_all(&folder).unwrap();
    }
}
