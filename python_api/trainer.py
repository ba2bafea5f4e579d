"""A training run of a TarFlow, step by step, on one process or many.

All randomness is a function of (seed, step, image of the batch): the order of the images, their
noise, the dropped labels. A checkpoint therefore holds weights, averages, moments and a step
number, and nothing else.

Source: the recipe of arXiv 2412.06329, appendix B.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from flowops import noise_uniform

from .augment import crop_and_flip
from .data import Images, scale_pixels
from .loading import batches, sample_indices
from .parallel import World, gradients_stay_here, local, parallelize, whole
from .precision import autocast, check_precision, faster_precision, matmul_precision
from .run_checkpoints import Checkpoints, check_same_data, read_state
from .starflow import STARFLOW
from .tarflow import TarFlow, gaussian_noise, uniform_dequantize
from .train_config import FREE_ON_RESUME, TrainConfig, learning_rate


def build_model(config: TrainConfig, data: Images) -> TarFlow:
    """The model for a data set, its weights drawn from the seed."""
    if config.crop > data.img_size:
        raise ValueError(
            f"crop: expected at most the images' {data.img_size} pixels, got {config.crop}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return TarFlow(
            in_channels=data.channels,
            img_size=config.crop or data.img_size,
            patch_size=config.patch_size,
            channels=_by_block(config, config.channels, config.deep_channels),
            num_blocks=config.blocks,
            layers_per_block=_by_block(config, config.layers, config.deep_layers),
            nvp=config.nvp,
            num_classes=len(data.class_names) if config.conditional else 0,
            checkpoint_blocks=config.checkpoint_blocks,
            **(STARFLOW if config.architecture == "starflow" else {}),
        )


def _by_block(config: TrainConfig, shallow: int, deep: int) -> int | list[int]:
    return [shallow] * (config.blocks - 1) + [deep] if deep else shallow


def add_noise(x: Tensor, config: TrainConfig, rng: Tensor, first_row: int = 0) -> Tensor:
    """The training noise on images in [-1, 1], the first of which is ``first_row`` of a batch."""
    if config.noise == "gaussian":
        return gaussian_noise(x, config.noise_std, rng, first_row)
    return uniform_dequantize(x, rng, first_row)


class Objective(nn.Module):
    """The training loss as a module: what a step calls, and what is spread over processes."""

    def __init__(self, model: TarFlow):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss; what is logged of it, ``[1 + num_blocks]``: the loss and each block's mean
        log-determinant per dimension; and z."""
        outputs, logdets = self.model.transform(x, y)
        z = outputs[-1]
        loss = self.model.loss(z, logdets.sum(0))
        return loss, torch.cat([loss[None], logdets.mean(1)]).detach(), z.detach()


