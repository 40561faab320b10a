// The choice of chunks on Hopper, of at most 16, for heads of 64.
//
// A block has 128 queries of a head: two warpgroups of 64, and a warp that copies means of 64 chunks at a time, which lie as products want them. The scores of all
// chunks are computed twice, for which tensor cores have the time: sorting is what takes long. First each of the four lanes of a row notes the greatest score of every
// eighth of its columns. The k-th greatest of these 32 is a bound that k scores reach, and seldom more than 20 do. Then what reaches it is kept, by each lane in ascending
// order of chunks, and of that the k best are taken, of equal ones the first. A lane that has kept 16 drops the worst, after which it wants more than the worst that is left.
// Up to 64 chunks all scores are there at once, and what is chosen is known when the k-th greatest is.
#pragma once
#include "hopper.cuh"
#include "select.cuh"

#ifdef ANSER_HOPPER
namespace chunks {
namespace hopper {

__device__ __forceinline__ void put_greater_first(float& a, float& b) {
    const float x = fmaxf(a, b);
    b = fminf(a, b);
    a = x;
}
__device__ __forceinline__ void put_greater_first(int& a, int& b) {
    const int x = max(a, b);
    b = min(a, b);
    a = x;
}
// Greatest first, by Batcher's network: from its step (P, K) on.
template <int P = 1, int K = 1, int L, class V> __device__ __forceinline__ void sort(V (&a)[L]) {
#pragma unroll
    for (int i = 0; i + K < L; i++)
        if (i >= K % P && (i - K % P) / K % 2 == 0 && i / (2 * P) == (i + K) / (2 * P)) put_greater_first(a[i], a[i + K]);
    if constexpr (K > 1) sort<P, K / 2>(a);
    else if constexpr (2 * P < L) sort<2 * P, 2 * P>(a);
}
// The same of what falls to a place and rises after it, or the other way round.
template <int K = 8> __device__ __forceinline__ void sort_halves(float (&a)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (i % (2 * K) < K) put_greater_first(a[i], a[i + K]);
    if constexpr (K > 1) sort_halves<K / 2>(a);
}

// The k-th greatest, k <= 16, of the values that four neighbouring lanes have of a row, of two rows.
template <int L> __device__ __forceinline__ void find_greatest(float (&a)[2][L], int k, float (&value)[2]) {
    const bool second = threadIdx.x & 1; // the row that this lane looks at
    sort(a[0]);
    sort(a[1]);
#pragma unroll
    for (int i = 0; i < L; i++) {
        const float mine = second ? a[1][i] : a[0][i], other = __shfl_xor_sync(~0u, second ? a[0][i] : a[1][i], 1);
        a[0][i] = mine;
        a[1][i] = other;
    }
    float c[16];
#pragma unroll
    for (int i = 0; i < 16; i++) c[i] = L == 8 ? i < 8 ? a[0][i % L] : a[1][(15 - i) % L] : fmaxf(a[0][i % L], a[1][(15 - i) % L]);
    sort_halves(c);
    // With 16 - k above all it is the 16th.
    const bool first = !(threadIdx.x & 2);
    for (int above = k; above < 16; above++) {
#pragma unroll
        for (int i = 15; i > 0; i--) c[i] = first ? c[i - 1] : c[i];
        if (first) c[0] = INFINITY;
    }
    // Of two lists the 16th is as great as both the last of i of one and the last of 16 - i of the other, for some i.
    float found = -INFINITY;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float other = __shfl_xor_sync(~0u, c[15 - i], 2);
        found = fmaxf(found, i == 0 ? fmaxf(other, c[15]) : fminf(c[i - 1], other));
    }
    const float other = __shfl_xor_sync(~0u, found, 1);
    value[0] = second ? other : found;
    value[1] = second ? found : other;
}

// If x exceeds the limit, keeps it at `next` + AT and c at `next` + AT_CHUNK, and goes on by STEP bytes; without a branch.
template <int AT, int AT_CHUNK, int STEP> __device__ __forceinline__ void keep_greater(Address& next, float x, float limit, int c) {
#ifndef ANSER_EMULATOR
    asm volatile("{.reg .pred p; setp.gt.f32 p, %1, %2; @p st.shared.f32 [%0 + %4], %1; @p st.shared.u16 [%0 + %5], %3; @p add.u32 %0, %0, %6;}"
                 : "+r"(next) : "f"(x), "f"(limit), "h"(uint16_t(c)), "n"(AT), "n"(AT_CHUNK), "n"(STEP) : "memory");
#else
    if (!(x > limit)) return;
    *reinterpret_cast<float*>(next + AT) = x;
    *reinterpret_cast<uint16_t*>(next + AT_CHUNK) = uint16_t(c);
    next += STEP;
#endif
}

template <class T> struct Pick {
    static constexpr int STAGES = 2, AT_ONCE = MEANS, STAGE = 2 * AT_ONCE * 64, THREADS = 256;
    static constexpr int MOST = 16, KEPT = MOST + 4; // that a lane keeps of a row; four more come before it looks
    static constexpr int WIDE = 20;                  // ints of a row's picks in shared memory, so that rows are in different banks
    // A lane's scores and their chunks, one after another, a row of it beside the other: lanes are neighbours.
    struct Kept {
        float score[2][KEPT][THREADS];
        uint16_t chunk[KEPT][THREADS][2];
    };

    struct Left {
        int count;
        float limit;
    };
    // Drops the worst of a lane's scores of a row, of equal ones the last, until `want` are left; later ones must be greater than the limit.
    __attribute__((noinline)) __device__ static Left drop(Kept& kept, int half, int count, int want) {
        const int t = threadIdx.x;
        for (;;) {
            float worst = INFINITY;
            int at = 0;
            for (int i = 0; i < count; i++) {
                const float x = kept.score[half][i][t];
                if (x <= worst) {
                    worst = x;
                    at = i;
                }
            }
            if (count <= want) return {count, worst};
            count--;
            for (int i = at; i < count; i++) {
                kept.score[half][i][t] = kept.score[half][i + 1][t];
                kept.chunk[i][t][half] = kept.chunk[i + 1][t][half];
            }
        }
    }
};

// What the four lanes of a row have of it together.
__device__ __forceinline__ uint64_t of_row(unsigned low, unsigned high) {
#pragma unroll
    for (int by = 1; by < 4; by *= 2) {
        low |= __shfl_xor_sync(~0u, low, by);
        high |= __shfl_xor_sync(~0u, high, by);
    }
    return uint64_t(high) << 32 | low;
}

// picks [heads, rows, slots - 1] and, if counts is given, the runs' counts (see lists.cuh), from means in two parts.
template <class T> __device__ __forceinline__ void pick(const Plan& p, const T* q, const T* parts, int* picks, int* counts) {
    using Work = Pick<T>;
    using Kept = typename Work::Kept;
    constexpr int STAGES = Work::STAGES, AT_ONCE = Work::AT_ONCE, THREADS = Work::THREADS;
    DYNAMIC_SHARED(memory);
    __shared__ uint64_t barriers[2 * STAGES];
    T *queries = aligned<T>(memory), *stages = queries + QUERIES * 64;
    Kept& kept = *reinterpret_cast<Kept*>(stages + STAGES * Work::STAGE);
    // In the place of means and of queries afterwards.
    Set* const sets = counts ? reinterpret_cast<Set*>(stages) : nullptr;
    int(*const chosen)[Work::WIDE] = reinterpret_cast<int(*)[Work::WIDE]>(queries);

    const int block = gridDim.x - 1 - blockIdx.x, head = blockIdx.y; // later queries have more to do
    const Sequence& s = sequence_of<&Sequence::query_base>(p, block);
    const int run = block - s.query_base, first = run * QUERIES, rows = min(QUERIES, s.len - first), want = p.slots - 1;
    const int end = (s.past + first + rows - 1) / p.size;
    const int listed = sets ? max(0, p.dense - s.past - first) : QUERIES; // the first row whose picks are
    int* const to = picks + (size_t(head) * p.rows + s.first_row + first) * want;
    const auto clear = [&] {
        for (int c = threadIdx.x; sets && c < end; c += blockDim.x) sets[c] = make_uint4(0, 0, 0, 0);
        __syncthreads();
    };
    const auto count_up = [&] {
        __syncthreads();
        int* const of = counts + size_t(head) * p.counts + s.count_base + size_t(run) * s.chunks;
        for (int c = threadIdx.x; sets && c < s.chunks; c += blockDim.x) of[c] = c < end ? size_of(sets[c]) : 0;
    };
    if (end <= want) { // all that is past
        clear();
        const int r = threadIdx.x, own = (s.past + first + r) / p.size;
        for (int j = 0; r < rows && j < want; j++) {
            to[r * want + j] = j < own ? j : -1;
            if (j < own && r >= listed) put(sets, j, r);
        }
        return count_up();
    }

    const Address b = chunks::kept(address_of(barriers));
    const auto full = [&](int i) { return b + 8 * i; };
    const auto empty = [&](int i) { return b + 8 * (STAGES + i); };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), THREADS / 32);
        }
    }
    for (int i = threadIdx.x; i < QUERIES * 8; i += blockDim.x) {
        const int r = i / 8, col = i % 8 * 8;
        copy_async(queries + chunks::place<64>(r, col), vector_of<64>(p, q, s.first_row + first + min(r, rows - 1), head) + col);
    }
    copy_commit();
    copy_wait<0>();
    fence_for_products();
    __syncthreads();
    const int lane = threadIdx.x % 32;
    Place<STAGES> at;
    if (threadIdx.x >= THREADS) {
        const T* from = parts + size_t(tile_of_means(p, s, 0, head / p.share)) * Work::STAGE;
        for (int pass = 0; pass < (end <= AT_ONCE ? 1 : 2); pass++)
            for (int low = 0; low < end; low += AT_ONCE, at.next()) {
                barrier_wait(empty(at.at), at.parity ^ 1);
                if (lane == 0) copy_together(address_of(stages + at.at * Work::STAGE), from + size_t(low) * (2 * 64), 2 * Work::STAGE, full(at.at));
                __syncwarp();
            }
        __syncthreads();
        clear();
        return count_up();
    }

    const int group = __shfl_sync(~0u, int(threadIdx.x / 128), 0), row = threadIdx.x / 32 * 16 + lane / 4;
    const uint64_t a = uniform(operand(address_of(queries + group * 64 * 64))), means = operand(address_of(stages));
    int own[2];
