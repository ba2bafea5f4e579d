// Kernel matrices, their products and the coupling, forward and inverse; formulas in docs/gram.md.

#include "gram.h"

namespace flowops::FLOWOPS_ISA {
namespace {

template <class A>
void couple_rows(const GramForwardArgs &args, const Strip<A> &strip) {
    const int64_t E = args.O / 2;
    const bool inverse = args.op == GramOp::inverse;
    for (int64_t r = 0; r < strip.rows; ++r) {
        const A *s = strip.out + r * strip.ld_outputs, *t = s + E;
        const A *half = strip.row(args.half, args.half_stride, r);
        A *out = static_cast<A *>(args.out) + (strip.first + r) * E;
        for_spans<A>(E, [=](int64_t e, auto length) {
            constexpr int N = decltype(length)::value;
            using Io = Convert<A, N>;
            const auto log_scale = Io::load(s + e), shift = Io::load(t + e), x = Io::load(half + e);
            Io::store(out + e, inverse ? (x - shift) * exponential<N>(-log_scale)
                                       : exponential<N>(log_scale) * x + shift);
        });
        if (inverse) continue;
        A logdet = 0;
        for (int64_t e = 0; e < E; ++e) logdet += s[e];
        static_cast<A *>(args.logdet)[strip.first + r] = logdet;
    }
}

template <class A>
void forward(const GramForwardArgs &args) {
    constexpr int64_t R = strip_rows<A>;
    const int threads = useful_threads(args);
    const int64_t strips = (args.N + R - 1) / R;
    A *scratch = static_cast<A *>(args.scratch);
    const Points<A> points(args, scratch);
    for_workers(threads, [&](int worker) {
        A *mine = scratch + worker * gram_forward_elements(args);
        Strip<A> strip(points, mine);
        A *out = static_cast<A *>(args.out);
        for (int64_t i = strips * worker / threads; i < strips * (worker + 1) / threads; ++i) {
            strip.read_rows(i);
            for (int64_t m0 = 0; m0 < args.M; m0 += gram_block) {
                strip.kernel_tile(m0);
                if (args.op != GramOp::gram) {
                    strip.add_outputs(m0, args.O);
                    continue;
                }
                const int64_t n = strip.count(m0);
                transpose(strip.K, strip.ld_rows, strip.rowwise, strip.ld_block, padded<A>(n), R);
                for (int64_t r = 0; r < strip.rows; ++r)
                    copy(strip.rowwise + r * gram_ld_block, out + (strip.first + r) * args.M + m0,
                         n);
            }
            if (args.op == GramOp::gram) continue;
            strip.outputs_as_rows(args.O);
            if (args.op != GramOp::product) {
                couple_rows(args, strip);
                continue;
            }
            for (int64_t r = 0; r < strip.rows; ++r)
                copy(strip.out + r * strip.ld_outputs, out + (strip.first + r) * args.O, args.O);
        }
    });
}

}  // namespace

void gram_forward(const GramForwardArgs &args) {
    return args.dtype == DType::f64 ? forward<double>(args) : forward<float>(args);
}

}  // namespace flowops::FLOWOPS_ISA
