// The same on Hopper, for heads of 64 and chunks that fill a step: products by wgmma, copies by warps of their own.
//
// A block stays on its multiprocessor and takes one batch of tiles after another, of any head of the group, from a counter. One warp finds out what they
// are. Three copy: what a tile starts with (its head: rows that all steps are multiplied with), and what it meets step by step, into rings of stages.
// Warpgroups of 64 rows each compute, one its products while others are at their exponentials. Nothing depends on which block takes a tile.
//
// Queries of a sequence's first k chunks see all keys before them: their tiles go over these in one piece and write what is the whole result, so that they are
// in no list and have nothing to merge. A copy of sixteen bytes a lane takes few instructions besides, since those that compute need the slots: four at most.
#pragma once
#include "tensor.cuh"
#include "wgmma.cuh"

#ifdef ANSER_HOPPER
namespace chunks {
namespace hopper {

// Warpgroups that compute, of 64 rows each: rows of a tile; threads that compute. Of the four warps after them two copy what a step has, its two matrices,
// one copies heads, and the last one finds tiles. Where tiles have few steps and heads of two matrices, one copies steps and two copy heads ("apart").
template <int GROUPS> struct Team {
    static constexpr int ROWS = 64 * GROUPS, COMPUTING = 128 * GROUPS, THREADS = COMPUTING + 128;
};
enum Role { FIRST, SECOND, HEADS_OF, FINDER };
constexpr int BATCHES = 2, BATCH = 8;

// A place in a ring of N and the parity of its phase.
template <int N> struct Place {
    static constexpr int COUNT = N;
    int at = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == N) {
            at = 0;
            parity ^= 1;
        }
    }
};

// Of stages of heads, of steps and of batches, each full and empty.
template <int HEADS, int STEPS> struct Barriers {
    uint64_t all[2 * (HEADS + STEPS + BATCHES)];
};
template <class Team, int HEADS, int STEPS> struct Signals {
    Address at;
    __device__ __forceinline__ Address head_full(int i) const { return at + 8 * i; }
    __device__ __forceinline__ Address head_empty(int i) const { return at + 8 * (HEADS + i); }
    __device__ __forceinline__ Address step_full(int i) const { return at + 8 * (2 * HEADS + i); }
    __device__ __forceinline__ Address step_empty(int i) const { return at + 8 * (2 * HEADS + STEPS + i); }
    __device__ __forceinline__ Address batch_full(int i) const { return at + 8 * (2 * (HEADS + STEPS) + i); }
    __device__ __forceinline__ Address batch_empty(int i) const { return at + 8 * (2 * (HEADS + STEPS) + BATCHES + i); }

    __device__ __forceinline__ Signals(Barriers<HEADS, STEPS>& b, bool apart = false) : at(kept(address_of(&b))) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < HEADS; i++) {
                barrier_init(head_full(i), apart ? 2 * 33 : 33); // a warp's lanes when copies are there, and the warp when other things are
                barrier_init(head_empty(i), Team::COMPUTING / 32);
            }
            for (int i = 0; i < STEPS; i++) {
                barrier_init(step_full(i), apart ? 32 : 2 * 32);
                barrier_init(step_empty(i), Team::COMPUTING / 32);
            }
            for (int i = 0; i < BATCHES; i++) {
                barrier_init(batch_full(i), 1);
                barrier_init(batch_empty(i), 3);
            }
            fence_for_products();
        }
        __syncthreads();
    }
};
// By a warp that is done with a stage, or has filled it.
__device__ __forceinline__ void release(Address b) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(b);
}

// Finds batches of tiles [BATCHES, BATCH], `batch` at a time: `find(i, t)` makes t tile i of `count`; later ones say that nothing comes any more.
template <class Signals, class Tile, class Find> __device__ __forceinline__ void find_tiles(const Signals& signals, Tile* batches, int batch, int count, int* counter, Find find) {
    const int lane = threadIdx.x % 32;
    Place<BATCHES> place;
    for (int first = 0; first < count; place.next()) {
        barrier_wait(signals.batch_empty(place.at), place.parity ^ 1);
        if (lane == 0) first = atomicAdd(counter, batch);
        first = __shfl_sync(~0u, first, 0);
        if (lane < batch) find(first + lane, batches[place.at * BATCH + lane]);
        release(signals.batch_full(place.at));
    }
}

