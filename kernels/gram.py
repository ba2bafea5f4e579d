"""Kernel matrices on the GPU: K itself, and K @ w with what couplings make of it, K never stored.

Distances take one of two forms. Up to 8 features, in fp64 and for Matern 1/2 (whose kink at 0 turns
small errors of a distance into large ones) they are sums of squared differences. Otherwise x and z
are centred, scaled and multiplied on tensor cores: S = |x|^2 + |z|^2 - 2 x.z. That loses digits
where norms are large beside S, so a tile in which that could be seen in K is done again from
differences; equal points are such a case and give exactly 1.
"""

import torch
import triton
import triton.language as tl

from .launch import TABLE, Launch, launch, row, start
from .numerics import COMPUTE, exponential

TABLE["gram_fwd"] = {
    "default": [
        row(4, 1, BLOCK_N=64, BLOCK_M=32, limits={"bytes": 4}),
        row(4, 1, BLOCK_N=32, BLOCK_M=32),
    ]
}
TABLE["gram_matmul_fwd"] = {
    "default": [
        row(4, 1, BLOCK_N=64, BLOCK_M=32, limits={"bytes": 4, "outputs": 64}),
        row(4, 1, BLOCK_N=32, BLOCK_M=32),
    ]
}

#: To this many features, differences cost no more than dots, and the loop over them is unrolled.
FEW_FEATURES = 8
#: Features of a dot at a time: 3xTF32 keeps its operands twice, and wider ones leave registers.
CHUNK = 16
#: Outputs a program of ``gram_matmul_fwd_kernel`` holds, split between s and t in a coupling.
_OUTPUTS_AT_ONCE = 128


@triton.jit
def profile_and_slope(S, KERNEL: tl.constexpr):
    """k and dk/dS of the scaled squared distance S. [same shape as S]"""
    # Every kernel is 0 long before S = 1e12, and points infinitely far apart are not inf * 0 there.
    # (tl.minimum would hide a NaN.)
    S = tl.where(S > 1e12, 1e12, S)
    if KERNEL == "se":
        K = exponential(-0.5 * S)
        return K, -0.5 * K
    r = tl.sqrt(S) if S.dtype == tl.float64 else tl.sqrt_rn(S)
    if KERNEL == "matern12":
        K = exponential(-r)
        return K, tl.where(S > 0, K / (-2.0 * tl.where(S > 0, r, 1.0)), 0.0)
    if KERNEL == "matern32":
        r *= 1.7320508075688772
        e = exponential(-r)
        return (1.0 + r) * e, -1.5 * e
    r *= 2.23606797749979
    e = exponential(-r)
    return (1.0 + r + r * r * 0.3333333333333333) * e, -0.8333333333333334 * (1.0 + r) * e


@triton.jit
def divide(a, b):
    """a / b to the last bit or the one before, b not too close to 0 or infinity. The IEEE division
    would do, but its way out for extreme arguments costs registers everywhere. [same shape as b]"""
    if b.dtype == tl.float64:
        return a / b
    else:
        reciprocal = 1.0 / b
        quotient = a * reciprocal
        better = tl.fma(tl.fma(-quotient, b, a), reciprocal, quotient)
        return tl.where(tl.abs(quotient) < float("inf"), better, quotient)  # inf - inf is NaN


@triton.jit
def difference(x_row, z_row, d, mask_n, mask_m, l_ptr, stride_l, COMPUTE: tl.constexpr):
    """(x - z) / lengthscale of feature d. [BLOCK_N, BLOCK_M]"""
    x = tl.load(x_row + d, mask=mask_n, other=0.0).to(COMPUTE)
    z = tl.load(z_row + d, mask=mask_m, other=0.0).to(COMPUTE)
    return (x[:, None] - z[None, :]) * divide(1.0, tl.load(l_ptr + d * stride_l).to(COMPUTE))


@triton.jit
def square_of_differences(x_row, z_row, mask_n, mask_m, l_ptr, stride_l, D, FEW: tl.constexpr,
                          COMPUTE: tl.constexpr):  # fmt: skip
    """S. x_row, z_row point to the first feature of each row. [BLOCK_N, BLOCK_M]"""
    S = tl.zeros((x_row.shape[0], z_row.shape[0]), COMPUTE)
    if FEW > 0:
        for d in tl.static_range(FEW):
            delta = difference(x_row, z_row, d, mask_n, mask_m, l_ptr, stride_l, COMPUTE)
            S += delta * delta
    else:
        for d in range(D):
            delta = difference(x_row, z_row, d, mask_n, mask_m, l_ptr, stride_l, COMPUTE)
            S += delta * delta
    return S


