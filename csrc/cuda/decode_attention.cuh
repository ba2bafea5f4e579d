// Attention of one token of every row to all tokens up to itself.
//
// A unit is a row, a head and a span of keys; blocks share the units. Lanes side by side share a
// key, eight elements each, two keys at a time. Where there are several spans, a second exchange
// merges them, spread over all blocks again: reading all parts in every block would cost more than
// it. What is summed with what depends on the token's place alone.
#pragma once
#include "decode.cuh"

DEVICE float minus_infinity() { return as_float(0xff800000u); }

struct Heads {
    u32 D, heads, pairs, spans;  // pairs: rows times heads
    u32 packets;                 // of a head's attention
    u32 group;                   // lanes that share a key
};

DEVICE Heads heads_of(const DecodeArgs &a, u32 place) {
    u32 heads = a.heads, D = u32(a.W) / heads, group = 1;
    while (8 * group < D) group *= 2;
    return {D, heads, u32(a.R) * heads, place / u32(a.span) + 1, packets_of<float>(D), group};
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}

// 2^(x - top), where top is the largest of some x. If all are -inf, or NaN, those remain.
DEVICE float exp2_below(float x, float top) { return exp2f(top == minus_infinity() ? x : x - top); }

// Keys [first, last) of the cache that are in sight of place, on their way to the L2 cache.
template <class T>
DEVICE void prefetch_cache(const DecodeArgs &a, i64 layer, u32 place, u32 block, u32 blocks) {
    constexpr u32 LINE = 128;
    Heads h = heads_of(a, place);
    for (u32 unit = block; unit < h.pairs * h.spans; unit += blocks) {
        u32 first = unit / h.pairs * u32(a.span), last = min(first + u32(a.span), place);
        i64 start = ((layer * h.pairs + unit % h.pairs) * a.T + first) * h.D * i64(sizeof(T));
        u32 bytes = last > first ? (last - first) * h.D * u32(sizeof(T)) : 0;
        for (u32 at = threadIdx.x * LINE; at < bytes; at += WORKERS * LINE) {
            prefetch_l2(static_cast<const unsigned char *>(a.keys) + start + at);
            prefetch_l2(static_cast<const unsigned char *>(a.values) + start + at);
        }
    }
}

// Queries, keys and values of the token at one head, in shared memory: three times D elements of T.
template <class T>
DEVICE void gather_head(const DecodeArgs &a, const Heads &h, u32 pair, u32 epoch, u32 *to) {
    u32 row = pair / h.heads, head = pair % h.heads, W = a.W;
    u32 words = h.D * sizeof(T) / 4, most = words / 3 + 2;
    const Quad *from = a.qkv_out + i64(row) * packets_of<T>(3 * W);
    for (u32 i = threadIdx.x; i < 3 * most; i += WORKERS) {
        u32 kind = i / most, start = (kind * W + head * h.D) * sizeof(T) / 4;
        u32 packet = start / 3 + i % most;
        if (packet * 3 >= start + words) continue;
        Quad q = wait_for(from + packet, load_packet(from + packet), epoch);
#pragma unroll
        for (u32 j = 0; j < 3; j++) {
            u32 word = packet * 3 + j - start;  // wraps around where it is before the start
            if (word < words) to[kind * words + word] = q.word[j];
        }
    }
}

// Two keys of a lane's group, and their values.
template <class T>
struct Pair {
    Quad keys[2][QUADS<T>], values[2][QUADS<T>];
};

// Of the cache. Those at and after `end` are zeros.
template <class T>
DEVICE Pair<T> load_pair(const T *keys, const T *values, u32 D, u32 key, u32 step, u32 end,
                         u32 element) {
    Pair<T> pair;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 n = key + i * step;
        bool real = n < end && element < D;
        const Quad *k = reinterpret_cast<const Quad *>(keys + u64(n) * D + element);
        const Quad *v = reinterpret_cast<const Quad *>(values + u64(n) * D + element);
#pragma unroll
        for (int j = 0; j < QUADS<T>; j++) {
            pair.keys[i][j] = real ? load_l2(k + j) : Quad{};
            pair.values[i][j] = real ? load_l2(v + j) : Quad{};
        }
    }
    return pair;
}

