"""The models of the benchmarks."""

from pathlib import Path

import torch

from flowops.api import TarFlow

#: in_channels, img_size, patch_size, channels, num_blocks, layers_per_block
DEMO = (1, 28, 4, 128, 4, 2)
MNIST = (1, 28, 4, 128, 4, 4)
WIDE_BLOCK = (3, 32, 2, 512, 1, 8)  # 100 MB of weights, which hardly fit into a CPU's caches
IMAGENET64 = (3, 64, 2, 768, 8, 8)

#: A whole model amplifies rounding by what its weights make of it.
FACTOR = 10


def make_model(device: str, config: tuple, classes: int = 0) -> TarFlow:
    """A TarFlow whose blocks are not the identity: noise on every parameter, of std 0.02 at width
    128 and less at larger ones, so that log-scales stay as large."""
    torch.manual_seed(0)
    model = TarFlow(*config, num_classes=classes).to(device)
    std = 0.02 * (128 / max(model.config["channels"], 128)) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn_like(parameter)
    return model


def trained_model(path: Path, device: str) -> TarFlow:
    """The model of a ``model.safetensors``.

    Raises:
        ValueError: if it has no affine steps, which the eager baseline expects.
    """
    from flowops.api import load_model

    model = load_model(path).to(device).eval()
    if not model.config["nvp"]:
        raise ValueError(f"model: expected one with affine steps, {path} has shifts alone")
    return model


def sizes(model: TarFlow) -> tuple[int, int, int, int]:
    """Attention layers, width, weights in products, tokens."""
    layers = sum(len(block.attn_blocks) for block in model.blocks)
    products = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    )
    return layers, model.config["channels"], products, model.num_patches
