"""A causal attention written by hand, accelerated: forecasts of noisy waves.

    python examples/accelerate_attention.py --out runs

The network predicts the next value of a series from all values before. Needs matplotlib and tyro,
and takes some twenty seconds on one core.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from flowops.api import accelerate


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, causal: bool = True):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, T, 3, self.num_heads, W // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        if self.causal:
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return self.proj((scores.softmax(3) @ v).transpose(1, 2).reshape(B, T, W))


class Forecaster(nn.Module):
    def __init__(self, tokens: int, width: int, layers: int):
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.positions = nn.Parameter(0.1 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(Attention(width, num_heads=4) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unsqueeze(2)) + self.positions[: x.shape[1]]
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h).squeeze(2)


def waves(n: int, tokens: int) -> Tensor:
    """``[n, tokens + 1]``: one value more than the network reads."""
    t = torch.arange(tokens + 1) / 8
    phase, frequency = 6.28 * torch.rand(n, 1), 0.5 + torch.rand(n, 1)
    return torch.sin(frequency * t + phase) + 0.05 * torch.randn(n, tokens + 1)


@dataclass
class Options:
    out: Path = Path("runs")
    """Folder that accelerate_attention.png is written to."""
    steps: int = 60
    """Training steps for each."""
    batch: int = 16
    tokens: int = 256
    width: int = 64
    layers: int = 2
    seed: int = 0


def train(model: nn.Module, options: Options) -> float:
    """Prints the last loss; seconds per step."""
    torch.manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    start = time.perf_counter()
    for _ in range(options.steps):
        series = waves(options.batch, options.tokens)
        loss = F.mse_loss(model(series[:, :-1]), series[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.5f}")
    return (time.perf_counter() - start) / options.steps


def main(options: Options) -> None:
    torch.manual_seed(options.seed)
    plain = Forecaster(options.tokens, options.width, options.layers)
    fast = accelerate(copy.deepcopy(plain))  # finds all attentions inside
    before, after = train(plain, options), train(fast, options)
    print(f"plain {1e3 * before:.1f} ms a step, accelerated {1e3 * after:.1f} ms")
    try:
        accelerate(Attention(options.width, num_heads=4, causal=False))
    except ValueError as error:
        print(f"one without a mask is refused: {error}")

    series = waves(1, options.tokens)
    with torch.no_grad():
        forecast = fast(series[:, :-1])
    figure = Figure(figsize=(8, 2.6), layout="tight")
    axis = figure.subplots()
    axis.plot(series[0, 1:], label="series")
    axis.plot(forecast[0], label="forecast from all values before")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "accelerate_attention.png", dpi=120)
    print(options.out / "accelerate_attention.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
