// What the emulated driver and the emulated kernels share: the thread that runs now, and how it waits for others.
//
// A block's threads are fibers of one system thread. A fiber runs until it waits for its warp or its block; then the next one
// goes on. Blocks run one after another, but those of a cooperative launch in turns: such a kernel has no __shared__ variables, which
// all its blocks would share here, only dynamic shared memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector_types.h>

namespace emulator {

// The lanes of a warp exchange values through here: written before a wait, read after it, two sides in turn.
struct Warp {
    unsigned char slots[2][32][128];
};

struct Thread {
    uint3 index;
    int lane;
    unsigned turn; // side of the warp's slots used last
    Warp* warp;
};

struct State {
    Thread* self;
    uint3 block;
    dim3 block_size, grid_size;
    unsigned char* dynamic_shared;
    void (*wait_warp)();
    void (*wait_block)(int barrier, int threads); // threads = 0: all of the block
    void (*arrive_block)(int barrier, int threads);
    void (*yield)();                              // lets others run
};

// One kernel: its name, how to call it with the driver's argument pointers, and the sizes of its arguments.
struct Kernel {
    const char* name;
    void (*call)(void** args);
    const size_t* sizes;
    size_t count;
};

// What a library of kernels exports as `emulator_kernels`: it keeps the state and returns its kernels.
using Kernels = const Kernel* (*)(State* state, size_t* count);

} // namespace emulator