#pragma unroll
    for (int half = 0; half < 2; half++) own[half] = row + 8 * half < rows ? (s.past + first + row + 8 * half) / p.size : 0;
    const int least = (s.past + first + 64 * group) / p.size; // all rows see so many
    float score[AT_ONCE / 8][4];
    // Calls f(first chunk) when `score` is that of the next chunks; block b has a lane's columns 8 b + .., of rows `row` and `row + 8` two each.
    const auto each = [&](auto f) {
        for (int low = 0; low < end; low += AT_ONCE) {
            barrier_wait(full(at.at), at.parity);
            const uint64_t m = uniform(operand_at(means, at.at * Work::STAGE * 2));
            products_begin();
#pragma unroll
            for (int k = 0; k < 8; k++) wgmma<T>(score, operand_at(a, 32 * (k % 4)), operand_at(m, 32 * (k % 4) + k / 4 * AT_ONCE * 128), k > 0);
            products_commit();
            products_wait<0>();
            keep_order(score);
            release(empty(at.at));
            at.next();
            if (low + AT_ONCE > least || p.sink + p.window > 0) {
#pragma unroll
                for (int i = 0; i < AT_ONCE / 2; i++) {
                    const int c = low + i / 4 * 8 + lane % 4 * 2 + i % 2, mine = own[i % 4 / 2];
                    float& x = score[i / 4][i % 4];
                    if (c < p.sink || c >= mine - p.window) x = INFINITY;
                    if (c >= mine) x = -INFINITY;
                }
            }
            f(low);
        }
    };
    int(*const mine)[Work::WIDE] = chosen + threadIdx.x / 32 * 16; // picks of the warp's rows, in order
    // Where all scores are there at once, a row's picks are two words of bits.
    const auto among_few = [&] {
        float all[2][16], x[2][16], least_taken[2];
        each([&](int) {
#pragma unroll
            for (int i = 0; i < AT_ONCE / 2; i++) x[i % 4 / 2][i / 4 * 2 + i % 2] = score[i / 4][i % 4];
        });
#pragma unroll
        for (int i = 0; i < 32; i++) all[i / 16][i % 16] = x[i / 16][i % 16];
        find_greatest(all, want, least_taken);
        uint64_t taken[2];
        const int column = lane % 4 * 2; // the lane has this one and the next of every eight
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const auto words = [&](auto in) {
                unsigned bits[2] = {0, 0};
#pragma unroll
                for (int i = 0; i < 16; i++)
                    if (in(x[half][i])) bits[i / 8] |= 1u << (i % 8 / 2 * 8 + i % 2);
                return of_row(bits[0] << column, bits[1] << column);
            };
            const float least = least_taken[half];
            taken[half] = words([&](float x) { return x >= least && x > -INFINITY; });
            if (__any_sync(~0u, __popcll(taken[half]) > want)) { // of those that equal the least one the first
                const uint64_t greater = words([&](float x) { return x > least; });
                uint64_t equal = taken[half] & ~greater;
                for (int missing = want - __popcll(greater); __popcll(equal) > missing;) equal &= ~(uint64_t(1) << (63 - __clzll(int64_t(equal))));
                taken[half] = greater | equal;
            }
        }
        __syncthreads(); // nobody reads means and queries any more
        clear();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int* const of = mine[lane / 4 + 8 * half];
            for (uint64_t left = taken[half] & uint64_t(0x0303030303030303) << column; left; left &= left - 1) {
                const uint64_t before = (left & -left) - 1;
                of[__popcll(taken[half] & before)] = __popcll(before);
            }
            for (int j = __popcll(taken[half]) + lane % 4; j < want; j += 4) of[j] = -1;
        }
        __syncwarp();
    };
    const auto among_many = [&] {
        float greatest[2][8], limit[2];
#pragma unroll
        for (int i = 0; i < 16; i++) greatest[i / 8][i % 8] = -INFINITY;
        each([&](int) {
#pragma unroll
            for (int i = 0; i < AT_ONCE / 2; i++) {
                float& x = greatest[i % 4 / 2][i / 4 % 4 * 2 + i % 2];
                x = fmaxf(x, score[i / 4][i % 4]);
            }
        });
        find_greatest(greatest, want, limit);
#pragma unroll
        for (int half = 0; half < 2; half++) limit[half] = own[half] ? nextafterf(limit[half], -INFINITY) : INFINITY;

        // Where the next one of each row goes.
        constexpr int NEXT = THREADS * sizeof(float), FULL = Work::MOST * NEXT, OTHER = Work::KEPT * NEXT;
        const Address begin = chunks::kept(address_of(kept.score[0][0] + threadIdx.x));
        Address next[2] = {begin, begin};
        each([&](int low) {
            const int mine = low + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < AT_ONCE / 2; i++) {
                const int c = mine + i / 4 * 8 + i % 2;
                if (i % 4 < 2) keep_greater<0, 2 * OTHER, NEXT>(next[0], score[i / 4][i % 4], limit[0], c);
                else keep_greater<OTHER, 2 * OTHER + 2, NEXT>(next[1], score[i / 4][i % 4], limit[1], c);
                if (i % 8 == 7 && max(next[0], next[1]) > begin + FULL) {
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        if (next[h] > begin + FULL) {
                            const typename Work::Left left = Work::drop(kept, h, int(next[h] - begin) / NEXT, want);
                            next[h] = begin + left.count * NEXT;
                            limit[h] = left.limit;
                        }
                }
            }
        });
        const int count[2] = {int(next[0] - begin) / NEXT, int(next[1] - begin) / NEXT};
        float all[2][Work::MOST], x[2][Work::MOST], least_taken[2];
