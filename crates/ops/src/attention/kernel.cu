// Causal attention by tiles, in f32 on CUDA cores: the exact mode and the reference of faster kernels.
//
// One block per segment, head and tile. A tile has TILE tokens and four threads for each: thread 4 i + q has row i, and of the
// other side's rows and of the channels those that are q modulo 4, so that sums over them are sums over four neighbours. Rows in shared
// memory are one element longer than a head, against bank conflicts.
#include "common.cuh"

struct Segment {
    int start, len, state_in, state_out;
};

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

template <int N> constexpr int TILE = N <= 64 ? 32 : 16;

// Rows first.. of a head of x [tokens, heads N]; zero past the segment's end.
template <int N, class T> __device__ void load_tile(float (*to)[N + 1], const T* x, const Segment& seg, int first, int heads) {
    for (int e = threadIdx.x; e < TILE<N> * N; e += blockDim.x) {
        const int t = first + e / N, n = e % N;
        to[e / N][n] = t < seg.len ? to_f32(x[(size_t(seg.start + t) * heads + blockIdx.y) * N + n]) : 0.f;
    }
}

template <int N> __device__ __forceinline__ float dot(const float* a, const float* b) {
    float s = 0.f;
#pragma unroll 16
    for (int n = 0; n < N; n++) s += a[n] * b[n];
    return s;
}

// y [tokens, heads N]; lse [tokens, heads], the logarithms of the softmax's denominators, may be null.
template <class T, int N>
__device__ void forward(const T* q, const T* k, const T* v, const Segment* segments, T* y, float* lse, int heads) {
    constexpr int S = TILE<N>;
    const Segment seg = segments[blockIdx.x];
    const int first = blockIdx.z * S, i = threadIdx.x >> 2, c = threadIdx.x & 3;
    if (first >= seg.len) return;
    __shared__ float qs[S][N + 1], ks[S][N + 1], vs[S][N + 1], p[S][S + 1];
    load_tile<N>(qs, q, seg, first, heads);
    const float scale = rsqrtf(float(N));
    float top = -INFINITY, total = 0.f, o[N / 4];
#pragma unroll
    for (int e = 0; e < N / 4; e++) o[e] = 0.f;
    for (int key = 0; key <= first; key += S) {
        __syncthreads();
        load_tile<N>(ks, k, seg, key, heads);
        load_tile<N>(vs, v, seg, key, heads);
        __syncthreads();
        float s[S / 4], most = top;
#pragma unroll
        for (int e = 0; e < S / 4; e++) {
            const int j = e * 4 + c;
            s[e] = key + j <= first + i ? dot<N>(qs[i], ks[j]) * scale : -INFINITY;
            most = fmaxf(most, s[e]);
        }
        most = quad_max(most);
        const float keep = expf(top - most);
        float sum = 0.f;
#pragma unroll
        for (int e = 0; e < S / 4; e++) {
            s[e] = expf(s[e] - most);
            p[i][e * 4 + c] = s[e];
            sum += s[e];
        }
        total = total * keep + quad_sum(sum);
        top = most;
        __syncwarp();
#pragma unroll
        for (int e = 0; e < N / 4; e++) o[e] *= keep;
        for (int j = 0; j < S; j++)
#pragma unroll
            for (int e = 0; e < N / 4; e++) o[e] += p[i][j] * vs[j][e * 4 + c];
    }
    if (first + i >= seg.len) return;
    const size_t at = size_t(seg.start + first + i) * heads + blockIdx.y;
#pragma unroll
    for (int e = 0; e < N / 4; e++) y[at * N + e * 4 + c] = from_f32<T>(o[e] / total);
    if (lse && c == 0) lse[at] = top + logf(total);
}

// delta[row] = dy . y over n channels, a warp per row of a head.
template <class T> __device__ void delta(const T* dy, const T* y, float* out, int rows, int n) {
    const int row = blockIdx.x * 4 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= rows) return;
    float s = 0.f;
    for (int j = lane; j < n; j += 32) s += to_f32(dy[size_t(row) * n + j]) * to_f32(y[size_t(row) * n + j]);
    s = warp_sum(s);
    if (lane == 0) out[row] = s;
}

