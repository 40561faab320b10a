//! A decoding step on a GPU: one token for each of some sequences.
//!
//! With few sequences every weight is used once, so that a step takes what reading the weights takes. The residual stream x [B, C] stays f32;
//! normalised and interpolated vectors and relu(.)^2 are rounded to the type of activations (f16 or bf16), everything else
//! is f32. For up to [`BATCH`] sequences a step is one kernel ([`Program`]), whose blocks, one for each multiprocessor, wait for what they need of each other:
//!
//! | operation | reads, C = 2048, f16 | floor at 2.94 TB/s |
//! | --- | --- | --- |
//! | [`Listing::mixed`], projections: r, k, v and the first halves of the low-rank maps, one matrix [3 C + ranks, C] | 27.3 MB | 9.3 us |
//! | [`Listing::heads`]: second halves, keys, value residual, WKV-7, read-out | 2.1 MB, states 0.5 MB in and out | 1.1 us |
//! | [`Listing::add`], output, C x C | 8.4 MB | 2.9 us |
//! | [`Listing::channels`], key, 4 C x C, squared | 33.6 MB | 11.4 us |
//! | the same, value | half of 4 C x C where half of relu^2 is zero: 16.8 MB | 5.7 us |
//!
//! 30.4 us a layer, and 91 us for the head: 820 us a token. Products run on tensor cores, not for their speed but because they need few
//! instructions for a byte. A block's ring of copies runs through its shares of all matrices without a stop, so that memory is busy while blocks wait and
//! while they make what a product needs (`program.cuh`); normalisation and interpolation stand within the products, whose blocks all make
//! their own input.
//!
//! **Waiting.** Every vector that operations hand on has a place of its own in a step, empty before it ([`Flow`], `flow.cuh`), and who needs a value reads it until it is there: one way to
//! the second-level cache and one back, where waiting for all blocks takes a fence, a count and a look at it first. Two operations do wait for all: the one that adds up what blocks give of a second
//! matrix by inputs, and the one that chooses tokens, after which all places are emptied. Rows of the token before are replaced by an operation that has read something of every block that needed them.
//!
//! **Narrow models.** Up to a width of [`WHOLE`] the second matrix of channel mixing lies by outputs, and [`Listing::squared`] and [`Listing::value`] take the place of [`Listing::channels`]: such a step is more waiting
//! than bytes, and the ring has the matrix before it is known which rows are needed.
//!
//! **Attention.** A block of a hybrid's attention has [`Listing::mixed`] for q, k and v; then the program stops for [`Step::attend`], which is two kernels (the choice of
//! chunks; attention, shared by keys among blocks that fill the GPU), and goes on with [`Listing::add`] before the same channel mixing. Where keys and values lie and
//! how many there are is read from device memory.
//!
//! **More sequences.** With up to [`product_most`] sequences, 64 where there is the shared memory, the large products are [`Step::product`]s, each a kernel whose blocks, one for each multiprocessor, begin to copy weights while the kernel
//! before still runs, and have functions, sums and inputs of their rows within: the projections with the first halves of the low-rank maps are one, relu^2 is in another, and where an
//! output's sum is split among blocks, as for the matrices of C outputs, [`Step::mix`] adds up the parts when it takes the residual stream. Eight kernels a layer: mix, projections, second halves
//! ([`Step::second_halves`]), [`Step::heads`], output, mix, key, value. With more the products are the matrix library's, r, k and v in one call, and [`Step::low_rank`] and [`Step::relu_squared`] stand between;
//! since the library's kernels don't start early, the small one before each fetches what it reads first ([`Ahead`]). The second matrix of channel mixing is read whole: with more sequences hardly
//! a row is under zeros of all. From about 100 sequences on states are most of what a step moves; kept in f16 they are half of that.
//!
//! **8 bits.** Matrices in codes ([`anser_tensor::CodedPlaces`]) are read by a program of their own for few sequences with activations in f16, in which channel mixing is [`Listing::squared`] and
//! [`Listing::value`]: with half of the bytes it costs less to read rows under zeros ahead of time than to know first which are needed. For any number there are [`Step::product`]s, more than 64 sequences in several
//! launches. Codes become f16 or bf16 in registers.
//!
//! **Sums.** Of few sequences a row of a product is summed within tiles, then over warps, then over blocks, in order: the same bits every time, whatever the other
//! sequences of the batch are; skipped rows are products with zero, which leave a sum as it is, and which rows a thread has does not depend on what is skipped. In a [`Step::product`] the order is that of the pieces, which
//! is the same for any number of sequences, though not that of few. The library and [`Step::low_rank`] share a sum as suits the number of
//! sequences: the same bits for the same number every time, but not the same for another.

