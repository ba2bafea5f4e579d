"""What a training step computes, and what the device can: the two halves of MFU."""

import statistics
import time

import torch

from .tarflow import TarFlow


def training_flops(model: TarFlow) -> int:
    """Operations that training on one image takes: two a weight and token forward and four
    backward, attention over the causal pairs and 2.5 times that backward. What activation
    checkpoints compute again is not counted, as is the custom for MFU."""
    T = model.num_patches
    products = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    )
    widths = sum(
        layer.attention.proj.in_features for block in model.blocks for layer in block.attn_blocks
    )
    attention = 4 * widths * T * (T + 1) // 2
    return 3 * 2 * products * T + attention * 7 // 2


def measured_peak(device: torch.device, precision: str) -> float:
    """Operations a second of a large square matrix product, the median of five."""
    side = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(7):  # the first two warm up
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[2:])
