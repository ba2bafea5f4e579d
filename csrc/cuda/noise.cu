// The op of flowops/noise.py: words, uniforms and normals of the noise contract for rows of a
// matrix.
//
// Bound: words and uniforms by writing. Normals are some 190 instructions for 16 bytes, which an
// H100 issues at the rate at which it writes if no cycle is lost: they are bound by instructions.
#include "noise_tiles.cuh"

struct Noise {
    const void *rng;
    void *out;
    i64 rows, width, length, first_row;
};

struct AsWords {
    using Value = i64;
    DEVICE static void convert(const Words &words, i64 (&values)[4]) {
#pragma unroll
        for (int j = 0; j < 4; j++) values[j] = words.at[j];
    }
};
struct AsUniforms {
    using Value = float;
    DEVICE static void convert(const Words &words, float (&values)[4]) {
#pragma unroll
        for (int j = 0; j < 4; j++) values[j] = uniform(words.at[j]);
    }
};
struct AsNormals {
    using Value = float;
    DEVICE static void convert(const Words &words, float (&values)[4]) { normals(words, values); }
};

template <class Kind>
DEVICE void draw(const Noise &args) {
    using T = typename Kind::Value;
    const Philox philox(args.rng);
    u32 width = args.width;
    Groups groups(width, 0);
    for_tiles(static_cast<T *>(args.out), args.rows, width, args.length, [&](Tile tile, T *to) {
        // Counters are those of the matrix that these rows are a part of.
        tile.begin.row += args.first_row;
        tile.end.row += args.first_row;
        groups.of(tile, [&](const Group &at) {
            T values[4];
            Kind::convert(philox(at.counter), values);
            store_group(to + at.at, width - 4 * at.group, values);
        });
    });
}

// For widths that are multiples of four: the groups are the matrix, in order.
template <class Kind>
DEVICE void draw_in_order(const Noise &args) {
    using T = typename Kind::Value;
    constexpr int V = 16 / sizeof(T);
    const Philox philox(args.rng);
    u64 per_row = args.width / 4, first = args.first_row * per_row;
    u64 counter = first + u64(blockIdx.x) * THREADS + threadIdx.x;
    u64 end = first + args.rows * per_row, step = u64(gridDim.x) * THREADS;
    // Where the group of counter 0 would be: the loop then counts in one number alone.
    u64 out = reinterpret_cast<u64>(args.out) - 4 * sizeof(T) * first;
    for (; counter < end; counter += step) {
        T values[4];
        Kind::convert(philox(counter), values);
        T *to = reinterpret_cast<T *>(out + 4 * sizeof(T) * counter);
#pragma unroll
        for (int j = 0; j < 4; j += V) {
            Vec<T, V> some;
#pragma unroll
            for (int i = 0; i < V; i++) some.at[i] = values[j + i];
            store_vec(to + j, some);
        }
    }
}

#define NOISE(tag, Kind)                                                 \
    FLOWOPS_KERNEL(noise_##tag, Noise, THREADS, 5) { draw<Kind>(args); } \
    FLOWOPS_KERNEL(noise_##tag##_in_order, Noise, THREADS, 5) { draw_in_order<Kind>(args); }

NOISE(words, AsWords)
NOISE(uniform, AsUniforms)
NOISE(normal, AsNormals)
