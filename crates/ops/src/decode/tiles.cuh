// Products with 1 to 4 rows of x on tensor cores: the rows of W are the rows of a tile, the batch, filled up to 8, its columns.
//
// A block has a run of rows of W, and x in shared memory. Its warps are `groups` groups with different rows; the `split` warps of a group take steps of k in
// turn. A lane copies what its own fragments need to a ring of its own, 16 bytes at a time, STAGES steps ahead of their use and across the wait for the
// kernel before: no barrier stands between memory and the tensor cores. The order of k within a step is that in which it lies in memory, for W
// and x alike. Sums go over a group's warps in order.
#pragma once
#include "mix.cuh"

// What a warp takes of W [rows, k] in a step.
constexpr int ROWS = 16, STEP = 64;
constexpr int PIECES = 4; // of 16 bytes a lane copies in a step
constexpr int STAGES = 5;

struct Share {
    int batch, total, k; // sequences; rows of W; columns of W
    int split;
};

// work[block] = {first row, rows, input, 0}. `fill` puts x into shared memory [batch + 1, stride], the last row zeros.
// y [batch, total]: f32, or T with RELU_SQUARED; ADD: y +=.
template <class T, int FINISH, class Fill> __device__ __forceinline__ void tiles(const T* w, void* y, int4 mine, Share s, Fill fill) {
    DYNAMIC_SHARED(dynamic);
    const int threads = blockDim.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const int groups = (threads >> 5) / s.split, group = warp / s.split, part = warp % s.split;
    T* ring = reinterpret_cast<T*>(dynamic) + threadIdx.x * 8;
    T* held = reinterpret_cast<T*>(dynamic) + size_t(STAGES) * PIECES * threads * 8;
    const int stride = (s.k + 63) / 64 * 64 + 32;
    float* sums = reinterpret_cast<float*>(held + (s.batch + 1) * stride) + group * s.split * 128 + lane;
    const int steps = (s.k + STEP - 1) / STEP, rounds = (mine.y + ROWS * groups - 1) / (ROWS * groups), per_warp = (steps + s.split - 1) / s.split;
    // Rows of a group in a round: as even as may be, so that no warp ends long after the others.
    const int rows = (mine.y + rounds * groups - 1) / (rounds * groups);
    int ahead_round = 0, ahead_step = 0, ahead_slot = 0;
    const auto begin = [&] {
        if (ahead_round < rounds) {
            const int first = (ahead_round * groups + group) * rows, end = min(mine.y, first + rows), step = ahead_step * s.split + part;
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const int row = first + p % 2 * 8 + g, col = step * STEP + p / 2 * 32 + q * 8;
                const bool valid = row < end && col < s.k;
                copy_async(ring + (ahead_slot * PIECES + p) * threads * 8, valid ? w + size_t(mine.x + row) * s.k + col : w, valid);
            }
            if (++ahead_step == per_warp) ahead_step = 0, ahead_round++;
        }
        copy_commit();
        ahead_slot = ahead_slot + 1 == STAGES ? 0 : ahead_slot + 1;
    };
    for (int i = 0; i < STAGES - 1; i++) begin();
    wait_for_previous();
    fill(held, stride);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    int slot = 0;
    for (int round = 0; round < rounds; round++) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        for (int i = 0; i < per_warp; i++) {
            copy_wait<STAGES - 2>();
            uint4 a[PIECES];
#pragma unroll
            for (int p = 0; p < PIECES; p++) a[p] = *reinterpret_cast<const uint4*>(ring + (slot * PIECES + p) * threads * 8);
            slot = slot + 1 == STAGES ? 0 : slot + 1;
            begin();
            const int step = i * s.split + part;
            if (step >= steps) continue;
            const T* x = held + min(g, s.batch) * stride + step * STEP;
#pragma unroll
            for (int d = 0; d < 2; d++) {
                const uint4 b = *reinterpret_cast<const uint4*>(x + d * 32 + q * 8);
                const uint4 &lo = a[d * 2], &hi = a[d * 2 + 1];
                mma<T>(sum, {lo.x, hi.x, lo.y, hi.y}, b.x, b.y);
                mma<T>(sum, {lo.z, hi.z, lo.w, hi.w}, b.z, b.w);
            }
        }
        if (s.split > 1) {
            if (round) __syncthreads();
            if (part)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[part * 128 + i * 32] = sum[i];
            __syncthreads();
            if (part) continue;
            for (int p = 1; p < s.split; p++)
#pragma unroll
                for (int i = 0; i < 4; i++) sum[i] += sums[p * 128 + i * 32];
        }
        const int first = (round * groups + group) * rows, end = min(mine.y, first + rows);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = first + g + i / 2 * 8, b = q * 2 + i % 2;
            if (row >= end || b >= s.batch) continue;
            const size_t at = size_t(b) * s.total + mine.x + row;
            const float v = sum[i];
            if (FINISH == RELU_SQUARED)
                static_cast<T*>(y)[at] = from_f32<T>(v > 0.f ? v * v : 0.f);
            else if (FINISH == ADD)
                static_cast<float*>(y)[at] = __ldcg(static_cast<float*>(y) + at) + v;
            else
                static_cast<float*>(y)[at] = v;
        }
    }
}

