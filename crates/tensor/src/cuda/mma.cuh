// Tensor-core products of one warp and the loads that feed them. A fragment is what one lane holds of a tile:
//
//   A 16 x 16 (row-major): a[0] = (g, 2q..), a[1] = (g + 8, 2q..), a[2] = (g, 2q + 8..), a[3] = (g + 8, 2q + 8..)
//   B 16 x 8:              b[0] = (2q.., g), b[1] = (2q + 8.., g)
//   C 16 x 8:              c[0..1] = (g, 2q..), c[2..3] = (g + 8, 2q..)      with g = lane / 4, q = lane % 4
#pragma once
#include "common.cuh"

// Two values of a fragment's register; `x` is the one with the lower index.
template <class T = bf16> __device__ __forceinline__ uint32_t pack(float x, float y);
template <> __device__ __forceinline__ uint32_t pack<bf16>(float x, float y) {
    const __nv_bfloat162 p = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(p);
}
template <> __device__ __forceinline__ uint32_t pack<f16>(float x, float y) {
    const __half2 p = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(p);
}
template <class T = bf16> __device__ __forceinline__ float2 unpack(uint32_t x);
template <> __device__ __forceinline__ float2 unpack<bf16>(uint32_t x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack<f16>(uint32_t x) { return __half22float2(reinterpret_cast<const __half2&>(x)); }

#ifndef ANSER_EMULATOR

// c += a b, of bf16 or f16.
template <class T = bf16> __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8 x 8 tiles of 16-bit values; lane i gives the address of row i % 8 of tile i / 8 (16 bytes, aligned). Lane (g, q) gets
// elements (g, 2q..) of each.
__device__ __forceinline__ void load_tiles(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// The same, each tile transposed: lane (g, q) gets elements (2q.., g).
__device__ __forceinline__ void load_tiles_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// An 8 x 8 tile held like C's halves (two values of row g a lane), transposed within the warp.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// 16 bytes from device memory to shared memory in the background; zeros if !valid.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// Closes the group of copies begun since the last call.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups are under way.
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Brings the 128 bytes at an address into the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Waits until `threads` threads have come to barrier `id` (1 to 15).
__device__ __forceinline__ void wait_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Comes to barrier `id` without waiting.
__device__ __forceinline__ void arrive_barrier(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

#else

template <class Get> void mma_emulated(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Get get) {
    struct Fragments {
        uint32_t a[4], b[2];
    };
    const auto lanes = emulator::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int g = emulator::state->self->lane / 4, q = emulator::state->self->lane % 4;
    for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i / 2), col = 2 * q + i % 2;
        float s = c[i];
        for (int k = 0; k < 16; k++) {
            const uint32_t x = lanes.at((row % 8) * 4 + k % 8 / 2).a[row / 8 + 2 * (k / 8)], y = lanes.at(col * 4 + k % 8 / 2).b[k / 8];
            s += get(x >> 16 * (k % 2)) * get(y >> 16 * (k % 2));
        }
        c[i] = s;
    }
}
template <class T = bf16> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_emulated(c, a, b0, b1, [](uint32_t x) { return unpack<T>(x).x; });
}
inline void load_tiles_emulated(uint32_t (&r)[4], const void* row, bool transposed) {
    if (uintptr_t(row) % 16) __builtin_trap();
    const auto lanes = emulator::exchange(static_cast<const uint16_t*>(row));
    const int g = emulator::state->self->lane / 4, q = emulator::state->self->lane % 4;
    for (int i = 0; i < 4; i++) {
        const auto at = [&](int y, int x) { return uint32_t(lanes.at(i * 8 + y)[x]); };
        r[i] = transposed ? at(2 * q, g) | at(2 * q + 1, g) << 16 : at(g, 2 * q) | at(g, 2 * q + 1) << 16;
    }
    __syncwarp();
}
inline void load_tiles(uint32_t (&r)[4], const void* row) { load_tiles_emulated(r, row, false); }
inline void load_tiles_transposed(uint32_t (&r)[4], const void* row) { load_tiles_emulated(r, row, true); }
inline uint32_t transpose(uint32_t x) {
    const auto lanes = emulator::exchange(x);
    const int g = emulator::state->self->lane / 4, q = emulator::state->self->lane % 4;
    const auto at = [&](int y, int c) { return (lanes.at(y * 4 + c / 2) >> 16 * (c % 2)) & 0xffffu; };
    return at(2 * q, g) | at(2 * q + 1, g) << 16;
}
inline void copy_async(void* to, const void* from, bool valid = true) {
    if (uintptr_t(to) % 16 || uintptr_t(from) % 16) __builtin_trap();
    valid ? memcpy(to, from, 16) : memset(to, 0, 16);
}
inline void copy_commit() {}
template <int N> void copy_wait() {}
inline void prefetch(const void*) {}
inline void wait_barrier(int id, int threads) { emulator::state->wait_block(id, threads); }
inline void arrive_barrier(int id, int threads) { emulator::state->arrive_block(id, threads); }
inline float exp2_fast(float x) { return exp2f(x); }
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::state->dynamic_shared

#endif
