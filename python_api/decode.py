"""The inverse of an autoregressive block: guidance, the choice of solver, and a block's weights in
the layout of the kernels, kept from call to call.

Source: Zhai et al. (arXiv 2412.06329); Gaussian guidance: Gu et al. (arXiv 2506.06276).
"""

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowops import BlockWeights, LayerWeights, decode_block, pack_block
from flowops.decode import check_solver
from flowops.decode_weights import fingerprint
from flowops.dispatch import compute_dtype

from .decode_tokens import decode_tokens
from .starflow import BlockParts
from .transformer import class_embedding, positions


@dataclass(frozen=True)
class Guidance:
    """Affine parameters moved away from ``a_u, b_u``, those of a pass without the label and with
    attention scores divided by ``attn_temp``, with weights ``g_i = weight``, or, if annealed,
    ``g_i = weight (i + 1) / n`` for the i-th of n tokens that are transformed.

    ``kind``: ``"linear"``, ``a += g (a - a_u)`` and the same for b, or ``"gaussian"``, the mean and
    deviation of ``p^(1 + g) / p_u^g`` for Gaussians p, p_u (``gaussian_guidance``)."""

    weight: float = 0.0
    what: str = "ab"
    attn_temp: float = 1.0
    annealed: bool = False
    kind: str = "linear"

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"guidance: expected a finite number, at least 0, got {self.weight!r}")
        if not set(self.what) <= {"a", "b"}:
            raise ValueError(f"guide_what: expected letters out of 'ab', got {self.what!r}")
        if not 0 < self.attn_temp < float("inf"):
            raise ValueError(f"attn_temp: expected a positive number, got {self.attn_temp!r}")
        if self.kind not in ("linear", "gaussian"):
            raise ValueError(f"guidance_kind: expected 'linear' or 'gaussian', got {self.kind!r}")
        if self.kind == "gaussian" and set(self.what) != {"a", "b"}:
            raise ValueError(
                "guide_what: expected 'ab' for guidance_kind='gaussian', which moves both, got "
                f"{self.what!r}"
            )

    @property
    def active(self) -> bool:
        return self.weight > 0 and bool(self.what)

    def by_token(self, like: Tensor) -> Tensor:
        """``[T, 2]``, the weights for log-scales and shifts by token, for ``like [B, T, C]``."""
        T = like.shape[1]
        steps = torch.arange(1, T + 1, device=like.device, dtype=like.dtype) / max(T - 1, 1)
        weight = steps * self.weight if self.annealed else torch.full_like(steps, self.weight)
        return torch.stack([weight * (letter in self.what) for letter in "ab"], dim=1)

    def combine(self, a: Tensor, b: Tensor, done: float) -> tuple[Tensor, Tensor]:
        """The parameters that are taken, ``[B, C]`` each, from those of both passes, ``[2B, C]``,
        the unguided one second. ``done``: the part of the tokens up to this one, from 0 to 1."""
        weight = self.weight * done if self.annealed else self.weight
        (a, a_u), (b, b_u) = a.chunk(2), b.chunk(2)
        if self.kind == "gaussian":
            return gaussian_guidance(a, b, a_u, b_u, weight)
        a = a + weight * (a - a_u) if "a" in self.what else a
        return a, b + weight * (b - b_u) if "b" in self.what else b


