// WKV-7 on tensor cores, in chunks of 16 tokens (the formulas are in mod.rs): bf16 operands (f16 at inference), f32 sums, f32 state.
//
// One block per piece of a sequence and head, N / 16 warps. Where a product has values (rows of the state) as an index, warp w has
// values 16 w .. 16 w + 15, with its rows of the state in registers from chunk to chunk; where it has channels, channels
// 16 w .. 16 w + 15. No sum runs across warps. A fragment of the state is at once the operand of the next product, and
// saved states have the order of registers, so that they go to memory and back in whole lines.
//
// Where keys repeat, u and its gradient are small differences of large terms. What makes them (A~ S^T, M_ak V, the inverse; B^ D^T,
// M_rb^T dY) therefore has operands of two bf16 each, the rounded value and what rounding left ("low"); the rest gains nothing from it.
//
// Bytes a token and channel, forward: 12 read, 2 written, 8 for the states, 3 for u and the inverse; backward 25 read, 12 written.
#pragma once
#include "mma.cuh"

namespace tensor {

constexpr int L = 16;      // tokens of a chunk
constexpr int SMALL = 24;  // pitch of a 16 x 16 matrix

// Whether what cancels is kept in two parts: f16 is precise enough.
template <class T> constexpr bool LOW = false;
template <> constexpr bool LOW<bf16> = true;
template <int N> constexpr int WARPS = N / 16;
template <int N> constexpr int PITCH = N + 8; // of a tile [tokens, N]: the rows of an 8 x 8 tile lie in different banks
template <int N> constexpr int TILE = L * PITCH<N>;

// A part of a sequence: its rows, its first chunk among all chunks, the arena rows its state comes from and goes to (-1: none), its
// number within the sequence, and the sequence.
struct Piece {
    int start, len, base, state_in, state_out, number, segment, last;
};

// log2 of the decay.
__device__ __forceinline__ float log2_decay(float w) { return __fdividef(-0.60653066f * 1.44269504f, 1.f + exp2_fast(-1.44269504f * w)); }

// Where a lane points load_tiles so that it gets, from a row-major matrix of pitch P:
//   rows 0..15, columns col..: an A fragment; transposed, the B fragments (k = rows) of columns col.. and col + 8..
template <int P, class T> __device__ __forceinline__ const T* by_rows(const T* m, int col) {
    const int lane = threadIdx.x & 31;
    return m + (lane & 15) * P + col + (lane >> 4) * 8;
}
//   the B fragments (n = rows) of rows 0..7 and 8..15; transposed, an A fragment of the transposed matrix
template <int P, class T> __device__ __forceinline__ const T* by_columns(const T* m, int col) {
    const int lane = threadIdx.x & 31;
    return m + ((lane & 7) + (lane >> 4) * 8) * P + col + (lane & 8);
}

// c[0], c[1] += A times the two 8-column halves of B.
template <class T = bf16> __device__ __forceinline__ void mma2(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    mma<T>(c[0], a, b[0], b[1]);
    mma<T>(c[1], a, b[2], b[3]);
}
// The same where b holds the fragments of a matrix of which the transpose is the A operand.
__device__ __forceinline__ void as_a(uint32_t (&a)[4], const uint32_t (&b)[4]) {
    a[0] = b[0];
    a[1] = b[2];
    a[2] = b[1];
    a[3] = b[3];
}
// What rounding x and y to `packed` leaves.
__device__ __forceinline__ uint32_t pack_low(float x, float y, uint32_t packed) {
    const float2 p = unpack(packed);
    return pack(x - p.x, y - p.y);
}
// A 16 x 16 result as the B operand (k = rows), and its low part.
template <class T = bf16> __device__ __forceinline__ void as_b(uint32_t (&b)[4], const float (&c)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) b[i] = transpose(pack<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]));
}
__device__ __forceinline__ void as_b(uint32_t (&b)[4], uint32_t (&low)[4], const float (&c)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float x = c[i / 2][i % 2 * 2], y = c[i / 2][i % 2 * 2 + 1];
        b[i] = pack(x, y);
        low[i] = transpose(pack_low(x, y, b[i]));
        b[i] = transpose(b[i]);
    }
}
__device__ __forceinline__ void clear(float (&c)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) c[i / 4][i % 4] = 0.f;
}

// Rows of the state as B operand (k = channel, n = value): of channels 16 k.. and the values of the warp; in f16 times factor[channel].
template <class T, int N>
__device__ __forceinline__ void state_operand(uint32_t (&b)[4], const float (&s)[N / 8][4], int k, const float* factor = nullptr) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int j = 2 * k + i % 2;
        float x = s[j][i / 2 * 2], y = s[j][i / 2 * 2 + 1];
        if constexpr (!LOW<T>) {
            const float2 f = *reinterpret_cast<const float2*>(factor + 8 * j + 2 * (threadIdx.x & 3));
            x *= f.x;
            y *= f.y;
        }
        b[i] = pack<T>(x, y);
    }
}
template <int N> __device__ __forceinline__ void state_low(uint32_t (&low)[4], const uint32_t (&b)[4], const float (&s)[N / 8][4], int k) {
#pragma unroll
    for (int i = 0; i < 4; i++) low[i] = pack_low(s[2 * k + i % 2][i / 2 * 2], s[2 * k + i % 2][i / 2 * 2 + 1], b[i]);
}

