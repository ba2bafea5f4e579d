// What bindings.cpp calls. Plain arrays, sizes and strides: no torch, no Python, no policy.
//
// Every kernel file is compiled once per instruction set into its own namespace (FLOWOPS_ISA);
// bindings.cpp picks one namespace when the module is loaded. Kernel files keep everything else in
// anonymous namespaces and call no standard-library templates, so that the linker can never fold
// code built for a wide instruction set into a function that runs on a narrow one.
#pragma once

#include <cstdint>

namespace flowops {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2 };

// Tensors are [B, T, C] with element strides for B and T and a contiguous last dimension; `params`
// is [B, T, 2C] (log-scale, shift) or [B, T, C] (shift only). Outputs are contiguous.
struct AffineArgs {
    DType x_dtype, params_dtype;
    int64_t B, T, C;
    bool has_scale, reverse;
    int threads;
    const void *x, *params;
    int64_t x_stride_b, x_stride_t, params_stride_b, params_stride_t;
};

// logdet is float, or double where the arithmetic is double. partial holds B * affine_chunks(T, C)
// doubles.
struct AffineForwardArgs : AffineArgs {
    void *z, *logdet;
    double *partial;
};

struct AffineBackwardArgs : AffineArgs {
    const void *grad_out;     // contiguous, x's dtype
    const void *grad_logdet;  // [B] or null
    void *grad_x, *grad_params;
};

struct AffineInverseArgs : AffineArgs {
    void *out;
};

enum class NoiseKind : int { words = 0, uniform = 1, normal = 2 };

// Rows `first_row` and on of a row-major matrix of width `width` under the noise contract
// (docs/noise.md).
struct NoiseArgs {
    uint64_t seed, offset;
    int64_t rows, width, first_row;
    NoiseKind kind;
    void *out;  // int64 for words, float otherwise; contiguous [rows, width]
    int threads;
};

struct PadNoiseArgs {
    DType dtype;
    uint64_t seed, offset;
    int64_t rows, features, pad;
    const void *x;  // [rows, features], contiguous last dimension
    int64_t x_stride;
    void *out;  // contiguous [rows, features + pad]
    double pad_scale, data_scale;
    int threads;
};

enum class GramOp : int { gram = 0, product = 1, coupling = 2, inverse = 3 };
enum class Profile : int { se = 0, matern12 = 1, matern32 = 2, matern52 = 3 };

// x [N, D] and half [N, O / 2] (x2 or y2 of a coupling, else null) have rows of their own stride
// and a contiguous last dimension; z [M, D], w [M, O] (O = 0 for the matrix itself), lengthscale
// ([D] or one) and all gradients are contiguous. Everything is float or double, as dtype says.
struct GramArgs {
    DType dtype;
    GramOp op;
    Profile profile;
    int64_t N, M, D, O;
    bool per_feature;  // lengthscale is [D]
    int threads;
    const void *x;
    int64_t x_stride;
    const void *half;
    int64_t half_stride;
    const void *z, *w, *lengthscale;
    void *scratch;  // gram_forward_scratch or gram_backward_scratch elements
};

// out is [N, M], [N, O] or [N, O / 2]; logdet [N] of a coupling, else null.
struct GramForwardArgs : GramArgs {
    void *out, *logdet;
};

// grad is that of out; grad_logdet, grad_half and grad_w are null where there is none.
struct GramBackwardArgs : GramArgs {
    const void *grad, *grad_logdet;
    void *grad_x, *grad_half, *grad_z, *grad_w, *grad_lengthscale;
    double *dlengthscale_partials;  // gram_chunks * (D or 1)
};

constexpr int64_t gram_block = 256;  // points that a strip of rows meets at once
constexpr int64_t gram_ld_block =
    gram_block + 16;                     // apart from powers of two, which share cache sets
constexpr int64_t gram_strip_rows = 32;  // at most; the widest registers hold 16 floats

inline int64_t gram_padded(int64_t n) {
    return (n + gram_strip_rows - 1) / gram_strip_rows * gram_strip_rows;
}

inline int64_t gram_points_elements(const GramArgs &a) {
    return 3 * gram_padded(a.D) + gram_padded(a.M * a.D) + a.D * gram_padded(a.M);
}

inline int64_t gram_forward_elements(const GramArgs &a) {
    return gram_strip_rows * (2 * gram_padded(a.D) + 2 * gram_padded(a.O) + 3 * gram_ld_block);
}

inline int64_t gram_backward_elements(const GramArgs &a) {
    return gram_forward_elements(a) +
           gram_strip_rows * (3 * gram_ld_block + 2 * gram_padded(a.O) + gram_padded(a.D));
}

// Runs of rows whose sums are kept apart: enough for many threads, few enough to stay small.
inline int64_t gram_chunks(const GramArgs &a) {
    const int64_t by_rows = (a.N + 127) / 128;
    const int64_t by_memory = (int64_t(1) << 23) / ((a.D + a.O) * gram_padded(a.M));
    const int64_t most = by_memory > 32 ? 32 : by_memory < 8 ? 8 : by_memory;
    return by_rows < most ? by_rows : most;
}

