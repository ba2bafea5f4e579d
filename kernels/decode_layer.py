"""A Transformer layer over cached keys and values, on the GPU: products and attention.

Row ``m = (r, t)`` is token ``front[b] + t`` of row r of the batch (image ``b = r % B``), t < n. The
positions are read on the device, so that every step is the same launch; rows at or past the last
token (whose parameters move nothing) store nothing, and programs of no other rows leave.

One or two rows have no use for tiles of a matrix unit: a program multiplies whole rows, whose norm
or merged attention it finds itself (every program again; they lie in the L2 cache). More rows have
that done once, apart.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .launch import TABLE, row

FEW_ROWS = 2  # that are multiplied without tiles
_PROGRAMS, _SPLITS = 256, 8  # programs that keep a GPU busy; most parts of a row of attention

# What the limits speak of: rows, length of the sums ("depth"), outputs, and bytes of an element.
_NARROW = {"rows": 256, "outputs": 1024, "itemsize": 2}
_STREAMED = [
    row(4, 1, BLOCK_M=1, BLOCK_N=32, BLOCK_K=64, limits={"rows": FEW_ROWS, "depth": 64}),
    row(4, 1, BLOCK_M=1, BLOCK_N=8, BLOCK_K=256, limits={"rows": FEW_ROWS, "depth": 256}),
    row(4, 1, BLOCK_M=1, BLOCK_N=8, BLOCK_K=1024, limits={"rows": FEW_ROWS, "depth": 1024}),
    row(8, 1, BLOCK_M=1, BLOCK_N=4, BLOCK_K=4096, limits={"rows": FEW_ROWS}),
    row(4, 1, BLOCK_M=16, BLOCK_N=64, BLOCK_K=32, limits={"depth": 64}),
    # Bound by what is on its way at a time, not by products.
    row(4, 4, BLOCK_M=16, BLOCK_N=16, BLOCK_K=256, limits={"rows": 16, "itemsize": 2}),
    row(4, 4, BLOCK_M=16, BLOCK_N=16, BLOCK_K=64, limits={"rows": 16}),
    row(4, 3, BLOCK_M=32, BLOCK_N=16, BLOCK_K=256, limits=_NARROW),
    row(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=128, limits={"rows": 256, "itemsize": 2}),
    row(4, 3, BLOCK_M=32, BLOCK_N=32, BLOCK_K=64, limits={"rows": 256}),
]
TABLE["decode_linear"] = {
    "default": [
        *_STREAMED,
        row(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    ],
    "sm90": [
        *_STREAMED,
        row(4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, limits={"rows": 2048, "itemsize": 2}),
        row(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, limits={"itemsize": 2}),
    ],
}
TABLE["decode_prepare"] = {"default": [row(4, 1)]}
TABLE["decode_attend_step"] = {
    "default": [row(4, 1, BLOCK_N=64, limits={"row_bytes": 128}), row(4, 1, BLOCK_N=32)]
}
TABLE["decode_attend_window"] = {
    "default": [
        row(4, 2, BLOCK_M=64, BLOCK_N=64, limits={"row_bytes": 128}),
        row(4, 2, BLOCK_M=32, BLOCK_N=32, limits={"row_bytes": 256}),
        row(8, 2, BLOCK_M=32, BLOCK_N=16),
    ]
}


@triton.jit
def positions(row, front_ptr, B, M, n, T):
    """r and position of each row, and whether its parameters move a token. [len(row)]"""
    r = row // n
    p = tl.load(front_ptr + r % B, mask=row < M, other=T) + row % n
    return r, p, p < T - 1


@triton.jit
def load_matrix(ptr, i, j, I: tl.constexpr, J: tl.constexpr, stride, BLOCK_I: tl.constexpr,
                BLOCK_J: tl.constexpr):  # fmt: skip
    """Elements (i, j) of ``[I, J]``, zeros outside. [len(i), len(j)]"""
    ptrs = ptr + i[:, None] * stride + j[None, :]
    if I % BLOCK_I == 0 and J % BLOCK_J == 0:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(i < I)[:, None] & (j < J)[None, :], other=0.0)


@triton.jit
def product(x, w, acc, PRECISION: tl.constexpr):
    """acc + x w^T for x [M, K], w [N, K], acc [M, N] in fp32."""
    if x.shape[0] == 1:
        return acc + tl.sum(x.to(tl.float32) * w.to(tl.float32), axis=1)[None, :]
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _normalized(h_ptr, norm_ptr, row, k, eps, K: tl.constexpr):
    """LayerNorm of whole rows of h; norm [2, K]: weight, bias. [len(row), len(k)]"""
    h = tl.load(h_ptr + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    weight = tl.load(norm_ptr + k, mask=k < K, other=0.0)
    bias = tl.load(norm_ptr + K + k, mask=k < K, other=0.0)
    centred = tl.where((k < K)[None, :], h - (tl.sum(h, axis=1) / K)[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred, axis=1) / K + eps)
    return centred / deviation[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _merged(part_ptr, lse_ptr, row, k, M, D: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr):
    """Attention from its parts over shares of the keys; the first share is never empty.
    [len(row), len(k)]"""
    mask = (k < K)[None, :]
    o_ptrs, lse_ptrs = part_ptr + k[None, :], lse_ptr + (k // D)[None, :]
    top = tl.load(lse_ptrs + row[:, None] * (K // D), mask=mask, other=0.0)
    o = tl.load(o_ptrs + row[:, None] * K, mask=mask, other=0.0)
    total = tl.full(top.shape, 1.0, tl.float32)
    for _ in tl.static_range(1, SPLITS):
        row += M
        lse = tl.load(lse_ptrs + row[:, None] * (K // D), mask=mask, other=0.0)
        part = tl.load(o_ptrs + row[:, None] * K, mask=mask, other=0.0)
        new = tl.maximum(top, lse)
        old, share = tl.exp2(top - new), tl.exp2(lse - new)
        o, total, top = o * old + part * share, total * old + share, new
    return o / total


@triton.jit
def decode_prepare_kernel(
    x_ptr, norm_ptr, lse_ptr, out_ptr, front_ptr, B, M, n, T, eps, K: tl.constexpr,
    D: tl.constexpr, INPUT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, K], a program a row: "norm", the norm of x; "parts", the attention of its parts."""
    row, k = tl.program_id(0) + tl.arange(0, 1), tl.arange(0, BLOCK_K)
    _, _, active = positions(row, front_ptr, B, M, n, T)
    if tl.max(active.to(tl.int32), axis=0) == 0:
        return
    wide = row.to(tl.int64)
    if INPUT == "norm":
        x = _normalized(x_ptr, norm_ptr, wide, k, eps, K)
    else:
        x = _merged(x_ptr, lse_ptr, wide, k, M, D, K, SPLITS)
    ptrs = out_ptr + wide[:, None] * K + k[None, :]
    tl.store(ptrs, x.to(out_ptr.dtype.element_ty), mask=(k < K)[None, :])


