//! WKV-7 alone, forward and both passes, with the share of the machine's multiply-add peak (10 N^2 and about 35 N^2 operations
//! a token and head).

use anser_ops::wkv7::Wkv7Inputs;
use anser_ops::{ParamSet, Tape, Var, batch};
use anser_tensor::Context;
use criterion::{BenchmarkId, Criterion, Throughput};

fn wkv7(c: &mut Criterion) {
    let ctx = Context::cpu(0);
    let mut group = c.benchmark_group("wkv7");
    for (b, t, h, n) in [(8, 128, 4, 64), (4, 512, 12, 64), (1, 2048, 12, 64), (8, 128, 8, 32)] {
        let (rows, width) = (b * t, h * n);
        let inputs: Vec<Var> = (0..6)
            .map(|i| {
                let mut x = ctx.alloc(rows * width);
                x.iter_mut().enumerate().for_each(|(j, x)| *x = (j as f32 * 0.37 + i as f32).sin() * 0.2);
                Var::leaf(rows, width, x)
            })
            .collect();
        let state = Var::constant(0, width * n, ctx.alloc(0));
        let segments = batch(b, t, false).into();
        let params = ParamSet::default();
        let [r, w, k, v, a, b_] = &inputs[..] else { unreachable!() };
        let x = Wkv7Inputs { r, w, k, v, a, b: b_ };
        group.throughput(Throughput::Elements(rows as u64));
        let name = format!("B{b} T{t} H{h} N{n}");
        group.bench_function(BenchmarkId::new("forward", &name), |bench| {
            bench.iter(|| Tape::inference(&ctx, &params).wkv7(x, &state, &segments, h).0.data()[0])
        });
        group.bench_function(BenchmarkId::new("forward and backward", &name), |bench| {
            bench.iter(|| {
                let mut none = ctx.alloc_f32(0);
                let mut tape = Tape::recording(&ctx, &params, &mut none);
                let (y, _) = tape.wkv7(x, &state, &segments, h);
                y.add_grad(ctx.zeros(rows * width));
                tape.backward();
                inputs.iter().for_each(|v| drop(v.take_grad()));
            })
        });
    }
}

fn main() {
    let mut c = Criterion::default().configure_from_args();
    wkv7(&mut c);
    c.final_summary();
}