// Keeps a 16 x 16 result in shared memory. `to` is row 0, column 0.
template <class T> __device__ __forceinline__ void keep_result(T* to, int pitch, const float (&c)[2][4]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        T* row = to + (g + 8 * half) * pitch + 2 * q;
        *reinterpret_cast<uint32_t*>(row) = pack<T>(c[0][2 * half], c[0][2 * half + 1]);
        *reinterpret_cast<uint32_t*>(row + 8) = pack<T>(c[1][2 * half], c[1][2 * half + 1]);
    }
}
// Stores it to device memory without rows from `rows` on.
template <class T> __device__ __forceinline__ void store_result(T* to, size_t pitch, const float (&c)[2][4], int rows) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8;
        if (row < rows) *reinterpret_cast<uint32_t*>(to + row * pitch + 8 * (i % 2) + 2 * q) = pack<T>(c[i % 2][i / 2 * 2], c[i % 2][i / 2 * 2 + 1]);
    }
}
// What is there before, if wanted; and its addition to a result. The load is far from the addition: it takes long.
__device__ __forceinline__ void load_prior(uint32_t (&prior)[4], const bf16* from, size_t pitch, int rows, bool wanted) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8;
        prior[i] = wanted && row < rows ? *reinterpret_cast<const uint32_t*>(from + row * pitch + 8 * (i % 2) + 2 * q) : 0;
    }
}
__device__ __forceinline__ void add_prior(float (&c)[2][4], const uint32_t (&prior)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 p = unpack(prior[i]);
        c[i % 2][i / 2 * 2] += p.x;
        c[i % 2][i / 2 * 2 + 1] += p.y;
    }
}

// A state [N, N] by value and channel, f32, to and from the warp's fragments.
template <int N> __device__ __forceinline__ void load_state(float (&s)[N / 8][4], const float* from, int warp) {
    const int lane = threadIdx.x & 31;
    const float* row = from + (16 * warp + (lane >> 2)) * N + 2 * (lane & 3);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float2 a = *reinterpret_cast<const float2*>(row + 8 * j), b = *reinterpret_cast<const float2*>(row + 8 * N + 8 * j);
        s[j][0] = a.x;
        s[j][1] = a.y;
        s[j][2] = b.x;
        s[j][3] = b.y;
    }
}
template <int N> __device__ __forceinline__ void store_state(const float (&s)[N / 8][4], float* to, int warp) {
    const int lane = threadIdx.x & 31;
    float* row = to + (16 * warp + (lane >> 2)) * N + 2 * (lane & 3);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        *reinterpret_cast<float2*>(row + 8 * j) = make_float2(s[j][0], s[j][1]);
        *reinterpret_cast<float2*>(row + 8 * N + 8 * j) = make_float2(s[j][2], s[j][3]);
    }
}
template <int N> __device__ __forceinline__ void zero_state(float (&s)[N / 8][4]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) s[i / 4][i % 4] = 0.f;
}

// Multiplies column j of the state by factor[j].
template <int N> __device__ __forceinline__ void decay_state(float (&s)[N / 8][4], const float* factor) {
    const int q = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float2 p = *reinterpret_cast<const float2*>(factor + 8 * j + 2 * q);
        s[j][0] *= p.x;
        s[j][1] *= p.y;
        s[j][2] *= p.x;
        s[j][3] *= p.y;
    }
}

// s += A B for A [16 values, 16 tokens] and the tile B [16 tokens, N].
template <int N, class T> __device__ __forceinline__ void add_to_state(float (&s)[N / 8][4], const uint32_t (&a)[4], const T* tile) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t b[4];
        load_tiles_transposed(b, by_rows<PITCH<N>>(tile, 16 * k));
        mma<T>(s[2 * k], a, b[0], b[1]);
        mma<T>(s[2 * k + 1], a, b[2], b[3]);
    }
}

// c += A s^T for the tile A [16 tokens, N], in two parts in bf16; unless null, d += B s^T for the tile B.
template <int N, class T>
__device__ __forceinline__ void times_state(float (&c)[2][4], const T* tile, const T* tile_low, const float (&s)[N / 8][4], const float* factor,
                                            float (&d)[2][4], const T* other) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t a[4], b[4];
        state_operand<T, N>(b, s, k, factor);
        load_tiles(a, by_rows<PITCH<N>>(tile, 16 * k));
        mma2<T>(c, a, b);
        if constexpr (LOW<T>) {
            uint32_t low[4];
            state_low<N>(low, b, s, k);
            mma2(c, a, low);
            load_tiles(a, by_rows<PITCH<N>>(tile_low, 16 * k));
            mma2(c, a, b);
        }
        if (other) {
            load_tiles(a, by_rows<PITCH<N>>(other, 16 * k));
            mma2<T>(d, a, b);
        }
    }
}

// c += A B in two parts.
__device__ __forceinline__ void mma2_low(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&a_low)[4], const uint32_t (&b)[4],
                                         const uint32_t (&b_low)[4]) {
    mma2(c, a, b);
    mma2(c, a, b_low);
    mma2(c, a_low, b);
}

// c += A B^T of two tiles [16, N].
template <int N, class T> __device__ __forceinline__ void add_product(float (&c)[2][4], const T* x, const T* y) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t a[4], b[4];
        load_tiles(a, by_rows<PITCH<N>>(x, 16 * k));
        load_tiles(b, by_columns<PITCH<N>>(y, 16 * k));
        mma2<T>(c, a, b);
    }
}

// Keeps what lies below the diagonal, and on it unless strict; the rest becomes zero (a choice, since it may be infinite).
__device__ __forceinline__ void lower(float (&c)[2][4], bool strict) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int row = g + 8 * (i % 4 / 2), col = 8 * (i / 4) + 2 * q + i % 2;
        if (col > row || (strict && col == row)) c[i / 4][i % 4] = 0.f;
    }
}

