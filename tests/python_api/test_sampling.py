"""Sampling from a TarFlow: reports, streams, memory, interruption. What a block's inverse computes
is tested in tests/flowops/test_decode*.py; golden samples are in test_tarflow.py."""

import warnings

import pytest
import torch

from flowops import noise_normal
from flowops.api import SamplingInterrupted, TarFlow, batching, unpatchify
from helpers import ISAS

RNG = torch.tensor([3, 0])
SOLVERS = {
    "exact": {},
    "jacobi": {"method": "jacobi", "tol": 1e-4, "window": 4},
    "auto": {"method": "auto", "tol": 1e-4},
}
TOKENS = 16

by_solver = pytest.mark.parametrize("solver", SOLVERS)
native = pytest.mark.skipif(not ISAS, reason="needs the native CPU kernels")


def build(**changed):
    """A model whose blocks are not the identity, of sizes that the native kernels take."""
    config = {"in_channels": 1, "img_size": 8, "patch_size": 2, "channels": 32, "head_dim": 16}
    config |= {"num_blocks": 3, "layers_per_block": 1, "num_classes": 3} | changed
    model = TarFlow(**config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def model():
    return build()


@pytest.fixture
def free_memory(monkeypatch):
    """Sets how many images there is memory for."""

    def set_images(images, model, method="exact", guidance=0.0):
        plan, solver = batching.Guidance(guidance), batching.Solver(method)
        each = max(batching.image_bytes(block, plan, solver) for block in model.blocks)
        free = int((images + 0.5) * each / batching._MEMORY_SHARE)
        monkeypatch.setattr(batching, "free_memory", lambda device: free)

    return set_images


@pytest.fixture
def inverted(monkeypatch):
    """Calls the given function with the number of each inverse of a block, before it, and with the
    number of images."""
    from flowops.api import sampling

    function, count = sampling.invert_block, 0

    def install(before):
        def invert(block, z, *args, **kwargs):
            nonlocal count
            count += 1
            before(count, len(z))
            return function(block, z, *args, **kwargs)

        monkeypatch.setattr(sampling, "invert_block", invert)

    return install


# --- solvers and reports -------------------------------------------------------------------------


@by_solver
@pytest.mark.parametrize("nvp", [True, False])
def test_round_trip(solver, nvp):
    model = build(nvp=nvp)
    noise, y = torch.randn(5, TOKENS, 4), torch.tensor([0, 1, 2, -1, 0])
    images, report = model.reverse(noise, y, return_report=True, **SOLVERS[solver])
    # A residual in x is one of at most exp(|a|) times as much in z; three blocks add theirs.
    bound = 1e-5 if solver == "exact" else 1e-3
    assert (model(images, y)[0] - noise).abs().max() < bound
    assert report.residual.shape == report.sweeps.shape == report.steps.shape == (5, 3)
    exact = solver == "exact"
    assert (report.residual <= (0 if exact else torch.tensor(1e-4))).all()
    if solver != "auto":
        assert (report.sweeps == 0).all() == exact
        assert (report.steps == (TOKENS - 1 if exact else 0)).all()


def test_the_report_is_that_of_the_blocks_in_their_order(model):
    """Block by block: ``x - F(x) = (z' - z) exp(a)``, where forward turns x into z'."""
    noise, blocks = torch.randn(4, TOKENS, 4), []
    _, report = model.reverse(
        *(noise, torch.tensor([0, 1, 2, -1])),
        method="jacobi",
        tol=1e-2,
        window=8,
        return_report=True,
        on_block=blocks.append,
    )
    assert len(blocks) == 3
    y, inputs = torch.tensor([0, 1, 2, -1]), [*blocks[1::-1], noise]
    for b, (x, z) in enumerate(zip(blocks[::-1], inputs, strict=True)):
        block = model.blocks[b].double()
        a = torch.zeros(4, TOKENS, 4, dtype=torch.float64)
        a[:, 1:] = block.params(x.double(), y)[:, :-1, :4]
        a = a.flip(1) if block.reverse else a
        change = ((block(x.double(), y)[0] - z.double()) * a.exp()).abs().amax((1, 2))
        torch.testing.assert_close(report.residual[:, b].double(), change, rtol=0, atol=1e-5)
        assert 1e-5 < change.max() <= 1e-2 + 1e-5
        assert len(set(report.sweeps[:, b].tolist())) == 1


def test_a_window_of_none_suits_the_device(model):
    noise = torch.randn(2, TOKENS, 4)
    default, report = model.reverse(noise, method="jacobi", tol=1e-3, return_report=True)
    assert (default - model.reverse(noise)).abs().max() < 0.1
    assert (report.sweeps < TOKENS - 1).all()


def test_reverse_returns_a_report_beside_a_sequence(model):
    noise = torch.randn(2, TOKENS, 4)
    sequence, report = model.reverse(noise, return_sequence=True, return_report=True)
    assert len(sequence) == 4
    assert report.residual.shape == (2, 3)
    assert torch.equal(sequence[0], unpatchify(noise, 2, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_noise_that_is_not_finite_names_the_image(model, value):
    noise = torch.randn(4, TOKENS, 4)
    noise[2, 3, 1] = noise[3, 0, 0] = value
    with pytest.raises(ValueError, match="noise: expected finite numbers, got .* in image 2"):
        model.reverse(noise)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "newton"}, "method: expected 'exact', 'jacobi' or 'auto', got 'newton'"),
        ({"tol": -1.0}, "tol: expected a finite number, at least 0, got -1.0"),
        ({"tol": float("nan")}, "tol: expected a finite number"),
        ({"window": 0}, "window: expected a positive number of tokens, got 0"),
        ({"window": 1.5}, "window: expected a positive number of tokens, got 1.5"),
        ({"guidance": -1.0}, "guidance: expected a finite number"),
        ({"attn_temp": 0.0}, "attn_temp: expected a positive number"),
        ({"y": 3}, "y: expected labels from 0 to 2, or -1 for none, got 3"),
        ({"y": torch.tensor([0])}, r"y: expected \[2\], got \[1\]"),
        ({"n": 0}, "n: expected a positive number of images, got 0"),
        ({"n": 2.0}, "n: expected a positive number of images, got 2.0"),
        ({"n": True}, "n: expected a positive number of images, got True"),
        ({"batch_size": 0}, "batch_size: expected a positive number of images, got 0"),
        ({"denoise_std": -0.1}, "denoise_std: expected a finite number, at least 0, got -0.1"),
        ({"denoise_std": float("nan")}, "denoise_std: expected a finite number"),
    ],
    ids=str,
)
def test_refusals_come_before_the_first_block(model, inverted, arguments, match):
    inverted(lambda count, images: pytest.fail("a block was inverted"))
    with pytest.raises(ValueError, match=match):
        model.sample(**{"n": 2} | arguments)
    with pytest.raises(ValueError, match=match):
        next(model.stream(**{"n": 2} | arguments))


