// WKV-7 as the recurrence, in f32 on CUDA cores: any head size and any length, the exact mode and the reference of the kernels on
// tensor cores in tensor.cuh.
//
// One block of 4 N threads per segment and head. A state is held four threads to a row (or to a column): thread 4 i + q holds
// elements q, q + 4, .. of row i, so that the vectors in shared memory are read without bank conflicts.
// The widest head fills the register file in the backward pass:
// may spill: wkv7_back_\w+_128
// may spill: wkv7_tensor_back_128
#include "common.cuh"
#include "tensor.cuh"

struct Segment {
    int start, len, state_in, state_out;
};

constexpr int BLOCK = 8; // tokens between kept states: going back inside a block divides by the decay at most 7 times

__device__ __forceinline__ float log_decay(float w) { return -0.60653066f * sigmoid(w); }

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <class T> struct Inputs {
    const T* p[6]; // r, w, k, v, a, b: [tokens, heads N]
};

// y [tokens, heads N]; states [slots, heads, N, N]; kept: before tokens 0, 8, ..; u [tokens, heads N].
template <class T, int N>
__device__ void forward(Inputs<T> in, const Segment* segments, const float* arena, float* arena_out, T* y, float* kept, float* us,
                        const int* offsets, int heads) {
    const Segment seg = segments[blockIdx.x];
    const int h = blockIdx.y, i = threadIdx.x >> 2, q = threadIdx.x & 3, c = heads * N;
    __shared__ float x[2][6][N];
    float s[N / 4];
#pragma unroll
    for (int e = 0; e < N / 4; e++)
        s[e] = seg.state_in < 0 ? 0.f : arena[(size_t(seg.state_in) * heads + h) * N * N + i * N + e * 4 + q];
    const int blocks = (seg.len + BLOCK - 1) / BLOCK;
    for (int t = 0; t < seg.len; t++) {
        const size_t row = size_t(seg.start + t) * c + h * N;
        float(*m)[N] = x[t & 1];
        if (threadIdx.x < N) {
#pragma unroll
            for (int n = 0; n < 6; n++) {
                const float value = to_f32(in.p[n][row + threadIdx.x]);
                m[n][threadIdx.x] = n == 1 ? expf(log_decay(value)) : value;
            }
        }
        __syncthreads();
        if (kept && t % BLOCK == 0) {
            float* to = kept + (size_t(offsets[blockIdx.x]) + size_t(h) * blocks + t / BLOCK) * N * N;
#pragma unroll
            for (int e = 0; e < N / 4; e++) to[i * N + e * 4 + q] = s[e];
        }
        float u = 0.f, out = 0.f;
#pragma unroll
        for (int e = 0; e < N / 4; e++) u += s[e] * m[4][e * 4 + q];
        u = quad_sum(u);
        const float v = m[3][i];
#pragma unroll
        for (int e = 0; e < N / 4; e++) {
            const int j = e * 4 + q;
            s[e] = s[e] * m[1][j] + u * m[5][j] + v * m[2][j];
            out += s[e] * m[0][j];
        }
        out = quad_sum(out);
        if (q == 0) {
            y[row + i] = from_f32<T>(out);
            if (us) us[row + i] = u;
        }
    }
    if (arena_out && seg.state_out >= 0)
#pragma unroll
        for (int e = 0; e < N / 4; e++) arena_out[(size_t(seg.state_out) * heads + h) * N * N + i * N + e * 4 + q] = s[e];
}

template <class T> struct Grads {
    T* p[6]; // of r, w, k, v, a, b
};

