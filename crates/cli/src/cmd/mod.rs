//! One file per subcommand.

pub mod bench;
pub mod convert;
pub mod debug;
pub mod generate;
pub mod inspect;
pub mod quickstart;
pub mod tokenize;
