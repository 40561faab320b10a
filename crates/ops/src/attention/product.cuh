// Products of a tile's rows with another tile. Four warps work on 64 rows at a time, 16 each; a lane has the fragments of mma.cuh. On Hopper
// heads of 64 take wgmma, whose fragments are the same, and which reads the other tile from shared memory by itself.
#pragma once
#include "plan.cuh"

namespace chunks {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int N> constexpr bool WGMMA = N == 64;
#else
template <int N> constexpr bool WGMMA = false;
#endif

// Elements of a row of a tile, and where an element is: rows of an 8 x 8 tile lie in different banks, since a row of 128 bytes has its 16-byte vectors in an order
// of its own (wgmma's "128-byte swizzle"; tiles are 1024 bytes aligned), others are longer by one.
template <int N> constexpr int WIDTH = N == 64 ? 64 : N + 8;
template <int N> __device__ __forceinline__ int place(int row, int col) { return row * WIDTH<N> + (N == 64 ? col ^ (row & 7) * 8 : col); }
template <class T> __device__ __forceinline__ T* aligned(unsigned char* p) { return reinterpret_cast<T*>((reinterpret_cast<size_t>(p) + 1023) & ~size_t(1023)); }

// What this thread copied is there, and so is what others did, for wgmma too.
__device__ __forceinline__ void wait_for_copies() {
    copy_wait<0>();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncthreads();
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <class T> constexpr bool IS_F16 = false;
template <> constexpr bool IS_F16<f16> = true;

// Rows from `p` on as an operand: eight rows of 128 bytes are a pattern, the next one is 1024 bytes on.
__device__ __forceinline__ uint64_t operand(const void* p) {
    return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(64) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}
// d [64, 64] = (add ? d : 0) + a b for 16 inner indices; TRANSPOSED: b's rows are the inner indices, else its columns.
#define WGMMA_64(TYPE) \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;}" \
                 : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(TRANSPOSED))
template <class T, int TRANSPOSED> __device__ __forceinline__ void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    if constexpr (IS_F16<T>)
        WGMMA_64("f16");
    else
        WGMMA_64("bf16");
}
// d [64, 32] = (add ? d : 0) + a b for 16 inner indices; TRANSPOSED: b's rows are the inner indices, else its columns.
#define WGMMA_32(TYPE) \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, %22;}" \
                 : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(TRANSPOSED))
template <class T, int TRANSPOSED> __device__ __forceinline__ void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    if constexpr (IS_F16<T>)
        WGMMA_32("f16");
    else
        WGMMA_32("bf16");
}
// What goes in and what is added to is in registers: the hardware reads them by itself, so that nothing that writes them may come later.
template <int B, int A, int C> __device__ __forceinline__ void wgmma_begin(const uint32_t (&a)[B][A][4], float (&d)[B][C][4]) {
#pragma unroll
    for (int i = 0; i < B * A * 4; i++) asm volatile("" ::"r"(a[i / (4 * A)][i / 4 % A][i % 4]) : "memory");
#pragma unroll
    for (int i = 0; i < B * C * 4; i++) asm volatile("" : "+f"(d[i / (4 * C)][i / 4 % C][i % 4])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Waits for all products; no use of the results moves before it.
template <int B, int C> __device__ __forceinline__ void wgmma_end(float (&d)[B][C][4]) {
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < B * C * 4; i++) asm volatile("" : "+f"(d[i / (4 * C)][i / 4 % C][i % 4])::"memory");
}
#endif

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
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (WGMMA<N>) {
        wgmma_begin(a, c);
#pragma unroll
        for (int m = 0; m < B; m++)
#pragma unroll
            for (int k = 0; k < N / 16; k++) wgmma<T, 0>(c[m], a[m][k], operand(tile + first * N + 16 * k), k > 0);
        wgmma_end(c);
        return;
    }
#endif
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
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (WGMMA<N>) {
        wgmma_begin(a, o);
#pragma unroll
        for (int m = 0; m < B; m++)
#pragma unroll
            for (int j = 0; j < W / 16; j++) wgmma<T, 1>(o[m], a[m][j], operand(tile + (first + 16 * j) * N), true);
        wgmma_end(o);
        return;
    }
#endif
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
