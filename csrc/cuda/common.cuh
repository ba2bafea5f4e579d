// What all kernels share: types, storage conversions and the launch convention.
//
// A .cu file is compiled by nvcc, by NVRTC, which has no headers of its own, and as C++ for the CPU
// by the emulator of the tests (tests/emulator), which brings its own words for CUDA's builtins. So
// no system header is included anywhere here.
#pragma once

using i64 = long long;
using u32 = unsigned int;
using u64 = unsigned long long;

#define CORE __host__ __device__ __forceinline__
#define DEVICE __device__ __forceinline__

#ifndef FLOWOPS_EMULATE
// Opens the definition of kernel `name`. A kernel takes one block of arguments, `args`, all of
// whose fields are eight bytes wide (pointers, i64, double): flowops/cuda_runtime.py packs them in
// order.
#define FLOWOPS_KERNEL(name, Arguments, threads, blocks_per_sm)          \
    extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) \
        name(const __grid_constant__ Arguments args)

// The dynamic shared memory of the block; there is no other.
DEVICE unsigned char *shared_memory() {
    extern __shared__ __align__(1024) unsigned char flowops_shared[];
    return flowops_shared;
}
#endif

// --- storage ------------------------------------------------------------------------------------

struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};

// The type of the arithmetic: fp32 whatever the storage, fp64 for fp64.
template <class T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

#ifndef FLOWOPS_EMULATE
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float x) { return __float_as_uint(x); }
DEVICE float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE f16 narrow_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
DEVICE bf16 narrow_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
#else
inline float widen(f16 x) { return from_f16(x); }
inline f16 narrow_f16(float x) { return to_f16<f16>(x); }
inline bf16 narrow_bf16(float x) { return to_bf16<bf16>(x); }
#endif

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
DEVICE float widen(bf16 x) { return as_float(static_cast<u32>(x.bits) << 16); }

template <class T, class C>
DEVICE T narrow(C x) {
    return static_cast<T>(x);
}
template <>
DEVICE bf16 narrow<bf16, float>(float x) {
    return narrow_bf16(x);
}
template <>
DEVICE f16 narrow<f16, float>(float x) {
    return narrow_f16(x);
}

// --- vectors ------------------------------------------------------------------------------------

// N elements that are moved at once; pointers to it must be multiples of its size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    T at[N];
};

template <class T, int N>
DEVICE Vec<T, N> load_vec(const T *from) {
#ifdef FLOWOPS_EMULATE
    check_aligned(from, sizeof(T) * N);
#endif
    return *reinterpret_cast<const Vec<T, N> *>(from);
}

template <class T, int N>
DEVICE void store_vec(T *to, const Vec<T, N> &values) {
#ifdef FLOWOPS_EMULATE
    check_aligned(to, sizeof(T) * N);
#endif
    *reinterpret_cast<Vec<T, N> *>(to) = values;
}

// --- warps --------------------------------------------------------------------------------------

template <class T>
DEVICE T warp_sum(T x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

DEVICE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
