"""The autoregressive block of a TarFlow and the causal Transformer inside it. Attribute names are
those of the published TarFlow checkpoints; the functions take any modules that have them.

Source: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329), section
2.2.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flowops import SAC_SAVE_OPS, affine_update, causal_attention


def layer_norm(norm: nn.LayerNorm, h: Tensor) -> Tensor:
    """``norm`` computed in fp32 (fp64 for fp64) whatever the storage of its input."""
    if h.dtype in (torch.float32, torch.float64) and norm.weight.dtype == h.dtype:
        return F.layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(h.float(), norm.normalized_shape, weight, bias, norm.eps).to(h.dtype)


def self_attention(module: nn.Module, h: Tensor, head_dim: int) -> Tensor:
    """Causal attention ``[B, T, W] -> [B, T, W]`` through ``module.qkv`` (rows of Q, K, V) and
    ``module.proj``; h is normed already."""
    B, T, _ = h.shape
    q, k, v = module.qkv(h).view(B, T, 3, -1, head_dim).unbind(2)  # read in place: no copy
    return module.proj(causal_attention(q, k, v).flatten(2))


def transformer_layer(layer: nn.Module, h: Tensor, head_dim: int) -> Tensor:
    """One layer ``[B, T, W] -> [B, T, W]``: ``h + Attn(LN(h))``, then ``h + MLP(LN(h))``."""
    attention, mlp = layer.attention, layer.mlp
    h = h + self_attention(attention, layer_norm(attention.norm, h), head_dim)
    return h + mlp.main(layer_norm(mlp.norm, h))


def positions(block: nn.Module, reverse: bool) -> Tensor:
    """``[T, W]`` in the block's token order."""
    return block.pos_embed.flip(0) if reverse else block.pos_embed


def class_embedding(block: nn.Module, y: Tensor | None, batch: int) -> Tensor:
    """``[B, W]``, or ``[1, W]`` where it is the same for all; the table's mean stands for no label
    (None or -1)."""
    if block.class_embed is None:
        return block.pos_embed.new_zeros(1, block.pos_embed.shape[1])
    table = block.class_embed[:, 0]
    mean = table.mean(0, keepdim=True)
    if y is None:
        return mean
    return torch.where((y < 0).unsqueeze(1), mean, table[y.clamp(min=0)])


def block_params(
    block: nn.Module, x: Tensor, y: Tensor | None, *, reverse: bool, head_dim: int
) -> Tensor:
    """What the affine step reads, ``[B, T, 2C]`` or ``[B, T, C]`` in the block's token order.

    Args:
        block: a ``TarFlowBlock`` or any module with its attribute names. Layers of other classes
            are computed from their weights: their own forward and its hooks don't run.
        x: ``[B, T, C]`` in raster order.
        y: ``[B]`` labels, -1 for none, or None.
        reverse: the block reads the tokens from the last to the first.
        head_dim: width of an attention head.
    """
    h = block.proj_in(x.flip(1) if reverse else x)
    embed = positions(block, reverse) + class_embedding(block, y, len(x)).unsqueeze(1)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # The residual stream is fp32, also where the parameters came in bf16 (FSDP).
        embed = embed.to(torch.promote_types(embed.dtype, torch.float32))
    h = h + embed
    for layer in block.attn_blocks:
        own = isinstance(layer, AttentionBlock)
        h = layer(h) if own else transformer_layer(layer, h, head_dim)
    return block.proj_out(h)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` computed in fp32 (fp64 for fp64) whatever the storage of its input."""

    def forward(self, h: Tensor) -> Tensor:
        return layer_norm(self, h)


class Attention(nn.Module):
    """Pre-norm causal self-attention, ``[B, T, W] -> [B, T, W]``, without the residual."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.head_dim = head_dim

    def forward(self, h: Tensor) -> Tensor:
        return self_attention(self, self.norm(h), self.head_dim)


class MLP(nn.Module):
    """Pre-norm two-layer perceptron with exact GELU, without the residual."""

    def __init__(self, width: int, expansion: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.main = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.main(self.norm(h))


class AttentionBlock(nn.Module):
    """One Transformer layer: attention and perceptron, each with its residual."""

    def __init__(self, width: int, head_dim: int, expansion: int):
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width, expansion)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(h)
        return h + self.mlp(h)


class TarFlowBlock(nn.Module):
    """One autoregressive block, ``x [B, T, C] -> z [B, T, C]`` with its log-determinant ``[B]``.

    Tokens are read in raster order, or in reversed order if ``reverse``; the affine step undoes the
    order on the fly. Parameters of token i transform token i + 1; the first passes through.
    """

    def __init__(
        self,
        patch_channels: int,
        width: int,
        num_patches: int,
        reverse: bool,
        num_layers: int,
        head_dim: int,
        expansion: int,
        nvp: bool,
        num_classes: int,
    ):
        super().__init__()
        self.reverse, self.head_dim, self.num_heads = reverse, head_dim, width // head_dim
        self.proj_in = nn.Linear(patch_channels, width)
        self.pos_embed = nn.Parameter(torch.randn(num_patches, width) * 1e-2)
        self.class_embed = (
            nn.Parameter(torch.randn(num_classes, 1, width) * 1e-2) if num_classes else None
        )
        self.attn_blocks = nn.ModuleList(
            AttentionBlock(width, head_dim, expansion) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(width, 2 * patch_channels if nvp else patch_channels)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self, x: Tensor, y: Tensor | None = None, selective: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``selective``: what is neither an input nor from ``SAC_SAVE_OPS`` is computed again in
        the backward pass. In here, so that it is compiled with the block."""
        if not selective:
            return self._transform(x, y)
        contexts = partial(create_selective_checkpoint_contexts, list(SAC_SAVE_OPS))
        return checkpoint(
            *(self._transform, x, y),
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )

    def _transform(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return affine_update(x, self.params(x, y), reverse=self.reverse)

    def params(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What the affine step reads, ``[B, T, 2C]`` or ``[B, T, C]``, in the block's order."""
        return block_params(self, x, y, reverse=self.reverse, head_dim=self.head_dim)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "attn_mask", None)  # the reference program stores its mask
        super()._load_from_state_dict(state_dict, prefix, *args)
