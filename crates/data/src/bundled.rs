//! The corpus inside the program: State of the Union addresses and Moby-Dick (see `corpus/README.md` for source and licence).

use std::io::Read;

/// The text, 12 MB; unpacked at each call.
pub fn corpus() -> String {
    let packed = include_bytes!("../corpus/sotu-moby.txt.xz");
    let mut text = String::new();
    if let Err(e) = lzma_rust2::XzReader::new(&packed[..], false).read_to_string(&mut text) {
        // The file is part of the program; a test reads it.
        unreachable!("bundled corpus: {e}");
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn is_whole() {
        let text = super::corpus();
        assert_eq!(text.len(), 11_966_622);
        assert!(text.starts_with("Fellow-Citizens of the Senate") && text.contains("Ishmael"));
    }
}
