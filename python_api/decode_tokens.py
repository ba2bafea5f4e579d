"""The inverse of an autoregressive block token by token in plain PyTorch, for blocks and guidance
that the decode kernels are not made for.

Source: Zhai et al. (arXiv 2412.06329); Gu et al. (arXiv 2506.06276).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flowops import causal_attention

from .starflow import split_params
from .transformer import TarFlowBlock, class_embedding, positions, under_autocast


class CachedAttention:
    """Causal attention of the tokens of one call to themselves and those of all calls before,
    whose keys and values stay in memory set aside at the first call.

    Args:
        tokens: how many there will be in all.
        temperature: ``[B, 1, 1, 1]``, by which the scores are divided; None for 1.
    """

    def __init__(self, tokens: int, temperature: Tensor | None):
        self.tokens, self.temperature, self.seen = tokens, temperature, 0
        self.keys = self.values = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, n, H, D = k.shape
        if self.keys is None:
            self.keys, self.values = k.new_empty(2, B, self.tokens, H, D)
        new, self.seen = slice(self.seen, self.seen + n), self.seen + n
        self.keys[:, new], self.values[:, new] = k, v
        if self.temperature is not None:
            q = (q / self.temperature).to(q.dtype)
        return causal_attention(q, self.keys[:, : self.seen], self.values[:, : self.seen])


def decode_tokens(
    block: TarFlowBlock,
    z: Tensor,
    y: Tensor | None,
    *,
    combine: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, int]:
    """``x`` with ``block(x, y)[0] == z``; nothing in the loop waits for a GPU.

    Args:
        z: ``[B, T, C]`` in raster order, fp32 or fp64; not changed. The update runs in its dtype,
            the network in the dtype of the weights or of autocast.
        y: ``[B]`` labels, -1 for none, or None.
        combine: adds a second pass without labels, in one batch with the first: from log-scales
            and shifts of both, ``[2B, C]`` each, and the part of the tokens that is done to those
            that are taken, ``[B, C]`` each.
        temperature: the second pass divides its attention scores by it.

    Returns:
        ``x [B, T, C]`` and the number of steps.
    """
    if block.reverse:
        z = z.flip(1)
    B, T, C = z.shape
    classes = class_embedding(block, y, B).expand(B, -1)
    if combine is not None:
        classes = torch.cat([classes, class_embedding(block, None, B).expand(B, -1)])
    classes, passes, divisor = classes.unsqueeze(1), len(classes) // B, None
    if temperature != 1:
        divisor = z.new_ones(len(classes), 1, 1, 1)
        divisor[B:] = temperature
    attend = [CachedAttention(T, divisor) for _ in block.attn_blocks]
    learned, rotary = block.pos_embed, block.rotary(z)
    if learned is not None:
        learned = positions(block, block.reverse)
    storage = z.dtype if under_autocast(z) else classes.dtype
    x = torch.empty_like(z)
    if block.sos_embed is None:
        x[:, 0] = z[:, 0]
        token, first = x[:, :1], 1
    else:
        token, first = block.first_token(z), 0
    for i, j in enumerate(range(first, T)):  # the i-th that is read gives parameters of token j
        params = block.token_params(
            token.to(storage).repeat(passes, 1, 1),
            classes if learned is None else learned[i] + classes,
            None if rotary is None else tuple(t[i : i + 1] for t in rotary),
            attend,
        )
        a, b = split_params(params[:, 0].to(z.dtype), C)
        if combine is not None:
            a, b = combine(a, b, (i + 1) / (T - first))
        token = (z[:, j] * a.exp() + b).unsqueeze(1)
        x[:, j] = token[:, 0]
    return (x.flip(1) if block.reverse else x), T - first
