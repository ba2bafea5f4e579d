// The op of flowops/padding.py: out = concat(x + data_scale eps, pad_scale eps), the noise drawn on
// the way. Where the data takes none, only the groups that reach into the padding are drawn.
//
// Bound, for fp32 on an H100: without noise on the data by memory, x once and out once; the rest is
// a third of the instructions that can be issued meanwhile. With it every group of four columns is
// drawn, some 250 instructions for the 32 bytes it moves: three quarters of those that can be
// issued, so by memory still, but not by far; in 16 bits by instructions.
#include "noise_tiles.cuh"

struct PadNoise {
    const void *x, *rng;
    void *out;
    const void *pad_scale_at, *data_scale_at;  // of the type of the arithmetic; null: a number
    double pad_scale, data_scale;
    i64 N, D, width, stride, length;
};

template <class C>
DEVICE C scale(const void *at, double number) {
    return at ? *static_cast<const C *>(at) : static_cast<C>(number);
}

// Copies the data of a tile to where it belongs. V > 1: x has no gaps and is aligned, or its rows
// are multiples of V and aligned each.
template <int V, class X>
DEVICE void copy_data(const PadNoise &args, const Tile &tile, X *to) {
    constexpr int MANY = V == 1 ? 8 : 4;  // loads under way
    constexpr u32 STEP = THREADS * V;
    u32 D = args.D, width = args.width, pad = width - D;
    const X *x = static_cast<const X *>(args.x) + tile.begin.row * args.stride;
    // Of the elements of x, counted as if it had no gaps, those that belong into the tile. Vectors
    // may begin before and reach beyond them.
    u64 first = (tile.begin.row * D + min(tile.begin.column, D)) / V * V;
    u32 end = tile.end.row * D + min(tile.end.column, D) - first;
    u32 there = min(u64(args.N) * D - first, u64(end) + V);
    Place<u64> start = place(first, D);
    Place<u32> step = place(STEP, D), at = {u32(start.row - tile.begin.row), start.column};
    at = sum(at, place(threadIdx.x * V, D), D);  // its row may be below 0
    for (u32 e = threadIdx.x * V; e < end; e += MANY * STEP) {
        Vec<X, V> values[MANY];
        Place<u32> from = at;
#pragma unroll
        for (int i = 0; i < MANY; i++, from = sum(from, step, D)) {
            u32 here = e + i * STEP;
            if (here >= end) continue;
            const X *source = x + i64(int(from.row)) * args.stride + from.column;
            if (here + V <= there) {
                values[i] = load_vec<X, V>(source);
            } else {
#pragma unroll
                for (u32 j = 0; j < V; j++)
                    if (here + j < there) values[i].at[j] = source[j];
            }
        }
#pragma unroll
        for (int i = 0; i < MANY; i++, at = sum(at, step, D)) {
            if (e + i * STEP >= end) continue;
            // Before the tile it wraps far beyond it: the launcher takes no rows of 2^28 elements.
            u32 p = at.row * width + at.column - tile.begin.column, column = at.column;
#pragma unroll
            for (int j = 0; j < V; j++, p++) {
                if (p < tile.count) to[p] = values[i].at[j];
                if (++column == D) {
                    column = 0;
                    p += pad;
                }
            }
        }
    }
}

// Noise on data and padding.
template <class X>
DEVICE void noise_everywhere(const PadNoise &args) {
    using C = Compute<X>;
    const Philox philox(args.rng);
    C pad_scale = scale<C>(args.pad_scale_at, args.pad_scale);
    C data_scale = scale<C>(args.data_scale_at, args.data_scale);
    u32 D = args.D, width = args.width;
    const Groups groups(width, 0);
    for_tiles(static_cast<X *>(args.out), args.N, width, args.length, [&](const Tile &tile, X *to) {
        const X *x = settled_global(static_cast<const X *>(args.x) + tile.begin.row * args.stride);
        groups.of(tile, [&](const Group &at) {
            int data = D - 4 * at.group;
            const X *row = settled_global(x + at.row * args.stride + 4 * at.group);
            X values[4];
#pragma unroll
            for (int j = 0; j < 4; j++) values[j] = j < data ? row[j] : narrow<X>(C(-0.0));
            float eps[4];
            normals(philox(at.counter), eps);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                C noise = times(C(eps[j]), j < data ? data_scale : pad_scale);
                values[j] = narrow<X>(plus(C(widen(values[j])), noise));  // -0 + noise is noise
            }
            store_group(to + at.at, width - 4 * at.group, values);
        });
    });
}

// Noise on the padding alone.
template <class X, int V>
DEVICE void noise_on_padding(const PadNoise &args) {
    using C = Compute<X>;
    const Philox philox(args.rng);
    C pad_scale = scale<C>(args.pad_scale_at, args.pad_scale);
    u32 D = args.D, width = args.width;
    const Groups groups(width, D / 4);
    for_tiles(static_cast<X *>(args.out), args.N, width, args.length, [&](const Tile &tile, X *to) {
        copy_data<V>(args, tile, to);
        groups.of(tile, [&](const Group &at) {
            int data = D - 4 * at.group, columns = width - 4 * at.group;
            float eps[4];
            normals(philox(at.counter), eps);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (j >= data && j < columns)
                    to[at.at + j] = narrow<X>(times(C(eps[j]), pad_scale));
        });
    });
}

#define PAD_NOISE(tag, X, V)                                                  \
    FLOWOPS_KERNEL(pad_noise_everywhere_##tag, PadNoise, THREADS, 5) {        \
        noise_everywhere<X>(args);                                            \
    }                                                                         \
    FLOWOPS_KERNEL(pad_noise_on_padding_##tag##_v1, PadNoise, THREADS, 3) {   \
        noise_on_padding<X, 1>(args);                                         \
    }                                                                         \
    FLOWOPS_KERNEL(pad_noise_on_padding_##tag##_v##V, PadNoise, THREADS, 3) { \
        noise_on_padding<X, V>(args);                                         \
    }

PAD_NOISE(f32, float, 4)
PAD_NOISE(bf16, bf16, 8)
PAD_NOISE(f16, f16, 8)
PAD_NOISE(f64, double, 2)
