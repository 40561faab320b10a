// The CUDA driver on the CPU, as much of it as Anser calls: memory, copies, launches, graphs. It is found under the driver's name.
//
// Memory ends at a guard page, so that reading or writing past a buffer stops the program, and begins as NaN, as does dynamic
// shared memory in every block. What a stream does beside another is done as late as may be, when somebody waits for it, to show
// missing waits and memory given to others too early. ANSER_EMULATOR_SEED=n lets warps run in an order of its own, to show missing barriers.
#include "core.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <glob.h>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>

using namespace emulator;

extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

namespace {

constexpr size_t STACK = 256 << 10;
constexpr int BARRIERS = 16;

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};

struct Fiber {
    Thread thread; // first, so that the thread that runs is its fiber
    void* sp;
    bool done;
};

struct Block {
    uint3 index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<int> live;
    std::vector<Barrier> warp_barriers;
    Barrier barriers[BARRIERS];
    int live_threads;
    unsigned char* dynamic_shared;
};

std::recursive_mutex one;
State state;
Block* block; // that runs now
unsigned char *stacks, *dynamic_shared;
constexpr size_t TOGETHER = 8, SHARED = 256 << 10; // blocks that run in turns at most, and the dynamic shared memory of each
void* scheduler;
const Kernel* kernel;
void** arguments;
uint64_t order;

void yield() { emulator_switch(&reinterpret_cast<Fiber*>(state.self)->sp, scheduler); }

template <class Needed> void end_if_all(Barrier& b, Needed needed) {
    if (b.arrived < needed()) return;
    b.arrived = 0;
    b.generation++;
}
template <class Needed> void wait(Barrier& b, Needed needed) {
    const unsigned generation = b.generation;
    b.arrived++;
    for (end_if_all(b, needed); b.generation == generation; end_if_all(b, needed)) {
        yield();
        if (b.generation != generation) return;
    }
}

void wait_warp() {
    const size_t w = state.self->warp - block->warps.data();
    wait(block->warp_barriers[w], [w] { return block->live[w]; });
}

void wait_block(int barrier, int threads) {
    if (barrier >= BARRIERS) abort();
    wait(block->barriers[barrier], [threads] { return threads ? threads : block->live_threads; });
}

void arrive_block(int barrier, int threads) {
    if (barrier >= BARRIERS) abort();
    Barrier& b = block->barriers[barrier];
    b.arrived++;
    end_if_all(b, [threads] { return threads; });
}

void run_fiber() {
    kernel->call(arguments);
    auto* f = reinterpret_cast<Fiber*>(state.self);
    f->done = true;
    block->live_threads--;
    block->live[f->thread.warp - block->warps.data()]--;
    yield();
    abort();
}

bool skipped() {
    if (!order) return false;
    order ^= order << 13;
    order ^= order >> 7;
    order ^= order << 17;
    return order & 1;
}

// The `place`-th of the blocks that run in turns.
Block begin_block(uint3 index, size_t place, size_t shared) {
    Block b;
    b.index = index;
    const dim3 n = state.block_size;
    const size_t threads = size_t(n.x) * n.y * n.z;
    b.fibers.resize(threads);
    b.warps.resize((threads + 31) / 32);
    b.warp_barriers.assign(b.warps.size(), {});
    b.live.assign(b.warps.size(), 0);
    b.live_threads = int(threads);
    b.dynamic_shared = dynamic_shared + place * SHARED;
    memset(b.dynamic_shared, 0xff, shared);
    for (size_t i = 0; i < threads; i++) {
        Fiber& f = b.fibers[i];
        f.thread = {{unsigned(i % n.x), unsigned(i / n.x % n.y), unsigned(i / n.x / n.y)}, int(i % 32), 0, &b.warps[i / 32]};
        f.done = false;
        b.live[i / 32]++;
        void** sp = reinterpret_cast<void**>(stacks + (place * 1024 + i + 1) * STACK);
        *--sp = nullptr; // keeps the stack aligned as after a call
        *--sp = reinterpret_cast<void*>(run_fiber);
        for (int r = 0; r < 6; r++) *--sp = nullptr;
        f.sp = sp;
    }
    return b;
}

