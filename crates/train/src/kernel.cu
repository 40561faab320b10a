// AdamW over all tensors in one launch, and the sum of squares of the gradients. The arena is cut into pieces of at most 2^14
// elements that lie in one tensor; starts are multiples of 8 (every tensor's size is), given in units of 8.
#include "common.cuh"

// What was found about the gradients.
struct Verdict {
    double norm;
    float scale; // what clipping multiplies them by
    int finite;
};

// If the norm of the gradients is not finite, nothing is touched.
template <class T>
__device__ void adamw(float* p, T* rounded, const float* g, float* m, float* v, const int* pieces, const Verdict* verdict, float b1,
                      float b2, float n1, float n2, float root, float eps, float keep, float rate, float rate2) {
    if (!verdict->finite) return;
    const float scale = verdict->scale;
    const size_t start = size_t(pieces[blockIdx.x * 3]) * 8;
    const int len = pieces[blockIdx.x * 3 + 1], group = pieces[blockIdx.x * 3 + 2];
    if (group != 0) keep = 1.f;
    if (group == 2) rate = rate2;
    for (int i = threadIdx.x * 8; i < len; i += blockDim.x * 8) {
        const size_t at = start + i;
        Vec pp = load(p + at), mm = load(m + at), vv = load(v + at);
        const Vec gg = load(g + at);
        for (int j = 0; j < 8; j++) {
            const float x = gg[j] * scale;
            mm[j] = b1 * mm[j] + n1 * x;
            vv[j] = b2 * vv[j] + n2 * x * x;
            pp[j] = pp[j] * keep - rate * mm[j] / (sqrtf(vv[j]) * root + eps);
        }
        store(p + at, pp);
        store(m + at, mm);
        store(v + at, vv);
        if (rounded) store(rounded + at, pp);
    }
}

#define ADAMW(T, name)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) adamw_##name(float* p, T* rounded, const float* g, float* m, float* v,        \
        const int* pieces, const Verdict* verdict, float b1, float b2, float n1, float n2, float root, float eps, float keep, \
        float rate, float rate2) {                                                                                            \
        adamw(p, rounded, g, m, v, pieces, verdict, b1, b2, n1, n2, root, eps, keep, rate, rate2);                            \
    }
FOR_EACH_TYPE(ADAMW)

// Sum over a block in a fixed order; the first thread gets it. A power of two of threads, at most 1024.
__device__ double sum_of_block(double s) {
    __shared__ double sums[1024];
    sums[threadIdx.x] = s;
    for (int n = blockDim.x / 2; n; n >>= 1) {
        __syncthreads();
        if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    }
    return sums[0];
}

// Sum of the squares of each piece.
extern "C" __global__ void __launch_bounds__(256) sums_of_squares(const float* g, const int* pieces, double* sums) {
    const size_t start = size_t(pieces[blockIdx.x * 3]) * 8;
    const int len = pieces[blockIdx.x * 3 + 1];
    double s = 0.;
#pragma unroll 4
    for (int i = threadIdx.x * 8; i < len; i += blockDim.x * 8) {
        const Vec x = load(g + start + i);
        for (int j = 0; j < 8; j++) s += double(x[j]) * double(x[j]);
    }
    s = sum_of_block(s);
    if (threadIdx.x == 0) sums[blockIdx.x] = s;
}

// One block: the norm from the sums of `count` pieces, and the scale that makes it at most `limit` (0: no limit).
extern "C" __global__ void __launch_bounds__(1024) verdict(const double* sums, int count, float limit, Verdict* out) {
    double s = 0.;
    for (int i = threadIdx.x; i < count; i += blockDim.x) s += sums[i];
    s = sqrt(sum_of_block(s));
    if (threadIdx.x == 0) *out = {s, limit > 0.f ? float(fmin(1., double(limit) / (s + 1e-6))) : 1.f, int(isfinite(s))};
}
