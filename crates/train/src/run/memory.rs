//! Whether a run fits into memory, and what to change where it doesn't.

use super::Event;
use crate::{Bptt, Error, Recompute, RecomputeMode, RunConfig, Settings, Trainer};
use std::iter::successors;

/// The bytes that a run takes, after choosing what is computed again if that is left to us.
///
/// # Errors
/// When there is less memory.
pub(super) fn fit(trainer: &mut Trainer, config: &RunConfig, on: &mut dyn FnMut(Event)) -> Result<usize, Error> {
    let (micro, room, auto) = (config.train.micro(), trainer.room(), config.train.recompute == RecomputeMode::Auto);
    let needed = if auto { trainer.recompute_to_fit(micro, room)? } else { trainer.forecast(micro)? };
    if let Some(room) = room.filter(|&room| needed as u64 > room) {
        let advice = what_fits(trainer, micro, room)?;
        return Err(Error::Memory { needed: needed as u64 >> 20, available: room >> 20, advice });
    }
    let recompute = trainer.settings().recompute;
    if auto && recompute != Recompute::Nothing {
        let what = format!("{recompute:?}").to_lowercase();
        on(Event::Warning(format!("to fit into memory, a step runs with train.recompute = \"{what}\"")));
    }
    Ok(needed)
}

/// Names the settings with which micro-batches fit into `room` bytes, when those of `micro` rows don't.
fn what_fits(trainer: &Trainer, micro: usize, room: u64) -> Result<String, Error> {
    let given = *trainer.settings();
    let fits = |rows: usize, settings: Settings| -> Result<bool, Error> {
        Ok(trainer.forecast_with(rows, settings)? as u64 <= room)
    };
    let less = || successors(Some(micro / 2), |n| Some(n / 2)).take_while(|&n| n > 0);
    let most = |settings: Settings| -> Result<Option<usize>, Error> {
        for rows in less() {
            if fits(rows, settings)? {
                return Ok(Some(rows));
            }
        }
        Ok(None)
    };
    let mut ways = Vec::new();
    if !given.checkpointing && fits(micro, Settings { recompute: Recompute::All, ..given })? {
        ways.push("train.recompute = \"all\"".to_string());
    }
    let checkpointing = Settings { checkpointing: true, ..given };
    if !given.checkpointing && fits(micro, checkpointing)? {
        ways.push("train.checkpointing = true".into());
    }
    if let Some(rows) = most(given)? {
        ways.push(format!("train.micro_rows = {rows}"));
    }
    if ways.is_empty()
        && let Some(rows) = most(checkpointing)?
    {
        ways.push(format!("train.checkpointing = true and train.micro_rows = {rows}"));
    }
    // At last, a piece of a row at a time.
    let mut piece = given.ctx / 2;
    while ways.is_empty() && piece >= 16 {
        if fits(1, Settings { bptt: Bptt::Exact(piece), ..checkpointing })? {
            ways.push(format!("train.checkpointing = true, train.micro_rows = 1 and train.bptt = {piece}"));
        }
        piece /= 2;
    }
    Ok(if ways.is_empty() { "train a smaller model".into() } else { format!("set {}", ways.join(", or ")) })
}
