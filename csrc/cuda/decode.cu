// The exact sampler of flowops/decode.py for few images: all T - 1 steps of a block in one launch.
//
// A block of threads on every multiprocessor owns some outputs of every product, the same in every
// step, and sends them to all others as packets (grid.cuh); whoever needs them polls the packets
// themselves, so that there is no barrier over the grid. A layer is six such exchanges:
//
//     1  LayerNorm, queries, keys and values; keys and values go into the cache as well
//     2  attention, a row, a head and a span of keys at a time
//     3  the spans merged (none while there is one span)
//     4  the projection, added to h
//     5  LayerNorm, up, GELU
//     6  down, added to h
//
// and a step two more: the parameters, and h of the next token, which every block finds for itself.
// Weights come through a ring in shared memory, as far ahead as it holds (decode_stream.cuh), and
// never wait for an exchange.
//
// What bounds it, for 2-768-8-8 in bf16, one image, on an H100: a step reads 113 MB of weights, 34
// us at 3.35 TB/s, which do not stay in the L2 cache; the keys and values do, 25 MB at the end.
// Beside that, in parallel, run 50 dependent exchanges, 0.5 us each on their way and 0.4 us of
// work: 45 us. So 45 to 50 us a step are to be expected, 0.37 to 0.41 s an image (floor by bytes:
// 0.28 s). With more rows it is bound by what every block reads of all others, 21 KB a row and
// layer: 16 rows take some 60 us more a step, and the cache 200 MB, as many as 60 us. These are
// estimates.
//
// The order of all sums is that of one output of one row: the same bits for any grid and batch.
#include "decode_attention.cuh"
#include "decode_stream.cuh"

template <class T>
struct Decoder {
    const DecodeArgs &a;
    u32 block, blocks;
    Ring ring;
    u32 turn = 0;        // which half of the partial sums is next
    u32 own, own_count;  // outputs in h: the first, how many

    DEVICE Decoder(const DecodeArgs &a, u32 block, u32 blocks)
        : a(a), block(block), blocks(blocks), ring(ring_of<T>(a)) {
        Matrix<T> m = matrix_of<T>(a, PROJ, 0, block, blocks);
        own = m.first, own_count = m.last - m.first;
    }

    DEVICE float *residual() const { return reinterpret_cast<float *>(shared_memory() + a.at_own); }
    DEVICE float *token() const { return reinterpret_cast<float *>(shared_memory() + a.at_token); }

    DEVICE void run() {
        u32 C = a.C, L = a.L;
        for (u32 i = threadIdx.x; i < u32(a.B) * C; i += WORKERS) {
            i64 at = at_token(i / C, 0) + i % C;
            token()[i] = a.z[at];
            if (block == 0) a.x[at] = a.z[at];
        }
        meet<WORKERS>();
        for (u32 place = 0; place + 1 < a.T; place++) {
            embed(place);
#pragma unroll 1
            for (u32 i = 0; i <= 4 * L; i++) {
                Product which = product_of(i, L);
                if (which == PROJ) {
                    attend<T>(a, i / 4, place, epoch(place, i / 4), block, blocks);
                    merge_spans(a, place, epoch(place, i / 4), block, blocks);
                }
                product(which, i / 4, place);
            }
            update(place);
        }
    }

    // Of what a layer sends; and of h after the token (layer 0) and after every layer.
    DEVICE u32 epoch(u32 place, u32 layer) const { return place * u32(a.L) + layer + 1; }
    DEVICE u32 stream_epoch(u32 place, u32 layer) const {
        return place * (u32(a.L) + 1) + layer + 1;
    }

    // Where a token begins in x and z.
    DEVICE i64 at_token(u32 image, u32 place) const {
        return (i64(image) * a.T + (a.reverse ? a.T - 1 - i64(place) : i64(place))) * a.C;
    }

