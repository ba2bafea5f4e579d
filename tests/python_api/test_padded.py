import copy
import importlib.util
import math
import pickle
import sys
from pathlib import Path

import normflows
import pytest
import torch
import zuko
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.distributions import StandardNormal
from nflows.flows.base import Flow
from nflows.transforms import (
    CompositeTransform,
    MaskedAffineAutoregressiveTransform,
    ReversePermutation,
)
from numpy.polynomial.hermite import hermgauss
from sklearn.datasets import make_moons
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from flowops import noise_normal, pad_noise
from flowops.api.ferumal import FerumalFlow
from flowops.api.padded import PaddedFlow, PadNoise

RNG = torch.tensor([42, 7])
by_pad = pytest.mark.parametrize("pad", [1, 2])


class Gaussian(nn.Module):
    """``N(mean, tril tril^T)`` in fp64, with a record of the rows that it is asked for."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean = nn.Parameter(mean.double())
        self.tril = nn.Parameter(torch.linalg.cholesky(covariance.double()))
        self.asked = []

    def distribution(self):
        return MultivariateNormal(self.mean, scale_tril=self.tril.tril())

    def log_prob(self, rows):
        self.asked.append(rows.detach())
        return self.distribution().log_prob(rows)

    def sample(self, n, *, rng=None):
        return self.mean + noise_normal((n, len(self.mean)), rng=rng).double() @ self.tril.T

    def marginal(self, features):
        covariance = (self.tril @ self.tril.T)[:features, :features]
        return MultivariateNormal(self.mean[:features], covariance)


def correlated(pad):
    """Two data columns; pads that depend on them, off centre, of a variance below theirs."""
    covariance = torch.tensor(
        [[1.0, 0.3, 0.7, -0.2], [0.3, 0.8, 0.4, 0.5], [0.7, 0.4, 2.0, 0.4], [-0.2, 0.5, 0.4, 2.5]]
    )
    mean = torch.tensor([0.5, -0.3, 0.4, -0.2])
    return Gaussian(mean[: 2 + pad], covariance[: 2 + pad, : 2 + pad])


def independent(pad, pad_scale):
    covariance = torch.block_diag(
        torch.tensor([[1.0, 0.6], [0.6, 0.8]]), pad_scale**2 * torch.eye(pad)
    )
    return Gaussian(torch.cat([torch.tensor([0.5, -0.3]), torch.zeros(pad)]), covariance)


@torch.no_grad()
def quadrature(log_prob, x, pad, nodes=40):
    """``log int p(x, e) de`` by Gauss-Hermite with the weight N(e; 0, 2^2): [N]."""
    points, weights = (torch.from_numpy(a).to(x.dtype) for a in hermgauss(nodes))
    e = 2 * math.sqrt(2) * torch.cartesian_prod(*[points] * pad).view(-1, pad)
    weights = torch.cartesian_prod(*[weights] * pad).view(-1, pad).prod(1) / math.pi ** (pad / 2)
    rows = torch.cat([x.repeat_interleave(len(e), 0), e.repeat(len(x), 1)], dim=1)
    ratio = log_prob(rows).view(len(x), -1) - Normal(0 * e, 2.0).log_prob(e).sum(1)
    return (ratio + weights.log()).logsumexp(1)


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


# --- the layer -----------------------------------------------------------------------------------


def test_layer_is_pad_noise_and_eval_leaves_the_noise_on_the_data_out():
    layer, x = PadNoise(2, pad_scale=1.5, data_scale=0.3), torch.randn(4, 5, 3)
    both = pad_noise(x, 2, pad_scale=1.5, data_scale=0.3, rng=RNG)
    pads = pad_noise(x, 2, pad_scale=1.5, rng=RNG)
    assert torch.equal(layer(x, rng=RNG), both)
    assert torch.equal(layer.eval()(x, rng=RNG), pads)
    assert not torch.equal(layer(x), layer(x))
    assert not layer.state_dict()


def test_no_pads():
    layer, x = PadNoise(0, data_scale=0.3), torch.randn(7, 3, dtype=torch.float64)
    eps = noise_normal((7, 3), rng=RNG, dtype=torch.float64)
    assert torch.equal(layer(x, rng=RNG), x + 0.3 * eps)
    assert layer.eval()(x) is x
    assert layer.entropy == 0
    assert torch.equal(layer.pads_log_prob(x[:, 3:]), torch.zeros(7, dtype=torch.float64))
    half = x.bfloat16()
    rounded_once = (half.float() + 0.3 * eps.float()).bfloat16()
    assert torch.equal(layer.train()(half, rng=RNG), rounded_once)
    with pytest.raises(TypeError, match="x: expected a floating dtype, got torch.int64"):
        layer(torch.ones(2, 3, dtype=torch.int64))


def test_density_and_entropy_of_the_pads():
    layer = PadNoise(3, pad_scale=2.0)
    pads = torch.randn(6, 4, 3, dtype=torch.float64)
    normal = Normal(torch.zeros(3, dtype=torch.float64), 2.0)
    expected = normal.log_prob(pads).sum(-1)
    torch.testing.assert_close(layer.pads_log_prob(pads), expected, rtol=1e-14, atol=0)
    assert layer.entropy == pytest.approx(normal.entropy().sum().item(), rel=1e-15)
    assert PadNoise(1).entropy == pytest.approx(2.1121, abs=5e-5)
    with pytest.raises(ValueError, match=r"pads: expected \[\.\.\., 3\], got \[6, 4\]"):
        layer.pads_log_prob(pads[..., 0])


# --- the estimators ------------------------------------------------------------------------------


@by_pad
def test_quadrature_gives_the_marginal_of_a_gaussian(pad):
    flow = correlated(pad)
    x = flow.marginal(2).sample((50,))
    exact = flow.marginal(2).log_prob(x)
    torch.testing.assert_close(quadrature(flow.log_prob, x, pad), exact, rtol=0, atol=1e-10)


@by_pad
def test_iwae_rises_from_the_elbo_to_the_marginal(pad):
    flow, draws = correlated(pad), 20_000
    padded = PaddedFlow(flow, 2, pad)
    x = torch.tensor([[1.0, -1.2]], dtype=torch.float64)
    exact = flow.marginal(2).log_prob(x).item()

    # E log p(x, e) is the log density at (x, 0) less half the trace of b^2 times the precision.
    precision = torch.cholesky_inverse(flow.tril)
    at_zero = flow.log_prob(torch.cat([x, torch.zeros(1, pad).double()], dim=1)).item()
    elbo = at_zero - 0.5 * 4 * precision.diagonal()[2:].sum().item() + padded.noise.entropy
    bound, last = elbo - exact, -math.inf
    with torch.no_grad():
        for K in (1, 4, 16, 64):
            rows = x.expand(draws, 2)
            values = padded.log_prob(rows, estimator="iwae", num_pads=K, rng=RNG) - exact
            mean, error = mean_and_error(values)
            if K == 1:
                assert mean == pytest.approx(bound, abs=5 * error)
                same = padded.log_prob(rows, num_pads=1, rng=RNG) - exact
                torch.testing.assert_close(same, values, rtol=0, atol=1e-12)
            # What is averaged inside the logarithm is unbiased.
            ratio, ratio_error = mean_and_error(values.exp())
            assert ratio == pytest.approx(1, abs=5 * ratio_error)
            assert last + 3 * error < mean < 3 * error
            last = mean
    variance = values.exp().var().item()  # of the mean of 64 weights: the bias is half of it
    assert mean == pytest.approx(-variance / 2, abs=5 * error)
    assert mean > -0.01
    values = padded.log_prob(x.expand(2000, 2), num_pads=64, rng=RNG) - exact
    mean, error = mean_and_error(values.detach())
    assert mean == pytest.approx(bound, abs=5 * error)


@by_pad
@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
@pytest.mark.parametrize("num_pads", [1, 5])
def test_pads_independent_of_the_data_leave_nothing_to_estimate(pad, estimator, num_pads):
    flow = independent(pad, 2.0)
    x = flow.marginal(2).sample((50,))
    actual = PaddedFlow(flow, 2, pad).log_prob(x, estimator=estimator, num_pads=num_pads)
    torch.testing.assert_close(actual, flow.marginal(2).log_prob(x), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    pad=st.integers(1, 2),
    num_pads=st.integers(1, 12),
    max_rows=st.integers(1, 120),
    pad_scale=st.sampled_from([0.5, 2.0]),
)
def test_chunks_change_nothing(rows, pad, num_pads, max_rows, pad_scale):
    flow = correlated(pad)
    padded = PaddedFlow(flow, 2, pad, pad_scale=pad_scale)
    x = torch.randn(rows, 2, dtype=torch.float64)
    options = {"num_pads": num_pads, "rng": RNG}
    values = {}
    for estimator in ("elbo", "iwae"):
        whole = padded.log_prob(x, estimator=estimator, **options)
        flow.asked.clear()
        values[estimator] = padded.log_prob(x, estimator=estimator, max_rows=max_rows, **options)
        torch.testing.assert_close(values[estimator], whole, rtol=0, atol=1e-11)
        # The pads of the contract, in order, and no more rows at a time than allowed.
        assert max(len(r) for r in flow.asked) <= max(max_rows, rows)
        expected = [
            pad_noise(x, pad, pad_scale=pad_scale, rng=RNG + torch.tensor([0, k]))
            for k in range(num_pads)
        ]
        assert torch.equal(torch.cat(flow.asked), torch.cat(expected))
    assert (values["elbo"] <= values["iwae"] + 1e-12).all()  # mean and log mean exp of the same


def direct(flow, x, estimator, num_pads, pad):
    weights = []
    for k in range(num_pads):
        e = 2 * noise_normal((len(x), 2 + pad), rng=RNG + torch.tensor([0, k])).double()[:, 2:]
        prior = Normal(torch.zeros(pad).double(), 2.0).log_prob(e).sum(1)
        weights.append(flow.log_prob(torch.cat([x, e], dim=1)) - prior)
    weights = torch.stack(weights)
    return weights.mean(0) if estimator == "elbo" else weights.exp().mean(0).log()


@by_pad
@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
@pytest.mark.parametrize("max_rows", [2**16, 20])
def test_gradients_are_those_of_the_formula(pad, estimator, max_rows):
    flow = correlated(pad)
    padded = PaddedFlow(flow, 2, pad)
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    leaves = [x, *padded.parameters()]
    outer = torch.randn(7, dtype=torch.float64)
    value = padded.log_prob(x, estimator=estimator, num_pads=11, rng=RNG, max_rows=max_rows)
    chunks = len(flow.asked)
    actual = torch.autograd.grad(value, leaves, outer)
    assert (chunks, len(flow.asked)) == ((1, 1) if max_rows > 77 else (6, 12))  # computed again
    formula = direct(flow, x, estimator, 11, pad)
    expected = torch.autograd.grad(formula, leaves, outer)
    torch.testing.assert_close(value, formula, rtol=0, atol=1e-12)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_many_pads_in_bounded_memory():
    flow = correlated(1)
    padded, x = PaddedFlow(flow, 2, 1), torch.randn(5, 2, dtype=torch.float64)
    with torch.no_grad():
        value = padded.log_prob(x, estimator="iwae", num_pads=4096, max_rows=2000, rng=RNG)
    assert [len(rows) for rows in flow.asked] == [2000] * 10 + [480]
    exact = flow.marginal(2).log_prob(x)
    # The weights of these rows have a relative standard deviation below 2.
    torch.testing.assert_close(value, exact, rtol=0, atol=4 * 2 / math.sqrt(4096))


def test_noise_on_the_data_is_drawn_once_and_in_training_only():
    flow = correlated(2)
    padded = PaddedFlow(flow, 2, 2, data_scale=0.5)
    x = torch.randn(6, 2, dtype=torch.float64)
    padded.log_prob(x, num_pads=3, rng=RNG)
    (rows,) = flow.asked
    noisy = pad_noise(x, 2, data_scale=0.5, rng=RNG)
    assert torch.equal(rows[:6], noisy)
    assert torch.equal(rows[:, :2], noisy[:, :2].repeat(3, 1))
    flow.asked.clear()
    torch.manual_seed(5)
    padded.log_prob(x)
    torch.manual_seed(5)  # one seed a call, that of both noises
    assert torch.equal(flow.asked[0], pad_noise(x, 2, data_scale=0.5))
    flow.asked.clear()
    padded.eval().log_prob(x, rng=RNG)
    assert torch.equal(flow.asked[0], pad_noise(x, 2, rng=RNG))


def test_without_pads_it_is_the_plain_flow():
    flow = correlated(0)
    padded = PaddedFlow(flow, 2, 0)
    x = torch.randn(6, 2, dtype=torch.float64)
    for estimator in ("elbo", "iwae"):
        assert torch.equal(padded.log_prob(x, estimator=estimator), flow.log_prob(x))
    assert all(len(rows) == 6 for rows in flow.asked)
    assert torch.equal(padded.sample(5, rng=RNG), flow.sample(5, rng=RNG))


def test_every_call_draws_new_pads_unless_told():
    padded, x = PaddedFlow(correlated(1), 2, 1), torch.randn(6, 2, dtype=torch.float64)
    generator = torch.Generator()

    def seeded():
        torch.manual_seed(5)

    for start, rng in (
        (seeded, None),
        (lambda: generator.manual_seed(5), generator),
        (lambda: None, RNG),
    ):
        start()
        first, second = padded.log_prob(x, rng=rng), padded.log_prob(x, rng=rng)
        assert torch.equal(first, second) == (rng is RNG)
        start()
        assert torch.equal(padded.log_prob(x, rng=rng), first)
    assert torch.equal(RNG, torch.tensor([42, 7]))


def test_nan_stays_in_its_row():
    x = torch.randn(6, 2, dtype=torch.float64)
    x[2, 0] = float("nan")
    flow = correlated(1)
    flow.distribution = lambda: MultivariateNormal(
        flow.mean, scale_tril=flow.tril, validate_args=False
    )
    padded = PaddedFlow(flow, 2, 1)
    for estimator in ("elbo", "iwae"):
        value = padded.log_prob(x, estimator=estimator, num_pads=4, max_rows=12)
        assert value.isnan().tolist() == [False, False, True, False, False, False]


# --- as a module ---------------------------------------------------------------------------------


def test_state_copies_and_pickles(tmp_path):
    padded = PaddedFlow(zuko.flows.MAF(3, hidden_features=(8,)), 2, 1)
    assert {name.split(".")[0] for name in padded.state_dict()} == {"flow"}
    x = torch.randn(6, 2)
    expected = padded.log_prob(x, rng=RNG)
    twin = copy.deepcopy(padded)
    assert torch.equal(twin.log_prob(x, rng=RNG), expected)
    with torch.no_grad():
        for parameter in padded.parameters():
            parameter.add_(1)
    assert torch.equal(twin.log_prob(x, rng=RNG), expected)  # nothing of it is the original's
    padded.load_state_dict(twin.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(padded))(x, rng=RNG), expected)


def test_distributed_data_parallel_calls_forward(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        padded = PaddedFlow(zuko.flows.MAF(3, hidden_features=(8,)), 2, 1)
        parallel = nn.parallel.DistributedDataParallel(padded)
        x = torch.randn(6, 2)
        value = parallel(x, estimator="iwae", num_pads=3, rng=RNG)
        assert torch.equal(value, padded.log_prob(x, estimator="iwae", num_pads=3, rng=RNG))
        value.sum().backward()
        assert all(p.grad is not None for p in padded.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_compiles_to_one_graph():
    class Standard(nn.Module):
        def log_prob(self, rows):
            return -0.5 * rows.square().sum(1)

        def sample(self, n):
            return torch.randn(n, 3)

    padded, x = PaddedFlow(Standard(), 2, 1, data_scale=0.1), torch.randn(6, 2)
    compiled = torch.compile(padded, fullgraph=True, backend="eager")
    for options in ({}, {"estimator": "iwae", "num_pads": 3}):
        torch.testing.assert_close(compiled(x, rng=RNG, **options), padded(x, rng=RNG, **options))


def test_initialize_hands_padded_data_on():
    seen = []

    class Initialized(Gaussian):
        def initialize(self, data, context=None, *, generator=None):
            seen.append((data, context, generator))

    x = torch.randn(9, 2, dtype=torch.float64)
    flow = Initialized(torch.zeros(3), torch.eye(3))
    PaddedFlow(flow, 2, 1).initialize(x, "context", rng=RNG, generator="generator")
    assert torch.equal(seen[0][0], pad_noise(x, 1, rng=RNG))
    assert seen[0][1:] == ("context", "generator")
    assert PaddedFlow(correlated(1), 2, 1).initialize(x) is None


def test_samples_lose_their_pads_and_rng_goes_through():
    flow = correlated(2)
    padded = PaddedFlow(flow, 2, 2)
    assert torch.equal(padded.sample(5, rng=RNG), flow.sample(5, rng=RNG)[:, :2])
    assert not torch.equal(padded.sample(5), padded.sample(5))
    assert not padded.sample(5).requires_grad


def test_a_distribution_of_torch():
    normal = Independent(Normal(torch.zeros(3), torch.tensor([1.0, 0.5, 2.0])), 1)
    padded, x = PaddedFlow(normal, 2, 1), torch.randn(6, 2)
    expected = Normal(torch.zeros(2), torch.tensor([1.0, 0.5])).log_prob(x).sum(1)
    torch.testing.assert_close(padded.log_prob(x), expected)
    assert padded.sample(5).shape == (5, 2)
    assert not list(padded.parameters())


# --- flows of other libraries, and ours ----------------------------------------------------------


def zuko_flow(features, context=0):
    if context:
        return zuko.flows.MAF(features, context, transforms=4, hidden_features=(32, 32))
    return zuko.flows.NSF(features, bins=6, transforms=2, hidden_features=(32, 32))


def nflows_flow(features, context=0):
    layers = []
    for _ in range(4):
        layers.append(ReversePermutation(features))
        layers.append(
            MaskedAffineAutoregressiveTransform(features, 32, context or None, num_blocks=1)
        )
    return Flow(CompositeTransform(layers), StandardNormal([features]))


def normflows_flow(features, context=0):
    base, layers = normflows.distributions.DiagGaussian(features), []
    if context:
        layer = normflows.flows.MaskedAffineAutoregressive
        layers = [layer(features, 32, context_features=context, num_blocks=1) for _ in range(2)]
        return normflows.ConditionalNormalizingFlow(base, layers)
    for i in range(6):
        mask = (torch.arange(features) + i) % 2
        s, t = (normflows.nets.MLP([features, 32, 32, features], init_zeros=True) for _ in "st")
        layers.append(normflows.flows.MaskedAffineFlow(mask.float(), t, s))
    return normflows.NormalizingFlow(base, layers)


def ferumal_flow(features, context=0):
    flow = FerumalFlow(features, layers=6, points=32, context=context)
    for layer in flow.layers[2::3]:
        nn.init.normal_(layer.weight, std=0.1)  # until initialize() sets them to zero
    return flow


FLOWS = [zuko_flow, nflows_flow, normflows_flow, ferumal_flow]
by_flow = pytest.mark.parametrize("make", FLOWS, ids=lambda make: make.__name__)


def moons(n, seed):
    """Two moons, about standardised, and which of them ``[n, 2]``."""
    x, label = make_moons(n, noise=0.08, random_state=seed)
    x = torch.from_numpy((x - [0.5, 0.25]) / [0.87, 0.5]).float()
    return x, nn.functional.one_hot(torch.from_numpy(label), 2).float()


def train(padded, x, context=None, steps=100):
    padded.initialize(x, *([] if context is None else [context]))
    optimizer = torch.optim.Adam(padded.parameters(), lr=1e-2)
    padded.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        loss = -padded(x[rows], None if context is None else context[rows]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(padded.parameters(), 5.0)
        optimizer.step()
    padded.eval()


def held_out_elbo(padded, *data):
    with torch.no_grad():
        return padded.log_prob(*data, num_pads=8, rng=RNG).mean().item()


@by_flow
@by_pad
def test_training_on_moons(make, pad):
    (x, _), (held_out, _) = moons(2000, 0), moons(500, 1)
    gaussian = MultivariateNormal(x.mean(0), x.T.cov()).log_prob(held_out).mean().item()
    padded = PaddedFlow(make(2 + pad), 2, pad, data_scale=0.01)
    before = held_out_elbo(padded, held_out)
    train(padded, x)
    after = held_out_elbo(padded, held_out)
    assert after > before + 0.5
    assert after > gaussian + 0.1  # more than the best that no bend at all could give
    samples = padded.sample(500)
    assert samples.shape == (500, 2)
    assert samples.isfinite().all()


@by_pad
def test_estimators_of_a_trained_flow_against_quadrature(pad):
    flow = zuko.flows.MAF(2 + pad, transforms=3, hidden_features=(32,), activation=nn.Tanh)
    padded = PaddedFlow(flow, 2, pad)
    train(padded, moons(1000, 0)[0], steps=60)
    padded.double()
    x = moons(8, 1)[0].double()
    exact, check = (quadrature(flow().log_prob, x, pad, nodes=n) for n in (40, 80))
    # zuko's log-scales are smooth but for a kink at 0; what follows is coarser by far.
    torch.testing.assert_close(exact, check, rtol=0, atol=2e-4)
    with torch.no_grad():
        weights = padded.log_prob(x.repeat(4000, 1), rng=RNG).view(4000, 8) - exact
        elbo = padded.log_prob(x, num_pads=4000, rng=RNG) - exact
        iwae = padded.log_prob(x, estimator="iwae", num_pads=4000, rng=RNG) - exact
    error = weights.std(0) / math.sqrt(4000)
    assert (elbo - weights.mean(0)).abs().lt(5 * math.sqrt(2) * error).all()
    assert elbo.lt(3 * error).all()
    assert elbo.mean() < 0
    error = weights.exp().std(0) / math.sqrt(4000)
    assert iwae.expm1().abs().lt(5 * error).all()


def flow_log_prob(flow, rows, context):
    return (
        flow(context).log_prob(rows)
        if isinstance(flow, zuko.flows.Flow)
        else flow.log_prob(rows, context)
    )


def flow_sample(flow, n, context):
    if isinstance(flow, zuko.flows.Flow):
        return flow(context).sample()
    if isinstance(flow, Flow):
        return flow.sample(1, context)[:, 0]
    if isinstance(flow, FerumalFlow):
        return flow.sample(n, context)
    return flow.sample(n, context)[0]


@by_flow
@pytest.mark.parametrize("shared", [False, True])
def test_context_goes_with_its_rows(make, shared):
    flow = make(3, context=4)
    padded, x = PaddedFlow(flow, 2, 1), torch.randn(6, 2)
    given = torch.randn(1 if shared else 6, 4)
    context = given.expand(6, 4)
    pads = [pad_noise(x, 1, rng=RNG + torch.tensor([0, k])) for k in range(5)]
    weights = [
        flow_log_prob(flow, rows, context) - padded.noise.pads_log_prob(rows[:, 2:])
        for rows in pads
    ]
    for max_rows in (1000, 12):
        value = padded.log_prob(x, given, num_pads=5, rng=RNG, max_rows=max_rows)
        torch.testing.assert_close(value, torch.stack(weights).mean(0))
    torch.manual_seed(3)
    samples = padded.sample(6, given)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(samples, flow_sample(flow, 6, context)[:, :2])


@pytest.mark.parametrize("make", [zuko_flow, nflows_flow])
def test_training_with_context(make):
    (x, moon), (held_out, held_out_moon) = moons(2000, 0), moons(500, 1)
    padded = PaddedFlow(make(3, context=2), 2, 1)
    before = held_out_elbo(padded, held_out, held_out_moon)
    train(padded, x, moon)
    after = held_out_elbo(padded, held_out, held_out_moon)
    assert after > before + 0.5
    assert after > held_out_elbo(padded, held_out, held_out_moon.flip(1)) + 1
    # One moon lies about 1.8 above the other; the context of each sample decides.
    samples = padded.sample(500, torch.eye(2).repeat(250, 1))
    assert 1.4 < samples[0::2, 1].median() - samples[1::2, 1].median() < 2.2


# --- the example ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "padded_ffjord.py"
    spec = importlib.util.spec_from_file_location("padded_ffjord", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["padded_ffjord"] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    yield module
    del sys.modules["padded_ffjord"]


def test_example_has_the_exact_trace(example):
    flow, x, t = example.FFJORD(3, 8, 4).double(), torch.randn(5, 3).double(), torch.tensor(0.3)
    _, trace = flow.velocity(t, x)
    for row, expected in zip(x, trace, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda r: flow.velocity(t, r[None])[0][0], row
        )
        torch.testing.assert_close(jacobian.trace(), expected, rtol=0, atol=1e-12)


def test_example_runs(example, tmp_path, capsys):
    example.main(example.Options(out=tmp_path / "new", pads=(0, 2), steps=1))
    assert (tmp_path / "new" / "padded_ffjord.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("Chamfer") == 2


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nflows_flow, normflows_flow, ferumal_flow])
def test_a_width_that_the_flow_tells_is_checked_at_once(make):
    with pytest.raises(ValueError, match=r"flow: expected one over features \+ pad = 3 .* over 4"):
        PaddedFlow(make(4), 2, 1)


def test_the_width_of_a_distribution_is_checked():
    expected = r"flow: expected one over features \+ pad = 3 columns, got one over 4"
    with pytest.raises(ValueError, match=expected):
        PaddedFlow(zuko_flow(4), 2, 1).log_prob(torch.randn(6, 2))
    with pytest.raises(ValueError, match=expected):
        PaddedFlow(Independent(Normal(torch.zeros(4), 1.0), 1), 2, 1)


class Silent(nn.Module):
    """Tells no width, takes any."""

    def __init__(self, columns=3, reduced=True):
        super().__init__()
        self.columns, self.reduced = columns, reduced

    def log_prob(self, rows):
        return -rows.square().sum(1) if self.reduced else -rows.square()

    def sample(self, n):
        return torch.randn(n, self.columns)


class Density(nn.Module):
    """Can be called, as modules can, and can't be drawn from."""

    def log_prob(self, rows):
        return -rows.square().sum(1)


