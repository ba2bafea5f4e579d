// Gradients of K @ w in one pass over the rows; K is computed again, in registers only.
//
// A block takes a chunk of rows, 32 at a time; how many chunks there are follows from the sizes
// alone. Its warps divide the points: each keeps the sums for dz and dw of its own points in
// registers from the first row to the last, and what it found for the rows is added to that of the
// other warps in shared memory. Sums of a chunk leave as one vector, [dz, dw, squares]; gram_reduce
// adds those in their order, in double.
//
// Bound by arithmetic with few features (some 4 D + 25 instructions a pair), by tensor cores with
// many.
#include "gram.cuh"

struct GramBackward {
    Gram gram;
    Matrix grad, grad_x;
    void *partial;  // [chunks][M D + M O + squares], float
    i64 chunk_rows;
};

constexpr u32 ROWS = 32;

// The sums over pairs of dL/dS (x - z)^2 / lengthscale^2: one for each feature where the
// lengthscale has, their sum otherwise.
DEVICE i64 squares_of(const Gram &gram) { return gram.lengthscale.stride ? gram.D : 1; }
DEVICE i64 partial_size(const Gram &gram) { return gram.M * (gram.D + gram.O) + squares_of(gram); }

// A block's columns of sums by warp, [warps][ld], as the squares of its partial.
DEVICE void finish_squares(const Gram &gram, float *to, float *by_warp, u32 ld, u32 columns) {
    __syncthreads();
    for (u32 d = threadIdx.x; d < columns; d += blockDim.x) {
        float sum = 0;
        for (u32 warp = 0; warp < blockDim.x / WARP; warp++) sum += by_warp[warp * ld + d];
        if (gram.lengthscale.stride)
            to[d] = sum;
        else
            by_warp[d] = sum;
    }
    if (gram.lengthscale.stride) return;
    __syncthreads();
    if (threadIdx.x > 0) return;
    float sum = 0;
    for (u32 d = 0; d < columns; d++) sum += by_warp[d];
    to[0] = sum;
}

// --- few features: differences, points in registers ----------------------------------------------

// Sums over the lanes that differ in g; a lane is left with part of them, from `first` of u on.
template <int COUNT, int LANES>
DEVICE void sum_over_points(float *u, u32 &first) {
    if constexpr (LANES >= 4 && COUNT % 2 == 0) {
        bool upper = lane() & LANES;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            float low = u[i], high = u[i + COUNT / 2];
            u[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, LANES);
        }
        if (upper) first += COUNT / 2;
        sum_over_points<COUNT / 2, LANES / 2>(u, first);
    } else if constexpr (LANES >= 4) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) u[i] += __shfl_xor_sync(0xffffffffu, u[i], LANES);
        sum_over_points<COUNT, LANES / 2>(u, first);
    }
}