use crate::gpu::{int, kernel, pointers, size};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Launch, Module};
use anser_tensor::{Buf, Context, DType};

mod attend;
mod low_rank;
mod product;
mod program;

pub use attend::{Attend, Attended};
pub use low_rank::LowRanks;
pub use product::{Lie, Matrix, Pieces, Run, Through, To, product_most};
pub use program::{FewHeads, Flow, Kinds, Listing, Mix, Plan, Program, Shift, Size, program_most};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Sequences of a [`Program`] at most.
pub const BATCH: usize = 4;
/// Sequences of a step at most.
pub const MOST: usize = 1024;
/// Width up to which the second matrix of channel mixing lies by outputs in 16 bits too, and is read whole by few sequences.
pub const WHOLE: usize = 1024;

/// A matrix [rows, cols] of activations of which a part is brought into the second-level cache while a small kernel before its product runs: of every row
/// of [out, in] the first columns, with which the product begins, and of [in, out] the first rows.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// The matrix.
    pub at: DevicePtr,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Whether it is [in, out].
    pub by_inputs: bool,
}

impl Ahead {
    /// Bytes: what memory gives in the 3 us or so that such a kernel takes.
    const BYTES: usize = 8 << 20;
    /// Blocks that fetch.
    const BLOCKS: usize = 64;

    /// The matrix and, as the kernels have them, rows, bytes from one to the next, and bytes of each in whole lines of the cache.
    fn args(&self, dtype: DType) -> [Arg<'static>; 2] {
        let pitch = self.cols * dtype.size();
        let (rows, width) = match self.by_inputs {
            true => (self.rows.min(Self::BYTES / pitch), pitch),
            false => (self.rows, pitch.min(Self::BYTES / self.rows)),
        };
        let mut words = [0; 8];
        words.iter_mut().zip([rows, pitch, width / 128 * 128]).for_each(|(to, v)| *to = v as i32);
        [self.at.into(), Arg::Words(words)]
    }
}

/// Weight and bias of a normalisation, f32.
pub type Norm = [DevicePtr; 2];

/// The vectors of one head step; see [`Step::heads`].
#[derive(Clone, Copy)]
pub struct Heads {
    /// w0, a0, v0, k_k, k_a, r_k, f32.
    pub vectors: [DevicePtr; 6],
    /// GroupNorm.
    pub ln_x: Norm,
}

/// Whether the kernels of more sequences hold vectors of width `c` and heads of `n`.
pub fn fits(c: usize, n: usize) -> bool {
    c <= 8192 && (n == 64 || n == 128)
}

/// A step for `batch` sequences of width `c` with heads of `n`.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// The context.
    pub ctx: &'a Context,
    /// Its GPU.
    pub gpu: &'a Cuda,
    /// Sequences.
    pub batch: usize,
    /// Channels.
    pub c: usize,
    /// Head size.
    pub n: usize,
}

