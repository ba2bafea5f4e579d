// The forward pass of flowops/patch_attention.py on Hopper: attention over all heads, the output
// product, the shift by one token, the affine step and its log-determinant in one kernel. Heads of
// width 64, 16-bit storage.
//
// A block owns 128 queries of an image at a time: two warpgroups have 64 each, the third brings the
// data. It copies q and the rows of the weight of a head ahead of use (two slots), and keys and
// values 64 at a time (six). The consumers walk the heads: scores by wgmma from shared memory, a
// running softmax, probabilities as the left operand in registers; the head's o, rounded, is again
// a left operand, against the head's columns of the weight. So the parameters of the affine step
// are complete after the last head and have never left the registers. The product of one tile of
// probabilities runs while the next tile's softmax does, and the two consumers run beside each
// other.
//
// What bounds it: memory up to some hundred tokens, 8 bytes a token, head and channel (q, k, v in,
// o out) for 2 T flops; from about a thousand on the softmax, whose exponentials (16 a clock and
// processor) and other instructions take twice as long as the products.
#include "hopper.cuh"

struct PatchAttention {
    const void *q, *k, *v, *weight, *bias, *x;
    void *z, *partial, *o, *lse;
    i64 B, T, H, C, has_scale, reverse, wide_x, negative;
    double scale;  // positive: |scale| / ln 2, for exp2
    i64 stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh;
    i64 stride_vb, stride_vt, stride_vh, stride_w, stride_xb, stride_xt;
};

constexpr int D = 64, KEYS = 64, QUERIES = 64, CONSUMERS = 2, BLOCK = CONSUMERS * QUERIES;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int STAGES = 6, SLOTS = 2;
// 168 a thread at the start, the most that 3 warpgroups can have alike; 40 + 2 * 232 <= 3 * 168.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(2 * D == ROW);
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * 168);

// --- shared memory ------------------------------------------------------------------------------

// Barriers of 8 bytes: of a stage with keys and values, of a slot with queries and weight. There is
// none for a slot that is full: the first stage after it is not before.
struct Barriers {
    static constexpr u32 full = 0, empty = full + 8 * STAGES, head_empty = empty + 8 * STAGES;
    static constexpr u32 bytes = head_empty + 8 * SLOTS;
};

// N rows of the weight: half of them for the log-scales, half for the shifts, zeros behind both.
template <int N>
struct Shared {
    static constexpr int q = 0, weight = q + SLOTS * BLOCK * ROW;
    static constexpr int k = weight + SLOTS * N * ROW, v = k + STAGES * KEYS * ROW;
    static constexpr int barriers = v + STAGES * KEYS * ROW, bytes = barriers + Barriers::bytes;
    static_assert(bytes <= 227 << 10);
};

// --- what a block does when ---------------------------------------------------------------------

// 128 queries of an image from `first` on, and how many tiles of keys they see.
struct Unit {
    i64 b;
    int first, tiles;
};

// A block takes every gridDim.x-th unit. The units of an image are neighbours, to meet in the L2
// cache; their order is turned from one round to the next, so that no block gets the long ones
// only.
DEVICE Unit unit_at(const PatchAttention &args, u32 unit) {
    u32 count = (args.T + BLOCK - 1) / BLOCK, b = unit / count;
    u32 tile = count - 1 - (unit + b * count / gridDim.x) % count;
    int all = (args.T + KEYS - 1) / KEYS;
    return {b, int(tile * BLOCK), min(int(tile + 1) * CONSUMERS, all)};
}

DEVICE u32 units(const PatchAttention &args) { return args.B * ((args.T + BLOCK - 1) / BLOCK); }

// --- the producer -------------------------------------------------------------------------------

// Copies ROWS rows of 64 elements; those from `limit` on are zeros. Eight threads take a row.
template <class T, int ROWS>
DEVICE void copy_rows(u32 to, const T *from, i64 stride, int limit) {
    int row = threadIdx.x % WARPGROUP / 8, piece = threadIdx.x % 8;
    to += swizzled(row, piece);
    from += row * stride + piece * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i += 16) {
        copy_async(to + i * ROW, from, row + i < limit);
        from += 16 * stride;
    }
}

