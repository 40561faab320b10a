//! Attention on a GPU: in f32 on CUDA cores, and in 16 bits with heads of 64 or 128 on tensor cores; on Hopper, with heads of 64 and chunks of at least 128, by
//! kernels of its own.
//!
//! What chose what is found for all heads at once, and kept for the way back. The kernels after that work on groups of heads, so that what is between them (partial
//! results of a row for each of its k chunks) stays below a bound that counts no data. Kernels start while those before end, and wait for these by themselves.

use super::plan::{Group, HOPPER_KEYS, HOPPER_TILE, KEYS, Plan, QUERIES, RUN, Way, tile};
use crate::gpu::{int, kernel};
use anser_tensor::cuda::{Arg, Cuda, DevicePtr, Launch, Module};
use anser_tensor::{Buf, Context, DType};

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Threads of the kernel for short chunks.
const SHORT_THREADS: usize = 640;
/// Tokens of a block that looks what a state has forgotten.
const TOKENS: usize = 64;
/// Chunks that are counted, and those that are scored, at a time.
const WINDOW: usize = 1024;
const AT_ONCE: usize = 32;
/// Picks for which candidates are kept, at most so many.
const FEW: usize = 16;
const CANDIDATES: usize = 24;
/// Threads that choose on Hopper, chunks whose means lie together, and the shared memory: queries, two stages of means in two parts, twenty scores with their chunks for each of 256 threads
/// and two rows.
const PICK_THREADS: usize = 288;
const MEANS: usize = 64;
const PICK_BYTES: usize = 1024 + 2 * 64 * (QUERIES + 2 * 2 * MEANS) + 2 * 20 * 256 * (4 + 2);
/// Chunks of a sequence, and counts of one of its heads, that one block sums up.
const ORDERED: usize = 256;
const ORDER: usize = 1 << 12;

/// The picks, and who chose each chunk, of all heads.
pub(super) struct Choice {
    /// i32 [heads, rows, k - 1], on the CPU [rows, heads, k - 1]: past chunks in ascending order, then -1.
    pub picks: Buf,
    lists: Option<Lists>,
}

struct Lists {
    lists: Buf,
    entries: Buf,
    /// Where in `entries` each pick is, which the forward pass uses up: i32 [heads, rows, k - 1].
    places: Option<Buf>,
    /// Two for each head.
    counters: Buf,
}

impl Choice {
    /// Picks alone, as the CPU has them.
    pub fn of(picks: Buf) -> Choice {
        Choice { picks, lists: None }
    }

    /// Addresses of a group's lists and entries and of its `which`-th counter.
    fn addresses(&self, plan: &Plan, group: Group, which: usize) -> [Arg<'static>; 3] {
        let Some(l) = &self.lists else { return [DevicePtr::NULL.into(); 3] };
        let at = |b: &Buf, n: usize| Arg::Ptr(b.ptr().offset(n, DType::F32));
        let first = group.first;
        let entries = at(&l.entries, first * plan.rows * plan.picks());
        [at(&l.lists, first * plan.all.chunks * 4), entries, at(&l.counters, 2 * first + which)]
    }
}

/// Keys of a step there, and queries of a step going back to keys.
fn step(n: usize) -> usize {
    if n == 64 { 64 } else { 32 }
}

/// Bytes of tiles of `rows` rows in shared memory, which are 1024 bytes aligned.
fn shared(rows: usize, n: usize) -> usize {
    1024 + 2 * rows * if n == 64 { 64 } else { n + 8 }
}

/// Launches a kernel that waits for those before by itself (see plan.cuh).
fn launch(gpu: &Cuda, name: &str, grid: [usize; 3], threads: usize, shared: usize, args: &[Arg]) {
    let how = Launch { grid, block: [threads, 1, 1], shared, overlap: true, together: false };
    gpu.launch_as(&KERNELS, name, how, args);
}

/// Means of the chunks that are full and not known.
pub(super) fn means(ctx: &Context, gpu: &Cuda, plan: &Plan) {
    means_in_parts(ctx, gpu, plan, DevicePtr::NULL, false);
}

/// The same, and all of them as two parts, or tiles of these.
fn means_in_parts(ctx: &Context, gpu: &Cuda, plan: &Plan, parts: DevicePtr, in_tiles: bool) {
    let words = plan.words(Way::Forward, plan.all_heads());
    let args = [Arg::Struct(&words), parts.into(), int(plan.n), int(usize::from(in_tiles))];
    let threads = if plan.chunks.size > 512 { 1024 } else { 256 };
    launch(gpu, &kernel(ctx, "chunk_means"), [plan.all.chunks, plan.key_heads, 1], threads, 0, &args);
}

