"""The probe of the GPU's exp rate. Imported on a GPU alone, where Triton is."""

import torch
import triton
import triton.language as tl

BLOCK = 1024
CHAIN = 256


@triton.jit
def exp_sweep_kernel(x_ptr, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + offsets)  # [BLOCK]
    for _ in tl.static_range(CHAIN):
        value = tl.exp2(-value)  # stays in (0, 1), and depends on the one before
    tl.store(x_ptr + offsets, value)


def exp_sweep(x: torch.Tensor) -> int:
    """Launches the sweep over ``x``, a multiple of BLOCK; returns how many exps it computes."""
    exp_sweep_kernel[(x.numel() // BLOCK,)](x, BLOCK=BLOCK, CHAIN=CHAIN, num_warps=4)
    return x.numel() * CHAIN
