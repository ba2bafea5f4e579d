// Kernel matrices, their products and the kernel coupling, formulas in docs/gram.md. K is never
// stored but by the op that returns it: a strip of rows, two registers wide, meets a block of
// points that stays in cache.
//
// Registers hold rows (tiles [points][rows]) where sums run over points or features, and points
// (tiles [rows][points], transposed once) where sums run over rows. Every sum is then one of a
// few loops: squares of differences, products, products with differences. Only differences of
// points are ever taken, and what points are scaled by before is a power of two: far from zero they
// are as good as centred ones.

#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "simd.h"

namespace flowops::FLOWOPS_ISA {
namespace {

template <class A>
constexpr int lanes = register_bytes / sizeof(A);
template <class A>
using Register = vec<A, lanes<A>>;
template <class A>
constexpr int64_t strip_rows = 2 * lanes<A>;

#if defined(__AVX512F__)
constexpr int group = 8;  // points, outputs or features that share two loaded registers
#else
constexpr int group = 4;
#endif

template <class A>
constexpr int64_t padded(int64_t n) {
    return (n + strip_rows<A> - 1) / strip_rows<A> * strip_rows<A>;
}

// Covers [0, n) with body(first, Length<I>): whole groups, then 4, 2, 1.
template <class Body>
inline void for_groups(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + group <= n; i += group) body(i, Length<group>());
    if (group > 4 && i + 4 <= n) {
        body(i, Length<4>());
        i += 4;
    }
    if (i + 2 <= n) {
        body(i, Length<2>());
        i += 2;
    }
    if (i < n) body(i, Length<1>());
}

// --- the loops, over k < n: b is read an element at a time, v two registers at a time
// --------

template <class A, int I>
struct Sums {
    Register<A> at[I][2];

    static Sums zero() { return {}; }

    static Sums load(const A *p, int64_t stride) {
        Sums sums;
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) {
            sums.at[i][0] = load_raw<lanes<A>>(p + i * stride);
            sums.at[i][1] = load_raw<lanes<A>>(p + i * stride + lanes<A>);
        }
        return sums;
    }

    void store(A *p, int64_t stride) const {
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) {
            store_raw<lanes<A>>(p + i * stride, at[i][0]);
            store_raw<lanes<A>>(p + i * stride + lanes<A>, at[i][1]);
        }
    }

    void add(const Sums &other) {
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) {
            at[i][0] += other.at[i][0];
            at[i][1] += other.at[i][1];
        }
    }

    // sum_k q_k (v_k - b_ik)^2; without `weighted` q is not read.
    template <bool weighted>
    void add_squares(int64_t n, const A *b, int64_t b_i, const A *v, int64_t v_k, const A *q) {
        in_runs(n, [&](Sums &sums, int64_t k) {
            const auto v0 = load_raw<lanes<A>>(v + k * v_k);
            const auto v1 = load_raw<lanes<A>>(v + k * v_k + lanes<A>);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) {
                const auto d0 = v0 - b[i * b_i + k], d1 = v1 - b[i * b_i + k];
                sums.at[i][0] += weighted ? (d0 * q[k]) * d0 : d0 * d0;
                sums.at[i][1] += weighted ? (d1 * q[k]) * d1 : d1 * d1;
            }
        });
    }

    // sum_k v_k b_ik
    void add_products(int64_t n, const A *b, int64_t b_i, int64_t b_k, const A *v, int64_t v_k) {
        in_runs(n, [&](Sums &sums, int64_t k) {
            const auto v0 = load_raw<lanes<A>>(v + k * v_k);
            const auto v1 = load_raw<lanes<A>>(v + k * v_k + lanes<A>);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) {
                sums.at[i][0] += v0 * b[i * b_i + k * b_k];
                sums.at[i][1] += v1 * b[i * b_i + k * b_k];
            }
        });
    }

    // sum_k v_k (u_i - b_ik)
    void add_differences(int64_t n, const A *b, int64_t b_k, const A *v, int64_t v_k,
                         const Sums &u) {
        in_runs(n, [&](Sums &sums, int64_t k) {
            const auto v0 = load_raw<lanes<A>>(v + k * v_k);
            const auto v1 = load_raw<lanes<A>>(v + k * v_k + lanes<A>);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) {
                sums.at[i][0] += v0 * (u.at[i][0] - b[i + k * b_k]);
                sums.at[i][1] += v1 * (u.at[i][1] - b[i + k * b_k]);
            }
        });
    }

    // sum_k v_k (u_i - b_ik)^2
    void add_weighted_squares(int64_t n, const A *b, int64_t b_k, const A *v, int64_t v_k,
                              const Sums &u) {
        in_runs(n, [&](Sums &sums, int64_t k) {
            const auto v0 = load_raw<lanes<A>>(v + k * v_k);
            const auto v1 = load_raw<lanes<A>>(v + k * v_k + lanes<A>);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) {
                const auto d0 = u.at[i][0] - b[i + k * b_k], d1 = u.at[i][1] - b[i + k * b_k];
                sums.at[i][0] += v0 * d0 * d0;
                sums.at[i][1] += v1 * d1 * d1;
            }
        });
    }