// 32 points a warp, in P tiles of 16; 8 J outputs.
template <int D, int J, bool VECTOR>
DEVICE void backward_few(const GramBackward &args) {
    constexpr int P = 2, KEPT = D == 8 ? 2 : 1;
    constexpr u32 LD = 12, LD_G = 8 * J + 4;
    const Gram &gram = args.gram;
    u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP, g = lane() / 4, t = lane() % 4;
    float *x = reinterpret_cast<float *>(shared_memory());
    float *grad = x + ROWS * LD;
    float *pulls = grad + ROWS * LD_G;  // of the rows, [warps][ROWS][D]
    float *by_warp = pulls + warps * ROWS * D;
    float *pull_scale = by_warp + warps * D;
    const FewScales<VECTOR, D> scales(gram);
    if (threadIdx.x == 0)
#pragma unroll
        for (int d = 0; d < D; d++) pull_scale[d] = scales.pull(d);
    auto scaled = [&](float value, u32) { return value * scales.power; };
    auto same = [](float value, u32) { return value; };
    auto point_of = [&](int p, int i) { return i64(warp * 16 * P + 16 * p + 8 * i + g); };

    float z[P][2][D], w[P][J][4], dz[P][2][D] = {}, dw[P][J][4] = {}, squares[VECTOR ? D : 1] = {};
#pragma unroll
    for (int p = 0; p < P; p++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            i64 m = point_of(p, i);
#pragma unroll
            for (int d = 0; d < D; d++)
                z[p][i][d] = m < gram.M && d < gram.D ? load(gram.z, m, d) * scales.power : 0.f;
#pragma unroll
            for (int j = 0; j < J; j++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    i64 o = 8 * j + 4 * k + t;
                    w[p][j][2 * k + i] = m < gram.M && o < gram.O ? load(gram.w, m, o) : 0.f;
                }
        }

    i64 first_row = blockIdx.x * args.chunk_rows,
        last_row = min(first_row + args.chunk_rows, gram.N);
    for (i64 n0 = first_row; n0 < last_row; n0 += ROWS) {
        stage({x, LD, ROWS, D}, gram.x, n0, last_row, gram.D, 0, threadIdx.x, blockDim.x, scaled);
        stage({grad, LD_G, ROWS, 8 * J}, args.grad, n0, last_row, gram.O, 0, threadIdx.x,
              blockDim.x, same);
        __syncthreads();
#pragma unroll 1
        for (u32 r0 = 0; r0 < ROWS; r0 += 8) {
            Split<2> right[J];
            const float *at = grad + (r0 + g) * LD_G + t;
#pragma unroll
            for (int j = 0; j < J; j++) right[j] = split<false>(at[8 * j], at[8 * j + 4]);
            float row[2][D], u[2 * D] = {}, K[P][4];
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int d = 0; d < D; d += 2) {
                    Vec<float, 2> two = load_vec<float, 2>(x + (r0 + 2 * t + i) * LD + d);
                    row[i][d] = two.at[0], row[i][d + 1] = two.at[1];
                }
#pragma unroll
            for (int p = 0; p < P; p++) {
                float delta[4][D], S[4], slope[4], dK[4] = {};
#pragma unroll
                for (int j = 0; j < J; j++)
                    add_product<false>(
                        dK, split<false>(w[p][j][0], w[p][j][1], w[p][j][2], w[p][j][3]), right[j]);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float sum = 0;
#pragma unroll
                    for (int d = 0; d < D; d++) {
                        delta[c][d] = scales.difference(row[c % 2][d], z[p][c / 2][d], d);
                        sum += delta[c][d] * delta[c][d];
                    }
                    S[c] = scales.distance(sum);
                }
                profile(gram.profile, S, K[p], slope);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float V = slope[c] * dK[c];
                    if constexpr (!VECTOR) squares[0] += V * S[c];
#pragma unroll
                    for (int d = 0; d < D; d++) {
                        float pull = V * delta[c][d];
                        dz[p][c / 2][d] -= pull;
                        u[c % 2 * D + d] += pull;
                        if constexpr (VECTOR) squares[d] += pull * delta[c][d];
                    }
                }
            }
            add_products<false>(dw, K, grad + r0 * LD_G, LD_G);
            u32 first = 0;
            sum_over_points<2 * D, 16>(u, first);
            float *to = pulls + (warp * ROWS + r0 + 2 * t) * D + first;  // u is [2][D] too
#pragma unroll
            for (int i = 0; i < KEPT; i++) to[i] = u[i];
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < ROWS * D; i += blockDim.x) {
            float sum = 0;
            for (u32 from = 0; from < warps; from++) sum += pulls[from * ROWS * D + i];
            i64 n = n0 + i / D;
            if (n < last_row && i % D < gram.D)
                store(args.grad_x, n, i % D, sum * pull_scale[i % D]);
        }
    }

    float *partial = static_cast<float *>(args.partial) + blockIdx.x * partial_size(gram);
