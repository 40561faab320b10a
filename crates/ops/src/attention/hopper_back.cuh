// The gradients on Hopper, in the same way: dq by tiles of queries, dk and dv by tiles of keys.
#pragma once
#include "hopper.cuh"

#ifdef ANSER_HOPPER
namespace chunks {
namespace hopper {

constexpr int KEY_ROWS = Team<2>::ROWS; // keys of a tile

template <class T> using Back = Queries<T, 3, 2, 64, 2, 6>;

// out [rows, group, slots, 64]: the part of dq that each slot's keys give; dq [rows, heads, 64] of dense rows.
template <class T>
__device__ __forceinline__ void back_queries(const Plan& p, const T* q, const T* dy, const float2* stats, const List* lists, const int* entries, int* counter, T* out, T* dq) {
    using Work = Back<T>;
    constexpr int KEYS = 64;
    DYNAMIC_SHARED(memory);
    __shared__ Work work;
    T *heads = aligned<T>(memory), *stages = heads + Work::HeadPlace::COUNT * Work::HEAD;
    const typename Work::Signals signals(work.barriers, Work::apart(p));
    wait_for_previous(); // so that what starts next, which doesn't wait, sees all before
    let_next_start();
    if (threadIdx.x >= Work::Team::COMPUTING) {
        fewer_registers<56>();
        const T* const sides[2] = {q, dy};
        work.serve(p, signals, sides, stats, lists, entries, counter, heads, stages);
    } else {
        more_registers<152>();
        const float scale = 0.125f;
        const uint64_t first = operand(address_of(stages)), rows = operand_at(operand(address_of(heads)), __shfl_sync(~0u, int(threadIdx.x / 128), 0) * 64 * 128);
        typename Work::HeadPlace head;
        typename Work::StepPlace place;
        for (;; head.next()) {
            barrier_wait(signals.head_full(head.at), head.parity);
            fence_for_products();
            const Tile t = work.tiles[head.at];
            if (t.count < 0) break;
            const uint64_t queries = uniform(operand_at(rows, head.at * Work::HEAD * 2)), grads = operand_at(queries, Work::ROWS * 128);
            uint32_t w[KEYS / 16][4];
            float s[KEYS / 8][4], g[KEYS / 8][4], o[8][4];
            const float2 stat[2] = {work.stat[head.at][row_of(0, 0)], work.stat[head.at][row_of(0, 1)]};
#pragma unroll
            for (int i = 0; i < 32; i++) o[i / 4][i % 4] = 0.f;
            const Span<KEYS> span(p, t);
            int last = -1, step = 0; // stage of the step before
            const auto wait = [&] {
                barrier_wait(signals.step_full(place.at), place.parity);
                fence_for_products();
            };
            const auto skip = [&] {
                wait();
                release(signals.step_empty(place.at));
                place.next();
            };
            for (; step < span.begin; step++) skip();
            for (; step < span.end; step++) {
                const uint64_t keys = uniform(operand_at(first, place.at * Work::STEP * 2));
                wait();
                keep_order(s);
                keep_order(g);
                products_begin();
                begin_times_rows<T>(s, queries, keys);
                products_commit();
                begin_times_rows<T>(g, grads, operand_at(keys, KEYS * 128));
                products_commit();
                products_wait<1>();
                keep_order(s);
                if (last >= 0) release(signals.step_empty(last));
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++) s[i / 4][i % 4] = exp2_fast(fmaf(s[i / 4][i % 4], scale * LOG2E, -stat[i % 4 / 2].x));
                span.mask(s, t.from + step * KEYS, 0.f);
                keep_order(s);
                products_wait<0>();
                keep_order(g);
                keep_order(o);
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++) s[i / 4][i % 4] *= g[i / 4][i % 4] - stat[i % 4 / 2].y;
#pragma unroll
                for (int j = 0; j < KEYS / 16; j++) as_a<T>(w[j], s[2 * j], s[2 * j + 1]);
                products_begin();
                begin_add_product<T>(o, w, keys);
                products_commit();
                last = place.at;
                place.next();
            }
            products_wait<0>();
            keep_order(o);
            if (last >= 0) release(signals.step_empty(last));
            for (; step < span.steps; step++) skip();
            const float factor[2] = {scale, scale};
            store_rows(p, out, dq, heads + head.at * Work::HEAD, work.entry[0][head.at], t.y, o, factor);
            release(signals.head_empty(head.at));
        }
    }
}

