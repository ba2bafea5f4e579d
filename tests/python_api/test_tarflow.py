import pytest
import torch

import golden_tarflow
from flowops.api import TarFlow, gaussian_noise, patchify, uniform_dequantize, unpatchify
from flowops.api.tarflow import TarFlowBlock

#: All of them are to give the exact result.
SOLVERS = [
    {"method": "exact"},
    *({"method": m, "window": n, "tol": 0.0} for m in ("jacobi", "auto") for n in (1, 3, 16)),
]


@pytest.fixture(scope="module")
def golden():
    return golden_tarflow.load()


@pytest.fixture
def golden_model(golden):
    config, weights, _ = golden
    model = TarFlow(**config)
    model.load_state_dict(weights)
    return model


def small(dtype=torch.float64, **kwargs):
    """A model whose blocks are not the identity."""
    config = {"in_channels": 2, "img_size": 4, "patch_size": 2, "channels": 16, "head_dim": 8}
    config |= {"num_blocks": 2, "layers_per_block": 1, "num_classes": 3} | kwargs
    model = TarFlow(**config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_golden_forward(golden, golden_model):
    *_, g = golden
    for suffix, y in (("", g["in.y"]), ("_dropped", g["in.y_dropped"]), ("_none", None)):
        z, outputs, logdets = golden_model(g["in.x"], y)
        assert relative(z, g[f"out.z{suffix}"]) < 1e-5
        assert relative(logdets, g[f"out.logdet{suffix}"]) < 1e-5
        if not suffix:
            assert len(outputs) == 2
            assert relative(outputs[0], g["out.block0"]) < 1e-5
            assert relative(outputs[1], g["out.block1"]) < 1e-5
    assert relative(golden_model.bits_per_dim(g["in.x"], g["in.y"]), g["out.bits_per_dim"]) < 1e-5


def test_golden_loss_and_gradients(golden, golden_model):
    *_, g = golden
    x = g["in.x"].clone().requires_grad_()
    z, _, logdets = golden_model(x, g["in.y"])
    loss = golden_model.loss(z, logdets)
    assert relative(loss, g["out.loss"]) < 1e-5
    loss.backward()
    parameters = dict(golden_model.named_parameters())
    checked = 0
    for key, expected in g.items():
        if key.startswith("out.grad."):
            name = key.removeprefix("out.grad.")
            actual = x.grad if name == "x" else parameters[name].grad
            assert relative(actual, expected) < 1e-5, name
            checked += 1
    assert checked == 4


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: "-".join(map(str, solver.values())))
@pytest.mark.parametrize("kind", golden_tarflow.SAMPLES)
def test_golden_samples(golden, golden_model, kind, solver):
    *_, g = golden
    arguments = dict(golden_tarflow.SAMPLES[kind])
    y = g["in.y"] if arguments.pop("y", None) else None
    noise = g["in.noise"].clone()
    images = golden_model.reverse(noise, y, **arguments, **solver)
    assert relative(images, g[f"out.sample.{kind}"]) < 1e-4
    assert torch.equal(noise, g["in.noise"])


def test_reverse_returns_the_sequence_of_images(golden, golden_model):
    *_, g = golden
    sequence = golden_model.reverse(g["in.noise"], g["in.y"], return_sequence=True)
    assert len(sequence) == 3
    assert torch.equal(sequence[0], unpatchify(g["in.noise"], 2, 8))
    assert torch.equal(sequence[-1], golden_model.reverse(g["in.noise"], g["in.y"]))


def test_a_reference_checkpoint_brings_its_mask(golden, golden_model):
    state = golden_model.state_dict()
    for b in range(2):
        state[f"blocks.{b}.attn_mask"] = torch.ones(16, 16).tril()
    golden_model.load_state_dict(state)
    assert "blocks.0.attn_mask" in state
    assert not any("attn_mask" in key for key in golden_model.state_dict())


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_log_det_is_that_of_the_jacobian(nvp, num_classes):
    model = small(nvp=nvp, num_classes=num_classes)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    y = torch.tensor([1]) if num_classes else None
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, y)[0], x)
    expected = torch.linalg.slogdet(jacobian.reshape(32, 32))[1]
    assert abs(model(x, y)[2].item() * 32 - expected.item()) < 1e-10