@triton.jit
def centred(row, mask, d, D, c_ptr, l_ptr, stride_l, PRECISION: tl.constexpr,
            COMPUTE: tl.constexpr):  # fmt: skip
    """(x - c) / lengthscale for features d, 0 outside. [rows, BLOCK_D]"""
    mask_d = d < D
    x = tl.load(row[:, None] + d[None, :], mask=mask[:, None] & mask_d[None, :], other=0.0)
    c = tl.load(c_ptr + d, mask=mask_d, other=0.0)
    l = tl.load(l_ptr + d * stride_l, mask=mask_d, other=1.0).to(COMPUTE)
    # A rounded 1 / l would be off by the same factor everywhere: errors of K would not average out.
    x = divide(x.to(COMPUTE) - c[None, :], tl.broadcast_to(l[None, :], x.shape))
    x = tl.where(mask[:, None], x, 0.0)
    if PRECISION == "tf32":
        # To the nearest TF32 number, here and not in the dot, so that norms see the same points.
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def loses_digits(S, K, norms, PRECISION: tl.constexpr):
    """Whether rounding S = norms - 2 x.z could be seen somewhere in this tile. [scalar]

    S is off by a few eps of the norms and K by less than K / 2 of that. Where S almost vanishes
    beside them, points may be equal. Both comparisons are false for NaN (infinite norms).
    """
    good = S >= norms * 0.00390625
    if PRECISION != "tf32":
        good = good & (K * norms <= 4.0)
    return tl.min(good.to(tl.int32)) == 0


