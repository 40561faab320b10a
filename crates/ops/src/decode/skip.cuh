// The second product of channel mixing, x += k W, for k = relu(.)^2 [B, hidden] (f32) and W [hidden, C]: rows of W under zeros are not read.
//
// A block has 256 channels (blockIdx.x) and a share of the hidden rows (blockIdx.y); its warps take the rows under non-zeros in turn. The block
// that ends last for its channels adds all shares, in their order.
#pragma once
#include "overlap.cuh"

constexpr int SKIP_WARPS = 16;
constexpr int SKIP_ROWS = 2048; // of a share at most

// parts [shares, B, C]; ended [C / 256] zeros before and after; count (may be null) += rows read.
template <class T, int B, int DEPTH>
__device__ void skip(const T* w, const float* k, float* x, float* parts, unsigned* ended, unsigned* count, int hidden, int c, int share) {
    DYNAMIC_SHARED(dynamic);
    __shared__ unsigned short list[SKIP_ROWS];
    __shared__ int found[SKIP_WARPS];
    __shared__ unsigned last;
    let_next_start();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int col = blockIdx.x * 256 + lane * 8, first = blockIdx.y * share, rows = min(share, hidden - first);
    T* ring = reinterpret_cast<T*>(dynamic) + threadIdx.x * 8;
    constexpr int STRIDE = SKIP_WARPS * 32 * 8;
    wait_for_previous();
    // The rows under non-zeros, in order: every warp looks through a run of rows twice, to count and to list.
    const int run = (rows + SKIP_WARPS * 32 - 1) / (SKIP_WARPS * 32) * 32;
    int n = 0;
    for (int pass = 0; pass < 2; pass++) {
        int at = 0;
        if (pass)
            for (int i = 0; i < warp; i++) at += found[i];
        for (int i = warp * run; i < min(rows, (warp + 1) * run); i += 32) {
            bool some = false;
            if (i + lane < rows)
                for (int b = 0; b < B; b++) some |= __ldcg(k + size_t(b) * hidden + first + i + lane) != 0.f;
            const unsigned bits = __ballot_sync(~0u, some);
            if (pass && some) list[at + __popc(bits & ((1u << lane) - 1))] = i + lane;
            at += __popc(bits);
        }
        if (!pass && lane == 0) found[warp] = at;
        __syncthreads();
    }
    for (int i = 0; i < SKIP_WARPS; i++) n += found[i];
    const auto begin = [&](int i) {
        const int at = i * SKIP_WARPS + warp;
        if (at < n && col < c) copy8(ring + (i % DEPTH) * STRIDE, w + size_t(first + list[at]) * c + col);
        copy_commit();
    };
    for (int i = 0; i < DEPTH - 1; i++) begin(i);
    Vec sum[B];
#pragma unroll
    for (int b = 0; b < B; b++) sum[b] = zeros();
    for (int i = 0; i * SKIP_WARPS + warp < n; i++) {
        float f[B];
#pragma unroll
        for (int b = 0; b < B; b++) f[b] = __ldcg(k + size_t(b) * hidden + first + list[i * SKIP_WARPS + warp]);
        copy_wait<DEPTH - 2>();
        if (col < c) {
            const Vec a = load(ring + (i % DEPTH) * STRIDE);
#pragma unroll
            for (int b = 0; b < B; b++)
#pragma unroll
                for (int j = 0; j < 8; j++) sum[b][j] = fmaf(a[j], f[b], sum[b][j]);
        }
        begin(i + DEPTH - 1);
    }
    copy_wait<0>();
    __syncthreads();
    // Over the warps, in order, through the memory of the ring.
    float* all = reinterpret_cast<float*>(dynamic); // [warps, 256]
    for (int b = 0; b < B; b++) {
        store(all + warp * 256 + lane * 8, sum[b]);
        __syncthreads();
        if (threadIdx.x < 256) {
            float s = 0.f;
            for (int i = 0; i < SKIP_WARPS; i++) s += all[i * 256 + threadIdx.x];
            const int at = blockIdx.x * 256 + threadIdx.x;
            if (at < c) __stcg(parts + (size_t(blockIdx.y) * B + b) * c + at, s);
        }
        __syncthreads();
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ended + blockIdx.x, 1u) == gridDim.y - 1;
        if (count && blockIdx.x == 0) atomicAdd(count, unsigned(n));
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x; i < 256 * B; i += blockDim.x) {
        const int b = i / 256, at = blockIdx.x * 256 + i % 256;
        if (at >= c) continue;
        float s = 0.f;
        for (int g = 0; g < gridDim.y; g++) s += __ldcg(parts + (size_t(g) * B + b) * c + at);
        x[size_t(b) * c + at] = __ldcg(x + size_t(b) * c + at) + s;
    }
    if (threadIdx.x == 0) ended[blockIdx.x] = 0;
}
