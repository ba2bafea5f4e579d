"""Launches the kernels of padding.cu."""

import torch
from torch import Tensor

from ..cuda_runtime import TAGS, fits, launch
from .noise import THREADS, tiles


def reason(x: Tensor, pad: int) -> str | None:
    """Why there is no kernel for these, or None."""
    if x.dtype not in TAGS:
        return f"no CUDA kernel for {x.dtype}"
    if x.shape[1] + pad >= 2**28:
        return "a row has 2^28 elements, which the CUDA kernels count in 32 bits"
    return None


def pad_noise_fwd(
    x: Tensor, rng: Tensor, pad: int, pad_scale: float | Tensor, data_scale: float | Tensor
) -> Tensor:
    """``[N, D + pad]``. x ``[N, D]`` has contiguous rows. A scale that is a 0-d tensor, on x's
    device, is read by the kernel, so that nothing waits."""
    (N, D), tag = x.shape, TAGS[x.dtype]
    out = x.new_empty((N, D + pad))
    if isinstance(data_scale, float) and data_scale == 0:
        kernel, blocks = f"pad_noise_on_padding_{tag}_v{_vector(x)}", 3
    else:
        kernel, blocks = f"pad_noise_everywhere_{tag}", 5
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    scales = (pad_scale, data_scale)
    in_memory = [s.to(compute) if isinstance(s, Tensor) else None for s in scales]
    numbers = [0.0 if isinstance(s, Tensor) else s for s in scales]
    length, grid, shared = tiles(out, blocks)
    args = (x, rng, out, *in_memory, *numbers, N, D, D + pad, x.stride(0), length)
    launch("padding", kernel, grid, THREADS, args, shared=shared)
    return out


def _vector(x: Tensor) -> int:
    """Elements of the vectors that x can be read in: it has no gaps and is aligned, so that a
    vector may reach into the next row, or its rows are whole vectors."""
    N, D = x.shape
    vector = 16 // x.element_size()
    dense = (N == 1 or x.stride(0) == D) and x.data_ptr() % 16 == 0
    return vector if dense or (D % vector == 0 and fits(x, vector)) else 1
