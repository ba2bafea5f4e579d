import copy
import itertools
import math

import pytest
import torch
from sklearn.datasets import make_moons
from torch.func import functional_call

from flowops.api import ferumal
from flowops.api.ferumal import FerumalFlow, KernelCoupling
from flowops.api.mixing import ActNorm, LULinear

KERNELS = ("se", "matern12", "matern32", "matern52")


def perturbed(module, scale=0.2):
    """The module with every parameter moved away from its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)
    return module


def flow(features=4, dtype=torch.float64, **options):
    """A small flow that is not the identity."""
    options = {"layers": 3, "points": 6} | options
    return perturbed(FerumalFlow(features, **options).to(dtype))


def inputs(N, D, C=0, dtype=torch.float64):
    x = torch.randn(N, D, dtype=dtype)
    return (x, torch.randn(N, C, dtype=dtype)) if C else (x, None)


def jacobian_logdet(module, x, context):
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None], context)[0][0], x)
    return torch.linalg.slogdet(jacobian)[1]


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [2, 3, 5])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("clamp", [None, 1.5])
@pytest.mark.parametrize("output_scale", [False, True])
@pytest.mark.parametrize("lengthscale", ["scalar", "features"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_log_det_of_the_coupling(kernel, lengthscale, output_scale, clamp, context, features):
    for split in (None, features - 1):
        layer = perturbed(
            KernelCoupling(
                features,
                6,
                split=split,
                kernel=kernel,
                lengthscale=lengthscale,
                output_scale=output_scale,
                scale_clamp=clamp,
                context=context,
            ).double(),
            0.5,
        )
        x, c = inputs(2, features, context)
        y, logdet = layer(x, c)
        back, inverse_logdet = layer.inverse(y, c)
        for i in range(2):
            row = None if c is None else c[i : i + 1]
            expected = jacobian_logdet(layer, x[i], row)
            assert abs(logdet[i] - expected) < 1e-10
            assert abs(logdet[i]) > 1e-3
        torch.testing.assert_close(inverse_logdet, -logdet, atol=1e-12, rtol=0)
        torch.testing.assert_close(back, x, atol=1e-12, rtol=0)
        torch.testing.assert_close(layer.invert(y, c), x, atol=1e-12, rtol=0)


FLOWS = list(
    itertools.product(
        ("permutation", "lu"), ("scalar", "features"), (None, 2.0), (0, 2), KERNELS, (2, 3, 5)
    )
)


@pytest.mark.parametrize(("mixing", "lengthscale", "clamp", "context", "kernel", "D"), FLOWS)
def test_log_det_and_inverse_of_the_flow(mixing, lengthscale, clamp, context, kernel, D):
    model = flow(
        D,
        mixing=mixing,
        lengthscale=lengthscale,
        scale_clamp=clamp,
        context=context,
        kernel=kernel,
        output_scale=kernel == "se",
    )
    x, c = inputs(3, D, context)
    z, logdet = model(x, c)
    row = None if c is None else c[:1]
    expected = jacobian_logdet(model, x[0], row)
    assert abs(logdet[0] - expected) < 1e-10
    base = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(model.log_prob(x, c), base.log_prob(z).sum(1) + logdet)
    assert (model.inverse(z, c) - x).abs().max() < 1e-10
    assert (model(model.inverse(x, c), c)[0] - x).abs().max() < 1e-10

    model, x, c = model.float(), x.float(), None if c is None else c.float()
    assert (model.inverse(model(x, c)[0], c) - x).abs().max() < 1e-5


@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("mixing", ["permutation", "lu"])
@pytest.mark.parametrize("lengthscale", ["scalar", "features"])
def test_gradients_of_log_prob(lengthscale, mixing, clamp):
    model = flow(
        3,
        layers=2,
        points=3,
        mixing=mixing,
        lengthscale=lengthscale,
        scale_clamp=clamp,
        output_scale=True,
        context=1,
    )
    x, c = inputs(3, 3, 1)
    names = [name for name, _ in model.named_parameters()]

    class LogProb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, c):
            return self.model.log_prob(x, c)

    def log_prob(x, c, *parameters):
        tensors = {f"model.{n}": p for n, p in zip(names, parameters, strict=True)}
        return functional_call(LogProb(), tensors, (x, c))

    arguments = (x.requires_grad_(), c.requires_grad_(), *model.parameters())
    assert torch.autograd.gradcheck(log_prob, arguments)


@pytest.mark.parametrize("kernel", ["se", "matern52"])
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_second_derivatives_of_the_coupling(clamp, kernel):
    layer = perturbed(
        KernelCoupling(3, 3, kernel=kernel, lengthscale="features", scale_clamp=clamp).double(), 0.5
    )
    x, _ = inputs(2, 3)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(call, (x.requires_grad_(), *layer.parameters()))


@pytest.mark.parametrize("clamp", [None, 1.0])
def test_every_parameter_gets_a_gradient(clamp):
    model = flow(5, mixing="lu", lengthscale="features", output_scale=True, scale_clamp=clamp)
    model.log_prob(inputs(20, 5)[0]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_clamp_bounds_log_scales_and_the_output_scale_multiplies_the_kernel():
    layer = perturbed(KernelCoupling(5, 8, output_scale=True).double())
    with torch.no_grad():
        layer.weight *= 20
    x, _ = inputs(30, 5)
    clamped = KernelCoupling(5, 8, output_scale=True, scale_clamp=0.5).double()
    clamped.load_state_dict(layer.state_dict())
    assert layer(x)[1].abs().max() > 3 * 0.5
    assert clamped(x)[1].abs().max() <= 3 * 0.5
    plain = KernelCoupling(5, 8).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        plain.weight *= layer.log_output_scale.exp()
    torch.testing.assert_close(plain(x)[0], layer(x)[0])


# --- state, dtypes, compilation ------------------------------------------------------------------


@pytest.mark.parametrize("learn_points", [False, True])
@pytest.mark.parametrize("mixing", ["permutation", "lu"])
def test_state_dict_round_trip(mixing, learn_points):
    options = {"mixing": mixing, "learn_points": learn_points, "output_scale": True}
    model = flow(5, lengthscale="features", **options)
    other = FerumalFlow(**(model.config | {"seed": 9})).double()
    x, _ = inputs(6, 5)
    assert not torch.equal(other.log_prob(x), model.log_prob(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(x), model.log_prob(x))
    assert torch.equal(copy.deepcopy(model).log_prob(x), model.log_prob(x))
    learned = {name.split(".")[-1] for name, _ in model.named_parameters()}
    assert ("points" in learned) == learn_points
    assert "points" in {name.split(".")[-1] for name in model.state_dict()}


@pytest.mark.parametrize("clamp", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, clamp):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    model = flow(5, dtype=dtype, mixing="lu", scale_clamp=clamp, output_scale=True)
    exact = copy.deepcopy(model).double()
    x = torch.randn(8, 5).to(dtype)
    z, logdet = model(x)
    assert (z.dtype, logdet.dtype, model.log_prob(x).dtype) == (dtype, wide, wide)
    # Rows travel between the layers in fp32: the log-density owes nothing to the storage of x.
    torch.testing.assert_close(
        model.log_prob(x).double(), exact.log_prob(x.double()), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(logdet.double(), exact(x.double())[1], rtol=1e-5, atol=1e-4)
    assert model.inverse(z).dtype == model.sample(3).dtype == dtype
    layer = model.layers[2]
    y, logdet = layer(x)
    assert (y.dtype, logdet.dtype) == (dtype, wide)
    assert [t.dtype for t in layer.inverse(y)] == [dtype, wide]
    model.log_prob(x).sum().backward()
    assert all(p.grad.dtype == dtype for p in model.parameters())
    model.initialize(torch.randn(20, 5).to(dtype))


def test_nothing_is_cast_under_autocast():
    for clamp in (None, 2.0):
        model = flow(4, dtype=torch.float32, mixing="lu", scale_clamp=clamp, output_scale=True)
        x = torch.randn(6, 4)
        expected = model.log_prob(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model.log_prob(x), expected)
            torch.testing.assert_close(model.inverse(model(x)[0]), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("clamp", [None, 2.0])
def test_log_prob_and_inverse_compile_whole(clamp):
    torch.compiler.reset()
    model = flow(4, dtype=torch.float32, layers=1, mixing="lu", context=1, scale_clamp=clamp)
    x, c = inputs(6, 4, 1, torch.float32)
    model.log_prob(x, c).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    options = {"fullgraph": True, "backend": "aot_eager"}
    log_prob = torch.compile(model.log_prob, **options)(x, c)
    torch.testing.assert_close(log_prob, model.log_prob(x, c))
    log_prob.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
    z = model(x, c)[0].detach()
    back = torch.compile(model.inverse, **options)(z, c)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clamp", [None, 2.0])
@pytest.mark.parametrize("mixing", ["permutation", "lu"])
def test_nothing_looks_at_values(mixing, clamp):
    """On the meta device there are none; what looks at them on a GPU waits for it."""
    options = {"layers": 2, "points": 5, "context": 1, "output_scale": True}
    model = FerumalFlow(4, mixing=mixing, scale_clamp=clamp, **options).to("meta")
    x, c = (torch.empty(6, d, device="meta", requires_grad=True) for d in (4, 1))
    model.log_prob(x, c).sum().backward()
    assert x.grad.shape == x.shape
    assert model.inverse(x, c).shape == (6, 4)
    assert [layer.inverse(x, c)[1].shape for layer in model.layers] == [(6,)] * 6


def test_kernel_and_backend_reach_the_ops(monkeypatch):
    seen = []

    def spy_on(name):
        original = getattr(ferumal, name)

        def spy(*args, **options):
            seen.append((name, options))
            return original(*args, **options)

        monkeypatch.setattr(ferumal, name, spy)

    for name in ("kernel_coupling", "kernel_coupling_inverse", "se_gram_matmul"):
        spy_on(name)
    options = {"kernel": "matern32", "backend": "reference"}
    x = torch.randn(3, 4)
    plain, clamped = KernelCoupling(4, 3, **options), KernelCoupling(4, 3, scale_clamp=1, **options)
    plain(x), plain.invert(x), plain.inverse(x), clamped(x), clamped.invert(x)
    assert [name for name, _ in seen] == [
        "kernel_coupling",
        "kernel_coupling_inverse",
        *["se_gram_matmul"] * 3,
    ]
    assert all(given == options for _, given in seen)


def test_the_coupling_works_inside_nflows():
    transforms = pytest.importorskip("nflows.transforms")
    layers = [perturbed(KernelCoupling(4, 5, context=1)), LULinear(4), ActNorm(4)]
    composite = transforms.CompositeTransform([transforms.ReversePermutation(4), *layers])
    x, c = inputs(6, 4, 1, torch.float32)
    y, logdet = composite(x, c)
    back, inverse_logdet = composite.inverse(y, c)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(inverse_logdet, -logdet, atol=1e-5, rtol=0)


# --- sampling and learning -----------------------------------------------------------------------


def test_samples_repeat_with_their_rng_and_go_back_to_their_noise():
    model = flow(3, mixing="lu")
    rng = torch.tensor([7, 0])
    x = model.sample(50, rng=rng)
    assert torch.equal(x, model.sample(50, rng=rng))
    torch.testing.assert_close(model.sample(20, rng=rng), x[:20])
    assert not torch.equal(x, model.sample(50, rng=torch.tensor([8, 0])))
    first, second = (model.sample(5, rng=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(model.sample(5), model.sample(5))
    noise = ferumal.noise_normal((50, 3), rng=rng).double()
    assert (model(x)[0] - noise).abs().max() < 1e-10
    assert not x.requires_grad


def fit(model, x, context=None, steps=120, lr=2e-2):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-model.log_prob(x, context).mean()).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("mixing", ["permutation", "lu"])
def test_it_learns_two_moons(mixing):
    rows = torch.tensor(make_moons(600, noise=0.1, random_state=0)[0], dtype=torch.float32)
    train, held_out = rows[:300], rows[300:]
    model = FerumalFlow(2, layers=4, points=40, mixing=mixing)
    model.initialize(train, generator=torch.Generator().manual_seed(0))
    fit(model, train)
    gaussian = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    gain = model.log_prob(held_out).mean() - gaussian.log_prob(held_out).mean()
    assert gain > 0.4
    samples = model.sample(2000, rng=torch.tensor([0, 0]))
    assert (samples.mean(0) - rows.mean(0)).abs().max() < 0.15
    assert (samples.std(0) / rows.std(0) - 1).abs().max() < 0.2


def test_it_learns_a_mean_that_depends_on_the_context():
    c = torch.linspace(-2, 2, 300).unsqueeze(1)
    mean = torch.cat([c.sin() * 2, c.square() - 1], dim=1)
    x = mean + 0.2 * torch.randn(300, 2)
    model = FerumalFlow(2, layers=4, points=30, context=1)
    model.initialize(x, c, generator=torch.Generator().manual_seed(0))
    fit(model, x, c)
    for value in (-1.5, 0.0, 1.0):
        expected = torch.tensor([2 * math.sin(value), value**2 - 1])
        samples = model.sample(500, torch.tensor([value]), rng=torch.tensor([1, 0]))
        assert (samples.mean(0) - expected).abs().max() < 0.25
        assert samples.std(0).max() < 0.5
    rows = model.sample(300, c, rng=torch.tensor([1, 0]))
    assert (rows - mean).abs().mean() < 0.35
