// Means of chunks, and the choice of chunks by them.
//
// A block has 128 queries of a head, a thread each. Scores come for 32 chunks at a time, on tensor cores in 16 bits: queries are exact, means in two parts.
// A thread marks those above its worst pick, then takes the marked ones, in ascending order, into a sorted list in registers: what displaces
// must be greater, so that of equal scores the lower chunk stays. What is always picked has a score above all.
#pragma once
#include "lists.cuh"

namespace chunks {

constexpr int MEANS = 64; // chunks whose means lie together for Hopper

// The number of the tile of means that a chunk of a sequence is in: at most p.chunks / MEANS + p.count for each head of keys.
__device__ __forceinline__ int tile_of_means(const Plan& p, const Sequence& s, int c, int key_head) {
    return key_head * (p.chunks / MEANS + p.count) + s.chunk_base / MEANS + int(&s - p.sequences) + c / MEANS;
}

// A block a chunk and head of keys; rows in a fixed order that depends on the block's threads alone. What is known is left. If so wanted also as two parts,
// [chunks, key_heads, 2, n], where what isn't full becomes zero; or, for heads of 64, in tiles [key_heads, tiles, 2, MEANS, 64] as products want them (see product.cuh).
template <class T> __device__ void means(const Plan& p, T* parts, int n, bool in_tiles) {
    const Sequence& s = sequence_of<&Sequence::chunk_base>(p, blockIdx.x);
    const int c = int(blockIdx.x) - s.chunk_base;
    const bool full = (c + 1) * p.size <= s.past + s.len, known = c < s.known;
    __shared__ float sums[32][128];
    float* to = s.means + (size_t(c) * p.key_heads + blockIdx.y) * n;
    if (full && !known) {
        const int lanes = n / 8, col = threadIdx.x % lanes * 8, step = blockDim.x / lanes;
        const T* keys = static_cast<const T*>(s.keys) + (size_t(c) * p.size * p.key_heads + blockIdx.y) * n + col;
        Vec sum = zeros();
#pragma unroll 8
        for (int row = threadIdx.x / lanes; row < p.size; row += step) {
            const Vec x = load(keys + size_t(row) * p.key_heads * n);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += x[j];
        }
        for (int o = 16; o >= lanes; o /= 2)
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += __shfl_xor_sync(~0u, sum[j], o);
        if ((threadIdx.x & 31) < lanes)
#pragma unroll
            for (int j = 0; j < 8; j++) sums[threadIdx.x / 32][col + j] = sum[j];
        __syncthreads();
    }
    if (threadIdx.x >= n) return;
    float mean = 0.f;
    if (known) {
        mean = to[threadIdx.x];
    } else if (full) {
        for (int i = 0; i < blockDim.x / 32; i++) mean += sums[i][threadIdx.x];
        mean /= float(p.size);
        to[threadIdx.x] = mean;
    }
    if (!parts) return;
    T* two = in_tiles ? parts + size_t(tile_of_means(p, s, c, blockIdx.y)) * 2 * MEANS * 64 + c % MEANS * 64 + (threadIdx.x ^ c % 8 * 8)
                      : parts + (size_t(blockIdx.x) * p.key_heads + blockIdx.y) * 2 * n + threadIdx.x;
    const T high = from_f32<T>(mean);
    two[0] = high;
    two[in_tiles ? MEANS * 64 : n] = from_f32<T>(mean - to_f32(high));
}

// The K best of what comes, best first; the slots in front of `first` are out of use.
template <int K> struct Best {
    float score[K];
    int chunk[K];
    __device__ __forceinline__ Best(int first) {
#pragma unroll
        for (int j = 0; j < K; j++) {
            score[j] = j < first ? INFINITY : -INFINITY;
            chunk[j] = j < first ? 0x7fffffff : -1;
        }
    }
    __device__ __forceinline__ float worst() const { return score[K - 1]; }
    __device__ __forceinline__ void insert(float s, int c) {
#pragma unroll
        for (int j = K - 1; j > 0; j--) {
            const bool here = s > score[j], above = s > score[j - 1];
            chunk[j] = above ? chunk[j - 1] : here ? c : chunk[j];
            score[j] = fmaxf(score[j], fminf(s, score[j - 1]));
        }
        if (s > score[0]) {
            score[0] = s;
            chunk[0] = c;
        }
    }
    // Chunks in ascending order, those that are missing last.
    __device__ __forceinline__ void sort() {
#pragma unroll
        for (int j = 0; j < K; j++)
            if (chunk[j] < 0) chunk[j] = 0x7fffffff;
#pragma unroll
        for (int round = 0; round < K; round++)
#pragma unroll
            for (int j = round % 2; j + 1 < K; j += 2) {
                const int a = min(chunk[j], chunk[j + 1]), b = max(chunk[j], chunk[j + 1]);
                chunk[j] = a;
                chunk[j + 1] = b;
            }
    }
};

// The K greatest of what comes, greatest first; `first` of them are out of use.
template <int K> struct Greatest {
    float score[K];
    __device__ __forceinline__ Greatest(int first) {
#pragma unroll
        for (int j = 0; j < K; j++) score[j] = j < first ? INFINITY : -INFINITY;
    }
    __device__ __forceinline__ void insert(float s) {
#pragma unroll
        for (int j = K - 1; j > 0; j--) score[j] = fmaxf(score[j], fminf(s, score[j - 1]));
        score[0] = fmaxf(score[0], s);
    }
};

constexpr int AT_ONCE = 32; // chunks that are scored at a time

// Scores in f32 on CUDA cores, by each thread for its query.
template <class T> struct ExactScores {
    const Plan& p;
    const Sequence& s;
    const T* q;
    int n;
    float (*scores)[QUERIES + 4];

    __device__ __forceinline__ void begin(int) {}
    __device__ __forceinline__ void score(int low, int end) {
        for (int c = low; q && c < min(low + AT_ONCE, end); c++) {
            const float* mean = s.means + (size_t(c) * p.key_heads + blockIdx.y / p.share) * n;
            float sum = 0.f;
            for (int i = 0; i < n; i += 8) {
                const Vec x = load(q + i), m = load(mean + i);
#pragma unroll
                for (int j = 0; j < 8; j++) sum += x[j] * m[j];
            }
            scores[c - low][threadIdx.x] = sum;
        }
    }
};

// Scores on tensor cores: a warp's 32 queries against 32 chunks.
template <class T, int N> struct TensorScores {
    static constexpr int PITCH = N + 8, STAGE = 2 * AT_ONCE * PITCH;
    const Plan& p;
    const Sequence& s;
    const T *q, *parts; // of the block's first query; of the sequence's chunk 0 and the key head
    int rows;           // queries
    float (*scores)[QUERIES + 4];
    T* tiles; // two stages of means; before them the queries come here
    uint32_t a[2][N / 16][4];

    // A thread copies a vector of every (QUERIES / (N / 4))th chunk's mean, of one of its parts.
    __device__ __forceinline__ void fetch(int low, int end) {
        constexpr int V = N / 8, STEP = QUERIES / (2 * V);
        const int first = threadIdx.x / (2 * V), half = threadIdx.x / V % 2, col = threadIdx.x % V * 8, stride = p.key_heads * 2 * N;
        const T* from = parts + size_t(low + first) * stride + half * N + col;
        T* to = tiles + low / AT_ONCE % 2 * STAGE + (half * AT_ONCE + first) * PITCH + col;
#pragma unroll
        for (int c = 0; c < AT_ONCE; c += STEP) {
            const bool valid = low + first + c < end;
            copy_async(to + c * PITCH, valid ? from : parts, valid);
            from += size_t(STEP) * stride;
        }
        copy_commit();
    }
    __device__ __forceinline__ void begin(int end) {
        for (int i = threadIdx.x; i < QUERIES * N / 8; i += QUERIES) {
            const int row = i / (N / 8), col = i % (N / 8) * 8;
            copy_async(tiles + row * PITCH + col, q + (row < rows ? size_t(row) * p.heads * N + col : 0), row < rows);
        }
        copy_commit();
        copy_wait<0>();
        __syncthreads();
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int k = 0; k < N / 16; k++) load_tiles(a[m][k], by_rows<PITCH>(tiles, (threadIdx.x >> 5) * 32 + 16 * m, 16 * k));
        __syncthreads();
        fetch(0, end);
    }
    __device__ __forceinline__ void score(int low, int end) {
        copy_wait<0>();
        __syncthreads();
        if (low + AT_ONCE < end) fetch(low + AT_ONCE, end);
        const T* tile = tiles + low / AT_ONCE % 2 * STAGE;
        const int lane = threadIdx.x & 31;
        float* to = &scores[2 * (lane & 3)][(threadIdx.x >> 5) * 32 + (lane >> 2)];
#pragma unroll
        for (int j = 0; j < AT_ONCE / 16; j++) {
            float c[2][2][4] = {};
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int k = 0; k < N / 16; k++) {
                    uint32_t b[4];
                    load_tiles(b, by_columns<PITCH>(tile, part * AT_ONCE + 16 * j, 16 * k));
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        mma<T>(c[m][0], a[m][k], b[0], b[1]);
                        mma<T>(c[m][1], a[m][k], b[2], b[3]);
                    }
                }
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int m = i / 8, half = i / 4 % 2, e = i % 4;
                to[(16 * j + 8 * half + e % 2) * (QUERIES + 4) + 16 * m + 8 * (e / 2)] = c[m][half][e];
            }
        }
        __syncwarp(); // a warp's queries are its threads'
    }
};

