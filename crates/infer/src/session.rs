use crate::lookup::Lookup;
use crate::{Decoder, Error, InitialState};
use anser_formats::{Checkpoint, Dtype, Source, write_safetensors};
use anser_model::{Cache, Model, State};
use anser_ops::attention::{Chunks, Past};
use anser_ops::{Tape, Var, batch};
use anser_tensor::{Buf, Context};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

const FORMAT: &str = "anser.state";
/// Tokens after the state at most that are read again beside a guess.
const MOST_PENDING: usize = 8;

/// One sequence being read and written: the recurrent state after its tokens and the logits for the next.
pub struct Session<'m> {
    ctx: Context,
    model: &'m Model,
    state: State,
    logits: Vec<f32>,
    /// On a GPU single tokens go through here; while it is there its slot 0 holds the state.
    decoder: Option<Decoder<'m>>,
    /// Where guesses come from, if there are any.
    lookup: Option<Lookup>,
    /// Tokens that `state` is not after yet, and what was read beyond them.
    pending: Vec<u32>,
    ahead: Option<Ahead>,
}

/// Guessed tokens that were read after the pending ones: the next comes true when it is fed.
#[derive(Clone)]
struct Ahead {
    tokens: Vec<u32>,
    /// How many have come true.
    taken: usize,
    /// Logits after each, [tokens, vocabulary].
    logits: Arc<Vec<f32>>,
    /// The state after all.
    state: State,
}

impl<'m> Session<'m> {
    /// An empty session.
    pub fn new(ctx: &Context, model: &'m Model) -> Session<'m> {
        let state = State::zeros(ctx, model.config(), 1);
        let (logits, pending) = (Vec::new(), Vec::new());
        Session { ctx: ctx.clone(), model, state, logits, decoder: None, lookup: None, pending, ahead: None }
    }

    /// The session, reading up to `guesses` tokens ahead whenever one is fed alone: those that followed the last three where they stood before. On a CPU a
    /// few tokens at once take little longer than one, and those guessed right are then there already. Logits stay the same to the bit. On a GPU nothing is guessed.
    pub fn guessing(mut self, guesses: usize) -> Session<'m> {
        self.lookup = (guesses > 0 && self.ctx.cuda().is_none()).then(|| Lookup::new(guesses));
        self
    }

