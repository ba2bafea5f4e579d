"""Causal attention, output projection and affine step in one kernel, and the head of its backward.

A program owns a tile of tokens of one image and walks the heads: each head's output is multiplied
with its columns of the projection while it is in registers, so the affine parameters of the tile
are complete after the last head, and the affine step is applied to the tokens that they belong to
(one further on). Nothing but o and the log-sum-exp, which backward needs, is written besides z.
"""

import math

import torch
import triton
import triton.language as tl

from .attention import attention_tile, constants, halves, load_rows, number, store_rows, strides
from .launch import TABLE, Launch, launch, row, start
from .numerics import COMPUTE, exponential

_HOPPER = [
    row(4, 2, BLOCK_M=64, BLOCK_N=32, limits={"row_bytes": 128, "channels": 16}),
    row(8, 2, BLOCK_M=128, BLOCK_N=32, limits={"row_bytes": 128}),
    row(8, 2, BLOCK_M=64, BLOCK_N=32, limits={"row_bytes": 256}),
]
TABLE["causal_patch_attention_fwd"] = {
    "default": [*_HOPPER[:2], row(8, 2, BLOCK_M=32, BLOCK_N=32)],
    "sm90": _HOPPER,
    "sm100": _HOPPER,
}
TABLE["causal_patch_attention_bwd_params"] = {
    "default": [
        row(4, 2, BLOCK_M=64, limits={"row_bytes": 128, "channels": 16}),
        row(8, 1, BLOCK_M=64, limits={"row_bytes": 128}),
        row(8, 1, BLOCK_M=32),
    ]
}


def fuses(dtype: torch.dtype, channels: int) -> bool:
    """Whether one kernel is the way: the parameters of a tile of tokens have to stay in registers,
    beside what products in wider dtypes take."""
    return dtype.itemsize == 2 and channels <= 64


