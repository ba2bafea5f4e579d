// Causal attention over all heads, output projection and affine step of flowops/patch_attention.py
// in one kernel, for heads of width 64 in 16-bit storage.
//
// A block owns a tile of tokens of one image and walks the heads. A head's output is multiplied
// with its columns of the projection while in registers, so the affine parameters of the tile are
// complete after the last head; they move the tokens one further on. Besides z only o and the
// log-sum-exp, which backward needs, are written.
//
// Bound: the tensor cores, and beside them shared memory. With 16 queries a warp, reading the keys
// and values there takes as long as multiplying them on an A100; a warp has 32 where the parameters
// leave it the registers. Per head a tile reads 256 bytes a key, which are in the L2 cache where
// the image's other tiles are near by.
#include "attention_tile.cuh"

struct PatchAttention {
    const void *q, *k, *v, *weight, *bias, *x;
    void *z, *partial, *o, *lse;
    i64 B, T, H, C, has_scale, reverse, wide_x, flip;
    // In bytes but for x, whose storage may be another.
    i64 stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh;
    i64 stride_vb, stride_vt, stride_vh, stride_w, stride_xb, stride_xt;
    i64 scale;  // bits of an fp32 number: in units of ln 2, positive; the sign is q's (flip)
};

// --- shared memory ------------------------------------------------------------------------------
//
// Everything comes through a ring of three slots: for each head its queries, then the keys and
// values 64 at a time, then its columns of the projection. While one slot is used two are filled.

constexpr int SLOTS = 3, SLOT = 2 * KEYS * ROW;

// Fills the ring and hands its slots out. QUERIES of a tile; COLUMNS: padded channels.
template <int QUERIES, int COLUMNS>
struct Ring {
    const PatchAttention &args;
    u32 base;
    i64 b;
    int first, key_tiles;  // the tile's first query, and how many tiles of keys it sees
    // What comes next into the ring.
    int head = 0, step = 0;
    const char *k = nullptr, *v = nullptr;
    u32 slot = 0, filled = 0;  // offsets: the one to hand out, the one to fill

    DEVICE void fill() {
        if (head < int(args.H)) {
            Piece piece;
            u32 to = base + filled;
            int tokens = args.T, C = args.C;
            if (step == 0) {
                k = piece.in(args.k, b * args.stride_kb + head * args.stride_kh, args.stride_kt);
                v = piece.in(args.v, b * args.stride_vb + head * args.stride_vh, args.stride_vt);
                i64 q = b * args.stride_qb + head * args.stride_qh + first * args.stride_qt;
                piece.copy<QUERIES>(to, piece.in(args.q, q, args.stride_qt), args.stride_qt,
                                    tokens - first);
            } else if (step <= key_tiles) {
                int left = tokens - (step - 1) * KEYS;
                k = piece.copy<KEYS>(to, k, args.stride_kt, left);
                v = piece.copy<KEYS>(to + KEYS * ROW, v, args.stride_vt, left);
            } else {
                const char *weight = piece.in(args.weight, head * ROW, args.stride_w);
                piece.copy<COLUMNS>(to, weight, args.stride_w, args.has_scale ? C : 0);
                if (args.has_scale) weight += C * args.stride_w;
                piece.copy<COLUMNS>(to + COLUMNS * ROW, weight, args.stride_w, C);
            }
            if (++step == key_tiles + 2) step = 0, head++;
            filled = filled == (SLOTS - 1) * SLOT ? 0 : filled + SLOT;
        }
        cp_async_commit();
    }

    // The next slot, when it has come; the one before must not be read any more.
    DEVICE u32 next() {
        cp_async_wait<SLOTS - 2>();
        __syncthreads();
        fill();
        u32 at = base + slot;
        slot = slot == (SLOTS - 1) * SLOT ? 0 : slot + SLOT;
        return at;
    }
};

// --- projection ---------------------------------------------------------------------------------

