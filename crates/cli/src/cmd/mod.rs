//! One file per subcommand.

mod answer;
pub mod bench;
pub mod chat;
pub mod convert;
pub mod data;
pub mod debug;
pub mod eval;
pub mod expand;
pub mod generate;
pub mod inspect;
pub mod quickstart;
pub mod serve;
pub mod tokenize;
pub mod train;