impl Step<'_> {
    fn launch(&self, name: &str, grid: [usize; 3], threads: usize, shared: usize, overlap: bool, args: &[Arg]) {
        self.gpu.launch_as(
            &KERNELS,
            name,
            Launch { grid, block: [threads, 1, 1], shared, overlap, together: false },
            args,
        );
    }

    /// Threads of a block that holds a row.
    fn row_threads(&self) -> usize {
        self.c.div_ceil(8).next_multiple_of(32).min(256)
    }

    /// Vectors of a row that each of `threads` holds: the kernels that there are.
    fn held(&self, threads: usize) -> usize {
        self.c.div_ceil(8 * threads).next_power_of_two()
    }

    /// x [batch, C] = LayerNorm of the tokens' rows of `table` [V, C].
    pub fn embed(&self, table: DevicePtr, tokens: DevicePtr, x: DevicePtr, norm: Norm) {
        let args = [table, tokens, x, norm[0], norm[1]].map(Arg::from).into_iter().chain([int(self.c)]);
        let args: Vec<Arg> = args.collect();
        let name = format!("decode_embed_{}", self.held(self.row_threads()));
        self.launch(&kernel(self.ctx, &name), [self.batch, 1, 1], self.row_threads(), 0, false, &args);
    }

    /// x += `parts` [n, batch, C]; y [K, batch, C]: K interpolations between LayerNorm(x) and the rows `slots` of `last` [slots, C], which are replaced; K = 0: LayerNorm(x)
    /// only. `ahead` is the matrix of the library's product after it.
    pub fn mix<const K: usize>(
        &self, x: DevicePtr, (parts, n): (DevicePtr, usize), y: DevicePtr, last: DevicePtr, slots: DevicePtr,
        norm: Norm, mu: [DevicePtr; K], ahead: Option<Ahead>,
    ) {
        let mut args = vec![x.into(), parts.into(), int(n)];
        args.extend([y, last, slots, norm[0], norm[1]].map(Arg::from));
        args.push(pointers(mu));
        match ahead {
            Some(ahead) => args.extend(ahead.args(self.ctx.dtype())),
            None => args.extend([DevicePtr::NULL.into(), Arg::Words([0; 8])]),
        }
        args.push(int(self.c));
        let name = kernel(self.ctx, &format!("decode_mix{K}_{}", self.held(self.row_threads())));
        let more = if ahead.is_some() { Ahead::BLOCKS.div_ceil(self.batch) } else { 0 };
        self.launch(&name, [self.batch, 1 + more, 1], self.row_threads(), 0, true, &args);
    }

    /// Heads from r, k and v `projected` [3, batch, C] and low-rank maps `mapped` [4, batch, C] ([`Step::low_rank`]), both f32, to `out` [batch, C]; `first`
    /// [batch, C] f32 holds the values of layer 0, and is written by it, which has no value gate (`gated`); `state` [slots, heads, N, N] f32 or f16 is advanced
    /// in the rows `slots`. `wrote` [2, batch, C] becomes value and key that the state takes up, in the type of activations, unless it is null.
    pub fn heads(
        &self, [projected, mapped]: [DevicePtr; 2], gated: bool, w: &Heads, first: DevicePtr, state: &Buf,
        slots: DevicePtr, wrote: DevicePtr, out: DevicePtr,
    ) {
        let mut args = vec![projected.into(), size(self.batch * self.c), mapped.into(), int(usize::from(gated))];
        args.extend([pointers(w.vectors), pointers(w.ln_x)]);
        args.extend([first, state.ptr(), slots, wrote, out].map(Arg::from));
        args.push(int(self.c));
        let name = kernel(self.ctx, &format!("decode_heads_{}_{}", self.n, state.dtype()));
        self.launch(&name, [self.c / self.n, self.batch, 1], 4 * self.n, 0, true, &args);
    }

    /// relu(.)^2 of `n` activations in place. `ahead` is the matrix of the product after it.
    pub fn relu_squared(&self, x: DevicePtr, n: usize, ahead: Ahead) {
        let ([blocks, ..], [threads, ..]) = self.gpu.walk(n);
        let grid = [blocks, 1 + Ahead::BLOCKS.div_ceil(blocks), 1];
        let [next, ahead] = ahead.args(self.ctx.dtype());
        let name = kernel(self.ctx, "decode_relu_squared");
        self.launch(&name, grid, threads, 0, true, &[x.into(), next, ahead, size(n / 8)]);
    }

    /// `token[batch]` = the most probable of logits [batch, V], the first of equals.
    pub fn argmax(&self, logits: DevicePtr, token: DevicePtr, vocab: usize) {
        let args = [logits.into(), token.into(), int(vocab)];
        self.launch("decode_argmax", [self.batch, 1, 1], 1024, 0, true, &args);
    }
}
