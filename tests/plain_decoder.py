"""The map whose fixed point ``decode_block`` finds, written plainly: whole sequences, a mask, no
cache. And random problems for it."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from flowops import LayerWeights, decode_block, pack_block

#: What has the storage dtype.
STORED = ("qkv_weight", "proj_weight", "up_weight", "down_weight", "w_out")


@dataclass(frozen=True)
class Decoder:
    """The arguments of ``pack_block``."""

    w_in: torch.Tensor
    b_in: torch.Tensor
    position: torch.Tensor
    layers: tuple[LayerWeights, ...]
    w_out: torch.Tensor
    b_out: torch.Tensor
    heads: int
    eps: float = 1e-5

    def packed(self, **options):
        return pack_block(
            *(self.w_in, self.b_in, self.position, self.layers, self.w_out, self.b_out),
            **{"heads": self.heads, "eps": self.eps} | options,
        )

    def map(self, function) -> "Decoder":
        """``function(name, tensor)`` of all weights."""
        return replace(
            self,
            **{
                name: function(name, getattr(self, name))
                for name in ("w_in", "b_in", "position", "w_out", "b_out")
            },
            layers=tuple(
                LayerWeights(*(function(n, t) for n, t in layer._asdict().items()))
                for layer in self.layers
            ),
        )

    def to(self, dtype) -> "Decoder":
        return self.map(lambda name, t: t.to(dtype))

    def rounded(self, dtype, names=None) -> "Decoder":
        """With all weights, or those of ``names``, as ``dtype`` holds them."""
        return self.map(lambda n, t: t.to(dtype).to(t.dtype) if names is None or n in names else t)

    def params(self, x, embed, temperature=1.0):
        """``[B, T, P]`` of tokens ``x [B, T, C]`` in the block's order."""
        h = x @ self.w_in.T + self.b_in + self.position + embed[:, None]
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for w in self.layers:
            norm = F.layer_norm(h, h.shape[-1:], w.norm1_weight, w.norm1_bias, self.eps)
            q, k, v = (
                t.unflatten(2, (self.heads, -1)).transpose(1, 2)
                for t in (norm @ w.qkv_weight.T + w.qkv_bias).chunk(3, dim=2)
            )
            scores = q @ k.mT / (q.shape[3] ** 0.5 * temperature)
            o = scores.masked_fill(later, float("-inf")).softmax(3) @ v
            h = h + o.transpose(1, 2).flatten(2) @ w.proj_weight.T + w.proj_bias
            norm = F.layer_norm(h, h.shape[-1:], w.norm2_weight, w.norm2_bias, self.eps)
            hidden = F.gelu(norm @ w.up_weight.T + w.up_bias)
            h = h + hidden @ w.down_weight.T + w.down_bias
        return h @ self.w_out.T + self.b_out

    def step(self, z, x, embed, guide=None, temperature=1.0, reverse=False):
        """``F(x)``, in raster order."""
        if reverse:
            z, x = z.flip(1), x.flip(1)
        B, _, C = z.shape
        p = self.params(x, embed[:B])
        a, b = p.split(C, 2) if p.shape[2] > C else (torch.zeros_like(p), p)
        if guide is not None:
            p = self.params(x, embed[B:], temperature)
            a_u, b_u = p.split(C, 2) if p.shape[2] > C else (torch.zeros_like(p), p)
            a, b = a + guide[:, :1] * (a - a_u), b + guide[:, 1:] * (b - b_u)
        new = torch.cat([z[:, :1], z[:, 1:] * a[:, :-1].exp() + b[:, :-1]], dim=1)
        return new.flip(1) if reverse else new


@dataclass(frozen=True)
class Problem:
    """The arguments of ``decode_block``. Tensors are fp64 and hold numbers of fp32."""

    decoder: Decoder
    z: torch.Tensor
    embed: torch.Tensor
    guide: torch.Tensor | None = None
    temperature: float = 1.0
    reverse: bool = False

    def first(self, B: int) -> "Problem":
        """The first B images alone."""
        halves = self.embed.split(len(self.z))
        return replace(self, z=self.z[:B], embed=torch.cat([half[:B] for half in halves]))

    def solve(self, backend="auto", dtype=torch.float32, storage=None, **options):
        """``decode_block`` in ``dtype``, the products' weights stored in ``storage``."""
        weights = self.decoder.to(dtype).packed(dtype=storage, backend=backend)
        return decode_block(
            *(self.z.to(dtype), weights, self.embed.to(dtype)),
            guide=None if self.guide is None else self.guide.to(dtype),
            **{"temperature": self.temperature, "reverse": self.reverse, "backend": backend}
            | options,
        )

    def step(self, x):
        """``F(x)`` in the dtype of x."""
        z, embed = self.z.to(x.dtype), self.embed.to(x.dtype)
        guide = None if self.guide is None else self.guide.to(x.dtype)
        decoder = self.decoder.to(x.dtype)
        return decoder.step(z, x, embed, guide, self.temperature, self.reverse)

    def residual(self, x):
        """``max |F(x) - x|`` of each image, computed in fp64."""
        return (self.step(x.double()) - x.double()).abs().amax((1, 2))


def random_decoder(
    T, C, heads=2, D=16, *, layers=2, hidden=32, nvp=True, strength=0.6, seed=0
) -> Decoder:
    """Weights of a block whose log-scales and shifts have a size near ``strength / 3``."""
    generator = torch.Generator().manual_seed(seed)
    W = heads * D

    def draw(*shape, size=1.0):
        return (size * torch.randn(shape, generator=generator)).double()

    def matrix(rows, columns, size=1.0):
        return draw(rows, columns, size=size / columns**0.5)

    def layer():
        return LayerWeights(
            *(1 + draw(W, size=0.1), draw(W, size=0.1), matrix(3 * W, W), draw(3 * W, size=0.1)),
            *(matrix(W, W, 0.5), draw(W, size=0.1), 1 + draw(W, size=0.1), draw(W, size=0.1)),
            *(matrix(hidden, W), draw(hidden, size=0.1), matrix(W, hidden), draw(W, size=0.1)),
        )

    P = 2 * C if nvp else C
    decoder = Decoder(
        *(matrix(W, C, 0.5), draw(W, size=0.1), draw(T, W, size=0.3)),
        tuple(layer() for _ in range(layers)),
        *(matrix(P, W, strength / 4), draw(P, size=strength / 6), heads),
    )
    return decoder.rounded(torch.float32)


def random_problem(
    B, T, C, heads=2, D=16, *, guided=False, reverse=False, offset=0.0, seed=0, **options
) -> Problem:
    """``options`` are those of ``random_decoder``."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).double()

    return Problem(
        random_decoder(T, C, heads, D, seed=seed, **options),
        (draw(B, T, C) + offset).float().double(),
        (0.3 * draw(2 * B if guided else B, heads * D)).float().double(),
        guide=torch.rand(T, 2, generator=generator).double() if guided else None,
        temperature=0.7 if guided else 1.0,
        reverse=reverse,
    )