// dy and dnew (gradient of the new arena) may be null; initial [segments, heads, N, N] may be null. Where `add` has the bit of an input,
// its gradient is added to what is there.
template <class T, int N>
__device__ void backward(Inputs<T> in, const Segment* segments, const float* kept, const float* us, const int* offsets,
                         const T* dy, const float* dnew, Grads<T> out, int add, float* initial, int heads) {
    const Segment seg = segments[blockIdx.x];
    const int h = blockIdx.y, i = threadIdx.x >> 2, q = threadIdx.x & 3, c = heads * N;
    __shared__ float x[2][8][N]; // r, decay, k, v, a, b, dy, u
    __shared__ float du_all[N];
    float s[N / 4], dc[N / 4], dr[N / 4]; // by columns (row e 4 + q, column i), and dr by rows (row i, column e 4 + q)
#pragma unroll
    for (int e = 0; e < N / 4; e++) {
        const bool some = dnew && seg.state_out >= 0;
        const float* d = some ? dnew + (size_t(seg.state_out) * heads + h) * N * N : nullptr;
        dc[e] = some ? d[(e * 4 + q) * N + i] : 0.f;
        dr[e] = some ? d[i * N + e * 4 + q] : 0.f;
        s[e] = 0.f;
    }
    const int blocks = (seg.len + BLOCK - 1) / BLOCK;
    const float* mine = kept + (size_t(offsets[blockIdx.x]) + size_t(h) * blocks) * N * N;
    for (int block = blocks - 1; block >= 0; block--) {
        const int first = block * BLOCK, end = min(seg.len, first + BLOCK);
        // The state after the block: the next block's kept state, or forward from this one's.
        if (block + 1 < blocks) {
#pragma unroll
            for (int e = 0; e < N / 4; e++) s[e] = mine[size_t(block + 1) * N * N + (e * 4 + q) * N + i];
        } else {
#pragma unroll
            for (int e = 0; e < N / 4; e++) s[e] = mine[size_t(block) * N * N + (e * 4 + q) * N + i];
            for (int t = first; t < end; t++) {
                const size_t row = size_t(seg.start + t) * c + h * N;
                const float d = expf(log_decay(to_f32(in.p[1][row + i]))), k = to_f32(in.p[2][row + i]), b = to_f32(in.p[5][row + i]);
#pragma unroll
                for (int e = 0; e < N / 4; e++) s[e] = s[e] * d + us[row + e * 4 + q] * b + to_f32(in.p[3][row + e * 4 + q]) * k;
            }
        }
        for (int t = end - 1; t >= first; t--) {
            const size_t row = size_t(seg.start + t) * c + h * N;
            float(*m)[N] = x[t & 1];
            if (threadIdx.x < N) {
                const int at = threadIdx.x;
#pragma unroll
                for (int n = 0; n < 6; n++) {
                    const float value = to_f32(in.p[n][row + at]);
                    m[n][at] = n == 1 ? expf(log_decay(value)) : value;
                }
                m[6][at] = dy ? to_f32(dy[row + at]) : 0.f;
                m[7][at] = us[row + at];
            }
            __syncthreads();
            const float r = m[0][i], d = m[1][i], k = m[2][i], a = m[4][i], b = m[5][i], g = m[6][i];
            float gr = 0.f, gk = 0.f, gb = 0.f, gv = 0.f, du = 0.f;
#pragma unroll
            for (int e = 0; e < N / 4; e++) {
                const int j = e * 4 + q;
                dc[e] += m[6][j] * r;
                dr[e] += g * m[0][j];
                gr += s[e] * m[6][j];
                gk += dc[e] * m[3][j];
                gb += dc[e] * m[7][j];
                gv += dr[e] * m[2][j];
                du += dr[e] * m[5][j];
            }
            gr = quad_sum(gr);
            gk = quad_sum(gk);
            gb = quad_sum(gb);
            gv = quad_sum(gv);
            du = quad_sum(du);
            if (q == 0) du_all[i] = du;
            __syncthreads();
            float gw = 0.f, ga = 0.f;
            const float inv = 1.f / d;
#pragma unroll
            for (int e = 0; e < N / 4; e++) {
                const int j = e * 4 + q;
                if (t > first) s[e] = (s[e] - m[3][j] * k - m[7][j] * b) * inv;
                else s[e] = mine[size_t(block) * N * N + j * N + i];
                gw += dc[e] * s[e];
                ga += s[e] * du_all[j];
                dc[e] = dc[e] * d + du_all[j] * a;
                dr[e] = dr[e] * m[1][j] + du * m[4][j];
            }
            gw = quad_sum(gw);
            ga = quad_sum(ga);
            if (q == 0) {
                const float w = to_f32(in.p[1][row + i]);
                const float grads[6] = {gr, gw * d * -0.60653066f * sigmoid(w) * sigmoid(-w), gk, gv, ga, gb};
#pragma unroll
                for (int n = 0; n < 6; n++) {
                    T* to = out.p[n] + row + i;
                    *to = from_f32<T>(grads[n] + (add >> n & 1 ? to_f32(*to) : 0.f));
                }
            }
        }
    }
    if (initial && seg.state_in >= 0)
#pragma unroll
        for (int e = 0; e < N / 4; e++) initial[(size_t(blockIdx.x) * heads + h) * N * N + i * N + e * 4 + q] = dr[e];
}

