"""The autoregressive block of a TarFlow and the causal Transformer inside it. Attribute names are
those of the published TarFlow checkpoints; the functions take any modules that have them.

Source: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329), section
2.2.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flowops import SAC_SAVE_OPS, affine_update, causal_attention

from .starflow import TARFLOW, BlockParts, RMSNorm, affine_update_unshifted, rotary_table, rotate

#: Of q, k, v ``[B, T, H, D]`` to o of the same shape, as ``causal_attention``.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def layer_norm(norm: nn.LayerNorm, h: Tensor) -> Tensor:
    """``norm`` computed in fp32 (fp64 for fp64) whatever the storage of its input."""
    if h.dtype in (torch.float32, torch.float64) and norm.weight.dtype == h.dtype:
        return F.layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(h.float(), norm.normalized_shape, weight, bias, norm.eps).to(h.dtype)


def self_attention(
    module: nn.Module,
    h: Tensor,
    head_dim: int,
    rotary: tuple[Tensor, Tensor] | None = None,
    attend: Attend = causal_attention,
) -> Tensor:
    """Causal attention ``[B, T, W] -> [B, T, W]`` through ``module.qkv`` (rows of Q, K, V) and
    ``module.proj``; h is normed already. ``rotary``: queries and keys turn by this table first."""
    B, T, _ = h.shape
    q, k, v = module.qkv(h).view(B, T, 3, -1, head_dim).unbind(2)  # read in place: no copy
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    return module.proj(attend(q, k, v).flatten(2))


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
        weight = block.proj_in.weight
        return weight.new_zeros(1, weight.shape[0])
    table = block.class_embed[:, 0]
    mean = table.mean(0, keepdim=True)
    if y is None:
        return mean
    return torch.where((y < 0).unsqueeze(1), mean, table[y.clamp(min=0)])


def under_autocast(like: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    device = like.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _residual_dtype(embed: Tensor) -> Tensor:
    """What is added to tokens first: under autocast it makes the residual stream fp32, also where
    the parameters came in bf16 (FSDP)."""
    if under_autocast(embed):
        return embed.to(torch.promote_types(embed.dtype, torch.float32))
    return embed


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
    h = h + _residual_dtype(embed)
    for layer in block.attn_blocks:
        own = isinstance(layer, AttentionBlock)
        h = layer(h) if own else transformer_layer(layer, h, head_dim)
    return block.proj_out(h)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` computed in fp32 (fp64 for fp64) whatever the storage of its input."""

    def forward(self, h: Tensor) -> Tensor:
        return layer_norm(self, h)


#: By ``BlockParts.norm``.
NORMS = {"layer": LayerNorm, "rms": RMSNorm}


class Attention(nn.Module):
    """Pre-norm causal self-attention, ``[B, T, W] -> [B, T, W]``, without the residual."""

    def __init__(self, width: int, head_dim: int, norm: str = "layer"):
        super().__init__()
        self.norm = NORMS[norm](width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.head_dim = head_dim

    def forward(
        self,
        h: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        attend: Attend = causal_attention,
    ) -> Tensor:
        return self_attention(self, self.norm(h), self.head_dim, rotary, attend)


class MLP(nn.Module):
    """Pre-norm two-layer perceptron with exact GELU, without the residual."""

    def __init__(self, width: int, expansion: int, norm: str = "layer"):
        super().__init__()
        self.norm = NORMS[norm](width)
        self.main = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.main(self.norm(h))


class AttentionBlock(nn.Module):
    """One Transformer layer: attention and perceptron, each with its residual."""

    def __init__(self, width: int, head_dim: int, expansion: int, norm: str = "layer"):
        super().__init__()
        self.attention = Attention(width, head_dim, norm)
        self.mlp = MLP(width, expansion, norm)

    def forward(
        self,
        h: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        attend: Attend = causal_attention,
    ) -> Tensor:
        h = h + self.attention(h, rotary, attend)
        return h + self.mlp(h)


class TarFlowBlock(nn.Module):
    """One autoregressive block, ``x [B, T, C] -> z [B, T, C]`` with its log-determinant ``[B]``.

    Tokens are read in raster order, or in reversed order if ``reverse``; the affine step undoes the
    order on the fly. Parameters of token i transform token i + 1 and the first passes through,
    unless ``parts`` say otherwise.
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
        parts: BlockParts = TARFLOW,
    ):
        super().__init__()
        self.reverse, self.head_dim, self.num_heads = reverse, head_dim, width // head_dim
        self.num_patches, self.nvp, self.parts = num_patches, nvp, parts
        self.proj_in = nn.Linear(patch_channels, width)
        self.pos_embed = (
            nn.Parameter(torch.randn(num_patches, width) * 1e-2)
            if parts.positions == "learned"
            else None
        )
        self.class_embed = (
            nn.Parameter(torch.randn(num_classes, 1, width) * 1e-2) if num_classes else None
        )
        self.sos_embed = (
            nn.Parameter(torch.randn(1, 1, patch_channels)) if parts.shift == "input" else None
        )
        self.attn_blocks = nn.ModuleList(
            AttentionBlock(width, head_dim, expansion, parts.norm) for _ in range(num_layers)
        )
        self.final_norm = RMSNorm(width) if parts.final_norm else None
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
        update = affine_update if self.parts.shift == "output" else affine_update_unshifted
        return update(x, self.params(x, y), reverse=self.reverse)

    def params(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What the affine step reads, ``[B, T, 2C]`` or ``[B, T, C]``, in the block's order."""
        tokens = x.flip(1) if self.reverse else x
        if self.sos_embed is not None:
            tokens = torch.cat([self.first_token(x), tokens[:, :-1]], dim=1)
        embed, rotary = self.embedding(y, len(x)), self.rotary(x)
        return self.token_params(tokens, embed, rotary)

    def token_params(
        self,
        tokens: Tensor,
        embed: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        attend: Sequence[Attend] | None = None,
    ) -> Tensor:
        """As ``params``, of consecutive tokens that the network reads.

        Args:
            tokens: ``[B, n, C]``.
            embed: ``[B or 1, n or 1, W]``, the part of ``embedding`` that is theirs.
            rotary: ``[n, 1, head_dim / 2]``, the part of ``rotary`` that is theirs, or None.
            attend: of each layer; None for causal attention among the tokens.
        """
        h = self.proj_in(tokens) + _residual_dtype(embed)
        for i, layer in enumerate(self.attn_blocks):
            h = layer(h, rotary, attend[i]) if attend else layer(h, rotary)
        if self.final_norm is not None:
            h = self.final_norm(h)
        return self.parts.affine_params(self.proj_out(h), self.nvp)

    def embedding(self, y: Tensor | None, batch: int) -> Tensor:
        """What is added to the tokens, ``[B or 1, T or 1, W]``: learned positions and class."""
        classes = class_embedding(self, y, batch).unsqueeze(1)
        return classes if self.pos_embed is None else positions(self, self.reverse) + classes

    def rotary(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """``rotary_table`` of all tokens for ``like``, or None where positions are learned.
        Computed at every call: a buffer would be rounded with the weights."""
        if self.pos_embed is not None:
            return None
        return rotary_table(self.num_patches, self.head_dim, like)

    def first_token(self, like: Tensor) -> Tensor:
        """The learned token that is read before all others, ``[B, 1, C]``."""
        return self.sos_embed.to(like.dtype).expand(len(like), -1, -1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "attn_mask", None)  # the reference program stores its mask
        super()._load_from_state_dict(state_dict, prefix, *args)
