"""Launches the kernels of attention.cu, and of attention_hopper.cu where they are faster."""

import math
import struct

import torch
from torch import Tensor

from ..cuda_runtime import TAGS, fits, launch
from . import attention_hopper

WARPS, SHARED = 4, 48 << 10
_HEAD = 64
#: Channels that the kernels have room for.
_COLUMNS = (16, 32, 48, 64)
#: Blocks of a grid in its second dimension, at most.
_MOST = 65535
#: Sign bits of two 16-bit numbers.
_SIGNS = 0x80008000


def patch_attention_reason(q, k, v, weight, bias, x) -> str | None:
    """Why there is no kernel for these tensors, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"no CUDA kernel for q in {q.dtype}, only for 16-bit ones"
    if x.dtype not in (q.dtype, torch.float32):
        return f"no CUDA kernel for x in {x.dtype} with q in {q.dtype}"
    if q.shape[3] != _HEAD:
        return f"heads are {q.shape[3]} wide; the CUDA kernel is for {_HEAD}"
    if x.shape[2] > _COLUMNS[-1]:
        return f"x has {x.shape[2]} channels; the CUDA kernel keeps {_COLUMNS[-1]} on chip"
    for name, tensor in (("q", q), ("k", k), ("v", v), ("weight", weight)):
        if tensor.stride(-1) == 1 and not fits(tensor, 8):
            return f"rows of {name} do not begin at multiples of 16 bytes"
    return None


def causal_patch_attention_fwd(q, k, v, weight, bias, x, reverse: bool, scale: float):
    """``(z, logdet, o, lse)``. weight ``[2C, HD]`` or ``[C, HD]``; last dimensions are
    contiguous."""
    if attention_hopper.serves(q, k, v, weight, bias, x):
        return attention_hopper.causal_patch_attention_fwd(q, k, v, weight, bias, x, reverse, scale)
    (B, T, H, _), C = q.shape, x.shape[2]
    columns = next(c for c in _COLUMNS if c >= C)
    # Twice 16 queries a warp, where registers and tokens suffice, halve what shared memory is read.
    rows = 2 if columns == 16 and T > 16 * WARPS else 1
    tiles = -(-T // (16 * WARPS * rows))
    z, o = x.new_empty(x.shape), q.new_empty(q.shape)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    has_scale = weight.shape[0] != C
    partial = lse.new_empty((B, tiles)) if has_scale else None
    launch(
        *("attention", f"causal_patch_attention_fwd_{TAGS[q.dtype]}_m{rows}_c{columns}"),
        *((tiles, min(B, _MOST), -(-B // _MOST)), 32 * WARPS),
        (
            *(q, k, v, weight, bias, x, z, partial, o, lse, B, T, H, C),
            *(has_scale, reverse, x.dtype != q.dtype, _SIGNS if scale < 0 else 0),
            *_bytes(q, k, v, weight),
            *x.stride()[:2],
            _bits(scale),
        ),
        shared=SHARED,
    )
    return z, partial.sum(1) if has_scale else lse.new_zeros(B), o, lse


def _bytes(*tensors: Tensor) -> list[int]:
    """Strides but for the last."""
    return [stride * t.element_size() for t in tensors for stride in t.stride()[:-1]]


def _bits(scale: float) -> int:
    """Of the scale in fp32. It is not 0, which would make NaN of the hidden scores, -infinity; the
    number in its place makes 0 of the others."""
    number = min(max(abs(scale) / math.log(2), 1e-30), 3e38)
    return struct.unpack("I", struct.pack("f", number))[0]
