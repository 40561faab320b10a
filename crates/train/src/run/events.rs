//! TensorBoard's event files: TFRecords of `Event` messages with scalar summaries.
//!
//! A record is u64 length, u32 masked CRC-32C of it, the bytes, u32 masked CRC-32C of them. `Event` has wall_time (1, double),
//! step (2, varint), file_version (3, string) or summary (5); a summary has values (1) of tag (1) and simple_value (2, float).

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// A file of scalars that TensorBoard shows.
pub(crate) struct Events(File);

impl Events {
    /// Begins a new file in `folder`; with `afresh` those of runs before go.
    pub(crate) fn create(folder: &Path, afresh: bool) -> io::Result<Events> {
        for entry in std::fs::read_dir(folder)?.flatten().filter(|_| afresh) {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("events.out.tfevents.") && name.contains(".anser.") {
                std::fs::remove_file(entry.path())?;
            }
        }
        let name = format!("events.out.tfevents.{:010}.anser.{}", now() as u64, std::process::id());
        let mut events = Events(File::create(folder.join(name))?);
        let mut event = double(1, now());
        event.extend(bytes(3, b"brain.Event:2"));
        events.0.write_all(&record(&event))?;
        Ok(events)
    }

    /// Adds values at a step.
    pub(crate) fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut v = bytes(1, tag.as_bytes());
            v.push(2 << 3 | 5);
            v.extend((*value as f32).to_le_bytes());
            summary.extend(bytes(1, &v));
        }
        let mut event = double(1, now());
        event.push(2 << 3);
        event.extend(varint(step));
        event.extend(bytes(5, &summary));
        self.0.write_all(&record(&event))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn varint(mut v: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while v >= 128 {
        out.push(v as u8 | 128);
        v >>= 7;
    }
    out.push(v as u8);
    out
}

fn double(field: u8, v: f64) -> Vec<u8> {
    [&[field << 3 | 1][..], &v.to_le_bytes()].concat()
}

fn bytes(field: u8, b: &[u8]) -> Vec<u8> {
    [&[field << 3 | 2][..], &varint(b.len() as u64), b].concat()
}

fn record(data: &[u8]) -> Vec<u8> {
    let masked = |b: &[u8]| crc32c::crc32c(b).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let len = (data.len() as u64).to_le_bytes();
    [&len[..], &masked(&len), data, &masked(data)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_tensorboards() {
        // What the RecordWriter of Python's tensorboard package writes for these contents; it also reads whole files of ours.
        assert_eq!(record(b"abc"), fixture("0300000000000000b099490e6162636e57f121"));
        assert_eq!(bytes(1, b"loss"), b"\x0a\x04loss");
        assert_eq!(varint(300), [0xac, 2]);
    }

    fn fixture(hex: &str) -> Vec<u8> {
        hex.as_bytes().chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
    }
}