#pragma unroll
        for (int i = 0; i < 32; i++) all[i / 16][i % 16] = x[i / 16][i % 16] = i % 16 < count[i / 16] ? kept.score[i / 16][i % 16][threadIdx.x] : -INFINITY;
        find_greatest(all, want, least_taken);
        __syncthreads(); // nobody reads means and queries any more
        clear();
        // Of those that equal the least one the first.
        unsigned taken[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned greater = 0, equal = 0;
#pragma unroll
            for (int i = 0; i < Work::MOST; i++) {
                if (x[half][i] > least_taken[half]) greater |= 1u << i;
                if (x[half][i] == least_taken[half] && x[half][i] > -INFINITY) equal |= 1u << i;
            }
            taken[half] = greater | equal;
            int both = __popc(taken[half]) << 8 | __popc(greater);
            both += __shfl_xor_sync(~0u, both, 1);
            both += __shfl_xor_sync(~0u, both, 2);
            const int missing = want - (both & 255); // of those that equal it
            if (__any_sync(~0u, both >> 8 > want)) {
                int counts_of[4];
#pragma unroll
                for (int i = 0; i < 4; i++) counts_of[i] = __shfl_sync(~0u, count[half], i, 4);
                for (int i = 0; i < count[half]; i++) {
                    if (!(equal >> i & 1)) continue;
                    const int c = kept.chunk[i][threadIdx.x][half];
                    int before = 0;
                    for (int l = 0; l < 4; l++)
                        for (int j = 0; j < counts_of[l]; j++) {
                            const int t = threadIdx.x - lane % 4 + l;
                            before += kept.score[half][j][t] == least_taken[half] && kept.chunk[j][t][half] < c;
                        }
                    if (before >= missing) taken[half] &= ~(1u << i);
                }
            }
        }
        // A row's picks come together, and into order.
