// Products with 5 to 64 rows of x on tensor cores: the rows of W are the rows of a tile, the batch, filled up to a multiple of 8, its columns.
//
// A block has a run of rows of W and a share of the columns k, for which it holds x in shared memory. Its warps are `groups` groups with different
// rows; the `split` warps of a group take steps of k in turn. A lane copies what its own fragments need to a ring of its own, 16 bytes at a time,
// STAGES steps ahead of their use and across the wait for the kernel before: no barrier stands between memory and the tensor cores. The order
// of k within a step is that in which it lies in memory, for W and x alike. Sums go over a group's warps in order, then over the shares in order, by
// the block that ends last.
#pragma once
#include "heads.cuh"
#include "mix.cuh"

// How W is stored, and what a warp takes of it in a step: [rows, k], 32 rows by 32 of k, or 16 by 64 with few sequences, or by inputs, [k, rows], 16 of k
// by 64 rows.
template <bool BY_INPUTS, int NT> struct Tile {
    static constexpr int ROWS = BY_INPUTS ? 64 : NT == 1 ? 16 : 32, STEP = BY_INPUTS ? 16 : NT == 1 ? 64 : 32, HIGH = ROWS / 16;
    static constexpr int PAD = BY_INPUTS ? 16 : 32, DEEP = BY_INPUTS ? 1 : STEP / 32;
};
constexpr int PIECES = 4; // of 16 bytes a lane copies in a step

// The lower and the upper halves of two words.
__device__ __forceinline__ uint32_t low(uint32_t x, uint32_t y) { return (x & 0xffffu) | y << 16; }
__device__ __forceinline__ uint32_t high(uint32_t x, uint32_t y) { return x >> 16 | (y & 0xffff0000u); }

constexpr int stages(int nt) { return nt > 4 ? 4 : 5; }

template <int NT> __device__ __forceinline__ int held_rows(int batch) { return NT == 1 ? batch + 1 : NT * 8; }

struct Share {
    int batch, total, k, width; // sequences; rows of W; columns of W, and of a share
    int split, shares;
};

