// Runs CUDA kernels on the CPU, thread by thread, to test them where there is no GPU.
//
// Included before a .cu file of csrc/cuda that is compiled as C++. Every thread of a block is a
// fiber. It runs until it waits: at a barrier, at an exchange between the lanes of a warp, in a
// spin loop; then another one goes on, in an order drawn from a seed. So a barrier that is missing
// shows as a result that depends on the seed. Blocks run one after another, those of a cooperative
// launch all at once. Shared memory begins as NaN and has a canary behind it; vector accesses have
// to be aligned. Time means nothing here, and neither do caches, the memory model and rounding
// inside tensor cores.
#pragma once
#define FLOWOPS_EMULATE 1

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t STACK = 256 << 10, CANARY = 256;
constexpr int WARP = 32, BARRIERS = 16;

// Arrivals of `expected` fibers; the generation counts the times that all have come.
struct Barrier {
    unsigned arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    alignas(16) unsigned char slots[WARP][128];  // what lanes show each other
};

struct Block {
    dim3 index;
    Barrier barriers[BARRIERS];
    std::vector<Warp> warps;
    std::vector<unsigned char> memory;
    unsigned char *shared = nullptr;
    size_t shared_bytes = 0;
    std::shared_ptr<void> extension;  // what another header keeps for the block
};

struct Fiber {
    Block *block = nullptr;
    dim3 thread;
    unsigned linear = 0;
    bool done = false, begun = false;
    jmp_buf at;
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
};

inline std::vector<std::unique_ptr<unsigned char[]>> stacks;  // of fibers that are done
inline Fiber *current = nullptr;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline unsigned long progress = 0;  // arrivals and ends, to notice when there are none
inline std::string error;
inline void (*kernel)(const void *) = nullptr;
inline const void *arguments = nullptr;

inline void fail(const std::string &what) {
    if (error.empty()) error = what;
}

inline void yield() {
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

inline void arrive_and_wait(Barrier &barrier, unsigned expected) {
    progress++;
    unsigned generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline Warp &warp() { return current->block->warps[current->linear / WARP]; }
inline unsigned lane() { return current->linear % WARP; }
inline void warp_sync() {
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    unsigned first = current->linear / WARP * WARP;
    arrive_and_wait(warp().barrier, std::min<unsigned>(WARP, threads - first));
}

// Every lane shows a value; `read(lane)` within `use` sees that of another.
template <class T, class Use>
auto exchange(const T &mine, Use use) {
    static_assert(sizeof(T) <= sizeof(Warp::slots[0]));
    Warp &w = warp();
    std::memcpy(w.slots[lane()], &mine, sizeof(T));
    warp_sync();
    auto result = use([&](unsigned lane) {
        T value;
        std::memcpy(&value, w.slots[lane], sizeof(T));
        return value;
    });
    warp_sync();
    return result;
}

inline void body() {
    kernel(arguments);
    current->done = true;
    progress++;
    _longjmp(scheduler, 1);
}

inline void resume(Fiber &fiber) {
    current = &fiber;
    threadIdx = fiber.thread;
    blockIdx = fiber.block->index;
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    if (stacks.empty()) {
        fiber.stack = std::make_unique_for_overwrite<unsigned char[]>(STACK);
    } else {
        fiber.stack = std::move(stacks.back());
        stacks.pop_back();
    }
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
    swapcontext(&scheduler_context, &fiber.context);
}

// Runs these blocks together until all their threads are done.
inline void run(std::vector<Block> &blocks, size_t shared, std::mt19937_64 &random, bool shuffle) {
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    std::vector<Fiber> fibers(blocks.size() * threads);
    for (size_t b = 0; b < blocks.size(); b++) {
        Block &block = blocks[b];
        block.warps.resize((threads + WARP - 1) / WARP);
        block.memory.assign(shared + 1024 + CANARY, 0xff);
        auto start = (reinterpret_cast<uintptr_t>(block.memory.data()) + 1023) & ~uintptr_t(1023);
        block.shared = reinterpret_cast<unsigned char *>(start);
        block.shared_bytes = shared;
        for (unsigned t = 0; t < threads; t++) {
            Fiber &fiber = fibers[b * threads + t];
            fiber.block = &block;
            fiber.linear = t;
            fiber.thread = {t % blockDim.x, t / blockDim.x % blockDim.y,
                            t / (blockDim.x * blockDim.y)};
        }
    }
    std::vector<unsigned> waiting(fibers.size());
    for (size_t i = 0; i < fibers.size(); i++) waiting[i] = i;
    unsigned idle = 0;
    while (!waiting.empty() && error.empty()) {
        if (shuffle) std::shuffle(waiting.begin(), waiting.end(), random);
        unsigned long before = progress;
        for (unsigned i : waiting) {
            resume(fibers[i]);
            if (!error.empty()) break;
        }
        std::erase_if(waiting, [&](unsigned i) {
            if (!fibers[i].done) return false;
            stacks.push_back(std::move(fibers[i].stack));
            return true;
        });
        idle = progress == before ? idle + 1 : 0;
        if (idle > 1000)
            fail("threads wait for each other for ever (a barrier that not all reach?)");
    }
    for (Block &block : blocks)
        for (size_t i = 0; i < CANARY; i++)
            if (block.shared[shared + i] != 0xff) return fail("a write behind the shared memory");
}

inline std::map<std::string, void (*)(const void *)> &kernels() {
    static std::map<std::string, void (*)(const void *)> all;
    return all;
}

struct Registration {
    Registration(const char *name, void (*function)(const void *)) { kernels()[name] = function; }
};

}  // namespace emulator

#define FLOWOPS_KERNEL(name, Arguments, threads, blocks_per_sm)                        \
    static void name(const Arguments &args);                                           \
    static emulator::Registration register_##name(                                     \
        #name, [](const void *args) { name(*static_cast<const Arguments *>(args)); }); \
    static void name(const Arguments &args)

// Returns null, or what went wrong. `seed` 0 runs the threads in their order.
extern "C" __attribute__((used, visibility("default"))) inline const char *emulate(
    const char *name, const unsigned *grid, const unsigned *block, size_t shared, int cooperative,
    const void *arguments, unsigned long seed) {
    static std::mutex one_at_a_time;
    std::lock_guard guard(one_at_a_time);
    using namespace emulator;
    error.clear();
    if (!kernels().count(name)) {
        fail(std::string("no kernel ") + name);
        return error.c_str();
    }
    kernel = kernels()[name];
    emulator::arguments = arguments;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    std::mt19937_64 random(seed);
    std::vector<dim3> indices;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) indices.push_back({x, y, z});
    if (seed) std::shuffle(indices.begin(), indices.end(), random);
    size_t at_once = cooperative ? indices.size() : 1;
    for (size_t i = 0; i < indices.size() && error.empty(); i += at_once) {
        std::vector<Block> blocks(at_once);
        for (size_t j = 0; j < at_once; j++) blocks[j].index = indices[i + j];
        run(blocks, shared, random, seed != 0);
    }
    return error.empty() ? nullptr : error.c_str();
}

