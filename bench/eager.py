"""TarFlow as its paper describes it, in plain eager PyTorch: the baseline of the benchmarks.

The algorithm of the reference program, written for reading, with the habits that cost it time:
flipped copies, a boolean mask, the shift by concatenation, a KV cache that grows by concatenation,
and guidance in a pass of its own. Weights are those of a ``flowops.api.TarFlow``, shared. Switches
take back one habit of the training step after the other, to measure what each costs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import flowops
from flowops.api import TarFlow, patchify, unpatchify


class EagerTarFlow:
    """``forward`` and ``reverse`` of ``model``, computed plainly, on the model's own parameters.

    Args:
        causal: flash attention that knows it is causal, instead of the boolean mask.
        fused_affine: ``flowops.affine_update`` for shift, affine step and log-determinant.
        compiled_blocks: ``torch.compile`` around each block.
    """

    def __init__(
        self,
        model: TarFlow,
        causal: bool = False,
        fused_affine: bool = False,
        compiled_blocks: bool = False,
    ):
        self.model, self.causal, self.fused_affine = model, causal, fused_affine
        T = model.num_patches
        self.mask = torch.tril(torch.ones(T, T, device=model.var.device))
        self.block = self._block
        if compiled_blocks:
            self.block = torch.compile(self._block, dynamic=False)

    def forward(self, x: Tensor, y: Tensor | None = None):
        x = patchify(x, self.model.patch_size)
        outputs, logdets = [], torch.zeros((), device=x.device)
        for block in self.model.blocks:
            x, logdet = self.block(block, x, y)
            logdets = logdets + logdet
            outputs.append(x)
        return x, outputs, logdets

    def loss(self, z: Tensor, logdets: Tensor) -> Tensor:
        return 0.5 * z.pow(2).mean() - logdets.mean()

    def _block(self, block, x, y):
        raster = x
        x = x.flip(1) if block.reverse else x
        params = self._params(block, x, y)
        if self.fused_affine:
            z, logdet = flowops.affine_update(raster, params, reverse=block.reverse)
            return z, logdet / x[0].numel()
        a, b = _shifted(params).chunk(2, dim=-1)
        z = (x - b) * (-_wide(a)).exp().type(a.dtype)
        return z.flip(1) if block.reverse else z, -a.mean(dim=[1, 2])

    def _params(self, block, x, y, temperature=1.0):
        position = block.pos_embed.flip(0) if block.reverse else block.pos_embed
        h = block.proj_in(x) + position + _class_embedding(block, y)
        for layer in block.attn_blocks:
            h = self._layer(layer, h, self.mask, None, temperature)
        return block.proj_out(h)

    def _layer(self, layer, h, mask, cache, temperature=1.0):
        B, T, W = h.shape
        attention, mlp = layer.attention, layer.mlp
        heads = W // attention.head_dim
        normed = _norm(attention.norm, h)
        qkv = attention.qkv(normed).reshape(B, T, 3 * heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        if cache is not None:
            cache.append((k, v))
            k = torch.cat([k for k, _ in cache], dim=2)
            v = torch.cat([v for _, v in cache], dim=2)
        causal = self.causal and mask is not None
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None or causal else mask.bool(),
            is_causal=causal,
            scale=attention.head_dim**-0.5 / temperature,
        )
        h = h + attention.proj(o.transpose(1, 2).reshape(B, T, W))
        return h + mlp.main(_norm(mlp.norm, h))

    @torch.no_grad()
    def reverse(
        self,
        noise: Tensor,
        y: Tensor | None = None,
        guidance: float = 0.0,
        attn_temp: float = 1.0,
        return_sequence: bool = False,
    ) -> Tensor | list[Tensor]:
        """Token by token. No label may be -1: to look for them would be a wait for the GPU at
        every token, which the reference program does not have."""
        x = noise * self.model.var.sqrt()
        sequence = [noise]
        for block in reversed(self.model.blocks):
            x = self._reverse_block(block, x, y, guidance, attn_temp)
            sequence.append(x)
        size = self.model.patch_size, self.model.img_size
        if return_sequence:
            return [unpatchify(tokens, *size) for tokens in sequence]
        return unpatchify(x, *size)

    def fixed_point(
        self,
        index: int,
        x: Tensor,
        z: Tensor,
        y: Tensor | None = None,
        guidance: float = 0.0,
        attn_temp: float = 1.0,
    ) -> Tensor:
        """``z exp(a) + b`` of block ``index``, with a and b of all tokens of x at once: x itself if
        the block turns it into z."""
        block = self.model.blocks[index]
        x, z = (t.flip(1) if block.reverse else t for t in (x, z))
        params = self._params(block, x, y)
        if guidance > 0:
            params = params + guidance * (params - self._params(block, x, None, attn_temp))
        a, b = _shifted(params).chunk(2, dim=-1)
        new = z * _wide(a).exp().type(a.dtype) + b
        return new.flip(1) if block.reverse else new

    def _reverse_block(self, block, z, y, guidance, attn_temp):
        x = z.flip(1) if block.reverse else z.clone()
        position = block.pos_embed.flip(0) if block.reverse else block.pos_embed
        caches = [[[] for _ in block.attn_blocks] for _ in range(2)]
        for i in range(x.shape[1] - 1):
            a, b = self._step(block, x, position, i, y, caches[0], 1.0)
            if guidance > 0:
                a_u, b_u = self._step(block, x, position, i, None, caches[1], attn_temp)
                a, b = a + guidance * (a - a_u), b + guidance * (b - b_u)
            x[:, i + 1] = x[:, i + 1] * _wide(a[:, 0]).exp().type(a.dtype) + b[:, 0]
        return x.flip(1) if block.reverse else x

    def _step(self, block, x, position, i, y, caches, temperature):
        h = block.proj_in(x[:, i : i + 1]) + position[i : i + 1] + _label_embedding(block, y)
        for layer, cache in zip(block.attn_blocks, caches, strict=True):
            h = self._layer(layer, h, None, cache, temperature)
        return block.proj_out(h).chunk(2, dim=-1)


def _norm(norm, h):
    return F.layer_norm(_wide(h), norm.normalized_shape, norm.weight, norm.bias, norm.eps).type(
        h.dtype
    )


def _wide(t):
    return t if t.dtype == torch.float64 else t.float()


def _shifted(params):
    """Those of each token from the tokens before it."""
    return torch.cat([torch.zeros_like(params[:, :1]), params[:, :-1]], dim=1)


def _class_embedding(block, y):
    if block.class_embed is None or y is None or not (y < 0).any():
        return _label_embedding(block, y)
    dropped = (y < 0).float().view(-1, 1, 1)
    return (1 - dropped) * block.class_embed[y] + dropped * block.class_embed.mean(dim=0)


def _label_embedding(block, y):
    if block.class_embed is None:
        return 0
    return block.class_embed.mean(dim=0) if y is None else block.class_embed[y]
