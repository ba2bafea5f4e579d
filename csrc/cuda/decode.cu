#include "decode_attention.cuh"
#include "decode_stream.cuh"

template <class T>
struct Decoder {
    const DecodeArgs &a;
    u32 block, blocks;
    Ring ring;
    u32 turn = 0;  // which half of the partial sums is next
    u32 R, W, E, L;
    Share own;  // outputs in h
    float *residual, *token;

    DEVICE Decoder(const DecodeArgs &a, u32 block, u32 blocks)
        : a(a),
          block(block),
          blocks(blocks),
          ring(ring_of<T>(a)),
          R(a.R),
          W(a.W),
          E(a.E),
          L(a.L),
          own(share_of<float>(a.W, block, blocks)),
          residual(reinterpret_cast<float *>(shared_memory() + a.at_own)),
          token(reinterpret_cast<float *>(shared_memory() + a.at_token)) {}

    DEVICE void run() {
        u32 C = a.C;
        for (u32 i = threadIdx.x; i < u32(a.B) * C; i += WORKERS) {
            token[i] = a.z[at_token(i / C, 0) + i % C];
            if (block == 0) a.x[at_token(i / C, 0) + i % C] = token[i];
        }
        meet<WORKERS>();
        for (u32 place = 0; place + 1 < a.T; place++) {
            embed(place);
            for (u32 layer = 0; layer < L; layer++) {
                u32 epoch = place * L + layer + 1;
                queries_keys_values(place, layer, epoch);
                attend<T>(a, layer, place, epoch, block, blocks);
                merge_spans(a, place, epoch, block, blocks);
                project(layer, epoch);
                up(layer, epoch);
                down(place, layer, epoch);
            }
            parameters(place);
            update(place);
        }
    }

    // Where a token begins in x and z.
    DEVICE i64 at_token(u32 image, u32 place) const {
        return (i64(image) * a.T + (a.reverse ? a.T - 1 - i64(place) : i64(place))) * a.C;
    }
    // Of h after the token (layer 0) and after every layer.
    DEVICE u32 stream_epoch(u32 place, u32 layer) const { return place * (L + 1) + layer + 1; }

    // h = W_in x + position + embed, this block's outputs, a warp each.
    DEVICE void embed(u32 place) {
        u32 lane = threadIdx.x % 32, count = own.last - own.first, C = a.C;
        for (u32 i = threadIdx.x / 32; i < count * u32(a.B); i += WARPS) {
            u32 n = own.first + i % count, image = i / count;
            float sum = 0;
            for (u32 c = lane; c < C; c += 32)
                sum += __ldg(a.w_in + i64(n) * C + c) * token[image * C + c];
            sum = warp_sum(sum);
            if (u32 r = image + lane * u32(a.B); lane < 2 && r < R)
                residual[(n - own.first) * R + r] = sum + (__ldg(a.position + i64(place) * W + n) +
                                                           __ldg(a.embed + i64(r) * W + n));
        }
        meet<WORKERS>();
        u32 packets = packets_of<float>(count);
        // What the last step left in the cache is to be seen by all that see this.
        if (threadIdx.x < packets * R) fence_grid();
        for (u32 i = threadIdx.x; i < packets * R; i += WORKERS) {
            u32 r = i / packets, n = i % packets * 3;
            Quad q{{0, 0, 0, stream_epoch(place, 0)}};
#pragma unroll
            for (u32 j = 0; j < 3; j++)
                if (n + j < count) q.word[j] = as_bits(residual[(n + j) * R + r]);
            store_packet(a.stream + r * pitch_of(W) + own.first / 3 + i % packets, q);
        }
    }

    DEVICE void queries_keys_values(u32 place, u32 layer, u32 epoch) {
        Share share = share_of<T>(3 * W, block, blocks);
        Output output(tile_rows<T>(a, row_slots<T>(W)));
        const float *bias = a.qkv_bias + i64(layer) * 3 * W;
        float early = early_bias(bias, share, output, R);
        prefetch_cache<T>(a, layer, place, block, blocks);
        gather_normed(a.stream, stream_epoch(place, layer), a.norm1 + i64(layer) * 2 * W,
                      layer == 0);
        u32 D = W / u32(a.heads);
        product<T>(a, ring, turn, W, share, output, bias, early,
                   [&](u32 n, u32 r, float sum, bool inside) {
                       if (inside && n >= W) {
                           void *cache = n < 2 * W ? a.keys : a.values;
                           u32 m = n < 2 * W ? n - W : n - 2 * W;
                           i64 line = ((i64(layer) * R + r) * a.heads + m / D) * a.T + place;
                           static_cast<T *>(cache)[line * D + m % D] = narrow<T>(sum);
                       }
                       publish<T>(a.qkv_out + i64(r) * packets_of<T>(3 * W), n, sum, inside, epoch);
                   });
    }