    /// The session with a bound on what attention keeps of it, before it reads anything.
    ///
    /// # Errors
    /// When the bound doesn't fit the model ([`Cache::validate`]), or something was read already.
    pub fn bounded(mut self, cache: Cache) -> Result<Session<'m>, Error> {
        cache.validate(self.model.config())?;
        if self.cached() > 0 {
            return Err(Error::State("a bound on what attention keeps must be there before the first token".into()));
        }
        self.state.cache = Some(cache);
        Ok(self)
    }

    /// The session begun with a tuned initial state, before it reads anything.
    ///
    /// # Errors
    /// When something was read already.
    pub fn begun(mut self, initial: &InitialState) -> Result<Session<'m>, Error> {
        if !self.logits.is_empty() {
            return Err(Error::State("an initial state must be there before the first token".into()));
        }
        initial.begin(&self.ctx, &mut self.state);
        Ok(self)
    }

    /// Tokens that attention keeps now.
    pub fn cached(&self) -> usize {
        self.pasts().next().map_or(0, |p| p.len() + self.pending.len())
    }

    /// Bytes of the state.
    pub fn bytes(&self) -> usize {
        let pasts = self.pasts().map(Past::bytes).sum::<usize>();
        self.state.vars().map(|v| v.buf().bytes()).sum::<usize>() + pasts
    }

    /// What attention keeps, from wherever it is.
    fn pasts(&self) -> Box<dyn Iterator<Item = &Past> + '_> {
        match &self.decoder {
            Some(decoder) => Box::new(decoder.pasts(0)),
            None => Box::new(self.state.attention.iter().map(|a| &a.pasts[0])),
        }
    }

    /// Reads tokens; long prompts in pieces, so that memory stays bounded.
    ///
    /// # Errors
    /// When a token is outside the vocabulary; the session is then as before that piece.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<(), Error> {
        if let &[token] = tokens {
            if let Some(mut lookup) = self.lookup.take() {
                let result = self.feed_guessing(token, &mut lookup);
                self.lookup = Some(lookup);
                return result;
            }
            if self.decoder.is_none()
                && let Some(mut decoder) = Decoder::new(&self.ctx, self.model, 1)?
            {
                decoder.set_state(0, &self.state)?;
                self.decoder = Some(decoder);
                // It goes on there, and what it gives up is free.
                let (heads, c) = (self.model.config().heads(), self.model.config().n_embd);
                self.state.attention.iter_mut().for_each(|a| a.pasts[0] = Past::new(&self.ctx, heads, c));
            }
            if let Some(decoder) = &mut self.decoder {
                self.logits = decoder.step(&[(0, token)])?.to_vec();
                return Ok(());
            }
        }
        self.settle()?;
        self.decoder = None;
        let mut rest = tokens;
        while !rest.is_empty() {
            let now;
            (now, rest) = rest.split_at(rest.len().min(piece(&self.ctx)).min(self.state.room(0)));
            (self.logits, self.state) = read(&self.ctx, self.model, now, 1, &self.state)?;
            self.lookup.iter_mut().for_each(|l| now.iter().for_each(|&t| l.push(t)));
        }
        Ok(())
    }

    /// Reads a token: if it was guessed, what came of it is there.
    fn feed_guessing(&mut self, token: u32, lookup: &mut Lookup) -> Result<(), Error> {
        let vocab = self.model.config().vocab_size;
        if let Some(ahead) = &mut self.ahead {
            let hit = ahead.tokens[ahead.taken] == token;
            if hit {
                self.logits = ahead.logits[ahead.taken * vocab..][..vocab].to_vec();
                ahead.taken += 1;
                self.pending.push(token);
                lookup.push(token);
            }
            if ahead.taken == ahead.tokens.len() {
                self.state = ahead.state.clone();
                self.pending.clear();
            }
            if !hit || ahead.taken == ahead.tokens.len() {
                lookup.learn(ahead.taken, ahead.tokens.len());
                self.ahead = None;
                // What attention has seen of a wrong guess makes room.
                self.state.attention.iter().for_each(|a| a.pasts.iter().for_each(Past::reclaim));
            }
            if hit {
                return Ok(());
            }
        }
        // What is pending is read once more, beside the next guess; alone if there is much of it. There is room for one token more, as there was for a guess.
        if self.pending.len() >= MOST_PENDING {
            self.settle()?;
        }
        let mut now = [&self.pending[..], &[token]].concat();
        let guess = lookup.guess(token, self.state.room(0) - now.len());
        now.extend(&guess);
        let (mut logits, next) = read(&self.ctx, self.model, &now, 1 + guess.len(), &self.state)?;
        lookup.push(token);
        let after = logits.split_off(vocab);
        self.logits = logits;
        if guess.is_empty() {
            self.state = next;
            self.pending.clear();
        } else {
            self.pending.push(token);
            self.ahead = Some(Ahead { tokens: guess, taken: 0, logits: Arc::new(after), state: next });
        }
        Ok(())
    }

    /// Brings the state to where the session is.
    fn settle(&mut self) -> Result<(), Error> {
        self.state = self.state()?;
        self.pending.clear();
        self.ahead = None;
        Ok(())
    }

    /// Logits for the next token, one per vocabulary entry.
    ///
    /// # Errors
    /// Before the first token.
    pub fn logits(&self) -> Result<&[f32], Error> {
        if self.logits.is_empty() { Err(Error::Empty) } else { Ok(&self.logits) }
    }

    /// The state, from wherever it is.
    pub(crate) fn state(&self) -> Result<State, Error> {
        if let Some(decoder) = &self.decoder {
            return decoder.state(0);
        }
        if self.pending.is_empty() {
            return Ok(self.state.clone());
        }
        Ok(read(&self.ctx, self.model, &self.pending, 0, &self.state)?.1)
    }

    /// A second session that goes on from here.
    pub fn fork(&self) -> Session<'m> {
        let state = self.decoder.as_ref().and_then(|d| d.state(0).ok()).unwrap_or_else(|| self.state.clone());
        Session {
            ctx: self.ctx.clone(),
            model: self.model,
            state,
            logits: self.logits.clone(),
            decoder: None,
            lookup: self.lookup.clone(),
            pending: self.pending.clone(),
            ahead: self.ahead.clone(),
        }
    }

    /// Writes the session to a file: everything that is needed to go on later.
    ///
    /// # Errors
    /// When writing fails.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let mut state = self.state()?;
        let mut tensors: Vec<(String, usize, Vec<f32>)> =
            state.named_mut().map(|(name, v)| (name, v.rows(), v.to_vec())).collect();
        for (j, a) in state.attention.iter().enumerate() {
            let past = &a.pasts[0];
            for (i, rows) in past.to_vecs().into_iter().enumerate() {
                tensors.push((past_name(j, i), past.len(), rows));
            }
        }
        self.ctx.check()?;
        let shapes: Vec<[usize; 2]> =
            tensors.iter().map(|(_, rows, data)| [*rows, data.len().checked_div(*rows).unwrap_or(0)]).collect();
        let mut sources: Vec<Source<'_>> = tensors
            .iter()
            .zip(&shapes)
            .map(|((name, _, data), shape)| Source::new(name.as_str(), shape, Dtype::F32, data))
            .collect();
        sources.push(Source::new("logits", &[self.logits.len()], Dtype::F32, &self.logits));
        let mut metadata = BTreeMap::from([
            (FORMAT.to_string(), "1".to_string()),
            ("anser.model".to_string(), self.model.fingerprint()),
        ]);
        if let Some(cache) = state.cache {
            metadata.insert(CACHE.into(), json!(cache).to_string());
        }
        Ok(write_safetensors(path, &sources, &metadata)?)
    }

    /// Goes on from a file written by [`Session::save`] with the same model.
    ///
    /// # Errors
    /// When the file is no state file, or of another version or model.
    pub fn load(ctx: &Context, model: &'m Model, path: &Path) -> Result<Session<'m>, Error> {
        let file = Checkpoint::open(path)?;
        match file.metadata().get(FORMAT).map(String::as_str) {
            Some("1") => {}
            Some(v) => return Err(Error::State(format!("{} has version {v}; this program reads 1", path.display()))),
            None => return Err(Error::State(format!("{} is not a state file", path.display()))),
        }
        if file.metadata().get("anser.model") != Some(&model.fingerprint()) {
            let reason = format!("{} was saved with another model; load that model", path.display());
            return Err(Error::State(reason));
        }
        let mut session = Session::new(ctx, model);
        let read = |name: &str, len: usize| -> Result<Vec<f32>, Error> {
            let t = file.get(name).ok_or_else(|| Error::State(format!("{}: no tensor {name}", path.display())))?;
            if t.elements() != len {
                let found = t.elements();
                return Err(Error::State(format!("{}: {name} has {found} elements, not {len}", path.display())));
            }
            let mut values = vec![0.0; len];
            t.read_f32_into(&mut values)?;
            Ok(values)
        };
        for (name, v) in session.state.named_mut() {
            let mut buf = v.buf().duplicate();
            buf.copy_from(&read(&name, v.rows() * v.cols())?);
            *v = Var::constant(v.rows(), v.cols(), buf);
        }
        if let Some(text) = file.metadata().get(CACHE) {
            let cache =
                serde_json::from_str(text).map_err(|e| Error::State(format!("{}: {CACHE}: {e}", path.display())))?;
            session = session.bounded(cache)?;
        }
        if let Some(chunks) = model.config().hybrid.map(|h| h.chunks()) {
            let c = model.config().n_embd;
            let notes = session.state.cache.map_or(0, |cache| cache.notes());
            let tokens = file.shape(&past_name(0, 0)).and_then(|s| s.first().copied()).unwrap_or(0);
            for (j, a) in session.state.attention.iter_mut().enumerate() {
                let rows = (0..2 + notes).map(|i| Ok(ctx.copy_of(&read(&past_name(j, i), tokens.saturating_mul(c))?)));
                let rows = rows.collect::<Result<Vec<_>, Error>>()?;
                a.pasts[0] = filled(ctx, &a.pasts[0], &rows, tokens, chunks);
            }
        }
        let len = file.shape("logits").map_or(0, |s| s.iter().product());
        session.logits = read("logits", len)?;
        Ok(session)
    }
}

