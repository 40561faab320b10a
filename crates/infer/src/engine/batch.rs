use super::EngineOptions;
use super::guess::Guesses;
use super::snapshot::Snapshot;
use crate::{Decoder, Error};
use anser_model::{Model, State};
use anser_ops::choose::{Cuts, Draw};
use anser_ops::{Segment, Tape, Var};
use anser_tensor::Context;
use std::borrow::Cow;
use std::ops::Range;

/// Tokens of a guess at most, unless something else is asked for: of 4, 8 and 16 these gained most.
const GUESSES: usize = 4;

/// What a step does for one sequence.
pub(super) struct Work<'a> {
    pub slot: usize,
    /// Tokens of the sequence before these, as far as they are known.
    pub before: &'a [u32],
    /// Tokens to read, at least one.
    pub tokens: &'a [u32],
    pub wants: Wants,
    /// Whether the most probable token will follow.
    pub greedy: bool,
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

impl Work<'_> {
    /// Whether it is the one token of a sequence that writes.
    fn is_one(&self) -> bool {
        self.tokens.len() == 1 && self.wants.logits == Rows::Last && !self.wants.hidden
    }
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
    /// See [`Batch::is_apart`].
    apart: bool,
}

enum States<'m> {
    /// For [`Model::forward`]: an arena, and where the state of each slot is. Who joins waits for the next step and takes a free row then; the arena is
    /// made anew only when it is too small, or much too large. A sequence that is alone may have tokens pending, of which its row
    /// knows nothing.
    Rows { arena: Option<State>, slots: Vec<Place>, guesses: Option<Box<Guesses>>, guesses_draws: bool },
    /// On a GPU: slots of a decoder, of which the first ones are in use, each with its place in the last step if it had one, and how many sequences a step may have.
    Slots { decoder: Box<Decoder<'m>>, used: Vec<Option<usize>>, together: usize },
}

enum Place {
    Arena(usize),
    Apart(State),
}

/// Rows of an arena for so many sequences: in steps of an eighth, so that its size, and with it the memory that is used, seldom changes.
fn capacity(sequences: usize) -> usize {
    sequences.next_multiple_of((sequences / 8).max(1).next_power_of_two())
}

/// Brings all states into an arena, and says in which row each slot is.
fn settle(ctx: &Context, empty: &State, arena: Option<State>, slots: &mut [Place]) -> (State, Vec<usize>) {
    let wanted = capacity(slots.len());
    let fits = |rows: usize| slots.len() <= rows && rows <= wanted + wanted / 4;
    let mut arena = match arena {
        Some(arena) if fits(arena.slots()) => arena,
        old => {
            let at = |p| match (p, &old) {
                (&Place::Arena(row), Some(old)) => (old, row),
                (Place::Apart(state), _) => (state, 0),
                (Place::Arena(_), None) => (empty, 0),
            };
            let free = std::iter::repeat_n((empty, 0), wanted - slots.len());
            let arena = State::gather(ctx, &slots.iter().map(at).chain(free).collect::<Vec<_>>());
            slots.iter_mut().enumerate().for_each(|(i, p)| *p = Place::Arena(i));
            arena
        }
    };
    let mut free = vec![true; arena.slots()];
    for p in slots.iter() {
        if let Place::Arena(row) = p {
            free[*row] = false;
        }
    }
    let mut free = (0..arena.slots()).filter(|&row| free[row]);
    let mut rows = Vec::with_capacity(slots.len());
    for p in slots {
        rows.push(match p {
            Place::Arena(row) => *row,
            Place::Apart(state) => {
                let row = free.next().unwrap_or_else(|| unreachable!("there are as many rows as slots"));
                arena.put(row, state, 0);
                *p = Place::Arena(row);
                row
            }
        });
    }
    (arena, rows)
}

