"""Token by token sampling in PyTorch: blocks of STARFlow's parts, and Gaussian guidance of all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from flowops.api import batching, sampling
from flowops.api.decode import gaussian_guidance
from plain_starflow import CONFIGS, plain_params, small

RNG = torch.tensor([3, 0])
LABELS = torch.tensor([0, 2, -1])
GUIDES = {
    "none": {},
    "linear": {"guidance": 0.7},
    "scales": {"guidance": 0.7, "guide_what": "a"},
    "shifts": {"guidance": 0.7, "guide_what": "b", "attn_temp": 0.5},
    "annealed": {"guidance": 0.7, "annealed_guidance": True},
    "gaussian": {"guidance": 1.5, "guidance_kind": "gaussian"},
    "gaussian-annealed": {
        "guidance": 1.5,
        "guidance_kind": "gaussian",
        "annealed_guidance": True,
        "attn_temp": 0.5,
    },
}
#: Those whose blocks the decode kernels know as well.
KERNELS = {"plain": {}, "vp": {"nvp": False}}

by_guide = pytest.mark.parametrize("guide", GUIDES)


def noise(batch=3, dtype=torch.float64):
    return torch.randn(batch, 9, 8, dtype=dtype)


def uncached(block, z, y, guide):
    """A block's inverse by the formulas: the whole network for every token."""
    weight, what = guide.get("guidance", 0.0), guide.get("guide_what", "ab")
    z = z.flip(1) if block.reverse else z
    first = 0 if block.parts.shift == "input" else 1
    x, T = z.clone(), z.shape[1]
    for j in range(first, T):
        i = j - first
        temperature = guide.get("attn_temp", 1.0)
        passes = [plain_params(block, x, y)[:, i], plain_params(block, x, None, temperature)[:, i]]
        if not block.nvp:
            passes = [torch.cat([torch.zeros_like(p), p], 1) for p in passes]
        (a, b), (a_u, b_u) = (p.chunk(2, 1) for p in passes)
        w = weight * (i + 1) / (T - first) if guide.get("annealed_guidance") else weight
        if guide.get("guidance_kind") == "gaussian":
            sigma, sigma_u = a.exp(), a_u.exp()
            s = (sigma / sigma_u).clamp(max=1) ** 2
            q = 1 + w - w * s
            a, b = (sigma / q.sqrt()).log(), ((1 + w) * b - w * s * b_u) / q
        elif weight:
            a = a + w * (a - a_u) if "a" in what else a
            b = b + w * (b - b_u) if "b" in what else b
        x[:, j] = z[:, j] * a.exp() + b
    return x.flip(1) if block.reverse else x


@by_guide
@pytest.mark.parametrize("parts", [*CONFIGS, *KERNELS])
def test_samples_are_those_of_the_formulas(parts, guide):
    model = small(parts, num_blocks=2, channels=24, **KERNELS.get(parts, {}))
    z = x = noise()
    for block in reversed(model.blocks):
        x = uncached(block, x, LABELS, GUIDES[guide])
    images, blocks = model.reverse(z, LABELS, **GUIDES[guide], return_sequence=True), []
    model.reverse(z, LABELS, **GUIDES[guide], on_block=blocks.append)
    torch.testing.assert_close(blocks[-1], x, rtol=1e-7, atol=1e-7)
    assert len(images) == 3
    if guide != "none" and (model.nvp or guide != "scales"):
        assert (images[-1] - model.reverse(z, LABELS)).abs().max() > 1e-4


# --- guidance ------------------------------------------------------------------------------------

numbers = st.floats(-3, 3)


