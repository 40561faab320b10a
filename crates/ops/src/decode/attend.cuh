// What an attention block adds to a step: the choice of past chunks, and attention to them and to the own chunk up to the token itself. Keys, values and means of
// a sequence lie wherever they have room; where that is, and how many there are, is read from device memory, so that recorded work stays valid.
#pragma once
#include "overlap.cuh"

// What is kept of one sequence by one attention block.
struct Kept {
    void *keys, *values; // [tokens, KC]
    const float* means;  // [full chunks, KC]
    void* notes[2];      // [tokens, C]
};
struct Rule {
    int stride;       // of the projections of a sequence, which are q [C], k and v [KC] and, if it is larger, a gate for each head
    int c, kc;        // channels of queries; of keys
    int group;        // heads of queries that share one of keys
    int blocks;       // attention blocks
    int size, want;   // tokens of a chunk; past chunks that are seen at most
    int notes;        // 0, 1: the query, 2: value and key that the RWKV-7 block before wrote
    int sink, window; // first and last chunks of the past that are always seen
};

// A chunk with its score; one that there isn't is -1.
struct Candidate {
    float score;
    int chunk;
};

constexpr int CHOOSE_THREADS = 256;
constexpr int SCORED = 1024;   // chunks that are ordered at a time
constexpr int MOST_WANTED = 256;
constexpr int LEAST_SHARE = 128; // chunks that are worth a block of their own

// Puts the `want` best of `n` candidates to `best`, the greatest score first, of equal ones the lower chunk: by counting how many go before each.
__device__ __forceinline__ void order(const Candidate* list, int n, int want, Candidate* best) {
    for (int i = threadIdx.x; i < want; i += CHOOSE_THREADS) best[i] = {-INFINITY, -1};
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += CHOOSE_THREADS) {
        const Candidate mine = list[i];
        int before = 0;
#pragma unroll 4
        for (int j = 0; j < n; j++) before += list[j].score > mine.score || (list[j].score == mine.score && list[j].chunk < mine.chunk);
        if (before < want) best[before] = mine;
    }
    __syncthreads();
}

