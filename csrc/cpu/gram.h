// What the forward and backward passes of kernel matrices share, formulas in docs/gram.md. K is
// never stored but by the op that returns it: a strip of rows, two registers wide, meets a block of
// points that stays in cache. Only differences of points are ever taken, and what points are scaled
// by before is a power of two: far from zero they are as good as centred ones.
#pragma once

#include "gram_tiles.h"

namespace flowops::FLOWOPS_ISA {
namespace {

// --- k and dk/dS ---------------------------------------------------------------------------------

// NaN stays. Every kernel is 0 long before the limits set here, and 0 times a limit is no NaN.
template <class A>
inline Register<A> at_most(A limit, Register<A> v) {
    const Register<A> most = Register<A>{} + limit;
    return v > most ? most : v;
}

// e^(-rate u) for 0 <= u <= cap, where it leaves the normal range and is 0. NaN for NaN, 1 for 0.
template <class A>
struct Decay {
    A rate, rest, cap;  // rest: what rounding took of the rate

    explicit Decay(double r) : rate(A(-r)), rest(A(-r - double(rate))), cap(A(750 / r)) {}

    Register<A> operator()(Register<A> u) const {
        return exponential<lanes<A>>(u * rate + u * rest);
    }
};

// 2^t = 2^n 2^f with n = round(t): adding `magic` leaves n + 127 in the low bits, so that shifting
// them up gives 2^n, and 0 for n = -127 where the cap is. Relative error of the polynomial 2e-8.
template <>
struct Decay<float> {
    float rate, rest, cap;

    explicit Decay(double r)
        : rate(float(r * -1.4426950408889634)),
          rest(float(r * -1.4426950408889634 - double(rate))),
          cap(float(127 / (r * 1.4426950408889634))) {}

    Register<float> operator()(Register<float> u) const {
        using V = Register<float>;
        constexpr float magic = 12582912.f + 127.f;  // 1.5 * 2^23 + 127
        const V shifted = u * rate + magic, n = shifted - magic;
        const V f = (u * rate - n) + u * rest;
        V p = f * 1.5353359e-4f + 1.3398875e-3f;
        p = p * f + 9.618437e-3f;
        p = p * f + 5.5503324e-2f;
        p = p * f + 2.4022648e-1f;
        p = p * f + 6.931472e-1f;
        p = p * f + 1.f;
        const auto bits = __builtin_bit_cast(vec<int32_t, lanes<float>>, shifted) << 23;
        return p * __builtin_bit_cast(V, bits);
    }
};

template <class A>
inline Register<A> root(Register<A> S) {
    Register<A> r;
    for (int i = 0; i < lanes<A>; ++i) r[i] = std::sqrt(S[i]);
    return r;
}

// --- one problem ---------------------------------------------------------------------------------

// dk/dS of the squared-exponential kernel is this times k; others have a tile of their own.
inline double slope_factor(const GramArgs &args) { return args.profile == Profile::se ? -0.5 : 1; }

// What all strips share. Feature d of x and z is multiplied by up[d], the power of two next to
// 1 / lengthscale, and what is left of 1 / lengthscale^2 is q[d], or q_all for all features. pull
// is difference_factor.
template <class A>
struct Points {
    const GramArgs &args;
    int64_t ld_features, ld_points;
    A *up, *q, *pull, *z, *zT;  // [D], [D], [D], [M][D], [D][ld_points]
    double q_all = 1;

    Points(const GramArgs &a, A *&scratch)
        : args(a), ld_features(padded<A>(a.D)), ld_points(padded<A>(a.M)) {
        const A *lengthscale = static_cast<const A *>(a.lengthscale);
        up = scratch;
        q = up + ld_features;
        pull = q + ld_features;
        z = pull + ld_features;
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
            if (!a.per_feature) q_all = rest * rest;
            pull[d] = A(difference_factor(d));
        }
        const A *points = static_cast<const A *>(a.z);
        for (int64_t d = 0; d < a.D; ++d) {
            for (int64_t m = 0; m < a.M; ++m)
                zT[d * ld_points + m] = z[m * a.D + d] = points[m * a.D + d] * up[d];
            for (int64_t m = a.M; m < ld_points; ++m) zT[d * ld_points + m] = 0;
        }
    }

    // dk/dx is this times the slope and (z - x), as those are kept.
    double difference_factor(int64_t d) const {
        return -2 * slope_factor(args) * (args.per_feature ? double(q[d]) : q_all) * double(up[d]);
    }
};

// One strip of rows: the buffers of one thread, and the steps that fill them.
template <class A>
struct Strip {
    static constexpr int64_t R = strip_rows<A>;
    static constexpr Constant<R> ld_rows = {};
    static constexpr Constant<gram_ld_block> ld_block = {};