// work[block] = {first row, rows, input, share}, blocks of a share after each other. `fill` puts x of the share into shared memory [8 NT, stride],
// or [batch + 1, stride] with NT = 1, the last row zeros.
// y [batch, total]: f32, or T with RELU_SQUARED; ADD: y +=. parts [shares, batch, total] f32; ended [blocks / shares] zeros before and after.
template <class T, int NT, int FINISH, bool BY_INPUTS, class Fill>
__device__ __forceinline__ void tiles(const T* w, void* y, float* parts, unsigned* ended, int4 mine, Share s, Fill fill) {
    using W = Tile<BY_INPUTS, NT>;
    constexpr int STAGES = stages(NT);
    DYNAMIC_SHARED(dynamic);
    __shared__ unsigned last;
    const int threads = blockDim.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const int groups = (threads >> 5) / s.split, group = warp / s.split, part = warp % s.split;
    T* ring = reinterpret_cast<T*>(dynamic) + threadIdx.x * 8;
    T* held = reinterpret_cast<T*>(dynamic) + size_t(STAGES) * PIECES * threads * 8;
    const int stride = (s.width + 63) / 64 * 64 + W::PAD;
    float* sums = reinterpret_cast<float*>(held + held_rows<NT>(s.batch) * stride) + group * (W::ROWS * NT * 8) + lane;
    const int k0 = mine.w * s.width, kn = min(s.width, s.k - k0), steps = (kn + W::STEP - 1) / W::STEP;
    const int rounds = (mine.y + W::ROWS * groups - 1) / (W::ROWS * groups), per_warp = (steps + s.split - 1) / s.split;
    // Rows of a group in a round: as even as may be, so that no warp ends long after the others.
    const int rows = BY_INPUTS ? W::ROWS : (mine.y + rounds * groups - 1) / (rounds * groups);
    int ahead_round = 0, ahead_step = 0, ahead_slot = 0;
    const auto begin = [&] {
        if (ahead_round < rounds) {
            const int first = (ahead_round * groups + group) * rows, end = min(mine.y, first + rows), step = ahead_step * s.split + part;
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const int row = first + (BY_INPUTS ? g * 8 : p % (2 * W::HIGH) * 8 + g);
                const int col = step * W::STEP + (BY_INPUTS ? q * 4 + p : p / (2 * W::HIGH) * 32 + q * 8);
                const bool valid = row < end && col < kn;
                const size_t at = BY_INPUTS ? size_t(k0 + col) * s.total + mine.x + row : size_t(mine.x + row) * s.k + k0 + col;
                copy_async(ring + (ahead_slot * PIECES + p) * threads * 8, valid ? w + at : w, valid);
            }
            if (++ahead_step == per_warp) ahead_step = 0, ahead_round++;
        }
        copy_commit();
        ahead_slot = ahead_slot + 1 == STAGES ? 0 : ahead_slot + 1;
    };
    for (int i = 0; i < STAGES - 1; i++) begin();
    wait_for_previous();
    fill(held, stride, k0, kn);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    const auto finish = [&](int b, int row, float v) {
        const size_t at = size_t(b) * s.total + mine.x + row;
        if (FINISH == RELU_SQUARED)
            static_cast<T*>(y)[at] = from_f32<T>(v > 0.f ? v * v : 0.f);
        else if (FINISH == ADD)
            static_cast<float*>(y)[at] = __ldcg(static_cast<float*>(y) + at) + v;
        else
            static_cast<float*>(y)[at] = v;
    };
    int slot = 0;
    for (int round = 0; round < rounds; round++) {
        float sum[W::HIGH][NT][4];
#pragma unroll
        for (int m = 0; m < W::HIGH; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) sum[m][n][i] = 0.f;
        for (int i = 0; i < per_warp; i++) {
            copy_wait<STAGES - 2>();
            uint4 a[PIECES];
#pragma unroll
            for (int p = 0; p < PIECES; p++) a[p] = *reinterpret_cast<const uint4*>(ring + (slot * PIECES + p) * threads * 8);
            slot = slot + 1 == STAGES ? 0 : slot + 1;
            begin();
            const int step = i * s.split + part;
            if (step >= steps) continue;
            const T* x = held + (NT == 1 ? min(g, s.batch) : g) * stride + step * W::STEP;
            if (BY_INPUTS) {
                uint2 b[NT];
#pragma unroll
                for (int n = 0; n < NT; n++) b[n] = *reinterpret_cast<const uint2*>(x + n * 8 * stride + q * 4);
#pragma unroll
                for (int m = 0; m < W::HIGH; m++) {
                    const auto word = [&](int p) { return m == 0 ? a[p].x : m == 1 ? a[p].y : m == 2 ? a[p].z : a[p].w; };
                    const uint32_t f[4] = {low(word(0), word(1)), high(word(0), word(1)), low(word(2), word(3)), high(word(2), word(3))};
#pragma unroll
                    for (int n = 0; n < NT; n++) mma<T>(sum[m][n], f, b[n].x, b[n].y);
                }
            } else {
#pragma unroll
                for (int d = 0; d < W::DEEP; d++)
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        const uint4 b = *reinterpret_cast<const uint4*>(x + n * 8 * stride + d * 32 + q * 8);
#pragma unroll
                        for (int m = 0; m < W::HIGH; m++) {
                            const uint4 &lo = a[(d * W::HIGH + m) * 2], &hi = a[(d * W::HIGH + m) * 2 + 1];
                            mma<T>(sum[m][n], {lo.x, hi.x, lo.y, hi.y}, b.x, b.y);
                            mma<T>(sum[m][n], {lo.z, hi.z, lo.w, hi.w}, b.z, b.w);
                        }
                    }
            }
        }
        if (round && s.split > 1) __syncthreads();
        for (int p = 0; p + 1 < s.split; p++) {
            // Warp p hands its sums to warp p + 1.
            if (part == p)
#pragma unroll
                for (int i = 0; i < W::HIGH * NT * 4; i++) sums[i * 32] = sum[i / (NT * 4)][i / 4 % NT][i % 4];
            __syncthreads();
            if (part == p + 1)
#pragma unroll
                for (int i = 0; i < W::HIGH * NT * 4; i++) sum[i / (NT * 4)][i / 4 % NT][i % 4] += sums[i * 32];
        }
        if (part + 1 < s.split) continue;
        const int first = (round * groups + group) * rows, end = min(mine.y, first + rows);
#pragma unroll
        for (int m = 0; m < W::HIGH; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = first + (BY_INPUTS ? g * 8 + m * 2 + i / 2 : m * 16 + g + i / 2 * 8), b = n * 8 + q * 2 + i % 2;
                    if (row >= end || b >= s.batch) continue;
                    if (s.shares == 1)
                        finish(b, row, sum[m][n][i]);
                    else
                        __stcg(parts + (size_t(mine.w) * s.batch + b) * s.total + mine.x + row, sum[m][n][i]);
                }
    }
    if (s.shares == 1) return;
    const int blocks = gridDim.x / s.shares, block = blockIdx.x % blocks;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(ended + block, 1u) == unsigned(s.shares - 1);
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x; i < mine.y * s.batch; i += threads) {
        const int b = i / mine.y, row = i % mine.y;
        float v = 0.f;
#pragma unroll 4
        for (int p = 0; p < s.shares; p++) v += __ldcg(parts + (size_t(p) * s.batch + b) * s.total + mine.x + row);
        finish(b, row, v);
    }
    if (threadIdx.x == 0) ended[block] = 0;
}

