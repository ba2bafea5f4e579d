"""Blocks under torch.compile and activation checkpointing."""

import copy
import functools
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flowops import dispatch
from flowops.api import TarFlow, load_model, save_model
from flowops.api.transformer import TarFlowBlock

# Under torch.compile the guards of torch look at .grad of whatever a graph reads.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

LABELS = torch.tensor([0, -1, 2])


def small(**kwargs):
    """A model whose blocks are not the identity."""
    config = {"in_channels": 2, "img_size": 8, "patch_size": 2, "channels": 16, "head_dim": 8}
    config |= {"num_blocks": 4, "layers_per_block": 1, "num_classes": 3} | kwargs
    model = TarFlow(**config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images():
    return torch.randn(3, 2, 8, 8)


def loss_of(model, x, y=LABELS):
    z, _, logdets = model(x, y)
    return model.loss(z, logdets)


def gradients(model, x, y=LABELS):
    """All parameters have a part in the result once there are labels."""
    names = [name for name, _ in model.named_parameters()]
    return dict(
        zip(names, torch.autograd.grad(loss_of(model, x, y), model.parameters()), strict=True)
    )


@pytest.fixture
def counter():
    """A backend that counts the graphs it is asked for."""
    torch.compiler.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


def compiled(model, counter):
    model.compile_blocks(backend=counter)
    counter.frame_count = 0  # less the trial
    return model


@pytest.mark.parametrize(("num_classes", "checkpoint_blocks"), [(0, False), (3, False), (3, True)])
def test_blocks_of_one_direction_share_a_graph(counter, num_classes, checkpoint_blocks):
    plain = small(num_classes=num_classes)
    y = LABELS if num_classes else None
    model = copy.deepcopy(plain)
    model.checkpoint_blocks = checkpoint_blocks
    compiled(model, counter)
    for labels in (y, None if y is None else torch.tensor([-1, -1, 1])):
        x = images()
        torch.testing.assert_close(loss_of(model, x, labels), loss_of(plain, x, labels))
        expected = gradients(plain, x, labels)
        for name, gradient in gradients(model, x, labels).items():
            torch.testing.assert_close(gradient, expected[name], msg=name)
    assert counter.frame_count == 2


def test_compiling_leaves_the_rest_of_the_model_as_it_was(counter, tmp_path):
    plain = small()
    model = compiled(copy.deepcopy(plain), counter)
    x, noise = images(), torch.randn(3, 16, 8)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in plain.named_modules()
    ]
    assert torch.equal(model.reverse(noise, LABELS), plain.reverse(noise, LABELS))
    save_model(model, tmp_path / "model.safetensors")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(load_model(tmp_path / "model.safetensors"))
    for other in copies:
        torch.testing.assert_close(loss_of(other, x), loss_of(plain, x))
    assert counter.frame_count == 0
    loss_of(model, x)
    assert counter.frame_count == 2


