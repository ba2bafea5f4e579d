"""The exact inverse of an autoregressive block, token by token over a preallocated KV cache.

Source: Zhai et al. (arXiv 2412.06329).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .transformer import AttentionBlock


@dataclass(frozen=True)
class Guidance:
    """``a += g (a - a_u)`` and the same for b, with ``a_u, b_u`` from a pass without the label and
    with attention scores divided by ``attn_temp``; ``g_i = weight (i + 1) / (T - 1)`` if
    annealed."""

    weight: float = 0.0
    what: str = "ab"
    attn_temp: float = 1.0
    annealed: bool = False

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"guidance: expected a finite number, at least 0, got {self.weight!r}")
        if not set(self.what) <= {"a", "b"}:
            raise ValueError(f"guide_what: expected letters out of 'ab', got {self.what!r}")
        if not 0 < self.attn_temp < float("inf"):
            raise ValueError(f"attn_temp: expected a positive number, got {self.attn_temp!r}")

    @property
    def active(self) -> bool:
        return self.weight > 0 and bool(self.what)

    def at(self, i: int, T: int) -> float:
        """The weight for the parameters that token i gives."""
        return self.weight * (i + 1) / (T - 1) if self.annealed else self.weight


class _Layer:
    """Weights of one Transformer layer in the decoding dtype, and its KV cache.

    ``R`` counts the rows of the batch, conditional ones first. Keys are cached transposed,
    ``[R H, D, T]``, values ``[R H, T, D]``: both products of a step are plain batched products. The
    scale of the scores is folded into the weights of q.
    """

    def __init__(
        self,
        layer: AttentionBlock,
        rows: int,
        tokens: int,
        dtype: torch.dtype,
        wide: torch.dtype,
    ):
        attention, mlp = layer.attention, layer.mlp
        self.norms = [
            (n.normalized_shape, n.weight.to(wide), n.bias.to(wide), n.eps)
            for n in (attention.norm, mlp.norm)
        ]
        W, D = attention.proj.weight.shape[0], attention.head_dim
        scale = torch.ones_like(attention.qkv.bias)
        scale[:W] = D**-0.5
        self.qkv = (
            (attention.qkv.weight * scale.unsqueeze(1)).to(dtype),
            (attention.qkv.bias * scale).to(dtype),
        )
        self.proj, self.up, self.down = (
            (linear.weight.to(dtype), linear.bias.to(dtype))
            for linear in (attention.proj, mlp.main[0], mlp.main[2])
        )
        self.dtype, self.wide = dtype, wide
        self.pairs, self.head_dim = rows * W // D, D
        self.keys = self.proj[0].new_empty(self.pairs, D, tokens)
        self.values = self.proj[0].new_empty(self.pairs, tokens, D)

    def step(self, h: Tensor, i: int, conditional: int, temperature: float) -> Tensor:
        """Token i for all rows, ``h [R, W]`` wide -> ``[R, W]``."""
        R, W = h.shape
        q, k, v = F.linear(self._norm(h, 0), *self.qkv).split(W, dim=1)
        if temperature != 1:
            q[conditional:] /= temperature
        self.keys[:, :, i] = k.reshape(self.pairs, self.head_dim)
        self.values[:, i] = v.reshape(self.pairs, self.head_dim)
        scores = torch.bmm(q.reshape(self.pairs, 1, self.head_dim), self.keys[:, :, : i + 1])
        weights = scores.to(self.wide).softmax(2).to(self.dtype)
        o = torch.bmm(weights, self.values[:, : i + 1]).view(R, W)
        h = h + F.linear(o, *self.proj)
        return h + F.linear(F.gelu(F.linear(self._norm(h, 1), *self.up)), *self.down)

    def _norm(self, h: Tensor, which: int) -> Tensor:
        return F.layer_norm(h, *self.norms[which]).to(self.dtype)


def invert_block(block, z: Tensor, y: Tensor | None, guidance: Guidance) -> Tensor:
    """``x`` with ``block(x, y)[0] == z``, to rounding.

    Args:
        block: a ``TarFlowBlock``.
        z: ``[B, T, C]`` in raster order; not changed.
        y: ``[B]`` labels, -1 for none, or None.
        guidance: whose second pass runs in one batch with the first.

    Returns:
        ``x [B, T, C]`` fp32 (fp64 for an fp64 block). Parameters, exp and update are computed in
        that dtype; the layers run in autocast's dtype where autocast is on.
    """
    B, T, C = z.shape
    wide = torch.float64 if block.pos_embed.dtype == torch.float64 else torch.float32
    narrow = block.pos_embed.dtype
    device_type = z.device.type
    if torch.is_autocast_enabled(device_type) and narrow == torch.float32:
        narrow = torch.get_autocast_dtype(device_type)

    x = z.to(wide, copy=True)
    sequence = x.flip(1) if block.reverse else x
    rows = 2 * B if guidance.active else B
    embed = block.class_embedding(y, B)
    if guidance.active:
        embed = torch.cat([embed.expand(B, -1), block.class_embedding(None, B).expand(B, -1)])
    position = block.positions().to(wide) + block.proj_in.bias.to(wide)
    w_in, (w_out, b_out) = (
        block.proj_in.weight.to(wide),
        (
            block.proj_out.weight.to(narrow),
            block.proj_out.bias.to(narrow),
        ),
    )
    temperature = guidance.attn_temp if guidance.active else 1.0

    # Results go into tensors made outside, so that they can still take part in a graph.
    with torch.inference_mode(), torch.autocast(device_type, enabled=False):
        layers = [_Layer(layer, rows, T - 1, narrow, wide) for layer in block.attn_blocks]
        for i in range(T - 1):
            token = F.linear(sequence[:, i], w_in, position[i])
            if guidance.active:
                token = token.repeat(2, 1)
            h = token + embed
            for layer in layers:
                h = layer.step(h, i, B, temperature)
            params = F.linear(h.to(narrow), w_out, b_out).to(wide)
            if guidance.active:
                params = _guide(params, guidance, guidance.at(i, T), C)
            following = sequence[:, i + 1]
            if params.shape[1] == 2 * C:
                following.mul_(torch.exp(params[:, :C]))
            following.add_(params[:, -C:])
    return sequence.flip(1) if block.reverse else sequence


def _guide(params: Tensor, guidance: Guidance, weight: float, C: int) -> Tensor:
    params, free = params.chunk(2)
    guided = params + weight * (params - free)
    if set(guidance.what) >= {"a", "b"}:
        return guided
    shift_only = params.shape[1] == C
    if guidance.what[0] == "b":
        return guided if shift_only else torch.cat([params[:, :C], guided[:, C:]], dim=1)
    return params if shift_only else torch.cat([guided[:, :C], params[:, C:]], dim=1)
