"""The affine layer: against torch.nn by hand, its Jacobian, and its own inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flowops.api.affine import AffineUpdate

CONVENTIONS = ["realnvp", "maf"]


def net_of(inputs, outputs, dtype=torch.float64):
    return nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs)).to(dtype)


class Causal(nn.Module):
    """What it returns for token i is made of the mean of tokens 0..i."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.net = net_of(channels, outputs)

    def forward(self, x, context=None):
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        params = self.net(x.cumsum(1) / count)
        return params if context is None else params * context


def by_hand(net, x, split, convention):
    x1, x2 = x[:, :split], x[:, split:]
    s, t = net(x1).chunk(2, -1)
    if convention == "realnvp":
        return torch.cat([x1, x2 * torch.exp(s) + t], 1), s.sum(1)
    return torch.cat([x1, (x2 - t) * torch.exp(-s)], 1), -s.sum(1)


@given(
    rows=st.integers(1, 5),
    features=st.integers(2, 9),
    split=st.integers(1, 8),
    convention=st.sampled_from(CONVENTIONS),
)
@settings(max_examples=40, deadline=None)
def test_coupling_is_the_one_written_by_hand(rows, features, split, convention):
    split = min(split, features - 1)
    net = net_of(split, 2 * (features - split))
    layer = AffineUpdate(net, split, convention)
    x = torch.randn(rows, features, dtype=torch.float64, requires_grad=True)
    weights = [x, *net.parameters()]
    results = [layer(x), by_hand(net, x, split, convention)]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # Any function of both outputs has the same gradients in x and in the weights of the network.
    grads = [torch.autograd.grad((y.sin().sum() + d.square().sum()), weights) for y, d in results]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    y, logdet = layer(x)
    back, inverse_logdet = layer.inverse(y)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("features", [2, 5, 6])
def test_the_default_split_is_that_of_chunk(features, convention):
    split = torch.zeros(1, features).chunk(2, -1)[0].shape[1]
    net = net_of(split, 2 * (features - split))
    x = torch.randn(3, features, dtype=torch.float64)
    got, expected = AffineUpdate(net, convention=convention)(x), by_hand(net, x, split, convention)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def jacobian_logdet(function, x):
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x)[0], x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1].view(1)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scale", [2, 1])
@pytest.mark.parametrize("shape", [(1, 2), (1, 5), (1, 6), (1, 1, 3), (1, 4, 1), (1, 5, 3)])
def test_log_determinants_are_those_of_the_jacobian(shape, scale, convention):
    """Both directions; ``scale`` 1 is a network of shifts alone."""
    if len(shape) == 2:
        layer = AffineUpdate(net_of((shape[1] + 1) // 2, scale * (shape[1] // 2)), None, convention)
    else:
        layer = AffineUpdate(Causal(shape[2], scale * shape[2]), None, convention)
    x = torch.randn(shape, dtype=torch.float64)
    y, logdet = layer(x)
    back, inverse_logdet = layer.inverse(y)
    torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(logdet, jacobian_logdet(layer, x), rtol=1e-10, atol=1e-11)
    expected = jacobian_logdet(layer.inverse, y)
    torch.testing.assert_close(inverse_logdet, expected, rtol=1e-10, atol=1e-11)
    assert logdet.shape == inverse_logdet.shape == (1,)
    assert (logdet.abs().item() > 0) == (scale == 2 and shape[1] > 1)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradients_of_the_inverse(convention):
    layer = AffineUpdate(Causal(2, 4), convention=convention)
    y = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.inverse, y)
    layer = AffineUpdate(net_of(3, 4), convention=convention)
    y = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.inverse, y)


def test_tokens_are_updated_with_what_the_token_before_gives():
    net = Causal(2, 4)
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    s, t = F.pad(net(x), (0, 0, 1, 0))[:, :-1].chunk(2, -1)
    y, logdet = AffineUpdate(net, convention="maf")(x)
    torch.testing.assert_close(y, (x - t) * torch.exp(-s), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logdet, -s.sum((1, 2)), rtol=1e-12, atol=1e-12)


def test_context_goes_to_the_network():
    layer, x = AffineUpdate(Causal(2, 4)), torch.randn(3, 5, 2, dtype=torch.float64)
    context = torch.rand(3, 1, 1, dtype=torch.float64)
    y, logdet = layer(x, context)
    assert (y - layer(x)[0]).abs().max() > 1e-3
    back, inverse_logdet = layer.inverse(y, context)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_log_determinants_of_16_bit_networks_are_summed_in_fp32(convention):
    E = 4096
    net = nn.Linear(1, 2 * E, dtype=torch.bfloat16)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.fill_(0.1)
    layer = AffineUpdate(net, 1, convention)
    x = torch.randn(2, E + 1, dtype=torch.bfloat16)
    y, logdet = layer(x)
    assert y.dtype == torch.bfloat16
    assert logdet.dtype == torch.float32
    exact = torch.tensor(0.1).bfloat16().double() * E * (1 if convention == "realnvp" else -1)
    assert (logdet.double() - exact).abs().max() < 1e-5 * exact.abs()  # fp32; bf16 errs by 4e-3


def test_a_stack_learns_a_density():
    """Trained under its own flow, a correlated Gaussian comes near its entropy."""
    mix = torch.tensor([[1.0, 0.0], [0.9, 0.3]])
    first, second = (AffineUpdate(net_of(1, 2, torch.float32)) for _ in range(2))
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=2e-2)
    for _ in range(300):
        x = torch.randn(256, 2) @ mix.T
        z, logdet_1 = first(x)
        z, logdet_2 = second(z.flip(1))
        loss = (0.5 * z.square().sum(1) - logdet_1 - logdet_2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = 1 + torch.linalg.slogdet(mix)[1]  # entropy in nats, less ln 2 pi
    # Over six seeds -0.01 to 0.03 above it, 1.0 to 1.6 at first; batches deviate by 0.07.
    assert loss.item() < expected.item() + 0.25


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"split": 0}, "split: expected at least 1, got 0"),
        ({"split": 1.5}, "split: expected an integer or None, got 1.5"),
        ({"split": True}, "split: expected an integer or None, got True"),
        ({"convention": "glow"}, "convention: expected one of .* got 'glow'"),
    ],
)
def test_bad_constructor_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        AffineUpdate(nn.Identity(), **arguments)


@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("split", "value", "error", "match"),
    [
        (2, torch.zeros(3, 2), ValueError, "expected more than split = 2 columns, got 2"),
        (None, torch.zeros(3, 1), ValueError, "expected more than split = 1 columns, got 1"),
        (None, torch.zeros(3), ValueError, r"expected \[N, D\] or \[B, T, C\], got \[3\]"),
        (2, torch.zeros(3, 4, 2), ValueError, r"expected \[N, D\], as split is given"),
        (None, torch.zeros(3, 4).long(), TypeError, "expected a floating tensor, got torch.int64"),
        (None, [0.0], TypeError, "expected a floating tensor, got list"),
        (1, torch.zeros(3, 4), ValueError, r"net: expected \[3, 6\] or \[3, 3\] .* got \[3, 1\]"),
    ],
)
def test_bad_inputs(method, split, value, error, match):
    layer = AffineUpdate(nn.Identity(), split)
    with pytest.raises(error, match=match) as raised:
        getattr(layer, method)(value)
    name = "x" if method == "forward" else "y"
    assert "net" in match or str(raised.value).startswith(f"{name}: ")