def test_what_the_flow_returns_is_checked():
    with pytest.raises(ValueError, match=r"expected samples .* = \[5, 3\], got \[5, 4\]"):
        PaddedFlow(Silent(4), 2, 1).sample(5)
    zuko_padded = PaddedFlow(zuko_flow(4), 2, 1)
    with pytest.raises(ValueError, match=r"expected samples .* = \[5, 3\], got \[5, 4\]"):
        zuko_padded.sample(5)
    with pytest.raises(
        ValueError, match=r"flow: expected log_prob \[6\] of \[6, 3\], got \[6, 3\]"
    ):
        PaddedFlow(Silent(reduced=False), 2, 1).log_prob(torch.randn(6, 2))


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((Silent(), 0, 1), {}, ValueError, "features: expected an integer of at least 1, got 0"),
        ((Silent(), 2.0, 1), {}, ValueError, "features: expected an integer .* got 2.0"),
        ((Silent(), 2, -1), {}, ValueError, "pad: expected an integer of at least 0, got -1"),
        ((Silent(), 2, True), {}, ValueError, "pad: expected an integer .* got True"),
        ((object(), 2, 1), {}, TypeError, "flow: expected log_prob and sample, .* got object"),
        ((Density(), 2, 1), {}, TypeError, "flow: expected log_prob and sample, .* got Density"),
        ((None, 2, 1), {}, TypeError, "flow: expected log_prob and sample, .* got NoneType"),
        *(
            ((Silent(), 2, 1), {"pad_scale": s}, ValueError, f"pad_scale: .* above 0, got {s}")
            for s in (0, -1.0, INF, NAN, None, True)
        ),
        *(
            ((Silent(), 2, 1), {"data_scale": s}, ValueError, f"data_scale: .* at least 0, got {s}")
            for s in (-1.0, INF, NAN, None)
        ),
    ],
)
def test_bad_construction_is_named(arguments, options, error, match):
    with pytest.raises(error, match="^" + match):
        PaddedFlow(*arguments, **options)


