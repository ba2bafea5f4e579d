r"""Layers between the couplings of a flow: scale and shift, permutation, linear map.

    ActNorm       y = (x + bias) exp(log_scale)      logdet = sum_d log_scale_d
    Permutation   y_d = x_order[d]                   logdet = 0
    LULinear      y = P L U x                        logdet = sum_d ln |U_dd|

Every layer is a module with ``forward(x, context=None) -> (y, logdet)`` and ``inverse(y,
context=None) -> (x, logdet)``, from data to noise and back: the convention of nflows. x is
``[N, D]``, logdet ``[N]`` in nats and that of the direction asked for. No layer here reads the
context. Arithmetic and logdet are fp32, fp64 if rows or parameters are; y has the dtype of x.

Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (arXiv
1807.03039), table 1 and section 3.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowops.dispatch import check_floating, compute_dtype, computing


class ActNorm(nn.Module):
    """``y = (x + bias) exp(log_scale)`` per feature; the identity until ``initialize``.

    Args:
        features: D.

    Raises:
        ValueError: naming the argument that is off.

    Source: arXiv 1807.03039, section 3.1.
    """

    def __init__(self, features: int):
        super().__init__()
        check_count("features", features, 1)
        self.bias = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))

    @torch.no_grad()
    def initialize(self, data: Tensor) -> None:
        """Sets bias and scale so that every feature of ``data`` comes out with mean 0 and variance
        1. This never happens in ``forward``.

        Args:
            data: ``[N >= 2, D]``, floating, finite, no feature constant.

        Raises:
            TypeError, ValueError: naming the row or column that is off.
        """
        check_data("data", data, len(self.bias), self.bias.device)
        if len(data) < 2:
            raise ValueError("data: expected at least 2 rows to take a variance from, got 1")
        constant = (data == data[0]).all(0).nonzero().flatten().tolist()
        if constant:
            column = constant[0]
            raise ValueError(
                f"data: column {column} is constant ({data[0, column].item()}), which no density "
                "has; drop it or add noise"
            )
        std, mean = torch.std_mean(data.double(), dim=0, correction=0)
        self.bias.copy_(-mean)
        self.log_scale.copy_(-std.log())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows("x", x, len(self.bias), self.bias.device)
        wide, bias, log_scale = computing(x, self.bias, self.log_scale)
        return ((wide + bias) * log_scale.exp()).to(x.dtype), log_scale.sum().expand(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows("y", y, len(self.bias), self.bias.device)
        wide, bias, log_scale = computing(y, self.bias, self.log_scale)
        return (wide * (-log_scale).exp() - bias).to(y.dtype), -log_scale.sum().expand(len(y))


class Permutation(nn.Module):
    """``y_d = x_order[d]``.

    Args:
        order: a permutation of 0..D-1, a sequence or an integer tensor; kept in the state dict.

    Raises:
        ValueError: if it is none.
    """

    def __init__(self, order: Sequence[int] | Tensor):
        super().__init__()
        order = torch.as_tensor(order)
        if order.ndim != 1 or sorted(order.tolist()) != list(range(len(order))) or not len(order):
            raise ValueError(
                f"order: expected a permutation of 0..D-1, got {order.tolist()} of shape "
                f"{list(order.shape)}"
            )
        self.register_buffer("order", order.long())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows("x", x, len(self.order), self.order.device)
        return x.index_select(1, self.order), x.new_zeros(len(x), dtype=compute_dtype(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows("y", y, len(self.order), self.order.device)
        x = y.index_select(1, self.order.argsort())
        return x, y.new_zeros(len(y), dtype=compute_dtype(y))


class LULinear(nn.Module):
    """``y = W x`` with ``W = P L U``: P a fixed permutation, L unit lower and U upper triangular.

    W starts as a random rotation. Its ``D^2`` parameters lie in one matrix ``lu``: L below the
    diagonal, U above it, ``ln |U_dd|`` on it. The signs of ``U_dd`` are fixed, so that W stays
    invertible and its determinant keeps its sign.

    Args:
        features: D.
        generator: of the rotation, on the CPU; None for torch's own.

    Raises:
        ValueError: naming the argument that is off.

    Source: arXiv 1807.03039, section 3.2, eq. 10-11.
    """

    def __init__(self, features: int, *, generator: torch.Generator | None = None):
        super().__init__()
        check_count("features", features, 1)
        rotation, _ = torch.linalg.qr(
            torch.randn(
                (features, features), dtype=torch.float64, device="cpu", generator=generator
            )
        )
        P, L, U = torch.linalg.lu(rotation)
        diagonal = U.diagonal()
        self.lu = nn.Parameter(placed(L.tril(-1) + U.triu(1) + diagonal.abs().log().diag()))
        self.register_buffer("sign", placed(diagonal.sign()))
        self.register_buffer("order", placed(P.argmax(1)))  # (P v)_d = v_order[d]

    def matrix(self) -> Tensor:
        """``W [D, D]``."""
        lower, upper = self._factors(self.lu)
        return (lower @ upper)[self.order]

    def _factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """L and U in the dtype of arithmetic with ``like``."""
        _, lu, sign = computing(like, self.lu, self.sign)
        upper = lu.triu(1) + (sign * lu.diagonal().exp()).diag()
        return lu.tril(-1) + torch.eye(len(lu), dtype=lu.dtype, device=lu.device), upper

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows("x", x, len(self.sign), self.sign.device)
        with uncast(x):
            lower, upper = self._factors(x)
            y = x.to(upper.dtype) @ (lower @ upper)[self.order].mT
        return y.to(x.dtype), self._logdet(upper.dtype).expand(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows("y", y, len(self.sign), self.sign.device)
        with uncast(y):
            lower, upper = self._factors(y)
            x = y.to(upper.dtype).index_select(1, self.order.argsort())
            x = torch.linalg.solve_triangular(
                lower.mT, x, upper=True, left=False, unitriangular=True
            )
            x = torch.linalg.solve_triangular(upper.mT, x, upper=False, left=False)
        return x.to(y.dtype), -self._logdet(upper.dtype).expand(len(y))

    def _logdet(self, dtype: torch.dtype) -> Tensor:
        return self.lu.diagonal().to(dtype).sum()


def placed(tensor: Tensor) -> Tensor:
    """A tensor made on the CPU as a new module would hold it: on torch's default device and, if
    floating, in its default dtype."""
    dtype = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device=torch.get_default_device(), dtype=dtype)


def uncast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off for products on the device of x, if it has one (meta has none)."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def check_count(name: str, value: int, least: int, instead: str = "") -> None:
    """Raises ValueError unless ``value`` is an integer of at least ``least``. ``instead`` ends the
    description of what else the caller takes."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}{instead}, got {value!r}")


