// Products of a few sequences in a kernel whose blocks stay (program.cuh), and the copies that run ahead of them.
//
// Tensor cores take the sequences, filled up to 16, as rows of a tile and 8 rows of W as its columns. Every warp has a share of the rows of each matrix, or with
// the warps of its group of their columns, and a ring of stages of its own that runs through these shares from the first matrix to the last: what it
// multiplies next is on its way while the blocks wait for each other or make a product's input. The order of k within 32 columns is that in which they lie in memory, for W and x alike. Sums of a group are added in order of the warps.
#pragma once
#include "overlap.cuh"

// Threads of a block that work, of which a multiprocessor has one: as few as have registers for everything.
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int TILE = 8, UNIT = 32;   // rows and columns of W that a warp multiplies at once
constexpr int CHUNK = 256;           // columns of a stage at most
constexpr int APART = CHUNK + 32;    // elements between its rows, of which neighbours lie in different banks
// Stages for which there is shared memory, with vectors that need little of it and with others.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ / 100 == 9
constexpr int STAGES_OF[2] = {5, 4};
#else
constexpr int STAGES_OF[2] = {2, 2};
#endif

// Waits for the threads that work.
__device__ __forceinline__ void sync_workers() { wait_barrier(1, THREADS); }

// The share that a block has of a matrix [total, k], of which groups of 2^spread warps have rows, as even as may be, so that no warp ends long after the others.
struct Share {
    const void* w; // its first row
    int first, rows, all, input, k, total; // rows that are multiplied in this run: all or none
    int spread, each, rounds; // rows of a group in a round
    Share() = default;
    __device__ Share(const void* w, int4 work, bool on, int k, int total, int spread)
        : w(w), first(work.x), rows(on ? work.y : 0), all(work.y), input(work.z), k(k), total(total), spread(spread) {
        const int groups = WARPS >> spread, all = TILE * groups;
        rounds = (rows + all - 1) / all;
        each = rounds ? (rows + rounds * groups - 1) / (rounds * groups) : 0;
    }
};
// A warp's part of it: rows of a group, columns of a warp.
struct Walk {
    int first, step, stop, each, from, to; // rows by rounds; columns
    Walk() = default;
    __device__ __forceinline__ explicit Walk(const Share& s) {
        const int warp = threadIdx.x >> 5, part = warp & ((1 << s.spread) - 1), units = s.k / UNIT;
        each = s.each, stop = s.rows;
        first = (warp >> s.spread) * each, step = (WARPS >> s.spread) * each;
        from = (units * part >> s.spread) * UNIT, to = (units * (part + 1) >> s.spread) * UNIT;
    }
    __device__ __forceinline__ int rows() const { return min(each, stop - first); }
    __device__ __forceinline__ bool empty() const { return first >= stop || from >= to; }
};

template <class T, int STAGES> struct Ring {
    T* places; // of this warp: [STAGES, TILE, APART]
    int in = 0, out = 0;
    // The next copy.
    const Share *share, *end;
    Walk walk;
    int column = 0;
    const T* next = nullptr; // of this lane

    __device__ Ring(T* ring, const Share* first, const Share* end)
        : places(ring + (threadIdx.x >> 5) * STAGES * TILE * APART), share(first), end(end) {
        if (share < end) walk = Walk(*share), find();
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) begin();
    }
    // From here on to rows that this warp has.
    __device__ __forceinline__ void find() {
        while (walk.empty()) {
            if (++share == end) return;
            walk = Walk(*share);
        }
        column = walk.from;
        next = static_cast<const T*>(share->w) + size_t(walk.first) * share->k + column + (threadIdx.x & 31) * 8;
    }
    // Begins the copies of the next stage, a row at a time.
    __device__ __forceinline__ void begin() {
        if (share < end) {
            const int lane = threadIdx.x & 31, rows = walk.rows(), cols = min(CHUNK, walk.to - column), k = share->k;
            T* to = places + in * TILE * APART + lane * 8;
            const T* from = next;
            if (lane * 8 < cols)
#pragma unroll
                for (int r = 0; r < TILE; r++, from += k)
                    if (r < rows) copy_async_once(to + r * APART, from);
            in = in + 1 == STAGES ? 0 : in + 1;
            column += cols, next += cols;
            if (column >= walk.to) walk.first += walk.step, find();
        }
        copy_commit();
    }
    // Waits for the oldest stage.
    __device__ __forceinline__ const T* take() const {
        copy_wait<STAGES - 1>();
        __syncwarp();
        return places + out * TILE * APART;
    }
    // The warp has done with it: another one begins.
    __device__ __forceinline__ void give_back() {
        out = out + 1 == STAGES ? 0 : out + 1;
        __syncwarp();
        begin();
    }
};

// Elements from one row of a product's input in shared memory to the next.
__device__ __forceinline__ int pitch(int k) { return k + 32; }

// finish(row, sequence, sum, old) for the block's rows, of held [batch, pitch(k)], with what old(row, sequence) was. `sums` [WARPS, 64].
template <class T, int STAGES, class Old, class Finish>
__device__ __forceinline__ void product(Ring<T, STAGES>& ring, const Share& s, const T* held, int batch, float* sums, Old old, Finish finish) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    Walk walk(s);
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
        float upper[2][4] = {}, lower[2][4] = {};
        const auto multiply = [&](int i, const T* w, const T* x) {
            const uint4 a = *reinterpret_cast<const uint4*>(x), b = *reinterpret_cast<const uint4*>(w);
            const uint32_t both[4] = {a.x, a.y, a.z, a.w};
            mma<T>(upper[i], both, b.x, b.z);
            mma<T>(lower[i], both, b.y, b.w);
        };
        if (!walk.empty())
#pragma unroll 1
            for (int column = walk.from; column < walk.to; column += CHUNK) {
                const int cols = min(CHUNK, walk.to - column);
                const T* w = ring.take() + g * APART + q * 8;
                if (cols == CHUNK) {
#pragma unroll
                    for (int u = 0; u < CHUNK; u += UNIT) multiply(u / UNIT % 2, w + u, x + column + u);
                } else {
#pragma unroll 1
                    for (int u = 0; u < cols; u += UNIT) multiply(0, w + u, x + column + u);
                }
                ring.give_back();
            }
        float2 sum = make_float2((upper[0][0] + upper[1][0]) + (lower[0][2] + lower[1][2]), (upper[0][1] + upper[1][1]) + (lower[0][3] + lower[1][3]));
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
