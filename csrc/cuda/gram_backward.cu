// Gradients of K @ w with few features: distances from differences. The sum of the partials.
//
// A warp has 32 points and meets all rows of the block; what it found for the rows is added to that
// of the other warps in shared memory. Bound by arithmetic, some 4 D + 30 instructions a pair.
#include "gram_backward.cuh"

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
    float *z = reinterpret_cast<float *>(shared_memory());
    float *w = z + warps * 16 * P * LD;
    float *x = w + warps * 16 * P * LD_G;
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
    stage({z, LD, warps * 16 * P, D}, gram.z, 0, gram.M, gram.D, 0, threadIdx.x, blockDim.x,
          scaled);
    stage({w, LD_G, warps * 16 * P, 8 * J}, gram.w, 0, gram.M, gram.O, 0, threadIdx.x, blockDim.x,
          same);
    auto point_of = [&](int p, int i) { return warp * 16 * P + 16 * p + 8 * i + g; };

    float dz[P][2][D] = {}, dw[P][J][4] = {}, squares[VECTOR ? D : 1] = {};
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
                float dK[4] = {};
#pragma unroll
                for (int j = 0; j < J; j++)
                    add_product<false>(
                        dK, rows_of<false>(w + (warp * 16 * P + 16 * p) * LD_G + 8 * j, LD_G),
                        right[j]);
                // A point at a time: its differences from two rows are all that registers hold.
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float *point = z + point_of(p, i) * LD;
                    float delta[2][D], S[2] = {}, own_K[2], slope[2];
#pragma unroll
                    for (int d = 0; d < D; d++)
#pragma unroll
                        for (int r = 0; r < 2; r++) {
                            delta[r][d] = scales.difference(row[r][d], point[d], d);
                            S[r] += delta[r][d] * delta[r][d];
                        }
#pragma unroll
                    for (int r = 0; r < 2; r++) S[r] = scales.distance(S[r]);
                    profile(gram.profile, S, own_K, slope);
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        float V = slope[r] * dK[2 * i + r];
                        K[p][2 * i + r] = own_K[r];
                        if constexpr (!VECTOR) squares[0] += V * S[r];
#pragma unroll
                        for (int d = 0; d < D; d++) {
                            dz[p][i][d] = __fmaf_rn(V, delta[r][d], dz[p][i][d]);
                            u[r * D + d] = __fmaf_rn(V, delta[r][d], u[r * D + d]);
                            if constexpr (VECTOR) squares[d] += V * delta[r][d] * delta[r][d];
                        }
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
            u32 m = point_of(p, i);
#pragma unroll
            for (int d = 0; d < D; d++) {
                float sum = dz[p][i][d];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (t == u32(d % 4) && m < gram.M && d < gram.D)
                    partial[m * gram.D + d] = -sum * scales.pull(d);
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

#define FEW(D, J, threads)                                                             \
    FLOWOPS_KERNEL(gram_backward_few_d##D##_o##J##_scalar, GramBackward, threads, 1) { \
        backward_few<D, J / 8, false>(args);                                           \
    }                                                                                  \
    FLOWOPS_KERNEL(gram_backward_few_d##D##_o##J##_vector, GramBackward, threads, 1) { \
        backward_few<D, J / 8, true>(args);                                            \
    }

FEW(2, 16, 320)
FEW(4, 16, 320)
FEW(8, 16, 320)
FEW(8, 32, 256)
