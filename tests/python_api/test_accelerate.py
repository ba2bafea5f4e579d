"""A TarFlow in the published attribute names, as it was and accelerated."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import golden_tarflow
from flowops.api import TarFlow
from flowops.api.accelerate import accelerate, restore
from plain_tarflow import Model, small

# Under torch.compile the guards of torch look at .grad of whatever a graph reads.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(scope="module")
def golden():
    return golden_tarflow.load()


@pytest.fixture
def golden_model(golden):
    config, weights, _ = golden
    model = Model(**config)
    result = model.load_state_dict(weights, strict=False)
    assert result.missing_keys == ["blocks.0.attn_mask", "blocks.1.attn_mask"]
    return model


def images(n=3, dtype=torch.float64):
    return torch.randn(n, 2, 4, 4, dtype=dtype)


LABELS = torch.tensor([0, -1, 2])


def loss_of(model, x, y):
    z, _, logdets = model(x, y)
    return 0.5 * z.square().mean() - logdets.mean()


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --- forward and training ------------------------------------------------------------------------


def test_golden_forward_and_gradients(golden, golden_model):
    *_, g = golden
    accelerate(golden_model)
    for suffix, y in (("", g["in.y"]), ("_dropped", g["in.y_dropped"]), ("_none", None)):
        z, _, logdets = golden_model(g["in.x"], y)
        assert relative(z, g[f"out.z{suffix}"]) < 1e-5
        assert relative(logdets, g[f"out.logdet{suffix}"]) < 1e-5
    loss = loss_of(golden_model, g["in.x"], g["in.y"])
    assert relative(loss, g["out.loss"]) < 1e-5
    loss.backward()
    parameters = dict(golden_model.named_parameters())
    names = [k.removeprefix("out.grad.") for k in g if k.startswith("out.grad.")]
    assert len(names) == 4
    for name in set(names) - {"x"}:
        assert relative(parameters[name].grad, g[f"out.grad.{name}"]) < 1e-5, name


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_outputs_and_all_gradients_are_the_original_ones(nvp, num_classes):
    plain = small(nvp=nvp, num_classes=num_classes)
    fast = accelerate(copy.deepcopy(plain))
    for y in (LABELS, None) if num_classes else (None,):
        x = images().requires_grad_()
        for got, expected in zip(fast(x, y), plain(x, y), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        inputs = [[x, *model.parameters()] for model in (fast, plain)]
        got, expected = (
            torch.autograd.grad(loss_of(m, x, y), i, allow_unused=True)
            for m, i in zip((fast, plain), inputs, strict=True)
        )
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_training_is_that_of_the_original():
    plain = small()
    models = plain, accelerate(copy.deepcopy(plain))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for _ in range(4):
        x, losses = images(), []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss_of(model, x, LABELS))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-9, atol=1e-9)


def test_autocast():
    plain = small(dtype=torch.float32)
    fast, x = accelerate(copy.deepcopy(plain)), images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, _, logdets = fast(x, LABELS)
        z_plain, _, logdets_plain = plain(x, LABELS)
    assert z.dtype == logdets.dtype == torch.float32
    torch.testing.assert_close(z, z_plain.float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(logdets, logdets_plain.float(), rtol=2e-2, atol=2e-2)


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", golden_tarflow.SAMPLES)
def test_golden_samples(golden, golden_model, kind):
    *_, g = golden
    accelerate(golden_model)
    arguments = dict(golden_tarflow.SAMPLES[kind])
    y = g["in.y"] if arguments.pop("y", None) else None
    noise = g["in.noise"].clone()
    expected = g[f"out.sample.{kind}"]
    assert relative(golden_model.reverse(noise, y, **arguments), expected) < 1e-4
    assert torch.equal(noise, g["in.noise"])
    sweeps = golden_model.reverse(noise, y, **arguments, method="jacobi", tol=1e-6)
    assert relative(sweeps, expected) < 1e-4


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"guidance": 0.8, "guide_what": "b", "attn_temp": 0.7}])
def test_reverse_is_the_original_one_and_inverts_forward(nvp, arguments):
    plain = small(nvp=nvp)
    plain.var.mul_(1.7)
    fast, noise = accelerate(copy.deepcopy(plain)), torch.randn(3, 16, 2, dtype=torch.float64)
    got = fast.reverse(noise, LABELS, **arguments, return_sequence=True)
    expected = plain.reverse(noise, LABELS, **arguments, return_sequence=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(fast.reverse(noise, LABELS, **arguments), got[-1])
    if not arguments:
        back = fast(got[-1], LABELS)[0] / fast.var.sqrt()
        torch.testing.assert_close(back, noise, rtol=1e-9, atol=1e-9)


def test_a_dropped_label_is_no_label_when_sampling():
    fast, noise = accelerate(small()), torch.randn(3, 16, 2, dtype=torch.float64)
    mixed, none = fast.reverse(noise, LABELS), fast.reverse(noise)
    torch.testing.assert_close(mixed[1], none[1], rtol=1e-12, atol=1e-12)
    assert (mixed[0] - none[0]).abs().max() > 1e-4


def test_bad_sampling_arguments_are_named():
    fast, noise = accelerate(small()), torch.randn(3, 16, 2, dtype=torch.float64)
    for argument, value in (("guidance", -1.0), ("guide_what", "c"), ("method", "newton")):
        with pytest.raises(ValueError, match=f"^{argument}: expected"):
            fast.reverse(noise, LABELS, **{argument: value})


# --- what stays, and the way back ----------------------------------------------------------------


def attributes(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


def test_weights_names_and_modules_stay_and_restore_undoes_all():
    model = small()
    before, weights = attributes(model), list(model.parameters())
    state, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    types = [type(module) for module in modules]
    x = images()
    expected = model(x, LABELS)
    model.train(False)
    random = torch.get_rng_state()

    assert accelerate(model) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in model.modules())
    accelerated = [type(module) for module in model.modules()]
    assert accelerated != types
    assert isinstance(model, Model)
    assert type(model.blocks[0]) is type(model.blocks[1])
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert accelerate(model) is model
    assert [type(module) for module in model.modules()] == accelerated

    assert restore(model) is model
    assert [type(module) for module in model.modules()] == types
    assert attributes(model) == before
    torch.testing.assert_close(model(x, LABELS), expected, rtol=0, atol=0)
    assert restore(model) is model


def test_an_attention_outside_a_block_computes_what_it_did():
    plain = small()
    fast, h = accelerate(copy.deepcopy(plain)), torch.randn(2, 5, 16, dtype=torch.float64)
    ours, theirs = (m.blocks[0].attn_blocks[0].attention for m in (fast, plain))
    assert torch.equal(ours(h), theirs(h))  # without a mask it isn't causal


def test_copies_and_pickles_are_accelerated_too(tmp_path):
    fast, x = accelerate(small()), images()
    expected, noise = fast(x, LABELS)[0], torch.randn(3, 16, 2, dtype=torch.float64)
    torch.save(fast, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded):
        assert [type(m) for m in other.modules()] == [type(m) for m in fast.modules()]
        assert torch.equal(other(x, LABELS)[0], expected)
        assert torch.equal(other.reverse(noise), fast.reverse(noise))
        assert type(restore(other)) is Model
    torch.save(fast.state_dict(), tmp_path / "weights.pt")
    again = small()
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    torch.testing.assert_close(again(x, LABELS)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_block_and_a_model_inside_another():
    block = accelerate(small().blocks[1])
    assert type(block).__name__ == "AcceleratedBlock"
    outer = nn.ModuleDict({"flow": small(), "other": nn.Linear(2, 2)})
    accelerate(outer)
    assert type(outer) is nn.ModuleDict
    assert type(outer["flow"]).__name__ == "AcceleratedModel"
    assert type(restore(outer)["flow"]) is Model


def test_our_own_models_are_left_alone():
    model = TarFlow(1, 4, 2, 8, 2, 1, head_dim=4)
    assert type(accelerate(model)) is TarFlow
    assert type(restore(model)) is TarFlow


def test_blocks_compile_to_one_graph():
    plain = small()
    fast, x = accelerate(copy.deepcopy(plain)), torch.randn(3, 16, 2, dtype=torch.float64)
    for i in range(2):
        compiled = torch.compile(fast.blocks[i], fullgraph=True, backend="aot_eager")
        got, expected = compiled(x, LABELS), plain.blocks[i](x, LABELS)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        grads = [
            torch.autograd.grad(z.square().sum() + d.sum(), list(m.blocks[i].parameters()))
            for (z, d), m in ((got, fast), (expected, plain))
        ]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    torch.compiler.reset()


def test_a_block_compiled_before_is_compiled_anew():
    plain = small().blocks[0]
    fast, x = copy.deepcopy(plain), torch.randn(3, 16, 2, dtype=torch.float64)
    compiled = torch.compile(fast, backend="aot_eager")
    compiled(x)
    accelerate(fast)
    with torch.profiler.profile() as profile:
        got = compiled(x)
    assert any("flowops::affine_update" in event.name for event in profile.events())
    torch.testing.assert_close(got, plain(x), rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


@pytest.fixture
def one_process(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(one_process):
    plain = small(dtype=torch.float32)
    fast = nn.parallel.DistributedDataParallel(accelerate(copy.deepcopy(plain)))
    x = images(dtype=torch.float32)
    loss, expected = loss_of(fast, x, LABELS), loss_of(plain, x, LABELS)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for got, p in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, p.grad)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("first", ["accelerate", "shard"])
def test_sharded_blocks(one_process, first):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    plain = small(dtype=torch.float32)
    fast = copy.deepcopy(plain)
    if first == "accelerate":
        accelerate(fast)
    for part in (*fast.blocks, fast):
        fully_shard(part, mesh=mesh)
    if first == "shard":
        accelerate(fast)
    x = images(dtype=torch.float32)
    loss, expected = loss_of(fast, x, LABELS), loss_of(plain, x, LABELS)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for got, p in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), p.grad)
    noise = torch.randn(3, 16, 2)
    for part in (fast, *fast.blocks):
        part.unshard()
    torch.testing.assert_close(fast.reverse(noise), plain.reverse(noise))
    if first == "accelerate":
        with pytest.raises(
            ValueError, match="expected the class that accelerate gave it, got FSDP"
        ):
            restore(fast)
    else:
        restore(fast)
        assert not any("Accelerated" in type(m).__name__ for m in fast.modules())


def test_models_without_values_are_taken_as_they_are():
    with torch.device("meta"):
        model = Model(2, 4, 1, 16, 2, 1)
    accelerate(model)
    z, _, logdets = model(torch.empty(3, 2, 4, 4, device="meta"))
    assert (z.shape, logdets.shape) == ((3, 16, 2), (3,))