    const GramArgs &args;
    const Points<A> &points;
    const int64_t ld_features, ld_outputs;
    int64_t first = 0, rows = 0;  // rows of the problem that this strip holds
    A *xs, *xT;                   // [R][ld_features], [ld_features][R]
    A *S, *K;                     // [gram_block][R]
    A *outT, *out;                // [ld_outputs][R], [R][ld_outputs]
    A *rowwise;                   // [R][ld_block], K as rows

    Strip(const Points<A> &p, A *&scratch)
        : args(p.args), points(p), ld_features(p.ld_features), ld_outputs(padded<A>(args.O)) {
        xs = take(scratch, R * ld_features);
        xT = take(scratch, R * ld_features);
        S = take(scratch, R * gram_block);
        K = take(scratch, R * gram_block);
        outT = take(scratch, R * ld_outputs);
        out = take(scratch, R * ld_outputs);
        rowwise = take(scratch, R * ld_block);
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
        transpose(xs, ld_features, xT, ld_rows, R, ld_features);
    }

    int64_t count(int64_t m0) const { return args.M - m0 < gram_block ? args.M - m0 : gram_block; }

    // K of the block of points from m0 on. For a backward pass also dk/dS over slope_factor, in
    // slope_tile(slope), and in S the squared distances over q_all.
    void kernel_tile(int64_t m0, A *slope = nullptr) {
        const int64_t n = count(m0);
        for_groups(n, [&](int64_t i, auto length) {
            using Tile = Sums<A, decltype(length)::value>;
            const A *z = points.z + (m0 + i) * args.D;
            if (args.per_feature)
                Tile::template squares<true>(args.D, z, args.D, xT, R, points.q)
                    .store(S + i * R, R);
            else
                Tile::template squares<false>(args.D, z, args.D, xT, R, nullptr)
                    .store(S + i * R, R);
        });
        switch (args.profile) {
            case Profile::se:
                return squared_exponential(n * R, slope != nullptr);
            case Profile::matern12:
                return matern(n * R, slope, 1, [](auto t, auto e, auto) {
                    const Register<A> none = {};
                    // A kink at 0: the slope there is taken as 0.
                    return Values{e, t > none ? e / (t * A(-2)) : none};
                });
            case Profile::matern32:
                return matern(n * R, slope, 3, [](auto t, auto e, auto one) {
                    return Values{(one + t) * e, e * A(-1.5)};
                });
            case Profile::matern52:
                return matern(n * R, slope, 5, [](auto t, auto e, auto one) {
                    return Values{(one + t + t * t * A(1. / 3)) * e, (one + t) * e * A(-5. / 6)};
                });
        }
    }

    A *slope_tile(A *slope) const { return args.profile == Profile::se ? K : slope; }

    // outT[o] += sum_m w[m][o] K[m] for the first `columns` columns of w; the first block sets it.
    void add_outputs(int64_t m0, int64_t columns) {
        for_groups(columns, [&](int64_t o, auto length) {
            const A *w = static_cast<const A *>(args.w) + m0 * args.O + o;
            const auto sums =
                Sums<A, decltype(length)::value>::products(count(m0), w, 1, args.O, K, R);
            if (m0 == 0)
                sums.store(outT + o * R, R);
            else
                sums.add_to(outT + o * R, R);
        });
    }

    void outputs_as_rows(int64_t columns) {
        transpose(outT, ld_rows, out, ld_outputs, padded<A>(columns), R);
    }

private:
    struct Values {
        Register<A> k, slope;
    };

    void squared_exponential(int64_t n, bool keep_distances) {
        const Decay<A> decay(points.q_all / 2);
        for (int64_t i = 0; i < n; i += lanes<A>) {
            const Register<A> s = at_most(decay.cap, load_raw<lanes<A>>(S + i));
            if (keep_distances) store_raw<lanes<A>>(S + i, s);
            store_raw<lanes<A>>(K + i, decay(s));
        }
    }

    // k and dk/dS as functions of t = sqrt(squared * S) and e^-t.
    template <class Function>
    void matern(int64_t n, A *slope, int squared, Function function) {
        const Decay<A> decay(1);
        const double scale = points.q_all * squared;
        const A factor = A(scale), rest = A(scale - double(factor));
        const Register<A> one = Register<A>{} + A(1);
        for (int64_t i = 0; i < n; i += lanes<A>) {
            const Register<A> s = at_most(A(1e12), load_raw<lanes<A>>(S + i));
            if (slope) store_raw<lanes<A>>(S + i, s);
            const Register<A> t = at_most(decay.cap, root<A>(s * factor + s * rest));
            const Values values = function(t, decay(t), one);
            store_raw<lanes<A>>(K + i, values.k);
            if (slope) store_raw<lanes<A>>(slope + i, values.slope);
        }
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

}  // namespace
}  // namespace flowops::FLOWOPS_ISA
