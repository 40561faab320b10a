//! What attention gives up of the past, so that a sequence of any length takes bounded memory and time (RWKV-X, arXiv 2504.21463,
//! section 3.4).

use crate::{Config, Error};
use anser_ops::attention::{Chunks, Past};
use anser_ops::{Segment, Var};
use anser_tensor::{Buf, Context, DType, DisjointMut};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A bound on the tokens that each attention block keeps of a sequence. When there are [`Cache::most`], the most recent
/// [`Cache::window`] stay and the best others, [`Cache::keep`] in all, in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// Tokens kept at most.
    pub most: usize,
    /// Tokens kept when there are so many.
    pub keep: usize,
    /// Of these the most recent ones.
    pub window: usize,
    /// What makes the others good.
    pub by: Eviction,
    /// Whether whole chunks stay or go, by the mean over their tokens, so that what was chosen from together stays together.
    pub whole_chunks: bool,
}

/// What makes a token of the past worth keeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Eviction {
    /// That it came later.
    Recent,
    /// The attention that the queries of the window pay to it, over heads: sum_i softmax_j(q_i . k_j / sqrt(N)), as in the paper.
    /// It tells what was asked of the past lately.
    Attention,
    /// What the state of the RWKV-7 block before has forgotten of it: |v_j - S k_j / |k_j|^2|^2 / |v_j|^2, the mean over heads, with the value and
    /// the key that this block wrote. It needs no question.
    Error,
}

impl fmt::Display for Eviction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Eviction::Recent => "recent",
            Eviction::Attention => "attention",
            Eviction::Error => "error",
        })
    }
}

impl FromStr for Eviction {
    type Err = String;
    fn from_str(s: &str) -> Result<Eviction, String> {
        match s {
            "recent" => Ok(Eviction::Recent),
            "attention" => Ok(Eviction::Attention),
            "error" => Ok(Eviction::Error),
            _ => Err(format!("unknown rule {s:?}: use recent, attention or error")),
        }
    }
}

/// What the RWKV-7 block before an attention block did with the tokens of a call.
pub(crate) struct Written {
    /// Value and key of every token, [tokens, C].
    pub(crate) rows: [Var; 2],
    /// The states afterwards, [slots, H x N x N].
    pub(crate) states: Var,
}

impl Cache {
    /// Up to `most` tokens, three quarters of them kept, an eighth of them the most recent.
    pub fn new(most: usize, by: Eviction, whole_chunks: bool) -> Cache {
        Cache { most, keep: most / 4 * 3, window: most / 8, by, whole_chunks }
    }

    /// Matrices [tokens, C] that the rule notes beside keys and values.
    pub fn notes(&self) -> usize {
        match self.by {
            Eviction::Recent => 0,
            Eviction::Attention => 1,
            Eviction::Error => 2,
        }
    }

    /// Checks that the bound fits a model.
    ///
    /// # Errors
    /// When the model has no attention, or the numbers leave nothing to choose.
    pub fn validate(&self, config: &Config) -> Result<(), Error> {
        let err = |m: String| Err(Error::Config(m));
        let Some(h) = config.hybrid.filter(|h| h.layers > 0) else {
            return err("a bound on the cache is of attention, which this model doesn't have".into());
        };
        let Cache { most, keep, window, .. } = *self;
        // A chunk to keep beside the window and a part of one before it, and those that every token sees.
        let least = h.chunk.saturating_mul(h.sink + 2).saturating_add(window);
        match () {
            _ if window == 0 => err("a cache keeps at least 1 recent token".into()),
            _ if h.window > 0 && window / h.chunk <= h.window => err(format!(
                "a cache of {most} tokens always keeps the last {window}, too few for {} chunks of {} beside a token's own",
                h.window, h.chunk
            )),
            _ if keep < least => err(format!(
                "a cache of {most} tokens is too small for chunks of {}: {keep} would be kept, and it takes {least}",
                h.chunk
            )),
            _ if keep + h.chunk > most => err(format!("a cache of {most} tokens cannot keep {keep}: nothing would go")),
            () => Ok(()),
        }
    }

    /// The past of a sequence in `slot` of the arena with what the rule notes of its last tokens, rows of the segment `s`; when it is
    /// full, what is kept of it.
    pub(crate) fn bound(
        &self, ctx: &Context, past: &Past, chunks: Chunks, (s, slot): (&Segment, usize), q: &Var,
        written: Option<&Written>,
    ) -> Past {
        let past = match (self.by, written) {
            (Eviction::Attention, _) => past.noting(ctx, &[q.buf()], s.start, s.len),
            (Eviction::Error, Some(w)) => past.noting(ctx, &w.rows.each_ref().map(Var::buf), s.start, s.len),
            _ => past.clone(),
        };
        self.thinned(ctx, &past, chunks, written.map(|w| (&w.states, slot)))
    }

