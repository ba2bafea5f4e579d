// out = concat(x + data_scale * eps_d, pad_scale * eps_p), the noise drawn on the way.
// Where data_scale is 0 only the counters that reach into the padding are drawn.

#include "kernels.h"
#include "philox.h"
#include "simd.h"

namespace flowops::FLOWOPS_ISA {
namespace {

// Normals of the counters row * groups + group for `count` consecutive (row, group >= first_group)
// items, starting at item `item`; four per counter.
inline void draw(const PadNoiseArgs &args, int64_t groups, int64_t first_group, int64_t item,
                 float *normals) {
    uint64_t counter[noise_block];
    const int64_t per_row = groups - first_group;
    if (per_row == groups) {
#pragma omp simd
        for (int64_t i = 0; i < noise_block; ++i) counter[i] = uint64_t(item + i);
    } else {
        int64_t row = item / per_row, group = first_group + item % per_row;
        for (int64_t i = 0; i < noise_block; ++i) {
            counter[i] = uint64_t(row * groups + group);
            if (++group == groups) {
                group = first_group;
                ++row;
            }
        }
    }
    WordBlock words;
    draw_words(counter, args.offset, args.seed, words);
    words_to_normals(words, normals);
}

template <class X>
void pad(const PadNoiseArgs &args) {
    using A = typename compute<X>::type;
    const int64_t D = args.features, W = D + args.pad;
    const int64_t groups = (W + 3) / 4;
    const bool plain = args.data_scale == 0;
    const int64_t first_group = plain ? D / 4 : 0;
    const int64_t per_row = groups - first_group;
    const int64_t rows_at_once = per_row < noise_block ? noise_block / per_row : 1;
    const int64_t tasks = (args.rows + rows_at_once - 1) / rows_at_once;
    const A pad_scale = A(args.pad_scale), data_scale = A(args.data_scale);
    const int threads = args.rows * W < 32768 ? 1 : args.threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        float normals[4 * noise_block];
        const int64_t first = task * rows_at_once;
        const int64_t last = first + rows_at_once < args.rows ? first + rows_at_once : args.rows;
        if (per_row <= noise_block) draw(args, groups, first_group, first * per_row, normals);
        for (int64_t row = first; row < last; ++row) {
            const X *x = static_cast<const X *>(args.x) + row * args.x_stride;
            X *out = static_cast<X *>(args.out) + row * W;
            if (plain)
                for (int64_t c = 0; c < D; ++c) out[c] = x[c];
            for (int64_t done = 0; done < per_row; done += noise_block) {
                if (per_row > noise_block)
                    draw(args, groups, first_group, row * per_row + done, normals);
                const float *eps =
                    normals + (per_row > noise_block ? 0 : 4 * (row - first) * per_row);
                const int64_t origin = 4 * (first_group + done);  // column of eps[0]
                const int64_t end = origin + 4 * noise_block < W ? origin + 4 * noise_block : W;
                const int64_t split = end < D ? end : (origin > D ? origin : D);
                if (!plain)
                    for_spans<A>(split - origin, [=](int64_t c, auto length) {
                        using Io = Convert<A, decltype(length)::value>;
                        const auto noise = Io::load(eps + c) * data_scale;
                        Io::store(out + origin + c, Io::load(x + origin + c) + noise);
                    });
                for_spans<A>(end - split, [=](int64_t c, auto length) {
                    using Io = Convert<A, decltype(length)::value>;
                    Io::store(out + split + c, Io::load(eps + split - origin + c) * pad_scale);
                });
            }
        }
    }
}

}  // namespace

void pad_noise(const PadNoiseArgs &args) {
    switch (args.dtype) {
        case DType::f32:
            return pad<float>(args);
        case DType::f64:
            return pad<double>(args);
        case DType::bf16:
            return pad<bf16>(args);
    }
}

}  // namespace flowops::FLOWOPS_ISA
