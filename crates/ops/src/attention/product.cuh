// Products of a tile's rows with another tile. Four warps work on 64 rows at a time, 16 each; a lane has the fragments of mma.cuh.
#pragma once
#include "plan.cuh"

namespace chunks {

// Elements of a row of a tile, and where an element is: rows of an 8 x 8 tile lie in different banks, since a row of 128 bytes has its 16-byte vectors in an order
// of its own (tiles are 1024 bytes aligned), others are longer by one.
template <int N> constexpr int WIDTH = N == 64 ? 64 : N + 8;
template <int N> __device__ __forceinline__ int place(int row, int col) { return row * WIDTH<N> + (N == 64 ? col ^ (row & 7) * 8 : col); }
template <class T> __device__ __forceinline__ T* aligned(unsigned char* p) { return reinterpret_cast<T*>(p + (-reinterpret_cast<size_t>(p) & 1023)); }

#ifndef ANSER_EMULATOR
// 1 / x to the last bit but one.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The logarithm to base 2, to 2^-22.
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Sixteen bytes that need not stay in the second-level cache, unless `row` is negative; without a branch.
__device__ __forceinline__ void store_once(void* to, const uint4& x, int row) {
    asm volatile("{.reg .pred p; setp.ge.s32 p, %5, 0; @p st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(row) : "memory");
}
// Sixteen bytes that are read once, or zeros. Those of one thread are asked for one after another, before what comes next.
__device__ __forceinline__ uint4 load_if(bool there, const void* from) {
    uint4 x;
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0; @p ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w) : "l"(from), "r"(unsigned(there)));
    return x;
}
#else
inline float reciprocal(float x) { return 1.f / x; }
inline float log2_fast(float x) { return log2f(x); }
inline uint4 load_if(bool there, const void* from) { return there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0); }
inline void store_once(void* to, const uint4& x, int row) {
    if (row >= 0) *static_cast<uint4*>(to) = x;
}
#endif

// What this thread copied is there, and so is what others did.
__device__ __forceinline__ void wait_for_copies() {
    copy_wait<0>();
    __syncthreads();
}

// Fragments of B blocks of 64 rows of a tile.
template <int N, class T, int B> __device__ __forceinline__ void load_rows(uint32_t (&a)[B][N / 16][4], const T* tile) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < B; m++)
#pragma unroll
        for (int k = 0; k < N / 16; k++) load_tiles(a[m][k], tile + place<N>(64 * m + threadIdx.x / 32 * 16 + (lane & 15), 16 * k + (lane >> 4) * 8));
}
// c [64 B, W] = A R^T for rows first .. first + W of the tile R.
template <class T, int N, int W, int B>
__device__ __forceinline__ void times_rows(float (&c)[B][W / 8][4], const uint32_t (&a)[B][N / 16][4], const T* tile, int first) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < B * W / 2; i++) c[i / (W / 2)][i / 4 % (W / 8)][i % 4] = 0.f;
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
        for (int j = 0; j < W; j += 16) {
            uint32_t b[4];
            load_tiles(b, tile + place<N>(first + j + (lane & 7) + (lane >> 4) * 8, 16 * k + (lane & 8)));
#pragma unroll
            for (int m = 0; m < B; m++) {
                mma<T>(c[m][j / 8], a[m][k], b[0], b[1]);
                mma<T>(c[m][j / 8 + 1], a[m][k], b[2], b[3]);
            }
        }
}
// o [64 B, N] += C R for those rows.
template <class T, int N, int W, int B>
__device__ __forceinline__ void add_product(float (&o)[B][N / 8][4], const float (&c)[B][W / 8][4], const T* tile, int first) {
    uint32_t a[B][W / 16][4];
#pragma unroll
    for (int i = 0; i < B * W / 16; i++) as_a<T>(a[i / (W / 16)][i % (W / 16)], c[i / (W / 16)][i % (W / 16) * 2], c[i / (W / 16)][i % (W / 16) * 2 + 1]);
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < W / 16; j++)
#pragma unroll
        for (int k = 0; k < N / 16; k++) {
            uint32_t b[4];
            load_tiles_transposed(b, tile + place<N>(first + 16 * j + (lane & 15), 16 * k + (lane >> 4) * 8));
#pragma unroll
            for (int m = 0; m < B; m++) {
                mma<T>(o[m][2 * k], a[m][j], b[0], b[1]);
                mma<T>(o[m][2 * k + 1], a[m][j], b[2], b[3]);
            }
        }
}

} // namespace chunks