// A tile of queries against all keys they see.
template <class T, int N>
__device__ void back_queries(const T* q, const T* k, const T* v, const Segment* segments, const T* dy, const float* lse,
                             const float* delta, int heads, T* dq) {
    constexpr int S = TILE<N>;
    const Segment seg = segments[blockIdx.x];
    const int first = blockIdx.z * S, i = threadIdx.x >> 2, c = threadIdx.x & 3;
    if (first >= seg.len) return;
    __shared__ float qs[S][N + 1], ds[S][N + 1], ks[S][N + 1], vs[S][N + 1], w[S][S + 1];
    load_tile<N>(qs, q, seg, first, heads);
    load_tile<N>(ds, dy, seg, first, heads);
    const bool in = first + i < seg.len;
    const size_t at = size_t(seg.start + first + i) * heads + blockIdx.y;
    const float scale = rsqrtf(float(N)), l = in ? lse[at] : 0.f, d = in ? delta[at] : 0.f;
    float sums[N / 4];
#pragma unroll
    for (int e = 0; e < N / 4; e++) sums[e] = 0.f;
    for (int key = 0; key <= first; key += S) {
        __syncthreads();
        load_tile<N>(ks, k, seg, key, heads);
        load_tile<N>(vs, v, seg, key, heads);
        __syncthreads();
#pragma unroll
        for (int e = 0; e < S / 4; e++) {
            const int j = e * 4 + c;
            float x = 0.f;
            if (in && key + j <= first + i)
                x = expf(dot<N>(qs[i], ks[j]) * scale - l) * (dot<N>(ds[i], vs[j]) - d) * scale;
            w[i][j] = x;
        }
        __syncwarp();
        for (int j = 0; j < S; j++)
#pragma unroll
            for (int e = 0; e < N / 4; e++) sums[e] += w[i][j] * ks[j][e * 4 + c];
    }
    if (!in) return;
#pragma unroll
    for (int e = 0; e < N / 4; e++) dq[at * N + e * 4 + c] = from_f32<T>(sums[e]);
}

// A tile of keys against all queries that see them.
template <class T, int N>
__device__ void back_keys(const T* q, const T* k, const T* v, const Segment* segments, const T* dy, const float* lse,
                          const float* delta, int heads, T* dk, T* dv) {
    constexpr int S = TILE<N>;
    const Segment seg = segments[blockIdx.x];
    const int first = blockIdx.z * S, i = threadIdx.x >> 2, c = threadIdx.x & 3;
    if (first >= seg.len) return;
    __shared__ float ks[S][N + 1], vs[S][N + 1], qs[S][N + 1], ds[S][N + 1], w[S][S + 1], p[S][S + 1];
    load_tile<N>(ks, k, seg, first, heads);
    load_tile<N>(vs, v, seg, first, heads);
    const float scale = rsqrtf(float(N));
    float sk[N / 4], sv[N / 4];
#pragma unroll
    for (int e = 0; e < N / 4; e++) sk[e] = sv[e] = 0.f;
    for (int query = first; query < seg.len; query += S) {
        __syncthreads();
        load_tile<N>(qs, q, seg, query, heads);
        load_tile<N>(ds, dy, seg, query, heads);
        __syncthreads();
#pragma unroll
        for (int e = 0; e < S / 4; e++) {
            const int j = e * 4 + c, t = query + j;
            float weight = 0.f, x = 0.f;
            if (t < seg.len && first + i <= t) {
                const size_t at = size_t(seg.start + t) * heads + blockIdx.y;
                weight = expf(dot<N>(qs[j], ks[i]) * scale - lse[at]);
                x = weight * (dot<N>(ds[j], vs[i]) - delta[at]) * scale;
            }
            p[i][j] = weight;
            w[i][j] = x;
        }
        __syncwarp();
        for (int j = 0; j < S; j++)
#pragma unroll
            for (int e = 0; e < N / 4; e++) {
                sk[e] += w[i][j] * qs[j][e * 4 + c];
                sv[e] += p[i][j] * ds[j][e * 4 + c];
            }
    }
    if (first + i >= seg.len) return;
    const size_t at = size_t(seg.start + first + i) * heads + blockIdx.y;
#pragma unroll
    for (int e = 0; e < N / 4; e++) {
        dk[at * N + e * 4 + c] = from_f32<T>(sk[e]);
        dv[at * N + e * 4 + c] = from_f32<T>(sv[e]);
    }
}

#define HEAD(T, name, N)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(4 * TILE<N>) attention_##name##_##N(                                     \
        const T* q, const T* k, const T* v, const Segment* segments, T* y, float* lse, int heads) {                       \
        forward<T, N>(q, k, v, segments, y, lse, heads);                                                                  \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(4 * TILE<N>) attention_dq_##name##_##N(                                  \
        const T* q, const T* k, const T* v, const Segment* segments, const T* dy, const float* lse, const float* delta,   \
        int heads, T* dq) {                                                                                               \
        back_queries<T, N>(q, k, v, segments, dy, lse, delta, heads, dq);                                                 \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(4 * TILE<N>) attention_dkv_##name##_##N(                                 \
        const T* q, const T* k, const T* v, const Segment* segments, const T* dy, const float* lse, const float* delta,   \
        int heads, T* dk, T* dv) {                                                                                        \
        back_keys<T, N>(q, k, v, segments, dy, lse, delta, heads, dk, dv);                                                \
    }
#define ATTENTION(T, name)                                                                                                \
    extern "C" __global__ void __launch_bounds__(128)                                                                     \
        attention_delta_##name(const T* dy, const T* y, float* out, int rows, int n) {                                    \
        delta(dy, y, out, rows, n);                                                                                       \
    }                                                                                                                     \
    HEAD(T, name, 16) HEAD(T, name, 32) HEAD(T, name, 64) HEAD(T, name, 128)
FOR_EACH_TYPE(ATTENTION)
