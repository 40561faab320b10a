// What makes a token worth keeping: what a state has forgotten of it, and what queries ask of it.
#pragma once
#include "plan.cuh"

namespace chunks {

constexpr int TOKENS = 64; // of a block

// errors [heads, count]: |v - S k / |k|^2|^2 / |v|^2 with values and keys [count, heads N] and the state S [heads, N, N]; blockIdx = (tokens, head), a thread a row of S.
template <class T, int N> __device__ void forgotten(const T* values, const T* keys, const float* state, float* errors, int count) {
    __shared__ __align__(16) float k[N];
    const int h = blockIdx.y, i = threadIdx.x, first = blockIdx.x * TOKENS, c = gridDim.y * N;
    float row[N];
#pragma unroll
    for (int j = 0; j < N; j += 4) {
        const float4 s = *reinterpret_cast<const float4*>(state + (size_t(h) * N + i % N) * N + j);
        row[j] = s.x, row[j + 1] = s.y, row[j + 2] = s.z, row[j + 3] = s.w;
    }
    for (int t = first; t < min(count, first + TOKENS); t++) {
        const size_t at = size_t(t) * c + h * N + i;
        const float v = i < N ? to_f32(values[at]) : 0.f;
        __syncthreads();
        if (i < N) k[i] = to_f32(keys[at]);
        __syncthreads();
        float own = 0.f, length = 0.f;
#pragma unroll
        for (int j = 0; j < N; j++) {
            own += row[j] * k[j];
            length += k[j] * k[j];
        }
        const float apart = i < N ? v - own / fmaxf(length, 1.17549435e-38f) : 0.f;
        const float error = block_sum(apart * apart), whole = block_sum(v * v);
        if (i == 0) errors[size_t(h) * count + t] = error / fmaxf(whole, 1.17549435e-38f);
    }
}

// Scores of rows [nrows, row_heads N] with columns [ncols, column_heads N], a thread a row; where one has fewer heads than there are, several share one: out [heads, nrows] = log2 of the sum over columns of 2^(score log2 e), or, given
// these of the columns, with SUMS the sum over columns of the softmax's shares.
template <class T, int N, bool SUMS> __device__ void asked(const T* rows, const T* columns, const float* lse, float* out, int nrows, int ncols, int row_heads, int column_heads) {
    constexpr int TILE_ = 32;
    __shared__ __align__(16) float tile[TILE_][N];
    __shared__ float top[TILE_];
    const int h = blockIdx.y, t = threadIdx.x, r = blockIdx.x * 128 + t, heads = gridDim.y;
    rows += h / (heads / row_heads) * N;
    columns += h / (heads / column_heads) * N;
    const float scale = rsqrtf(float(N)) * 1.44269504f;
    float x[N];
#pragma unroll
    for (int e = 0; e < N; e += 8) {
        const Vec v = r < nrows ? load(rows + size_t(r) * row_heads * N + e) : zeros();
#pragma unroll
        for (int j = 0; j < 8; j++) x[e + j] = v[j] * scale;
    }
    float most = -INFINITY, total = 0.f;
    for (int first = 0; first < ncols; first += TILE_) {
        const int count = min(TILE_, ncols - first);
        __syncthreads();
        for (int i = t; i < count * N / 8; i += 128) store(&tile[i / (N / 8)][i % (N / 8) * 8], load(columns + size_t(first + i / (N / 8)) * column_heads * N + i % (N / 8) * 8));
        if (SUMS && t < count) top[t] = lse[size_t(h) * ncols + first + t];
        __syncthreads();
        for (int j = 0; j < count; j++) {
            float s[4] = {};
#pragma unroll
            for (int e = 0; e < N; e += 4)
#pragma unroll
                for (int l = 0; l < 4; l++) s[l] = fmaf(x[e + l], tile[j][e + l], s[l]);
            const float score = (s[0] + s[1]) + (s[2] + s[3]);
            if (SUMS) {
                total += exp2f(score - top[j]);
            } else {
                const float more = fmaxf(most, score);
                total = total * exp2f(most - more) + exp2f(score - more);
                most = more;
            }
        }
    }
    if (r < nrows) out[size_t(h) * nrows + r] = SUMS ? total : most + log2f(total);
}

} // namespace chunks
