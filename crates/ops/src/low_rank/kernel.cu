// The function between the two matrices of a low-rank map, and its bias. kind: 1 = tanh, 2 = sigmoid.
#include "common.cuh"

template <class T> __device__ void apply(T* h, int kind, size_t n) {
    for (size_t i = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) * 8; i < n; i += size_t(gridDim.x) * blockDim.x * 8) {
        Vec x = load(h + i);
        for (int j = 0; j < 8; j++) x[j] = kind == 1 ? tanhf(x[j]) : sigmoid(x[j]);
        store(h + i, x);
    }
}

template <class T> __device__ void derivative(const T* h, T* d, int kind, size_t n) {
    for (size_t i = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) * 8; i < n; i += size_t(gridDim.x) * blockDim.x * 8) {
        const Vec x = load(h + i);
        Vec g = load(d + i);
        for (int j = 0; j < 8; j++) g[j] *= kind == 1 ? 1.f - x[j] * x[j] : x[j] * (1.f - x[j]);
        store(d + i, g);
    }
}

// Sums of the columns of d [rows, c] over runs of rows: parts[run][c].
template <class T> __device__ void column_sums(const T* d, float* parts, int rows, int c, int run) {
    const int col = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (col >= c) return;
    Vec s = zeros();
    const int first = blockIdx.x * run, end = min(rows, first + run);
#pragma unroll 8
    for (int r = first; r < end; r++) {
        const Vec x = load(d + size_t(r) * c + col);
        for (int j = 0; j < 8; j++) s[j] += x[j];
    }
    store(parts + size_t(blockIdx.x) * c + col, s);
}

#define LOW_RANK(T, name)                                                                                                   \
    extern "C" __global__ void activate_##name(T* h, int kind, size_t n) { apply(h, kind, n); }                            \
    extern "C" __global__ void activate_back_##name(const T* h, T* d, int kind, size_t n) { derivative(h, d, kind, n); }   \
    extern "C" __global__ void column_sums_##name(const T* d, float* parts, int rows, int c, int run) {                    \
        column_sums(d, parts, rows, c, run);                                                                               \
    }
FOR_EACH_TYPE(LOW_RANK)
