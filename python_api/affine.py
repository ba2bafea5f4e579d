"""The affine step of RealNVP, MAF and TarFlow as a layer around any network.

Source: Dinh et al., "Density Estimation using Real NVP" (arXiv 1605.08803), eq. 7-8; Papamakarios
et al., "Masked Autoregressive Flow for Density Estimation" (arXiv 1705.07057), eq. 3-4.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowops import affine_inverse, affine_update
from flowops.dispatch import compute_dtype

CONVENTIONS = ("realnvp", "maf")


class AffineUpdate(nn.Module):
    """``y2 = x2 exp(s) + t`` (RealNVP) or ``y2 = (x2 - t) exp(-s)`` (MAF), ``s, t`` from a network.

    Rows ``x [N, D]`` are coupled: the first ``split`` features x1 stay and ``[s, t] = net(x1)``.
    Tokens ``x [B, T, C]`` are updated autoregressively: ``[s, t] = net(x)``, where token i is
    updated with what the network returns for token i - 1, and the first stays. The network must be
    causal: what it returns for token i depends on tokens 0..i alone.

    ``forward(x, context=None) -> (y, logdet)`` and ``inverse(y, context=None) -> (x, logdet)``;
    logdet ``[N]`` or ``[B]`` in nats is that of the direction asked for, fp32 or wider. Both are
    differentiable. ``inverse`` on tokens calls the network T times.

    Args:
        net: from ``[N, split]`` to ``[N, 2 (D - split)]``, log-scales s first, then shifts t, or to
            ``[N, D - split]``, shifts alone. From ``[B, T, C]`` to ``[B, T, 2C]`` or ``[B, T, C]``.
            A context is its second argument.
        split: features of x1; None: ``(D + 1) // 2``, as ``x.chunk(2, -1)`` has it. Not for tokens.
        convention: ``"realnvp"`` or ``"maf"``.

    Raises:
        ValueError: naming the argument that is off.

    Source: arXiv 1605.08803, eq. 7-8; arXiv 1705.07057, eq. 3-4.
    """

    def __init__(self, net: nn.Module, split: int | None = None, convention: str = "realnvp"):
        super().__init__()
        if split is not None and (isinstance(split, bool) or not isinstance(split, int)):
            raise ValueError(f"split: expected an integer or None, got {split!r}")
        if split is not None and split < 1:
            raise ValueError(f"split: expected at least 1, got {split}")
        if convention not in CONVENTIONS:
            raise ValueError(f"convention: expected one of {CONVENTIONS}, got {convention!r}")
        self.net, self.split, self.convention = net, split, convention

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._is_tokens("x", x):
            return self._step(x, self._params(x, context), inverse=False)
        return self._couple("x", x, context, inverse=False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._is_tokens("y", y):
            return self._couple("y", y, context, inverse=True)
        T, x = y.shape[1], y[:, :1]
        for i in range(1, T):
            # A causal network ignores the tokens that aren't known yet; zeros stand for them.
            params = self._params(F.pad(x, (0, 0, 0, T - i)), context)
            x, _ = self._step(y[:, : i + 1], params[:, : i + 1], inverse=True)
        return self._step(y, self._params(x, context), inverse=True)

    def _couple(self, name, x, context, inverse):
        N, D = x.shape
        split = (D + 1) // 2 if self.split is None else self.split
        if split >= D:
            raise ValueError(f"{name}: expected more than split = {split} columns, got {D}")
        x1, E = x[:, :split], D - split
        params = self._params(x1, context)
        if params.shape not in ((N, E), (N, 2 * E)):
            raise ValueError(
                f"net: expected [{N}, {2 * E}] or [{N}, {E}] for {name} of {list(x.shape)}, got "
                f"{list(params.shape)}"
            )
        # Two tokens of E features: the first stays and gives the parameters of the second, x2. What
        # the first consists of is the same to the step: as many features before x2, or zeros.
        tokens = F.pad(x, (2 * E - D, 0)) if 2 * E != D else x
        params = params.unsqueeze(1).expand(-1, 2, -1)
        y, logdet = self._step(tokens.reshape(N, 2, E), params, inverse)
        return y.view(N, D) if 2 * E == D else torch.cat([x1, y[:, 1]], dim=1), logdet

    def _step(self, x, params, inverse):
        """One way or the other, ``[B, T, C]``, with its log-determinant."""
        if inverse == (self.convention == "realnvp"):
            return affine_update(x, params)
        y, C = affine_inverse(x, params), x.shape[2]
        log_scale = params[:, :-1, : params.shape[2] - C]
        return y, log_scale.to(compute_dtype(x, params)).sum((1, 2))

    def _params(self, x, context):
        return self.net(x) if context is None else self.net(x, context)

    def _is_tokens(self, name, x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
        if x.ndim not in (2, 3):
            raise ValueError(f"{name}: expected [N, D] or [B, T, C], got {list(x.shape)}")
        if x.ndim == 3 and self.split is not None:
            raise ValueError(f"{name}: expected [N, D], as split is given, got {list(x.shape)}")
        return x.ndim == 3
