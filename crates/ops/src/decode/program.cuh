// The operations of a step of 1 to 4 sequences, in one kernel whose blocks stay for all of them. What one operation gives the next one waits for word by word (flow.cuh); for all blocks only SUM and TOKEN wait, and every operation
// when not all of them run.
//
// Products run behind a ring of copies that never stops (ring.cuh). Channel mixing is two of them, KEY and VALUE, where the second matrix lies by outputs: in codes, and in narrow models. Where it lies by inputs, CHANNELS goes through
// both without a wait: a block has the same hidden channels of both, its rows of the second under zeros are not read, and what it gives for all channels is added to that of the others
// in order of the blocks, by SUM.
#pragma once
#include "few_heads.cuh"

enum Kind { EMBED, MIXED, HEADS, ADD, CHANNELS, SUM, LOGITS, TOKEN, KEY, VALUE, KINDS };
constexpr int VALUES = 1 << KINDS; // beside the kinds in a mask: the second matrix of CHANNELS

struct Embed {
    const void* table;
    const int* tokens;
    float* x;
    Norm norm;
};
// y = finish(m W^T). m [batch, C]: interpolations between h = norm(x) and `last`, which stays, while h goes to `now`; h itself without `last`. With ADD and VALUE m is x [batch, k] itself, y is `before` and the product,
// and the rows of `last`, if it is given, become those of `now`: all blocks have read them, as x has something of each.
struct Product {
    Matrix m;
    const void* x;
    Norm norm;
    Mixes mu;
    const void* last;
    void* now;
    void* y;           // [batch, total] f32; with KEY activations; with CHANNELS the parts [blocks, batch, C]
    const void* value; // CHANNELS: the second matrix [total, C]
    void* seen;        // CHANNELS: number of its rows that were read; VALUE: how many would have to be, if it is wanted; LOGITS: Found [blocks, MOST]
    const float* before;
};
struct Sum {
    const float *parts, *x;
    const void* now;
    void* last;
    size_t count;
    float* y;
};
struct Found {
    float value;
    int index;
};
struct Token {
    const Found* found;
    int* tokens;
    size_t vocab;
};
struct Op {
    size_t kind;
    union {
        Embed embed;
        Product product;
        HeadsOf heads;
        Sum sum;
        Token token;
        size_t words[31];
    };
};
static_assert(sizeof(Op) == 256, "");

struct Run {
    int from, to, mask;   // operations
    int number, products; // of the first product among them, and how many there are
    int batch, c;
    int waits; // for all blocks
};
// Bytes of shared memory: what operations use in turn; hidden channels of a block at most. Bytes of what blocks hand to each other, 16 at a time, and whether all operations run.
struct Room {
    int bytes, hidden, flow, all;
};

// h = (h - mean) / sqrt(variance + 1e-5) weight + bias of rows held by the block. Every warp has the mean of its channels and the sum of the squares around it, of which all make those of a row.
// `scratch` [MOST, WARPS] is not written again before the next barrier but one.
template <int B, int HELD>
__device__ __forceinline__ void normalise_rows(Vec (&h)[B][HELD], const Constants<HELD, THREADS>& weight, const Constants<HELD, THREADS>& bias, int batch, int c,
                                               float4* scratch) {
    constexpr int SPAN = 32 * 8; // channels of a warp, one vector of a thread after another
    const int warp = threadIdx.x >> 5;
    if (warp * SPAN < c) {
        int n = 0;
#pragma unroll 1
        for (int i = 0; i < HELD; i++) n += max(0, min(SPAN, c - (i * WARPS + warp) * SPAN));
        const float channels = float(n);
#pragma unroll
        for (int b = 0; b < B; b++) {
            if (b >= batch) break;
            float s = 0.f, squares = 0.f;
            each_vector<HELD, THREADS>(c, [&](int i, int) {
                for (int j = 0; j < 8; j++) s += h[b][i][j];
            });
            s = warp_sum(s);
            const float mean = s / channels;
            each_vector<HELD, THREADS>(c, [&](int i, int) {
                for (int j = 0; j < 8; j++) squares += (h[b][i][j] - mean) * (h[b][i][j] - mean);
            });
            squares = warp_sum(squares);
            if ((threadIdx.x & 31) == 0) scratch[b * WARPS + warp] = make_float4(s, squares, mean, channels);
        }
    }
    sync_workers();
    const float each = 1.f / c;
    float mean[B], by[B];
#pragma unroll
    for (int b = 0; b < B; b++) {
        if (b >= batch) break;
        float s = 0.f, squares = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w * SPAN < c) s += scratch[b * WARPS + w].x;
        mean[b] = s * each;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w * SPAN < c) {
                const float4 v = scratch[b * WARPS + w];
                squares += v.y + v.w * (v.z - mean[b]) * (v.z - mean[b]);
            }
        by[b] = rsqrtf(squares * each + 1e-5f);
    }
    each_vector<HELD, THREADS>(c, [&](int i, int at) {
        const Vec w = weight.at(at), v = bias.at(at);
#pragma unroll
        for (int b = 0; b < B; b++)
            if (b < batch)
                for (int j = 0; j < 8; j++) h[b][i][j] = (h[b][i][j] - mean[b]) * by[b] * w[j] + v[j];
    });
}