// A warp copies COUNT rows of a matrix whose rows are `stride` apart, from column `from` on; `row(r)` is the number of row r, -1: zeros. The lanes of a quarter warp
// have a row, each a vector of it, and every other four rows have the vectors' order turned.
template <int COUNT, class T, class Row> __device__ __forceinline__ void copy_rows(T* to, const T* from, unsigned stride, Row row) {
    const int lane = threadIdx.x % 32, r = lane / 8, col = lane % 8 * 8;
    T *even = to + chunks::place<64>(r, col), *odd = to + chunks::place<64>(r + 4, col);
    const T* column = from + col;
#pragma unroll 4
    for (int i = 0; i < COUNT / 8; i++) {
        const int a = row(8 * i + r), b = row(8 * i + 4 + r);
        copy_async(even + 512 * i, column + size_t(unsigned(max(a, 0))) * stride, a >= 0);
        copy_async(odd + 512 * i, column + size_t(unsigned(max(b, 0))) * stride, b >= 0);
    }
}
// The same of neighbouring rows, zeros from row `end` on.
template <int COUNT, class T> __device__ __forceinline__ void copy_span(T* to, const T* from, unsigned stride, int first, int end) {
    if (first + COUNT > end) return copy_rows<COUNT>(to, from, stride, [&](int r) { return first + r < end ? first + r : -1; });
    const int lane = threadIdx.x % 32, r = lane / 8, col = lane % 8 * 8;
    T *even = to + chunks::place<64>(r, col), *odd = to + chunks::place<64>(r + 4, col);
    const T* at = from + size_t(unsigned(first + r)) * stride + col;
#pragma unroll 4
    for (int i = 0; i < COUNT / 8; i++) {
        copy_async(even + 512 * i, at);
        copy_async(odd + 512 * i, at + size_t(stride) * 4);
        at += size_t(stride) * 8;
    }
}

