// LayerNorm with the residual connection before it. W warps hold a row, each thread H vectors of 8 of its channels, so that
// C <= 256 W H. With one warp a row, a block takes four rows at a time, and nothing waits for other warps.
#include "common.cuh"

template <int W> __device__ __forceinline__ float row_sum(float x) {
    if constexpr (W == 1) return warp_sum(x);
    else return block_sum(x);
}

template <int W> constexpr int ROWS = W == 1 ? 4 : 1;

// Mean and 1 / sqrt(variance + 1e-5) of a row; channels from c on are zero in h and don't count.
template <int W, int H> __device__ __forceinline__ float2 stats(const Vec (&h)[H], int first, int c) {
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < H; i++)
        for (int j = 0; j < 8; j++) s += h[i][j];
    const float mean = row_sum<W>(s) / c;
    s = 0.f;
#pragma unroll
    for (int i = 0; i < H; i++)
        if (first + i * W * 256 < c)
            for (int j = 0; j < 8; j++) s += (h[i][j] - mean) * (h[i][j] - mean);
    return {mean, rsqrtf(row_sum<W>(s) / c + 1e-5f)};
}

// x = x + dx (dx may be null), sum = x; y = (x - mean) / sqrt(variance + 1e-5) * weight + bias.
template <class T, int W, int H>
__device__ void forward(const T* x, const T* dx, T* sum, T* y, const float* weight, const float* bias, int rows, int c) {
    const int r = blockIdx.x * ROWS<W> + (W == 1 ? threadIdx.x >> 5 : 0);
    if (r >= rows) return;
    const int first = (W == 1 ? threadIdx.x & 31 : threadIdx.x) * 8;
    const size_t row = size_t(r) * c;
    Vec h[H], d[H];
#pragma unroll
    for (int i = 0; i < H; i++) {
        const int at = first + i * W * 256;
        h[i] = at < c ? load(x + row + at) : zeros();
        if (dx) d[i] = at < c ? load(dx + row + at) : zeros();
    }
    if (dx) {
#pragma unroll
        for (int i = 0; i < H; i++) {
            const int at = first + i * W * 256;
            for (int j = 0; j < 8; j++) h[i][j] = to_f32(from_f32<T>(h[i][j] + d[i][j]));
            if (at < c) store(sum + row + at, h[i]);
        }
    }
    const float2 m = stats<W, H>(h, first, c);
#pragma unroll
    for (int i = 0; i < H; i++) {
        const int at = first + i * W * 256;
        if (at < c) {
            const Vec w = load(weight + at), b = load(bias + at);
            for (int j = 0; j < 8; j++) h[i][j] = (h[i][j] - m.x) * m.y * w[j] + b[j];
            store(y + row + at, h[i]);
        }
    }
}

// dx = prior (may be null) + gradient of x; partial sums of dweight and dbias in parts[block][2][c].
template <class T, int W, int H>
__device__ void backward(const T* x, const T* dy, const T* prior, T* dx, const float* weight, float* parts, int rows, int c) {
    const int runs = gridDim.x * ROWS<W>, run = blockIdx.x * ROWS<W> + (W == 1 ? threadIdx.x >> 5 : 0);
    const int per = (rows + runs - 1) / runs, begin = run * per, end = min(rows, begin + per);
    const int first = (W == 1 ? threadIdx.x & 31 : threadIdx.x) * 8;
    Vec dw[H], db[H];
#pragma unroll
    for (int i = 0; i < H; i++) dw[i] = db[i] = zeros();
    for (int r = begin; r < end; r++) {
        const size_t row = size_t(r) * c;
        Vec h[H], d[H], p[H];
#pragma unroll
        for (int i = 0; i < H; i++) {
            const int at = first + i * W * 256;
            h[i] = at < c ? load(x + row + at) : zeros();
            d[i] = at < c ? load(dy + row + at) : zeros();
            p[i] = prior && at < c ? load(prior + row + at) : zeros();
        }
        const float2 m = stats<W, H>(h, first, c);
        float a = 0.f, b = 0.f;
#pragma unroll
        for (int i = 0; i < H; i++) {
            const int at = first + i * W * 256;
            const Vec w = at < c ? load(weight + at) : zeros();
            for (int j = 0; j < 8; j++) {
                h[i][j] = (h[i][j] - m.x) * m.y;
                dw[i][j] += d[i][j] * h[i][j];
                db[i][j] += d[i][j];
                d[i][j] *= w[j];
                a += d[i][j];
                b += d[i][j] * h[i][j];
            }
        }
        if (!dx) continue;
        a = row_sum<W>(a) / c;
        b = row_sum<W>(b) / c;
#pragma unroll
        for (int i = 0; i < H; i++) {
            const int at = first + i * W * 256;
            for (int j = 0; j < 8; j++) p[i][j] += m.y * (d[i][j] - a - h[i][j] * b);
            if (at < c) store(dx + row + at, p[i]);
        }
    }
    float* mine = parts + size_t(blockIdx.x) * 2 * c;
    if constexpr (W == 1) {
        // The sums of the block's warps, one after the other.
        __shared__ float sums[2][H * 256];
        for (int turn = 0; turn < ROWS<W>; turn++) {
            if (int(threadIdx.x >> 5) == turn) {
#pragma unroll
                for (int i = 0; i < H; i++) {
                    const int at = first + i * 256;
                    if (turn) {
                        const Vec pw = load(&sums[0][at]), pb = load(&sums[1][at]);
                        for (int j = 0; j < 8; j++) {
                            dw[i][j] += pw[j];
                            db[i][j] += pb[j];
                        }
                    }
                    store(&sums[0][at], dw[i]);
                    store(&sums[1][at], db[i]);
                }
            }
            __syncthreads();
        }
        for (int i = threadIdx.x; i < c; i += blockDim.x) {
            mine[i] = sums[0][i];
            mine[c + i] = sums[1][i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < H; i++) {
            const int at = first + i * W * 256;
            if (at < c) {
                store(mine + at, dw[i]);
                store(mine + c + at, db[i]);
            }
        }
    }
}

#define LAYER_NORM(T, name, W, H)                                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * W * ROWS<W>, W > 4 ? 2 : 4) layer_norm_##W##x##H##_##name(                         \
        const T* x, const T* dx, T* sum, T* y, const float* weight, const float* bias, int rows, int c) {                 \
        forward<T, W, H>(x, dx, sum, y, weight, bias, rows, c);                                                           \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * W * ROWS<W>, W > 4 ? 1 : 2) layer_norm_back_##W##x##H##_##name(                    \
        const T* x, const T* dy, const T* prior, T* dx, const float* weight, float* parts, int rows, int c) {             \
        backward<T, W, H>(x, dy, prior, dx, weight, parts, rows, c);                                                      \
    }
#define ALL(T, name)                                                                                                      \
    LAYER_NORM(T, name, 1, 1)                                                                                             \
    LAYER_NORM(T, name, 1, 2)                                                                                             \
    LAYER_NORM(T, name, 1, 3)                                                                                             \
    LAYER_NORM(T, name, 1, 4)                                                                                             \
    LAYER_NORM(T, name, 2, 4)                                                                                             \
    LAYER_NORM(T, name, 4, 4)                                                                                             \
    LAYER_NORM(T, name, 8, 4)
FOR_EACH_TYPE(ALL)