#pragma unroll
        for (int i = 0; i < 8; i++) mine[2 * i + lane / 16][lane % 16] = 0x7fffffff;
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int to_place = __popc(taken[half]);
#pragma unroll
            for (int by = 1; by < 4; by *= 2) {
                const int before = __shfl_up_sync(~0u, to_place, by, 4);
                if (lane % 4 >= by) to_place += before;
            }
            for (unsigned left = taken[half]; left; left &= left - 1) mine[lane / 4 + 8 * half][--to_place] = kept.chunk[__ffs(int(left)) - 1][threadIdx.x][half];
        }
        __syncwarp();
        if (lane < 16) {
            int c[16];
#pragma unroll
            for (int i = 0; i < 16; i++) c[i] = ~mine[lane][i];
            sort(c);
#pragma unroll
            for (int i = 0; i < 16; i++) mine[lane][i] = c[i] == ~0x7fffffff ? -1 : ~c[i];
        }
        __syncwarp();
    };
    if (end <= AT_ONCE) among_few();
    else among_many();
    // Each half warp a row.
    const int slot = lane % 16;
    if (slot < want) {
        const int r0 = threadIdx.x / 32 * 16 + lane / 16;
        const int* from = mine[lane / 16] + slot;
        int* at = to + r0 * want + slot;
        unsigned* const word = reinterpret_cast<unsigned*>(sets) + r0 / 32; // of the rows in a set
        unsigned bit = 1u << r0 % 32;
#pragma unroll
        for (int i = 0; i < 8; i++, at += 2 * want, bit <<= 2) {
            const int c = from[2 * i * Work::WIDE];
            if (r0 + 2 * i < rows) *at = c;
            if (r0 + 2 * i < rows && r0 + 2 * i >= listed && c >= 0) atomicOr(word + 4 * c, bit);
        }
    }
    count_up();
}

} // namespace hopper
} // namespace chunks
#endif
