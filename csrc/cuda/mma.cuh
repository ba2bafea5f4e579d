// Products of small tiles on tensor cores, by the 32 lanes of a warp together.
//
// Lane 4 g + t of a warp holds, of C [16, 8], the elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8,
// 2t+1).
#pragma once
#include "common.cuh"

#ifndef FLOWOPS_EMULATE

// To the nearest number of 11 significant bits, ties away from zero.
DEVICE u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// c += a b, a [16, 8] in (g, t), (g+8, t), (g, t+4), (g+8, t+4) and b [8, 8] in (t, g), (t+4, g).
// Bits of a and b beyond TF32 are not read.
DEVICE void mma_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else
#include "mma.h"
#endif