// Every thread until it waits.
void turn(Block& b) {
    block = &b;
    state.block = b.index;
    state.dynamic_shared = b.dynamic_shared;
    for (size_t w = 0; w < b.warps.size(); w++) {
        if (skipped()) continue;
        for (size_t i = w * 32; i < std::min(b.fibers.size(), w * 32 + 32); i++) {
            Fiber& f = b.fibers[i];
            if (f.done) continue;
            state.self = &f.thread;
            emulator_switch(&scheduler, f.sp);
        }
    }
}

std::map<std::string, const Kernel*> kernels;

void load() {
    state.wait_warp = wait_warp;
    state.wait_block = wait_block;
    state.arrive_block = arrive_block;
    state.yield = yield;
    if (const char* seed = getenv("ANSER_EMULATOR_SEED")) order = strtoull(seed, nullptr, 10) * 0x9e3779b97f4a7c15 | 1;
    stacks = static_cast<unsigned char*>(mmap(nullptr, TOGETHER * 1024 * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    dynamic_shared = static_cast<unsigned char*>(aligned_alloc(1024, TOGETHER * SHARED));
    Dl_info self;
    dladdr(reinterpret_cast<void*>(load), &self);
    std::string folder = self.dli_fname;
    folder.resize(folder.rfind('/') + 1);
    glob_t found;
    glob((folder + "kernels-*.so").c_str(), 0, nullptr, &found);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        void* library = dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            fprintf(stderr, "%s\n", dlerror());
            abort();
        }
        size_t count;
        const Kernel* list = reinterpret_cast<Kernels>(dlsym(library, "emulator_kernels"))(&state, &count);
        for (size_t k = 0; k < count; k++)
            if (!kernels.emplace(list[k].name, &list[k]).second) {
                fprintf(stderr, "two kernels are named %s\n", list[k].name);
                abort();
            }
    }
    globfree(&found);
}

struct Function {
    const Kernel* kernel;
    size_t shared; // bytes of dynamic shared memory it may use
};
std::map<std::string, Function> functions;
std::map<uint64_t, std::pair<void*, size_t>> memory;

// While a thread captures a stream, its work is kept here instead of done.
using Work = std::vector<std::function<void()>>;
thread_local Work* capture;

// A stream that has waited for another one's event puts work off until its own event is waited for.
struct Stream {
    bool late = false;
    Work work;
};
struct Event {
    Stream* on = nullptr;
};
std::vector<Stream*> streams;

int run(std::function<void()> work, void* on = nullptr) {
    auto* stream = static_cast<Stream*>(on);
    std::lock_guard<std::recursive_mutex> guard(one);
    if (capture)
        capture->push_back(std::move(work));
    else if (stream && stream->late)
        stream->work.push_back(std::move(work));
    else
        work();
    return 0;
}

void finish(Stream* stream) {
    std::lock_guard<std::recursive_mutex> guard(one);
    if (!stream) return;
    stream->late = false;
    for (auto& work : std::exchange(stream->work, {})) run(work, stream);
}

void finish_all() {
    std::lock_guard<std::recursive_mutex> guard(one);
    for (Stream* s : streams) finish(s);
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) int