@triton.jit
def _addend(bias_ptr, embed_ptr, out_ptr, row, r, p, col, mask, N: tl.constexpr,
            OUTPUT: tl.constexpr):  # fmt: skip
    """What is added to a product. [len(row), len(col)] or [1, len(col)]"""
    if OUTPUT == "embed":
        addend = tl.load(bias_ptr + p[:, None] * N + col[None, :], mask=mask, other=0.0)
        addend += tl.load(embed_ptr + r[:, None] * N + col[None, :], mask=mask, other=0.0)
    else:
        addend = tl.load(bias_ptr + col, mask=col < N, other=0.0)[None, :]
    if OUTPUT == "add":
        addend += tl.load(out_ptr + row[:, None] * N + col[None, :], mask=mask, other=0.0)
    return addend


@triton.jit
def decode_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, lse_ptr, embed_ptr, out_ptr, k_ptr, v_ptr, front_ptr,
    B, M, n, T, eps, K: tl.constexpr, N: tl.constexpr, D: tl.constexpr, INPUT: tl.constexpr,
    OUTPUT: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x W^T + bias for x [M, K], W [N, K].

    INPUT: "rows", x as it is; "tokens", x [B, T, K] at the rows' positions; and, for one row a
    program, "norm" and "parts" as in ``decode_prepare_kernel``.
    OUTPUT: "embed", bias [T, N] by position and embed [M / n, N] added; "qkv", k and v stored into
    the cache [M / n, heads, T, D]; "gelu"; "add", to what out holds.
    """
    row_tiles = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)  # neighbours share weights
    row = pid % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    col = pid // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    r, p, active = positions(row, front_ptr, B, M, n, T)
    # A single row doesn't wait for its position before it asks for the weights.
    if BLOCK_M > 1:  # noqa: SIM102
        if tl.max(active.to(tl.int32), axis=0) == 0:
            return
    wide, r = row.to(tl.int64), r.to(tl.int64)
    inside = active if INPUT == "tokens" else row < M
    mask = (active if OUTPUT == "embed" else row < M)[:, None] & (col < N)[None, :]
    if BLOCK_M == 1:  # asked for along with the weights
        addend = _addend(bias_ptr, embed_ptr, out_ptr, wide, r, p, col, mask, N, OUTPUT)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w = load_matrix(weight_ptr, col, k, N, K, K, BLOCK_N, BLOCK_K)
        if INPUT == "norm":
            x = _normalized(x_ptr, norm_ptr, wide, k, eps, K)
        elif INPUT == "parts":
            x = _merged(x_ptr, lse_ptr, wide, k, M, D, K, SPLITS)
        else:
            at = (r % B) * T + p if INPUT == "tokens" else wide
            mask_x = inside[:, None] if K % BLOCK_K == 0 else inside[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + at[:, None] * K + k[None, :], mask=mask_x, other=0.0)
        acc = product(x.to(w.dtype), w, acc, PRECISION)
    if BLOCK_M > 1:
        addend = _addend(bias_ptr, embed_ptr, out_ptr, wide, r, p, col, mask, N, OUTPUT)
    acc += addend
    mask = active[:, None] & (col < N)[None, :]
    if OUTPUT == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if OUTPUT == "qkv":
        kind, head, d = col // K, col % K // D, col % D
        cached = ((r[:, None] * (K // D) + head[None, :]) * T + p[:, None]) * D + d[None, :]
        value = acc.to(k_ptr.dtype.element_ty)
        q_ptrs = out_ptr + wide[:, None] * K + col[None, :]
        tl.store(q_ptrs, value, mask=mask & (kind == 0)[None, :])
        tl.store(k_ptr + cached, value, mask=mask & (kind == 1)[None, :])
        tl.store(v_ptr + cached, value, mask=mask & (kind == 2)[None, :])
    else:
        ptrs = out_ptr + wide[:, None] * N + col[None, :]
        tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _share(keys, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Begin and end of one program's share of the keys, in whole tiles. [scalars]"""
    size = tl.cdiv(tl.cdiv(keys, BLOCK_N), SPLITS) * BLOCK_N
    return split * size, tl.minimum((split + 1) * size, keys)


