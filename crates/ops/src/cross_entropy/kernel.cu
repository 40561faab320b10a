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
    auto take = [&](float v, int i) {
        if (v > m) {
            s = s * __expf(m - v) + 1.f;
            m = v;
            place = i;
        } else {
            s += __expf(v - m);
        }
    };
    if (wide) {
        for (int i = threadIdx.x * 8; i < vocab; i += blockDim.x * 8) {
            const Vec v = load(z + i);
            for (int j = 0; j < 8; j++) take(v[j], i + j);
        }
    } else {
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) take(to_f32(z[i]), i);
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
    if (threadIdx.x == 0) loss[blockIdx.x] = m + logf(s) - to_f32(z[target]);
    if (!grad) return;
    __syncthreads();
    const float scale = weight * inv_divisor / s;
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

#define CROSS_ENTROPY(T, name)                                                                                            \
    extern "C" __global__ void __launch_bounds__(512) cross_entropy_##name(T* z, const int* targets, const float* weights, \
        float* loss, float inv_divisor, int l2wrap, int grad, int vocab) {                                                \
        row(z, targets, weights, loss, inv_divisor, l2wrap, grad, vocab);                                                 \
    }
FOR_EACH_TYPE(CROSS_ENTROPY)
