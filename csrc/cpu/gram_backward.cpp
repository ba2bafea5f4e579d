// Gradients of kernel matrices, their products and the coupling; formulas in docs/gram.md. K is
// computed again, and all gradients come out of one pass over the rows.

#include "gram.h"

namespace flowops::FLOWOPS_ISA {
namespace {

// Sums over rows: those of one chunk, added up strip by strip. Chunks are added in their order, in
// double, so results do not depend on threads.
template <class A>
struct Partial {
    A *dwT, *dzT;          // [O][ld_points], [D][ld_points]
    double *dlengthscale;  // [D] or [1]
};

template <class A>
struct BackwardStrip : Strip<A> {
    using Base = Strip<A>;
    using Base::args, Base::points, Base::R, Base::rows, Base::first, Base::S, Base::K, Base::xs,
        Base::xT, Base::take, Base::count, Base::row, Base::ld_features, Base::ld_outputs,
        Base::ld_rows, Base::ld_block, Base::out, Base::outT, Base::rowwise;

    const GramBackwardArgs &backward;
    A *slopes;         // [gram_block][R]
    A *V, *V_rowwise;  // dL/dS over slope_factor [gram_block][R], [R][ld_block]
    A *g, *gT;         // dL/d(K w) [R][ld_outputs], [ld_outputs][R]
    A *dxT;            // [ld_features][R]

    BackwardStrip(const GramBackwardArgs &b, const Points<A> &p, A *&scratch)
        : Base(p, scratch), backward(b) {
        slopes = take(scratch, R * gram_block);
        V = take(scratch, R * gram_block);
        V_rowwise = take(scratch, R * ld_block);
        g = take(scratch, R * ld_outputs);
        gT = take(scratch, R * ld_outputs);
        dxT = take(scratch, R * ld_features);
    }

    // Rows past the last one have no gradient.
    void read_gradients() {
        for (int64_t r = 0; r < R; ++r) {
            A *to = g + r * ld_outputs;
            for (int64_t o = 0; o < ld_outputs; ++o) to[o] = 0;
            if (r < rows) copy(row(backward.grad, args.O, r), to, args.O);
        }
        transpose(g, ld_outputs, gT, ld_rows, R, ld_outputs);
    }

    // The same through a coupling or its inverse, whose s (and t) are in `out`.
    void pull_through_coupling() {
        const int64_t E = args.O / 2;
        const bool inverse = args.op == GramOp::inverse;
        for (int64_t r = 0; r < R; ++r) {
            A *ds = g + r * ld_outputs, *dt = ds + E;
            for (int64_t o = r < rows ? args.O : 0; o < ld_outputs; ++o) ds[o] = 0;
            if (r >= rows) continue;
            const A *s = out + r * ld_outputs, *t = s + E;
            const A *half = row(args.half, args.half_stride, r), *grad = row(backward.grad, E, r);
            A *grad_half = static_cast<A *>(backward.grad_half) + (first + r) * E;
            const A dlogdet =
                inverse ? A(0) : static_cast<const A *>(backward.grad_logdet)[first + r];
            for_spans<A>(E, [=](int64_t e, auto length) {
                constexpr int N = decltype(length)::value;
                using Io = Convert<A, N>;
                const auto log_scale = Io::load(s + e), dy = Io::load(grad + e);
                const auto x = Io::load(half + e);
                const auto dx = dy * exponential<N>(inverse ? -log_scale : log_scale);
                Io::store(grad_half + e, dx);
                Io::store(ds + e, inverse ? dx * (Io::load(t + e) - x) : dx * x + dlogdet);
                Io::store(dt + e, inverse ? -dx : dy);
            });
        }
        transpose(g, ld_outputs, gT, ld_rows, R, ld_outputs);
    }

