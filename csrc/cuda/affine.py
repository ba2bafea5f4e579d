"""Launches the kernels of affine.cu."""

import torch
from torch import Tensor

from ..cuda_runtime import TAGS, blocks_at_once, fits, launch

THREADS = 256

#: Chunks of all rows together, where rows are long enough: what large GPUs hold at once.
UNITS = 1024

#: Storage types of x and params that there are kernels for, and the vectors they are moved in.
VECTORS = {
    ("f32", "f32"): (4,),
    ("f32", "bf16"): (4,),
    ("f32", "f16"): (4,),
    ("bf16", "bf16"): (8, 4),
    ("f16", "f16"): (8, 4),
    ("f64", "f64"): (2,),
}


def dtype_reason(x: Tensor, params: Tensor) -> str | None:
    """Why there is no kernel for these storage types, or None."""
    if (TAGS.get(x.dtype), TAGS.get(params.dtype)) not in VECTORS:
        return f"no CUDA kernel for x in {x.dtype} with params in {params.dtype}"
    return None


def _variant(x: Tensor, params: Tensor, *dense: Tensor) -> tuple[str, int]:
    """Name of the storage types, and the widest vector that divides rows and addresses; ``dense``
    are contiguous tensors of x's shape."""
    tags = TAGS[x.dtype], TAGS[params.dtype]
    for vector in VECTORS[tags]:
        if x.shape[2] % vector == 0 and all(fits(t, vector) for t in (x, params, *dense)):
            return "_".join(tags), vector
    return "_".join(tags), 1


def _chunks(x: Tensor, vector: int) -> tuple[int, int]:
    """Into how many chunks a batch row is cut, from sizes alone so that sums are the same on every
    GPU, and the grid."""
    B, T, C = x.shape
    most = -(-T * C // (THREADS * vector))
    chunks = min(-(-UNITS // B), most)
    return chunks, min(B * chunks, blocks_at_once(x.device, 4))


def _sizes(x: Tensor, params: Tensor, chunks: int, reverse: bool) -> tuple[int, ...]:
    B, T, C = x.shape
    return (
        *(B, T, C, chunks, params.shape[2] != C, reverse),
        *(*x.stride()[:2], *params.stride()[:2]),
    )


def affine_fwd(x, params, reverse: bool, inverse: bool, compute: torch.dtype):
    """``(z, logdet)``, or ``(x, None)`` for the inverse. x ``[B, T, C]`` and params have a
    contiguous last dimension."""
    B, _, C = x.shape
    name, vector = _variant(x, params)
    chunks, grid = _chunks(x, vector)
    out, has_scale = x.new_empty(x.shape), params.shape[2] != C
    partial = x.new_empty((B, chunks), dtype=compute) if has_scale and not inverse else None
    launch(
        *("affine", f"affine_{'inverse' if inverse else 'update'}_{name}_v{vector}"),
        *(grid, THREADS),
        (x, params, out, partial, *_sizes(x, params, chunks, reverse)),
        shared=THREADS // 32 * compute.itemsize,
    )
    if inverse:
        return out, None
    if not has_scale:
        return out, x.new_zeros(B, dtype=compute)
    return out, partial.view(B) if chunks == 1 else partial.sum(1)


def affine_bwd(grad, grad_logdet, x, params, reverse: bool, inverse: bool, compute: torch.dtype):
    """``(grad_x, grad_params)``; grad and grad_logdet are contiguous."""
    name, vector = _variant(x, params, grad)
    chunks, grid = _chunks(x, vector)
    grad_x, grad_params = x.new_empty(x.shape), params.new_empty(params.shape)
    launch(
        *("affine", f"affine_{'inverse' if inverse else 'update'}_backward_{name}_v{vector}"),
        *(grid, THREADS),
        (
            *(grad, grad_logdet, x, params, grad_x, grad_params),
            *_sizes(x, params, chunks, reverse),
        ),
    )
    return grad_x, grad_params
