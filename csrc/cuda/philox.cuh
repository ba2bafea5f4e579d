// Noise contract v1 (docs/noise.md): counter-based words, uniforms and normals.
//
// The same bits as csrc/cpu/philox.h: every operation rounds once, and those that the compiler
// would fuse are written as the intrinsics that it may not touch.
#pragma once
#include "common.cuh"

DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
DEVICE double times(double a, double b) { return __dmul_rn(a, b); }
DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
DEVICE double plus(double a, double b) { return __dadd_rn(a, b); }

// All 64 bits, in one instruction: of u64(a) * b the compiler makes two.
DEVICE u64 wide_product(u32 a, u32 b) {
#ifndef FLOWOPS_EMULATE
    u64 product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
#else
    return u64(a) * b;
#endif
}

struct Words {
    u32 at[4];
};

// Philox4x32-10 (Salmon et al. 2011), for one key and offset.
struct Philox {
    u32 keys[10][2];
    u64 offset;

    // `rng`: seed and offset.
    DEVICE explicit Philox(const void *rng) : offset(static_cast<const u64 *>(rng)[1]) {
        u64 seed = static_cast<const u64 *>(rng)[0];
        u32 k0 = seed, k1 = seed >> 32;
#pragma unroll
        for (int round = 0; round < 10; round++) {
            // Through a lane, or the compiler would add again at every use.
            keys[round][0] = __shfl_sync(0xffffffffu, k0, 0);
            keys[round][1] = __shfl_sync(0xffffffffu, k1, 0);
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
    }

    DEVICE Words operator()(u64 counter) const {
        u32 c0 = counter, c1 = counter >> 32, c2 = offset, c3 = offset >> 32;
#pragma unroll
        for (int round = 0; round < 10; round++) {
            u64 p0 = wide_product(c0, 0xD2511F53), p1 = wide_product(c2, 0xCD9E8D57);
            c0 = u32(p1 >> 32) ^ c1 ^ keys[round][0];
            c1 = p1;
            c2 = u32(p0 >> 32) ^ c3 ^ keys[round][1];
            c3 = p0;
        }
        return {{c0, c1, c2, c3}};
    }
};

// ((w >> 8) + 1) 2^-24, in (0, 1].
DEVICE float uniform(u32 w) {
    return times(static_cast<float>((w >> 8) + 1), 5.9604644775390625e-08f);
}

// value * x + coefficient, each rounded.
DEVICE float horner_step(float value, float x, float coefficient) {
    return plus(times(value, x), coefficient);
}

// Box-Muller on one pair of words. What the contract does with integers takes fewer instructions
// here; all of it is exact, so the bits are the same.
DEVICE void normal_pair(u32 w0, u32 w1, float &n0, float &n1) {
    constexpr u32 SQRT_HALF = 0x3f3504f3;  // its bits
    // Above the mantissa is now e; k = e - 24, from the float whose mantissa is e.
    u32 above = as_bits(static_cast<float>((w0 >> 8) + 1)) - SQRT_HALF;
    float f = plus(as_float((above & 0x7fffff) + SQRT_HALF), -1.f);
    float k = plus(as_float(0x4b000000 | above >> 23), -8388632.f);
    float p = -0.07634492963552475f;
    p = horner_step(p, f, 0.12761574983596802f);
    p = horner_step(p, f, -0.13160182535648346f);
    p = horner_step(p, f, 0.14201758801937103f);
    p = horner_step(p, f, -0.16623356938362122f);
    p = horner_step(p, f, 0.20001226663589478f);
    p = horner_step(p, f, -0.2500081956386566f);
    p = horner_step(p, f, 0.3333333134651184f);
    float ff = times(f, f);
    float tail = plus(times(times(ff, f), p), times(k, -2.12194440e-4f));
    float log_u = plus(times(k, 0.693359375f), plus(f, plus(tail, times(ff, -0.5f))));
    float r = __fsqrt_rn(times(log_u, -2.f));

    // An eighth of a turn on, the two highest bits are the quarter that is nearest (4 is 0 again,
    // as it is in the signs). The others are t + 1/8 in units of 2^-32 turns, of which the contract
    // takes 22 bits: as the mantissa of a float they give t + 5/8.
    u32 turn = w1 + 0x20000000, odd = turn << 1;
    float t = plus(as_float(0x3f000000 | turn << 2 >> 10), -0.625f);
    float tt = times(t, t);
    float s = -75.39346313476562f;
    s = horner_step(s, tt, 81.59235382080078f);
    s = horner_step(s, tt, -41.34165954589844f);
    s = horner_step(s, tt, 6.2831854820251465f);
    s = times(s, t);
    float c = 59.22919845581055f;
    c = horner_step(c, tt, -85.4432373046875f);
    c = horner_step(c, tt, 64.93932342529297f);
    c = horner_step(c, tt, -19.739208221435547f);
    c = horner_step(c, tt, 1.f);
    bool swap = static_cast<int>(odd) < 0;
    u32 cosine = as_bits(swap ? s : c) ^ ((turn ^ odd) & 0x80000000);
    u32 sine = as_bits(swap ? c : s) ^ (turn & 0x80000000);
    n0 = times(r, as_float(cosine));
    n1 = times(r, as_float(sine));
}

// The normals of a group's four columns.
DEVICE void normals(const Words &words, float (&values)[4]) {
    normal_pair(words.at[0], words.at[1], values[0], values[1]);
    normal_pair(words.at[2], words.at[3], values[2], values[3]);
}