// The gradient of the old arena: that of the new one in rows that no segment replaced (g holds it), plus those of the initial
// states, in the order of the segments. One block per row and 256 elements.
extern "C" __global__ void wkv7_state_grad(float* g, const float* initial, const Segment* segments, int count, int size) {
    const int slot = blockIdx.y, at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= size) return;
    bool replaced = false;
    float s = 0.f;
    for (int n = 0; n < count; n++) {
        if (segments[n].state_out == slot) replaced = true;
        if (segments[n].state_in == slot) s += initial[size_t(n) * size + at];
    }
    float* to = g + size_t(slot) * size + at;
    *to = (replaced ? 0.f : *to) + s;
}

#define WKV7(T, name, N)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(4 * N) wkv7_##name##_##N(Inputs<T> in, const Segment* segments,          \
        const float* arena, float* arena_out, T* y, float* kept, float* us, const int* offsets, int heads) {              \
        forward<T, N>(in, segments, arena, arena_out, y, kept, us, offsets, heads);                                       \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(4 * N) wkv7_back_##name##_##N(Inputs<T> in, const Segment* segments,     \
        const float* kept, const float* us, const int* offsets, const T* dy, const float* dnew, Grads<T> out,             \
        int add, float* initial, int heads) {                                                                             \
        backward<T, N>(in, segments, kept, us, offsets, dy, dnew, out, add, initial, heads);                                 \
    }
#define SIZES(T, name) WKV7(T, name, 16) WKV7(T, name, 32) WKV7(T, name, 64) WKV7(T, name, 128)
FOR_EACH_TYPE(SIZES)

#define TENSOR_FORWARD(T, name, N, blocks)                                                                                  \
    extern "C" __global__ void __launch_bounds__(2 * N, blocks) wkv7_tensor_##name##_##N(                                     \
        tensor::Inputs<T> in, const tensor::Piece* pieces, const float* arena, float* arena_out, const float* entry, T* y,    \
        tensor::Saved saved, int heads) {                                                                                     \
        tensor::forward<T, N, false>(in, pieces, arena, arena_out, entry, nullptr, y, saved, heads);                          \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(2 * N) wkv7_tensor_scan_##name##_##N(                                        \
        tensor::Inputs<T> in, const tensor::Piece* pieces, const float* arena, float* map, int heads) {                       \
        tensor::forward<T, N, true>(in, pieces, arena, nullptr, nullptr, map, nullptr, {}, heads);                            \
    }
#define TENSOR(N)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(2 * N) wkv7_tensor_back_##N(tensor::Inputs<bf16> in, const tensor::Piece* pieces, \
        tensor::Saved saved, const bf16* dy, const float* dnew, const float* exit, tensor::Grads out, int add, float* initial, \
        int heads) {                                                                                                          \
        tensor::backward<N, false>(in, pieces, saved, dy, dnew, exit, nullptr, out, add, initial, heads);                     \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(2 * N, 192 / N) wkv7_tensor_back_scan_##N(                                         \
        tensor::Inputs<bf16> in, const tensor::Piece* pieces, tensor::Saved saved, const bf16* dy, const float* dnew,         \
        float* map, int heads) {                                                                                              \
        tensor::backward<N, true>(in, pieces, saved, dy, dnew, nullptr, map, {}, 0, nullptr, heads);                          \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256) wkv7_tensor_entries_##N(const int2* ranges, const float* map,           \
        float* entry, int heads) {                                                                                            \
        tensor::combine<N, false>(ranges, map, nullptr, entry, heads);                                                        \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256) wkv7_tensor_exits_##N(const int2* ranges, const float* map,             \
        const float* own, float* exit, int heads) {                                                                           \
        tensor::combine<N, true>(ranges, map, own, exit, heads);                                                              \
    }
TENSOR_FORWARD(bf16, bf16, 64, 4)
TENSOR_FORWARD(bf16, bf16, 128, 1)
TENSOR_FORWARD(f16, f16, 64, 4)
TENSOR_FORWARD(f16, f16, 128, 1)
TENSOR(64)
TENSOR(128)