// Tiles of queries and the keys that they see: SIDES matrices of queries, with two of them statistics, and KEYS keys a step.
template <class T, int GROUPS, int SIDES, int KEYS, int HEADS, int STEPS> struct Queries {
    using Team = hopper::Team<GROUPS>;
    static constexpr int ROWS = Team::ROWS, HEAD = SIDES * ROWS * 64, STEP = 2 * KEYS * 64;
    using HeadPlace = Place<HEADS>;
    using StepPlace = Place<STEPS>;
    using Signals = hopper::Signals<Team, HEADS, STEPS>;
    Barriers<HEADS, STEPS> barriers;
    Tile batches[BATCHES * BATCH], tiles[HEADS];
    int entry[SIDES][HEADS][ROWS];
    float2 stat[HEADS][SIDES == 2 ? ROWS : 1];

    __device__ __forceinline__ void find(const Plan& p, const Signals& signals, const List* lists, const int* entries, int* counter) {
        find_tiles(signals, batches, p.together, p.tiles * p.group, counter, [&](int i, Tile& t) {
            // Long ones of all heads come first. After p.ahead backwards: tiles of neighbours, some of them short, come last.
            const int at = i / p.group;
            if (at < p.tiles) tile_of<Team::ROWS, true>(t, p, lists, entries, at < p.ahead ? p.ahead - 1 - at : p.tiles - 1 - (at - p.ahead), i % p.group);
            else t.count = -1;
        });
    }
    __device__ __forceinline__ static bool apart(const Plan& p) { return SIDES == 2 && p.together > 1; }

    // Heads: the tiles' queries, matrices FROM up to TO.
    template <int FROM, int TO>
    __device__ __forceinline__ void copy_heads(const Plan& p, const Signals& signals, const T* const (&sides)[SIDES], const float2* stats, T* heads) {
        constexpr bool AHEAD = SIDES == 2; // entries are fetched one tile ahead
        const int lane = threadIdx.x % 32;
        HeadPlace h;
        for (Place<BATCHES> batch;; batch.next()) {
            barrier_wait(signals.batch_full(batch.at), batch.parity);
            const Tile* list = batches + batch.at * BATCH;
            int next[ROWS / 32];
            const auto fetch = [&](const Tile& t) {
#pragma unroll
                for (int i = 0; i < ROWS / 32; i++) next[i] = t.entry(p, lane + 32 * i);
            };
            if (AHEAD) fetch(list[0]);
            for (int j = 0; j < p.together; j++) {
                const Tile& t = list[j];
                if (!AHEAD) fetch(t);
                const bool nothing = t.count == 0;
                if (!nothing) {
                    barrier_wait(signals.head_empty(h.at), h.parity ^ 1);
                    if (FROM == 0 && lane == 0) tiles[h.at] = t;
#pragma unroll
                    for (int i = 0; i < ROWS / 32; i++) entry[FROM][h.at][lane + 32 * i] = next[i];
                    __syncwarp();
                }
                if (AHEAD && j + 1 < p.together) fetch(list[j + 1]);
                if (nothing) continue;
                const int count = t.count;
                if (count > 0) {
                    const int head = p.first + t.y, mask = (1 << p.bits) - 1;
                    const int* entries = entry[FROM][h.at];
                    const auto row = [&](int r) { return entries[r] < 0 ? -1 : entries[r] & mask; };
                    for (int side = FROM; side < TO; side++)
                        copy_rows<ROWS>(heads + h.at * HEAD + side * ROWS * 64, sides[side] + head * 64, p.heads * 64, row);
                    for (int r = lane; SIDES == 2 && FROM == 0 && r < ROWS; r += 32) copy_async_8(&stat[h.at][r], stats + size_t(max(row(r), 0)) * p.heads + head, row(r) >= 0);
                }
                barrier_arrive_copied(signals.head_full(h.at));
                release(signals.head_full(h.at));
                if (count < 0) return;
                h.next();
            }
            release(signals.batch_empty(batch.at));
        }
    }
    // Steps: the tiles' keys, values or both.
    template <bool OF_KEYS, bool OF_VALUES> __device__ __forceinline__ void copy_steps(const Plan& p, const Signals& signals, T* stages) {
        StepPlace step;
        for (Place<BATCHES> batch;; batch.next()) {
            barrier_wait(signals.batch_full(batch.at), batch.parity);
            for (int j = 0; j < p.together; j++) {
                const Tile& t = batches[batch.at * BATCH + j];
                if (t.count < 0) return;
                if (t.count == 0) continue;
                const int to = t.to, column = (p.first + t.y) / p.share * 64;
                for (int key = t.from; key < to; key += KEYS) {
                    barrier_wait(signals.step_empty(step.at), step.parity ^ 1);
                    T* at = stages + step.at * STEP;
                    if (OF_KEYS) copy_span<KEYS>(at, static_cast<const T*>(t.keys) + column, p.key_heads * 64, key, to);
                    if (OF_VALUES) copy_span<KEYS>(at + KEYS * 64, static_cast<const T*>(t.values) + column, p.key_heads * 64, key, to);
                    barrier_arrive_copied(signals.step_full(step.at));
                    step.next();
                }
            }
            release(signals.batch_empty(batch.at));
        }
    }
    // What a warp beside those that compute does.
    __device__ __forceinline__ void serve(const Plan& p, const Signals& signals, const T* const (&sides)[SIDES], const float2* stats, const List* lists,
                                          const int* entries, int* counter, T* heads, T* stages) {
        switch (threadIdx.x / 32 - Team::COMPUTING / 32) {
        case FIRST: return SIDES == 2 && apart(p) ? copy_steps<true, true>(p, signals, stages) : copy_steps<true, false>(p, signals, stages);
        case SECOND: return SIDES == 2 && apart(p) ? copy_heads<SIDES - 1, SIDES>(p, signals, sides, stats, heads) : copy_steps<false, true>(p, signals, stages);
        case HEADS_OF: return SIDES == 2 && apart(p) ? copy_heads<0, 1>(p, signals, sides, stats, heads) : copy_heads<0, SIDES>(p, signals, sides, stats, heads);
        default: return find(p, signals, lists, entries, counter);
        }
    }
};

