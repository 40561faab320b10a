// One decoding step of RWKV-7 for a few sequences; mod.rs says how the kernels follow each other.
// may spill: decode_heads_64_(f16_\w+.\(\w+\)|f32_\w+.\(sm_(80|90a)\))
// A few registers each, read back from the first-level cache; more blocks at a time are worth more.
#include "attend.cuh"
#include "heads.cuh"
#include "low_rank.cuh"
#include "mix.cuh"
#include "product.cuh"
#include "program.cuh"

// The types of activations that decoding has kernels for.
#define FOR_BOTH_TYPES(KERNEL) KERNEL(bf16, bf16) KERNEL(f16, f16)

#define MIX_OF(T, name, HELD, K)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) decode_mix##K##_##HELD##_##name(                                              \
        float* x, const float* parts, int count, T* y, T* last, const int* slots, const float* w, const float* b, Mixes mu,           \
        const void* next, Ahead ahead, int c) {                                                                                     \
        mix<T, HELD, K>(x, parts, count, y, last, slots, w, b, mu, next, ahead, c);                                                 \
    }
#define MIX_FOR(T, name, HELD)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) decode_embed_##HELD##_##name(                                                 \
        const T* table, const int* tokens, float* x, const float* w, const float* b, int c) {                                       \
        embed<T, HELD>(table, tokens, x, w, b, c);                                                                                  \
    }                                                                                                                               \
    MIX_OF(T, name, HELD, 6) MIX_OF(T, name, HELD, 1) MIX_OF(T, name, HELD, 0)
#define MIX(T, name) MIX_FOR(T, name, 1) MIX_FOR(T, name, 2) MIX_FOR(T, name, 4)
FOR_BOTH_TYPES(MIX)

#define HEADS_OF(T, name, S, kept, N)                                                                                               \
    extern "C" __global__ void __launch_bounds__(4 * N, N > 64 ? 1 : (N == 64 && sizeof(S) == 2 ? 384 : 320) / N)                   \
    decode_heads_##N##_##kept##_##name(const float* proj, size_t apart, const float* mapped, int gated, Vectors vec, Norm norm,     \
                                       float* first, S* state, const int* slots, T* wrote, T* out, int c) {                         \
        heads<T, S, N>(proj, apart, mapped, gated, vec, norm, first, state, slots, wrote, out, c);                                  \
    }
#define HEADS_FOR(T, name, N) HEADS_OF(T, name, float, f32, N) HEADS_OF(T, name, f16, f16, N)
#define HEADS_OF_ALL(T, name) HEADS_FOR(T, name, 64) HEADS_FOR(T, name, 128)
FOR_BOTH_TYPES(HEADS_OF_ALL)

#define PROGRAM_OF(T, name, how, CODED, B, HELD)                                                                                    \
    extern "C" __global__ void __launch_bounds__(ALL, 1) decode_program_##how##_##B##_##HELD##_##name(                              \
        const Op* ops, const int* slots, unsigned* arrived, unsigned char* flow, Run r, Room room) {                                \
        program<T, 64, B, HELD, CODED>(ops, slots, arrived, flow, r, room);                                                         \
    }
#define PROGRAM_FOR(T, name, how, CODED)                                                                                            \
    PROGRAM_OF(T, name, how, CODED, 1, 1) PROGRAM_OF(T, name, how, CODED, 1, 2)                                                     \
    PROGRAM_OF(T, name, how, CODED, 4, 1) PROGRAM_OF(T, name, how, CODED, 4, 2)
#define PROGRAM(T, name) PROGRAM_FOR(T, name, rows, false)
FOR_BOTH_TYPES(PROGRAM)
PROGRAM_FOR(f16, f16, codes, true)

#define PRODUCT_OF(T, name, LIE, how, M)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 1) decode_product_##how##_##M##_##name(                                        \
        const void* w, const f16* scales, int pitch, const T* x, float* y, T* z, const Piece* work, int pieces, int batch, int count, \
        int k, int n, int y_pitch, int z_pitch) {                                                                                    \
        product_of_many<T, LIE, M>({w, scales, pitch}, x, y, z, work, pieces, batch, count, k, n, y_pitch, z_pitch);                  \
    }
