// What stands before matrix products: normalisation of the residual stream x [batch, C] (f32), token shift, interpolations. A thread has HELD vectors of
// 8 channels: C <= 8 * HELD * blockDim.
#pragma once
#include "overlap.cuh"

// Calls f(i, channel) for every vector of the thread, one of WORKERS, or of all of the block.
template <int HELD, int WORKERS = 0, class F> __device__ __forceinline__ void each_vector(int c, F f) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * (WORKERS ? WORKERS : blockDim.x) + threadIdx.x) * 8;
        if (at < c) f(i, at);
    }
}

// A row of constants: read at once where a thread has one vector of it, only brought near where it has more.
template <int HELD, int WORKERS = 0> struct Constants {
    const float* p;
    Vec held = {};
    __device__ __forceinline__ Constants(const float* row, int c) : p(row) {
        if (row) each_vector<HELD, WORKERS>(c, [&](int, int at) {
            if (HELD == 1)
                held = load(p + at);
            else
                prefetch(p + at);
        });
    }
    __device__ __forceinline__ Vec at(int channel) const { return HELD == 1 ? held : load(p + channel); }
};

// (x - mean) / sqrt(variance + 1e-5) weight + bias of a row held by a block.
template <int HELD> __device__ __forceinline__ void normalise(Vec (&h)[HELD], const Constants<HELD>& weight, const Constants<HELD>& bias, int c) {
    float s = 0.f;
    each_vector<HELD>(c, [&](int i, int) {
        for (int j = 0; j < 8; j++) s += h[i][j];
    });
    const float mean = block_sum(s) / c;
    s = 0.f;
    each_vector<HELD>(c, [&](int i, int) {
        for (int j = 0; j < 8; j++) s += (h[i][j] - mean) * (h[i][j] - mean);
    });
    const float inv = rsqrtf(block_sum(s) / c + 1e-5f);
    each_vector<HELD>(c, [&](int i, int at) {
        const Vec w = weight.at(at), b = bias.at(at);
        for (int j = 0; j < 8; j++) h[i][j] = (h[i][j] - mean) * inv * w[j] + b[j];
    });
}

struct Mixes {
    const float* p[6];
};

// blockIdx.y > 0: these blocks only fetch what comes next. x += `count` parts [count, batch, C]; h = norm(x); y [K, batch, C] = h + (last - h) mu_k; last [slots, C] = h. With K = 0, y [batch, C] = h.
template <class T, int HELD, int K>
__device__ void mix(float* x, const float* parts, int count, T* y, T* last, const int* slots, const float* weight, const float* bias, Mixes mu,
                    const void* next, Ahead ahead, int c) {
    if (blockIdx.y) return fetch(next, ahead);
    const Constants<HELD> w(weight, c), b(bias, c);
    const size_t row = size_t(blockIdx.x) * c;
    // The row of `last` is the previous step's.
    Vec h[HELD], before[HELD], m[K ? K : 1];
    T* state = K ? last + size_t(slots[blockIdx.x]) * c : nullptr;
    const auto interpolations = [&](int at) {
#pragma unroll
        for (int k = 0; k < K; k++) m[k] = load(mu.p[k] + at);
    };
    each_vector<HELD>(c, [&](int i, int at) {
        if (K) before[i] = load_fresh(state + at);
        if (HELD == 1) interpolations(at);
    });
    wait_for_previous();
    let_next_start();
    each_vector<HELD>(c, [&](int i, int at) { h[i] = load_fresh(x + row + at); });
    if (count)
        each_vector<HELD>(c, [&](int i, int at) {
#pragma unroll 4
            for (int p = 0; p < count; p++) {
                const Vec part = load_fresh(parts + size_t(p) * gridDim.x * c + row + at);
#pragma unroll
                for (int j = 0; j < 8; j++) h[i][j] += part[j];
            }
            store(x + row + at, h[i]);
        });
    normalise<HELD>(h, w, b, c);
    each_vector<HELD>(c, [&](int i, int at) {
        if (K == 0) {
            store(y + row + at, h[i]);
            return;
        }
        if (HELD > 1) interpolations(at);
        for (int j = 0; j < 8; j++) h[i][j] = to_f32(from_f32<T>(h[i][j]));
        store(state + at, h[i]);
#pragma unroll
        for (int k = 0; k < K; k++) {
            Vec o;
            for (int j = 0; j < 8; j++) o[j] = h[i][j] + (before[i][j] - h[i][j]) * m[k][j];
            store(y + (size_t(k) * gridDim.x) * c + row + at, o);
        }
    });
}

// x [batch, C] = norm(table[token]).
template <class T, int HELD> __device__ void embed(const T* table, const int* tokens, float* x, const float* weight, const float* bias, int c) {
    const Constants<HELD> w(weight, c), b(bias, c);
    wait_for_previous();
    let_next_start();
    Vec h[HELD];
    const T* row = table + size_t(__ldcg(tokens + blockIdx.x)) * c;
    each_vector<HELD>(c, [&](int i, int at) { h[i] = load(row + at); });
    normalise<HELD>(h, w, b, c);
    each_vector<HELD>(c, [&](int i, int at) { store(x + size_t(blockIdx.x) * c + at, h[i]); });
}