// A tile of keys of a chunk, with a piece of its list and, with the first piece, the later queries of the chunk.
struct KeyTile {
    const void *keys, *values; // of the sequence
    const int* chosen;         // the piece
    int first_row;             // of the sequence
    int first, end;            // keys
    int own_end;               // of the queries that see all keys from the chunk's on in one piece
    int count, own, steps;     // queries of the piece; steps of own queries; steps; 0 steps: nothing to do, -1: nothing comes any more
    int pieces, at, y;         // of the list; row of the parts; head of the group
};
__device__ __forceinline__ void key_tile_of(KeyTile& t, const Plan& p, const List* lists, const int* entries, int index, int y, int step) {
    t.steps = 0;
    const Sequence& s = sequence_of<&Sequence::piece_base, true>(p, index);
    const int tiles = (p.size + KEY_ROWS - 1) / KEY_ROWS, local = index - s.piece_base, number = local / tiles;
    const List* all = p.slots > 1 ? lists_of(p, s, lists, y) : nullptr;
    const int chunk = all ? last_up_to_alone(s.chunks, number, [&](int i) { return all[i].piece; }) : number;
    const List list = all ? all[chunk] : List{0, 0, 0, chunk};
    const int piece = number - list.piece, begin = piece * p.piece;
    t.keys = s.keys;
    t.values = s.values;
    t.first_row = s.first_row;
    t.first = chunk * p.size + local % tiles * KEY_ROWS;
    t.end = min((chunk + 1) * p.size, s.len);
    t.pieces = max(1, (list.size + p.piece - 1) / p.piece);
    if (piece >= t.pieces || chunk >= s.chunks || t.first >= t.end) return;
    t.chosen = all ? entries_of(p, s, entries, y) + list.first + begin : nullptr;
    t.count = min(p.piece, list.size - begin);
    t.own_end = t.end <= p.dense ? min(p.dense, s.len) : t.end;
    t.own = piece == 0 ? (t.own_end - t.first + step - 1) / step : 0;
    t.steps = t.own + (t.count + step - 1) / step;
    t.at = (s.piece_base / tiles + number) * 2 * p.size + t.first - chunk * p.size;
    t.y = y;
}

// 4 bytes from device memory to shared memory in the background; zeros if !valid.
__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool valid) {
#ifndef ANSER_EMULATOR
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0) : "memory");
#else
    valid ? memcpy(to, from, 4) : memset(to, 0, 4);
#endif
}