#define PRODUCT_FOR(T, name, M)                                                                                                      \
    PRODUCT_OF(T, name, ROWS, rows, M) PRODUCT_OF(T, name, INPUTS, inputs, M) PRODUCT_OF(T, name, CODES, codes, M)
#define PRODUCT(T, name) PRODUCT_FOR(T, name, 16) PRODUCT_FOR(T, name, 32) PRODUCT_FOR(T, name, 64)
FOR_BOTH_TYPES(PRODUCT)

#define LOW_RANK(T, name)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) decode_downs_##name(                                                          \
        const T* w, const T* x, T* halves, float* parts, unsigned* ended, const int4* work, int batch, int c, int shares, int width) { \
        downs<T>(w, x, halves, parts, ended, work, batch, c, shares, width);                                                        \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) decode_ups_##name(const T* halves, int stride, Maps maps, float* y,           \
                                                                        const int4* work, int batch, int c) {                       \
        ups<T>(halves, stride, maps, y, work, batch, c);                                                                            \
    }
FOR_BOTH_TYPES(LOW_RANK)

#define ATTEND_FOR(T, name, N)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(CHOOSE_THREADS) decode_choose_##N##_##name(                                         \
        const float* projected, const T* wrote, const Kept* all, const int* slots, const int* positions, Candidate* found,           \
        unsigned* ended, int* picks, Rule r) {                                                                                       \
        choose<T, N>(projected, wrote, all, slots, positions, found, ended, picks, r);                                               \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * ATTEND_WARPS) decode_attend_##N##_##name(                                      \
        const float* projected, const Kept* all, const int* slots, const int* positions, const int* picks, float* parts,             \
        unsigned* ended, T* out, Rule r) {                                                                                           \
        attend<T, N>(projected, all, slots, positions, picks, parts, ended, out, r);                                                 \
    }
#define ATTEND(T, name) ATTEND_FOR(T, name, 64) ATTEND_FOR(T, name, 128)
FOR_BOTH_TYPES(ATTEND)

// x = relu(x)^2 for n vectors of 8.
#define RELU(T, name)                                                                                                               \
    extern "C" __global__ void decode_relu_squared_##name(T* x, const void* next, Ahead ahead, size_t n) {                          \
        let_next_start();                                                                                                           \
        if (blockIdx.y) return fetch(next, ahead);                                                                                  \
        wait_for_previous();                                                                                                        \
        for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {                \
            Vec v = load_fresh(x + i * 8);                                                                                          \
            for (int j = 0; j < 8; j++) v[j] = v[j] > 0.f ? v[j] * v[j] : 0.f;                                                      \
            store(x + i * 8, v);                                                                                                    \
        }                                                                                                                           \
    }
FOR_BOTH_TYPES(RELU)

// token[b] = the first index of the largest logit of row b.
extern "C" __global__ void decode_argmax(const float* logits, int* token, int vocab) {
    __shared__ float value[32];
    __shared__ int index[32];
    wait_for_previous();
    let_next_start();
    logits += size_t(blockIdx.x) * vocab;
    float best = -INFINITY;
    int at = vocab;
    const auto take = [&](float v, int i) {
        if (v > best || (v == best && i < at)) best = v, at = i;
    };
    constexpr int LOADS = 16;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x * LOADS) {
        float v[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) v[j] = i + j * int(blockDim.x) < vocab ? __ldcg(logits + i + j * blockDim.x) : -INFINITY;
#pragma unroll
        for (int j = 0; j < LOADS; j++) take(v[j], i + j * blockDim.x);
    }
    for (int o = 16; o; o >>= 1) {
        const float v = __shfl_xor_sync(~0u, best, o);
        const int i = __shfl_xor_sync(~0u, at, o);
        take(v, i);
    }
    if ((threadIdx.x & 31) == 0) value[threadIdx.x >> 5] = best, index[threadIdx.x >> 5] = at;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 0; i < int(blockDim.x >> 5); i++) take(value[i], index[i]);
    token[blockIdx.x] = at < vocab ? at : 0;
}
