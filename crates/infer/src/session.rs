use crate::{Decoder, Error, InitialState, state_file};
use anser_model::{Cache, Model, State};
use anser_ops::attention::Past;
use anser_ops::{Tape, Var, batch};
use anser_tensor::Context;
use std::path::Path;

/// One sequence being read and written: the recurrent state after its tokens and the logits for the next.
pub struct Session<'m> {
    ctx: Context,
    model: &'m Model,
    state: State,
    logits: Vec<f32>,
    /// On a GPU single tokens go through here; while it is there its slot 0 holds the state.
    decoder: Option<Decoder<'m>>,
}

impl<'m> Session<'m> {
    /// An empty session.
    pub fn new(ctx: &Context, model: &'m Model) -> Session<'m> {
        let state = State::zeros(ctx, model.config(), 1);
        Session { ctx: ctx.clone(), model, state, logits: Vec::new(), decoder: None }
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
        self.pasts().next().map_or(0, Past::len)
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
            if self.decoder.is_none()
                && let Some(mut decoder) = Decoder::new(&self.ctx, self.model, 1)?
            {
                decoder.set_state(0, &self.state)?;
                self.decoder = Some(decoder);
                // It goes on there, and what it gives up is free.
                let empty = self.model.config().empty_past(&self.ctx);
                self.state.attention.iter_mut().for_each(|a| a.pasts[0] = empty.clone());
            }
            if let Some(decoder) = &mut self.decoder {
                self.logits = decoder.step(&[(0, token)])?.to_vec();
                return Ok(());
            }
        }
        self.state = self.state()?;
        self.decoder = None;
        let mut rest = tokens;
        while !rest.is_empty() {
            let now;
            (now, rest) = rest.split_at(rest.len().min(piece(&self.ctx, self.model)).min(self.state.room(0)));
            (self.logits, self.state) = read(&self.ctx, self.model, now, 1, &self.state)?;
        }
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
        match &self.decoder {
            Some(decoder) => decoder.state(0),
            None => Ok(self.state.clone()),
        }
    }

    /// A second session that goes on from here.
    pub fn fork(&self) -> Session<'m> {
        let state = self.decoder.as_ref().and_then(|d| d.state(0).ok()).unwrap_or_else(|| self.state.clone());
        Session { ctx: self.ctx.clone(), model: self.model, state, logits: self.logits.clone(), decoder: None }
    }

    /// Writes the session to a file: everything that is needed to go on later.
    ///
    /// # Errors
    /// When writing fails.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        state_file::write(&self.ctx, self.model, self.state()?, &self.logits, path)
    }

    /// Goes on from a file written by [`Session::save`] with the same model.
    ///
    /// # Errors
    /// When the file is no state file, or of another version or model.
    pub fn load(ctx: &Context, model: &'m Model, path: &Path) -> Result<Session<'m>, Error> {
        let (state, logits) = state_file::open(ctx, model, path)?;
        Ok(Session { ctx: ctx.clone(), model, state, logits, decoder: None })
    }
}

/// Tokens of one piece of a prompt, which bounds memory: many on a GPU, which a few don't fill. A narrow model takes as many more as its products are smaller, for
/// about two gigabytes of activations at most.
pub(crate) fn piece(ctx: &Context, model: &Model) -> usize {
    if ctx.cuda().is_none() {
        return 256;
    }
    let width = model.config().n_embd.next_power_of_two();
    ((32768 << 20) / (width * width)).clamp(4096, 32768)
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

#[cfg(test)]
mod tests {
    use super::*;
    use anser_model::{Config, Eviction, Hybrid, Init};

    #[test]
    fn pieces_forks_and_files_go_on_bitwise() {
        let with = |hybrid| Config { hybrid: Some(hybrid), ..Config::new(2, 64, 300) };
        let hybrid = |chunk, topk| with(Hybrid { chunk, topk, ..Hybrid::new(2) });
        let always = with(Hybrid { chunk: 7, topk: 5, sink: 1, window: 2, gate: true, ..Hybrid::new(2) });
        go_on(&Config::new(2, 64, 300), None);
        // Chunks that end at, before and after the ends of pieces.
        for (chunk, topk) in [(64, 3), (7, 4), (1000, 2)] {
            go_on(&hybrid(chunk, topk), None);
        }
        let shared = Config { head_size: 16, ..with(Hybrid { chunk: 16, key_heads: Some(2), ..Hybrid::new(2) }) };
        go_on(&always, None);
        go_on(&shared, None);
        // The past is given up at the same places whatever the pieces, so that nothing changes there either.
        for by in [Eviction::Recent, Eviction::Attention, Eviction::Error] {
            for whole_chunks in [false, true] {
                go_on(&hybrid(16, 3), Some(Cache::new(120, by, whole_chunks)));
                go_on(&always, Some(Cache::new(168, by, whole_chunks)));
                go_on(&shared, Some(Cache::new(120, by, whole_chunks)));
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
