// y = v + (v_first - v) sigmoid(gate), elementwise.
#include "common.cuh"

#define EACH for (size_t i = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) * 8; i < n; i += size_t(gridDim.x) * blockDim.x * 8)

template <class T> __device__ void forward(const T* v, const T* first, const T* gate, T* y, size_t n) {
    EACH {
        Vec x = load(v + i);
        const Vec f = load(first + i), g = load(gate + i);
        for (int j = 0; j < 8; j++) x[j] += (f[j] - x[j]) * sigmoid(g[j]);
        store(y + i, x);
    }
}

// dfirst also takes up prior, which may be null or dfirst itself. A thread owns 8 channels and walks over a run of rows; parts[run][c]
// get the sum of dgate.
template <class T>
__device__ void backward(const T* dy, const T* v, const T* first, const T* gate, const T* prior, T* dv, T* dfirst, T* dgate,
                         float* parts, int rows, int c, int run) {
    const int col = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (col >= c) return;
    Vec sum = zeros();
    const int start = blockIdx.x * run, end = min(rows, start + run);
#pragma unroll 2
    for (int row = start; row < end; row++) {
        const size_t i = size_t(row) * c + col;
        const Vec d = load(dy + i), x = load(v + i), f = load(first + i), g = load(gate + i);
        Vec a, e, b = prior ? load(prior + i) : zeros();
        for (int j = 0; j < 8; j++) {
            const float s = sigmoid(g[j]), r = sigmoid(-g[j]);
            a[j] = d[j] * r;
            b[j] += d[j] * s;
            e[j] = d[j] * (f[j] - x[j]) * s * r;
            sum[j] += e[j];
        }
        store(dv + i, a);
        store(dfirst + i, b);
        store(dgate + i, e);
    }
    store(parts + size_t(blockIdx.x) * c + col, sum);
}

#define RESIDUAL(T, name)                                                                                                 \
    extern "C" __global__ void value_residual_##name(const T* v, const T* first, const T* gate, T* y, size_t n) {         \
        forward(v, first, gate, y, n);                                                                                    \
    }                                                                                                                     \
    extern "C" __global__ void value_residual_back_##name(const T* dy, const T* v, const T* first, const T* gate,        \
                                                          const T* prior, T* dv, T* dfirst, T* dgate, float* parts,       \
                                                          int rows, int c, int run) {                                     \
        backward(dy, v, first, gate, prior, dv, dfirst, dgate, parts, rows, c, run);                                      \
    }
FOR_EACH_TYPE(RESIDUAL)
