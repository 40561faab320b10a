// cuBLASLt on the CPU, as much of it as Anser calls: products with their epilogue, sums in f32 over k in order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

namespace {

struct Desc {
    int trans[2] = {0, 0}; // of A, of B
    unsigned epilogue = 1;
    void* bias = nullptr;
    int bias_type = -1;
};
struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t ld;
    int batch = 1;
    int64_t stride = 0;
};

float get(const void* p, int type, size_t i) {
    switch (type) {
    case 0: return static_cast<const float*>(p)[i];
    case 2: return __half2float(static_cast<const __half*>(p)[i]);
    case 14: return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    }
    abort();
}
void set(void* p, int type, size_t i, float v) {
    switch (type) {
    case 0: static_cast<float*>(p)[i] = v; return;
    case 2: static_cast<__half*>(p)[i] = __float2half_rn(v); return;
    case 14: static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v); return;
    }
    abort();
}

struct Call {
    Desc d;
    Layout a, b, c;
    const void *pa, *pb;
    void* pc;
    float alpha, beta;
};

// The matrix by rows of k: [outer][k].
std::vector<float> rows(const void* p, const Layout& l, bool k_is_rows, size_t at) {
    const size_t k = k_is_rows ? l.rows : l.cols, outer = k_is_rows ? l.cols : l.rows;
    std::vector<float> to(outer * k);
    for (size_t o = 0; o < outer; o++)
        for (size_t i = 0; i < k; i++) to[o * k + i] = get(p, l.type, at + (k_is_rows ? i + o * l.ld : o + i * l.ld));
    return to;
}

void multiply(void* data) {
    auto* call = static_cast<Call*>(data);
    const Desc& d = call->d;
    const size_t m = call->c.rows, n = call->c.cols, k = d.trans[0] ? call->a.rows : call->a.cols;
    for (int batch = 0; batch < call->c.batch; batch++) {
        const auto a = rows(call->pa, call->a, d.trans[0], batch * call->a.stride), b = rows(call->pb, call->b, !d.trans[1], batch * call->b.stride);
        if (a.size() != m * k || b.size() != n * k) abort();
        const int bias_type = d.bias_type < 0 ? call->c.type : d.bias_type;
        for (size_t j = 0; j < n; j++)
            for (size_t i = 0; i < m; i++) {
                float s = 0;
                for (size_t x = 0; x < k; x++) s += a[i * k + x] * b[j * k + x];
                const size_t at = batch * call->c.stride + i + j * call->c.ld;
                s *= call->alpha;
                if (call->beta != 0) s += call->beta * get(call->pc, call->c.type, at);
                if (d.epilogue & 4) s += get(d.bias, bias_type, i);
                if (d.epilogue & 2 && s < 0) s = 0;
                set(call->pc, call->c.type, at, s);
            }
        const auto sums = [&](const std::vector<float>& x, size_t outer) {
            for (size_t o = 0; o < outer; o++) {
                float s = 0;
                for (size_t i = 0; i < k; i++) s += x[o * k + i];
                set(d.bias, bias_type, o, s);
            }
        };
        if (d.epilogue == 256) sums(a, m);
        if (d.epilogue == 512) sums(b, n);
    }
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) int

extern "C" __attribute__((visibility("default"))) size_t cublasLtGetVersion() { return 0; }
EXPORT cublasLtCreate(void** h) { return *h = new int, 0; }
EXPORT cublasLtDestroy(void*) { return 0; }
EXPORT cublasLtMatmulDescCreate(void** d, int, int) { return *d = new Desc, 0; }
EXPORT cublasLtMatmulDescDestroy(void* d) { return delete static_cast<Desc*>(d), 0; }
EXPORT cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* v, size_t) {
    auto* d = static_cast<Desc*>(desc);
    switch (attribute) {
    case 3: memcpy(&d->trans[0], v, 4); break;
    case 4: memcpy(&d->trans[1], v, 4); break;
    case 7: memcpy(&d->epilogue, v, 4); break;
    case 8: memcpy(&d->bias, v, 8); break;
    case 26: memcpy(&d->bias_type, v, 4); break;
    }
    return 0;
}
EXPORT cublasLtMatrixLayoutCreate(void** l, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    return *l = new Layout{type, rows, cols, ld}, 0;
}
EXPORT cublasLtMatrixLayoutDestroy(void* l) { return delete static_cast<Layout*>(l), 0; }
EXPORT cublasLtMatrixLayoutSetAttribute(void* layout, int attribute, const void* v, size_t) {
    auto* l = static_cast<Layout*>(layout);
    switch (attribute) {
    case 4: memcpy(&l->ld, v, 8); break;
    case 5: memcpy(&l->batch, v, 4); break;
    case 6: memcpy(&l->stride, v, 8); break;
    default: abort();
    }
    return 0;
}
EXPORT cublasLtMatmulPreferenceCreate(void** p) { return *p = new int, 0; }
EXPORT cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return 0; }
EXPORT cublasLtMatmulPreferenceDestroy(void*) { return 0; }
EXPORT cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* count) {
    memset(results, 0, 64 + 8 + 4 + 4 + 16);
    return *count = 1, 0;
}
EXPORT cublasLtMatmulAlgoConfigGetAttribute(const void*, int, void* buf, size_t size, size_t*) { return memset(buf, 0, size), 0; }
EXPORT cublasLtMatmul(void*, void* desc, const void* alpha, const void* a, void* la, const void* b, void* lb, const void* beta,
                      const void* c, void*, void* out, void* lc, const void*, void*, size_t, void* stream) {
    if (c != out && *static_cast<const float*>(beta) != 0) return 7;
    auto* call = new Call{*static_cast<Desc*>(desc), *static_cast<Layout*>(la), *static_cast<Layout*>(lb), *static_cast<Layout*>(lc),
                          a, b, out, *static_cast<const float*>(alpha), *static_cast<const float*>(beta)};
    // The driver runs it now, or when the graph being captured is launched (so it is kept).
    using Run = int (*)(void (*)(void*), void*, void*);
    static const Run run = [] {
        Dl_info self;
        dladdr(reinterpret_cast<void*>(multiply), &self);
        std::string path = self.dli_fname;
        path = path.substr(0, path.rfind('/')) + "/libcuda.so";
        return reinterpret_cast<Run>(dlsym(dlopen(path.c_str(), RTLD_NOW), "emulator_run"));
    }();
    return run(multiply, call, stream);
}