/// Tokens of one piece of a prompt, which bounds memory: many on a GPU, which a few don't fill.
pub(crate) fn piece(ctx: &Context) -> usize {
    if ctx.cuda().is_some() { 4096 } else { 256 }
}

/// Reads a piece of a prompt, going on from a state of one slot: the logits after its last `rows` tokens and the next state. The host waits for the GPU only at the end.
pub(crate) fn read(
    ctx: &Context, model: &Model, piece: &[u32], rows: usize, state: &State,
) -> Result<(Vec<f32>, State), Error> {
    let mut tape = Tape::inference(ctx, model.params());
    let segments = batch(1, piece.len(), true).into();
    let (hidden, next) = model.forward(&mut tape, piece, &segments, state, false)?;
    if rows == 0 {
        ctx.check()?;
        return Ok((Vec::new(), next));
    }
    let c = hidden.cols();
    let last = Var::constant(rows, c, hidden.buf().part((piece.len() - rows) * c, rows * c));
    let logits = model.logits(&mut tape, &last).to_vec();
    ctx.check()?;
    Ok((logits, next))
}

/// An empty past filled with what is kept of so many tokens: keys, values, notes ([`Past::to_vecs`]).
pub(crate) fn filled(ctx: &Context, empty: &Past, rows: &[Buf], tokens: usize, chunks: Chunks) -> Past {
    let past = empty.append(ctx, [&rows[0], &rows[1]], 0, tokens, chunks);
    past.noting(ctx, &rows[2..].iter().collect::<Vec<_>>(), 0, tokens)
}

