// What the parts of decode.cu share: its arguments, who owns which outputs, and packets of them.
#pragma once
#include "grid.cuh"

// Pointers as in flowops/decode_weights.py. `at_...`: offsets into the shared memory, in bytes.
struct DecodeArgs {
    const float *z;
    float *x;
    const float *w_in, *position, *norm1;
    const void *qkv;
    const float *qkv_bias;
    const void *proj;
    const float *proj_bias, *norm2;
    const void *up;
    const float *up_bias;
    const void *down;
    const float *down_bias;
    const void *w_out;
    const float *b_out, *embed, *guide;
    void *keys, *values;  // [L, R, heads, T, D]
    // What blocks send each other: h after the token and after each perceptron, and after each
    // attention; queries, keys and values; attention over a span of keys; attention; the
    // perceptron's inside; the parameters.
    Quad *stream, *middle, *qkv_out, *parts, *attended, *hidden, *params;
    i64 B, T, C, R, W, E, L, heads, P, reverse, span, ring, swizzle;
    i64 at_counters, at_rows, at_partial, at_stats, at_own, at_token, at_attention;
    double eps, scale, free_scale;
};

constexpr int WARPS = 15, WORKERS = 32 * WARPS;  // and one warp that fetches weights
constexpr int THREADS = WORKERS + 32;
constexpr int LANES = 30;    // of a warp that have an output: whole packets of any type
constexpr int BATCH = 4;     // packets that a thread waits for at once
constexpr int PAYLOAD = 12;  // bytes of a packet

template <class Out>
constexpr u32 PER_PACKET = PAYLOAD / sizeof(Out);

template <class Out>
DEVICE u32 packets_of(u32 elements) {
    return (elements + PER_PACKET<Out> - 1) / PER_PACKET<Out>;
}

// Packets that a row of h takes in memory: whole warps read it.
DEVICE u32 pitch_of(u32 W) { return (packets_of<float>(W) + 31) / 32 * 32; }

// Blocks that take part: those that own something of every product in a layer. Each of them waits
// for all others several times a layer, so that none overwrites what another one still reads.
template <class T>
DEVICE u32 blocks_of(const DecodeArgs &a) {
    return min(min(u32(gridDim.x), packets_of<float>(a.W)), packets_of<T>(a.E));
}

// --- products -----------------------------------------------------------------------------------

// Those of a layer, in their order, and the one after the last layer.
enum Product : u32 { QKV, PROJ, UP, DOWN, OUT };

// Of products in all: four a layer and OUT.
DEVICE Product product_of(u32 i, u32 L) { return i == 4 * L ? OUT : static_cast<Product>(i % 4); }

// A weight matrix [N, K], and this block's outputs of it, [first, last): whole packets.
template <class T>
struct Matrix {
    const T *weights;
    const float *bias;
    u32 K, per_packet, first, last;

    // A row in 16-byte slots.
    DEVICE u32 slots() const { return K * sizeof(T) / sizeof(Quad); }
};

template <class T>
DEVICE Matrix<T> matrix_of(const DecodeArgs &a, Product which, u32 layer, u32 block, u32 blocks) {
    u32 W = a.W, E = a.E, N = W, K = W, per = PER_PACKET<float>;
    const void *weights = a.proj;
    const float *bias = a.proj_bias;
    if (which == QKV) N = 3 * W, per = PER_PACKET<T>, weights = a.qkv, bias = a.qkv_bias;
    if (which == UP) N = E, per = PER_PACKET<T>, weights = a.up, bias = a.up_bias;
    if (which == DOWN) K = E, weights = a.down, bias = a.down_bias;
    if (which == OUT) N = a.P, layer = 0, weights = a.w_out, bias = a.b_out;
    u32 packets = (N + per - 1) / per;
    u32 first = packets * block / blocks * per, last = packets * (block + 1) / blocks * per;
    return {static_cast<const T *>(weights) + u64(layer) * N * K,
            bias + layer * N,
            K,
            per,
            first,
            min(last, N)};
}

// --- packets ------------------------------------------------------------------------------------

// Sends outputs n of a row, one a lane: PER_PACKET lanes side by side have those of a packet. All
// lanes of the warp call it.
template <class Out>
DEVICE void publish(Quad *row, u32 n, float value, bool inside, u32 epoch) {
    constexpr int STEP = sizeof(u32) / sizeof(Out);
    value = inside ? value : 0.0f;
    u32 word = as_bits(value);
    if constexpr (STEP == 2) word = pack<bf16>(value, __shfl_down_sync(0xffffffffu, value, 1));
    u32 second = __shfl_down_sync(0xffffffffu, word, STEP);
    u32 third = __shfl_down_sync(0xffffffffu, word, 2 * STEP);
    if (inside && n % PER_PACKET<Out> == 0)
        store_packet(row + n / PER_PACKET<Out>, Quad{{word, second, third, epoch}});
}

DEVICE Quad wait_for(const Quad *at, Quad q, u32 epoch) {
    while (q.word[3] != epoch) {
        rest();
        q = load_packet(at);
    }
    return q;
}

// Waits for `count` packets (i % pitch < real of them are sent) and shows each to one thread:
// use(i, words, whether it was sent). With a pitch of whole warps, all lanes come to `use`.
template <class Use>
DEVICE void gather(const Quad *from, u32 count, u32 pitch, u32 real, u32 epoch, Use use) {
#pragma unroll 1
    for (u32 first = threadIdx.x; first < count; first += BATCH * WORKERS) {
        Quad q[BATCH];
        bool sent[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            u32 i = first + j * WORKERS;
            sent[j] = i < count && i % pitch < real;
            q[j] = sent[j] ? load_packet(from + i) : Quad{};
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            u32 i = first + j * WORKERS;
            if (sent[j]) q[j] = wait_for(from + i, q[j], epoch);
            if (i < count) use(i, q[j].word, sent[j]);
        }
    }
}

// --- elements -----------------------------------------------------------------------------------

// Eight elements that lie side by side.
DEVICE void widen8(const Quad (&q)[1], float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = as_float(q[0].word[i] << 16);
        x[2 * i + 1] = as_float(q[0].word[i] & 0xffff0000u);
    }
}
DEVICE void widen8(const Quad (&q)[2], float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = as_float(q[i / 4].word[i % 4]);
}

template <class T>
constexpr int QUADS = sizeof(T) / 2;  // that eight elements take
