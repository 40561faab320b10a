// The heads of up to 4 sequences in a kernel whose blocks stay (program.cuh): as heads.cuh, with the second halves of the low-rank maps, which a block reads
// while it waits.
#pragma once
#include "flow.cuh"
#include "heads.cuh"
#include "mix.cuh"
#include "ring.cuh"

constexpr int MOST = 4; // sequences

// How blocks wait for each other: by a warp that has nothing else to do, beside those that work, since what it waits for would hold up their copies.
// arrived[0] counts the blocks that have come to a wait, arrived[1] those that have ended; both are 0 between two kernels.
constexpr int ALL = THREADS + 32;
struct Grid {
    // What the block has written is there for all.
    __device__ __forceinline__ static void arrive() { arrive_barrier(2, ALL); }
    // Until all blocks have arrived as often.
    __device__ __forceinline__ static void wait() { wait_barrier(3, ALL); }
    // The other warp's part: `times` waits, the first of them, if it is `free`, for nobody.
    __device__ static void serve(unsigned* arrived, int times, bool free) {
        unsigned awaited = 0;
        for (int i = 0; i < times; i++) {
            if (i || !free) {
                wait_barrier(2, ALL);
                awaited += gridDim.x;
                if (threadIdx.x == THREADS) {
                    add_release(arrived);
                    wait_for_at_least(arrived, awaited);
                }
                __syncwarp();
            }
            wait_barrier(3, ALL);
        }
        if (threadIdx.x == THREADS && atomicAdd(arrived + 1, 1u) == gridDim.x - 1) arrived[0] = arrived[1] = 0;
    }
};

struct HeadsOf {
    const float* projected; // of a sequence r, k, v, and the first halves of the low-rank maps v, w, a, g
    int stride, ends[4], kept16; // from one sequence to the next; where the rows of each map end in `up`, multiples of 8; whether the state is f16
    const void* up;              // [ends[3], C]
    Vectors vec;
    Norm norm;
    float* first;
    void *state, *wrote, *out;
};

// Brings what the block will read of the second halves near.
template <class T, int N> __device__ __forceinline__ void prefetch_heads(const HeadsOf& op, int batch, int c) {
    const int heads = c / N;
    for (int pair = blockIdx.x; pair < heads * batch; pair += gridDim.x)
        for (int j = threadIdx.x; j < op.ends[3]; j += THREADS) prefetch(static_cast<const T*>(op.up) + size_t(j) * c + pair % heads * N);
}

