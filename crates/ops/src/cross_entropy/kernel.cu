// Loss of a row of logits and, with `grad`, its gradient in place; one block per row.
// dz = (weight (softmax(z) - onehot) + [l2wrap] 1e-4 max(z) onehot(argmax z)) / divisor; of equal logits the first counts.
#include "common.cuh"

template <class T>
__device__ void row(T* z, const int* targets, const float* weights, float* loss, float inv_divisor, int l2wrap, int grad, int vocab) {
    z += size_t(blockIdx.x) * vocab;
    const int target = targets[blockIdx.x];
    if (target < 0) {
        if (threadIdx.x == 0) loss[blockIdx.x] = 0.f;
        if (grad)
            for (int i = threadIdx.x; i < vocab; i += blockDim.x) z[i] = from_f32<T>(0.f);
        return;
    }
    __shared__ float maxima[32], sums[32];
    __shared__ int places[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const bool wide = vocab % 8 == 0;
    float m = -INFINITY, s = 0.f;
    int place = 0x7fffffff;
    auto take = [&](const float* v, int count, int i) {
        float top = m;
        for (int j = 0; j < count; j++) top = fmaxf(top, v[j]);
        if (top > m) {
            s *= __expf(m - top);
            m = top;
            for (int j = count - 1; j >= 0; j--)
                if (v[j] == m) place = i + j;
        }
        for (int j = 0; j < count; j++) s += __expf(v[j] - m);
    };
    if (wide) {
        for (int i = threadIdx.x * 8; i < vocab; i += blockDim.x * 8) {
            const Vec v = load(z + i);
            take(v.v, 8, i);
        }
    } else {
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            const float v = to_f32(z[i]);
            take(&v, 1, i);
        }
    }
    auto merge = [&](float m2, float s2, int p2) {
        const float top = fmaxf(m, m2);
        if (top == -INFINITY) return;
        s = s * __expf(m - top) + s2 * __expf(m2 - top);
        if (m2 > m || (m2 == m && p2 < place)) place = p2;
        m = top;
    };
    for (int o = 16; o; o >>= 1) {
        const float m2 = __shfl_xor_sync(~0u, m, o), s2 = __shfl_xor_sync(~0u, s, o);
        const int p2 = __shfl_xor_sync(~0u, place, o);
        merge(m2, s2, p2);
    }
    if (lane == 0) {
        maxima[warp] = m;
        sums[warp] = s;
        places[warp] = place;
    }
    __syncthreads();
    m = maxima[0];
    s = sums[0];
    place = places[0];
    for (int w = 1; w < warps; w++) merge(maxima[w], sums[w], places[w]);
    const float weight = weights ? weights[blockIdx.x] : 1.f;
    const float nll = m + logf(s) - to_f32(z[target]);
    if (threadIdx.x == 0) loss[blockIdx.x] = nll;
    if (!grad) return;
    __syncthreads();
    // A loss that is not finite makes its gradients so.
    const float scale = isfinite(nll) ? weight * inv_divisor / s : NAN;
    auto change = [&](float v, int i) {
        float g = __expf(v - m) * scale;
        if (i == target) g -= weight * inv_divisor;
        if (l2wrap && i == place) g += 1e-4f * m * inv_divisor;
        return g;
    };
    if (wide) {
        for (int i = threadIdx.x * 8; i < vocab; i += blockDim.x * 8) {
            Vec v = load(z + i);
            for (int j = 0; j < 8; j++) v[j] = change(v[j], i + j);
            store(z + i, v);
        }
    } else {
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) z[i] = from_f32<T>(change(to_f32(z[i]), i));
    }
}

// Maximum over a block of at most 32 warps; every thread gets it.
__device__ __forceinline__ float block_max(float x, float* parts) {
#pragma unroll
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x & 31] : -INFINITY;
#pragma unroll
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
    return x;
}

