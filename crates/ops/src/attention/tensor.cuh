// The operation on tensor cores, for 16 bits and heads of 64 or 128.
//
// A past chunk is attended to by tiles of the queries that chose it, gathered from its list, so that no product is masked away; a query's own
// chunk by tiles of neighbours. Each writes a result of its own, normalised, with the logarithm of its softmax's denominator, to the
// query's slot; `merge` adds a query's slots up. Backward the same way gives dq, and dk, dv go by tiles of keys, over the later queries of
// their own chunk and the list. Nothing depends on which queries share a tile, but for sums over a list, whose order is fixed.
#pragma once
#include "lists.cuh"
#include "product.cuh"

namespace chunks {

constexpr float LOG2E = 1.44269504f;
template <int N> constexpr int KEYS = N == 64 ? 64 : 32; // keys of a step
template <int N> constexpr int BLOCKS = N == 64 ? 2 : 1; // of 16 queries a warp; two halve the loads from shared memory
template <int N> constexpr int TILE = 64 * BLOCKS<N>;    // queries of a tile; 4 warps

// A tile of queries and the keys it sees.
struct Tile {
    const void *keys, *values; // of the sequence
    const int* entries;        // of the queries; null if the keys are in the queries' own chunks,
    int row, position;         // which then are the first query's
    int count;                 // of queries
    int from, to;              // keys
    int y;                     // head of the group

    // The entry of row r; -1 past the end.
    __device__ __forceinline__ int entry(const Plan& p, int r) const {
        return r >= count ? -1 : entries ? entries[r] : entry_of(p, row + r, position + r < p.dense ? p.slots : p.slots - 1);
    }
    // Where the logarithm of the sum of row r's partial result is, so that neighbours of a list are neighbours: [rows, group] of own chunks, then [group, entries].
    __device__ __forceinline__ int log_of(const Plan& p, const int* of_group, int r) const {
        return entries ? p.rows * p.group + int(entries - of_group) + r : (row + r) * p.group + y;
    }
};
// Makes t tile `index` of head `y` of the group; by a warp, or by a thread alone.
template <int M, bool ALONE = false> __device__ __forceinline__ void tile_of(Tile& t, const Plan& p, const List* lists, const int* entries, int index, int y) {
    t.y = y;
    t.count = 0;
    t.entries = nullptr;
    if (index >= p.tiles) return;
    const Sequence& s = sequence_of<&Sequence::tile_base, ALONE>(p, index);
    t.keys = s.keys;
    t.values = s.values;
    int number = index - s.tile_base;
    const int own = (s.len + M - 1) / M;
    if (number < own) {
        t.row = s.first_row + number * M;
        t.position = s.past + number * M;
        t.count = min(M, s.len - number * M);
        t.from = low_of(p, t.position);
        t.to = t.position + t.count;
        return;
    }
    number -= own;
    const List* all = lists_of(p, s, lists, y);
    const int c = find_last<ALONE>(s.chunks, number, [&](int i) { return all[i].tile; });
    const List list = all[c];
    const int begin = (number - list.tile) * M;
    t.entries = entries_of(p, s, entries, y) + list.first + begin;
    t.count = max(0, min(M, list.size - begin));
    t.from = c * p.size;
    t.to = t.from + p.size;
}

// Row of a tile that a lane has as half h of block m: a block is 64 rows, 16 a warp.
__device__ __forceinline__ int row_of(int m, int h) { return 64 * m + threadIdx.x / 32 * 16 + 8 * h + (threadIdx.x & 31) / 4; }

// Starts copying rows of a head of queries or, OF_KEYS, of their keys, `row(r)` of tile row r (-1: zeros), by `THREADS` threads.
template <int N, int ROWS, int THREADS, bool OF_KEYS, class T, class Row> __device__ __forceinline__ void gather(const Plan& p, T* to, const T* from, int head, Row row) {
#pragma unroll
    for (int i = 0; i < ROWS * (N / 8) / THREADS; i++) {
        const int x = threadIdx.x + i * THREADS, r = x / (N / 8), col = x % (N / 8) * 8, at = row(r);
        copy_async(to + place<N>(r, col), (OF_KEYS ? key_of<N>(p, from, max(at, 0), head) : vector_of<N>(p, from, max(at, 0), head)) + col, at >= 0);
    }
}

// What a tile sees of some keys: nothing, all, or part.
enum Sight { NOTHING, PART, ALL };
__device__ __forceinline__ Sight sight(const Plan& p, const Tile& t, int key, int count) {
    if (t.entries) return key + count <= t.to ? ALL : key < t.to ? PART : NOTHING;
    const int last = t.position + t.count - 1;
    if (key > last) return NOTHING;
    return key + count - 1 <= t.position && key >= last / p.size * p.size ? ALL : PART;
}
__device__ __forceinline__ bool seen(const Plan& p, const Tile& t, int position, int key) {
    return t.entries ? key < t.to : key <= position && key >= position / p.size * p.size;
}

// Writes the warp's rows, each times its factor, to their slots in out [rows, group, slots, N], by way of shared memory.
template <class T, int N>
__device__ __forceinline__ void store_slots(const Plan& p, T* out, T* tile, const int* entries, const float (&o)[BLOCKS<N>][N / 8][4], const float (&factor)[BLOCKS<N>][2]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS<N>; i++)
#pragma unroll
        for (int k = 0; k < N / 8; k++)
            *reinterpret_cast<uint32_t*>(tile + place<N>(row_of(i / 2, i % 2), 8 * k + lane % 4 * 2)) =
                pack<T>(o[i / 2][k][i % 2 * 2] * factor[i / 2][i % 2], o[i / 2][k][i % 2 * 2 + 1] * factor[i / 2][i % 2]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * BLOCKS<N> * N / 8 / 32; i++) {
        const int x = i * 32 + lane, mine = x / (N / 8), col = x % (N / 8) * 8, r = mine / 16 * 64 + threadIdx.x / 32 * 16 + mine % 16, e = entries[r];
        if (e < 0) continue;
        const size_t at = (size_t(row_in(p, e)) * p.group + blockIdx.y) * p.slots + slot_in(p, e);
        *reinterpret_cast<uint4*>(out + at * N + col) = *reinterpret_cast<const uint4*>(tile + place<N>(r, col));
    }
}

