"""The reference program of TarFlow, as it is and accelerated: training steps and samples.

    git clone https://github.com/apple/ml-tarflow
    python examples/accelerate_tarflow.py --code ml-tarflow/transformer_flow.py --out runs

Both train on the same images of discs, from the same weights, and sample from the same noise. Needs
matplotlib and tyro, and takes less than a minute on one core.

Source: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329).
"""

import copy
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

from flowops.api import accelerate


@dataclass
class Options:
    code: Path
    """transformer_flow.py of the reference program, or another file with such a class Model."""
    out: Path = Path("runs")
    """Folder that accelerate_tarflow.png is written to."""
    steps: int = 200
    """Training steps for each."""
    batch: int = 32
    channels: int = 64
    blocks: int = 4
    layers: int = 1
    method: str = "exact"
    """Of the accelerated sampler: exact, jacobi or auto."""
    seed: int = 0


def load(code: Path) -> type[nn.Module]:
    spec = importlib.util.spec_from_file_location("tarflow_code", code)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Model


def discs(n: int, size: int = 16) -> Tensor:
    """``[n, 1, size, size]`` in [-1, 1], with a little noise: a density needs some."""
    axis = torch.arange(size, dtype=torch.float32)
    center, radius = size * (0.3 + 0.4 * torch.rand(n, 2)), size * (0.12 + 0.12 * torch.rand(n))
    distance = torch.hypot(axis - center[:, :1, None], axis[:, None] - center[:, 1:, None])
    return (radius.view(n, 1, 1) - distance).tanh().unsqueeze(1) + 0.1 * torch.randn(
        n, 1, size, size
    )


def train(name: str, model: nn.Module, options: Options) -> None:
    torch.manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = time.perf_counter()
    for _ in range(options.steps):
        z, _, logdets = model(discs(options.batch))
        loss = 0.5 * z.square().mean() - logdets.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    step = (time.perf_counter() - start) / options.steps
    print(f"{name}: loss {loss.item():.4f}, {1e3 * step:.0f} ms a step")


@torch.no_grad()
def sample(name: str, model: nn.Module, noise: Tensor, **solver) -> Tensor:
    start = time.perf_counter()
    images = model.reverse(noise.clone(), **solver)
    print(f"{name}: {len(noise)} images in {1e3 * (time.perf_counter() - start):.0f} ms")
    return images


def main(options: Options) -> None:
    torch.manual_seed(options.seed)
    plain = load(options.code)(1, 16, 2, options.channels, options.blocks, options.layers)
    fast = accelerate(copy.deepcopy(plain))
    train("plain", plain, options)
    train("accelerated", fast, options)

    plain.load_state_dict(fast.state_dict())
    noise = torch.randn(8, 64, 4)
    images = {
        "plain": sample("plain", plain, noise),
        "accelerated": sample("accelerated", fast, noise, method=options.method),
    }
    difference = (images["plain"] - images["accelerated"]).abs().max()
    print(f"the images differ by {difference:.1e} at most")

    figure = Figure(figsize=(8, 2.4), layout="tight")
    for row, (name, batch) in enumerate(images.items()):
        axis = figure.add_subplot(2, 1, row + 1)
        axis.imshow(torch.cat(list(batch[:, 0]), dim=1), cmap="gray", vmin=-1, vmax=1)
        axis.set(ylabel=name, xticks=[], yticks=[])
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "accelerate_tarflow.png", dpi=120)
    print(options.out / "accelerate_tarflow.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
