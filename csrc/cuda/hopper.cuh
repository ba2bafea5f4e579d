// Hopper's own instructions: products of warpgroups, barriers in shared memory, copies that arrive
// at them. For sm_90a; the emulator has twins of the same names (tests/emulator/hopper.h).
//
// Source, for layouts and bits: PTX ISA 9, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate
// Instructions" (register fragments of m64nNk16, shared memory layouts, matrix descriptor, async
// proxy), "mbarrier", "cp.async.mbarrier.arrive", "setmaxnreg". Where the ISA shows a figure
// instead of a formula, and for the offsets of a descriptor, the layouts that CUTLASS states are
// the second witness (include/cute/arch/mma_sm90_desc.hpp,
// include/cute/atom/mma_traits_sm90_gmma.hpp: CLayout_64xN, ALayout_64x16, make_gmma_desc), and
// ThunderKittens the third (include/types/shared/descriptor.cuh).
#pragma once

#include "mma16.cuh"

constexpr int WARPGROUP = 128;

// --- tiles in shared memory ---------------------------------------------------------------------

// A tile has rows of 128 bytes, 64 elements of 16 bits, and begins at a multiple of 1024 bytes. The
// eight 16-byte pieces of row r stand in the order piece ^ (r % 8), which is the 128-byte swizzle
// of wgmma: bits 4..6 of an address are crossed with its bits 7..9 (CUTLASS: Swizzle<3, 4, 3>).
constexpr int ROW = 128;

CORE int swizzled(int row, int piece) { return row * ROW + (piece ^ (row & 7)) * 16; }

// Matrix descriptor: bits 0..13 the address, 16..29 the leading and 32..45 the stride byte offset,
// all three without their last four bits; 49..51 the base offset, 0 for tiles that begin at
// multiples of 1024; 62..63 the swizzle, 1 for 128 bytes. With this swizzle (make_gmma_desc)
//  - k along the rows (K-major): the stride offset leads to the next 8 rows, the leading one is not
//    used; a step of k by 16 is 32 bytes;
//  - k down the rows (MN-major): the stride offset leads to the next 8 of k, the leading one to the
//    next 64 columns, of which these tiles have no more; a step of k by 16 is 16 rows.
// Triton makes the same bits and steps for tiles of 64 by 64, in both directions.
CORE u64 descriptor(u32 address) {
    constexpr u64 stride = 8 * ROW;
    return u64(address & 0x3ffff) >> 4 | (stride >> 4) << 32 | u64(1) << 62;
}

#ifdef FLOWOPS_EMULATE
#include "hopper.h"
#else

// --- barriers and copies ------------------------------------------------------------------------

DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Returns when the phase of this parity is over; at once for parity 1 of a new barrier.
DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Copies 16 bytes to shared memory, or zeros.
DEVICE void copy_async(u32 to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Arrives when all copies that this thread has ever begun have landed. They count as the generic
// proxy's: who waits for them has to pass fence_proxy_async before a product reads them.
DEVICE void copies_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Until all copies that this thread began have landed.
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Between a wait for data and the first product that reads it.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barrier `id` (0 is __syncthreads) of so many threads.
DEVICE void named_barrier(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of every thread of the warpgroup from here on.
template <int REGISTERS>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- products of a warpgroup --------------------------------------------------------------------

// Before the first product of a group: registers that it uses have been written.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until no more than so many groups are under way.
template <int GROUPS>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across the instructions around.
template <int COUNT>
DEVICE void pin(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// And those that make a left operand, before the fence that its products need.
DEVICE void pin(u32 (&p)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; i++) asm volatile("" : "+r"(p[i / 4][i % 4])::"memory");
}

#define FLOWOPS_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLOWOPS_D16(i) FLOWOPS_D4(i), FLOWOPS_D4(i + 4), FLOWOPS_D4(i + 8), FLOWOPS_D4(i + 12)
#define FLOWOPS_D32 FLOWOPS_D16(0), FLOWOPS_D16(16)
#define FLOWOPS_D48 FLOWOPS_D32, FLOWOPS_D16(32)
#define FLOWOPS_D64 FLOWOPS_D48, FLOWOPS_D16(48)
#define FLOWOPS_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FLOWOPS_R32 FLOWOPS_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FLOWOPS_R48 FLOWOPS_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define FLOWOPS_R64 FLOWOPS_R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d [64, N] += a [64, 16] b [16, N], a in registers. Thread t of the warpgroup holds
//   d[4 j + 2 h + e]: row 16 (t / 32) + t % 32 / 4 + 8 h, column 8 j + 2 (t % 4) + e
//   a[2 g + h], half e: the same row, column 8 g + 2 (t % 4) + e
// so that columns 16 i .. 16 i + 15 of a d are an a. b lies in shared memory: k along the rows, or
// DOWN them.
#define FLOWOPS_WGMMA(T, type, n, results, operands, a0, a1, a2, a3, b0, down)                    \
    template <bool DOWN>                                                                          \
    DEVICE void wgmma(T, float (&d)[n / 2], const u32(&a)[4], u64 b) {                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" results \
                     "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b0 ", 1, 1, 1, %" #down ";"   \
                     : operands                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(DOWN)));       \
    }
