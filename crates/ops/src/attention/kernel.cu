// Top-k chunk attention: the formulas are in mod.rs, the schemes in the files included.
//
// Convergence barriers of the exact kernels' nested loops, a few bytes:
// may spill: chunk_(forward|dq|select)_[bf]+\d+\s
// What copying warps with 32 registers need once a tile, a few words:
// may spill: chunk_(hopper_attend|short_2)_
// The same of nested loops in a kernel that memory holds up:
// may spill: chunk_fill\s
#include "forgotten.cuh"
#include "exact.cuh"
#include "select.cuh"
#include "tensor.cuh"
#include "hopper_back.cuh"
#include "short.cuh"
#include "pick.cuh"

using namespace chunks;

extern "C" __global__ void __launch_bounds__(256) chunk_count(Plan p, const int* picks, int* counts) {
    DYNAMIC_SHARED(memory);
    begin_kernel();
    count(p, picks, counts, reinterpret_cast<Set*>(memory));
}
extern "C" __global__ void __launch_bounds__(1024) chunk_total(Plan p, int* counts, List* lists) {
    begin_kernel();
    total(p, counts, lists);
}
extern "C" __global__ void __launch_bounds__(256) chunk_scan(Plan p, List* lists, int tile, int* counters, int n) {
    begin_kernel();
    scan(p, lists, tile, counters, n);
}
extern "C" __global__ void __launch_bounds__(1024) chunk_order(Plan p, int* counts, List* lists, int tile, int* counters, int n) {
    begin_kernel();
    order(p, counts, lists, tile, counters, n);
}
extern "C" __global__ void __launch_bounds__(256, 5) chunk_fill(Plan p, const int* picks, const int* counts, const List* lists, int* entries, int* places) {
    DYNAMIC_SHARED(memory);
    begin_kernel();
    fill<true>(p, picks, counts, lists, entries, places, memory);
}
extern "C" __global__ void __launch_bounds__(256) chunk_fill_many(Plan p, const int* picks, const int* counts, const List* lists, int* entries, int* places) {
    DYNAMIC_SHARED(memory);
    begin_kernel();
    fill<false>(p, picks, counts, lists, entries, places, memory);
}

#define EXACT(T, name)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) chunk_means_##name(Plan p, T* parts, int n, int in_tiles) {                    \
        begin_kernel();                                                                                                             \
        means<T>(p, parts, n, in_tiles);                                                                                            \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128) chunk_select_##name(Plan p, const T* q, int* picks, int n) {                    \
        begin_kernel();                                                                                                             \
        select_exact<T, 16>(p, q, picks, n);                                                                                        \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128)                                                                               \
        chunk_forward_##name(Plan p, const T* q, const int* picks, T* y, float* lse, int n) {                                       \
        begin_kernel();                                                                                                             \
        exact_forward(p, q, picks, y, lse, n);                                                                                      \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                                               \
        chunk_stats_##name(const T* dy, const T* y, const float* lse, float2* out, int rows, int n) {                               \
        begin_kernel();                                                                                                             \
        stats(dy, y, lse, out, rows, n);                                                                                            \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128)                                                                               \
        chunk_dq_##name(Plan p, const T* q, const T* dy, const int* picks, const float2* stats, T* dq, int n) {                     \
        begin_kernel();                                                                                                             \
        exact_queries(p, q, dy, picks, stats, dq, n);                                                                               \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) chunk_join_##name(const T* parts, T* out, int threads, int lanes, int share) {  \
        begin_kernel();                                                                                                             \
        join(parts, out, threads, lanes, share);                                                                                    \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128) chunk_dkv_##name(Plan p, const T* q, const T* dy, const float2* stats,          \
                                                                       const List* lists, const int* entries, T* dk, T* dv, int n) { \
        begin_kernel();                                                                                                             \
        exact_keys(p, q, dy, stats, lists, entries, dk, dv, n);                                                                     \
    }
FOR_EACH_TYPE(EXACT)

