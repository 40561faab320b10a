// Who chose a chunk: picks [heads, rows, slots - 1] turned round into a list for each head and chunk, by a counting sort in ascending order of rows.
//
// Rows go in runs of 128. For each chunk a run has a set of its rows, a bit each: their number is the run's count, and a row's place among them is that of its
// entry. The counts before a run, and the chunks before a chunk, say where a run's entries go.
#pragma once
#include "plan.cuh"

namespace chunks {

constexpr int WINDOW = 1024; // chunks that have sets at a time

struct Run {
    const Sequence& s;
    int first, from, to, number; // its first row; rows that are listed
};
__device__ __forceinline__ Run run_of(const Plan& p) {
    const Sequence& s = sequence_of<&Sequence::run_base>(p, blockIdx.x);
    const int number = int(blockIdx.x) - s.run_base, from = number * p.run;
    return {s, s.first_row + from, s.first_row + max(from, p.dense - s.past), s.first_row + min(from + p.run, s.len), number};
}
__device__ __forceinline__ int* counts_of(const Plan& p, const Sequence& s, int* counts, int run) {
    return counts + size_t(blockIdx.y) * p.counts + s.count_base + size_t(run) * s.chunks;
}
template <class Int> __device__ __forceinline__ Int* picks_of(const Plan& p, Int* picks, int row) {
    return picks + (size_t(p.first + blockIdx.y) * p.rows + row) * (p.slots - 1);
}

// Rows of a run that chose a chunk.
using Set = uint4;
__device__ __forceinline__ void put(Set* sets, int c, int i) { atomicOr(reinterpret_cast<unsigned*>(sets + c) + i / 32, 1u << i % 32); }
__device__ __forceinline__ int size_of(const Set& s) { return __popc(s.x) + __popc(s.y) + __popc(s.z) + __popc(s.w); }
// Rows of the set before row i.
__device__ __forceinline__ int before_in(const Set* sets, int c, int i) {
    const unsigned* words = reinterpret_cast<const unsigned*>(sets + c);
    int n = __popc(words[i / 32] & ((1u << i % 32) - 1));
    for (int w = 0; w < i / 32; w++) n += __popc(words[w]);
    return n;
}
// Calls f(row, slot) for all picks of a run; by a block.
template <class F> __device__ __forceinline__ void each_pick(const Plan& p, const Run& r, F f) {
    const int k = p.slots - 1, bits = min(5, 32 - __clz(k - 1)), lanes = 1 << bits; // lanes of a row
    for (int row = r.from + threadIdx.x / lanes; row < r.to; row += blockDim.x / lanes)
        for (int slot = threadIdx.x % lanes; slot < k; slot += lanes) f(row, slot);
}
// The sets of a run for n chunks from `low` on; by a block.
__device__ __forceinline__ void sets_of(const Plan& p, const Run& r, const int* picks, int low, int n, Set* sets) {
    __syncthreads();
    for (int c = threadIdx.x; c < n; c += blockDim.x) sets[c] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    each_pick(p, r, [&](int row, int slot) {
        const int c = picks_of(p, picks, row)[slot] - low;
        if (c >= 0 && c < n) put(sets, c, row - r.first);
    });
    __syncthreads();
}

__device__ void count(const Plan& p, const int* picks, int* counts, Set* sets) {
    const Run r = run_of(p);
    int* to = counts_of(p, r.s, counts, r.number);
    for (int low = 0; low < r.s.chunks; low += WINDOW) {
        const int n = min(WINDOW, r.s.chunks - low);
        sets_of(p, r, picks, low, n, sets);
        for (int c = threadIdx.x; c < n; c += blockDim.x) to[low + c] = size_of(sets[c]);
    }
}

// Counts become the counts before each run. A lane has a chunk, a warp a part of the runs.
__device__ void total(const Plan& p, int* counts, List* lists) {
    __shared__ int sums[32][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunk = blockIdx.x * 32 + lane;
    const Sequence& s = sequence_of<&Sequence::chunk_base, true>(p, chunk); // lanes differ: each searches for itself
    const int runs = chunk < p.chunks ? (s.len + p.run - 1) / p.run : 0, part = (runs + 31) / 32, from = warp * part, to = min(from + part, runs);
    int* all = counts_of(p, s, counts, 0) + chunk - s.chunk_base;
    int sum = 0;
#pragma unroll 8
    for (int run = from; run < to; run++) sum += all[size_t(run) * s.chunks];
    sums[warp][lane] = sum;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; w++) before += sums[w][lane];
    if (warp == 31 && chunk < p.chunks) lists[size_t(blockIdx.y) * p.chunks + chunk].size = before + sum;
    for (int run = from; run < to; run += 8) {
        int n[8];
#pragma unroll
        for (int i = 0; i < 8; i++) n[i] = run + i < to ? all[size_t(run + i) * s.chunks] : 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (run + i < to) all[size_t(run + i) * s.chunks] = before;
            before += n[i];
        }
    }
}

