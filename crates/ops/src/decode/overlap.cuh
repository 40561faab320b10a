// Overlapping with the kernel before and after (programmatic dependent launch), and waiting for other blocks of the same kernel.
#pragma once
#include "mma.cuh"

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

#ifndef ANSER_EMULATOR
// Adds one to what blocks count, after everything that the thread has seen or written.
__device__ __forceinline__ void add_release(unsigned* p) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory"); }
// Waits until it is at least n: what is read after that is not older.
__device__ __forceinline__ void wait_for_at_least(const unsigned* p, unsigned n) {
    unsigned v;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    while (v < n);
}
// Where copies go in shared memory. (It is the same in all lanes but for a part that isn't, which ptxas 13.0 mustn't know, since it makes illegal instructions of copies with a hint then.)
using Copied = uint32_t;
__device__ __forceinline__ Copied copied_to(void* p) { return __shfl_sync(~0u, shared_address(p), threadIdx.x); }
// As copy_async, of what is needed once: it need not stay in the second-level cache.
__device__ __forceinline__ void copy_async_once(Copied to, const void* from) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}
// Four bytes from device memory to shared memory in the background.
__device__ __forceinline__ void copy_async_word(Copied to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_word(void* to, const void* from) { copy_async_word(shared_address(to), from); }
#else
inline void add_release(unsigned* p) { ++*p; }
inline void wait_for_at_least(const unsigned* p, unsigned n) {
    while (*p < n) emulator::state->yield();
}
using Copied = unsigned char*;
inline Copied copied_to(void* p) { return static_cast<Copied>(p); }
inline void copy_async_word(void* to, const void* from) { memcpy(to, from, 4); }
inline void copy_async_once(Copied to, const void* from) { copy_async(to, from); }
#endif

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
