// The autoregressive affine step, formulas in docs/affine.md:
//     z_i = (x_i - b_{i-1}) exp(-a_{i-1}),  logdet = -sum a_{i-1},  a_{-1} = b_{-1} = 0
// Position s of the token order reads params row s-1 and x, z row s, or row T-1-s under `reverse`.

#include "kernels.h"
#include "simd.h"

namespace flowops::FLOWOPS_ISA {
namespace {

// Compensated (Kahan) sums, one a lane: long sums of like terms stay as good as short ones.
template <class A>
struct LaneSums {
    A sum[16] = {}, excess[16] = {};

    template <int N>
    void subtract(vec<A, N> value) {
        const auto old = load_raw<N>(sum);
        const auto term = -value - load_raw<N>(excess);
        const auto next = old + term;
        const vec<A, N> none = {};
        // Next to an infinity there is nothing to compensate; inf - inf would make it a NaN.
        store_raw<N>(excess, next - next == none ? (next - old) - term : none);
        store_raw<N>(sum, next);
    }

    double total() const {
        double total = 0;
        for (int i = 0; i < 16; ++i) total += double(sum[i]) - double(excess[i]);
        return total;
    }
};

// One token of each direction; all pointers are to C contiguous elements. `a` is null where the
// update preserves volume.
template <class X, class P, class A>
inline void update_token(const X *x, const P *a, const P *b, X *z, int64_t C, LaneSums<A> &sums) {
    for_spans<A>(C, [=, &sums](int64_t c, auto length) {
        constexpr int N = decltype(length)::value;
        using Io = Convert<A, N>;
        auto value = Io::load(x + c) - Io::load(b + c);
        if (a) {
            const auto log_scale = Io::load(a + c);
            value *= exponential<N>(-log_scale);
            sums.template subtract<N>(log_scale);
        }
        Io::store(z + c, value);
    });
}

template <class X, class P, class A>
inline void update_token_backward(const X *x, const P *a, const P *b, const X *grad_z,
                                  A grad_logdet, X *grad_x, P *grad_a, P *grad_b, int64_t C) {
    for_spans<A>(C, [=](int64_t c, auto length) {
        constexpr int N = decltype(length)::value;
        using Io = Convert<A, N>;
        auto scaled = Io::load(grad_z + c);
        if (a) {
            scaled *= exponential<N>(-Io::load(a + c));
            const auto centred = Io::load(x + c) - Io::load(b + c);
            Io::store(grad_a + c, -scaled * centred - grad_logdet);
        }
        Io::store(grad_x + c, scaled);
        Io::store(grad_b + c, -scaled);
    });
}

template <class X, class P>
inline void invert_token(const X *z, const P *a, const P *b, X *x, int64_t C) {
    using A = typename compute<X>::type;
    for_spans<A>(C, [=](int64_t c, auto length) {
        constexpr int N = decltype(length)::value;
        using Io = Convert<A, N>;
        auto value = Io::load(z + c);
        if (a) value *= exponential<N>(Io::load(a + c));
        Io::store(x + c, value + Io::load(b + c));
    });
}

template <class X, class P, class A>
inline void invert_token_backward(const X *z, const P *a, const P *, const X *grad_x, A, X *grad_z,
                                  P *grad_a, P *grad_b, int64_t C) {
    for_spans<A>(C, [=](int64_t c, auto length) {
        constexpr int N = decltype(length)::value;
        using Io = Convert<A, N>;
        const auto grad = Io::load(grad_x + c);
        auto scaled = grad;
        if (a) {
            scaled *= exponential<N>(Io::load(a + c));
            Io::store(grad_a + c, scaled * Io::load(z + c));
        }
        Io::store(grad_z + c, scaled);
        Io::store(grad_b + c, grad);
    });
}

// Calls body(batch, chunk, first, last) for every run of token positions, in parallel.
template <class Body>
inline void for_chunks(const AffineArgs &args, Body body) {
    const int64_t tokens = affine_chunk_tokens(args.C);
    const int64_t chunks = affine_chunks(args.T, args.C);
    const int64_t count = args.B * chunks;
    const int threads = args.B * args.T * args.C < 32768 ? 1 : args.threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t chunk = i % chunks;
        const int64_t first = chunk * tokens;
        body(i / chunks, chunk, first, first + tokens < args.T ? first + tokens : args.T);
    }
}

template <class X>
inline void copy(const X *from, X *to, int64_t C) {
    for (int64_t c = 0; c < C; ++c) to[c] = from[c];
}

// Row pointers at batch `b`, position `s`.
template <class X, class P>
struct Rows {
    const AffineArgs &args;
    int64_t row(int64_t s) const { return args.reverse ? args.T - 1 - s : s; }
    int64_t dense(int64_t b, int64_t s) const { return (b * args.T + row(s)) * args.C; }
    const X *x(int64_t b, int64_t s) const {
        return static_cast<const X *>(args.x) + b * args.x_stride_b + row(s) * args.x_stride_t;
    }
    const P *params(int64_t b, int64_t s) const {
        return static_cast<const P *>(args.params) + b * args.params_stride_b +
               s * args.params_stride_t;
    }
    const P *scale(const P *p) const { return args.has_scale ? p : nullptr; }
    const P *shift(const P *p) const { return args.has_scale ? p + args.C : p; }
};

template <class X, class P>
void forward(const AffineForwardArgs &args) {
    using A = typename compute<X>::type;
    const Rows<X, P> rows{args};
    const int64_t chunks = affine_chunks(args.T, args.C);
    for_chunks(args, [&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
        LaneSums<A> sums;
        for (int64_t s = first; s < last; ++s) {
            X *z = static_cast<X *>(args.z) + rows.dense(b, s);
            if (s == 0) {
                copy(rows.x(b, 0), z, args.C);
                continue;
            }
            const P *p = rows.params(b, s - 1);
            update_token(rows.x(b, s), rows.scale(p), rows.shift(p), z, args.C, sums);
        }
        args.partial[b * chunks + chunk] = sums.total();
    });
    for (int64_t b = 0; b < args.B; ++b) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += args.partial[b * chunks + chunk];
        static_cast<A *>(args.logdet)[b] = A(sum);
    }
}