#pragma unroll
    for (int p = 0; p < P; p++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            i64 m = point_of(p, i);
#pragma unroll
            for (int d = 0; d < D; d++) {
                float sum = dz[p][i][d];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (t == u32(d % 4) && m < gram.M && d < gram.D)
                    partial[m * gram.D + d] = sum * scales.pull(d);
            }
#pragma unroll
            for (int j = 0; j < J; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    i64 o = 8 * j + 2 * t + c;
                    if (m < gram.M && o < gram.O)
                        partial[gram.M * gram.D + m * gram.O + o] = dw[p][j][2 * i + c];
                }
        }
    constexpr int SQUARES = VECTOR ? D : 1;
#pragma unroll
    for (int d = 0; d < SQUARES; d++) {
        float sum = warp_sum(squares[d]);
        if (lane() == 0) by_warp[warp * SQUARES + d] = sum;
    }
    finish_squares(gram, partial + gram.M * (gram.D + gram.O), by_warp, SQUARES,
                   VECTOR ? u32(gram.D) : 1);
}

// --- many features -----------------------------------------------------------------------------

// Of a lane's part of [16, 8], rows g + 8 i and columns d0 + c: sum over k of
// v(i, k) (a(i, d) - b(k, d)) scale[d], and the same with squares, over rows too.
template <class V, class A, class B>
DEVICE void add_pull_of_differences(float (&pull)[4], float (&squares)[2], u32 count, u32 d0,
                                    u32 features, const float *scale, V v, A a, B b) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
        u32 d = d0 + c;
        if (d >= features) continue;
        float left[2] = {a(0, d), a(1, d)};
        for (u32 k = 0; k < count; k++) {
            float right = b(k, d);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float delta = (left[i] - right) * scale[d], part = v(i, k) * delta;
                pull[2 * i + c] += part;
                squares[c] += part * delta;
            }
        }
    }
}

// Adds sums over all rows of a tile, of columns 2t and 2t+1, to the warp's own.
DEVICE void add_squares(float *own, const float (&squares)[2]) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float sum = squares[c];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        if (lane() / 4 == 0) own[lane() % 4 * 2 + c] += sum;
    }
}

