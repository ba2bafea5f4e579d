// K @ w, and what couplings make of it, for up to 256 points; K exists in registers only.
//
// Every block holds all points and weights in shared memory. A warp takes 32 rows (16 where outputs
// are many) and walks the points 8 at a time: distances, the kernel, and the product on tensor
// cores straight from the registers that K was made in. Warps never wait for each other.
//
// With few features this is bound by arithmetic, some 2 D + 10 instructions a pair, with many by
// tensor cores; bytes (x, the outputs and w once a block) are a tenth of either.
#include "gram.cuh"

enum Mode { MATMUL, COUPLING, INVERSE, COUPLING_BACKWARD, INVERSE_BACKWARD };

struct GramForward {
    Gram gram;
    Matrix half, grad;        // of the couplings: the rows that move; the gradient of their image
    Matrix out, both;         // `both` takes the gradients of s, then of t
    const void *grad_logdet;  // [N], float like logdet
    void *logdet;
    i64 mode;
};

// --- what becomes of the sums ------------------------------------------------------------------

// What the coupling or its inverse does with s and t for element e of row n; returns s.
DEVICE float couple(const GramForward &args, i64 n, i64 e, float s, float t) {
    float half = load(args.half, n, e), out;
    if (args.mode == COUPLING) {
        out = expf(s) * half + t;
    } else if (args.mode == INVERSE) {
        out = (half - t) * expf(-s);
    } else {
        bool inverse = args.mode == INVERSE_BACKWARD;
        float grad = load(args.grad, n, e);
        out = grad * expf(inverse ? -s : s);
        float grad_s = inverse ? -out * (half - t)
                               : out * half + static_cast<const float *>(args.grad_logdet)[n];
        store(args.both, n, e, grad_s);
        store(args.both, n, args.gram.O / 2 + e, inverse ? -out : grad);
    }
    store(args.out, n, e, out);
    return s;
}

// The outputs from o0 on of 16 I rows from n0 on, by way of the warp's shared memory: `made`, and
// `logdet`, a sum for each lane of a row.
template <int I, int J>
DEVICE void finish(const GramForward &args, i64 n0, i64 o0, const float (&sums)[I][J][4],
                   float *made, float *logdet) {
    constexpr u32 LD = 8 * J + 4;
    u32 g = lane() / 4, t = lane() % 4;
    __syncwarp();  // `made` lies where the rows were
#pragma unroll
    for (int i = 0; i < 2 * I; i++)
#pragma unroll
        for (int j = 0; j < J; j++)
            store_vec<float, 2>(made + (8 * i + g) * LD + 8 * j + 2 * t,
                                {sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]});
    // A lane reads what it wrote itself.
