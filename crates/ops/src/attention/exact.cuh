// The operation in f32 on CUDA cores, for all sizes of heads up to 128: the exact mode, and the reference of the faster kernels. A warp has a
// query (or, going back to keys, a key); a lane computes the products with one key and sums every 32nd channel.
#pragma once
#include "lists.cuh"

namespace chunks {

constexpr int E = 4; // channels of a lane

template <class T> __device__ __forceinline__ float dot(const T* a, const T* b, int n) {
    float s = 0.f;
    for (int i = 0; i < n; i += 8) {
        const Vec x = load(a + i), y = load(b + i);
#pragma unroll
        for (int j = 0; j < 8; j++) s += x[j] * y[j];
    }
    return s;
}
template <class T> __device__ __forceinline__ const T* at(const Plan& p, const void* x, int row, int n) {
    return static_cast<const T*>(x) + (size_t(row) * p.heads + blockIdx.y) * n;
}
template <class T> __device__ __forceinline__ const T* key_at(const Plan& p, const void* x, int row, int n) {
    return static_cast<const T*>(x) + (size_t(row) * p.key_heads + blockIdx.y / p.share) * n;
}
// sums[e] += x of the lane's channels, by factor.
template <class T> __device__ __forceinline__ void add_scaled(float (&sums)[E], float factor, const T* x, int n) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int e = 0; e < E; e++)
        if (e * 32 + lane < n) sums[e] += factor * to_f32(x[e * 32 + lane]);
}
template <class T> __device__ __forceinline__ void store_sums(T* to, const float (&sums)[E], float factor, int n) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int e = 0; e < E; e++)
        if (e * 32 + lane < n) to[e * 32 + lane] = from_f32<T>(sums[e] * factor);
}

// Runs f(row, position) for the queries of the block, one for each warp in turn.
template <class F> __device__ __forceinline__ void each_query(const Plan& p, F f) {
    const Sequence& s = sequence_of<&Sequence::query_base>(p, blockIdx.x);
    const int first = (int(blockIdx.x) - s.query_base) * QUERIES;
    for (int i = first + (threadIdx.x >> 5); i < min(first + QUERIES, s.len); i += 4) f(s, s.first_row + i, s.past + i);
}
// Runs f(first key, keys) for all keys that a query sees, 32 at a time.
template <class F> __device__ __forceinline__ void each_key(const Plan& p, const int* picks, int row, int position, F f) {
    for (int slot = 0; slot < p.slots; slot++) {
        int from = position / p.size * p.size, to = position + 1;
        if (slot < p.slots - 1) {
            const int c = picks[(size_t(blockIdx.y) * p.rows + row) * (p.slots - 1) + slot];
            if (c < 0) continue;
            from = c * p.size;
            to = from + p.size;
        }
        for (int key = from; key < to; key += 32) f(key, min(32, to - key));
    }
}

template <class T> __device__ void exact_forward(const Plan& p, const T* q, const int* picks, T* y, float* lse, int n) {
    const int lane = threadIdx.x & 31;
    const float scale = rsqrtf(float(n));
    each_query(p, [&](const Sequence& s, int row, int position) {
        float top = -INFINITY, total = 0.f, sums[E] = {};
        each_key(p, picks, row, position, [&](int key, int count) {
            const float x = lane < count ? dot(at<T>(p, q, row, n), key_at<T>(p, s.keys, key + lane, n), n) * scale : -INFINITY;
            float most = x;
            for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
            most = fmaxf(most, top);
            const float keep = expf(top - most), w = expf(x - most);
            total = total * keep + warp_sum(w);
            top = most;
#pragma unroll
            for (int e = 0; e < E; e++) sums[e] *= keep;
            for (int j = 0; j < count; j++) add_scaled(sums, __shfl_sync(~0u, w, j), key_at<T>(p, s.values, key + j, n), n);
        });
        store_sums(const_cast<T*>(at<T>(p, y, row, n)), sums, 1.f / total, n);
        if (lse && lane == 0) lse[size_t(row) * p.heads + blockIdx.y] = top + logf(total);
    });
}