// Starts copying the tiles WHICH of one chunk; rows past the end become zero.
template <int N, unsigned WHICH, class T, class Pointers>
__device__ __forceinline__ void fetch(T* to, const Pointers& from, size_t at, int c, int rows) {
    const int row = threadIdx.x / (N / 8), col = threadIdx.x % (N / 8) * 8;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (WHICH >> i & 1) copy_async(to + i * TILE<N> + row * PITCH<N> + col, from[i] + (row < rows ? at + size_t(row) * c + col : 0), row < rows);
}

// A thread's part of making the tiles: 4 rows of two neighbouring channels.
struct Part {
    int channel, row;
    template <int N> static __device__ __forceinline__ Part of() { return {int(threadIdx.x % (N / 2)) * 2, int(threadIdx.x / (N / 2)) * 4}; }
};
template <int N, class T> __device__ __forceinline__ float2 pair(const T* tile, int row, int channel) {
    return unpack<T>(*reinterpret_cast<const uint32_t*>(tile + row * PITCH<N> + channel));
}
// Writes x y to a tile, and what rounding leaves of it to another, unless that is null.
template <int N, class T> __device__ __forceinline__ void set_pair(T* tile, int row, int channel, float2 x, float2 y, T* low = nullptr) {
    const int at = row * PITCH<N> + channel;
    const uint32_t p = pack<T>(x.x * y.x, x.y * y.y);
    *reinterpret_cast<uint32_t*>(tile + at) = p;
    if (LOW<T> && low) *reinterpret_cast<uint32_t*>(low + at) = pack_low(x.x * y.x, x.y * y.y, p);
}

// Sums of log decays: of the thread's rows up to each, and over its rows into sums[row group][N].
template <int N, class T> __device__ __forceinline__ void sum_decays(float2 (&sum)[4], const T* w, float* sums, int rows) {
    const Part p = Part::of<N>();
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = pair<N>(w, p.row + i, p.channel);
    float2 s = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 d = {log2_decay(sum[i].x), log2_decay(sum[i].y)};
        if (p.row + i < rows) s = {s.x + d.x, s.y + d.y};
        sum[i] = s;
    }
    *reinterpret_cast<float2*>(sums + p.row / 4 * N + p.channel) = s;
}

enum { R, W, K, V, A, B }; // inputs
// Tiles: R~ A~ K~ B~ K^ B^, and low parts: of A~ (forward), of B~ and B^ (backward).
enum { RT, AT, KT, BT, KH, BH, AL, BL = AL, HL };

// The tiles WHICH of a chunk, the decay over the whole chunk and, BACK, the sums of log decays before and after each token:
// total[0..16][N], pitch N + 8. In f16, whose range is short, R~ and A~ are divided and K~ and B~ multiplied by the decay over the
// first half, which goes to `middle` and onto the state's side of products with it.
template <int N, unsigned WHICH, bool BACK, class T>
__device__ __forceinline__ void make_tiles(T* tiles, const T* raw, const float2 (&sum)[4], const float* sums, float* whole, float* middle, float* total) {
    const Part p = Part::of<N>();
    float2 before = {0.f, 0.f}, all = {0.f, 0.f}, mid = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 s = *reinterpret_cast<const float2*>(sums + i * N + p.channel);
        if (i * 4 < p.row) before = {before.x + s.x, before.y + s.y};
        all = {all.x + s.x, all.y + s.y};
        if (!LOW<T> && i == 1) mid = all;
    }
    // All loads come before the stores, which the compiler must take for writes to the same memory.
    constexpr auto has = [](int tile) { return bool(WHICH >> tile & 1); };
    float2 in[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const auto input = [&](int which) { return pair<N>(raw + which * TILE<N>, p.row + i, p.channel); };
        if (has(RT)) in[i][0] = input(R);
        in[i][1] = input(A);
        if (has(KT) || has(KH)) in[i][2] = input(K);
        in[i][3] = input(B);
    }
    const float2 end = {exp2_fast(all.x), exp2_fast(all.y)}, half = {exp2_fast(mid.x), exp2_fast(mid.y)};
    float2 up_before = {exp2_fast(before.x - mid.x), exp2_fast(before.y - mid.y)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = p.row + i;
        const float2 now = {before.x + sum[i].x, before.y + sum[i].y};
        const float2 up = {exp2_fast(now.x - mid.x), exp2_fast(now.y - mid.y)}, down = {exp2_fast(mid.x - now.x), exp2_fast(mid.y - now.y)};
        // The decay of the rest of the chunk.
        float2 rest = {end.x * down.x, end.y * down.y};
        if (!LOW<T>) rest = {exp2_fast(all.x - now.x), exp2_fast(all.y - now.y)};
        const auto make = [&](int tile, float2 x, float2 y, int low = 0) {
            if (has(tile)) set_pair<N>(tiles + tile * TILE<N>, row, p.channel, x, y, low && has(low) ? tiles + low * TILE<N> : nullptr);
        };
        make(RT, in[i][0], up);
        make(AT, in[i][1], up_before, BACK ? 0 : AL);
        make(KT, in[i][2], down);
        make(KH, in[i][2], rest);
        make(BT, in[i][3], down, BACK ? BL : 0);
        make(BH, in[i][3], rest, BACK ? HL : 0);
        if (BACK && has(KH)) {
            if (row == 0) *reinterpret_cast<float2*>(total + p.channel) = {0.f, 0.f};
            *reinterpret_cast<float2*>(total + (row + 1) * (N + 8) + p.channel) = now;
        }
        up_before = up;
    }
    if (p.row == 0) *reinterpret_cast<float2*>(whole + p.channel) = end;
    if (!LOW<T> && p.row == 4) *reinterpret_cast<float2*>(middle + p.channel) = half;
}