    /// What is kept of a past, with its notes, when it is full; else all. `state`: the states of the RWKV-7 block before, [slots, H x N x N], and the slot.
    pub(crate) fn thinned(&self, ctx: &Context, past: &Past, chunks: Chunks, state: Option<(&Var, usize)>) -> Past {
        if past.len() < self.most || ctx.is_dry() {
            return past.clone();
        }
        let state = || {
            let (all, slot) = state?;
            let (n, of) = (all.cols(), all.buf().dtype());
            let part = all.buf().part(slot * n, n);
            Some(match ctx.cuda() {
                Some(gpu) if of != DType::F32 => {
                    let wide = ctx.alloc_f32(n);
                    gpu.widen(part.ptr(), of, wide.ptr(), n);
                    wide
                }
                _ => part,
            })
        };
        let kept = self.kept(ctx, past, chunks, state);
        past.keep(ctx, &kept, chunks)
    }

    /// The tokens to keep of a full past.
    fn kept(&self, ctx: &Context, past: &Past, chunks: Chunks, state: impl FnOnce() -> Option<Buf>) -> Vec<usize> {
        let (len, heads, [kc, c]) = (past.len(), past.heads(), past.channels());
        let unit = if self.whole_chunks { chunks.size } else { 1 };
        // What may go, in whole units; the rest stays.
        let old = (len - self.window) / unit * unit;
        let stay = (self.keep - (len - old)) / unit;
        let recent = || (0..old).map(|i| i as f32).collect();
        let mut goodness = match self.by {
            Eviction::Recent => recent(),
            Eviction::Attention => past.asked(ctx, self.window, old).unwrap_or_else(|| match &past.notes()[..] {
                [queries] => attention(ctx, &past.keys()[..old * kc], &queries[(len - self.window) * c..], c, heads),
                _ => recent(),
            }),
            Eviction::Error => state().map_or_else(recent, |state| {
                past.forgotten(ctx, old, &state).unwrap_or_else(|| match &past.notes()[..] {
                    [values, keys] => forgotten(ctx, &values[..old * c], &keys[..old * c], &state, c, heads[0]),
                    _ => recent(),
                })
            }),
        };
        // What every token sees at the beginning stays there.
        goodness.iter_mut().take(chunks.sink * chunks.size).for_each(|g| *g = f32::INFINITY);
        let mean = |(i, g): (usize, &[f32])| (g.iter().sum::<f32>() / unit as f32, i);
        let mut best: Vec<(f32, usize)> = goodness.chunks(unit).enumerate().map(mean).collect();
        // The best first, of equal ones the earlier.
        best.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut units: Vec<usize> = best[..stay].iter().map(|b| b.1).collect();
        units.sort_unstable();
        units.iter().flat_map(|u| u * unit..(u + 1) * unit).chain(old..len).collect()
    }
}

/// In eight sums, which are a vector's.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, end), (b, other)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        (0..8).for_each(|l| sums[l] += a[l] * b[l]);
    }
    sums.iter().sum::<f32>() + end.iter().zip(other).map(|(a, b)| a * b).sum::<f32>()
}

/// The attention that all queries [.., C] pay to each of the keys [.., key heads x N], a softmax over them.
fn attention(ctx: &Context, keys: &[f32], queries: &[f32], c: usize, [heads, key_heads]: [usize; 2]) -> Vec<f32> {
    let n = c / heads;
    let kc = key_heads * n;
    let count = keys.len() / kc;
    let mut each = vec![0.0; heads * count];
    let shared = DisjointMut::new(&mut each);
    ctx.threads().run(heads, |h| {
        // SAFETY: every head has its own row.
        let sums = unsafe { shared.get(h * count..(h + 1) * count) };
        let mut p = vec![0.0; count];
        for q in queries.chunks_exact(c) {
            let (q, at) = (&q[h * n..][..n], h / (heads / key_heads) * n);
            p.iter_mut().zip(keys.chunks_exact(kc)).for_each(|(p, k)| *p = dot(q, &k[at..][..n]) / (n as f32).sqrt());
            let top = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            p.iter_mut().for_each(|p| *p = (*p - top).exp());
            let total: f32 = p.iter().sum();
            sums.iter_mut().zip(&p).for_each(|(s, p)| *s += p / total);
        }
    });
    (0..count).map(|j| (0..heads).map(|h| each[h * count + j]).sum()).collect()
}

