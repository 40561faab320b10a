// The values of a matrix that is kept in codes of 8 bits (anser_tensor::CodedPlaces), for products of many rows: rounded as the products of a decoding step have them.
#include "common.cuh"

// y [rows, k] = codes [rows, k] times the scales of their groups of 64, which lie [k / 128, pitch, 2]. A thread has 16 codes at a time.
template <class T> __device__ void decoded(const int8_t* codes, const __half2* scales, int pitch, T* y, int rows, int k) {
    const int vectors = k / 16;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size_t(rows) * vectors; i += size_t(gridDim.x) * blockDim.x) {
        const int row = int(i / vectors), at = int(i % vectors);
        const float2 both = __half22float2(scales[size_t(at / 8) * pitch + row]);
        const float scale = at / 4 % 2 ? both.y : both.x;
        int8_t c[16];
        *reinterpret_cast<uint4*>(c) = reinterpret_cast<const uint4*>(codes)[i];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Vec v;
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = c[h * 8 + j] * scale;
            store(y + i * 16 + h * 8, v);
        }
    }
}

#define DECODED(T, name)                                                                                                             \
    extern "C" __global__ void linear_decoded_##name(const int8_t* codes, const __half2* scales, int pitch, T* y, int rows, int k) {   \
        decoded<T>(codes, scales, pitch, y, rows, k);                                                                                \
    }
FOR_EACH_TYPE(DECODED)
