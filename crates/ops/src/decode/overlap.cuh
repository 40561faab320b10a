// Overlapping with the kernel before and after (programmatic dependent launch), and rings of copies that a thread keeps to itself.
#pragma once
#include "mma.cuh"

// What happens to the sums of a product: stored, stored as relu(.)^2, added to what is there.
enum Finish { STORE, RELU_SQUARED, ADD };

// Lets the next kernel start on multiprocessors that have room: it reads what never changes (weights) and then waits.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until all kernels before have ended and shows what they wrote. Every kernel waits, so that the end of one is the end of all before.
//
// A kernel that lets the next start before it waits itself may have several after it running, all of them waiting; what they read before that must have
// been written long before: by the step before. The first kernel of a step starts when everything before has ended.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Eight elements of T from device memory to this thread's own place in shared memory.
template <class T> __device__ __forceinline__ void copy8(T* to, const T* from) {
    copy_async(to, from);
    if (sizeof(T) == 4) copy_async(reinterpret_cast<char*>(to) + 16, reinterpret_cast<const char*>(from) + 16);
}

// Eight elements that an earlier kernel wrote, past the first-level cache.
__device__ __forceinline__ Vec load_fresh(const float* p) {
    const float4 a = __ldcg(reinterpret_cast<const float4*>(p)), b = __ldcg(reinterpret_cast<const float4*>(p) + 1);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
template <class T> __device__ __forceinline__ Vec unpack8(const uint4& raw) {
    T e[8];
    *reinterpret_cast<uint4*>(e) = raw;
    Vec r;
#pragma unroll
    for (int i = 0; i < 8; i++) r[i] = to_f32(e[i]);
    return r;
}
template <class T> __device__ __forceinline__ Vec load_fresh(const T* p) { return unpack8<T>(__ldcg(reinterpret_cast<const uint4*>(p))); }
template <class T> __device__ __forceinline__ float load_fresh_one(const T* p) {
    const unsigned short raw = __ldcg(reinterpret_cast<const unsigned short*>(p));
    return to_f32(reinterpret_cast<const T&>(raw));
}

// Sixteen bytes that are needed once.
__device__ __forceinline__ uint4 load_once(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }

// What a later kernel reads first of its weights: `width` bytes of each of `rows` rows, `pitch` bytes apart.
struct Ahead {
    int rows, pitch, width;
};
// Brings it into the second-level cache, with the blocks whose blockIdx.y is not 0: while a small kernel runs, memory has nothing else to do.
__device__ __forceinline__ void fetch(const void* w, Ahead a) {
    const int lines = a.width / 128, threads = gridDim.x * (gridDim.y - 1) * blockDim.x;
    const int first = ((blockIdx.y - 1) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
    for (int i = first; i < a.rows * lines; i += threads) prefetch(static_cast<const char*>(w) + size_t(i / lines) * a.pitch + i % lines * 128);
}