EXPORT cuInit(unsigned) {
    static std::once_flag once;
    std::call_once(once, load);
    return 0;
}
EXPORT cuDriverGetVersion(int* v) { return *v = 13000, 0; }
EXPORT cuDeviceGetCount(int* n) { return *n = 1, 0; }
EXPORT cuDeviceGet(int* d, int) { return *d = 0, 0; }
EXPORT cuDeviceGetName(char* name, int n, int) { return snprintf(name, n, "emulator"), 0; }
EXPORT cuDeviceGetAttribute(int* v, int attribute, int) {
    switch (attribute) {
    case 16: *v = 7; break;          // multiprocessors
    case 75: *v = 9; break;          // compute capability
    case 76: *v = 0; break;
    case 97: *v = 227 << 10; break;  // shared memory of a block
    default: *v = 0;
    }
    return 0;
}
EXPORT cuDeviceTotalMem_v2(size_t* n, int) { return *n = size_t(8) << 30, 0; }
EXPORT cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = *total = size_t(8) << 30, 0; }
EXPORT cuDevicePrimaryCtxRetain(void** c, int) { return *c = &state, 0; }
EXPORT cuCtxSetCurrent(void*) { return 0; }
EXPORT cuCtxSynchronize() { return finish_all(), 0; }
EXPORT cuStreamCreate(void** s, unsigned) {
    std::lock_guard<std::recursive_mutex> guard(one);
    streams.push_back(new Stream);
    return *s = streams.back(), 0;
}
EXPORT cuStreamDestroy_v2(void*) { return 0; }
EXPORT cuStreamSynchronize(void* s) { return finish(static_cast<Stream*>(s)), 0; }
EXPORT cuStreamWaitEvent(void* s, void* e, unsigned) {
    auto *stream = static_cast<Stream*>(s), *other = static_cast<Event*>(e)->on;
    if (!other || other == stream) return 0;
    if (other->late)
        finish(other);
    else
        stream->late = true;
    return 0;
}
EXPORT cuEventCreate(void** e, unsigned) { return *e = new Event, 0; }
EXPORT cuEventRecord(void* e, void* s) { return static_cast<Event*>(e)->on = static_cast<Stream*>(s), 0; }
EXPORT cuEventSynchronize(void*) { return 0; }
EXPORT cuEventQuery(void*) { return 0; }
EXPORT cuEventDestroy_v2(void*) { return 0; }
EXPORT cuEventElapsedTime(float* ms, void*, void*) { return *ms = 0.001f, 0; }
EXPORT cuEventElapsedTime_v2(float* ms, void*, void*) { return *ms = 0.001f, 0; }
EXPORT cuGetErrorString(int, const char** s) { return *s = "error of the emulated driver", 0; }

EXPORT cuMemAlloc_v2(uint64_t* p, size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(one);
    const size_t rounded = (bytes + 255) / 256 * 256, pages = (rounded + 4095) / 4096 * 4096;
    auto* base = static_cast<unsigned char*>(mmap(nullptr, pages + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED) return 2;
    mprotect(base + pages, 4096, PROT_NONE);
    *p = reinterpret_cast<uint64_t>(base + pages - rounded);
    memset(reinterpret_cast<void*>(*p), 0xff, rounded);
    memory[*p] = {base, pages + 4096};
    return 0;
}
EXPORT cuMemFree_v2(uint64_t p) {
    std::lock_guard<std::recursive_mutex> guard(one);
    finish_all();
    if (!memory.count(p)) return 1;
    munmap(memory[p].first, memory[p].second);
    memory.erase(p);
    return 0;
}
EXPORT cuMemAllocHost_v2(void** p, size_t bytes) { return *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096), 0; }
EXPORT cuMemFreeHost(void* p) { return free(p), 0; }
EXPORT cuMemHostRegister_v2(void*, size_t, unsigned) { return 0; }
EXPORT cuMemHostUnregister(void*) { return 0; }
EXPORT cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, void* s) {
    return run([=] { memcpy(reinterpret_cast<void*>(to), from, n); }, s);
}
EXPORT cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, void* s) {
    return run([=] { memcpy(to, reinterpret_cast<void*>(from), n); }, s);
}
EXPORT cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void* s) {
    return run([=] { memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), n); }, s);
}
EXPORT cuMemsetD8Async(uint64_t to, unsigned char v, size_t n, void* s) {
    return run([=] { memset(reinterpret_cast<void*>(to), v, n); }, s);
}