// --- CUDA's builtins ----------------------------------------------------------------------------

inline unsigned char *shared_memory() { return emulator::current->block->shared; }

inline void __syncthreads() {
    emulator::arrive_and_wait(emulator::current->block->barriers[0],
                              blockDim.x * blockDim.y * blockDim.z);
}
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::warp_sync(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::yield(); }

template <class T>
T __shfl_xor_sync(unsigned, T mine, int lanes) {
    return emulator::exchange(mine, [&](auto read) { return read(emulator::lane() ^ lanes); });
}
template <class T>
T __shfl_sync(unsigned, T mine, int lane) {
    return emulator::exchange(mine, [&](auto read) { return read(lane & 31); });
}
template <class T>
T __shfl_down_sync(unsigned, T mine, int lanes) {
    return emulator::exchange(mine, [&](auto read) {
        unsigned from = emulator::lane() + lanes;
        return from < 32 ? read(from) : mine;
    });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    return emulator::exchange(predicate, [&](auto read) {
        unsigned bits = 0;
        for (unsigned i = 0; i < 32; i++) bits |= unsigned(read(i) != 0) << i;
        return bits;
    });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == ~0u;
}

inline unsigned atomicAdd(unsigned *at, unsigned value) {
    unsigned before = *at;
    *at += value;
    return before;
}
inline unsigned atomicMax(unsigned *at, unsigned value) {
    unsigned before = *at;
    *at = std::max(*at, value);
    return before;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }

// Each rounds once: this file is compiled without contraction.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
template <class T>
T __ldg(const T *at) {
    return *at;
}
template <class T>
T __ldcg(const T *at) {
    return *at;
}
template <class T>
T __ldcs(const T *at) {
    return *at;
}
template <class T>
void __stcg(T *at, T value) {
    *at = value;
}
template <class T>
void __stcs(T *at, T value) {
    *at = value;
}
using std::max;
using std::min;

// --- conversions --------------------------------------------------------------------------------

inline float as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline unsigned as_bits(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
template <class F16>
F16 to_f16(float x) {
    _Float16 half = x;
    F16 out;
    std::memcpy(&out, &half, 2);
    return out;
}
template <class F16>
float from_f16(F16 x) {
    _Float16 half;
    std::memcpy(&half, &x, 2);
    return half;
}
template <class BF16>
BF16 to_bf16(float x) {
    unsigned bits = as_bits(x);
    unsigned rounded = bits + 0x7fff + (bits >> 16 & 1);
    BF16 out;
    out.bits = x != x ? 0x7fff : rounded >> 16;
    return out;
}

inline void check_aligned(const void *at, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(at) % bytes) emulator::fail("a misaligned vector access");
}
