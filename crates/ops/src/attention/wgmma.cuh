// Products of a warpgroup (four warps, 64 rows) on Hopper, whose operands come from shared memory, and the barriers that say what is there.
//
// Tiles have rows of 64 values, 128 bytes, whose 16-byte vectors lie in the order of wgmma's 128-byte swizzle; they are 1024 bytes aligned. Fragments of A
// and of results are those of mma.cuh, 16 rows a warp. Emulated, a product is done at once, and its operand is the tile's address.
#pragma once
#include "product.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(ANSER_EMULATOR)
#define ANSER_HOPPER
#endif

#ifdef ANSER_HOPPER
namespace chunks {

// Barriers in shared memory: a phase ends when so many have arrived; phases have parities 0, 1, 0 ..
#ifndef ANSER_EMULATOR

using Address = uint32_t; // in shared memory
__device__ __forceinline__ Address address_of(const void* p) { return shared_address(p); }

__device__ __forceinline__ void barrier_init(Address b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(Address b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
// Arrives when all that this thread copied so far is there.
__device__ __forceinline__ void barrier_arrive_copied(Address b) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(b) : "memory");
}
// Sixteen bytes from device memory in the background.
__device__ __forceinline__ void copy_async_to(Address to, const void* from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
// The same of many bytes by one thread, after which the phase of a barrier that one arrives at ends.
__device__ __forceinline__ void copy_together(Address to, const void* from, int bytes, Address barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// The reverse of load_tiles.
__device__ __forceinline__ void store_tiles(Address row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Waits until the phase of this parity has ended; by whole warps.
__device__ __forceinline__ void barrier_wait(Address b, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(b), "r"(parity) : "memory");
    } while (!done);
}
// What is in shared memory as this thread sees it is what its products see.
__device__ __forceinline__ void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// Rows from an address on as an operand: eight rows of 128 bytes are a pattern, the next one is 1024 bytes on.
__device__ __forceinline__ uint64_t operand(Address p) { return uint64_t(p >> 4 | 1 << 16) | uint64_t(64 | 1 << 30) << 32; }
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, int bytes) { return operand >> 32 << 32 | (uint32_t(operand) + uint32_t(bytes >> 4)); }
// The same for the whole warp, as the compiler then knows.
__device__ __forceinline__ uint64_t uniform(uint64_t operand) { return operand >> 32 << 32 | __shfl_sync(~0u, uint32_t(operand), 0); }
// Computed once, not wherever it is used.
__device__ __forceinline__ Address kept(Address p) {
    asm volatile("" : "+r"(p));
    return p;
}
template <class T> __device__ __forceinline__ T* kept(T* p) {
    asm volatile("" : "+l"(p));
    return p;
}
// Before products that use registers written since the last ones.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of products begun since the last call.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N groups are under way.
template <int N> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// No use of these results moves across.
template <int C> __device__ __forceinline__ void keep_order(float (&d)[C][4]) {
#pragma unroll
    for (int i = 0; i < 4 * C; i++) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}
// All of these are there.
template <int K> __device__ __forceinline__ void keep_order(uint32_t (&a)[K][4]) {
#pragma unroll
    for (int i = 0; i < 4 * K; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

#define D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define D16(i) D4(i), D4(i + 1), D4(i + 2), D4(i + 3)
#define WGMMA_64(TYPE)                                                                                                                  \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                        \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}," \
                 " {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"                                                                                \
                 : D16(0), D16(4)                                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))
template <class T> constexpr bool IS_F16 = false;
template <> constexpr bool IS_F16<f16> = true;

// Begins d = (add ? d : 0) + a b for 16 inner indices, which are b's rows.
template <class T> __device__ __forceinline__ void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    if constexpr (IS_F16<T>)
        WGMMA_64("f16");
    else
        WGMMA_64("bf16");
}
#define WGMMA_64_SHARED(TYPE)                                                                                                           \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                        \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}," \
                 " %32, %33, p, 1, 1, 0, 0;}"                                                                                           \
                 : D16(0), D16(4)                                                                                                       \
                 : "l"(a), "l"(b), "r"(int(add)))
#define WGMMA_128_SHARED(TYPE)                                                                                                          \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                       \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"   \
                 "%61,%62,%63}, %64, %65, p, 1, 1, 0, 0;}"                                                                              \
                 : D16(0), D16(4), D16(8), D16(12)                                                                                      \
                 : "l"(a), "l"(b), "r"(int(add)))
// Begins d = (add ? d : 0) + a b for 16 inner indices, which are columns of both; a is 64 rows of a tile.
template <class T> __device__ __forceinline__ void wgmma(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    if constexpr (IS_F16<T>)
        WGMMA_128_SHARED("f16");
    else
        WGMMA_128_SHARED("bf16");
}
template <class T> __device__ __forceinline__ void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
    if constexpr (IS_F16<T>)
        WGMMA_64_SHARED("f16");
    else
        WGMMA_64_SHARED("bf16");
}
#undef WGMMA_64
#undef WGMMA_64_SHARED
#undef WGMMA_128_SHARED
#undef D16
#undef D4

#else

using Address = uint64_t;
inline Address address_of(const void* p) { return Address(p); }