#pragma unroll 1
    for (u32 row = g; row < 16 * I && n0 + row < args.gram.N; row += 8) {
        float sum = 0;
#pragma unroll 2
        for (u32 column = 2 * t; column < 8 * J && o0 + column < args.gram.O; column += 8) {
            Vec<float, 2> two = load_vec<float, 2>(made + row * LD + column);
            i64 n = n0 + row, o = o0 + column;
            if (args.mode != MATMUL) {
                sum += couple(args, n, o / 2, two.at[0], two.at[1]);
            } else {
                store(args.out, n, o, two.at[0]);
                if (o + 1 < args.gram.O) store(args.out, n, o + 1, two.at[1]);
            }
        }
        float &total = logdet[row * 4 + t];
        total = o0 == 0 ? sum : total + sum;
    }
}
template <u32 ROWS>
DEVICE void finish_logdet(const GramForward &args, i64 n0, const float *logdet) {
    if (args.mode != COUPLING) return;
    __syncwarp();
    i64 n = n0 + lane();
    const float *sums = logdet + lane() * 4;
    if (lane() < ROWS && n < args.gram.N)
        static_cast<float *>(args.logdet)[n] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// --- few features: K from differences, rows in registers -----------------------------------------

template <int D, int J, bool VECTOR>
DEVICE void forward_few(const GramForward &args) {
    constexpr u32 ROWS = 32, LD = 12;
    const Gram &gram = args.gram;
    u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    u32 points = padded(gram.M, 8), outputs = padded(gram.O, 8 * J), ld_w = outputs + 4;
    float *z = reinterpret_cast<float *>(shared_memory());
    float *w = z + points * LD;
    float *x = w + points * ld_w + warp * ROWS * (8 * J + 4 + 4);  // and later what is made of them
    float *logdet = x + ROWS * (8 * J + 4);
    const FewScales<VECTOR, D> scales(gram);
    auto scaled = [&](float value, u32) { return value * scales.power; };
    auto same = [](float value, u32) { return value; };
    stage({z, LD, points, D}, gram.z, 0, gram.M, gram.D, 0, threadIdx.x, blockDim.x, scaled);
    stage({w, ld_w, points, outputs}, gram.w, 0, gram.M, gram.O, gram.paired, threadIdx.x,
          blockDim.x, same);
    __syncthreads();
    u32 g = lane() / 4, t = lane() % 4;
    i64 step = i64(gridDim.x) * warps * ROWS;
    for (i64 n0 = (i64(blockIdx.x) * warps + warp) * ROWS; n0 < gram.N; n0 += step) {
        __syncwarp();  // all lanes have read the rows before
        stage({x, LD, ROWS, D}, gram.x, n0, gram.N, gram.D, 0, lane(), WARP, scaled);
        __syncwarp();
        float row[4][D];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int d = 0; d < D; d++) row[i][d] = x[(8 * i + g) * LD + d];
        for (u32 o0 = 0; o0 < outputs; o0 += 8 * J) {
            float sums[2][J][4] = {};
            for (u32 m0 = 0; m0 < points; m0 += 8) {
                float point[2][D], S[8], K[8], slope[8];
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int d = 0; d < D; d += 2) {
                        Vec<float, 2> two = load_vec<float, 2>(z + (m0 + 2 * t + j) * LD + d);
                        point[j][d] = two.at[0], point[j][d + 1] = two.at[1];
                    }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float sum = 0;
#pragma unroll
                    for (int d = 0; d < D; d++) {
                        float delta = scales.difference(row[i / 2][d], point[i % 2][d], d);
                        sum += delta * delta;
                    }
                    S[i] = scales.distance(sum);
                }
                profile(gram.profile, S, K, slope);
                float tiles[2][4] = {{K[0], K[1], K[2], K[3]}, {K[4], K[5], K[6], K[7]}};
                add_products<false>(sums, tiles, w + m0 * ld_w + o0, ld_w);
            }
            finish(args, n0, o0, sums, x, logdet);
        }
        finish_logdet<ROWS>(args, n0, logdet);
    }
}

// --- many features -----------------------------------------------------------------------------

