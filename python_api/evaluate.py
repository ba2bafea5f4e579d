"""How good a model is on held-out images: bits per dim, and classification by Bayes' rule.

The images are cut among the processes of a run, each taken once. The noise of an image depends on
its number in the data alone, so that the figures depend neither on how many processes there are nor
on the size of the batches.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .data import Images, scale_pixels
from .loading import ImageSource
from .parallel import World
from .precision import autocast, check_precision, matmul_precision
from .tarflow import TarFlow
from .train_config import TrainConfig
from .trainer import add_noise

Result = TypeVar("Result")

_NOISE_SEED = 0x5EED  # evaluation draws the same noise whatever run it is part of

#: With more classes than these, images are classified only where asked for.
MANY_CLASSES = 50


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        bits_per_dim: the mean over images, in ``unit``.
        standard_error: of that mean, over images.
        accuracy: share of the ``classified`` images that Bayes' rule labels right, or None.
        images: how many.
        classified: how many of them, the first ones, were classified.
        unit: "bits per dim", on the scale of 256 levels; for latents "bits per latent dim", on the
            scale that they are stored in.
    """

    bits_per_dim: float
    standard_error: float
    accuracy: float | None
    images: int
    classified: int = 0
    unit: str = "bits per dim"


def share(n: int, world: World) -> range:
    """Which of n images are this process's: runs of equal length, the last ones shorter or empty.

    Args:
        n: images, over all processes.
    """
    size = -(-n // world.size)
    return range(min(world.rank * size, n), min((world.rank + 1) * size, n))


def image_batches(
    data: ImageSource, images: range, batch_size: int, size: int | None = None
) -> Iterator[tuple[int, Images]]:
    """The number of the first image and the images, batch by batch.

    Args:
        data: what to take them from.
        images: which.
        batch_size: images at a time, at most.
        size: side of the centre square that is taken of each; None: all of it.

    Raises:
        ValueError: if the images are smaller.
    """
    for start in range(images.start, images.stop, batch_size):
        chosen = data[torch.arange(start, min(start + batch_size, images.stop))]
        yield start, chosen if size is None else _centre_square(chosen, size)


def noisy_batches(
    data: ImageSource,
    config: TrainConfig,
    device: torch.device,
    batch_size: int = 256,
    images: range | None = None,
    size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images once, scaled, under the noise the model was trained with, drawn the same every time;
    and their labels.

    Args:
        config: says what noise.
        device: where they are put.
        data, batch_size, images, size: as in ``image_batches``; all images unless said otherwise.

    Raises:
        ValueError: if the images are smaller than ``size``.
    """
    rng = torch.tensor([_NOISE_SEED, 0], device=device)
    images = range(len(data)) if images is None else images
    for start, chosen in image_batches(data, images, batch_size, size):
        x, y = chosen.pixels.to(device), chosen.labels
        x = scale_pixels(x) if x.dtype == torch.uint8 else x.float()
        yield add_noise(x, config, rng, start), None if y is None else y.to(device)


@torch.no_grad()
def evaluate(
    model: TarFlow,
    data: ImageSource,
    config: TrainConfig,
    classify: bool | int | None = None,
    *,
    world: World | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates on ``data``; all processes have to call it and get the same.

    For a model with classes, the likelihood is that under the true label, and Bayes' rule picks the
    label with the largest likelihood, all being equally probable beforehand: a pass for every image
    and class.

    Args:
        model: whole in every process.
        data: ``Images`` or a store. Of images larger than the model's the centre is taken. Latents,
            whose pixels are floating, are taken as they are.
        config: says what noise the model was trained with.
        classify: how many images to classify, the first ones: True for all, False for none; None
            for all if the model has at most ``MANY_CLASSES`` classes. Without labels there are none
            to compare with, and nothing is classified.
        world: the processes; None for this one alone.
        batch_size: images at a time in a pass.
        precision: ``"fp32"``, ``"tf32"`` or ``"bf16"``, of the passes.
        on_batch: called after each batch with the passes, each of an image under a label, that
            this process has done and those it has to do in all.

    Raises:
        ValueError: naming what of data, device or arguments does not fit.
        OSError: those of ``data``.
        RuntimeError: naming another process that failed.
    """
    world = world or World(device=model.var.device)
    uint8, labelled = check_data(model, data)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a positive number of images, got {batch_size}")
    check_precision(precision, model.var.device)
    classified = _images_to_classify(classify, len(data), model.num_classes if labelled else 0)
    mine, to_classify = share(len(data), world), share(classified, world)
    progress = _Progress(len(mine) + len(to_classify) * model.num_classes, on_batch)

    def batches(images: range) -> Iterator[tuple[Tensor, Tensor | None]]:
        return noisy_batches(
            data, config, model.var.device, batch_size, images, size=model.img_size
        )

    def work() -> Tensor:
        bits, right = [model.var.new_zeros(0)], torch.zeros((), device=model.var.device)
        with matmul_precision(precision), autocast(precision, model.var.device):
            for x, y in batches(mine):
                bits.append(model.bits_per_dim(x, y if model.num_classes else None))
                progress.add(len(x))
            for x, y in batches(to_classify):
                table = _bits_by_class(model, x, batch_size, progress)
                right += (table.argmin(1) == y).sum()
        return torch.stack([*_moments(torch.cat(bits).double()), right.double()])

    sums = world.gather(together(world, work)[None])
    n, mean, variance = _pooled(sums)
    return Evaluation(
        bits_per_dim=mean - (0 if uint8 else math.log2(128)),
        standard_error=math.sqrt(variance / n),
        accuracy=sums[:, 3].sum().item() / classified if classified else None,
        images=len(data),
        classified=classified,
        unit="bits per dim" if uint8 else "bits per latent dim",
    )


def print_evaluation(console, result: Evaluation, noise: str) -> None:
    """Two lines on a ``rich.console.Console``.

    Args:
        noise: under which the images were, as ``noise_name`` tells.
    """
    console.print(
        f"{result.bits_per_dim:.4f} ± {result.standard_error:.4f} {result.unit} "
        f"({result.images} held-out images, {noise} noise)"
    )
    if result.accuracy is not None:
        part = f" (the first {result.classified})" if result.classified < result.images else ""
        console.print(f"{result.accuracy:.1%} classified right by Bayes' rule{part}")


def together(world: World, work: Callable[[], Result]) -> Result:
    """What ``work`` returns here, or an error in all processes where it fails in any, so that none
    waits for another."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    world.agree(error)
    return result


def check_data(model: TarFlow, data: ImageSource) -> tuple[bool, bool]:
    """Whether the pixels are of 256 levels, and whether there are labels.

    Raises:
        ValueError: where images, channels or classes are not the model's.
    """
    if not len(data):
        raise ValueError("data: expected at least one image")
    one = data[torch.zeros(1, dtype=torch.long)]
    if one.pixels.shape[1] != model.in_channels:
        raise ValueError(
            f"data: expected {model.in_channels} channels, those of the model, got "
            f"{one.pixels.shape[1]}"
        )
    _centre_square(one, model.img_size)
    if one.labels is not None and model.num_classes not in (0, len(data.class_names)):
        raise ValueError(f"data: expected {model.num_classes} classes, got {len(data.class_names)}")
    return one.pixels.dtype == torch.uint8, one.labels is not None


# --- parts ---------------------------------------------------------------------------------------


def _centre_square(images: Images, size: int) -> Images:
    H, W = images.pixels.shape[2:]
    if min(H, W) < size:
        raise ValueError(f"data: expected images of at least {size} pixels a side, got {H}x{W}")
    top, left = (H - size) // 2, (W - size) // 2
    pixels = images.pixels[:, :, top : top + size, left : left + size]
    return Images(pixels, images.labels, images.class_names)


def _images_to_classify(classify: bool | int | None, n: int, num_classes: int) -> int:
    if not num_classes:
        return 0
    if classify is None:
        classify = num_classes <= MANY_CLASSES
    if classify < 0:
        raise ValueError(f"classify: expected a number of images, at least 0, got {classify}")
    return n if classify is True else min(int(classify), n)


def _bits_by_class(model: TarFlow, x: Tensor, batch_size: int, progress: "_Progress") -> Tensor:
    """Bits per dim under each label, ``[B, num_classes]``: pairs of an image and a label, as many
    at a time as images otherwise."""
    pairs, bits = torch.arange(len(x) * model.num_classes, device=x.device), []
    for part in pairs.split(batch_size):
        bits.append(model.bits_per_dim(x[part // model.num_classes], part % model.num_classes))
        progress.add(len(part))
    return torch.cat(bits).view(len(x), model.num_classes)


def _moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Their number, mean and sum of squares about the mean."""
    n = values.new_tensor(len(values))
    mean = values.sum() / n.clamp(min=1)
    return n, mean, (values - mean).square().sum()


def _pooled(moments: Tensor) -> tuple[int, float, float]:
    """Number, mean and variance of all values from the moments ``[parts, 3 or more]`` of parts.

    Source: Chan, Golub and LeVeque (1983), for any number of parts.
    """
    n, mean, squares = moments.cpu()[:, :3].unbind(1)
    total = n.sum()
    centre = (n * mean).sum() / total
    squares = (squares + n * (mean - centre).square()).sum()
    return int(total), centre.item(), (squares / (total - 1).clamp(min=1)).item()


class _Progress:
    def __init__(self, total: int, on_batch: Callable[[int, int], None] | None):
        self._done, self._total, self._on_batch = 0, total, on_batch

    def add(self, passes: int) -> None:
        self._done += passes
        if self._on_batch is not None:
            self._on_batch(self._done, self._total)
