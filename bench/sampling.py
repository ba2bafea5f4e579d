"""Sampling from a TarFlow, exactly and by Jacobi sweeps, against a loop over tokens in PyTorch."""

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from flowops.api import TarFlow, patchify

from .ceilings import Work
from .eager import EagerTarFlow
from .job import DTYPES, OURS, Job, Missing, Spec, by_name, is_ours
from .models import FACTOR, IMAGENET64, MNIST, WIDE_BLOCK, make_model, sizes, trained_model
from .timing import GateError, gate, relative_error
from .upstream import load_upstream, upstream_model

TOL = 1e-3
#: Not a name that begins like ours: Jacobi is to be held against the exact sampler too.
EXACT = "exact by flowops"


def sampling_work(
    model: TarFlow,
    B: int,
    guidance: float,
    precision: str = "fp32",
    passes: float | None = None,
) -> Work:
    """Token by token: every weight for every token, and keys and values of all tokens so far.
    Guidance asks twice, and shares the weights.

    ``passes`` is how often a block's weights are read where that is not once for every token. Each
    token is computed at least once all the same.
    """
    layers, width, products, T = sizes(model)
    passes = T - 1 if passes is None else passes
    size, asked = DTYPES[precision].itemsize, B * (2 if guidance > 0 else 1)
    seen = T * (T - 1) // 2
    return Work(
        bytes=size * (passes * products + layers * width * asked * passes * T),
        flops=asked * (2 * products * (T - 1) + 4 * layers * width * seen),
        exps=asked * layers * (width // model.config["head_dim"]) * seen,
        product=precision,
    )


class SamplingJob(Job):
    """All providers turn the same noise into images.

    Args:
        precision: ``"bf16"`` for bf16 autocast, in which ours stores weights in bf16.
        method, tol: of ours, as in ``TarFlow.reverse``.
        gated: gate by the equation of every block for this many images; None to gate the images by
            an fp64 sampler, which takes its time and fits the exact method alone.
    """

    inputs = ()

    def __init__(
        self,
        model: TarFlow,
        noise: Tensor,
        y: Tensor | None = None,
        guidance: float = 0.0,
        *,
        precision: str = "fp32",
        method: str = "exact",
        tol: float = TOL,
        gated: int | None = None,
    ):
        self.model, self.noise, self.y, self.guidance = model, noise, y, guidance
        self.precision, self.gated, self.exact = precision, gated, method == "exact"
        self.tol = 0.0 if self.exact else tol
        self.work = sampling_work(model, len(noise), guidance, precision)
        self.eager = EagerTarFlow(model)
        # Without options where it can be: an older flowops, to compare with, may not have them.
        ours = model.reverse if self.exact else partial(model.reverse, method=method, tol=tol)
        self.first = noise
        self.providers = {OURS: ours, **self._by_backend(ours), "eager": self.eager.reverse}
        self._golden = self._double = None

    def _by_backend(self, ours: Callable) -> dict[str, Callable | Missing]:
        """On a GPU also by each backend; CUDA takes small batches, and the exact method alone."""
        if self.noise.device.type == "cpu":
            return {}
        return by_name(partial(_through, ours))

    @torch.no_grad()
    def call(self, name: str, inputs=(), **options):
        with self._autocast():
            return self.providers[name](self.noise, self.y, self.guidance, **options)

    def _autocast(self) -> torch.autocast:
        bf16 = self.precision == "bf16"
        return torch.autocast(self.noise.device.type, torch.bfloat16, enabled=bf16)

    def check(self, name: str) -> float:
        if self._double is None:
            self._double = EagerTarFlow(copy.deepcopy(self.model).double())
        return self._check_images(name) if self.gated is None else self._check_equations(name)

    def release(self) -> None:
        self._golden = self._double = None

    def _check_images(self, name: str) -> float:
        """Against the same loop in fp64."""
        if self._golden is None:
            self._golden = (
                self._double.reverse(self.noise.double(), self.y, self.guidance),
                self.call("eager"),
            )
        golden, plain = self._golden
        images = self.call(name)
        if not is_ours(name):
            return relative_error(images, golden)
        return gate("images", images, plain, golden, DTYPES[self.precision], FACTOR)

    @torch.no_grad()
    def _check_equations(self, name: str) -> float:
        """x = z exp(a(x)) + b(x) of every block, in fp64: for ours up to ``tol``, and to the
        rounding of one plain pass over all tokens in the job's precision."""
        if is_ours(name) and not self.exact:
            sequence, report = self.call(name, return_sequence=True, return_report=True)
            residual = report.residual.max().item()
            if not residual <= self.tol:
                raise GateError(f"residual: {residual:.2e}, expected at most tol {self.tol:g}")
            passes = (report.sweeps + report.steps)[0].double().mean().item()
            self.work = sampling_work(
                *(self.model, len(self.noise), self.guidance, self.precision, passes)
            )
        else:
            sequence = self.call(name, return_sequence=True)
        tokens = [patchify(x[: self.gated], self.model.patch_size) for x in sequence]
        tokens[0] = tokens[0] * self.model.var.sqrt()
        labels = None if self.y is None else self.y[: self.gated]
        worst = 0.0
        for k, (z, x) in enumerate(pairwise(tokens)):
            block = -1 - k  # the last one is the first to be inverted
            golden = self._double.fixed_point(block, x.double(), z.double(), labels, self.guidance)
            with self._autocast():
                plain = self.eager.fixed_point(block, x, z, labels, self.guidance)
            scale = golden.abs().max().item()
            error, rounding = ((t - golden).abs().max().item() for t in (x, plain))
            eps = torch.finfo(DTYPES[self.precision]).eps
            allowed = self.tol + FACTOR * rounding + 2 * eps * scale
            if is_ours(name) and not (rounding <= 0.05 * scale and error <= allowed):
                raise GateError(
                    f"block {len(tokens) - 2 - k}: off its equation by {error:.2e}, allowed "
                    f"{allowed:.2e}: not timed"
                )
            worst = max(worst, error / scale)
        return worst


def _through(function: Callable, backend: str) -> Callable:
    """``function`` with every op on ``backend``."""

    def named(*args, **options):
        with mock.patch.dict(os.environ, FLOWOPS_BACKEND=backend):
            return function(*args, **options)

    return named


# --- the jobs of `flowops bench` -----------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and what is asked of it. ``gated`` as in ``SamplingJob``; without ``eager`` its loop
    over tokens is left out, which for a whole model on a GPU takes too long."""

    name: str
    config: tuple
    classes: int
    B: int
    precision: str = "fp32"
    guidance: float = 0.0
    gated: int | None = None
    eager: bool = True


def sampling_specs(
    device: str, upstream: Path | None = None, model: Path | None = None
) -> Iterator[Spec]:
    """``model``: a trained one for the rows of Jacobi, which otherwise use random weights."""
    mnist = partial(Case, "4x4 layers", MNIST, 10)
    if device == "cpu":
        wide = Case("1x8 layers of width 512", WIDE_BLOCK, 0, 1, gated=1)
        exact = [mnist(1), mnist(32), mnist(32, guidance=1.0), mnist(1, "bf16"), mnist(32, "bf16")]
        exact.append(wide)
        solved = [mnist(1, gated=1), mnist(32, gated=32), wide]
    else:
        # Eager is timed on one block of the eight, which are alike. fp64 fits for one image.
        whole = partial(Case, "2-768-8-8", IMAGENET64, 0, precision="bf16", gated=1, eager=False)
        block = (*IMAGENET64[:4], 1, 8)
        one = partial(Case, "one block of 2-768-8-8", block, 0, precision="bf16", gated=1)
        exact = [case(B) for case in (whole, one) for B in (1, 16, 64)] + [mnist(1), mnist(32)]
        solved = [whole(1), whole(16), whole(64), mnist(1, gated=1), mnist(32, gated=32)]
    for case in exact:
        job = "exact, guided" if case.guidance else "exact"
        build = partial(exact_job, device, case, upstream)
        yield Spec("sampling", job, f"{case.name}, B={case.B}", case.precision, build)
    layers = None if model is None else _layers(trained_model(model, "cpu"))
    for case in solved:
        trained = model if case.config == MNIST else None
        weights = "random weights" if trained is None else "trained"
        name = case.name if trained is None else layers
        for method in ("jacobi", "auto"):
            build = partial(jacobi_job, device, case, method, trained)
            job, shape = f"{method}, tol {TOL:g}", f"{name}, {weights}, B={case.B}"
            yield Spec("sampling", job, shape, case.precision, build)


def _layers(model: TarFlow) -> str:
    return f"{model.config['num_blocks']}x{model.config['layers_per_block']} layers"


def exact_job(device: str, case: Case, upstream: Path | None = None) -> Job:
    model = make_model(device, case.config, case.classes)
    job = _job(model, case)
    if case.eager and upstream is None:
        job.providers["upstream"] = Missing("no --upstream DIR")
    elif case.eager:
        job.providers["upstream"] = upstream_model(load_upstream(upstream), model).reverse
    return job


def jacobi_job(device: str, case: Case, method: str, trained: Path | None = None) -> Job:
    """With the weights of ``trained``, or random ones: how many sweeps it takes depends on them."""
    if trained is None:
        model = make_model(device, case.config, case.classes)
    else:
        model = trained_model(trained, device)
    job = _job(model, case, method=method)
    job.providers[EXACT] = model.reverse
    return job


def _job(model: TarFlow, case: Case, **options) -> SamplingJob:
    device, classes = model.var.device, model.num_classes
    noise = torch.randn(case.B, model.num_patches, model.patch_channels, device=device)
    labels = torch.arange(case.B, device=device) % classes if classes else None
    options |= {"precision": case.precision, "gated": case.gated}
    job = SamplingJob(model, noise, labels, case.guidance, **options)
    if not case.eager:
        job.providers["eager"] = Missing("too slow for a whole model: see the rows of one block")
    return job