// The sets of the block's queries that chose each chunk, if so wanted, become a run's counts (see lists.cuh).
struct Chosen {
    Set* sets; // null: not wanted
    int* counts;
    __device__ __forceinline__ void begin(const Sequence& s) const {
        __syncthreads();
        for (int c = threadIdx.x; sets && c < s.chunks; c += QUERIES) sets[c] = make_uint4(0, 0, 0, 0);
        __syncthreads();
    }
    // This thread's query, which is listed or not, chose a chunk.
    __device__ __forceinline__ void add(bool listed, int c) const {
        if (listed) put(sets, c, threadIdx.x);
    }
    __device__ __forceinline__ bool lists(const Plan& p, int position) const { return sets && position >= p.dense; }
    __device__ __forceinline__ void end(const Plan& p, const Sequence& s, int run) const {
        __syncthreads();
        for (int c = threadIdx.x; sets && c < s.chunks; c += QUERIES)
            counts[size_t(blockIdx.y) * p.counts + s.count_base + size_t(run) * s.chunks + c] = size_of(sets[c]);
    }
};

// picks [heads, rows, slots - 1]: K at a time, each time those after the last one of the time before.
template <int K, class Scores> __device__ __forceinline__ void select(const Plan& p, Scores& from, const Sequence& s, int first, int* picks, const Chosen& chosen) {
    const int want = p.slots - 1, i = first + threadIdx.x;
    const int own = i < s.len ? (s.past + i) / p.size : 0, end = (s.past + min(first + QUERIES, s.len) - 1) / p.size;
    const bool listed = chosen.lists(p, s.past + i);
    int* to = picks + (size_t(blockIdx.y) * p.rows + s.first_row + i) * want;
    if (end <= want) { // all that is past
        for (int j = 0; i < s.len && j < want; j++) {
            to[j] = j < own ? j : -1;
            if (j < own) chosen.add(listed, j);
        }
        return;
    }
    float before = INFINITY;
    int before_chunk = -1;
    for (int done = 0; done < want; done += K) {
        const int count = min(K, want - done);
        Best<K> best(K - count);
        from.begin(end);
        for (int low = 0; low < end; low += AT_ONCE) {
            from.score(low, end);
            for (int c = low; c < min(low + AT_ONCE, p.sink); c++) from.scores[c - low][threadIdx.x] = INFINITY;
            for (int c = max(low, own - p.window); c < min(low + AT_ONCE, own); c++) from.scores[c - low][threadIdx.x] = INFINITY;
            const float worst = best.worst();
            unsigned marked = 0;
            const int mine = min(AT_ONCE, own - low);
#pragma unroll
            for (int c = 0; c < AT_ONCE; c++) {
                const float x = from.scores[c][threadIdx.x];
                bool in = c < mine && x > worst;
                if (done) in = in && (x < before || (x == before && low + c > before_chunk));
                if (in) marked |= 1u << c;
            }
            while (__any_sync(~0u, marked != 0)) {
                const int c = __ffs(int(marked)) - 1;
                if (marked) best.insert(from.scores[c][threadIdx.x], low + c);
                marked &= marked - 1;
            }
        }
        before = best.worst();
        before_chunk = best.chunk[K - 1] < 0 ? 0x7fffffff : best.chunk[K - 1];
        best.sort();
#pragma unroll
        for (int j = 0; j < K; j++)
            if (i < s.len && j < count) {
                const bool real = best.chunk[j] != 0x7fffffff;
                to[done + j] = real ? best.chunk[j] : -1;
                if (real) chosen.add(listed, best.chunk[j]);
            }
        if (done + K < want) __syncthreads();
    }
    if (want <= K || i >= s.len) return;
    for (int j = 1; j < want; j++) { // by insertion; a missing one is the greatest
        const unsigned x = to[j];
        int k = j;
        for (; k > 0 && unsigned(to[k - 1]) > x; k--) to[k] = to[k - 1];
        to[k] = int(x);
    }
}

