// Removal and replacement keys. 8 channels a thread; the N / 8 threads of a head are neighbours in a warp.
#include "common.cuh"

// Sum over the threads of a head of n channels (n / 8 of them, a power of two).
__device__ __forceinline__ float head_sum(float x, int n) {
    for (int o = n >> 4; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
    return x;
}

template <class T>
__device__ void forward(const T* k, const T* rate, const float* k_k, const float* k_a, T* ko, T* ao, T* bo, int n, int c,
                        size_t total, float scale) {
    const size_t i = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) * 8;
    const bool in = i < total;
    const int col = i % c;
    const Vec x = in ? load(k + i) : zeros(), z = in ? load(rate + i) : zeros();
    const Vec pk = load(k_k + col), pa = load(k_a + col);
    float s = 0.f;
    for (int j = 0; j < 8; j++) s += x[j] * pk[j] * (x[j] * pk[j]);
    const float inv = 1.f / fmaxf(sqrtf(head_sum(s, n)), 1e-12f);
    Vec o, a, b;
    for (int j = 0; j < 8; j++) {
        const float u = x[j] * pk[j] * inv, r = sigmoid(z[j]);
        o[j] = x[j] * (1.f + (r - 1.f) * pa[j]);
        a[j] = -u;
        b[j] = u * r * scale;
    }
    if (!in) return;
    store(ko + i, o);
    store(ao + i, a);
    store(bo + i, b);
}

// A thread owns 8 channels and walks over a run of rows; parts[run][3][c] get dk_k, dk_a and the sum of drate.
template <class T>
__device__ void backward(const T* __restrict__ k, const T* __restrict__ rate, const T* __restrict__ d0,
                         const T* __restrict__ d1, const T* __restrict__ d2, const float* k_k, const float* k_a,
                         T* __restrict__ dk, T* __restrict__ drate, float* parts, int n, int rows, int c, int run,
                         float scale) {
    const int col = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    const bool in = col < c; // whole heads are in or out
    const Vec pk = in ? load(k_k + col) : zeros(), pa = in ? load(k_a + col) : zeros();
    Vec sk = zeros(), sa = zeros(), sz = zeros();
    const int first = blockIdx.x * run, end = min(rows, first + run);
#pragma unroll 2
    for (int r = first; r < end; r++) {
        const size_t i = size_t(r) * c + col;
        const Vec x = in ? load(k + i) : zeros(), z = in ? load(rate + i) : zeros();
        const Vec e0 = in ? load(d0 + i) : zeros(), e1 = in ? load(d1 + i) : zeros(), e2 = in ? load(d2 + i) : zeros();
        float s = 0.f, along = 0.f;
        Vec a, na;
        for (int j = 0; j < 8; j++) {
            // Sigmoids of z and -z from one exponential; exact divisions would take longer than the memory waited for.
            const float e = fminf(__expf(-z[j]), 1e30f);
            a[j] = __fdividef(1.f, 1.f + e);
            na[j] = e * a[j];
            const float u = x[j] * pk[j];
            s += u * u;
            along += u * (a[j] * scale * e2[j] - e1[j]);
        }
        const float norm = sqrtf(head_sum(s, n)), inv = 1.f / fmaxf(norm, 1e-12f);
        along = head_sum(along, n) * inv;
        if (norm <= 1e-12f) along = 0.f;
        Vec gk, gz;
        for (int j = 0; j < 8; j++) {
            const float u = x[j] * pk[j] * inv;
            const float db = scale * e2[j];
            const float du = (a[j] * db - e1[j] - u * along) * inv;
            gk[j] = e0[j] * (1.f - na[j] * pa[j]) + du * pk[j];
            gz[j] = (e0[j] * x[j] * pa[j] + db * u) * a[j] * na[j];
            sk[j] += du * x[j];
            sa[j] -= e0[j] * x[j] * na[j];
            sz[j] += gz[j];
        }
        if (in) {
            store(dk + i, gk);
            store(drate + i, gz);
        }
    }
    if (!in) return;
    float* mine = parts + size_t(blockIdx.x) * 3 * c + col;
    store(mine, sk);
    store(mine + c, sa);
    store(mine + 2 * c, sz);
}

#define KEY_PATH(T, name)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) key_path_##name(const T* k, const T* rate, const float* k_k,        \
        const float* k_a, T* ko, T* ao, T* bo, int n, int c, size_t total, float scale) {                                 \
        forward(k, rate, k_k, k_a, ko, ao, bo, n, c, total, scale);                                                       \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128) key_path_back_##name(const T* k, const T* rate, const T* d0, const T* d1, \
        const T* d2, const float* k_k, const float* k_a, T* dk, T* drate, float* parts, int n, int rows, int c, int run, \
        float scale) {                                                                                                    \
        backward(k, rate, d0, d1, d2, k_k, k_a, dk, drate, parts, n, rows, c, run, scale);                                \
    }
FOR_EACH_TYPE(KEY_PATH)
