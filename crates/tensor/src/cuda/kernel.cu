// Kernels on flat buffers: filling, adding, converting, and the second half of sums over rows.
#include "common.cuh"

extern "C" __global__ void fill_f32(float* x, float value, size_t n) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) x[i] = value;
}

// x += y.
#define ADD(T, name)                                                                                                          \
    extern "C" __global__ void add_##name(T* x, const T* y, size_t n) {                                                      \
        for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n / 8; i += size_t(gridDim.x) * blockDim.x) {     \
            Vec a = load(x + i * 8);                                                                                          \
            const Vec b = load(y + i * 8);                                                                                    \
            for (int j = 0; j < 8; j++) a[j] += b[j];                                                                         \
            store(x + i * 8, a);                                                                                              \
        }                                                                                                                     \
        const size_t i = n / 8 * 8 + threadIdx.x;                                                                             \
        if (blockIdx.x == 0 && i < n) x[i] = from_f32<T>(to_f32(x[i]) + to_f32(y[i]));                                        \
    }
FOR_EACH_TYPE(ADD)

template <class A, class B> __device__ void convert(const A* x, B* y, size_t n) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
        y[i] = from_f32<B>(to_f32(x[i]));
}
#define CONVERT(T, name)                                                                                              \
    extern "C" __global__ void f32_to_##name(const float* x, T* y, size_t n) { convert(x, y, n); }                   \
    extern "C" __global__ void name##_to_f32(const T* x, float* y, size_t n) { convert(x, y, n); }
CONVERT(bf16, bf16)
CONVERT(f16, f16)

// to[c] (+)= sum over p < count of parts[p * stride + c], for c < cols.
struct PartialSum {
    float* to;
    const float* parts;
    int count, stride, cols, add;
};

struct PartialSums {
    PartialSum of[32];
};

// In the order of p within each of 32 groups and then over the groups. Grid: most columns / 32, sums; block: 32 x 32.
extern "C" __global__ void __launch_bounds__(1024) add_partial_sums(const __grid_constant__ PartialSums sums) {
    __shared__ float group[32][33];
    const PartialSum& sum = sums.of[blockIdx.y];
    if (blockIdx.x * 32 >= sum.cols) return;
    const int c = blockIdx.x * 32 + threadIdx.x;
    float s = 0.f;
    if (c < sum.cols) {
        const float* mine = sum.parts + c;
#pragma unroll 4
        for (int p = threadIdx.y; p < sum.count; p += 32) s += mine[size_t(p) * sum.stride];
    }
    group[threadIdx.y][threadIdx.x] = s;
    __syncthreads();
    // A warp sums the groups of one column.
    s = warp_sum(group[threadIdx.x][threadIdx.y]);
    const int column = blockIdx.x * 32 + threadIdx.y;
    if (threadIdx.x == 0 && column < sum.cols) sum.to[column] = sum.add ? sum.to[column] + s : s;
}