// Writes the warpgroup's rows, each times its factor, to their slots in out [rows, group, slots, 64] or, if they are whole, to whole [rows, heads, 64], by way
// of shared memory.
template <class T> __device__ __forceinline__ void store_rows(const Plan& p, T* out, T* whole, T* tile, const int* entries, int y, const float (&o)[8][4], const float (&factor)[2]) {
    const int lane = threadIdx.x % 32;
    wait_barrier(1 + threadIdx.x / 128, 128); // products that read the tile are done in all warps
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int k = 0; k < 8; k++)
            *reinterpret_cast<uint32_t*>(tile + place<64>(row_of(0, half), 8 * k + lane % 4 * 2)) =
                pack<T>(o[k][2 * half] * factor[half], o[k][2 * half + 1] * factor[half]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = threadIdx.x / 32 * 16 + 4 * i + lane / 8, col = lane % 8 * 8, e = entries[r];
        if (e < 0) continue;
        const int row = row_in(p, e), slot = slot_in(p, e);
        T* to = slot == p.slots ? vector_of<64>(p, whole, row, p.first + y) : out + ((size_t(row) * p.group + y) * p.slots + slot) * 64;
        *reinterpret_cast<uint4*>(to + col) = *reinterpret_cast<const uint4*>(tile + place<64>(r, col));
    }
}

// Steps of KEYS keys of a tile that the warpgroup's rows see any of, and the keys that a lane's two rows see.
template <int KEYS> struct Span {
    int begin, end, steps;
    int all_from, all_to; // keys that every row of the warpgroup sees
    int low[2], high[2];  // first and last key

    __device__ __forceinline__ Span(const Plan& p, const Tile& t) {
        const int from = threadIdx.x / 128 * 64, first = t.position + from, last = t.position + min(from + 64, t.count) - 1;
        steps = (t.to - t.from + KEYS - 1) / KEYS;
        if (t.entries) {
            begin = 0;
            end = from < t.count ? steps : 0;
            all_from = low[0] = low[1] = t.from;
            all_to = high[0] = high[1] = t.to - 1;
            return;
        }
        begin = from < t.count ? (low_of(p, first) - t.from) / KEYS : 0;
        end = from < t.count ? (last - t.from) / KEYS + 1 : 0;
        all_from = low_of(p, last);
        all_to = first;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            high[half] = t.position + row_of(0, half);
            low[half] = low_of(p, high[half]);
        }
    }
    // Sets what isn't seen of the step's keys from `key` on to `value`.
    __device__ __forceinline__ void mask(float (&s)[KEYS / 8][4], int key, float value) const {
        if (key >= all_from && key + KEYS - 1 <= all_to) return;
        const int mine = key + threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int from = low[half] - mine, to = high[half] - mine;
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                const int at = i / 2 * 8 + i % 2;
                if (at < from || at > to) s[i / 2][2 * half + i % 2] = value;
            }
        }
    }
};

template <class T> using Forward = Queries<T, 3, 1, 128, 2, 4>;

