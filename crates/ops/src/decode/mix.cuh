// What stands before matrix products: normalisation of the residual stream x [batch, C] (f32), token shift, interpolations.
#pragma once
#include "overlap.cuh"

constexpr int HELD = 4; // vectors of 8 channels a thread holds: C <= 8 * 4 * blockDim

// (x - mean) / sqrt(variance + 1e-5) weight + bias of a row held by a block.
__device__ __forceinline__ void normalise(Vec (&h)[HELD], const float* weight, const float* bias, int c) {
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if ((i * blockDim.x + threadIdx.x) * 8 < c)
            for (int j = 0; j < 8; j++) s += h[i][j];
    const float mean = block_sum(s) / c;
    s = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if ((i * blockDim.x + threadIdx.x) * 8 < c)
            for (int j = 0; j < 8; j++) s += (h[i][j] - mean) * (h[i][j] - mean);
    const float inv = rsqrtf(block_sum(s) / c + 1e-5f);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * 8;
        if (at < c) {
            const Vec w = load(weight + at), b = load(bias + at);
            for (int j = 0; j < 8; j++) h[i][j] = (h[i][j] - mean) * inv * w[j] + b[j];
        }
    }
}

struct Mixes {
    const float* p[6];
};

// h = norm(x); y [K, batch, C] = h + (last - h) mu_k; last [slots, C] = h. With K = 0, y [batch, C] = h.
template <class T, int K>
__device__ void mix(const float* x, T* y, T* last, const int* slots, const float* weight, const float* bias, Mixes mu, int c) {
    for (int i = threadIdx.x * 8; i < c; i += blockDim.x * 8) {
        prefetch(weight + i);
        prefetch(bias + i);
        if (K) prefetch(last + size_t(slots[blockIdx.x]) * c + i);
#pragma unroll
        for (int k = 0; k < K; k++) prefetch(mu.p[k] + i);
    }
    wait_for_previous();
    let_next_start();
    const size_t row = size_t(blockIdx.x) * c;
    Vec h[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * 8;
        if (at < c) h[i] = load_fresh(x + row + at);
    }
    normalise(h, weight, bias, c);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * 8;
        if (at >= c) continue;
        if (K == 0) {
            store(y + row + at, h[i]);
            continue;
        }
        T* state = last + size_t(slots[blockIdx.x]) * c + at;
        const Vec before = load_fresh(state);
        for (int j = 0; j < 8; j++) h[i][j] = to_f32(from_f32<T>(h[i][j]));
        store(state, h[i]);
#pragma unroll
        for (int k = 0; k < K; k++) {
            const Vec m = load(mu.p[k] + at);
            Vec o;
            for (int j = 0; j < 8; j++) o[j] = h[i][j] + (before[j] - h[i][j]) * m[j];
            store(y + (size_t(k) * gridDim.x) * c + row + at, o);
        }
    }
}

// x [batch, C] = norm(table[token]).
template <class T>
__device__ void embed(const T* table, const int* tokens, float* x, const float* weight, const float* bias, int c) {
    wait_for_previous();
    let_next_start();
    Vec h[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * 8;
        if (at < c) h[i] = load(table + size_t(__ldcg(tokens + blockIdx.x)) * c + at);
    }
    normalise(h, weight, bias, c);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * 8;
        if (at < c) store(x + size_t(blockIdx.x) * c + at, h[i]);
    }
}
