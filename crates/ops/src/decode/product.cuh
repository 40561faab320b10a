// Products of a weight matrix with up to 64 sequences: what memory gives of the matrix is the time, and tensor cores have to keep up with it.
//
// A matrix is cut into pieces of up to 64 outputs and a share of the inputs each, for which blocks of 8 warps walk over k in steps of 128 columns that pass through
// a ring of copies, of the weights and of the sequences' inputs. Copies of weights begin before the kernel before has ended, and go on from piece to piece. A warp
// has half of the outputs and a quarter of a step's columns; the quarters are added up in shared memory in order. The order of a sum depends on the piece alone,
// not on how many sequences there are. (Copies have no hint that they are needed once: with one and a size, ptxas 13.0 makes illegal instructions.)
#pragma once
#include "codes.cuh"

constexpr int PIECE = 64, QUARTERS = 4;
constexpr int SUMS_PITCH = PIECE + 8;
// How the matrix lies: [outputs, k], [k, outputs], or [outputs, k] in codes of 8 bits.
enum Lie { ROWS, INPUTS, CODES };
// Bytes of a step of the ring, and how many there are for M sequences: what shared memory has room for.
constexpr int weight_bytes(Lie lie) { return lie == CODES ? PIECE * (STEP + SCALES) : PIECE * STEP * 2; }
constexpr int step_bytes(Lie lie, int m) { return weight_bytes(lie) + m * STEP * 2; }
constexpr int product_steps(Lie lie, int m) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ / 100 == 9
    return lie == CODES ? (m == 16 ? 16 : m == 32 ? 11 : 7) : m == 16 ? 10 : m == 32 ? 7 : 5;
#else
    // In 99 KiB, but for 64 sequences of 16 bits, for which there are 100.
    return lie == CODES ? (m == 16 ? 6 : m == 32 ? 3 : 2) : m == 16 ? 4 : 2;
#endif
}

// What a piece's sums go through before they are written.
enum Through { AS_IS, SQUARED, TANH, SIGMOID };
__device__ __forceinline__ float through(int f, float v) {
    return f == SQUARED ? (v > 0.f ? v * v : 0.f) : f == TANH ? tanhf(v) : f == SIGMOID ? sigmoid(v) : v;
}

struct __align__(16) Piece {
    int row, rows;     // its outputs; an even number but for the last of y with an odd pitch
    int from, columns; // of k; a multiple of 8
    int input;         // which matrix [batch, k] of x
    int plane;         // of y, or -1 for z
    int column;        // of its first output there
    int f;
};

// Where 16 bytes of a row of `CHUNKS` such lie, in bytes: eight rows below each other, and four neighbours of two rows, in different banks.
template <int CHUNKS> __device__ __forceinline__ int place_of(int row, int chunk) { return (row * CHUNKS + (chunk ^ ((row & 1) << 2 | (row >> 1 & 3)))) * 16; }
// The same for a row of codes, of which a warp reads 32 bytes in each of four rows at once.
__device__ __forceinline__ int place_of_codes(int row, int chunk) { return (row * 8 + (chunk ^ (row & 3) << 1)) * 16; }

// The matrix.
struct Weights {
    const void* at;
    const f16* scales;
    int pitch; // outputs from a step's scales to the next's
};