// Runs the tiles of a block as one pipeline of steps of keys: while one is computed the next is on its way, be it of the next tile, and so are that
// one's queries, whose place is free once they are in registers.
//
//   queries(rows)     begins copying the rows' queries; rows(r) is row r of the tile or -1
//   begin(tile, entries)   loads them from there; the tile begins
//   compute(tile, step, keys)   `keys`, followed by the values
//   end(entries, scratch)   the tile is done; `scratch` holds TILE rows
template <class T, int N, class Queries, class Begin, class Compute, class End>
__device__ __forceinline__ void each_tile(const Plan& p, const List* lists, const int* entries, T* stages, Queries queries, Begin begin, Compute compute, End end) {
    constexpr int M = TILE<N>, STAGE = 2 * KEYS<N> * WIDTH<N>;
    __shared__ Tile tiles[4];
    __shared__ int entry[4][M];
    const int head = p.first + blockIdx.y, warp = threadIdx.x / 32;
    if (warp < p.together) {
        Tile t = {};
        tile_of<M>(t, p, lists, entries, blockIdx.x * p.together + warp, blockIdx.y);
        if (threadIdx.x % 32 == 0) tiles[warp] = t;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.together * M; i += 128) entry[i / M][i % M] = tiles[i / M].entry(p, i % M);
    __syncthreads();
    const auto next = [&](int i) {
        while (i < p.together && tiles[i].count == 0) i++;
        return i;
    };
    const auto fetch = [&](const Tile& t, int step, int stage) {
        T* to = stages + stage * STAGE;
        const int key = t.from + step * KEYS<N>, last = t.to;
        const auto row = [&](int r) { return key + r < last ? key + r : -1; };
        gather<N, KEYS<N>, 128, true>(p, to, static_cast<const T*>(t.keys), head, row);
        gather<N, KEYS<N>, 128, true>(p, to + KEYS<N> * WIDTH<N>, static_cast<const T*>(t.values), head, row);
        copy_commit();
    };
    const auto fetch_first = [&](int i, int stage) {
        queries([&](int r) { return entry[i][r] < 0 ? -1 : row_in(p, entry[i][r]); });
        fetch(tiles[i], 0, stage);
    };
    int i = next(0), stage = 0;
    if (i == p.together) return;
    fetch_first(i, stage);
    while (i < p.together) {
        const Tile& t = tiles[i];
        const int steps = (t.to - t.from + KEYS<N> - 1) / KEYS<N>, following = next(i + 1);
        for (int step = 0; step < steps; step++) {
            wait_for_copies();
            if (step == 0) {
                begin(t, entry[i]);
                if (steps == 1) __syncthreads();
            }
            if (step + 1 < steps)
                fetch(t, step + 1, stage ^ 1);
            else if (following < p.together)
                fetch_first(following, stage ^ 1);
            compute(t, step, stages + stage * STAGE);
            stage ^= 1;
        }
        __syncthreads();
        end(tiles[i], entry[i], stages + (stage ^ 1) * STAGE);
        i = following;
    }
}

