"""A block's weights as sampling reads them: prepared once, and again after every change."""

import copy
import pickle

import numpy as np
import pytest
import torch

from flowops.api import TarFlow, decode

NOISE = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(1))
NAMES = [name for name, _ in TarFlow(1, 8, 2, 32, 1, 1, head_dim=16).named_parameters()]


@pytest.fixture
def model():
    model = TarFlow(1, 8, 2, 32, 2, 2, num_classes=3, head_dim=16)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def packs(monkeypatch):
    """The packings so far."""
    calls, function = [], decode.pack_block
    monkeypatch.setattr(
        decode, "pack_block", lambda *a, **k: calls.append(k["dtype"]) or function(*a, **k)
    )
    return calls


def fresh(model, noise=NOISE):
    """What a model with these weights that has never sampled returns."""
    new = TarFlow(**model.config).to(model.var.dtype)
    new.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return new.reverse(noise)


def assert_seen(model, before):
    after = model.reverse(NOISE)
    assert torch.equal(after, fresh(model))
    assert not torch.equal(after, before)


def test_weights_are_packed_once_for_many_calls(model, packs):
    first = model.reverse(NOISE)
    assert len(packs) == 2
    model.reverse(NOISE, torch.tensor([0, 1, 2]), guidance=1.0)
    model.reverse(NOISE[:1], method="jacobi")
    model.sample(5, 1, batch_size=2)
    assert torch.equal(model.reverse(NOISE), first)
    assert len(packs) == 2


def test_one_changed_weight_packs_one_block(model, packs):
    model.reverse(NOISE)
    with torch.no_grad():
        model.blocks[1].attn_blocks[1].mlp.main[2].bias[3] += 1
    model.reverse(NOISE)
    assert len(packs) == 3


@pytest.mark.parametrize(
    "name", [name for name, _ in TarFlow(1, 8, 2, 64, 1, 1).named_parameters()]
)
def test_a_change_of_any_weight_in_place_is_seen(model, name):
    before = model.reverse(NOISE)
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(1.5).add_(0.1)
    assert_seen(model, before)