/// Means of chunks, the picks by them, and on tensor cores who chose each chunk.
pub(super) fn choose(ctx: &Context, gpu: &Cuda, plan: &Plan, q: &Buf) -> Choice {
    let picks = ctx.alloc_f32(plan.rows * plan.heads * plan.picks());
    if plan.picks() == 0 {
        return Choice::of(picks);
    }
    let words = plan.words(Way::Forward, plan.all_heads());
    let (head, grid) = (Arg::Struct(&words), [plan.all.queries, plan.heads, 1]);
    if !plan.on_tensor_cores(ctx) {
        means(ctx, gpu, plan);
        let args = [head, q.ptr().into(), picks.ptr().into(), int(plan.n)];
        launch(gpu, &kernel(ctx, "chunk_select"), grid, QUERIES, 0, &args);
        return Choice::of(picks);
    }
    let which = match plan.picks() {
        0..=2 => "2",
        3..=FEW if plan.most_chunks <= 1 << 16 => "16",
        _ => "more",
    };
    let on_hopper = gpu.info().is_hopper() && plan.n == 64 && which == "16";
    let rows = if on_hopper { (plan.all.chunks / MEANS + plan.count) * MEANS } else { plan.all.chunks };
    let parts = ctx.alloc(rows * plan.key_heads * 2 * plan.n);
    means_in_parts(ctx, gpu, plan, parts.ptr(), on_hopper);
    let counts = ctx.alloc_f32(plan.heads * plan.all.counts);
    let counted = plan.most_chunks <= WINDOW && which != "more";
    let to = if counted { counts.ptr() } else { DevicePtr::NULL };
    let args = [head, q.ptr().into(), parts.ptr().into(), picks.ptr().into(), to.into()];
    if on_hopper {
        launch(gpu, &kernel(ctx, "chunk_hopper_pick"), grid, PICK_THREADS, PICK_BYTES, &args);
    } else {
        let name = format!("{}_{}", kernel(ctx, &format!("chunk_select_{which}")), plan.n);
        // Sets of queries, where candidates are kept in the place of scores.
        let rest = if which == "16" { 6 * CANDIDATES * QUERIES } else { 16 * plan.most_chunks.min(WINDOW) };
        let bytes = 4 * AT_ONCE * (QUERIES + 4) + 2 * QUERIES * (plan.n + 8) + rest;
        launch(gpu, &name, grid, QUERIES, bytes, &args[..if which == "more" { 4 } else { 5 }]);
    }
    let lists = Some(lists(ctx, gpu, plan, &picks, &counts, counted));
    Choice { picks, lists }
}

/// errors [heads, count] f32: how badly the state [heads, N, N] f32 gives back each of `count` values under its key, both [count, heads x N].
pub(super) fn forgotten(
    ctx: &Context, gpu: &Cuda, [values, keys]: [DevicePtr; 2], state: &Buf, errors: &Buf, of: [usize; 3],
) {
    let [count, heads, n] = of;
    let name = format!("{}_{n}", kernel(ctx, "chunk_forgotten"));
    let args = [values, keys, state.ptr(), errors.ptr()].map(Arg::from).into_iter().chain([int(count)]);
    let args: Vec<Arg> = args.collect();
    gpu.launch(&KERNELS, &name, [count.div_ceil(TOKENS), heads, 1], [n.max(32), 1, 1], &args);
}

/// sums [heads, count] f32: the shares of `asking` queries' softmax, [.., heads x N], over `count` keys, [.., key heads x N], that each key has.
pub(super) fn asked(ctx: &Context, gpu: &Cuda, [queries, keys]: [DevicePtr; 2], sums: &Buf, of: [usize; 5]) {
    let [asking, count, heads, key_heads, n] = of;
    let lse = ctx.alloc_f32(heads * asking);
    let launch = |name: &str, rows: usize, args: &[Arg<'_>]| {
        let name = format!("{}_{n}", kernel(ctx, name));
        gpu.launch(&KERNELS, &name, [rows.div_ceil(128), heads, 1], [128, 1, 1], args);
    };
    let (wide, narrow) = (int(heads), int(key_heads));
    let args = [queries.into(), keys.into(), lse.ptr().into(), int(asking), int(count), wide, narrow];
    launch("chunk_ask", asking, &args);
    let [lse, sums] = [&lse, sums].map(|b| Arg::Ptr(b.ptr()));
    let args = [keys.into(), queries.into(), lse, sums, int(count), int(asking), narrow, wide];
    launch("chunk_asked", count, &args);
}

