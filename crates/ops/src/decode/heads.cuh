// One head of one sequence from its projections and low-rank maps to what the output matrix reads: keys, value residual, one step of WKV-7 with the state
// [N, N] in place, GroupNorm, bonus and gate. 4 N threads. States are kept in f32 or f16; arithmetic is f32.
#pragma once
#include "overlap.cuh"

struct Maps {
    const void* up[4]; // w, a, v, g: [rank, C]; v null in the first layer
};
struct Vectors {
    const float* p[6]; // w0, a0, v0, k_k, k_a, r_k
};
struct Norm {
    const float* p[2]; // weight and bias of ln_x
};

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Four values of a state, as they are kept and as they are computed with.
__device__ __forceinline__ float4 load_state(const float* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }
__device__ __forceinline__ uint2 load_state(const f16* p) { return __ldcg(reinterpret_cast<const uint2*>(p)); }
__device__ __forceinline__ float4 floats(float4 s) { return s; }
__device__ __forceinline__ float4 floats(uint2 s) {
    const float2 a = unpack<f16>(s.x), b = unpack<f16>(s.y);
    return make_float4(a.x, a.y, b.x, b.y);
}
__device__ __forceinline__ void store_state(float* p, float4 s) { *reinterpret_cast<float4*>(p) = s; }
__device__ __forceinline__ uint2 narrow(float4 s) {
    // The largest there are rather than infinity, which would stay.
    const auto fit = [](float v) { return fminf(fmaxf(v, -65504.f), 65504.f); };
    return make_uint2(pack<f16>(fit(s.x), fit(s.y)), pack<f16>(fit(s.z), fit(s.w)));
}
__device__ __forceinline__ uint4 narrow(float4 s, float4 t) {
    const uint2 a = narrow(s), b = narrow(t);
    return make_uint4(a.x, a.y, b.x, b.y);
}
__device__ __forceinline__ void store_state(f16* p, float4 s) { *reinterpret_cast<uint2*>(p) = narrow(s); }

// Sum of f(0) to f(N - 1), by every warp for itself.
template <int N, class F> __device__ __forceinline__ float each_warp_sum(F f) {
    float s = 0.f;
    for (int n = threadIdx.x & 31; n < N; n += 32) s += f(n);
    return warp_sum(s);
}

