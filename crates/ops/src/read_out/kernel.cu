// (GroupNorm(y) weight + bias + (sum_j r_j k_j r_k_j) v) gate per head. 8 channels a thread; the N / 8 threads of a head
// are neighbours in a warp.
#include "common.cuh"

constexpr float EPS = 64e-5f;

__device__ __forceinline__ float head_sum(float x, int n) {
    for (int o = n >> 4; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
    return x;
}

template <class T>
__device__ void forward(const T* y, const T* r, const T* k, const T* v, const T* gate, const float* r_k, const float* weight,
                        const float* bias, T* out, int n, int c, size_t total) {
    const size_t i = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) * 8;
    const bool in = i < total;
    const int col = i % c;
    const Vec yy = in ? load(y + i) : zeros(), rr = in ? load(r + i) : zeros(), kk = in ? load(k + i) : zeros();
    const Vec rk = load(r_k + col);
    float m = 0.f, s = 0.f;
    for (int j = 0; j < 8; j++) {
        m += yy[j];
        s += rr[j] * kk[j] * rk[j];
    }
    const float mean = head_sum(m, n) / n;
    s = head_sum(s, n);
    float q = 0.f;
    for (int j = 0; j < 8; j++) q += (yy[j] - mean) * (yy[j] - mean);
    const float inv = rsqrtf(head_sum(q, n) / n + EPS);
    if (!in) return;
    const Vec vv = load(v + i), g = load(gate + i), w = load(weight + col), b = load(bias + col);
    Vec o;
    for (int j = 0; j < 8; j++) o[j] = ((yy[j] - mean) * inv * w[j] + b[j] + s * vv[j]) * g[j];
    store(out + i, o);
}

// parts[run][3][c] get dr_k, dweight, dbias.
template <class T>
__device__ void backward(const T* __restrict__ d, const T* __restrict__ y, const T* __restrict__ r, const T* __restrict__ k,
                         const T* __restrict__ v, const T* __restrict__ gate, const float* r_k, const float* weight,
                         const float* bias, T* __restrict__ dy, T* __restrict__ dr, T* __restrict__ dk, T* __restrict__ dv,
                         T* __restrict__ dgate, float* parts, int n,
                         int rows, int c, int run) {
    const int col = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    const bool in = col < c; // whole heads are in or out
    const Vec rk = in ? load(r_k + col) : zeros(), w = in ? load(weight + col) : zeros(), b = in ? load(bias + col) : zeros();
    Vec srk = zeros(), sw = zeros(), sb = zeros();
    const int first = blockIdx.x * run, end = min(rows, first + run);
#pragma unroll 2
    for (int t = first; t < end; t++) {
        const size_t i = size_t(t) * c + col;
        const Vec yy = in ? load(y + i) : zeros(), rr = in ? load(r + i) : zeros(), kk = in ? load(k + i) : zeros();
        const Vec vv = in ? load(v + i) : zeros(), g = in ? load(gate + i) : zeros(), e0 = in ? load(d + i) : zeros();
        float m = 0.f, s = 0.f, q = 0.f;
        Vec e;
        for (int j = 0; j < 8; j++) {
            e[j] = e0[j] * g[j];
            m += yy[j];
            s += rr[j] * kk[j] * rk[j];
            q += e[j] * vv[j];
        }
        const float mean = head_sum(m, n) / n;
        s = head_sum(s, n);
        q = head_sum(q, n);
        float var = 0.f;
        for (int j = 0; j < 8; j++) var += (yy[j] - mean) * (yy[j] - mean);
        const float inv = rsqrtf(head_sum(var, n) / n + EPS);
        float ha = 0.f, hb = 0.f;
        for (int j = 0; j < 8; j++) {
            ha += e[j] * w[j];
            hb += e[j] * w[j] * (yy[j] - mean) * inv;
        }
        ha = head_sum(ha, n) / n;
        hb = head_sum(hb, n) / n;
        Vec oy, orr, ok, ov, og;
        for (int j = 0; j < 8; j++) {
            const float x = (yy[j] - mean) * inv;
            oy[j] = inv * (e[j] * w[j] - ha - x * hb);
            orr[j] = q * kk[j] * rk[j];
            ok[j] = q * rr[j] * rk[j];
            ov[j] = s * e[j];
            og[j] = e0[j] * (x * w[j] + b[j] + s * vv[j]);
            srk[j] += q * rr[j] * kk[j];
            sw[j] += e[j] * x;
            sb[j] += e[j];
        }
        if (in) {
            store(dy + i, oy);
            store(dr + i, orr);
            store(dk + i, ok);
            store(dv + i, ov);
            store(dgate + i, og);
        }
    }
    if (!in) return;
    float* mine = parts + size_t(blockIdx.x) * 3 * c + col;
    store(mine, srk);
    store(mine + c, sw);
    store(mine + 2 * c, sb);
}

#define READ_OUT(T, name)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) read_out_##name(const T* y, const T* r, const T* k, const T* v,     \
        const T* gate, const float* r_k, const float* weight, const float* bias, T* out, int n, int c, size_t total) {    \
        forward(y, r, k, v, gate, r_k, weight, bias, out, n, c, total);                                                   \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128) read_out_back_##name(const T* d, const T* y, const T* r, const T* k, \
        const T* v, const T* gate, const float* r_k, const float* weight, const float* bias, T* dy, T* dr, T* dk, T* dv,  \
        T* dgate, float* parts, int n, int rows, int c, int run) {                                                        \
        backward(d, y, r, k, v, gate, r_k, weight, bias, dy, dr, dk, dv, dgate, parts, n, rows, c, run);                  \
    }
FOR_EACH_TYPE(READ_OUT)
