//! The `anser` command.
fn main() {}