// 16 points a warp, at most 8 I features and 8 J outputs. DOTS as in forward_many; what pulls at
// points and rows of a tile that lost digits is from differences too.
template <int I, int J, bool DOTS, bool ROUNDED>
DEVICE void backward_many(const GramBackward &args) {
    constexpr u32 LD_V = ROWS + 4, STEPS = ROWS / 8;
    const Gram &gram = args.gram;
    u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP, g = lane() / 4, t = lane() % 4;
    u32 features = gram.D, width = padded(features, 8), ld = width + 4;
    u32 outputs = padded(gram.O, 8), ld_w = outputs + 4, points = 16 * warps, m_own = 16 * warp;
    float *z = reinterpret_cast<float *>(shared_memory());
    float *w = z + points * ld;
    float *x = w + points * ld_w;
    float *grad = x + ROWS * ld;
    float *v = grad + ROWS * ld_w;  // dL/dS, [points][LD_V]
    float *centre = v + points * LD_V;
    float *scale = centre + width;
    float *norms = scale + width;
    float *row_norm = norms + points;
    float *by_warp = row_norm + ROWS;
    u32 *lost = reinterpret_cast<u32 *>(by_warp + warps * width);  // [warps][STEPS]
    auto same = [](float value, u32) { return value; };
    auto centred = [&](float value, u32 d) {
        value = (value - centre[d]) / lengthscale(gram, d);
        return ROUNDED ? as_float(to_tf32(value)) : value;
    };
    stage({z, ld, points, width}, gram.z, 0, gram.M, features, 0, threadIdx.x, blockDim.x, same);
    stage({w, ld_w, points, outputs}, gram.w, 0, gram.M, gram.O, 0, threadIdx.x, blockDim.x, same);
    for (u32 d = threadIdx.x; d < features; d += blockDim.x) scale[d] = 1 / lengthscale(gram, d);
    for (u32 i = threadIdx.x; i < warps * width; i += blockDim.x) by_warp[i] = 0;
    __syncthreads();
    if constexpr (DOTS) {
        column_means(centre, z, ld, gram.M, features, warp, warps);
        __syncthreads();
        stage({z, ld, points, width}, gram.z, 0, gram.M, features, 0, threadIdx.x, blockDim.x,
              centred);
        __syncthreads();
        row_norms(norms, z, ld, points, width, warp, warps);
    }
    float dz[1][I][4] = {}, dw[1][J][4] = {}, column_sum[2] = {};
    bool any_lost = false;
    float *own_squares = by_warp + warp * width;
    float *partial = static_cast<float *>(args.partial) + blockIdx.x * partial_size(gram);

    i64 first_row = blockIdx.x * args.chunk_rows,
        last_row = min(first_row + args.chunk_rows, gram.N);
    for (i64 n0 = first_row; n0 < last_row; n0 += ROWS) {
        // Points and rows as differences want them: as given, x and z in shared memory where they
        // are.
        auto point = [&](i64 m, u32 d) {
            if constexpr (!DOTS) return z[m * ld + d];
            return m < gram.M ? load(gram.z, m, d) : 0.f;
        };
        auto row = [&](u32 r, u32 d) {
            if constexpr (!DOTS) return x[r * ld + d];
            return n0 + r < last_row ? load(gram.x, n0 + r, d) : 0.f;
        };
        __syncthreads();  // the rows before are done with
        auto stage_x = [&](auto make) {
            stage({x, ld, ROWS, width}, gram.x, n0, last_row, features, 0, threadIdx.x, blockDim.x,
                  make);
        };
        if constexpr (DOTS)
            stage_x(centred);
        else
            stage_x(same);
        stage({grad, ld_w, ROWS, outputs}, args.grad, n0, last_row, gram.O, 0, threadIdx.x,
              blockDim.x, same);
        __syncthreads();
        if constexpr (DOTS) {
            row_norms(row_norm, x, ld, ROWS, width, warp, warps);
            __syncthreads();
        }
        // The warp's points with all rows.
#pragma unroll 1
        for (u32 r0 = 0; r0 < ROWS; r0 += 16) {
            float S[1][2][4] = {}, dK[1][2][4] = {}, K[2][1][4], slope[2][4];
            bool by_differences[2] = {true, true};
            if constexpr (DOTS) {
                add_dots<ROUNDED>(S, z + m_own * ld, ld, x + r0 * ld, ld, width);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float both[4];
                    bool loses = false;
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        both[c] =
                            norms[m_own + g + c / 2 * 8] + row_norm[r0 + 8 * j + 2 * t + c % 2];
                        S[0][j][c] = both[c] - 2 * S[0][j][c];
                    }
                    profile(gram.profile, S[0][j], K[j][0], slope[j]);
#pragma unroll
                    for (int c = 0; c < 4; c++)
                        loses |= loses_digits<ROUNDED>(S[0][j][c], K[j][0][c], both[c]);
                    by_differences[j] = __any_sync(0xffffffffu, loses);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (!by_differences[j]) continue;
                square_of_differences(
                    S[0][j], features, scale,
                    [&](u32 k, u32 d) { return point(m_own + g + 8 * k, d); },
                    [&](u32 k, u32 d) { return row(r0 + 8 * j + 2 * t + k, d); });
                profile(gram.profile, S[0][j], K[j][0], slope[j]);
            }
            add_dots<ROUNDED>(dK, w + m_own * ld_w, ld_w, grad + r0 * ld_w, ld_w, outputs);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                u32 r = r0 + 8 * j;
                float V[1][4];
#pragma unroll
                for (int c = 0; c < 4; c++) V[0][c] = slope[j][c] * dK[0][j][c];
                float *own_v = v + (m_own + g) * LD_V + r;
                store_vec<float, 2>(own_v + 2 * t, {V[0][0], V[0][1]});
                store_vec<float, 2>(own_v + 8 * LD_V + 2 * t, {V[0][2], V[0][3]});
                if (lane() == 0) lost[warp * STEPS + r / 8] = by_differences[j];
                add_products<ROUNDED>(dw, K[j], grad + r * ld_w, ld_w, outputs);
                if (!by_differences[j]) {
                    column_sum[0] += V[0][0] + V[0][1];
                    column_sum[1] += V[0][2] + V[0][3];
                    add_products<ROUNDED>(dz, V, x + r * ld, ld, width);
                    continue;
                }
                __syncwarp();
#pragma unroll
                for (int i = 0; i < I; i++) {
                    if (u32(8 * i) >= width) continue;
                    float pull[4] = {}, squares[2] = {};
                    u32 d0 = 8 * i + 2 * t;
                    add_pull_of_differences(
                        pull, squares, 8, d0, features, scale,
                        [&](u32 k, u32 from) { return own_v[8 * k * LD_V + from]; },
                        [&](u32 k, u32 d) { return point(m_own + g + 8 * k, d); },
                        [&](u32 from, u32 d) { return row(r + from, d); });
                    add_squares(own_squares + 8 * i, squares);
                    // Sums from products have to stay apart until their squares are known: those
                    // from differences wait where the result goes.
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        i64 m = m_own + g + c / 2 * 8, d = d0 + c % 2;
                        if constexpr (!DOTS)
                            dz[0][i][c] += pull[c];
                        else if (m < gram.M && d < features)
                            partial[m * features + d] =
                                pull[c] + (any_lost ? partial[m * features + d] : 0.f);
                    }
                }
                any_lost = true;
            }
        }
        __syncthreads();
        // The rows with all points: 16 of them and 8 features a warp.
        for (u32 tile = warp; tile < ROWS / 16 * width / 8; tile += warps) {
            u32 r0 = tile % (ROWS / 16) * 16, d0 = tile / (ROWS / 16) * 8;
            float pull[4] = {}, squares[2] = {}, unused[2] = {};
            const u32 *tile_lost = lost + r0 / 8;
            if constexpr (DOTS) {
                float sums[4] = {}, row_sum[2] = {};
                for (u32 m0 = 0; m0 < points; m0 += 8) {
                    bool low = !tile_lost[m0 / 16 * STEPS], high = !tile_lost[m0 / 16 * STEPS + 1];
                    const float *at = v + (m0 + 2 * t) * LD_V + r0 + g,
                                *b = z + (m0 + 2 * t) * ld + d0 + g;
                    float left[4] = {low ? at[0] : 0, high ? at[8] : 0, low ? at[LD_V] : 0,
                                     high ? at[LD_V + 8] : 0};
                    row_sum[0] += left[0] + left[2];
                    row_sum[1] += left[1] + left[3];
                    add_product<ROUNDED>(sums, split<ROUNDED>(left[0], left[1], left[2], left[3]),
                                         split<ROUNDED>(b[0], b[ld]));
                }
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float sum = row_sum[c / 2];
                    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                    float own = x[(r0 + g + c / 2 * 8) * ld + d0 + 2 * t + c % 2];
                    pull[c] = sum * own - sums[c];
                    squares[c % 2] += own * pull[c];
                }
                add_squares(own_squares + d0, squares);
            }
            for (u32 m0 = 0; m0 < points; m0 += 16) {
                const u32 *here = tile_lost + m0 / 16 * STEPS;
                if (!here[0] && !here[1]) continue;
                add_pull_of_differences(
                    pull, unused, 16, d0 + 2 * t, features, scale,
                    [&](u32 k, u32 from) {
                        return here[k] ? v[(m0 + from) * LD_V + r0 + g + 8 * k] : 0.f;
                    },
                    [&](u32 k, u32 d) { return row(r0 + g + 8 * k, d); },
                    [&](u32 from, u32 d) { return point(m0 + from, d); });
            }
