"""The causal Transformer inside an autoregressive block. Attribute names are those of the published
TarFlow checkpoints.

Source: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329), section
2.2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowops import causal_attention


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` computed in fp32 (fp64 for fp64) whatever the storage of its input."""

    def forward(self, h: Tensor) -> Tensor:
        if h.dtype in (torch.float32, torch.float64) and self.weight.dtype == h.dtype:
            return super().forward(h)
        normed = F.layer_norm(
            h.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(h.dtype)


class Attention(nn.Module):
    """Pre-norm causal self-attention, ``[B, T, W] -> [B, T, W]``, without the residual."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.head_dim = head_dim

    def forward(self, h: Tensor) -> Tensor:
        B, T, W = h.shape
        qkv = self.qkv(self.norm(h)).view(B, T, 3, W // self.head_dim, self.head_dim)
        q, k, v = qkv.unbind(2)  # read in place: no copy
        return self.proj(causal_attention(q, k, v).flatten(2))


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