/// Turns the picks round. `counts` of runs may be there.
fn lists(ctx: &Context, gpu: &Cuda, plan: &Plan, picks: &Buf, counts: &Buf, counted: bool) -> Lists {
    let heads = plan.heads;
    let lists = ctx.alloc_f32(heads * plan.all.chunks * 4);
    let entries = ctx.alloc_f32(heads * plan.rows * plan.picks());
    let places = plan.on_tensor_cores(ctx).then(|| ctx.alloc_f32(picks.len()));
    let counters = ctx.alloc_f32(2 * heads);
    let words = plan.words(Way::Forward, plan.all_heads());
    let head = Arg::Struct(&words);
    let [p, c, l, e] = [picks, counts, &lists, &entries].map(|b| Arg::Ptr(b.ptr()));
    let to_places = places.as_ref().map_or(DevicePtr::NULL, Buf::ptr).into();
    let (runs, window) = ([plan.all.runs, heads, 1], plan.most_chunks.min(WINDOW));
    if !counted {
        launch(gpu, "chunk_count", runs, 256, 16 * window, &[head, p, c]);
    }
    let lists = Lists { lists, entries, places, counters };
    if plan.most_chunks <= ORDERED && plan.most_counts <= ORDER {
        let args = [head, c, l, int(plan.tile(Way::Forward)), lists.counters.ptr().into(), int(2 * heads)];
        launch(gpu, "chunk_order", [plan.count, heads, 1], 1024, 0, &args);
    } else {
        launch(gpu, "chunk_total", [plan.all.chunks.div_ceil(32), heads, 1], 1024, 0, &[head, c, l]);
        scan(gpu, plan, &lists, Way::Forward);
    }
    // Sets and two numbers of each chunk; entries and where they go, if these are not too many.
    let (fill, staged) =
        if plan.picks() <= FEW { ("chunk_fill", 8 * RUN * plan.picks()) } else { ("chunk_fill_many", 0) };
    launch(gpu, fill, runs, 256, 24 * window + staged, &[head, p, c, l, e, to_places]);
    lists
}

/// Numbers the tiles of lists for a direction, and clears the counters.
fn scan(gpu: &Cuda, plan: &Plan, lists: &Lists, way: Way) {
    let words = plan.words(way, plan.all_heads());
    let (tile, counters) = (int(plan.tile(way)), lists.counters.ptr().into());
    let args = [Arg::Struct(&words), lists.lists.ptr().into(), tile, counters, int(2 * plan.heads)];
    launch(gpu, "chunk_scan", [plan.count, plan.heads, 1], 256, 0, &args);
}

