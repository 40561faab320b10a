// Included before a kernel.cu that is compiled for the emulator: the parts of CUDA C++ that the kernels use, on the CPU.
#pragma once
#include "core.h"
#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <utility>

namespace emulator {
inline State* state;

template <class... A, size_t... I> void call(void (*f)(A...), void** args, std::index_sequence<I...>) {
    f(*static_cast<std::remove_reference_t<A>*>(args[I])...);
}
template <class... A> void call(void (*f)(A...), void** args) { call(f, args, std::index_sequence_for<A...>()); }
template <class... A> struct Sizes { static constexpr size_t of[] = {sizeof(A)..., 0}; };
template <class... A> const size_t* sizes(void (*)(A...)) { return Sizes<A...>::of; }
template <class... A> size_t count(void (*)(A...)) { return sizeof...(A); }

// Gives every lane of the warp all lanes' values: `at(lane)`.
template <class T> struct Lanes {
    unsigned char (*slots)[128];
    T at(int lane) const {
        T v;
        memcpy(&v, slots[lane & 31], sizeof v);
        return v;
    }
};
template <class T> Lanes<T> exchange(const T& value) {
    static_assert(sizeof(T) <= 128);
    Thread* t = state->self;
    auto slots = t->warp->slots[++t->turn & 1];
    memcpy(slots[t->lane], &value, sizeof value);
    state->wait_warp();
    return {slots};
}
} // namespace emulator

// After the headers of CUDA, which use these words too.
#undef __shared__
#undef __launch_bounds__
#undef __device__
#undef __host__
#undef __constant__
#undef __grid_constant__
#define threadIdx (emulator::state->self->index)
#define blockIdx (emulator::state->block)
#define blockDim (emulator::state->block_size)
#define gridDim (emulator::state->grid_size)
#define __shared__ static
#define __launch_bounds__(...)
#define __device__
#define __host__
#define __constant__ static const
#define __grid_constant__
// __global__ stays in the preprocessed text, from which the names of the kernels are read.

inline void __syncthreads() { emulator::state->wait_block(0, 0); }
inline void __syncwarp(unsigned = ~0u) { emulator::state->wait_warp(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask, int = 32) { return emulator::exchange(v).at(emulator::state->self->lane ^ mask); }
template <class T> T __shfl_sync(unsigned, T v, int lane, int width = 32) {
    const int self = emulator::state->self->lane;
    return emulator::exchange(v).at((self & ~(width - 1)) | (lane & (width - 1)));
}
template <class T> T __shfl_down_sync(unsigned, T v, int by, int = 32) {
    const int from = emulator::state->self->lane + by;
    return emulator::exchange(v).at(from > 31 ? emulator::state->self->lane : from);
}
template <class T> T __shfl_up_sync(unsigned, T v, int by, int = 32) {
    const int from = emulator::state->self->lane - by;
    return emulator::exchange(v).at(from < 0 ? emulator::state->self->lane : from);
}
inline unsigned __ballot_sync(unsigned, int v) {
    const auto lanes = emulator::exchange(v);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= unsigned(lanes.at(i) != 0) << i;
    return bits;
}
inline int __any_sync(unsigned m, int v) { return __ballot_sync(m, v) != 0; }
inline int __all_sync(unsigned m, int v) { return __ballot_sync(m, v) == ~0u; }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1u) << (31 - i);
    return y;
}
inline unsigned atomicOr(unsigned* p, unsigned v) { return std::exchange(*p, *p | v); }
inline int atomicAdd(int* p, int v) { return std::exchange(*p, *p + v); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return std::exchange(*p, *p + v); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) { return std::exchange(*p, *p + v); }
inline int atomicMin(int* p, int v) { return std::exchange(*p, *p < v ? *p : v); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
inline unsigned __float_as_uint(float x) { unsigned i; memcpy(&i, &x, 4); return i; }
inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T> void __stcg(T* p, T v) { *p = v; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= unsigned(both >> (s >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return c;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline size_t min(size_t a, size_t b) { return a < b ? a : b; }
inline size_t max(size_t a, size_t b) { return a > b ? a : b; }
using std::isfinite;
using std::isinf;
using std::isnan;
