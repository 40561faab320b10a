// What the blocks of a kernel that stays (program.cuh) hand to each other. Whoever reads a word looks at it until it is there: that takes one way to the second-level cache and one back, where waiting for all blocks takes a fence,
// a count and a look at it before the word is read.
//
// Words lie in memory of their own, a place for each that a step gives. It holds NOTHING, is written once, and when all blocks have come to the end of the step it holds NOTHING again. No word says anything of others; but who has
// read it knows that the block that wrote it has read what the word was made of.
#pragma once
#include "overlap.cuh"

// All bits of a number that no computation gives: of f32 and, in its halves, of 16 bits.
constexpr uint32_t NOTHING = ~0u;

#ifndef ANSER_EMULATOR
__device__ __forceinline__ uint4 look(const uint4* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ uint32_t look(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ void give(uint4* p, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void give(uint32_t* p, uint32_t v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
__device__ __forceinline__ void give(unsigned short* p, unsigned short v) { asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory"); }
__device__ __forceinline__ void look_again() {}
#else
inline uint4 look(const uint4* p) { return *p; }
inline uint32_t look(const uint32_t* p) { return *p; }
inline void give(uint4* p, uint4 v) { *p = v; }
inline void give(uint32_t* p, uint32_t v) { *p = v; }
inline void give(unsigned short* p, unsigned short v) { *p = v; }
inline void look_again() { emulator::state->yield(); }
#endif

// Whether all of it is there, in elements of T.
template <class T> __device__ __forceinline__ bool there(uint4 v) {
    // A half of w is all ones if subtracting one from it in ~w borrows.
    const auto missing = [](uint32_t w) { return (~w - 0x00010001u) & w & 0x80008000u; };
    return !(missing(v.x) | missing(v.y) | missing(v.z) | missing(v.w));
}
template <> __device__ __forceinline__ bool there<float>(uint4 v) { return v.x != NOTHING && v.y != NOTHING && v.z != NOTHING && v.w != NOTHING; }

// That memory. When only some operations run (`on` is not set), what they read may never come: their places are behind it, and hold zeros.
struct Flow {
    unsigned char* at;
    unsigned bytes;
    bool on;
    __device__ __forceinline__ bool has(const void* p) const { return size_t(static_cast<const unsigned char*>(p) - at) < bytes; }
    template <class P> __device__ __forceinline__ P* place(P* p) const { return !on && has(p) ? reinterpret_cast<P*>(reinterpret_cast<uintptr_t>(p) + bytes) : p; }
    // Nothing again, by all threads that work.
    __device__ __forceinline__ void clear(int workers) const {
        for (size_t i = blockIdx.x * workers + threadIdx.x; i < bytes / 16; i += size_t(gridDim.x) * workers)
            reinterpret_cast<uint4*>(at)[i] = make_uint4(NOTHING, NOTHING, NOTHING, NOTHING);
    }
};

// Calls f(all) until it leaves `all` set: whether everything that it looked at was there.
template <class F> __device__ __forceinline__ void until(F f) {
    for (;;) {
        bool all = true;
        f(all);
        if (all) return;
        look_again();
    }
}

// Reads that say whether all was there.
template <class T> __device__ __forceinline__ uint4 look8(const T* p, bool& all) {
    const uint4 v = look(reinterpret_cast<const uint4*>(p));
    all &= there<T>(v);
    return v;
}
__device__ __forceinline__ float4 look4(const float* p, bool& all) {
    const uint4 v = look(reinterpret_cast<const uint4*>(p));
    all &= there<float>(v);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
__device__ __forceinline__ float look1(const float* p, bool& all) {
    const uint32_t v = look(reinterpret_cast<const uint32_t*>(p));
    all &= v != NOTHING;
    return __uint_as_float(v);
}

// Hands values on.
__device__ __forceinline__ uint32_t given(float v) { return __float_as_uint(v) == NOTHING ? NOTHING >> 1 : __float_as_uint(v); }
__device__ __forceinline__ void give(float* p, float v) { give(reinterpret_cast<uint32_t*>(p), given(v)); }
__device__ __forceinline__ void give(float* p, float4 v) { give(reinterpret_cast<uint4*>(p), make_uint4(given(v.x), given(v.y), given(v.z), given(v.w))); }
__device__ __forceinline__ void give(float* p, const Vec& v) {
    give(p, make_float4(v.v[0], v.v[1], v.v[2], v.v[3]));
    give(p + 4, make_float4(v.v[4], v.v[5], v.v[6], v.v[7]));
}
template <class T> __device__ __forceinline__ void give(T* p, T v) { give(reinterpret_cast<unsigned short*>(p), reinterpret_cast<const unsigned short&>(v)); }
template <class T> __device__ __forceinline__ void give(T* p, const Vec& v) {
    T e[8];
#pragma unroll
    for (int i = 0; i < 8; i++) e[i] = from_f32<T>(v.v[i]);
    give(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(e));
}