def test_guidance_of_a_model_without_classes():
    model = build(num_classes=0)
    with pytest.raises(ValueError, match="guidance: the model has no classes"):
        model.sample(2, guidance=1.0, rng=RNG)
    with pytest.raises(ValueError, match="y: the model was built without classes"):
        model.sample(2, 1, rng=RNG)
    plain = model.sample(2, rng=RNG)
    assert not torch.allclose(model.sample(2, guidance=1.0, attn_temp=0.5, rng=RNG), plain)


# --- streams and batches -------------------------------------------------------------------------


@by_solver
def test_sample_is_reverse_of_the_noise_of_the_contract(model, solver):
    noise = noise_normal((6, TOKENS * 4), rng=RNG).view(6, TOKENS, 4)
    y = torch.tensor([0, 1, 2, -1, 0, 1])
    options = {"guidance": 0.7} | SOLVERS[solver]
    images, report = model.sample(6, y, rng=RNG, return_report=True, **options)
    expected, expected_report = model.reverse(noise, y, return_report=True, **options)
    assert torch.equal(images, expected)
    for name in ("residual", "sweeps", "steps"):
        assert torch.equal(getattr(report, name), getattr(expected_report, name))


def test_a_stream_yields_the_batches_of_sample_in_order(model):
    y = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    options = {"rng": RNG, "batch_size": 3} | SOLVERS["jacobi"]
    images, report = model.sample(7, y, return_report=True, **options)
    parts = list(model.stream(7, y, **options))
    assert [len(batch) for batch, _ in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([batch for batch, _ in parts]), images)
    for name in ("residual", "sweeps", "steps"):
        joined = torch.cat([getattr(part, name) for _, part in parts])
        assert torch.equal(joined, getattr(report, name))
        assert joined.shape == (7, 3)


def test_a_stream_does_no_more_than_is_asked_of_it(model, inverted):
    counts = []
    inverted(lambda count, images: counts.append(images))
    stream = model.stream(9, rng=RNG, batch_size=4)
    assert counts == []
    next(stream)
    assert counts == [4, 4, 4]
    assert torch.is_grad_enabled()
    stream.close()
    assert counts == [4, 4, 4]


@native
@pytest.mark.parametrize("solver", ["exact", "jacobi"])
def test_the_batch_size_changes_nothing(model, solver):
    options = {"rng": RNG, "guidance": 0.5} | SOLVERS[solver]
    images = model.sample(7, 1, **options)
    for batch_size in (1, 2, 3, 7, 100):
        assert torch.equal(model.sample(7, 1, batch_size=batch_size, **options), images)
    assert torch.equal(model.sample(4, 1, **options), images[:4])


def test_images_are_denoised_batch_by_batch(model):
    images = model.sample(5, 1, rng=RNG)
    denoised = model.sample(5, 1, rng=RNG, denoise_std=0.1, batch_size=2)
    expected = model.denoise(images, torch.full((5,), 1), 0.1)
    torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5)


# --- memory --------------------------------------------------------------------------------------


@native
def test_too_many_images_for_the_memory_come_in_smaller_batches(model, free_memory):
    images = model.sample(8, 1, rng=RNG)
    free_memory(3, model)
    with pytest.warns(UserWarning, match="8 images at a time need more .*: sampling 3 at a time"):
        split = model.sample(8, 1, rng=RNG)
    assert torch.equal(split, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.sample(8, 1, rng=RNG, batch_size=3), images)


