// Matrices in codes of 8 bits: whole numbers, of which GROUP neighbouring ones of a row stand for values by one scale. Scales lie [steps, rows, STEP / GROUP], in f16.
#pragma once
#include "overlap.cuh"

constexpr int STEP = 128, GROUP = 64;
constexpr int SCALES = STEP / GROUP * 2; // bytes of the scales of a step of a row

// Eight codes in f16.
__device__ __forceinline__ uint4 whole_numbers(uint2 codes) {
    const __half2 offset = __float2half2_rn(1152.f);
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // As 1,152 more than they are: the bits of 1,024, and 128 added to make them positive.
        const uint32_t two = __byte_perm((i < 2 ? codes.x : codes.y) ^ 0x80808080u, 0x64646464u, i % 2 ? 0x4342 : 0x4140);
        const __half2 v = __hsub2(reinterpret_cast<const __half2&>(two), offset);
        r[i] = reinterpret_cast<const uint32_t&>(v);
    }
    return make_uint4(r[0], r[1], r[2], r[3]);
}

// Eight codes times a scale, in the type of activations.
template <class T> __device__ __forceinline__ uint4 decoded(uint2 codes, float scale);
template <> __device__ __forceinline__ uint4 decoded<f16>(uint2 codes, float scale) {
    const __half2 by = __float2half2_rn(scale);
    uint4 r = whole_numbers(codes);
    const auto times = [&](uint32_t& x) {
        const __half2 v = __hmul2(reinterpret_cast<const __half2&>(x), by);
        x = reinterpret_cast<const uint32_t&>(v);
    };
    times(r.x), times(r.y), times(r.z), times(r.w);
    return r;
}
template <> __device__ __forceinline__ uint4 decoded<bf16>(uint2 codes, float scale) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t word = (i < 2 ? codes.x : codes.y) ^ 0x80808080u;
        // As 2^23 + 128 more than they are.
        const auto value = [&](int byte) { return (__uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650 + byte)) - 8388736.f) * scale; };
        r[i] = pack<bf16>(value(i % 2 * 2), value(i % 2 * 2 + 1));
    }
    return make_uint4(r[0], r[1], r[2], r[3]);
}
