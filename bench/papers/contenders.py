"""The flows that are compared, each behind ``log_prob`` and ``sample`` over D columns."""

import itertools

import torch
from torch import Tensor, nn

from flowops.api.ferumal import FerumalFlow, KernelCoupling
from flowops.api.padded import PaddedFlow

#: Hidden units of the networks.
HIDDEN = (64, 64)
#: Log-scales of our networks' couplings stay within +-5. (zuko: +-6.9; kernel couplings: free.)
SCALE_CLAMP = 5.0

FF_REALNVP, FF_GLOW = "FF-RealNVP", "FF-Glow"
REALNVP, GLOW, ZUKO = "RealNVP", "Glow", "RealNVP (zuko)"
MIXING = {FF_REALNVP: "permutation", REALNVP: "permutation", FF_GLOW: "lu", GLOW: "lu"}
CONTENDERS = (FF_REALNVP, REALNVP, ZUKO, FF_GLOW, GLOW)


class MLPCoupling(nn.Module):
    """``y = [x1, exp(s) x2 + t]`` with ``[s, t] = MLP(x1)``, the identity at the start.

    Args:
        features: D; x1 are the first ``features // 2``, as in ``KernelCoupling``.
        hidden: units of the hidden layers, with ReLU.

    Source: arXiv 1605.08803.
    """

    def __init__(self, features: int, hidden: tuple[int, ...] = HIDDEN):
        super().__init__()
        self.split = features // 2
        widths = [self.split, *hidden]
        layers: list[nn.Module] = []
        for read, written in itertools.pairwise(widths):
            layers += [nn.Linear(read, written), nn.ReLU()]
        last = nn.Linear(widths[-1], 2 * (features - self.split))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last)

    def forward(self, x: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
        s, t = self._log_scale_and_shift(x)
        return torch.cat([x[:, : self.split], x[:, self.split :] * s.exp() + t], 1), s.sum(1)

    def inverse(self, y: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
        s, t = self._log_scale_and_shift(y)
        return torch.cat([y[:, : self.split], (y[:, self.split :] - t) * (-s).exp()], 1), -s.sum(1)

    def _log_scale_and_shift(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.net(rows[:, : self.split]).chunk(2, dim=1)
        return SCALE_CLAMP * torch.tanh(s / SCALE_CLAMP), t


def build(
    name: str, features: int, layers: int, points: int | str, seed: int, pad: int = 0, **padding
) -> PaddedFlow:
    """A contender over ``features + pad`` columns, wrapped.

    RealNVP and Glow are the kernel flows with an MLP in place of each kernel machine: ActNorm,
    permutations, rotations and halves are the same, of the same seed.

    Args:
        name: one of ``CONTENDERS``.
        features: D of the data.
        layers: couplings L.
        points: auxiliary points of a layer of the kernel flows, or ``"all"``.
        seed: of the start.
        pad: padding columns p; ``padding`` holds ``pad_scale`` and ``data_scale``.

    Raises:
        ImportError: zuko is not installed.
    """
    torch.manual_seed(seed)
    width = features + pad
    if name == ZUKO:
        import zuko

        flow = zuko.flows.RealNVP(width, transforms=layers, hidden_features=HIDDEN)
    else:
        flow = FerumalFlow(width, layers=layers, points=points, mixing=MIXING[name], seed=seed)
        if name in (REALNVP, GLOW):
            for i, layer in enumerate(flow.layers):
                if isinstance(layer, KernelCoupling):
                    flow.layers[i] = MLPCoupling(width)
    return PaddedFlow(flow, features, pad, **padding)
