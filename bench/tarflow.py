"""A training step of a TarFlow through flowops against the same model in plain PyTorch."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flowops.api import TarFlow
from flowops.api.flops import training_flops

from .ceilings import Work
from .eager import EagerTarFlow
from .job import DTYPES, OURS, Job, Missing, Spec
from .models import DEMO, FACTOR, IMAGENET64, make_model, sizes
from .sampling import SamplingJob
from .timing import Timing, check_error, interleave, relative_error
from .upstream import load_upstream, upstream_model


@dataclass(frozen=True)
class Comparison:
    """Timings of one job and the largest relative error of ours that the gate saw."""

    ours: Timing
    eager: Timing
    error: float

    @property
    def speedup(self) -> float:
        return self.eager.median / self.ours.median


def compare_training(
    model: TarFlow, x: Tensor, y: Tensor | None, precision: str = "fp32", seconds: float = 8.0
) -> Comparison:
    """One training step, ours against eager, on a copy of the model."""
    return _compare(TrainingJob(copy.deepcopy(model), x, y, precision), seconds)


def compare_sampling(
    model: TarFlow,
    noise: Tensor,
    y: Tensor | None,
    guidance: float = 0.0,
    seconds: float = 8.0,
) -> Comparison:
    """Exact sampling from the same noise."""
    return _compare(SamplingJob(model, noise, y, guidance), seconds)


def _compare(job: Job, seconds: float) -> Comparison:
    error = job.check(OURS)
    job.release()

    def call(name):
        job.call(name, ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    timings = interleave({name: partial(call, name) for name in (OURS, "eager")}, seconds, warmup=1)
    return Comparison(timings[OURS], timings["eager"], error)


def training_work(model: TarFlow, B: int, precision: str) -> Work:
    """The products, and AdamW's three states, weights and gradients once in and out."""
    layers, width, _, T = sizes(model)
    heads = width // model.config["head_dim"]
    return Work(
        bytes=32 * sum(p.numel() for p in model.parameters()),
        flops=B * training_flops(model),
        exps=2 * layers * heads * B * T * (T + 1) // 2,
        product=precision,
    )


# --- training ------------------------------------------------------------------------------------


class TrainingJob(Job):
    """Forward, backward, clipping and AdamW, each side as it is used. All providers train the one
    model they are given; ``gated`` images go through the gate (fp64 may not fit for more)."""

    inputs = ()

    def __init__(self, model, x, y, precision="fp32", gated: int | None = None):
        self.model, self.x, self.y, self.precision = model, x, y, precision
        self.gated = gated or len(x)
        self.work = training_work(model, len(x), precision)
        self.precisions: dict[str, str] = {}
        eager = EagerTarFlow(model)
        self.providers = {
            OURS: (model, model.loss, True),
            "eager": (eager.forward, eager.loss, False),
        }
        self._optimizers: dict[bool, torch.optim.Optimizer] = {}
        self._golden = None

    def add(self, name: str, forward, loss: Callable, fused=False, precision: str | None = None):
        """Another provider: its forward, its loss, and whether AdamW is fused."""
        self.providers[name] = (forward, loss, fused)
        self.precisions[name] = precision or self.precision

    def call(self, name: str, inputs=()) -> None:
        forward, loss, fused = self.providers[name]
        optimizer = self._optimizer(fused)
        optimizer.zero_grad()
        self._backward(name, forward, loss, self.x, self.y)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()

    def _optimizer(self, fused: bool) -> torch.optim.Optimizer:
        """One for all who use it so, or many models' states would fill the memory."""
        if fused not in self._optimizers:
            options = {"fused": True} if fused else {}
            # A rate of zero does the same work, and leaves all providers the same weights.
            self._optimizers[fused] = torch.optim.AdamW(
                self.model.parameters(), lr=0.0, betas=(0.9, 0.95), **options
            )
        return self._optimizers[fused]

    def _backward(self, name: str, forward, loss, x, y) -> tuple[Tensor, Tensor]:
        bf16 = self.precisions.get(name, self.precision) == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            z, _, logdets = forward(x, y)
            value = loss(z, logdets)
        value.backward()
        return z.detach(), logdets.detach()

    def check(self, name: str) -> float:
        if self._golden is None:
            double = copy.deepcopy(self.model).double()
            eager = EagerTarFlow(double)
            golden = self._gradients("fp64", eager.forward, eager.loss, double, torch.float64)
            del double, eager
            forward, loss, _ = self.providers["eager"]
            plain = self._gradients("eager", forward, loss, self.model, self.x.dtype)
            self._golden = golden, _worst(plain, golden)
        golden, plain = self._golden
        forward, loss, _ = self.providers[name]
        error = _worst(self._gradients(name, forward, loss, self.model, self.x.dtype), golden)
        if name == OURS:
            dtype = DTYPES[self.precision]
            for what, ours, theirs in zip(("z", "logdet", "gradients"), error, plain, strict=True):
                check_error(what, ours, theirs, dtype, FACTOR)
        return max(error)

    def _gradients(self, name, forward, loss, model, dtype) -> tuple[Tensor, ...]:
        """z, logdet and the gradients of all parameters."""
        model.zero_grad()
        y = None if self.y is None else self.y[: self.gated]
        z, logdets = self._backward(name, forward, loss, self.x[: self.gated].to(dtype), y)
        # The compiler may leave a parameter without a gradient where it is zero.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        model.zero_grad()
        return (z, logdets, *grads)

    def release(self) -> None:
        self._golden = None


