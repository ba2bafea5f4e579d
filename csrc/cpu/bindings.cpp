// flowops._C: CPU kernels behind raw pointers. Checks live in Python (flowops/); what arrives here
// is trusted. One table of kernels per instruction set; the widest that this processor runs is
// picked when the module is loaded.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace flowops {

FLOWOPS_DECLARE_KERNELS(baseline)
#ifdef FLOWOPS_X86_LEVELS
FLOWOPS_DECLARE_KERNELS(v3)
FLOWOPS_DECLARE_KERNELS(v4)
#endif

namespace {

std::vector<Kernels> supported_kernels() {
    std::vector<Kernels> tables{FLOWOPS_KERNELS(baseline)};
#ifdef FLOWOPS_X86_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
        tables.push_back(FLOWOPS_KERNELS(v3));
    if (tables.size() == 2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        tables.push_back(FLOWOPS_KERNELS(v4));
#endif
    return tables;
}

const std::vector<Kernels> &available() {
    static const std::vector<Kernels> tables = supported_kernels();
    return tables;
}

Kernels active = available().back();

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels &table : available()) names.emplace_back(table.isa);
    return names;
}

void set_isa(const std::string &name) {
    for (const Kernels &table : available())
        if (name == table.isa) {
            active = table;
            return;
        }
    throw std::invalid_argument("isa: '" + name + "' does not run on this processor");
}

using Address = uintptr_t;

template <class T>
T *at(Address address) {
    return reinterpret_cast<T *>(address);
}

// The arguments that every affine kernel takes, in the order of flowops/affine.py.
template <class Args>
Args affine_args(int x_dtype, int params_dtype, int64_t B, int64_t T, int64_t C, bool has_scale,
                 bool reverse, int threads, Address x, int64_t x_stride_b, int64_t x_stride_t,
                 Address params, int64_t params_stride_b, int64_t params_stride_t) {
    Args args{};
    args.x_dtype = DType(x_dtype);
    args.params_dtype = DType(params_dtype);
    args.B = B;
    args.T = T;
    args.C = C;
    args.has_scale = has_scale;
    args.reverse = reverse;
    args.threads = threads;
    args.x = at<const void>(x);
    args.x_stride_b = x_stride_b;
    args.x_stride_t = x_stride_t;
    args.params = at<const void>(params);
    args.params_stride_b = params_stride_b;
    args.params_stride_t = params_stride_t;
    return args;
}

void affine_forward(int xd, int pd, int64_t B, int64_t T, int64_t C, bool has_scale, bool reverse,
                    int threads, Address x, int64_t xb, int64_t xt, Address params, int64_t pb,
                    int64_t pt, Address z, Address logdet) {
    auto args = affine_args<AffineForwardArgs>(xd, pd, B, T, C, has_scale, reverse, threads, x, xb,
                                               xt, params, pb, pt);
    std::vector<double> partial(size_t(B * affine_chunks(T, C)));
    args.z = at<void>(z);
    args.logdet = at<void>(logdet);
    args.partial = partial.data();
    py::gil_scoped_release release;
    active.affine_forward(args);
}

template <void (*Kernels::*kernel)(const AffineBackwardArgs &)>
void affine_backward(int xd, int pd, int64_t B, int64_t T, int64_t C, bool has_scale, bool reverse,
                     int threads, Address x, int64_t xb, int64_t xt, Address params, int64_t pb,
                     int64_t pt, Address grad_out, Address grad_logdet, Address grad_x,
                     Address grad_params) {
    auto args = affine_args<AffineBackwardArgs>(xd, pd, B, T, C, has_scale, reverse, threads, x, xb,
                                                xt, params, pb, pt);
    args.grad_out = at<const void>(grad_out);
    args.grad_logdet = at<const void>(grad_logdet);
    args.grad_x = at<void>(grad_x);
    args.grad_params = at<void>(grad_params);
    py::gil_scoped_release release;
    (active.*kernel)(args);
}