template <class T, int N>
DEVICE void produce(const PatchAttention &args, u32 base) {
    using At = Shared<N>;
    const u32 barriers = base + At::barriers;
    Ring<SLOTS> head;
    Ring<STAGES> stage;
    for (u32 u = blockIdx.x; u < units(args); u += gridDim.x) {
        Unit unit = unit_at(args, u);
        const T *q = static_cast<const T *>(args.q) + unit.b * args.stride_qb;
        const T *k = static_cast<const T *>(args.k) + unit.b * args.stride_kb;
        const T *v = static_cast<const T *>(args.v) + unit.b * args.stride_vb;
        const T *weight = static_cast<const T *>(args.weight);
        q += unit.first * args.stride_qt;
        for (int h = 0; h < args.H; h++) {
            mbarrier_wait(barriers + Barriers::head_empty + 8 * head.slot, head.parity ^ 1);
            copy_rows<T, BLOCK>(base + At::q + head.slot * BLOCK * ROW, q, args.stride_qt,
                                args.T - unit.first);
            u32 to = base + At::weight + head.slot * N * ROW;
            int scales = args.has_scale ? args.C : 0;
            copy_rows<T, N / 2>(to, weight, args.stride_w, scales);
            copy_rows<T, N / 2>(to + N / 2 * ROW, weight + scales * args.stride_w, args.stride_w,
                                args.C);
            head.advance();
#pragma unroll 1
            for (int tile = 0; tile < unit.tiles; tile++) {
                int first = tile * KEYS;
                mbarrier_wait(barriers + Barriers::empty + 8 * stage.slot, stage.parity ^ 1);
                u32 at = base + stage.slot * KEYS * ROW;
                copy_rows<T, KEYS>(at + At::k, k + first * args.stride_kt, args.stride_kt,
                                   args.T - first);
                copy_rows<T, KEYS>(at + At::v, v + first * args.stride_vt, args.stride_vt,
                                   args.T - first);
                copies_arrive(barriers + Barriers::full + 8 * stage.slot);
                stage.advance();
            }
            q += args.stride_qh, k += args.stride_kh, v += args.stride_vh, weight += D;
        }
    }
    wait_for_copies();  // no thread ends with copies under way
}

// --- the arithmetic of the consumers ------------------------------------------------------------

// The running softmax of two rows: largest score, and this thread's share of the sum.
struct Softmax {
    float m[2], l[2];

    // Turns scores [64, 64] into probabilities up to a factor of their row. `rescale` is by what
    // that of the tiles before changes. On the diagonal, keys after the row's query count nothing.
    DEVICE void take(float (&s)[32], const Lane &lane, bool diagonal, bool negative, float scale,
                     float (&rescale)[2]) {
        if (negative) {
#pragma unroll
            for (int i = 0; i < 32; i++) s[i] = -s[i];
        }
        if (diagonal) {
#pragma unroll
            for (int i = 0; i < 32; i++) {
                int key = i / 4 * 8 + lane.column + i % 2, query = lane.row + i / 2 % 2 * 8;
                if (key > query) s[i] = -as_float(0x7f800000u);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float largest = m[h];
#pragma unroll
            for (int j = 0; j < 32; j += 4)
                largest = fmaxf(largest, fmaxf(s[j + 2 * h], s[j + 2 * h + 1]));
            largest = row_max(largest);
            float shift = __fmul_rn(largest, scale), sum = 0;
            // Of two rounded shifts: exactly 1 where the maximum stays, however many tiles follow.
            rescale[h] = exp2_approx(__fmul_rn(m[h], scale) - shift);
#pragma unroll
            for (int j = 0; j < 32; j += 4) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &p = s[j + 2 * h + e];
                    p = exp2_approx(__fmaf_rn(p, scale, -shift));
                    sum += p;
                }
            }
            m[h] = largest;
            l[h] = __fmaf_rn(l[h], rescale[h], sum);
        }
    }
};

// Scores of 64 queries and 64 keys.
template <class T>
DEVICE void scores(float (&s)[32], u32 q, u32 k) {
    wgmma<true>(T(), s, descriptor(q), descriptor(k));
#pragma unroll
    for (int i = 1; i < D / 16; i++) {
        wgmma<false>(T(), s, descriptor(q + 32 * i), descriptor(k + 32 * i));
    }
}

template <class T, bool DOWN, int COUNT>
DEVICE void add_product(float (&d)[COUNT], const u32 (&a)[4][4], u32 b) {
    constexpr int step = DOWN ? 16 * ROW : 32;
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma<DOWN>(T(), d, a[i], descriptor(b + step * i));
}

