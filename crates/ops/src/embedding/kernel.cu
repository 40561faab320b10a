// Rows of a table, and the gradient of the table: tokens grouped by id, each group summed in order by one block.
#include "common.cuh"

template <class P, class T> __device__ void gather(const P* table, const int* tokens, T* y, int c) {
    const P* row = table + size_t(tokens[blockIdx.x]) * c;
    for (int i = threadIdx.x * 8; i < c; i += blockDim.x * 8) store(y + size_t(blockIdx.x) * c + i, load(row + i));
}

// groups[g] = {id, first, end}: rows order[first..end] of dy have this id.
template <class T> __device__ void scatter(float* grad, const T* dy, const int* order, const int* groups, int c) {
    const int* g = groups + blockIdx.x * 3;
    float* row = grad + size_t(g[0]) * c;
    for (int i = threadIdx.x * 8; i < c; i += blockDim.x * 8) {
        Vec s = load(row + i);
#pragma unroll 4
        for (int n = g[1]; n < g[2]; n++) {
            const Vec d = load(dy + size_t(order[n]) * c + i);
            for (int j = 0; j < 8; j++) s[j] += d[j];
        }
        store(row + i, s);
    }
}

#define EMBEDDING(T, name)                                                                                               \
    extern "C" __global__ void embedding_##name(const T* table, const int* tokens, T* y, int c) { gather(table, tokens, y, c); } \
    extern "C" __global__ void embedding_back_##name(float* grad, const T* dy, const int* order, const int* groups, int c) { \
        scatter(grad, dy, order, groups, c);                                                                             \
    }
FOR_EACH_TYPE(EMBEDDING)
