// Products with few rows of x: every weight is read once, straight through; sums in f32.
//
// A block has consecutive rows of W [rows, k], all with one input. Its warps share the columns: in every unit of 256 columns a lane has 8, which it
// copies to a ring in shared memory of its own, DEPTH copies ahead of their use, across the wait for the kernel before.
#pragma once
#include "overlap.cuh"

constexpr int ROWS = 4;   // rows summed between two barriers
constexpr int WARPS = 8; // at most

// work[block] = {first row, rows, input, 0}; x [inputs, B, k]; y [B, rows] (ADD: y += ).
// split: warps along the columns; the block has split * groups warps, and each group sums other rows.
template <class T, int B, int FINISH, int DEPTH>
__device__ void rows(const T* w, const T* x, float* y, const int4* work, int total, int k, int split) {
    DYNAMIC_SHARED(dynamic);
    __shared__ float parts[2][WARPS][ROWS * B];
    let_next_start();
    const int4 mine = work[blockIdx.x];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, groups = (blockDim.x >> 5) / split;
    const int group = warp / split, part = warp % split, units = ((k + 255) / 256 + split - 1) / split;
    T* ring = reinterpret_cast<T*>(dynamic) + threadIdx.x * 8;
    const int stride = blockDim.x * 8;
    // Copies are in the order of their use: sets of ROWS rows, units of columns, rows.
    const int sets = (mine.y + ROWS * groups - 1) / (ROWS * groups);
    int ahead_row = 0, ahead_unit = 0, ahead_set = 0, ahead_slot = 0;
    const auto begin = [&] {
        const int row = (ahead_set * groups + group) * ROWS + ahead_row, col = (ahead_unit * split + part) * 256 + lane * 8;
        if (row < mine.y && col < k) copy8(ring + ahead_slot * stride, w + size_t(mine.x + row) * k + col);
        copy_commit();
        ahead_slot = (ahead_slot + 1) % DEPTH;
        if (++ahead_row < ROWS) return;
        ahead_row = 0;
        if (++ahead_unit < units) return;
        ahead_unit = 0;
        ahead_set++;
    };
    for (int i = 0; i < DEPTH - 1; i++) begin();
    wait_for_previous();
    T* held = reinterpret_cast<T*>(dynamic) + DEPTH * stride; // x [B, k]
    x += size_t(mine.z) * B * k;
    for (int i = threadIdx.x * 8; i < B * k; i += stride) store(held + i, load_fresh(x + i));
    __syncthreads();
    int next = 0;
    for (int set = 0; set < sets; set++) {
        float sum[ROWS][B];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int b = 0; b < B; b++) sum[r][b] = 0.f;
        for (int unit = 0; unit < units; unit++) {
            const int col = (unit * split + part) * 256 + lane * 8;
            Vec v[B];
#pragma unroll
            for (int b = 0; b < B; b++) v[b] = col < k ? load(held + b * k + col) : zeros();
#pragma unroll
            for (int r = 0; r < ROWS; r++, next = (next + 1) % DEPTH) {
                copy_wait<DEPTH - 2>();
                if (col < k && (set * groups + group) * ROWS + r < mine.y) {
                    const Vec a = load(ring + next * stride);
#pragma unroll
                    for (int b = 0; b < B; b++)
#pragma unroll
                        for (int j = 0; j < 8; j++) sum[r][b] = fmaf(a[j], v[b][j], sum[r][b]);
                }
                begin();
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int b = 0; b < B; b++) {
                const float s = warp_sum(sum[r][b]);
                if (lane == 0) parts[set & 1][warp][r * B + b] = s;
            }
        __syncthreads();
        if (threadIdx.x < groups * ROWS * B) {
            const int g = threadIdx.x / (ROWS * B), i = threadIdx.x % (ROWS * B), row = (set * groups + g) * ROWS + i / B;
            if (row < mine.y) {
                float s = 0.f;
                for (int p = 0; p < split; p++) s += parts[set & 1][g * split + p][i];
                float* to = y + size_t(i % B) * total + mine.x + row;
                if (FINISH == RELU_SQUARED) s = s > 0.f ? s * s : 0.f;
                if (FINISH == ADD) s += __ldcg(to);
                *to = s;
            }
        }
    }
}