impl<'m> Batch<'m> {
    /// A batch of sequences whose states begin as `empty`.
    pub fn new(ctx: &Context, model: &'m Model, options: &EngineOptions, empty: State) -> Result<Batch<'m>, Error> {
        let most = options.guesses.unwrap_or(GUESSES);
        let guesses = (most > 0 && ctx.cuda().is_none()).then(|| Box::new(Guesses::new(most)));
        let apart = options.deterministic && ctx.cuda().is_some();
        let states = match Decoder::new(ctx, model, options.slots.min(Decoder::MOST_SLOTS))? {
            Some(mut decoder) => {
                let together = if apart { decoder.set_apart() } else { decoder.slots() };
                States::Slots { decoder: Box::new(decoder), used: Vec::new(), together }
            }
            None => States::Rows { arena: None, slots: Vec::new(), guesses, guesses_draws: options.guesses.is_some() },
        };
        ctx.check()?;
        Ok(Batch { ctx: ctx.clone(), model, empty, states, apart })
    }

    /// Whether sequences are kept apart on a GPU, so that what comes of one is the same to the bit whatever others do: each is read alone, or by kernels whose
    /// sums are those of one sequence.
    pub fn is_apart(&self) -> bool {
        self.apart
    }

    /// Adds a sequence behind the others, with a state of one slot.
    pub fn push(&mut self, state: State) -> Result<(), Error> {
        self.catch_up()?;
        match &mut self.states {
            States::Rows { slots, guesses, .. } => {
                guesses.iter_mut().for_each(|g| g.forget());
                slots.push(Place::Apart(state));
            }
            States::Slots { decoder, used, .. } => {
                decoder.set_state(used.len(), &state)?;
                used.push(None);
            }
        }
        Ok(())
    }

    /// Takes the sequence in `slot` out; the last one takes its place.
    pub fn swap_remove(&mut self, slot: usize) -> Result<(), Error> {
        match &mut self.states {
            States::Rows { arena, slots, guesses, .. } => {
                guesses.iter_mut().for_each(|g| g.forget());
                if let (Place::Arena(row), Some(arena)) = (slots.swap_remove(slot), arena)
                    && arena.attention.iter().any(|a| a.pasts[row].len() > 0)
                {
                    // What its attention kept is memory.
                    arena.put(row, &self.empty, 0);
                }
            }
            States::Slots { decoder, used, .. } => {
                used.swap_remove(slot);
                if slot < used.len() {
                    let last = decoder.state(used.len())?;
                    decoder.set_state(slot, &last)?;
                }
                // What its attention kept is memory.
                decoder.forget(used.len());
            }
        }
        Ok(())
    }

    /// Brings the state of a sequence that is alone to where it is.
    fn catch_up(&mut self) -> Result<(), Error> {
        match &mut self.states {
            States::Rows { arena: Some(arena), guesses: Some(guesses), .. } => {
                guesses.settle(&self.ctx, self.model, arena)
            }
            _ => Ok(()),
        }
    }

    /// A copy of the state in `slot`, of one slot.
    fn state(&self, slot: usize) -> Result<State, Error> {
        match &self.states {
            States::Rows { arena, slots, .. } => Ok(match (&slots[slot], arena) {
                (Place::Arena(row), Some(arena)) => State::gather(&self.ctx, &[(arena, *row)]),
                (Place::Apart(state), _) => state.clone(),
                (Place::Arena(_), None) => self.empty.clone(),
            }),
            States::Slots { decoder, .. } => decoder.state(slot),
        }
    }

    /// What there is to keep of `slot`: its state, and the logits after it.
    pub fn snapshot(&mut self, slot: usize, logits: Vec<f32>) -> Result<Snapshot, Error> {
        self.catch_up()?;
        match &mut self.states {
            States::Slots { decoder, .. } => {
                let values = decoder.values(slot)?;
                Ok(Snapshot::of(values, decoder.pasts(slot).cloned().collect(), logits))
            }
            States::Rows { .. } => Ok(Snapshot::new(&self.state(slot)?, logits)),
        }
    }

    /// Replaces the state in `slot`.
    pub fn set_state(&mut self, slot: usize, state: State) -> Result<(), Error> {
        match &mut self.states {
            States::Rows { slots, guesses, .. } => {
                guesses.iter_mut().for_each(|g| g.forget());
                slots[slot] = Place::Apart(state);
            }
            States::Slots { decoder, used, .. } => {
                decoder.set_state(slot, &state)?;
                used[slot] = None;
            }
        }
        Ok(())
    }

    /// Whether it can choose tokens itself, from logits that stay where they are until the next step: where all sequences have one.
    pub fn chooses(&self) -> bool {
        matches!(&self.states, States::Slots { decoder, together, .. } if *together >= decoder.slots())
    }

    /// The logits after what the sequence in `slot` read in the last step, if they stayed on the GPU; none otherwise.
    pub fn logits(&mut self, slot: usize) -> Result<Vec<f32>, Error> {
        match &mut self.states {
            States::Slots { decoder, used, .. } => match used[slot] {
                Some(at) => Ok(decoder.logits(at..at + 1)?.to_vec()),
                None => Ok(Vec::new()),
            },
            States::Rows { .. } => Ok(Vec::new()),
        }
    }

    /// Tokens that the sequence in `slot` may read in one step ([`State::room`]).
    pub fn room(&self, slot: usize) -> usize {
        match &self.states {
            States::Rows { arena, slots, guesses, .. } => match (&slots[slot], arena) {
                (Place::Arena(row), Some(arena)) => {
                    let pending = guesses.as_ref().map_or(0, |g| g.pending());
                    arena.room(*row).saturating_sub(pending).max(1)
                }
                (Place::Apart(state), _) => state.room(0),
                (Place::Arena(_), None) => usize::MAX,
            },
            States::Slots { decoder, .. } => decoder.room(slot),
        }
    }

    /// Reads tokens of some sequences, each at most once: what they want, in their order. `meanwhile` is done while a GPU is at work, or before.
    pub fn step(&mut self, work: &[Work<'_>], meanwhile: impl FnOnce()) -> Result<Vec<Output>, Error> {
        let (ctx, model) = (&self.ctx, self.model);
        match &mut self.states {
            States::Rows { arena, slots, guesses, guesses_draws } => {
                meanwhile();
                let (mut state, rows) = settle(ctx, &self.empty, arena.take(), slots);
                let work: Vec<Work<'_>> = work.iter().map(|w| Work { slot: rows[w.slot], ..*w }).collect();
                // A failure leaves the states as they were.
                let alone = slots.len() == 1 && work.iter().all(|w| w.is_one() && (w.greedy || *guesses_draws));
                let result = match guesses {
                    Some(guesses) if alone => {
                        let result = guesses.feed(ctx, model, &mut state, work[0].before, work[0].tokens[0]);
                        *arena = Some(state);
                        return Ok(vec![Output { logits: result?, ..Output::default() }]);
                    }
                    Some(guesses) => guesses.settle(ctx, model, &mut state),
                    None => Ok(()),
                };
                let result = result.and_then(|()| forward(ctx, model, &state, &work, self.apart));
                let (outputs, state) = match result {
                    Ok((outputs, next)) => (Ok(outputs), next),
                    Err(e) => (Err(e), state),
                };
                *arena = Some(state);
                outputs
            }
            States::Slots { decoder, used, together } => {
                let mut outputs: Vec<Output> = work.iter().map(|_| Output::default()).collect();
                let (mut single, others): (Vec<usize>, Vec<usize>) = (0..work.len()).partition(|&i| work[i].is_one());
                // Those whose logits the host needs first.
                single.sort_by_key(|&i| work[i].wants.token.is_some());
                used.fill(None);
                let mut meanwhile = Some(meanwhile);
                for single in single.chunks(*together) {
                    let inputs: Vec<(usize, u32)> = single.iter().map(|&i| (work[i].slot, work[i].tokens[0])).collect();
                    decoder.feed(&inputs)?;
                    meanwhile.take().into_iter().for_each(|f| f());
                    let draw = |(row, &i): (usize, &usize)| work[i].wants.token.map(|from| Draw { row, from });
                    let draws: Vec<Draw> = single.iter().enumerate().filter_map(draw).collect();
                    let (here, chosen) = single.split_at(single.len() - draws.len());
                    if !draws.is_empty() {
                        let tokens = decoder.choose(&draws)?;
                        for ((at, &i), token) in (here.len()..).zip(chosen).zip(tokens) {
                            used[work[i].slot] = Some(at);
                            outputs[i].token = Some(token);
                        }
                    }
                    if !here.is_empty() {
                        let logits = decoder.logits(0..here.len())?;
                        let each = logits.chunks_exact(model.config().vocab_size);
                        here.iter().zip(each).for_each(|(&i, logits)| outputs[i].logits = logits.to_vec());
                    }
                }
                meanwhile.take().into_iter().for_each(|f| f());
                if !others.is_empty() {
                    let slots: Vec<usize> = others.iter().map(|&i| work[i].slot).collect();
                    let state = decoder.states(&slots)?;
                    let here: Vec<Work<'_>> =
                        others.iter().enumerate().map(|(slot, &i)| Work { slot, ..work[i] }).collect();
                    let (done, next) = forward(ctx, model, &state, &here, self.apart)?;
                    decoder.set_states(&slots, &next)?;
                    others.into_iter().zip(done).for_each(|(i, output)| outputs[i] = output);
                }
                ctx.check()?;
                Ok(outputs)
            }
        }
    }
}

/// The tokens of several slots of a state: what each wants, and the state after them. In one pass of the model, or `apart` in one for each.
fn forward(
    ctx: &Context, model: &Model, state: &State, work: &[Work<'_>], apart: bool,
) -> Result<(Vec<Output>, State), Error> {
    if !apart || work.len() < 2 {
        return pass(ctx, model, state, work);
    }
    let (mut outputs, mut state) = (Vec::new(), state.clone());
    for one in work {
        let (output, next) = pass(ctx, model, &state, std::slice::from_ref(one))?;
        outputs.extend(output);
        state = next;
    }
    Ok((outputs, state))
}

/// One pass of the model.
fn pass(ctx: &Context, model: &Model, state: &State, work: &[Work<'_>]) -> Result<(Vec<Output>, State), Error> {
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
    let logits = (count > 0).then(|| {
        let mut buf = ctx.alloc(count * c);
        let mut at = 0;
        for r in &wanted {
            buf.write_part(at * c, hidden.buf(), r.start * c, r.len() * c);
            at += r.len();
        }
        model.logits(&mut tape, &Var::constant(count, c, buf))
    });
    // On a CPU they are copied once, to whom they belong.
    let logits = match &logits {
        None => Cow::Borrowed(&[][..]),
        Some(logits) if ctx.cuda().is_none() => Cow::Borrowed(logits.data()),
        Some(logits) => Cow::Owned(logits.to_vec()),
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