#define HEAD(T, name, N)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128)                                                                               \
        chunk_select_2_##name##_##N(Plan p, const T* q, const T* parts, int* picks, int* counts) {                                  \
        begin_kernel();                                                                                                             \
        select_tensor<T, N, 2, false>(p, q, parts, picks, counts);                                                                  \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128, 4)                                                                            \
        chunk_select_16_##name##_##N(Plan p, const T* q, const T* parts, int* picks, int* counts) {                                 \
        begin_kernel();                                                                                                             \
        select_tensor<T, N, 16, true>(p, q, parts, picks, counts);                                                                  \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128)                                                                               \
        chunk_select_more_##name##_##N(Plan p, const T* q, const T* parts, int* picks) {                                            \
        begin_kernel();                                                                                                             \
        select_tensor<T, N, 16, false>(p, q, parts, picks, nullptr);                                                                \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                                            \
        chunk_attend_##name##_##N(Plan p, const T* q, const List* lists, const int* entries, T* out, float* lse) {                  \
        begin_kernel();                                                                                                             \
        attend<T, N>(p, q, lists, entries, out, lse);                                                                               \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128)                                                                               \
        chunk_merge_##name##_##N(Plan p, const int* places, const T* parts, const float* part_lse, T* y, float* lse) {              \
        begin_kernel();                                                                                                             \
        merge<T, N>(p, places, parts, part_lse, y, lse);                                                                            \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128) chunk_merge_dq_##name##_##N(Plan p, const int* picks, const T* parts, T* dq) {\
        begin_kernel();                                                                                                             \
        merge_dq<T, N>(p, picks, parts, dq);                                                                                        \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128, 2) chunk_dq_##name##_##N(                                                     \
        Plan p, const T* q, const T* dy, const float2* stats, const List* lists, const int* entries, T* out) {                      \
        begin_kernel();                                                                                                             \
        back_queries<T, N>(p, q, dy, stats, lists, entries, out);                                                                   \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(2 * KEY_TILE, 2)                                                              \
        chunk_dkv_##name##_##N(Plan p, const T* q, const T* dy, const float2* stats, const List* lists, const int* entries,         \
                               float* parts, T* dk, T* dv) {                                                                        \
        begin_kernel();                                                                                                             \
        back_keys<T, N>(p, q, dy, stats, lists, entries, parts, dk, dv);                                                            \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(2 * N)                                                                             \
        chunk_add_pieces_##name##_##N(Plan p, const List* lists, const float* parts, T* dk, T* dv) {                                \
        begin_kernel();                                                                                                             \
        add_pieces<T, N>(p, lists, parts, dk, dv);                                                                                  \
    }
#define TENSOR(T, name) HEAD(T, name, 64) HEAD(T, name, 128)
TENSOR(bf16, bf16) TENSOR(f16, f16)

// On other chips than Hopper these do nothing.
#ifdef ANSER_HOPPER
#define ON_HOPPER(...) __VA_ARGS__
#else
#define ON_HOPPER(...)
#endif
#define HOPPER(T, name)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512, 1) chunk_hopper_attend_##name(const List* lists, const int* entries, int* counter, Plan p,\
                                                                                     const T* q, T* out, float* lse, T* y, float* y_lse) {\
        ON_HOPPER(hopper::attend<T>(p, q, lists, entries, counter, out, lse, y, y_lse);)                                            \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(288, 2)                                                                            \
        chunk_hopper_pick_##name(Plan p, const T* q, const T* parts, int* picks, int* counts) {                                     \
        begin_kernel();                                                                                                             \
        ON_HOPPER(hopper::pick<T>(p, q, parts, picks, counts);)                                                                     \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(640, 1)                                                                            \
        chunk_short_1_##name(const List* lists, const int* entries, int* counter, Plan p, const T* q, T* out, float* lse) {         \
        ON_HOPPER(hopper::attend_short<T, 1>(p, q, lists, entries, counter, out, lse);)                                             \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(640, 1)                                                                            \
        chunk_short_2_##name(const List* lists, const int* entries, int* counter, Plan p, const T* q, T* out, float* lse) {         \
        ON_HOPPER(hopper::attend_short<T, 2>(p, q, lists, entries, counter, out, lse);)                                             \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(512, 1) chunk_hopper_dq_##name(                                                    \
        const List* lists, const int* entries, int* counter, Plan p, const T* q, const T* dy, const float2* stats, T* out, T* dq) { \
        ON_HOPPER(hopper::back_queries<T>(p, q, dy, stats, lists, entries, counter, out, dq);)                                      \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                            \
        chunk_hopper_dkv_##name(const List* lists, const int* entries, int* counter, Plan p, const T* q, const T* dy,               \
                                const float2* stats, float* parts, T* dk, T* dv) {                                                  \
        ON_HOPPER(hopper::back_keys<T>(p, q, dy, stats, lists, entries, counter, parts, dk, dv);)                                   \
    }
HOPPER(bf16, bf16) HOPPER(f16, f16)

#define FORGOTTEN_FOR(T, name, N)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(N < 32 ? 32 : N) chunk_forgotten_##name##_##N(                                      \
        const T* values, const T* keys, const float* state, float* errors, int count) {                                             \
        chunks::forgotten<T, N>(values, keys, state, errors, count);                                                                \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128) chunk_ask_##name##_##N(                                                        \
        const T* queries, const T* keys, float* lse, int nqueries, int nkeys, int query_heads, int key_heads) {                     \
        chunks::asked<T, N, false>(queries, keys, nullptr, lse, nqueries, nkeys, query_heads, key_heads);                           \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128) chunk_asked_##name##_##N(                                                      \
        const T* keys, const T* queries, const float* lse, float* sums, int nkeys, int nqueries, int key_heads, int query_heads) {  \
        chunks::asked<T, N, true>(keys, queries, lse, sums, nkeys, nqueries, key_heads, query_heads);                               \
    }
#define FORGOTTEN(T, name) FORGOTTEN_FOR(T, name, 16) FORGOTTEN_FOR(T, name, 32) FORGOTTEN_FOR(T, name, 64) FORGOTTEN_FOR(T, name, 128)
FOR_EACH_TYPE(FORGOTTEN)