// (I - M)^-1 for strictly lower M in c, by substitution in f32: one column a lane. Scratch: 16 x 20 floats.
template <class T> __device__ __forceinline__ void invert(const float (&c)[2][4], float* scratch, T* to, T* low) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, column = lane & 15;
#pragma unroll
    for (int i = 0; i < 8; i++) scratch[(8 * (i / 4) + 2 * q + i % 2) * 20 + g + 8 * (i % 4 / 2)] = c[i / 4][i % 4];
    __syncwarp();
    float x[L];
#pragma unroll
    for (int i = 0; i < L; i++) x[i] = i == column ? 1.f : 0.f;
#pragma unroll
    for (int l = 0; l < L - 1; l++) {
#pragma unroll
        for (int four = (l + 1) / 4; four < 4; four++) {
            const float4 m = *reinterpret_cast<const float4*>(scratch + l * 20 + four * 4);
            if (four * 4 > l) x[four * 4] += m.x * x[l];
            if (four * 4 + 1 > l) x[four * 4 + 1] += m.y * x[l];
            if (four * 4 + 2 > l) x[four * 4 + 2] += m.z * x[l];
            x[four * 4 + 3] += m.w * x[l];
        }
    }
    if (lane < 16)
#pragma unroll
        for (int i = 0; i < L; i++) {
            const T rounded = from_f32<T>(x[i]);
            to[i * SMALL + column] = rounded;
            if (LOW<T>) low[i * SMALL + column] = from_f32<T>(x[i] - to_f32(rounded));
        }
    __syncwarp();
}

// A result [16, 16] to a matrix in shared memory, and what rounding leaves of it.
template <class T> __device__ __forceinline__ void keep_small(T* to, const float (&c)[2][4]) { keep_result(to, SMALL, c); }
template <class T> __device__ __forceinline__ void keep_low(T* to, float (&c)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) c[i / 4][i % 4] -= to_f32(from_f32<T>(c[i / 4][i % 4]));
    keep_small(to, c);
}

template <class T> struct Inputs {
    const T* p[6]; // r, w, k, v, a, b: [tokens, heads N]
    __device__ __forceinline__ const T* operator[](int i) const { return p[i]; }
};

// What the forward pass keeps for the backward pass: for every chunk and head the state before it in the order of registers
// [channels / 16][values / 16][lane] and the inverse [2, 16, 16], rounded and low; u [tokens, heads N].
struct Saved {
    uint4* states;
    uint4* inverses;
    bf16* u;
};

template <class T, int N> struct ForwardShared {
    T raw[2][6][TILE<N>];
    T tiles[7][TILE<N>];
    T m[6][L * SMALL]; // inverse, M_ak, M_rb, M_rk; low parts of the first two
    float scratch[L * 20], sums[4 * N], whole[N], middle[N];
};