// Tiles of keys and the queries that see them.
template <class T> struct Keys {
    using Team = hopper::Team<2>;
    static constexpr int ROWS = Team::ROWS, HEADS = 2, STEPS = 8, QUERIES = 64, HEAD = 2 * ROWS * 64, STEP = 2 * QUERIES * 64;
    using HeadPlace = Place<HEADS>;
    using StepPlace = Place<STEPS>;
    using Signals = hopper::Signals<Team, HEADS, STEPS>;
    Barriers<HEADS, STEPS> barriers;
    KeyTile batches[BATCHES * BATCH], tiles[HEADS];
    float stat[STEPS][2][QUERIES];

    __device__ __forceinline__ void find(const Plan& p, const Signals& signals, const List* lists, const int* entries, int* counter) {
        const int all = p.pieces * ((p.size + ROWS - 1) / ROWS);
        find_tiles(signals, batches, 1, all * p.group, counter, [&](int i, KeyTile& t) {
            // Those of first chunks, with long lists, come first.
            if (i < all * p.group) key_tile_of(t, p, lists, entries, i / p.group, i % p.group, QUERIES);
            else t.steps = -1;
        });
    }
    // Heads: the tiles' keys and values.
    __device__ __forceinline__ void copy_heads(const Plan& p, const Signals& signals, T* heads) {
        HeadPlace h;
        for (Place<BATCHES> batch;; batch.next()) {
            barrier_wait(signals.batch_full(batch.at), batch.parity);
            const KeyTile& t = batches[batch.at * BATCH];
            const int steps = t.steps;
            if (steps != 0) {
                barrier_wait(signals.head_empty(h.at), h.parity ^ 1);
                if (threadIdx.x % 32 == 0) tiles[h.at] = t;
                if (steps > 0) {
                    T* to = heads + h.at * HEAD;
                    const int column = (p.first + t.y) / p.share * 64;
                    copy_span<ROWS>(to, static_cast<const T*>(t.keys) + column, p.key_heads * 64, t.first, t.end);
                    copy_span<ROWS>(to + ROWS * 64, static_cast<const T*>(t.values) + column, p.key_heads * 64, t.first, t.end);
                }
                barrier_arrive_copied(signals.head_full(h.at));
                release(signals.head_full(h.at));
                if (steps < 0) return;
                h.next();
            }
            release(signals.batch_empty(batch.at));
        }
    }
    // Steps: queries with the logarithms of their sums or, SECOND, gradients with their products with the results.
    template <Role ROLE> __device__ __forceinline__ void copy_steps(const Plan& p, const Signals& signals, const T* from, const float2* stats, T* stages) {
        const int lane = threadIdx.x % 32;
        StepPlace place;
        for (Place<BATCHES> batch;; batch.next()) {
            barrier_wait(signals.batch_full(batch.at), batch.parity);
            const KeyTile& t = batches[batch.at * BATCH];
            const int steps = t.steps, own_steps = t.own, own = t.first + lane, own_end = t.own_end, first_row = t.first_row, count = t.count, head = p.first + t.y;
            const int mask = (1 << p.bits) - 1;
            const int* chosen = t.chosen;
            release(signals.batch_empty(batch.at));
            if (steps < 0) return;
            // The rows of a step, two a lane, are looked up one step ahead of the copies.
            int next[2];
            const auto look_up = [&](int step) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int mine = own + step * QUERIES + 32 * i, other = (step - own_steps) * QUERIES + 32 * i + lane;
                    next[i] = step < own_steps ? (mine < own_end ? first_row + mine : -1) : other < count ? chosen[other] & mask : -1;
                }
            };
            if (steps > 0) look_up(0);
            for (int step = 0; step < steps; step++) {
                const int row[2] = {next[0], next[1]};
                if (step + 1 < steps) look_up(step + 1);
                barrier_wait(signals.step_empty(place.at), place.parity ^ 1);
                T* to = stages + place.at * STEP + ROLE * QUERIES * 64;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    copy_rows<32>(to + 32 * i * 64, from + head * 64, p.heads * 64, [&](int r) { return __shfl_sync(~0u, row[i], r); });
                    const float2* of = stats + size_t(max(row[i], 0)) * p.heads + head;
                    copy_async_4(&stat[place.at][ROLE][32 * i + lane], ROLE == FIRST ? &of->x : &of->y, row[i] >= 0);
                }
                barrier_arrive_copied(signals.step_full(place.at));
                place.next();
            }
        }
    }
    // What a warp beside those that compute does.
    __device__ __forceinline__ void serve(const Plan& p, const Signals& signals, const T* q, const T* dy, const float2* stats, const List* lists, const int* entries,
                                          int* counter, T* heads, T* stages) {
        switch (threadIdx.x / 32 - Team::COMPUTING / 32) {
        case FIRST: return copy_steps<FIRST>(p, signals, q, stats, stages);
        case SECOND: return copy_steps<SECOND>(p, signals, dy, stats, stages);
        case HEADS_OF: return copy_heads(p, signals, heads);
        default: return find(p, signals, lists, entries, counter);
        }
    }
};