// A barrier's state: its phase's parity, arrivals left, arrivals of a phase.
inline void barrier_init(Address b, int arrivals) { *reinterpret_cast<uint64_t*>(b) = uint64_t(arrivals) << 16 | uint64_t(arrivals); }
inline void barrier_arrive(Address b) {
    uint64_t& state = *reinterpret_cast<uint64_t*>(b);
    const uint64_t all = state & 0xffff, left = (state >> 16 & 0xffff) - 1, parity = state >> 32;
    state = (left ? parity : parity ^ 1) << 32 | (left ? left : all) << 16 | all;
}
inline void barrier_arrive_copied(Address b) { barrier_arrive(b); }
inline void barrier_wait(Address b, uint32_t parity) {
    while (!__any_sync(~0u, *reinterpret_cast<uint64_t*>(b) >> 32 != parity)) {}
}
inline void copy_async_to(Address to, const void* from) { copy_async(reinterpret_cast<void*>(to), from); }
inline void copy_together(Address to, const void* from, int bytes, Address barrier) {
    if (to % 16 || uintptr_t(from) % 16 || bytes % 16) __builtin_trap();
    memcpy(reinterpret_cast<void*>(to), from, bytes);
    barrier_arrive(barrier);
}
inline void store_tiles(Address row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    if (row % 16) __builtin_trap();
    const auto lanes = emulator::exchange(row);
    const int g = emulator::state->self->lane / 4, q = emulator::state->self->lane % 4;
    const uint32_t tiles[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) *reinterpret_cast<uint32_t*>(lanes.at(8 * i + g) + 4 * q) = tiles[i];
    __syncwarp();
}
inline void fence_for_products() {}
template <int N> void more_registers() {}
template <int N> void fewer_registers() {}
inline uint64_t operand(Address p) { return p; }
inline uint64_t operand_at(uint64_t operand, int bytes) { return operand + bytes; }
inline uint64_t uniform(uint64_t operand) { return operand; }
inline Address kept(Address p) { return p; }
template <class T> T* kept(T* p) { return p; }
inline void products_begin() {}
inline void products_commit() {}
template <int N> void products_wait() {}
template <int C> void keep_order(float (&)[C][4]) {}
template <int K> void keep_order(uint32_t (&)[K][4]) {}

template <class T, int C> void wgmma_emulated(float (&d)[C][4], const uint32_t (&a)[4], uint64_t b, bool add, bool rows) {
    struct Fragment {
        uint32_t a[4];
    };
    const auto lanes = emulator::exchange(Fragment{{a[0], a[1], a[2], a[3]}});
    const int g = emulator::state->self->lane / 4, q = emulator::state->self->lane % 4;
    const auto value = [](uint32_t x) { return unpack<T>(x & 0xffff).x; };
    float left[2][16];
    for (int i = 0; i < 32; i++) {
        const int row = i / 16, k = i % 16;
        left[row][k] = value(lanes.at(g * 4 + k % 8 / 2).a[row + k / 8 * 2] >> 16 * (k % 2));
    }
    for (int i = 0; i < 4 * C; i++) {
        const int col = i / 4 * 8 + 2 * q + i % 2;
        float sum = add ? d[i / 4][i % 4] : 0.f;
        for (int k = 0; k < 16; k++) {
            const uint64_t at = b + (rows ? k * 128 + col * 2 : col * 128 + k * 2);
            sum += left[i % 4 / 2][k] * value(*reinterpret_cast<const uint16_t*>(at ^ (at >> 7 & 7) << 4));
        }
        d[i / 4][i % 4] = sum;
    }
    __syncwarp();
}
template <class T> void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) { wgmma_emulated<T>(d, a, b, add, true); }
template <class T, int C> void wgmma(float (&d)[C][4], uint64_t a, uint64_t b, bool add) {
    const int lane = emulator::state->self->lane, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    uint32_t rows[4];
    for (int i = 0; i < 4; i++) {
        const uint64_t at = a + (row + i % 2 * 8) * 128 + lane % 4 * 4 + i / 2 * 16;
        rows[i] = *reinterpret_cast<const uint32_t*>(at ^ (at >> 7 & 7) << 4);
    }
    wgmma_emulated<T>(d, rows, b, add, false);
}

#endif

// Begins c = A R^T for 64 rows of a tile and rows of another one, eight a block of c.
//
// A in registers would be no faster, and is dangerous: the compiler (ptxas 13.0) takes registers that are loaded before a loop and read by such products alone
// for free after its first turn.
template <class T, int C> __device__ __forceinline__ void begin_times_rows(float (&c)[C][4], uint64_t a, uint64_t rows) {
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<T>(c, operand_at(a, 32 * k), operand_at(rows, 32 * k), k > 0);
}
// Begins o = (add ? o : 0) + A R for 16 K rows of a tile.
template <class T, int K> __device__ __forceinline__ void begin_add_product(float (&o)[8][4], const uint32_t (&a)[K][4], uint64_t rows, bool add = true) {
#pragma unroll
    for (int k = 0; k < K; k++) wgmma<T>(o, a[k], operand_at(rows, 16 * 128 * k), add || k > 0);
}

} // namespace chunks
#endif
