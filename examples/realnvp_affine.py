"""A RealNVP on two moons out of ``AffineUpdate``, against the same couplings in plain torch.

    python examples/realnvp_affine.py --out runs

Needs matplotlib and tyro, and takes half a minute on one core.

Source: Dinh et al., "Density Estimation using Real NVP" (arXiv 1605.08803).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

from flowops.api import AffineUpdate


class RealNVP(nn.Module):
    """Couplings of two halves that take turns."""

    def __init__(self, features: int, couplings: int, width: int):
        super().__init__()
        half = features // 2
        self.couplings = nn.ModuleList(
            AffineUpdate(
                nn.Sequential(
                    nn.Linear(half, width),
                    nn.GELU(),
                    nn.Linear(width, width),
                    nn.GELU(),
                    nn.Linear(width, 2 * half),
                )
            )
            for _ in range(couplings)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logdets = 0
        for coupling in self.couplings:
            x, logdet = coupling(x)
            x, logdets = x.flip(1), logdets + logdet
        return x, logdets

    def log_prob(self, x: Tensor) -> Tensor:
        z, logdet = self(x)
        return logdet - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def sample(self, n: int) -> Tensor:
        x = torch.randn(n, 2)
        for coupling in reversed(self.couplings):
            x, _ = coupling.inverse(x.flip(1))
        return x


def log_prob_by_hand(flow: RealNVP, x: Tensor) -> Tensor:
    """The line that ``AffineUpdate`` stands for, written out."""
    logdets = 0
    for coupling in flow.couplings:
        x1, x2 = x.chunk(2, -1)
        s, t = coupling.net(x1).chunk(2, -1)
        x, logdets = torch.cat([x1, x2 * s.exp() + t], -1).flip(1), logdets + s.sum(-1)
    return logdets - 0.5 * (x.square() + math.log(2 * math.pi)).sum(1)


def moons(n: int) -> Tensor:
    angle, lower = math.pi * torch.rand(n), torch.rand(n) < 0.5
    sign = 1 - 2 * lower.float()
    x = torch.stack([sign * angle.cos() + lower - 0.5, sign * angle.sin() + 0.5 * lower - 0.25], 1)
    return x + 0.08 * torch.randn(n, 2)


@dataclass
class Options:
    out: Path = Path("runs")
    """Folder that realnvp_affine.png is written to."""
    steps: int = 1000
    batch: int = 512
    couplings: int = 8
    width: int = 64
    """Of the two hidden layers of every network."""
    seed: int = 0


def main(options: Options) -> None:
    torch.manual_seed(options.seed)
    flow = RealNVP(2, options.couplings, options.width)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        loss = -flow.log_prob(moons(options.batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    data = moons(2000)
    with torch.no_grad():
        ours, by_hand, samples = (
            flow.log_prob(data),
            log_prob_by_hand(flow, data),
            flow.sample(2000),
        )
    print(f"log p {ours.mean():.3f} nats, by hand {by_hand.mean():.3f}")
    print(f"they differ by {(ours - by_hand).abs().max():.1e} at most")

    figure = Figure(figsize=(6.4, 3.2), layout="tight")
    panels = {"data": data, "samples": samples}
    for axis, (title, points) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axis.scatter(*points.T.numpy(), s=2, linewidths=0)
        axis.set(title=title, xlim=(-2, 2), ylim=(-1.5, 1.5), aspect="equal")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "realnvp_affine.png", dpi=120)
    print(options.out / "realnvp_affine.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
