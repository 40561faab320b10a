// The low-rank maps of more than a few sequences, as products of their own on tensor cores: inputs and weights lie in the second-level cache or are small, so
// that what counts is how many blocks copy at once.
//
// A block computes a square of 64 sequences by 64 columns: its 8 warps 16 by 32 each, over k in steps of 64 that pass through a ring of copies. First halves
// share k among blocks; the last of a square adds the parts in order.
#pragma once
#include "heads.cuh"

constexpr int SIDE = 64, PITCH = SIDE + 8, SQUARE_STAGES = 4;

// sum += x w over `steps` steps, for warp (m, n) rows 16 m and columns 32 n of the square. `x(step, row, col)` and `w(step, row, col)` say where eight elements
// of a step are, null for zeros: of x [64 sequences, 64 of k], of w [64 columns, 64 of k] or, by inputs, [64 of k, 64 columns].
template <class T, bool BY_INPUTS, class X, class W>
__device__ __forceinline__ void square(float (&sum)[4][4], int steps, X x, W w) {
    DYNAMIC_SHARED(dynamic);
    T* ring = reinterpret_cast<T*>(dynamic);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, m = warp & 3, n = warp >> 2;
    const auto place = [&](int step, int which) { return ring + (step % SQUARE_STAGES * 2 + which) * SIDE * PITCH; };
    const auto begin = [&](int step, int which, auto from) {
        if (step >= steps) return;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = (threadIdx.x >> 3) + i * 32, col = threadIdx.x % 8 * 8;
            const T* p = from(step, row, col);
            copy_async(place(step, which) + row * PITCH + col, p ? p : from(0, 0, 0), p);
        }
    };
    for (int i = 0; i < SQUARE_STAGES - 1; i++) begin(i, 1, w);
    wait_for_previous();
    for (int i = 0; i < SQUARE_STAGES - 1; i++) {
        begin(i, 0, x);
        copy_commit();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = 0.f;
    for (int step = 0; step < steps; step++) {
        copy_wait<SQUARE_STAGES - 2>();
        __syncthreads();
        begin(step + SQUARE_STAGES - 1, 1, w);
        begin(step + SQUARE_STAGES - 1, 0, x);
        copy_commit();
        const T* rows = place(step, 0) + (m * 16 + lane % 16) * PITCH + lane / 16 * 8;
        const T* columns = place(step, 1);
        const int low = lane / 8 % 2 * 8, high = n * 32 + lane / 16 * 8, within = lane % 8;
#pragma unroll
        for (int k = 0; k < SIDE; k += 16) {
            uint32_t a[4], b[4];
            load_tiles(a, rows + k);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (BY_INPUTS)
                    load_tiles_transposed(b, columns + (k + low + within) * PITCH + high + i * 16);
                else
                    load_tiles(b, columns + (high + i * 16 + within) * PITCH + k + low);
                mma<T>(sum[i * 2], a, b[0], b[1]);
                mma<T>(sum[i * 2 + 1], a, b[2], b[3]);
            }
        }
    }
}

// Gives the sums of a square to `to(sequence, column, two sums)`.
template <class To> __device__ __forceinline__ void each_pair(float (&sum)[4][4], To to) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int row = (warp & 3) * 16 + (lane >> 2), col = (warp >> 2) * 32 + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) to(row + j * 8, col + i * 8, make_float2(sum[i][j * 2], sum[i][j * 2 + 1]));
}

// halves [batch, squares * 64] = the functions of the first halves x W^T, for x [inputs, batch, c] and W [ranks, c]; columns of a square that are past its
// rows of W are not read. work[square] = {first row of W, rows, input, map}; blockIdx.x: squares by `shares` of `width` columns of W each; blockIdx.y: sequences
// 64 at a time. parts [blocks, 4096]; ended [squares of the grid] zeros before and after.
template <class T>
__device__ void downs(const T* w, const T* x, T* halves, float* parts, unsigned* ended, const int4* work, int batch, int c, int shares, int width) {
    __shared__ unsigned last;
    let_next_start();
    const int at = blockIdx.x / shares, share = blockIdx.x % shares, squares = gridDim.x / shares, b0 = blockIdx.y * SIDE;
    const int4 mine = work[at];
    const int k0 = share * width, kn = min(width, c - k0);
    x += (size_t(mine.z) * batch + b0) * c + k0;
    w += size_t(mine.x) * c + k0;
    float sum[4][4];
    square<T, false>(
        sum, (kn + SIDE - 1) / SIDE,
        [&](int step, int row, int col) { return b0 + row < batch && step * SIDE + col < kn ? x + size_t(row) * c + step * SIDE + col : nullptr; },
        [&](int step, int row, int col) { return row < mine.y && step * SIDE + col < kn ? w + size_t(row) * c + step * SIDE + col : nullptr; });
    if (shares > 1) {
        const int here = blockIdx.y * squares + at;
        float4* to = reinterpret_cast<float4*>(parts) + size_t(here) * shares * 1024 + threadIdx.x;
#pragma unroll
        for (int i = 0; i < 4; i++) __stcg(to + share * 1024 + i * 256, make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(ended + here, 1u) == unsigned(shares - 1);
        __syncthreads();
        if (!last) return;
        __threadfence();
        if (threadIdx.x == 0) ended[here] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] = 0.f;
#pragma unroll 4
        for (int p = 0; p < shares; p++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 v = __ldcg(to + p * 1024 + i * 256);
                sum[i][0] += v.x, sum[i][1] += v.y, sum[i][2] += v.z, sum[i][3] += v.w;
            }
    }
    const auto f = [&](float v) { return mine.w == 0 ? tanhf(v) : mine.w == 3 ? sigmoid(v) : v; };
    each_pair(sum, [&](int row, int col, float2 v) {
        if (b0 + row < batch)
            *reinterpret_cast<uint32_t*>(halves + size_t(b0 + row) * squares * SIDE + at * SIDE + col) = pack<T>(f(v.x), f(v.y));
    });
}

// y [4, batch, c] = the second halves of the low-rank maps. work[blockIdx.x] = {first channel, rank, map, first column of halves}; halves [batch, stride];
// blockIdx.y: sequences 64 at a time.
template <class T> __device__ void ups(const T* halves, int stride, Maps maps, float* y, const int4* work, int batch, int c) {
    let_next_start();
    const int4 mine = work[blockIdx.x];
    const int b0 = blockIdx.y * SIDE, left = c - mine.x;
    halves += size_t(b0) * stride + mine.w;
    const T* w = static_cast<const T*>(maps.up[mine.z]) + mine.x;
    float sum[4][4];
    square<T, true>(
        sum, (mine.y + SIDE - 1) / SIDE,
        [&](int step, int row, int col) { return b0 + row < batch ? halves + size_t(row) * stride + step * SIDE + col : nullptr; },
        [&](int step, int row, int col) { return step * SIDE + row < mine.y && col < left ? w + size_t(step * SIDE + row) * c + col : nullptr; });
    y += (size_t(mine.z) * batch + b0) * c + mine.x;
    each_pair(sum, [&](int row, int col, float2 v) {
        if (b0 + row < batch && col < left) *reinterpret_cast<float2*>(y + size_t(row) * c + col) = v;
    });
}
