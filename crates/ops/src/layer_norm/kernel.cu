// LayerNorm with the residual connection before it, one block per row (forward) or per run of rows (backward).
// A thread holds up to 4 vectors of 8 channels, so that C <= 8 * 4 * blockDim.
#include "common.cuh"

constexpr int HELD = 4;

// x = x + dx (dx may be null), sum = x; y = (x - mean) / sqrt(variance + 1e-5) * weight + bias.
template <class T>
__device__ void forward(const T* x, const T* dx, T* sum, T* y, const float* weight, const float* bias, int c) {
    const size_t row = size_t(blockIdx.x) * c;
    Vec h[HELD];
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * 8;
        if (at < c) {
            h[i] = load(x + row + at);
            if (dx) {
                const Vec d = load(dx + row + at);
                for (int j = 0; j < 8; j++) h[i][j] = to_f32(from_f32<T>(h[i][j] + d[j]));
                store(sum + row + at, h[i]);
            }
            for (int j = 0; j < 8; j++) s += h[i][j];
        }
    }
    const float mean = block_sum(s) / c;
    s = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if ((i * blockDim.x + threadIdx.x) * 8 < c)
            for (int j = 0; j < 8; j++) s += (h[i][j] - mean) * (h[i][j] - mean);
    const float inv = rsqrtf(block_sum(s) / c + 1e-5f);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * 8;
        if (at < c) {
            const Vec w = load(weight + at), b = load(bias + at);
            for (int j = 0; j < 8; j++) h[i][j] = (h[i][j] - mean) * inv * w[j] + b[j];
            store(y + row + at, h[i]);
        }
    }
}

// dx = prior (may be null) + gradient of x; partial sums of dweight and dbias in parts[block][2][c].
template <class T>
__device__ void backward(const T* x, const T* dy, const T* prior, T* dx, const float* weight, float* parts, int rows, int c) {
    const int per = (rows + gridDim.x - 1) / gridDim.x;
    const int first = blockIdx.x * per, last = min(rows, first + per);
    Vec dw[HELD], db[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) dw[i] = db[i] = zeros();
    for (int r = first; r < last; r++) {
        const size_t row = size_t(r) * c;
        Vec h[HELD];
        float s = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int at = (i * blockDim.x + threadIdx.x) * 8;
            if (at < c) {
                h[i] = load(x + row + at);
                for (int j = 0; j < 8; j++) s += h[i][j];
            }
        }
        const float mean = block_sum(s) / c;
        s = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if ((i * blockDim.x + threadIdx.x) * 8 < c)
                for (int j = 0; j < 8; j++) s += (h[i][j] - mean) * (h[i][j] - mean);
        const float inv = rsqrtf(block_sum(s) / c + 1e-5f);
        float a = 0.f, b = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int at = (i * blockDim.x + threadIdx.x) * 8;
            if (at < c) {
                const Vec d = load(dy + row + at), w = load(weight + at);
                for (int j = 0; j < 8; j++) {
                    const float z = (h[i][j] - mean) * inv;
                    dw[i][j] += d[j] * z;
                    db[i][j] += d[j];
                    a += d[j] * w[j];
                    b += d[j] * w[j] * z;
                }
            }
        }
        if (!dx) continue;
        a = block_sum(a) / c;
        b = block_sum(b) / c;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int at = (i * blockDim.x + threadIdx.x) * 8;
            if (at < c) {
                const Vec d = load(dy + row + at), w = load(weight + at);
                Vec p = prior ? load(prior + row + at) : zeros();
                for (int j = 0; j < 8; j++) p[j] += inv * (d[j] * w[j] - a - (h[i][j] - mean) * inv * b);
                store(dx + row + at, p);
            }
        }
    }
    float* mine = parts + size_t(blockIdx.x) * 2 * c;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * 8;
        if (at < c) {
            store(mine + at, dw[i]);
            store(mine + c + at, db[i]);
        }
    }
}

#define LAYER_NORM(T, name)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        layer_norm_##name(const T* x, const T* dx, T* sum, T* y, const float* weight, const float* bias, int c) {         \
        forward(x, dx, sum, y, weight, bias, c);                                                                          \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) layer_norm_back_##name(                                             \
        const T* x, const T* dy, const T* prior, T* dx, const float* weight, float* parts, int rows, int c) {             \
        backward(x, dy, prior, dx, weight, parts, rows, c);                                                               \
    }
FOR_EACH_TYPE(LAYER_NORM)