// out [rows, group, slots, 64]; lse as `Tile::log_of` says, may be null; y [rows, heads, 64] and y_lse [rows, heads], may be null, of dense rows.
template <class T>
__device__ __forceinline__ void attend(const Plan& p, const T* q, const List* lists, const int* entries, int* counter, T* out, float* lse, T* y, float* y_lse) {
    using Work = Forward<T>;
    constexpr int KEYS = 128;
    DYNAMIC_SHARED(memory);
    __shared__ Work work;
    T *heads = aligned<T>(memory), *stages = heads + Work::HeadPlace::COUNT * Work::HEAD;
    const typename Work::Signals signals(work.barriers);
    wait_for_previous(); // so that what starts next, which may not wait, sees all before
    let_next_start();
    if (threadIdx.x >= Work::Team::COMPUTING) {
        fewer_registers<32>();
        const T* const sides[1] = {q};
        work.serve(p, signals, sides, nullptr, lists, entries, counter, heads, stages);
    } else {
        more_registers<160>();
        const int lane = threadIdx.x % 32;
        const float scale = 0.125f * LOG2E;
        const uint64_t first = operand(address_of(stages)), rows = operand_at(operand(address_of(heads)), __shfl_sync(~0u, int(threadIdx.x / 128), 0) * 64 * 128);
        typename Work::HeadPlace head;
        typename Work::StepPlace place;
        for (;; head.next()) {
            barrier_wait(signals.head_full(head.at), head.parity);
            fence_for_products();
            const Tile t = work.tiles[head.at];
            if (t.count < 0) break;
            const uint64_t a = uniform(operand_at(rows, head.at * Work::HEAD * 2));
            uint32_t w[KEYS / 16][4];
            float s[KEYS / 8][4], o[8][4], base[2] = {0.f, 0.f}, limit[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f}, keep[2] = {1.f, 1.f};
            bool rises = false;
#pragma unroll
            for (int i = 0; i < 32; i++) o[i / 4][i % 4] = 0.f;
            const Span<KEYS> span(p, t);
            int last = 0; // stage of the step before
            const auto wait = [&] {
                barrier_wait(signals.step_full(place.at), place.parity);
                fence_for_products();
            };
            const auto skip = [&] {
                wait();
                release(signals.step_empty(place.at));
                place.next();
            };
            const auto scores = [&] { begin_times_rows<T>(s, a, uniform(operand_at(first, place.at * Work::STEP * 2))); };
            const auto values = [&] { begin_add_product<T>(o, w, uniform(operand_at(first, last * Work::STEP * 2 + KEYS * 128))); };
            // Scores become weights, by a base that a row's scores have exceeded by 2^8 at most; where that rises, what there was before is kept in part.
            const auto softmax = [&](int step) {
                span.mask(s, t.from + step * KEYS, -INFINITY);
                float most[2][2];
                rises = false;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    most[half][0] = most[half][1] = -INFINITY;
#pragma unroll
                    for (int j = 0; j < KEYS / 8; j++) most[half][j % 2] = fmaxf(most[half][j % 2], fmaxf(s[j][2 * half], s[j][2 * half + 1]));
                    most[half][0] = fmaxf(most[half][0], most[half][1]);
                    rises = rises || most[half][0] > limit[half];
                }
                rises = __any_sync(~0u, rises);
                if (rises) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float top = most[half][0];
                        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                        keep[half] = 1.f;
                        if (top > limit[half]) {
                            keep[half] = limit[half] == -INFINITY ? 0.f : exp2_fast(base[half] - top * scale);
                            base[half] = top * scale;
                            limit[half] = top + 8.f / scale;
                            total[half] *= keep[half];
                        }
                    }
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float sum[2] = {total[half], 0.f};
#pragma unroll
                    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            s[j][2 * half + e] = exp2_fast(fmaf(s[j][2 * half + e], scale, -base[half]));
                            sum[e] += s[j][2 * half + e];
                        }
                    total[half] = sum[0] + sum[1];
                }
            };
            const auto pack_weights = [&] {
#pragma unroll
                for (int j = 0; j < KEYS / 16; j++) as_a<T>(w[j], s[2 * j], s[2 * j + 1]);
            };
            int step = 0;
            for (; step < span.begin; step++) skip();
            if (step < span.end) {
                wait();
                products_begin();
                scores();
                products_commit();
                products_wait<0>();
                keep_order(s);
                softmax(step);
                pack_weights();
                last = place.at;
                place.next();
                // The scores of a step come while the values of the one before are added up.
                for (step++; step < span.end; step++) {
                    wait();
                    keep_order(s);
                    keep_order(o);
                    products_begin();
                    scores();
                    products_commit();
                    values();
                    products_commit();
                    products_wait<1>();
                    keep_order(s);
                    if (p.size > 0) softmax(step); // always; without a branch the compiler waits for the values first
                    keep_order(s);
                    products_wait<0>();
                    keep_order(o);
                    release(signals.step_empty(last));
                    if (rises) {
#pragma unroll
                        for (int k = 0; k < 32; k++) o[k / 4][k % 4] *= keep[k % 4 / 2];
                    }
                    pack_weights();
                    last = place.at;
                    place.next();
                }
                keep_order(o);
                products_begin();
                values();
                products_commit();
                products_wait<0>();
                keep_order(o);
                release(signals.step_empty(last));
            }
            for (; step < span.steps; step++) skip();

            float factor[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = total[half];
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                factor[half] = reciprocal(sum);
                const int r = row_of(0, half), e = work.entry[0][head.at][r];
                if (e >= 0 && lane % 4 == 0) {
                    const float value = (base[half] + log2f(sum)) * (1.f / LOG2E);
                    if (slot_in(p, e) == p.slots) {
                        if (y_lse) y_lse[size_t(row_in(p, e)) * p.heads + p.first + t.y] = value;
                    } else if (lse) {
                        lse[t.log_of(p, entries, r)] = value;
                    }
                }
            }
            store_rows(p, out, y, heads + head.at * Work::HEAD, work.entry[0][head.at], t.y, o, factor);
            release(signals.head_empty(head.at));
        }
    }
}

} // namespace hopper
} // namespace chunks
#endif