// Of sequence b, r, k and v lie at proj + b C, `apart` after each other; the low-rank maps in mapped [4, batch, C], of which the value gate is not `gated` in
// layer 0. first [batch, C]: v of layer 0, written by layer 0. state [slots, heads, N, N]. wrote [2, batch, C], if wanted: value and key that the state takes up.
template <class T, class S, int N>
__device__ void heads(const float* proj, size_t apart, const float* mapped, int gated, Vectors vec, Norm norm, float* first, S* state, const int* slots,
                      T* wrote, T* out, int c) {
    constexpr int THREADS_ = 4 * N;
    // A small state waits for its use in shared memory: registers for more blocks at a time are worth more.
    constexpr bool STAGED = sizeof(S) == 2 && N == 64;
    __shared__ uint4 staged[STAGED ? 2 * THREADS_ : 1];
    __shared__ __align__(16) float x[7][N]; // r, d, k, v, removal key z (not yet of length 1), z times the rate, terms of the bonus
    __shared__ float y[N];
    let_next_start();
    const int h = blockIdx.x, b = blockIdx.y, t = threadIdx.x, warp = t >> 5, c0 = h * N;
    // Before the wait: the state, which no kernel shortly before writes. Four threads have a row of it; which four columns the e-th are of this one.
    const int i = t >> 2, q = t & 3;
    const auto col = [&](int e) { return STAGED ? e / 2 * 32 + q * 8 + e % 2 * 4 : e * 16 + q * 4; };
    S* s_at = state + (size_t(slots[b]) * (c / N) + h) * N * N + i * N;
    decltype(load_state(s_at)) kept[STAGED ? 1 : N / 16];
    if constexpr (STAGED) {
        for (int e = 0; e < 2; e++) copy_async(&staged[e * THREADS_ + t], s_at + col(2 * e));
    } else {
#pragma unroll
        for (int e = 0; e < N / 16; e++) kept[e] = load_state(s_at + col(e));
    }
    copy_commit();
    const int ch = c0 + t; // channel of the first N threads
    float p[6];
    if (t < N) {
#pragma unroll
        for (int j = 0; j < 6; j++) p[j] = vec.p[j] ? vec.p[j][ch] : 0.f;
    }
    wait_for_previous();
    proj += size_t(b) * c;
    float v = 0.f, gate = 0.f;
    if (t < N) {
        float m[4];
        for (int j = 0; j < 4; j++) m[j] = j != 2 || gated ? __ldcg(mapped + (size_t(j) * gridDim.y + b) * c + ch) : 0.f;
        const float v0 = gated ? __ldcg(first + size_t(b) * c + ch) : 0.f;
        const float r = __ldcg(proj + ch), k = __ldcg(proj + apart + ch);
        v = __ldcg(proj + 2 * apart + ch);
        x[1][t] = expf(-0.60653066f * sigmoid(m[0] + p[0]));
        const float rate = sigmoid(m[1] + p[1]), z = k * p[3], ks = k * (1.f + (rate - 1.f) * p[4]);
        if (gated)
            v += (v0 - v) * sigmoid(m[2] + p[2]);
        else
            first[size_t(b) * c + ch] = v;
        gate = m[3];
        x[0][t] = r;
        x[2][t] = ks;
        x[3][t] = v;
        x[4][t] = z;
        x[5][t] = z * rate;
        x[6][t] = r * ks * p[5];
    }
    copy_wait<0>();
    __syncthreads();
    const float inv = 1.f / fmaxf(sqrtf(each_warp_sum<N>([&](int n) { return x[4][n] * x[4][n]; })), 1e-12f);
    const auto before = [&](int e) {
        if constexpr (STAGED)
            return floats(reinterpret_cast<const uint2*>(&staged[e / 2 * THREADS_ + t])[e % 2]);
        else
            return floats(kept[e]);
    };
    float4 s[N / 16];
    float u = 0.f, o = 0.f;
    const auto four = [&](int n, int e) { return *reinterpret_cast<const float4*>(&x[n][col(e)]); };
#pragma unroll
    for (int e = 0; e < N / 16; e++) {
        const float4 a = four(4, e);
        s[e] = before(e);
        u += s[e].x * a.x + s[e].y * a.y + s[e].z * a.z + s[e].w * a.w;
    }
    // By minus the key of length 1, and back by that times the rate.
    u = quad_sum(u) * -inv * inv;
    const float vi = x[3][i];
    // Read again rather than held.
    if constexpr (STAGED) asm volatile("" ::: "memory");
#pragma unroll
    for (int e = 0; e < N / 16; e++) {
        if constexpr (STAGED) s[e] = before(e);
        const float4 d = four(1, e), bb = four(5, e), kk = four(2, e), rr = four(0, e);
        s[e].x = s[e].x * d.x + u * bb.x + vi * kk.x;
        s[e].y = s[e].y * d.y + u * bb.y + vi * kk.y;
        s[e].z = s[e].z * d.z + u * bb.z + vi * kk.z;
        s[e].w = s[e].w * d.w + u * bb.w + vi * kk.w;
        o += s[e].x * rr.x + s[e].y * rr.y + s[e].z * rr.z + s[e].w * rr.w;
        if constexpr (!STAGED)
            store_state(s_at + col(e), s[e]);
        else if (e % 2)
            *reinterpret_cast<uint4*>(s_at + col(e - 1)) = narrow(s[e - 1], s[e]);
    }
    float weight = 0.f, bias = 0.f;
    if (t < N) weight = norm.p[0][ch], bias = norm.p[1][ch];
    o = quad_sum(o);
    if (q == 0) y[i] = o;
    __syncthreads();
    if (warp * 32 >= N) return;
    const float mean = each_warp_sum<N>([&](int n) { return y[n]; }) / N;
    const float var = each_warp_sum<N>([&](int n) { return (y[n] - mean) * (y[n] - mean); }) / N;
    const float bonus = each_warp_sum<N>([&](int n) { return x[6][n]; });
    if (t >= N) return;
    out[size_t(b) * c + ch] = from_f32<T>(((y[t] - mean) * rsqrtf(var + 64e-5f) * weight + bias + bonus * v) * gate);
    if (!wrote) return;
    wrote[size_t(b) * c + ch] = from_f32<T>(x[3][t]);
    wrote[size_t(gridDim.y + b) * c + ch] = from_f32<T>(x[2][t]);
}