/// Key of a state file's metadata with the bound on what attention keeps.
const CACHE: &str = "anser.cache";

/// The name of the i-th matrix that attention block `j` keeps: keys, values, what its bound notes.
fn past_name(j: usize, i: usize) -> String {
    format!("state.moba.{j}.{}", ["keys", "values", "notes.0", "notes.1"][i])
}

#[cfg(test)]
mod tests {
    use super::*;
    use anser_model::{Config, Eviction, Hybrid, Init};
    use anser_tensor::{DType, WeightType};

    #[test]
    fn pieces_forks_and_files_go_on_bitwise() {
        let hybrid =
            |chunk, topk| Config { hybrid: Some(Hybrid { layers: 2, chunk, topk }), ..Config::new(2, 64, 300) };
        go_on(&Config::new(2, 64, 300), None);
        // Chunks that end at, before and after the ends of pieces.
        for (chunk, topk) in [(64, 3), (7, 4), (1000, 2)] {
            go_on(&hybrid(chunk, topk), None);
        }
        // The past is given up at the same places whatever the pieces, so that nothing changes there either.
        for by in [Eviction::Recent, Eviction::Attention, Eviction::Error] {
            for whole_chunks in [false, true] {
                go_on(&hybrid(16, 3), Some(Cache::new(120, by, whole_chunks)));
            }
        }
    }

    /// A model in which something passes through attention: its output projections would begin as zeros.
    fn model(ctx: &Context, config: &Config) -> Model {
        let mut model = Model::init(ctx, config, Init::Noise, 1).unwrap();
        let specs = model.params().specs().to_vec();
        for s in specs.iter().filter(|s| s.name.ends_with("att.output.weight")) {
            let wave = |j: usize| ((s.range.start + j) as f32 * 0.7).sin() * 0.1;
            model.params_mut().values_mut()[s.range.clone()].iter_mut().enumerate().for_each(|(j, v)| *v = wave(j));
        }
        model
    }

