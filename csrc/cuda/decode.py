"""Launches the kernels of decode.cu."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cuda_runtime
from ..cuda_runtime import TAGS, launch

THREADS, WARPS, TILE = 512, 15, 16

#: Keys of a unit of attention.
SPAN = 120
#: Most images of a batch: more have products large enough for kernels of their own.
MOST_IMAGES = 8
#: Shared memory that the emulator lends a block, in bytes: little, so that the ring comes round.
EMULATED_SHARED = 96 << 10

_PIECE = 256  # slots, decode_stream.cuh


@dataclass(frozen=True)
class Sizes:
    B: int
    T: int
    C: int
    R: int
    W: int
    E: int
    L: int
    heads: int
    P: int
    itemsize: int


def packets(elements: int, itemsize: int) -> int:
    """Of 12 bytes each."""
    return -(-elements * itemsize // 12)


def pitch(W: int) -> int:
    return -(-packets(W, 4) // 32) * 32


def _layout(s: Sizes, blocks: int, limit: int) -> tuple[int, list[int], int] | None:
    """Slots of the ring, where the parts of the shared memory begin (``at_...`` of
    ``DecodeArgs``) and bytes of all; None if ``limit`` bytes are too few."""
    row = max(max(s.W, s.E) * s.itemsize + 64, s.W * (s.itemsize + 4) + 64, s.P * 4)
    parts = [
        8,
        s.R * row,
        2 * WARPS * TILE * s.R * 4,
        s.R * pitch(s.W) // 32 * 8,
        -(-packets(s.W, 4) // blocks) * 3 * s.R * 4,
        s.B * s.C * 4,
        3 * s.W // s.heads * s.itemsize + WARPS * (s.W // s.heads + 2) * 4,
    ]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + -(-part // 16) * 16)
    ring = (limit - ends[-1]) // 128 * 8
    for K in (s.W, s.E):
        slots = K * s.itemsize // 16
        if ring < slots * (12 // s.itemsize + max(1, _PIECE // slots)):
            return None
    return ring, [ring * 16 + end for end in ends[:-1]], ring * 16 + ends[-1]


def _sizes(z, weights, embed, heads: int) -> Sizes:
    L, E, W = weights.up.shape
    return Sizes(*z.shape, len(embed), W, E, L, heads, len(weights.w_out), weights.qkv.itemsize)


def _blocks(s: Sizes, device: torch.device) -> int:
    """All of them wait for each other, and each owns something of every product."""
    return min(cuda_runtime.processors(device), packets(s.W, 4), packets(s.E, s.itemsize))


def _shared_limit(device: torch.device) -> int:
    return EMULATED_SHARED if device.type == "cpu" else cuda_runtime.shared_limit(device)


def reason(z, weights, embed, heads: int, window: int) -> str | None:
    """Why there is no kernel for these arguments, or None. ``weights``: PackedBlock, in rows."""
    s, dtype = _sizes(z, weights, embed, heads), weights.qkv.dtype
    if min(window, s.T - 1) > 1:
        return "it makes single steps alone, no sweeps over windows"
    if s.B > MOST_IMAGES:
        return f"it takes up to {MOST_IMAGES} images, not {s.B}"
    if z.dtype != torch.float32 or dtype not in (torch.float32, torch.bfloat16):
        return f"no CUDA kernel for {dtype} weights with {z.dtype} tokens"
    D = s.W // heads
    if D % 8 or D > 128:
        return f"its heads are {D} wide, which is no multiple of 8 up to 128"
    if s.E % 8:
        return f"its hidden width {s.E} is no multiple of 8"
    if any(w.data_ptr() % 16 for w in weights):
        return "its weights don't begin at multiples of 16 bytes"
    if _layout(s, _blocks(s, z.device), _shared_limit(z.device)) is None:
        return f"{s.R} rows of width {s.W} and {s.E} don't fit in a processor's shared memory"
    return None


def decode_block(z, weights, embed, guide, heads: int, eps, temperature, reverse: bool):
    """``(x, residual, counts)`` of ``flowops.decode.decode_block_reference`` for window 1."""
    s, dtype = _sizes(z, weights, embed, heads), weights.qkv.dtype
    counts = torch.arange(2, device=z.device) * (s.T - 1)  # no copy from the host
    if s.T == 1:
        return z.clone(), z.new_zeros(s.B), counts
    blocks, D = _blocks(s, z.device), s.W // heads
    ring, at, shared = _layout(s, blocks, _shared_limit(z.device))
    keys, values = (weights.qkv.new_empty(s.L, s.R, heads, s.T, D) for _ in "kv")
    x, scale = torch.empty_like(z), D**-0.5 / 0.6931471805599453
    swizzle = s.W % 64 == 0 and s.E % 64 == 0
    launch(
        *("decode", f"decode_block_{TAGS[dtype]}", blocks, THREADS),
        (
            *(z, x, *weights, embed, guide, keys, values, *_exchanges(s, z.device)),
            *(s.B, s.T, s.C, s.R, s.W, s.E, s.L, s.heads, s.P, reverse, SPAN, ring, swizzle),
            *(*at, float(eps), scale, scale / temperature),
        ),
        shared=shared,
        cooperative=True,
    )
    return x, z.new_zeros(s.B), counts


def _exchanges(s: Sizes, device: torch.device) -> tuple[Tensor, ...]:
    """What blocks send each other, in epoch 0: nothing yet."""
    D = s.W // s.heads
    spans, attended = -(-(s.T - 1) // SPAN), s.R * s.heads * packets(D, 4)
    sizes = [
        *[s.R * pitch(s.W)] * 2,
        s.R * packets(3 * s.W, s.itemsize),
        spans * (attended + s.R * s.heads),
        attended,
        s.R * packets(s.E, s.itemsize),
        s.R * packets(s.P, 4),
    ]
    return torch.zeros(sum(sizes), 4, dtype=torch.int32, device=device).split(sizes)
