//! The part of zip that `torch.save` uses: stored (uncompressed) members, found through the central directory, ZIP64 included.

/// A stored member: name, byte range and checksum of its contents.
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) start: usize,
    pub(crate) end: usize,
    crc: usize,
}

impl Member {
    /// Whether the contents are those that were written.
    pub(crate) fn is_whole(&self, file: &[u8]) -> bool {
        crc32fast::hash(&file[self.start..self.end]) as usize == self.crc
    }
}

fn u16_at(file: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(*file.get(at..)?.first_chunk()?) as usize)
}

fn u32_at(file: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(*file.get(at..)?.first_chunk()?) as usize)
}

fn u64_at(file: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(*file.get(at..)?.first_chunk()?)).ok()
}

const TRUNCATED: &str = "the zip archive is truncated or damaged: copy or download the file again";

/// The members of an archive.
pub(crate) fn members(file: &[u8]) -> Result<Vec<Member>, String> {
    // The end record is followed by a comment of at most 64 KiB.
    let from = file.len().saturating_sub(22 + 65535);
    let end = (from..file.len().saturating_sub(21)).rev().find(|&i| file[i..].starts_with(b"PK\x05\x06"));
    let end = end.ok_or(TRUNCATED)?;
    read(file, end).ok_or(TRUNCATED)?
}

/// `None`: something lies outside the file.
fn read(file: &[u8], end: usize) -> Option<Result<Vec<Member>, String>> {
    let (mut count, mut at) = (u16_at(file, end + 10)?, u32_at(file, end + 16)?);
    if let Some(locator) = end.checked_sub(20).filter(|&l| file[l..].starts_with(b"PK\x06\x07")) {
        let record = u64_at(file, locator + 8)?;
        if !file.get(record..)?.starts_with(b"PK\x06\x06") {
            return None;
        }
        (count, at) = (u64_at(file, record + 32)?, u64_at(file, record + 48)?);
    }
    // Every member takes 46 bytes or more of the directory: a larger count is damage, not a reason to allocate.
    if count > file.len() / 46 {
        return None;
    }
    let mut members = Vec::with_capacity(count);
    for _ in 0..count {
        if !file.get(at..)?.starts_with(b"PK\x01\x02") {
            return None;
        }
        let (method, crc) = (u16_at(file, at + 10)?, u32_at(file, at + 16)?);
        let (mut packed, mut size, mut local) =
            (u32_at(file, at + 20)?, u32_at(file, at + 24)?, u32_at(file, at + 42)?);
        let (name_len, extra_len, comment_len) =
            (u16_at(file, at + 28)?, u16_at(file, at + 30)?, u16_at(file, at + 32)?);
        let name = String::from_utf8_lossy(file.get(at + 46..at + 46 + name_len)?).into_owned();
        let extra = file.get(at + 46 + name_len..at + 46 + name_len + extra_len)?;
        let mut e = 0;
        while e + 4 <= extra.len() {
            let (id, len) = (u16_at(extra, e)?, u16_at(extra, e + 2)?);
            if id == 1 {
                // ZIP64: 64-bit values for the fields that are all ones, in this order.
                let mut next = e + 4;
                for field in [&mut size, &mut packed, &mut local] {
                    if *field == 0xFFFF_FFFF {
                        *field = u64_at(extra, next)?;
                        next += 8;
                    }
                }
            }
            e += 4 + len;
        }
        if method != 0 || packed != size {
            return Some(Err(format!(
                "member {name} is compressed; load the file in PyTorch and save it with torch.save"
            )));
        }
        if !file.get(local..)?.starts_with(b"PK\x03\x04") {
            return None;
        }
        let start = local.checked_add(30 + u16_at(file, local + 26)? + u16_at(file, local + 28)?)?;
        let stop = start.checked_add(size)?;
        file.get(start..stop)?;
        members.push(Member { name, start, end: stop, crc });
        at += 46 + name_len + extra_len + comment_len;
    }
    Some(Ok(members))
}