// The same for at most 2^16 logits of 16 bits, a multiple of 8, which are read once and stay in the registers of 512 threads.
constexpr int THREADS = 512, HELD = 16;
template <class T>
__device__ void held_row(T* z, const int* targets, const float* weights, float* loss, float inv_divisor, int l2wrap, int grad,
                         int vocab) {
    z += size_t(blockIdx.x) * vocab;
    const int target = targets[blockIdx.x];
    uint4* mine = reinterpret_cast<uint4*>(z) + threadIdx.x;
    const int vectors = vocab / 8;
    if (target < 0) {
        if (threadIdx.x == 0) loss[blockIdx.x] = 0.f;
        if (grad)
            for (int i = 0; i * THREADS + threadIdx.x < vectors; i++) mine[i * THREADS] = make_uint4(0, 0, 0, 0);
        return;
    }
    __shared__ float maxima[32], sums[32], hit;
    __shared__ int place;
    if (threadIdx.x == 0) {
        hit = to_f32(z[target]);
        place = vocab;
    }
    // Minus infinity where there is no logit: it changes neither the maximum nor the sum.
    T lows[8];
#pragma unroll
    for (int j = 0; j < 8; j++) lows[j] = from_f32<T>(-INFINITY);
    const uint4 lowest = *reinterpret_cast<const uint4*>(lows);
    uint4 raw[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        raw[i] = i * THREADS + threadIdx.x < vectors ? mine[i * THREADS] : lowest;
    }
    auto widen = [](uint4& r) {
        // Empty code that the compiler cannot look into: else it keeps the widened row in registers that it doesn't have.
        asm volatile("" : "+r"(r.x), "+r"(r.y), "+r"(r.z), "+r"(r.w));
        T e[8];
        *reinterpret_cast<uint4*>(e) = r;
        Vec v;
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = to_f32(e[j]);
        return v;
    };
    float m = -INFINITY;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const Vec v = widen(raw[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) m = fmaxf(m, v[j]);
    }
    const float own = m;
    m = block_max(own, maxima);
    if (l2wrap && own == m) {
        // Few threads come here.
        int first = vocab;
#pragma unroll
        for (int i = HELD - 1; i >= 0; i--) {
            const Vec v = widen(raw[i]);
#pragma unroll
            for (int j = 7; j >= 0; j--)
                if (v[j] == m) first = (i * THREADS + int(threadIdx.x)) * 8 + j;
        }
        atomicMin(&place, first);
    }
    constexpr float LOG2E = 1.4426950408889634f;
    const float shift = -m * LOG2E;
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const Vec v = widen(raw[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) s += exp2f(fmaf(v[j], LOG2E, shift));
    }
    s = warp_sum(s);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = s;
    __syncthreads();
    s = warp_sum(threadIdx.x % 32 < THREADS / 32 ? sums[threadIdx.x & 31] : 0.f);
    const float weight = weights ? weights[blockIdx.x] : 1.f, nll = m + logf(s) - hit;
    if (threadIdx.x == 0) loss[blockIdx.x] = nll;
    if (!grad) return;
    const float scale = isfinite(nll) ? weight * inv_divisor / s : NAN;
    const int top = l2wrap ? place : -1;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = i * THREADS + threadIdx.x;
        if (at >= vectors) continue;
        Vec v = widen(raw[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = exp2f(fmaf(v[j], LOG2E, shift)) * scale;
        if (at == target >> 3 || at == top >> 3) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (at * 8 + j == target) v[j] -= weight * inv_divisor;
                if (at * 8 + j == top) v[j] += 1e-4f * m * inv_divisor;
            }
        }
        store(reinterpret_cast<T*>(mine + i * THREADS), v);
    }
}

// total = sum of weight x loss in f64, in a fixed order. One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) total_loss(const float* loss, const float* weights, double* total, int rows) {
    __shared__ double sums[1024];
    double s = 0.;
    for (int i = threadIdx.x; i < rows; i += 1024) s += double(weights ? weights[i] : 1.f) * double(loss[i]);
    sums[threadIdx.x] = s;
    for (int n = 512; n; n >>= 1) {
        __syncthreads();
        if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    }
    if (threadIdx.x == 0) *total = sums[0];
}

#define HELD_ROW(T, name)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_held_##name(T* z, const int* targets,                \
        const float* weights, float* loss, float inv_divisor, int l2wrap, int grad, int vocab) {                          \
        held_row(z, targets, weights, loss, inv_divisor, l2wrap, grad, vocab);                                            \
    }
HELD_ROW(bf16, bf16)
HELD_ROW(f16, f16)

#define CROSS_ENTROPY(T, name)                                                                                            \
    extern "C" __global__ void __launch_bounds__(512) cross_entropy_##name(T* z, const int* targets, const float* weights, \
        float* loss, float inv_divisor, int l2wrap, int grad, int vocab) {                                                \
        row(z, targets, weights, loss, inv_divisor, l2wrap, grad, vocab);                                                 \
    }
FOR_EACH_TYPE(CROSS_ENTROPY)
