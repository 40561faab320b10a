// x = max(x, 0)^2 in place, and the gradient d = 2 sqrt(y) d from the output y, elementwise. A thread holds four vectors at a time.
#include "common.cuh"

constexpr int HELD = 4;

template <class T, class F> __device__ void each(const T* x, T* y, size_t n, F f) {
    const size_t step = size_t(gridDim.x) * blockDim.x * 8;
    for (size_t i = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) * 8; i < n; i += step * HELD) {
        Vec a[HELD], b[HELD];
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (i + k * step < n) {
                a[k] = load(x + i + k * step);
                if (x != y) b[k] = load(y + i + k * step);
            }
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (i + k * step < n) {
#pragma unroll
                for (int j = 0; j < 8; j++) a[k][j] = f(a[k][j], b[k][j]);
                store(y + i + k * step, a[k]);
            }
    }
}

#define RELU(T, name)                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) relu_squared_##name(T* x, size_t n) {           \
        each(x, x, n, [](float a, float) { return fmaxf(a, 0.f) * fmaxf(a, 0.f); });                  \
    }                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) relu_squared_back_##name(const T* y, T* d, size_t n) { \
        each(y, d, n, [](float a, float g) { return a > 0.f ? 2.f * a * rsqrtf(a) * g : 0.f; });      \
    }
FOR_EACH_TYPE(RELU)
