"""Causal attention on the GPU, forward: q, k, v ``[B, T, H, D]`` read in place through strides.

Two shapes of kernel. Where all keys of a head fit on chip (the table says) attention is bound by
memory, so one program owns a head, loads its k and v once and runs over its queries. Longer
sequences run tile by tile with the running softmax of FlashAttention, the mask on the diagonal
tiles alone. Query t sees the keys up to t + S - T.

Source: Dao, "FlashAttention-2" (arXiv 2307.08691).
"""

import math

import torch
import triton
import triton.language as tl

from .launch import TABLE, Launch, launch, row, serves, start
from .numerics import COMPUTE

# What the limits speak of: bytes of a row of k and of an element, keys, and keys times width.
# The default rows fit the 99 KB of shared memory that the smallest GPUs from sm_80 on have.
TABLE["causal_attention_fwd"] = {
    "default": [
        row(4, 2, BLOCK_M=64, BLOCK_N=64, limits={"row_bytes": 128}),
        row(8, 2, BLOCK_M=64, BLOCK_N=32, limits={"row_bytes": 256}),
        row(8, 2, BLOCK_M=32, BLOCK_N=16),
    ],
    "sm90": [
        row(4, 3, BLOCK_M=64, BLOCK_N=64, limits={"row_bytes": 64}),
        row(8, 3, BLOCK_M=128, BLOCK_N=64, limits={"row_bytes": 128}),
        row(8, 2, BLOCK_M=128, BLOCK_N=64, limits={"row_bytes": 256, "itemsize": 2}),
    ],
}
# Wider dtypes would spill: their products take three passes.
TABLE["causal_attention_fwd_on_chip"] = {
    "default": [
        row(4, 1, BLOCK_M=32, BLOCK_S=32, limits={"itemsize": 2, "keys": 32}),
        row(4, 1, BLOCK_M=64, BLOCK_S=64, limits={"itemsize": 2, "keys": 64}),
        row(8, 1, BLOCK_M=64, BLOCK_S=128, limits={"itemsize": 2, "keys": 128}),
        row(8, 1, BLOCK_M=64, BLOCK_S=256, limits={"itemsize": 2, "keys": 256, "area": 256 * 64}),
    ]
}


@triton.jit
def load_rows(ptr, rows, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """Rows of a matrix, zeros past ``limit`` rows or D columns. [len(rows), BLOCK_D]"""
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if MASKED:
        return tl.load(ptrs, mask=(rows < limit)[:, None] & (cols < D)[None, :], other=0.0)
    elif D != BLOCK_D:
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_rows(ptr, rows, stride, limit, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores ``values [len(rows), BLOCK_D]`` where ``load_rows`` reads, in the dtype stored."""
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = (rows < limit)[:, None] & (cols < D)[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def number(high, low, COMPUTE: tl.constexpr):
    """A number of its two halves: one that is passed reaches a kernel in fp32."""
    if COMPUTE == tl.float64:
        return tl.full((), high, tl.float64) + tl.full((), low, tl.float64)
    else:
        return tl.full((), high, tl.float32)


@triton.jit
def _attend(
    acc, m, l, q, k_ptr, v_ptr, position, begin, end, S, scale, stride_kt, stride_vt,
    DIAGONAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes in the keys of [begin, end). acc [BLOCK_M, BLOCK_D]; m, l, position [BLOCK_M]"""
    for n in range(begin, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, stride_kt, S, D, BLOCK_D, DIAGONAL)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=COMPUTE)
        s = s * scale  # [BLOCK_M, BLOCK_N], in units of log 2
        if DIAGONAL:
            s = tl.where(key[None, :] <= position[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(p, axis=1)
        v = load_rows(v_ptr, key, stride_vt, S, D, BLOCK_D, DIAGONAL)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=COMPUTE)
        m = m_new
    return acc, m, l


@triton.jit
def attention_tile(
    q_ptr, k_ptr, v_ptr, tile, T, S, scale, stride_qt, stride_kt, stride_vt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
):  # fmt: skip
    """o [BLOCK_M, BLOCK_D] and log-sum-exp [BLOCK_M] of one tile of one head's queries."""
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    position = query + (S - T)
    q = load_rows(q_ptr, query, stride_qt, T, D, BLOCK_D, True)
    if NEGATIVE_SCALE:  # the running maximum is one of scaled scores only if scale >= 0
        q = -q
    acc = tl.zeros([BLOCK_M, BLOCK_D], COMPUTE)
    m = tl.full([BLOCK_M], float("-inf"), COMPUTE)
    l = tl.zeros([BLOCK_M], COMPUTE)
    first = tile * BLOCK_M + (S - T)  # what the tile's first query sees last
    diagonal = (first + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first + BLOCK_M, S)
    acc, m, l = _attend(
        acc, m, l, q, k_ptr, v_ptr, position, 0, diagonal, S, scale, stride_kt, stride_vt,
        False, D, BLOCK_D, BLOCK_N, COMPUTE, PRECISION,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, k_ptr, v_ptr, position, diagonal, end, S, scale, stride_kt, stride_vt,
        True, D, BLOCK_D, BLOCK_N, COMPUTE, PRECISION,
    )  # fmt: skip
    ln2: tl.constexpr = 0.6931471805599453
    return acc / l[:, None], (m + tl.log2(l)) * ln2


@triton.jit
def causal_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, T, S, H, tiles, scale_high, scale_low,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles  # the longest first; neighbours share k and v in the L2 cache
    head = (pid // tiles).to(tl.int64)
    b, h = head // H, head % H
    scale = number(scale_high, scale_low, COMPUTE)
    o, lse = attention_tile(
        q_ptr + b * stride_qb + h * stride_qh, k_ptr + b * stride_kb + h * stride_kh,
        v_ptr + b * stride_vb + h * stride_vh, tile, T, S, scale,
        stride_qt, stride_kt, stride_vt,
        D, BLOCK_D, BLOCK_M, BLOCK_N, COMPUTE, PRECISION, NEGATIVE_SCALE,
    )  # fmt: skip
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    store_rows(o_ptr + (b * T * H + h) * D, query, H * D, T, o, D, BLOCK_D)
    tl.store(lse_ptr + head * T + query, lse, mask=query < T)


@triton.jit
def causal_attention_fwd_on_chip_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, T, S, H, scale_high, scale_low,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    scale = number(scale_high, scale_low, COMPUTE)
    key = tl.arange(0, BLOCK_S)
    k = load_rows(k_ptr + b * stride_kb + h * stride_kh, key, stride_kt, S, D, BLOCK_D, True)
    v = load_rows(v_ptr + b * stride_vb + h * stride_vh, key, stride_vt, S, D, BLOCK_D, True)
    for begin in range(0, T, BLOCK_M):
        query = begin + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr + b * stride_qb + h * stride_qh, query, stride_qt, T, D, BLOCK_D, True)
        if NEGATIVE_SCALE:
            q = -q
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=COMPUTE) * scale
        s = tl.where(key[None, :] <= query[:, None] + (S - T), s, float("-inf"))
        m = tl.max(s, axis=1)
        p = tl.exp2(s - m[:, None])  # [BLOCK_M, BLOCK_S]
        l = tl.sum(p, axis=1)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=COMPUTE) / l[:, None]
        store_rows(o_ptr + (b * T * H + h) * D, query, H * D, T, o, D, BLOCK_D)
        ln2: tl.constexpr = 0.6931471805599453
        tl.store(lse_ptr + head * T + query, (m + tl.log2(l)) * ln2, mask=query < T)


