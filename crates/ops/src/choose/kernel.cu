// A token for each of some rows of logits [rows, vocab], f32; one block per row.
//
// A token's distance d is how far its logit is below the largest one, times `before`; its weight is exp(-d). Weights are summed as integers, of which 2^40 is 1,
// so that the order of sums changes nothing. The cut of top-p is found by the sums of weights in 2048 classes of d, and again within the class where it lies, which tells
// tokens apart whose logits differ by 2^-18.
#include "common.cuh"

typedef unsigned long long u64;

// As the host writes it.
struct Draw {
    float before, after;  // Powers of the probabilities before and after the cuts.
    float top_p;          // 1: no cut.
    float reach;          // Greatest d.
    u64 random;           // Uniform; which token of those left.
    int row;              // Of the logits.
    int greedy;           // The first of the most probable, whatever else is said.
};

constexpr int THREADS = 1024, WARPS = THREADS / 32, CLASSES = 2048;
constexpr float CLASS = 128.f;  // Classes of a distance of 1.
constexpr float FAR = CLASSES / CLASS;

__device__ u64 weight(float d) { return u64(__expf(-d) * 1099511627776.f); }

// Inclusive sums over a warp.
__device__ u64 warp_scan(u64 v) {
    for (int o = 1; o < 32; o *= 2) {
        const u64 below = __shfl_up_sync(~0u, v, o);
        if (int(threadIdx.x & 31) >= o) v += below;
    }
    return v;
}

// Over all threads: the inclusive sum at this one, and all in `total`. `sums` [WARPS] is scratch.
__device__ u64 block_scan(u64 v, u64* sums, u64& total) {
    const int warp = threadIdx.x >> 5;
    v = warp_scan(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 31) sums[warp] = v;
    __syncthreads();
    u64 before = 0;
    total = 0;
    for (int i = 0; i < WARPS; i++) {
        if (i < warp) before += sums[i];
        total += sums[i];
    }
    return v + before;
}

// The class at which the sums of weights reach `need`, and the sum before it in `before`; -1 if they don't.
__device__ int reaches(const u64* classes, u64 need, u64& before, u64* sums, int* found, u64* found_before) {
    const u64 first = classes[2 * threadIdx.x], second = classes[2 * threadIdx.x + 1];
    if (threadIdx.x == 0) *found = -1;
    u64 total;
    const u64 end = block_scan(first + second, sums, total), start = end - first - second;
    if (start < need && need <= end) {
        const bool in_first = need <= start + first;
        *found = 2 * threadIdx.x + (in_first ? 0 : 1);
        *found_before = start + (in_first ? 0 : first);
    }
    __syncthreads();
    before = *found_before;
    return *found;
}

// tokens[i] = the token that draws[i] chooses, -1 if a logit is no finite number.
extern "C" __global__ void __launch_bounds__(THREADS) choose(const float* logits, const Draw* draws, int* tokens, int vocab) {
    __shared__ u64 classes[CLASSES], sums[WARPS], found_before;
    __shared__ float maxima[WARPS];
    __shared__ int places[WARPS], strange, found;
    const Draw draw = draws[blockIdx.x];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    logits += size_t(draw.row) * vocab;

    // The largest logit, and the first place where it is.
    if (threadIdx.x == 0) strange = 0;
    __syncthreads();
    float max = -INFINITY;
    int place = vocab;
    bool finite = true;
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const float v = logits[i];
        finite &= isfinite(v);
        if (v > max) max = v, place = i;
    }
    if (!finite) strange = 1;
    const auto larger = [&](float v, int at) {
        if (v > max || (v == max && at < place)) max = v, place = at;
    };
    for (int o = 16; o; o /= 2) {
        const float v = __shfl_xor_sync(~0u, max, o);
        const int at = __shfl_xor_sync(~0u, place, o);
        larger(v, at);
    }
    if (lane == 0) maxima[warp] = max, places[warp] = place;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) larger(maxima[i], places[i]);
    if (strange || draw.greedy) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = strange ? -1 : place;
        return;
    }

    // Tokens stay whose fine class is at most `cut`.
    const auto distance = [&](int i) { return (max - logits[i]) * draw.before; };
    const auto fine = [&](float d) { return int(fminf(d, 8000.f) * (CLASS * CLASSES)); };
    int cut = 0x7fffffff;
    if (draw.top_p < 1.f) {
        u64 mine = 0, total, before = 0;
        for (int i = threadIdx.x; i < CLASSES; i += THREADS) classes[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < vocab; i += THREADS) {
            const float d = distance(i);
            const u64 w = weight(d);
            mine += w;
            if (d < FAR) atomicAdd(&classes[fine(d) / CLASSES], w);
        }
        block_scan(mine, sums, total);
        u64 need = u64(ceil(double(draw.top_p) * double(total)));
        need = need > 1 ? need : 1;
        const int rough = reaches(classes, need, before, sums, &found, &found_before);
        if (rough >= 0) {
            __syncthreads();
            for (int i = threadIdx.x; i < CLASSES; i += THREADS) classes[i] = 0;
            __syncthreads();
            for (int i = threadIdx.x; i < vocab; i += THREADS) {
                const float d = distance(i);
                const int at = fine(d);
                if (d < FAR && at / CLASSES == rough) atomicAdd(&classes[at % CLASSES], weight(d));
            }
            __syncthreads();
            cut = rough * CLASSES + reaches(classes, need - before, before, sums, &found, &found_before);
        }
    }

    // Each warp has a stretch of the vocabulary.
    const int stretch = (vocab + THREADS - 1) / THREADS * 32;
    const auto left = [&](int i) -> u64 {
        if (i >= vocab) return 0;
        const float d = distance(i);
        return d <= draw.reach && fine(d) <= cut ? weight(d * draw.after) : 0;
    };
    u64 mine = 0;
    for (int i = warp * stretch + lane; i < (warp + 1) * stretch; i += 32) mine += left(i);
    for (int o = 16; o; o /= 2) mine += __shfl_xor_sync(~0u, mine, o);
    __syncthreads();
    if (lane == 0) sums[warp] = mine;
    __syncthreads();
    u64 total = 0, before = 0;
    for (int i = 0; i < WARPS; i++) total += sums[i];
    const u64 target = __umul64hi(draw.random, total);
    for (int i = 0; i < warp; i++) before += sums[i];
    if (target < before || target >= before + mine) return;
    for (int at = warp * stretch;; at += 32) {
        const u64 end = before + warp_scan(left(at + lane));
        const unsigned beyond = __ballot_sync(~0u, end > target);
        if (beyond) {
            if (lane == 0) tokens[blockIdx.x] = at + __ffs(beyond) - 1;
            return;
        }
        before = __shfl_sync(~0u, end, 31);
    }
}
