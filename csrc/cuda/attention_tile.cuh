// Attention of a warp's queries to a tile of keys by mma.sync, for heads of width 64 in 16-bit
// storage: FlashAttention-2, with the tiles in shared memory and all else in registers.
//
// Source: Dao, "FlashAttention-2" (arXiv 2307.08691).
#pragma once
#include "mma16.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int D = 64, KEYS = 64;  // width of a head, and keys that are multiplied at once
constexpr int ROW = 2 * D;        // bytes of a row in shared memory

DEVICE float minus_infinity() { return as_float(0xff800000); }

// --- shared memory ------------------------------------------------------------------------------
//
// Rows of 128 bytes, whose 16-byte chunk c lies at c ^ (row % 8): the eight rows that ldmatrix
// reads at once at one column are in eight different groups of banks, and so are the eight chunks
// of a row that are copied.

// The piece of 16 bytes that this thread copies of every 16 rows, and where it lies in a slot.
struct Piece {
    int row = threadIdx.x / 8, chunk = threadIdx.x % 8;

    // Its address in a matrix that begins at `first`; stride in bytes.
    DEVICE const char *in(const void *first, i64 offset, i64 stride) const {
        return static_cast<const char *>(first) + offset + row * stride + chunk * 16;
    }

    // Copies ROWS rows, of which `real` are there; zeros for the others. Returns the address in the
    // row behind them.
    template <int ROWS>
    DEVICE const char *copy(u32 slot, const char *from, i64 stride, int real) const {
        u32 to = slot + row * ROW + (chunk ^ row % 8) * 16;
#pragma unroll
        for (int i = 0; i < ROWS; i += THREADS / 8) {
            cp_async16(to + i * ROW, from, row + i < real);
            from += THREADS / 8 * stride;
        }
        return from;
    }
};

// Where a lane points ldmatrix: rows by the lane's bit 3 and columns by bit 4, as a left factor has
// them (and, transposed, a right one of which rows are stored), or the other way round, as a right
// one has them of which columns are stored. `^ 32 i` goes 16 columns on, `+ 2048 i` 16 rows.
DEVICE u32 rows_first(int lane) { return (lane % 16) * ROW + ((lane / 16) ^ lane % 8) * 16; }
DEVICE u32 columns_first(int lane) {
    return (lane / 16 * 8 + lane % 8) * ROW + ((lane / 8 % 2) ^ lane % 8) * 16;
}

// --- attention ----------------------------------------------------------------------------------

// A warp's queries, of which `at` is the first row; `flip` are the bits of their signs, or none.
template <int M>
DEVICE void load_queries(u32 (&q)[M][D / 16][4], u32 at, u32 flip) {
    at += rows_first(threadIdx.x % 32);
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            ldmatrix(q[m][d], (at ^ 32 * d) + 16 * ROW * m);
#pragma unroll
            for (int i = 0; i < 4; i++) q[m][d][i] ^= flip;
        }
    }
}

// The running softmax of a warp's queries, 16 * M of them, and the sum of values it weighs.
template <int M>
struct Attention {
    float o[M][D / 8][4];
    float base[M][2];  // p = 2^(score - base): near the maximum, in units of ln 2
    float sum[M][2];   // of p, this lane's share
};

// The base follows the maximum only when that is 2^8 beyond it. Every row decides for itself, so
// its bits are its own, but mostly no row of the warp has to be rescaled.
constexpr float SLACK = 8;

template <int M, class T, bool DIAGONAL>
DEVICE void attend(Attention<M> &state, const u32 (&q)[M][D / 16][4], u32 keys, u32 values, int key,
                   int row, float scale) {
    int lane = threadIdx.x % 32, column = key + 2 * (lane % 4);
    // Whether 16 keys from 16 j on are past all of the 16 queries from 16 m on.
    auto hidden = [&](int j, int m) { return DIAGONAL && key + 16 * j > row + 16 * m + 15; };
    float s[M][KEYS / 8][4] = {};
    keys += columns_first(lane);
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            if (hidden(j, M - 1)) continue;
            u32 k[4];
            ldmatrix(k, (keys ^ 32 * d) + 16 * ROW * j);
#pragma unroll
            for (int m = 0; m < M; m++) {
                if (hidden(j, m)) continue;
                mma<T>(s[m][2 * j], q[m][d], k[0], k[1]);
                mma<T>(s[m][2 * j + 1], q[m][d], k[2], k[3]);
            }
        }
    }
    float top[M][2];
    bool beyond = false;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int query = row + 16 * m + 8 * half + lane / 4;
            float most = minus_infinity();
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    if (DIAGONAL && column + 8 * n + e % 2 > query) s[m][n][e] = minus_infinity();
                    most = fmaxf(most, s[m][n][e]);
                }
            }
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            top[m][half] = most * scale;
            beyond |= top[m][half] > state.base[m][half] + SLACK;
        }
    }
    if (__any_sync(0xffffffffu, beyond)) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float &base = state.base[m][half];
                float next = top[m][half] > base + SLACK ? top[m][half] : base;
                float rescale = exp2_approx(base - next);
                base = next;
                state.sum[m][half] *= rescale;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    state.o[m][n][2 * half] *= rescale;
                    state.o[m][n][2 * half + 1] *= rescale;
                }
            }
        }
    }
    values += rows_first(lane);
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++) {
        if (hidden(j, M - 1)) continue;
        u32 p[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float (&pair)[4] = s[m][2 * j + i / 2];
                int half = i % 2;
                float low = exp2_approx(__fmaf_rn(pair[2 * half], scale, -state.base[m][half]));
                float high =
                    exp2_approx(__fmaf_rn(pair[2 * half + 1], scale, -state.base[m][half]));
                state.sum[m][half] += low + high;
                p[m][i] = pack<T>(low, high);
            }
        }
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            u32 v[4];
            ldmatrix_transposed(v, (values ^ 32 * d) + 16 * ROW * j);
#pragma unroll
            for (int m = 0; m < M; m++) {
                if (hidden(j, m)) continue;
                mma<T>(state.o[m][2 * d], p[m], v[0], v[1]);
                mma<T>(state.o[m][2 * d + 1], p[m], v[2], v[3]);
            }
        }
    }
}

// Stores 16 rows of o, of which `real` are there. The four lanes of a row trade their words, so
// that each has 16 bytes of it in one piece.
template <class T>
DEVICE void store_head(T *to, i64 stride, const u32 (&words)[D / 8][2], int real) {
    int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int n = 0; n < D / 8; n += 4) {
            Vec<u32, 4> row = {words[n][half], words[n + 1][half], words[n + 2][half],
                               words[n + 3][half]};
#pragma unroll
            for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (i & bit) continue;
                    u32 got =
                        __shfl_xor_sync(0xffffffffu, t & bit ? row.at[i] : row.at[i + bit], bit);
                    if (t & bit)
                        row.at[i] = got;
                    else
                        row.at[i + bit] = got;
                }
            }
            int r = lane / 4 + 8 * half;
            if (r < real) store_vec(reinterpret_cast<u32 *>(to + r * stride + 8 * (n + t)), row);
        }
    }
}
