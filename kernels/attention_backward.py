"""Causal attention on the GPU, backward, deterministic: no gradient is added to atomically.

Where all keys of a head fit on chip, one program owns the head: k, v and their gradients stay
there, every tensor is read and written once, five products a tile. Longer sequences take one pass
over key tiles (grad_k, grad_v) and one over query tiles (grad_q), each program owning what it
writes; the scores are computed in both.

Source: Dao et al., "FlashAttention" (arXiv 2205.14135), appendix B.
"""

import math

import triton
import triton.language as tl

from .attention import (
    constants,
    halves,
    load_rows,
    number,
    sizes_of,
    store_rows,
    strides,
)
from .launch import TABLE, Launch, launch, row, serves, start

_ON_CHIP = [
    row(4, 1, BLOCK_M=32, BLOCK_S=32, limits={"itemsize": 2, "keys": 32, "area": 32 * 64}),
    row(4, 1, BLOCK_M=32, BLOCK_S=64, limits={"itemsize": 2, "keys": 64, "area": 64 * 64}),
    row(8, 1, BLOCK_M=32, BLOCK_S=128, limits={"itemsize": 2, "keys": 128, "area": 128 * 64}),
]
_WHOLE_SEQUENCE = row(
    *(8, 1), BLOCK_M=32, BLOCK_S=256, limits={"itemsize": 2, "keys": 256, "row_bytes": 128}
)
TABLE["causal_attention_bwd_on_chip"] = {
    "default": _ON_CHIP,
    "sm90": [*_ON_CHIP, _WHOLE_SEQUENCE],
    "sm100": [*_ON_CHIP, _WHOLE_SEQUENCE],
}
TABLE["causal_attention_bwd_delta"] = {"default": [row(4, 1, BLOCK_M=32)]}
TABLE["causal_attention_bwd_dkdv"] = {
    "default": [
        row(4, 2, BLOCK_M=32, BLOCK_N=64, limits={"row_bytes": 128, "itemsize": 2}),
        row(8, 2, BLOCK_M=32, BLOCK_N=64, limits={"row_bytes": 256, "itemsize": 2}),
        row(8, 1, BLOCK_M=32, BLOCK_N=64, limits={"row_bytes": 128, "itemsize": 4}),
        row(8, 1, BLOCK_M=32, BLOCK_N=32, limits={"row_bytes": 256, "itemsize": 4}),
        row(8, 1, BLOCK_M=16, BLOCK_N=16, limits={"itemsize": 4}),
        row(8, 1, BLOCK_M=16, BLOCK_N=32, limits={"row_bytes": 512}),
        row(8, 1, BLOCK_M=16, BLOCK_N=16),
    ],
}
TABLE["causal_attention_bwd_dq"] = {
    "default": [
        row(4, 2, BLOCK_M=64, BLOCK_N=32, limits={"row_bytes": 128, "itemsize": 2}),
        row(8, 2, BLOCK_M=64, BLOCK_N=32, limits={"row_bytes": 256, "itemsize": 2}),
        row(8, 1, BLOCK_M=64, BLOCK_N=32, limits={"row_bytes": 128, "itemsize": 4}),
        row(8, 1, BLOCK_M=32, BLOCK_N=32, limits={"row_bytes": 256, "itemsize": 4}),
        row(8, 1, BLOCK_M=16, BLOCK_N=16, limits={"itemsize": 4}),
        row(8, 1, BLOCK_M=32, BLOCK_N=16, limits={"row_bytes": 512}),
        row(8, 1, BLOCK_M=16, BLOCK_N=16),
    ],
}


