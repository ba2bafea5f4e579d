"""The weights of an autoregressive block in the layout of the kernels that invert it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch

_PANEL = 16


class LayerWeights(NamedTuple):
    """One pre-norm Transformer layer: weights ``[out, in]`` and biases ``[out]`` of its products,
    weight and bias ``[W]`` of its norms. ``qkv`` is ``[3W, W]``: queries of all heads, then keys,
    then values."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


class PackedBlock(NamedTuple):
    """The tensors behind ``BlockWeights``, layers stacked. Biases, norms, ``w_in`` and ``position``
    are fp32 (fp64 for fp64); the other five have the storage dtype. Order: csrc/cpu/bindings.cpp,
    kernels/decode.py."""

    w_in: Tensor  # [W, C]
    position: Tensor  # [T, W], the bias of w_in included
    norm1: Tensor  # [L, 2, W]: weight, bias
    qkv: Tensor  # [L, 3W, W]
    qkv_bias: Tensor  # [L, 3W]
    proj: Tensor  # [L, W, W]
    proj_bias: Tensor  # [L, W]
    norm2: Tensor  # [L, 2, W]
    up: Tensor  # [L, E, W]
    up_bias: Tensor  # [L, E]
    down: Tensor  # [L, W, E]
    down_bias: Tensor  # [L, W]
    w_out: Tensor  # [P, W]
    b_out: Tensor  # [P]


@dataclass(frozen=True)
class BlockWeights:
    """A block's weights in the layout of the kernels that will read them, made by
    ``pack_block``. Copies: later changes of the model's weights are not seen."""

    tensors: tuple[Tensor, ...]
    heads: int
    eps: float
    panels: bool
    tokens: int
    channels: int
    outputs: int


