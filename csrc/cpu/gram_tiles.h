// Sums over tiles of registers and their transposition, for the kernel matrices (gram.h).
//
// Registers hold rows (tiles [points][rows]) where sums run over points or features, and points
// (tiles [rows][points], transposed once) where sums run over rows. Every sum is then one of three
// loops: squares of differences, products, products with differences.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "simd.h"

namespace flowops::FLOWOPS_ISA {
namespace {

template <class A>
constexpr int lanes = register_bytes / sizeof(A);
template <class A>
using Register = vec<A, lanes<A>>;
template <class A>
constexpr int64_t strip_rows = 2 * lanes<A>;
template <int64_t n>
using Constant = std::integral_constant<int64_t, n>;

#if defined(__AVX512F__)
constexpr int group = 8;  // points, outputs or features that share two loaded registers
#else
constexpr int group = 4;
#endif

template <class A>
constexpr int64_t padded(int64_t n) {
    return (n + strip_rows<A> - 1) / strip_rows<A> * strip_rows<A>;
}

// Covers [0, n) with body(first, Length<I>): whole groups, then 4, 2, 1.
template <class Body>
inline void for_groups(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + group <= n; i += group) body(i, Length<group>());
    if (group > 4 && i + 4 <= n) {
        body(i, Length<4>());
        i += 4;
    }
    if (i + 2 <= n) {
        body(i, Length<2>());
        i += 2;
    }
    if (i < n) body(i, Length<1>());
}

// --- sums over k < n: b is read an element at a time, v two registers at a time ------------

template <class A, int I>
struct Sums {
    Register<A> at[I][2];

    void store(A *p, int64_t stride) const {
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) {
            store_raw<lanes<A>>(p + i * stride, at[i][0]);
            store_raw<lanes<A>>(p + i * stride + lanes<A>, at[i][1]);
        }
    }

    void add_to(A *p, int64_t stride) const {
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) {
            A *to = p + i * stride;
            store_raw<lanes<A>>(to, load_raw<lanes<A>>(to) + at[i][0]);
            store_raw<lanes<A>>(to + lanes<A>, load_raw<lanes<A>>(to + lanes<A>) + at[i][1]);
        }
    }

    // sum_k q_k (v_k - b_ik)^2; without `weighted` q is not read.
    template <bool weighted>
    static Sums squares(int64_t n, const A *b, int64_t b_i, const A *v, int64_t v_k, const A *q) {
        return in_runs(n, [=](Sums &sums, int64_t k) {
            const auto v0 = load_raw<lanes<A>>(v + k * v_k);
            const auto v1 = load_raw<lanes<A>>(v + k * v_k + lanes<A>);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) {
                const auto d0 = v0 - b[i * b_i + k], d1 = v1 - b[i * b_i + k];
                sums.at[i][0] += weighted ? (d0 * q[k]) * d0 : d0 * d0;
                sums.at[i][1] += weighted ? (d1 * q[k]) * d1 : d1 * d1;
            }
        });
    }

    // sum_k v_k b_ik
    static Sums products(int64_t n, const A *b, int64_t b_i, int64_t b_k, const A *v, int64_t v_k) {
        return in_runs(n, [=](Sums &sums, int64_t k) {
            const auto v0 = load_raw<lanes<A>>(v + k * v_k);
            const auto v1 = load_raw<lanes<A>>(v + k * v_k + lanes<A>);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) {
                sums.at[i][0] += v0 * b[i * b_i + k * b_k];
                sums.at[i][1] += v1 * b[i * b_i + k * b_k];
            }
        });
    }

    // sum_k v_k (b_ik - u_i), or with `squared` sum_k v_k (b_ik - u_i)^2
    template <bool squared>
    static Sums differences(int64_t n, const A *b, int64_t b_k, const A *v, int64_t v_k, const A *u,
                            int64_t u_i) {
        return in_runs(n, [=](Sums &sums, int64_t k) {
            const auto v0 = load_raw<lanes<A>>(v + k * v_k);
            const auto v1 = load_raw<lanes<A>>(v + k * v_k + lanes<A>);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) {
                const auto d0 = b[i + k * b_k] - load_raw<lanes<A>>(u + i * u_i);
                const auto d1 = b[i + k * b_k] - load_raw<lanes<A>>(u + i * u_i + lanes<A>);
                sums.at[i][0] += squared ? v0 * d0 * d0 : v0 * d0;
                sums.at[i][1] += squared ? v1 * d1 * d1 : v1 * d1;
            }
        });
    }

private:
    // body(sums, k) for k < n, in runs whose sums are added up one by one: long sums in one
    // accumulator would round more than those of a matrix product do.
    template <class Body>
    static Sums in_runs(int64_t n, Body body) {
        constexpr int64_t run = 32;
        Sums total = {};
        for (int64_t k = 0; k < (n < run ? n : run); ++k) body(total, k);
        for (int64_t k0 = run; k0 < n; k0 += run) {
            Sums sums = {};
            const int64_t end = k0 + run < n ? k0 + run : n;
            for (int64_t k = k0; k < end; ++k) body(sums, k);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) {
                total.at[i][0] += sums.at[i][0];
                total.at[i][1] += sums.at[i][1];
            }
        }
        return total;
    }
};

// --- transposition -------------------------------------------------------------------------------

// Interleaves the first half of N registers with the second; log2(N) times is a transposition.
template <class A, int N, size_t... lane>
__attribute__((always_inline)) inline void interleave(const vec<A, N> *from, vec<A, N> *to,
                                                      std::index_sequence<lane...>) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
#if defined(__clang__)
        to[2 * i] =
            __builtin_shufflevector(from[i], from[i + N / 2], int(lane % 2 * N + lane / 2)...);
        to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + N / 2],
                                                int(lane % 2 * N + lane / 2 + N / 2)...);
#else
        using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
        const vec<Index, N> low = {Index(lane % 2 * N + lane / 2)...};
        to[2 * i] = __builtin_shuffle(from[i], from[i + N / 2], low);
        to[2 * i + 1] = __builtin_shuffle(from[i], from[i + N / 2], low + Index(N / 2));
#endif
    }
}

// from [rows][ld_from] to [columns][ld_to], rows and columns multiples of the register's length. A
// leading dimension is a number, or a type that converts to one that the compiler knows.
template <class A, class From, class To>
void transpose(const A *from, From ld_from, A *to, To ld_to, int64_t rows, int64_t columns) {
    constexpr int N = lanes<A>;
    for (int64_t r = 0; r < rows; r += N)
        for (int64_t c = 0; c < columns; c += N) {
            vec<A, N> a[N], b[N];
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) a[i] = load_raw<N>(from + r * ld_from + c + i * ld_from);
            const auto lane = std::make_index_sequence<N>();
            if constexpr (N == 16) {
                interleave<A, N>(a, b, lane);
                interleave<A, N>(b, a, lane);
                interleave<A, N>(a, b, lane);
                interleave<A, N>(b, a, lane);
            } else if constexpr (N == 8) {
                interleave<A, N>(a, b, lane);
                interleave<A, N>(b, a, lane);
                interleave<A, N>(a, b, lane);
                for (int i = 0; i < N; ++i) a[i] = b[i];
            } else if constexpr (N == 4) {
                interleave<A, N>(a, b, lane);
                interleave<A, N>(b, a, lane);
            } else {
                interleave<A, N>(a, b, lane);
                for (int i = 0; i < N; ++i) a[i] = b[i];
            }
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) store_raw<N>(to + c * ld_to + r + i * ld_to, a[i]);
        }
}

}  // namespace
}  // namespace flowops::FLOWOPS_ISA
