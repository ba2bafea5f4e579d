// The op of flowops/noise.py: words, uniforms and normals of the noise contract for a matrix.
//
// Bound: words and uniforms by writing. Normals are some 190 instructions for 16 bytes, which an
// H100 issues at the rate at which it writes if no cycle is lost: they are bound by instructions.
#include "noise_tiles.cuh"

struct Noise {
    const void *rng;
    void *out;
    i64 rows, width, length;
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
    for_tiles(static_cast<T *>(args.out), args.rows, width, args.length,
              [&](const Tile &tile, T *to) {
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
    u64 groups = u64(args.rows) * args.width / 4, step = u64(gridDim.x) * THREADS;
    for (u64 group = u64(blockIdx.x) * THREADS + threadIdx.x; group < groups; group += step) {
        T values[4];
        Kind::convert(philox(group), values);
        T *to = static_cast<T *>(args.out) + 4 * group;
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
