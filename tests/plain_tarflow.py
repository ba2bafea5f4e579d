"""A TarFlow in the attribute names of its reference program, written plainly: what ``accelerate``
takes, and what its results are compared to."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.num_heads = nn.LayerNorm(width), heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h, mask=None, temperature=1.0):
        q, k, v = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm(h)).chunk(3, dim=2)
        )
        scale = q.shape[3] ** -0.5 / temperature
        mask = None if mask is None else mask.bool()
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h):
        return self.main(self.norm(h))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, h, mask, temperature):
        h = h + self.attention(h, mask, temperature)
        return h + self.mlp(h)


class Keep(nn.Module):
    def forward(self, x, dim=1, inverse=False):
        return x


class Flip(nn.Module):
    def forward(self, x, dim=1, inverse=False):
        return x.flip(dim)


class Block(nn.Module):
    def __init__(self, channels, tokens, width, heads, layers, flip, nvp, num_classes):
        super().__init__()
        self.proj_in = nn.Linear(channels, width)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(tokens, width))
        self.class_embed = None
        if num_classes:
            self.class_embed = nn.Parameter(0.01 * torch.randn(num_classes, 1, width))
        self.attn_blocks = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.proj_out = nn.Linear(width, (1 + nvp) * channels)
        nn.init.zeros_(self.proj_out.weight)
        self.permutation = Flip() if flip else Keep()
        self.register_buffer("attn_mask", torch.ones(tokens, tokens).tril())

    def scales_and_shifts(self, x, y, temperature=1.0):
        """Of the tokens after the first; ``x`` is in the block's order."""
        h = self.proj_in(x) + self.permutation(self.pos_embed, dim=0)
        if self.class_embed is not None:
            mean = self.class_embed.mean(0).expand(len(x), 1, -1)
            if y is not None:
                mean = torch.where((y < 0).view(-1, 1, 1), mean, self.class_embed[y.clamp(min=0)])
            h = h + mean
        for layer in self.attn_blocks:
            h = layer(h, self.attn_mask, temperature)
        params = self.proj_out(h)[:, :-1]
        if params.shape[2] == x.shape[2]:
            return torch.zeros_like(params), params
        return params.chunk(2, dim=2)

    def forward(self, x, y=None):
        x = self.permutation(x)
        a, b = self.scales_and_shifts(x, y)
        z = torch.cat([x[:, :1], (x[:, 1:] - b) * torch.exp(-a)], dim=1)
        return self.permutation(z, inverse=True), -a.sum((1, 2)) / x[0].numel()

    @torch.no_grad()
    def reverse(
        self, x, y=None, guidance=0, guide_what="ab", attn_temp=1.0, annealed_guidance=False
    ):
        z = self.permutation(x)
        x, T = z.clone(), z.shape[1]
        for i in range(T - 1):
            a, b = self.scales_and_shifts(x, y)
            if guidance > 0:
                g = guidance * (i + 1) / (T - 1) if annealed_guidance else guidance
                a_u, b_u = self.scales_and_shifts(x, None, attn_temp)
                a = a + g * (a - a_u) if "a" in guide_what else a
                b = b + g * (b - b_u) if "b" in guide_what else b
            x[:, i + 1] = z[:, i + 1] * torch.exp(a[:, i]) + b[:, i]
        return self.permutation(x, inverse=True)


class Model(nn.Module):
    def __init__(
        self, in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp=True,
        num_classes=0, heads=1,
    ):  # fmt: skip
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        T, C = (img_size // patch_size) ** 2, in_channels * patch_size**2
        sizes = (C, T, channels, heads, layers_per_block)
        self.blocks = nn.ModuleList(
            Block(*sizes, i % 2, nvp, num_classes) for i in range(num_blocks)
        )
        self.register_buffer("var", torch.ones(T, C))

    def patchify(self, x):
        return F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def unpatchify(self, x):
        return F.fold(x.transpose(1, 2), self.img_size, self.patch_size, stride=self.patch_size)

    def forward(self, x, y=None):
        x, outputs, logdets = self.patchify(x), [], 0
        for block in self.blocks:
            x, logdet = block(x, y)
            outputs.append(x)
            logdets = logdets + logdet
        return x, outputs, logdets

    def reverse(
        self, x, y=None, guidance=0, guide_what="ab", attn_temp=1.0, annealed_guidance=False,
        return_sequence=False,
    ):  # fmt: skip
        images = [self.unpatchify(x)]
        x = x * self.var.sqrt()
        for block in reversed(self.blocks):
            x = block.reverse(x, y, guidance, guide_what, attn_temp, annealed_guidance)
            images.append(self.unpatchify(x))
        return images if return_sequence else images[-1]


def small(dtype=torch.float64, **kwargs):
    """A model whose blocks are not the identity."""
    config = {"in_channels": 2, "img_size": 4, "patch_size": 1, "channels": 16, "heads": 2}
    config |= {"num_blocks": 2, "layers_per_block": 2, "num_classes": 3} | kwargs
    model = Model(**config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model