def test_compiled_blocks_under_autocast_and_without_gradients(counter):
    plain = small()
    model, x = compiled(copy.deepcopy(plain), counter), images()
    with torch.autocast("cpu", torch.bfloat16):
        z, _, logdets = model(x, LABELS)
        z_plain, _, logdets_plain = plain(x, LABELS)
    assert z.dtype == logdets.dtype == torch.float32
    torch.testing.assert_close(z, z_plain, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(logdets, logdets_plain, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(x, LABELS), plain.log_prob(x, LABELS))
    torch.testing.assert_close(model.denoise(x, LABELS, 0.2), plain.denoise(x, LABELS, 0.2))


def test_a_compiler_that_does_not_work_is_named_at_once():
    def broken(graph, inputs):
        raise OSError("No working C++ compiler found\nin all these places")

    model = small()
    with pytest.raises(RuntimeError, match=r"does not work here for cpu: OSError: .* found$"):
        model.compile_blocks(backend=broken)
    assert loss_of(model, images()).isfinite()


def test_the_whole_model_is_one_graph_with_checkpoints(counter):
    model, x = small(num_blocks=2, checkpoint_blocks=True), images()
    whole = torch.compile(lambda x, y: loss_of(model, x, y), fullgraph=True, backend=counter)
    loss = whole(x, LABELS)
    torch.testing.assert_close(loss, loss_of(model, x))
    expected = gradients(model, x)
    for gradient, name in zip(torch.autograd.grad(loss, model.parameters()), expected, strict=True):
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert counter.frame_count == 1


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_nothing_depends_on_values(autocast, checkpoint_blocks):
    """Meta tensors have none: whatever looks at one raises, as it would wait for a GPU."""
    model = small(checkpoint_blocks=checkpoint_blocks).to("meta")
    x, y = images().to("meta"), LABELS.to("meta")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z, _, logdets = model(x, y)
    model.loss(z, logdets).backward()
    model.update_prior(z.detach())
    assert model.log_prob(x, y).shape == (3,)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("nvp", [True, False])
def test_checkpoints_give_the_same_bits(nvp):
    model, x = small(nvp=nvp), images().requires_grad_()
    plain, (plain_x,) = gradients(model, x), torch.autograd.grad(loss_of(model, x), x)
    model.checkpoint_blocks = True
    again, (again_x,) = gradients(model, x), torch.autograd.grad(loss_of(model, x), x)
    assert torch.equal(again_x, plain_x)
    for name in plain:
        assert torch.equal(again[name], plain[name]), name
    denoised = model.denoise(x.detach(), LABELS, 0.1)
    model.checkpoint_blocks = False
    assert torch.equal(denoised, model.denoise(x.detach(), LABELS, 0.1))


@pytest.fixture
def attention_calls(monkeypatch):
    """A list that grows by an element with every run of the forward pass of attention."""
    calls, table = [], dispatch._IMPLEMENTATIONS["causal_attention"]
    for backend, (function, supports) in list(table.items()):
        counted = functools.partial(
            lambda function, *args: calls.append(args) or function(*args), function
        )
        monkeypatch.setitem(table, backend, (counted, supports))
    return calls


@pytest.mark.parametrize("nvp", [True, False])
def test_selective_checkpoints_keep_what_attention_returns(attention_calls, nvp):
    model, x = small(nvp=nvp, layers_per_block=2), images().requires_grad_()
    runs = {}
    for model.checkpoint_blocks in (False, True, "selective"):
        attention_calls.clear()
        loss = loss_of(model, x)
        forward = len(attention_calls)
        inputs = [*model.parameters(), x]
        runs[model.checkpoint_blocks] = torch.autograd.grad(loss, inputs)
        assert forward == 8
        assert len(attention_calls) == (16 if model.checkpoint_blocks is True else 8)
    for kind in (True, "selective"):
        for again, plain in zip(runs[kind], runs[False], strict=True):
            assert torch.equal(again, plain)


def test_compiled_selective_checkpoints_keep_what_attention_returns(counter, attention_calls):
    plain, x = small(num_blocks=2), images()
    model = compiled(copy.deepcopy(plain), counter)
    model.checkpoint_blocks = "selective"
    loss = loss_of(model, x)
    loss.backward()
    assert counter.frame_count == 2
    attention_calls.clear()
    gradient = gradients(model, x)
    assert len(attention_calls) == 2
    expected = gradients(plain, x)
    for name in expected:
        torch.testing.assert_close(gradient[name], expected[name], msg=name)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, x), loss_of(plain, x))


def test_each_block_is_computed_again_once(monkeypatch):
    calls, forward = [], TarFlowBlock.forward

    def counted(self, x, y=None):
        calls.append(self)
        return forward(self, x, y)

    monkeypatch.setattr(TarFlowBlock, "forward", counted)
    model = small(checkpoint_blocks=True)
    blocks = list(model.blocks)
    loss = loss_of(model, images())
    assert calls == blocks
    loss.backward()
    assert calls == blocks + blocks[::-1]
    calls.clear()
    with torch.no_grad():
        loss_of(model, images())
    assert calls == blocks


def test_checkpoints_keep_one_tensor_a_block():
    model, x = small(num_blocks=8), images()
    saved = {}
    for model.checkpoint_blocks in (False, True):
        packed = []

        def pack(tensor, packed=packed):
            packed.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss_of(model, x)
        saved[model.checkpoint_blocks] = sum(packed)
    # What the 8 blocks read, tokens and labels, and what the loss squares.
    assert saved[True] <= 9 * x.nbytes + 8 * LABELS.nbytes
    assert saved[True] < saved[False] / 20


def test_checkpoint_blocks_is_no_part_of_the_model_file(tmp_path):
    model = small(channels=64, head_dim=64, checkpoint_blocks=True)
    assert "checkpoint_blocks" not in model.config
    save_model(model, tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").checkpoint_blocks is False
    assert load_model(tmp_path / "model.safetensors", checkpoint_blocks=True).checkpoint_blocks