constexpr int CANDIDATES = 24; // that a query keeps at most
struct Candidates {
    float score[CANDIDATES][QUERIES];
    uint16_t chunk[CANDIDATES][QUERIES];
};

// The same for at most K picks. A thread has the best scores in registers, and beside them, in ascending order of chunks, those that were among the best when they
// came; when these are many they are looked through.
template <int K, class Scores>
__device__ __forceinline__ void select_few(const Plan& p, Scores& from, const Sequence& s, int first, int* picks, const Chosen& chosen, Candidates& kept) {
    const int want = p.slots - 1, i = first + threadIdx.x;
    const int own = i < s.len ? (s.past + i) / p.size : 0, end = (s.past + min(first + QUERIES, s.len) - 1) / p.size;
    const bool listed = chosen.lists(p, s.past + i);
    int* to = picks + (size_t(blockIdx.y) * p.rows + s.first_row + i) * want;
    if (end <= want) { // all that is past
        chosen.begin(s);
        for (int j = 0; i < s.len && j < want; j++) {
            to[j] = j < own ? j : -1;
            if (j < own) chosen.add(listed, j);
        }
        return;
    }
    Greatest<K> best(K - want);
    int count = 0;
    // Leaves those that are among the best still: what is above the worst one, and of what equals it the first.
    const auto look_through = [&] {
        const float worst = best.score[K - 1];
        int equal = want, left = 0;
#pragma unroll
        for (int j = 0; j < K; j++)
            if (j >= K - want && best.score[j] > worst) equal--;
#pragma unroll 4
        for (int j = 0; j < CANDIDATES; j++) {
            const float x = kept.score[j][threadIdx.x];
            const uint16_t c = kept.chunk[j][threadIdx.x];
            kept.score[left][threadIdx.x] = x;
            kept.chunk[left][threadIdx.x] = c;
            const bool same = x == worst && equal > 0, stays = j < count && (x > worst || same);
            equal -= same;
            left += stays;
        }
        count = left;
    };
    from.begin(end);
    for (int low = 0; low < end; low += AT_ONCE) {
        from.score(low, end);
        if (p.sink + p.window > 0) {
            for (int c = low; c < min(low + AT_ONCE, p.sink); c++) from.scores[c - low][threadIdx.x] = INFINITY;
            for (int c = max(low, own - p.window); c < min(low + AT_ONCE, own); c++) from.scores[c - low][threadIdx.x] = INFINITY;
        }
        const float worst = best.score[K - 1];
        unsigned marked = 0;
#pragma unroll
        for (int c = 0; c < AT_ONCE; c++)
            if (from.scores[c][threadIdx.x] > worst) marked |= 1u << c;
        if (own - low < AT_ONCE) marked &= own > low ? (1u << (own - low)) - 1 : 0;
        while (__any_sync(~0u, marked != 0)) {
            const int c = __clz(__brev(marked)) & 31;
            const float x = marked ? from.scores[c][threadIdx.x] : -INFINITY;
            best.insert(x);
            kept.score[count][threadIdx.x] = x;
            kept.chunk[count][threadIdx.x] = uint16_t(low + c);
            count += marked && x >= best.score[K - 1];
            marked &= marked - 1;
            if (__any_sync(~0u, count == CANDIDATES)) look_through();
        }
    }
    look_through();
    chosen.begin(s); // where scores were
    for (int j = 0; i < s.len && j < want; j++) {
        const int c = j < count ? kept.chunk[j][threadIdx.x] : -1;
        to[j] = c;
        if (c >= 0) chosen.add(listed, c);
    }
}

