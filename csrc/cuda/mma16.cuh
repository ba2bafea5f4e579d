// What a kernel needs to multiply 16-bit matrices by mma.sync: tiles that come asynchronously,
// fragments from shared memory, and products of them. sm_80 and later.
//
// A warp's fragments, with lane = 4 g + t: of a 16 x 8 sum, lane has rows g (elements 0, 1) and
// g + 8 (2, 3) at columns 2t, 2t + 1; of the 16 x 16 left factor, those rows at columns 2t, 2t + 1
// (words 0, 1) and 2t + 8, 2t + 9 (2, 3); of the 16 x 8 right factor, rows 2t, 2t + 1 (word 0) and
// 2t + 8, 2t + 9 (1) at column g. So two neighbouring sums, rounded, are a left factor.
#pragma once
#include "common.cuh"

#ifndef FLOWOPS_EMULATE

// The address that the functions below take.
DEVICE u32 shared_address(const void *at) { return __cvta_generic_to_shared(at); }

// Begins to copy 16 bytes to shared memory, or zeros if there is nothing `real` to copy.
DEVICE void cp_async16(u32 to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(real ? 16 : 0)
                 : "memory");
}
// Makes a group of the copies begun since the last one.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies, but for the latest `PENDING` groups.
template <int PENDING>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices, one word of each to a lane; lanes 8i.. give the addresses of the rows of
// matrix i.
DEVICE void ldmatrix(u32 (&to)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}
DEVICE void ldmatrix_transposed(u32 (&to)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]
template <class T>
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
DEVICE void mma<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void mma<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers, rounded, in one word; the first in its lower half.
template <class T>
DEVICE u32 pack(float low, float high);
template <>
DEVICE u32 pack<bf16>(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <>
DEVICE u32 pack<f16>(float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// 2^x by the hardware's instruction: within 2 ulp, results under 2^-126 are 0.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x by the hardware's instruction, within 1 ulp.
DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#else
#include "mma16.h"
#endif