// y = x W^T for x [inputs, batch, k]; blockIdx.y: sequences 64 at a time, each 64 with parts and counters of its own.
template <class T, int NT, int FINISH, bool BY_INPUTS>
__device__ void product(const T* w, const T* x, void* y, float* parts, unsigned* ended, const int4* work, Share s) {
    let_next_start();
    const int4 mine = work[blockIdx.x];
    const int b0 = blockIdx.y * 64, batch = s.batch;
    s.batch = min(batch - b0, 64);
    y = static_cast<char*>(y) + size_t(b0) * s.total * (FINISH == RELU_SQUARED ? sizeof(T) : sizeof(float));
    parts += size_t(b0) * s.shares * s.total;
    ended += blockIdx.y * (gridDim.x / s.shares);
    tiles<T, NT, FINISH, BY_INPUTS>(w, y, parts, ended, mine, s, [&](T* held, int stride, int k0, int kn) {
        x += (size_t(mine.z) * batch + b0) * s.k + k0;
        const int pieces = (s.width + 63) / 64 * 8;
        for (int i = threadIdx.x; i < held_rows<NT>(s.batch) * pieces; i += blockDim.x) {
            const int b = i / pieces, col = i % pieces * 8;
            const bool valid = b < s.batch && col < kn;
            copy_async(held + b * stride + col, valid ? x + size_t(b) * s.k + col : x, valid);
        }
    });
}

// y = m W^T for interpolations m between h = norm(x) and `last`, or for h itself without `last`, which every block makes itself. The first writes h to `now`
// [batch, C], from where a later kernel, when all have read `last`, puts it there.
template <class T, int FINISH>
__device__ void mixed_product(const T* w, const float* x, void* y, const int4* work, Norm norm, Mixes mu, const T* last, const int* slots, T* now,
                              Share s) {
    let_next_start();
    const int4 mine = work[blockIdx.x];
    const int c = s.k;
    const float* m = mu.p[mine.z];
    for (int i = threadIdx.x * 8; i < c; i += blockDim.x * 8) {
        prefetch(norm.p[0] + i);
        prefetch(norm.p[1] + i);
        if (!last) continue;
        prefetch(m + i);
        for (int b = 0; b < s.batch; b++) prefetch(last + size_t(slots[b]) * c + i);
    }
    tiles<T, 1, FINISH, false>(w, y, nullptr, nullptr, mine, s, [&](T* held, int stride, int, int) {
        const auto at = [&](int i) { return (i * blockDim.x + threadIdx.x) * 8; };
        Vec next[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (at(i) < c) next[i] = load_fresh(x + at(i));
        for (int b = 0; b < s.batch; b++) {
            Vec h[HELD];
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                h[i] = next[i];
                if (b + 1 < s.batch && at(i) < c) next[i] = load_fresh(x + size_t(b + 1) * c + at(i));
            }
            normalise(h, norm.p[0], norm.p[1], c);
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                if (at(i) >= c) continue;
                if (last) {
                    for (int j = 0; j < 8; j++) h[i][j] = to_f32(from_f32<T>(h[i][j]));
                    if (blockIdx.x == 0) store(now + size_t(b) * c + at(i), h[i]);
                    const Vec before = load_fresh(last + size_t(slots[b]) * c + at(i)), f = load(m + at(i));
                    for (int j = 0; j < 8; j++) h[i][j] += (before[j] - h[i][j]) * f[j];
                }
                store(held + b * stride + at(i), h[i]);
            }
        }
        // Zeros: the columns behind the last, and the row that stands for no sequence.
        for (int b = 0; b <= s.batch; b++)
            for (int i = (b < s.batch ? c : 0) + threadIdx.x; i < stride; i += blockDim.x) held[b * stride + i] = from_f32<T>(0.f);
    });
}

// y [4, batch, C]: the second halves of the low-rank maps of functions of the first halves, which lie at proj + b * stride. work[block] = {first
// channel, channels, map, 0}; blockIdx.y: sequences 64 at a time.
template <class T, int NT>
__device__ void ups(const float* proj, int stride, Maps maps, Ranks ranks, float* y, const int4* work, int batch, int c) {
    let_next_start();
    const int4 mine = work[blockIdx.x];
    const int m = mine.z, b0 = blockIdx.y * 64, rank = ranks.rank[m];
    const Share s = {min(batch - b0, 64), c, rank, rank, int(blockDim.x >> 5), 1};
    tiles<T, NT, STORE, true>(static_cast<const T*>(maps.up[m]), y + (size_t(m) * batch + b0) * c, nullptr, nullptr, mine, s,
                              [&](T* held, int width, int, int) {
        proj += size_t(b0) * stride + ranks.at[m];
        const int columns = (rank + 63) / 64 * 64;
#pragma unroll 4
        for (int i = threadIdx.x; i < held_rows<NT>(s.batch) * columns; i += blockDim.x) {
            const int b = i / columns, col = i % columns;
            float v = 0.f;
            if (b < s.batch && col < rank) {
                v = __ldcg(proj + size_t(b) * stride + col);
                v = m == 0 ? tanhf(v) : m == 3 ? sigmoid(v) : v;
            }
            held[b * width + col] = from_f32<T>(v);
        }
    });
}