// out [rows, group, slots, N]; lse as `Tile::log_of` says, may be null. Shared memory: a tile of queries, two steps of keys and values.
template <class T, int N> __device__ __forceinline__ void attend(const Plan& p, const T* q, const List* lists, const int* entries, T* out, float* lse) {
    constexpr int M = TILE<N>, P = WIDTH<N>, B = BLOCKS<N>;
    DYNAMIC_SHARED(memory);
    T* tile = aligned<T>(memory);
    const int lane = threadIdx.x & 31;
    const float scale = rsqrtf(float(N)) * LOG2E;
    uint32_t a[B][N / 16][4];
    float o[B][N / 8][4], top[B][2], total[B][2];
    const auto queries = [&](auto row) { gather<N, M, 128, false>(p, tile, q, p.first + blockIdx.y, row); };
    const auto begin = [&](const Tile&, const int*) {
        load_rows<N>(a, tile);
#pragma unroll
        for (int i = 0; i < B * N / 2; i++) o[i / (N / 2)][i / 4 % (N / 8)][i % 4] = 0.f;
#pragma unroll
        for (int i = 0; i < 2 * B; i++) {
            top[i / 2][i % 2] = -INFINITY;
            total[i / 2][i % 2] = 0.f;
        }
    };
    const auto compute = [&](const Tile& t, int step, const T* keys) {
        const int key = t.from + step * KEYS<N>;
        const Sight sees = sight(p, t, key, KEYS<N>);
        if (sees == NOTHING) return;
        float c[B][KEYS<N> / 8][4];
        times_rows<T, N, KEYS<N>>(c, a, keys, 0);
        if (sees == PART) {
#pragma unroll
            for (int m = 0; m < B; m++)
#pragma unroll
                for (int i = 0; i < KEYS<N> / 2; i++)
                    if (!seen(p, t, t.position + row_of(m, i % 4 / 2), key + i / 4 * 8 + lane % 4 * 2 + i % 2)) c[m][i / 4][i % 4] = -INFINITY;
        }
#pragma unroll
        for (int m = 0; m < B; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = top[m][half];
#pragma unroll
                for (int j = 0; j < KEYS<N> / 8; j++) most = fmaxf(most, fmaxf(c[m][j][2 * half], c[m][j][2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                // A row may have seen nothing yet.
                const float base = most == -INFINITY ? 0.f : most * scale, keep = exp2_fast(top[m][half] * scale - base);
                top[m][half] = most;
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < KEYS<N> / 8; j++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        c[m][j][e] = exp2_fast(fmaf(c[m][j][e], scale, -base));
                        sum += c[m][j][e];
                    }
                total[m][half] = total[m][half] * keep + sum;
#pragma unroll
                for (int k = 0; k < N / 8; k++) {
                    o[m][k][2 * half] *= keep;
                    o[m][k][2 * half + 1] *= keep;
                }
            }
        add_product<T, N, KEYS<N>>(o, c, keys + KEYS<N> * P, 0);
    };
    const auto end = [&](const Tile& t, const int* entry, T* scratch) {
        float factor[B][2];
#pragma unroll
        for (int i = 0; i < 2 * B; i++) {
            float sum = total[i / 2][i % 2];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            factor[i / 2][i % 2] = 1.f / sum;
            const int r = row_of(i / 2, i % 2);
            if (lse && r < t.count && lane % 4 == 0) lse[t.log_of(p, entries, r)] = (top[i / 2][i % 2] * scale + log2f(sum)) * (1.f / LOG2E);
        }
        store_slots<T, N>(p, out, scratch, entry, o, factor);
    };
    each_tile<T, N>(p, lists, entries, tile + M * P, queries, begin, compute, end);
}

// A row of a head of the group, N / 8 neighbouring lanes each, 8 channels a lane.
template <int N> struct Vector {
    static constexpr int LANES = N / 8, AHEAD = 8; // parts that are fetched together
    size_t number; // among [rows, group]
    int row, head, lane;
    bool real; // not past the end, where lanes only take part in shuffles
    __device__ __forceinline__ Vector(const Plan& p) {
        const size_t x = size_t(blockIdx.x) * blockDim.x + threadIdx.x, all = size_t(p.rows) * p.group;
        real = x / LANES < all;
        number = real ? x / LANES : all - 1;
        lane = x % LANES;
        row = number / p.group;
        head = p.first + number % p.group;
    }
    template <class T> __device__ __forceinline__ Vec part(const Plan& p, const T* parts, int slot) const {
        return load(parts + (number * p.slots + slot) * N + lane * 8);
    }
    // The parts of slots first + i of which `used` has bit i.
    template <class T> __device__ __forceinline__ void fetch(const Plan& p, uint4 (&raw)[AHEAD], const T* parts, int first, unsigned used) const {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            raw[i] = load_if(used >> i & 1, parts + (number * p.slots + first + i) * N + lane * 8);
            __syncwarp(); // so that the compiler doesn't put off loads to save registers
        }
    }
    // Which slots from `first` on, as many as there are lanes, a value that isn't negative is in use for.
    __device__ __forceinline__ unsigned used(int value) const { return __ballot_sync(~0u, value >= 0) >> (threadIdx.x & 31 & ~(LANES - 1)); }
    // What [heads, rows, slots - 1] has for a slot, -1: it isn't in use.
    __device__ __forceinline__ int of_slot(const Plan& p, const int* all, int slot) const {
        return slot < p.slots - 1 ? all[(size_t(head) * p.rows + row) * (p.slots - 1) + slot] : -1;
    }
};

// y [rows, heads N], lse [rows, heads] of the group's heads from their slots: the own chunk's first, then the picks', whose weights the lanes share.
template <class T, int N> __device__ __forceinline__ void merge(const Plan& p, const int* places, const T* parts, const float* part_lse, T* y, float* lse) {
    constexpr int LANES = N / 8, AHEAD = Vector<N>::AHEAD;
    const Vector<N> v(p);
    if (dense_row(p, v.row)) return;
    const float* l = part_lse + size_t(p.rows) * (p.group + (v.head - p.first) * (p.slots - 1));
    Vec sum = v.part(p, parts, p.slots - 1);
    float top = part_lse[v.number], total = 1.f;
    uint4 raw[AHEAD];
    for (int first = 0; first < p.slots - 1; first += LANES) {
        const int place = v.of_slot(p, places, first + v.lane);
        const unsigned used = v.used(place);
        v.fetch(p, raw, parts, first, used);
        const float mine = place >= 0 ? l[place] : -INFINITY;
        float most = fmaxf(top, mine);
        for (int o = LANES / 2; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
        const float keep = exp2_fast((top - most) * LOG2E), weight = exp2_fast((mine - most) * LOG2E);
        top = most;
        total *= keep;
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] *= keep;
#pragma unroll
        for (int i = 0; i < LANES; i += AHEAD) {
            if (i > 0) v.fetch(p, raw, parts, first + i, used >> i);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const float w = __shfl_sync(~0u, weight, i + k, LANES);
                const Vec part = load(reinterpret_cast<const T*>(&raw[k]));
                total += w;
#pragma unroll
                for (int j = 0; j < 8; j++) sum[j] += w * part[j];
            }
        }
    }
    if (!v.real) return;
    const float factor = 1.f / total;
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] *= factor;
    store(vector_of<N>(p, y, v.row, v.head) + v.lane * 8, sum);
    if (lse && v.lane == 0) lse[size_t(v.row) * p.heads + v.head] = top + logf(total);
}