private:
    // body(sums, k) for k < n, in runs whose sums are added up one by one: long sums in one
    // accumulator would round more than those of a matrix product do.
    template <class Body>
    void in_runs(int64_t n, Body body) {
        constexpr int64_t run = 16;
        for (int64_t k0 = 0; k0 < n; k0 += run) {
            Sums sums = zero();
            const int64_t end = k0 + run < n ? k0 + run : n;
            for (int64_t k = k0; k < end; ++k) body(sums, k);
            add(sums);
        }
    }
};

// --- transposition
// ---------------------------------------------------------------------------------

// Interleaves the first half of N registers with the second; log2(N) times is a transposition.
template <class A, int N, size_t... lane>
inline void interleave(const vec<A, N> *from, vec<A, N> *to, std::index_sequence<lane...>) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
#if defined(__clang__)
        to[2 * i] =
            __builtin_shufflevector(from[i], from[i + N / 2], int(lane % 2 * N + lane / 2)...);
        to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + N / 2],
                                                int(lane % 2 * N + lane / 2 + N / 2)...);
#else
        using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
        const vec<Index, N> low = {Index(lane % 2 * N + lane / 2)...};
        to[2 * i] = __builtin_shuffle(from[i], from[i + N / 2], low);
        to[2 * i + 1] = __builtin_shuffle(from[i], from[i + N / 2], low + Index(N / 2));
#endif
    }
}

// from [rows][ld_from] to [columns][ld_to], rows and columns multiples of the register's length.
template <class A>
void transpose(const A *from, int64_t ld_from, A *to, int64_t ld_to, int64_t rows,
               int64_t columns) {
    constexpr int N = lanes<A>;
    for (int64_t r = 0; r < rows; r += N)
        for (int64_t c = 0; c < columns; c += N) {
            vec<A, N> a[N], b[N];
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) a[i] = load_raw<N>(from + (r + i) * ld_from + c);
            const auto lane = std::make_index_sequence<N>();
            if constexpr (N == 16) {
                interleave<A, N>(a, b, lane);
                interleave<A, N>(b, a, lane);
                interleave<A, N>(a, b, lane);
                interleave<A, N>(b, a, lane);
            } else if constexpr (N == 8) {
                interleave<A, N>(a, b, lane);
                interleave<A, N>(b, a, lane);
                interleave<A, N>(a, b, lane);
                for (int i = 0; i < N; ++i) a[i] = b[i];
            } else if constexpr (N == 4) {
                interleave<A, N>(a, b, lane);
                interleave<A, N>(b, a, lane);
            } else {
                interleave<A, N>(a, b, lane);
                for (int i = 0; i < N; ++i) a[i] = b[i];
            }
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) store_raw<N>(to + (c + i) * ld_to + r, a[i]);
        }
}

// --- k(S) and dk/dS
// --------------------------------------------------------------------------------

template <class A>
inline Register<A> root(Register<A> S) {
    Register<A> r;
    for (int i = 0; i < lanes<A>; ++i) r[i] = std::sqrt(S[i]);
    return r;
}

