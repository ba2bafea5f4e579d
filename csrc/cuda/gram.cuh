// What the forward and backward passes of kernel matrices share; formulas in docs/gram.md.
//
// Rows of x stream past the points z and weights w, which stay in shared memory. Distances take one
// of two forms. To 8 features, and for Matern 1/2, they are sums of squared differences. Otherwise
// x and z are centred, divided by the lengthscale and multiplied on tensor cores, and a tile in
// which that may have cost digits is done again from differences; points that coincide are such a
// case.
//
// All products run on tensor cores, of fp32 split into two TF32 numbers each. Tensor cores cut off
// what they add instead of rounding it, which over long sums of one sign would add up: they only
// sum over 8, and fp32 additions do the rest.
//
// Matrices in shared memory have rows of a multiple of 8 floats and 4 more: a warp then reads both
// [g][t] and [2t][g], g < 8 and t < 4, from 32 different banks.
#pragma once
#include "mma.cuh"

enum Storage { F32, BF16, F16 };
enum Profile { SE, MATERN12, MATERN32, MATERN52 };

// A matrix, or vector of stride 1 or 0, in global memory, in any storage type.
struct Matrix {
    void *data;
    i64 stride, storage;
};

struct Gram {
    Matrix x, z, w, lengthscale;
    i64 N, M, D, O, profile;
    i64 paired;  // w has the weights of all s, then of all t, and they are wanted in turns
};

constexpr u32 WARP = 32;

DEVICE u32 lane() { return threadIdx.x % WARP; }
DEVICE u32 padded(u32 n, u32 multiple) { return (n + multiple - 1) / multiple * multiple; }
DEVICE u32 leading(u32 n, u32 multiple) { return padded(n, multiple) + 4; }

// --- functions that the hardware has -----------------------------------------------------------

#ifndef FLOWOPS_EMULATE
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float root(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The smaller one; NaN if x is.
DEVICE float at_most(float limit, float x) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(limit), "f"(x));
    return y;
}
#else
inline float power_of_two(float x) { return std::exp2(x); }
inline float root(float x) { return std::sqrt(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float at_most(float limit, float x) { return x > limit ? limit : x; }
#endif

// --- global memory -----------------------------------------------------------------------------

DEVICE float load(const Matrix &from, i64 row, i64 column) {
    i64 at = row * from.stride + column;
    if (from.storage == F32) return static_cast<const float *>(from.data)[at];
    if (from.storage == BF16) return widen(static_cast<const bf16 *>(from.data)[at]);
    return widen(static_cast<const f16 *>(from.data)[at]);
}

DEVICE void store(const Matrix &to, i64 row, i64 column, float x) {
    i64 at = row * to.stride + column;
    if (to.storage == F32)
        static_cast<float *>(to.data)[at] = x;
    else if (to.storage == BF16)
        static_cast<bf16 *>(to.data)[at] = narrow<bf16>(x);
    else
        static_cast<f16 *>(to.data)[at] = narrow<f16>(x);
}

DEVICE float lengthscale(const Gram &gram, i64 d) {
    return load(gram.lengthscale, 0, d * gram.lengthscale.stride);
}

// Threads in shared memory as [rows][ld], from row `first` on: make(value, column), and 0 in rows
// from `last` on and in columns from `columns` to `width`. In pairs, columns are taken from the two
// halves in turns.
struct Staged {
    float *to;
    u32 ld, rows, width;
};

template <class T, class Make>
DEVICE void stage_as(const Staged &s, const Matrix &from, i64 first, i64 last, u32 columns,
                     u32 paired, u32 thread, u32 threads, Make make) {
    u32 row = thread / s.width, column = thread - row * s.width;
    u32 row_step = threads / s.width, column_step = threads - row_step * s.width;
    const T *data = static_cast<const T *>(from.data) + first * from.stride;
#pragma unroll 4
    for (u32 i = thread; i < s.rows * s.width; i += threads) {
        float value = 0;
        if (first + row < last && column < columns) {
            u32 source = paired ? column / 2 + column % 2 * (columns / 2) : column;
            value = make(widen(data[row * from.stride + source]), column);
        }
        s.to[row * s.ld + column] = value;
        row += row_step, column += column_step;
        if (column >= s.width) column -= s.width, row++;
    }
}

template <class Make>
DEVICE void stage(const Staged &s, const Matrix &from, i64 first, i64 last, u32 columns, u32 paired,
                  u32 thread, u32 threads, Make make) {
    if (from.storage == F32)
        stage_as<float>(s, from, first, last, columns, paired, thread, threads, make);
    else if (from.storage == BF16)
        stage_as<bf16>(s, from, first, last, columns, paired, thread, threads, make);
    else
        stage_as<f16>(s, from, first, last, columns, paired, thread, threads, make);
}

// --- k and dk/dS of squared distances ----------------------------------------------------------

// Every kernel is 0 long before the limit of S, and points infinitely far apart are no inf * 0.
template <int COUNT>
DEVICE void profile(i64 kind, float (&S)[COUNT], float (&K)[COUNT], float (&slope)[COUNT]) {
    constexpr float minus_log2e = -1.4426950408889634f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) S[i] = at_most(1e12f, S[i]);
    if (kind == SE) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            K[i] = power_of_two(S[i] * (0.5f * minus_log2e));
            slope[i] = -0.5f * K[i];
        }
        return;
    }
    float factor = kind == MATERN12   ? 1.f
                   : kind == MATERN32 ? 1.7320508075688772f
                                      : 2.23606797749979f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float r = root(S[i]) * factor, e = power_of_two(r * minus_log2e);
        if (kind == MATERN12) {
            K[i] = e;  // a kink at 0: the slope there is taken as 0
            slope[i] = r > 0 ? -0.5f * e * reciprocal(r) : 0.f;
        } else if (kind == MATERN32) {
            K[i] = (1 + r) * e;
            slope[i] = -1.5f * e;
        } else {
            K[i] = (1 + r + r * r * (1.f / 3)) * e;
            slope[i] = (-5.f / 6) * (1 + r) * e;
        }
    }
}

