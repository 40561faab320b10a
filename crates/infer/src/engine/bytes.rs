//! Numbers and floats in little-endian bytes with a checksum (CRC-32) behind them.

pub(super) fn put_number(out: &mut Vec<u8>, n: usize) {
    out.extend((n as u64).to_le_bytes());
}

pub(super) fn put_floats(out: &mut Vec<u8>, values: &[f32]) {
    let at = out.len();
    out.resize(at + values.len() * 4, 0);
    out[at..].as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, v)| *to = v.to_le_bytes());
}

/// Puts the checksum at the end.
pub(super) fn seal(out: &mut Vec<u8>) {
    out.extend(crc32fast::hash(out).to_le_bytes());
}

/// Reads what was put; nothing comes where there is not enough.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Of the beginning of something, whose checksum is elsewhere.
    #[cfg(any(feature = "redis", feature = "object-store", test))]
    pub fn open(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    /// Of bytes whose checksum is right.
    pub fn sealed(bytes: &'a [u8]) -> Option<Reader<'a>> {
        let (rest, sum) = bytes.split_last_chunk()?;
        (crc32fast::hash(rest) == u32::from_le_bytes(*sum)).then_some(Reader(rest))
    }

    pub fn number(&mut self) -> Option<usize> {
        let n;
        (n, self.0) = self.0.split_first_chunk()?;
        usize::try_from(u64::from_le_bytes(*n)).ok()
    }

    pub fn floats(&mut self, count: usize) -> Option<Vec<f32>> {
        Some(self.words(count)?.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    /// Four bytes each.
    pub fn words(&mut self, count: usize) -> Option<&'a [[u8; 4]]> {
        let now;
        (now, self.0) = self.0.split_at_checked(count.checked_mul(4)?)?;
        Some(now.as_chunks().0)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