def sizes_of(q: torch.Tensor, S: int, BLOCK_D: int) -> dict[str, int]:
    """What the rows' limits speak of."""
    return {
        "row_bytes": BLOCK_D * q.element_size(),
        "itemsize": q.element_size(),
        "keys": S,
        "area": S * BLOCK_D,
    }


def constants(q: torch.Tensor, precision: str) -> dict:
    """The constants that all attention kernels share."""
    D = q.shape[3]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    return {
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "COMPUTE": COMPUTE[compute],
        "PRECISION": precision if q.dtype == torch.float32 else "ieee",
    }


def halves(value: float) -> tuple[float, float]:
    """A number as what ``number`` takes: in fp32, and what is left."""
    high = torch.tensor(value, dtype=torch.float32).item()
    return high, value - high


def strides(*tensors: torch.Tensor) -> list[int]:
    """All but the last, which is 1."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def causal_attention_fwd(q, k, v, scale: float, precision: str):
    """``o [B, T, H, D]`` and the log-sum-exp ``[B, H, T]``. The last dimensions are contiguous;
    precision is the ``input_precision`` of fp32 products: "tf32x3", "tf32" or "ieee"."""
    (B, T, H, _), S = q.shape, k.shape[1]
    shared = constants(q, precision)
    sizes = sizes_of(q, S, shared["BLOCK_D"])
    on_chip = serves("causal_attention_fwd_on_chip", q.device, sizes)

    def attempt(choice: Launch):
        o = q.new_empty(q.shape)
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_empty((B, H, T), dtype=lse_dtype)
        tiles = () if on_chip else (triton.cdiv(T, choice["BLOCK_M"]),)
        start(
            causal_attention_fwd_on_chip_kernel if on_chip else causal_attention_fwd_kernel,
            *(choice, B * H * math.prod(tiles)),
            (
                q,
                k,
                v,
                o,
                lse,
                T,
                S,
                H,
                *tiles,
                *halves(abs(scale) / math.log(2)),
                *strides(q, k, v),
            ),
            **shared,
            NEGATIVE_SCALE=scale < 0,
        )
        return o, lse

    kernel = "causal_attention_fwd_on_chip" if on_chip else "causal_attention_fwd"
    return launch(kernel, q.device, sizes, attempt)