@pytest.mark.parametrize("nvp", [True, False])
def test_transform_tells_the_log_det_of_each_block(nvp):
    model = small(nvp=nvp, num_blocks=3)
    x, y = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.tensor([1, 0, -1, 2])
    outputs, logdets = model.transform(x, y)
    z, same, total = model(x, y)
    assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))
    assert torch.equal(outputs[-1], z)
    assert logdets.shape == (3, 4)
    assert torch.equal(logdets.sum(0), total)
    tokens = patchify(x, 2)
    for i, block in enumerate(model.blocks):
        expected, logdet = block(tokens, y)
        assert torch.equal(outputs[i], expected)
        assert torch.equal(logdets[i], logdet / 32)
        tokens = expected


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_reverse_inverts_forward(nvp, patch_size):
    model = small(nvp=nvp, patch_size=patch_size, num_blocks=3)
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, -1, 0])
    z = model(x, y)[0]
    assert (model.reverse(z, y) - x).abs().max() < 1e-9
    assert (model(model.reverse(z, y), y)[0] - z).abs().max() < 1e-9


def test_a_dropped_label_is_no_label_in_both_directions():
    model = small()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    dropped = torch.tensor([-1, 2, -1])
    z, z_none = model(x, dropped)[0], model(x)[0]
    torch.testing.assert_close(z[[0, 2]], z_none[[0, 2]])
    assert (z[1] - z_none[1]).abs().max() > 1e-3
    torch.testing.assert_close(model.reverse(z, dropped)[[0, 2]], model.reverse(z)[[0, 2]])


def test_vp_prior_follows_the_noise_and_scales_samples():
    model = small(nvp=False)
    x = 3 * torch.randn(64, 2, 4, 4, dtype=torch.float64)
    y = torch.zeros(64, dtype=torch.long)
    for _ in range(100):
        model.update_prior(model(x, y)[0])
    z = model(x, y)[0]
    torch.testing.assert_close(model.var, z.square().mean(0), rtol=1e-3, atol=0)
    unit = z / model.var.sqrt()
    torch.testing.assert_close(model.reverse(unit, y), x)
    density = torch.distributions.Normal(0.0, model.var.sqrt()).log_prob(z).sum((1, 2))
    torch.testing.assert_close(model.log_prob(x, y), density)


def test_bits_per_dim_is_the_density_on_the_pixel_scale():
    model = small()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    nats = model.log_prob(x) - 32 * torch.log(torch.tensor(128.0))
    expected = -nats / 32 / torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(model.bits_per_dim(x), expected, rtol=1e-6, atol=0)


def test_loss_is_the_density_per_dimension():
    model = small()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    z, _, logdets = model(x)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    expected = -model.log_prob(x).mean() / 32 - constant
    torch.testing.assert_close(model.loss(z, logdets).double(), expected, rtol=1e-6, atol=1e-6)


def test_denoise_follows_the_score_and_leaves_no_weight_gradients():
    model = small()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    step, epsilon = model.denoise(x, y, 0.3) - x, 1e-6
    direction = torch.randn_like(x)
    slope = (
        model.log_prob(x + epsilon * direction, y) - model.log_prob(x - epsilon * direction, y)
    ) / (2 * epsilon)
    torch.testing.assert_close(
        (step * direction).sum((1, 2, 3)), 0.09 * slope, rtol=1e-5, atol=1e-7
    )
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.denoise(x, y, 0.3) - x, step)