def check_points(points: int, rows: int) -> None:
    if points > rows:
        raise ValueError(
            f"points: the layer has {points} points, the data only {rows} rows; build it with "
            f"points={rows} at most, or points='all'"
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_rows(name: str, x: Tensor, features: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless x is a floating ``[N >= 1, features]`` on ``device``.
    Looks at no values."""
    check_floating(**{name: x})
    if x.ndim != 2 or x.shape[1] != features or x.shape[0] == 0:
        raise ValueError(f"{name}: expected [N >= 1, {features}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def check_data(name: str, data: Tensor, features: int, device: torch.device) -> None:
    """``check_rows``, and ValueError naming the first value that is not finite."""
    check_rows(name, data, features, device)
    bad = (~data.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"{name}: expected finite values, got {data[row, column].item()} in row {row}, column "
            f"{column}"
        )


def check_features(features: int) -> None:
    """Raises ValueError unless a coupling can split them."""
    check_count("features", features, 1)
    if features == 1:
        raise ValueError(
            "features: a coupling needs at least 2, got 1; add noise dimensions (PaddedFlow)"
        )


def check_context(context: Tensor | None, columns: int, x: Tensor) -> None:
    """Raises TypeError or ValueError unless context is a floating ``[N, columns]`` beside x, or
    None if there are no columns."""
    if not columns:
        if context is not None:
            raise ValueError("context: expected None (built with context=0), got one")
        return
    if context is None:
        raise ValueError(f"context: expected [{len(x)}, {columns}], got None")
    check_floating(x=x, context=context)
    if context.shape != (len(x), columns):
        raise ValueError(f"context: expected [{len(x)}, {columns}], got {list(context.shape)}")


def random_order(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A random permutation of 0..n-1 on ``device``; the generator may be on another."""
    source = device if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=source).to(device)


def exchanging_order(features: int, split: int, generator: torch.Generator) -> Tensor:
    """A random permutation that brings at least one new feature into the first ``split``: two
    couplings in a row never move the same ones."""
    while True:
        order = torch.randperm(features, generator=generator, device="cpu")
        if bool((order[:split] >= split).any()):
            return order


def unrepeated_first(rows: Tensor) -> Tensor:
    """The rows in their order, but those equal to an earlier one last. Equal points with equal
    weights would stay equal through training."""
    _, group = torch.unique(rows, dim=0, return_inverse=True)
    index = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(index, len(rows)).scatter_reduce(0, group, index, "amin")
    return rows[(first[group] < index).int().argsort(stable=True)]


def typical_distance(rows: Tensor, *, per_feature: bool) -> Tensor:
    """Median distance between rows that differ; 1 if none do. Per feature: ``r_d c``, r_d the
    median difference of feature d and c the median distance of rows divided by r, so that the
    typical ``|(x - x') / lengthscale|`` is 1 in any number of features."""
    if not per_feature:
        distances = torch.pdist(rows)
        distances = distances[distances > 0]
        return distances.median() if len(distances) else rows.new_ones(())
    r = torch.stack([typical_distance(c, per_feature=False) for c in rows.split(1, dim=1)])
    return r * typical_distance(rows / r, per_feature=False)