    #[test]
    fn guessing_changes_nothing_but_time() {
        let ctx = Context::cpu(2);
        let plain = Config::new(2, 64, 40);
        let hybrid = Config { hybrid: Some(Hybrid { layers: 1, chunk: 8, topk: 2 }), ..plain.clone() };
        let bound = Cache::new(64, Eviction::Error, false);
        for (config, cache) in [(&plain, None), (&hybrid, None), (&hybrid, Some(bound))] {
            let trained = model(&ctx, config);
            for kept in [DType::F32.into(), DType::BF16.into(), WeightType::Int8, WeightType::Q4] {
                let model = trained.packed(&ctx, kept);
                let session = |guesses: usize| {
                    let s = Session::new(&ctx, &model);
                    if let Some(c) = cache { s.bounded(c).unwrap() } else { s }.guessing(guesses)
                };
                // Twelve tokens again and again, with others now and then, from where a guess may be wrong.
                let token = |i: u32| if i % 29 < 2 { i * 7 % 40 } else { i % 12 };
                let fed: Vec<u32> = (0..220).map(token).collect();
                let mut right = 0;
                for guesses in [1, 3, 8] {
                    let (mut s, mut plain) = (session(guesses), session(0));
                    for half in [&fed[..20], &fed[20..]] {
                        s.feed(&half[..10]).unwrap();
                        plain.feed(&half[..10]).unwrap();
                        for (i, &t) in half[10..].iter().enumerate() {
                            let (mut fork, before) = (s.fork(), s.ahead.as_ref().map_or(0, |a| a.taken));
                            s.feed(&[t]).unwrap();
                            plain.feed(&[t]).unwrap();
                            right += usize::from(s.ahead.as_ref().is_some_and(|a| a.taken > before));
                            assert!(s.logits().unwrap() == plain.logits().unwrap(), "{config:?} {kept} {guesses} {i}");
                            assert_eq!(s.cached(), plain.cached());
                            if i % 40 == 7 {
                                fork.feed(&[t, 5]).unwrap();
                                let mut other = plain.fork();
                                other.feed(&[5]).unwrap();
                                assert!(fork.logits().unwrap() == other.logits().unwrap());
                                let all =
                                    |s: &Session<'_>| s.state().unwrap().vars().map(|v| v.to_vec()).collect::<Vec<_>>();
                                assert!(all(&s) == all(&plain));
                            }
                            if i % 40 == 9 {
                                assert!(s.feed(&[40]).is_err());
                            }
                        }
                    }
                }
                assert!(right > 100, "{right}");
            }
        }
    }

    fn go_on(config: &Config, cache: Option<Cache>) {
        let ctx = Context::cpu(2);
        let model = model(&ctx, config);
        let tokens: Vec<u32> = (0..600).map(|i| i * 7 % 300).collect();
        let session = || match cache {
            Some(cache) => Session::new(&ctx, &model).bounded(cache).unwrap(),
            None => Session::new(&ctx, &model),
        };
        let mut whole = session();
        assert!(whole.logits().is_err());
        whole.feed(&tokens).unwrap();
        if let Some(cache) = cache {
            assert!(whole.cached() < cache.most);
            let mut one_by_one = session();
            for &t in &tokens {
                one_by_one.feed(&[t]).unwrap();
            }
            assert!(one_by_one.logits().unwrap() == whole.logits().unwrap());
        } else if config.hybrid.is_some() {
            assert_eq!(whole.cached(), 600);
        }
        let mut parts = session();
        parts.feed(&tokens[..300]).unwrap();
        let path = std::env::temp_dir().join(format!("anser-state-{}.safetensors", std::process::id()));
        parts.save(&path).unwrap();
        let mut fork = parts.fork();
        fork.feed(&[1, 2, 3]).unwrap();
        parts.feed(&tokens[300..]).unwrap();
        assert!(parts.logits().unwrap() == whole.logits().unwrap());
        let mut loaded = Session::load(&ctx, &model, &path).unwrap();
        loaded.feed(&tokens[300..]).unwrap();
        assert!(loaded.logits().unwrap() == whole.logits().unwrap());
        assert!(fork.logits().unwrap() != whole.logits().unwrap());
        if let Some(cache) = cache {
            let late = Session::load(&ctx, &model, &path).unwrap();
            assert!(late.bounded(cache).is_err(), "what came before has no notes");
        }
        let other = Model::init(&ctx, config, Init::Current, 2).unwrap();
        let e = Session::load(&ctx, &other, &path).err().unwrap().to_string();
        assert!(e.contains("another model"), "{e}");
        std::fs::remove_file(path).unwrap();
        assert!(whole.feed(&[300]).is_err());
    }
}