    // V for the block from m0 on, also as rows, with K as rows. Returns sum V S.
    double pull_to_distances(int64_t m0) {
        const int64_t n = count(m0), n_padded = padded<A>(n);
        for (int64_t i = n * R; i < n_padded * R; ++i) V[i] = K[i] = 0;
        const A *slope = this->slope_tile(slopes);
        Register<A> VS = {};
        const auto weigh = [&](Register<A> dK, int64_t i) {
            const Register<A> s = load_raw<lanes<A>>(S + i);
            const Register<A> v = dK * load_raw<lanes<A>>(slope + i);
            store_raw<lanes<A>>(V + i, v);
            return v * s;
        };
        if (args.op == GramOp::gram) {
            for (int64_t r = 0; r < R; ++r) {
                A *to = V_rowwise + r * ld_block;
                for (int64_t i = 0; i < n_padded; ++i) to[i] = 0;
                if (r < rows) copy(row(backward.grad, args.M, r) + m0, to, n);
            }
            transpose(V_rowwise, ld_block, V, ld_rows, R, n_padded);
            for (int64_t m = 0; m < n; m += group) {
                Register<A> some = {};
                const int64_t end = (m + group < n ? m + group : n) * R;
                for (int64_t i = m * R; i < end; i += lanes<A>)
                    some += weigh(load_raw<lanes<A>>(V + i), i);
                VS += some;
            }
        } else {
            for_groups(n, [&](int64_t i, auto length) {
                constexpr int I = decltype(length)::value;
                const A *w = static_cast<const A *>(args.w) + (m0 + i) * args.O;
                const auto dK = Sums<A, I>::products(args.O, w, args.O, 1, gT, R);
                Register<A> some = {};
#pragma GCC unroll 8
                for (int j = 0; j < I; ++j) {
                    some += weigh(dK.at[j][0], (i + j) * R);
                    some += weigh(dK.at[j][1], (i + j) * R + lanes<A>);
                }
                VS += some;
            });
            transpose(K, ld_rows, rowwise, ld_block, n_padded, R);
        }
        transpose(V, ld_rows, V_rowwise, ld_block, n_padded, R);
        double total = 0;
        for (int i = 0; i < lanes<A>; ++i) total += double(VS[i]);
        return total;
    }

    void add_to_weights(int64_t m0, const Partial<A> &partial) {
        const int64_t ld = points.ld_points;
        for (int64_t i = 0; i < count(m0); i += R)
            for_groups(args.O, [&](int64_t o, auto length) {
                Sums<A, decltype(length)::value>::products(rows, g + o, 1, ld_outputs, rowwise + i,
                                                           ld_block)
                    .add_to(partial.dwT + o * ld + m0 + i, ld);
            });
    }

    // sum_n V (x - z), and for lengthscales by feature sum_nm V (x - z)^2.
    void add_to_points(int64_t m0, const Partial<A> &partial) {
        const int64_t ld = points.ld_points;
        for (int64_t i = 0; i < count(m0); i += R)
            for_groups(args.D, [&](int64_t d, auto length) {
                using Dz = Sums<A, decltype(length)::value>;
                const int64_t at = d * ld + m0 + i;
                const A *x = xs + d, *v = V_rowwise + i, *z = points.zT + at;
                Dz::template differences<false>(rows, x, ld_features, v, ld_block, z, ld)
                    .add_to(partial.dzT + at, ld);
                if (!args.per_feature) return;
                const auto squares =
                    Dz::template differences<true>(rows, x, ld_features, v, ld_block, z, ld);
                for (int j = 0; j < decltype(length)::value; ++j)
                    for (int lane = 0; lane < lanes<A>; ++lane)
                        partial.dlengthscale[d + j] +=
                            double(squares.at[j][0][lane]) + double(squares.at[j][1][lane]);
            });
    }

    // sum_m V (z - x)
    void add_to_rows(int64_t m0) {
        for_groups(args.D, [&](int64_t d, auto length) {
            const auto sums = Sums<A, decltype(length)::value>::template differences<false>(
                count(m0), points.z + m0 * args.D + d, args.D, V, R, xT + d * R, R);
            if (m0 == 0)
                sums.store(dxT + d * R, R);
            else
                sums.add_to(dxT + d * R, R);
        });
    }