// SCAN: only how a piece changes its state, S -> S F + C with F and C [N, N]; to `map` [pieces, heads, 2, N, N]. Of a first piece C is the state that it leaves.
template <class T, int N, bool SCAN>
__device__ void forward(const Inputs<T>& in, const Piece* pieces, const float* arena, float* arena_out, const float* entry, float* map, T* y,
                        Saved saved, int heads) {
    DYNAMIC_SHARED(memory);
    auto& m = *reinterpret_cast<ForwardShared<T, N>*>(memory);
    const Piece piece = pieces[blockIdx.x];
    if (SCAN && piece.last) return; // nobody goes on from it; going back what comes before it needs no F
    const int h = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, c = heads * N, chunks = (piece.len + L - 1) / L;
    const size_t origin = size_t(piece.start) * c + h * N;
    float s[N / 8][4];
    float f[SCAN ? N / 8 : 1][4];
    zero_state<N>(s);
    if constexpr (SCAN) {
        zero_state<N>(f);
        const int g = lane >> 2, q = lane & 3;
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) f[j][i] = 16 * warp + g + 8 * (i / 2) == 8 * j + 2 * q + i % 2 ? 1.f : 0.f;
    }
    if (piece.number > 0) {
        if (!SCAN) load_state<N>(s, entry + (size_t(blockIdx.x) * heads + h) * N * N, warp);
    } else if (piece.state_in >= 0) {
        load_state<N>(s, arena + (size_t(piece.state_in) * heads + h) * N * N, warp);
    }
    constexpr unsigned FETCHED = SCAN ? 1 << W | 1 << K | 1 << V | 1 << A | 1 << B : 63;
    constexpr unsigned MADE = 127 - (SCAN ? 1 << RT : 0) - (LOW<T> ? 0 : 1 << AL);
    fetch<N, FETCHED>(m.raw[0][0], in, origin, c, piece.len);
    copy_commit();
    for (int chunk = 0; chunk < chunks; chunk++) {
        const int first = chunk * L, rows = min(L, piece.len - first), stage = chunk & 1;
        const T* raw = m.raw[stage][0];
        copy_wait<0>();
        __syncthreads();
        if (chunk + 1 < chunks) fetch<N, FETCHED>(m.raw[stage ^ 1][0], in, origin + size_t(first + L) * c, c, piece.len - first - L);
        copy_commit();
        float2 sum[4];
        sum_decays<N>(sum, raw + W * TILE<N>, m.sums, rows);
        __syncthreads();
        make_tiles<N, MADE, false>(m.tiles[0], raw, sum, m.sums, m.whole, m.middle, nullptr);
        __syncthreads();
        const size_t index = (size_t(piece.base) * heads + size_t(h) * chunks + chunk);
#pragma unroll
        for (int i = warp; i < (SCAN ? 2 : 4); i += WARPS<N>) {
            float p[2][4];
            clear(p);
            add_product<N>(p, m.tiles[i < 2 ? AT : RT], m.tiles[i % 2 ? KT : BT]);
            if (LOW<T> && i == 1) add_product<N>(p, m.tiles[AL], m.tiles[KT]);
            lower(p, i < 2);
            if (i == 0) {
                invert(p, m.scratch, m.m[0], m.m[4]);
                if (!SCAN && saved.inverses)
#pragma unroll
                    for (int low = 0; low < 2; low++)
                        saved.inverses[(index * 2 + low) * 32 + lane] = *reinterpret_cast<const uint4*>(m.m[4 * low] + (lane >> 1) * SMALL + (lane & 1) * 8);
            } else {
                keep_small(m.m[i], p);
                if (LOW<T> && i == 1) keep_low(m.m[5], p);
            }
        }
        if (!SCAN && saved.states)
#pragma unroll
            for (int k = 0; k < N / 16; k++) {
                uint32_t b[4];
                state_operand<bf16, N>(b, s, k);
                saved.states[((index * WARPS<N> + k) * WARPS<N> + warp) * 32 + lane] = make_uint4(b[0], b[2], b[1], b[3]);
            }
        float u[2][4], out[2][4], uf[2][4];
        clear(u);
        clear(out);
        clear(uf);
        times_state<N, T>(u, m.tiles[AT], m.tiles[AL], s, m.middle, out, SCAN ? nullptr : m.tiles[RT]);
        if constexpr (SCAN) times_state<N, T>(uf, m.tiles[AT], m.tiles[AL], f, m.middle, out, nullptr);
        __syncthreads();
        uint32_t a[4], inverse[4], inverse_low[4], v[4], t[4], low[4], x[4];
        load_tiles_transposed(v, by_rows<PITCH<N>>(raw + V * TILE<N>, 16 * warp));
        load_tiles(a, by_rows<SMALL>(m.m[1], 0));
        load_tiles(inverse, by_rows<SMALL>(m.m[0], 0));
        mma2<T>(u, a, v);
        if constexpr (LOW<T>) {
            load_tiles(inverse_low, by_rows<SMALL>(m.m[4], 0));
            load_tiles(a, by_rows<SMALL>(m.m[5], 0));
            mma2(u, a, v);
        }
        const auto solve = [&](float(&u)[2][4]) {
            if constexpr (LOW<T>) {
                as_b(t, low, u);
                clear(u);
                mma2_low(u, inverse, inverse_low, t, low);
            } else {
                as_b<T>(t, u);
                clear(u);
                mma2<T>(u, inverse, t);
            }
            as_b<T>(t, u);
        };
        solve(u);
        decay_state<N>(s, m.whole);
        as_a(x, v);
        add_to_state<N>(s, x, m.tiles[KH]);
        as_a(x, t);
        add_to_state<N>(s, x, m.tiles[BH]);
        if constexpr (SCAN) {
            solve(uf);
            as_a(x, t);
            decay_state<N>(f, m.whole);
            add_to_state<N>(f, x, m.tiles[BH]);
        } else {
            const size_t at = origin + size_t(first) * c + 16 * warp;
            if (saved.u) store_result(saved.u + at, c, u, rows);
            load_tiles(a, by_rows<SMALL>(m.m[3], 0));
            mma2<T>(out, a, v);
            load_tiles(a, by_rows<SMALL>(m.m[2], 0));
            mma2<T>(out, a, t);
            store_result(y + at, c, out, rows);
        }
    }
    if constexpr (SCAN) {
        float* to = map + (size_t(blockIdx.x) * heads + h) * 2 * N * N;
        store_state<N>(f, to, warp);
        store_state<N>(s, to + N * N, warp);
    } else if (piece.last && arena_out && piece.state_out >= 0) {
        store_state<N>(s, arena_out + (size_t(piece.state_out) * heads + h) * N * N, warp);
    }
}

struct Grads {
    bf16* p[6]; // of r, w, k, v, a, b
};

struct BackInputs {
    const bf16* p[8]; // r, w, k, v, a, b, u, dy
    __device__ __forceinline__ const bf16* operator[](int i) const { return p[i]; }
};
enum { U = 6, DY = 7 };

template <int N> struct BackShared {
    bf16 raw[2][8][TILE<N>];
    bf16 inverse[2][2][L * SMALL];
    bf16 tiles[8][TILE<N>]; // the last becomes Z
    bf16 d[N * PITCH<N>];   // the gradient of the state after the chunk, by value and channel
    union {                 // one after the other
        float sums[4 * N];
        bf16 m[4][L * SMALL];  // M_ak, M_rb, M_rk, low part of M_rb
        bf16 dm[4][L * SMALL]; // gradients of M_ab, M_ak, M_rb, M_rk
    };
    float total[(L + 1) * (N + 8)], whole[N];
};
// Known to cuda.rs.
static_assert(sizeof(ForwardShared<bf16, 64>) == 19 * 2 * TILE<64> + 6 * 768 + 4 * (320 + 6 * 64));
static_assert(sizeof(BackShared<64>) == 24 * 2 * TILE<64> + 2 * 64 * 72 + 8 * 768 + 4 * (17 * 72 + 64));

// Sum over the 8 rows of a fragment: every lane gets the sum of its column.
__device__ __forceinline__ float sum_rows(float x) {
#pragma unroll
    for (int o = 4; o < 32; o <<= 1) x += __shfl_xor_sync(~0u, x, o);
    return x;
}

