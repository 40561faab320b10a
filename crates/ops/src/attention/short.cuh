// The forward pass on Hopper for short chunks, of up to 256 tokens: a chunk's keys and values stay in shared memory while queries come by.
//
// A block takes one item after another from a counter: a chunk with its own queries, or with a part of its list. Each of three warpgroups takes every third 64
// queries by itself, so that one is at its products while others are at their exponentials. Eight warps feed them: one finds items, ahead of all others, four copy
// keys and values, one item ahead or two, and each warpgroup has one for its queries. Nothing depends on which block takes an item.
//
// Where queries that see all keys before them are a good part of all, they are no items: the kernel for long chunks goes over their keys in one piece (see hopper.cuh), on
// a share of the multiprocessors, beside this one.
#pragma once
#include "hopper.cuh"

#ifdef ANSER_HOPPER
namespace chunks {
namespace hopper {

constexpr int SHORT_ITEM = 512; // queries of an item at most

// Makes t item `index` of head `y` of the group: first each chunk's own queries, then parts of lists; by a warp.
__device__ __forceinline__ void short_item(Tile& t, const Plan& p, const List* lists, const int* entries, int index, int y) {
    t.y = y;
    t.entries = nullptr;
    const Sequence& s = sequence_of<&Sequence::tile_base>(p, index);
    t.keys = s.keys;
    t.values = s.values;
    int number = index - s.tile_base;
    const int before = max(s.past, p.dense) / p.size, own = max(0, s.chunks - before);
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
    const int c = last_up_to(s.chunks, number, [&](int i) { return all[i].tile; });
    const List list = all[c];
    const int begin = (number - list.tile) * SHORT_ITEM;
    t.entries = entries_of(p, s, entries, y) + list.first + begin;
    t.count = max(0, min(SHORT_ITEM, list.size - begin));
    t.from = c * p.size;
    t.to = t.from + p.size;
}

template <class T, int STEPS> struct Short {
    static constexpr int GROUPS = 3, KEY_WARPS = 4, FEEDING = GROUPS + 1 + KEY_WARPS, THREADS = 128 * GROUPS + 32 * FEEDING;
    static_assert(THREADS == 640); // as it is launched
    static constexpr int STAGES = STEPS == 1 ? 3 : 2; // of items, of keys and values, and of each warpgroup's queries
    static constexpr int KEYS = 128, STAGE = STEPS * 2 * KEYS * 64, TILE = 64 * 64, PITCH = 64 + 8; // values of a stage, of a tile of queries, of a row of results
    // Registers of a thread that computes and of one that feeds. At first all have as many, and who then wants more than others gave up waits for ever. (With other
    // numbers ptxas 13.0 lets products wait for each other, in the one kernel or in the other.)
    static constexpr int MANY = STEPS == 1 ? 128 : 136, FEW = STEPS == 1 ? 48 : 32, FIRST = 65536 / THREADS / 8 * 8;
    static_assert(128 * GROUPS * MANY + 32 * FEEDING * FEW <= THREADS * FIRST);
    uint64_t barriers[2 * (2 + GROUPS) * STAGES];
    Tile items[STAGES];
    // Of a tile's rows: their number in q, and the place of their result, -1: none. Row r is at `at(r)`: those that lanes have together are neighbours.
    alignas(16) int rows[GROUPS][STAGES][64], places[GROUPS][STAGES][64];
    int logs[GROUPS][STAGES][64]; // where row r's logarithm goes
    __device__ __forceinline__ static int at(int r) { return r % 4 * 16 + r / 4; }

    // Each thread has the address of the barriers.
    struct Signals {
        Address at;
        __device__ __forceinline__ Address number(int kind, int i) const { return at + 8 * (kind * STAGES + i); }
        __device__ __forceinline__ Address item_full(int i) const { return number(0, i); }
        __device__ __forceinline__ Address item_empty(int i) const { return number(1, i); }
        __device__ __forceinline__ Address keys_full(int i) const { return number(2, i); }
        __device__ __forceinline__ Address keys_empty(int i) const { return number(3, i); }
        __device__ __forceinline__ Address queries_full(int g, int i) const { return number(4 + g, i); }
        __device__ __forceinline__ Address queries_empty(int g, int i) const { return number(4 + GROUPS + g, i); }
    };

    __device__ __forceinline__ Signals init() {
        const Signals b{kept(address_of(barriers))};
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_init(b.item_full(i), 1);
                barrier_init(b.item_empty(i), 4 * GROUPS + GROUPS + KEY_WARPS);
                barrier_init(b.keys_full(i), 32 * KEY_WARPS);
                barrier_init(b.keys_empty(i), 4 * GROUPS);
                for (int g = 0; g < GROUPS; g++) {
                    barrier_init(b.queries_full(g, i), 33);
                    barrier_init(b.queries_empty(g, i), 4);
                }
            }
            fence_for_products();
        }
        __syncthreads();
        return b;
    }
    // One warp: items.
    __device__ __forceinline__ void find(const Plan& p, const Signals& b, const List* lists, const int* entries, int* counter) {
        const int lane = threadIdx.x % 32, all = p.tiles * p.group;
        Place<STAGES> place;
        for (;;) {
            int i = 0;
            if (lane == 0) i = atomicAdd(counter, 1);
            i = __shfl_sync(~0u, i, 0);
            Tile t;
            // Backwards: the long ones of a head come first.
            if (i < all) short_item(t, p, lists, entries, p.tiles - 1 - i % p.tiles, i / p.tiles);
            else t.count = -1;
            if (t.count == 0) continue;
            barrier_wait(b.item_empty(place.at), place.parity ^ 1);
            if (lane == 0) items[place.at] = t;
            release(b.item_full(place.at));
            if (t.count < 0) return;
            place.next();
        }
    }
    // One of four warps: half of an item's keys or of its values.
    __device__ __forceinline__ void keys(const Plan& p, const Signals& b, int warp, T* stages) {
        constexpr int COUNT = 2 * KEYS / KEY_WARPS;
        const int of_values = warp / 2, part = warp % 2 * COUNT;
        T* const first = stages + of_values * KEYS * 64 + part * 64;
        Place<STAGES> place;
        for (;; place.next()) {
            barrier_wait(b.item_full(place.at), place.parity);
            const Tile& t = items[place.at];
            if (t.count < 0) return;
            const T* const from = static_cast<const T*>(of_values ? t.values : t.keys) + (p.first + t.y) / p.share * 64;
            const int key = t.from + part, end = t.to;
            release(b.item_empty(place.at));
            barrier_wait(b.keys_empty(place.at), place.parity ^ 1);
            for (int step = 0; step < STEPS; step++) {
                if (key - part + step * KEYS >= end) break;
                copy_span<COUNT>(first + place.at * STAGE + step * 2 * KEYS * 64, from, p.key_heads * 64, key + step * KEYS, end);
            }
            barrier_arrive_copied(b.keys_full(place.at));
        }
    }
    // A warp for each warpgroup: its queries.
    __device__ __forceinline__ void queries(const Plan& p, const Signals& b, int group, const T* q, const int* entries, Address tiles) {
        const int lane = threadIdx.x % 32, mask = (1 << p.bits) - 1, own = (p.slots - 1) << p.bits;
        const unsigned stride = p.heads * 64 * sizeof(T);
        const Address first = tiles + 2 * (group * STAGES * TILE + chunks::place<64>(lane / 8, lane % 8 * 8));
        Place<STAGES> item, mine;
        for (int i = group;; item.next()) { // i is the next tile of the item that is the warpgroup's
            barrier_wait(b.item_full(item.at), item.parity);
            const Tile& t = items[item.at];
            const int count = t.count, y = t.y;
            if (count < 0) return;
            const int tiles_of = (count + 63) / 64;
            const char* const column = kept(reinterpret_cast<const char*>(q + (p.first + y) * 64 + lane % 8 * 8));
            // Entries are fetched ahead of the copies.
            int next[2];
            const auto fetch = [&](int i) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int r = 64 * i + 32 * j + lane;
                    next[j] = r >= count ? -1 : t.entries ? t.entries[r] : own | (t.row + r);
                }
            };
            if (i < tiles_of) fetch(i);
            for (; i < tiles_of; i += GROUPS) {
                const int entry[2] = {next[0], next[1]};
                barrier_wait(b.queries_empty(group, mine.at), mine.parity ^ 1);
                int* of = rows[group][mine.at];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    // Where there is no row any will do.
                    const int row = entry[j] < 0 ? 0 : entry[j] & mask;
                    of[at(32 * j + lane)] = row;
                    logs[group][mine.at][32 * j + lane] = entry[j] < 0 ? -1 : t.log_of(p, entries, 64 * i + 32 * j + lane);
                    places[group][mine.at][at(32 * j + lane)] = entry[j] < 0 ? -1 : (row * p.group + y) * p.slots + (entry[j] >> p.bits);
                }
                __syncwarp();
                if (i + GROUPS < tiles_of) fetch(i + GROUPS);
                const Address even = first + 2 * TILE * mine.at, odd = (even + 4 * 128) ^ 64;
                const auto copy = [&](Address to, int row) { copy_async_to(to, column + size_t(unsigned(row)) * stride); };
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int4 x = reinterpret_cast<const int4*>(of + lane / 8 * 16)[k];
                    copy(even + 2048 * k, x.x);
                    copy(odd + 2048 * k, x.y);
                    copy(even + 2048 * k + 1024, x.z);
                    copy(odd + 2048 * k + 1024, x.w);
                }
                barrier_arrive_copied(b.queries_full(group, mine.at));
                release(b.queries_full(group, mine.at));
                mine.next();
            }
            i -= tiles_of;
            release(b.item_empty(item.at));
        }
    }
};