// Every block takes a head of a sequence at a time. `shared` has room for ends[3] + (ends[3] / 8 + 12) N
// floats. The second halves: eight threads take 8 rows of one map for 8 channels each, and the sums of all units of a map are added in order.
template <class T, int N> __device__ __forceinline__ void few_heads(const HeadsOf& op, const Flow& flow, const int* slots, int batch, int c, float* shared) {
    constexpr int LANES = N / 8, PARTS = THREADS / LANES, ROWS = 8, AHEAD = 2; // units that wait in registers
    constexpr int HALVES = 2; // first halves that a thread waits for at once
    constexpr int PER = THREADS / N < N / 4 ? THREADS / N : N / 4, COLS = N / PER; // threads of a row of the state, and columns of each
    const int count = op.ends[3], units = count / ROWS, gated = op.ends[0];
    float(*x)[N] = reinterpret_cast<float(*)[N]>(shared); // r, d, k, v, removal key z (not yet of length 1), z times the rate, terms of the bonus
    float *y = x[7], *mapped = x[8], *sums = x[12];       // [N], [4, N], [units, N]
    float* halves = sums + units * N;                     // [ends[3]]
    const int t = threadIdx.x, warp = t >> 5, heads = c / N;
    bool waited = false;
    for (int pair = blockIdx.x; pair < heads * batch; pair += gridDim.x) {
        int h = pair, b = 0;
        for (; h >= heads; h -= heads) b++;
        const int c0 = h * N, ch = c0 + t;
        // Before the wait: second halves and the state, which no operation shortly before writes.
        const T* up = static_cast<const T*>(op.up) + c0;
        const auto read = [&](uint4(&to)[ROWS], int unit) {
            const T* from = up + size_t(min(unit, units - 1) * ROWS) * c + t % LANES * 8;
#pragma unroll
            for (int p = 0; p < ROWS; p++, from += c) to[p] = load_once(from);
        };
        uint4 second[AHEAD][ROWS];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) read(second[a], t / LANES + a * PARTS);
        // PER threads have a row of the state; which four columns the e-th are of this one.
        const int i = t / PER, q = t % PER;
        const auto col = [&](int e) { return (e * PER + q) * 4; };
        const size_t row = ((size_t(slots[b]) * heads + h) * N + i) * N;
        float4 s[COLS / 4] = {};
        if (i < N)
#pragma unroll
            for (int e = 0; e < COLS / 4; e++)
                s[e] = op.kept16 ? floats(load_state(static_cast<f16*>(op.state) + row + col(e))) : load_state(static_cast<float*>(op.state) + row + col(e));
        float p[6] = {};
        if (t < N)
#pragma unroll
            for (int j = 0; j < 6; j++) p[j] = op.vec.p[j] ? op.vec.p[j][ch] : 0.f;
        if (!flow.on && !waited) Grid::wait();
        waited = true;
        const float* projected = flow.place(op.projected) + size_t(b) * op.stride;
        float r = 0.f, k = 0.f, v = 0.f, v0 = 0.f, gate = 0.f;
        if (t < N && gated) v0 = __ldcg(op.first + size_t(b) * c + ch);
#pragma unroll 1
        for (int j = t; j == t || j < count; j += HALVES * THREADS) {
            float f[HALVES];
            until([&](bool& all) {
#pragma unroll
                for (int i = 0; i < HALVES; i++)
                    if (j + i * THREADS < count) f[i] = look1(projected + 3 * c + j + i * THREADS, all);
                if (j < N) {
                    r = look1(projected + ch, all);
                    k = look1(projected + c + ch, all);
                    v = look1(projected + 2 * c + ch, all);
                }
            });
#pragma unroll
            for (int i = 0; i < HALVES; i++) {
                const int at = j + i * THREADS;
                if (at < count) halves[at] = at >= op.ends[2] ? sigmoid(f[i]) : at >= op.ends[0] && at < op.ends[1] ? tanhf(f[i]) : f[i];
            }
        }
        sync_workers();
        const auto multiply = [&](const uint4(&w)[ROWS], int unit) {
            const Vec f = load(halves + unit * ROWS);
            Vec sum = zeros();
#pragma unroll
            for (int p = 0; p < ROWS; p++) {
                const Vec v = unpack8<T>(w[p]);
                for (int e = 0; e < 8; e++) sum[e] = fmaf(f[p], v[e], sum[e]);
            }
            store(sums + unit * N + t % LANES * 8, sum);
        };
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (const int unit = t / LANES + a * PARTS; unit < units) multiply(second[a], unit);
#pragma unroll 1
        for (int unit = t / LANES + AHEAD * PARTS; unit < units; unit += PARTS) {
            read(second[0], unit);
            multiply(second[0], unit);
        }
        float weight = 0.f, bias = 0.f;
        if (t < N) weight = op.norm.p[0][ch], bias = op.norm.p[1][ch];
        sync_workers();
        for (int e = t; e < 4 * N; e += THREADS) {
            const int m = e / N;
            float all = 0.f;
#pragma unroll 4
            for (int u = m ? op.ends[m - 1] / ROWS : 0; u < op.ends[m] / ROWS; u++) all += sums[u * N + e % N];
            mapped[e] = all;
        }
        sync_workers();
        if (t < N) {
            x[1][t] = expf(-0.60653066f * sigmoid(mapped[N + t] + p[0]));
            const float rate = sigmoid(mapped[2 * N + t] + p[1]), z = k * p[3], ks = k * (1.f + (rate - 1.f) * p[4]);
            if (gated)
                v += (v0 - v) * sigmoid(mapped[t] + p[2]);
            else
                op.first[size_t(b) * c + ch] = v;
            gate = mapped[3 * N + t];
            x[0][t] = r;
            x[2][t] = ks;
            x[3][t] = v;
            x[4][t] = z;
            x[5][t] = z * rate;
            x[6][t] = r * ks * p[5];
        }
        sync_workers();
        const auto row_sum = [](float f) {
#pragma unroll
            for (int o = 1; o < PER; o *= 2) f += __shfl_xor_sync(~0u, f, o);
            return f;
        };
        const auto four = [&](int n, int e) { return *reinterpret_cast<const float4*>(&x[n][col(e)]); };
        const float inv = 1.f / fmaxf(sqrtf(each_warp_sum<N>([&](int n) { return x[4][n] * x[4][n]; })), 1e-12f);
        float u = 0.f, o = 0.f;
        if (i < N) {
#pragma unroll
            for (int e = 0; e < COLS / 4; e++) {
                const float4 a = four(4, e);
                u += s[e].x * a.x + s[e].y * a.y + s[e].z * a.z + s[e].w * a.w;
            }
        }
        // By minus the key of length 1, and back by that times the rate.
        u = row_sum(u) * -inv * inv;
        if (i < N) {
            const float vi = x[3][i];
#pragma unroll
            for (int e = 0; e < COLS / 4; e++) {
                const float4 d = four(1, e), bb = four(5, e), kk = four(2, e), rr = four(0, e);
                s[e].x = s[e].x * d.x + u * bb.x + vi * kk.x;
                s[e].y = s[e].y * d.y + u * bb.y + vi * kk.y;
                s[e].z = s[e].z * d.z + u * bb.z + vi * kk.z;
                s[e].w = s[e].w * d.w + u * bb.w + vi * kk.w;
                o += s[e].x * rr.x + s[e].y * rr.y + s[e].z * rr.z + s[e].w * rr.w;
            }
        }
        o = row_sum(o);
        if (i < N && q == 0) y[i] = o;
        sync_workers();
        if (warp * 32 < N) {
            const float mean = each_warp_sum<N>([&](int n) { return y[n]; }) / N;
            const float var = each_warp_sum<N>([&](int n) { return (y[n] - mean) * (y[n] - mean); }) / N;
            const float bonus = each_warp_sum<N>([&](int n) { return x[6][n]; });
            if (t < N) {
                T* wrote = static_cast<T*>(op.wrote);
                give(flow.place(static_cast<T*>(op.out)) + size_t(b) * c + ch, from_f32<T>(((y[t] - mean) * rsqrtf(var + 64e-5f) * weight + bias + bonus * v) * gate));
                if (wrote) {
                    wrote[size_t(b) * c + ch] = from_f32<T>(x[3][t]);
                    wrote[size_t(batch + b) * c + ch] = from_f32<T>(x[2][t]);
                }
            }
        }
        // What nobody waits for.
        if (i < N)
#pragma unroll
            for (int e = 0; e < COLS / 4; e++) {
                if (op.kept16)
                    store_state(static_cast<f16*>(op.state) + row + col(e), s[e]);
                else
                    store_state(static_cast<float*>(op.state) + row + col(e), s[e]);
            }
        // Shared memory is the next head's.
        sync_workers();
    }
    if (!flow.on && !waited) Grid::wait();
}
