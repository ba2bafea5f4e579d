"""What a training run is made of, and the published runs by name.

Source: arXiv 2412.06329, appendix B; the commands of its reference program.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin


@dataclass(frozen=True)
class TrainConfig:
    """What a training run is made of."""

    patch_size: int = 4
    """Side of a patch in pixels."""
    channels: int = 128
    """Width of the Transformer, a multiple of 64."""
    blocks: int = 4
    """Autoregressive blocks."""
    layers: int = 2
    """Transformer layers in each block."""
    deep_layers: int = 0
    """Transformer layers of the block nearest the noise; 0: as the others."""
    deep_channels: int = 0
    """Width of the block nearest the noise; 0: as the others."""
    architecture: Literal["tarflow", "starflow"] = "tarflow"
    """What the blocks are made of: docs/starflow.md."""
    nvp: bool = True
    """Affine steps; without it shifts alone, with a learned prior variance."""
    noise: Literal["gaussian", "uniform"] = "gaussian"
    """Noise on the training images: Gaussian for samples, uniform for bits per dim."""
    noise_std: float = 0.1
    """Standard deviation of the Gaussian noise; images span [-1, 1]."""
    crop: int = 0
    """Augmentation: take a random square of this many pixels of each image; 0: all of it."""
    shift: int = 0
    """Augmentation: move each image by up to this many pixels."""
    flip: bool = False
    """Augmentation: mirror images left to right, each with a probability of one half."""
    conditional: bool = True
    """Use the labels, if the data has any."""
    drop_label: float = 0.1
    """Share of labels dropped, for guidance."""
    steps: int = 1000
    batch_size: int = 64
    """Images a step, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches a step: their gradients are added up before the update."""
    lr: float = 2e-3
    """Peak learning rate, after warm-up; then a cosine down to 1e-6."""
    warmup: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    """Largest gradient norm; 0: any."""
    ema: float = 0.995
    """Decay of the averaged weights, those that are saved as the model; 0: no average."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """bf16 is autocast, tf32 (GPU only) rounds the factors of fp32 matrix products; auto times fp32
    and bf16 on this machine (fp32 for uniform noise)."""
    compile: bool = False
    """Put the blocks through torch.compile."""
    checkpoint_blocks: bool | Literal["selective"] = False
    """Keep less for the backward pass and compute it again, which saves memory and costs time:
    selective keeps the outputs of attention, True only what passes between the blocks."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: each holds all weights (DDP), or its part of them (FSDP2), gathered block
    by block."""
    shard_ranks: int = 0
    """fsdp: processes that share one copy of the weights, a divisor of their number (HSDP: copies
    are kept in step as by DDP); 0: all."""
    seed: int = 0
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, the newest."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    sample_every: int = 0
    """Steps between grids of samples; 0: one at the end."""
    workers: int = 0
    """Processes that read images ahead, for each training process."""
    peak_tflops: float = 0.0
    """What the device can do at this precision, for `mfu`; 0: measured at the start."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            choices, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(
                    f"{field.name}: expected one of {', '.join(choices)}, got {value!r}"
                )
        if self.checkpoint_blocks not in (False, True, "selective"):
            raise ValueError(
                f"checkpoint_blocks: expected False, True or 'selective', got "
                f"{self.checkpoint_blocks!r}"
            )
        positive = (
            *("patch_size", "channels", "blocks", "layers", "steps", "batch_size", "accumulate"),
            *("lr", "checkpoint_every", "keep_checkpoints", "log_every"),
        )
        at_least_0 = (
            *("noise_std", "crop", "warmup", "weight_decay", "shift", "grad_clip"),
            *("deep_layers", "deep_channels"),
            *("shard_ranks", "sample_every", "workers", "peak_tflops"),
        )
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in at_least_0:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("drop_label", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected from 0 to below 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size {self.batch_size}, got "
                f"{self.accumulate}"
            )
        if self.shard_ranks and self.parallel != "fsdp":
            raise ValueError("shard_ranks: needs parallel fsdp, got ddp")


#: What a run that goes on from a checkpoint may ask for anew; the precision stays the checkpoint's.
FREE_ON_RESUME = frozenset(
    {
        *("precision", "compile", "checkpoint_blocks", "parallel", "shard_ranks", "accumulate"),
        *("checkpoint_every", "keep_checkpoints", "log_every", "sample_every", "workers"),
        "peak_tflops",
    }
)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up from 1e-6, cosine to 1e-6."""
    floor = min(1e-6, config.lr)
    if step < config.warmup:
        return floor + (config.lr - floor) * step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def noise_name(config: TrainConfig) -> str:
    return f"gaussian, std {config.noise_std:g}" if config.noise == "gaussian" else "uniform, 1/256"


# --- the published runs --------------------------------------------------------------------------


def _published(images: int, epochs: int, batch_size: int = 256, **changes) -> TrainConfig:
    """The recipe that all published runs share: no clipping, no averaging, an epoch of warm-up."""
    epoch = images // batch_size
    recipe = TrainConfig(
        patch_size=2,
        channels=768,
        blocks=8,
        layers=8,
        noise_std=0.05,
        flip=True,
        steps=epochs * epoch,
        batch_size=batch_size,
        lr=1e-4,
        warmup=epoch,
        grad_clip=0.0,
        ema=0.0,
        precision="bf16",
        compile=True,
        checkpoint_every=1000,
        log_every=20,
        sample_every=5 * epoch,
        workers=4,
    )
    return dataclasses.replace(recipe, **changes)


_IMAGENET, _AFHQ = 1_281_167, 14_630  # training images

PRESETS: dict[str, TrainConfig] = {
    "mnist": TrainConfig(batch_size=32, lr=4e-3, warmup=100, ema=0.99, steps=2500),
    "imagenet64-bpd": _published(
        _IMAGENET, 100, crop=64, noise="uniform", precision="fp32", conditional=False
    ),
    "imagenet64-uncond": _published(_IMAGENET, 200, crop=64, conditional=False),
    "imagenet64-cond": _published(_IMAGENET, 200, crop=64),
    "imagenet128-cond": _published(
        _IMAGENET, 320, 768, crop=128, patch_size=4, channels=1024, noise_std=0.15
    ),
    "afhq256": _published(_AFHQ, 4000, crop=256, patch_size=8, noise_std=0.07),
}


def load_config(name: str) -> TrainConfig:
    """A preset by its name, or the settings in a JSON file (such as a run's ``config.json``);
    those it leaves out have their defaults.

    Raises:
        ValueError: naming the file and the setting that is off.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"config: expected one of {', '.join(PRESETS)}, or a JSON file, got {name!r}"
        )
    try:
        settings = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config: {path}: expected a table of settings")
    return config_from(settings, path)


def config_from(settings: dict, source: str | Path) -> TrainConfig:
    """A configuration from a table of settings.

    Raises:
        ValueError: naming the source and the setting that is unknown or off.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name, value in settings.items():
        if name not in fields:
            raise ValueError(f"config: {source}: there is no setting {name!r}")
        kind = type(fields[name].default)
        number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        either = name == "checkpoint_blocks" and value == "selective"
        if not (type(value) is kind or number or either):
            raise ValueError(f"config: {source}: {name}: expected {kind.__name__}, got {value!r}")
    try:
        return TrainConfig(**settings)
    except ValueError as error:
        raise ValueError(f"config: {source}: {error}") from error
