// y = x sigmoid(gate) with a gate for each head, which `lanes` threads share, each 8 channels.
#include "common.cuh"

template <class T> __device__ void forward(const T* x, const T* gate, T* y, int threads, int lanes) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= threads) return;
    Vec v = load(x + size_t(i) * 8);
    const float s = sigmoid(to_f32(gate[i / lanes]));
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= s;
    store(y + size_t(i) * 8, v);
}

template <class T> __device__ void backward(const T* dy, const T* x, const T* gate, T* dx, T* dgate, int threads, int lanes) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float dot = 0.f, g = 0.f;
    if (i < threads) {
        Vec d = load(dy + size_t(i) * 8);
        const Vec v = load(x + size_t(i) * 8);
        g = to_f32(gate[i / lanes]);
        const float s = sigmoid(g);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            dot += d[j] * v[j];
            d[j] *= s;
        }
        store(dx + size_t(i) * 8, d);
    }
    for (int o = lanes / 2; o; o >>= 1) dot += __shfl_xor_sync(~0u, dot, o);
    if (i < threads && i % lanes == 0) dgate[i / lanes] = from_f32<T>(sigmoid(g) * sigmoid(-g) * dot);
}

#define GATE(T, name)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) head_gate_##name(const T* x, const T* gate, T* y, int threads, int lanes) { \
        forward(x, gate, y, threads, lanes);                                                                                \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) head_gate_back_##name(const T* dy, const T* x, const T* gate, T* dx, T* dgate, int threads, int lanes) { \
        backward(dy, x, gate, dx, dgate, threads, lanes);                                                                   \
    }
FOR_EACH_TYPE(GATE)
