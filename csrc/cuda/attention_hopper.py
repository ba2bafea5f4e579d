"""Launches the kernels of attention_hopper.cu."""

import math

import torch

from ..cuda_runtime import TAGS, blocks_at_once, fits, launch

THREADS = 384
#: Queries that a block owns at a time, and of those a warp.
BLOCK, WARP_ROWS = 128, 16
WIDTH = 64
#: Rows of the weight that kernels have room for; half of them for the log-scales.
ROWS = (32, 64, 96, 128)


def serves(q, k, v, weight, bias, x) -> bool:
    """Whether the kernels are for a GPU and arguments like these: compute capability 9.0, heads of
    width 64 in a 16-bit dtype, C up to 64, x in that dtype or fp32, rows that begin at multiples of
    16 bytes. With 64 tokens or fewer one of the two consumers would have nothing to do."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and x.shape[1] > BLOCK // 2
        and takes(q, k, v, weight, bias, x)
    )


def takes(q, k, v, weight, bias, x) -> bool:
    """Whether the kernels compute this; ``serves`` says where they are the way."""
    return (
        q.shape[3] == WIDTH
        and q.dtype in (torch.bfloat16, torch.float16)
        and x.dtype in (q.dtype, torch.float32)
        and x.shape[2] <= ROWS[-1] // 2
        and all(t.stride(-1) == 1 for t in (q, k, v, weight, bias, x))
        and all(fits(t, 8) for t in (q, k, v, weight))
    )


def shared_bytes(rows: int) -> int:
    """As ``Shared`` in attention_hopper.cu: two slots of queries and weight, six stages of 64 keys
    and values, and barriers of 8 bytes: two for a stage, one for a slot."""
    return 2 * (BLOCK + rows) * 128 + 6 * 2 * 64 * 128 + (2 * 6 + 2) * 8


def causal_patch_attention_fwd(q, k, v, weight, bias, x, reverse: bool, scale: float):
    """``(z, logdet, o, lse)``. weight ``[2C, HD]`` or ``[C, HD]``."""
    (B, T, H, _), C = q.shape, x.shape[2]
    rows = next(rows for rows in ROWS if rows >= 2 * C)
    tiles, has_scale = -(-T // BLOCK), weight.shape[0] != C
    z, o = x.new_empty(x.shape), q.new_empty(q.shape)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    logdet = x.new_zeros(B, dtype=torch.float32)
    partial = lse.new_empty((B, tiles * (BLOCK // WARP_ROWS))) if has_scale else None
    launch(
        *("attention_hopper", f"causal_patch_attention_fwd_hopper_{TAGS[q.dtype]}_n{rows}"),
        *(min(B * tiles, blocks_at_once(q.device, 1)), THREADS),
        (
            *(q, k, v, weight, bias, x, z, partial, o, lse),
            *(B, T, H, C, has_scale, reverse, x.dtype != q.dtype, scale < 0),
            # Not 0, which would make NaN of scores that the mask has set to -infinity.
            max(abs(scale) / math.log(2), 2.0**-126),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            *(weight.stride(0), *x.stride()[:2]),
        ),
        shared=shared_bytes(rows),
    )
    return z, partial.sum(1) if has_scale else logdet, o, lse
