// Gradients of K @ w with many features or outputs, on tensor cores.
//
// A warp has 16 points and meets all rows of the block for dz and dw. dL/dS of all of them goes
// through shared memory, from where dx is made: 16 rows and 8 features a warp, all points. Bound by
// tensor cores, 3 (4 D + 4 O) multiplications and additions a pair.
#include "gram_backward.cuh"

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
#pragma unroll 1
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
    constexpr u32 LD = 8 * I + 4, LD_W = 8 * J + 4, LD_V = ROWS + 4, STEPS = ROWS / 8;
    constexpr int Q = I == 8 ? 1 : 2;  // tiles of 8 rows at a time, as registers allow
    const Gram &gram = args.gram;
    u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP, g = lane() / 4, t = lane() % 4;
    u32 features = gram.D, width = padded(features, 8);
    u32 outputs = padded(gram.O, 8), points = 16 * warps, m_own = 16 * warp;
    float *z = reinterpret_cast<float *>(shared_memory());
    float *w = z + points * LD;
    float *x = w + points * LD_W;
    float *grad = x + ROWS * LD;
    float *v = grad + ROWS * LD_W;  // dL/dS, [points][LD_V]
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
    stage({z, LD, points, width}, gram.z, 0, gram.M, features, 0, threadIdx.x, blockDim.x, same);
    stage({w, LD_W, points, outputs}, gram.w, 0, gram.M, gram.O, 0, threadIdx.x, blockDim.x, same);
    for (u32 d = threadIdx.x; d < features; d += blockDim.x) scale[d] = 1 / lengthscale(gram, d);
    for (u32 i = threadIdx.x; i < warps * width; i += blockDim.x) by_warp[i] = 0;
    __syncthreads();
    if constexpr (DOTS) {
        column_means(centre, z, LD, gram.M, features, warp, warps);
        __syncthreads();
        stage({z, LD, points, width}, gram.z, 0, gram.M, features, 0, threadIdx.x, blockDim.x,
              centred);
        __syncthreads();
        row_norms(norms, z, LD, points, width, warp, warps);
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
            if constexpr (!DOTS) return z[m * LD + d];
            return m < gram.M ? load(gram.z, m, d) : 0.f;
        };
        auto row = [&](u32 r, u32 d) {
            if constexpr (!DOTS) return x[r * LD + d];
            return n0 + r < last_row ? load(gram.x, n0 + r, d) : 0.f;
        };
        __syncthreads();  // the rows before are done with
        auto stage_x = [&](auto make) {
            stage({x, LD, ROWS, width}, gram.x, n0, last_row, features, 0, threadIdx.x, blockDim.x,
                  make);
        };
        if constexpr (DOTS)
            stage_x(centred);
        else
            stage_x(same);
        stage({grad, LD_W, ROWS, outputs}, args.grad, n0, last_row, gram.O, 0, threadIdx.x,
              blockDim.x, same);
        __syncthreads();
        if constexpr (DOTS) {
            row_norms(row_norm, x, LD, ROWS, width, warp, warps);
            __syncthreads();
        }
        // The warp's points with all rows.
#pragma unroll 1
        for (u32 r0 = 0; r0 < ROWS; r0 += 8 * Q) {
            float S[1][Q][4] = {}, dK[1][Q][4] = {};
            add_dots<ROUNDED>(dK, w + m_own * LD_W, LD_W, grad + r0 * LD_W, LD_W, outputs);
            if constexpr (DOTS) add_dots<ROUNDED>(S, z + m_own * LD, LD, x + r0 * LD, LD, width);
#pragma unroll
            for (int j = 0; j < Q; j++) {
                u32 r = r0 + 8 * j;
                float K[1][4], V[1][4], slope[4];
                bool by_differences = true;
                if constexpr (DOTS) {
                    float both[4];
                    bool loses = false;
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        both[c] = norms[m_own + g + c / 2 * 8] + row_norm[r + 2 * t + c % 2];
                        S[0][j][c] = both[c] - 2 * S[0][j][c];
                    }
                    profile(gram.profile, S[0][j], K[0], slope);
#pragma unroll
                    for (int c = 0; c < 4; c++)
                        loses |= loses_digits<ROUNDED>(S[0][j][c], K[0][c], both[c]);
                    by_differences = __any_sync(0xffffffffu, loses);
                }
                if (by_differences) {
                    square_of_differences(
                        S[0][j], features, scale,
                        [&](u32 k, u32 d) { return point(m_own + g + 8 * k, d); },
                        [&](u32 k, u32 d) { return row(r + 2 * t + k, d); });
                    profile(gram.profile, S[0][j], K[0], slope);
                }
#pragma unroll
                for (int c = 0; c < 4; c++) V[0][c] = slope[c] * dK[0][j][c];
                float *own_v = v + (m_own + g) * LD_V + r;
                store_vec<float, 2>(own_v + 2 * t, {V[0][0], V[0][1]});
                store_vec<float, 2>(own_v + 8 * LD_V + 2 * t, {V[0][2], V[0][3]});
                if (lane() == 0) lost[warp * STEPS + r / 8] = by_differences;
                add_products<ROUNDED>(dw, K, grad + r * LD_W, LD_W, outputs);
                if (!by_differences) {
                    column_sum[0] += V[0][0] + V[0][1];
                    column_sum[1] += V[0][2] + V[0][3];
                    add_products<ROUNDED>(dz, V, x + r * LD, LD, width);
                    continue;
                }
                __syncwarp();
#pragma unroll(DOTS ? 1 : I)
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
#pragma unroll 2
                for (u32 m0 = 0; m0 < points; m0 += 8) {
                    bool low = !tile_lost[m0 / 16 * STEPS], high = !tile_lost[m0 / 16 * STEPS + 1];
                    const float *at = v + (m0 + 2 * t) * LD_V + r0 + g,
                                *b = z + (m0 + 2 * t) * LD + d0 + g;
                    float left[4] = {low ? at[0] : 0, high ? at[8] : 0, low ? at[LD_V] : 0,
                                     high ? at[LD_V + 8] : 0};
                    row_sum[0] += left[0] + left[2];
                    row_sum[1] += left[1] + left[3];
                    add_product<ROUNDED>(sums, split<ROUNDED>(left[0], left[1], left[2], left[3]),
                                         split<ROUNDED>(b[0], b[LD]));
                }
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float sum = row_sum[c / 2];
                    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                    float own = x[(r0 + g + c / 2 * 8) * LD + d0 + 2 * t + c % 2];
                    pull[c] = sum * own - sums[c];
                    squares[c % 2] += own * pull[c];
                }
                add_squares(own_squares + d0, squares);
            }
#pragma unroll 1
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
                pull = sum * z[m * LD + d] - pull;
                squares[c % 2] += z[m * LD + d] * pull;
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
MANY(16, 32, 512, differences, false, false)
MANY(64, 128, 384, differences, false, false)