// out [rows, group, slots, 64]; lse as `Tile::log_of` says.
template <class T, int STEPS>
__device__ __forceinline__ void attend_short(const Plan& p, const T* q, const List* lists, const int* entries, int* counter, T* out, float* lse) {
    using Work = Short<T, STEPS>;
    constexpr int KEYS = Work::KEYS, GROUPS = Work::GROUPS;
    DYNAMIC_SHARED(memory);
    __shared__ Work work;
    T *tiles = aligned<T>(memory), *stages = tiles + GROUPS * Work::STAGES * Work::TILE, *results = stages + Work::STAGES * Work::STAGE;
    const Address tiles_at = kept(address_of(tiles));
    const typename Work::Signals b = work.init();
    let_next_start();
    if (p.dense == 0) wait_for_previous(); // otherwise the kernel before has waited
    if (threadIdx.x >= 128 * GROUPS) {
        fewer_registers<Work::FEW>();
        const int warp = threadIdx.x / 32 - 4 * GROUPS;
        if (warp < GROUPS) work.queries(p, b, warp, q, entries, tiles_at);
        else if (warp == GROUPS) {
            work.find(p, b, lists, entries, counter);
            if (p.dense > 0) wait_for_previous(); // so that what starts next sees what it has written
        } else work.keys(p, b, warp - GROUPS - 1, stages);
    } else {
        more_registers<Work::MANY>();
        const int lane = threadIdx.x % 32, group = __shfl_sync(~0u, int(threadIdx.x / 128), 0), row = threadIdx.x % 128 / 32 * 16 + lane / 4;
        const float scale = 0.125f * LOG2E;
        const Address stages_at = kept(address_of(stages));
        // Results of the warp's 16 rows go by way of shared memory: where the lane's part of fragments and of rows is.
        T* const mine_of = results + (group * 64 + threadIdx.x % 128 / 32 * 16) * Work::PITCH;
        const Address fragments = kept(address_of(mine_of + lane % 16 * Work::PITCH + lane / 16 * 8));
        const T* const vectors = mine_of + lane / 8 * Work::PITCH + lane % 8 * 8;
        char* const to_vectors = kept(reinterpret_cast<char*>(out + lane % 8 * 8));
        Place<Work::STAGES> place, mine;
        for (int i = group;; place.next()) { // as in `queries`
            barrier_wait(b.item_full(place.at), place.parity);
            const Tile& t = work.items[place.at];
            if (t.count < 0) break;
            const int tiles_of = (t.count + 63) / 64, from = t.from, to = t.to, position = t.entries ? 1 << 30 : t.position;
            release(b.item_empty(place.at));
            barrier_wait(b.keys_full(place.at), place.parity);
            const uint64_t keys = uniform(operand(stages_at + place.at * Work::STAGE * 2));
            for (; i < tiles_of; i += GROUPS) {
                barrier_wait(b.queries_full(group, mine.at), mine.parity);
                fence_for_products();
                const uint64_t a = uniform(operand(tiles_at + (group * Work::STAGES + mine.at) * Work::TILE * 2));
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
                // Where the results of rows r, r + 4 .. of the warp go.
                const int* places = work.places[group][mine.at] + threadIdx.x % 128 / 32 * 4;
                float factor[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float& sum = total[half];
                    sum += __shfl_xor_sync(~0u, sum, 1);
                    sum += __shfl_xor_sync(~0u, sum, 2);
                    factor[half] = reciprocal(sum);
                }
                const int half = lane % 4, at = work.logs[group][mine.at][threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * (half & 1)];
                const float value = (half ? top[1] : top[0]) * scale + log2_fast(half ? total[1] : total[0]);
                if (half < 2 && at >= 0) lse[at] = value * (1.f / LOG2E);
#pragma unroll
                for (int k = 0; k < 8; k += 2)
                    store_tiles(fragments + 16 * k, pack<T>(o[k][0] * factor[0], o[k][1] * factor[0]), pack<T>(o[k][2] * factor[1], o[k][3] * factor[1]),
                                pack<T>(o[k + 1][0] * factor[0], o[k + 1][1] * factor[0]), pack<T>(o[k + 1][2] * factor[1], o[k + 1][3] * factor[1]));
                __syncwarp();
                const int4 to_rows = *reinterpret_cast<const int4*>(places + lane / 8 * 16);
                const int to_row[4] = {to_rows.x, to_rows.y, to_rows.z, to_rows.w};
#pragma unroll
                for (int j = 0; j < 4; j++)
                    store_once(to_vectors + size_t(unsigned(to_row[j])) * 128u, *reinterpret_cast<const uint4*>(vectors + 4 * j * Work::PITCH), to_row[j]);
                __syncwarp();
                release(b.queries_empty(group, mine.at));
                mine.next();
            }
            i -= tiles_of;
            release(b.keys_empty(place.at));
        }
    }
}

} // namespace hopper
} // namespace chunks
#endif