// picks [batch, heads, want]: the past chunks of the token at position positions[b], -1 where there are fewer; its key, value and notes are put to the others.
// blockIdx = (share of the chunks, head, sequence). found [batch, heads, shares, want]; ended [batch, heads] zeros before and after. wrote [2, batch, C].
template <class T, int N>
__device__ void choose(const float* projected, const T* wrote, const Kept* all, const int* slots, const int* positions, Candidate* found,
                       unsigned* ended, int* picks, Rule r) {
    constexpr int LANES = N / 4, GROUPS = CHOOSE_THREADS / LANES;
    __shared__ Candidate list[SCORED + MOST_WANTED], best[MOST_WANTED];
    __shared__ unsigned last;
    let_next_start();
    const int share = blockIdx.x, h = blockIdx.y, b = blockIdx.z, t = threadIdx.x, head = b * gridDim.y + h;
    const int at = positions[b], own = at / r.size;
    const Kept kept = all[size_t(slots[b]) * r.blocks];
    const bool scoring = own > r.want && r.want > 0;
    const int width = max(LEAST_SHARE, (own + int(gridDim.x) - 1) / int(gridDim.x)), shares = scoring ? (own + width - 1) / width : 1;
    if (share >= shares) return;
    const int first = share * width, end = scoring ? min(own, first + width) : first;
    const int key_head = h / r.group * N;
    const float* means = kept.means + key_head;
    for (int i = first + t / LANES; i < end; i += GROUPS)
        if (t % LANES % 8 == 0) prefetch(means + size_t(i) * r.kc + t % LANES * 4);
    wait_for_previous();
    projected += size_t(b) * r.stride;
    if (share == 0 && t < N && h % r.group == 0) {
        const size_t to = size_t(at) * r.kc + key_head + t;
        static_cast<T*>(kept.keys)[to] = from_f32<T>(__ldcg(projected + r.c + key_head + t));
        static_cast<T*>(kept.values)[to] = from_f32<T>(__ldcg(projected + r.c + r.kc + key_head + t));
    }
    projected += h * N;
    if (share == 0 && t < N) {
        const size_t to = size_t(at) * r.c + h * N + t;
        if (r.notes == 1) static_cast<T*>(kept.notes[0])[to] = from_f32<T>(__ldcg(projected + t));
        for (int i = 0; i < 2 && r.notes == 2; i++)
            static_cast<T*>(kept.notes[i])[to] = from_f32<T>(load_fresh_one(wrote + size_t(i * gridDim.z + b) * r.c + h * N + t));
    }
    picks += size_t(head) * r.want;
    if (!scoring) {
        for (int i = t; i < r.want; i += CHOOSE_THREADS) picks[i] = i < own ? i : -1;
        return;
    }
    const int lane = t % LANES, group = t / LANES;
    float q[4];
#pragma unroll
    for (int j = 0; j < 4; j++) q[j] = to_f32(from_f32<T>(__ldcg(projected + lane * 4 + j)));
    int have = 0; // the best so far, at the beginning of the list
    const auto take = [&](int n) {
        __syncthreads();
        order(list, have + n, r.want, best);
        have = min(r.want, have + n);
        for (int i = t; i < have; i += CHOOSE_THREADS) list[i] = best[i];
    };
    for (int low = first; low < end; low += SCORED) {
        const int n = min(SCORED, end - low);
#pragma unroll 4
        for (int i0 = 0; i0 < n; i0 += GROUPS) {
            const int i = i0 + group;
            float4 m = make_float4(0.f, 0.f, 0.f, 0.f);
            if (i < n) m = __ldcg(reinterpret_cast<const float4*>(means + size_t(low + i) * r.kc) + lane);
            float s = q[0] * m.x + q[1] * m.y + q[2] * m.z + q[3] * m.w;
#pragma unroll
            for (int o = LANES / 2; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
            const bool always = low + i < r.sink || low + i + r.window >= own;
            if (lane == 0 && i < n) list[have + i] = {always ? INFINITY : s, low + i};
        }
        take(n);
    }
    if (shares > 1) {
        Candidate* to = found + size_t(head) * gridDim.x * r.want;
        for (int i = t; i < r.want; i += CHOOSE_THREADS) {
            const Candidate c = i < have ? best[i] : Candidate{-INFINITY, -1};
            __stcg(reinterpret_cast<float2*>(to + share * r.want + i), make_float2(c.score, __int_as_float(c.chunk)));
        }
        __threadfence();
        __syncthreads();
        if (t == 0) last = atomicAdd(ended + head, 1u) == unsigned(shares - 1);
        __syncthreads();
        if (!last) return;
        __threadfence();
        if (t == 0) ended[head] = 0;
        have = 0;
        for (int low = 0; low < shares * r.want; low += SCORED) {
            const int n = min(SCORED, shares * r.want - low);
            for (int i = t; i < n; i += CHOOSE_THREADS) {
                const float2 c = __ldcg(reinterpret_cast<const float2*>(to + low + i));
                list[have + i] = {c.x, __float_as_int(c.y)};
            }
            take(n);
        }
    }
    for (int i = t; i < r.want; i += CHOOSE_THREADS) picks[i] = i < have ? best[i].chunk : -1;
}

constexpr int ATTEND_WARPS = 4;
constexpr int KEYS = 16; // that a warp takes at a time

// out [batch, C] = attention of the token at position positions[b] to what `choose` gave it and to its own chunk. blockIdx = (share of the keys, head, sequence).
// parts [batch, heads, shares, N + 2]: sums, maximum and total of each share, which the block that ends last merges in their order; ended as above.
//
// N / 8 lanes have a key: a warp takes 32 / (N / 8) keys with one load, and each of these columns of lanes has its own running maximum.
template <class T, int N>
__device__ void attend(const float* projected, const Kept* all, const int* slots, const int* positions, const int* picks, float* parts,
                       unsigned* ended, T* out, Rule r) {
    constexpr int LANES = N / 8, ROWS_ = 32 / LANES, LOADS = KEYS / ROWS_;
    __shared__ float sums[ATTEND_WARPS][N], tops[ATTEND_WARPS], totals[ATTEND_WARPS];
    __shared__ unsigned last;
    let_next_start();
    const int h = blockIdx.y, b = blockIdx.z, t = threadIdx.x, warp = t >> 5, lane = t & 31, head = b * gridDim.y + h;
    const int at = positions[b], own = at / r.size, first_own = own * r.size, channel = lane % LANES * 8;
    const Kept kept = all[size_t(slots[b]) * r.blocks];
    const int key_head = h / r.group * N;
    const T *keys = static_cast<const T*>(kept.keys) + key_head, *values = static_cast<const T*>(kept.values) + key_head;
    const int own_tiles = (at - first_own) / KEYS + 1, chunk_tiles = (r.size - 1) / KEYS + 1, seen = min(own, r.want);
    const int step = gridDim.x * ATTEND_WARPS, begin = blockIdx.x * ATTEND_WARPS + warp;
    // Those of the own chunk come first: they are known before the choice is.
    for (int i = begin; i < own_tiles; i += step) {
        const int row = first_own + i * KEYS + lane / 2;
        if (row < at) prefetch((lane % 2 ? values : keys) + size_t(row) * r.kc);
    }
    wait_for_previous();
    Vec q = load_fresh(projected + size_t(b) * r.stride + h * N + channel);
    const float scale = rsqrtf(float(N)) * 1.44269504f;
#pragma unroll
    for (int j = 0; j < 8; j++) q[j] = to_f32(from_f32<T>(q[j])) * scale;
    picks += size_t(head) * r.want;
    float top = -INFINITY, total = 0.f;
    Vec sum = zeros();
    const int tiles = own_tiles + seen * chunk_tiles;
    for (int i = begin; i < tiles; i += step) {
        int row = first_own + i * KEYS, stop = at + 1;
        if (i >= own_tiles) {
            const int chunk = __ldcg(picks + (i - own_tiles) / chunk_tiles);
            if (chunk < 0) continue;
            row = chunk * r.size + (i - own_tiles) % chunk_tiles * KEYS;
            stop = (chunk + 1) * r.size;
        }
        uint4 k[LOADS], v[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            const int mine = row + j * ROWS_ + lane / LANES;
            k[j] = v[j] = make_uint4(0, 0, 0, 0);
            if (mine < stop) {
                k[j] = __ldcg(reinterpret_cast<const uint4*>(keys + size_t(mine) * r.kc + channel));
                v[j] = __ldcg(reinterpret_cast<const uint4*>(values + size_t(mine) * r.kc + channel));
            }
        }
        float s[LOADS], most = top;
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            const Vec x = unpack8<T>(k[j]);
            s[j] = 0.f;
#pragma unroll
            for (int e = 0; e < 8; e++) s[j] = fmaf(q[e], x[e], s[j]);
#pragma unroll
            for (int o = LANES / 2; o; o >>= 1) s[j] += __shfl_xor_sync(~0u, s[j], o);
            if (row + j * ROWS_ + lane / LANES >= stop) s[j] = -INFINITY;
            most = fmaxf(most, s[j]);
        }
        // A column of lanes may have seen no key yet.
        const float base = most == -INFINITY ? 0.f : most, keep = exp2_fast(top - base);
        top = most;
        total *= keep;
#pragma unroll
        for (int e = 0; e < 8; e++) sum[e] *= keep;
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            const float p = exp2_fast(s[j] - base);
            const Vec x = unpack8<T>(v[j]);
            total += p;
#pragma unroll
            for (int e = 0; e < 8; e++) sum[e] = fmaf(p, x[e], sum[e]);
        }
    }
    __syncwarp();
    // Columns of lanes, warps, shares.
    float most = top;