@given(numbers, numbers, numbers, st.floats(0, 3), st.floats(0, 8))
@settings(deadline=None)
def test_gaussian_guidance_is_the_normalised_product(a, b, b_u, wider, w):
    """``(1 + w) log p - w log p_u`` and the log-density differ by a constant."""
    a, b, a_u, b_u = (torch.tensor([v], dtype=torch.float64) for v in (a, b, a + wider, b_u))
    log_sigma, mean = gaussian_guidance(a, b, a_u, b_u, w)
    x = mean + log_sigma.exp() * torch.linspace(-2, 2, 9, dtype=torch.float64)
    product = (1 + w) * Normal(b, a.exp()).log_prob(x) - w * Normal(b_u, a_u.exp()).log_prob(x)
    rest = product - Normal(mean, log_sigma.exp()).log_prob(x)
    assert (rest - rest[0]).abs().max() < 1e-8 * (1 + product.abs().max())


@given(numbers, numbers, numbers, st.floats(0, 3), st.floats(0, 8))
@settings(deadline=None)
def test_a_wider_density_is_guided_as_one_of_the_same_width(a, b, b_u, wider, w):
    """There the product is none, and the rule is the linear one."""
    a, b, a_u, b_u = (torch.tensor(v, dtype=torch.float64) for v in (a, b, a - wider, b_u))
    log_sigma, mean = gaussian_guidance(a, b, a_u, b_u, w)
    torch.testing.assert_close(log_sigma, a)
    torch.testing.assert_close(mean, b + w * (b - b_u))


def test_no_weight_is_no_guidance():
    a, b, a_u, b_u = torch.randn(4, 5, dtype=torch.float64)
    log_sigma, mean = gaussian_guidance(a, b, a_u, b_u, 0.0)
    assert torch.equal(log_sigma, a)
    assert torch.equal(mean, b)
    model, z = small("starflow"), noise()
    guided = model.reverse(z, LABELS, guidance=0.0, guidance_kind="gaussian")
    assert torch.equal(guided, model.reverse(z, LABELS))


def test_both_kinds_agree_where_nothing_is_scaled():
    """A loop in PyTorch against the decode kernels."""
    model, z = small(nvp=False), noise()
    linear, gaussian = (
        model.reverse(z, LABELS, guidance=1.3, attn_temp=0.8, guidance_kind=kind)
        for kind in ("linear", "gaussian")
    )
    torch.testing.assert_close(linear, gaussian, rtol=1e-9, atol=1e-9)


def test_guidance_needs_something_to_move_away_from():
    model = small("starflow", num_classes=0)
    with pytest.raises(ValueError, match="guidance: the model has no classes"):
        model.sample(2, guidance=1.0, guidance_kind="gaussian")
    images = model.sample(2, guidance=1.0, guidance_kind="gaussian", attn_temp=0.5, rng=RNG)
    assert not torch.allclose(images, model.sample(2, rng=RNG))


# --- solvers and reports -------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "steps"), [("rotary", 8), ("input", 9), ("starflow", 9)])
def test_the_report_counts_the_steps(parts, steps):
    images, report = small(parts).sample(4, 1, rng=RNG, return_report=True)
    assert images.shape == (4, 2, 6, 6)
    assert (report.steps == steps).all()
    assert (report.sweeps == 0).all()
    assert (report.residual == 0).all()


@pytest.mark.parametrize("parts", CONFIGS)
def test_auto_takes_the_exact_method(parts):
    model, z = small(parts), noise()
    assert torch.equal(model.reverse(z, LABELS, method="auto"), model.reverse(z, LABELS))


def test_auto_takes_the_exact_method_for_gaussian_guidance():
    model, z = small(), noise()
    guide = GUIDES["gaussian"]
    images, report = model.reverse(z, LABELS, **guide, method="auto", return_report=True)
    assert torch.equal(images, model.reverse(z, LABELS, **guide))
    assert (report.sweeps == 0).all()


