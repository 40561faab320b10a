// Who chose a chunk: picks [rows, heads, slots - 1] turned round into a list for each head and chunk, by a counting sort in ascending order of rows.
//
// Rows go in runs. A run counts its picks; the counts before a run, and the chunks before a chunk, say where its entries go.
#pragma once
#include "plan.cuh"

namespace chunks {

constexpr int WINDOW = 8192; // chunks that are counted at a time

struct Run {
    const Sequence& s;
    int from, to, number;
};
__device__ __forceinline__ Run run_of(const Plan& p) {
    const Sequence& s = sequence_of<&Sequence::run_base>(p, blockIdx.x);
    const int number = int(blockIdx.x) - s.run_base, from = number * p.run;
    return {s, s.first_row + from, s.first_row + min(from + p.run, s.len), number};
}
__device__ __forceinline__ int* counts_of(const Plan& p, const Sequence& s, int* counts, int run) {
    return counts + size_t(blockIdx.y) * p.counts + s.count_base + size_t(run) * s.chunks;
}
__device__ __forceinline__ const int* picks_of(const Plan& p, const int* picks, int row) {
    return picks + (size_t(row) * p.heads + p.first + blockIdx.y) * (p.slots - 1);
}

__device__ void count(const Plan& p, const int* picks, int* counts, int* seen) {
    const Run r = run_of(p);
    int* to = counts_of(p, r.s, counts, r.number);
    const int k = p.slots - 1;
    for (int low = 0; low < r.s.chunks; low += WINDOW) {
        const int n = min(WINDOW, r.s.chunks - low);
        __syncthreads();
        for (int c = threadIdx.x; c < n; c += blockDim.x) seen[c] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < (r.to - r.from) * k; i += blockDim.x) {
            const int c = picks_of(p, picks, r.from + i / k)[i % k] - low;
            if (c >= 0 && c < n) atomicAdd(&seen[c], 1);
        }
        __syncthreads();
        for (int c = threadIdx.x; c < n; c += blockDim.x) to[low + c] = seen[c];
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

// Sums over the chunks before; a block of 8 warps a sequence.
__device__ void scan(const Plan& p, List* lists, int tile) {
    const Sequence& s = p.sequences[blockIdx.x];
    List* all = const_cast<List*>(lists_of(p, s, lists, blockIdx.y));
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
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 3; i++) {
            x[i] += before[i] - own[i];
            for (int w = 0; w < 8; w++) {
                if (w < warp) x[i] += sums[i][w];
                before[i] += sums[i][w];
            }
        }
        if (c < s.chunks) all[c] = {x[0], size, x[1], x[2]};
        __syncthreads();
    }
}

// A warp a run: the picks of a row are different chunks, so that lanes never meet.
__device__ void fill(const Plan& p, const int* picks, int* counts, const List* lists, int* entries, int* next) {
    const Run r = run_of(p);
    const List* all = lists_of(p, r.s, lists, blockIdx.y);
    const int* before = counts_of(p, r.s, counts, r.number);
    int* to = entries_of(p, r.s, entries, blockIdx.y);
    const int lane = threadIdx.x, k = p.slots - 1;
    for (int low = 0; low < r.s.chunks; low += WINDOW) {
        const int n = min(WINDOW, r.s.chunks - low);
        __syncwarp();
        for (int c = lane; c < n; c += 32) next[c] = all[low + c].first + before[low + c];
        __syncwarp();
        for (int first = 0; first < k; first += 32) {
            const int slot = first + lane;
            for (int row = r.from; row < r.to; row += 8) {
                int c[8];
#pragma unroll
                for (int i = 0; i < 8; i++) c[i] = row + i < r.to && slot < k ? picks_of(p, picks, row + i)[slot] - low : -1;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    if (c[i] >= 0 && c[i] < n) to[next[c[i]]++] = entry_of(p, row + i, slot);
                    __syncwarp();
                }
            }
        }
    }
}

} // namespace chunks