#pragma unroll
    for (int o = LANES; o < 32; o *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    const float factor = top == -INFINITY ? 0.f : exp2_fast(top - most);
    total *= factor;
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] *= factor;
#pragma unroll
    for (int o = LANES; o < 32; o *= 2) {
        total += __shfl_xor_sync(~0u, total, o);
#pragma unroll
        for (int e = 0; e < 8; e++) sum[e] += __shfl_xor_sync(~0u, sum[e], o);
    }
    if (lane < LANES) store(&sums[warp][channel], sum);
    if (lane == 0) tops[warp] = most, totals[warp] = total;
    __syncthreads();
    const auto weight = [](float part, float all) { return part == -INFINITY ? 0.f : exp2_fast(part - all); };
    parts += size_t(head) * gridDim.x * (N + 2);
    if (t < N) {
        float m = -INFINITY, l = 0.f, o = 0.f;
#pragma unroll
        for (int i = 0; i < ATTEND_WARPS; i++) m = fmaxf(m, tops[i]);
#pragma unroll
        for (int i = 0; i < ATTEND_WARPS; i++) {
            const float w = weight(tops[i], m);
            l += totals[i] * w;
            o += sums[i][t] * w;
        }
        float* to = parts + blockIdx.x * (N + 2);
        __stcg(to + t, o);
        if (t == 0) __stcg(to + N, m), __stcg(to + N + 1, l);
    }
    __threadfence();
    __syncthreads();
    if (t == 0) last = atomicAdd(ended + head, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (t == 0) ended[head] = 0;
    if (t >= N) return;
    float m = -INFINITY, l = 0.f, o = 0.f;
#pragma unroll 8
    for (int i = 0; i < gridDim.x; i++) m = fmaxf(m, __ldcg(parts + i * (N + 2) + N));
#pragma unroll 8
    for (int i = 0; i < gridDim.x; i++) {
        const float* from = parts + i * (N + 2);
        const float w = weight(__ldcg(from + N), m);
        l += __ldcg(from + N + 1) * w;
        o += __ldcg(from + t) * w;
    }
    const int before = r.c + 2 * r.kc;
    const float gate = r.stride > before ? sigmoid(to_f32(from_f32<T>(__ldcg(projected + size_t(b) * r.stride + before + h)))) : 1.f;
    out[size_t(b) * r.c + h * N + t] = from_f32<T>(o / l * gate);
}