def test_sample_depends_on_rng_and_index_alone():
    model = small(torch.float32)
    rng = torch.tensor([3, 0])
    images = model.sample(7, 1, rng=rng)
    assert images.shape == (7, 2, 4, 4)
    torch.testing.assert_close(model.sample(7, 1, rng=rng, batch_size=2), images)
    torch.testing.assert_close(model.sample(3, 1, rng=rng), images[:3])
    labels = torch.tensor([1, 1, 0])
    torch.testing.assert_close(model.sample(3, labels, rng=rng)[:2], images[:2])
    assert not torch.allclose(model.sample(3, labels, rng=rng)[2], images[2])
    denoised = model.sample(7, 1, rng=rng, denoise_std=0.1)
    torch.testing.assert_close(denoised, model.denoise(images, torch.full((7,), 1), 0.1))


def test_guidance_needs_something_to_guide_by():
    model = small(torch.float32, num_classes=0)
    noise = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match="guidance: the model has no classes"):
        model.reverse(noise, guidance=1.0)
    plain = model.reverse(noise)
    assert not torch.allclose(model.reverse(noise, guidance=1.0, attn_temp=0.5), plain)


@pytest.mark.parametrize("what", ["a", "b", "ab", "ba"])
@pytest.mark.parametrize("nvp", [True, False])
def test_guidance_of_zero_weight_changes_nothing(what, nvp):
    model = small(nvp=nvp)
    noise = torch.randn(2, 4, 8, dtype=torch.float64)
    y = torch.tensor([0, 1])
    plain = model.reverse(noise, y)
    torch.testing.assert_close(model.reverse(noise, y, 1e-300, what), plain)
    guided = model.reverse(noise, y, 2.0, what)
    assert torch.allclose(guided, plain) == (what == "a" and not nvp)


def test_patchify_is_unfold_order():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 4, 12)
    assert torch.equal(tokens[0, 1], x[0, :, 0:2, 2:4].flatten())
    assert torch.equal(unpatchify(tokens, 2, 4), x)


def test_training_noise():
    x = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    rng = torch.tensor([1, 2])
    noisy = uniform_dequantize(x, rng)
    level = torch.floor((noisy + 1) * 128)
    torch.testing.assert_close(
        level.clamp(max=255).flatten()[:-1], torch.arange(255.0), atol=1, rtol=0
    )
    assert noisy.min() >= -1
    assert noisy.max() <= 1
    big = torch.zeros(64, 1, 32, 32)
    assert abs(gaussian_noise(big, 0.25, rng).std().item() - 0.25) < 0.005