// For `pieces` pieces of W and x [inputs, batch, k], of which `count` <= M rows count: y [planes, batch, y_pitch] f32 or z [batch, z_pitch] = f(x W^T). `n`: outputs of W [k, n].
template <class T, Lie LIE, int M>
__device__ void product_of_many(Weights weights, const T* x, float* y, T* z, const Piece* work, int pieces, int batch, int count, int k, int n, int y_pitch,
                                int z_pitch) {
    constexpr int STEPS = product_steps(LIE, M), TILES = M / 16, PASS = M < 32 ? M : 32, INPUTS_AT = weight_bytes(LIE), BYTES = step_bytes(LIE, M);
    DYNAMIC_SHARED(ring);
    float* sums = reinterpret_cast<float*>(ring + STEPS * BYTES); // [QUARTERS, PASS, SUMS_PITCH]
    let_next_start();
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31;

    // The next step to copy: of a matrix that lies in rows a thread has 16 bytes of every 16th row, of codes of every 32nd.
    constexpr int ROW = LIE == CODES ? 1 : 2, CHUNKS = LIE == ROWS ? 16 : 8, APART = 256 / CHUNKS, LINES = LIE == INPUTS ? STEP : PIECE;
    const int line = t / CHUNKS, chunk = t % CHUNKS, place_in_step = LIE == CODES ? place_of_codes(line, chunk) : place_of<CHUNKS>(line, chunk);
    const size_t apart = size_t(LIE == INPUTS ? n : k) * ROW * APART, input_apart = size_t(k) * 16;
    struct Next {
        int piece, place, rows, left;
        const unsigned char* weights;
        const f16* scales;
        const T* x;
    };
    const auto begin = [&](Next& at) {
        if (at.piece >= pieces) return;
        const Piece p = work[at.piece];
        at.rows = p.rows, at.left = p.columns;
        const size_t first = LIE == INPUTS ? size_t(p.from + line) * n + p.row + chunk * 8 : size_t(p.row + line) * k + p.from + chunk * (16 / ROW);
        at.weights = static_cast<const unsigned char*>(weights.at) + first * ROW;
        if (LIE == CODES) at.scales = weights.scales + (size_t(p.from / STEP) * weights.pitch + p.row + t) * (STEP / GROUP);
        at.x = x + (size_t(p.input) * batch + (t >> 4)) * k + p.from + (t & 15) * 8;
    };
    const auto copy_weights = [&](const Next& at) {
        if (at.piece >= pieces) return;
        unsigned char* to = ring + at.place + place_in_step;
        const unsigned char* from = at.weights;
#pragma unroll
        for (int i = 0; i < LINES / APART; i++, from += apart) {
            const bool there = LIE == INPUTS ? chunk * 8 < at.rows : line + i * APART < at.rows;
            const bool valid = LIE == INPUTS ? line + i * APART < at.left : chunk * (16 / ROW) < at.left;
            if (there) copy_async(to + i * APART * CHUNKS * 16, from, valid);
        }
        if (LIE == CODES && t < at.rows) copy_async_word(ring + at.place + PIECE * STEP + t * 4, at.scales);
    };
    const int place_of_inputs = INPUTS_AT + place_of<16>(t >> 4, t & 15);
    const auto copy_inputs = [&](const Next& at) {
        if (at.piece >= pieces) return;
        unsigned char* to = ring + at.place + place_of_inputs;
        const T* from = at.x;
#pragma unroll
        for (int i = 0; i < M / 16; i++, from += input_apart)
            if ((t >> 4) + i * 16 < count) copy_async(to + i * 16 * 256, from, (t & 15) * 8 < at.left);
    };
    const auto advance = [&](Next& at) {
        at.place = at.place + BYTES == STEPS * BYTES ? 0 : at.place + BYTES;
        at.left -= STEP;
        at.weights += LIE == INPUTS ? size_t(n) * STEP * ROW : STEP * ROW;
        if (LIE == CODES) at.scales += size_t(weights.pitch) * (STEP / GROUP);
        at.x += STEP;
        if (at.left > 0) return;
        at.piece += gridDim.x;
        begin(at);
    };

    Next next{int(blockIdx.x), 0};
    begin(next);
    Next inputs = next;
#pragma unroll 1
    for (int i = 0; i < STEPS - 1; i++) copy_weights(next), advance(next);
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < STEPS - 1; i++) copy_inputs(inputs), advance(inputs), copy_commit();

    const int quarter = warp & (QUARTERS - 1), half = warp / QUARTERS, g = lane >> 2, q = lane & 3;
    int place = 0;
#pragma unroll 1
    for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        const Piece p = work[piece];
        float sum[TILES][4][4] = {};
