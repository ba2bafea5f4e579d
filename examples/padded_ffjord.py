"""A continuous flow (FFJORD) on data on a circle, with 0, 1 and 2 columns of padding.

    python examples/padded_ffjord.py --out runs

The circle has no density in the plane, so the log-likelihood that is printed has no upper limit
(with a data_scale above 0 it has one); what counts is where the samples lie. After so short a
training the order of the three changes with the seed. Needs torchdiffeq, matplotlib and tyro, and
takes less than a minute on one core.

Source: Grathwohl et al., "FFJORD" (arXiv 1810.01367); Meng et al., "PaddingFlow" (arXiv
2403.08216).
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchdiffeq import odeint

from flowops.api.padded import PaddedFlow


class FFJORD(nn.Module):
    """``dx/dt = f(t, x)`` from data x at t = 0 to a standard normal z at t = 1,
    ``log p(x) = log N(z; 0, I) + int tr(df/dx) dt``; f is a perceptron with two hidden layers."""

    def __init__(self, columns: int, width: int, solver_steps: int):
        super().__init__()
        self.features = columns
        self.first = nn.Linear(columns + 1, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, columns)
        self.solver = {"method": "midpoint", "options": {"step_size": 1 / solver_steps}}

    def velocity(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """f ``[N, D]`` and its trace ``[N]``, exact: sum_jk s2_j W2_jk (W1 W3)_kj s1_k with the
        slopes s1, s2 of the hidden layers."""
        h1 = torch.tanh(self.first(torch.cat([x, t.expand(len(x), 1)], dim=1)))
        h2 = torch.tanh(self.second(h1))
        loop = self.first.weight[:, : self.features] @ self.third.weight
        trace = ((1 - h2.square()) @ (self.second.weight * loop.T) * (1 - h1.square())).sum(1)
        return self.third(h2), trace

    def log_prob(self, x: Tensor) -> Tensor:
        z, logdet = odeint(
            lambda t, state: self.velocity(t, state[0]),
            (x, x.new_zeros(len(x))),
            x.new_tensor([0.0, 1.0]),
            **self.solver,
        )
        return logdet[-1] - 0.5 * (z[-1].square() + math.log(2 * math.pi)).sum(1)

    def sample(self, n: int) -> Tensor:
        z = self.third.weight.new_empty(n, self.features).normal_()
        times = z.new_tensor([1.0, 0.0])
        return odeint(lambda t, x: self.velocity(t, x)[0], z, times, **self.solver)[-1]


def circle(n: int, generator: torch.Generator) -> Tensor:
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def chamfer(a: Tensor, b: Tensor) -> float:
    """Mean distance to the nearest point of the other set, from a and from b, added."""
    distance = torch.cdist(a, b)
    return (distance.amin(0).mean() + distance.amin(1).mean()).item()


@dataclass
class Options:
    out: Path = Path("runs")
    """Folder that padded_ffjord.png is written to."""
    pads: tuple[int, ...] = (0, 1, 2)
    """Numbers of padding columns to compare."""
    data_scale: float = 0.0
    """Standard deviation of the noise on the data in training."""
    steps: int = 300
    """Training steps for each."""
    batch: int = 256
    lr: float = 1e-2
    """Peak learning rate; a cosine down to 0."""
    width: int = 64
    """Of the hidden layers."""
    solver_steps: int = 8
    """Midpoint steps between data and noise."""
    seed: int = 0


def train(data: Tensor, pad: int, options: Options) -> PaddedFlow:
    torch.manual_seed(options.seed)
    flow = FFJORD(data.shape[1] + pad, options.width, options.solver_steps)
    padded = PaddedFlow(flow, data.shape[1], pad, data_scale=options.data_scale)
    optimizer = torch.optim.Adam(padded.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        loss = -padded(data[torch.randint(len(data), (options.batch,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(padded.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return padded.eval()


def main(options: Options) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    data, held_out = circle(4000, generator), circle(1000, generator)
    panels = {"data": held_out}
    for pad in options.pads:
        start = time.perf_counter()
        padded = train(data, pad, options)
        samples = padded.sample(len(held_out))
        with torch.no_grad():
            log_prob = padded.log_prob(held_out, estimator="iwae").mean()
        off, distance = (samples.norm(dim=1) - 1).abs(), chamfer(samples, held_out)
        print(
            f"p = {pad}: Chamfer {distance:.4f}, off the circle {off.mean():.4f} on average and "
            f"{off.quantile(0.99):.3f} at 99 %, log p {log_prob:.2f} nats, "
            f"{time.perf_counter() - start:.0f} s"
        )
        panels[f"p = {pad}: Chamfer {distance:.3f}"] = samples

    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="tight")
    axes = figure.subplots(1, len(panels))
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        axis.scatter(*points.T.numpy(), s=3, linewidths=0)
        axis.set(title=title, xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "padded_ffjord.png", dpi=120)
    print(options.out / "padded_ffjord.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