    void write_rows() {
        transpose(dxT, ld_rows, xs, ld_features, ld_features, R);
        for (int64_t r = 0; r < rows; ++r) {
            A *to = static_cast<A *>(backward.grad_x) + (first + r) * args.D;
            for (int64_t d = 0; d < args.D; ++d) to[d] = xs[r * ld_features + d] * points.pull[d];
        }
    }

    void run(int64_t index, const Partial<A> &partial) {
        this->read_rows(index);
        const bool one_block = args.M <= gram_block;
        if (args.op == GramOp::coupling || args.op == GramOp::inverse) {
            const int64_t columns = args.op == GramOp::coupling ? args.O / 2 : args.O;
            for (int64_t m0 = 0; m0 < args.M; m0 += gram_block) {
                this->kernel_tile(m0, slopes);
                this->add_outputs(m0, columns);
            }
            this->outputs_as_rows(columns);
            pull_through_coupling();
        } else {
            if (args.op == GramOp::product) read_gradients();
            if (one_block) this->kernel_tile(0, slopes);
        }
        for (int64_t m0 = 0; m0 < args.M; m0 += gram_block) {
            if (!one_block) this->kernel_tile(m0, slopes);
            const double VS = pull_to_distances(m0);
            if (!args.per_feature) partial.dlengthscale[0] += VS;
            if (args.op != GramOp::gram) add_to_weights(m0, partial);
            add_to_points(m0, partial);
            add_to_rows(m0);
        }
        write_rows();
    }
};

template <class A>
void backward(const GramBackwardArgs &args) {
    constexpr int64_t R = strip_rows<A>;
    const int threads = useful_threads(args);
    const int64_t strips = (args.N + R - 1) / R, chunks = gram_chunks(args);
    A *scratch = static_cast<A *>(args.scratch);
    const Points<A> points(args, scratch);
    const int64_t ld = points.ld_points, sums = (args.O + args.D) * ld;
    const int64_t scales = args.per_feature ? args.D : 1;
    A *partials = scratch;
    double *dlengthscales = args.dlengthscale_partials;
    scratch += chunks * sums;
    for_workers(threads, [&](int worker) {
        A *mine = scratch + worker * gram_backward_elements(args);
        BackwardStrip<A> strip(args, points, mine);
        for (int64_t c = chunks * worker / threads; c < chunks * (worker + 1) / threads; ++c) {
            A *dwT = partials + c * sums;
            const Partial<A> partial{dwT, dwT + args.O * ld, dlengthscales + c * scales};
            for (int64_t i = 0; i < sums; ++i) dwT[i] = 0;
            for (int64_t d = 0; d < scales; ++d) partial.dlengthscale[d] = 0;
            for (int64_t i = strips * c / chunks; i < strips * (c + 1) / chunks; ++i)
                strip.run(i, partial);
        }
    });
    const auto total = [=](int64_t at) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += partials[c * sums + at];
        return sum;
    };
    for_workers(threads, [&](int worker) {
        A *dw = static_cast<A *>(args.grad_w), *dz = static_cast<A *>(args.grad_z);
        for (int64_t m = args.M * worker / threads; m < args.M * (worker + 1) / threads; ++m) {
            for (int64_t o = 0; o < args.O; ++o) dw[m * args.O + o] = A(total(o * ld + m));
            for (int64_t d = 0; d < args.D; ++d)
                dz[m * args.D + d] = A(points.difference_factor(d) * total((args.O + d) * ld + m));
        }
    });
    for (int64_t d = 0; d < scales; ++d) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += dlengthscales[c * scales + d];
        const double q = args.per_feature ? double(points.q[d]) : points.q_all;
        static_cast<A *>(args.grad_lengthscale)[d] =
            A(-2 * slope_factor(args) * q * sum /
              double(static_cast<const A *>(args.lengthscale)[d]));
    }
}

}  // namespace

void gram_backward(const GramBackwardArgs &args) {
    return args.dtype == DType::f64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace flowops::FLOWOPS_ISA
