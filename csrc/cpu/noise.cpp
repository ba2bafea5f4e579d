// Words, uniforms and normals of the noise contract for rows of a matrix.

#include "kernels.h"
#include "philox.h"

namespace flowops::FLOWOPS_ISA {
namespace {

void convert(const WordBlock &block, NoiseKind, int64_t *values) {
    for (int64_t i = 0; i < noise_block; ++i)
        for (int j = 0; j < 4; ++j) values[4 * i + j] = block.w[j][i];
}

void convert(const WordBlock &block, NoiseKind kind, float *values) {
    if (kind == NoiseKind::normal) return words_to_normals(block, values);
    for (int64_t i = 0; i < noise_block; ++i)
        for (int j = 0; j < 4; ++j) values[4 * i + j] = uniform(block.w[j][i]);
}

template <class T>
void fill(const NoiseArgs &args) {
    // Rows start on a whole counter, so a row holds `groups` counters and the last may be cut.
    const int64_t groups = (args.width + 3) / 4;
    const int64_t counters = args.rows * groups;
    const uint64_t before = uint64_t(args.first_row) * groups;
    const int64_t blocks = (counters + noise_block - 1) / noise_block;
    const int threads = blocks < 16 ? 1 : args.threads;
    T *out = static_cast<T *>(args.out);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t b = 0; b < blocks; ++b) {
        uint64_t counter_of[noise_block];
        WordBlock words;
        T values[4 * noise_block];
        const int64_t first = b * noise_block;
        const int64_t last = first + noise_block < counters ? first + noise_block : counters;
        for (int64_t i = 0; i < noise_block; ++i) counter_of[i] = before + (first + i);
        draw_words(counter_of, args.offset, args.seed, words);
        convert(words, args.kind, values);
        int64_t counter = first;
        while (counter < last) {
            const int64_t row = counter / groups, group = counter % groups;
            const int64_t take = groups - group < last - counter ? groups - group : last - counter;
            const int64_t column = 4 * group;
            const int64_t end = column + 4 * take < args.width ? column + 4 * take : args.width;
            T *to = out + row * args.width + column;
            const T *from = values + 4 * (counter - first);
            for (int64_t c = 0; c < end - column; ++c) to[c] = from[c];
            counter += take;
        }
    }
}

}  // namespace

void noise(const NoiseArgs &args) {
    if (args.kind == NoiseKind::words)
        fill<int64_t>(args);
    else
        fill<float>(args);
}

}  // namespace flowops::FLOWOPS_ISA
