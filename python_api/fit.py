"""Maximum-likelihood training of a flow on rows of numbers, with early stopping."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .padded import PaddedFlow


@dataclass(frozen=True)
class FitConfig:
    """How a flow is trained: Adam, cosine decay, the parameters of the best validation kept."""

    steps: int = 5000
    """At most; training stops before if validation no longer improves."""
    batch_size: int = 256
    """Rows a step; all rows where there are fewer."""
    lr: float = 5e-3
    """At the start; it falls to a hundredth along a cosine."""
    eval_every: int = 50
    """Steps between validations."""
    patience: int = 20
    """Validations without improvement after which training stops."""
    grad_clip: float = 10.0
    """Largest norm of the gradient."""
    num_pads: int = 16
    """Pads a row in validation of a padded flow (IWAE)."""
    seed: int = 0
    """Of the order of rows and of the pads."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every", "patience", "num_pads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")


@dataclass
class FitResult:
    """What happened. Likelihoods are means in nats a row, of the rows as the flow saw them."""

    stopped: str  # "patience", "steps", "interrupted" or "diverged"
    best_step: int = 0
    best_valid: float = -math.inf
    records: list[dict[str, float]] = field(default_factory=list)
    """A row each validation: step, train (mean since the last), valid, seconds (of training)."""


def fit_flow(
    flow: nn.Module,
    train: Tensor,
    valid: Tensor,
    config: FitConfig,
    on_validation: Callable[[dict[str, float]], None] | None = None,
) -> FitResult:
    """Trains ``flow`` in place and leaves it in eval mode with its best parameters.

    The order of rows, and so the result, depends on the seed alone. A padded flow is trained by the
    ELBO with one pad a row and validated by IWAE with the same pads every time. An interrupt
    (Ctrl-C) after the first validation ends training like patience does.

    Args:
        flow: with ``log_prob(x [N, D]) -> [N]``. Flows with ``initialize(data)`` get it first.
        train, valid: ``[N, D]``, floating, on the flow's device.
        config: see ``FitConfig``.
        on_validation: called with every record.

    Raises:
        FloatingPointError: if the likelihood is not finite before the first validation. Later the
            best parameters so far are kept and ``stopped`` is "diverged".
    """
    generator = torch.Generator().manual_seed(config.seed)
    if hasattr(flow, "initialize"):
        pads = {"rng": _state(config, -1, train)} if isinstance(flow, PaddedFlow) else {}
        flow.initialize(train, generator=torch.Generator().manual_seed(config.seed), **pads)
    optimizer = torch.optim.Adam(flow.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.505 + 0.495 * math.cos(math.pi * min(step / config.steps, 1))
    )
    batches = _batches(len(train), config.batch_size, generator)
    result, best, seconds, bad = FitResult("steps"), None, 0.0, 0
    try:
        for first in range(0, config.steps, config.eval_every):
            count = min(config.eval_every, config.steps - first)
            started, losses = time.perf_counter(), []
            flow.train()
            for step in range(first, first + count):
                loss = -_training_log_prob(flow, train[next(batches)], config, step).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(flow.parameters(), config.grad_clip)
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            likelihood = -torch.stack(losses).mean().item()
            seconds += time.perf_counter() - started
            valid_likelihood = mean_log_prob(flow, valid, config.num_pads, config.seed)[0]
            if not (math.isfinite(likelihood) and math.isfinite(valid_likelihood)):
                if best is None:
                    raise FloatingPointError(
                        f"the likelihood is not finite after {first + count} steps (training "
                        f"{likelihood}, validation {valid_likelihood}): lower the learning rate "
                        f"{config.lr}"
                    )
                result.stopped = "diverged"
                break
            numbers = (first + count, likelihood, valid_likelihood, seconds)
            record = dict(zip(("step", "train", "valid", "seconds"), numbers, strict=True))
            result.records.append(record)
            if valid_likelihood > result.best_valid:
                result.best_step, result.best_valid, bad = first + count, valid_likelihood, 0
                best = copy.deepcopy(flow.state_dict())
            else:
                bad += 1
            if on_validation is not None:
                on_validation(record)
            if bad >= config.patience:
                result.stopped = "patience"
                break
    except KeyboardInterrupt:
        if best is None:
            raise
        result.stopped = "interrupted"
    flow.load_state_dict(best)
    flow.eval()
    return result


@torch.no_grad()
def log_prob(flow: nn.Module, x: Tensor, num_pads: int = 64, seed: int = 0) -> Tensor:
    """``log p(x)`` ``[N]`` in eval mode and in pieces: of a padded flow the IWAE bound, its pads a
    function of seed and row."""
    was_training, rows = flow.training, 8192
    flow.eval()
    pieces = []
    for i in range(0, len(x), rows):
        if isinstance(flow, PaddedFlow) and flow.noise.pad:
            state = torch.tensor([seed, i * num_pads], device=x.device)
            options = {"estimator": "iwae", "num_pads": num_pads, "rng": state}
        else:
            options = {}
        pieces.append(flow.log_prob(x[i : i + rows], **options))
    flow.train(was_training)
    return torch.cat(pieces)


def mean_log_prob(
    flow: nn.Module, x: Tensor, num_pads: int = 64, seed: int = 0
) -> tuple[float, float]:
    """Mean of ``log_prob`` over the rows and its standard error, in nats."""
    return mean_and_error(log_prob(flow, x, num_pads, seed))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value), of numbers taken in double."""
    values = values.double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def _training_log_prob(flow: nn.Module, x: Tensor, config: FitConfig, step: int) -> Tensor:
    pads = {"rng": _state(config, step, x)} if isinstance(flow, PaddedFlow) else {}
    return flow.log_prob(x, **pads)


def _state(config: FitConfig, step: int, x: Tensor) -> Tensor:
    """Of the pads of a step, apart from those of evaluation, whose offsets count up from 0."""
    return torch.tensor([config.seed, 2**40 + step], device=x.device)


def _batches(rows: int, size: int, generator: torch.Generator):
    """Endless batches of row numbers: every epoch in a new order, no row twice in an epoch, and a
    short rest of it left out, since a step counts its rows alike."""
    size = min(size, rows)
    while True:
        order = torch.randperm(rows, generator=generator)
        yield from (order[i : i + size] for i in range(0, rows - size + 1, size))