EXPORT cuModuleLoadData(void** m, const void*) { return *m = &state, 0; }
EXPORT cuModuleGetFunction(void** f, void*, const char* name) {
    std::lock_guard<std::recursive_mutex> guard(one);
    const auto k = kernels.find(name);
    if (k == kernels.end()) return fprintf(stderr, "the emulator has no kernel %s\n", name), 500;
    *f = &functions.emplace(name, Function{k->second, 48 << 10}).first->second;
    return 0;
}
EXPORT cuFuncSetAttribute(void* f, int attribute, int value) {
    if (attribute == 8) static_cast<Function*>(f)->shared = value;
    return 0;
}
EXPORT cuFuncGetAttribute(int* v, int, void*) { return *v = 0, 0; }
EXPORT cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void*, int, size_t) { return *n = 2, 0; }

// CUlaunchConfig: grid, block, shared bytes, stream, attributes.
struct LaunchAttribute {
    int id;
    char pad[4];
    union {
        int cooperative;
        char bytes[64];
    };
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned count;
};
EXPORT cuLaunchKernelEx(const LaunchConfig* c, void* f, void** args, void**) {
    const auto* function = static_cast<Function*>(f);
    const auto [gx, gy, gz] = c->grid;
    const auto [bx, by, bz] = c->block;
    const unsigned shared = c->shared;
    bool together = false;
    for (unsigned i = 0; i < c->count; i++) together |= c->attributes[i].id == 2 && c->attributes[i].cooperative;
    if (size_t(bx) * by * bz > 1024 || shared > function->shared || shared > (227u << 10) || gy > 65535 || gz > 65535) return 1;
    if (together && size_t(gx) * gy * gz > TOGETHER) return 720;
    const Kernel* k = function->kernel;
    std::vector<std::vector<unsigned char>> copies(k->count);
    for (size_t i = 0; i < k->count; i++) {
        const auto* from = static_cast<unsigned char*>(args[i]);
        copies[i].assign(from, from + k->sizes[i]);
    }
    return run([=, gx = gx, gy = gy, gz = gz, bx = bx, by = by, bz = bz]() mutable {
        std::vector<void*> pointers;
        for (auto& c : copies) pointers.push_back(c.data());
        kernel = k;
        arguments = pointers.data();
        state.block_size = dim3(bx, by, bz);
        state.grid_size = dim3(gx, gy, gz);
        std::vector<Block> blocks;
        const auto run_blocks = [&] {
            for (bool running = true; running;) {
                running = false;
                for (Block& b : blocks)
                    if (b.live_threads) running = true, turn(b);
            }
            blocks.clear();
        };
        for (unsigned z = 0; z < gz; z++)
            for (unsigned y = 0; y < gy; y++)
                for (unsigned x = 0; x < gx; x++) {
                    blocks.push_back(begin_block({x, y, z}, blocks.size(), shared));
                    if (!together) run_blocks();
                }
        run_blocks();
    }, c->stream);
}
EXPORT cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                      void* stream, void** args, void** extra) {
    const LaunchConfig config{{gx, gy, gz}, {bx, by, bz}, shared, stream, nullptr, 0};
    return cuLaunchKernelEx(&config, f, args, extra);
}

EXPORT cuStreamBeginCapture_v2(void*, int) { return capture = new Work, 0; }
EXPORT cuStreamEndCapture(void*, void** graph) {
    *graph = capture;
    capture = nullptr;
    return 0;
}
EXPORT cuStreamIsCapturing(void*, int* status) { return *status = capture ? 1 : 0, 0; }
EXPORT cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) { return *exec = new Work(*static_cast<Work*>(graph)), 0; }
EXPORT cuGraphLaunch(void* exec, void*) {
    for (auto& work : *static_cast<Work*>(exec)) run(work);
    return 0;
}
EXPORT cuGraphUpload(void*, void*) { return 0; }
EXPORT cuGraphDestroy(void* graph) { return delete static_cast<Work*>(graph), 0; }
EXPORT cuGraphExecDestroy(void* exec) { return delete static_cast<Work*>(exec), 0; }
// For cuBLASLt, which works on the same streams.
EXPORT emulator_run(void (*f)(void*), void* data, void* stream) {
    return run([=] { f(data); }, stream);
}
