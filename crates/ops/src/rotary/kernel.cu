// Rotary positions: a block turns one head of one segment.
#include "common.cuh"

struct Segment {
    int start, len, state_in, state_out;
};

// x, y [tokens, heads n]; angles [longest segment, n / 2] of cosine and sine.
template <class T>
__device__ void turn(const T* x, T* y, const Segment* segments, const float2* angles, int heads, int n, float sign) {
    const Segment seg = segments[blockIdx.x];
    const int half = n / 2;
    for (int e = threadIdx.x; e < seg.len * half; e += blockDim.x) {
        const size_t i = (size_t(seg.start + e / half) * heads + blockIdx.y) * n + e % half;
        const float2 angle = angles[e];
        const float a = to_f32(x[i]), b = to_f32(x[i + half]), sine = sign * angle.y;
        y[i] = from_f32<T>(a * angle.x - b * sine);
        y[i + half] = from_f32<T>(a * sine + b * angle.x);
    }
}

#define ROTARY(T, name)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(128) rotary_##name(                                                      \
        const T* x, T* y, const Segment* segments, const float2* angles, int heads, int n, float sign) {                  \
        turn(x, y, segments, angles, heads, n, sign);                                                                     \
    }
FOR_EACH_TYPE(ROTARY)
