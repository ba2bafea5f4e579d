// Short vectors of fixed length (GCC and Clang vector extensions), loads and stores that convert
// storage types, and exp. Everything has internal linkage: see kernels.h for why.
#pragma once

#include <cstdint>

namespace {

struct bf16 {
    uint16_t bits;
};

// The type that arithmetic on storage of type X runs in.
template <class X>
struct compute {
    using type = float;
};
template <>
struct compute<double> {
    using type = double;
};

template <class T, int N>
struct vector_of {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using vec = typename vector_of<T, N>::type;

template <int N, class T>
inline vec<T, N> load_raw(const T *p) {
    vec<T, N> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

template <int N, class T>
inline void store_raw(T *p, vec<T, N> v) {
    __builtin_memcpy(p, &v, sizeof(v));
}

// Loads from and stores to any storage type; arithmetic type A, length N.
template <class A, int N>
struct Convert {
    static vec<A, N> load(const A *p) { return load_raw<N>(p); }
    static void store(A *p, vec<A, N> v) { store_raw<N>(p, v); }

    // Noise is fp32 whatever the storage.
    template <class F>
        requires(sizeof(F) == 4 && sizeof(A) == 8)
    static vec<A, N> load(const F *p) {
        return __builtin_convertvector(load_raw<N>(p), vec<A, N>);
    }

    static vec<A, N> load(const bf16 *p) {
        const auto half = load_raw<N>(reinterpret_cast<const uint16_t *>(p));
        const auto bits = __builtin_convertvector(half, vec<uint32_t, N>) << 16;
        return __builtin_convertvector(__builtin_bit_cast(vec<float, N>, bits), vec<A, N>);
    }

    // Rounds to nearest even; a NaN keeps a set mantissa bit instead of becoming an infinity.
    static void store(bf16 *p, vec<float, N> v) {
        const auto u = __builtin_bit_cast(vec<uint32_t, N>, v);
        const vec<uint32_t, N> rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        const vec<uint32_t, N> quiet = (u >> 16) | 0x40u;
        const vec<uint32_t, N> bits = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
        store_raw<N>(reinterpret_cast<uint16_t *>(p),
                     __builtin_convertvector(bits, vec<uint16_t, N>));
    }
};

template <int N>
struct Length {
    static constexpr int value = N;
};

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

// Covers [0, C) with body(first, Length<N>): whole registers of A, then at most one half and one
// quarter of it, then single elements. Channel counts of patches (12, 16, 48) never run element by
// element, and vectors wider than a register, which compilers split badly, never occur.
template <class A, class Body>
inline void for_spans(int64_t C, Body body) {
    constexpr int W = register_bytes / sizeof(A);
    constexpr int H = W >= 8 ? W / 2 : W, Q = W >= 16 ? W / 4 : H;
    int64_t c = 0;
    for (; c + W <= C; c += W) body(c, Length<W>());
    if (H < W && c + H <= C) {
        body(c, Length<H>());
        c += H;
    }
    if (Q < H && c + Q <= C) {
        body(c, Length<Q>());
        c += Q;
    }
    for (; c < C; ++c) body(c, Length<1>());
}

// e^r for |r| <= ln(2) / 2, relative error 3e-9.
template <int N>
inline vec<float, N> exponential_near_zero(vec<float, N> r) {
    vec<float, N> p = r * 1.38131587e-3f + 8.36942345e-3f;
    p = p * r + 4.16684560e-2f;
    p = p * r + 1.66665152e-1f;
    p = p * r + 4.99999940e-1f;
    return p * r * r + r + 1.f;
}

// exp(x) = 2^n e^r with n = round(x / ln 2), split as 2^n1 * 2^n2 so that results near the ends of
// the range overflow to infinity and underflow through the subnormals exactly as they should.
// The clamps are written so that NaN passes through.
template <int N>
inline vec<float, N> exponential(vec<float, N> x) {
    using V = vec<float, N>;
    using I = vec<int32_t, N>;
    constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    const V high = V{} + 89.f, low = V{} - 104.f;
    V c = x > high ? high : x;
    c = c < low ? low : c;
    const V n = (c * 1.44269504f + magic) - magic;
    V r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    const V p = exponential_near_zero<N>(r);
    const V n1 = (n * 0.5f + magic) - magic;
    const I bias = I{} + (__builtin_bit_cast(int32_t, magic) - 127);
    const I k1 = (__builtin_bit_cast(I, n1 + magic) - bias) << 23;
    const I k2 = (__builtin_bit_cast(I, (n - n1) + magic) - bias) << 23;
    return p * __builtin_bit_cast(V, k1) * __builtin_bit_cast(V, k2);
}

// The same in double, with the Taylor polynomial of degree 13 (remainder below 1e-17 on the range).
template <int N>
inline vec<double, N> exponential(vec<double, N> x) {
    using V = vec<double, N>;
    using I = vec<int64_t, N>;
    constexpr double magic = 6755399441055744.;  // 1.5 * 2^52
    const V high = V{} + 710., low = V{} - 746.;
    V c = x > high ? high : x;
    c = c < low ? low : c;
    const V n = (c * 1.4426950408889634 + magic) - magic;
    V r = c - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    V p = r * (1. / 6227020800.) + 1. / 479001600.;
    constexpr double coefficients[] = {
        1. / 39916800., 1. / 3628800., 1. / 362880., 1. / 40320., 1. / 5040.,
        1. / 720.,      1. / 120.,     1. / 24.,     1. / 6.,     0.5};
#pragma GCC unroll 10
    for (double coefficient : coefficients) p = p * r + coefficient;
    p = p * r * r + r + 1.;
    const V n1 = (n * 0.5 + magic) - magic;
    const I bias = I{} + (__builtin_bit_cast(int64_t, magic) - 1023);
    const I k1 = (__builtin_bit_cast(I, n1 + magic) - bias) << 52;
    const I k2 = (__builtin_bit_cast(I, (n - n1) + magic) - bias) << 52;
    return p * __builtin_bit_cast(V, k1) * __builtin_bit_cast(V, k2);
}

}  // namespace
