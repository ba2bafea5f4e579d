"""How good a model is on held-out images: bits per dim, and classification by Bayes' rule."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Images, scale_pixels
from .tarflow import TarFlow
from .train_config import TrainConfig
from .trainer import add_noise

_NOISE_SEED = 0x5EED  # evaluation draws the same noise whatever run it is part of


@dataclass(frozen=True)
class Evaluation:
    """``bits_per_dim`` with its standard error over images; ``accuracy`` of Bayes' rule or None."""

    bits_per_dim: float
    standard_error: float
    accuracy: float | None
    images: int


def noisy_batches(
    data: Images, config: TrainConfig, device: torch.device, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The images once, under the noise the model was trained with, drawn the same every time."""
    for i, start in enumerate(range(0, len(data), batch_size)):
        index = torch.arange(start, min(start + batch_size, len(data)))
        part = data[index]
        rng = torch.tensor([_NOISE_SEED, i], device=device)
        x = add_noise(scale_pixels(part.pixels.to(device)), config, rng)
        yield x, None if part.labels is None else part.labels.to(device)


@torch.no_grad()
def evaluate(
    model: TarFlow, data: Images, config: TrainConfig, classify: bool = True
) -> Evaluation:
    """Evaluates on ``data``.

    For a model with classes, the likelihood is that under the true label, and Bayes' rule picks the
    label with the largest likelihood, all being equally probable beforehand; that takes one pass a
    class, which ``classify=False`` saves.

    Raises:
        ValueError: if model and data do not fit.
    """
    if data.labels is not None and model.num_classes not in (0, len(data.class_names)):
        raise ValueError(f"data: expected {model.num_classes} classes, got {len(data.class_names)}")
    classified = classify and data.labels is not None and model.num_classes > 0
    bits, correct = [], 0
    for x, y in noisy_batches(data, config, model.var.device):
        if not classified:
            bits.append(model.bits_per_dim(x, y if model.num_classes else None))
            continue
        table = torch.stack(
            [model.bits_per_dim(x, torch.full_like(y, c)) for c in range(model.num_classes)], dim=1
        )
        bits.append(table.gather(1, y.unsqueeze(1)).squeeze(1))
        correct += int((table.argmin(1) == y).sum())
    values = torch.cat(bits).double()
    return Evaluation(
        bits_per_dim=values.mean().item(),
        standard_error=values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0,
        accuracy=correct / len(values) if classified else None,
        images=len(values),
    )
