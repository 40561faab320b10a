use crate::testing::{matrix, noise};
use crate::{Group, ParamSet, Segment, Tape, Var};
use anser_tensor::Context;
use std::sync::Arc;

const C: usize = 37;
const SLOTS: usize = 4;

fn seg(start: usize, len: usize, state_in: Option<usize>, state_out: Option<usize>) -> Segment {
    Segment { start, len, state_in, state_out }
}

/// Everything [`Tape::norm_shift`] gives, while recording or not.
fn run<const K: usize>(
    threads: usize, recording: bool, rows: usize, segments: &Arc<[Segment]>, residual: bool,
) -> Vec<Vec<u32>> {
    let ctx = Context::cpu(threads);
    let specs = (0..2 + K).map(|i| (i.to_string(), vec![1, C], Group::Plain)).collect();
    let (mut set, handles) = ParamSet::new(specs);
    for (i, &h) in handles.iter().enumerate() {
        set.get_mut(h).copy_from_slice(&noise(C, 9 + i as u32));
    }
    let mut grads = ctx.zeros_f32(set.values().len());
    let mut t = match recording {
        true => Tape::recording(&ctx, &set, &mut grads),
        false => Tape::inference(&ctx, &set),
    };
    let var = |rows: usize, seed: u32| {
        let mut value = ctx.alloc(rows * C);
        value.copy_from_slice(&matrix(rows, C, seed, 2.0).2);
        Var::constant(rows, C, value)
    };
    let (x, dx, last) = (var(rows, 1), var(rows, 2), var(SLOTS, 3));
    let mu = std::array::from_fn(|k| handles[2 + k]);
    let (s, ys, next) = t.norm_shift::<K>(x, residual.then_some(&dx), [handles[0], handles[1]], &last, segments, mu);
    [s, next].iter().chain(&ys).map(|v| v.data().iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn one_pass_gives_the_bits_of_its_parts() {
    let cases = [
        (0, vec![]),
        (1, vec![seg(0, 1, None, Some(2))]),
        (1, vec![seg(0, 1, Some(1), Some(1))]),
        // Four sequences decode together, one of them new.
        (4, (0..4).map(|i| seg(i, 1, (i != 2).then_some(3 - i), Some(i))).collect()),
        // Segments that begin inside a block of rows, at its edge and one after it; a fork; no state wanted.
        (
            100,
            vec![
                seg(0, 31, Some(0), Some(0)),
                seg(31, 1, Some(0), None),
                seg(32, 33, None, Some(2)),
                seg(65, 35, Some(2), Some(3)),
            ],
        ),
        (96, vec![seg(0, 96, None, None)]),
    ];
    for (rows, segments) in cases {
        let segments: Arc<[Segment]> = segments.into();
        for residual in [false, true] {
            for threads in [1, 3] {
                let case = format!("{rows} rows, residual {residual}, {threads} threads");
                let of = |recording| run::<1>(threads, recording, rows, &segments, residual);
                assert!(of(false) == of(true), "1 interpolation of {case}");
                let of = |recording| run::<6>(threads, recording, rows, &segments, residual);
                assert!(of(false) == of(true), "6 interpolations of {case}");
            }
        }
    }
}
