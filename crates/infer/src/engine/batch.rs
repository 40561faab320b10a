use crate::{Decoder, Error};
use anser_model::{Model, State};
use anser_ops::choose::{Cuts, Draw};
use anser_ops::{Segment, Tape, Var};
use anser_tensor::Context;
use std::ops::Range;

/// What a step does for one sequence.
pub(super) struct Work<'a> {
    pub slot: usize,
    /// Tokens to read, at least one.
    pub tokens: &'a [u32],
    pub wants: Wants,
}

/// What is wanted after the tokens of a [`Work`].
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Wants {
    /// Logits: of no token, of the last, or of all.
    pub logits: Rows,
    /// The hidden vector of the last token.
    pub hidden: bool,
    /// Instead of the logits of the last token one that they choose, where that is done on a GPU.
    pub token: Option<Option<Cuts>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    None,
    Last,
    All,
}

/// What a [`Work`] gave.
#[derive(Default)]
pub(super) struct Output {
    /// [rows wanted, V].
    pub logits: Vec<f32>,
    pub hidden: Option<Vec<f32>>,
    /// If a GPU has chosen, where the logits then are ([`Batch::logits`]): `None` if one of them is no finite number.
    pub token: Option<Option<u32>>,
}

/// The states of the sequences that run, in slots 0, 1, .. without gaps, and the steps that advance them.
pub(super) struct Batch<'m> {
    ctx: Context,
    model: &'m Model,
    /// An empty state of one slot.
    empty: State,
    states: States<'m>,
}

enum States<'m> {
    /// For [`Model::forward`]: an arena, and where the state of each slot is. What joins and leaves is noted there and the arena made
    /// anew before the next step, so that a step of many changes copies once and other steps copy nothing.
    Rows { arena: Option<State>, slots: Vec<Place> },
    /// On a GPU: slots of a decoder, of which the first ones are in use, each with its place in the last step if it had one.
    Slots { decoder: Box<Decoder<'m>>, used: Vec<Option<usize>> },
}

enum Place {
    Arena(usize),
    Apart(State),
}

