"""Attentions written elsewhere, as they were and accelerated."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowops.api.accelerate import accelerate, restore


class SelfAttention(nn.Module):
    """As many write it; switches turn it into what is refused."""

    def __init__(self, width=24, heads=3, norm=None, causal=True, dropout=0.0, scale=None):
        super().__init__()
        self.num_heads, self.shape = heads, (heads, width // heads)
        self.causal, self.dropout, self.scale = causal, dropout, scale
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        nn.init.zeros_(self.proj.weight)  # as residual branches often start
        if norm is not None:
            self.norm = norm

    def forward(self, x, bias=None):
        B, T, W = x.shape
        if hasattr(self, "norm"):
            x = self.norm(x)
        q, k, v = self.qkv(x).reshape(B, T, 3, *self.shape).permute(2, 0, 3, 1, 4)
        k = k if bias is None else k + bias
        dropout = self.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, dropout_p=dropout, scale=self.scale
        )
        return self.proj(o.transpose(1, 2).reshape(B, T, W))


class NormedOutside(SelfAttention):
    """Its norm is the parent's to call."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)

    def forward(self, x):
        norm = self._modules.pop("norm")
        try:
            return super().forward(x)
        finally:
            self.norm = norm


class Interleaved(SelfAttention):
    def forward(self, x):
        B, T, W = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, 3, 8).permute(3, 0, 2, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(o.transpose(1, 2).reshape(B, T, W))


@pytest.mark.parametrize(
    "make",
    [
        SelfAttention,
        lambda: SelfAttention(width=16, heads=1),
        lambda: SelfAttention(norm=nn.LayerNorm(24)),
        lambda: SelfAttention(norm=nn.RMSNorm(24)),
        NormedOutside,
        lambda: SelfAttention().bfloat16(),
    ],
)
def test_attention(make):
    plain = make()
    nn.init.normal_(plain.proj.weight, std=0.2)
    fast = accelerate(copy.deepcopy(plain))
    assert type(fast).__name__.startswith("Accelerated")
    dtype = plain.proj.weight.dtype
    x = torch.randn(2, 7, plain.proj.in_features, dtype=dtype, requires_grad=True)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2  # bf16: a few roundings of 4e-3
    torch.testing.assert_close(fast(x), plain(x), rtol=tolerance, atol=tolerance)
    grads = [
        torch.autograd.grad(m(x).square().sum(), [x, m.qkv.weight, m.proj.weight])
        for m in (fast, plain)
    ]
    for got, expected in zip(*grads, strict=True):
        assert (got - expected).abs().max() < tolerance * expected.abs().max()
    assert type(restore(fast)) is type(plain)
    assert set(vars(fast)) == set(vars(plain))


@pytest.mark.parametrize(("name", "value"), [("heads", 3), ("head_dim", 8)])
def test_other_names_for_the_heads(name, value):
    module, x = SelfAttention(), torch.randn(2, 7, 24)
    nn.init.normal_(module.proj.weight)
    del module.num_heads
    setattr(module, name, value)
    expected = module(x)
    torch.testing.assert_close(accelerate(module)(x), expected)


def test_more_arguments_take_the_original_forward():
    plain = SelfAttention()
    nn.init.normal_(plain.proj.weight)
    fast = accelerate(copy.deepcopy(plain))
    x, bias = torch.randn(2, 7, 24), torch.randn(7, 8)
    assert torch.equal(fast(x, bias), plain(x, bias))
    assert torch.equal(fast(x, bias=bias), plain(x, bias=bias))


def test_all_attentions_in_a_network_or_none():
    network = nn.Sequential(SelfAttention(), nn.Linear(24, 24), nn.Sequential(SelfAttention()))
    plain, x = copy.deepcopy(network), torch.randn(2, 7, 24)
    accelerate(network)
    assert [type(m).__name__ for m in (network[0], network[2][0])] == [
        "AcceleratedSelfAttention"
    ] * 2
    torch.testing.assert_close(network(x), plain(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    restore(network)
    network[2][0].causal = False
    with pytest.raises(ValueError, match=r"^2.0: expected plain causal self-attention, but on"):
        accelerate(network)
    assert type(network[0]) is type(network[2][0]) is SelfAttention


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SelfAttention(causal=False), r"on random \[2, 5, 24\] in evaluation mode it diff"),
        (lambda: SelfAttention(scale=1.0), "in evaluation mode it differs by"),
        (lambda: SelfAttention(dropout=0.1), "in training mode it differs by"),
        (Interleaved, "in evaluation mode it differs by"),
    ],
)
def test_other_attentions_are_refused(make, match):
    module = make().eval()
    with pytest.raises(ValueError, match=f"^model: expected plain causal .*{match}"):
        accelerate(module)
    assert type(module) is type(make())
    assert not module.training


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("num_heads", 5, "num_heads: expected a divisor of 24, got 5"),
        ("num_heads", None, "model: expected num_heads, heads or head_dim as an integer"),
        ("qkv", nn.Linear(24, 40), "qkv: expected 72 rows, Q, K and V, got 40"),
        ("forward", lambda x: x, "model: expected the forward of its class"),
    ],
)
def test_attentions_of_other_sizes_are_refused(name, value, match):
    module = SelfAttention()
    setattr(module, name, value)
    with pytest.raises(ValueError, match=match):
        accelerate(module)