def pack_block(
    w_in: Tensor,
    b_in: Tensor,
    position: Tensor,
    layers: Sequence[LayerWeights],
    w_out: Tensor,
    b_out: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> BlockWeights:
    """Prepares a block's weights for ``decode_block``, once for many calls.

    Args:
        w_in: ``[W, C]``, b_in ``[W]``: tokens to the Transformer's width.
        position: ``[T, W]`` in the block's token order.
        layers: the Transformer's, first to last.
        w_out: ``[2C, W]`` (log-scales, shifts) or ``[C, W]`` (shifts), b_out ``[2C]`` or ``[C]``.
        heads: of the attention.
        eps: of the norms.
        dtype: storage of the products' weights; that of ``qkv_weight`` unless given.
        backend: that will decode, see ``flowops.dispatch``: the CPU kernels have a layout of
            their own.

    Returns:
        Detached copies, on the device of the weights.

    Raises:
        ValueError: naming the argument that is off.
    """
    dispatch.check_backend(backend)
    _check(w_in, b_in, position, layers, w_out, b_out, heads)
    narrow = dtype or layers[0].qkv_weight.dtype
    wide = torch.float64 if narrow == torch.float64 else torch.float32

    def stack(name: str, dtype: torch.dtype) -> Tensor:
        return torch.stack([getattr(layer, name).detach() for layer in layers]).to(dtype)

    def norm(name: str) -> Tensor:
        return torch.stack([stack(f"{name}_weight", wide), stack(f"{name}_bias", wide)], dim=1)

    packed = PackedBlock(
        w_in=w_in.detach().to(wide, copy=True),
        position=position.detach().to(wide) + b_in.detach().to(wide),
        norm1=norm("norm1"),
        qkv=stack("qkv_weight", narrow),
        qkv_bias=stack("qkv_bias", wide),
        proj=stack("proj_weight", narrow),
        proj_bias=stack("proj_bias", wide),
        norm2=norm("norm2"),
        up=stack("up_weight", narrow),
        up_bias=stack("up_bias", wide),
        down=stack("down_weight", narrow),
        down_bias=stack("down_bias", wide),
        w_out=w_out.detach().to(narrow, copy=True),
        b_out=b_out.detach().to(wide, copy=True),
    )
    asked = os.environ.get("FLOWOPS_BACKEND") or "auto" if backend == "auto" else backend
    panels = (
        asked in ("auto", "cpu")
        and w_in.device.type == "cpu"
        and dispatch.backend_state("cpu")[0]
        and panel_reason(packed, heads) is None
    )
    return BlockWeights(
        tensors=tuple(_to_panels(packed, heads) if panels else packed),
        heads=heads,
        eps=eps,
        panels=panels,
        tokens=len(position),
        channels=w_in.shape[1],
        outputs=len(b_out),
    )


def fingerprint(tensors: Sequence[Tensor]) -> int | None:
    """A number that changes with the tensors' values, read at a few places of each: enough to see
    what an optimizer does, which PyTorch's version counters don't if it is fused. None where
    reading them would wait for a device, or the native module is missing."""
    if not dispatch.backend_state("cpu")[0] or any(t.device.type != "cpu" for t in tensors):
        return None
    return dispatch.native().fingerprint(
        [t.data_ptr() for t in tensors], [t.nbytes for t in tensors]
    )


def _check(w_in, b_in, position, layers, w_out, b_out, heads: int) -> None:
    if w_in.ndim != 2:
        raise ValueError(f"w_in: expected [W, C], got {list(w_in.shape)}")
    (W, C), P = w_in.shape, len(w_out) if w_out.ndim else 0
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or W % heads:
        raise ValueError(f"heads: expected a divisor of the width {W}, got {heads}")
    if not layers:
        raise ValueError("layers: expected at least one, got none")
    if tuple(w_out.shape) not in ((2 * C, W), (C, W)):
        raise ValueError(f"w_out: expected [{2 * C}, {W}] or [{C}, {W}], got {list(w_out.shape)}")
    T = len(position) if position.ndim else 0
    expected = {"b_in": (b_in, (W,)), "position": (position, (T, W)), "b_out": (b_out, (P,))}
    E = len(layers[0].up_bias)
    shapes = LayerWeights(
        *((W,), (W,), (3 * W, W), (3 * W,), (W, W), (W,)),
        *((W,), (W,), (E, W), (E,), (W, E), (W,)),
    )
    for i, layer in enumerate(layers):
        for name, shape in shapes._asdict().items():
            expected[f"layers[{i}].{name}"] = getattr(layer, name), shape
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")


def panel_reason(packed: PackedBlock, heads: int) -> str | None:
    """Why the native CPU kernel can't take these weights, or None."""
    W, E = packed.w_in.shape[0], packed.up.shape[1]
    if packed.qkv.dtype not in (torch.float32, torch.bfloat16):
        return f"{packed.qkv.dtype} has no native CPU kernel"
    for name, size in (("width", W), ("head width", W // heads), ("hidden width", E)):
        if size % _PANEL:
            return f"its {name} {size} is no multiple of {_PANEL}"
    return None


def _to_panels(packed: PackedBlock, heads: int) -> PackedBlock:
    """The layout of csrc/cpu/decode.cpp: matrices ``[N, K]`` as ``[N / 16, K, 16]``, the last panel
    filled with zeros, and outputs of qkv sorted by heads."""

    def panels(w: Tensor) -> Tensor:
        w = _fill(w, -2)
        return w.unflatten(-2, (-1, _PANEL)).transpose(-1, -2).contiguous()

    def by_heads(rows: Tensor) -> Tensor:
        return rows.unflatten(1, (3, heads, -1)).transpose(1, 2).flatten(1, 3).contiguous()

    return packed._replace(
        w_in=panels(packed.w_in),
        qkv=panels(by_heads(packed.qkv)),
        qkv_bias=by_heads(packed.qkv_bias),
        proj=panels(packed.proj),
        up=panels(packed.up),
        down=panels(packed.down),
        w_out=panels(packed.w_out),
        b_out=_fill(packed.b_out, -1),
    )


def from_panels(packed: PackedBlock, heads: int, outputs: int) -> PackedBlock:
    def rows(w: Tensor) -> Tensor:
        return w.transpose(-1, -2).flatten(-3, -2)

    def by_kind(rows: Tensor) -> Tensor:
        return rows.unflatten(1, (heads, 3, -1)).transpose(1, 2).flatten(1, 3)

    return packed._replace(
        w_in=rows(packed.w_in),
        qkv=by_kind(rows(packed.qkv)),
        qkv_bias=by_kind(packed.qkv_bias),
        proj=rows(packed.proj),
        up=rows(packed.up),
        down=rows(packed.down),
        w_out=rows(packed.w_out)[:outputs],
        b_out=packed.b_out[:outputs],
    )


def _fill(t: Tensor, dim: int) -> Tensor:
    missing = -t.shape[dim] % _PANEL
    return F.pad(t, (0, 0) * (-1 - dim) + (0, missing)) if missing else t
