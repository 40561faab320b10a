// Products of a few sequences in a kernel whose blocks stay (program.cuh), and the copies that run ahead of them.
//
// Tensor cores take the sequences, filled up to 16, as rows of a tile and 8 rows of W as its columns. Every warp has a share of the rows of each matrix, or with
// the warps of its group of their columns, and a ring of stages of its own that runs through these shares from the first matrix to the last: what it
// multiplies next is on its way while the blocks wait for each other or make a product's input. The order of k within 32 columns is that in which they lie in memory, for W and x alike. Sums of a group are added in order of the warps.
//
// Rows of W may be codes of 8 bits (codes.cuh). They are multiplied as whole numbers, and the sum over the columns of a scale is multiplied with it. A lane has 16 neighbouring codes, and x lies so
// in shared memory that its two vectors for them are in the banks where the two for 32 neighbouring columns in 16 bits would be.
#pragma once
#include "codes.cuh"

// Threads of a block that work, of which a multiprocessor has one: as few as have registers for everything.
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int TILE = 8;           // rows of W that a warp multiplies at once
constexpr int CHUNK = 512;        // bytes of each in a stage at most
constexpr int APART = CHUNK + 64; // bytes between these, of which neighbours lie in different banks
constexpr int stage_bytes(bool coded) { return TILE * (APART + (coded ? CHUNK / STEP * SCALES : 0)); }
// Stages for which there is shared memory, for B sequences of which a thread holds HELD vectors.
constexpr int stages_of(bool coded, int b, int held) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ / 100 == 9
    return b * held > 4 ? (coded ? 2 : 4) : coded && b * held > 1 ? 4 : 5;
#else
    return 2;
#endif
}

// Waits for the threads that work.
__device__ __forceinline__ void sync_workers() { wait_barrier(1, THREADS); }

// A matrix [total, k]: rows in codes, and behind them rows in 16 bits.
struct Matrix {
    const void* w[2];
    const f16* scales;
    const int4* work; // of every block: first row, rows, input
    int total, k, spread, number;
    int coded, pitch; // rows in codes; rows from the scales of a step of columns to those of the next
};

// The share that a block has of a matrix, of which groups of 2^spread warps have rows, as even as may be, so that no warp ends long after the others.
struct Share {
    const unsigned char* w; // its first row
    const f16* scales;      // of that row, if it is in codes
    int first, rows, all, k, total, pitch; // rows that are multiplied in this run: all or none
    short rounds;
    unsigned char input, spread, each; // rows of a group in a round
    Share() = default;
    __device__ Share(const Matrix& m, int4 work, bool on)
        : first(work.x), rows(on ? work.y : 0), all(work.y), k(m.k), total(m.total), pitch(m.pitch), input(work.z), spread(m.spread) {
        const bool coded = first < m.coded;
        const int place = coded ? first : first - m.coded;
        w = static_cast<const unsigned char*>(m.w[coded ? 0 : 1]) + size_t(place) * k * (coded ? 1 : 2);
        scales = coded ? m.scales + place * (STEP / GROUP) : nullptr;
        const int groups = WARPS >> spread, tiles = TILE * groups;
        rounds = (rows + tiles - 1) / tiles;
        each = rounds ? (rows + rounds * groups - 1) / (rounds * groups) : 0;
    }
};
static_assert(sizeof(Share) == 48, "");
// A warp's part of it: rows of a group, columns of a warp.
struct Walk {
    int first, step, stop, each, from, to; // rows by rounds; columns
    Walk() = default;
    __device__ __forceinline__ Walk(const Share& s, bool coded) {
        const int warp = threadIdx.x >> 5, part = warp & ((1 << s.spread) - 1), unit = coded ? STEP : 32, units = (s.k + unit - 1) / unit;
        each = s.each, stop = s.rows;
        first = (warp >> s.spread) * each, step = (WARPS >> s.spread) * each;
        from = (units * part >> s.spread) * unit, to = min((units * (part + 1) >> s.spread) * unit, s.k);
    }
    __device__ __forceinline__ int rows() const { return min(each, stop - first); }
    __device__ __forceinline__ bool empty() const { return first >= stop || from >= to; }
};

