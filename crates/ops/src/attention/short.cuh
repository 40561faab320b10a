// The forward pass on Hopper for short chunks, of up to 256 tokens: a chunk's keys and values stay in shared memory while queries come by.
//
// A block takes one item after another from a counter: a chunk with its own queries, or with a part of its list. One warp finds items and copies keys and
// values, one item ahead. Each of three warpgroups takes every third 64 queries by itself, fed by a copying warp of its own, so that one is at its products
// while others are at their exponentials. Nothing depends on which block takes an item.
#pragma once
#include "hopper.cuh"

#ifdef ANSER_HOPPER
namespace chunks {
namespace hopper {

constexpr int SHORT_ITEM = 512; // queries of an item at most

// Makes t item `index` of head `y` of the group: first each chunk's own queries, then parts of lists.
__device__ __forceinline__ void short_item(Tile& t, const Plan& p, const List* lists, const int* entries, int index, int y) {
    t.y = y;
    t.entries = nullptr;
    const Sequence& s = sequence_of<&Sequence::tile_base, true>(p, index);
    t.keys = s.keys;
    t.values = s.values;
    int number = index - s.tile_base;
    const int before = s.past / p.size, own = s.chunks - before;
    if (number < own) {
        t.from = (before + number) * p.size;
        t.to = min(t.from + p.size, s.past + s.len);
        t.position = max(t.from, s.past);
        t.row = s.first_row + t.position - s.past;
        t.count = t.to - t.position;
        return;
    }
    number -= own;
    const List* all = lists_of(p, s, lists, y);
    const int c = last_up_to_alone(s.chunks, number, [&](int i) { return all[i].tile; });
    const List list = all[c];
    const int begin = (number - list.tile) * SHORT_ITEM;
    t.entries = entries_of(p, s, entries, y) + list.first + begin;
    t.count = max(0, min(SHORT_ITEM, list.size - begin));
    t.from = c * p.size;
    t.to = t.from + p.size;
}

template <class T, int STEPS> struct Short {
    static constexpr int GROUPS = 3, KEYS = 128, RINGS = STEPS == 1 ? 3 : 2, QUERIES = 3, STAGE = STEPS * 2 * KEYS * 64, BATCH = 8; // items are found so many at a time, if there are many
    uint64_t barriers[3 * RINGS + 2 * GROUPS * QUERIES];
    Tile found[BATCH], items[RINGS];
    int entry[GROUPS][QUERIES][64]; // rows of q; -1: none
    int places[GROUPS][QUERIES][64]; // of results

    // Each thread has the address of the barriers.
    struct Signals {
        Address at;
        __device__ __forceinline__ Address keys_full(int i) const { return at + 8 * i; }
        __device__ __forceinline__ Address item_full(int i) const { return at + 8 * (RINGS + i); }
        __device__ __forceinline__ Address keys_empty(int i) const { return at + 8 * (2 * RINGS + i); }
        __device__ __forceinline__ Address queries_full(int g, int i) const { return at + 8 * (3 * RINGS + g * QUERIES + i); }
        __device__ __forceinline__ Address queries_empty(int g, int i) const { return at + 8 * (3 * RINGS + (GROUPS + g) * QUERIES + i); }
    };

    __device__ __forceinline__ Signals init() {
        const Signals b{kept(address_of(barriers))};
        if (threadIdx.x == 0) {
            for (int i = 0; i < RINGS; i++) {
                barrier_init(b.keys_full(i), 32);
                barrier_init(b.item_full(i), 1);
                barrier_init(b.keys_empty(i), 4 * GROUPS + GROUPS);
            }
            for (int g = 0; g < GROUPS; g++)
                for (int i = 0; i < QUERIES; i++) {
                    barrier_init(b.queries_full(g, i), 33);
                    barrier_init(b.queries_empty(g, i), 4);
                }
            fence_for_products();
        }
        __syncthreads();
        return b;
    }
    // One warp: items and their keys and values.
    __device__ __forceinline__ void keys(const Plan& p, const Signals& b, const List* lists, const int* entries, int* counter, T* stages) {
        const int lane = threadIdx.x % 32, all = p.tiles * p.group, batch = all < 64 * int(gridDim.x) ? 2 : BATCH;
        Place<RINGS> place;
        for (;;) {
            int first = 0;
            if (lane == 0) first = atomicAdd(counter, batch);
            first = __shfl_sync(~0u, first, 0);
            // Backwards: the long ones of a head come first.
            if (lane < batch) {
                Tile& t = found[lane];
                const int i = first + lane;
                t.count = 0;
                if (first >= all) t.count = -1;
                else if (i < all) short_item(t, p, lists, entries, p.tiles - 1 - i % p.tiles, i / p.tiles);
            }
            __syncwarp();
            for (int i = 0; i < batch; i++) {
                const int count = found[i].count;
                if (count == 0) continue;
                barrier_wait(b.keys_empty(place.at), place.parity ^ 1);
                if (lane == 0) items[place.at] = found[i];
                release(b.item_full(place.at));
                if (count < 0) return;
                const Tile& t = items[place.at];
                T* to = stages + place.at * STAGE;
                const int column = (p.first + t.y) / p.share * 64, from = t.from, end = t.to;
                const T *from_keys = static_cast<const T*>(t.keys) + column, *values = static_cast<const T*>(t.values) + column;
                for (int step = 0; step < STEPS; step++) {
                    if (from + step * KEYS >= end) break;
                    copy_span<KEYS>(to + step * 2 * KEYS * 64, from_keys, p.key_heads * 64, from + step * KEYS, end);
                    copy_span<KEYS>(to + (step * 2 + 1) * KEYS * 64, values, p.key_heads * 64, from + step * KEYS, end);
                }
                barrier_arrive_copied(b.keys_full(place.at));
                place.next();
            }
        }
    }
    // A warp for each warpgroup: its queries.
    __device__ __forceinline__ void queries(const Plan& p, const Signals& b, int group, const T* q, T* tiles) {
        const int lane = threadIdx.x % 32;
        Place<RINGS> place;
        Place<QUERIES> mine;
        for (int turn = 0;; place.next()) {
            barrier_wait(b.item_full(place.at), place.parity);
            const Tile& t = items[place.at];
            if (t.count < 0) return;
            const int tiles_of = (t.count + 63) / 64, head = p.first + t.y, mask = (1 << p.bits) - 1;
            // Entries are fetched ahead of the copies.
            int next[2];
            const auto fetch = [&](int i) {
#pragma unroll
                for (int j = 0; j < 2; j++) next[j] = t.entry(p, 64 * i + 32 * j + lane);
            };
            const int begin = (group + GROUPS - turn) % GROUPS;
            if (begin < tiles_of) fetch(begin);
            for (int i = begin; i < tiles_of; i += GROUPS) {
                const int first = next[0], second = next[1];
                barrier_wait(b.queries_empty(group, mine.at), mine.parity ^ 1);
                int *entries = entry[group][mine.at], *to = places[group][mine.at];
                const auto note = [&](int r, int e) {
                    const int row = e & mask;
                    entries[r] = e < 0 ? -1 : row;
                    to[r] = (row * p.group + t.y) * p.slots + slot_in(p, e);
                };
                note(lane, first);
                note(32 + lane, second);
                __syncwarp();
                if (i + GROUPS < tiles_of) fetch(i + GROUPS);
                const auto row = [&](int r) { return entries[r]; };
                copy_rows<64>(tiles + (group * QUERIES + mine.at) * 64 * 64, q + head * 64, p.heads * 64, row);
                barrier_arrive_copied(b.queries_full(group, mine.at));
                release(b.queries_full(group, mine.at));
                mine.next();
            }
            turn = (turn + tiles_of) % GROUPS;
            release(b.keys_empty(place.at));
        }
    }
};

// out [rows, group, slots, 64]; lse [rows, group, slots].
template <class T, int STEPS>
__device__ __forceinline__ void attend_short(const Plan& p, const T* q, const List* lists, const int* entries, int* counter, T* out, float* lse) {
    using Work = Short<T, STEPS>;
    constexpr int KEYS = Work::KEYS, GROUPS = Work::GROUPS;
    DYNAMIC_SHARED(memory);
    __shared__ Work work;
    T *tiles = aligned<T>(memory), *stages = tiles + GROUPS * Work::QUERIES * 64 * 64;
    const typename Work::Signals b = work.init();
    begin_kernel();
    if (threadIdx.x >= 128 * GROUPS) {
        fewer_registers<32>();
        const int warp = threadIdx.x / 32 - 4 * GROUPS;
        if (warp < GROUPS) work.queries(p, b, warp, q, tiles);
        else work.keys(p, b, lists, entries, counter, stages);
    } else {
        more_registers<160>();
        const int lane = threadIdx.x % 32, group = __shfl_sync(~0u, int(threadIdx.x / 128), 0), row = threadIdx.x % 128 / 32 * 16 + lane / 4;
        const float scale = 0.125f * LOG2E;
        Place<Work::RINGS> place;
        Place<Work::QUERIES> mine;
        for (int turn = 0;; place.next()) {
            barrier_wait(b.item_full(place.at), place.parity);
            const int count = work.items[place.at].count;
            if (count < 0) break;
            const Tile& t = work.items[place.at];
            const int tiles_of = (count + 63) / 64, from = t.from, to = t.to, position = t.entries ? 1 << 30 : t.position;
            barrier_wait(b.keys_full(place.at), place.parity);
            const uint64_t keys = uniform(operand(address_of(stages + place.at * Work::STAGE)));
            for (int i = (group + GROUPS - turn) % GROUPS; i < tiles_of; i += GROUPS) {
                barrier_wait(b.queries_full(group, mine.at), mine.parity);
                fence_for_products();
                T* tile = tiles + (group * Work::QUERIES + mine.at) * 64 * 64;
                const uint64_t a = uniform(operand(address_of(tile)));
                float o[8][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    const int key = from + step * KEYS;
                    if (step > 0 && (key >= to || key > position + 64 * i + 63)) break;
                    float s[KEYS / 8][4];
                    uint32_t w[KEYS / 16][4];
                    products_begin();
                    begin_times_rows<T>(s, a, operand_at(keys, step * 2 * KEYS * 128));
                    products_commit();
                    products_wait<0>();
                    keep_order(s);
                    // The last key that all rows see, and those that a lane's rows do.
                    if (key + KEYS - 1 > min(to - 1, position + 64 * i)) {
                        const int at = key + lane % 4 * 2;
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const int last = min(to - 1, position + 64 * i + row + 8 * half) - at;
#pragma unroll
                            for (int j = 0; j < KEYS / 4; j++)
                                if (j / 2 * 8 + j % 2 > last) s[j / 2][2 * half + j % 2] = -INFINITY;
                        }
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float most[2] = {top[half], -INFINITY};
#pragma unroll
                        for (int j = 0; j < KEYS / 8; j++) most[j % 2] = fmaxf(most[j % 2], fmaxf(s[j][2 * half], s[j][2 * half + 1]));
                        most[0] = fmaxf(most[0], most[1]);
                        most[0] = fmaxf(most[0], __shfl_xor_sync(~0u, most[0], 1));
                        most[0] = fmaxf(most[0], __shfl_xor_sync(~0u, most[0], 2));
                        const float base = most[0] == -INFINITY ? 0.f : most[0] * scale;
                        if (step > 0) {
                            const float keep = exp2_fast(top[half] * scale - base);
                            total[half] *= keep;
#pragma unroll
                            for (int k = 0; k < 16; k++) o[k / 2][2 * half + k % 2] *= keep;
                        }
                        top[half] = most[0];
                        float sum[2] = {total[half], 0.f};
#pragma unroll
                        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                s[j][2 * half + e] = exp2_fast(fmaf(s[j][2 * half + e], scale, -base));
                                sum[e] += s[j][2 * half + e];
                            }
                        total[half] = sum[0] + sum[1];
                    }
#pragma unroll
                    for (int j = 0; j < KEYS / 16; j++) as_a<T>(w[j], s[2 * j], s[2 * j + 1]);
                    keep_order(w);
                    if (step > 0) keep_order(o);
                    products_begin();
                    begin_add_product<T>(o, w, operand_at(keys, (step * 2 + 1) * KEYS * 128), step > 0);
                    products_commit();
                    products_wait<0>();
                    keep_order(o);
                }
                const int *entry = work.entry[group][mine.at] + (row & ~7), *at = work.places[group][mine.at] + (row & ~7);
                wait_barrier(1 + group, 128); // all warps' products that read the queries are done
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float sum = total[half];
                    sum += __shfl_xor_sync(~0u, sum, 1);
                    sum += __shfl_xor_sync(~0u, sum, 2);
                    const float factor = reciprocal(sum);
                    const int r = 8 * half + lane / 4;
                    if (lane % 4 == 0 && entry[r] >= 0) lse[at[r]] = (top[half] * scale + log2f(sum)) * (1.f / LOG2E);
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        *reinterpret_cast<uint32_t*>(tile + (row + 8 * half) * 64 + (8 * (k ^ lane / 4) + lane % 4 * 2)) = pack<T>(o[k][2 * half] * factor, o[k][2 * half + 1] * factor);
                }
                __syncwarp();
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int r = 4 * j + lane / 8;
                    const uint4 x = *reinterpret_cast<const uint4*>(tile + chunks::place<64>((row & ~7) + r, lane % 8 * 8));
                    if (entry[r] >= 0) store_once(out + size_t(unsigned(at[r])) * 64 + lane % 8 * 8, x);
                }
                release(b.queries_empty(group, mine.at));
                mine.next();
            }
            turn = (turn + tiles_of) % GROUPS;
            release(b.keys_empty(place.at));
        }
    }
}

} // namespace hopper
} // namespace chunks
#endif