class Trainer:
    """One run: model, averaged weights, optimizer, and the step they are at.

    Args:
        config: with a ``precision`` other than "auto" where there are several processes and a
            checkpoint is to be loaded: its own.
        model: on the device of ``world``; FSDP2 takes its weights apart.
        data: ``Images``, or anything that has their ``len``, indexing by a tensor, ``img_size``,
            ``channels``, ``class_names`` and ``fingerprint`` (a store).
        world: the processes, each of which makes a Trainer with the same arguments.
    """

    def __init__(
        self, config: TrainConfig, model: TarFlow, data: Images, world: World | None = None
    ):
        self.config, self.model, self.data = config, model, data
        self.device = model.var.device
        self.world = world or World(device=self.device)
        self.step_count = 0
        if config.batch_size > len(data):
            raise ValueError(
                f"batch_size: expected at most the {len(data)} training images, got "
                f"{config.batch_size}"
            )
        shares = config.accumulate * self.world.size
        if config.batch_size % shares:
            raise ValueError(
                f"batch_size: expected a multiple of {shares} ({self.world.size} processes, "
                f"{config.accumulate} micro-batches), got {config.batch_size}"
            )
        if config.shift >= data.img_size:
            raise ValueError(f"shift: expected less than the image, got {config.shift}")
        self.local_batch = config.batch_size // shares
        pixels = data[torch.zeros(1, dtype=torch.long)].pixels
        #: What bits per dim of the model's units lack for those of 256 levels; latents have none.
        self.bits_offset = math.log2(128) if pixels.dtype == torch.uint8 else 0.0
        if pixels.dtype != torch.uint8 and config.noise == "uniform":
            raise ValueError(
                "noise: expected gaussian for latents, which have no levels, got uniform"
            )
        check_precision(config.precision, self.device)
        if config.compile:
            try:
                model.compile_blocks()
            except RuntimeError as error:
                raise ValueError(f"compile: {error}") from error
        self.precision = config.precision
        if self.world.size > 1:
            self.precision = self.world.first(self.settle_precision())
        self.objective = parallelize(
            *(Objective(model), model.blocks, self.world),
            *(config.parallel, config.shard_ranks, self.precision == "bf16"),
        )
        self.ema = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        for p in model.parameters():  # as AdamW would, but before a checkpoint is loaded into them
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self._batches: Iterator[Images] | None = None

    # --- a step ----------------------------------------------------------------------------------

    def step(self, stop: bool = False) -> dict[str, Tensor | float]:
        """One update. A step whose loss or gradient is not finite in any process changes nothing
        but the count.

        Args:
            stop: this process was asked to stop; all learn it from the records.

        Returns:
            step and lr as numbers; loss, logdets ``[num_blocks]``, grad_norm, refused and stop as
            tensors on the device, the same in all processes, which nothing here waits for
            (``read_records`` does).
        """
        config, model = self.config, self.model
        self.settle_precision()
        rate = learning_rate(config, self.step_count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        stats, moment = 0, 0
        for part in range(config.accumulate):
            x, y = self._noisy(next(self._loaded()), self.step_count, part)
            last = part == config.accumulate - 1
            with (
                gradients_stay_here(self.objective, not last),
                matmul_precision(self.precision),
            ):
                with autocast(self.precision, self.device):
                    loss, told, z = self.objective(x, y)
                (loss / config.accumulate).backward()
            stats = stats + told / config.accumulate
            if not config.nvp:
                moment = moment + z.float().square().mean(0) / config.accumulate
        norm = whole(
            torch.nn.utils.clip_grad_norm_(
                model.parameters(), config.grad_clip or math.inf, foreach=True
            )
        )
        stats = self.world.mean_(torch.cat([stats, stats.new_full((1,), float(stop))]))
        loss = stats[0]
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        # The fused optimizer reads on the device whether it is to do nothing, as for a GradScaler.
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        if not config.nvp:
            moment = self.world.mean_(moment).to(model.var.dtype)
            model.var.lerp_(torch.where(finite, moment, model.var), model.PRIOR_RATE)
        self._average(finite)
        self.step_count += 1
        return {
            "step": self.step_count,
            "loss": loss,
            "logdets": stats[1:-1],
            "grad_norm": norm,
            "lr": rate,
            "refused": ~finite,
            "stop": stats[-1] > 0,
        }

    def settle_precision(self) -> str:
        """Replaces "auto" by what is faster here."""
        if self.precision == "auto":
            uniform = self.config.noise == "uniform"  # its purpose is the likelihood
            self.precision = "fp32" if uniform else faster_precision(self.model, *self.batch(0))
        return self.precision

    def batch(self, step: int, part: int = 0) -> tuple[Tensor, Tensor | None]:
        """Noisy images and labels of a step: this process's, of one micro-batch."""
        first = step * self.config.batch_size + self._first_row(part)
        index = sample_indices(len(self.data), self.config.seed, first, self.local_batch)
        return self._noisy(self.data[index], step, part)

    def _loaded(self) -> Iterator[Images]:
        if self._batches is None:
            self._batches = batches(
                self.data,
                seed=self.config.seed,
                batch_size=self.config.batch_size,
                first_step=self.step_count,
                steps=self.config.steps,
                rank=self.world.rank,
                world_size=self.world.size,
                parts=self.config.accumulate,
                workers=self.config.workers,
                pin=self.device.type == "cuda",
            )
        return self._batches

    def _first_row(self, part: int) -> int:
        """Where in the batch of all processes this process's images of a micro-batch begin."""
        return (part * self.world.size + self.world.rank) * self.local_batch

    def _noisy(self, images: Images, step: int, part: int) -> tuple[Tensor, Tensor | None]:
        config, first_row = self.config, self._first_row(part)
        x = _to_device(images.pixels, self.device)
        x = crop_and_flip(
            *(x, self.model.img_size, config.shift, config.flip),
            *(self._rng(step, 0), first_row),
        )
        x = scale_pixels(x) if x.dtype == torch.uint8 else x.float()
        x = add_noise(x, config, self._rng(step, 1), first_row)
        y = images.labels if self.model.num_classes else None
        if y is not None:
            y = _to_device(y, self.device)
            u = noise_uniform(
                (len(y), 1), rng=self._rng(step, 2), device=self.device, first_row=first_row
            )
            y = y.masked_fill(u[:, 0] <= config.drop_label, -1)
        return x, y

    def _rng(self, step: int, purpose: int) -> Tensor:
        """Purpose 3 is the order of the images (loading.py)."""
        return _to_device(torch.tensor([self.config.seed, 4 * step + purpose]), self.device)

    @torch.no_grad()
    def _average(self, finite: Tensor) -> None:
        decay = min(self.config.ema, (1 + self.step_count) / (10 + self.step_count))
        current = self.model.state_dict()
        for name, mean in self.ema.items():
            mean = local(mean)
            # A refused step goes towards itself: a weight of zero would let a NaN through.
            mean.lerp_(torch.where(finite, local(current[name]), mean), 1 - decay)

    # --- state -----------------------------------------------------------------------------------

    def averaged_model(self) -> TarFlow:
        """A copy of the model with the averaged weights, whole; all processes have to ask."""
        model = TarFlow(**self.model.config).to(self.device)
        model.load_state_dict({name: whole(t) for name, t in self.ema.items()})
        return model.eval()

    def save(self, checkpoints: Checkpoints) -> None:
        """Starts writing a checkpoint, in the background."""
        state = {
            "step": self.step_count,
            "train_config": dataclasses.asdict(self.config),
            "config": self.model.config,
            "precision": self.precision,
            "data": self.fingerprint,
            "world_size": self.world.size,
        }
        checkpoints.save(self._tensors(), state, self.step_count)

    def load(self, checkpoints: Checkpoints, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: naming the checkpoint, and the setting or what of the data differs.
        """
        state = read_state(path)
        ours = dataclasses.asdict(self.config)
        for name, value in state["train_config"].items():
            if name not in FREE_ON_RESUME and ours.get(name) != value:
                raise ValueError(
                    f"{name}: {path} was trained with {value!r}, this run has {ours.get(name)!r}"
                )
        check_same_data(state["data"], self.fingerprint, path)
        check_precision(state["precision"], self.device)
        if self.world.size > 1 and state["precision"] != self.precision:
            raise ValueError(
                f"precision: {path} was trained with {state['precision']!r}, this run has "
                f"{self.precision!r}"
            )
        checkpoints.load(path, self._tensors())
        self.step_count, self.precision = state["step"], state["precision"]
        self._batches = None

    @functools.cached_property
    def fingerprint(self) -> dict[str, int]:
        """What a checkpoint says about its data."""
        return self.data.fingerprint()

    def _tensors(self) -> dict[str, Tensor]:
        """All of the state, by name; the very tensors."""
        tensors = {f"model.{k}": t for k, t in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": t for k, t in self.ema.items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors |= {f"optimizer.{name}.{k}": t for k, t in state.items()}
        return tensors


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy from pageable memory would wait for all that the GPU has yet to do."""
    if device.type != "cuda":
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)