    DEVICE void project(u32 layer, u32 epoch) {
        Output output(tile_rows<float>(a, row_slots<T>(W)));
        const float *bias = a.proj_bias + i64(layer) * W;
        float early = early_bias(bias, own, output, R);
        u32 D = W / u32(a.heads), packets = packets_of<float>(D), line = u32(a.heads) * packets;
        Rows<T> rows = rows_of<T>(a, W);
        gather(a.attended, R * line, line, line, epoch, [&](u32 i, const u32(&words)[4], bool) {
            u32 r = i / line, head = i % line / packets, d = i % packets * 3;
#pragma unroll
            for (u32 j = 0; j < 3; j++)
                if (d + j < D)
                    rows.at[r * rows.pitch + head * D + d + j] = narrow<T>(as_float(words[j]));
        });
        meet<WORKERS>();
        add_product(W, output, bias, early, a.middle, epoch);
    }

    DEVICE void up(u32 layer, u32 epoch) {
        Share share = share_of<T>(E, block, blocks);
        Output output(tile_rows<T>(a, row_slots<T>(W)));
        const float *bias = a.up_bias + i64(layer) * E;
        float early = early_bias(bias, share, output, R);
        gather_normed(a.middle, epoch, a.norm2 + i64(layer) * 2 * W, false);
        product<T>(a, ring, turn, W, share, output, bias, early,
                   [&](u32 n, u32 r, float sum, bool inside) {
                       publish<T>(a.hidden + i64(r) * packets_of<T>(E), n, gelu(sum), inside,
                                  epoch);
                   });
    }

    DEVICE void down(u32 place, u32 layer, u32 epoch) {
        Output output(tile_rows<float>(a, row_slots<T>(E)));
        const float *bias = a.down_bias + i64(layer) * W;
        float early = early_bias(bias, own, output, R);
        u32 packets = packets_of<T>(E), words = E * sizeof(T) / 4;
        Rows<T> rows = rows_of<T>(a, E);
        gather(a.hidden, R * packets, packets, packets, epoch,
               [&](u32 i, const u32(&from)[4], bool) {
                   u32 r = i / packets, word = i % packets * 3;
                   u32 *to = reinterpret_cast<u32 *>(rows.at + r * rows.pitch);
#pragma unroll
                   for (u32 j = 0; j < 3; j++)
                       if (word + j < words) to[word + j] = from[j];
               });
        meet<WORKERS>();
        add_product(E, output, bias, early, a.stream, stream_epoch(place, layer + 1));
    }

    // h += a product, and sends h.
    DEVICE void add_product(u32 K, const Output &output, const float *bias, float early, Quad *to,
                            u32 epoch) {
        product<T>(a, ring, turn, K, own, output, bias, early,
                   [&](u32 n, u32 r, float sum, bool inside) {
                       if (inside) sum = residual[(n - own.first) * R + r] += sum;
                       publish<float>(to + r * pitch_of(W), n, sum, inside, epoch);
                   });
    }

    // Waits for h, and leaves its LayerNorm in shared memory. Statistics are those of runs of 96
    // elements, a warp's packets, merged in their order: the same for any number of rows.
    DEVICE void gather_normed(const Quad *from, u32 epoch, const float *norm, bool acquire) {
        constexpr u32 RUN = 96;
        u32 pitch = pitch_of(W), lane = threadIdx.x % 32, runs = pitch / 32;
        Rows<T> rows = rows_of<T>(a, W);
        float *raw = reinterpret_cast<float *>(rows.at + R * rows.pitch);
        float *stats = reinterpret_cast<float *>(shared_memory() + a.at_stats);
        u32 early = threadIdx.x % pitch * 3;  // the element that comes first
        float weight[3], shift[3];
#pragma unroll
        for (u32 j = 0; j < 3; j++) {
            weight[j] = early + j < W ? __ldg(norm + early + j) : 0.0f;
            shift[j] = early + j < W ? __ldg(norm + W + early + j) : 0.0f;
        }
        gather(from, R * pitch, pitch, packets_of<float>(W), epoch,
               [&](u32 i, const u32(&words)[4], bool) {
                   u32 r = i / pitch, n = i % pitch * 3, start = n / RUN * RUN;
                   float sum = 0, square = 0;  // elements after the last are zeros
#pragma unroll
                   for (u32 j = 0; j < 3; j++) sum += as_float(words[j]);
                   sum = warp_sum(sum);
                   float mean = sum / min(RUN, W - start);
#pragma unroll
                   for (u32 j = 0; j < 3; j++)
                       if (n + j < W) {
                           float x = as_float(words[j]);
                           raw[r * W + n + j] = x;
                           square += (x - mean) * (x - mean);
                       }
                   square = warp_sum(square);
                   if (lane == 0) stats[i / 32 * 2] = sum, stats[i / 32 * 2 + 1] = square;
               });
        if (acquire) fence_grid();
        meet<WORKERS>();
        for (u32 i = threadIdx.x; i < R * pitch; i += WORKERS) {
            u32 r = i / pitch, n = i % pitch * 3;
            float sum = 0, square = 0;
            for (u32 run = 0; run < runs; run++) sum += stats[(r * runs + run) * 2];
            float mean = sum / W;
            for (u32 run = 0; run < runs; run++) {
                const float *s = stats + (r * runs + run) * 2;
                float count = min(RUN, W - run * RUN), off = s[0] / count - mean;
                square += s[1] + count * off * off;
            }
            float scale = 1.0f / __fsqrt_rn(square / W + float(a.eps));
#pragma unroll
            for (u32 j = 0; j < 3; j++) {
                if (n + j >= W) break;
                if (i >= WORKERS) weight[j] = __ldg(norm + n + j);
                if (i >= WORKERS) shift[j] = __ldg(norm + W + n + j);
                float x = (raw[r * W + n + j] - mean) * scale * weight[j] + shift[j];
                rows.at[r * rows.pitch + n + j] = narrow<T>(x);
            }
        }
        meet<WORKERS>();
    }

