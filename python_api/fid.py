"""Frechet Inception distance between the images of a data set and a model's samples.

Features are those of the Inception network that published figures are made with, computed by
torch-fidelity; sums and the distance are those of torchmetrics. The network's weights are read from
disk and never downloaded.

Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium" (arXiv 1706.08500).
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowops import noise_normal

from .batching import fitting_batch, in_batches
from .checkpoint import read_tensors
from .data import to_pixels
from .decode import Guidance, Solver
from .evaluate import check_data, image_batches, share, together
from .loading import ImageSource
from .parallel import World
from .precision import matmul_precision
from .tarflow import TarFlow

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_WEIGHTS_FROM = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"

#: Images at a time in the network: at 299 pixels a side its activations are the larger part.
_FEATURE_BATCH = 64


class Inception(nn.Module):
    """Pool features of an Inception network of torch-fidelity: uint8 ``[B, 3, H, W]`` to
    ``[B, 2048]``. It resizes the images to 299 pixels a side, as TensorFlow 1 did."""

    num_features = 2048

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)[0]


def find_weights(path: str | Path | None = None) -> Path:
    """The file of the Inception network's weights: ``path``, or that of torch.hub's cache.

    Raises:
        FileNotFoundError: saying which file belongs where.
    """
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"fid_weights: no such file: {path}")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"FID needs the weights of its Inception network, which nothing here downloads: put "
            f"{_WEIGHTS_FROM}/{WEIGHTS} at {path}, or name the file with fid_weights"
        )
    return path


def load_inception(path: str | Path | None = None) -> Inception:
    """The network, in evaluation mode, with weights from disk.

    Args:
        path: as in ``find_weights``; a table of tensors, ``.pth`` or ``.safetensors``. No code that
            a pickle may carry is run.

    Raises:
        ImportError: if torchmetrics or torch-fidelity is missing.
        FileNotFoundError, ValueError: naming the file that is missing or holds something else.
    """
    _import_metric()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise _missing(error) from error
    path = find_weights(path)
    # torch-fidelity unpickles whatever it is given: it is given what was read safely, written anew.
    tensors = io.BytesIO()
    torch.save(read_tensors(path)[0], tensors)
    tensors.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=tensors
        )
    except RuntimeError as error:  # of load_state_dict, a line for each key that differs
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: not the weights of FID's Inception network ({reason})") from None
    return Inception(network).eval()


@torch.no_grad()
def compute_fid(
    model: TarFlow,
    data: ImageSource,
    n: int,
    *,
    world: World | None = None,
    feature: nn.Module | None = None,
    denoise_std: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    on_batch: Callable[[int, int], None] | None = None,
    **options,
) -> float:
    """The distance of n samples from all images of ``data``; all processes have to call it and get
    the same.

    The noise of sample i depends on seed and i alone. The labels of a model with classes have the
    frequencies of the data's; without labels they are the classes in turn.

    Args:
        model: whole in every process.
        data: ``Images`` or a store of uint8 images; of larger ones than the model's the centre is
            taken.
        n: samples.
        world: the processes; None for this one alone.
        feature: from uint8 ``[B, 3, H, W]`` to ``[B, num_features]``, with an attribute
            ``num_features``; None for ``load_inception()``.
        denoise_std: if positive, ``denoise`` the samples with it.
        seed: of the samples.
        batch_size: samples at a time, at most.
        on_batch: called after each batch with the images, real and drawn, that this process has
            done and those it has to do in all.
        options: of ``TarFlow.reverse``: guidance, method and what belongs to them.

    Raises:
        ImportError, FileNotFoundError: as ``load_inception``.
        ValueError, TypeError: naming what of data, model or arguments does not fit.
        RuntimeError: naming another process that failed.
    """
    world = world or World(device=model.var.device)
    device = model.var.device
    _check_images(model, data, n)
    feature = (load_inception() if feature is None else feature).to(device)
    # By itself it would gather the sums of all processes in each.
    metric = _import_metric()(feature, sync_on_compute=False).to(device)
    real, drawn = share(len(data), world), share(n, world)
    done = 0

    def update(pixels: Tensor, is_real: bool) -> None:
        nonlocal done
        for part in pixels.split(_FEATURE_BATCH):
            metric.update(part.expand(-1, 3, -1, -1), real=is_real)
        done += len(pixels)
        if on_batch is not None:
            on_batch(done, len(real) + len(drawn))

    def work() -> None:
        with matmul_precision("fp32"):
            for _, images in image_batches(data, real, batch_size, model.img_size):
                update(images.pixels.to(device), is_real=True)
            labels = sample_labels(data, n, model.num_classes)
            for images in _samples(model, drawn, labels, seed, denoise_std, batch_size, options):
                update(to_pixels(images), is_real=False)

    together(world, work)
    for kind in ("real", "fake") if world.size > 1 else ():
        for name in ("sum", "cov_sum", "num_samples"):
            dist.all_reduce(getattr(metric, f"{kind}_features_{name}"))
    return world.first(metric.cpu().compute().item() if world.rank == 0 else None)


def sample_labels(data: ImageSource, n: int, num_classes: int) -> Tensor | None:
    """The labels of n samples, int64 ``[n]``, on the CPU: in the frequencies of the data's, sorted;
    the classes in turn for data without labels; None for a model without classes."""
    if not num_classes:
        return None
    labels, numbers = getattr(data, "labels", None), torch.arange(n)
    if labels is None:
        return numbers % num_classes
    return labels.cpu().sort().values[numbers * len(labels) // n]


# --- parts ---------------------------------------------------------------------------------------


def _samples(
    model: TarFlow,
    images: range,
    labels: Tensor | None,
    seed: int,
    denoise_std: float,
    batch_size: int,
    options: dict,
) -> Iterator[Tensor]:
    """Samples with the numbers ``images``: those that ``model.sample`` draws from the seed."""
    if not images:
        return
    device = model.var.device
    rng = torch.tensor([seed, 0], device=device)

    def draw(first: int, last: int) -> Tensor:
        first, last = images.start + first, images.start + last
        shape = (last - first, model.num_patches, model.patch_channels)
        noise = noise_normal((shape[0], shape[1] * shape[2]), rng=rng, first_row=first).view(shape)
        y = None if labels is None else labels[first:last].to(device)
        x = model.reverse(noise.to(model.var.dtype), y, **options)
        return model.denoise(x, y, denoise_std) if denoise_std > 0 else x

    guidance = Guidance(options.get("guidance", 0.0))
    solver = Solver(options.get("method", "exact"), window=options.get("window"))
    asked = min(len(images), batch_size)
    batch = fitting_batch(model.blocks, asked, guidance, solver, device)
    yield from in_batches(len(images), batch, draw)


def _check_images(model: TarFlow, data: ImageSource, n: int) -> None:
    uint8, _ = check_data(model, data)
    if not uint8 or model.in_channels not in (1, 3):
        kind = f"uint8 images of {model.in_channels} channels" if uint8 else "latents"
        raise ValueError(f"data: FID needs grey or RGB images of 256 levels, got {kind}")
    for name, images in (("data", len(data)), ("n", n)):
        if images < 2:
            raise ValueError(f"{name}: FID needs at least two images, got {images}")


def _import_metric() -> type:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except (ImportError, RuntimeError) as error:
        raise _missing(error) from error
    return FrechetInceptionDistance


def _missing(error: Exception) -> ImportError:
    # A torchvision made for another torch fails to import with a RuntimeError.
    return ImportError(
        f"FID needs torchmetrics and torch-fidelity, pip install 'flowops[fid]': {error}"
    )
