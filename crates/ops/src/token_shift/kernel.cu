// Token shift with K interpolations. A thread owns 8 channels and walks over a run of rows.
//
// links[row] = {before, after}: the row before or after in the same segment; -1 if there is none (zero); -2 - s for
// row s of the state arena.
#include "common.cuh"

template <class T, int K> struct Pointers {
    T* p[K];
};

template <class T> __device__ Vec at_link(const T* x, const T* arena, int link, int c, int col) {
    if (link >= 0) return load(x + size_t(link) * c + col);
    return link == -1 ? zeros() : load(arena + size_t(-2 - link) * c + col);
}

// y_k = x + (x' - x) mu_k.
template <class T, int K>
__device__ void forward(const T* x, const T* last, const int2* links, Pointers<T, K> y, Pointers<const float, K> mu, int rows,
                        int c, int run) {
    const int col = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (col >= c) return;
    Vec m[K];
#pragma unroll
    for (int k = 0; k < K; k++) m[k] = load(mu.p[k] + col);
    const int first = blockIdx.x * run, end = min(rows, first + run);
    Vec kept = zeros();
    // Four rows at a time, so that four loads are under way.
    for (int r = first; r < end; r += 4) {
        Vec own[4], p[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (r + i < end) own[i] = load(x + size_t(r + i) * c + col);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (r + i >= end) break;
            const int before = links[r + i].x;
            const bool held = (i || r > first) && before == r + i - 1;
            p[i] = held ? (i ? own[(i + 3) % 4] : kept) : at_link(x, last, before, c, col);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (r + i >= end) break;
#pragma unroll
            for (int k = 0; k < K; k++) {
                Vec o;
                for (int j = 0; j < 8; j++) o[j] = own[i][j] + (p[i][j] - own[i][j]) * m[k][j];
                store(y.p[k] + size_t(r + i) * c + col, o);
            }
        }
        kept = own[3];
    }
}

// dx_t = sum_k dy_k,t (1 - mu_k) + sum_k dy_k,t+1 mu_k (+ the gradient of the arena's row at a segment's end); partial sums of
// dmu_k = sum_t dy_k,t (x'_t - x_t) in parts[run][K][c]. dx may be null.
template <class T, int K>
__device__ void backward(const T* x, const T* last, const T* dlast, const int2* links, Pointers<const T, K> dy,
                         Pointers<const float, K> mu, T* dx, float* parts, int rows, int c, int run) {
    const int col = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (col >= c) return;
    Vec m[K], dm[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
        m[k] = load(mu.p[k] + col);
        dm[k] = zeros();
    }
    const int first = blockIdx.x * run, end = min(rows, first + run);
    Vec kept = zeros(), open = zeros(); // x of the row before; its gradient without what the next row adds
    for (int r = first; r < end; r++) {
        const int2 link = links[r];
        const Vec p = r > first && link.x == r - 1 ? kept : at_link(x, last, link.x, c, col);
        kept = load(x + size_t(r) * c + col);
        Vec own = zeros(), back = zeros();
#pragma unroll
        for (int k = 0; k < K; k++) {
            const Vec d = dy.p[k] ? load(dy.p[k] + size_t(r) * c + col) : zeros();
            for (int j = 0; j < 8; j++) {
                dm[k][j] += d[j] * (p[j] - kept[j]);
                own[j] += d[j] * (1.f - m[k][j]);
                back[j] += d[j] * m[k][j];
            }
        }
        if (dx && r > first && link.x == r - 1) {
            for (int j = 0; j < 8; j++) open[j] += back[j];
        }
        if (dx && r > first) store(dx + size_t(r - 1) * c + col, open);
        open = own;
        if (dx && link.y <= -2 && dlast) {
            const Vec d = load(dlast + size_t(-2 - link.y) * c + col);
            for (int j = 0; j < 8; j++) open[j] += d[j];
        }
    }
    if (dx && end > first) {
        if (links[end - 1].y >= 0) {
#pragma unroll
            for (int k = 0; k < K; k++) {
                if (!dy.p[k]) continue;
                const Vec d = load(dy.p[k] + size_t(end) * c + col);
                for (int j = 0; j < 8; j++) open[j] += d[j] * m[k][j];
            }
        }
        store(dx + size_t(end - 1) * c + col, open);
    }
#pragma unroll
    for (int k = 0; k < K; k++) store(parts + (size_t(blockIdx.x) * K + k) * c + col, dm[k]);
}

// Copies each segment's last row to its arena row: pairs[i] = {row of x, arena row}.
template <class T> __device__ void keep_last(const T* x, T* arena, const int2* pairs, int c) {
    const int2 p = pairs[blockIdx.x];
    for (int i = threadIdx.x; i < c; i += blockDim.x) arena[size_t(p.y) * c + i] = x[size_t(p.x) * c + i];
}

// Gradient of the old arena from the first rows of segments that start from it: starts[i] = {row, arena row}; one block per
// arena row adds those that belong to it, in order. g starts as the new arena's gradient in rows nobody replaced.
template <class T, int K>
__device__ void last_grad(T* g, const int2* starts, int count, Pointers<const T, K> dy, Pointers<const float, K> mu, int c) {
    for (int i = threadIdx.x; i < c; i += blockDim.x) {
        float s = to_f32(g[size_t(blockIdx.x) * c + i]);
        for (int n = 0; n < count; n++) {
            if (starts[n].y != int(blockIdx.x)) continue;
#pragma unroll
            for (int k = 0; k < K; k++)
                if (dy.p[k]) s += to_f32(dy.p[k][size_t(starts[n].x) * c + i]) * mu.p[k][i];
        }
        g[size_t(blockIdx.x) * c + i] = from_f32<T>(s);
    }
}

#define SHIFT(T, name, K)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) token_shift##K##_##name(                                            \
        const T* x, const T* last, const int2* links, Pointers<T, K> y, Pointers<const float, K> mu, int rows, int c,     \
        int run) {                                                                                                        \
        forward<T, K>(x, last, links, y, mu, rows, c, run);                                                               \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128) token_shift##K##_back_##name(                                       \
        const T* x, const T* last, const T* dlast, const int2* links, Pointers<const T, K> dy, Pointers<const float, K> mu, \
        T* dx, float* parts, int rows, int c, int run) {                                                                  \
        backward<T, K>(x, last, dlast, links, dy, mu, dx, parts, rows, c, run);                                           \
    }                                                                                                                     \
    extern "C" __global__ void token_shift##K##_last_grad_##name(T* g, const int2* starts, int count,                     \
                                                                 Pointers<const T, K> dy, Pointers<const float, K> mu, int c) { \
        last_grad<T, K>(g, starts, count, dy, mu, c);                                                                     \
    }
#define BOTH(T, name)                                                                                                     \
    SHIFT(T, name, 1)                                                                                                     \
    SHIFT(T, name, 6)                                                                                                     \
    extern "C" __global__ void keep_last_##name(const T* x, T* arena, const int2* pairs, int c) { keep_last(x, arena, pairs, c); }
FOR_EACH_TYPE(BOTH)