impl<'m> Batch<'m> {
    /// A batch of up to `most` sequences, whose states begin as `empty`.
    pub fn new(ctx: &Context, model: &'m Model, most: usize, empty: State) -> Result<Batch<'m>, Error> {
        let states = match Decoder::new(ctx, model, most.min(Decoder::MOST_SLOTS))? {
            Some(decoder) => States::Slots { decoder: Box::new(decoder), used: Vec::new() },
            None => States::Rows { arena: None, slots: Vec::new() },
        };
        ctx.check()?;
        Ok(Batch { ctx: ctx.clone(), model, empty, states })
    }

    /// Adds a sequence behind the others, with a state of one slot.
    pub fn push(&mut self, state: State) -> Result<(), Error> {
        match &mut self.states {
            States::Rows { slots, .. } => slots.push(Place::Apart(state)),
            States::Slots { decoder, used } => {
                decoder.set_state(used.len(), &state)?;
                used.push(None);
            }
        }
        Ok(())
    }

    /// Takes the sequence in `slot` out; the last one takes its place.
    pub fn swap_remove(&mut self, slot: usize) -> Result<(), Error> {
        match &mut self.states {
            States::Rows { slots, .. } => {
                slots.swap_remove(slot);
            }
            States::Slots { decoder, used } => {
                used.swap_remove(slot);
                if slot < used.len() {
                    let last = decoder.state(used.len())?;
                    decoder.set_state(slot, &last)?;
                }
            }
        }
        Ok(())
    }

    /// A copy of the state in `slot`, of one slot.
    pub fn state(&self, slot: usize) -> Result<State, Error> {
        match &self.states {
            States::Rows { arena, slots } => Ok(match (&slots[slot], arena) {
                (Place::Arena(row), Some(arena)) => State::gather(&self.ctx, &[(arena, *row)]),
                (Place::Apart(state), _) => state.clone(),
                (Place::Arena(_), None) => self.empty.clone(),
            }),
            States::Slots { decoder, .. } => decoder.state(slot),
        }
    }

    /// Replaces the state in `slot`.
    pub fn set_state(&mut self, slot: usize, state: State) -> Result<(), Error> {
        match &mut self.states {
            States::Rows { slots, .. } => slots[slot] = Place::Apart(state),
            States::Slots { decoder, .. } => decoder.set_state(slot, &state)?,
        }
        Ok(())
    }

    /// Whether it can choose tokens itself.
    pub fn chooses(&self) -> bool {
        matches!(self.states, States::Slots { .. })
    }

    /// The logits after what the sequence in `slot` read in the last step, if they stayed on the GPU; none otherwise.
    pub fn logits(&mut self, slot: usize) -> Result<Vec<f32>, Error> {
        match &mut self.states {
            States::Slots { decoder, used } => match used[slot] {
                Some(at) => Ok(decoder.logits(at..at + 1)?.to_vec()),
                None => Ok(Vec::new()),
            },
            States::Rows { .. } => Ok(Vec::new()),
        }
    }

    /// Tokens that the sequence in `slot` may read in one step ([`State::room`]).
    pub fn room(&self, slot: usize) -> usize {
        match &self.states {
            States::Rows { arena, slots } => match (&slots[slot], arena) {
                (Place::Arena(row), Some(arena)) => arena.room(*row),
                (Place::Apart(state), _) => state.room(0),
                (Place::Arena(_), None) => usize::MAX,
            },
            States::Slots { .. } => usize::MAX,
        }
    }

    /// Reads tokens of some sequences, each at most once: what they want, in their order.
    pub fn step(&mut self, work: &[Work<'_>]) -> Result<Vec<Output>, Error> {
        let (ctx, model) = (&self.ctx, self.model);
        match &mut self.states {
            States::Rows { arena, slots } => {
                let whole = |a: &State| a.slots() == slots.len();
                let in_place = slots.iter().enumerate().all(|(i, p)| matches!(p, Place::Arena(row) if *row == i));
                let state = match arena.take() {
                    Some(arena) if whole(&arena) && in_place => arena,
                    old => {
                        let at = |p| match (p, &old) {
                            (&Place::Arena(row), Some(old)) => (old, row),
                            (Place::Apart(state), _) => (state, 0),
                            (Place::Arena(_), None) => (&self.empty, 0),
                        };
                        State::gather(ctx, &slots.iter().map(at).collect::<Vec<_>>())
                    }
                };
                slots.iter_mut().enumerate().for_each(|(i, p)| *p = Place::Arena(i));
                // A failure leaves the states as they were.
                let result = forward(ctx, model, &state, work);
                let (outputs, state) = match result {
                    Ok((outputs, next)) => (Ok(outputs), next),
                    Err(e) => (Err(e), state),
                };
                *arena = Some(state);
                outputs
            }
            States::Slots { decoder, used } => {
                let mut outputs: Vec<Output> = work.iter().map(|_| Output::default()).collect();
                let one = |w: &Work<'_>| w.tokens.len() == 1 && w.wants.logits == Rows::Last && !w.wants.hidden;
                let (mut single, others): (Vec<usize>, Vec<usize>) = (0..work.len()).partition(|&i| one(&work[i]));
                // Those whose logits the host needs first.
                single.sort_by_key(|&i| work[i].wants.token.is_some());
                let inputs: Vec<(usize, u32)> = single.iter().map(|&i| (work[i].slot, work[i].tokens[0])).collect();
                decoder.feed(&inputs)?;
                used.fill(None);
                single.iter().enumerate().for_each(|(at, &i)| used[work[i].slot] = Some(at));
                let draw = |(row, &i): (usize, &usize)| work[i].wants.token.map(|from| Draw { row, from });
                let draws: Vec<Draw> = single.iter().enumerate().filter_map(draw).collect();
                let (here, chosen) = single.split_at(single.len() - draws.len());
                if !draws.is_empty() {
                    let tokens = decoder.choose(&draws)?;
                    chosen.iter().zip(tokens).for_each(|(&i, token)| outputs[i].token = Some(token));
                }
                if !here.is_empty() {
                    let logits = decoder.logits(0..here.len())?;
                    let each = logits.chunks_exact(model.config().vocab_size);
                    here.iter().zip(each).for_each(|(&i, logits)| outputs[i].logits = logits.to_vec());
                }
                for i in others {
                    let (state, slot) = (decoder.state(work[i].slot)?, work[i].slot);
                    let (mut output, next) = forward(ctx, model, &state, &[Work { slot: 0, ..work[i] }])?;
                    decoder.set_state(slot, &next)?;
                    outputs[i] = output.pop().unwrap_or_default();
                }
                ctx.check()?;
                Ok(outputs)
            }
        }
    }
}

/// One pass of the model over the tokens of several slots of a state: what each wants, and the state after it.
fn forward(ctx: &Context, model: &Model, state: &State, work: &[Work<'_>]) -> Result<(Vec<Output>, State), Error> {
    let tokens: Vec<u32> = work.iter().flat_map(|w| w.tokens).copied().collect();
    let mut start = 0;
    let segment = |w: &Work<'_>| {
        let s = Segment { start, len: w.tokens.len(), state_in: Some(w.slot), state_out: Some(w.slot) };
        start += s.len;
        s
    };
    let segments: Vec<Segment> = work.iter().map(segment).collect();
    let mut tape = Tape::inference(ctx, model.params());
    let (hidden, next) = model.forward(&mut tape, &tokens, &segments.clone().into(), state, false)?;
    let rows = |(w, s): (&Work<'_>, &Segment)| -> Range<usize> {
        let end = s.start + s.len;
        match w.wants.logits {
            Rows::None => end..end,
            Rows::Last => end - 1..end,
            Rows::All => s.start..end,
        }
    };
    let wanted: Vec<Range<usize>> = work.iter().zip(&segments).map(rows).collect();
    let (count, c) = (wanted.iter().map(ExactSizeIterator::len).sum(), hidden.cols());
    let logits = if count == 0 {
        Vec::new()
    } else {
        let mut buf = ctx.alloc(count * c);
        let mut at = 0;
        for r in &wanted {
            buf.write_part(at * c, hidden.buf(), r.start * c, r.len() * c);
            at += r.len();
        }
        model.logits(&mut tape, &Var::constant(count, c, buf)).to_vec()
    };
    ctx.check()?;
    let mut rest = &logits[..];
    let output = |((w, s), r): ((&Work<'_>, &Segment), Range<usize>)| {
        let mine;
        (mine, rest) = rest.split_at(r.len() * model.config().vocab_size);
        let hidden = w.wants.hidden.then(|| hidden.buf().part((s.start + s.len - 1) * c, c).to_vec());
        Output { logits: mine.to_vec(), hidden, token: None }
    };
    let outputs = work.iter().zip(&segments).zip(wanted).map(output).collect();
    Ok((outputs, next))
}