// Sums over the chunks before; by 256 threads, of a sequence.
__device__ __forceinline__ void sum_up(const Plan& p, const Sequence& s, List* all, int tile) {
    __shared__ int sums[3][8];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int before[3] = {0, 0, 0};
    for (int low = 0; low < s.chunks; low += 256) {
        const int c = low + threadIdx.x, size = c < s.chunks ? all[c].size : 0;
        const int own[3] = {size, (size + tile - 1) / tile, max(1, (size + p.piece - 1) / p.piece)};
        int x[3];
#pragma unroll
        for (int i = 0; i < 3; i++) {
            x[i] = own[i];
            for (int by = 1; by < 32; by *= 2) {
                const int y = __shfl_up_sync(~0u, x[i], by);
                if (lane >= by) x[i] += y;
            }
            if (lane == 31) sums[i][warp] = x[i];
        }
        wait_barrier(1, 256);
#pragma unroll
        for (int i = 0; i < 3; i++) {
            x[i] += before[i] - own[i];
            for (int w = 0; w < 8; w++) {
                if (w < warp) x[i] += sums[i][w];
                before[i] += sums[i][w];
            }
        }
        if (c < s.chunks) all[c] = {x[0], size, x[1], x[2]};
        wait_barrier(1, 256);
    }
}
// Counters of what the kernels after have taken start from zero here.
__device__ __forceinline__ void clear(int* counters, int n) {
    for (int i = threadIdx.x; blockIdx.x + blockIdx.y == 0 && i < n; i += blockDim.x) counters[i] = 0;
}
__device__ void scan(const Plan& p, List* lists, int tile, int* counters, int n) {
    clear(counters, n);
    const Sequence& s = p.sequences[blockIdx.x];
    sum_up(p, s, const_cast<List*>(lists_of(p, s, lists, blockIdx.y)), tile);
}

// Both for a sequence of few chunks and runs: a block of 1024 threads, of which a warp takes a chunk.
__device__ void order(const Plan& p, int* counts, List* lists, int tile, int* counters, int n) {
    clear(counters, n);
    const Sequence& s = p.sequences[blockIdx.x];
    List* all = const_cast<List*>(lists_of(p, s, lists, blockIdx.y));
    const int runs = (s.len + p.run - 1) / p.run, lane = threadIdx.x & 31;
    for (int c = threadIdx.x / 32; c < s.chunks; c += 32) {
        int* of = counts_of(p, s, counts, 0) + c;
        int before = 0;
        for (int low = 0; low < runs; low += 128) { // four neighbouring runs a lane
            int m[4], sum = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) m[i] = low + 4 * lane + i < runs ? of[size_t(low + 4 * lane + i) * s.chunks] : 0;
#pragma unroll
            for (int i = 0; i < 4; i++) sum += m[i];
            int x = sum;
            for (int by = 1; by < 32; by *= 2) {
                const int y = __shfl_up_sync(~0u, x, by);
                if (lane >= by) x += y;
            }
            int at = before + x - sum;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (low + 4 * lane + i < runs) of[size_t(low + 4 * lane + i) * s.chunks] = at;
                at += m[i];
            }
            before += __shfl_sync(~0u, x, 31);
        }
        if (lane == 0) all[c].size = before;
    }
    __syncthreads();
    if (threadIdx.x < 256) sum_up(p, s, all, tile);
}