// The same of a in shared memory, k along its rows. N = 64; FRESH: d = a b.
#define FLOWOPS_WGMMA_TYPE(T, type)                                                      \
    FLOWOPS_WGMMA(T, type, 32, FLOWOPS_R16, FLOWOPS_D16(0), 16, 17, 18, 19, 20, 21)      \
    FLOWOPS_WGMMA(T, type, 64, FLOWOPS_R32, FLOWOPS_D32, 32, 33, 34, 35, 36, 37)         \
    FLOWOPS_WGMMA(T, type, 96, FLOWOPS_R48, FLOWOPS_D48, 48, 49, 50, 51, 52, 53)         \
    FLOWOPS_WGMMA(T, type, 128, FLOWOPS_R64, FLOWOPS_D64, 64, 65, 66, 67, 68, 69)        \
    template <bool FRESH>                                                                \
    DEVICE void wgmma(T, float (&d)[32], u64 a, u64 b) {                                 \
        asm volatile(                                                                    \
            "{\n"                                                                        \
            ".reg .pred add;\n"                                                          \
            "setp.ne.b32 add, %34, 0;\n"                                                 \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FLOWOPS_R32 \
            "}, %32, %33, add, 1, 1, 0, 0;\n"                                            \
            "}"                                                                          \
            : FLOWOPS_D32                                                                \
            : "l"(a), "l"(b), "n"(int(!FRESH)));                                         \
    }

FLOWOPS_WGMMA_TYPE(bf16, "bf16")
FLOWOPS_WGMMA_TYPE(f16, "f16")
#endif

// --- with both ----------------------------------------------------------------------------------

// Where a ring of slots is: the next one, and the parity of its phase.
template <int COUNT>
struct Ring {
    u32 slot = 0, parity = 0;
    DEVICE void advance() {
        if (++slot == COUNT) slot = 0, parity ^= 1;
    }
};

DEVICE void arrive_once_a_warp(u32 barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

// Of an accumulator a thread has two rows, `row` and row + 8 of the 64, and in each the columns
// 8 j + column and the next one.
struct Lane {
    int row, column;
};

DEVICE Lane lane_at() {
    int thread = threadIdx.x % WARPGROUP;
    return {thread / 32 * 16 + thread % 32 / 4, thread % 4 * 2};
}

// The largest, or the sum, over the four threads that share a row.
DEVICE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <int COUNT>
DEVICE void multiply_rows(float (&d)[COUNT], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) d[i] *= by[i / 2 % 2];
}

// An accumulator as a left operand.
template <class T>
DEVICE void as_left(const float (&d)[32], u32 (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; i++) a[i / 4][i % 4] = pack<T>(d[2 * i], d[2 * i + 1]);
}