template <class X, class P>
void inverse(const AffineInverseArgs &args) {
    const Rows<X, P> rows{args};
    for_chunks(args, [&](int64_t b, int64_t, int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s) {
            X *out = static_cast<X *>(args.out) + rows.dense(b, s);
            if (s == 0) {
                copy(rows.x(b, 0), out, args.C);
                continue;
            }
            const P *p = rows.params(b, s - 1);
            invert_token(rows.x(b, s), rows.scale(p), rows.shift(p), out, args.C);
        }
    });
}

// Backward of either direction; `token` is update_token_backward or invert_token_backward.
template <class X, class P, class Token>
void backward(const AffineBackwardArgs &args, Token token) {
    using A = typename compute<X>::type;
    const Rows<X, P> rows{args};
    const int64_t width = args.has_scale ? 2 * args.C : args.C;
    for_chunks(args, [&](int64_t b, int64_t, int64_t first, int64_t last) {
        const A grad_logdet = args.grad_logdet ? static_cast<const A *>(args.grad_logdet)[b] : A(0);
        for (int64_t s = first; s < last; ++s) {
            const X *grad_out = static_cast<const X *>(args.grad_out) + rows.dense(b, s);
            X *grad_x = static_cast<X *>(args.grad_x) + rows.dense(b, s);
            P *grad_params = static_cast<P *>(args.grad_params) + (b * args.T + s) * width;
            if (s == 0) {
                // Position 0 passes through; the params row that no token reads is the last one.
                copy(grad_out, grad_x, args.C);
                P *unused = grad_params + (args.T - 1) * width;
                for (int64_t c = 0; c < width; ++c) unused[c] = P{};
                continue;
            }
            const P *p = rows.params(b, s - 1);
            P *grad_p = grad_params - width;
            token(rows.x(b, s), rows.scale(p), rows.shift(p), grad_out, grad_logdet, grad_x, grad_p,
                  args.has_scale ? grad_p + args.C : grad_p, args.C);
        }
    });
}

template <class X, class P>
void update_backward(const AffineBackwardArgs &args) {
    backward<X, P>(args, [](auto... a) { update_token_backward(a...); });
}

template <class X, class P>
void inverse_backward(const AffineBackwardArgs &args) {
    backward<X, P>(args, [](auto... a) { invert_token_backward(a...); });
}

}  // namespace

// Storage types: x and params alike, or x in fp32 with params in bf16 (autocast).
#define FLOWOPS_BY_DTYPE(FUNCTION, ARGS)                                          \
    switch (ARGS.x_dtype) {                                                       \
        case DType::f64:                                                          \
            return FUNCTION<double, double>(ARGS);                                \
        case DType::bf16:                                                         \
            return FUNCTION<bf16, bf16>(ARGS);                                    \
        case DType::f32:                                                          \
            return ARGS.params_dtype == DType::f32 ? FUNCTION<float, float>(ARGS) \
                                                   : FUNCTION<float, bf16>(ARGS); \
    }

void affine_forward(const AffineForwardArgs &args) { FLOWOPS_BY_DTYPE(forward, args) }
void affine_backward(const AffineBackwardArgs &args) { FLOWOPS_BY_DTYPE(update_backward, args) }
void affine_inverse(const AffineInverseArgs &args) { FLOWOPS_BY_DTYPE(inverse, args) }
void affine_inverse_backward(const AffineBackwardArgs &args) {
    FLOWOPS_BY_DTYPE(inverse_backward, args)
}

}  // namespace flowops::FLOWOPS_ISA
