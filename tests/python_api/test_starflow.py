"""STARFlow's parts of an autoregressive block: density, arithmetic, files. Sampling through them is
tested in test_starflow_sampling.py."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowops import affine_update
from flowops.api import TarFlow, load_model, save_model
from flowops.api.checkpoint import save_tensors
from flowops.api.starflow import (
    STARFLOW,
    TARFLOW,
    UNIT_SOFTPLUS,
    BlockParts,
    RMSNorm,
    affine_update_unshifted,
    log_softplus,
    rotary_table,
    rotate,
)
from plain_starflow import CONFIGS, plain_params, small

# Under torch.compile the guards of torch look at .grad of whatever a graph reads.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

LABELS = torch.tensor([0, -1, 2])

by_parts = pytest.mark.parametrize("parts", CONFIGS)
by_direction = pytest.mark.parametrize("reverse_first", [False, True])


def images(dtype=torch.float64, batch=3):
    return torch.randn(batch, 2, 6, 6, dtype=dtype)


def loss_of(model, x, y=LABELS):
    z, _, logdets = model(x, y)
    return model.loss(z, logdets)


def gradients(model, x, y=LABELS):
    names = [name for name, _ in model.named_parameters()]
    return dict(
        zip(names, torch.autograd.grad(loss_of(model, x, y), model.parameters()), strict=True)
    )


def jacobian_logdet(function, x):
    jacobian = torch.autograd.functional.jacobian(function, x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), -1))[1]


# --- density -------------------------------------------------------------------------------------


@by_direction
@by_parts
def test_log_det_is_that_of_the_jacobian(parts, reverse_first):
    model = small(parts, num_blocks=1, layers_per_block=2, reverse_first=reverse_first)
    assert model.blocks[0].reverse == reverse_first
    x, y = images(batch=1), LABELS[2:]
    expected = jacobian_logdet(lambda x: model(x, y)[0], x)
    assert abs(model(x, y)[2].item() * x.numel() - expected.item()) < 1e-9
    if model.nvp:
        assert abs(expected) > 1e-2


@by_parts
def test_transform_tells_the_log_det_of_each_block(parts):
    model = small(parts)
    x, y = images(batch=1), LABELS[:1]
    outputs, logdets = model.transform(x, y)
    z, same, total = model(x, y)
    assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))
    assert torch.equal(outputs[-1], z)
    assert logdets.shape == (3, 1)
    torch.testing.assert_close(logdets.sum(0), total)
    for i, block in enumerate(model.blocks[1:]):
        expected = jacobian_logdet(lambda t, block=block: block(t, y)[0], outputs[i])
        assert abs(logdets[i + 1].item() * x.numel() - expected.item()) < 1e-9


@by_direction
@by_parts
def test_reverse_inverts_forward(parts, reverse_first):
    model = small(parts, reverse_first=reverse_first)
    x = images()
    z = model(x, LABELS)[0]
    assert (model.reverse(z, LABELS) - x).abs().max() < 1e-9
    noise = torch.randn_like(z)
    assert (model(model.reverse(noise, LABELS), LABELS)[0] - noise).abs().max() < 1e-9


@by_direction
@by_parts
def test_parameters_see_earlier_tokens_alone(parts, reverse_first):
    """``out[i, j]``: how much the parameters of the i-th token depend on the j-th, in order."""
    model = small(parts, num_blocks=1, layers_per_block=2, reverse_first=reverse_first)
    block, x = model.blocks[0], torch.randn(1, 9, 8, dtype=torch.float64)
    out = torch.autograd.functional.jacobian(lambda x: block.params(x)[0], x)[:, :, 0]
    out = out.abs().amax((1, 3))
    out = out.flip(1) if reverse_first else out
    seen = torch.ones(9, 9).tril(-1 if block.parts.shift == "input" else 0).bool()
    assert (out[seen] > 1e-9).all()
    assert (out[~seen] == 0).all()


@by_direction
@by_parts
def test_a_block_is_what_its_parts_say(parts, reverse_first):
    """Against the formulas, written once more without anything of the package."""
    model = small(parts, num_blocks=1, layers_per_block=2, reverse_first=reverse_first)
    block, x = model.blocks[0], torch.randn(3, 9, 8, dtype=torch.float64)
    params = block.params(x, LABELS)
    expected = plain_params(block, x.flip(1) if reverse_first else x, LABELS)
    torch.testing.assert_close(params, expected, rtol=1e-9, atol=1e-9)
    z, logdet = block(x, LABELS)
    if block.parts.shift == "output":
        expected = torch.cat([torch.zeros_like(expected[:, :1]), expected[:, :-1]], 1)
    expected = expected.flip(1) if reverse_first else expected
    a, b = expected.split(8, 2) if model.nvp else (torch.zeros_like(expected), expected)
    torch.testing.assert_close(z, (x - b) / a.exp())
    torch.testing.assert_close(logdet, -a.sum((1, 2)))


@pytest.mark.parametrize("parts", ["starflow", "rms"])
def test_denoise_follows_the_score(parts):
    model, x, epsilon = small(parts), images(), 1e-6
    step, direction = model.denoise(x, LABELS, 0.3) - x, torch.randn_like(x)
    up, down = (model.log_prob(x + s * epsilon * direction, LABELS) for s in (1, -1))
    slope = (up - down) / (2 * epsilon)
    torch.testing.assert_close(
        (step * direction).sum((1, 2, 3)), 0.09 * slope, rtol=1e-5, atol=1e-7
    )


def test_bits_per_dim_and_loss_are_the_density():
    model, x = small("starflow"), images()
    z, _, logdets = model(x, LABELS)
    nats = model.log_prob(x, LABELS)
    constant = 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(
        model.loss(z, logdets), -nats.mean() / 72 - constant, rtol=1e-6, atol=1e-6
    )
    bits = model.bits_per_dim(x, LABELS)
    torch.testing.assert_close(bits, -nats / 72 / math.log(2) + 7)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z.detach()).sum((1, 2))
    torch.testing.assert_close(nats, normal + 72 * logdets)


def test_it_learns():
    """Latents whose pixels are those of the first row but for little noise."""
    torch.manual_seed(1)
    model = TarFlow.starflow(
        *(2, 4, 1), channels=[32, 64], num_blocks=2, layers_per_block=[1, 2], head_dim=32
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(80):
        x = torch.randn(64, 2, 1, 4).repeat(1, 1, 4, 1) + 0.05 * torch.randn(64, 2, 4, 4)
        losses.append(loss_of(model, x, None))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.8
    assert all(torch.isfinite(loss) for loss in losses)
    with torch.no_grad():
        drawn = model.sample(64, rng=torch.tensor([0, 0]))
    rows = drawn - drawn.mean(2, keepdim=True)
    assert rows.square().mean() < 0.5 * drawn.square().mean()


# --- the parts -----------------------------------------------------------------------------------


@given(st.floats(-1e4, 1e4), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=200, deadline=None)
def test_log_softplus(value, dtype):
    u = torch.tensor(value, dtype=dtype, requires_grad=True)
    exact = u.item()
    softplus = math.exp(exact) if exact < -40 else math.log1p(math.exp(min(exact, 40)))
    expected = exact if exact < -40 else math.log(max(softplus, exact))
    slope = 1.0 if exact < -40 else 1 / (1 + math.exp(-exact)) / max(softplus, exact)
    actual = log_softplus(u)
    (grad,) = torch.autograd.grad(actual, u)
    eps = torch.finfo(dtype).eps
    assert abs(actual.item() - expected) <= 8 * eps * max(1, abs(expected))
    assert abs(grad.item() - slope) <= 8 * eps * slope


def test_a_scale_of_softplus_starts_at_one():
    assert torch.nn.functional.softplus(torch.tensor(UNIT_SOFTPLUS)).item() == pytest.approx(1)
    parts = BlockParts(scale="softplus", soft_clip=4.0)
    assert parts.affine_params(torch.zeros(1, 1, 4), nvp=True).abs().max() < 1e-7


def test_soft_clip_bounds_the_output_and_keeps_small_ones():
    parts = BlockParts(soft_clip=4.0)
    out = torch.tensor([-1e6, -1e-3, 0.0, 1e-3, 1e6])
    clipped = parts.affine_params(out, nvp=True)
    torch.testing.assert_close(clipped, torch.tensor([-4, -1e-3, 0, 1e-3, 4]))


def test_plain_parts_hand_the_output_on_as_it_is():
    out = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert BlockParts(shift="input", norm="rms").affine_params(out, nvp=True) is out
    assert TARFLOW.changed() == {}
    clipped = BlockParts(soft_clip=4.0).affine_params(out, nvp=True)
    assert clipped.dtype == torch.float32
    assert torch.equal(clipped, 4 * torch.tanh(out.float() / 4))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [3, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_unshifted_update_is_the_shifted_one_of_one_token_more(reverse, width, dtype):
    x, params = torch.randn(2, 5, 3), torch.randn(2, 5, width).to(dtype)
    x = x.double() if dtype == torch.float64 else x
    z, logdet = affine_update_unshifted(x, params, reverse=reverse)
    more = torch.zeros(2, 1, 3, dtype=x.dtype)
    ends = [x, more] if reverse else [more, x]
    one_more = torch.cat([params, params[:, :1]], 1)
    expected, expected_logdet = affine_update(torch.cat(ends, 1), one_more, reverse=reverse)
    expected = expected[:, :-1] if reverse else expected[:, 1:]
    assert z.dtype == x.dtype
    assert logdet.dtype == expected_logdet.dtype
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(logdet, expected_logdet)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    norm = RMSNorm(8).to(dtype)
    norm.weight.data = torch.randn(8).to(dtype)
    h = (100 * torch.randn(3, 5, 8)).to(dtype)
    wide = h.double()
    rms = (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(h).dtype == dtype
    torch.testing.assert_close(norm(h), (wide / rms * (1 + norm.weight.double())).to(dtype))
    assert torch.equal(RMSNorm(8).weight, torch.zeros(8))


def test_rotary_angles_are_those_of_rows_and_columns():
    cos, sin = rotary_table(9, 24, torch.zeros((), dtype=torch.float64))
    assert cos.shape == sin.shape == (9, 1, 12)
    for i in range(9):
        row, column = divmod(i, 3)
        angles = [row, row / 100, column, column / 100, *([0.0] * 8)]
        for j, angle in enumerate(angles):
            assert cos[i, 0, j].item() == pytest.approx(math.cos(angle), abs=1e-15)
            assert sin[i, 0, j].item() == pytest.approx(math.sin(angle), abs=1e-15)


def test_scores_of_turned_vectors_depend_on_the_distance_alone():
    table = rotary_table(16, 32, torch.zeros((), dtype=torch.float64))
    q, k = torch.randn(2, 32, dtype=torch.float64)
    q, k = (rotate(t.expand(1, 16, 1, 32), table)[0, :, 0] for t in (q, k))
    scores = (q @ k.T).view(4, 4, 4, 4)  # rows and columns of the query, of the key
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1])
    assert (scores[0, 0, 0, 0] - scores[0, 0, 0, 1]).abs() > 1e-3
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3
    torch.testing.assert_close(q.norm(dim=1), q.norm(dim=1)[:1].expand(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_stay_fp32_whatever_the_weights(dtype):
    block = small("rotary", dtype=dtype).blocks[0]
    cos, sin = block.rotary(torch.zeros(1, dtype=dtype))
    assert cos.dtype == sin.dtype == torch.float32
    exact = rotary_table(9, 24, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(cos.double(), exact[0], rtol=0, atol=1e-6)
    x = torch.randn(1, 9, 2, 24).to(dtype)
    assert rotate(x, (cos, sin)).dtype == dtype


# --- dtypes, compilation, memory -----------------------------------------------------------------


@by_parts
def test_autocast_leaves_the_affine_step_in_fp32(parts):
    model, x = small(parts, dtype=torch.float32), images(torch.float32)
    z, _, logdets = model(x, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        narrow_z, outputs, narrow_logdets = model(x, LABELS)
        block = model.blocks[0]
        params = block.params(outputs[0], LABELS)
        _, logdet = block(outputs[0], LABELS)
    assert narrow_z.dtype == narrow_logdets.dtype == torch.float32
    torch.testing.assert_close(narrow_z, z, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(narrow_logdets, logdets, rtol=2e-2, atol=2e-2)
    assert not torch.equal(narrow_z, z)
    if model.nvp:
        a = params[..., :8].double()
        a = a if block.parts.shift == "input" else a[:, :-1]
        torch.testing.assert_close(logdet.double(), -a.sum((1, 2)), rtol=1e-6, atol=1e-5)
    if block.parts.soft_clip or (block.parts.scale == "softplus" and model.nvp):
        assert params.dtype == torch.float32


@by_parts
def test_weights_in_bf16(parts):
    wide = small(parts, dtype=torch.float32)
    model, x = copy.deepcopy(wide).bfloat16(), images(torch.float32)
    z, _, logdets = model(x.bfloat16(), LABELS)
    assert z.dtype == torch.bfloat16
    assert logdets.dtype == torch.float32
    torch.testing.assert_close(z.float(), wide(x, LABELS)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("parts", "checkpoint_blocks"),
    [("starflow", False), ("starflow", True), ("starflow", "selective"), ("rms", False)],
)
def test_compiled_equals_eager(parts, checkpoint_blocks):
    torch.compiler.reset()
    plain, x = small(parts, channels=24, num_blocks=2), images()
    model = copy.deepcopy(plain)
    model.checkpoint_blocks = checkpoint_blocks
    model.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(loss_of(model, x), loss_of(plain, x))
    expected = gradients(plain, x)
    for name, gradient in gradients(model, x).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    torch.compiler.reset()


@pytest.mark.parametrize("checkpoint_blocks", [True, "selective"])
@by_parts
def test_checkpoints_give_the_same_bits(parts, checkpoint_blocks):
    model, x = small(parts, dtype=torch.float32), images(torch.float32)
    plain, denoised = gradients(model, x), model.denoise(x, LABELS, 0.1)
    model.checkpoint_blocks = checkpoint_blocks
    again = gradients(model, x)
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name
    assert torch.equal(model.denoise(x, LABELS, 0.1), denoised)


def test_every_parameter_learns():
    model = small("starflow", dtype=torch.float32)
    for name, gradient in gradients(model, images(torch.float32)).items():
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_nothing_depends_on_values(checkpoint_blocks):
    """Meta tensors have none: whatever looks at one raises, as it would wait for a GPU."""
    model = small("starflow", dtype=torch.float32, checkpoint_blocks=checkpoint_blocks).to("meta")
    x, y = images(torch.float32).to("meta"), LABELS.to("meta")
    loss_of(model, x, y).backward()
    assert all(p.grad is not None for p in model.parameters())


# --- sizes, files, refusals ----------------------------------------------------------------------


def test_widths_and_layers_by_block():
    model = small(channels=[24, 24, 48], layers_per_block=(1, 1, 3))
    assert [block.proj_in.out_features for block in model.blocks] == [24, 24, 48]
    assert [len(block.attn_blocks) for block in model.blocks] == [1, 1, 3]
    assert [block.num_heads for block in model.blocks] == [1, 1, 2]
    assert model.config["layers_per_block"] == [1, 1, 3]
    x = images()
    assert (
        model.reverse(model(x, LABELS)[0], LABELS, method="jacobi", tol=0.0) - x
    ).abs().max() < (1e-9)


def test_one_line_gives_starflow():
    sizes = {"channels": 24, "num_blocks": 2, "layers_per_block": [1, 2], "head_dim": 24}
    model = TarFlow.starflow(2, 6, 2, **sizes)
    assert STARFLOW.items() <= model.config.items()
    assert [block.reverse for block in model.blocks] == [True, False]
    assert model.blocks[1].parts == BlockParts(
        shift="input", scale="softplus", soft_clip=4.0, final_norm=True, positions="rotary"
    )
    assert "soft_clip" not in TarFlow.starflow(2, 6, 2, **sizes, soft_clip=0.0).config


def test_weights_have_the_published_names():
    names = {name for name in small("starflow", norm="rms").state_dict() if name[:9] != "blocks.1."}
    layer = "blocks.0.attn_blocks.0."
    expected = {"blocks.0.sos_embed", "blocks.0.final_norm.weight"}
    expected |= {layer + "attention.norm.weight", layer + "mlp.norm.weight"}
    assert expected <= names
    assert not any(name.endswith(("pos_embed", "norm.bias")) for name in names)


def test_a_plain_model_is_as_it_was():
    model = TarFlow(2, 8, 2, 16, 2, 1, head_dim=8)
    assert list(model.config) == [
        *("in_channels", "img_size", "patch_size", "channels", "num_blocks", "layers_per_block"),
        *("nvp", "num_classes", "head_dim", "expansion"),
    ]
    assert {name.removeprefix("blocks.0.") for name in model.state_dict() if "s.1" not in name} == {
        *("var", "pos_embed", "proj_in.weight", "proj_in.bias", "proj_out.weight", "proj_out.bias"),
        *(
            f"attn_blocks.0.{name}.{kind}"
            for name in (
                *("attention.norm", "attention.qkv", "attention.proj"),
                *("mlp.norm", "mlp.main.0", "mlp.main.2"),
            )
            for kind in ("weight", "bias")
        ),
    }


@by_parts
def test_files_hold_the_parts(parts, tmp_path):
    model = small(parts, dtype=torch.float32, channels=[24, 24, 48])
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    x = images(torch.float32)
    assert torch.equal(loaded(x, LABELS)[0], model(x, LABELS)[0])


def test_files_of_earlier_versions_load(tmp_path):
    model = small(dtype=torch.float32)
    keys = ["in_channels", "img_size", "patch_size", "channels", "num_blocks", "layers_per_block"]
    keys += ["nvp", "num_classes", "head_dim", "expansion"]
    config = {key: model.config[key] for key in keys}
    save_tensors(tmp_path / "model.safetensors", model.state_dict(), {"config": config})
    loaded, x = load_model(tmp_path / "model.safetensors"), images(torch.float32)
    assert loaded.blocks[0].parts == TARFLOW
    assert torch.equal(loaded(x, LABELS)[0], model(x, LABELS)[0])


def test_weights_of_other_parts_are_named(tmp_path):
    model = small("starflow", dtype=torch.float32)
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.0\.sos_embed is not in the model"):
        load_model(tmp_path / "model.safetensors", shift="output")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"shift": "none"}, "shift: expected 'output' or 'input', got 'none'"),
        ({"scale": "relu"}, "scale: expected 'exp' or 'softplus', got 'relu'"),
        ({"norm": None}, "norm: expected 'layer' or 'rms', got None"),
        ({"positions": "sine"}, "positions: expected 'learned' or 'rotary', got 'sine'"),
        ({"final_norm": "rms"}, "final_norm: expected False or True, got 'rms'"),
        ({"soft_clip": -1.0}, "soft_clip: expected a finite number, at least 0, got -1.0"),
        ({"soft_clip": math.nan}, "soft_clip: expected a finite number"),
        ({"soft_clip": True}, "soft_clip: expected a finite number"),
        ({"scale": "softplus", "nvp": False}, "scale: expected 'exp' for nvp=False"),
        (
            {"positions": "rotary", "head_dim": 16, "channels": 16},
            "head_dim: expected a multiple of 4, at least 20, for rotary positions, got 16",
        ),
        ({"positions": "rotary", "head_dim": 22, "channels": 22}, "head_dim: .* got 22"),
        ({"channels": [24, 48]}, r"channels: .* for each of 3 blocks, got \[24, 48\]"),
        ({"channels": [24, 48, 20]}, r"channels: expected a multiple of 24, got \[24, 48, 20\]"),
        (
            {"layers_per_block": [1, 0, 2]},
            r"layers_per_block: expected an integer of at least 1 for",
        ),
        ({"layers_per_block": [1, 2.0, 2]}, r"layers_per_block: .* got \[1, 2.0, 2\]"),
        ({"layers_per_block": 1.5}, "layers_per_block: expected an integer of at least 1, got 1.5"),
    ],
    ids=str,
)
def test_refusals(arguments, match):
    config = {"in_channels": 2, "img_size": 6, "patch_size": 2, "channels": 24, "num_blocks": 3}
    config |= {"layers_per_block": 1, "head_dim": 24}
    with pytest.raises(ValueError, match=match):
        TarFlow(**(config | arguments))