def test_a_class_embedding_is_read_anew(model):
    y = torch.tensor([0, 1, 2])
    before = model.reverse(NOISE, y)
    with torch.no_grad():
        model.blocks[0].class_embed[1] += 1
    after = model.reverse(NOISE, y)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_step_of_an_optimizer_is_seen(model, optimizer, options):
    before = model.reverse(NOISE)
    z, _, logdets = model(torch.randn(4, 1, 8, 8))
    model.loss(z, logdets).backward()
    optimizer(model.parameters(), lr=1e-3, **options).step()
    assert_seen(model, before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_seen(model, assign):
    before = model.reverse(NOISE)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for block in range(2):
        state[f"blocks.{block}.proj_out.weight"] += 0.1
    model.load_state_dict(state, assign=assign)
    assert_seen(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_is_seen(model, packs, dtype):
    before = model.reverse(NOISE)
    model.to(dtype)
    after = model.reverse(NOISE)
    assert packs[-1] == dtype
    assert after.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(after, fresh(model))
    model.float()
    assert torch.equal(model.reverse(NOISE), fresh(model))
    assert torch.equal(model.reverse(NOISE), before) == (dtype == torch.float64)


def test_a_tensor_at_the_address_of_an_old_one_is_seen(model):
    """Allocators hand out the same memory again, and ``.data =`` leaves a version as it is."""
    weight = model.blocks[0].proj_out.weight
    memory = np.asarray(weight.detach()).copy()
    weight.data = torch.from_numpy(memory)
    before = model.reverse(NOISE)
    weight.data = torch.zeros_like(weight)
    memory *= 1.5
    weight.data = torch.from_numpy(memory)
    assert_seen(model, before)


def test_copies_have_weights_of_their_own(model):
    before = model.reverse(NOISE)
    twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert torch.equal(model.reverse(NOISE), before)
    assert torch.equal(pickled.reverse(NOISE), before)
    assert_seen(twin, before)


@pytest.mark.parametrize("training", [False, True])
def test_train_and_eval_forget_what_was_written_through_data_alone(model, training):
    before = model.reverse(NOISE)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    model.train(training)
    assert_seen(model, before)


def test_forgotten_weights_are_packed_again(model, packs):
    before = model.reverse(NOISE)
    decode.forget_weights(model.blocks[0])
    assert torch.equal(model.reverse(NOISE), before)
    assert len(packs) == 3


def test_prepared_weights_die_with_their_model(model):
    model.reverse(NOISE)
    held = len(decode._PACKED)
    del model.blocks[1]
    assert len(decode._PACKED) == held - 1


def test_tensors_of_inference_mode(packs):
    with torch.inference_mode():
        model = TarFlow(1, 8, 2, 32, 2, 1, head_dim=16)
        before = model.reverse(NOISE)
        model.blocks[0].proj_out.weight.add_(0.01)  # which counts no versions
        assert not torch.equal(model.reverse(NOISE), before)
    assert torch.equal(model.reverse(NOISE), fresh(model))


def test_inference_mode_changes_nothing(model):
    before = model.reverse(NOISE)
    with torch.inference_mode():
        assert torch.equal(model.reverse(NOISE), before)
        assert (
            torch.equal(model.sample(2, 1, rng=torch.tensor([1, 2])).sum(), torch.tensor(0.0))
            is False
        )
    assert torch.equal(model.reverse(NOISE), before)


def test_another_backend_has_another_layout(model, monkeypatch):
    before = model.reverse(NOISE)
    monkeypatch.setenv("FLOWOPS_BACKEND", "reference")
    torch.testing.assert_close(model.reverse(NOISE), before, rtol=1e-4, atol=1e-4)
    monkeypatch.delenv("FLOWOPS_BACKEND")
    assert torch.equal(model.reverse(NOISE), before)


def test_autocast_stores_the_layers_in_bf16(model, packs):
    wide = model.reverse(NOISE)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.reverse(NOISE)
    assert packs == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert cast.dtype == torch.float32
    assert 1e-5 < (cast - wide).abs().max() / wide.abs().max() < 0.05
    rounded = copy.deepcopy(model)
    for block in rounded.blocks:  # the rest stays in fp32
        for linear in [m for m in block.attn_blocks.modules() if isinstance(m, torch.nn.Linear)]:
            linear.weight.data = linear.weight.data.bfloat16().float()
        block.proj_out.weight.data = block.proj_out.weight.data.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded.reverse(NOISE), cast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(model, packs, dtype):
    wide = model.reverse(NOISE)
    model.to(dtype)
    half = model.reverse(NOISE)
    assert half.dtype == torch.float32
    assert packs[-1] == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert (half - wide).abs().max() / wide.abs().max() < 0.05
    assert torch.equal(model.reverse(NOISE.to(dtype).float()), model.reverse(NOISE.to(dtype)))


def test_an_element_of_an_inference_tensor_is_seen(model):
    with torch.inference_mode():
        weight = 0.01 * torch.randn_like(model.blocks[0].proj_out.weight)
    model.blocks[0].proj_out.weight = torch.nn.Parameter(weight, requires_grad=False)
    before = model.reverse(NOISE)
    with torch.inference_mode():
        weight[3, 5] += 0.1
    assert_seen(model, before)


def test_norms_of_one_block_have_one_eps(model):
    model.blocks[1].attn_blocks[0].mlp.norm.eps = 1e-3
    with pytest.raises(ValueError, match="one eps for all norms of a block"):
        model.reverse(NOISE)


def test_weights_packed_in_inference_mode_serve_outside_of_it(model):
    with torch.inference_mode():
        before = model.reverse(NOISE)
    assert torch.equal(model.reverse(NOISE), before)
    packed = (weights for *_, weights in decode._PACKED.values())
    assert not any(t.is_inference() for weights in packed for t in weights.tensors)