template <bool CODED, int STAGES> struct Ring {
    static constexpr int STAGE = stage_bytes(CODED);
    unsigned char* places; // of this warp: [STAGES, STAGE], rows and then scales [steps, TILE]
    int out = 0; // the stage that is multiplied next, and then filled anew
    Copied to;   // where the next copy of this lane goes
    // The next copy.
    const Share *share, *end;
    Walk walk;
    int column = 0;
    const unsigned char* next = nullptr; // of this lane

    __device__ Ring(unsigned char* ring, const Share* first, const Share* end) : places(ring + (threadIdx.x >> 5) * STAGES * STAGE), share(first), end(end) {
        to = copied_to(places + (threadIdx.x & 31) * 16);
        if (share < end) walk = Walk(*share, coded()), find();
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) begin();
        to -= STAGES * STAGE;
    }
    __device__ __forceinline__ bool coded() const { return CODED && share->scales; }
    // From here on to rows that this warp has.
    __device__ __forceinline__ void find() {
        while (walk.empty()) {
            if (++share == end) return;
            walk = Walk(*share, coded());
        }
        column = walk.from;
        next = share->w + (size_t(walk.first) * share->k + column) * (coded() ? 1 : 2) + (threadIdx.x & 31) * 16;
    }
    // Begins the copies of the next stage, a row at a time.
    __device__ __forceinline__ void begin() {
        if (share < end) {
            const int size = coded() ? 1 : 2, lane = threadIdx.x & 31, rows = walk.rows(), cols = min(CHUNK / size, walk.to - column), k = share->k * size;
            const unsigned char* from = next;
            if (lane * 16 < cols * size)
#pragma unroll
                for (int r = 0; r < TILE; r++, from += k)
                    if (r < rows) copy_async_once(to + r * APART, from);
            if (coded() && lane % TILE < rows && lane / TILE * STEP < cols)
                copy_async_word(to + TILE * APART + lane * (SCALES - 16),
                                share->scales + (size_t(column / STEP + lane / TILE) * share->pitch + walk.first + lane % TILE) * (STEP / GROUP));
            column += cols, next += cols * size;
            if (column >= walk.to) walk.first += walk.step, find();
        }
        to += STAGE;
        copy_commit();
    }
    // Waits for the oldest stage.
    __device__ __forceinline__ const unsigned char* take() const {
        copy_wait<STAGES - 1>();
        __syncwarp();
        return places + out * STAGE;
    }
    // The warp has done with it: another one begins.
    __device__ __forceinline__ void give_back() {
        __syncwarp();
        begin();
        if (++out == STAGES) out = 0, to -= STAGES * STAGE;
    }
};

// Elements from one row of a product's input in shared memory to the next.
__device__ __forceinline__ int pitch(int k) { return k + 32; }

// Where the 8 elements from column `at` on are in such a row, for rows of W in codes or in 16 bits: of 64 columns those that a lane has for the first half of its codes, and then those
// for the second half.
__device__ __forceinline__ int place_of_input(bool coded, int at) { return coded ? (at & ~(GROUP - 1)) + (at >> 3 & 1) * 32 + (at >> 4 & 3) * 8 : at; }

// finish(row, sequence, sum, old) for the block's rows, of held [batch, pitch(k)], with what old(row, sequence) was. `sums` [WARPS, 64].
template <class T, bool CODED, int STAGES, class Old, class Finish>
__device__ __forceinline__ void product(Ring<CODED, STAGES>& ring, const Share& s, const T* held, int batch, float* sums, Old old, Finish finish) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const bool coded = CODED && s.scales;
    Walk walk(s, coded);
    const int part = (threadIdx.x >> 5) & ((1 << s.spread) - 1), rounds = s.rounds;
    const T* x = held + min(g, batch - 1) * pitch(s.k) + q * 8;
    sums += ((threadIdx.x >> 5) - part) * 64 + lane * 2;