// --- products ----------------------------------------------------------------------------------

// Fragments of mma_tf32 as sums of two TF32 numbers. The low one is cut by the hardware, which is
// as good as rounding: one bit is too many at most. ROUNDED ones have no low part.
template <int COUNT>
struct Split {
    u32 high[COUNT], low[COUNT];
};

template <bool ROUNDED, class... Values>
DEVICE Split<sizeof...(Values)> split(Values... values) {
    constexpr int COUNT = sizeof...(Values);
    float x[COUNT] = {values...};
    Split<COUNT> s;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        s.high[i] = to_tf32(x[i]);
        if constexpr (!ROUNDED) s.low[i] = as_bits(x[i] - as_float(s.high[i]));
    }
    return s;
}

template <bool ROUNDED>
DEVICE void add_product(float (&sum)[4], const Split<4> &a, const Split<2> &b) {
    float c[4] = {};
    if constexpr (!ROUNDED) {
        mma_tf32(c, a.low, b.high);
        mma_tf32(c, a.high, b.low);
    }
    mma_tf32(c, a.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += c[i];
}

// [16, k] of a matrix in shared memory, from its first row and column k on.
template <bool ROUNDED>
DEVICE Split<4> rows_of(const float *a, u32 ld) {
    const float *at = a + lane() / 4 * ld + lane() % 4;
    return split<ROUNDED>(at[0], at[8 * ld], at[4], at[8 * ld + 4]);
}

// sums[i][j] += a[16 i.., :width] b[8 j.., :width]^T, both in shared memory.
template <bool ROUNDED, int I, int J>
DEVICE void add_dots(float (&sums)[I][J][4], const float *a, u32 ld_a, const float *b, u32 ld_b,
                     u32 width) {
    b += lane() / 4 * ld_b + lane() % 4;
    for (u32 k = 0; k < width; k += 8) {
        Split<4> left[I];
#pragma unroll
        for (int i = 0; i < I; i++) left[i] = rows_of<ROUNDED>(a + 16 * i * ld_a + k, ld_a);
#pragma unroll
        for (int j = 0; j < J; j++) {
            const float *at = b + 8 * j * ld_b + k;
            Split<2> right = split<ROUNDED>(at[0], at[4]);
#pragma unroll
            for (int i = 0; i < I; i++) add_product<ROUNDED>(sums[i][j], left[i], right);
        }
    }
}

// sums[i][j] += a[i] b[:8, 8 j..]: the columns 2t and 2t+1 that a lane has of a [16, 8] as a result
// serve as t and t+4 of an operand if the rows of b in shared memory are taken in the same order.
// b has `columns` of them.
template <bool ROUNDED, int I, int J>
DEVICE void add_products(float (&sums)[I][J][4], const float (&a)[I][4], const float *b, u32 ld,
                         u32 columns = 8 * J) {
    b += lane() % 4 * 2 * ld + lane() / 4;
    Split<4> left[I];
#pragma unroll
    for (int i = 0; i < I; i++) left[i] = split<ROUNDED>(a[i][0], a[i][2], a[i][1], a[i][3]);
#pragma unroll
    for (int j = 0; j < J; j++) {
        if (u32(8 * j) >= columns) continue;
        Split<2> right = split<ROUNDED>(b[8 * j], b[8 * j + ld]);
#pragma unroll
        for (int i = 0; i < I; i++) add_product<ROUNDED>(sums[i][j], left[i], right);
    }
}

// --- distances of many features ----------------------------------------------------------------

// Squared norms of rows of a multiple of four columns; 8 rows are one warp's work.
DEVICE void row_norms(float *to, const float *rows, u32 ld, u32 count, u32 width, u32 warp,
                      u32 warps) {
    for (u32 row = warp * 8 + lane() / 4; row < count; row += warps * 8) {
        float sum = 0;
        for (u32 d = lane() % 4; d < width; d += 4) sum += rows[row * ld + d] * rows[row * ld + d];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane() % 4 == 0) to[row] = sum;
    }
}