/// y [rows, heads x N] and, if wanted, lse [rows, heads].
pub(super) fn forward(
    ctx: &Context, gpu: &Cuda, plan: &Plan, q: &Buf, choice: &mut Choice, y: &Buf, lse: Option<&Buf>,
) {
    let (n, heads, slots) = (plan.n, plan.heads, plan.chunks.top);
    let lse = lse.map_or(DevicePtr::NULL, Buf::ptr);
    let [q, p, y] = [q, &choice.picks, y].map(|b| Arg::Ptr(b.ptr()));
    if !plan.on_tensor_cores(ctx) {
        let words = plan.words(Way::Forward, plan.all_heads());
        let args = [Arg::Struct(&words), q, p, y, lse.into(), int(n)];
        let grid = [plan.all.queries, heads, 1];
        return launch(gpu, &kernel(ctx, "chunk_forward"), grid, 128, 0, &args);
    }
    let places = choice.lists.as_mut().and_then(|l| l.places.take());
    let name = |base: &str| format!("{}_{n}", kernel(ctx, base));
    let attend = |group: Group, out: Arg<'_>, part_lse: DevicePtr| {
        let words = plan.words(Way::Forward, group);
        let tiles = plan.all.tiles[0];
        let lists = choice.addresses(plan, group, 0);
        let part_lse = part_lse.into();
        let whole = |way: Way, which: usize, share: f64| {
            let rows = 2 * HOPPER_TILE + 4 * 2 * HOPPER_KEYS;
            let words = plan.words(way, group);
            let args = [Arg::Struct(&words), q, out, part_lse, y, lse.into()];
            let lists = choice.addresses(plan, group, which);
            let work = plan.all.tiles[way as usize] * group.len;
            hopper(ctx, gpu, ("chunk_hopper_attend", 512, rows), (work, share), lists, &args);
        };
        if plan.short() {
            if plan.dense > 0 {
                // The next doesn't wait for it, so that its blocks start beside these.
                whole(Way::Dense, 1, plan.dense_share);
            }
            let steps = plan.chunks.size.div_ceil(HOPPER_KEYS);
            // Of each warpgroup queries in as many stages as keys and values, and results, whose rows are longer by an eighth.
            let stages = [3, 2][steps - 1];
            let rows = 3 * stages * 64 + stages * steps * 2 * HOPPER_KEYS + 3 * (64 + 8);
            let kernel = format!("chunk_short_{steps}");
            let args = [Arg::Struct(&words), q, out, part_lse];
            return hopper(ctx, gpu, (&kernel, SHORT_THREADS, rows), (tiles * group.len, 1.0), lists, &args);
        }
        if plan.hopper {
            return whole(Way::Forward, 0, 1.0);
        }
        let [l, e, _] = lists;
        let args = [Arg::Struct(&words), q, l, e, out, part_lse];
        let grid = [tiles.div_ceil(plan.together()), group.len, 1];
        launch(gpu, &name("chunk_attend"), grid, 128, shared(tile(n) + 4 * step(n), n), &args);
    };
    if slots == 1 {
        return attend(plan.all_heads(), y, lse);
    }
    for group in plan.groups(plan.rows * slots * (2 * n + 4)) {
        let parts = ctx.alloc(plan.rows * group.len * slots * n);
        let part_lse = ctx.alloc_f32(plan.rows * group.len * slots);
        attend(group, parts.ptr().into(), part_lse.ptr());
        let words = plan.words(Way::Forward, group);
        let grid = [(plan.rows * group.len * n / 8).div_ceil(128), 1, 1];
        let places = places.as_ref().expect("forward comes once after a choice").ptr().into();
        let args = [Arg::Struct(&words), places, parts.ptr().into(), part_lse.ptr().into(), y, lse.into()];
        // Begun while the kernel before ends it takes a tenth of all time more: it gathers, and seems to get no more first-level cache than that one leaves.
        gpu.launch_with(&KERNELS, &name("chunk_merge"), grid, [128, 1, 1], 0, &args);
    }
}

/// Launches a kernel for Hopper, so many threads a block, on `work` pieces of work: a block on each of a share of the multiprocessors, with `rows` rows of
/// shared memory. The kernel takes the lists and a counter of pieces first.
fn hopper(
    ctx: &Context, gpu: &Cuda, (name, threads, rows): (&str, usize, usize), (work, share): (usize, f64),
    [l, e, mut c]: [Arg<'_>; 3], args: &[Arg<'_>],
) {
    let counter = ctx.alloc_f32(1);
    if matches!(c, Arg::Ptr(DevicePtr::NULL)) {
        gpu.clear(counter.ptr(), 4);
        c = counter.ptr().into();
    }
    let args = [&[l, e, c], args].concat();
    let most = (f64::from(gpu.info().multiprocessors) * share).ceil() as usize;
    let grid = [work.min(most), 1, 1];
    launch(gpu, &kernel(ctx, name), grid, threads, shared(rows, 64), &args);
}

/// dq [rows, heads x N] and dk, dv [rows, key heads x N] of sequences without a past.
pub(super) fn backward(
    ctx: &Context, gpu: &Cuda, plan: &Plan, q: &Buf, choice: &Choice, of: [&Buf; 3], [dq, dk, dv]: [&Buf; 3],
) {
    let share = plan.heads / plan.key_heads;
    if share == 1 {
        return each_head_back(ctx, gpu, plan, q, choice, of, [dq, dk, dv]);
    }
    // Those of each head of queries first.
    let parts: [Buf; 2] = std::array::from_fn(|_| ctx.alloc(plan.rows * plan.heads * plan.n));
    each_head_back(ctx, gpu, plan, q, choice, of, [dq, &parts[0], &parts[1]]);
    for (from, to) in parts.iter().zip([dk, dv]) {
        let threads = plan.rows * plan.key_heads * plan.n / 8;
        let args = [from.ptr().into(), to.ptr().into(), int(threads), int(plan.n / 8), int(share)];
        launch(gpu, &kernel(ctx, "chunk_join"), [threads.div_ceil(256), 1, 1], 256, 0, &args);
    }
}