def gaussian_guidance(
    a: Tensor, b: Tensor, a_u: Tensor, b_u: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Log-deviation and mean of ``p^(1 + w) / p_u^w``, with ``p = N(b, exp(2a))``:

        s = min(exp(2 (a - a_u)), 1),   q = 1 + w - w s
        a' = a - ln(q) / 2,             b' = b + (w s / q) (b - b_u)

    The bound on s keeps the product a density where p is wider than p_u.

    Source: Gu et al. (arXiv 2506.06276), guidance.
    """
    s = torch.exp(2 * (a - a_u).clamp(max=0))
    q = 1 + weight * (1 - s)
    return a - 0.5 * q.log(), b + (weight * s / q) * (b - b_u)


@dataclass(frozen=True)
class Solver:
    """``method``, ``tol`` and ``window`` of ``flowops.decode_block``."""

    method: str = "exact"
    tol: float = 1e-3
    window: int | None = None

    def __post_init__(self):
        check_solver(self.method, self.tol, self.window)


class BlockReport(NamedTuple):
    """``residual [B]``, what one more sweep would change in an image, in units of the block's
    output; ``counts [2]``: sweeps over windows, steps of single tokens."""

    residual: Tensor
    counts: Tensor


def invert_block(
    block: nn.Module,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    solver: Solver = Solver(),
    *,
    reverse: bool,
    heads: int,
) -> tuple[Tensor, BlockReport]:
    """``x`` with ``block(x, y)[0] == z``.

    Args:
        block: a ``TarFlowBlock`` or any module with its attribute names.
        z: ``[B, T, C]`` in raster order; not changed.
        y: ``[B]`` labels, -1 for none, or None.
        guidance: whose second pass runs in one batch with the first.
        solver: how.
        reverse: the block reads the tokens from the last to the first.
        heads: of its attention.

    Returns:
        ``x [B, T, C]`` fp32 (fp64 for an fp64 block) and the report. Parameters, exp and update
        are computed in that dtype. The layers' weights are read in bf16 under bf16 autocast.

    Raises:
        ValueError: if the solver's method or sharded weights are not to be had (``check_method``).
    """
    check_method([block], guidance, solver)
    if not _known_to_kernels(block, guidance):
        return _invert_by_tokens(block, z, y, guidance)
    weights = _packed(block, z.device, reverse, heads)
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        z = z.to(weights.tensors[0].dtype)
        embed = class_embedding(block, y, len(z)).to(z.dtype).expand(len(z), -1)
        if guidance.active:
            free = class_embedding(block, None, len(z)).to(z.dtype).expand(len(z), -1)
            embed = torch.cat([embed, free])
        decoded = decode_block(
            z,
            weights,
            embed,
            guide=guidance.by_token(z) if guidance.active else None,
            temperature=guidance.attn_temp if guidance.active else 1.0,
            reverse=reverse,
            method=solver.method,
            tol=solver.tol,
            window=solver.window,
        )
    return decoded.x, BlockReport(decoded.residual, decoded.counts)


def check_method(blocks: Iterable[nn.Module], guidance: Guidance, solver: Solver) -> None:
    """Whether the method can invert the blocks: "jacobi" needs TarFlow's own parts and guidance.

    Raises:
        ValueError: saying why it can't.
    """
    if solver.method != "jacobi":
        return
    if guidance.active and guidance.kind == "gaussian":
        reason = "with guidance_kind='gaussian'"
    else:
        changed = next((changed for block in blocks if (changed := _changed(block))), None)
        if not changed:
            return
        listed = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        reason = f"for blocks with {listed}"
    raise ValueError(
        f"method: expected 'exact' or 'auto' {reason}, which sweeps are not made for, got 'jacobi'"
    )


def _known_to_kernels(block: nn.Module, guidance: Guidance) -> bool:
    return not _changed(block) and not (guidance.active and guidance.kind == "gaussian")


def _changed(block: nn.Module) -> dict:
    """The parts of a block that are not TarFlow's; modules written elsewhere have none."""
    parts = getattr(block, "parts", None)
    return parts.changed() if isinstance(parts, BlockParts) else {}


def _invert_by_tokens(
    block: nn.Module, z: Tensor, y: Tensor | None, guidance: Guidance
) -> tuple[Tensor, BlockReport]:
    refuse_sharded(block.parameters())
    z = z.to(compute_dtype(block.proj_in.weight))
    guided = guidance.active
    with torch.no_grad():
        x, steps = decode_tokens(
            block,
            z,
            y,
            combine=guidance.combine if guided else None,
            temperature=guidance.attn_temp if guided else 1.0,
        )
    counts = torch.zeros(2, dtype=torch.int64, device=z.device)
    counts[1] = steps
    return x, BlockReport(z.new_zeros(len(z)), counts)


def refuse_sharded(tensors: Iterable[Tensor]) -> None:
    if any(hasattr(t, "full_tensor") for t in tensors):
        raise ValueError(
            "model: expected weights in one place, got sharded ones (DTensor); gather them before "
            "sampling"
        )


# --- a block's weights in the layout of the kernels ----------------------------------------------

_PACKED: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, object, BlockWeights]] = (
    weakref.WeakKeyDictionary()
)


def forget_weights(module: nn.Module) -> None:
    """Drops the prepared weights of all blocks in ``module``."""
    for block in module.modules():
        _PACKED.pop(block, None)


def _packed(block: nn.Module, device: torch.device, reverse: bool, heads: int) -> BlockWeights:
    """The block's weights as they are now. On the CPU they are copied again if they changed; on a
    GPU always, into the same memory: looking would wait for it, and copying is short beside
    sampling."""
    narrow = block.proj_in.weight.dtype
    if narrow == torch.float32 and torch.is_autocast_enabled(device.type):
        narrow = torch.get_autocast_dtype(device.type)
    if narrow == torch.float16:
        narrow = torch.float32  # no kernel stores it, and fp32 holds it
    layers = [_layer(layer) for layer in block.attn_blocks]
    w_in, b_in, w_out, b_out = *_linear(block.proj_in), *_linear(block.proj_out)
    tensors = [w_in, b_in, block.pos_embed, w_out, b_out, *(t for layer in layers for t in layer)]
    refuse_sharded(tensors)
    eps = {
        norm.eps for layer in block.attn_blocks for norm in (layer.attention.norm, layer.mlp.norm)
    }
    if len(eps) > 1:
        raise ValueError(f"model: expected one eps for all norms of a block, got {sorted(eps)}")
    layout = (narrow, device, reverse, heads, *eps, os.environ.get("FLOWOPS_BACKEND"))
    seen = None if any(t.is_inference() for t in tensors) else fingerprint(tensors)
    key = seen is not None and (seen, *((t.data_ptr(), t._version) for t in tensors))
    found_layout, found_key, found = _PACKED.get(block, (None, None, None))
    if found_layout == layout and key and key == found_key:
        return found
    with torch.inference_mode(False), torch.no_grad():  # for later calls, in any mode
        weights = pack_block(
            *(w_in, b_in, positions(block, reverse), layers, w_out, b_out),
            heads=heads,
            eps=eps.pop(),
            dtype=narrow,
        )
        if found_layout == layout and device.type == "cuda":
            torch._foreach_copy_(found.tensors, weights.tensors)  # where CUDA graphs find them
            weights = found
    _PACKED[block] = layout, key, weights
    return weights


def _layer(layer: nn.Module) -> LayerWeights:
    attention, mlp = layer.attention, layer.mlp
    return LayerWeights(
        *(*_linear(attention.norm), *_linear(attention.qkv), *_linear(attention.proj)),
        *(*_linear(mlp.norm), *_linear(mlp.main[0]), *_linear(mlp.main[2])),
    )


def _linear(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias
