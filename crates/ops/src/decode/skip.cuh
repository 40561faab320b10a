// The second product of channel mixing, x += k W, for k = relu(.)^2 [B, hidden] and W [hidden, C]: rows of W under zeros are not read.
//
// A block has 256 channels (blockIdx.x) and a share of the hidden rows (blockIdx.y), of which its warps take up to 32 at a time: a lane looks whether one of
// them is under a non-zero. The block that ends last for its channels adds all shares, in their order.
#pragma once
#include "overlap.cuh"

constexpr int SKIP_WARPS = 16;
constexpr int SKIP_LOADS = 8; // rows that a warp waits for at once

// parts [shares, B, C]; ended [C / 256] zeros before and after; count += rows read. The rows `slots` of `last` become those of `now` [B, C].
template <class T, int B>
__device__ void skip(const T* w, const T* k, float* x, float* parts, unsigned* ended, unsigned* count, const T* now, T* last, const int* slots,
                     int hidden, int c, int share) {
    __shared__ __align__(16) float all[SKIP_WARPS * 256];
    __shared__ unsigned read[SKIP_WARPS], final;
    let_next_start();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int col = blockIdx.x * 256 + lane * 8, first = blockIdx.y * share, rows = min(share, hidden - first);
    wait_for_previous();
    Vec sum[B];
#pragma unroll
    for (int b = 0; b < B; b++) sum[b] = zeros();
    unsigned n = 0;
    const int taken = min((share + SKIP_WARPS - 1) / SKIP_WARPS, 32);
    for (int i = warp * taken; i < rows; i += SKIP_WARPS * taken) {
        float f[B];
        bool some = false;
#pragma unroll
        for (int b = 0; b < B; b++) {
            f[b] = lane < taken && i + lane < rows ? load_fresh_one(k + size_t(b) * hidden + first + i + lane) : 0.f;
            some |= f[b] != 0.f;
        }
        unsigned left = __ballot_sync(~0u, some);
        n += __popc(left);
        const T* from = w + size_t(first + i) * c + col;
        while (left) {
            int row[SKIP_LOADS];
            uint4 a[SKIP_LOADS];
#pragma unroll
            for (int j = 0; j < SKIP_LOADS; j++) {
                row[j] = __ffs(left) - 1;
                left &= left - 1;
                if (row[j] >= 0 && col < c) a[j] = load_once(from + size_t(row[j]) * c);
            }
#pragma unroll
            for (int j = 0; j < SKIP_LOADS; j++) {
                if (row[j] < 0) break;
                const Vec v = col < c ? unpack8<T>(a[j]) : zeros();
#pragma unroll
                for (int b = 0; b < B; b++) {
                    const float s = __shfl_sync(~0u, f[b], row[j]);
#pragma unroll
                    for (int e = 0; e < 8; e++) sum[b][e] = fmaf(v[e], s, sum[b][e]);
                }
            }
        }
    }
    if (lane == 0) read[warp] = n;
    for (int b = 0; b < B; b++) {
        store(all + warp * 256 + lane * 8, sum[b]);
        __syncthreads();
        if (threadIdx.x < 256) {
            float s = 0.f;
            for (int i = 0; i < SKIP_WARPS; i++) s += all[i * 256 + threadIdx.x];
            const int at = blockIdx.x * 256 + threadIdx.x;
            if (at < c) {
                __stcg(parts + (size_t(blockIdx.y) * B + b) * c + at, s);
                if (blockIdx.y == 0) last[size_t(slots[b]) * c + at] = from_f32<T>(load_fresh_one(now + size_t(b) * c + at));
            }
        }
        __syncthreads();
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        final = atomicAdd(ended + blockIdx.x, 1u) == gridDim.y - 1;
        unsigned rows_read = 0;
        for (int i = 0; i < SKIP_WARPS; i++) rows_read += read[i];
        if (blockIdx.x == 0) atomicAdd(count, rows_read);
    }
    __syncthreads();
    if (!final) return;
    __threadfence();
    for (int i = threadIdx.x; i < 256 * B; i += blockDim.x) {
        const int b = i / 256, at = blockIdx.x * 256 + i % 256;
        if (at >= c) continue;
        float s = 0.f;
#pragma unroll 16
        for (int g = 0; g < gridDim.y; g++) s += __ldcg(parts + (size_t(g) * B + b) * c + at);
        x[size_t(b) * c + at] = __ldcg(x + size_t(b) * c + at) + s;
    }
    if (threadIdx.x == 0) ended[blockIdx.x] = 0;
}