/// dq, dk, dv [rows, heads x N], as if every head had keys of its own.
fn each_head_back(
    ctx: &Context, gpu: &Cuda, plan: &Plan, q: &Buf, choice: &Choice, [y, dy, lse]: [&Buf; 3], grads: [&Buf; 3],
) {
    let (n, heads, slots) = (plan.n, plan.heads, plan.chunks.top);
    let stats = ctx.alloc_f32(plan.rows * heads * 2);
    let [dq, dk, dv] = grads.map(|b| Arg::Ptr(b.ptr()));
    let [q, y, dy, lse, s, p] = [q, y, dy, lse, &stats, &choice.picks].map(|b| Arg::Ptr(b.ptr()));
    let grid = [(plan.rows * heads * n / 8).div_ceil(256), 1, 1];
    let args = [dy, y, lse, s, int(plan.rows * heads), int(n)];
    launch(gpu, &kernel(ctx, "chunk_stats"), grid, 256, 0, &args);
    if !plan.on_tensor_cores(ctx) {
        let counts = ctx.alloc_f32(plan.heads * plan.all.counts);
        let lists = (slots > 1).then(|| lists(ctx, gpu, plan, &choice.picks, &counts, false));
        let words = plan.words(Way::Backward, plan.all_heads());
        let null = || DevicePtr::NULL.into();
        let l = lists.as_ref().map_or_else(null, |l| l.lists.ptr().into());
        let e = lists.as_ref().map_or_else(null, |l| l.entries.ptr().into());
        let head = Arg::Struct(&words);
        let grid = [plan.all.queries, heads, 1];
        launch(gpu, &kernel(ctx, "chunk_dq"), grid, 128, 0, &[head, q, dy, p, s, dq, int(n)]);
        let grid = [plan.all.chunks, heads, 1];
        let args = [head, q, dy, s, l, e, dk, dv, int(n)];
        return launch(gpu, &kernel(ctx, "chunk_dkv"), grid, 128, 0, &args);
    }
    let name = |base: &str| format!("{}_{n}", kernel(ctx, base));
    if let Some(lists) = &choice.lists {
        scan(gpu, plan, lists, Way::Backward);
    }
    // A head's sums of pieces of lists, which only lists of several need.
    let sums = if slots > 1 { plan.pieces() * 2 * plan.chunks.size * n } else { 0 };
    let bytes = if slots > 1 { plan.rows * slots * 2 * n + 4 * sums } else { 0 };
    let tiles = plan.all.tiles[1];
    for group in plan.groups(bytes) {
        let words = plan.words(Way::Backward, group);
        let head = Arg::Struct(&words);
        let parts = ctx.alloc(if slots > 1 { plan.rows * group.len * slots * n } else { 0 });
        let sums = ctx.alloc_f32(group.len * sums);
        let out = if slots > 1 { parts.ptr().into() } else { dq };
        let back = [head, q, dy, s];
        let to_keys = [sums.ptr().into(), dk, dv];
        if plan.hopper {
            // The second doesn't wait for the first, so that its blocks start where those of the first end.
            let rows = 2 * 2 * HOPPER_TILE + 6 * 2 * 64;
            let lists = choice.addresses(plan, group, 0);
            let args = [&back[..], &[out, dq]].concat();
            hopper(ctx, gpu, ("chunk_hopper_dq", 512, rows), (tiles * group.len, 1.0), lists, &args);
            let lists = choice.addresses(plan, group, 1);
            let args = [&back[..], &to_keys].concat();
            let rows = 2 * 2 * HOPPER_KEYS + 8 * 2 * 64;
            hopper(ctx, gpu, ("chunk_hopper_dkv", 384, rows), (plan.all.pieces * group.len, 1.0), lists, &args);
        } else {
            let [l, e, _] = choice.addresses(plan, group, 0);
            let bytes = shared(2 * tile(n) + 4 * step(n), n);
            let grid = [tiles.div_ceil(plan.together()), group.len, 1];
            launch(gpu, &name("chunk_dq"), grid, 128, bytes, &[&back[..], &[l, e, out]].concat());
            let bytes = shared(2 * KEYS + 4 * step(n), n) + 2 * step(n) * 8;
            let grid = [plan.all.pieces, group.len, 1];
            launch(gpu, &name("chunk_dkv"), grid, 2 * KEYS, bytes, &[&back[..], &[l, e], &to_keys].concat());
        }
        if slots > 1 {
            let grid = [(plan.rows * group.len * n / 8).div_ceil(128), 1, 1];
            launch(gpu, &name("chunk_merge_dq"), grid, 128, 0, &[head, p, parts.ptr().into(), dq]);
            let [l, ..] = choice.addresses(plan, group, 0);
            let grid = [plan.all.chunks * plan.chunks.size.div_ceil(16), group.len, 1];
            launch(gpu, &name("chunk_add_pieces"), grid, 2 * n, 0, &[head, l, sums.ptr().into(), dk, dv]);
        }
    }
}