// Ends a head: o and the log-sum-exp are stored, and o's share of the parameters is added to acc.
template <int M, class T, int COLUMNS>
DEVICE void project(Attention<M> &state, float (&acc)[M][COLUMNS / 4][4], u32 weight, T *o,
                    i64 stride_o, float *lse, int row, int real) {
    int lane = threadIdx.x % 32;
    u32 words[M][D / 8][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = state.sum[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            float inverse = reciprocal_approx(sum);
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                words[m][n][half] = pack<T>(state.o[m][n][2 * half] * inverse,
                                            state.o[m][n][2 * half + 1] * inverse);
            int r = row + 16 * m + 8 * half + lane / 4;
            if (lane % 4 == 0 && r < real)
                lse[r] = (state.base[m][half] + log2f(sum)) * 0.6931471805599453f;
        }
    }
    weight += columns_first(lane);
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
#pragma unroll
        for (int c = 0; c < COLUMNS / 8; c++) {
            u32 w[4];
            ldmatrix(w, (weight ^ 32 * d) + 16 * ROW * c);
#pragma unroll
            for (int m = 0; m < M; m++) {
                u32 a[4] = {words[m][2 * d][0], words[m][2 * d][1], words[m][2 * d + 1][0],
                            words[m][2 * d + 1][1]};
                mma<T>(acc[m][2 * c], a, w[0], w[1]);
                mma<T>(acc[m][2 * c + 1], a, w[2], w[3]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
        store_head(o + (row + 16 * m) * stride_o, stride_o, words[m], real - row - 16 * m);
}

// --- affine step --------------------------------------------------------------------------------

// Lays the parameters of a warp's rows open: COLUMNS log-scales and as many shifts a row. The
// padding spreads four rows over all banks.
template <int COLUMNS>
constexpr int PARAMS = 2 * COLUMNS + 8;

template <int M, int COLUMNS>
DEVICE void spread(const float (&acc)[M][COLUMNS / 4][4], float *params) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        float *row = params + (8 * i + lane / 4) * PARAMS<COLUMNS> + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < COLUMNS / 4; n++) {
            Vec<float, 2> pair = {acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]};
            store_vec(row + 8 * n, pair);
        }
    }
}

// z of the tokens that the parameters of the tile's tokens move: the next ones. The last token's
// move nothing; it stands in for the first, which is copied. Returns minus the sum of this thread's
// log-scales.
template <class X, class T, int COLUMNS>
DEVICE float affine_step(const PatchAttention &args, const float *params, i64 b, int first,
                         int count) {
    u32 C = args.C, elements = count * C;
    int last = args.T - 1;
    const T *bias = static_cast<const T *>(args.bias);
    const X *x = static_cast<const X *>(args.x) + b * args.stride_xb;
    X *z = static_cast<X *>(args.z) + b * args.T * args.C;
    float sum = 0;
    for (u32 e = threadIdx.x; e < elements; e += THREADS) {
        u32 row = e / C, c = e - row * C;
        int token = first + row;
        bool known = token < last;
        i64 moved = args.reverse ? (known ? last - 1 - token : last) : (known ? token + 1 : 0);
        float a = 0, shift = 0;
        if (known) {
            const float *of_row = params + row * PARAMS<COLUMNS> + c;
            if (args.has_scale) a = of_row[0] + widen(bias[c]);
            shift = of_row[COLUMNS] + widen(bias[args.has_scale ? C + c : c]);
        }
        float from = widen(x[moved * args.stride_xt + c]);
        z[moved * C + c] = narrow<X>((from - shift) * expf(-a));
        sum -= a;
    }
    return sum;
}

// --- kernel -------------------------------------------------------------------------------------