// A softmax under way: the largest score (base 2), the weights' sum and the weighted values.
struct Softmax {
    float top = minus_infinity(), weight = 0, sum[8] = {};
};

DEVICE float dot8(const float (&x)[8], const float (&y)[8]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i] * y[i];
    return sum;
}

template <class T>
DEVICE void take_in(Softmax &s, const Pair<T> &pair, const float (&query)[8], u32 key, u32 step,
                    u32 end, u32 group) {
    float score[2], top = s.top;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float values[8];
        widen8(pair.keys[i], values);
        score[i] = dot8(query, values);
        for (u32 lanes = group / 2; lanes > 0; lanes /= 2)
            score[i] += __shfl_xor_sync(0xffffffffu, score[i], lanes);
        if (key + i * step >= end) score[i] = minus_infinity();
        top = fmaxf(top, score[i]);
    }
    float before = exp2_below(s.top, top);
    s.weight *= before;
#pragma unroll
    for (int j = 0; j < 8; j++) s.sum[j] *= before;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float values[8], weight = exp2_below(score[i], top);
        widen8(pair.values[i], values);
        s.weight += weight;
#pragma unroll
        for (int j = 0; j < 8; j++) s.sum[j] += weight * values[j];
    }
    s.top = top;
}

// Of all groups of a warp, at every lane.
DEVICE void merge_groups(Softmax &s, u32 group) {
    float top = s.top;
    for (u32 lanes = group; lanes < 32; lanes *= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, lanes));
    float share = exp2_below(s.top, top);
    s.weight *= share;
#pragma unroll
    for (int j = 0; j < 8; j++) s.sum[j] *= share;
    for (u32 lanes = group; lanes < 32; lanes *= 2) {
        s.weight += __shfl_xor_sync(0xffffffffu, s.weight, lanes);
#pragma unroll
        for (int j = 0; j < 8; j++) s.sum[j] += __shfl_xor_sync(0xffffffffu, s.sum[j], lanes);
    }
    s.top = top;
}

// Merges what the warps have left in shared memory, [WARPS, 2 + D], and sends it: the attention, or
// if there are more spans its largest score, weight and weighted values.
DEVICE void send_unit(const DecodeArgs &a, const Heads &h, u32 unit, const float *warps,
                      u32 epoch) {
    u32 lane = threadIdx.x % 32, item = threadIdx.x / 32 * LANES + lane, width = h.D + 2;
    u32 ahead = h.spans > 1 ? 3 : 0;  // a packet of its own for score and weight
    if (threadIdx.x / 32 * LANES >= h.D + ahead) return;
    float mine = lane < WARPS ? warps[lane * width] : minus_infinity(), top = warp_max(mine);
    float share = exp2_below(mine, top), weight = 0, sum = 0;
    bool inside = lane < LANES && item < h.D + ahead, value = inside && item >= ahead;
    for (u32 i = 0; i < WARPS; i++) {
        float by = __shfl_sync(0xffffffffu, share, i);
        weight += by * warps[i * width + 1];
        if (value) sum += by * warps[i * width + 2 + item - ahead];
    }
    Quad *to =
        h.spans > 1 ? a.parts + i64(unit) * (h.packets + 1) : a.attended + i64(unit) * h.packets;
    if (h.spans == 1) sum /= weight;
    if (!value) sum = item == 0 ? top : item == 1 ? weight : 0.0f;
    publish<float>(to, item, sum, inside, epoch);
}

