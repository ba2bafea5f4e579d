"""TarFlow through flowops against the same model in plain eager PyTorch, in one run."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from flowops.api import TarFlow

from .eager import EagerTarFlow
from .timing import Timing, gate, interleave


@dataclass(frozen=True)
class Comparison:
    """Timings of one job and the largest relative error of ours that the gate saw."""

    ours: Timing
    eager: Timing
    error: float

    @property
    def speedup(self) -> float:
        return self.eager.median / self.ours.median


def compare_training(
    model: TarFlow, x: Tensor, y: Tensor | None, precision: str = "fp32", seconds: float = 8.0
) -> Comparison:
    """One training step: forward, backward, clipping and AdamW, each side as it is used. Works on
    copies of the model."""
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    eager = EagerTarFlow(theirs)
    error = _gate_density(model, x, y)
    optimizers = (
        torch.optim.AdamW(ours.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True),
        torch.optim.AdamW(theirs.parameters(), lr=1e-5, betas=(0.9, 0.95)),
    )

    def step(forward, loss, parameters, optimizer):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            z, _, logdets = forward(x, y)
            value = loss(z, logdets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    timings = interleave(
        {
            "ours": lambda: step(ours, ours.loss, ours.parameters(), optimizers[0]),
            "eager": lambda: step(eager.forward, eager.loss, theirs.parameters(), optimizers[1]),
        },
        seconds,
    )
    return Comparison(timings["ours"], timings["eager"], error)


def compare_sampling(
    model: TarFlow,
    noise: Tensor,
    y: Tensor | None,
    guidance: float = 0.0,
    seconds: float = 8.0,
) -> Comparison:
    """Exact sampling from the same noise."""
    eager = EagerTarFlow(model)
    golden = EagerTarFlow(copy.deepcopy(model).double()).reverse(noise.double(), y, guidance)
    error = gate(
        "sampling",
        model.reverse(noise, y, guidance),
        eager.reverse(noise, y, guidance),
        golden,
        torch.float32,
        factor=10,
    )

    def wait(images: Tensor):
        if images.is_cuda:
            torch.cuda.synchronize()

    timings = interleave(
        {
            "ours": lambda: wait(model.reverse(noise, y, guidance)),
            "eager": lambda: wait(eager.reverse(noise, y, guidance)),
        },
        seconds,
        warmup=1,
    )
    return Comparison(timings["ours"], timings["eager"], error)


@torch.no_grad()
def _gate_density(model: TarFlow, x: Tensor, y: Tensor | None) -> float:
    golden = EagerTarFlow(copy.deepcopy(model).double()).forward(x.double(), y)
    plain, ours = EagerTarFlow(model).forward(x, y), model(x, y)
    return max(
        gate(name, ours[i], plain[i], golden[i], torch.float32, factor=10)
        for name, i in (("z", 0), ("logdet", 2))
    )
