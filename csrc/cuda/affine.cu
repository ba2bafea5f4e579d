// The affine step of flowops/affine.py: one pass over x and the parameters, forward and backward.
//
// A batch row's T * C elements are cut into chunks. The blocks, no more than fit on the GPU, take
// one chunk after the other. The log-determinant leaves as one partial sum a chunk, in an order
// that does not depend on the grid. Bound by memory: in fp32 16 bytes an element forward and 28
// backward, moved 16 at a time, against some 120 instructions for four elements.
#include "common.cuh"

struct AffineForward {
    const void *x, *params;
    void *out, *partial;
    i64 B, T, C, chunks, has_scale, reverse;
    i64 stride_xb, stride_xt, stride_pb, stride_pt;
};

struct AffineBackward {
    const void *grad, *grad_logdet, *x, *params;
    void *grad_x, *grad_params;
    i64 B, T, C, chunks, has_scale, reverse;
    i64 stride_xb, stride_xt, stride_pb, stride_pt;
};

constexpr int THREADS = 256;

// --- the arithmetic -----------------------------------------------------------------------------

CORE float exponential(float x) { return expf(x); }
CORE double exponential(double x) { return exp(x); }

template <bool INVERSE, class C>
CORE C affine_step(C x, C a, C b) {
    return INVERSE ? x * exponential(a) + b : (x - b) * exponential(-a);
}

// Gradients to x, a and b for that of the output, and of the log-determinant, which is -sum(a).
template <bool INVERSE, class C>
CORE void affine_gradients(C grad, C grad_logdet, C x, C a, C b, C &grad_x, C &grad_a, C &grad_b) {
    if constexpr (INVERSE) {
        grad_x = grad * exponential(a);
        grad_a = grad_x * x;
        grad_b = grad;
    } else {
        grad_x = grad * exponential(-a);
        grad_a = -grad_x * (x - b) - grad_logdet;
        grad_b = -grad_x;
    }
}

// --- where elements are -------------------------------------------------------------------------

// Elements e.. of a batch row: their token and channel, and the token whose parameters they take
// (-1: none). V of them share the token.
struct Place {
    i64 token, channel, source;
};

template <class Arguments>
DEVICE Place place(const Arguments &args, u32 e) {
    u32 C = args.C, token = e / C;
    i64 source = args.reverse ? args.T - 2 - i64(token) : i64(token) - 1;
    return {token, e - token * C, source};
}

// a and b of V elements, 0 where there are none.
template <int V, class P, class C, class Arguments>
DEVICE void load_params(const Arguments &args, i64 b, const Place &at, C (&a)[V], C (&shift)[V]) {
#pragma unroll
    for (int i = 0; i < V; i++) a[i] = shift[i] = 0;
    if (at.source < 0) return;
    const P *params = static_cast<const P *>(args.params) + b * args.stride_pb +
                      at.source * args.stride_pt + at.channel;
    if (args.has_scale) {
        Vec<P, V> values = load_vec<P, V>(params);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] = widen(values.at[i]);
        params += args.C;
    }
    Vec<P, V> values = load_vec<P, V>(params);
#pragma unroll
    for (int i = 0; i < V; i++) shift[i] = widen(values.at[i]);
}

// The sum of all threads' values, at thread 0.
template <class C>
DEVICE C block_sum(C x) {
    C *shared = reinterpret_cast<C *>(shared_memory());
    x = warp_sum(x);
    __syncthreads();  // the sum before this one has been read
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x < THREADS / 32 ? shared[threadIdx.x] : C(0);
    return threadIdx.x < 32 ? warp_sum(x) : x;
}

// --- kernels ------------------------------------------------------------------------------------

template <class X, class P, int V, bool INVERSE>
DEVICE void forward(const AffineForward &args) {
    using C = decltype(Compute<X>() + Compute<P>());
    u32 elements = args.T * args.C;
    u32 chunk = ceil_div(elements, args.chunks * V) * V;
    for (i64 unit = blockIdx.x; unit < args.B * args.chunks; unit += gridDim.x) {
        i64 b = unit / args.chunks;
        u32 first = (unit - b * args.chunks) * chunk, last = min(first + chunk, elements);
        const X *x = static_cast<const X *>(args.x) + b * args.stride_xb;
        X *out = static_cast<X *>(args.out) + b * elements;
        C sum = 0;
        for (u32 e = first + threadIdx.x * V; e < last; e += THREADS * V) {
            Place at = place(args, e);
            C a[V], shift[V];
            load_params<V, P>(args, b, at, a, shift);
            Vec<X, V> from = load_vec<X, V>(x + at.token * args.stride_xt + at.channel), to;
#pragma unroll
            for (int i = 0; i < V; i++) {
                to.at[i] = narrow<X>(affine_step<INVERSE>(C(widen(from.at[i])), a[i], shift[i]));
                sum -= a[i];
            }
            store_vec(out + e, to);
        }
        if (!INVERSE && args.has_scale) {
            sum = block_sum(sum);
            if (threadIdx.x == 0) static_cast<C *>(args.partial)[unit] = sum;
        }
    }
}