ROWS = torch.ones(6, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (([[1.0, 2.0]],), {}, TypeError, "x: expected a torch.Tensor, got list"),
        ((ROWS.int(),), {}, TypeError, "x: expected a floating dtype, got torch.int32"),
        ((torch.ones(6, 3),), {}, ValueError, r"x: expected \[N >= 1, 2\], got \[6, 3\]"),
        ((torch.ones(0, 2),), {}, ValueError, r"x: expected \[N >= 1, 2\], got \[0, 2\]"),
        ((torch.ones(2),), {}, ValueError, r"x: expected \[N >= 1, 2\], got \[2\]"),
        ((ROWS, torch.ones(6, 4)), {}, ValueError, "context: the wrapped Silent takes none"),
        ((ROWS,), {"estimator": "iw"}, ValueError, r"estimator: expected one of .* got 'iw'"),
        ((ROWS,), {"num_pads": 0}, ValueError, "num_pads: expected .* at least 1, got 0"),
        ((ROWS,), {"num_pads": 1.5}, ValueError, "num_pads: expected .* at least 1, got 1.5"),
        ((ROWS,), {"max_rows": 0}, ValueError, "max_rows: expected .* at least 1, got 0"),
        ((ROWS,), {"rng": 3}, TypeError, "rng: expected an int64 tensor"),
        ((ROWS,), {"rng": torch.ones(2)}, ValueError, "rng: expected int64 of shape"),
    ],
)
def test_bad_calls_are_named(arguments, options, error, match):
    with pytest.raises(error, match="^" + match):
        PaddedFlow(Silent(), 2, 1).log_prob(*arguments, **options)


def test_bad_contexts_and_samples_are_named():
    padded = PaddedFlow(zuko_flow(3, context=4), 2, 1)
    with pytest.raises(ValueError, match=r"context: expected \[6, \.\.\.\] or .* got \[5, 4\]"):
        padded.log_prob(ROWS, torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"context: expected \[5, \.\.\.\] or .* got \[6, 4\]"):
        padded.sample(5, torch.ones(6, 4))
    with pytest.raises(TypeError, match="context: expected a torch.Tensor, got int"):
        padded.sample(5, 3)
    with pytest.raises(ValueError, match="n: expected an integer of at least 1, got 0"):
        padded.sample(0)
    with pytest.raises(ValueError, match=r"rng: Silent.sample takes none.*manual_seed"):
        PaddedFlow(Silent(), 2, 1).sample(5, rng=RNG)
    with pytest.raises(ValueError, match=r"data: expected \[N >= 1, 2\], got \[6, 3\]"):
        padded.initialize(torch.ones(6, 3))
