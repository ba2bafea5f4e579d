import copy
import itertools
import math

import pytest
import torch

from flowops.api.ferumal import FerumalFlow, KernelCoupling
from flowops.api.mixing import ActNorm, LULinear, Permutation


def perturbed(module, scale=0.2):
    """The module with every parameter moved away from its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)
    return module


def inputs(N, D, C=0, dtype=torch.float64):
    x = torch.randn(N, D, dtype=dtype)
    return (x, torch.randn(N, C, dtype=dtype)) if C else (x, None)


# --- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("context", [0, 2])
def test_the_coupling_starts_as_the_identity(context, clamp):
    layer = KernelCoupling(5, 7, context=context, scale_clamp=clamp)
    x, c = inputs(9, 5, context, torch.float32)
    for _ in range(2):
        y, logdet = layer(x, c)
        assert torch.equal(y, x)
        assert torch.equal(logdet, torch.zeros(9))
        assert torch.equal(layer.inverse(x, c)[0], x)
        perturbed(layer)
        layer.initialize(x, c)  # undoes what was learned


def test_the_flow_starts_as_a_permutation_or_rotation_of_standardized_data():
    data = 3 + 2 * torch.randn(200, 5, dtype=torch.float64)
    for mixing in ("permutation", "lu"):
        model = FerumalFlow(5, layers=4, points=10, mixing=mixing).double()
        model.initialize(data)
        z, _ = model(data)
        assert z.mean(0).abs().max() < 1e-12
        standard = (data - data.mean(0)) / data.std(0, correction=0)
        if mixing == "permutation":
            torch.testing.assert_close(z.sum(1), standard.sum(1))


def test_every_feature_moves_within_two_layers():
    for features, seed in itertools.product((2, 3, 4, 5, 7), range(5)):
        model = perturbed(FerumalFlow(features, layers=2, points=4, seed=seed).double(), 0.0)
        with torch.no_grad():
            for layer in model.layers:
                if isinstance(layer, KernelCoupling):
                    layer.weight.fill_(0.1)
        x, _ = inputs(1, features)
        orders = [layer.order for layer in model.layers if isinstance(layer, Permutation)]
        unmoved = x[:, orders[0]][:, orders[1]]
        assert (model(x)[0] != unmoved).all()


def test_layers_are_in_the_documented_order_and_the_seed_determines_them():
    for mixing, mix in (("permutation", Permutation), ("lu", LULinear)):
        models = [FerumalFlow(6, layers=2, points=3, mixing=mixing, seed=s) for s in (1, 1, 2)]
        assert [type(layer) for layer in models[0].layers] == [ActNorm, mix, KernelCoupling] * 2
        states = [list(model.state_dict().values()) for model in models]
        assert all(map(torch.equal, states[0], states[1]))
        assert not all(map(torch.equal, states[0], states[2]))
    orders = [FerumalFlow(6, layers=4, points=3).layers[i].order.tolist() for i in (1, 4, 7, 10)]
    assert orders[1] == orders[3] == [5, 4, 3, 2, 1, 0]
    assert orders[0] != orders[2]


# --- initialisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["permutation", "lu"])
@pytest.mark.parametrize("context", [0, 2])
def test_points_are_rows_carried_to_their_layer(context, mixing):
    data, c = inputs(40, 5, context)
    data = data * torch.tensor([1.0, 5, 0.2, 1, 1]) + 7
    model = FerumalFlow(5, layers=3, points=12, mixing=mixing, context=context).double()
    model.initialize(data, c, generator=torch.Generator().manual_seed(3))
    carried = data
    for norm, mix, coupling in zip(*[iter(model.layers)] * 3, strict=True):
        torch.testing.assert_close(norm.bias, -carried.mean(0))
        torch.testing.assert_close((-norm.log_scale).exp(), carried.std(0, correction=0))
        carried, _ = mix(norm(carried)[0])
        rows = carried[:, :2] if c is None else torch.cat([carried[:, :2], c], dim=1)
        distance = (coupling.points.unsqueeze(1) - rows).abs().sum(2)
        assert distance.amin(1).max() < 1e-12
        assert len(set(distance.argmin(1).tolist())) == 12
        carried, _ = coupling(carried, c)
    chosen = [layer.points for layer in model.layers if isinstance(layer, KernelCoupling)]
    assert not torch.equal(chosen[0], chosen[1])


def test_initialization_is_determined_by_its_generator():
    data = torch.randn(300, 4)
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(states))
        model = FerumalFlow(4, layers=2, points=20)
        model.INIT_ROWS = 100
        model.initialize(data, generator=torch.Generator().manual_seed(seed))
        states.append(list(model.state_dict().values()))
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))


def test_only_a_choice_of_many_rows_is_carried():
    model = FerumalFlow(2, layers=2, points=5)
    model.INIT_ROWS = 50
    data = torch.randn(400, 2)
    model.initialize(data, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:50]
    torch.testing.assert_close(model.layers[0].bias, -data[order].mean(0))
    model = FerumalFlow(2, layers=1, points=60)  # more points than that bound
    model.INIT_ROWS = 50
    model.initialize(data)
    assert len(model.layers[2].points.unique(dim=0)) == 60
    model = FerumalFlow(2, layers=1, points="all")
    model.INIT_ROWS = 50
    model.initialize(data)
    assert model.layers[2].points.shape == (400, 1)


@pytest.mark.parametrize("lengthscale", ["scalar", "features"])
def test_lengthscale_is_the_median_distance_and_survives_repeated_rows(lengthscale):
    data = torch.randn(500, 6).double() * torch.tensor([1.0, 30, 0.1, 1, 1, 1])
    layer = KernelCoupling(6, 10, split=3, lengthscale=lengthscale).double()
    layer.initialize(data)
    factor = KernelCoupling.LENGTHSCALE_FACTOR
    scaled = torch.pdist(data[:, :3] / layer.log_lengthscale.exp()).median()
    torch.testing.assert_close(scaled.item(), 1 / factor)
    # nine rows of ten are the same: the median distance is zero, the lengthscale must not be
    data[50:] = data[0]
    layer.initialize(data)
    spread = data[:50, :3].std(0)
    assert (layer.log_lengthscale.exp() > 0.3 * factor * spread.min()).all()
    assert (layer.log_lengthscale.exp() < 30 * factor * spread.max()).all()
    layer.initialize(torch.ones(20, 6).double())
    assert layer.log_lengthscale.exp().isfinite().all()


def test_repeated_rows_become_points_only_when_there_are_no_others():
    data = torch.randn(10, 4).repeat(20, 1)
    layer = KernelCoupling(4, 10)
    layer.initialize(data)
    assert len(layer.points.unique(dim=0)) == 10
    layer = KernelCoupling(4, 12)
    layer.initialize(data)
    assert len(layer.points.unique(dim=0)) == 10


def test_gradients_do_not_reach_into_initialization():
    data = torch.randn(20, 4, requires_grad=True)
    model = FerumalFlow(4, layers=1, points=5)
    model.initialize(data)
    assert all(p.is_leaf for p in model.parameters())


# --- all rows as points --------------------------------------------------------------------------


def test_all_rows_become_points_in_their_order_and_are_not_learned():
    data, c = inputs(30, 5, 1)
    model = FerumalFlow(5, layers=2, points="all", context=1).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)  # made before the sizes are known
    model.initialize(data, c)
    first, rest = model.layers[2], model.layers[5]
    assert first.points.shape == rest.points.shape == (30, 3)
    assert sum(layer.weight.numel() for layer in (first, rest)) == 2 * 2 * 30 * 3
    carried = model.layers[1](model.layers[0](data)[0])[0]
    torch.testing.assert_close(first.points, torch.cat([carried[:, :2], c], dim=1))
    assert not any("points" in name for name, _ in model.named_parameters())
    before = model.log_prob(data, c).mean()
    for _ in range(20):
        optimizer.zero_grad()
        (-model.log_prob(data, c).mean()).backward()
        optimizer.step()
    assert model.log_prob(data, c).mean() > before
    model.initialize(data[:20], c[:20])  # again, with another count
    assert model.layers[2].weight.shape == (20, 6)
    model.log_prob(data, c).sum().backward()


def test_all_points_survive_state_dicts_copies_and_casts():
    data, _ = inputs(25, 4)
    model = FerumalFlow(4, layers=2, points="all").double()
    copy.deepcopy(model).float().state_dict()  # before anything is known
    model.initialize(data)
    perturbed(model)
    expected = model.log_prob(data)
    for assign in (False, True):
        other = FerumalFlow(4, layers=2, points="all").double()
        optimizer_holds = list(other.parameters())
        assert not other.load_state_dict(model.state_dict(), assign=assign).missing_keys
        assert torch.equal(other.log_prob(data), expected)
        if not assign:
            assert all(a is b for a, b in zip(optimizer_holds, other.parameters(), strict=True))
    smaller = FerumalFlow(4, layers=2, points="all").double()
    smaller.initialize(data[:10])
    smaller.load_state_dict(model.state_dict())
    assert torch.equal(smaller.log_prob(data), expected)
    assert torch.equal(copy.deepcopy(model).log_prob(data), expected)
    assert (model.float().log_prob(data.float()) - expected).abs().max() < 1e-3


def test_all_points_need_data_first():
    layer, x = KernelCoupling(4, "all"), torch.randn(3, 4)
    for call in (layer, layer.inverse, layer.invert):
        with pytest.raises(RuntimeError, match="none before initialize"):
            call(x)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"features": 1}, r"features: a coupling needs at least 2, got 1.*PaddedFlow"),
        ({"features": 0}, "features: expected an integer of at least 1, got 0"),
        ({"features": 2.0}, "features: expected an integer"),
        ({"points": 0}, "points: expected an integer of at least 1 or 'all', got 0"),
        ({"points": "some"}, "points: expected .* or 'all', got 'some'"),
        ({"kernel": "rbf"}, "kernel: expected one of"),
        ({"lengthscale": 1.0}, "lengthscale: expected one of"),
        ({"scale_clamp": 0.0}, "scale_clamp: expected None or a positive number, got 0.0"),
        ({"scale_clamp": math.inf}, "scale_clamp: expected"),
        ({"context": -1}, "context: expected an integer of at least 0, got -1"),
        ({"backend": "gpu"}, "backend: expected"),
    ],
)
def test_options_are_checked(options, says):
    for build in (KernelCoupling, FerumalFlow):
        with pytest.raises(ValueError, match=says):
            build(**({"features": 4, "points": 3} | options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 0}, "layers: expected an integer of at least 1"),
        ({"mixing": "conv"}, "mixing: expected one of"),
        ({"seed": None}, "seed: expected an integer"),
    ],
)
def test_options_of_the_flow_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        FerumalFlow(4, **options)


@pytest.mark.parametrize("split", [0, 4, 5, 1.0])
def test_the_split_is_checked(split):
    with pytest.raises(ValueError, match="split: expected"):
        KernelCoupling(4, 3, split=split)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.randn(3, 5), ValueError, r": expected \[N >= 1, 4\], got \[3, 5\]"),
        (torch.randn(4), ValueError, r": expected \[N >= 1, 4\], got \[4\]"),
        (torch.randn(0, 4), ValueError, r": expected .*, got \[0, 4\]"),
        (torch.ones(3, 4, dtype=torch.int32), TypeError, ": expected a floating dtype"),
        ("rows", TypeError, ": expected a torch.Tensor, got str"),
        (torch.randn(3, 4, device="meta"), ValueError, ": expected a tensor on cpu"),
    ],
)
def test_rows_are_checked(x, error, says):
    layer, model = KernelCoupling(4, 3), FerumalFlow(4, layers=1, points=3)
    calls = {"x": [layer, model, model.log_prob], "y": [layer.inverse, layer.invert]}
    calls |= {"z": [model.inverse], "data": [layer.initialize, model.initialize]}
    for name, functions in calls.items():
        for call in functions:
            with pytest.raises(error, match=name + says):
                call(x)


@pytest.mark.parametrize(
    ("columns", "context", "error", "says"),
    [
        (2, None, ValueError, r"context: expected \[6, 2\], got None"),
        (0, torch.randn(6, 1), ValueError, r"context: expected None \(built with context=0\)"),
        (2, torch.randn(6, 1), ValueError, r"context: expected \[6, 2\], got \[6, 1\]"),
        (2, torch.randn(5, 2), ValueError, r"context: expected \[6, 2\], got \[5, 2\]"),
        (2, torch.ones(6, 2, dtype=torch.int64), TypeError, "context: expected a floating dtype"),
    ],
)
def test_the_context_is_checked(columns, context, error, says):
    layer = KernelCoupling(4, 3, context=columns)
    model = FerumalFlow(4, layers=1, points=3, context=columns)
    x = torch.randn(6, 4)
    calls = [layer, layer.inverse, layer.invert, layer.initialize]
    calls += [model, model.log_prob, model.inverse, model.initialize]
    for call in calls:
        with pytest.raises(error, match=says):
            call(x, context)
    with pytest.raises(error, match=says):
        model.sample(6, context)


def test_data_are_checked():
    model = FerumalFlow(3, layers=1, points=5)
    data = torch.randn(10, 3)
    data[4, 2] = torch.nan
    for initialize in (model.initialize, KernelCoupling(3, 5).initialize):
        with pytest.raises(ValueError, match="data: expected finite values, got nan in row 4, col"):
            initialize(data)
    data[:, 2] = 3.5
    with pytest.raises(ValueError, match=r"column 2 is constant \(3.5\)"):
        model.initialize(data)
    with pytest.raises(ValueError, match="at least 2 rows"):
        model.initialize(data[:1])
    with pytest.raises(ValueError, match=r"5 points, the data only 4 rows; .*points=4"):
        model.initialize(torch.randn(4, 3))
    conditional = FerumalFlow(3, layers=1, points=5, context=1)
    context = torch.zeros(10, 1)
    context[7] = torch.inf
    with pytest.raises(ValueError, match="context: expected finite values, got inf in row 7"):
        conditional.initialize(torch.randn(10, 3), context)


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_the_number_of_samples_is_checked(n):
    with pytest.raises(ValueError, match="n: expected an integer of at least 1"):
        FerumalFlow(2, layers=1, points=2).sample(n)


def test_a_refused_initialize_changes_nothing():
    flow = FerumalFlow(3, layers=2, points=20)
    before = {name: t.clone() for name, t in flow.state_dict().items()}
    with pytest.raises(ValueError, match=r"20 points, the data only 10 rows"):
        flow.initialize(torch.randn(10, 3))
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, before[name]), name