// dq [rows, heads N] of the group's heads from its slots.
template <class T, int N> __device__ __forceinline__ void merge_dq(const Plan& p, const int* picks, const T* parts, T* dq) {
    constexpr int LANES = N / 8, AHEAD = Vector<N>::AHEAD;
    const Vector<N> v(p);
    if (dense_row(p, v.row)) return;
    Vec sum = v.part(p, parts, p.slots - 1);
    uint4 raw[AHEAD];
    for (int first = 0; first < p.slots - 1; first += LANES) {
        const unsigned used = v.used(v.of_slot(p, picks, first + v.lane));
#pragma unroll
        for (int i = 0; i < LANES; i += AHEAD) {
            v.fetch(p, raw, parts, first + i, used >> i);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const Vec part = load(reinterpret_cast<const T*>(&raw[k]));
#pragma unroll
                for (int j = 0; j < 8; j++) sum[j] += part[j];
            }
        }
    }
    if (v.real) store(vector_of<N>(p, dq, v.row, v.head) + v.lane * 8, sum);
}

// out [rows, group, slots, N]: the part of dq that each slot's keys give. Shared memory: tiles of q and dy, two steps of keys and values.
template <class T, int N>
__device__ __forceinline__ void back_queries(const Plan& p, const T* q, const T* dy, const float2* stats, const List* lists, const int* entries, T* out) {
    constexpr int M = TILE<N>, P = WIDTH<N>, B = BLOCKS<N>, W = 16;
    DYNAMIC_SHARED(memory);
    T* tile = aligned<T>(memory);
    const int lane = threadIdx.x & 31, head = p.first + blockIdx.y;
    const float scale = rsqrtf(float(N));
    uint32_t a[B][N / 16][4], d[B][N / 16][4];
    float o[B][N / 8][4];
    float2 stat[B][2];
    const auto queries = [&](auto row) {
        gather<N, M, 128, false>(p, tile, q, head, row);
        gather<N, M, 128, false>(p, tile + M * P, dy, head, row);
    };
    const auto begin = [&](const Tile&, const int* entry) {
#pragma unroll
        for (int i = 0; i < 2 * B; i++) {
            const int e = entry[row_of(i / 2, i % 2)];
            stat[i / 2][i % 2] = e < 0 ? make_float2(0.f, 0.f) : stats[size_t(row_in(p, e)) * p.heads + head];
        }
        load_rows<N>(a, tile);
        load_rows<N>(d, tile + M * P);
#pragma unroll
        for (int i = 0; i < B * N / 2; i++) o[i / (N / 2)][i / 4 % (N / 8)][i % 4] = 0.f;
    };
    const auto compute = [&](const Tile& t, int step, const T* keys) {
#pragma unroll 1
        for (int j = 0; j < KEYS<N>; j += W) {
            const int key = t.from + step * KEYS<N> + j;
            const Sight sees = sight(p, t, key, W);
            if (sees == NOTHING) continue;
            float c[B][W / 8][4], e[B][W / 8][4];
            times_rows<T, N, W>(c, a, keys, j);
            times_rows<T, N, W>(e, d, keys + KEYS<N> * P, j);
#pragma unroll
            for (int m = 0; m < B; m++)
#pragma unroll
                for (int i = 0; i < W / 2; i++) {
                    const float2 l = stat[m][i % 4 / 2];
                    float w = exp2_fast(fmaf(c[m][i / 4][i % 4], scale * LOG2E, -l.x));
                    if (sees == PART && !seen(p, t, t.position + row_of(m, i % 4 / 2), key + i / 4 * 8 + lane % 4 * 2 + i % 2)) w = 0.f;
                    c[m][i / 4][i % 4] = w * (e[m][i / 4][i % 4] - l.y);
                }
            add_product<T, N, W>(o, c, keys, j);
        }
    };
    const auto end = [&](const Tile& t, const int* entry, T* scratch) {
        float factor[B][2];
#pragma unroll
        for (int i = 0; i < 2 * B; i++) factor[i / 2][i % 2] = scale;
        store_slots<T, N>(p, out, scratch, entry, o, factor);
    };
    each_tile<T, N>(p, lists, entries, tile + 2 * M * P, queries, begin, compute, end);
}

