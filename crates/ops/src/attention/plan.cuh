// What all kernels of the folder share: the sequences, and how blocks find their work.
//
// Work is flattened: the host knows from shapes how many pieces of work each sequence has at most and gives every sequence the number of
// its first one; a block finds its sequence, then, where lists are concerned, its chunk, and has nothing to do if it is one too many.
#pragma once
#include "../decode/overlap.cuh"

namespace chunks {

// Kernels of the operation follow each other closely: each lets the next one start at once and waits for those before.
__device__ __forceinline__ void begin_kernel() {
    let_next_start();
    wait_for_previous();
}

struct Sequence {
    int first_row, len, past; // row of the first query; queries; keys before the first query
    int chunks;               // of past + len keys
    int known;                // chunks whose means are there
    int chunk_base, count_base, run_base, tile_base, piece_base, query_base, unused;
    const void *keys, *values; // of position 0, [past + len, key_heads N]
    float* means;              // [chunks, key_heads N]
};

struct Plan {
    const Sequence* sequences;
    int count;
    int heads, first, group; // all heads, and the group of heads in hand
    int slots;               // partial results of a row: those of its picks and, last, of its own chunk
    int size;                // tokens of a chunk
    int rows, chunks, counts; // of all sequences: rows; chunks; counts of a head
    int run;                 // rows of a run (see lists.cuh)
    int piece;               // longest part of a list that one block takes backward
    int pieces;              // most such parts of a head
    int tiles, together;     // tiles of a head, and how many of them a block takes
    int bits, key_tile;      // bits of an entry that are the row; keys of a tile backward
    int sink, window;        // first and last chunks of the past that are always picked
    int key_heads, share;    // all heads of keys, and how many of queries share one
    int dense, ahead;        // positions of a sequence whose queries are taken to see all keys before them in one piece, without lists (see hopper.cuh), and the first
                             // tiles that are taken before others, the last of them first: the longest if there is one sequence
};

// The queries that chose a chunk: their place in the sequence's entries, how many, and the numbers of the first tile and piece.
struct List {
    int first, size, tile, piece;
};

constexpr int QUERIES = 128; // queries of a block that is about queries alone

// Last i < n with key(i) <= x, for ascending keys of which the first is; by a warp.
template <class Key> __device__ __forceinline__ int last_up_to(int n, int x, Key key) {
    const int lane = threadIdx.x & 31;
    int low = 0;
    while (n > 1) {
        const int step = (n + 31) / 32, at = lane * step;
        const int up = __popc(__ballot_sync(~0u, at < n && key(low + at) <= x)) - 1;
        low += up * step;
        n = min(step, n - up * step);
    }
    return low;
}
// The same by one thread.
template <class Key> __device__ __forceinline__ int last_up_to_alone(int n, int x, Key key) {
    int low = 0;
    for (int high = n - 1; low < high;) {
        const int mid = (low + high + 1) / 2;
        if (key(mid) <= x) low = mid;
        else high = mid - 1;
    }
    return low;
}
template <bool ALONE, class Key> __device__ __forceinline__ int find_last(int n, int x, Key key) {
    return ALONE ? last_up_to_alone(n, x, key) : last_up_to(n, x, key);
}
template <int Sequence::*BASE, bool ALONE = false> __device__ __forceinline__ const Sequence& sequence_of(const Plan& p, int x) {
    return p.sequences[find_last<ALONE>(p.count, x, [&](int i) { return p.sequences[i].*BASE; })];
}

// `y` is a head of the group.
__device__ __forceinline__ const List* lists_of(const Plan& p, const Sequence& s, const List* lists, int y) {
    return lists + size_t(y) * p.chunks + s.chunk_base;
}
// The first key that a query sees in one piece with itself.
__device__ __forceinline__ int low_of(const Plan& p, int position) { return position < p.dense ? 0 : position / p.size * p.size; }
// Whether a row is such a query; only where sequences lie in the order of their rows.
__device__ __forceinline__ bool dense_row(const Plan& p, int row) {
    if (p.dense == 0) return false;
    const Sequence& s = p.sequences[last_up_to_alone(p.count, row, [&](int i) { return p.sequences[i].first_row; })];
    return s.past + row - s.first_row < p.dense;
}
// An entry is a row and, in the bits above it, the slot of its pick; p.slots where the result is the whole one.
__device__ __forceinline__ int entry_of(const Plan& p, int row, int slot) { return slot << p.bits | row; }
__device__ __forceinline__ int row_in(const Plan& p, int entry) { return entry & ((1 << p.bits) - 1); }
__device__ __forceinline__ int slot_in(const Plan& p, int entry) { return entry >> p.bits; }
// Entries of a sequence.
template <class Int> __device__ __forceinline__ Int* entries_of(const Plan& p, const Sequence& s, Int* entries, int y) {
    return entries + (size_t(y) * p.rows + s.first_row) * (p.slots - 1);
}

// Where the vector of a row of a head is in a matrix [rows, heads N].
template <int N, class T> __device__ __forceinline__ T* vector_of(const Plan& p, T* x, int row, int head) {
    return x + (size_t(row) * p.heads + head) * N;
}
// The same in a matrix [rows, key_heads N], for a head of queries.
template <int N, class T> __device__ __forceinline__ T* key_of(const Plan& p, T* x, int row, int head) {
    return x + (size_t(row) * p.key_heads + head / p.share) * N;
}

// Where a lane points load_tiles, from row `row` and column `col` of a matrix of pitch P in shared memory, so that it gets
//   rows 0..15, columns 0..15: an A fragment; transposed, the B fragments (k = rows) of columns 0.. and 8..
template <int P, class T> __device__ __forceinline__ const T* by_rows(const T* m, int row, int col) {
    const int lane = threadIdx.x & 31;
    return m + (row + (lane & 15)) * P + col + (lane >> 4) * 8;
}
//   the B fragments (n = rows) of rows 0..7 and 8..15
template <int P, class T> __device__ __forceinline__ const T* by_columns(const T* m, int row, int col) {
    const int lane = threadIdx.x & 31;
    return m + (row + (lane & 7) + (lane >> 4) * 8) * P + col + (lane & 8);
}
// A 16 x 16 result, given by its halves, as the A operand.
template <class T> __device__ __forceinline__ void as_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack<T>(left[0], left[1]);
    a[1] = pack<T>(left[2], left[3]);
    a[2] = pack<T>(right[0], right[1]);
    a[3] = pack<T>(right[2], right[3]);
}

} // namespace chunks