// SCAN: only the gradient of the state before a piece, given zero for the state after it or, of a last piece, what it is; to `map` [pieces, heads, N, N].
// Where `add` has the bits of R, K or V, their gradients are added to what is there.
template <int N, bool SCAN>
__device__ void backward(const Inputs<bf16>& in, const Piece* pieces, const Saved& saved, const bf16* dy, const float* dnew, const float* exit,
                         float* map, const Grads& out, int add, float* initial, int heads) {
    DYNAMIC_SHARED(memory);
    auto& m = *reinterpret_cast<BackShared<N>*>(memory);
    const Piece piece = pieces[blockIdx.x];
    if (SCAN && piece.number == 0) return; // nobody needs it
    const int h = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const int c = heads * N, chunks = (piece.len + L - 1) / L;
    const size_t origin = size_t(piece.start) * c + h * N;
    const BackInputs from = {{in[R], in[W], in[K], in[V], in[A], in[B], saved.u, dy}};
    float d[N / 8][4];
    zero_state<N>(d);
    if (!piece.last) {
        if (!SCAN) load_state<N>(d, exit + (size_t(blockIdx.x) * heads + h) * N * N, warp);
    } else if (dnew && piece.state_out >= 0) {
        load_state<N>(d, dnew + (size_t(piece.state_out) * heads + h) * N * N, warp);
    }
    constexpr unsigned FETCHED = SCAN ? 1 << R | 1 << W | 1 << A | 1 << B | 1 << DY : 255;
    constexpr unsigned MADE = SCAN ? 1 << RT | 1 << AT | 1 << BT | 1 << BH | 1 << BL | 1 << HL : 255;
    const auto fetch_chunk = [&](int chunk) {
        const size_t index = size_t(piece.base) * heads + size_t(h) * chunks + chunk;
        fetch<N, FETCHED>(m.raw[chunk & 1][0], from, origin + size_t(chunk) * L * c, c, piece.len - chunk * L);
        if (warp < 2) copy_async(m.inverse[chunk & 1][warp] + (lane >> 1) * SMALL + (lane & 1) * 8, saved.inverses + (index * 2 + warp) * 32 + lane);
    };
    fetch_chunk(chunks - 1);
    copy_commit();
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        const int first = chunk * L, rows = min(L, piece.len - first);
        const bf16* raw = m.raw[chunk & 1][0];
        const size_t index = size_t(piece.base) * heads + size_t(h) * chunks + chunk;
        copy_wait<0>();
        __syncthreads();
        if (chunk > 0) fetch_chunk(chunk - 1);
        copy_commit();
        const size_t at0 = origin + size_t(first) * c + 16 * warp;
        uint32_t prior[2][4];
        if constexpr (!SCAN) load_prior(prior[0], out.p[V] + at0, c, rows, add >> V & 1);
        uint4 s[SCAN ? 1 : WARPS<N>]; // the state before the chunk: all values, the warp's channels
        if constexpr (!SCAN) {
#pragma unroll
            for (int w = 0; w < WARPS<N>; w++) s[w] = saved.states[((index * WARPS<N> + warp) * WARPS<N> + w) * 32 + lane];
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
                bf16* row = m.d + (16 * warp + g) * PITCH<N> + 8 * j + 2 * q;
                *reinterpret_cast<uint32_t*>(row) = pack(d[j][0], d[j][1]);
                *reinterpret_cast<uint32_t*>(row + 8 * PITCH<N>) = pack(d[j][2], d[j][3]);
            }
        }
        float2 sum[4];
        sum_decays<N>(sum, raw + W * TILE<N>, m.sums, rows);
        __syncthreads();
        make_tiles<N, MADE, true>(m.tiles[0], raw, sum, m.sums, m.whole, nullptr, m.total);
        __syncthreads();
