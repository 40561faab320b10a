use crate::testing::{check, matrix};
use crate::{Segment, Var};
use std::sync::Arc;

const HEADS: usize = 2;

fn reference(x: &[f64], segments: &[Segment], n: usize) -> Vec<Vec<f64>> {
    let c = HEADS * n;
    let mut y = vec![f64::NAN; x.len()];
    for s in segments {
        for t in 0..s.len {
            for i in 0..c {
                let (j, at) = (i % (n / 2), (s.start + t) * c + i);
                let angle = t as f64 / 1e4f64.powf(2.0 * j as f64 / n as f64);
                // The first half of a head's channels is the real part of a complex number, the second the imaginary part.
                y[at] = if i % n < n / 2 {
                    x[at] * angle.cos() - x[at + n / 2] * angle.sin()
                } else {
                    x[at - n / 2] * angle.sin() + x[at] * angle.cos()
                };
            }
        }
    }
    vec![y]
}

#[test]
fn values_and_gradients() {
    for (lengths, n) in [(vec![], 4), (vec![1], 4), (vec![40, 3, 1], 4), (vec![5], 10)] {
        let piece = |start: &mut usize, len: &usize| {
            *start += len;
            Some(Segment { start: *start - len, len: *len, state_in: None, state_out: None })
        };
        let segments: Arc<[Segment]> = lengths.iter().scan(0, piece).collect();
        check(
            &[matrix(lengths.iter().sum(), HEADS * n, 1, 1.0)],
            &[],
            |t, x: &[Var], _| vec![t.rotary(&x[0], &segments, HEADS)],
            |x| reference(&x[0], &segments, n),
        );
    }
}