template <class T, int K> __device__ void select_exact(const Plan& p, const T* q, int* picks, int n) {
    __shared__ float scores[AT_ONCE][QUERIES + 4];
    const Sequence& s = sequence_of<&Sequence::query_base>(p, blockIdx.x);
    const int first = (int(blockIdx.x) - s.query_base) * QUERIES, i = first + threadIdx.x;
    ExactScores<T> from{p, s, i < s.len ? q + (size_t(s.first_row + i) * p.heads + blockIdx.y) * n : nullptr, n, scores};
    select<K>(p, from, s, first, picks, Chosen{nullptr, nullptr});
}

// With few chunks, if counts is given, also those of the runs.
template <class T, int N, int K, bool FEW> __device__ void select_tensor(const Plan& p, const T* q, const T* parts, int* picks, int* counts) {
    DYNAMIC_SHARED(memory);
    const int block = gridDim.x - 1 - blockIdx.x; // later queries have more to do
    const Sequence& s = sequence_of<&Sequence::query_base>(p, block);
    const int first = (block - s.query_base) * QUERIES;
    auto* scores = reinterpret_cast<float(*)[QUERIES + 4]>(memory);
    T* tiles = reinterpret_cast<T*>(memory + sizeof(float) * AT_ONCE * (QUERIES + 4));
    unsigned char* rest = reinterpret_cast<unsigned char*>(tiles + QUERIES * (N + 8));
    Candidates* kept = reinterpret_cast<Candidates*>(rest);
    const Chosen chosen{counts ? reinterpret_cast<Set*>(FEW ? memory : rest) : nullptr, counts};
    TensorScores<T, N> from{p, s, vector_of<N>(p, q, s.first_row + first, blockIdx.y), parts + (size_t(s.chunk_base) * p.key_heads + blockIdx.y / p.share) * 2 * N, s.len - first, scores, tiles};
    if constexpr (FEW) {
        select_few<K>(p, from, s, first, picks, chosen, *kept);
    } else {
        chosen.begin(s);
        select<K>(p, from, s, first, picks, chosen);
    }
    chosen.end(p, s, block - s.query_base);
}

} // namespace chunks
