// The same on Hopper, for heads of 64 and chunks that fill a step: products by wgmma, copies by warps of their own.
//
// A block stays on its multiprocessor and takes one batch of tiles after another, of any head of the group, from a counter. One warp finds out what they
// are. Two warps copy: what a tile starts with (its head: rows that all steps are multiplied with), then what it meets step by step, into rings of stages.
// Two warpgroups of 64 rows each compute, one its products while the other one is at its exponentials. Nothing depends on which block takes a tile.
#pragma once
#include "tensor.cuh"
#include "wgmma.cuh"

#ifdef ANSER_HOPPER
namespace chunks {
namespace hopper {

constexpr int ROWS = 128, COMPUTING = 256, THREADS = 384; // rows of a tile; threads that compute; all
constexpr int COPIERS = 2, FINDER = 8 + COPIERS;          // warps that copy; number of the warp that finds
constexpr int BATCHES = 2, BATCH = 8;

// A place in a ring of N and the parity of its phase.
template <int N> struct Place {
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
template <int HEADS, int STEPS> struct Signals {
    Address at;
    __device__ __forceinline__ Address head_full(int i) const { return at + 8 * i; }
    __device__ __forceinline__ Address head_empty(int i) const { return at + 8 * (HEADS + i); }
    __device__ __forceinline__ Address step_full(int i) const { return at + 8 * (2 * HEADS + i); }
    __device__ __forceinline__ Address step_empty(int i) const { return at + 8 * (2 * HEADS + STEPS + i); }
    __device__ __forceinline__ Address batch_full(int i) const { return at + 8 * (2 * (HEADS + STEPS) + i); }
    __device__ __forceinline__ Address batch_empty(int i) const { return at + 8 * (2 * (HEADS + STEPS) + BATCHES + i); }

    __device__ __forceinline__ Signals(Barriers<HEADS, STEPS>& b) : at(address_of(&b)) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < HEADS; i++) {
                barrier_init(head_full(i), COPIERS * 33); // a warp's lanes when copies are there, and the warp when other things are
                barrier_init(head_empty(i), COMPUTING / 32);
            }
            for (int i = 0; i < STEPS; i++) {
                barrier_init(step_full(i), COPIERS * 32);
                barrier_init(step_empty(i), COMPUTING / 32);
            }
            for (int i = 0; i < BATCHES; i++) {
                barrier_init(batch_full(i), 1);
                barrier_init(batch_empty(i), COPIERS);
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

// Finds batches of tiles [BATCHES, BATCH], `batch` at a time: `find(i)` is tile i of `count`, later ones say that nothing comes any more.
template <class Signals, class Tile, class Find> __device__ __forceinline__ void find_tiles(const Signals& signals, Tile* batches, int batch, int count, int* counter, Find find) {
    const int lane = threadIdx.x % 32;
    Place<BATCHES> place;
    for (int first = 0; first < count; place.next()) {
        barrier_wait(signals.batch_empty(place.at), place.parity ^ 1);
        if (lane == 0) first = atomicAdd(counter, batch);
        first = __shfl_sync(~0u, first, 0);
        if (lane < batch) batches[place.at * BATCH + lane] = find(first + lane);
        release(signals.batch_full(place.at));
    }
}

// A warp copies 32 rows of a head; lane r has the number of row r, -1: zeros. `to` is a multiple of eight rows.
template <class T> __device__ __forceinline__ void copy_rows(const Plan& p, T* to, const T* from, int head, int row) {
    const int lane = threadIdx.x % 32, col = lane % 8 * 8;
#pragma unroll 4
    for (int i = 0; i < 8; i++) {
        const int r = 4 * i + lane / 8, at = __shfl_sync(~0u, row, r);
        copy_async(to + place<64>(r, col), vector_of<64>(p, from, max(at, 0), head) + col, at >= 0);
    }
}
// A warp copies COUNT neighbouring rows of keys or values of a head, zeros from row `end` on.
template <int COUNT, class T> __device__ __forceinline__ void copy_span(const Plan& p, T* to, const T* from, int head, int row, int end) {
    const int r = threadIdx.x % 32 / 8, col = threadIdx.x % 8 * 8;
    const T* at = key_of<64>(p, from, row + r, head) + col;
#pragma unroll 4
    for (int i = 0; i < COUNT / 4; i++) {
        const bool valid = row + r + 4 * i < end;
        copy_async(to + place<64>(r + 4 * i, col), valid ? at : from, valid);
        at += size_t(4) * p.key_heads * 64;
    }
}

// Tiles of queries and the keys that they see: SIDES matrices of queries, with two of them statistics, and KEYS keys a step.
template <class T, int SIDES, int KEYS, int HEADS, int STEPS> struct Queries {
    static constexpr int HEAD = SIDES * ROWS * 64, STEP = 2 * KEYS * 64, PART = ROWS / COPIERS;
    using HeadPlace = Place<HEADS>;
    using StepPlace = Place<STEPS>;
    using Signals = hopper::Signals<HEADS, STEPS>;
    Barriers<HEADS, STEPS> barriers;
    Tile batches[BATCHES * BATCH], tiles[HEADS];
    int entry[HEADS][ROWS];
    float2 stat[HEADS][SIDES == 2 ? ROWS : 1];

    __device__ __forceinline__ void find(const Plan& p, const Signals& signals, const List* lists, const int* entries, int* counter) {
        find_tiles(signals, batches, p.together, p.tiles * p.group, counter, [&](int i) {
            // Backwards: a head's tiles of neighbours, some of them short, come last.
            if (i < p.tiles * p.group) return tile_of<ROWS, true>(p, lists, entries, p.tiles - 1 - i % p.tiles, i / p.tiles);
            Tile end = {};
            end.count = -1;
            return end;
        });
    }
    __device__ __forceinline__ void copy(const Plan& p, const Signals& signals, const T* const (&sides)[SIDES], const float2* stats, T* heads, T* stages) {
        const int warp = threadIdx.x / 32 - COMPUTING / 32, first = warp * PART + threadIdx.x % 32; // row of this thread; another one is 32 on
        HeadPlace h;
        StepPlace step;
        for (Place<BATCHES> batch;; batch.next()) {
            barrier_wait(signals.batch_full(batch.at), batch.parity);
            const Tile* list = batches + batch.at * BATCH;
            // The entries of a tile are fetched one tile ahead.
            int next[PART / 32];
            const auto fetch = [&](const Tile& t) {
#pragma unroll
                for (int i = 0; i < PART / 32; i++) next[i] = t.entry(p, first + 32 * i);
            };
            fetch(list[0]);
            for (int j = 0; j < p.together; j++) {
                int e[PART / 32];
#pragma unroll
                for (int i = 0; i < PART / 32; i++) e[i] = next[i];
                const Tile t = list[j];
                if (j + 1 < p.together) fetch(list[j + 1]);
                if (t.count == 0) continue;
                barrier_wait(signals.head_empty(h.at), h.parity ^ 1);
                const int head = p.first + t.y;
                if (threadIdx.x == COMPUTING) tiles[h.at] = t;
                if (t.count > 0) {
#pragma unroll
                    for (int i = 0; i < PART / 32; i++) {
                        const int row = e[i] < 0 ? -1 : row_in(p, e[i]), r = first + 32 * i;
                        entry[h.at][r] = e[i];
#pragma unroll
                        for (int side = 0; side < SIDES; side++)
                            copy_rows(p, heads + h.at * HEAD + (side * ROWS + r - threadIdx.x % 32) * 64, sides[side], head, row);
                        if (SIDES == 2) copy_async_8(&stat[h.at][r], stats + size_t(max(row, 0)) * p.heads + head, row >= 0);
                    }
                }
                barrier_arrive_copied(signals.head_full(h.at));
                release(signals.head_full(h.at));
                if (t.count < 0) return;
                h.next();
                for (int key = t.from; key < t.to; key += KEYS) {
                    constexpr int COUNT = KEYS / COPIERS;
                    barrier_wait(signals.step_empty(step.at), step.parity ^ 1);
                    T* to = stages + step.at * STEP + COUNT * warp * 64;
                    copy_span<COUNT>(p, to, static_cast<const T*>(t.keys), head, key + COUNT * warp, t.to);
                    copy_span<COUNT>(p, to + KEYS * 64, static_cast<const T*>(t.values), head, key + COUNT * warp, t.to);
                    barrier_arrive_copied(signals.step_full(step.at));
                    step.next();
                }
            }
            release(signals.batch_empty(batch.at));
        }
    }
};

// Writes the warpgroup's rows, each times its factor, to their slots in out [rows, group, slots, 64], by way of shared memory.
template <class T> __device__ __forceinline__ void store_rows(const Plan& p, T* out, T* tile, const int* entries, int y, const float (&o)[8][4], const float (&factor)[2]) {
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
        const size_t at = (size_t(row_in(p, e)) * p.group + y) * p.slots + slot_in(p, e);
        *reinterpret_cast<uint4*>(out + at * 64 + col) = *reinterpret_cast<const uint4*>(tile + place<64>(r, col));
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
        begin = from < t.count ? (first / p.size * p.size - t.from) / KEYS : 0;
        end = from < t.count ? (last - t.from) / KEYS + 1 : 0;
        all_from = last / p.size * p.size;
        all_to = first;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            high[half] = t.position + row_of(0, half);
            low[half] = high[half] / p.size * p.size;
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

template <class T> using Forward = Queries<T, 1, 128, 3, 4>;

// out [rows, group, slots, 64]; lse [rows, group, slots], may be null.
template <class T> __device__ __forceinline__ void attend(const Plan& p, const T* q, const List* lists, const int* entries, int* counter, T* out, float* lse) {
    using Work = Forward<T>;
    constexpr int KEYS = 128;
    DYNAMIC_SHARED(memory);
    __shared__ Work work;
    T *heads = aligned<T>(memory), *stages = heads + 3 * Work::HEAD;
    const typename Work::Signals signals(work.barriers);
    if (threadIdx.x >= COMPUTING) {
        fewer_registers<88>();
        const T* const sides[1] = {q};
        if (threadIdx.x / 32 < FINDER) work.copy(p, signals, sides, nullptr, heads, stages);
        else if (threadIdx.x / 32 == FINDER) work.find(p, signals, lists, entries, counter);
    } else {
        more_registers<208>();
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
            const uint64_t a = operand_at(rows, head.at * Work::HEAD * 2);
            uint32_t w[KEYS / 16][4];
            float s[KEYS / 8][4], o[8][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f}, keep[2];
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
            const auto scores = [&] { begin_times_rows<T>(s, a, operand_at(first, place.at * Work::STEP * 2)); };
            const auto values = [&] { begin_add_product<T>(o, w, operand_at(first, last * Work::STEP * 2 + KEYS * 128)); };
            // Scores become weights; what there was before is kept in part.
            const auto softmax = [&](int step) {
                span.mask(s, t.from + step * KEYS, -INFINITY);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float most[2] = {top[half], -INFINITY};
#pragma unroll
                    for (int j = 0; j < KEYS / 8; j++) most[j % 2] = fmaxf(most[j % 2], fmaxf(s[j][2 * half], s[j][2 * half + 1]));
                    most[0] = fmaxf(most[0], most[1]);
                    most[0] = fmaxf(most[0], __shfl_xor_sync(~0u, most[0], 1));
                    most[0] = fmaxf(most[0], __shfl_xor_sync(~0u, most[0], 2));
                    // A row may have seen nothing yet.
                    const float base = most[0] == -INFINITY ? 0.f : most[0] * scale;
                    keep[half] = exp2_fast(top[half] * scale - base);
                    top[half] = most[0];
                    float sum[2] = {total[half] * keep[half], 0.f};
#pragma unroll
                    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            s[j][2 * half + e] = exp2_fast(fmaf(s[j][2 * half + e], scale, -base));
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
#pragma unroll
                    for (int k = 0; k < 32; k++) o[k / 4][k % 4] *= keep[k % 4 / 2];
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
                factor[half] = 1.f / sum;
                const int e = work.entry[head.at][row_of(0, half)];
                if (lse && e >= 0 && lane % 4 == 0)
                    lse[(size_t(row_in(p, e)) * p.group + t.y) * p.slots + slot_in(p, e)] = (top[half] * scale + log2f(sum)) * (1.f / LOG2E);
            }
            store_rows(p, out, heads + head.at * Work::HEAD, work.entry[head.at], t.y, o, factor);
            release(signals.head_empty(head.at));
        }
    }
}

} // namespace hopper
} // namespace chunks
#endif