// Means of the columns of `rows` in shared memory.
DEVICE void column_means(float *to, const float *rows, u32 ld, u32 count, u32 columns, u32 warp,
                         u32 warps) {
    for (u32 d = warp; d < columns; d += warps) {
        float sum = 0;
        for (u32 row = lane(); row < count; row += WARP) sum += rows[row * ld + d];
        sum = warp_sum(sum) / count;
        if (lane() == 0) to[d] = sum;
    }
}

// Whether rounding S = norms - 2 x.z could be seen in K: S is off by a few eps of the norms and K
// by less than K / 2 of that. Where S almost vanishes beside them, points may be equal. True for
// NaN.
template <bool ROUNDED>
DEVICE bool loses_digits(float S, float K, float norms) {
    return !(S >= norms * 0.00390625f && (ROUNDED || K * norms <= 4.f));
}

// S of a lane's four pairs of [16, 8] from differences: a(i, d) of rows g + 8 i, b(j, d) of 2t + j.
template <class A, class B>
DEVICE void square_of_differences(float (&S)[4], u32 features, const float *scale, A a, B b) {
#pragma unroll
    for (int i = 0; i < 4; i++) S[i] = 0;
#pragma unroll 1
    for (u32 d = 0; d < features; d++) {
        float f = scale[d], left[2] = {a(0, d), a(1, d)}, right[2] = {b(0, d), b(1, d)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float delta = (left[i / 2] - right[i % 2]) * f;
            S[i] += delta * delta;
        }
    }
}

// --- few features ------------------------------------------------------------------------------

// x and z are multiplied by a power of two near 1 / lengthscale, which rounds nothing, and S by
// what is left. With one lengthscale for each feature differences are divided instead.
template <bool VECTOR, int D>
struct FewScales {
    float power, factor[VECTOR ? D : 1];

    DEVICE explicit FewScales(const Gram &gram) {
        power = 1;
        if constexpr (VECTOR) {
#pragma unroll
            for (int d = 0; d < D; d++) factor[d] = d < gram.D ? 1 / lengthscale(gram, d) : 0.f;
        } else {
            float l = lengthscale(gram, 0);
            u32 exponent = as_bits(l) >> 23;  // l is positive
            exponent = exponent < 3 ? 3 : exponent > 250 ? 250 : exponent;
            power = as_float((254 - exponent) << 23);
            factor[0] = 1 / (l * power);
        }
    }

    DEVICE float difference(float x, float z, int d) const {
        return VECTOR ? (x - z) * factor[VECTOR ? d : 0] : x - z;
    }
    DEVICE float distance(float sum) const { return VECTOR ? sum : sum * (factor[0] * factor[0]); }

    // From sum V difference to that of 2 V (x - z) / lengthscale^2.
    DEVICE float pull(int d) const {
        return VECTOR ? 2 * factor[VECTOR ? d : 0] : 2 * power * factor[0] * factor[0];
    }
};
