//! Anser as a library: load a RWKV-7 model, run it, train it.
//!
//! ```
//! use anser::{Config, Context, Init, Model, Sampler, Sampling, Session, Tokenizer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let ctx = Context::cpu(0);
//! let tokenizer = Tokenizer::bytes();
//! // A new model; `Model::load` reads one from a `Checkpoint`.
//! let model = Model::init(&ctx, &Config::new(2, 64, tokenizer.vocab_size()), Init::Current, 1)?;
//! let mut session = Session::new(&ctx, &model);
//! session.feed(&tokenizer.encode(b"Hello"))?;
//! let mut sampler = Sampler::new(Sampling::default())?;
//! let token = sampler.sample(session.logits()?)?;
//! session.feed(&[token])?;
//! # Ok(())
//! # }
//! ```

pub use anser_data as data;
pub use anser_formats::Checkpoint;
pub use anser_infer::{Sampler, SamplerOrder, Sampling, Session, TextStream, chat, engine};
pub use anser_model::{Config, Init, Load, Model, State};
pub use anser_ops as ops;
pub use anser_tensor::{Context, DType, Device};
pub use anser_tokenizer::{StreamDecoder, Tokenizer};
pub use anser_train::{RunConfig, Settings, Trainer, run};

#[cfg(test)]
mod tests {
    #[test]
    fn handles_can_move_to_other_threads() {
        fn is_send<T: Send>() {}
        is_send::<crate::Checkpoint>();
        is_send::<crate::Context>();
        is_send::<crate::Model>();
        is_send::<crate::State>();
        is_send::<crate::Session<'_>>();
        is_send::<crate::Sampler>();
        is_send::<crate::engine::Engine>();
        is_send::<crate::engine::Stream>();
        is_send::<crate::Trainer>();
    }
}
