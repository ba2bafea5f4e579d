import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowops.api.mixing import (
    ActNorm,
    LULinear,
    Permutation,
    exchanging_order,
    typical_distance,
    unrepeated_first,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def perturbed(layer, scale=0.3):
    """The layer with every parameter moved away from its start."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += scale * torch.randn_like(parameter)
    return layer


def layers(D):
    generator = torch.Generator().manual_seed(D)
    return {
        "actnorm": ActNorm(D),
        "permutation": Permutation(torch.randperm(D, generator=generator)),
        "lu": LULinear(D, generator=generator),
    }


KINDS = sorted(layers(2))


@pytest.mark.parametrize("D", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_log_det_is_that_of_the_jacobian_in_both_directions(kind, D):
    layer = perturbed(layers(D)[kind].double())
    x = torch.randn(4, D, dtype=torch.float64)
    y, logdet = layer(x)
    assert logdet.shape == (4,)
    assert logdet.dtype == torch.float64
    for go, rows, expected in ((layer, x, logdet), (layer.inverse, y, layer.inverse(y)[1])):
        for i in range(len(rows)):
            jacobian = torch.autograd.functional.jacobian(
                lambda v, go=go: go(v[None])[0][0], rows[i]
            )
            assert abs(torch.linalg.slogdet(jacobian)[1] - expected[i]) < 1e-10
    torch.testing.assert_close(layer.inverse(y)[1], -logdet, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("D", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_inverse(kind, D, dtype, tolerance):
    # Off-diagonal factors of 0.1 keep the condition number of W, which multiplies rounding, small.
    layer = perturbed(layers(D)[kind].to(dtype), 0.1)
    x = torch.randn(50, D, dtype=dtype)
    assert (layer.inverse(layer(x)[0])[0] - x).abs().max() < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype):
    layer = perturbed(layers(5)[kind].to(dtype))
    x = torch.randn(7, 5).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact, exact_logdet = copy.deepcopy(layer).double()(x.double())
    y, logdet = layer(x)
    assert (y.dtype, logdet.dtype) == (dtype, wide)
    # Rounded once, at the end; the arithmetic before it is fp32.
    bound = torch.finfo(dtype).eps * exact.abs() + 1e-5
    assert ((y.double() - exact).abs() <= bound).all()
    assert (logdet.double() - exact_logdet).abs().max() < 1e-5
    assert layer.inverse(y)[1].dtype == wide


def test_fp64_rows_are_not_rounded_by_fp32_parameters():
    for layer in layers(3).values():
        y, logdet = perturbed(layer)(torch.randn(2, 3, dtype=torch.float64))
        assert (y.dtype, logdet.dtype) == (torch.float64, torch.float64)


def test_nothing_is_cast_under_autocast():
    x = torch.randn(6, 4)
    for kind, layer in layers(4).items():
        y, _ = perturbed(layer)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast, logdet = layer(x)
            back, _ = layer.inverse(cast)
        assert torch.equal(cast, y), kind
        assert (back - x).abs().max() < 1e-4, kind
        assert logdet.dtype == torch.float32, kind


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    layer = perturbed(layers(3)[kind].double())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(method, x, *parameters):
        tensors = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(Calling(layer, method), prefixed(tensors), (x,))

    for method in ("forward", "inverse"):
        inputs = (x, *layer.parameters())
        assert torch.autograd.gradcheck(lambda *t, m=method: call(m, *t), inputs)
        assert torch.autograd.gradgradcheck(lambda *t, m=method: call(m, *t), inputs)


class Calling(torch.nn.Module):
    """A module whose forward is another method of a layer."""

    def __init__(self, layer, method):
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, x):
        return getattr(self.layer, self.method)(x)


def prefixed(tensors):
    return {f"layer.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind):
    layer = perturbed(layers(6)[kind])
    other = {"actnorm": ActNorm(6), "permutation": Permutation(range(6)), "lu": LULinear(6)}[kind]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(other(x)[0], layer(x)[0])
    assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    torch.compiler.reset()
    layer = perturbed(layers(4)[kind])
    x = torch.randn(5, 4)
    y, logdet = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x)[0])
    torch.testing.assert_close(logdet, layer(x)[1])


# --- ActNorm -------------------------------------------------------------------------------------


def test_actnorm_is_the_identity_until_initialized_and_never_initializes_itself():
    layer, x = ActNorm(3), 5 + 2 * torch.randn(100, 3)
    y, logdet = layer.train()(x)
    assert torch.equal(y, x)
    assert torch.equal(logdet, torch.zeros(100))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 60), st.integers(1, 5), st.floats(-1e3, 1e3), st.floats(1e-2, 1e2), st.integers()
)
def test_actnorm_standardizes(N, D, mean, std, seed):
    generator = torch.Generator().manual_seed(seed % 2**63)
    data = mean + std * torch.randn(N, D, generator=generator, dtype=torch.float64)
    layer = ActNorm(D).double()
    layer.initialize(data)
    y, _ = layer(data)
    # The mean's rounding comes back divided by the spread, which for two rows may be small.
    allowed = 1e-14 * (1 + abs(mean) / data.std(0, correction=0).min()) * 100
    assert y.mean(0).abs().max() < allowed
    assert (y.var(0, correction=0) - 1).abs().max() < allowed


def test_actnorm_is_accurate_far_from_zero():
    data = 1e4 + torch.randn(1000, 2)
    layer = ActNorm(2)
    layer.initialize(data)
    exact = (data.double() - data.double().mean(0)) / data.double().std(0, correction=0)
    # The bias is stored in fp32: half a unit of 1e4 is 5e-4.
    assert (layer(data)[0] - exact).abs().max() < 1e-3
    assert (layer.inverse(layer(data)[0])[0] - data).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (torch.randn(1, 2), ValueError, "data: expected at least 2 rows"),
        (torch.randn(5, 3), ValueError, r"data: expected \[N >= 1, 2\], got \[5, 3\]"),
        (torch.randn(5), ValueError, r"data: expected \[N >= 1, 2\], got \[5\]"),
        (torch.randn(0, 2), ValueError, r"got \[0, 2\]"),
        (torch.ones(5, 2, dtype=torch.int64), TypeError, "data: expected a floating dtype"),
        ([[1.0, 2.0]], TypeError, "data: expected a torch.Tensor, got list"),
        (torch.tensor([[0.0, 7.0], [1.0, 7.0]]), ValueError, r"column 1 is constant \(7.0\)"),
        (torch.tensor([[0.0, 1.0], [2.0, torch.nan]]), ValueError, "got nan in row 1, column 1"),
        (torch.tensor([[-torch.inf, 1.0], [2.0, 0.0]]), ValueError, "got -inf in row 0, column 0"),
    ],
)
def test_actnorm_names_what_is_wrong_with_data(data, error, says):
    with pytest.raises(error, match=says):
        ActNorm(2).initialize(data)


# --- Permutation ---------------------------------------------------------------------------------


def test_permutation_permutes():
    layer = Permutation([2, 0, 1])
    y, logdet = layer(torch.tensor([[10.0, 11.0, 12.0]]))
    assert y.tolist() == [[12.0, 10.0, 11.0]]
    assert logdet.tolist() == [0.0]
    assert list(layer.state_dict()) == ["order"]


@pytest.mark.parametrize("order", [[], [1], [0, 0], [0, 2], [[0, 1]], torch.tensor([1, 2])])
def test_permutation_refuses_what_is_none(order):
    with pytest.raises(ValueError, match="order: expected a permutation"):
        Permutation(order)


# --- LULinear ------------------------------------------------------------------------------------


def test_lu_starts_as_a_rotation_that_its_generator_determines():
    matrices = [
        LULinear(6, generator=torch.Generator().manual_seed(seed)).matrix() for seed in (3, 3, 4)
    ]
    torch.testing.assert_close(matrices[0] @ matrices[0].mT, torch.eye(6), atol=1e-6, rtol=0)
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])


def test_lu_multiplies_by_its_matrix_and_has_no_idle_parameter():
    layer = perturbed(LULinear(5).double())
    x = torch.randn(4, 5, dtype=torch.float64)
    y, logdet = layer(x)
    W = layer.matrix()
    torch.testing.assert_close(y, x @ W.mT)
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(W)[1])
    (y.square().sum() + logdet.sum()).backward()
    assert (layer.lu.grad != 0).all()
    assert sum(p.numel() for p in layer.parameters()) == 25


# --- what initialisation shares ------------------------------------------------------------------


@pytest.mark.parametrize(("features", "split"), [(2, 1), (3, 1), (5, 2), (4, 3)])
def test_exchanging_order_changes_the_half_that_stays(features, split):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        order = exchanging_order(features, split, generator).tolist()
        assert sorted(order) == list(range(features))
        assert set(order[:split]) != set(range(split))


def test_unrepeated_rows_come_first_in_their_order():
    rows = torch.tensor([[3.0, 0], [1, 1], [3, 0], [2, 5], [1, 1], [3, 0], [0, 0]])
    expected = [[3.0, 0], [1, 1], [2, 5], [0, 0], [3, 0], [1, 1], [3, 0]]
    assert unrepeated_first(rows).tolist() == expected


def test_typical_distance():
    rows = torch.tensor([[0.0, 0], [0, 0], [3, 4], [0, 0]])
    assert typical_distance(rows, per_feature=False).item() == 5
    # Features of very different spread: each counts the same, and the typical distance is one.
    rows = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([1.0, 1e3, 1e-3])
    lengthscale = typical_distance(rows, per_feature=True)
    torch.testing.assert_close(torch.pdist(rows / lengthscale).median().item(), 1.0)
    spread = lengthscale / rows.std(0)
    assert spread.max() / spread.min() < 1.2
    assert typical_distance(torch.ones(4, 2), per_feature=False).item() == 1
    assert typical_distance(torch.ones(4, 2), per_feature=True).tolist() == [1, 1]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_features_are_checked(value):
    for layer in (ActNorm, LULinear):
        with pytest.raises(ValueError, match="features: expected an integer of at least 1"):
            layer(value)
