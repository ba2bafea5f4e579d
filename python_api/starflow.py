"""The parts of an autoregressive block in which STARFlow differs from TarFlow, each by itself.

Source: Gu et al., "STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis"
(arXiv 2506.06276). Names of weights, constants and the axes of the positions are those of its
reference program.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowops.dispatch import compute_dtype

#: ``softplus(a + UNIT_SOFTPLUS)`` is 1 at a = 0.
UNIT_SOFTPLUS = math.log(math.e - 1)

#: Pairs of a head that turn with time; rows and columns share the others.
TIME_PAIRS = 8

ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of; the defaults are TarFlow's.

    Attributes:
        shift: ``"output"``: parameters of token i transform token i + 1, and the first passes
            through; ``"input"``: the network reads a learned token first and all but the last of
            its tokens, so that every token is transformed.
        scale: sigma is ``exp(a)`` (``"exp"``) or ``softplus(a + ln(e - 1))`` (``"softplus"``).
        soft_clip: if positive, the network's output o is ``soft_clip tanh(o / soft_clip)``.
        norm: before attention and perceptron, ``"layer"`` or ``"rms"``.
        final_norm: an RMSNorm before the output projection.
        positions: ``"learned"``, a table added to the tokens, or ``"rotary"``, rotations of queries
            and keys.
    """

    shift: str = "output"
    scale: str = "exp"
    soft_clip: float = 0.0
    norm: str = "layer"
    final_norm: bool = False
    positions: str = "learned"

    def __post_init__(self):
        for name, choices in (
            ("shift", ("output", "input")),
            ("scale", ("exp", "softplus")),
            ("norm", ("layer", "rms")),
            ("positions", ("learned", "rotary")),
            ("final_norm", (False, True)),
        ):
            value = getattr(self, name)
            if value not in choices:
                first, second = choices
                raise ValueError(f"{name}: expected {first!r} or {second!r}, got {value!r}")
        clip = self.soft_clip
        if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 <= clip < math.inf:
            raise ValueError(f"soft_clip: expected a finite number, at least 0, got {clip!r}")

    def changed(self) -> dict:
        """The parts that are not TarFlow's, by name."""
        plain = asdict(TARFLOW)
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    def affine_params(self, out: Tensor, nvp: bool) -> Tensor:
        """Log-scales and shifts ``[..., 2C]`` (``[..., C]``, shifts alone, without nvp) from the
        network's output of the same shape: in fp32 (fp64 for fp64), or as it is where nothing is
        to be done."""
        if not self.soft_clip and (self.scale == "exp" or not nvp):
            return out
        out = out.to(compute_dtype(out))
        if self.soft_clip:
            out = self.soft_clip * torch.tanh(out / self.soft_clip)
        if self.scale == "exp" or not nvp:
            return out
        a, b = out.chunk(2, dim=-1)
        return torch.cat([log_softplus(a + UNIT_SOFTPLUS), b], dim=-1)


TARFLOW = BlockParts()

#: STARFlow's choices as arguments of ``TarFlow``.
STARFLOW = {
    "shift": "input",
    "scale": "softplus",
    "soft_clip": 4.0,
    "final_norm": True,
    "positions": "rotary",
    "reverse_first": True,
}


def log_softplus(u: Tensor) -> Tensor:
    """``ln ln(1 + e^u)``, accurate to a few eps, and its gradient too, for any u."""
    # Below the bound softplus is exp to the last bit, even of fp64, and soon underflows.
    bound = 36.0
    return torch.where(u < -bound, u, F.softplus(u.clamp(min=-bound), threshold=bound).log())


def split_params(params: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Log-scales and shifts, ``[..., C]`` each, in fp32 (fp64 for fp64)."""
    params = params.to(compute_dtype(params))
    if params.shape[-1] == channels:
        return torch.zeros_like(params), params
    a, b = params.chunk(2, dim=-1)
    return a, b


def affine_update_unshifted(
    x: Tensor, params: Tensor, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """``z_i = (x_i - b_i) exp(-a_i)`` and its log-determinant: ``flowops.affine_update`` without
    the shift by one.

    Args:
        x: ``[B, T, C]``, floating.
        params: ``[B, T, 2C]``, log-scales a first, then shifts b; or ``[B, T, C]``, shifts alone.
        reverse: x and z are in raster order while params are in reversed token order.

    Returns:
        ``z [B, T, C]`` in x's dtype and ``logdet [B]`` in nats, fp32 (fp64 for fp64).

    Source: arXiv 2506.06276.
    """
    a, b = split_params(params.flip(1) if reverse else params, x.shape[2])
    z = (x.to(compute_dtype(x, b)) - b) * torch.exp(-a)
    return z.to(x.dtype), -a.sum(dim=(1, 2))


class RMSNorm(nn.Module):
    """``h / rms(h) * (1 + weight)``, ``rms(h)^2 = mean(h^2) + eps``, computed in fp32 (fp64 for
    fp64) whatever the storage of its input. The weight starts at zero."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, h: Tensor) -> Tensor:
        dtype = compute_dtype(h)
        return F.rms_norm(h.to(dtype), self.weight.shape, 1 + self.weight.to(dtype), self.eps).to(
            h.dtype
        )


def rotary_table(tokens: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles by which the pairs of a head turn.

    The i-th token that a block reads is in row ``i // side`` and column ``i % side`` of a square,
    at time 0. Of the ``head_dim / 2`` pairs the first half of all but ``TIME_PAIRS`` turn with the
    row, the second with the column, the last ``TIME_PAIRS`` with the time: for one image not at
    all.

    Args:
        tokens: their number, a square.
        head_dim: a multiple of 4, at least 20.
        like: a tensor on the device; fp64 for angles in fp64, which are fp32 otherwise.

    Returns:
        Two tensors ``[T, 1, head_dim / 2]``.

    Source: Su et al. (arXiv 2104.09864); the split of the axes: program of arXiv 2506.06276.
    """
    options = {"device": like.device, "dtype": compute_dtype(like)}
    pairs = (head_dim // 2 - TIME_PAIRS) // 2
    exponents = torch.arange(pairs, **options) / pairs
    frequencies = ROTARY_BASE**-exponents
    along = torch.arange(math.isqrt(tokens), **options)[:, None] * frequencies  # [side, pairs]
    side = len(along)
    angles = torch.cat(
        [
            along[:, None].expand(side, side, pairs),
            along[None].expand(side, side, pairs),
            along.new_zeros(side, side, TIME_PAIRS),
        ],
        dim=2,
    ).view(tokens, 1, head_dim // 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (2j, 2j + 1) of ``x [B, T, H, D]`` by the angles of ``rotary_table``, in the
    table's dtype; the result has x's."""
    cos, sin = table
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def check_parts(parts: BlockParts, nvp: bool, head_dim: int) -> None:
    """Whether they fit the rest of a model's configuration.

    Raises:
        ValueError: naming the argument that is off.
    """
    if parts.scale != "exp" and not nvp:
        raise ValueError(
            f"scale: expected 'exp' for nvp=False, without scales, got {parts.scale!r}"
        )
    if parts.positions == "rotary" and (head_dim % 4 or head_dim < 2 * TIME_PAIRS + 4):
        raise ValueError(
            "head_dim: expected a multiple of 4, at least "
            f"{2 * TIME_PAIRS + 4}, for rotary positions, got {head_dim}"
        )