template <class T, int M, int COLUMNS>
DEVICE void patch_attention(const PatchAttention &args) {
    constexpr int QUERIES = WARPS * 16 * M;
    static_assert(QUERIES * ROW <= SLOT && 2 * COLUMNS * ROW <= SLOT);
    static_assert((QUERIES * PARAMS<COLUMNS> + WARPS) * 4 <= SLOTS * SLOT);
    // The longest first; the tiles of an image follow each other and share k and v in the L2 cache.
    i64 b = blockIdx.z * gridDim.y + blockIdx.y;
    if (b >= args.B) return;
    int tokens = args.T, tile = gridDim.x - 1 - blockIdx.x, first = tile * QUERIES;
    // By a shuffle the compiler knows that a warp has one.
    int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    int row = first + warp * 16 * M;
    int key_tiles = (min(first + QUERIES, tokens) + KEYS - 1) / KEYS;
    float scale = as_float(args.scale);
    Ring<QUERIES, COLUMNS> ring{args, shared_address(shared_memory()), b, first, key_tiles};
#pragma unroll 1
    for (int i = 0; i < SLOTS - 1; i++) ring.fill();
    float acc[M][COLUMNS / 4][4] = {};
    u32 q[M][D / 16][4] = {};
    Attention<M> state = {};
    int heads = args.H;
#pragma unroll 1
    for (int head = 0, step = 0; head < heads;) {
        u32 slot = ring.next();
        if (step == 0) {
            load_queries<M>(q, slot + warp * 16 * M * ROW, args.flip);
            state = Attention<M>{};
#pragma unroll
            for (int i = 0; i < 2 * M; i++) state.base[i / 2][i % 2] = minus_infinity();
        } else if (step <= key_tiles) {
            int key = (step - 1) * KEYS;
            u32 values = slot + KEYS * ROW;
            if (key + KEYS <= row + 1)
                attend<M, T, false>(state, q, slot, values, key, row, scale);
            else if (key < row + 16 * M)
                attend<M, T, true>(state, q, slot, values, key, row, scale);
        } else {
            T *o = static_cast<T *>(args.o) + (b * args.T * heads + head) * D;
            float *lse = static_cast<float *>(args.lse) + (b * heads + head) * args.T;
            project<M, T, COLUMNS>(state, acc, slot, o, heads * D, lse, row, tokens);
        }
        if (++step == key_tiles + 2) step = 0, head++;
    }
    __syncthreads();  // the ring is not read any more
    float *params = reinterpret_cast<float *>(shared_memory());
    spread<M, COLUMNS>(acc, params + warp * 16 * M * PARAMS<COLUMNS>);
    __syncthreads();
    int count = min(QUERIES, tokens - first);
    float sum = args.wide_x ? affine_step<float, T, COLUMNS>(args, params, b, first, count)
                            : affine_step<T, T, COLUMNS>(args, params, b, first, count);
    if (!args.has_scale) return;
    float *sums = params + QUERIES * PARAMS<COLUMNS>;
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARPS; i++) sum += sums[i];
        static_cast<float *>(args.partial)[b * gridDim.x + tile] = sum;
    }
}

// M: 16 queries a warp, M times; COLUMNS: channels, padded.
#define PATCH_ATTENTION(T, M, COLUMNS, blocks_per_sm)                                           \
    FLOWOPS_KERNEL(causal_patch_attention_fwd_##T##_m##M##_c##COLUMNS, PatchAttention, THREADS, \
                   blocks_per_sm) {                                                             \
        patch_attention<T, M, COLUMNS>(args);                                                   \
    }

PATCH_ATTENTION(bf16, 1, 16, 3)
PATCH_ATTENTION(bf16, 2, 16, 2)
PATCH_ATTENTION(bf16, 1, 32, 3)
PATCH_ATTENTION(bf16, 1, 48, 3)
PATCH_ATTENTION(bf16, 1, 64, 2)
PATCH_ATTENTION(f16, 1, 16, 3)
PATCH_ATTENTION(f16, 2, 16, 2)
PATCH_ATTENTION(f16, 1, 32, 3)
PATCH_ATTENTION(f16, 1, 48, 3)
PATCH_ATTENTION(f16, 1, 64, 2)