inline int64_t gram_forward_scratch(const GramArgs &a) {
    return gram_points_elements(a) + a.threads * gram_forward_elements(a);
}

inline int64_t gram_backward_scratch(const GramArgs &a) {
    return gram_points_elements(a) + gram_chunks(a) * (a.D + a.O) * gram_padded(a.M) +
           a.threads * gram_backward_elements(a);
}

// One block of a TarFlow to invert; shapes, packing and the solver in flowops/decode.py. Everything
// is contiguous; arithmetic is float, dtype is that of qkv, proj, up, down and w_out.
struct DecodeArgs {
    DType dtype;
    int64_t B, T, C, W, L, heads, E, P, window;
    bool guided, has_scale, reverse;
    float eps, scale, temperature, tol;
    double break_even;
    int threads;
    const float *z, *embed, *guide;
    const float *w_in, *position, *norm1;
    const void *qkv;
    const float *qkv_bias;
    const void *proj;
    const float *proj_bias, *norm2;
    const void *up;
    const float *up_bias;
    const void *down;
    const float *down_bias;
    const void *w_out;
    const float *b_out;
    float *x, *residual;
    int64_t *counts;  // wide sweeps, single steps
    void *workspace;  // decode_workspace floats, aligned to 64 bytes
};

constexpr int64_t decode_probe_sweeps = 8;
constexpr int64_t decode_own_rows = 64;

inline int64_t decode_padded(int64_t n) { return (n + 15) / 16 * 16; }

// Threads that share every product, and how many such teams share the images. A thread should have
// two panels of outputs at least in the narrowest product; where one team is all there is, one.
struct DecodeTeams {
    int64_t count, size;
};

inline DecodeTeams decode_teams(const DecodeArgs &a, int64_t threads) {
    int64_t size = a.W / 32 < 1 ? 1 : a.W / 32;
    size = size < threads ? size : threads;
    int64_t count = threads / size;
    count = count < a.B ? count : a.B;
    if (count == 1) size = a.W / 16 < threads ? a.W / 16 : threads;
    return {count, size};
}

inline int64_t decode_rows(const DecodeArgs &a) {
    const int64_t window = a.window < a.T - 1 ? a.window : a.T - 1;
    return a.B * (a.guided ? 2 : 1) * window;
}

inline int64_t decode_thread_elements(const DecodeArgs &a) {
    return decode_padded(decode_own_rows * a.W) + decode_padded(a.T) +
           decode_padded(2 * decode_rows(a));
}

inline int64_t decode_workspace(const DecodeArgs &a) {
    const int64_t rows = decode_rows(a), cache = (a.guided ? 2 : 1) * a.B * a.L * a.W;
    return 2 * decode_padded(cache * decode_padded(a.T)) + 3 * decode_padded(rows * a.W) +
           decode_padded(rows * 3 * a.W) + decode_padded(rows * a.E) +
           decode_padded(rows * decode_padded(a.P)) + decode_padded(2 * a.B) +
           (a.threads < 1 ? 1 : a.threads) * decode_thread_elements(a);
}

// Work is cut at fixed places that depend on sizes alone, so results do not depend on threads.
constexpr int64_t affine_chunk_elements = 8192;

inline int64_t affine_chunk_tokens(int64_t C) {
    return C >= affine_chunk_elements ? 1 : affine_chunk_elements / C;
}

inline int64_t affine_chunks(int64_t T, int64_t C) {
    const int64_t tokens = affine_chunk_tokens(C);
    return (T + tokens - 1) / tokens;
}

struct Kernels {
    const char *isa;
    void (*affine_forward)(const AffineForwardArgs &);
    void (*affine_backward)(const AffineBackwardArgs &);
    void (*affine_inverse)(const AffineInverseArgs &);
    void (*affine_inverse_backward)(const AffineBackwardArgs &);
    void (*noise)(const NoiseArgs &);
    void (*pad_noise)(const PadNoiseArgs &);
    void (*gram_forward)(const GramForwardArgs &);
    void (*gram_backward)(const GramBackwardArgs &);
    void (*decode)(const DecodeArgs &);
};

#define FLOWOPS_DECLARE_KERNELS(ISA)                          \
    namespace ISA {                                           \
    void affine_forward(const AffineForwardArgs &);           \
    void affine_backward(const AffineBackwardArgs &);         \
    void affine_inverse(const AffineInverseArgs &);           \
    void affine_inverse_backward(const AffineBackwardArgs &); \
    void noise(const NoiseArgs &);                            \
    void pad_noise(const PadNoiseArgs &);                     \
    void gram_forward(const GramForwardArgs &);               \
    void gram_backward(const GramBackwardArgs &);             \
    void decode(const DecodeArgs &);                          \
    }

#define FLOWOPS_KERNELS(ISA)                                                                 \
    Kernels {                                                                                \
        #ISA, &ISA::affine_forward, &ISA::affine_backward, &ISA::affine_inverse,             \
            &ISA::affine_inverse_backward, &ISA::noise, &ISA::pad_noise, &ISA::gram_forward, \
            &ISA::gram_backward, &ISA::decode                                                \
    }

}  // namespace flowops