// I tiles of 16 rows a warp, 8 J outputs at a time. DOTS: distances from products, or from
// differences where those lose digits; else always from differences.
template <int I, int J, bool DOTS, bool ROUNDED>
DEVICE void forward_many(const GramForward &args) {
    constexpr u32 ROWS = 16 * I;
    const Gram &gram = args.gram;
    u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    u32 features = gram.D, width = padded(features, 8), ld = width + 4;
    u32 points = padded(gram.M, 16), outputs = padded(gram.O, 8 * J), ld_w = outputs + 4;
    float *z = reinterpret_cast<float *>(shared_memory());
    float *w = z + points * ld;
    float *centre = w + points * ld_w;
    float *scale = centre + width;  // 1 / lengthscale
    float *norms = scale + width;   // of z
    u32 ld_x = max(ld, u32(8 * J + 4));
    float *x = norms + points + warp * ROWS * (ld_x + 1 + 4);  // and later what is made of them
    float *row_norm = x + ROWS * ld_x, *logdet = row_norm + ROWS;
    auto same = [](float value, u32) { return value; };
    auto centred = [&](float value, u32 d) {
        value = (value - centre[d]) / lengthscale(gram, d);
        return ROUNDED ? as_float(to_tf32(value)) : value;
    };
    stage({z, ld, points, width}, gram.z, 0, gram.M, features, 0, threadIdx.x, blockDim.x, same);
    stage({w, ld_w, points, outputs}, gram.w, 0, gram.M, gram.O, gram.paired, threadIdx.x,
          blockDim.x, same);
    for (u32 d = threadIdx.x; d < features; d += blockDim.x) scale[d] = 1 / lengthscale(gram, d);
    __syncthreads();
    if constexpr (DOTS) {
        column_means(centre, z, ld, gram.M, features, warp, warps);
        __syncthreads();
        stage({z, ld, points, width}, gram.z, 0, gram.M, features, 0, threadIdx.x, blockDim.x,
              centred);
        __syncthreads();
        row_norms(norms, z, ld, points, width, warp, warps);
        __syncthreads();
    }
    u32 g = lane() / 4, t = lane() % 4;
    i64 step = i64(gridDim.x) * warps * ROWS;
    for (i64 n0 = (i64(blockIdx.x) * warps + warp) * ROWS; n0 < gram.N; n0 += step) {
        for (u32 o0 = 0; o0 < outputs; o0 += 8 * J) {
            __syncwarp();
            if constexpr (DOTS) {
                stage({x, ld, ROWS, width}, gram.x, n0, gram.N, features, 0, lane(), WARP, centred);
                __syncwarp();
                row_norms(row_norm, x, ld, ROWS, width, 0, 1);
            } else {
                stage({x, ld, ROWS, width}, gram.x, n0, gram.N, features, 0, lane(), WARP, same);
            }
            __syncwarp();
            float sums[I][J][4] = {};
            for (u32 m0 = 0; m0 < points; m0 += 16) {
                float S[I][2][4] = {}, K[I][2][4], slope[4];
                if constexpr (DOTS) add_dots<ROUNDED>(S, x, ld, z + m0 * ld, ld, width);
#pragma unroll
                for (int i = 0; i < I; i++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        u32 r = 16 * i + g, m = m0 + 8 * j + 2 * t;
                        if constexpr (DOTS) {
                            bool lost = false;
                            float both[4];
#pragma unroll
                            for (int c = 0; c < 4; c++) {
                                both[c] = row_norm[r + c / 2 * 8] + norms[m + c % 2];
                                S[i][j][c] = both[c] - 2 * S[i][j][c];
                            }
                            profile(gram.profile, S[i][j], K[i][j], slope);
#pragma unroll
                            for (int c = 0; c < 4; c++)
                                lost |= loses_digits<ROUNDED>(S[i][j][c], K[i][j][c], both[c]);
                            if (!__any_sync(0xffffffffu, lost)) continue;
                            square_of_differences(
                                S[i][j], features, scale,
                                [&](u32 k, u32 d) {
                                    i64 n = n0 + r + 8 * k;
                                    return n < gram.N ? load(gram.x, n, d) : 0.f;
                                },
                                [&](u32 k, u32 d) {
                                    return m + k < gram.M ? load(gram.z, m + k, d) : 0.f;
                                });
                        } else {
                            square_of_differences(
                                S[i][j], features, scale,
                                [&](u32 k, u32 d) { return x[(r + 8 * k) * ld + d]; },
                                [&](u32 k, u32 d) { return z[(m + k) * ld + d]; });
                        }
                        profile(gram.profile, S[i][j], K[i][j], slope);
                    }
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float tiles[I][4];
#pragma unroll
                    for (int i = 0; i < I; i++)
#pragma unroll
                        for (int c = 0; c < 4; c++) tiles[i][c] = K[i][j][c];
                    add_products<ROUNDED>(sums, tiles, w + (m0 + 8 * j) * ld_w + o0, ld_w);
                }
            }
            finish(args, n0, o0, sums, x, logdet);
        }
        finish_logdet<ROWS>(args, n0, logdet);
    }
}

// --- kernels -----------------------------------------------------------------------------------

#define FEW(D, J, blocks)                                                     \
    FLOWOPS_KERNEL(gram_few_d##D##_o##J##_scalar, GramForward, 256, blocks) { \
        forward_few<D, J / 8, false>(args);                                   \
    }                                                                         \
    FLOWOPS_KERNEL(gram_few_d##D##_o##J##_vector, GramForward, 256, blocks) { \
        forward_few<D, J / 8, true>(args);                                    \
    }

FEW(2, 16, 2)
FEW(4, 16, 2)
FEW(8, 16, 2)
FEW(8, 32, 1)

#define MANY(I, J, name, DOTS, ROUNDED)                            \
    FLOWOPS_KERNEL(gram_many_o##J##_##name, GramForward, 256, 1) { \
        forward_many<I, J / 8, DOTS, ROUNDED>(args);               \
    }

MANY(2, 32, fp32, true, false)
MANY(2, 64, fp32, true, false)
MANY(1, 128, fp32, true, false)
MANY(2, 32, tf32, true, true)
MANY(2, 64, tf32, true, true)
MANY(1, 128, tf32, true, true)
MANY(2, 64, differences, false, false)
