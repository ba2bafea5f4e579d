"""PaddingFlow: a flow over the data and p columns of noise, for data that do not fill their space.

With p(x, e) the wrapped flow over D + p columns and pads e of N(0, b^2),

    log w(e) = log p(x, e) - log N(e; 0, b^2)
    ELBO     mean of log w                IWAE-K   logsumexp of K log w, less log K

are in expectation lower bounds of ``log p(x) = log int p(x, e) de``; IWAE-K rises to it with K.

Source: Meng et al., "PaddingFlow: Improving Normalizing Flows with Padding-Dimensional Noise"
(arXiv 2403.08216); IWAE: Burda et al., "Importance Weighted Autoencoders" (arXiv 1509.00519).
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowops import noise_normal, pad_noise
from flowops.dispatch import check_floating
from flowops.noise import Rng, make_rng

from .mixing import check_count

#: Pads a row where ``num_pads`` is None.
NUM_PADS = {"elbo": 1, "iwae": 64}


class PadNoise(nn.Module):
    """``concat(x + data_scale eps_d, pad_scale eps_p)``, ``flowops.pad_noise`` as a layer.

    In eval mode the noise on the data is left out, as dropout would be; the pads are always drawn.

    Args:
        pad: number of padding columns p; 0 for none.
        pad_scale: their standard deviation b, above 0.
        data_scale: standard deviation of the noise on the data, in units of x.

    Raises:
        ValueError: naming the argument that is off.

    Source: arXiv 2403.08216, eq. 6-7.
    """

    def __init__(self, pad: int, *, pad_scale: float = 2.0, data_scale: float = 0.0):
        super().__init__()
        check_count("pad", pad, 0)
        if not _is_finite(pad_scale) or pad_scale <= 0:
            raise ValueError(f"pad_scale: expected a finite number above 0, got {pad_scale!r}")
        if not _is_finite(data_scale) or data_scale < 0:
            raise ValueError(
                f"data_scale: expected a finite number, at least 0, got {data_scale!r}"
            )
        self.pad, self.pad_scale, self.data_scale = pad, float(pad_scale), float(data_scale)

    def forward(self, x: Tensor, *, rng: Rng = None) -> Tensor:
        """Pads x.

        Args:
            x: ``[..., D]``, floating.
            rng: as in ``flowops.make_rng``; None for new noise at every call.

        Returns:
            ``[..., D + pad]`` in x's dtype.

        Raises:
            TypeError, ValueError: naming the argument that is off.
        """
        data_scale = self.data_scale if self.training else 0.0
        if self.pad:
            return pad_noise(x, self.pad, pad_scale=self.pad_scale, data_scale=data_scale, rng=rng)
        check_floating(x=x)
        if not data_scale:
            return x
        compute = torch.promote_types(x.dtype, torch.float32)
        eps = noise_normal(x.shape, rng=rng, device=x.device, dtype=compute)
        return (x + data_scale * eps).to(x.dtype)

    def pads_log_prob(self, pads: Tensor) -> Tensor:
        """``log N(pads; 0, pad_scale^2)``.

        Args:
            pads: ``[..., pad]``, floating.

        Returns:
            ``[...]`` in nats.

        Raises:
            TypeError, ValueError: naming what is off.
        """
        check_floating(pads=pads)
        if pads.ndim < 1 or pads.shape[-1] != self.pad:
            raise ValueError(f"pads: expected [..., {self.pad}], got {list(pads.shape)}")
        energy = (pads / self.pad_scale).square().sum(-1)
        return -0.5 * (energy + self.pad * math.log(2 * math.pi * self.pad_scale**2))

    @property
    def entropy(self) -> float:
        """Of a row's pads, ``p (1 + ln(2 pi b^2)) / 2`` nats: ELBO less the mean of log p(x, e)."""
        return 0.5 * self.pad * (1 + math.log(2 * math.pi * self.pad_scale**2))

    def extra_repr(self) -> str:
        return f"{self.pad}, pad_scale={self.pad_scale}, data_scale={self.data_scale}"


# --- how a flow is spoken to ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Methods:
    """A flow with ``log_prob`` and ``sample``: flowops, nflows, normflows."""

    takes_context: bool
    takes_rng: bool
    draws_per_context: bool  # nflows: ``sample(n, context)`` draws n for every row of the context

    def log_prob(self, flow: Any, rows: Tensor, context: Tensor | None) -> Tensor:
        return flow.log_prob(rows) if context is None else flow.log_prob(rows, context)

    def sample(self, flow: Any, n: int, context: Tensor | None, rng: Rng) -> Tensor:
        options = {} if rng is None else {"rng": rng}
        if context is None:
            samples = flow.sample(n, **options)
        elif self.draws_per_context:
            samples = flow.sample(1, context, **options).squeeze(1)
        else:
            samples = flow.sample(n, context, **options)
        return samples[0] if isinstance(samples, tuple) else samples  # normflows: and log_prob