#pragma unroll 1
    for (int round = 0; round < rounds; round++, walk.first += walk.step) {
        const int rows = walk.rows(), first = s.first + walk.first + q * 2;
        const bool mine = g < batch && !part, low = mine && q * 2 < rows, high = mine && q * 2 + 1 < rows;
        const float was[2] = {low ? old(first, g) : 0.f, high ? old(first + 1, g) : 0.f};
        // A lane has eight neighbouring values of x: four of them stand in rows g of the tile, the others in rows g + 8, and each are multiplied with their own
        // columns of W. What they give with the others' is not used.
        const auto multiply = [](float(&upper)[4], float(&lower)[4], const uint4& b, const T* x) {
            const uint4 a = *reinterpret_cast<const uint4*>(x);
            const uint32_t both[4] = {a.x, a.y, a.z, a.w};
            mma<T>(upper, both, b.x, b.z);
            mma<T>(lower, both, b.y, b.w);
        };
        float2 sum = make_float2(0.f, 0.f);
        if (coded) {
            if constexpr (CODED) {
                const auto group = [&](const unsigned char* w, const T* x, float2 scales) {
                    const uint4 codes = *reinterpret_cast<const uint4*>(w);
                    float upper[4] = {}, lower[4] = {};
                    multiply(upper, lower, whole_numbers(make_uint2(codes.x, codes.y)), x);
                    multiply(upper, lower, whole_numbers(make_uint2(codes.z, codes.w)), x + 32);
                    sum.x = fmaf(upper[0] + lower[2], scales.x, sum.x);
                    sum.y = fmaf(upper[1] + lower[3], scales.y, sum.y);
                };
                const auto step = [&](const unsigned char* stage, int at, const T* x, bool both) {
                    const uint2 scales = *reinterpret_cast<const uint2*>(stage + TILE * APART + (at / STEP * TILE + q * 2) * SCALES);
                    const float2 low = unpack<f16>(scales.x), high = unpack<f16>(scales.y);
                    const unsigned char* w = stage + g * APART + q * 16 + at;
                    group(w, x, make_float2(low.x, high.x));
                    if (both) group(w + GROUP, x + GROUP, make_float2(low.y, high.y));
                };
                if (!walk.empty())
#pragma unroll 1
                    for (int column = walk.from; column < walk.to; column += CHUNK) {
                        const int cols = min(CHUNK, walk.to - column);
                        const unsigned char* stage = ring.take();
                        if (cols == CHUNK) {
#pragma unroll
                            for (int at = 0; at < CHUNK; at += STEP) step(stage, at, x + column + at, true);
                        } else {
#pragma unroll 1
                            for (int at = 0; at < cols; at += STEP) step(stage, at, x + column + at, at + GROUP < cols);
                        }
                        ring.give_back();
                    }
            }
        } else {
            constexpr int COLUMNS = CHUNK / 2;
            float upper[2][4] = {}, lower[2][4] = {};
            const auto tile = [&](int i, const unsigned char* w, const T* x) { multiply(upper[i], lower[i], *reinterpret_cast<const uint4*>(w), x); };
            if (!walk.empty())
#pragma unroll 1
                for (int column = walk.from; column < walk.to; column += COLUMNS) {
                    const int cols = min(COLUMNS, walk.to - column);
                    const unsigned char* w = ring.take() + g * APART + q * 16;
                    if (cols == COLUMNS) {
#pragma unroll
                        for (int u = 0; u < COLUMNS; u += 32) tile(u / 32 % 2, w + u * 2, x + column + u);
                    } else {
#pragma unroll 1
                        for (int u = 0; u < cols; u += 32) tile(0, w + u * 2, x + column + u);
                    }
                    ring.give_back();
                }
            sum = make_float2((upper[0][0] + upper[1][0]) + (lower[0][2] + lower[1][2]), (upper[0][1] + upper[1][1]) + (lower[0][3] + lower[1][3]));
        }
        if (s.spread) {
            if (round) sync_workers();
            if (part) *reinterpret_cast<float2*>(sums + part * 64) = sum;
            sync_workers();
            if (part) continue;
#pragma unroll
            for (int p = 1; p < WARPS; p++)
                if (p < 1 << s.spread) {
                    const float2 v = *reinterpret_cast<const float2*>(sums + p * 64);
                    sum.x += v.x, sum.y += v.y;
                }
        }
        if (low) finish(first, g, sum.x, was[0]);
        if (high) finish(first + 1, g, sum.y, was[1]);
    }
}