#pragma unroll
        for (int i = warp; i < 3; i += WARPS<N>) {
            if (SCAN && i != 1) continue;
            float p[2][4];
            clear(p);
            add_product<N>(p, m.tiles[i == 0 ? AT : RT], m.tiles[i == 1 ? BT : KT]);
            if (i == 1) add_product<N>(p, m.tiles[RT], m.tiles[BL]);
            lower(p, i == 0);
            keep_small(m.m[i], p);
            if (i == 1) keep_low(m.m[3], p);
        }
        float du[2][4], dv[2][4];
        clear(du);
        clear(dv);
        if constexpr (!SCAN) add_prior(dv, prior[0]);
        times_state<N, bf16>(du, m.tiles[BH], m.tiles[HL], d, nullptr, dv, SCAN ? nullptr : m.tiles[KH]);
        // By channels of the warp: V D, U D, dY S, and the sum over values of S D.
        float vd[2][4], ud[2][4], ys[2][4], zs[2][4], along[2][2] = {};
        if constexpr (!SCAN) {
            clear(vd);
            clear(ud);
            clear(ys);
#pragma unroll
            for (int w = 0; w < WARPS<N>; w++) {
                uint32_t a[4], b[4];
                load_tiles_transposed(b, by_rows<PITCH<N>>(m.d + 16 * w * PITCH<N>, 16 * warp));
                load_tiles(a, by_rows<PITCH<N>>(raw + V * TILE<N>, 16 * w));
                mma2(vd, a, b);
                load_tiles(a, by_rows<PITCH<N>>(raw + U * TILE<N>, 16 * w));
                mma2(ud, a, b);
                load_tiles(b, by_rows<PITCH<N>>(m.d + 16 * w * PITCH<N>, 16 * warp));
                const uint32_t mine[4] = {s[w].x, s[w].y, s[w].z, s[w].w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 x = unpack(mine[i]), y = unpack(b[i]);
                    along[i / 2][0] += x.x * y.x;
                    along[i / 2][1] += x.y * y.y;
                }
                // From here on as operand (k = value, n = channel).
                s[w] = make_uint4(transpose(mine[0]), transpose(mine[1]), transpose(mine[2]), transpose(mine[3]));
                const uint32_t turned[4] = {s[w].x, s[w].y, s[w].z, s[w].w};
                load_tiles(a, by_rows<PITCH<N>>(raw + DY * TILE<N>, 16 * w));
                mma2(ys, a, turned);
            }
        }
        __syncthreads();
        uint32_t a[4], b[4], t[4], x[4], low[4];
        bf16* const z = m.tiles[HL];
        load_tiles_transposed(b, by_rows<PITCH<N>>(raw + DY * TILE<N>, 16 * warp));
        load_tiles_transposed(a, by_columns<SMALL>(m.m[1], 0));
        mma2(du, a, b);
        load_tiles_transposed(a, by_columns<SMALL>(m.m[3], 0));
        mma2(du, a, b);
        as_b(t, low, du);
        load_tiles_transposed(a, by_columns<SMALL>(m.inverse[chunk & 1][0], 0));
        load_tiles_transposed(x, by_columns<SMALL>(m.inverse[chunk & 1][1], 0));
        clear(du);
        mma2_low(du, a, x, t, low); // now Z
        as_b(t, du);
        if constexpr (!SCAN) {
            keep_result(z + 16 * warp, PITCH<N>, du);
            load_tiles_transposed(a, by_columns<SMALL>(m.m[2], 0));
            mma2(dv, a, b);
            load_tiles_transposed(a, by_columns<SMALL>(m.m[0], 0));
            mma2(dv, a, t);
            store_result(out.p[V] + at0, c, dv, rows);
        }
        decay_state<N>(d, m.whole);
        as_a(x, b);
        add_to_state<N>(d, x, m.tiles[RT]);
        as_a(x, t);
        add_to_state<N>(d, x, m.tiles[AT]);
        if constexpr (!SCAN) {
            __syncthreads();
#pragma unroll
            for (int i = warp; i < 4; i += WARPS<N>) {
                float p[2][4];
                clear(p);
                add_product<N>(p, i < 2 ? z : raw + DY * TILE<N>, raw + (i % 2 ? V : U) * TILE<N>);
                lower(p, i < 2);
                keep_small(m.dm[i], p);
            }
            clear(zs);
#pragma unroll
            for (int w = 0; w < WARPS<N>; w++) {
                const uint32_t turned[4] = {s[w].x, s[w].y, s[w].z, s[w].w};
                load_tiles(a, by_rows<PITCH<N>>(z, 16 * w));
                mma2(zs, a, turned);
            }
            load_prior(prior[0], out.p[R] + at0, c, rows, add >> R & 1);
            load_prior(prior[1], out.p[K] + at0, c, rows, add >> K & 1);
            __syncthreads();
            // Within the chunk, by channels of the warp.
            float ir[2][4], ia[2][4], ik[2][4], ib[2][4];
            clear(ir);
            clear(ia);
            clear(ik);
            clear(ib);
            const auto within = [&](float(&to)[2][4], int i, int tile, bool turned) {
                uint32_t a[4], b[4];
                if (turned) load_tiles_transposed(a, by_columns<SMALL>(m.dm[i], 0));
                else load_tiles(a, by_rows<SMALL>(m.dm[i], 0));
                load_tiles_transposed(b, by_rows<PITCH<N>>(m.tiles[tile], 16 * warp));
                mma2(to, a, b);
            };
            within(ir, 3, KT, false);
            within(ir, 2, BT, false);
            within(ia, 1, KT, false);
            within(ia, 0, BT, false);
            within(ik, 3, RT, true);
            within(ik, 1, AT, true);
            within(ib, 2, RT, true);
            within(ib, 0, AT, true);
            // The gradient of the log decay. The difference of sums within the chunk is exact but for f32's rounding, since the factors
            // are the very operands of the products.
            uint32_t rt[4], at[4], kt[4], bt[4], kh[4], bh[4];
            load_tiles(rt, by_rows<PITCH<N>>(m.tiles[RT], 16 * warp));
            load_tiles(at, by_rows<PITCH<N>>(m.tiles[AT], 16 * warp));
            load_tiles(kt, by_rows<PITCH<N>>(m.tiles[KT], 16 * warp));
            load_tiles(bt, by_rows<PITCH<N>>(m.tiles[BT], 16 * warp));
            load_tiles(kh, by_rows<PITCH<N>>(m.tiles[KH], 16 * warp));
            load_tiles(bh, by_rows<PITCH<N>>(m.tiles[BH], 16 * warp));
            float dw[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float own[2], rest[2], after = 0.f;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int i = 2 * half + e, reg = 2 * j + half;
                        const auto value = [&](const uint32_t(&x)[4]) {
                            const float2 both = unpack(x[reg]);
                            return e ? both.y : both.x;
                        };
                        const float q2 = value(at) * (zs[j][i] + ia[j][i]);
                        const float q3 = value(kh) * vd[j][i] + value(bh) * ud[j][i];
                        own[half] = value(rt) * (ys[j][i] + ir[j][i]) - value(kt) * ik[j][i] - value(bt) * ib[j][i] + q2 - q3;
                        rest[half] = q2;
                        after += q3;
                    }
                    const int channel = 16 * warp + 8 * j + 2 * q + e;
                    const float base = sum_rows(after) + m.whole[channel] * sum_rows(along[j][e]);
                    // Sums over this and the later tokens.
                    float low = own[0], high = own[1];
#pragma unroll
                    for (int o = 1; o < 8; o <<= 1) {
                        const float l = __shfl_down_sync(~0u, low, 4 * o), u = __shfl_down_sync(~0u, high, 4 * o);
                        if (g + o < 8) {
                            low += l;
                            high += u;
                        }
                    }
                    low += __shfl_sync(~0u, high, q);
                    dw[j][e] = base + low - rest[0];
                    dw[j][2 + e] = base + high - rest[1];
                }
            }
            float dr[2][4], da[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = g + 8 * half, channel = 16 * warp + 8 * j + 2 * q;
                    const float2 before = *reinterpret_cast<const float2*>(m.total + row * (N + 8) + channel);
                    const float2 now = *reinterpret_cast<const float2*>(m.total + (row + 1) * (N + 8) + channel);
                    const float2 whole = *reinterpret_cast<const float2*>(m.whole + channel), w = pair<N>(raw + W * TILE<N>, row, channel);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int i = 2 * half + e;
                        const float up = exp2_fast(e ? now.y : now.x), down = exp2_fast(e ? -now.y : -now.x), end = e ? whole.y : whole.x;
                        const float logit = e ? w.y : w.x;
                        dr[j][i] = up * (ys[j][i] + ir[j][i]);
                        da[j][i] = exp2_fast(e ? before.y : before.x) * (zs[j][i] + ia[j][i]);
                        ik[j][i] = down * (ik[j][i] + end * vd[j][i]);
                        ib[j][i] = down * (ib[j][i] + end * ud[j][i]);
                        dw[j][i] *= -0.60653066f * __fdividef(1.f, 1.f + exp2_fast(-1.44269504f * logit)) * __fdividef(1.f, 1.f + exp2_fast(1.44269504f * logit));
                    }
                }
            add_prior(dr, prior[0]);
            add_prior(ik, prior[1]);
            store_result(out.p[R] + at0, c, dr, rows);
            store_result(out.p[W] + at0, c, dw, rows);
            store_result(out.p[K] + at0, c, ik, rows);
            store_result(out.p[A] + at0, c, da, rows);
            store_result(out.p[B] + at0, c, ib, rows);
        }
    }
    if constexpr (SCAN) store_state<N>(d, map + (size_t(blockIdx.x) * heads + h) * N * N, warp);
    else if (initial && piece.number == 0 && piece.state_in >= 0) store_state<N>(d, initial + (size_t(piece.segment) * heads + h) * N * N, warp);
}