@triton.jit
def _project(acc, o, weight_ptr, h, stride_w, C, D: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds one head's share of C parameters. acc [BLOCK_M, BLOCK_C]"""
    channel = tl.arange(0, BLOCK_C)
    weight = load_rows(weight_ptr + h * D, channel, stride_w, C, D, BLOCK_D, True)
    return tl.dot(o, tl.trans(weight), acc, input_precision=PRECISION, out_dtype=COMPUTE)


@triton.jit
def _affine_inputs(
    x_ptr, bias_a_ptr, bias_b_ptr, a, shift, token, T, C, stride_xt,
    HAS_SCALE: tl.constexpr, REVERSE: tl.constexpr, BLOCK_C: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """x, a, shift [BLOCK_M, BLOCK_C] of the tokens that the parameters of ``token`` move: the next
    ones [BLOCK_M]. The last token's move nothing; it stands in for the first, with a = shift = 0.
    Then the mask of all elements, and that of those with parameters."""
    channel = tl.arange(0, BLOCK_C)
    known = (token < T - 1)[:, None] & (channel < C)[None, :]
    mask = (token < T)[:, None] & (channel < C)[None, :]
    if REVERSE:
        moved = tl.where(token < T - 1, T - 2 - token, T - 1).to(tl.int64)
    else:
        moved = tl.where(token < T - 1, token + 1, 0).to(tl.int64)
    x = tl.load(x_ptr + moved[:, None] * stride_xt + channel[None, :], mask=mask, other=0.0)
    a, shift = a.to(AFFINE), shift.to(AFFINE)
    if HAS_SCALE:
        bias = tl.load(bias_a_ptr + channel, mask=channel < C, other=0.0).to(AFFINE)
        a = tl.where(known, a + bias[None, :], 0.0)
    bias = tl.load(bias_b_ptr + channel, mask=channel < C, other=0.0).to(AFFINE)
    shift = tl.where(known, shift + bias[None, :], 0.0)
    return x.to(AFFINE), a, shift, moved, mask, known


@triton.jit
def causal_patch_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, weight_a_ptr, weight_b_ptr, bias_a_ptr, bias_b_ptr, x_ptr,
    z_ptr, partial_ptr, o_ptr, lse_ptr,
    T, H, C, tiles, scale_high, scale_low,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_w, stride_xb, stride_xt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
    AFFINE: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr, REVERSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles  # the longest first
    b = (pid // tiles).to(tl.int64)
    scale = number(scale_high, scale_low, COMPUTE)
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    a = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    shift = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    for h in range(H):
        head = tl.full((), h, tl.int64)
        o, lse = attention_tile(
            q_ptr + b * stride_qb + head * stride_qh, k_ptr + b * stride_kb + head * stride_kh,
            v_ptr + b * stride_vb + head * stride_vh, tile, T, T, scale,
            stride_qt, stride_kt, stride_vt, D, BLOCK_D, BLOCK_M, BLOCK_N, COMPUTE, PRECISION,
            NEGATIVE_SCALE,
        )  # fmt: skip
        o = o.to(o_ptr.dtype.element_ty)
        store_rows(o_ptr + (b * T * H + h) * D, token, H * D, T, o, D, BLOCK_D)
        tl.store(lse_ptr + (b * H + h) * T + token, lse, mask=token < T)
        if HAS_SCALE:
            a = _project(
                a, o, weight_a_ptr, h, stride_w, C, D, BLOCK_D, BLOCK_C, COMPUTE, PRECISION
            )
        shift = _project(
            shift, o, weight_b_ptr, h, stride_w, C, D, BLOCK_D, BLOCK_C, COMPUTE, PRECISION
        )
    x, a, shift, moved, mask, _ = _affine_inputs(
        x_ptr + b * stride_xb, bias_a_ptr, bias_b_ptr, a, shift, token, T, C, stride_xt,
        HAS_SCALE, REVERSE, BLOCK_C, AFFINE,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_C)
    z = x - shift
    if HAS_SCALE:
        z *= exponential(-a)
        tl.store(partial_ptr + b * tiles + tile, -tl.sum(a))
    ptrs = z_ptr + (b * T + moved)[:, None] * C + channel[None, :]
    tl.store(ptrs, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def causal_patch_attention_bwd_params_kernel(
    grad_z_ptr, grad_logdet_ptr, weight_a_ptr, weight_b_ptr, bias_a_ptr, bias_b_ptr,
    x_ptr, o_ptr, grad_x_ptr, grad_params_ptr, grad_o_ptr,
    T, H, C, tiles, stride_w, stride_xb, stride_xt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
    AFFINE: tl.constexpr, PRECISION: tl.constexpr, HAS_SCALE: tl.constexpr,
    REVERSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The parameters again from o, then the gradients of the affine step and of the projection's
    input."""
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    token = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    a = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    shift = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    o_ptr += b * T * H * D
    for h in range(H):
        o = load_rows(o_ptr + h * D, token, H * D, T, D, BLOCK_D, True)
        if HAS_SCALE:
            a = _project(
                a, o, weight_a_ptr, h, stride_w, C, D, BLOCK_D, BLOCK_C, COMPUTE, PRECISION
            )
        shift = _project(
            shift, o, weight_b_ptr, h, stride_w, C, D, BLOCK_D, BLOCK_C, COMPUTE, PRECISION
        )
    x, a, shift, moved, mask, known = _affine_inputs(
        x_ptr + b * stride_xb, bias_a_ptr, bias_b_ptr, a, shift, token, T, C, stride_xt,
        HAS_SCALE, REVERSE, BLOCK_C, AFFINE,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_C)
    rows = (b * T + moved)[:, None] * C + channel[None, :]
    grad_x = tl.load(grad_z_ptr + rows, mask=mask, other=0.0).to(AFFINE)
    if HAS_SCALE:
        grad_x *= exponential(-a)
    tl.store(grad_x_ptr + rows, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    dtype = grad_params_ptr.dtype.element_ty
    grad_shift = tl.where(known, -grad_x, 0.0).to(dtype)
    if HAS_SCALE:
        grad_a = -grad_x * (x - shift) - tl.load(grad_logdet_ptr + b).to(AFFINE)
        grad_a = tl.where(known, grad_a, 0.0).to(dtype)
        rows = (b * T + token)[:, None] * (2 * C) + channel[None, :]
        tl.store(grad_params_ptr + rows, grad_a, mask=mask)
        tl.store(grad_params_ptr + rows + C, grad_shift, mask=mask)
    else:
        rows = (b * T + token)[:, None] * C + channel[None, :]
        tl.store(grad_params_ptr + rows, grad_shift, mask=mask)
    grad_o_ptr += b * T * H * D
    for h in range(H):
        weight = load_rows(weight_b_ptr + h * D, channel, stride_w, C, D, BLOCK_D, True)
        grad_o = tl.dot(grad_shift, weight, input_precision=PRECISION, out_dtype=COMPUTE)
        if HAS_SCALE:
            weight = load_rows(weight_a_ptr + h * D, channel, stride_w, C, D, BLOCK_D, True)
            grad_o = tl.dot(grad_a, weight, grad_o, input_precision=PRECISION, out_dtype=COMPUTE)
        store_rows(grad_o_ptr + h * D, token, H * D, T, grad_o, D, BLOCK_D)


def _constants(q, x, weight, reverse: bool, precision: str) -> tuple[dict, torch.dtype]:
    """The constants of both kernels and the dtype of the affine step."""
    C = x.shape[2]
    affine = torch.float64 if torch.float64 in (q.dtype, x.dtype) else torch.float32
    shared = constants(q, precision) | {
        "BLOCK_C": max(16, triton.next_power_of_2(C)),
        "AFFINE": COMPUTE[affine],
        "HAS_SCALE": weight.shape[0] != C,
        "REVERSE": reverse,
    }
    return shared, affine


def _halves_of(parameter: torch.Tensor, C: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the log-scales and of the shifts; without log-scales both are those of the shifts."""
    return parameter[:C], parameter[-C:]


def _sizes(q, x, shared: dict) -> dict[str, int]:
    return {"row_bytes": shared["BLOCK_D"] * q.element_size(), "channels": x.shape[2]}


def causal_patch_attention_fwd(
    q, k, v, weight, bias, x, reverse: bool, scale: float, precision: str
):
    """``(z, logdet, o, lse)``. weight ``[2C, HD]`` or ``[C, HD]``; last dimensions are
    contiguous."""
    B, T, H, _ = q.shape
    C = x.shape[2]
    shared, affine = _constants(q, x, weight, reverse, precision)

    def attempt(choice: Launch):
        tiles = triton.cdiv(T, choice["BLOCK_M"])
        z, o = x.new_empty(x.shape), q.new_empty(q.shape)
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_empty((B, H, T), dtype=lse_dtype)
        has_scale = shared["HAS_SCALE"]
        partial = x.new_empty((B, tiles), dtype=affine) if has_scale else z
        start(
            *(causal_patch_attention_fwd_kernel, choice, B * tiles),
            (
                *(q, k, v, *_halves_of(weight, C), *_halves_of(bias, C), x, z, partial, o, lse),
                *(T, H, C, tiles),
                *(*halves(abs(scale) / math.log(2)), *strides(q, k, v)),
                *(weight.stride(0), x.stride(0), x.stride(1)),
            ),
            **shared,
            NEGATIVE_SCALE=scale < 0,
        )
        return z, partial.sum(1) if has_scale else x.new_zeros(B, dtype=affine), o, lse

    return launch("causal_patch_attention_fwd", q.device, _sizes(q, x, shared), attempt)


def causal_patch_attention_bwd_params(
    grad_z, grad_logdet, q, weight, bias, x, o, reverse: bool, precision: str
):
    """``(grad_x, grad_params [B, T, rows of weight], grad_o)``; grad_z, grad_logdet and o are
    contiguous."""
    B, T, H, _ = q.shape
    C = x.shape[2]
    shared, _ = _constants(q, x, weight, reverse, precision)

    def attempt(choice: Launch):
        tiles = triton.cdiv(T, choice["BLOCK_M"])
        grad_x, grad_o = x.new_empty(x.shape), o.new_empty(o.shape)
        grad_params = q.new_empty((B, T, weight.shape[0]))
        start(
            *(causal_patch_attention_bwd_params_kernel, choice, B * tiles),
            (
                *(grad_z, grad_logdet, *_halves_of(weight, C), *_halves_of(bias, C)),
                *(x, o, grad_x, grad_params, grad_o),
                *(T, H, C, tiles, weight.stride(0), x.stride(0), x.stride(1)),
            ),
            **shared,
        )
        return grad_x, grad_params, grad_o

    return launch("causal_patch_attention_bwd_params", q.device, _sizes(q, x, shared), attempt)