// Writes the entries of a run and, if so wanted, where each pick's is in `places` [heads, rows, slots - 1], -1 of a pick that isn't there: by a block of 256 threads.
// STAGES: entries are put into order in shared memory first, so that those of a chunk are written together.
constexpr int STAGED = 16; // picks of a row at most for that
template <bool STAGES> __device__ void fill(const Plan& p, const int* picks, const int* counts, const List* lists, int* entries, int* places, unsigned char* memory) {
    __shared__ int sums[8];
    const Run r = run_of(p);
    // Picks of a slot of every 16th row, which are fetched while other things are, -2 where there is none; `number` is that of the first row among the run's.
    const int slot = threadIdx.x % STAGED, number = threadIdx.x / STAGED;
    const size_t at = (size_t(p.first + blockIdx.y) * p.rows + r.first + number) * (p.slots - 1) + slot;
    const int step = 16 * (p.slots - 1);
    int mine[STAGED / 2];
#pragma unroll
    for (int i = 0; i < STAGED / 2; i++) {
        const int row = r.first + number + 16 * i;
        mine[i] = STAGES && slot < p.slots - 1 && row >= r.from && row < r.to ? picks[at + i * step] : -2;
    }
    const List* all = lists_of(p, r.s, lists, blockIdx.y);
    const int* before = counts_of(p, r.s, const_cast<int*>(counts), r.number);
    const int window = min(WINDOW, r.s.chunks), lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int* of_head = entries + size_t(blockIdx.y) * p.rows * (p.slots - 1);
    const int base = int(entries_of(p, r.s, entries, blockIdx.y) - of_head);
    Set* sets = reinterpret_cast<Set*>(memory);
    int *first = reinterpret_cast<int*>(sets + window), *here = first + window; // where a chunk's entries begin: in `of_head`, and in `staged`
    int2* staged = reinterpret_cast<int2*>(memory + 24 * window); // an entry and where it goes
    for (int low = 0; low < r.s.chunks; low += WINDOW) {
        const int n = min(WINDOW, r.s.chunks - low);
        __syncthreads();
        for (int c = threadIdx.x; c < n; c += blockDim.x) first[c] = base + all[low + c].first + before[low + c];
        if constexpr (!STAGES) {
            sets_of(p, r, picks, low, n, sets);
            each_pick(p, r, [&](int row, int slot) {
                const int pick = picks_of(p, picks, row)[slot], c = pick - low;
                if (pick >= 0 && (c < 0 || c >= n)) return;
                const int place = pick < 0 ? -1 : first[c] + before_in(sets, c, row - r.first);
                if (place >= 0) of_head[place] = entry_of(p, row, slot);
                if (places) picks_of(p, places, row)[slot] = place;
            });
            continue;
        }
        for (int c = threadIdx.x; c < n; c += blockDim.x) sets[c] = make_uint4(0, 0, 0, 0);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < STAGED / 2; i++) {
            const unsigned c = mine[i] - low;
            if (c < n) atomicOr(&sets[c].x + i / 2, 1u << (number + i % 2 * 16));
        }
        __syncthreads();
        // A warp has an eighth of the chunks.
        int x[WINDOW / 256], before_warp = 0, sum = 0;
#pragma unroll
        for (int i = 0; i < WINDOW / 256; i++) {
            const int c = warp * (WINDOW / 8) + 32 * i + lane, size = c < n ? size_of(sets[c]) : 0;
            int up_to = size;
            for (int by = 1; by < 32; by *= 2) {
                const int y = __shfl_up_sync(~0u, up_to, by);
                if (lane >= by) up_to += y;
            }
            x[i] = sum + up_to - size;
            sum += __shfl_sync(~0u, up_to, 31);
        }
        if (lane == 0) sums[warp] = sum;
        __syncthreads();
        sum = 0;
        for (int w = 0; w < 8; w++) {
            if (w < warp) before_warp += sums[w];
            sum += sums[w];
        }
#pragma unroll
        for (int i = 0; i < WINDOW / 256; i++) {
            const int c = warp * (WINDOW / 8) + 32 * i + lane;
            if (c < n) here[c] = before_warp + x[i];
        }
        __syncthreads();
        int* to = places + at;
        int entry = entry_of(p, r.first + number, slot);
#pragma unroll
        for (int i = 0; i < STAGED / 2; i++, to += step, entry += 16) {
            const unsigned c = mine[i] - low;
            int place = -1;
            if (c < n) {
                const Set set = sets[c];
                const unsigned words[4] = {set.x, set.y, set.z, set.w};
                int before = __popc(words[i / 2] & ((1u << (number + i % 2 * 16)) - 1));
#pragma unroll
                for (int w = 0; w < i / 2; w++) before += __popc(words[w]);
                place = first[c] + before;
                staged[here[c] + before] = make_int2(entry, place);
            }
            if (places && (c < n || mine[i] == -1)) *to = place;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < sum; i += blockDim.x) of_head[staged[i].y] = staged[i].x;
    }
}

} // namespace chunks
