// What all kernels share: element types, 8-element vectors in f32 registers, reductions in a fixed order.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

// Instantiates KERNEL(T, suffix) for the element types of activations.
#define FOR_EACH_TYPE(KERNEL) KERNEL(float, f32) KERNEL(bf16, bf16) KERNEL(f16, f16)

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_f32(f16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_f32<f16>(float x) { return __float2half_rn(x); }

// Eight consecutive elements as f32. Addresses are multiples of 8 elements.
struct Vec {
    float v[8];
    __device__ __forceinline__ float& operator[](int i) { return v[i]; }
    __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

__device__ __forceinline__ Vec zeros() {
    Vec r;
#pragma unroll
    for (int i = 0; i < 8; i++) r[i] = 0.f;
    return r;
}

__device__ __forceinline__ Vec load(const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

template <class T> __device__ __forceinline__ Vec load(const T* p) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    T e[8];
    *reinterpret_cast<uint4*>(e) = raw;
    Vec r;
#pragma unroll
    for (int i = 0; i < 8; i++) r[i] = to_f32(e[i]);
    return r;
}

__device__ __forceinline__ void store(float* p, const Vec& x) {
    reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

template <class T> __device__ __forceinline__ void store(T* p, const Vec& x) {
    T e[8];
#pragma unroll
    for (int i = 0; i < 8; i++) e[i] = from_f32<T>(x[i]);
    *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(e);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Sum over a warp; every lane gets it.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
    return x;
}

// Sum over a block of whole warps (at most 32); every thread gets it. Begins and ends with a barrier.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[32];
    const int warps = blockDim.x >> 5;
    x = warp_sum(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = x;
    __syncthreads();
    float s = 0.f;
    for (int i = 0; i < warps; i++) s += parts[i];
    return s;
}
