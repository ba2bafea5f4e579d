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

// Outputs [first, last) of a product: those of one block, in whole packets.
struct Share {
    u32 first, last;
};

template <class Out>
DEVICE Share share_of(u32 outputs, u32 block, u32 blocks) {
    u64 packets = packets_of<Out>(outputs);
    u32 first = packets * block / blocks, last = packets * (block + 1) / blocks;
    return {first * PER_PACKET<Out>, min(last * PER_PACKET<Out>, outputs)};
}

// Blocks that take part: those that own something of every product in a layer. Each of them waits
// for all others several times a layer, so that none overwrites what another one still reads.
template <class T>
DEVICE u32 blocks_of(const DecodeArgs &a) {
    return min(min(u32(gridDim.x), packets_of<float>(a.W)), packets_of<T>(a.E));
}

// Rows of a matrix [N, K] in 16-byte slots.
template <class T>
DEVICE u32 row_slots(u32 K) {
    return K * sizeof(T) / sizeof(Quad);
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
