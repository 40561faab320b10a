// y = max(x, 0)^2 and dx = 2 max(x, 0) dy, elementwise; dx may be dy.
#include "common.cuh"

#define EACH for (size_t i = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) * 8; i < n; i += size_t(gridDim.x) * blockDim.x * 8)

#define RELU(T, name)                                                                                 \
    extern "C" __global__ void relu_squared_##name(const T* x, T* y, size_t n) {                      \
        EACH {                                                                                        \
            Vec a = load(x + i);                                                                      \
            for (int j = 0; j < 8; j++) a[j] = fmaxf(a[j], 0.f) * fmaxf(a[j], 0.f);                   \
            store(y + i, a);                                                                          \
        }                                                                                             \
    }                                                                                                 \
    extern "C" __global__ void relu_squared_back_##name(const T* x, T* d, size_t n) {                 \
        EACH {                                                                                        \
            const Vec a = load(x + i);                                                                \
            Vec g = load(d + i);                                                                      \
            for (int j = 0; j < 8; j++) g[j] *= 2.f * fmaxf(a[j], 0.f);                               \
            store(d + i, g);                                                                          \
        }                                                                                             \
    }
FOR_EACH_TYPE(RELU)