void affine_inverse(int xd, int pd, int64_t B, int64_t T, int64_t C, bool has_scale, bool reverse,
                    int threads, Address z, int64_t zb, int64_t zt, Address params, int64_t pb,
                    int64_t pt, Address out) {
    auto args = affine_args<AffineInverseArgs>(xd, pd, B, T, C, has_scale, reverse, threads, z, zb,
                                               zt, params, pb, pt);
    args.out = at<void>(out);
    py::gil_scoped_release release;
    active.affine_inverse(args);
}

// rng is the address of int64[2] = (seed, offset).
void noise(int kind, Address rng, int64_t rows, int64_t width, int64_t first_row, Address out,
           int threads) {
    const int64_t *words = at<const int64_t>(rng);
    const NoiseArgs args{uint64_t(words[0]), uint64_t(words[1]), rows,          width,
                         first_row,          NoiseKind(kind),    at<void>(out), threads};
    py::gil_scoped_release release;
    active.noise(args);
}

void pad_noise(int dtype, Address rng, int64_t rows, int64_t features, int64_t pad, Address x,
               int64_t x_stride, Address out, double pad_scale, double data_scale, int threads) {
    const int64_t *words = at<const int64_t>(rng);
    const PadNoiseArgs args{
        DType(dtype),      uint64_t(words[0]), uint64_t(words[1]), rows,      features,   pad,
        at<const void>(x), x_stride,           at<void>(out),      pad_scale, data_scale, threads};
    py::gil_scoped_release release;
    active.pad_noise(args);
}

// The arguments that every gram kernel takes, in the order of flowops/gram.py.
template <class Args>
Args gram_args(int dtype, int op, int profile, int64_t N, int64_t M, int64_t D, int64_t O,
               bool per_feature, int threads, Address x, int64_t x_stride, Address half,
               int64_t half_stride, Address z, Address w, Address lengthscale) {
    Args args{};
    args.dtype = DType(dtype);
    args.op = GramOp(op);
    args.profile = Profile(profile);
    args.N = N;
    args.M = M;
    args.D = D;
    args.O = O;
    args.per_feature = per_feature;
    args.threads = threads;
    args.x = at<const void>(x);
    args.x_stride = x_stride;
    args.half = at<const void>(half);
    args.half_stride = half_stride;
    args.z = at<const void>(z);
    args.w = at<const void>(w);
    args.lengthscale = at<const void>(lengthscale);
    return args;
}

// Uninitialised room for `elements` of the arithmetic's type, on a cache line.
class Scratch {
public:
    Scratch(DType dtype, int64_t elements)
        : data(static_cast<char *>(::operator new(size_t(elements) * (dtype == DType::f64 ? 8 : 4),
                                                  std::align_val_t(64)))) {}
    ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
    Scratch(const Scratch &) = delete;
    char *const data;
};

void gram_forward(int dtype, int op, int profile, int64_t N, int64_t M, int64_t D, int64_t O,
                  bool per_feature, int threads, Address x, int64_t x_stride, Address half,
                  int64_t half_stride, Address z, Address w, Address lengthscale, Address out,
                  Address logdet) {
    auto args = gram_args<GramForwardArgs>(dtype, op, profile, N, M, D, O, per_feature, threads, x,
                                           x_stride, half, half_stride, z, w, lengthscale);
    args.out = at<void>(out);
    args.logdet = at<void>(logdet);
    const Scratch scratch(args.dtype, gram_forward_scratch(args));
    args.scratch = scratch.data;
    py::gil_scoped_release release;
    active.gram_forward(args);
}

void gram_backward(int dtype, int op, int profile, int64_t N, int64_t M, int64_t D, int64_t O,
                   bool per_feature, int threads, Address x, int64_t x_stride, Address half,
                   int64_t half_stride, Address z, Address w, Address lengthscale, Address grad,
                   Address grad_logdet, Address grad_x, Address grad_half, Address grad_z,
                   Address grad_w, Address grad_lengthscale) {
    auto args = gram_args<GramBackwardArgs>(dtype, op, profile, N, M, D, O, per_feature, threads, x,
                                            x_stride, half, half_stride, z, w, lengthscale);
    args.grad = at<const void>(grad);
    args.grad_logdet = at<const void>(grad_logdet);
    args.grad_x = at<void>(grad_x);
    args.grad_half = at<void>(grad_half);
    args.grad_z = at<void>(grad_z);
    args.grad_w = at<void>(grad_w);
    args.grad_lengthscale = at<void>(grad_lengthscale);
    const Scratch scratch(args.dtype, gram_backward_scratch(args));
    args.scratch = scratch.data;
    std::vector<double> partials(size_t(gram_chunks(args) * (per_feature ? D : 1)));
    args.dlengthscale_partials = partials.data();
    py::gil_scoped_release release;
    active.gram_backward(args);
}