template <class T>
DEVICE void attend(const DecodeArgs &a, i64 layer, u32 place, u32 epoch, u32 block, u32 blocks) {
    Heads h = heads_of(a, place);
    T *token = reinterpret_cast<T *>(shared_memory() + a.at_attention);  // query, key, value
    float *warps = reinterpret_cast<float *>(token + 3 * h.D);
    u32 lane = threadIdx.x % 32, element = lane % h.group * 8, step = WORKERS / h.group;
    for (u32 unit = block; unit < h.pairs * h.spans; unit += blocks) {
        u32 pair = unit % h.pairs, first = unit / h.pairs * u32(a.span);
        u32 end = min(first + u32(a.span), place + 1), key = first + threadIdx.x / h.group;
        i64 start = (layer * h.pairs + pair) * a.T * h.D;
        const T *keys = static_cast<const T *>(a.keys) + start;
        const T *values = static_cast<const T *>(a.values) + start;
        // Asked for before the query is there.
        Pair<T> now = load_pair(keys, values, h.D, key, step, min(end, place), element);
        gather_head<T>(a, h, pair, epoch, reinterpret_cast<u32 *>(token));
        meet<WORKERS>();
        float query[8];
        float scale = pair / h.heads < a.B ? a.scale : a.free_scale;
#pragma unroll
        for (int i = 0; i < 8; i++)
            query[i] = element < h.D ? widen(token[element + i]) * scale : 0.0f;
        Softmax s;
        for (u32 at = first; at < end; at += 2 * step) {
            u32 own = at + threadIdx.x / h.group;
            if (at > first) now = load_pair(keys, values, h.D, own, step, min(end, place), element);
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (own + i * step == place && element < h.D)
#pragma unroll
                    for (int j = 0; j < QUADS<T>; j++) {
                        const Quad *from = reinterpret_cast<const Quad *>(token + element) + j;
                        now.keys[i][j] = from[h.D * sizeof(T) / sizeof(Quad)];
                        now.values[i][j] = from[2 * h.D * sizeof(T) / sizeof(Quad)];
                    }
            take_in(s, now, query, own, step, end, h.group);
        }
        merge_groups(s, h.group);
        float *to = warps + threadIdx.x / 32 * (h.D + 2);
        if (lane < h.group && element < h.D)
#pragma unroll
            for (int i = 0; i < 8; i++) to[2 + element + i] = s.sum[i];
        if (lane == 0) to[0] = s.top, to[1] = s.weight;
        meet<WORKERS>();
        send_unit(a, h, unit, warps, epoch);
    }
}

// Merges the spans: a warp makes one packet, a lane has every 32nd span.
DEVICE void merge_spans(const DecodeArgs &a, u32 place, u32 epoch, u32 block, u32 blocks) {
    Heads h = heads_of(a, place);
    if (h.spans == 1) return;
    u32 lane = threadIdx.x % 32, count = h.pairs * h.packets;
    for (u32 i = block + threadIdx.x / 32 * blocks; i < count; i += WARPS * blocks) {
        u32 pair = i / h.packets, packet = i % h.packets;
        float top = minus_infinity(), weight = 0, sum[3] = {};
        for (u32 span = lane; span < h.spans; span += 32) {
            const Quad *part = a.parts + i64(span * h.pairs + pair) * (h.packets + 1);
            Quad q = load_packet(part), v = load_packet(part + 1 + packet);
            q = wait_for(part, q, epoch);
            v = wait_for(part + 1 + packet, v, epoch);
            float score = as_float(q.word[0]), higher = fmaxf(top, score);
            float before = exp2_below(top, higher), share = exp2_below(score, higher);
            weight = weight * before + as_float(q.word[1]) * share;
#pragma unroll
            for (int j = 0; j < 3; j++) sum[j] = sum[j] * before + as_float(v.word[j]) * share;
            top = higher;
        }
        __syncwarp();
        float share = exp2_below(top, warp_max(top));
        weight = warp_sum(weight * share);
        Quad out{{0, 0, 0, epoch}};
#pragma unroll
        for (int j = 0; j < 3; j++) out.word[j] = as_bits(warp_sum(sum[j] * share) / weight);
        if (lane == 0) store_packet(a.attended + i64(i), out);
    }
}
