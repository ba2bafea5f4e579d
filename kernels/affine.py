"""The affine step on the GPU: one pass over x and the parameters, forward and backward.

A batch row's T * C elements are cut into chunks, one program each; element e belongs to token
e // C, whatever C is, so no lane idles. The log-determinant leaves as one partial sum a chunk.
"""

import torch
import triton
import triton.language as tl

from .launch import TABLE, Launch, launch, row, start
from .numerics import COMPUTE, exponential

TABLE["affine_fwd"] = {
    "default": [row(4, BLOCK=1024, limits={"elements": 1024}), row(8, BLOCK=4096)]
}
TABLE["affine_bwd"] = {
    "default": [row(4, BLOCK=1024, limits={"elements": 1024}), row(8, BLOCK=2048)]
}


@triton.jit
def _load_params(params_ptr, e, mask, T, stride_pt, C: tl.constexpr, HAS_SCALE: tl.constexpr,
                 REVERSE: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """a, b of elements e and the offset of a among the parameters. [BLOCK] each"""
    token = e // C
    source = T - 2 - token if REVERSE else token - 1
    known = mask & (source >= 0)  # the first token has none: a = b = 0
    source = tl.where(source < 0, T - 1, source)
    offset = source.to(tl.int64) * stride_pt + e % C
    if HAS_SCALE:
        a = tl.load(params_ptr + offset, mask=known, other=0.0).to(COMPUTE)
        b = tl.load(params_ptr + offset + C, mask=known, other=0.0).to(COMPUTE)
    else:
        b = tl.load(params_ptr + offset, mask=known, other=0.0).to(COMPUTE)
        a = tl.zeros_like(b)
    return a, b, source, known


@triton.jit
def affine_fwd_kernel(
    x_ptr, params_ptr, out_ptr, partial_ptr, T, chunks,
    stride_xb, stride_xt, stride_pb, stride_pt,
    C: tl.constexpr, HAS_SCALE: tl.constexpr, REVERSE: tl.constexpr, INVERSE: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b_index = (pid // chunks).to(tl.int64)
    e = (pid % chunks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = e < T * C
    a, b, _, _ = _load_params(
        params_ptr + b_index * stride_pb, e, mask, T, stride_pt, C, HAS_SCALE, REVERSE, COMPUTE
    )
    x_offset = b_index * stride_xb + (e // C).to(tl.int64) * stride_xt + e % C
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(COMPUTE)
    if INVERSE:
        out = x * exponential(a) + b
    else:
        out = (x - b) * exponential(-a)
        if HAS_SCALE:
            tl.store(partial_ptr + pid, -tl.sum(a, axis=0))
    tl.store(out_ptr + b_index * T * C + e, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def affine_bwd_kernel(
    grad_ptr, grad_logdet_ptr, x_ptr, params_ptr, grad_x_ptr, grad_params_ptr, T, chunks,
    stride_xb, stride_xt, stride_pb, stride_pt,
    C: tl.constexpr, HAS_SCALE: tl.constexpr, REVERSE: tl.constexpr, INVERSE: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b_index = (pid // chunks).to(tl.int64)
    e = (pid % chunks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = e < T * C
    a, b, source, known = _load_params(
        params_ptr + b_index * stride_pb, e, mask, T, stride_pt, C, HAS_SCALE, REVERSE, COMPUTE
    )
    x_offset = b_index * stride_xb + (e // C).to(tl.int64) * stride_xt + e % C
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(COMPUTE)
    grad = tl.load(grad_ptr + b_index * T * C + e, mask=mask, other=0.0).to(COMPUTE)
    if INVERSE:
        grad_x = grad * exponential(a)
        grad_a = grad_x * x
        grad_b = grad
    else:
        grad_x = grad * exponential(-a)
        grad_a = -grad_x * (x - b) - tl.load(grad_logdet_ptr + b_index).to(COMPUTE)
        grad_b = -grad_x
    dtype = grad_params_ptr.dtype.element_ty
    tl.store(grad_x_ptr + b_index * T * C + e, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    # The first token's place goes to the last parameters, which nothing uses: zeros.
    grad_a, grad_b = tl.where(known, grad_a, 0.0), tl.where(known, grad_b, 0.0)
    if HAS_SCALE:
        offset = (b_index * T + source) * (2 * C) + e % C
        tl.store(grad_params_ptr + offset, grad_a.to(dtype), mask=mask)
        tl.store(grad_params_ptr + offset + C, grad_b.to(dtype), mask=mask)
    else:
        offset = (b_index * T + source) * C + e % C
        tl.store(grad_params_ptr + offset, grad_b.to(dtype), mask=mask)


def affine_fwd(x, params, reverse: bool, inverse: bool, compute: torch.dtype):
    """``(z, logdet)``, or ``(x, None)`` for the inverse. x ``[B, T, C]`` and params have a
    contiguous last dimension."""
    B, T, C = x.shape

    def attempt(choice: Launch):
        chunks = triton.cdiv(T * C, choice["BLOCK"])
        out = x.new_empty(x.shape)
        has_scale = params.shape[2] != C
        partial = x.new_empty((B, chunks), dtype=compute) if has_scale and not inverse else out
        start(
            *(affine_fwd_kernel, choice, B * chunks),
            (x, params, out, partial, T, chunks, *x.stride()[:2], *params.stride()[:2]),
            C=C,
            HAS_SCALE=has_scale,
            REVERSE=reverse,
            INVERSE=inverse,
            COMPUTE=COMPUTE[compute],
        )
        if inverse:
            return out, None
        if not has_scale:
            return out, x.new_zeros(B, dtype=compute)
        return out, partial.view(B) if chunks == 1 else partial.sum(1)

    return launch("affine_fwd", x.device, {"elements": T * C}, attempt)


def affine_bwd(grad, grad_logdet, x, params, reverse: bool, inverse: bool, compute: torch.dtype):
    """``(grad_x, grad_params)``; grad and grad_logdet are contiguous."""
    B, T, C = x.shape

    def attempt(choice: Launch):
        chunks = triton.cdiv(T * C, choice["BLOCK"])
        grad_x, grad_params = x.new_empty(x.shape), params.new_empty(params.shape)
        start(
            *(affine_bwd_kernel, choice, B * chunks),
            (
                *(grad, grad if inverse else grad_logdet, x, params, grad_x, grad_params),
                *(T, chunks, *x.stride()[:2], *params.stride()[:2]),
            ),
            C=C,
            HAS_SCALE=params.shape[2] != C,
            REVERSE=reverse,
            INVERSE=inverse,
            COMPUTE=COMPUTE[compute],
        )
        return grad_x, grad_params

    return launch("affine_bwd", x.device, {"elements": T * C}, attempt)