// 8 bytes from device memory to shared memory in the background; zeros if !valid.
__device__ __forceinline__ void copy_async_8(void* to, const void* from, bool valid) {
#ifndef ANSER_EMULATOR
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 8 : 0) : "memory");
#else
    valid ? memcpy(to, from, 8) : memset(to, 0, 8);
#endif
}

// Keys of a tile, 16 a warp, and queries of a step.
constexpr int KEY_TILE = 64;
template <int N> constexpr int STEP = N == 64 ? 64 : 32;

// dk, dv of a tile of keys of a chunk: a piece of the chunk's list and, with the first piece, the later queries of the chunk. Where a list
// has several pieces they leave f32 parts [group, pieces, 2, size, N], which `add_pieces` adds up.
//
// A query that isn't there is zero with a weight of 1, and adds nothing.
template <class T, int N>
__device__ __forceinline__ void back_keys(const Plan& p, const T* q, const T* dy, const float2* stats, const List* lists, const int* entries, float* parts, T* dk, T* dv) {
    constexpr int P = WIDTH<N>, K = KEY_TILE, Q = STEP<N>, THREADS = 2 * K, V = N / 8, PASSES = Q * V / THREADS, W = 16;
    constexpr int STAGE = 2 * Q * P;
    DYNAMIC_SHARED(memory);
    T *keys = aligned<T>(memory), *values = keys + K * P, *stages = values + K * P;
    float2* stat_stages = reinterpret_cast<float2*>(stages + 2 * STAGE);
    const Sequence& s = sequence_of<&Sequence::piece_base>(p, blockIdx.x);
    const int tiles = (p.size + K - 1) / K, local = int(blockIdx.x) - s.piece_base, number = local / tiles;
    const List* all = p.slots > 1 ? lists_of(p, s, lists, blockIdx.y) : nullptr;
    const int chunk = all ? last_up_to(s.chunks, number, [&](int i) { return all[i].piece; }) : number;
    const List list = all ? all[chunk] : List{0, 0, 0, chunk};
    const int pieces = max(1, (list.size + p.piece - 1) / p.piece), piece = number - list.piece;
    const int first = chunk * p.size + local % tiles * K, end = min((chunk + 1) * p.size, s.len);
    if (piece >= pieces || chunk >= s.chunks || first >= end) return;
    const int head = p.first + blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x / 32 * 16;
    const int* chosen = all ? entries_of(p, s, entries, blockIdx.y) + list.first : nullptr;
    const int from = piece * p.piece, to = min(list.size, from + p.piece);
    const int own = piece == 0 ? (end - first + Q - 1) / Q : 0, steps = own + (to - from + Q - 1) / Q;

    const auto key_row = [&](int r) { return first + r < end ? first + r : -1; };
    gather<N, K, THREADS, true>(p, keys, static_cast<const T*>(s.keys), head, key_row);
    gather<N, K, THREADS, true>(p, values, static_cast<const T*>(s.values), head, key_row);
    copy_commit();
    // The rows of a thread's part of a step are fetched one step ahead of the rows' data.
    int row[PASSES];
    const auto find = [&](int step) {
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const int r = (threadIdx.x + i * THREADS) / V, mine = first + step * Q + r, other = from + (step - own) * Q + r;
            row[i] = step < own ? (mine < end ? s.first_row + mine : -1) : other < to ? row_in(p, chosen[other]) : -1;
        }
    };
    const auto fetch = [&](int step) {
        T* stage = stages + step % 2 * STAGE;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const int x = threadIdx.x + i * THREADS, r = x / V, col = x % V * 8, at = max(row[i], 0);
            copy_async(stage + place<N>(r, col), vector_of<N>(p, q, at, head) + col, row[i] >= 0);
            copy_async(stage + Q * P + place<N>(r, col), vector_of<N>(p, dy, at, head) + col, row[i] >= 0);
            if (col == 0) copy_async_8(stat_stages + step % 2 * Q + r, stats + size_t(at) * p.heads + head, row[i] >= 0);
        }
        copy_commit();
    };
    find(0);
    fetch(0);
    find(1);

    const float scale = rsqrtf(float(N));
    float sk[1][N / 8][4] = {}, sv[1][N / 8][4] = {};
    constexpr bool KEPT = N == 64; // keys and values stay in registers
    uint32_t ka[1][N / 16][4], va[1][N / 16][4];
    for (int step = 0; step < steps; step++) {
        wait_for_copies();
        if (KEPT && step == 0) {
            load_rows<N>(ka, keys);
            load_rows<N>(va, values);
        }
        if (step + 1 < steps) {
            fetch(step + 1);
            find(step + 2);
        }
        const T *queries = stages + step % 2 * STAGE, *grads = queries + Q * P;
        const float2* stat = stat_stages + step % 2 * Q;
        const int query = step < own ? first + step * Q : s.len; // positions count on own queries only
#pragma unroll 1
        for (int j = 0; j < Q; j += W) {
            float c[1][W / 8][4], e[1][W / 8][4];
            if (!KEPT) load_rows<N>(ka, keys);
            times_rows<T, N, W>(c, ka, queries, j);
            if (!KEPT) load_rows<N>(va, values);
            times_rows<T, N, W>(e, va, grads, j);
            const bool part = query + j < first + warp + 15;
#pragma unroll
            for (int i = 0; i < W / 8; i++) {
                const float4 l = *reinterpret_cast<const float4*>(stat + j + 8 * i + lane % 4 * 2);
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    float w = exp2_fast(fmaf(c[0][i][x], scale * LOG2E, -(x % 2 ? l.z : l.x)));
                    if (part && query + j + 8 * i + lane % 4 * 2 + x % 2 < first + row_of(0, x / 2)) w = 0.f;
                    c[0][i][x] = w;
                    e[0][i][x] = w * (e[0][i][x] - (x % 2 ? l.w : l.y));
                }
            }
            add_product<T, N, W>(sv, c, grads, j);
            add_product<T, N, W>(sk, e, queries, j);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int key = first + row_of(0, half);
        if (key >= end) continue;
#pragma unroll
        for (int k = 0; k < N / 8; k++) {
            const int col = 8 * k + lane % 4 * 2;
            const float x = sk[0][k][2 * half] * scale, y = sk[0][k][2 * half + 1] * scale, z = sv[0][k][2 * half], w = sv[0][k][2 * half + 1];
            if (pieces == 1) {
                *reinterpret_cast<uint32_t*>(vector_of<N>(p, dk, s.first_row + key, head) + col) = pack<T>(x, y);
                *reinterpret_cast<uint32_t*>(vector_of<N>(p, dv, s.first_row + key, head) + col) = pack<T>(z, w);
            } else {
                float* at = parts + ((size_t(blockIdx.y) * p.pieces + s.piece_base / tiles + number) * 2 * p.size + key - chunk * p.size) * N + col;
                *reinterpret_cast<float2*>(at) = make_float2(x, y);
                *reinterpret_cast<float2*>(at + size_t(p.size) * N) = make_float2(z, w);
            }
        }
    }
}