// `weights` are the addresses of the packed weights in the order of flowops/decode.py.
void decode(int dtype, int64_t B, int64_t T, int64_t C, int64_t W, int64_t L, int64_t heads,
            int64_t E, int64_t P, int64_t window, bool guided, bool reverse, double eps,
            double scale, double temperature, double tol, double break_even, int threads, Address z,
            Address embed, Address guide, const std::vector<Address> &weights, Address x,
            Address residual, Address counts) {
    DecodeArgs a{};
    a.dtype = DType(dtype);
    a.B = B, a.T = T, a.C = C, a.W = W, a.L = L, a.heads = heads, a.E = E, a.P = P;
    a.window = window, a.guided = guided, a.has_scale = P == 2 * C, a.reverse = reverse;
    a.eps = float(eps), a.scale = float(scale), a.temperature = float(temperature);
    a.tol = float(tol), a.break_even = break_even, a.threads = threads;
    a.z = at<const float>(z), a.embed = at<const float>(embed), a.guide = at<const float>(guide);
    a.w_in = at<const float>(weights.at(0)), a.position = at<const float>(weights.at(1));
    a.norm1 = at<const float>(weights.at(2)), a.qkv = at<const void>(weights.at(3));
    a.qkv_bias = at<const float>(weights.at(4)), a.proj = at<const void>(weights.at(5));
    a.proj_bias = at<const float>(weights.at(6)), a.norm2 = at<const float>(weights.at(7));
    a.up = at<const void>(weights.at(8)), a.up_bias = at<const float>(weights.at(9));
    a.down = at<const void>(weights.at(10)), a.down_bias = at<const float>(weights.at(11));
    a.w_out = at<const void>(weights.at(12)), a.b_out = at<const float>(weights.at(13));
    a.x = at<float>(x), a.residual = at<float>(residual), a.counts = at<int64_t>(counts);
    py::gil_scoped_release release;
    const Scratch workspace(DType::f32, decode_workspace(a));
    a.workspace = workspace.data;
    active.decode(a);
}

// Mixes up to 16 words of each run of bytes, evenly spaced.
uint64_t fingerprint(const std::vector<Address> &addresses, const std::vector<int64_t> &bytes) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < addresses.size(); ++i) {
        const int64_t words = bytes.at(i) / 4, step = words < 16 ? 1 : words / 16;
        for (int64_t word = 0; word < words; word += step) {
            uint32_t value;
            std::memcpy(&value, at<const char>(addresses[i]) + 4 * word, 4);
            hash = (hash ^ value) * 0x100000001b3u;
            hash ^= hash >> 29;
        }
    }
    return hash;
}

}  // namespace
}  // namespace flowops

PYBIND11_MODULE(_C, m) {
    using namespace flowops;
    m.doc() = "CPU kernels of flowops; called by flowops/, not by users.";
    m.def("isas", &isas, "Instruction sets that this processor runs, narrowest first.");
    m.def("isa", [] { return std::string(active.isa); }, "The instruction set in use.");
    m.def("set_isa", &set_isa, "Use another one; for tests.");
    m.def("affine_forward", &affine_forward);
    m.def("affine_backward", &affine_backward<&Kernels::affine_backward>);
    m.def("affine_inverse", &affine_inverse);
    m.def("affine_inverse_backward", &affine_backward<&Kernels::affine_inverse_backward>);
    m.def("noise", &noise);
    m.def("pad_noise", &pad_noise);
    m.def("gram_forward", &gram_forward);
    m.def("gram_backward", &gram_backward);
    m.def("decode", &decode);
    m.def("fingerprint", &fingerprint);
}