@triton.jit
def _store_attention(o_ptr, lse_ptr, row, head, split, o, m, l, mask, M, heads, D: tl.constexpr,
                     BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Weighted sums o [rows, BLOCK_D] of maximum m and weight l [rows], divided. A share of no keys
    has l = 0; its log-sum-exp (base 2) is -inf."""
    d = tl.arange(0, BLOCK_D)
    at = split.to(tl.int64) * M + row
    if SPLITS > 1:
        tl.store(lse_ptr + at * heads + head, m + tl.log2(l), mask=mask)
    o = o / tl.where(l == 0.0, 1.0, l)[:, None]
    ptrs = o_ptr + (at[:, None] * heads + head) * D + d[None, :]
    tl.store(ptrs, o.to(o_ptr.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def decode_attend_step_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, front_ptr, B, R, T, heads, scale, free_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query a row and head. Each of BLOCK_N lanes of keys has a softmax of its own until the
    last key, so that nothing crosses lanes before. Scales are in units of log 2."""
    split, pair = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    r, head = (pair // heads).to(tl.int64), pair % heads
    p = tl.load(front_ptr + r % B)
    if p >= T - 1:
        return
    d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + (r * heads + head) * D + d, mask=d < D, other=0.0).to(tl.float32)
    q *= tl.where(r < B, scale, free_scale)
    cached = (r * heads + head) * T * D
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, end = _share(p + 1, split, SPLITS, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        mask = (key < end)[:, None] & (d < D)[None, :]
        at = cached + key[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(key < end, tl.sum(k * q[None, :], axis=1), float("-inf"))
        m_new = tl.maximum(m, s)
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight, rescale = tl.exp2(s - top), tl.exp2(m - top)
        l = l * rescale + weight
        acc = acc * rescale[:, None] + weight[:, None] * v
        m = m_new
    top = tl.max(m, axis=0)
    share = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    o, l = tl.sum(acc * share[:, None], axis=0), tl.sum(l * share, axis=0)
    one = tl.arange(0, 1)
    _store_attention(
        o_ptr, lse_ptr, r + one, head, split, o[None, :], top + tl.zeros([1], tl.float32),
        l + tl.zeros([1], tl.float32), one == 0, R, heads, D, BLOCK_D, SPLITS,
    )  # fmt: skip


@triton.jit
def _attend(
    acc, m, l, q, k_ptr, v_ptr, position, begin, end, scale, DIAGONAL: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes in the keys of [begin, end). acc [BLOCK_M, BLOCK_D]; m, l, position [BLOCK_M]"""
    d = tl.arange(0, BLOCK_D)
    for first in range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        at = key[:, None] * D + d[None, :]
        if DIAGONAL:
            mask = (key < end)[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + at, mask=mask, other=0.0)
            v = tl.load(v_ptr + at, mask=mask, other=0.0)
        else:
            k = tl.load(k_ptr + at, mask=(d < D)[None, :], other=0.0)
            v = tl.load(v_ptr + at, mask=(d < D)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32) * scale
        if DIAGONAL:
            seen = (key[None, :] <= position[:, None]) & (key < end)[None, :]
            # The window's later tokens may be infinite, and 0 * inf is not 0.
            spoilt = tl.max((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, axis=1)
            v = tl.where((spoilt != 0)[:, None], 0.0, v)
            s = tl.where(seen & (spoilt != 0)[None, :], float("nan"), s)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - top[:, None])
        rescale = tl.exp2(m - top)
        l = l * rescale + tl.sum(p, axis=1)
        acc = tl.dot(
            p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION,
            out_dtype=tl.float32,
        )  # fmt: skip
        m = m_new
    return acc, m, l


@triton.jit
def decode_attend_window_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, front_ptr, B, R, n, T, heads, tiles, scale, free_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of one row's window and head: queries at front + t, keys up to their own."""
    split, pid = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    tile, pair = tiles - 1 - pid % tiles, pid // tiles  # the longest first
    r, head = (pair // heads).to(tl.int64), pair % heads
    front = tl.load(front_ptr + r % B)
    if front + tile * BLOCK_M >= T - 1:
        return
    t, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    active = (t < n) & (front + t < T - 1)
    q_ptrs = q_ptr + ((r * n + t)[:, None] * heads + head) * D + d[None, :]
    q = tl.load(q_ptrs, mask=active[:, None] & (d < D)[None, :], other=0.0)
    cached = (r * heads + head) * T * D
    k_ptr += cached
    v_ptr += cached
    scale = tl.where(r < B, scale, free_scale)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = front + tile * BLOCK_M
    last = tl.minimum(tl.minimum(first + BLOCK_M, front + n), T - 1)
    begin, end = _share(last, split, SPLITS, BLOCK_N)
    diagonal = tl.minimum(tl.maximum((first + 1) // BLOCK_N * BLOCK_N, begin), end)
    acc, m, l = _attend(
        acc, m, l, q, k_ptr, v_ptr, front + t, begin, diagonal, scale, False, D, BLOCK_D, BLOCK_N,
        PRECISION,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, k_ptr, v_ptr, front + t, diagonal, end, scale, True, D, BLOCK_D, BLOCK_N,
        PRECISION,
    )  # fmt: skip
    _store_attention(
        o_ptr, lse_ptr, r * n + t, head, split, acc, m, l, active, R * n, heads, D, BLOCK_D, SPLITS
    )


def splits_of(rows: int, heads: int, window: int, tokens: int) -> int:
    """Into how many parts the keys of a row and head are split, for want of other programs."""
    programs = rows * heads * triton.cdiv(window, 64)
    return max(1, min(_SPLITS, _PROGRAMS // programs, triton.cdiv(tokens, 64)))


def tiles_for(name: str, device: torch.device, **sizes: int) -> launch.Launch:
    """The launch that ``TABLE`` has. Nothing is ever timed (``FLOWOPS_AUTOTUNE``): what a launch
    takes depends on the fronts of the moment."""
    return launch.choose(name, launch.family_of(device), tuple(sizes.items()))


def precision_of(weight: torch.Tensor, precision: str) -> str:
    """The ``input_precision`` of products with ``weight``: it speaks of fp32 alone."""
    return precision if weight.dtype == torch.float32 else "ieee"
