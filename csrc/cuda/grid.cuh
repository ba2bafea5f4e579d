// What blocks of one grid, and warps of one block, tell each other without a launch in between.
//
// Between blocks: packets of 16 bytes, three words of payload and an epoch. One store makes all of
// them visible at once, so that a reader that finds the epoch it waits for has the payload as well:
// no fence, no barrier, no second trip to the L2 cache. tests/emulator/grid.h has the same
// functions for the CPU.
#pragma once
#include "mma16.cuh"

struct alignas(16) Quad {
    u32 word[4];
};

#ifndef FLOWOPS_EMULATE

// --- between blocks -----------------------------------------------------------------------------

// A 128-bit access with a scope is a single one in PTX's memory model (ISA 8.3, sm_70).
DEVICE Quad load_packet(const Quad *at) {
    Quad q;
    asm volatile(
        "{\n\t.reg .b128 all;\n\t.reg .b64 low, high;\n\t"
        "ld.relaxed.gpu.global.b128 all, [%4];\n\t"
        "mov.b128 {low, high}, all;\n\t"
        "mov.b64 {%0, %1}, low;\n\tmov.b64 {%2, %3}, high;\n\t}"
        : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3])
        : "l"(at)
        : "memory");
    return q;
}

DEVICE void store_packet(Quad *at, const Quad &q) {
    asm volatile(
        "{\n\t.reg .b128 all;\n\t.reg .b64 low, high;\n\t"
        "mov.b64 low, {%0, %1};\n\tmov.b64 high, {%2, %3};\n\t"
        "mov.b128 all, {low, high};\n\t"
        "st.relaxed.gpu.global.b128 [%4], all;\n\t}" ::"r"(q.word[0]),
        "r"(q.word[1]), "r"(q.word[2]), "r"(q.word[3]), "l"(at)
        : "memory");
}

// Between two looks at what is not there yet.
DEVICE void rest() { __nanosleep(20); }

// Orders what this thread (and those it met at a barrier) wrote before for all blocks.
DEVICE void fence_grid() { __threadfence(); }

// What other blocks wrote before a fence; the L1 cache is left out.
DEVICE Quad load_l2(const Quad *at) {
    Quad q;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3])
                 : "l"(at));
    return q;
}

DEVICE void prefetch_l2(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// --- between the warps of a block ---------------------------------------------------------------

// The first THREADS threads of a block meet; the others are not asked.
template <int THREADS>
DEVICE void meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// A word in shared memory by which one thread tells others how far it is. Not a release: its fence
// would wait for copies that are still on their way. None is needed, since a multiprocessor serves
// accesses to shared memory in their order (mbarrier.arrive, a release, is compiled to none
// either).
DEVICE u32 look(const u32 *at) {
    u32 x;
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];"
                 : "=r"(x)
                 : "r"(shared_address(at))
                 : "memory");
    return x;
}
DEVICE void show(u32 *at, u32 x) {
    asm volatile("st.relaxed.cta.shared.u32 [%0], %1;" ::"r"(shared_address(at)), "r"(x)
                 : "memory");
}

// --- copies in the background -------------------------------------------------------------------

// Begins to copy 16 bytes to shared memory, with what `evict_first` returns.
DEVICE void cp_async16_once(u32 to, const void *from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "l"(policy)
                 : "memory");
}
// For what is not read again before the L2 cache is full of other things.
DEVICE u64 evict_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
#else
#include "grid.h"
#endif