template <Profile profile, class A>
inline Register<A> value(Register<A> S) {
    constexpr int N = lanes<A>;
    if constexpr (profile == Profile::se) return exponential<N>(S * A(-0.5));
    const Register<A> r = root<A>(S);
    if constexpr (profile == Profile::matern12) return exponential<N>(-r);
    if constexpr (profile == Profile::matern32) {
        const Register<A> t = r * A(1.7320508075688772);
        return (A(1) + t) * exponential<N>(-t);
    }
    const Register<A> t = r * A(2.23606797749979);
    return (A(1) + t + t * t * A(1. / 3)) * exponential<N>(-t);
}

// Of S and K = k(S). Matern 1/2 has a kink at 0: its slope there is taken as 0.
template <Profile profile, class A>
inline Register<A> slope(Register<A> S, Register<A> K) {
    if constexpr (profile == Profile::se) return K * A(-0.5);
    constexpr int N = lanes<A>;
    const Register<A> r = root<A>(S);
    if constexpr (profile == Profile::matern12) {
        const Register<A> none = {};
        return S > none ? K / (r * A(-2)) : none;
    }
    if constexpr (profile == Profile::matern32)
        return exponential<N>(r * A(-1.7320508075688772)) * A(-1.5);
    const Register<A> t = r * A(2.23606797749979);
    return (A(1) + t) * exponential<N>(-t) * A(-5. / 6);
}

// --- one problem
// ------------------------------------------------------------------------------------

// What all strips share. Feature d of x and z is multiplied by up[d], the power of two next to
// 1 / lengthscale; q is what is left of 1 / lengthscale^2. Rounding a number that scales all
// distances would shift them all alike and not average out: q_rest is what it took.
template <class A>
struct Points {
    const GramArgs &args;
    int64_t ld_features, ld_points;
    A *up, *q, *z, *zT;  // [D], [D], [M][D], [D][ld_points]
    A q_rest;

    Points(const GramArgs &a, A *&scratch)
        : args(a), ld_features(padded<A>(a.D)), ld_points(padded<A>(a.M)) {
        const A *lengthscale = static_cast<const A *>(a.lengthscale);
        up = scratch;
        q = up + ld_features;
        z = q + ld_features;
        zT = z + padded<A>(a.M * a.D);
        scratch = zT + a.D * ld_points;
        for (int64_t d = 0; d < a.D; ++d) {
            const double l = lengthscale[a.per_feature ? d : 0];
            int exponent = -std::ilogb(l);
            const int most = sizeof(A) == 4 ? 120 : 1000;
            exponent = exponent > most ? most : exponent < -most ? -most : exponent;
            const double power = std::ldexp(1., exponent), rest = 1. / (l * power);
            up[d] = A(power);
            q[d] = A(rest * rest);
            q_rest = A(rest * rest - double(q[d]));
        }
        const A *points = static_cast<const A *>(a.z);
        for (int64_t d = 0; d < a.D; ++d) {
            for (int64_t m = 0; m < a.M; ++m)
                zT[d * ld_points + m] = z[m * a.D + d] = points[m * a.D + d] * up[d];
            for (int64_t m = a.M; m < ld_points; ++m) zT[d * ld_points + m] = 0;
        }
    }

    // dS/dx = this times (x - z), both multiplied by up.
    A slope_of_difference(int64_t d) const { return 2 * q[args.per_feature ? d : 0] * up[d]; }
};

// One strip of rows: the buffers of one thread, and the steps that fill them.
template <class A, Profile profile>
struct Strip {
    static constexpr int64_t R = strip_rows<A>;

    const GramArgs &args;
    const Points<A> &points;
    const int64_t ld_features, ld_outputs;
    int64_t first = 0, rows = 0;  // rows of the problem that this strip holds
    A *xs, *xT;                   // [R][ld_features], [ld_features][R]
    A *S, *K;                     // [gram_block][R]
    A *outT, *out;                // [ld_outputs][R], [R][ld_outputs]
    A *rowwise;                   // [R][gram_block], K as rows

    Strip(const Points<A> &p, A *&scratch)
        : args(p.args), points(p), ld_features(p.ld_features), ld_outputs(padded<A>(args.O)) {
        xs = take(scratch, R * ld_features);
        xT = take(scratch, R * ld_features);
        S = take(scratch, R * gram_block);
        K = take(scratch, R * gram_block);
        outT = take(scratch, R * ld_outputs);
        out = take(scratch, R * ld_outputs);
        rowwise = take(scratch, R * gram_block);
    }

