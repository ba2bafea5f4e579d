r"""Kernel flows ("Ferumal"): couplings whose log-scales and shifts are kernel machines.

    KernelCoupling   x = [x1, x2],  [s, t] = K(x1, points) weight
                     y = [x1, exp(s) x2 + t],  logdet = sum_j s_j
    FerumalFlow      layers of ActNorm -> permutation or linear map -> KernelCoupling,
                     log p(x) = log N(z; 0, I) + logdet

Source: English, Kirchler and Lippert, "Kernelised Normalising Flows" (arXiv 2307.14839), eq. 6-9.
"""

import math

import torch
from torch import Tensor, nn

from flowops import kernel_coupling, kernel_coupling_inverse, noise_normal, se_gram_matmul
from flowops.dispatch import check_backend, computing
from flowops.gram import KERNELS
from flowops.noise import Rng

from .mixing import (
    ActNorm,
    LULinear,
    Permutation,
    check_choice,
    check_context,
    check_count,
    check_data,
    check_features,
    check_points,
    check_rows,
    exchanging_order,
    placed,
    random_order,
    typical_distance,
    unrepeated_first,
)


class KernelCoupling(nn.Module):
    """``y = [x1, exp(s) x2 + t]`` with ``[s, t] = output_scale K(x1, points) weight``.

    Weights start at zero: the layer is the identity, and ``initialize`` places points and
    lengthscale by the data. Until then points are standard normal.

    Args:
        features: D, at least 2.
        points: number M of auxiliary points, or ``"all"``: every row that ``initialize`` is given
            becomes a point, never learned.
        split: features of x1, the first ones, which stay; ``features // 2`` if None.
        kernel: ``"se"``, ``"matern12"``, ``"matern32"`` or ``"matern52"``.
        lengthscale: ``"scalar"``, or ``"features"`` for one for each column that K reads.
        learn_points: points are a parameter; False: a buffer.
        output_scale: one learned positive factor on K.
        scale_clamp: c > 0 bounds the log-scales, ``s -> c tanh(s / c)``; None leaves them free.
        context: columns C that are appended to x1, so that points lie in ``split + C`` dimensions.
        backend: of ``flowops.kernel_coupling``.
        generator: of the points, on the CPU; None for torch's own.

    Raises:
        ValueError: naming the argument that is off.

    Source: arXiv 2307.14839, eq. 6-9.
    """

    #: Initial lengthscale in units of the median distance between rows.
    LENGTHSCALE_FACTOR = 1.0
    #: Rows whose distances that median is taken of.
    LENGTHSCALE_ROWS = 1024

    def __init__(
        self,
        features: int,
        points: int | str,
        *,
        split: int | None = None,
        kernel: str = "se",
        lengthscale: str = "scalar",
        learn_points: bool = True,
        output_scale: bool = False,
        scale_clamp: float | None = None,
        context: int = 0,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_features(features)
        self.all_points = points == "all"
        if not self.all_points:
            check_count("points", points, 1, " or 'all'")
        split = features // 2 if split is None else split
        check_count("split", split, 1)
        if split >= features:
            raise ValueError(f"split: expected less than features {features}, got {split}")
        check_choice("kernel", kernel, KERNELS)
        check_choice("lengthscale", lengthscale, ("scalar", "features"))
        if scale_clamp is not None and not 0 < scale_clamp < math.inf:
            raise ValueError(f"scale_clamp: expected None or a positive number, got {scale_clamp}")
        check_count("context", context, 0)
        check_backend(backend)
        self.features, self.split, self.context = features, split, context
        self.scale_clamp, self._how = scale_clamp, {"kernel": kernel, "backend": backend}

        M, width = 0 if self.all_points else points, split + context
        rows = placed(torch.randn((M, width), device="cpu", generator=generator))
        learned = learn_points and not self.all_points
        self.points = nn.Parameter(rows) if learned else nn.Buffer(rows)
        self.weight = nn.Parameter(torch.zeros(M, 2 * (features - split)))
        typical = self.LENGTHSCALE_FACTOR * math.sqrt(2 * width)  # distance of two normal rows
        shape = () if lengthscale == "scalar" else (width,)
        self.log_lengthscale = nn.Parameter(torch.full(shape, math.log(typical)))
        self.log_output_scale = nn.Parameter(torch.zeros(())) if output_scale else None

    @torch.no_grad()
    def initialize(
        self,
        data: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Takes random rows as points (no row twice while there are others; all rows if
        ``points="all"``), the median distance between rows as lengthscale, and zero weights.

        Args:
            data: ``[N, D]``, floating, finite, as it arrives at this layer.
            context: ``[N, C]``.
            generator: of the choice, on any device; None for torch's own.

        Raises:
            TypeError, ValueError: naming what is off; more points than rows.
        """
        check_data("data", data, self.features, self.weight.device)
        stay = self._stay(data, context)
        if context is not None:
            check_data("context", context, self.context, data.device)
        N, M = len(data), len(self.points)
        rows = stay[random_order(N, generator, stay.device)]
        if self.all_points:
            self._resize(N)
            self.points.copy_(stay)
        else:
            check_points(M, N)
            self.points.copy_(unrepeated_first(rows)[:M])
        sample, per_feature = rows[: self.LENGTHSCALE_ROWS].double(), self.log_lengthscale.ndim > 0
        typical = typical_distance(sample, per_feature=per_feature)
        self.log_lengthscale.copy_((self.LENGTHSCALE_FACTOR * typical).log())
        self.weight.zero_()
        if self.log_output_scale is not None:
            self.log_output_scale.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise.

        Args:
            x: ``[N, D]``, floating.
            context: ``[N, C]``, floating; None if the layer was built without.

        Returns:
            ``y [N, D]`` in x's dtype and ``logdet [N]`` in nats, fp32 (fp64 for fp64).

        Raises:
            TypeError, ValueError: naming the argument that is off.
            RuntimeError: if ``points="all"`` and there are none yet.
        """
        check_rows("x", x, self.features, self.weight.device)
        stay, moving = self._stay(x, context), x[:, self.split :]
        if self.scale_clamp is None:
            moved, logdet = kernel_coupling(stay, moving, *self._machine(), **self._how)
        else:
            s, t = self._log_scale_and_shift(stay)
            moved, logdet = (moving * s.exp() + t).to(x.dtype), s.sum(1)
        return torch.cat([x[:, : self.split], moved], dim=1), logdet

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise to data: x and the log-determinant of this direction. Otherwise as ``forward``."""
        check_rows("y", y, self.features, self.weight.device)
        s, t = self._log_scale_and_shift(self._stay(y, context))
        moved = ((y[:, self.split :] - t) * (-s).exp()).to(y.dtype)
        return torch.cat([y[:, : self.split], moved], dim=1), -s.sum(1)

    def invert(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """x of ``inverse`` alone; without a clamp in one fused pass."""
        if self.scale_clamp is not None:
            return self.inverse(y, context)[0]
        check_rows("y", y, self.features, self.weight.device)
        stay, moved = self._stay(y, context), y[:, self.split :]
        moving = kernel_coupling_inverse(stay, moved, *self._machine(), **self._how)
        return torch.cat([y[:, : self.split], moving], dim=1)

    def _stay(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What K reads: the half that stays, with the context."""
        check_context(context, self.context, x)
        stay = x[:, : self.split]
        return stay if context is None else torch.cat([stay, context], dim=1)

    def _machine(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points, weights and lengthscale. exp is taken in fp32 at least."""
        if self.all_points and not len(self.points):
            raise RuntimeError(
                "points: with points='all' there are none before initialize() or load_state_dict()"
            )
        (log_lengthscale,) = computing(self.log_lengthscale)
        weight = self.weight
        if self.log_output_scale is not None:
            weight, log_output_scale = computing(weight, self.log_output_scale)
            weight = weight * log_output_scale.exp()
        return self.points, weight, log_lengthscale.exp()

    def _log_scale_and_shift(self, stay: Tensor) -> tuple[Tensor, Tensor]:
        points, weight, lengthscale = self._machine()
        stay, _ = computing(stay, weight)  # the product has the dtype of what K reads
        s, t = se_gram_matmul(stay, points, weight, lengthscale, **self._how).chunk(2, dim=1)
        if self.scale_clamp is not None:
            s = self.scale_clamp * torch.tanh(s / self.scale_clamp)
        return s, t

    def _resize(self, rows: int) -> None:
        """Makes room for ``rows`` points. The first time the parameter stays the same object, for
        optimizers; later a graph may remember its old shape."""
        if rows != len(self.points):
            self.points = self.points.new_empty(rows, self.points.shape[1])
            weight = self.weight.new_empty(rows, self.weight.shape[1])
            if len(self.weight):
                self.weight = nn.Parameter(weight, self.weight.requires_grad)
            else:
                self.weight.data = weight

    def _load_from_state_dict(self, state_dict, prefix, *args):
        points = state_dict.get(prefix + "points")
        if self.all_points and points is not None:
            self._resize(len(points))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        points = "all" if self.all_points else len(self.points)
        return f"{self.features}, {points=}, split={self.split}, kernel={self._how['kernel']!r}"


class FerumalFlow(nn.Module):
    """A flow of L layers, each ActNorm -> mixing -> KernelCoupling, onto a standard normal.

    Call ``initialize`` with training data first: without it points and scales fit standard normal
    data only.

    Args:
        features: D, at least 2.
        layers: L.
        points: auxiliary points of each layer, or ``"all"``; see ``KernelCoupling``.
        mixing: ``"permutation"``: random, then reversal, by turns (FF-RealNVP); ``"lu"``: a learned
            linear map that starts as a random rotation (FF-Glow).
        kernel, lengthscale, learn_points, output_scale, scale_clamp, context, backend: as in
            ``KernelCoupling``.
        seed: of permutations, rotations and the points before ``initialize``.

    Raises:
        ValueError: naming the argument that is off.

    Source: arXiv 2307.14839; arXiv 1807.03039 for the order of the layers.
    """

    #: Rows that ``initialize`` carries through the layers at most (unless every row is a point).
    INIT_ROWS = 65_536

    def __init__(
        self,
        features: int,
        *,
        layers: int = 8,
        points: int | str = 150,
        mixing: str = "permutation",
        kernel: str = "se",
        lengthscale: str = "scalar",
        learn_points: bool = True,
        output_scale: bool = False,
        scale_clamp: float | None = None,
        context: int = 0,
        seed: int = 0,
        backend: str = "auto",
    ):
        super().__init__()
        check_count("layers", layers, 1)
        check_choice("mixing", mixing, ("permutation", "lu"))
        check_count("seed", seed, 0)
        coupling = {
            "kernel": kernel,
            "lengthscale": lengthscale,
            "learn_points": learn_points,
            "output_scale": output_scale,
            "scale_clamp": scale_clamp,
            "context": context,
            "backend": backend,
        }
        own = {"features": features, "layers": layers, "points": points, "mixing": mixing}
        self.config = {**own, "seed": seed, **coupling}
        self.features, self.context = features, context
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        for i in range(layers):
            machine = KernelCoupling(features, points, generator=generator, **coupling)
            if mixing == "lu":
                mix = LULinear(features, generator=generator)
            elif i % 2:
                mix = Permutation(torch.arange(features - 1, -1, -1))
            else:
                mix = Permutation(exchanging_order(features, machine.split, generator))
            self.layers.extend([ActNorm(features), mix, machine])

    @torch.no_grad()
    def initialize(
        self,
        data: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fits the flow's start to the data, layer by layer: ActNorm takes mean and variance, the
        coupling points and lengthscale, of the data as they arrive there. What couplings had
        learned is reset. Of more than ``INIT_ROWS`` rows a random choice is carried.

        Args:
            data: ``[N >= 2, D]``, floating, finite, no feature constant.
            context: ``[N, C]``.
            generator: of all choices, on any device; None for torch's own.

        Raises:
            TypeError, ValueError: naming the row or column that is off; more points than rows.
        """
        check_data("data", data, self.features, self.layers[0].bias.device)
        check_context(context, self.context, data)
        points = self.config["points"]
        if points != "all" and len(data) > 1:  # what a single row lacks, ActNorm says
            check_points(points, len(data))
            if len(data) > (most := max(points, self.INIT_ROWS)):
                chosen = random_order(len(data), generator, data.device)[:most]
                data, context = data[chosen], context if context is None else context[chosen]
        data = self._carried("data", data)
        for layer in self.layers:
            if isinstance(layer, KernelCoupling):
                layer.initialize(data, context, generator)  # now the identity: nothing to carry
                continue
            if isinstance(layer, ActNorm):
                layer.initialize(data)
            data, _ = layer(data)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``z [N, D]`` and ``logdet [N]``. Arguments, dtypes and errors as
        ``KernelCoupling.forward``."""
        z, logdet = self._to_noise(x, context)
        return z.to(x.dtype), logdet

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log p(x | context)`` in nats, ``[N]``, fp32 (fp64 for fp64). Arguments and errors as
        ``forward``."""
        z, logdet = self._to_noise(x, context)
        return logdet - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise to data, ``[N, D]`` in z's dtype. Otherwise as ``forward``."""
        x = self._carried("z", z)
        for layer in reversed(self.layers):
            if isinstance(layer, KernelCoupling):
                x = layer.invert(x, context)
            else:
                x, _ = layer.inverse(x)
        return x.to(z.dtype)

    @torch.no_grad()
    def sample(self, n: int, context: Tensor | None = None, *, rng: Rng = None) -> Tensor:
        """Draws n rows ``[n, D]`` in the dtype of the parameters.

        Args:
            n: how many.
            context: ``[n, C]``, or ``[C]`` for all; None if the flow was built without.
            rng: as in ``flowops.make_rng``. The noise of row i depends on rng and i alone.

        Raises:
            TypeError, ValueError: naming the argument that is off.
        """
        check_count("n", n, 1)
        if isinstance(context, Tensor) and context.ndim == 1:
            context = context.expand(n, -1)
        bias = self.layers[0].bias
        z = noise_normal((n, self.features), rng=rng, device=bias.device)
        return self.inverse(self._carried("z", z), context).to(bias.dtype)

    def _to_noise(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z and logdet in fp32 at least: nothing is rounded between layers."""
        z, total = self._carried("x", x), 0
        for layer in self.layers:
            z, logdet = layer(z, context)
            total = total + logdet
        return z, total

    def _carried(self, name: str, x: Tensor) -> Tensor:
        bias = self.layers[0].bias
        check_rows(name, x, self.features, bias.device)
        return computing(x, bias)[0]