@pytest.mark.parametrize(
    ("parts", "arguments", "match"),
    [
        (
            "input",
            {"method": "jacobi"},
            r"method: expected 'exact' or 'auto' for blocks with shift='input', .* got 'jacobi'",
        ),
        ("rms", {"method": "jacobi"}, r"norm='rms', final_norm=True"),
        (
            None,
            {"method": "jacobi"} | GUIDES["gaussian"],
            r"method: expected 'exact' or 'auto' with guidance_kind='gaussian', .* got 'jacobi'",
        ),
        ("starflow", {"guidance_kind": "cubic"}, "guidance_kind: expected 'linear' or 'gaussian'"),
        (
            None,
            GUIDES["gaussian"] | {"guide_what": "b"},
            "guide_what: expected 'ab' for guidance_kind='gaussian'.* got 'b'",
        ),
    ],
    ids=str,
)
def test_refusals_come_before_the_first_block(monkeypatch, parts, arguments, match):
    model = small(parts)
    monkeypatch.setattr(sampling, "invert_block", lambda *_, **__: pytest.fail("inverted"))
    with pytest.raises(ValueError, match=match):
        model.reverse(noise(), LABELS, **arguments)
    with pytest.raises(ValueError, match=match):
        model.stream(2, 1, **arguments)


def test_sweeps_are_there_for_plain_blocks_under_inactive_guidance():
    model, z = small(), noise()
    images = model.reverse(z, LABELS, guidance_kind="gaussian", method="jacobi", tol=0.0)
    torch.testing.assert_close(images, model.reverse(z, LABELS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parts", ["starflow", None])
def test_sharded_weights_are_refused(parts):
    model = small(parts)
    model.blocks[2].proj_out.bias.full_tensor = lambda: None
    with pytest.raises(ValueError, match=r"model: expected weights in one place, .*\(DTensor\)"):
        model.sample(2, 1, **GUIDES["gaussian"])


# --- precision and memory ------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["starflow", "rms", None])
def test_autocast_is_close_to_fp32(parts):
    model, z = small(parts, dtype=torch.float32), noise(dtype=torch.float32)
    guide = GUIDES["gaussian"]
    wide = model.reverse(z, LABELS, **guide)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model.reverse(z, LABELS, **guide)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide, rtol=0.1, atol=0.1)
    assert not torch.equal(narrow, wide)


@pytest.mark.parametrize("parts", ["starflow", "rms", None])
def test_weights_in_bf16_give_fp32_images(parts):
    model, z = small(parts, dtype=torch.float32), noise(dtype=torch.float32)
    wide = model.reverse(z, LABELS, **GUIDES["gaussian"])
    images = model.bfloat16().reverse(z, LABELS, **GUIDES["gaussian"])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, wide, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("guide", ["none", "gaussian-annealed"])
def test_nothing_depends_on_values(guide):
    """Meta tensors have none: whatever looks at one raises, as it would wait for a GPU."""
    model = small("starflow", dtype=torch.float32).to("meta")
    z, y = noise(dtype=torch.float32).to("meta"), LABELS.to("meta")
    assert model.reverse(z, y, **GUIDES[guide]).shape == (3, 2, 6, 6)


def test_noise_stays_as_it_is():
    model, z = small("starflow"), noise()
    kept = z.clone()
    model.reverse(z, LABELS)
    assert torch.equal(z, kept)


def test_images_do_not_depend_on_the_batch():
    model = small("starflow")
    y = torch.tensor([0, 1, 2, -1, 0])
    images = model.sample(5, y, rng=RNG, guidance=1.0)
    parts = model.sample(5, y, rng=RNG, guidance=1.0, batch_size=2)
    torch.testing.assert_close(images, parts)
    torch.testing.assert_close(model.sample(3, y[:3], rng=RNG, guidance=1.0), images[:3])


def test_memory_is_that_of_the_widest_block():
    model = small("starflow", channels=[24, 24, 48], layers_per_block=[1, 1, 2])
    plan, solver = batching.Guidance(1.0), batching.Solver()
    needed = [batching.image_bytes(block, plan, solver) for block in model.blocks]
    assert needed[0] == needed[1]
    cache = 8 * 2 * 2 * 9 * 48 * 2  # fp64, two passes, keys and values of 9 tokens in 2 layers
    assert cache < needed[2] < 5 * cache