// --- the consumers ------------------------------------------------------------------------------

// Writes a head's o: through shared memory, for whole rows. Each warp has its own 16 rows there.
template <class T>
DEVICE void store_o(const u32 (&o)[4][4], unsigned char *shared, const Lane &lane, T *to,
                    i64 stride, int limit) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        int at = swizzled(lane.row + i % 2 * 8, i / 2) + lane.column * 2;
        *reinterpret_cast<u32 *>(shared + at) = o[i / 4][i % 4];
    }
    __syncwarp();
    int thread = threadIdx.x % WARPGROUP, piece = thread % 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = thread / 32 * 16 + i * 4 + thread % 32 / 8;
        auto values = load_vec<T, 8>(reinterpret_cast<const T *>(shared + swizzled(row, piece)));
        if (row < limit) store_vec(to + row * stride + piece * 8, values);
    }
    __syncwarp();
}

// The affine step with the parameters of 64 tokens from `first` on, which move the tokens after
// them. Those of the last token move nothing: it stands in for the token that has none.
template <class T, int N>
DEVICE void affine(const PatchAttention &args, const float (&params)[N / 2], const Lane &lane,
                   i64 b, int first) {
    const T *bias = static_cast<const T *>(args.bias);
    float sum = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int token = first + lane.row + h * 8, last = args.T - 1;
        if (token > last) continue;
        bool known = token < last;
        i64 moved = args.reverse ? (known ? last - 1 - token : last) : (known ? token + 1 : 0);
        i64 from = b * args.stride_xb + moved * args.stride_xt, to = (b * args.T + moved) * args.C;
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            int channel = i / 2 * 8 + lane.column + i % 2, at = i / 2 * 4 + h * 2 + i % 2;
            if (channel >= args.C) continue;
            float x = args.wide_x ? static_cast<const float *>(args.x)[from + channel]
                                  : widen(static_cast<const T *>(args.x)[from + channel]);
            if (known) {
                float a = args.has_scale ? params[at] + widen(bias[channel]) : 0.f;
                x -= params[at + N / 4] + widen(bias[channel + (args.has_scale ? args.C : 0)]);
                x *= expf(-a);
                sum -= a;
            }
            if (args.wide_x) {
                static_cast<float *>(args.z)[to + channel] = x;
            } else {
                static_cast<T *>(args.z)[to + channel] = narrow<T>(x);
            }
        }
    }
    sum = warp_sum(sum);
    if (args.has_scale && threadIdx.x % 32 == 0) {
        i64 warps = ceil_div(args.T, BLOCK) * (BLOCK / 16);
        static_cast<float *>(args.partial)[b * warps + (first + lane.row) / 16] = sum;
    }
}