#pragma unroll 1
        for (int step = 0; step < p.columns; step += STEP) {
            copy_wait<STEPS - 2>();
            __syncthreads();
            copy_weights(next), copy_inputs(next), advance(next);
            copy_commit();
            const unsigned char *columns = ring + place, *rows = columns + INPUTS_AT;
            place = place + BYTES == STEPS * BYTES ? 0 : place + BYTES;
            if constexpr (LIE == CODES) {
                // A lane has eight neighbouring columns: four of them are those of a first product, the others of a second.
                uint4 a[TILES][2];
#pragma unroll
                for (int m = 0; m < TILES; m++)
#pragma unroll
                    for (int i = 0; i < 2; i++) a[m][i] = *reinterpret_cast<const uint4*>(rows + place_of<16>(m * 16 + i * 8 + g, quarter * 4 + q));
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int row = half * 32 + j * 8 + g;
                    const uint2 codes = *reinterpret_cast<const uint2*>(columns + place_of_codes(row, quarter * 2 + (q >> 1)) + q % 2 * 8);
                    const f16 scale = reinterpret_cast<const f16*>(columns + PIECE * STEP)[row * (STEP / GROUP) + quarter / 2];
                    const uint4 b = decoded<T>(codes, to_f32(scale));
#pragma unroll
                    for (int m = 0; m < TILES; m++) {
                        const uint32_t first[4] = {a[m][0].x, a[m][1].x, a[m][0].y, a[m][1].y}, second[4] = {a[m][0].z, a[m][1].z, a[m][0].w, a[m][1].w};
                        mma<T>(sum[m][j], first, b.x, b.y);
                        mma<T>(sum[m][j], second, b.z, b.w);
                    }
                }
            } else {
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    uint32_t a[TILES][4], b[4];
                    const int chunk = quarter * 4 + s * 2;
#pragma unroll
                    for (int m = 0; m < TILES; m++) load_tiles(a[m], rows + place_of<16>(m * 16 + (lane & 15), chunk + (lane >> 4)));
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int low = lane >> 3 & 1, high = lane >> 4, within = lane & 7;
                        if constexpr (LIE == INPUTS)
                            load_tiles_transposed(b, columns + place_of<8>((chunk + low) * 8 + within, half * 4 + j * 2 + high));
                        else
                            load_tiles(b, columns + place_of<16>(half * 32 + j * 16 + high * 8 + within, chunk + low));
#pragma unroll
                        for (int m = 0; m < TILES; m++) {
                            mma<T>(sum[m][j * 2], a[m], b[0], b[1]);
                            mma<T>(sum[m][j * 2 + 1], a[m], b[2], b[3]);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int first = 0; first < M; first += PASS) {
            if (first) __syncthreads();
            float* mine = sums + (quarter * PASS + g) * SUMS_PITCH + half * 32 + q * 2;
#pragma unroll
            for (int m = 0; m < PASS / 16; m++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float(&v)[4] = sum[first / 16 + m][j];
                    *reinterpret_cast<float2*>(mine + m * 16 * SUMS_PITCH + j * 8) = make_float2(v[0], v[1]);
                    *reinterpret_cast<float2*>(mine + (m * 16 + 8) * SUMS_PITCH + j * 8) = make_float2(v[2], v[3]);
                }
            __syncthreads();
            const int r = lane * 2;
#pragma unroll
            for (int i = 0; i < PASS / 8; i++) {
                const int b = i * 8 + warp, sequence = first + b;
                if (sequence >= count || r >= p.rows) continue;
                float2 v = make_float2(0.f, 0.f);
#pragma unroll
                for (int s = 0; s < QUARTERS; s++) {
                    const float2 part = *reinterpret_cast<const float2*>(sums + (s * PASS + b) * SUMS_PITCH + r);
                    v.x += part.x, v.y += part.y;
                }
                float* to = y + (size_t(p.plane) * batch + sequence) * y_pitch + p.column + r;
                if (p.plane >= 0 && y_pitch % 2) {
                    to[0] = v.x;
                    if (r + 1 < p.rows) to[1] = v.y;
                } else if (p.plane >= 0)
                    *reinterpret_cast<float2*>(to) = v;
                else
                    *reinterpret_cast<uint32_t*>(z + size_t(sequence) * z_pitch + p.column + r) = pack<T>(through(p.f, v.x), through(p.f, v.y));
            }
        }
    }
    // Copies end before their block does.
    copy_wait<0>();
}
