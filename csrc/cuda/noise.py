"""Launches the kernels of noise.cu, and cuts matrices into the tiles of noise_tiles.cuh."""

import torch
from torch import Tensor

from ..cuda_runtime import blocks_at_once, launch

THREADS = 256
#: Bytes of a tile, and of the margins before and behind it.
TILE, MARGIN = 16 << 10, 32

_PER_PROCESSOR = 5  # blocks


def reason(width: int) -> str | None:
    """Why there is no kernel for rows of this width, or None."""
    if width >= 2**31 and width % 4 != 0:
        return "a row has 2^31 elements, which the CUDA kernels count in 32 bits"
    return None


def tiles(out: Tensor, per_processor: int) -> tuple[int, int, int]:
    """Elements of a tile of ``out``, the grid and the bytes of shared memory. All blocks get the
    same number of tiles, and a tile is 16-byte vectors, at least a group for every thread."""
    size, blocks = out.element_size(), blocks_at_once(out.device, per_processor)
    rounds = -(-out.numel() * size // (blocks * TILE))
    length = max(-(-out.numel() // (blocks * rounds)), 4 * THREADS)
    length = -(-length * size // 16) * 16 // size
    return length, min(-(-out.numel() // length), blocks), length * size + 2 * MARGIN


def noise_fwd(rng: Tensor, rows: int, width: int, kind: str, first_row: int) -> Tensor:
    """``[rows, width]``: int64 words, or fp32 values. rng is contiguous."""
    out = rng.new_empty((rows, width), dtype=torch.int64 if kind == "words" else torch.float32)
    if width % 4 == 0:
        grid = min(-(-out.numel() // (4 * THREADS)), blocks_at_once(rng.device, _PER_PROCESSOR))
        args = (rng, out, rows, width, 0, first_row)
        launch("noise", f"noise_{kind}_in_order", grid, THREADS, args)
    else:
        length, grid, shared = tiles(out, _PER_PROCESSOR)
        args = (rng, out, rows, width, length, first_row)
        launch("noise", f"noise_{kind}", grid, THREADS, args, shared=shared)
    return out