@triton.jit
def _score_gradient(
    q, k, v, grad_o, lse, delta, query, key, shift, scale, KEYS_FIRST: tl.constexpr,
    DIAGONAL: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p and dL/d(scale q.k): [BLOCK_N, BLOCK_M] if KEYS_FIRST, else [BLOCK_M, BLOCK_N]. The
    products that follow want them one way or the other."""
    log2e: tl.constexpr = 1.4426950408889634
    lse = lse * log2e
    if KEYS_FIRST:
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=COMPUTE)
        p = tl.exp2(s * scale - lse[None, :])
        if DIAGONAL:
            p = tl.where(key[:, None] <= query[None, :] + shift, p, 0.0)
        grad_p = tl.dot(v, tl.trans(grad_o), input_precision=PRECISION, out_dtype=COMPUTE)
        return p, p * (grad_p - delta[None, :])
    else:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=COMPUTE)
        p = tl.exp2(s * scale - lse[:, None])
        if DIAGONAL:
            p = tl.where(key[None, :] <= query[:, None] + shift, p, 0.0)
        grad_p = tl.dot(grad_o, tl.trans(v), input_precision=PRECISION, out_dtype=COMPUTE)
        return p, p * (grad_p - delta[:, None])


@triton.jit
def _load_queries(
    q_ptr, grad_o_ptr, lse_ptr, query, T, stride_qt, stride_ot,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q, grad_o [BLOCK_M, BLOCK_D] and lse [BLOCK_M]; past the end p = exp(-inf) = 0."""
    q = load_rows(q_ptr, query, stride_qt, T, D, BLOCK_D, True)
    grad_o = load_rows(grad_o_ptr, query, stride_ot, T, D, BLOCK_D, True)
    return q, grad_o, tl.load(lse_ptr + query, mask=query < T, other=float("inf"))


@triton.jit
def causal_attention_bwd_on_chip_kernel(
    grad_o_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    T, S, H, scale_high, scale_low, log2_high, log2_low,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    in_log = number(log2_high, log2_low, COMPUTE)
    scale = number(scale_high, scale_low, COMPUTE)
    key = tl.arange(0, BLOCK_S)
    k = load_rows(k_ptr + b * stride_kb + h * stride_kh, key, stride_kt, S, D, BLOCK_D, True)
    v = load_rows(v_ptr + b * stride_vb + h * stride_vh, key, stride_vt, S, D, BLOCK_D, True)
    grad_k = tl.zeros([BLOCK_S, BLOCK_D], COMPUTE)
    grad_v = tl.zeros([BLOCK_S, BLOCK_D], COMPUTE)
    rows = (b * T * H + h) * D  # of o and grad_q, which are contiguous
    for begin in range(0, T, BLOCK_M):
        query = begin + tl.arange(0, BLOCK_M)
        q, grad_o, lse = _load_queries(
            q_ptr + b * stride_qb + h * stride_qh, grad_o_ptr + b * stride_gb + h * stride_gh,
            lse_ptr + head * T, query, T, stride_qt, stride_gt, D, BLOCK_D,
        )  # fmt: skip
        o = load_rows(o_ptr + rows, query, H * D, T, D, BLOCK_D, True)
        delta = tl.sum(o.to(COMPUTE) * grad_o.to(COMPUTE), axis=1)
        p, grad_s = _score_gradient(
            q, k, v, grad_o, lse, delta, query, key, S - T, in_log, True, True, COMPUTE, PRECISION
        )
        grad_s = grad_s.to(q.dtype)
        grad_v = tl.dot(p.to(q.dtype), grad_o, grad_v, input_precision=PRECISION, out_dtype=COMPUTE)
        grad_k = tl.dot(grad_s, q, grad_k, input_precision=PRECISION, out_dtype=COMPUTE)
        grad_q = tl.dot(tl.trans(grad_s), k, input_precision=PRECISION, out_dtype=COMPUTE)
        store_rows(grad_q_ptr + rows, query, H * D, T, grad_q * scale, D, BLOCK_D)
    rows = (b * S * H + h) * D
    store_rows(grad_k_ptr + rows, key, H * D, S, grad_k * scale, D, BLOCK_D)
    store_rows(grad_v_ptr + rows, key, H * D, S, grad_v, D, BLOCK_D)


@triton.jit
def causal_attention_bwd_delta_kernel(
    grad_o_ptr, o_ptr, delta_ptr, T, H, tiles, stride_gb, stride_gt, stride_gh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(o * grad_o), what the softmax's normalisation takes back."""
    pid = tl.program_id(0)
    head = (pid // tiles).to(tl.int64)
    b, h = head // H, head % H
    query = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    grad_o_ptr += b * stride_gb + h * stride_gh
    grad_o = load_rows(grad_o_ptr, query, stride_gt, T, D, BLOCK_D, True)
    o = load_rows(o_ptr + (b * T * H + h) * D, query, H * D, T, D, BLOCK_D, True)
    delta = tl.sum(o.to(COMPUTE) * grad_o.to(COMPUTE), axis=1)
    tl.store(delta_ptr + head * T + query, delta, mask=query < T)


@triton.jit
def _gather_keys(
    grad_k, grad_v, k, v, q_ptr, grad_o_ptr, lse_ptr, delta_ptr, key, begin, end, T, shift, in_log,
    stride_qt, stride_gt, DIAGONAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the queries of [begin, end) owe. grad_k, grad_v, k, v [BLOCK_N, BLOCK_D]"""
    for m in range(begin, end, BLOCK_M):
        query = m + tl.arange(0, BLOCK_M)
        q, grad_o, lse = _load_queries(
            q_ptr, grad_o_ptr, lse_ptr, query, T, stride_qt, stride_gt, D, BLOCK_D
        )
        delta = tl.load(delta_ptr + query, mask=query < T, other=0.0)
        p, grad_s = _score_gradient(
            q, k, v, grad_o, lse, delta, query, key, shift, in_log,
            True, DIAGONAL, COMPUTE, PRECISION,
        )  # fmt: skip
        p, grad_s = p.to(q.dtype), grad_s.to(q.dtype)
        grad_v = tl.dot(p, grad_o, grad_v, input_precision=PRECISION, out_dtype=COMPUTE)
        grad_k = tl.dot(grad_s, q, grad_k, input_precision=PRECISION, out_dtype=COMPUTE)
    return grad_k, grad_v


@triton.jit
def causal_attention_bwd_dkdv_kernel(
    grad_o_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    T, S, H, tiles, scale_high, scale_low, log2_high, log2_low,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid % tiles  # the first keys have the most queries: the longest first
    head = (pid // tiles).to(tl.int64)
    b, h = head // H, head % H
    in_log = number(log2_high, log2_low, COMPUTE)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + b * stride_kb + h * stride_kh, key, stride_kt, S, D, BLOCK_D, True)
    v = load_rows(v_ptr + b * stride_vb + h * stride_vh, key, stride_vt, S, D, BLOCK_D, True)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], COMPUTE)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], COMPUTE)
    q_ptr += b * stride_qb + h * stride_qh
    grad_o_ptr += b * stride_gb + h * stride_gh
    lse_ptr += head * T
    delta_ptr += head * T
    shift = S - T
    first = tl.maximum(tile * BLOCK_N - shift, 0)  # the first query that sees any of the keys
    begin = first // BLOCK_M * BLOCK_M
    all_seen = tl.maximum(tile * BLOCK_N + BLOCK_N - 1 - shift, 0)  # from here on all are seen
    full = tl.minimum(tl.cdiv(all_seen, BLOCK_M) * BLOCK_M, tl.cdiv(T, BLOCK_M) * BLOCK_M)
    grad_k, grad_v = _gather_keys(
        grad_k, grad_v, k, v, q_ptr, grad_o_ptr, lse_ptr, delta_ptr, key, begin, full, T, shift,
        in_log, stride_qt, stride_gt, True, D, BLOCK_D, BLOCK_M, COMPUTE, PRECISION,
    )  # fmt: skip
    grad_k, grad_v = _gather_keys(
        grad_k, grad_v, k, v, q_ptr, grad_o_ptr, lse_ptr, delta_ptr, key, full, T, T, shift,
        in_log, stride_qt, stride_gt, False, D, BLOCK_D, BLOCK_M, COMPUTE, PRECISION,
    )  # fmt: skip
    rows = (b * S * H + h) * D
    scale = number(scale_high, scale_low, COMPUTE)
    store_rows(grad_k_ptr + rows, key, H * D, S, grad_k * scale, D, BLOCK_D)
    store_rows(grad_v_ptr + rows, key, H * D, S, grad_v, D, BLOCK_D)


@triton.jit
def _gather_queries(
    grad_q, q, grad_o, lse, delta, k_ptr, v_ptr, query, begin, end, S, shift, in_log,
    stride_kt, stride_vt, DIAGONAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the keys of [begin, end) owe. grad_q, q, grad_o [BLOCK_M, BLOCK_D]"""
    for n in range(begin, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, stride_kt, S, D, BLOCK_D, DIAGONAL)
        v = load_rows(v_ptr, key, stride_vt, S, D, BLOCK_D, DIAGONAL)
        _, grad_s = _score_gradient(
            q, k, v, grad_o, lse, delta, query, key, shift, in_log,
            False, DIAGONAL, COMPUTE, PRECISION,
        )  # fmt: skip
        grad_q = tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision=PRECISION, out_dtype=COMPUTE)
    return grad_q


@triton.jit
def causal_attention_bwd_dq_kernel(
    grad_o_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    T, S, H, tiles, scale_high, scale_low, log2_high, log2_low,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles  # the longest first
    head = (pid // tiles).to(tl.int64)
    b, h = head // H, head % H
    in_log = number(log2_high, log2_low, COMPUTE)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q, grad_o, lse = _load_queries(
        q_ptr + b * stride_qb + h * stride_qh, grad_o_ptr + b * stride_gb + h * stride_gh,
        lse_ptr + head * T, query, T, stride_qt, stride_gt, D, BLOCK_D,
    )  # fmt: skip
    delta = tl.load(delta_ptr + head * T + query, mask=query < T, other=0.0)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    shift = S - T
    first = tile * BLOCK_M + shift
    diagonal = (first + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first + BLOCK_M, S)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], COMPUTE)
    grad_q = _gather_queries(
        grad_q, q, grad_o, lse, delta, k_ptr, v_ptr, query, 0, diagonal, S, shift, in_log,
        stride_kt, stride_vt, False, D, BLOCK_D, BLOCK_N, COMPUTE, PRECISION,
    )  # fmt: skip
    grad_q = _gather_queries(
        grad_q, q, grad_o, lse, delta, k_ptr, v_ptr, query, diagonal, end, S, shift, in_log,
        stride_kt, stride_vt, True, D, BLOCK_D, BLOCK_N, COMPUTE, PRECISION,
    )  # fmt: skip
    scale = number(scale_high, scale_low, COMPUTE)
    rows = (b * T * H + h) * D
    store_rows(grad_q_ptr + rows, query, H * D, T, grad_q * scale, D, BLOCK_D)


def causal_attention_bwd(grad_o, q, k, v, o, lse, scale: float, precision: str):
    """``(grad_q, grad_k, grad_v)``, contiguous. o and lse are those of ``causal_attention_fwd``;
    the last dimensions of the others are contiguous."""
    (B, T, H, _), S = q.shape, k.shape[1]
    shared = constants(q, precision)
    sizes = sizes_of(q, S, shared["BLOCK_D"])
    scales = (*halves(scale), *halves(scale / math.log(2)))
    strided = strides(q, k, v, grad_o)

    def on_chip(choice: Launch):
        grads = tuple(t.new_empty(t.shape) for t in (q, k, v))
        args = (grad_o, q, k, v, o, lse, *grads, T, S, H, *scales, *strided)
        start(causal_attention_bwd_on_chip_kernel, choice, B * H, args, **shared)
        return grads

    if serves("causal_attention_bwd_on_chip", q.device, sizes):
        return launch("causal_attention_bwd_on_chip", q.device, sizes, on_chip)

    def delta_pass(choice: Launch):
        delta, tiles = lse.new_empty(lse.shape), triton.cdiv(T, choice["BLOCK_M"])
        args = (grad_o, o, delta, T, H, tiles, *strides(grad_o))
        start(causal_attention_bwd_delta_kernel, choice, B * H * tiles, args, **shared)
        return delta

    delta = launch("causal_attention_bwd_delta", q.device, sizes, delta_pass)

    def key_pass(choice: Launch):
        grads, tiles = [t.new_empty(t.shape) for t in (k, v)], triton.cdiv(S, choice["BLOCK_N"])
        args = (grad_o, q, k, v, lse, delta, *grads, T, S, H, tiles, *scales, *strided)
        start(causal_attention_bwd_dkdv_kernel, choice, B * H * tiles, args, **shared)
        return grads

    def query_pass(choice: Launch):
        grad_q, tiles = q.new_empty(q.shape), triton.cdiv(T, choice["BLOCK_M"])
        args = (grad_o, q, k, v, lse, delta, grad_q, T, S, H, tiles, *scales, *strided)
        start(causal_attention_bwd_dq_kernel, choice, B * H * tiles, args, **shared)
        return grad_q

    grad_q = launch("causal_attention_bwd_dq", q.device, sizes, query_pass)
    return grad_q, *launch("causal_attention_bwd_dkdv", q.device, sizes, key_pass)