// y += x W^T for x [batch, k].
template <class T> __device__ void output(const T* w, const T* x, float* y, const int4* work, Share s) {
    let_next_start();
    const int4 mine = work[blockIdx.x];
    tiles<T, ADD>(w, y, mine, s, [&](T* held, int stride) {
        const int pieces = (s.k + 63) / 64 * 8;
        for (int i = threadIdx.x; i < (s.batch + 1) * pieces; i += blockDim.x) {
            const int b = i / pieces, col = i % pieces * 8;
            const bool valid = b < s.batch && col < s.k;
            copy_async(held + b * stride + col, valid ? x + size_t(b) * s.k + col : x, valid);
        }
    });
}

// y = m W^T for interpolations m between h = norm(x) and `last`, or for h itself without `last`, which every block makes itself. The first writes h to `now`
// [batch, C], from where a later kernel, when all have read `last`, puts it there.
template <class T, int HELD, int FINISH>
__device__ void mixed_product(const T* w, const float* x, void* y, const int4* work, Norm norm, Mixes mu, const T* last, const int* slots, T* now,
                              Share s) {
    let_next_start();
    const int4 mine = work[blockIdx.x];
    const int c = s.k;
    const Constants<HELD> weight(norm.p[0], c), bias(norm.p[1], c), m(last ? mu.p[mine.z] : nullptr, c);
    if (last)
        for (int b = 0; b < s.batch; b++) each_vector<HELD>(c, [&](int, int at) { prefetch(last + size_t(slots[b]) * c + at); });
    tiles<T, FINISH>(w, y, mine, s, [&](T* held, int stride) {
        Vec h[HELD], next[HELD], before[HELD];
        each_vector<HELD>(c, [&](int i, int at) { next[i] = load_fresh(x + at); });
        for (int b = 0; b < s.batch; b++) {
            each_vector<HELD>(c, [&](int i, int at) {
                h[i] = next[i];
                if (HELD == 1 && last) before[i] = load_fresh(last + size_t(slots[b]) * c + at);
                if (b + 1 < s.batch) next[i] = load_fresh(x + size_t(b + 1) * c + at);
            });
            normalise<HELD>(h, weight, bias, c);
            each_vector<HELD>(c, [&](int i, int at) {
                if (last) {
                    if (HELD > 1) before[i] = load_fresh(last + size_t(slots[b]) * c + at);
                    for (int j = 0; j < 8; j++) h[i][j] = to_f32(from_f32<T>(h[i][j]));
                    if (blockIdx.x == 0) store(now + size_t(b) * c + at, h[i]);
                    const Vec f = m.at(at);
                    for (int j = 0; j < 8; j++) h[i][j] += (before[i][j] - h[i][j]) * f[j];
                }
                store(held + b * stride + at, h[i]);
            });
        }
        // Zeros: the columns behind the last, and the row that stands for no sequence.
        for (int b = 0; b <= s.batch; b++)
            for (int i = (b < s.batch ? c : 0) + threadIdx.x; i < stride; i += blockDim.x) held[b * stride + i] = from_f32<T>(0.f);
    });
}