// The input of a product into held [batch, pitch], after the wait.
template <class T, int B, int HELD>
__device__ __forceinline__ void mixed_input(const Product& op, const Flow& flow, const Share& mine, bool coded, T* held, const int* slots, int batch, int c, float4* scratch) {
    const T* last = static_cast<const T*>(op.last);
    const Constants<HELD, THREADS> weight(op.norm.p[0], c), bias(op.norm.p[1], c), m(last ? op.mu.p[mine.input] : nullptr, c);
    // A vector that waits as it is; more are only brought near.
    uint4 before[B] = {};
    if (last)
#pragma unroll
        for (int b = 0; b < B; b++)
            if (b < batch) each_vector<HELD, THREADS>(c, [&](int i, int at) {
                const T* p = last + size_t(slots[b]) * c + at;
                if (HELD == 1)
                    before[b] = __ldcg(reinterpret_cast<const uint4*>(p));
                else
                    prefetch(p);
            });
    if (!flow.on) Grid::wait();
    Vec h[B][HELD] = {};
    const float* x = flow.place(static_cast<const float*>(op.x));
    until([&](bool& all) {
#pragma unroll
        for (int b = 0; b < B; b++)
            if (b < batch) each_vector<HELD, THREADS>(c, [&](int i, int at) {
                const float4 low = look4(x + size_t(b) * c + at, all), high = look4(x + size_t(b) * c + at + 4, all);
                h[b][i] = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
            });
    });
    normalise_rows<B, HELD>(h, weight, bias, batch, c, scratch);
    const int stride = pitch(c);
    each_vector<HELD, THREADS>(c, [&](int i, int at) {
        Vec f = zeros();
        if (last) f = m.at(at);
#pragma unroll
        for (int b = 0; b < B; b++) {
            if (b >= batch) break;
            Vec& v = h[b][i];
            if (last) {
                for (int j = 0; j < 8; j++) v[j] = to_f32(from_f32<T>(v[j]));
                if (blockIdx.x == 0) give(flow.place(static_cast<T*>(op.now)) + size_t(b) * c + at, v);
                const Vec old = HELD == 1 ? unpack8<T>(before[b]) : load_fresh(last + size_t(slots[b]) * c + at);
                for (int j = 0; j < 8; j++) v[j] += (old[j] - v[j]) * f[j];
            }
            store(held + b * stride + place_of_input(coded, at), v);
        }
    });
}

// The rows `slots` of `last` become those of `now` [batch, C], by the last blocks, which have the fewest rows of a matrix.
template <class T> __device__ __forceinline__ void shift(const void* now, const Flow& flow, void* last, const int* slots, int batch, int c) {
    for (int i = (gridDim.x - 1 - blockIdx.x) * THREADS + threadIdx.x; i < batch * c / 8; i += gridDim.x * THREADS) {
        const int b = i / (c / 8), at = i % (c / 8) * 8;
        const T* from = flow.place(static_cast<const T*>(now)) + size_t(b) * c + at;
        uint4 v;
        until([&](bool& all) { v = look8(from, all); });
        *reinterpret_cast<uint4*>(static_cast<T*>(last) + size_t(slots[b]) * c + at) = v;
    }
}