@dataclass(frozen=True)
class _Distributions:
    """A distribution in the manner of torch.distributions, or (zuko) what makes one of a
    context."""

    takes_context: bool
    takes_rng: bool = False

    def _distribution(self, flow: Any, context: Tensor | None) -> Any:
        return flow(context) if self.takes_context else flow

    def log_prob(self, flow: Any, rows: Tensor, context: Tensor | None) -> Tensor:
        distribution = self._distribution(flow, context)
        _check_width(distribution, rows.shape[1])
        return distribution.log_prob(rows)

    def sample(self, flow: Any, n: int, context: Tensor | None, rng: None) -> Tensor:
        return self._distribution(flow, context).sample((n,) if context is None else ())


def _interface(flow: Any) -> _Methods | _Distributions:
    """Chosen by what the flow offers, so that no library has to be imported."""
    if callable(flow) and not hasattr(flow, "log_prob"):
        return _Distributions(takes_context=True)
    if not (hasattr(flow, "log_prob") and hasattr(flow, "sample")):
        raise TypeError(
            "flow: expected log_prob and sample, or a call that returns a distribution, got "
            f"{type(flow).__name__}"
        )
    if hasattr(flow, "event_shape"):
        return _Distributions(takes_context=False)
    takes_rng = "rng" in inspect.signature(flow.sample).parameters
    return _Methods(
        takes_context=_takes_two(flow.log_prob),
        takes_rng=takes_rng,
        draws_per_context=hasattr(flow, "sample_and_log_prob") and not takes_rng,
    )


def _takes_two(function: Callable) -> bool:
    parameters = inspect.signature(function).parameters.values()
    by_position = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return by_position > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _check_width(flow: Any, expected: int) -> None:
    """Raises if the flow says that it is over another number of columns; most have no public way to
    say so, and then what they return is checked."""
    shapes = (
        (getattr(flow, "features", None),),
        getattr(flow, "event_shape", None),  # torch.distributions
        getattr(getattr(flow, "q0", None), "shape", None),  # normflows
        getattr(getattr(flow, "_distribution", None), "_shape", None),  # nflows
    )
    for shape in shapes:
        if isinstance(shape, tuple) and len(shape) == 1 and isinstance(shape[0], int):
            if shape[0] != expected:
                raise ValueError(
                    f"flow: expected one over features + pad = {expected} columns, got one over "
                    f"{shape[0]}"
                )
            return


# --- the padded flow -----------------------------------------------------------------------------