@triton.jit
def kernel_tile(x_row, z_row, mask_n, mask_m, c_ptr, l_ptr, stride_l, D, KERNEL: tl.constexpr,
                DOT: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr,
                COMPUTE: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """k and dk/dS between rows and points [BLOCK_N, BLOCK_M], and whether they are from differences
    for want of digits [scalar]."""
    lost = False
    if DOT:
        S = tl.zeros((x_row.shape[0], z_row.shape[0]), COMPUTE)
        norm_x = tl.zeros((x_row.shape[0],), COMPUTE)
        norm_z = tl.zeros((z_row.shape[0],), COMPUTE)
        for start in range(0, D, CHUNK):
            d = start + tl.arange(0, CHUNK)
            x = centred(x_row, mask_n, d, D, c_ptr, l_ptr, stride_l, PRECISION, COMPUTE)
            z = centred(z_row, mask_m, d, D, c_ptr, l_ptr, stride_l, PRECISION, COMPUTE)
            norm_x += tl.sum(x * x, axis=1)
            norm_z += tl.sum(z * z, axis=1)
            S = tl.dot(x, tl.trans(z), S, input_precision=PRECISION, out_dtype=COMPUTE)
        norms = norm_x[:, None] + norm_z[None, :]
        S = norms - 2.0 * S
        K, slope = profile_and_slope(S, KERNEL)
        lost = loses_digits(S, K, norms, PRECISION)
        if lost:
            S = square_of_differences(
                x_row, z_row, mask_n, mask_m, l_ptr, stride_l, D, FEW, COMPUTE
            )
            K, slope = profile_and_slope(S, KERNEL)
    else:
        S = square_of_differences(x_row, z_row, mask_n, mask_m, l_ptr, stride_l, D, FEW, COMPUTE)
        K, slope = profile_and_slope(S, KERNEL)
    return K, slope, lost


@triton.jit
def gram_fwd_kernel(
    x_ptr, z_ptr, l_ptr, c_ptr, dk_ptr, out_ptr, N, M, D, m_tiles,
    stride_xn, stride_zm, stride_l, stride_kn, stride_km,
    KERNEL: tl.constexpr, DOT: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr, CHUNK: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """K, or with SLOPE dL/dS for a given dL/dK; a program a tile."""
    pid = tl.program_id(0)
    n = (pid // m_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (pid % m_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n, mask_m = n < N, m < M
    K, slope, _ = kernel_tile(
        x_ptr + n * stride_xn, z_ptr + m * stride_zm, mask_n, mask_m, c_ptr, l_ptr, stride_l, D,
        KERNEL, DOT, FEW, PRECISION, COMPUTE, CHUNK,
    )  # fmt: skip
    mask = mask_n[:, None] & mask_m[None, :]
    if SLOPE:
        dk_at = dk_ptr + n[:, None] * stride_kn + m[None, :] * stride_km
        K = slope * tl.load(dk_at, mask=mask, other=0.0).to(COMPUTE)
    tl.store(out_ptr + n[:, None] * M + m[None, :], K.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gram_matmul_fwd_kernel(
    x_ptr, z_ptr, w_ptr, l_ptr, c_ptr, half_ptr, grad_ptr, grad_logdet_ptr,
    out_ptr, logdet_ptr, grads_ptr, N, M, D, O, tiles_o,
    stride_xn, stride_zm, stride_wm, stride_l, stride_hn, stride_gn,
    KERNEL: tl.constexpr, DOT: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_O: tl.constexpr, MODE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """K @ w for BLOCK_N rows and BLOCK_O outputs, then what MODE makes of it.

    "matmul": w [M, O]. In the other modes w [M, 2 O] holds the weights of s, then of t;
    "coupling" and "inverse" map half, the rows that move, and their "_backward" turns the gradient
    of that into those of half and of [s, t] (grads [N, 2 O]).
    """
    pid = tl.program_id(0)
    n = (pid // tiles_o).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = (pid % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_n, mask_o = n < N, o < O
    s = tl.zeros((BLOCK_N, BLOCK_O), COMPUTE)
    t = tl.zeros((BLOCK_N, BLOCK_O), COMPUTE)
    for first in range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = m < M
        K, _, _ = kernel_tile(
            x_ptr + n * stride_xn, z_ptr + m * stride_zm, mask_n, mask_m, c_ptr, l_ptr, stride_l, D,
            KERNEL, DOT, FEW, PRECISION, COMPUTE, CHUNK,
        )  # fmt: skip
        w_at = w_ptr + m[:, None] * stride_wm + o[None, :]
        mask_w = mask_m[:, None] & mask_o[None, :]
        w = tl.load(w_at, mask=mask_w, other=0.0).to(COMPUTE)
        s = tl.dot(K, w, s, input_precision=PRECISION, out_dtype=COMPUTE)
        if MODE != "matmul" and MODE != "coupling_backward":
            w = tl.load(w_at + O, mask=mask_w, other=0.0).to(COMPUTE)
            t = tl.dot(K, w, t, input_precision=PRECISION, out_dtype=COMPUTE)
    mask = mask_n[:, None] & mask_o[None, :]
    if MODE == "matmul":
        out = s
    else:
        half_at = half_ptr + n[:, None] * stride_hn + o[None, :]
        half = tl.load(half_at, mask=mask, other=0.0).to(COMPUTE)
        if MODE == "coupling":
            out = exponential(s) * half + t
            tl.store(logdet_ptr + (pid % tiles_o).to(tl.int64) * N + n, tl.sum(s, axis=1), mask_n)
        elif MODE == "inverse":
            out = (half - t) * exponential(-s)
        else:
            grad_at = grad_ptr + n[:, None] * stride_gn + o[None, :]
            grad = tl.load(grad_at, mask=mask, other=0.0).to(COMPUTE)
            if MODE == "coupling_backward":
                out = grad * exponential(s)
                h = tl.load(grad_logdet_ptr + n, mask=mask_n, other=0.0).to(COMPUTE)
                grad_s, grad_t = out * half + h[:, None], grad
            else:
                out = grad * exponential(-s)
                grad_s, grad_t = -out * (half - t), -out
            grads_at = grads_ptr + n[:, None] * (2 * O) + o[None, :]
            tl.store(grads_at, grad_s, mask=mask)
            tl.store(grads_at + O, grad_t, mask=mask)
    out_at = out_ptr + n[:, None] * O + o[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


def block_of(size: int, largest: int) -> int:
    """The power of two for ``size`` columns of a dot: at least 16, at most ``largest``."""
    return min(max(16, triton.next_power_of_2(size)), largest)


def outputs_block(O: int, alone: bool) -> int:
    """BLOCK_O of ``gram_matmul_fwd_kernel`` for O outputs, or O each of s and t."""
    return block_of(O, _OUTPUTS_AT_ONCE if alone else _OUTPUTS_AT_ONCE // 2)


def constants(D: int, kernel: str, precision: str, compute: torch.dtype) -> dict:
    """What all kernels are specialised on."""
    few = D if D <= FEW_FEATURES else 0
    double = compute == torch.float64
    dots = "ieee" if double or torch.version.hip else {"fp32": "tf32x3"}.get(precision, precision)
    return {
        "KERNEL": kernel,
        "DOT": not (few or double or kernel == "matern12"),
        "FEW": few,
        "PRECISION": dots,
        "COMPUTE": COMPUTE[compute],
        "CHUNK": CHUNK,
    }


def centre_of(z, constants: dict, compute: torch.dtype):
    """The point that both x and z are measured from, near all of them. Any would do: distances do
    not see it. z itself, unread, where distances are sums of differences."""
    return z.mean(0, dtype=compute) if constants["DOT"] else z


def stride_of(lengthscale) -> int:
    return lengthscale.ndim  # a vector is contiguous, a scalar is read again for every feature


def gram_fwd(x, z, lengthscale, kernel, precision, compute, grad=None):
    """``K [N, M]`` in x's dtype, or for ``grad``, the gradient of K, that of S in ``compute``.

    x and z have a contiguous last dimension, here as in all launchers; so has lengthscale."""
    (N, D), M = x.shape, z.shape[0]
    const = constants(D, kernel, precision, compute)
    centre = centre_of(z, const, compute)

    def attempt(choice: Launch):
        m_tiles = triton.cdiv(M, choice["BLOCK_M"])
        out = x.new_empty((N, M), dtype=x.dtype if grad is None else compute)
        dk = out if grad is None else grad
        start(
            *(gram_fwd_kernel, choice, triton.cdiv(N, choice["BLOCK_N"]) * m_tiles),
            (
                *(x, z, lengthscale, centre, dk, out, N, M, D, m_tiles),
                *(x.stride(0), z.stride(0), stride_of(lengthscale), *dk.stride()),
            ),
            **const,
            SLOPE=grad is not None,
        )
        return out

    return launch("gram_fwd", x.device, {"bytes": compute.itemsize}, attempt)


def _matmul(mode, x, z, w, lengthscale, kernel, precision, compute, half=None, grads=()):
    """``(out, logdet or None, gradients of [s, t] or None)`` of ``gram_matmul_fwd_kernel``."""
    (N, D), M = x.shape, z.shape[0]
    O = w.shape[1] if half is None else half.shape[1]
    const = constants(D, kernel, precision, compute)
    centre = centre_of(z, const, compute)
    block_o = outputs_block(O, half is None)
    backward = mode.endswith("_backward")

    def attempt(choice: Launch):
        tiles_o = triton.cdiv(O, block_o)
        out = (x if half is None else half).new_empty((N, O))
        logdet = out.new_empty((tiles_o, N), dtype=compute) if mode == "coupling" else None
        both = out.new_empty((N, 2 * O), dtype=compute) if backward else None
        given = half if half is not None else out
        grad, grad_logdet = (*grads, out, out)[:2]
        start(
            *(gram_matmul_fwd_kernel, choice, triton.cdiv(N, choice["BLOCK_N"]) * tiles_o),
            (
                *(x, z, w, lengthscale, centre, given, grad, grad_logdet),
                *(out, out if logdet is None else logdet, out if both is None else both),
                *(N, M, D, O, tiles_o, x.stride(0), z.stride(0), w.stride(0)),
                *(stride_of(lengthscale), given.stride(0), grad.stride(0)),
            ),
            **const,
            BLOCK_O=block_o,
            MODE=mode,
        )
        if logdet is not None:
            logdet = logdet[0] if tiles_o == 1 else logdet.sum(0)
        return out, logdet, both

    sizes = {"bytes": compute.itemsize, "outputs": block_o if half is None else 2 * block_o}
    return launch("gram_matmul_fwd", x.device, sizes, attempt)


def gram_matmul_fwd(x, z, w, lengthscale, kernel, precision, compute):
    """``K @ w [N, O]`` in x's dtype."""
    return _matmul("matmul", x, z, w, lengthscale, kernel, precision, compute)[0]


def coupling_fwd(x1, x2, z, w, lengthscale, kernel, precision, compute):
    """``(y2 [N, E], logdet [N])``."""
    return _matmul("coupling", x1, z, w, lengthscale, kernel, precision, compute, x2)[:2]


def coupling_inverse_fwd(x1, y2, z, w, lengthscale, kernel, precision, compute):
    """``x2 [N, E]``."""
    return _matmul("inverse", x1, z, w, lengthscale, kernel, precision, compute, y2)[0]


def coupling_grads(mode, grads, x1, half, z, w, lengthscale, kernel, precision, compute):
    """``(gradient of half [N, E], gradient of [s, t] [N, 2E])`` for ``grads``, those of what the
    coupling or its inverse returned."""
    out, _, both = _matmul(mode, x1, z, w, lengthscale, kernel, precision, compute, half, grads)
    return out, both