// Activations x [batch, k] into held [batch, pitch(k)]; a thread waits for LOADS vectors at once.
template <int LOADS, class T> __device__ __forceinline__ void copied_input(const T* x, const Flow& flow, T* held, int batch, int k, bool coded) {
    const int n = k / 8, stride = pitch(k);
    x = flow.place(x);
    for (int i = threadIdx.x; i < batch * n; i += THREADS * LOADS) {
        uint4 v[LOADS];
        until([&](bool& all) {
#pragma unroll
            for (int j = 0; j < LOADS; j++)
                if (i + j * THREADS < batch * n) v[j] = look8(x + (i + j * THREADS) * 8, all);
        });
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            int b = 0, at = i + j * THREADS;
            if (at >= batch * n) break;
            for (; at >= n; at -= n) b++;
            *reinterpret_cast<uint4*>(held + b * stride + place_of_input(coded, at * 8)) = v[j];
        }
    }
}

// Adds to `seen` how many of the k columns of held [batch, pitch(k)], in 16 bits, are not zero in all rows; every thread of the grid looks at its own.
template <class T> __device__ __forceinline__ void count_rows(const T* held, int batch, int k, unsigned* seen) {
    unsigned some = 0;
#pragma unroll 1
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < k; i += gridDim.x * THREADS) {
        unsigned bits = 0;
#pragma unroll 1
        for (int b = 0; b < batch; b++) bits |= reinterpret_cast<const unsigned short*>(held)[b * pitch(k) + i];
        some += (bits & 0x7fff) != 0;
    }
    if (some) atomicAdd(seen, some);
}

// Brings n rows of c elements near, a warp for each.
template <class At> __device__ __forceinline__ void prefetch_rows(int n, int c, At at) {
    for (int i = threadIdx.x >> 5; i < n; i += WARPS)
        for (int j = (threadIdx.x & 31) * 64; j < c; j += 32 * 64) prefetch(at(i) + j);
}

// The block's rows of the second matrix of channel mixing, `first` the first of them, but for those under zeros of all sequences of h [batch, most]: for all
// channels, to the block's parts [batch, C]. Groups of threads have every so many rows, whichever are read, so that a sequence's sums have one order. `list`
// [most] are rows by groups, which begin at `begins` [THREADS / 8 + 1].
template <class T, int B>
__device__ __forceinline__ void values(const T* w, int first, int rows, const float* h, int most, int* list, int* begins, float* parts, unsigned* seen, int batch, int c,
                                       float* scratch) {
    constexpr int LOADS = 8; // rows that a thread waits for at once
    const int t = threadIdx.x, lane = t & 31;
    const int lanes = min(c / 8, THREADS), groups = THREADS / lanes, group = groups > 1 ? t / lanes : 0;
    if (t < 32) {
        int n = 0;
        for (int g = 0; g < groups; g++) {
            if (t == 0) begins[g] = n;
            for (int i = g + lane * groups; i - lane * groups < rows; i += 32 * groups) {
                bool some = false;
                for (int b = 0; b < batch; b++) some |= i < rows && h[b * most + i] != 0.f;
                const unsigned found = __ballot_sync(~0u, some);
                if (some) list[n + __popc(found & ((1u << lane) - 1))] = i;
                n += __popc(found);
            }
        }
        if (t == 0) begins[groups] = n, atomicAdd(seen, unsigned(n));
    }
    sync_workers();
    prefetch_rows(begins[groups], c, [&](int i) { return w + size_t(first + list[i]) * c; });
    const int begin = begins[min(group, groups)], end = group < groups ? begins[group + 1] : begin;
    for (int c0 = 0; c0 < c; c0 += lanes * 8) {
        const int col = c0 + (t - group * lanes) * 8;
        const bool in = col < c;
        Vec sum[B];
#pragma unroll
        for (int b = 0; b < B; b++) sum[b] = zeros();
        const T* from = w + size_t(first) * c + col;
        for (int i = begin; i < end && in; i += LOADS) {
            uint4 a[LOADS] = {};
            int row[LOADS];
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                row[j] = i + j < end ? list[i + j] : -1;
                if (row[j] >= 0) a[j] = load_once(from + size_t(row[j]) * c);
            }
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                if (row[j] < 0) break;
                const Vec v = unpack8<T>(a[j]);
#pragma unroll
                for (int b = 0; b < B; b++) {
                    if (b >= batch) break;
                    const float s = h[b * most + row[j]];
#pragma unroll
                    for (int e = 0; e < 8; e++) sum[b][e] = fmaf(v[e], s, sum[b][e]);
                }
            }
        }