    // h = W_in x + position + embed, this block's outputs, a warp each.
    DEVICE void embed(u32 place) {
        u32 lane = threadIdx.x % 32, count = own_count, C = a.C, R = a.R, W = a.W;
        for (u32 i = threadIdx.x / 32; i < count * u32(a.B); i += WARPS) {
            u32 n = own + i % count, image = i / count;
            float sum = 0;
            for (u32 c = lane; c < C; c += 32)
                sum += __ldg(a.w_in + i64(n) * C + c) * token()[image * C + c];
            sum = warp_sum(sum);
            if (u32 r = image + lane * u32(a.B); lane < 2 && r < R)
                residual()[(n - own) * R + r] = sum + (__ldg(a.position + i64(place) * W + n) +
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
                if (n + j < count) q.word[j] = as_bits(residual()[(n + j) * R + r]);
            store_packet(a.stream + r * pitch_of(W) + own / 3 + i % packets, q);
        }
    }

    DEVICE void product(Product which, u32 layer, u32 place) {
        u32 W = a.W, R = a.R, now = epoch(place, layer);
        Matrix<T> m = matrix_of<T>(a, which, layer, block, blocks);
        if (m.first == m.last) return;  // there may be more blocks than parameters
        Output output(tile_rows(a, m));
        float bias = bias_of(m, m.first, output, R);
        if (which == QKV) prefetch_cache<T>(a, layer, place, block, blocks);
        if (which == PROJ)
            gather_attended(now);
        else if (which == DOWN)
            gather_hidden(now);
        else
            gather_stream(which, layer, place);
        // The cache of earlier steps is in sight from here on.
        if (which == QKV && layer == 0) fence_grid();
        meet<WORKERS>();
        if (which == DOWN) now = stream_epoch(place, layer + 1);
        if (which == OUT) now = place + 1;
        multiply_all(a, ring, turn, m, output, bias, [&](u32 n, u32 r, float sum, bool inside) {
            if (which == QKV || which == UP) {
                if (which == UP) sum = gelu(sum);
                if (which == QKV && inside && n >= W) store_cache(n, r, sum, layer, place);
                u32 pitch = packets_of<T>(which == UP ? a.E : 3 * a.W);
                publish<T>((which == UP ? a.hidden : a.qkv_out) + r * pitch, n, sum, inside, now);
            } else {
                if (which != OUT && inside) sum = residual()[(n - own) * R + r] += sum;
                Quad *to = which == PROJ ? a.middle : which == DOWN ? a.stream : a.params;
                u32 pitch = which == OUT ? packets_of<float>(a.P) : pitch_of(W);
                publish<float>(to + r * pitch, n, sum, inside, now);
            }
        });
    }

    DEVICE static float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

    // Output n >= W of QKV: a key or a value.
    DEVICE void store_cache(u32 n, u32 r, float x, u32 layer, u32 place) const {
        u32 W = a.W, D = W / u32(a.heads);
        void *cache = n < 2 * W ? a.keys : a.values;
        u32 m = n < 2 * W ? n - W : n - 2 * W;
        i64 line = ((i64(layer) * a.R + r) * a.heads + m / D) * a.T + place;
        static_cast<T *>(cache)[line * D + m % D] = narrow<T>(x);
    }

    DEVICE void gather_attended(u32 epoch) {
        u32 heads = a.heads, D = u32(a.W) / heads, packets = packets_of<float>(D);
        u32 line = heads * packets;
        Rows<T> rows = rows_of<T>(a, a.W);
        gather(a.attended, u32(a.R) * line, line, line, epoch,
               [&](u32 i, const u32(&words)[4], bool) {
                   u32 r = i / line, head = i % line / packets, d = i % packets * 3;
                   T *to = rows.at + r * rows.pitch + head * D + d;
#pragma unroll
                   for (u32 j = 0; j < 3; j++)
                       if (d + j < D) to[j] = narrow<T>(as_float(words[j]));
               });
    }

    DEVICE void gather_hidden(u32 epoch) {
        u32 packets = packets_of<T>(a.E), count = u32(a.E) * sizeof(T) / 4;
        Rows<T> rows = rows_of<T>(a, a.E);
        gather(a.hidden, u32(a.R) * packets, packets, packets, epoch,
               [&](u32 i, const u32(&words)[4], bool) {
                   u32 r = i / packets, word = i % packets * 3;
                   u32 *to = reinterpret_cast<u32 *>(rows.at + r * rows.pitch) + word;
#pragma unroll
                   for (u32 j = 0; j < 3; j++)
                       if (word + j < count) to[j] = words[j];
               });
    }

    // Waits for h and leaves it in shared memory, normalised but for OUT. Statistics are those of
    // runs of 96 elements, a warp's packets, merged in their order: the same for any number of
    // rows.
    DEVICE void gather_stream(Product which, u32 layer, u32 place) {
        constexpr u32 RUN = 96;
        const Quad *from = which == UP ? a.middle : a.stream;
        const float *norm = which == OUT ? nullptr : which == UP ? a.norm2 : a.norm1;
        u32 now = which == UP ? epoch(place, layer) : stream_epoch(place, layer);
        u32 W = a.W, pitch = pitch_of(W), count = u32(a.R) * pitch, runs = pitch / 32;
        Rows<T> rows = rows_of<T>(a, W);
        float *raw = reinterpret_cast<float *>(rows.at + u32(a.R) * rows.pitch);
        float *stats = reinterpret_cast<float *>(shared_memory() + a.at_stats);
        float last = 1.0f / (W - (runs - 1) * RUN);
        if (norm) norm += u64(layer) * 2 * W;
        float weight[3], shift[3];  // of the first packet, asked for before it is waited for
        load_norm(norm, threadIdx.x % pitch * 3, weight, shift);
        gather(from, count, pitch, packets_of<float>(W), now,
               [&](u32 i, const u32(&words)[4], bool) {
                   u32 r = i / pitch, n = i % pitch * 3;
                   float sum = 0, square = 0;  // elements after the last are zeros
#pragma unroll
                   for (u32 j = 0; j < 3; j++) sum += as_float(words[j]);
                   float mean = warp_sum(sum) * (n / RUN + 1 < runs ? 1.0f / RUN : last);
#pragma unroll
                   for (u32 j = 0; j < 3; j++)
                       if (n + j < W) {
                           float x = as_float(words[j]);
                           raw[r * W + n + j] = x;
                           square += (x - mean) * (x - mean);
                       }
                   square = warp_sum(square);
                   if (threadIdx.x % 32 == 0) stats[i / 16] = mean, stats[i / 16 + 1] = square;
               });
        meet<WORKERS>();
        float by = 1.0f / W;
#pragma unroll 1
        for (u32 i = threadIdx.x; i < count; i += WORKERS) {
            u32 r = i / pitch, n = i % pitch * 3;
            const float *s = stats + r * runs * 2;
            float mean = 0, square = 0, scale = 1;
            if (norm) {
                for (u32 run = 0; run < runs; run++) mean += s[2 * run] * min(RUN, W - run * RUN);
                mean *= by;
                for (u32 run = 0; run < runs; run++) {
                    float off = s[2 * run] - mean;
                    square += s[2 * run + 1] + min(RUN, W - run * RUN) * off * off;
                }
                scale = 1.0f / __fsqrt_rn(square * by + float(a.eps));
            }
            if (i >= WORKERS) load_norm(norm, n, weight, shift);
#pragma unroll
            for (u32 j = 0; j < 3; j++)
                if (n + j < W) {
                    float x = (raw[r * W + n + j] - mean) * scale * weight[j] + shift[j];
                    rows.at[r * rows.pitch + n + j] = narrow<T>(x);
                }
        }
    }

    DEVICE void load_norm(const float *norm, u32 n, float (&weight)[3], float (&shift)[3]) const {
#pragma unroll
        for (u32 j = 0; j < 3; j++) {
            bool inside = norm && n + j < a.W;
            weight[j] = inside ? __ldg(norm + n + j) : 1.0f;
            shift[j] = inside ? __ldg(norm + a.W + n + j) : 0.0f;
        }
    }

    // The next token, in every block for itself.
    DEVICE void update(u32 place) {
        u32 P = a.P, C = a.C, B = a.B, R = a.R, packets = packets_of<float>(P);
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
            token()[i] = x;
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
