"""Small models of all kinds of blocks, and their network written from the formulas alone."""

import math

import torch
from torch.nn import functional as F

from flowops.api import TarFlow
from flowops.api.starflow import STARFLOW

#: Arguments of ``TarFlow`` by name of the test: each part by itself, and some together.
CONFIGS = {
    "input": {"shift": "input"},
    "softplus": {"scale": "softplus"},
    "clip": {"soft_clip": 1.0},
    "rms": {"norm": "rms", "final_norm": True},
    "rotary": {"positions": "rotary"},
    "shifts": {"shift": "input", "soft_clip": 1.0, "nvp": False},
    "starflow": STARFLOW | {"reverse_first": False},
}


def small(parts=None, dtype=torch.float64, **changed):
    """A model on ``[B, 2, 6, 6]`` in 9 tokens whose blocks are not the identity."""
    config = {"in_channels": 2, "img_size": 6, "patch_size": 2, "channels": [24, 24, 48]}
    config |= {"num_blocks": 3, "layers_per_block": 1, "num_classes": 3, "head_dim": 24}
    if changed.get("num_blocks") == 1:
        config["channels"] = 48
    config |= CONFIGS.get(parts, {}) | changed
    model = TarFlow(**config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def plain_params(block, x, y, temperature=1.0):
    """Log-scales and shifts ``[B, T, 2C]`` (``[B, T, C]`` for shifts alone) in fp64.

    Args:
        x: ``[B, T, C]`` in the order in which the block reads.
    """
    w = {name: tensor.double() for name, tensor in block.named_parameters()}
    parts, T, D = block.parts, x.shape[1], block.head_dim

    def linear(name, h):
        return h @ w[name + ".weight"].T + w[name + ".bias"]

    def rms(name, h):
        scale = (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return h / scale * (1 + w[name + ".weight"])

    def norm(name, h):
        if parts.norm == "rms":
            return rms(name, h)
        centred = h - h.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * w[name + ".weight"] + w[name + ".bias"]

    def turned(t):  # [B, T, H, D]
        side, pairs = math.isqrt(T), (D // 2 - 8) // 2
        out = t.clone()
        for i in range(T):
            for j in range(2 * pairs):
                position = i // side if j < pairs else i % side
                angle = position * 10000 ** -((j % pairs) / pairs)
                even, odd = t[:, i, :, 2 * j], t[:, i, :, 2 * j + 1]
                out[:, i, :, 2 * j] = even * math.cos(angle) - odd * math.sin(angle)
                out[:, i, :, 2 * j + 1] = even * math.sin(angle) + odd * math.cos(angle)
        return out

    tokens = x.double()
    if parts.shift == "input":
        tokens = torch.cat([w["sos_embed"].expand(len(x), -1, -1), tokens[:, :-1]], 1)
    h = linear("proj_in", tokens)
    if parts.positions == "learned":
        h = h + (w["pos_embed"].flip(0) if block.reverse else w["pos_embed"])
    if block.class_embed is not None:
        table = w["class_embed"][:, 0]
        labels = [None] * len(x) if y is None else y.tolist()
        rows = [table.mean(0) if k is None or k < 0 else table[k] for k in labels]
        h = h + torch.stack(rows)[:, None]
    for i in range(len(block.attn_blocks)):
        layer = f"attn_blocks.{i}."
        q, k, v = linear(layer + "attention.qkv", norm(layer + "attention.norm", h)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (-1, D)) for t in (q, k, v))
        if parts.positions == "rotary":
            q, k = turned(q), turned(k)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D) / temperature
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        h = h + linear(layer + "attention.proj", mixed)
        hidden = F.gelu(linear(layer + "mlp.main.0", norm(layer + "mlp.norm", h)))
        h = h + linear(layer + "mlp.main.2", hidden)
    if parts.final_norm:
        h = rms("final_norm", h)
    out = linear("proj_out", h)
    if parts.soft_clip:
        out = parts.soft_clip * torch.tanh(out / parts.soft_clip)
    if parts.scale == "exp" or not block.nvp:
        return out
    a, b = out.chunk(2, -1)
    return torch.cat([torch.log(torch.log1p(torch.exp(a + math.log(math.e - 1)))), b], -1)