#pragma unroll
            for (int c = 0; c < 4; c++) {
                i64 n = n0 + r0 + g + c / 2 * 8, d = d0 + 2 * t + c % 2;
                if (n < last_row && d < features) store(args.grad_x, n, d, 2 * pull[c] * scale[d]);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < I; i++) {
        if (u32(8 * i) >= width) continue;
        float squares[2] = {};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            i64 m = m_own + g + c / 2 * 8, d = 8 * i + 2 * t + c % 2;
            float sum = column_sum[c / 2], pull = dz[0][i][c];
            if constexpr (DOTS) {
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                pull = sum * z[m * ld + d] - pull;
                squares[c % 2] += z[m * ld + d] * pull;
            }
            if (m < gram.M && d < features) {
                if (DOTS && any_lost) pull += partial[m * features + d];
                partial[m * features + d] = 2 * pull * scale[d];
            }
        }
        if constexpr (DOTS) add_squares(own_squares + 8 * i, squares);
    }
#pragma unroll
    for (int j = 0; j < J; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            i64 m = m_own + g + c / 2 * 8, o = 8 * j + 2 * t + c % 2;
            if (m < gram.M && o < gram.O) partial[gram.M * gram.D + m * gram.O + o] = dw[0][j][c];
        }
    finish_squares(gram, partial + gram.M * (gram.D + gram.O), by_warp, width, features);
}

