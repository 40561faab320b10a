use crate::Segment;
use crate::testing::{check, matrix};
use std::sync::Arc;

const C: usize = 3;
const SLOTS: usize = 3;

fn seg(start: usize, len: usize, state_in: Option<usize>, state_out: Option<usize>) -> Segment {
    Segment { start, len, state_in, state_out }
}

/// x is the rows, the arena and K vectors; gives K outputs and the new arena.
fn reference(x: &[Vec<f64>], segments: &[Segment]) -> Vec<Vec<f64>> {
    let mut out: Vec<Vec<f64>> = x[2..].iter().map(|_| vec![0.0; x[0].len()]).collect();
    let mut arena = x[1].clone();
    for s in segments {
        for t in s.start..s.start + s.len {
            for c in 0..C {
                let before = match s.state_in {
                    _ if t > s.start => x[0][(t - 1) * C + c],
                    Some(slot) => x[1][slot * C + c],
                    None => 0.0,
                };
                let now = x[0][t * C + c];
                for (y, mu) in out.iter_mut().zip(&x[2..]) {
                    y[t * C + c] = now + (before - now) * mu[c];
                }
                if let Some(slot) = s.state_out {
                    arena[slot * C + c] = now;
                }
            }
        }
    }
    out.push(arena);
    out
}

fn check_k<const K: usize>(rows: usize, segments: Vec<Segment>) {
    let segments: Arc<[Segment]> = segments.into();
    let mu: Vec<_> = (0..K).map(|k| matrix(1, C, 3 + k as u32, 1.0)).collect();
    check(
        &[matrix(rows, C, 1, 2.0), matrix(SLOTS, C, 2, 2.0)],
        &mu,
        |t, x, p| {
            let (y, last) = t.token_shift::<K>(&x[0], &x[1], &segments, std::array::from_fn(|k| p[k]));
            y.into_iter().chain([last]).collect()
        },
        |x| reference(x, &segments),
    );
}

#[test]
fn values_and_gradients() {
    let cases = [
        (0, vec![]),
        (1, vec![seg(0, 1, None, Some(2))]),
        (1, vec![seg(0, 1, Some(1), Some(1))]),
        // A reset, a document that carries on, one over several blocks of rows.
        (80, vec![seg(0, 2, None, Some(0)), seg(2, 1, Some(1), Some(1)), seg(3, 77, Some(2), Some(2))]),
        // A fork: two read one row, one of them writes another's row.
        (5, vec![seg(0, 2, Some(0), Some(0)), seg(2, 3, Some(0), Some(1))]),
    ];
    for (rows, segments) in cases {
        check_k::<1>(rows, segments.clone());
        check_k::<6>(rows, segments);
    }
}