    static A *take(A *&scratch, int64_t n) {
        A *taken = scratch;
        scratch += n;
        return taken;
    }

    const A *row(const void *base, int64_t stride, int64_t r) const {
        return static_cast<const A *>(base) + (first + (r < rows ? r : rows - 1)) * stride;
    }

    // Rows past the last one of the problem repeat it.
    void read_rows(int64_t index) {
        first = index * R;
        rows = args.N - first < R ? args.N - first : R;
        for (int64_t r = 0; r < R; ++r) {
            const A *x = row(args.x, args.x_stride, r);
            A *to = xs + r * ld_features;
            for (int64_t d = 0; d < args.D; ++d) to[d] = x[d] * points.up[d];
            for (int64_t d = args.D; d < ld_features; ++d) to[d] = 0;
        }
        transpose(xs, ld_features, xT, R, R, ld_features);
    }

    int64_t count(int64_t m0) const { return args.M - m0 < gram_block ? args.M - m0 : gram_block; }

    // S and K of the block of points from m0 on.
    void kernel_tile(int64_t m0) {
        const int64_t n = count(m0);
        for_groups(n, [&](int64_t i, auto length) {
            auto sums = Sums<A, decltype(length)::value>::zero();
            const A *z = points.z + (m0 + i) * args.D;
            if (args.per_feature)
                sums.template add_squares<true>(args.D, z, args.D, xT, R, points.q);
            else
                sums.template add_squares<false>(args.D, z, args.D, xT, R, nullptr);
            sums.store(S + i * R, R);
        });
        const A scale = args.per_feature ? A(1) : points.q[0];
        const A rest = args.per_feature ? A(0) : points.q_rest;
        // Every kernel is 0 long before, and 0 times a capped distance is no NaN.
        const Register<A> cap = Register<A>{} + A(1e12);
        for (int64_t i = 0; i < n * R; i += lanes<A>) {
            Register<A> s = load_raw<lanes<A>>(S + i);
            s = s > cap ? cap : s;
            s = s * scale + s * rest;
            store_raw<lanes<A>>(S + i, s);
            store_raw<lanes<A>>(K + i, value<profile, A>(s));
        }
    }

    // outT[o] += sum_m w[m][o] K[m] for the first `columns` columns of w; the first block sets it.
    void add_outputs(int64_t m0, int64_t columns) {
        for_groups(columns, [&](int64_t o, auto length) {
            using Out = Sums<A, decltype(length)::value>;
            A *to = outT + o * R;
            auto sums = m0 == 0 ? Out::zero() : Out::load(to, R);
            const A *w = static_cast<const A *>(args.w) + m0 * args.O + o;
            sums.add_products(count(m0), w, 1, args.O, K, R);
            sums.store(to, R);
        });
    }

    void outputs_as_rows(int64_t columns) {
        transpose(outT, R, out, ld_outputs, padded<A>(columns), R);
    }
};

template <class Body>
inline void for_workers(int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int t = 0; t < threads; ++t) body(t);
}

inline int useful_threads(const GramArgs &args) {
    return args.N * args.M * (args.D + args.O + 8) < 200000 ? 1 : args.threads;
}