def test_training_noise_of_a_part_of_the_batch():
    x, rng = images(7, 3, 5, 5), torch.tensor([1, 2])
    for noisy in (
        lambda x, **rows: gaussian_noise(x, 0.3, rng, **rows),
        lambda x, **rows: uniform_dequantize(x, rng, **rows),
    ):
        whole = noisy(x)
        parts = [noisy(x[a:b], first_row=a) for a, b in ((0, 2), (2, 3), (3, 7))]
        assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(noisy(x[2:3]), whole[2:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_stays_close(dtype):
    if dtype == torch.float16:
        pytest.skip("fp16 matrix products on the CPU are only emulated")
    wide = small(torch.float32)
    half = TarFlow(**wide.config).to(dtype)
    half.load_state_dict(wide.state_dict())
    x = torch.randn(4, 2, 4, 4)
    z, _, logdets = half(x.to(dtype))
    assert logdets.dtype == torch.float32
    assert relative(z.float(), wide(x)[0]) < 0.1
    noise = torch.randn(4, 4, 8)
    assert relative(half.reverse(noise), wide.reverse(noise)) < 0.2


def test_autocast_keeps_affine_and_log_det_in_fp32():
    model = small(torch.float32)
    x = torch.randn(4, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        z, _, logdets = model(x)
        images = model.reverse(z)
    assert z.dtype == logdets.dtype == images.dtype == torch.float32
    torch.testing.assert_close(z, model(x)[0], rtol=0.1, atol=0.1)
    torch.testing.assert_close(images, x, rtol=0.1, atol=0.2)


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    model = small(torch.float32)
    x, y = torch.randn(3, 2, 4, 4), torch.tensor([0, -1, 2])

    def loss(x):
        z, _, logdets = model(x, y)
        return model.loss(z, logdets)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = loss(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    names = [name for name, p in model.named_parameters()]
    parameters = list(model.parameters())
    for name, a, b in zip(
        names,
        torch.autograd.grad(actual, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=name)


def test_the_untrained_model_is_nearly_the_identity():
    model = TarFlow(1, 8, 2, 64, 2, 1)
    assert all(bool((b.proj_out.weight == 0).all()) for b in model.blocks)
    assert [b.reverse for b in model.blocks] == [False, True]
    assert isinstance(model.blocks[0], TarFlowBlock)


def images(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


@pytest.mark.parametrize(
    ("x", "y", "error", "match"),
    [
        ("picture", None, TypeError, "x: expected a floating tensor, got str"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.uint8), None, TypeError, "x: .*torch.uint8"),
        (images(2, 4, 4), None, ValueError, r"x: expected \[B >= 1, 2, 4, 4\], got \[2, 4, 4\]"),
        (images(0, 2, 4, 4), None, ValueError, "x: expected .*B >= 1"),
        (images(1, 3, 4, 4), None, ValueError, "x: expected"),
        (images(2, 2, 4, 4), torch.tensor([0]), ValueError, r"y: expected \[2\], got \[1\]"),
        (
            images(1, 2, 4, 4),
            torch.tensor([3]),
            ValueError,
            "y: expected labels from 0 to 2.*got 3",
        ),
        (images(1, 2, 4, 4), torch.tensor([-2]), ValueError, "y: expected labels .*got -2"),
        (images(1, 2, 4, 4), torch.tensor([0.0]), TypeError, "y: expected integer labels"),
        (images(1, 2, 4, 4), [0], TypeError, "y: expected integer labels, got list"),
        (images(1, 2, 4, 4, device="meta"), None, ValueError, "x: expected a tensor on cpu"),
    ],
)
def test_bad_images_and_labels(x, y, error, match):
    with pytest.raises(error, match=match):
        small(torch.float32)(x, y)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"noise": images(2, 4, 7)}, r"noise: expected \[B >= 1, 4, 8\]"),
        ({"guidance": -1.0}, "guidance: expected a finite number"),
        ({"guidance": float("nan")}, "guidance: expected a finite number"),
        ({"guide_what": "c"}, "guide_what: expected letters out of 'ab', got 'c'"),
        ({"attn_temp": 0.0}, "attn_temp: expected a positive number"),
        ({"y": torch.tensor([0, 5])}, "y: expected labels from 0 to 2"),
    ],
)
def test_bad_sampling_arguments(arguments, match):
    arguments = {"noise": images(2, 4, 8)} | arguments
    with pytest.raises(ValueError, match=match):
        small(torch.float32).reverse(**arguments)


def test_labels_for_an_unconditional_model():
    with pytest.raises(ValueError, match="y: the model was built without classes"):
        small(torch.float32, num_classes=0)(images(1, 2, 4, 4), torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": 0}, "n: expected a positive number of images, got 0"),
        ({"n": 2, "y": 3}, "y: expected labels from 0 to 2.*got 3"),
        ({"n": 2, "batch_size": 0}, "batch_size: expected a positive number"),
    ],
)
def test_bad_sample_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        small(torch.float32).sample(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"patch_size": 3}, "patch_size: expected a divisor of img_size 8, got 3"),
        ({"channels": 100}, "channels: expected a multiple of 64, got 100"),
        ({"num_blocks": 0}, "num_blocks: expected an integer of at least 1, got 0"),
        ({"num_classes": -1}, "num_classes: expected an integer of at least 0, got -1"),
        ({"img_size": 8.0}, "img_size: expected an integer"),
    ],
)
def test_bad_constructor_arguments(arguments, match):
    config = {"in_channels": 1, "img_size": 8, "patch_size": 2, "channels": 64}
    config |= {"num_blocks": 2, "layers_per_block": 1} | arguments
    with pytest.raises(ValueError, match=match):
        TarFlow(**config)