// stats [rows, heads]: the softmax's logarithm (to base 2) and dy . y; n / 8 threads a row.
template <class T> __device__ void stats(const T* dy, const T* y, const float* lse, float2* out, int rows, int n) {
    const int lanes = n / 8, i = blockIdx.x * blockDim.x + threadIdx.x, row = i / lanes;
    float s = 0.f;
    if (row < rows) {
        const Vec a = load(dy + size_t(i) * 8), b = load(y + size_t(i) * 8);
#pragma unroll
        for (int j = 0; j < 8; j++) s += a[j] * b[j];
    }
    for (int o = lanes / 2; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
    if (row < rows && i % lanes == 0) out[row] = make_float2(lse[row] * 1.44269504f, s);
}

// The weight of a key and the gradient of its score, by a lane that has both.
template <class T>
__device__ __forceinline__ float2 weights(const Plan& p, const Sequence& s, const T* q, const T* dy, const float2* stats, int row, int key, int n) {
    const float2 l = stats[size_t(row) * p.heads + blockIdx.y];
    const float scale = rsqrtf(float(n));
    const float w = exp2f(dot(at<T>(p, q, row, n), key_at<T>(p, s.keys, key, n), n) * scale * 1.44269504f - l.x);
    return make_float2(w, w * (dot(at<T>(p, dy, row, n), key_at<T>(p, s.values, key, n), n) - l.y) * scale);
}

template <class T> __device__ void exact_queries(const Plan& p, const T* q, const T* dy, const int* picks, const float2* stats, T* dq, int n) {
    const int lane = threadIdx.x & 31;
    each_query(p, [&](const Sequence& s, int row, int position) {
        float sums[E] = {};
        each_key(p, picks, row, position, [&](int key, int count) {
            const float ds = lane < count ? weights(p, s, q, dy, stats, row, key + lane, n).y : 0.f;
            for (int j = 0; j < count; j++) add_scaled(sums, __shfl_sync(~0u, ds, j), key_at<T>(p, s.keys, key + j, n), n);
        });
        store_sums(const_cast<T*>(at<T>(p, dq, row, n)), sums, 1.f, n);
    });
}

// A block a chunk; each warp takes keys in turn: the later queries of its chunk, then those that chose it.
template <class T>
__device__ void exact_keys(const Plan& p, const T* q, const T* dy, const float2* stats, const List* lists, const int* entries, T* dk, T* dv, int n) {
    const Sequence& s = sequence_of<&Sequence::chunk_base>(p, blockIdx.x);
    const int c = int(blockIdx.x) - s.chunk_base, lane = threadIdx.x & 31, end = min((c + 1) * p.size, s.len);
    const List list = p.slots > 1 ? lists_of(p, s, lists, blockIdx.y)[c] : List{0, 0, 0, 0};
    const int* chosen = p.slots > 1 ? entries_of(p, s, entries, blockIdx.y) + list.first : nullptr;
    for (int key = c * p.size + (threadIdx.x >> 5); key < end; key += 4) {
        float sk[E] = {}, sv[E] = {};
        for (int i = key - end; i < list.size; i += 32) {
            const int at_lane = i + lane, row = at_lane < 0 ? s.first_row + end + at_lane : at_lane < list.size ? row_in(p, chosen[at_lane]) : -1;
            const float2 w = row < 0 ? make_float2(0.f, 0.f) : weights(p, s, q, dy, stats, row, key, n);
            for (int j = 0; j < 32; j++) {
                const int other = __shfl_sync(~0u, row, j);
                const float wv = __shfl_sync(~0u, w.x, j), wk = __shfl_sync(~0u, w.y, j);
                if (other < 0) continue;
                add_scaled(sk, wk, at<T>(p, q, other, n), n);
                add_scaled(sv, wv, at<T>(p, dy, other, n), n);
            }
        }
        store_sums(const_cast<T*>(at<T>(p, dk, s.first_row + key, n)), sk, 1.f, n);
        store_sums(const_cast<T*>(at<T>(p, dv, s.first_row + key, n)), sv, 1.f, n);
    }
}

// out [rows, key_heads N] = sums over the heads that share one of parts [rows, heads N], in their order; a thread has 8 channels, `lanes` of them a head.
template <class T> __device__ void join(const T* parts, T* out, int threads, int lanes, int share) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= threads) return;
    Vec sum = zeros();
    for (int g = 0; g < share; g++) {
        const Vec x = load(parts + ((size_t(i / lanes) * share + g) * lanes + i % lanes) * 8);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += x[j];
    }
    store(out + size_t(i) * 8, sum);
}

} // namespace chunks
