"""The arithmetic of a training step: fp32, TF32 matrix products, or bf16 autocast."""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from .tarflow import TarFlow


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError where the device can't keep what ``precision`` promises."""
    if precision != "tf32":
        return
    if device.type != "cuda":
        raise ValueError(
            f"precision: tf32 needs tensor cores of a CUDA device, the model is on {device}; "
            f"take fp32"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"precision: tf32 needs compute capability 8.0, "
            f"{torch.cuda.get_device_name(device)} has less; take fp32"
        )


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Inside, fp32 matrix products round their factors to TF32 if ``precision`` is ``"tf32"``, else
    they don't; whatever was set before is back afterwards."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        name = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the switches alone: torch has no one word for it
        name = None
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        if name is not None:
            torch.set_float32_matmul_precision(name)
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast, or none. The ops of flowops keep ``exp`` and log-determinant in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def faster_precision(model: TarFlow, x: Tensor, y: Tensor | None) -> str:
    """``"bf16"`` where autocast makes a step at least a tenth faster here, else ``"fp32"``; on a
    GPU always bf16."""
    if x.device.type == "cuda":
        return "bf16"
    times = {"fp32": math.inf, "bf16": math.inf}
    for attempt in range(3):
        for name in times:
            start = time.perf_counter()
            with autocast(name, x.device):
                z, _, logdets = model(x, y)
            torch.autograd.grad(model.loss(z, logdets), list(model.parameters()), allow_unused=True)
            if attempt:  # the first pays for warming up
                times[name] = min(times[name], time.perf_counter() - start)
    return "bf16" if times["fp32"] > 1.1 * times["bf16"] else "fp32"