#pragma unroll
        for (int b = 0; b < B; b++) {
            if (b >= batch) break;
            if (groups == 1) {
                if (in) store(parts + size_t(b) * c + col, sum[b]);
                continue;
            }
            store(scratch + t * 8, sum[b]);
            sync_workers();
            for (int i = t; i < lanes * 8; i += THREADS) {
                float s = 0.f;
                for (int g = 0; g < groups; g++) s += scratch[g * lanes * 8 + i];
                if (c0 + i < c) parts[size_t(b) * c + c0 + i] = s;
            }
            sync_workers();
        }
    }
}

// y [batch, C] = x and the sum of parts [count, batch, C]; the rows `slots` of `last` become those of `now`.
template <class T> __device__ __forceinline__ void add_parts(const Sum& op, const Flow& flow, const int* slots, int batch, int c) {
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31, half = lane % 2, items = batch * c / 8;
    Grid::wait();
    // A warp has 8 channels, and two lanes those of every 16th part.
    for (int item = blockIdx.x + warp * gridDim.x; item < items; item += gridDim.x * WARPS) {
        const float* x = flow.place(op.x) + size_t(item) * 8 + half * 4;
        float4 before;
        until([&](bool& all) { before = look4(x, all); });
        float4 s = make_float4(0.f, 0.f, 0.f, 0.f);
        // As many at once as an H100 has blocks.
        constexpr int LOADS = 9;
        for (int first = lane / 2; first < int(op.count); first += 16 * LOADS) {
            float4 v[LOADS];
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                const int p = first + j * 16;
                v[j] = make_float4(0.f, 0.f, 0.f, 0.f);
                if (p < int(op.count)) v[j] = __ldcg(reinterpret_cast<const float4*>(op.parts + (size_t(p) * batch * c + size_t(item) * 8)) + half);
            }
#pragma unroll
            for (int j = 0; j < LOADS; j++) s.x += v[j].x, s.y += v[j].y, s.z += v[j].z, s.w += v[j].w;
        }
#pragma unroll
        for (int o = 2; o < 32; o *= 2) {
            s.x += __shfl_xor_sync(~0u, s.x, o);
            s.y += __shfl_xor_sync(~0u, s.y, o);
            s.z += __shfl_xor_sync(~0u, s.z, o);
            s.w += __shfl_xor_sync(~0u, s.w, o);
        }
        if (lane < 2) give(flow.place(op.y) + size_t(item) * 8 + half * 4, make_float4(before.x + s.x, before.y + s.y, before.z + s.z, before.w + s.w));
    }
    shift<T>(op.now, flow, op.last, slots, batch, c);
}

__device__ __forceinline__ void take_larger(Found& best, float v, int i) {
    if (v > best.value || (v == best.value && i < best.index)) best = {v, i};
}