def _worst(actual: tuple[Tensor, ...], golden: tuple[Tensor, ...]) -> tuple[float, float, float]:
    """Relative errors of z, of the log-determinant, and the largest of all gradients."""
    z, logdet, *grads = (relative_error(a, g) for a, g in zip(actual, golden, strict=True))
    return z, logdet, max(grads)


# --- the jobs of `flowops bench` -----------------------------------------------------------------


def tarflow_specs(device: str, upstream: Path | None = None) -> Iterator[Spec]:
    if device == "cpu":
        cases = [("demo", DEMO, 10, 64, None, p) for p in ("fp32", "bf16")]
        ladder = ("demo", DEMO, 10, 64, None, "fp32")
    else:
        cases = [("2-768-8-8, 64x64", IMAGENET64, 0, 16, 1, "bf16")]
        ladder = ("2-768-8-8, 64x64", IMAGENET64, 0, 8, 1, "fp32")
    for case in cases:
        build = partial(training_job, device, *case[1:], upstream=upstream)
        yield Spec("tarflow", "training step", f"{case[0]}, B={case[3]}", case[-1], build)
    build = partial(ladder_job, device, *ladder[1:])
    yield Spec("tarflow", "ladder of a step", f"{ladder[0]}, B={ladder[3]}", ladder[-1], build)


def _images(device, config, classes, B) -> tuple[Tensor, Tensor | None]:
    channels, size = config[:2]
    x = torch.randn(B, channels, size, size, device=device)
    return x, torch.randint(classes, (B,), device=device) if classes else None


def training_job(device, config, classes, B, gated, precision, upstream=None) -> Job:
    model = make_model(device, config, classes)
    job = TrainingJob(model, *_images(device, config, classes, B), precision, gated)
    if hasattr(model, "compile_blocks"):
        name = f"{OURS}, compiled blocks"
        ours = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # shares the weights
        try:
            ours.compile_blocks()
            job.add(name, ours, ours.loss, fused=True)
        except RuntimeError as error:
            job.providers[name] = Missing(str(error))
    # Block by block, as one graph of all layers takes minutes to compile and is no faster.
    eager = EagerTarFlow(model, compiled_blocks=True)
    job.add("eager, compiled blocks", eager.forward, eager.loss)
    if upstream is None:
        job.providers["upstream"] = Missing("no --upstream DIR")
    else:
        cls = load_upstream(upstream)
        plain, other = upstream_model(cls, model), upstream_model(cls, model)
        for block in other.blocks:
            block.compile(dynamic=False)
        job.add("upstream", plain, plain.get_loss)
        job.add("upstream, compiled blocks", other, other.get_loss)
    return job


def ladder_job(device, config, classes, B, gated, precision) -> Job:
    """Each rung adds one thing to the rung before it."""
    model = make_model(device, config, classes)
    job = TrainingJob(model, *_images(device, config, classes, B), precision, gated)
    switches = {}
    for rung, switch in (
        ("+ causal flash attention", "causal"),
        ("+ fused affine and log-det", "fused_affine"),
        ("+ compiled blocks", "compiled_blocks"),
    ):
        switches[switch] = True
        rungs = EagerTarFlow(model, **switches)
        job.add(rung, rungs.forward, rungs.loss)
    job.add("+ bf16", rungs.forward, rungs.loss, precision="bf16")
    return job
