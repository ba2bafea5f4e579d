"""``TarFlow.denoise``: Tweedie's estimate, and that it costs no more than it must."""

import collections
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowops.api import TarFlow

BLOCKS, TOKENS, CHANNELS = 3, 16, 4


def build(dtype=torch.float32, **changed):
    config = {"in_channels": 1, "img_size": 8, "patch_size": 2, "channels": 32, "head_dim": 16}
    config |= {"num_blocks": BLOCKS, "layers_per_block": 2, "num_classes": 3} | changed
    model = TarFlow(**config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def score(model, x, y=None):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(model.log_prob(1 * x, y).sum(), x)[0]


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("classes", [0, 3])
def test_it_is_tweedies_formula(nvp, classes):
    model = build(torch.float64, nvp=nvp, num_classes=classes)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, -1]) if classes else None
    expected = x + 0.3**2 * score(model, x, y)
    torch.testing.assert_close(model.denoise(x, y, 0.3), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.denoise(x, y, 0.0), x)
    assert not model.denoise(x, y, 0.3).requires_grad


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen", "tracked"])
def test_it_needs_no_gradients_of_its_caller(mode):
    model, x = build(), torch.randn(2, 1, 8, 8)
    expected = model.denoise(x, noise_std=0.3)
    if mode == "frozen":
        model.requires_grad_(False)
    around = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with around.get(mode, torch.enable_grad)():
        x = x.clone().requires_grad_(mode == "tracked")
        assert torch.equal(model.denoise(x, noise_std=0.3), expected)
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


# The guards of torch look at .grad of whatever a graph reads.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_denoise_alike():
    torch.compiler.reset()
    model, x = build(num_blocks=2, layers_per_block=1), torch.randn(2, 1, 8, 8)
    expected = model.denoise(x, noise_std=0.3)
    model.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(model.denoise(x, noise_std=0.3), expected)


def test_weights_and_their_gradients_are_left_alone():
    model, x = build(), torch.randn(2, 1, 8, 8)
    z, _, logdets = model(x)
    model.loss(z, logdets).backward()
    held = [
        (p, p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None
    ]
    assert held
    model.denoise(x, noise_std=0.3)
    for parameter, value, gradient in held:
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_it_computes_gradients_of_the_input_alone():
    """A forward pass, a second one for what was not kept, and the half of a backward pass that
    belongs to the inputs."""
    model, x = build(), torch.randn(2, 1, 8, 8)
    tracked = flops(lambda: model.denoise(x, noise_std=0.3))
    training = flops(lambda: sum(model.log_prob(x)).backward())
    model.requires_grad_(False)
    forward = flops(lambda: model.log_prob(x))
    to_input = flops(lambda: score(model, x)) - forward
    assert forward < to_input < 1.5 * forward  # attention takes more than twice its forward
    assert training > 2.9 * forward
    assert flops(lambda: model.denoise(x, noise_std=0.3)) == tracked == 2 * forward + to_input


def peak_bytes(model, function):
    """The most that autograd keeps of forward passes at a time, without the weights."""
    weights = {p.data_ptr() for p in model.parameters()}
    holders, sizes, peak = collections.Counter(), {}, 0

    class Kept:
        def __init__(self, t):
            self.tensor = t
            holders[t.data_ptr()] += 1
            sizes[t.data_ptr()] = t.nbytes

        def __del__(self):
            holders[self.tensor.data_ptr()] -= 1

    def pack(t):
        nonlocal peak
        kept = t if t.data_ptr() in weights else Kept(t)
        peak = max(peak, sum(sizes[address] for address, n in holders.items() if n))
        return kept

    def unpack(kept):
        return kept.tensor if isinstance(kept, Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        function()
    return peak


def test_it_keeps_one_block_at_a_time():
    model, x = build(), torch.randn(8, 1, 8, 8)
    whole = peak_bytes(model, lambda: score(model, x))
    assert whole > 100 * 4 * x.numel()
    assert peak_bytes(model, lambda: model.denoise(x, noise_std=0.3)) < 1.1 * whole / BLOCKS


def test_it_does_not_import_the_compiler():
    program = """if True:
        import sys, torch
        from flowops.api import TarFlow
        TarFlow(1, 8, 2, 64, 2, 1).denoise(torch.zeros(2, 1, 8, 8), noise_std=0.1)
        sys.exit("torch._dynamo" in sys.modules)"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"noise_std": -0.1}, ValueError, "noise_std: expected a finite number, at least 0, got"),
        ({"noise_std": float("nan")}, ValueError, "noise_std: expected a finite number"),
        ({"x": torch.zeros(2, 1, 8, 7)}, ValueError, "x: expected"),
        ({"x": torch.zeros(2, 1, 8, 8).long()}, TypeError, "x: expected a floating tensor"),
        ({"y": torch.tensor([3, 0])}, ValueError, "y: expected labels from 0 to 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(arguments, error, match):
    with pytest.raises(error, match=match):
        build().denoise(**{"x": torch.zeros(2, 1, 8, 8), "noise_std": 0.1} | arguments)


def test_samples_of_a_bf16_model_are_denoised():
    half = build(torch.bfloat16)
    rng = torch.tensor([3, 0])
    plain, images = half.sample(3, 1, rng=rng), half.sample(3, 1, rng=rng, denoise_std=0.1)
    assert images.dtype == torch.float32
    step = half.float().denoise(plain, torch.full((3,), 1), 0.1) - plain
    assert (images - plain - step).norm() < 0.05 * step.norm()
