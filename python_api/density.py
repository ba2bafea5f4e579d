"""A density over the columns of a table: a flow with its standardisation and names, in one file."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import fit
from .checkpoint import read_tensors, save_tensors
from .ferumal import FerumalFlow
from .padded import PaddedFlow
from .table import Standardizer, Table

Model = Literal[
    "ferumal",
    "ferumal-glow",
    "maf",
    "nsf",
    "padded-ferumal",
    "padded-ferumal-glow",
    "padded-maf",
    "padded-nsf",
]
MODELS = get_args(Model)
_POINTS = 150  # of the tables of arXiv 2307.14839
_FORMAT = "flowops_density"


@dataclass(frozen=True)
class FlowSpec:
    """Which flow. ``maf`` and ``nsf`` are those of the package zuko, with its defaults."""

    model: Model = "ferumal"
    """Those that begin with "padded-" have extra columns of noise."""
    layers: int = 8
    points: int | None = None
    """Auxiliary points a layer of the kernel flows; 150, or all training rows if they are fewer."""
    pad: int = 1
    """Columns of noise of a padded model."""
    pad_scale: float = 2.0
    """Standard deviation of that noise; the data have 1."""
    data_scale: float = 0.0
    """Standard deviation of noise on the data in training; for discrete data 0.01, say."""

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {self.model!r}")
        if self.padded and self.pad < 1:
            raise ValueError(f"pad: expected at least 1 for {self.model}, got {self.pad}")

    @property
    def padded(self) -> bool:
        return self.model.startswith("padded-")

    def build(self, features: int, seed: int = 0) -> PaddedFlow:
        """The untrained flow over so many columns; plain models have no padding columns.

        Raises:
            ValueError: a kernel flow over one column, which has no half to move; options that the
                flow refuses.
            ModuleNotFoundError: ``maf`` and ``nsf`` without zuko.
        """
        pad = self.pad if self.padded else 0
        if features + pad < 2:
            raise ValueError(
                f"model: {self.model} couples columns and needs at least 2, the data have "
                f"{features}; take padded-{self.model}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = self._flow(features + pad, seed)
        return PaddedFlow(flow, features, pad, pad_scale=self.pad_scale, data_scale=self.data_scale)

    def _flow(self, width: int, seed: int) -> nn.Module:
        name = self.model.removeprefix("padded-")
        if name in ("maf", "nsf"):
            import zuko

            return getattr(zuko.flows, name.upper())(width, transforms=self.layers)
        return FerumalFlow(
            width,
            layers=self.layers,
            points=_POINTS if self.points is None else self.points,
            mixing="lu" if name == "ferumal-glow" else "permutation",
            seed=seed,
        )


@dataclass(eq=False)
class Density:
    """``log p(x)`` and samples in the units of the data.

    Args:
        spec: what the flow was built from.
        flow: over standardised rows.
        standardizer: of the training rows.
        columns: their names, in order.
    """

    spec: FlowSpec
    flow: PaddedFlow
    standardizer: Standardizer
    columns: tuple[str, ...]

    @classmethod
    def untrained(
        cls, spec: FlowSpec, train: Table, seed: int = 0, device: str = "cpu"
    ) -> "Density":
        """A flow of ``spec`` for these training rows, of which it has mean and scale so far.

        Raises:
            ValueError: more points than rows; as ``FlowSpec.build``.
        """
        most = _POINTS if spec.points is None else spec.points
        if "ferumal" in spec.model and most > len(train):
            if spec.points is not None:
                raise ValueError(
                    f"points: expected at most as many as there are training rows, {len(train)}, "
                    f"got {spec.points}"
                )
            most = len(train)
        spec = dataclasses.replace(spec, points=most)
        flow = spec.build(len(train.columns), seed).to(device)
        return cls(spec, flow, Standardizer.fit(train), train.columns)

    def fit(
        self, train: Table, valid: Table, config: fit.FitConfig, on_validation=None
    ) -> fit.FitResult:
        """``fit_flow`` on tables. Its likelihoods are those of standardised rows."""
        rows = self._rows(train.values), self._rows(valid.values)
        return fit.fit_flow(self.flow, *rows, config, on_validation)

    def log_prob(self, values: np.ndarray, num_pads: int = 64, seed: int = 0) -> Tensor:
        """``log p(x)`` in nats, float64 ``[N]`` on the CPU; of a padded flow the IWAE bound, the
        same for the same seed.

        Args:
            values: ``[N, D]`` in the order of ``columns``.
        """
        standard = fit.log_prob(self.flow, self._rows(values), num_pads, seed)
        return standard.double().cpu() - self.standardizer.logdet

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """``[n, D]``, float64, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = [self.flow.sample(min(8192, n - i)) for i in range(0, n, 8192)]
        return self.standardizer.inverse(torch.cat(drawn).double().cpu().numpy())

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all; errors as ``checkpoint.write_whole``."""
        tensors = {f"flow.{name}": t for name, t in self.flow.state_dict().items()}
        tensors |= {f"standardizer.{k}": t for k, t in self.standardizer.tensors().items()}
        about = {"spec": dataclasses.asdict(self.spec), "columns": list(self.columns)}
        save_tensors(path, tensors, {_FORMAT: about})

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "Density":
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        tensors, metadata = read_tensors(path)
        about = metadata.get(_FORMAT)
        if about is None:
            raise ValueError(f"{path}: not a density that `flowops fit` saved")
        parts = {"flow": {}, "standardizer": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        spec, columns = FlowSpec(**about["spec"]), tuple(about["columns"])
        flow = spec.build(len(columns))
        try:
            flow.load_state_dict(parts["flow"])
        except RuntimeError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(
            spec, flow.to(device).eval(), Standardizer.from_tensors(parts["standardizer"]), columns
        )

    def _rows(self, values: np.ndarray) -> Tensor:
        device = next(self.flow.parameters()).device
        return torch.from_numpy(self.standardizer.forward(values)).float().to(device)


def is_density(path: str | Path) -> bool:
    """Whether this is a file that ``Density.save`` wrote; reads its header alone."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        return _FORMAT in (file.metadata() or {})
    return False


def gaussian_log_probs(train: Table, tables: list[Table]) -> Iterator[tuple[str, list[Tensor]]]:
    """What a flow has to beat: the maximum-likelihood Gaussians of the training rows.

    Yields:
        The name and ``log p`` (nats, float64) of the rows of each table, for independent columns
        and, where the training rows determine it, for a full covariance.
    """
    standardizer = Standardizer.fit(train)
    rows = [torch.from_numpy(standardizer.forward(t.values)) for t in tables]
    constant = -standardizer.logdet - 0.5 * len(train.columns) * math.log(2 * math.pi)
    yield "independent Gaussians", [constant - 0.5 * r.square().sum(1) for r in rows]
    standard = torch.from_numpy(standardizer.forward(train.values))
    covariance = standard.mT @ standard / len(standard)
    values, _ = torch.linalg.eigh(covariance)
    if values[0] > values[-1] * len(values) * torch.finfo(torch.float64).eps:
        factor = torch.linalg.cholesky(covariance)
        constant = constant - factor.diagonal().log().sum().item()
        solved = [torch.linalg.solve_triangular(factor, r.mT, upper=False) for r in rows]
        yield "Gaussian, full covariance", [constant - 0.5 * s.square().sum(0) for s in solved]
