"""Training a TarFlow: a plain loop that can stop at any moment and go on exactly where it was.

All randomness is a function of (seed, step): the order of the images, their noise, the dropped
labels. A checkpoint therefore holds weights, optimizer and a step number, and nothing else.

Source: the recipe of arXiv 2412.06329, appendix B.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flowops import noise_uniform, noise_words

from .checkpoint import load_into, read_tensors, save_model, save_tensors
from .data import Images, scale_pixels
from .fingerprint import check_same_data, fingerprint
from .precision import autocast, check_precision, faster_precision, matmul_precision
from .records import MetricsLog, read_records
from .tarflow import TarFlow, gaussian_noise, uniform_dequantize


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
    nvp: bool = True
    """Affine steps; without it shifts alone, with a learned prior variance."""
    noise: Literal["gaussian", "uniform"] = "gaussian"
    """Noise on the training images: Gaussian for samples, uniform for bits per dim."""
    noise_std: float = 0.1
    """Standard deviation of the Gaussian noise; images span [-1, 1]."""
    shift: int = 0
    """Augmentation: move each image by up to this many pixels."""
    drop_label: float = 0.1
    """Share of labels dropped, for guidance."""
    steps: int = 1000
    batch_size: int = 64
    lr: float = 2e-3
    """Peak learning rate, after warm-up; then a cosine down to 1e-6."""
    warmup: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.995
    """Decay of the averaged weights, those that are saved as the model."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """bf16 is autocast, tf32 (GPU only) rounds the factors of fp32 matrix products; auto times fp32
    and bf16 on this machine (fp32 for uniform noise)."""
    compile: bool = False
    """Put the blocks through torch.compile."""
    checkpoint_blocks: bool = False
    """Keep less for the backward pass and compute each block again: saves memory, costs time."""
    seed: int = 0
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""

    def __post_init__(self):
        positive = (
            *("patch_size", "channels", "blocks", "layers", "steps", "batch_size", "lr"),
            *("grad_clip", "checkpoint_every", "log_every"),
        )
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("noise_std", "warmup", "weight_decay", "shift"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("drop_label", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected from 0 to below 1, got {getattr(self, name)}")


#: What a run that goes on from a checkpoint may ask for anew; the precision stays the checkpoint's.
_FREE_ON_RESUME = (
    *("precision", "compile", "checkpoint_blocks"),
    *("checkpoint_every", "log_every"),
)


def build_model(config: TrainConfig, data: Images) -> TarFlow:
    """The model for a data set, its weights drawn from the seed."""
    _, c, H, W = data.pixels.shape
    if H != W:
        raise ValueError(f"data: expected square images, got {H}x{W}")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return TarFlow(
            in_channels=c,
            img_size=H,
            patch_size=config.patch_size,
            channels=config.channels,
            num_blocks=config.blocks,
            layers_per_block=config.layers,
            nvp=config.nvp,
            num_classes=len(data.class_names),
            checkpoint_blocks=config.checkpoint_blocks,
        )


def add_noise(x: Tensor, config: TrainConfig, rng: Tensor) -> Tensor:
    """The training noise on images in [-1, 1]."""
    if config.noise == "gaussian":
        return gaussian_noise(x, config.noise_std, rng)
    return uniform_dequantize(x, rng)


def noise_name(config: TrainConfig) -> str:
    return f"gaussian, std {config.noise_std:g}" if config.noise == "gaussian" else "uniform, 1/256"


class Trainer:
    """One run: model, averaged weights, optimizer, and the step they are at."""

    def __init__(self, config: TrainConfig, model: TarFlow, data: Images):
        if config.batch_size > len(data):
            raise ValueError(
                f"batch_size: expected at most the {len(data)} training images, got "
                f"{config.batch_size}"
            )
        if config.shift >= data.pixels.shape[2]:
            raise ValueError(f"shift: expected less than the image, got {config.shift}")
        self.config, self.model, self.data = config, model, data
        self.device = model.var.device
        check_precision(config.precision, self.device)
        if config.compile:
            try:
                model.compile_blocks()
            except RuntimeError as error:
                raise ValueError(f"compile: {error}") from error
        self.ema = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step_count = 0
        self.precision = config.precision

    def step(self) -> dict[str, Tensor | float]:
        """One update. A step whose loss or gradient is not finite changes nothing but the count.

        Returns:
            step and lr as numbers; loss, grad_norm and refused as 0-d tensors on the device, which
            nothing here waits for (``read_records`` does).
        """
        config, model = self.config, self.model
        self.settle_precision()
        x, y = self.batch(self.step_count)
        rate = learning_rate(config, self.step_count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with matmul_precision(self.precision):
            with autocast(self.precision, self.device):
                z, _, logdets = model(x, y)
            loss = model.loss(z, logdets)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip, foreach=True)
        loss = loss.detach()
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        # The fused optimizer reads on the device whether it is to do nothing, as for a GradScaler.
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        if not config.nvp:
            before = model.var.clone()
            model.update_prior(z.detach())
            model.var.copy_(torch.where(finite, model.var, before))
        self._average(finite)
        self.step_count += 1
        return {
            "step": self.step_count,
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            "refused": ~finite,
        }

    def settle_precision(self) -> str:
        """Replaces "auto" by what is faster here."""
        if self.precision == "auto":
            uniform = self.config.noise == "uniform"  # its purpose is the likelihood
            self.precision = "fp32" if uniform else faster_precision(self.model, *self.batch(0))
        return self.precision

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Noisy images and labels of a step."""
        config, n = self.config, len(self.data)
        epoch, k = divmod(step, n // config.batch_size)
        order = _order(n, config.seed + epoch)
        chosen = self.data[order[k * config.batch_size : (k + 1) * config.batch_size]]
        x = scale_pixels(_to_device(chosen.pixels, self.device))
        if config.shift:
            x = _shifted(x, config.shift, self._rng(step, 0))
        x = add_noise(x, config, self._rng(step, 1))
        y = chosen.labels
        if y is not None:
            y = _to_device(y, self.device)
            u = noise_uniform((len(y), 1), rng=self._rng(step, 2), device=self.device)
            y = y.masked_fill(u[:, 0] <= config.drop_label, -1)
        return x, y

    def averaged_model(self) -> TarFlow:
        """A copy of the model with the averaged weights."""
        model = TarFlow(**self.model.config).to(self.device)
        model.load_state_dict(self.ema)
        return model.eval()

    def save(self, path: Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        tensors = {f"model.{k}": t for k, t in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": t for k, t in self.ema.items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{k}": t for k, t in state.items()}
        save_tensors(
            path,
            tensors,
            {
                "step": self.step_count,
                "train_config": dataclasses.asdict(self.config),
                "config": self.model.config,
                "precision": self.precision,
                "data": self.fingerprint,
            },
        )

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            FileNotFoundError, ValueError: naming the file, and the setting or what of the data
                differs. (Files of earlier versions don't say what data they were trained on.)
        """
        tensors, metadata = read_tensors(path)
        if "train_config" not in metadata:
            raise ValueError(f"{path} is not a training checkpoint")
        ours = dataclasses.asdict(self.config)
        for name, value in metadata["train_config"].items():
            if name not in _FREE_ON_RESUME and ours.get(name) != value:
                raise ValueError(
                    f"{name}: {path} was trained with {value!r}, this run has {ours.get(name)!r}"
                )
        check_same_data(metadata.get("data", {}), self.fingerprint, path)
        check_precision(metadata["precision"], self.device)
        part = {
            prefix: {
                k.removeprefix(prefix + "."): t
                for k, t in tensors.items()
                if k.startswith(prefix + ".")
            }
            for prefix in ("model", "ema", "optimizer")
        }
        load_into(self.model, part["model"], path)
        self.ema = {k: t.to(self.device) for k, t in part["ema"].items()}
        for name, parameter in self.model.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {k: part["optimizer"].get(f"{name}.{k}") for k in keys}
            if None not in found.values():
                self.optimizer.state[parameter] = {k: t.to(self.device) for k, t in found.items()}
        self.step_count = metadata["step"]
        self.precision = metadata["precision"]

    @functools.cached_property
    def fingerprint(self) -> dict[str, int]:
        """What a checkpoint says about its data."""
        return fingerprint(self.data)

    def _rng(self, step: int, purpose: int) -> Tensor:
        return _to_device(torch.tensor([self.config.seed, 4 * step + purpose]), self.device)

    @torch.no_grad()
    def _average(self, finite: Tensor) -> None:
        decay = min(self.config.ema, (1 + self.step_count) / (10 + self.step_count))
        current = self.model.state_dict()
        for name, mean in self.ema.items():
            # A refused step goes towards itself: a weight of zero would let a NaN through.
            mean.lerp_(torch.where(finite, current[name], mean), 1 - decay)


def run_training(
    trainer: Trainer, out: Path, on_step: Callable[[dict], None] | None = None
) -> TarFlow:
    """Trains to the last step, leaving ``checkpoint.safetensors``, ``metrics.jsonl`` and
    ``model.safetensors`` (averaged weights) in ``out``. Ctrl-C saves after the step at hand.

    Args:
        trainer: fresh, or loaded from a checkpoint.
        out: a directory that exists.
        on_step: called with the record of every step, for those since the last call every
            ``log_every`` steps, at checkpoints and at the end: only then the device is waited for.

    Returns:
        The model with averaged weights.

    Raises:
        FloatingPointError: after ten refused steps in a row.
        KeyboardInterrupt: after Ctrl-C, with the checkpoint written.
        OSError: naming the file that could not be written.
    """
    config, checkpoint = trainer.config, out / "checkpoint.safetensors"
    started, first = time.perf_counter(), trainer.step_count
    unread, refused = [], 0
    with MetricsLog(out, first) as log, _deferred_interrupt() as interrupts:
        while trainer.step_count < config.steps:
            unread.append(trainer.step())
            step, interrupted = trainer.step_count, bool(interrupts)
            save = interrupted or step == config.steps or step % config.checkpoint_every == 0
            if save or step % config.log_every == 0:
                records, unread = read_records(unread), []
                images = (step - first) * config.batch_size
                for record in records:
                    record["images_per_second"] = images / (time.perf_counter() - started)
                    refused = refused + 1 if record["refused"] else 0
                    due = record["step"] % config.log_every == 0 or record["step"] == config.steps
                    if record["refused"] or due:
                        log.write(record)
                    if on_step is not None:
                        on_step(record)
                    if refused == 10:
                        raise FloatingPointError(
                            f"step {record['step']}: ten steps in a row gave a loss or gradient "
                            f"that is not finite; nothing was saved since the last checkpoint; try "
                            f"a lower lr"
                        )
            if save:
                trainer.save(checkpoint)
            if interrupted:
                raise KeyboardInterrupt
    model = trainer.averaged_model()
    save_model(
        model,
        out / "model.safetensors",
        train_config=dataclasses.asdict(config),
        class_names=trainer.data.class_names,
    )
    return model


@contextlib.contextmanager
def _deferred_interrupt():
    """Yields a list that Ctrl-C fills, so that a step is never cut in two. Elsewhere than in the
    main thread, where signals can't be handled, it stays empty."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up from 1e-6, cosine to 1e-6."""
    floor = min(1e-6, config.lr)
    if step < config.warmup:
        return floor + (config.lr - floor) * step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@functools.lru_cache(maxsize=2)
def _order(n: int, seed: int) -> Tensor:
    """The images of an epoch in turn."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy from pageable memory would wait for all that the GPU has yet to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _shifted(x: Tensor, limit: int, rng: Tensor) -> Tensor:
    """Each image moved by up to ``limit`` pixels along both axes; borders repeat their edge."""
    B, _, H, W = x.shape
    offsets = noise_words((B, 2), rng=rng, device=x.device) % (2 * limit + 1) - limit
    rows = (torch.arange(H, device=x.device) + offsets[:, :1]).clamp(0, H - 1)
    columns = (torch.arange(W, device=x.device) + offsets[:, 1:]).clamp(0, W - 1)
    x = x.gather(2, rows[:, None, :, None].expand_as(x))
    return x.gather(3, columns[:, None, None, :].expand_as(x))
