// AdamW over all tensors in one launch, and the sum of squares of the gradients. The arena is cut into pieces of at most 2^14
// elements that lie in one tensor; starts are multiples of 8 (every tensor's size is), given in units of 8.
#include "common.cuh"

template <class T>
__device__ void adamw(float* p, T* rounded, const float* g, float* m, float* v, const int* pieces, float b1, float b2, float n1,
                      float n2, float root, float eps, float scale, float keep, float rate, float rate2) {
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
    extern "C" __global__ void adamw_##name(float* p, T* rounded, const float* g, float* m, float* v, const int* pieces,      \
        float b1, float b2, float n1, float n2, float root, float eps, float scale, float keep, float rate, float rate2) {    \
        adamw(p, rounded, g, m, v, pieces, b1, b2, n1, n2, root, eps, scale, keep, rate, rate2);                              \
    }
FOR_EACH_TYPE(ADAMW)

extern "C" __global__ void sum_of_squares(const float* g, const int* pieces, float* sums) {
    const size_t start = size_t(pieces[blockIdx.x * 2]) * 8;
    const int len = pieces[blockIdx.x * 2 + 1];
    float s = 0.f;
    for (int i = threadIdx.x * 8; i < len; i += blockDim.x * 8) {
        const Vec x = load(g + start + i);
        for (int j = 0; j < 8; j++) s += x[j] * x[j];
    }
    s = block_sum(s);
    if (threadIdx.x == 0) sums[blockIdx.x] = s;
}
