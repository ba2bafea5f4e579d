// Noise contract v1 (docs/noise.md): counter-based words, uniforms and normals.
//
// Only IEEE operations that round once (+, -, *, sqrt), never a fused multiply-add: the same bits
// come out of every instruction set, of the PyTorch reference and of any GPU compiler told not to
// fuse. Files that include this are compiled with -ffp-contract=off.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

constexpr int philox_lanes = register_bytes / 8;
using Lanes = vec<uint64_t, philox_lanes>;

// Products of the low halves of 64-bit lanes; what is in the high halves does not matter.
inline Lanes multiply_low_halves(Lanes a, uint32_t k) {
#if defined(__AVX512F__)
    return Lanes(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(k)));
#elif defined(__AVX2__)
    return Lanes(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(k)));
#elif defined(__SSE2__)
    return Lanes(_mm_mul_epu32(__m128i(a), _mm_set1_epi64x(k)));
#else
    return (a & 0xffffffffu) * uint64_t(k);
#endif
}

// Philox4x32-10 (Salmon et al. 2011) of one counter a lane. Each 32-bit word lives in the low half
// of a 64-bit lane, so the two halves of a product come apart by one shift.
inline void philox(Lanes counter, uint64_t offset, uint64_t seed, Lanes (&c)[4]) {
    c[0] = counter;
    c[1] = counter >> 32;
    c[2] = Lanes{} + offset;
    c[3] = Lanes{} + (offset >> 32);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Lanes p0 = multiply_low_halves(c[0], 0xD2511F53u);
        const Lanes p1 = multiply_low_halves(c[2], 0xCD9E8D57u);
        c[0] = (p1 >> 32) ^ c[1] ^ uint64_t(k0);
        c[1] = p1;
        c[2] = (p0 >> 32) ^ c[3] ^ uint64_t(k1);
        c[3] = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// ((w >> 8) + 1) 2^-24, in (0, 1].
inline float uniform(uint32_t w) { return float(int32_t(w >> 8) + 1) * 5.9604644775390625e-08f; }

// Box-Muller on one pair of words. ln by a degree-10 minimax polynomial on [sqrt(1/2), sqrt(2)),
// sine and cosine by minimax polynomials on an eighth of a turn, reduced exactly in integers.
inline void normal_pair(uint32_t w0, uint32_t w1, float &n0, float &n1) {
    const int32_t bits = __builtin_bit_cast(int32_t, float(int32_t(w0 >> 8) + 1));
    const int32_t e = (bits - 0x3f3504f3) >> 23;
    const float f = __builtin_bit_cast(float, bits - (e << 23)) - 1.f;
    const float k = float(e - 24);
    float p = -0.07634492963552475f;
    p = p * f + 0.12761574983596802f;
    p = p * f + -0.13160182535648346f;
    p = p * f + 0.14201758801937103f;
    p = p * f + -0.16623356938362122f;
    p = p * f + 0.20001226663589478f;
    p = p * f + -0.2500081956386566f;
    p = p * f + 0.3333333134651184f;
    const float ff = f * f;
    const float tail = (ff * f) * p + k * -2.12194440e-4f;
    const float log_u = k * 0.693359375f + (f + (tail - ff * 0.5f));
    const float r = __builtin_sqrtf(log_u * -2.f);

    const int32_t turn = int32_t(w1 >> 8);
    const int32_t q = (turn + 0x200000) >> 22;
    const float t = float(turn - (q << 22)) * 5.9604644775390625e-08f;
    const float tt = t * t;
    float s = -75.39346313476562f;
    s = s * tt + 81.59235382080078f;
    s = s * tt + -41.34165954589844f;
    s = s * tt + 6.2831854820251465f;
    s = s * t;
    float c = 59.22919845581055f;
    c = c * tt + -85.4432373046875f;
    c = c * tt + 64.93932342529297f;
    c = c * tt + -19.739208221435547f;
    c = c * tt + 1.f;
    const bool swap = q & 1;
    const float cosine = swap ? s : c;
    const float sine = swap ? c : s;
    n0 = r * (((q + 1) & 2) ? -cosine : cosine);
    n1 = r * ((q & 2) ? -sine : sine);
}

constexpr int64_t noise_block = 256;  // counters drawn at a time: 4 KB of values, inside L1

struct WordBlock {
    uint32_t w[4][noise_block];
};

inline void draw_words(const uint64_t *counter, uint64_t offset, uint64_t seed, WordBlock &block) {
    for (int64_t i = 0; i < noise_block; i += philox_lanes) {
        Lanes words[4];
        philox(load_raw<philox_lanes>(counter + i), offset, seed, words);
        for (int j = 0; j < 4; ++j)
            store_raw<philox_lanes>(block.w[j] + i,
                                    __builtin_convertvector(words[j], vec<uint32_t, philox_lanes>));
    }
}

// Four normals a counter, in the order of the matrix.
inline void words_to_normals(const WordBlock &block, float *normals) {
#pragma omp simd
    for (int64_t i = 0; i < noise_block; ++i) {
        float n0, n1, n2, n3;
        normal_pair(block.w[0][i], block.w[1][i], n0, n1);
        normal_pair(block.w[2][i], block.w[3][i], n2, n3);
        normals[4 * i + 0] = n0;
        normals[4 * i + 1] = n1;
        normals[4 * i + 2] = n2;
        normals[4 * i + 3] = n3;
    }
}

}  // namespace
