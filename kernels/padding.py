"""Padding with noise on the GPU: the noise is drawn where it is used, the output written once."""

import torch
import triton
import triton.language as tl

from .launch import TABLE, Launch, launch, row, start
from .noise import normals
from .numerics import COMPUTE

TABLE["pad_noise_fwd"] = {"default": [row(4, BLOCK=256)]}


@triton.jit
def _scale(scale, IN_MEMORY: tl.constexpr, COMPUTE: tl.constexpr):
    if IN_MEMORY:
        return tl.load(scale).to(COMPUTE)
    else:
        return tl.full((), scale, COMPUTE)


@triton.jit
def pad_noise_fwd_kernel(
    x_ptr, rng_ptr, out_ptr, pad_scale, data_scale, N, D, width, groups_per_row, stride_xn,
    PAD_SCALE_IN_MEMORY: tl.constexpr, DATA_SCALE_IN_MEMORY: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    row = group // groups_per_row
    col = (group % groups_per_row)[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK, 4]
    mask = (row < N)[:, None] & (col < width)
    is_data = col < D
    x = tl.load(x_ptr + row[:, None] * stride_xn + col, mask=mask & is_data, other=0.0)
    pad_scale = _scale(pad_scale, PAD_SCALE_IN_MEMORY, COMPUTE)
    data_scale = _scale(data_scale, DATA_SCALE_IN_MEMORY, COMPUTE)
    scale = tl.where(is_data, data_scale, pad_scale)
    out = x.to(COMPUTE) + normals(rng_ptr, group).to(COMPUTE) * scale
    tl.store(out_ptr + row[:, None] * width + col, out.to(out_ptr.dtype.element_ty), mask=mask)


def pad_noise_fwd(x, rng, pad: int, pad_scale, data_scale, compute: torch.dtype):
    """``[N, D + pad]``. x ``[N, D]`` has contiguous rows; a scale is a 0-d tensor: on the CPU it is
    read here, on x's device by the kernel, so that nothing ever waits."""
    N, D = x.shape
    width = D + pad
    groups_per_row = triton.cdiv(width, 4)

    def argument(scale: torch.Tensor):
        if scale.device == x.device and x.device.type != "cpu":
            return scale
        if compute == torch.float32:
            return float(scale)
        # A number reaches a kernel in fp32; a double has to go through memory.
        return torch.full((), float(scale), dtype=compute, device=x.device)

    pad_scale, data_scale = argument(pad_scale), argument(data_scale)

    def attempt(choice: Launch):
        out = x.new_empty((N, width))
        start(
            *(pad_noise_fwd_kernel, choice, triton.cdiv(N * groups_per_row, choice["BLOCK"])),
            (
                *(x, rng, out, pad_scale, data_scale),
                *(N, D, width, groups_per_row, x.stride(0)),
            ),
            fuse=False,
            PAD_SCALE_IN_MEMORY=isinstance(pad_scale, torch.Tensor),
            DATA_SCALE_IN_MEMORY=isinstance(data_scale, torch.Tensor),
            COMPUTE=COMPUTE[compute],
        )
        return out

    return launch("pad_noise_fwd", x.device, {}, attempt)