template <class T, int N>
DEVICE void consume(const PatchAttention &args, unsigned char *shared, u32 base) {
    using At = Shared<N>;
    const int consumer = threadIdx.x / WARPGROUP - 1;
    const Lane lane = lane_at();
    const u32 barriers = base + At::barriers;
    const float scale = args.scale;
    Ring<SLOTS> head;
    Ring<STAGES> stage;
    auto full = [&] { return barriers + Barriers::full + 8 * stage.slot; };
    auto empty = [&](u32 slot) { return barriers + Barriers::empty + 8 * slot; };
    auto values = [&](u32 slot) { return base + At::v + slot * KEYS * ROW; };
    auto keys = [&] { return base + At::k + stage.slot * KEYS * ROW; };

    for (u32 u = blockIdx.x; u < units(args); u += gridDim.x) {
        const Unit unit = unit_at(args, u);
        const int first = unit.first + consumer * QUERIES, limit = args.T - first;
        // The last of its tiles of keys is on the diagonal; the other consumer may see one more.
        const int tiles = min(first / KEYS + 1, unit.tiles);
        float params[N / 2] = {};
        for (int h = 0; h < args.H; h++) {
            const int q = At::q + (head.slot * BLOCK + consumer * QUERIES) * ROW;
            float s[32] = {}, o[32] = {}, rescale[2];
            u32 p[4][4];
            Softmax softmax = {{-as_float(0x7f800000u), -as_float(0x7f800000u)}, {0, 0}};

            mbarrier_wait(full(), stage.parity);
            fence_proxy_async();
            pin(s);
            wgmma_fence();
            scores<T>(s, base + q, keys());
            wgmma_commit();
            wgmma_wait<0>();
            pin(s);
            softmax.take(s, lane, tiles == 1, args.negative, scale, rescale);
            as_left<T>(s, p);
            u32 before = stage.slot;
            stage.advance();
            if (tiles > 1) mbarrier_wait(full(), stage.parity);
#pragma unroll 1
            for (int tile = 1; tile < tiles; tile++) {
                fence_proxy_async();
                pin(s);
                pin(o);
                pin(p);
                wgmma_fence();
                scores<T>(s, base + q, keys());
                wgmma_commit();
                add_product<T, true>(o, p, values(before));
                wgmma_commit();
                wgmma_wait<1>();
                pin(s);
                softmax.take(s, lane, tile == tiles - 1, args.negative, scale, rescale);
                pin(s);
                u32 done = before;
                before = stage.slot;
                stage.advance();
                // Here, and not where it is needed: the compiler would bring the wait below it
                // forward to before the softmax, across anything but a branch.
                if (tile < tiles - 1) mbarrier_wait(full(), stage.parity);
                wgmma_wait<0>();
                pin(o);
                arrive_once_a_warp(empty(done));
                multiply_rows(o, rescale);
                as_left<T>(s, p);
            }
            pin(o);
            pin(p);
            wgmma_fence();
            add_product<T, true>(o, p, values(before));
            wgmma_commit();
            wgmma_wait<0>();
            pin(o);
            arrive_once_a_warp(empty(before));

            float *lse = static_cast<float *>(args.lse) + (unit.b * args.H + h) * args.T + first;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float l = row_sum(softmax.l[i]);
                int row = lane.row + i * 8;
                if (lane.column == 0 && row < limit) {
                    lse[row] = (__fmul_rn(softmax.m[i], scale) + log2f(l)) * 0.69314718056f;
                }
                rescale[i] = 1 / l;
            }
            multiply_rows(o, rescale);
            as_left<T>(o, p);
            pin(params);
            pin(p);
            wgmma_fence();
            add_product<T, false>(params, p, base + At::weight + head.slot * N * ROW);
            wgmma_commit();
            wgmma_wait<0>();  // p may not even be read before
            pin(params);
            // o goes out through the place of q, which all four warps are done with.
            named_barrier(1 + consumer, WARPGROUP);
            T *to = static_cast<T *>(args.o) + ((unit.b * args.T + first) * args.H + h) * D;
            store_o(p, shared + q, lane, to, args.H * D, limit);
            arrive_once_a_warp(barriers + Barriers::head_empty + 8 * head.slot);
            head.advance();
            if (tiles < unit.tiles) {  // what only the other consumer needs
                mbarrier_wait(full(), stage.parity);
                arrive_once_a_warp(empty(stage.slot));
                stage.advance();
            }
        }
        affine<T, N>(args, params, lane, unit.b, first);
    }
}

// --- kernels ------------------------------------------------------------------------------------

template <class T, int N>
DEVICE void forward(const PatchAttention &args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FLOWOPS_EMULATE)
    unsigned char *shared = shared_memory();
    const u32 base = shared_address(shared), barriers = base + Shared<N>::barriers;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(barriers + Barriers::full + 8 * i, WARPGROUP);
            mbarrier_init(barriers + Barriers::empty + 8 * i, CONSUMERS * WARPGROUP / 32);
        }
        for (int i = 0; i < SLOTS; i++) {
            mbarrier_init(barriers + Barriers::head_empty + 8 * i, CONSUMERS * WARPGROUP / 32);
        }
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        release_registers<PRODUCER_REGISTERS>();
        produce<T, N>(args, base);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume<T, N>(args, shared, base);
    }
#else
    asm("trap;");  // never launched: attention_hopper.serves
#endif
}

#define PATCH_ATTENTION(tag, T, N)                                                               \
    FLOWOPS_KERNEL(causal_patch_attention_fwd_hopper_##tag##_n##N, PatchAttention, THREADS, 1) { \
        forward<T, N>(args);                                                                     \
    }

PATCH_ATTENTION(bf16, bf16, 32)
PATCH_ATTENTION(bf16, bf16, 64)
PATCH_ATTENTION(bf16, bf16, 96)
PATCH_ATTENTION(bf16, bf16, 128)
PATCH_ATTENTION(f16, f16, 32)
PATCH_ATTENTION(f16, f16, 64)
PATCH_ATTENTION(f16, f16, 96)
PATCH_ATTENTION(f16, f16, 128)