/// How badly the state [H, N, N] gives back each of the values [.., C] under its key.
fn forgotten(ctx: &Context, values: &[f32], keys: &[f32], state: &[f32], c: usize, heads: usize) -> Vec<f32> {
    let n = c / heads;
    let mut errors = vec![0.0; values.len() / c];
    let shared = DisjointMut::new(&mut errors);
    ctx.threads().run(values.len() / c, |j| {
        let of_head = |h: usize| {
            let at = j * c + h * n..j * c + (h + 1) * n;
            let (v, k) = (&values[at.clone()], &keys[at]);
            let scale = 1.0 / dot(k, k).max(f32::MIN_POSITIVE);
            let rows = state[h * n * n..][..n * n].chunks_exact(n);
            let apart: f32 = rows.zip(v).map(|(row, v)| (v - dot(row, k) * scale).powi(2)).sum();
            apart / dot(v, v).max(f32::MIN_POSITIVE)
        };
        // SAFETY: every token has its own place.
        let to = unsafe { shared.get(j..j + 1) };
        to[0] = (0..heads).map(of_head).sum::<f32>() / heads as f32;
    });
    errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hybrid;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed;
        let mut next = || {
            s = s.wrapping_mul(1664525).wrapping_add(1013904223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn a_state_that_holds_a_token_has_no_error_there() {
        let (ctx, n, heads) = (Context::cpu(2), 4, 2);
        let c = n * heads;
        let (values, keys) = (noise(3 * c, 1), noise(3 * c, 2));
        // What is left of the second token alone.
        let mut state = vec![0.0; heads * n * n];
        for h in 0..heads {
            let (v, k) = (&values[c + h * n..][..n], &keys[c + h * n..][..n]);
            for i in 0..n {
                (0..n).for_each(|j| state[(h * n + i) * n + j] = v[i] * k[j]);
            }
        }
        // S = v k^T gives v |k|^2 under k.
        let e = forgotten(&ctx, &values, &keys, &state, c, heads);
        assert!(e[1] < 1e-10 && e[0] > 0.1 && e[2] > 0.1, "{e:?}");
        assert!(
            forgotten(&ctx, &values, &keys, &vec![0.0; state.len()], c, heads).iter().all(|e| (e - 1.0).abs() < 1e-6)
        );
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn a_gpu_finds_the_same_goodness() {
        for dtype in [DType::F32, DType::F16] {
            for n in [16, 64, 128] {
                let (heads, tokens) = (2, 70);
                let c = n * heads;
                let gpu = Context::with_activations(anser_tensor::Device::Cuda(0), dtype, 1).unwrap();
                let round = |x: Vec<f32>| gpu.copy_of(&x).to_vec();
                let (values, keys) = (round(noise(tokens * c, 1)), round(noise(tokens * c, 2)));
                let state = noise(heads * n * n, 3);
                let rows = [&values, &keys].map(|x| gpu.copy_of(x));
                let past = Past::new(&gpu, [heads; 2], n);
                let past = past.append(&gpu, rows.each_ref(), 0, tokens, Chunks::new(8, 2));
                let past = past.noting(&gpu, &rows.each_ref(), 0, tokens);
                let mut on_device = gpu.alloc_f32(state.len());
                on_device.copy_from(&state);
                let got = past.forgotten(&gpu, 66, &on_device).unwrap();
                let want = forgotten(&Context::cpu(1), &values[..66 * c], &keys[..66 * c], &state, c, heads);
                let same = |got: &[f32], want: &[f32]| {
                    got.len() == 66 && got.iter().zip(want).all(|(a, b)| (a - b).abs() < 2e-5 * b.abs())
                };
                assert!(same(&got, &want), "{dtype} {n}");
                for key_heads in [heads, 1] {
                    let wide = key_heads * n;
                    let keys = &keys[..tokens * wide];
                    let past = Past::new(&gpu, [heads, key_heads], n);
                    let past = past.append(&gpu, [&gpu.copy_of(keys); 2], 0, tokens, Chunks::new(8, 2));
                    let got = past.noting(&gpu, &[&rows[0]], 0, tokens).asked(&gpu, 37, 66).unwrap();
                    let (queries, of) = (&values[(tokens - 37) * c..], [heads, key_heads]);
                    let want = attention(&Context::cpu(1), &keys[..66 * wide], queries, c, of);
                    assert!(same(&got, &want), "{dtype} {n} {key_heads}");
                }
            }
        }
    }

    #[test]
    fn attention_is_a_share() {
        let (ctx, c) = (Context::cpu(2), 8);
        let queries = noise(3 * c, 3);
        let keys = [queries[..c].iter().map(|q| 30.0 * q).collect(), noise(2 * c, 4)].concat();
        let a = attention(&ctx, &keys, &queries, c, [2, 2]);
        // Three queries and two heads.
        assert!((a.iter().sum::<f32>() - 6.0).abs() < 1e-5 && a.iter().all(|&a| a > 0.0));
        assert!(a[0] > a[1].max(a[2]));
    }

    #[test]
    fn the_best_stay_in_their_order() {
        let (ctx, c) = (Context::cpu(1), 4);
        let of = |len: usize, values: &[f32]| {
            let past = Past::new(&ctx, [1, 1], c);
            let rows = |x: &[f32]| ctx.copy_of(x);
            let keys: Vec<f32> = vec![1.0; len * c];
            let past = past.append(&ctx, [&rows(&keys), &rows(&keys)], 0, len, Chunks::new(4, 2));
            past.noting(&ctx, &[&rows(values), &rows(&keys)], 0, len)
        };
        let cache = |by, whole_chunks| Cache { most: 24, keep: 12, window: 3, by, whole_chunks };
        // A state of nothing but 1 gives back 1; tokens 2 and 9 wrote something else.
        let mut values = vec![1.0; 24 * c];
        [2, 9].iter().for_each(|t| values[t * c..][..c].fill(-1.0));
        let state = || Some(ctx.copy_of(&vec![1.0; c * c]));
        let kept_with = |chunks: Chunks, by, whole| cache(by, whole).kept(&ctx, &of(24, &values), chunks, state);
        let kept = |by, whole| kept_with(Chunks::new(4, 2), by, whole);
        assert_eq!(kept(Eviction::Recent, false), (12..24).collect::<Vec<_>>());
        // The rest is equal, so that the earlier stays.
        assert_eq!(kept(Eviction::Error, false), [0, 1, 2, 3, 4, 5, 6, 7, 9, 21, 22, 23].to_vec());
        // Whole chunks: 0 and 2, and the one in which the window begins.
        assert_eq!(kept(Eviction::Error, true), [0, 1, 2, 3, 8, 9, 10, 11, 20, 21, 22, 23].to_vec());
        // The chunk that every token sees stays, however bad.
        let sink = |whole| kept_with(Chunks { sink: 1, ..Chunks::new(4, 2) }, Eviction::Recent, whole);
        assert_eq!(sink(false), (0..4).chain(16..24).collect::<Vec<_>>());
        assert_eq!(sink(true), (0..4).chain(16..24).collect::<Vec<_>>());
    }

    #[test]
    fn bounds_that_leave_nothing_to_choose_are_errors() {
        let with = |hybrid: Hybrid| Config { hybrid: Some(hybrid), ..Config::new(2, 64, 8) };
        let hybrid = Hybrid { chunk: 64, ..Hybrid::new(1) };
        let config = with(hybrid);
        let fits =
            |config: &Config, most| Cache::new(most, Eviction::Error, true).validate(config).map_err(|e| e.to_string());
        let check = |most| fits(&config, most);
        let (sink, window) = (with(Hybrid { sink: 2, ..hybrid }), with(Hybrid { window: 2, ..hybrid }));
        assert!(fits(&sink, 512).is_ok() && fits(&sink, 400).unwrap_err().contains("it takes 306"));
        assert!(fits(&window, 1536).is_ok() && fits(&window, 1024).unwrap_err().contains("2 chunks of 64"));
        assert!(check(512).is_ok());
        assert!(check(100).unwrap_err().contains("too small for chunks of 64"));
        assert!(check(0).unwrap_err().contains("at least 1"));
        let plain = Config { hybrid: None, ..config.clone() };
        assert!(
            Cache::new(512, Eviction::Recent, false).validate(&plain).unwrap_err().to_string().contains("doesn't have")
        );
        let all = Cache { keep: 512, ..Cache::new(512, Eviction::Recent, false) };
        assert!(all.validate(&config).unwrap_err().to_string().contains("nothing would go"));
    }
}