// dk, dv of tiles of keys. Where a list has several pieces they leave f32 parts [group, pieces, 2, size, 64], which `add_pieces` adds up.
//
// A query that isn't there is zero with a weight of 1, and adds nothing.
template <class T>
__device__ __forceinline__ void back_keys(const Plan& p, const T* q, const T* dy, const float2* stats, const List* lists, const int* entries, int* counter, float* parts,
                                          T* dk, T* dv) {
    using Work = Keys<T>;
    constexpr int Q = Work::QUERIES;
    DYNAMIC_SHARED(memory);
    __shared__ Work work;
    T *heads = aligned<T>(memory), *stages = heads + Work::HEADS * Work::HEAD;
    const typename Work::Signals signals(work.barriers);
    if (threadIdx.x >= Work::Team::COMPUTING) {
        fewer_registers<88>();
        work.serve(p, signals, q, dy, stats, lists, entries, counter, heads, stages);
    } else {
        more_registers<208>();
        const int lane = threadIdx.x % 32;
        const float scale = 0.125f;
        const uint64_t stage = operand(address_of(stages)), rows = operand_at(operand(address_of(heads)), __shfl_sync(~0u, int(threadIdx.x / 128), 0) * 64 * 128);
        typename Work::HeadPlace head;
        typename Work::StepPlace place;
        for (;; head.next()) {
            barrier_wait(signals.head_full(head.at), head.parity);
            fence_for_products();
            const KeyTile t = work.tiles[head.at];
            if (t.steps < 0) break;
            const uint64_t keys = uniform(operand_at(rows, head.at * Work::HEAD * 2)), values = operand_at(keys, Work::ROWS * 128);
            uint32_t w[Q / 16][4], x[Q / 16][4];
            float s[Q / 8][4], g[Q / 8][4], sk[8][4], sv[8][4];
#pragma unroll
            for (int i = 0; i < 32; i++) sk[i / 4][i % 4] = sv[i / 4][i % 4] = 0.f;
            int last = -1, step = 0; // stage of the step before
            const auto wait = [&] {
                barrier_wait(signals.step_full(place.at), place.parity);
                fence_for_products();
            };
            // The second warpgroup's keys come after the first step's queries.
            if (threadIdx.x >= 128 && t.own > 0) {
                wait();
                release(signals.step_empty(place.at));
                place.next();
                step = 1;
            }
            for (; step < t.steps; step++) {
                const uint64_t queries = uniform(operand_at(stage, place.at * Work::STEP * 2)), grads = operand_at(queries, Q * 128);
                const float* stat = work.stat[place.at][0] + lane % 4 * 2;
                wait();
                keep_order(s);
                keep_order(g);
                products_begin();
                begin_times_rows<T>(s, keys, queries);
                products_commit();
                begin_times_rows<T>(g, values, grads);
                products_commit();
                float2 sums[Q / 8];
#pragma unroll
                for (int i = 0; i < Q / 8; i++) sums[i] = *reinterpret_cast<const float2*>(stat + 8 * i);
                products_wait<1>();
                keep_order(s);
                if (last >= 0) release(signals.step_empty(last));
#pragma unroll
                for (int i = 0; i < Q / 8; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) s[i][j] = exp2_fast(fmaf(s[i][j], scale * LOG2E, -(j % 2 ? sums[i].y : sums[i].x)));
                const int query = t.first + step * Q; // of own queries
                if (step < t.own && query < t.first + row_of(0, 1)) {
#pragma unroll
                    for (int i = 0; i < Q / 2; i++)
                        if (query + i / 4 * 8 + lane % 4 * 2 + i % 2 < t.first + row_of(0, i % 4 / 2)) s[i / 4][i % 4] = 0.f;
                }
#pragma unroll
                for (int j = 0; j < Q / 16; j++) as_a<T>(w[j], s[2 * j], s[2 * j + 1]);
                keep_order(sv);
                products_begin();
                begin_add_product<T>(sv, w, grads);
                products_commit();
#pragma unroll
                for (int i = 0; i < Q / 8; i++) sums[i] = *reinterpret_cast<const float2*>(stat + Q + 8 * i);
                products_wait<1>();
                keep_order(g);
#pragma unroll
                for (int i = 0; i < Q / 8; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) g[i][j] = s[i][j] * (g[i][j] - (j % 2 ? sums[i].y : sums[i].x));
#pragma unroll
                for (int j = 0; j < Q / 16; j++) as_a<T>(x[j], g[2 * j], g[2 * j + 1]);
                keep_order(sk);
                products_begin();
                begin_add_product<T>(sk, x, queries);
                products_commit();
                last = place.at;
                place.next();
            }
            products_wait<0>();
            keep_order(sk);
            keep_order(sv);
            if (last >= 0) release(signals.step_empty(last));
            release(signals.head_empty(head.at));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int key = t.first + row_of(0, half);
                if (key >= t.end) continue;
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const int col = 8 * k + lane % 4 * 2;
                    const float a = sk[k][2 * half] * scale, b = sk[k][2 * half + 1] * scale, c = sv[k][2 * half], d = sv[k][2 * half + 1];
                    if (t.pieces == 1) {
                        *reinterpret_cast<uint32_t*>(vector_of<64>(p, dk, t.first_row + key, p.first + t.y) + col) = pack<T>(a, b);
                        *reinterpret_cast<uint32_t*>(vector_of<64>(p, dv, t.first_row + key, p.first + t.y) + col) = pack<T>(c, d);
                    } else {
                        float* at = parts + (size_t(t.y) * p.pieces * 2 * p.size + t.at + row_of(0, half)) * 64 + col;
                        *reinterpret_cast<float2*>(at) = make_float2(a, b);
                        *reinterpret_cast<float2*>(at + size_t(p.size) * 64) = make_float2(c, d);
                    }
                }
            }
        }
    }
    wait_for_previous(); // whose end this one's end is then
}

} // namespace hopper
} // namespace chunks
#endif