template <class X, class P, int V, bool INVERSE>
DEVICE void backward(const AffineBackward &args) {
    using C = decltype(Compute<X>() + Compute<P>());
    u32 elements = args.T * args.C;
    u32 chunk = ceil_div(elements, args.chunks * V) * V;
    i64 width = args.has_scale ? 2 * args.C : args.C;
    for (i64 unit = blockIdx.x; unit < args.B * args.chunks; unit += gridDim.x) {
        i64 b = unit / args.chunks;
        u32 first = (unit - b * args.chunks) * chunk, last = min(first + chunk, elements);
        const X *x = static_cast<const X *>(args.x) + b * args.stride_xb;
        const X *grad = static_cast<const X *>(args.grad) + b * elements;
        X *grad_x = static_cast<X *>(args.grad_x) + b * elements;
        C grad_logdet = INVERSE ? C(0) : static_cast<const C *>(args.grad_logdet)[b];
        for (u32 e = first + threadIdx.x * V; e < last; e += THREADS * V) {
            Place at = place(args, e);
            C a[V], shift[V];
            load_params<V, P>(args, b, at, a, shift);
            Vec<X, V> from = load_vec<X, V>(x + at.token * args.stride_xt + at.channel);
            Vec<X, V> grads = load_vec<X, V>(grad + e), to;
            Vec<P, V> to_a, to_shift;
            bool known = at.source >= 0;
#pragma unroll
            for (int i = 0; i < V; i++) {
                C gx, ga, gb;
                affine_gradients<INVERSE>(C(widen(grads.at[i])), grad_logdet, C(widen(from.at[i])),
                                          a[i], shift[i], gx, ga, gb);
                to.at[i] = narrow<X>(gx);
                to_a.at[i] = narrow<P>(known ? ga : C(0));
                to_shift.at[i] = narrow<P>(known ? gb : C(0));
            }
            store_vec(grad_x + e, to);
            // The first token's place goes to the last parameters, which nothing uses: zeros.
            P *grad_params = static_cast<P *>(args.grad_params) +
                             (b * args.T + (known ? at.source : args.T - 1)) * width + at.channel;
            if (args.has_scale) {
                store_vec(grad_params, to_a);
                grad_params += args.C;
            }
            store_vec(grad_params, to_shift);
        }
    }
}

#define AFFINE(tag, X, P, V)                                                           \
    FLOWOPS_KERNEL(affine_update_##tag##_v##V, AffineForward, THREADS, 4) {            \
        forward<X, P, V, false>(args);                                                 \
    }                                                                                  \
    FLOWOPS_KERNEL(affine_inverse_##tag##_v##V, AffineForward, THREADS, 4) {           \
        forward<X, P, V, true>(args);                                                  \
    }                                                                                  \
    FLOWOPS_KERNEL(affine_update_backward_##tag##_v##V, AffineBackward, THREADS, 4) {  \
        backward<X, P, V, false>(args);                                                \
    }                                                                                  \
    FLOWOPS_KERNEL(affine_inverse_backward_##tag##_v##V, AffineBackward, THREADS, 4) { \
        backward<X, P, V, true>(args);                                                 \
    }

// x and params: fp32 with 16-bit parameters is what autocast makes.
AFFINE(f32_f32, float, float, 1)
AFFINE(f32_f32, float, float, 4)
AFFINE(f32_bf16, float, bf16, 1)
AFFINE(f32_bf16, float, bf16, 4)
AFFINE(f32_f16, float, f16, 1)
AFFINE(f32_f16, float, f16, 4)
AFFINE(bf16_bf16, bf16, bf16, 1)
AFFINE(bf16_bf16, bf16, bf16, 4)
AFFINE(bf16_bf16, bf16, bf16, 8)
AFFINE(f16_f16, f16, f16, 1)
AFFINE(f16_f16, f16, f16, 4)
AFFINE(f16_f16, f16, f16, 8)
AFFINE(f64_f64, double, double, 1)
AFFINE(f64_f64, double, double, 2)