    DEVICE static float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

    // W_out h, if any of its outputs are this block's.
    DEVICE void parameters(u32 place) {
        u32 P = a.P, pitch = pitch_of(W), epoch = place + 1;
        Share share = share_of<float>(P, block, blocks);
        if (share.first == share.last) return;
        Output output(tile_rows<float>(a, row_slots<T>(W)));
        float early = early_bias(a.b_out, share, output, R);
        Rows<T> rows = rows_of<T>(a, W);
        gather(a.stream, R * pitch, pitch, packets_of<float>(W), stream_epoch(place, L),
               [&](u32 i, const u32(&words)[4], bool sent) {
                   u32 r = i / pitch, n = i % pitch * 3;
#pragma unroll
                   for (u32 j = 0; j < 3; j++)
                       if (n + j < W)
                           rows.at[r * rows.pitch + n + j] = narrow<T>(as_float(words[j]));
               });
        meet<WORKERS>();
        product<T>(a, ring, turn, W, share, output, a.b_out, early,
                   [&](u32 n, u32 r, float sum, bool inside) {
                       publish<float>(a.params + i64(r) * packets_of<float>(P), n, sum, inside,
                                      epoch);
                   });
    }

    // The next token, in every block for itself.
    DEVICE void update(u32 place) {
        u32 P = a.P, C = a.C, B = a.B, packets = packets_of<float>(P);
        float *params = reinterpret_cast<float *>(shared_memory() + a.at_rows);
        i64 first = at_token(threadIdx.x / C, place + 1) + threadIdx.x % C;
        float early = threadIdx.x < B * C ? a.z[first] : 0.0f;
        gather(a.params, R * packets, packets, packets, place + 1,
               [&](u32 i, const u32(&words)[4], bool) {
                   u32 r = i / packets, n = i % packets * 3;
#pragma unroll
                   for (u32 j = 0; j < 3; j++)
                       if (n + j < P) params[r * P + n + j] = as_float(words[j]);
               });
        meet<WORKERS>();
        for (u32 i = threadIdx.x; i < B * C; i += WORKERS) {
            u32 image = i / C, c = i % C;
            i64 at = at_token(image, place + 1) + c;
            const float *p = params + image * P + c, *free = R > B ? p + B * P : nullptr;
            const float *guide = a.guide + 2 * place;
            float x = i < WORKERS ? early : a.z[at];
            if (P == 2 * C) {
                x *= expf(guided(p[0], free, guide));
                p += C;
                free = free ? free + C : free;
            }
            x += guided(p[0], free, guide + 1);
            token[i] = x;
            if (block == 0) a.x[at] = x;
        }
        meet<WORKERS>();
    }

    DEVICE static float guided(float p, const float *free, const float *weight) {
        return free ? p + __ldg(weight) * (p - *free) : p;
    }
};

template <class T>
DEVICE void decode_block(const DecodeArgs &a) {
    u32 block = blockIdx.x, blocks = blocks_of<T>(a);
    if (block >= blocks) return;
    u32 *counters = reinterpret_cast<u32 *>(shared_memory() + a.at_counters);
    if (threadIdx.x == 0) counters[0] = counters[1] = 0;
    __syncthreads();
    if (threadIdx.x < WORKERS)
        Decoder<T>(a, block, blocks).run();
    else
        stream_weights<T>(a, block, blocks);
}

FLOWOPS_KERNEL(decode_block_bf16, DecodeArgs, THREADS, 1) { decode_block<bf16>(args); }
FLOWOPS_KERNEL(decode_block_f32, DecodeArgs, THREADS, 1) { decode_block<float>(args); }
