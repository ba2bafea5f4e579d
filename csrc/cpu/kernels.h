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

// Rows are those of a row-major matrix of width `width` under the noise contract (docs/noise.md).
struct NoiseArgs {
    uint64_t seed, offset;
    int64_t rows, width;
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
};

#define FLOWOPS_DECLARE_KERNELS(ISA)                          \
    namespace ISA {                                           \
    void affine_forward(const AffineForwardArgs &);           \
    void affine_backward(const AffineBackwardArgs &);         \
    void affine_inverse(const AffineInverseArgs &);           \
    void affine_inverse_backward(const AffineBackwardArgs &); \
    void noise(const NoiseArgs &);                            \
    void pad_noise(const PadNoiseArgs &);                     \
    }

#define FLOWOPS_KERNELS(ISA)                                                     \
    Kernels {                                                                    \
        #ISA, &ISA::affine_forward, &ISA::affine_backward, &ISA::affine_inverse, \
            &ISA::affine_inverse_backward, &ISA::noise, &ISA::pad_noise          \
    }

}  // namespace flowops