class PaddedFlow(nn.Module):
    """A flow over D data columns, made of any flow over D + p columns.

    Args:
        flow: over ``features + pad`` columns: one of flowops, nflows or normflows (methods
            ``log_prob`` and ``sample``), of zuko (``flow(context)`` is a distribution), or a
            distribution of torch. Kept as ``flow``, whether it is a module or not.
        features: number of data columns D.
        pad: number of padding columns p; 0 for the plain flow, to compare with.
        pad_scale, data_scale: as in ``PadNoise``. The noise on the data is drawn in training mode
            only, once a call.

    Raises:
        TypeError, ValueError: naming the argument that is off.

    Source: arXiv 2403.08216.
    """

    def __init__(
        self,
        flow: Any,
        features: int,
        pad: int,
        *,
        pad_scale: float = 2.0,
        data_scale: float = 0.0,
    ):
        super().__init__()
        check_count("features", features, 1)
        self.features = features
        self.noise = PadNoise(pad, pad_scale=pad_scale, data_scale=data_scale)
        self._interface = _interface(flow)
        _check_width(flow, features + pad)
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None, **options) -> Tensor:
        """``log_prob``, for wrappers that call the module (``DistributedDataParallel``)."""
        return self.log_prob(x, context, **options)

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        estimator: Literal["elbo", "iwae"] = "elbo",
        num_pads: int | None = None,
        rng: Rng = None,
        max_rows: int = 2**16,
    ) -> Tensor:
        """A lower bound of ``log p(x)`` in nats (in expectation), of K random pads a row.

            log w_k = log p(x, e_k) - log N(e_k; 0, b^2)
            elbo = mean_k log w_k            iwae = logsumexp_k log w_k - log K

        Both are log p(x) itself if the flow has the pads N(0, b^2) and independent of the data. Pad
        k of row n is that of ``pad_noise(x, pad, rng=(seed, offset + k))`` for any ``max_rows``;
        noise on the data is that of k = 0, for all k.

        Args:
            x: ``[N, features]``, floating.
            context: ``[N, ...]``, or ``[1, ...]`` for all rows; None for none.
            estimator: ``"elbo"`` to train with, ``"iwae"`` to evaluate.
            num_pads: K; None for 1 (elbo) or 64 (iwae).
            rng: as in ``flowops.make_rng``; None for new pads at every call.
            max_rows: rows that the flow gets at a time, though at least one pad of all N. Where
                that takes several calls and gradients are on, backward computes each call again
                instead of keeping what is inside.

        Returns:
            ``[N]``. With ``pad=0`` the flow's own log_prob.

        Raises:
            TypeError, ValueError: naming the argument that is off.

        Source: arXiv 2403.08216; 1509.00519, eq. 8.
        """
        self._check_rows("x", x)
        if estimator not in tuple(NUM_PADS):
            raise ValueError(f"estimator: expected one of {tuple(NUM_PADS)}, got {estimator!r}")
        num_pads = NUM_PADS[estimator] if num_pads is None else num_pads
        check_count("num_pads", num_pads, 1)
        check_count("max_rows", max_rows, 1)
        context = self._expand_context(context, len(x))
        seed, offset = make_rng(rng, x.device).unbind()
        offsets = offset + torch.arange(num_pads, device=x.device)
        states = torch.stack([seed.expand(num_pads), offsets], dim=1)
        if not self.noise.pad:
            return self._flow_log_prob(self.noise(x, rng=states[0]), context)
        if self.training and self.noise.data_scale:
            x = self.noise(x, rng=states[0])[:, : self.features]

        chunks = states.split(max(1, max_rows // len(x)))
        reduce = self._reduce
        if len(chunks) > 1 and torch.is_grad_enabled():
            reduce = functools.partial(checkpoint, self._reduce, use_reentrant=False)
        total = reduce(x, context, chunks[0], estimator)
        add = torch.add if estimator == "elbo" else torch.logaddexp
        for chunk in chunks[1:]:
            total = add(total, reduce(x, context, chunk, estimator))
        return total / num_pads if estimator == "elbo" else total - math.log(num_pads)

    @torch.no_grad()
    def sample(self, n: int, context: Tensor | None = None, *, rng: Rng = None) -> Tensor:
        """Draws n rows from the flow and drops the last p columns.

        Args:
            n: how many.
            context: ``[n, ...]``, one a sample, or ``[1, ...]`` for all; None for none.
            rng: handed to the flow, which has to take one.

        Returns:
            ``[n, features]``.

        Raises:
            TypeError, ValueError: naming the argument that is off.
        """
        check_count("n", n, 1)
        if rng is not None and not self._interface.takes_rng:
            raise ValueError(
                f"rng: {type(self.flow).__name__}.sample takes none, it draws from torch's "
                "generator (torch.manual_seed)"
            )
        context = self._expand_context(context, n)
        samples = self._interface.sample(self.flow, n, context, rng)
        expected = [n, self.features + self.noise.pad]
        if list(samples.shape) != expected:
            raise ValueError(
                f"flow: expected samples [n, features + pad] = {expected}, got "
                f"{list(samples.shape)}"
            )
        return samples[:, : self.features]

    def initialize(self, data: Tensor, *args, rng: Rng = None, **options) -> None:
        """Pads the data and calls ``flow.initialize(padded, *args, **options)``, if the flow has
        such a method.

        Args:
            data: ``[N, features]``, floating.
            rng: of the pads, as in ``flowops.make_rng``.

        Raises:
            TypeError, ValueError: naming the argument that is off; what the flow raises.
        """
        self._check_rows("data", data)
        if hasattr(self.flow, "initialize"):
            self.flow.initialize(self.noise(data, rng=rng), *args, **options)

    def _reduce(self, x: Tensor, context: Tensor | None, states: Tensor, estimator: str) -> Tensor:
        """``[N]``: sum (elbo) or logsumexp (iwae) of log w over the pads of these states."""
        noise, K, N = self.noise, len(states), len(x)
        padded = torch.cat(
            [pad_noise(x, noise.pad, pad_scale=noise.pad_scale, rng=state) for state in states]
        )
        if context is not None:
            context = context.expand(K, *context.shape).flatten(0, 1)
        pads_log_prob = noise.pads_log_prob(padded[:, self.features :])
        weights = (self._flow_log_prob(padded, context) - pads_log_prob).view(K, N)
        return weights.sum(0) if estimator == "elbo" else weights.logsumexp(0)

    def _flow_log_prob(self, rows: Tensor, context: Tensor | None) -> Tensor:
        log_prob = self._interface.log_prob(self.flow, rows, context)
        if log_prob.shape != rows.shape[:1]:
            raise ValueError(
                f"flow: expected log_prob {list(rows.shape[:1])} of {list(rows.shape)}, got "
                f"{list(log_prob.shape)}"
            )
        return log_prob

    def _check_rows(self, name: str, x: Tensor) -> None:
        check_floating(**{name: x})
        if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] != self.features:
            raise ValueError(f"{name}: expected [N >= 1, {self.features}], got {list(x.shape)}")

    def _expand_context(self, context: Tensor | None, rows: int) -> Tensor | None:
        if context is None:
            return None
        if not self._interface.takes_context:
            raise ValueError(f"context: the wrapped {type(self.flow).__name__} takes none")
        if not isinstance(context, Tensor):
            raise TypeError(f"context: expected a torch.Tensor, got {type(context).__name__}")
        if context.ndim < 1 or context.shape[0] not in (1, rows):
            raise ValueError(
                f"context: expected [{rows}, ...] or [1, ...], got {list(context.shape)}"
            )
        return context.expand(rows, *context.shape[1:])


def _is_finite(number: float) -> bool:
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and math.isfinite(number)