// The states between the pieces of a sequence. Forward: entry[p + 1] = entry[p] F_p + C_p, where the first is C_0. Backward: exit[p - 1] = exit[p] F_p^T + D_p, where
// the first is D of the last piece. 256 threads; a 64 x 64 part of the result at a time. Shared: two matrices [N, N + 4].
template <int N, bool BACK> __device__ void combine(const int2* ranges, const float* map, const float* own, float* states, int heads) {
    DYNAMIC_SHARED(memory);
    constexpr int P = N + 4, PARTS = N / 64;
    float* s = reinterpret_cast<float*>(memory);
    float* f = s + N * P;
    const int2 range = ranges[blockIdx.x]; // first piece, number of pieces
    const int h = blockIdx.y, row = threadIdx.x / 16 * 4, col = threadIdx.x % 16 * 4;
    const auto piece = [&](int n) { return (size_t(range.x + (BACK ? range.y - 1 - n : n)) * heads + h) * N * N; };
    const auto add_of = [&](int n) { return BACK ? own + piece(n) : map + 2 * piece(n) + N * N; };
    const auto to_of = [&](int n) { return states + piece(n + 1); };
    if (range.y < 2) return;
    for (int i = threadIdx.x; i < N * N; i += 256) to_of(0)[i] = s[i / N * P + i % N] = add_of(0)[i];
    float next[N * N / 256]; // of the next F
    const auto fetch = [&](int n) {
#pragma unroll
        for (int i = 0; i < N * N / 256; i++) next[i] = map[2 * piece(n) + threadIdx.x + 256 * i];
    };
    if (range.y > 2) fetch(1);
    for (int n = 1; n + 1 < range.y; n++) {
        const float* add = add_of(n);
        float* to = to_of(n);
#pragma unroll
        for (int j = 0; j < N * N / 256; j++) {
            const int i = threadIdx.x + 256 * j;
            f[BACK ? i % N * P + i / N : i / N * P + i % N] = next[j];
        }
        __syncthreads();
        if (n + 2 < range.y) fetch(n + 1);
        float sum[PARTS * PARTS][4][4];
#pragma unroll
        for (int part = 0; part < PARTS * PARTS; part++) {
            const int r = row + part / PARTS * 64, k = col + part % PARTS * 64;
#pragma unroll
            for (int i = 0; i < 16; i++) sum[part][i / 4][i % 4] = add[(r + i / 4) * N + k + i % 4];
            for (int j = 0; j < N; j += 4) {
                float4 a[4];
#pragma unroll
                for (int i = 0; i < 4; i++) a[i] = *reinterpret_cast<const float4*>(s + (r + i) * P + j);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float4 b = *reinterpret_cast<const float4*>(f + (j + e) * P + k);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float x = e == 0 ? a[i].x : e == 1 ? a[i].y : e == 2 ? a[i].z : a[i].w;
                        sum[part][i][0] += x * b.x;
                        sum[part][i][1] += x * b.y;
                        sum[part][i][2] += x * b.z;
                        sum[part][i][3] += x * b.w;
                    }
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int part = 0; part < PARTS * PARTS; part++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = row + part / PARTS * 64 + i, k = col + part % PARTS * 64;
                const float4 v = make_float4(sum[part][i][0], sum[part][i][1], sum[part][i][2], sum[part][i][3]);
                *reinterpret_cast<float4*>(s + r * P + k) = v;
                *reinterpret_cast<float4*>(to + r * N + k) = v;
            }
    }
}

} // namespace tensor
