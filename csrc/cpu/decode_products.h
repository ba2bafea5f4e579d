// Products of a few rows with packed matrices, the work of decoding a Transformer token by token.
//
// A matrix [N, K] is packed into panels of 16 outputs, [N / 16][K][16]: one broadcast of a row's
// element meets 16 outputs, whether there is one row or many. Values are cached as the panels of
// such a matrix, keys as rows.
#pragma once

#include <cstddef>
#include <utility>

#include "kernels.h"
#include "simd.h"

namespace flowops::FLOWOPS_ISA {
namespace {

constexpr int64_t panel = 16;
constexpr int lanes = register_bytes / 4;  // floats a register
constexpr int parts = int(panel) / lanes;  // registers a panel
// Registers that hold sums; the rest hold a panel of the matrix.
constexpr int sum_registers = lanes == 16 ? 24 : 12;
constexpr int most_rows = lanes == 4 ? 3 : 6;

using Lane = vec<float, lanes>;

// Sums over k are kept in runs of this length: the error of a sum grows with its length in one
// register, and a run of a few panels stays in the first-level cache for all rows.
constexpr int64_t run_length = 128;

// out[r][0 : 16 PANELS) (+)= sum over k < K of a[r][k] * w[k][...], for ROWS rows. Every element is
// one chain of operations in the order of k, whatever ROWS and PANELS are: the same bits come out
// for any number of rows and threads.
template <int ROWS, int PANELS, class Weight>
inline void product_tile(const float *a, int64_t a_stride, const Weight *w, int64_t panel_stride,
                         int64_t K, bool add, float *out, int64_t out_stride) {
    Lane sum[ROWS][PANELS * parts] = {};
    for (int64_t k = 0; k < K; ++k) {
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 4
            for (int i = 0; i < parts; ++i) {
                const Lane weight =
                    Convert<float, lanes>::load(w + p * panel_stride + k * panel + i * lanes);
#pragma GCC unroll 6
                for (int r = 0; r < ROWS; ++r)
                    sum[r][p * parts + i] += weight * a[r * a_stride + k];
            }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 32
        for (int i = 0; i < PANELS * parts; ++i) {
            float *to = out + r * out_stride + i * lanes;
            store_raw<lanes>(to, add ? load_raw<lanes>(to) + sum[r][i] : sum[r][i]);
        }
}

template <int ROWS, class Weight>
inline void product_panels(int64_t panels, const float *a, int64_t a_stride, const Weight *w,
                           int64_t panel_stride, int64_t K, bool add, float *out,
                           int64_t out_stride) {
    auto step = [&](auto count) {
        constexpr int P = decltype(count)::value;
        if constexpr (ROWS * P * parts <= sum_registers)
            for (; panels >= P; panels -= P) {
                product_tile<ROWS, P>(a, a_stride, w, panel_stride, K, add, out, out_stride);
                w += P * panel_stride;
                out += P * panel;
            }
    };
    step(Length<8>());
    step(Length<4>());
    step(Length<2>());
    step(Length<1>());
}

// How many panels a run keeps in the first-level cache while all rows pass.
constexpr int64_t group_panels = 4;

// out[r][0 : 16 panels) (+)= a[r] . w for `rows` rows of a and one packed matrix.
template <class Weight>
void product(int64_t rows, int64_t panels, int64_t K, const float *a, int64_t a_stride,
             const Weight *w, int64_t panel_stride, bool add, float *out, int64_t out_stride) {
    const int64_t tiles = (rows + most_rows - 1) / most_rows;
    const int64_t group = rows <= most_rows ? 2 * group_panels : group_panels;
    for (int64_t first = 0; first < panels; first += group) {
        const int64_t count = first + group < panels ? group : panels - first;
        for (int64_t k = 0; k == 0 || k < K; k += run_length) {
            const int64_t n = K - k < run_length ? K - k : run_length;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t r = rows * tile / tiles, height = rows * (tile + 1) / tiles - r;
                auto run = [&](auto length) {
                    if constexpr (decltype(length)::value <= most_rows)
                        product_panels<decltype(length)::value>(
                            count, a + r * a_stride + k, a_stride,
                            w + first * panel_stride + k * panel, panel_stride, n, add || k > 0,
                            out + r * out_stride + first * panel, out_stride);
                };
                switch (height) {
                    case 1:
                        run(Length<1>());
                        break;
                    case 2:
                        run(Length<2>());
                        break;
                    case 3:
                        run(Length<3>());
                        break;
                    case 4:
                        run(Length<4>());
                        break;
                    case 5:
                        run(Length<5>());
                        break;
                    default:
                        run(Length<6>());
                }
            }
        }
    }
}

// e^x for x <= 0, flushed below e^-87: no need to scale twice as simd.h does.
inline Lane decay(Lane x) {
    using I = vec<int32_t, lanes>;
    constexpr float magic = 12582912.f + 127.f;  // 1.5 * 2^23 + 127
    const Lane c = x < -87.f ? Lane{} - 87.f : x;
    const Lane shifted = c * 1.44269504f + magic, n = shifted - magic;
    Lane r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    return exponential_near_zero<lanes>(r) *
           __builtin_bit_cast(Lane, __builtin_bit_cast(I, shifted) << 23);
}

// x Phi(x) = x - x Q(x), Q(t) = 1 - Phi(t) = exp(p(t)) for t = |x| <= 6 and 0 beyond, where x Q is
// below 1e-8. p minimises the largest error of t Q, 6e-9.
inline Lane gelu(Lane x) {
    const Lane t = x < 0 ? -x : x;
    const Lane c = t > 6.f ? Lane{} + 6.f : t;
    Lane p = c * 1.70941326e-7f - 3.86422743e-6f;
    constexpr float coefficients[] = {3.51027082e-5f,  -1.42685660e-4f, -8.99982263e-5f,
                                      4.91126859e-3f,  -3.64081352e-2f, -3.18289629e-1f,
                                      -7.97886712e-1f, -6.93147144e-1f};
#pragma GCC unroll 8
    for (float coefficient : coefficients) p = p * c + coefficient;
    const Lane tail = t > 6.f ? Lane{} : decay(p);
    return x < 0 ? x * tail : x - x * tail;
}

// Sums of neighbours of a and b, in turn: log2(lanes) times adds up all of every register.
template <std::size_t... lane>
inline Lane fold(Lane a, Lane b, std::index_sequence<lane...>) {
    constexpr int half = lanes / 2;
#if defined(__clang__)
    return __builtin_shufflevector(a, b, int(lane % 2 * lanes + lane / 2)...) +
           __builtin_shufflevector(a, b, int(lane % 2 * lanes + lane / 2 + half)...);
#else
    const vec<int32_t, lanes> low = {int32_t(lane % 2 * lanes + lane / 2)...};
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + half);
#endif
}

// out[j] = q . keys[j] for j < n, and whatever the memory beyond gives up to a whole register.
inline void dot_rows(const float *q, const float *keys, int64_t D, int64_t n, float *out) {
    for (int64_t j = 0; j < n; j += lanes) {
        Lane sum[lanes] = {};
        const float *key = keys + j * D;
        for (int64_t d = 0; d < D; d += lanes) {
            const Lane part = load_raw<lanes>(q + d);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) sum[i] += part * load_raw<lanes>(key + i * D + d);
        }
#pragma GCC unroll 4
        for (int count = lanes / 2; count > 0; count /= 2)
#pragma GCC unroll 8
            for (int i = 0; i < count; ++i)
                sum[i] = fold(sum[i], sum[i + count], std::make_index_sequence<lanes>());
        store_raw<lanes>(out + j, sum[0]);
    }
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias over W features, a multiple of 16.
inline void layer_norm(const float *x, const float *weight, const float *bias, int64_t W, float eps,
                       float *y) {
    Lane sum{};
    for (int64_t i = 0; i < W; i += lanes) sum += load_raw<lanes>(x + i);
    float mean = 0;
    for (int i = 0; i < lanes; ++i) mean += sum[i];
    mean /= float(W);
    Lane squares{};
    for (int64_t i = 0; i < W; i += lanes) {
        const Lane d = load_raw<lanes>(x + i) - mean;
        squares += d * d;
    }
    float variance = 0;
    for (int i = 0; i < lanes; ++i) variance += squares[i];
    const float scale = 1.f / __builtin_sqrtf(variance / float(W) + eps);
    for (int64_t i = 0; i < W; i += lanes)
        store_raw<lanes>(y + i,
                         (load_raw<lanes>(x + i) - mean) * scale * load_raw<lanes>(weight + i) +
                             load_raw<lanes>(bias + i));
}

}  // namespace
}  // namespace flowops::FLOWOPS_ISA