template <class T, int N, int B, int HELD, bool CODED> __device__ __forceinline__ void program(const Op* ops, const int* slots_at, unsigned* arrived, unsigned char* flow_at, Run r, Room room) {
    DYNAMIC_SHARED(dynamic);
    const int t = threadIdx.x, batch = B == 1 ? 1 : r.batch, c = r.c;
    constexpr int STAGES = stages_of(CODED, B, HELD);
    // Vectors of an input that a thread waits for at once: as many as there are registers for.
    constexpr int COPIES = B * HELD > 4 || STAGES < 4 ? 1 : B == 1 ? (CODED ? 4 : 2) : CODED ? 2 : 1;
    float* shared = reinterpret_cast<float*>(dynamic + STAGES * WARPS * stage_bytes(CODED));
    T* held = reinterpret_cast<T*>(shared);
    float* sums = shared + room.bytes / 4 - WARPS * 64;
    float* hidden = shared + room.bytes / 4;
    int* list = reinterpret_cast<int*>(hidden + MOST * room.hidden);
    float4* scratch = reinterpret_cast<float4*>(list + (room.hidden + 4) / 4 * 4); // [MOST, WARPS]
    Op* held_ops = reinterpret_cast<Op*>(scratch + MOST * WARPS);
    int* slots = reinterpret_cast<int*>(held_ops + 2);
    Share* shares = reinterpret_cast<Share*>(slots + MOST);
    const Flow flow{flow_at, unsigned(room.flow) * 16, room.all != 0};
    if (t >= THREADS) return Grid::serve(arrived, r.waits, !flow.on);
    for (int i = r.from + t; i < r.to; i += THREADS) {
        const int kind = int(ops[i].kind);
        if (kind == EMBED || kind == HEADS || kind == SUM || kind == TOKEN) continue;
        const Matrix& m = ops[i].product.m;
        shares[m.number - r.number] = Share(m, m.work[blockIdx.x], r.mask >> kind & 1);
    }
    const auto word = [&](int i) { return __ldg(reinterpret_cast<const uint4*>(ops + i) + t); };
    if (t < 16) reinterpret_cast<uint4*>(held_ops)[t] = word(r.from);
    if (t < batch) slots[t] = slots_at[t];
    sync_workers();
    Ring<CODED, STAGES> ring(dynamic, shares, shares + r.products);
#pragma unroll 1
    for (int i = r.from; i < r.to; i++) {
        const Op& op = held_ops[(i - r.from) & 1];
        uint4 next = {};
        if (t < 16 && i + 1 < r.to) next = word(i + 1);
        const int kind = int(op.kind);
        const bool channels = !CODED && kind == CHANNELS, sum = !CODED && kind == SUM, key = kind == KEY, add = kind == ADD || kind == VALUE;
        const bool on = r.mask >> kind & 1, value = channels && r.mask & VALUES;
        if (on && kind == HEADS) {
            few_heads<T, N>(op.heads, flow, slots, batch, c, shared);
        } else if (on && sum) {
            add_parts<T>(op.sum, flow, slots, batch, c);
        } else if (on && kind == EMBED) {
            if (!flow.on) Grid::wait();
            if (int(blockIdx.x) < batch) {
                const Constants<HELD, THREADS> weight(op.embed.norm.p[0], c), bias(op.embed.norm.p[1], c);
                const T* from = static_cast<const T*>(op.embed.table) + size_t(__ldcg(op.embed.tokens + blockIdx.x)) * c;
                Vec h[1][HELD] = {};
                each_vector<HELD, THREADS>(c, [&](int j, int at) { h[0][j] = load(from + at); });
                normalise_rows<1, HELD>(h, weight, bias, 1, c, scratch);
                each_vector<HELD, THREADS>(c, [&](int j, int at) { give(flow.place(op.embed.x) + size_t(blockIdx.x) * c + at, h[0][j]); });
            }
        } else if (on && kind == TOKEN) {
            Grid::wait();
            // A warp for each sequence.
            const int b = t >> 5;
            if (blockIdx.x == 0 && b < batch) {
                Found best{-INFINITY, int(op.token.vocab)};
                for (int j = t & 31; j < int(gridDim.x); j += 32) {
                    const float2 f = __ldcg(reinterpret_cast<const float2*>(op.token.found + j * MOST + b));
                    take_larger(best, f.x, __float_as_int(f.y));
                }
#pragma unroll 1
                for (int o = 16; o; o >>= 1) take_larger(best, __shfl_xor_sync(~0u, best.value, o), __shfl_xor_sync(~0u, best.index, o));
                if ((t & 31) == 0) op.token.tokens[b] = best.index < int(op.token.vocab) ? best.index : 0;
            }
            if (flow.on) flow.clear(THREADS);
        } else if (on || value) {
            const Product& p = op.product;
            const Share& mine = shares[p.m.number - r.number];
            const bool coded = CODED && mine.scales;
            if (add) {
                if (!flow.on) Grid::wait();
                copied_input<COPIES>(static_cast<const T*>(p.x), flow, held, batch, mine.k, coded);
            } else {
                mixed_input<T, B, HELD>(p, flow, mine, coded, held, slots, batch, c, scratch);
            }
            if (t < 16) reinterpret_cast<uint4*>(held_ops + ((i + 1 - r.from) & 1))[t] = next;
            sync_workers();
            if (const Op& after = held_ops[(i + 1 - r.from) & 1]; kind == MIXED && i + 1 < r.to && after.kind == HEADS)
                prefetch_heads<T, N>(after.heads, batch, c);
            float* y = flow.place(static_cast<float*>(p.y));
            const float* before = flow.place(p.before);
            const int total = mine.total;
            if (channels && !on)
                for (int j = t; j < MOST * room.hidden; j += THREADS) hidden[j] = float(j & 1);
            Found best{-INFINITY, total};
            // All of `before` was there when the block read it as another operation's input.
            const auto old = [&](int row, int b) { return add ? __ldcg(before + size_t(b) * total + row) : 0.f; };
            product(ring, mine, held, batch, sums, old, [&](int row, int b, float v, float was) {
                if (channels || key) {
                    const T squared = from_f32<T>(v > 0.f ? v * v : 0.f);
                    if (channels)
                        hidden[b * room.hidden + row - mine.first] = to_f32(squared);
                    else
                        give(reinterpret_cast<T*>(y) + size_t(b) * total + row, squared);
                } else {
                    give(y + size_t(b) * total + row, was + v);
                    if (kind == LOGITS) take_larger(best, v, row);
                }
            });
            if (add) {
                // What nobody waits for.
                if (!CODED && p.seen) count_rows(held, batch, mine.k, static_cast<unsigned*>(p.seen));
                if (p.last) shift<T>(p.now, flow, const_cast<void*>(p.last), slots, batch, c);
            } else if (value) {
                sync_workers();
                if (mine.all)
                    values<T, B>(static_cast<const T*>(p.value), mine.first, mine.all, hidden, room.hidden, list, reinterpret_cast<int*>(scratch), y + size_t(blockIdx.x) * batch * c,
                                 static_cast<unsigned*>(p.seen), batch, c, shared);
            } else if (kind == LOGITS) {
                // Of sequence `lane / 4` of every warp.
                Found* found = reinterpret_cast<Found*>(sums);
#pragma unroll 1
                for (int o = 1; o < 4; o *= 2) take_larger(best, __shfl_xor_sync(~0u, best.value, o), __shfl_xor_sync(~0u, best.index, o));
                sync_workers();
                if ((t & 31) < 4 * MOST && (t & 3) == 0) found[(t >> 5) * MOST + (t & 31) / 4] = best;
                sync_workers();
                if (t < MOST) {
                    for (int w = 1; w < WARPS; w++) take_larger(found[t], found[w * MOST + t].value, found[w * MOST + t].index);
                    static_cast<Found*>(p.seen)[blockIdx.x * MOST + t] = found[t];
                }
            }
        }
        if (kind == HEADS || sum || kind == EMBED || !(on || value))
            if (t < 16) reinterpret_cast<uint4*>(held_ops + ((i + 1 - r.from) & 1))[t] = next;
        if (i + 1 == r.to) break;
        sync_workers();
        if (on || value)
            if (const int after = int(held_ops[(i + 1 - r.from) & 1].kind); !flow.on || after == SUM || after == TOKEN) Grid::arrive();
    }
}