def test_guidance_and_windows_take_their_share_of_the_memory(model):
    block = model.blocks[0]

    def images(guidance=0.0, **solver):
        return batching.image_bytes(block, batching.Guidance(guidance), batching.Solver(**solver))

    assert 1.5 < images(1.0) / images() <= 2
    assert images() < images(method="jacobi", window=4) < images(method="jacobi", window=8)
    cache = 4 * 2 * TOKENS * 32  # keys and values of a layer in fp32
    assert cache < images() < 4 * cache
    free = batching.free_memory(torch.device("cpu"))
    assert free is None or free > images()
    assert batching.free_memory(torch.device("meta")) is None


def test_one_image_is_always_tried(model, free_memory):
    free_memory(-0.4, model)
    with pytest.warns(UserWarning, match="sampling 1 at a time"):
        assert model.sample(2, 1, rng=RNG).shape == (2, 1, 8, 8)


@native
@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_memory_that_runs_out_halves_the_batch(model, inverted, error):
    images = model.sample(11, 1, rng=RNG, batch_size=8)
    seen = []

    def fail(count, size):
        seen.append(size)
        if size > 4 or count == 6:
            raise error("no memory")

    inverted(fail)
    with pytest.warns(UserWarning, match="memory does not hold") as caught:
        parts = [batch for batch, _ in model.stream(11, 1, rng=RNG, batch_size=8)]
    assert [len(part) for part in parts] == [4, 2, 2, 2, 1]
    assert torch.equal(torch.cat(parts), images)
    assert seen[:5] == [8, 4, 4, 4, 4]
    messages = [str(warning.message) for warning in caught]
    assert [m.split("hold ")[1] for m in messages] == [
        f"8 images at a time ({error.__name__}): sampling 4 at a time",
        f"4 images at a time ({error.__name__}): sampling 2 at a time",
    ]


def test_an_image_that_does_not_fit_raises(model, inverted):
    def fail(count, size):
        raise MemoryError("no memory")

    inverted(fail)
    with pytest.warns(UserWarning, match="sampling 1 at a time"):  # noqa: SIM117
        with pytest.raises(MemoryError, match="no memory"):
            model.sample(2, 1, rng=RNG)


# --- Ctrl-C --------------------------------------------------------------------------------------


def interrupt_at(number):
    def before(count, images):
        if count == number:
            raise KeyboardInterrupt

    return before


def test_an_interrupt_keeps_the_finished_images(model, inverted):
    images = model.sample(8, 1, rng=RNG, batch_size=2)
    inverted(interrupt_at(2 * 3 + 2))  # inside the third batch
    with pytest.raises(SamplingInterrupted, match="interrupted: 4 of 8 images were") as caught:
        model.sample(8, 1, rng=RNG, batch_size=2)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert torch.equal(caught.value.images, images[:4])


def test_an_interrupt_from_on_block(model):
    calls = []

    def stop(tokens):
        calls.append(tokens.shape)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with pytest.raises(SamplingInterrupted, match="4 of 8") as caught:
        model.sample(8, 1, rng=RNG, batch_size=2, on_block=stop)
    assert caught.value.images.shape == (4, 1, 8, 8)
    assert calls[0] == (2, TOKENS, 4)


def test_an_interrupt_before_the_first_image(model, inverted):
    inverted(interrupt_at(2))
    with pytest.raises(SamplingInterrupted, match="interrupted: 0 of 2") as caught:
        model.sample(2, 1, rng=RNG)
    assert caught.value.images is None


def test_a_stream_passes_the_interrupt_on(model, inverted):
    images = model.sample(6, 1, rng=RNG, batch_size=2)
    inverted(interrupt_at(5))
    kept = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for batch, _ in model.stream(6, 1, rng=RNG, batch_size=2):
            kept.append(batch)
    assert torch.equal(torch.cat(kept), images[:2])
    assert torch.is_grad_enabled()


# --- the bar -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(10, 256), (7, 1), (9, 4)])
def test_the_bar_reaches_the_number_of_images(model, capsys, n, batch_size):
    seen = []
    images = model.sample(n, 1, rng=RNG, batch_size=batch_size, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "sampling" in err
    assert f"{n}/{n}" in err
    assert "100%" in err
    model.sample(n, 1, rng=RNG, batch_size=batch_size, progress=True, on_block=seen.append)
    assert len(seen) == 3 * -(-n // batch_size)
    assert len(images) == n


def test_the_bar_counts_finished_images_alone(model, capsys, inverted):
    def fail(count, size):
        if count == 3:
            raise MemoryError("no memory")

    inverted(fail)
    with pytest.warns(UserWarning, match="sampling 4 at a time"):
        model.sample(8, 1, rng=RNG, progress=True)
    assert "8/8" in capsys.readouterr().err


def test_no_bar_unless_asked(model, capsys):
    model.sample(2, 1, rng=RNG)
    assert capsys.readouterr() == ("", "")