// --- the sum of the partials -------------------------------------------------------------------

struct GramReduce {
    const void *partial;
    Matrix dz, dw, dlengthscale, lengthscale;
    i64 chunks, M, D, O, squares;
};

// 32 elements a block; each warp adds up every eighth partial.
FLOWOPS_KERNEL(gram_reduce, GramReduce, 256, 4) {
    constexpr u32 GROUPS = 8;
    double *sums = reinterpret_cast<double *>(shared_memory());
    i64 size = args.M * (args.D + args.O) + args.squares, i = i64(blockIdx.x) * WARP + lane();
    const float *partial = static_cast<const float *>(args.partial);
    double sum = 0;
    if (i < size)
#pragma unroll 8
        for (i64 chunk = threadIdx.x / WARP; chunk < args.chunks; chunk += GROUPS)
            sum += partial[chunk * size + i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= WARP || i >= size) return;
    for (u32 group = 1; group < GROUPS; group++) sum += sums[group * WARP + lane()];
    if (i < args.M * args.D) {
        store(args.dz, i / args.D, i % args.D, sum);
        return;
    }
    i -= args.M * args.D;
    if (i < args.M * args.O) {
        store(args.dw, i / args.O, i % args.O, sum);
        return;
    }
    i -= args.M * args.O;
    store(args.dlengthscale, 0, i, -2 * sum / load(args.lengthscale, 0, i));
}

// --- kernels -----------------------------------------------------------------------------------

#define FEW(D, J)                                                                  \
    FLOWOPS_KERNEL(gram_backward_few_d##D##_o##J##_scalar, GramBackward, 256, 1) { \
        backward_few<D, J / 8, false>(args);                                       \
    }                                                                              \
    FLOWOPS_KERNEL(gram_backward_few_d##D##_o##J##_vector, GramBackward, 256, 1) { \
        backward_few<D, J / 8, true>(args);                                        \
    }

FEW(2, 16)
FEW(4, 16)
FEW(8, 16)
FEW(8, 32)

#define MANY(D, J, threads, name, DOTS, ROUNDED)                                        \
    FLOWOPS_KERNEL(gram_backward_many_d##D##_o##J##_##name, GramBackward, threads, 1) { \
        backward_many<D / 8, J / 8, DOTS, ROUNDED>(args);                               \
    }

MANY(16, 32, 512, fp32, true, false)
MANY(32, 64, 512, fp32, true, false)
MANY(64, 128, 384, fp32, true, false)
MANY(16, 32, 512, tf32, true, true)
MANY(32, 64, 512, tf32, true, true)
MANY(64, 128, 384, tf32, true, true)
MANY(64, 128, 384, differences, false, false)