template <class A>
inline void copy(const A *from, A *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// --- forward
// ---------------------------------------------------------------------------------------

template <class A, Profile profile>
void couple_rows(const GramForwardArgs &args, const Strip<A, profile> &strip) {
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

template <class A, Profile profile>
void forward(const GramForwardArgs &args) {
    constexpr int64_t R = strip_rows<A>;
    const int threads = useful_threads(args);
    const int64_t strips = (args.N + R - 1) / R;
    A *scratch = static_cast<A *>(args.scratch);
    const Points<A> points(args, scratch);
    for_workers(threads, [&](int worker) {
        A *mine = scratch + worker * gram_forward_elements(args);
        Strip<A, profile> strip(points, mine);
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
                transpose(strip.K, R, strip.rowwise, gram_block, padded<A>(n), R);
                for (int64_t r = 0; r < strip.rows; ++r)
                    copy(strip.rowwise + r * gram_block, out + (strip.first + r) * args.M + m0, n);
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

// --- backward
// --------------------------------------------------------------------------------------

// Sums over rows: those of one chunk, added up strip by strip. Chunks are added in their order, in
// double, so results do not depend on threads.
template <class A>
struct Partial {
    A *dwT, *dzT;          // [O][ld_points], [D][ld_points]
    double *dlengthscale;  // [D] or [1]
};

template <class A, Profile profile>
struct BackwardStrip : Strip<A, profile> {
    using Base = Strip<A, profile>;
    using Base::args, Base::points, Base::R, Base::rows, Base::first, Base::S, Base::K, Base::xs,
        Base::xT, Base::take, Base::count, Base::row, Base::ld_features, Base::ld_outputs,
        Base::out, Base::outT, Base::rowwise;

    const GramBackwardArgs &backward;
    A *V, *V_rowwise;  // dL/dS [gram_block][R], [R][gram_block]
    A *g, *gT;         // dL/d(K w) [R][ld_outputs], [ld_outputs][R]
    A *dxT;            // [ld_features][R]

    BackwardStrip(const GramBackwardArgs &b, const Points<A> &p, A *&scratch)
        : Base(p, scratch), backward(b) {
        V = take(scratch, R * gram_block);
        V_rowwise = take(scratch, R * gram_block);
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
        transpose(g, ld_outputs, gT, R, R, ld_outputs);
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
        transpose(g, ld_outputs, gT, R, R, ld_outputs);
    }

    // V = dL/dS for the block from m0 on, also as rows, with K as rows. Returns sum V S.
    double pull_to_distances(int64_t m0) {
        const int64_t n = count(m0), n_padded = padded<A>(n);
        for (int64_t i = n * R; i < n_padded * R; ++i) V[i] = K[i] = 0;
        Register<A> VS = {};
        const auto weigh = [&](Register<A> dK, int64_t i) {
            const Register<A> s = load_raw<lanes<A>>(S + i);
            const Register<A> v = dK * slope<profile, A>(s, load_raw<lanes<A>>(K + i));
            store_raw<lanes<A>>(V + i, v);
            return v * s;
        };
        if (args.op == GramOp::gram) {
            for (int64_t r = 0; r < R; ++r) {
                A *to = V_rowwise + r * gram_block;
                for (int64_t i = 0; i < n_padded; ++i) to[i] = 0;
                if (r < rows) copy(row(backward.grad, args.M, r) + m0, to, n);
            }
            transpose(V_rowwise, gram_block, V, R, R, n_padded);
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
                auto dK = Sums<A, I>::zero();
                const A *w = static_cast<const A *>(args.w) + (m0 + i) * args.O;
                dK.add_products(args.O, w, args.O, 1, gT, R);
                Register<A> some = {};
#pragma GCC unroll 8
                for (int j = 0; j < I; ++j) {
                    some += weigh(dK.at[j][0], (i + j) * R);
                    some += weigh(dK.at[j][1], (i + j) * R + lanes<A>);
                }
                VS += some;
            });
            transpose(K, R, rowwise, gram_block, n_padded, R);
        }
        transpose(V, R, V_rowwise, gram_block, n_padded, R);
        double total = 0;
        for (int i = 0; i < lanes<A>; ++i) total += double(VS[i]);
        return total;
    }

    void add_to_weights(int64_t m0, const Partial<A> &partial) {
        for (int64_t i = 0; i < count(m0); i += R)
            for_groups(args.O, [&](int64_t o, auto length) {
                A *to = partial.dwT + o * points.ld_points + m0 + i;
                auto sums = Sums<A, decltype(length)::value>::load(to, points.ld_points);
                sums.add_products(rows, g + o, 1, ld_outputs, rowwise + i, gram_block);
                sums.store(to, points.ld_points);
            });
    }

    // sum_n V (z - x), and for lengthscales by feature sum_nm V (z - x)^2.
    void add_to_points(int64_t m0, const Partial<A> &partial) {
        for (int64_t i = 0; i < count(m0); i += R)
            for_groups(args.D, [&](int64_t d, auto length) {
                using Dz = Sums<A, decltype(length)::value>;
                const int64_t ld = points.ld_points, at = d * ld + m0 + i;
                const auto z = Dz::load(points.zT + at, ld);
                auto sums = Dz::load(partial.dzT + at, ld);
                sums.add_differences(rows, xs + d, ld_features, V_rowwise + i, gram_block, z);
                sums.store(partial.dzT + at, ld);
                if (!args.per_feature) return;
                auto squares = Dz::zero();
                squares.add_weighted_squares(rows, xs + d, ld_features, V_rowwise + i, gram_block,
                                             z);
                for (int j = 0; j < decltype(length)::value; ++j)
                    for (int lane = 0; lane < lanes<A>; ++lane)
                        partial.dlengthscale[d + j] +=
                            double(squares.at[j][0][lane]) + double(squares.at[j][1][lane]);
            });
    }

    // sum_m V (x - z)
    void add_to_rows(int64_t m0) {
        for_groups(args.D, [&](int64_t d, auto length) {
            using Dx = Sums<A, decltype(length)::value>;
            A *to = dxT + d * R;
            auto sums = m0 == 0 ? Dx::zero() : Dx::load(to, R);
            sums.add_differences(count(m0), points.z + m0 * args.D + d, args.D, V, R,
                                 Dx::load(xT + d * R, R));
            sums.store(to, R);
        });
    }

    void write_rows() {
        transpose(dxT, R, xs, ld_features, ld_features, R);
        for (int64_t r = 0; r < rows; ++r) {
            A *to = static_cast<A *>(backward.grad_x) + (first + r) * args.D;
            for (int64_t d = 0; d < args.D; ++d)
                to[d] = xs[r * ld_features + d] * points.slope_of_difference(d);
        }
    }

    void run(int64_t index, const Partial<A> &partial) {
        this->read_rows(index);
        const bool one_block = args.M <= gram_block;
        if (args.op == GramOp::coupling || args.op == GramOp::inverse) {
            const int64_t columns = args.op == GramOp::coupling ? args.O / 2 : args.O;
            for (int64_t m0 = 0; m0 < args.M; m0 += gram_block) {
                this->kernel_tile(m0);
                this->add_outputs(m0, columns);
            }
            this->outputs_as_rows(columns);
            pull_through_coupling();
        } else {
            if (args.op == GramOp::product) read_gradients();
            if (one_block) this->kernel_tile(0);
        }
        for (int64_t m0 = 0; m0 < args.M; m0 += gram_block) {
            if (!one_block) this->kernel_tile(m0);
            const double VS = pull_to_distances(m0);
            if (!args.per_feature) partial.dlengthscale[0] += VS;
            if (args.op != GramOp::gram) add_to_weights(m0, partial);
            add_to_points(m0, partial);
            add_to_rows(m0);
        }
        write_rows();
    }
};

template <class A, Profile profile>
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
        BackwardStrip<A, profile> strip(args, points, mine);
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
                dz[m * args.D + d] =
                    A(total((args.O + d) * ld + m) * double(points.slope_of_difference(d)));
        }
    });
    for (int64_t d = 0; d < scales; ++d) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += dlengthscales[c * scales + d];
        const double q = args.per_feature ? double(points.q[d]) : 1;
        static_cast<A *>(args.grad_lengthscale)[d] =
            A(-2 * q * sum / double(static_cast<const A *>(args.lengthscale)[d]));
    }
}

#define FLOWOPS_BY_PROFILE(FUNCTION, A)                  \
    switch (args.profile) {                              \
        case Profile::se:                                \
            return FUNCTION<A, Profile::se>(args);       \
        case Profile::matern12:                          \
            return FUNCTION<A, Profile::matern12>(args); \
        case Profile::matern32:                          \
            return FUNCTION<A, Profile::matern32>(args); \
        case Profile::matern52:                          \
            return FUNCTION<A, Profile::matern52>(args); \
    }

}  // namespace

void gram_forward(const GramForwardArgs &args) {
    if (args.dtype == DType::f64) FLOWOPS_BY_PROFILE(forward, double)
    FLOWOPS_BY_PROFILE(forward, float)
}

void gram_backward(const GramBackwardArgs &args) {
    if (args.dtype == DType::f64) FLOWOPS_BY_PROFILE(backward, double)
    FLOWOPS_BY_PROFILE(backward, float)
}

}  // namespace flowops::FLOWOPS_ISA