// Adds up the parts of chunks whose lists have several pieces; 16 rows a block.
template <class T, int N> __device__ __forceinline__ void add_pieces(const Plan& p, const List* lists, const float* parts, T* dk, T* dv) {
    const int blocks = (p.size + 15) / 16;
    const Sequence& s = sequence_of<&Sequence::chunk_base>(p, blockIdx.x / blocks);
    const int chunk = int(blockIdx.x) / blocks - s.chunk_base, tiles = (p.size + p.key_tile - 1) / p.key_tile;
    const List list = lists_of(p, s, lists, blockIdx.y)[chunk];
    const int pieces = (list.size + p.piece - 1) / p.piece, i = threadIdx.x / (N / 8) + int(blockIdx.x) % blocks * 16, col = threadIdx.x % (N / 8) * 8;
    if (pieces < 2 || i >= p.size || chunk * p.size + i >= s.len) return;
    for (int which = 0; which < 2; which++) {
        Vec sum = zeros();
        for (int piece = 0; piece < pieces; piece++) {
            const Vec x = load(parts + (((size_t(blockIdx.y) * p.pieces + s.piece_base / tiles + list.piece + piece) * 2 + which) * p.size + i) * N + col);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += x[j];
        }
        store(vector_of<N>(p, which ? dv : dk, s.first_row + chunk * p.size + i, p.first + blockIdx.y) + col, sum);
    }
}

} // namespace chunks
