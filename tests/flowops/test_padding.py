import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowops import cuda_runtime, noise_normal, pad_noise
from flowops.padding import pad_noise_reference
from helpers import ENGINES, ISAS, assert_close, poison, running

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LAYOUTS = ("contiguous", "sliced", "transposed", "every other", "expanded")
INT64 = st.integers(-(2**63), 2**63 - 1)
RNG = torch.tensor([42, 7])

by_engine = pytest.mark.parametrize("engine", ENGINES)
by_isa = pytest.mark.parametrize("isa", ISAS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def laid_out(layout, rows, D, dtype, mean=0.0):
    """Data ``[rows, D]`` whose neighbours in memory, if it has any, are NaN."""
    x = (torch.randn(rows, D, dtype=torch.float64) + mean).to(dtype)
    nan = float("nan")
    if layout == "sliced":
        whole = torch.full((rows + 2, D + 3), nan, dtype=dtype)
        whole[1:-1, 2:-1] = x
        return whole[1:-1, 2:-1]
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "every other":
        return torch.stack([x, torch.full_like(x, nan)], dim=-1).flatten(-2)[:, ::2]
    if layout == "expanded":
        return x[:1].expand(rows, D)
    return x


def as_double(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("data_scale", [0.0, 0.3])
def test_reference_is_the_formula(data_scale):
    x = torch.randn(6, 5, dtype=torch.float64)
    eps = noise_normal((6, 8), rng=RNG, dtype=torch.float64, backend="reference")
    out = pad_noise_reference(x, RNG, 3, as_double(2.5), as_double(data_scale))
    assert torch.equal(out[:, :5], x + data_scale * eps[:, :5])
    assert torch.equal(out[:, 5:], 2.5 * eps[:, 5:])


@by_isa
@by_dtype
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    D=st.integers(1, 70),
    pad=st.integers(1, 9),
    pad_scale=st.floats(0, 100),
    data_scale=st.sampled_from([0.0, 1.0]) | st.floats(0, 10),
    layout=st.sampled_from(LAYOUTS),
    mean=st.sampled_from([0.0, 100.0]),
    seed=INT64,
    offset=INT64,
)
@example(1, 1, 1, 2.0, 0.0, "contiguous", 0.0, 0, 0)
@example(40, 70, 9, 2.0, 0.5, "sliced", 100.0, -1, -(2**63))
def test_cpu_gives_the_bits_of_the_reference(
    isa, dtype, rows, D, pad, pad_scale, data_scale, layout, mean, seed, offset
):
    x = laid_out(layout, rows, D, dtype, mean)
    rng = torch.tensor([seed, offset])
    scales = {"pad_scale": pad_scale, "data_scale": data_scale}
    expected = pad_noise(x, pad, **scales, rng=rng, backend="reference")
    poison(expected)
    with running(isa):
        actual = pad_noise(x, pad, **scales, rng=rng, backend="cpu")
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert actual.isfinite().all()
    assert torch.equal(actual, expected)


@by_isa
@by_dtype
@pytest.mark.parametrize("data_scale", [0.0, 0.25])
def test_rows_that_need_several_blocks_of_counters(isa, dtype, data_scale):
    for rows, D, pad in ((5, 2000, 9), (3, 1023, 1), (3, 1, 4000), (2, 1500, 1500), (700, 60, 4)):
        x = torch.randn(rows, D).to(dtype)
        expected = pad_noise(x, pad, data_scale=data_scale, rng=RNG, backend="reference")
        poison(expected)
        with running(isa):
            actual = pad_noise(x, pad, data_scale=data_scale, rng=RNG, backend="cpu")
        assert torch.equal(actual, expected)


@by_isa
@pytest.mark.parametrize("data_scale", [0.0, 0.25])
def test_thread_count_does_not_change_a_bit(isa, data_scale):
    x = torch.randn(1111, 50)
    results = []
    with running(isa):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(pad_noise(x, 3, data_scale=data_scale, rng=RNG, backend="cpu"))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@by_engine
@by_dtype
def test_noise_is_that_of_the_padded_matrix(engine, dtype):
    x = torch.randn(33, 10).to(dtype)
    eps = noise_normal((33, 15), rng=RNG)
    with running(engine) as backend:
        out = pad_noise(x, 5, pad_scale=1.0, rng=RNG, backend=backend)
        noisy = pad_noise(torch.zeros_like(x), 5, data_scale=1.0, rng=RNG, backend=backend)
    assert torch.equal(out[:, :10], x)
    assert torch.equal(out[:, 10:], eps[:, 10:].to(dtype))
    assert torch.equal(noisy[:, :10], eps[:, :10].to(dtype))
    assert torch.equal(noisy[:, 10:], (2 * eps[:, 10:]).to(dtype))


@by_engine
def test_leading_dimensions_count_rows(engine):
    x = torch.randn(3, 4, 5, 6)
    with running(engine) as backend:
        out = pad_noise(x, 2, data_scale=0.5, rng=RNG, backend=backend)
        rows = pad_noise(x.view(60, 6), 2, data_scale=0.5, rng=RNG, backend=backend)
        one = pad_noise(x[0, 0, 0], 2, data_scale=0.5, rng=RNG, backend=backend)
        swapped = pad_noise(x.transpose(0, 2), 2, data_scale=0.5, rng=RNG, backend=backend)
    assert out.shape == (3, 4, 5, 8)
    assert torch.equal(out.view(60, 8), rows)
    assert torch.equal(one, rows[0])
    assert torch.equal(swapped[0, 0, 0], rows[0])
    again = pad_noise(x.transpose(0, 2).contiguous(), 2, data_scale=0.5, rng=RNG)
    assert torch.equal(swapped, again)


@by_engine
def test_strided_rng(engine):
    x, rng = torch.randn(9, 6), torch.tensor([42, 99, 7, 99])[::2]
    assert not rng.is_contiguous()
    with running(engine) as backend:
        for _ in range(5):
            actual = pad_noise(x, 2, data_scale=0.5, rng=rng, backend=backend)
            expected = pad_noise(x, 2, data_scale=0.5, rng=RNG, backend="reference")
            assert torch.equal(actual, expected)


@by_engine
@by_dtype
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scales_may_be_tensors_of_any_floating_dtype(engine, dtype, scale_dtype):
    x = torch.randn(17, 6).to(dtype)
    pad_scale = torch.tensor(1.3, dtype=scale_dtype)
    data_scale = torch.tensor(0.7, dtype=scale_dtype)
    with running(engine) as backend:
        actual = pad_noise(
            x, 3, pad_scale=pad_scale, data_scale=data_scale, rng=RNG, backend=backend
        )
        numbers = pad_noise(
            *(x, 3),
            pad_scale=pad_scale.item(),
            data_scale=data_scale.item(),
            rng=RNG,
            backend=backend,
        )
    assert actual.dtype == dtype
    assert torch.equal(actual, numbers)


@by_engine
@by_dtype
@pytest.mark.parametrize(("D", "pad"), [(1, 1), (7, 2), (63, 9)])
@pytest.mark.parametrize("zero", [False, True])
def test_gradients_follow_autograd_of_the_reference(engine, dtype, D, pad, zero):
    def leaves(dtype):
        x = torch.linspace(-2, 2, 100 * D).view(100, D).to(dtype)
        scales = torch.tensor([1.5, 0.0 if zero else 0.3]).to(dtype)
        return x.requires_grad_(), *(s.clone().requires_grad_() for s in scales)

    # Close to the noise, so that the sums behind the gradients of the scales don't cancel.
    weight = noise_normal((100, D + pad), rng=RNG) + 0.3 * torch.randn(100, D + pad)
    runs = []
    with running(engine) as backend:
        for function, made in (
            (
                lambda x, a, b: pad_noise(
                    x, pad, pad_scale=a, data_scale=b, rng=RNG, backend=backend
                ),
                leaves(dtype),
            ),
            (lambda x, a, b: pad_noise_reference(x, RNG, pad, a, b), leaves(dtype)),
            (
                lambda x, a, b: pad_noise_reference(x, RNG, pad, a, b),
                [t.detach().double().requires_grad_() for t in leaves(dtype)],
            ),
        ):
            out = function(*made)
            runs.append(torch.autograd.grad((out * weight.to(out.dtype)).sum(), made))
    for name, actual, plain, golden in zip(("x", "pad", "data"), *runs, strict=True):
        assert actual.dtype == plain.dtype
        if dtype == torch.float64:
            # The golden is no wider here: it rounds as often as the sum it is compared with.
            torch.testing.assert_close(actual, golden, rtol=1e-13, atol=0)
        else:
            assert_close(actual, plain, golden, name)
    assert torch.equal(runs[0][0], weight[:, :D].to(dtype))


@by_engine
def test_gradients_of_some_inputs_only(engine):
    x = torch.randn(9, 4)
    weight = torch.randn(9, 6)
    eps = noise_normal((9, 6), rng=RNG)
    expected = {"pad_scale": (weight * eps)[:, 4:].sum(), "data_scale": (weight * eps)[:, :4].sum()}
    with running(engine) as backend:
        for name, value in expected.items():
            scale = torch.tensor(0.4, requires_grad=True)
            out = pad_noise(x, 2, **{name: scale}, rng=RNG, backend=backend)
            torch.testing.assert_close(torch.autograd.grad(out, scale, weight)[0], value)


@by_engine
def test_every_call_without_rng_is_new_and_follows_manual_seed(engine):
    x = torch.randn(9, 4)
    with running(engine) as backend:
        torch.manual_seed(5)
        first, second = pad_noise(x, 2, backend=backend), pad_noise(x, 2, backend=backend)
        torch.manual_seed(5)
        assert torch.equal(pad_noise(x, 2, backend=backend), first)
        generator = torch.Generator().manual_seed(1)
        third = pad_noise(x, 2, rng=generator, backend=backend)
        again = pad_noise(x, 2, rng=generator.manual_seed(1), backend=backend)
    assert not torch.equal(first, second)
    assert torch.equal(third, again)


def test_default_scales():
    x = torch.randn(20000, 1)
    out = pad_noise(x, 4, rng=RNG)
    assert torch.equal(out[:, :1], x)
    assert abs(out[:, 1:].std() - 2) < 5 * 2 / math.sqrt(2 * 80000)


@pytest.mark.skipif(not ISAS, reason="there are no native kernels here")
def test_half_goes_to_the_reference():
    x = torch.randn(17, 6).half()
    out = pad_noise(x, 3, data_scale=0.5, rng=RNG)
    assert out.dtype == torch.float16
    assert torch.equal(out, pad_noise(x, 3, data_scale=0.5, rng=RNG, backend="reference"))
    assert torch.equal(out, pad_noise(x.float(), 3, data_scale=0.5, rng=RNG).half())
    with pytest.raises(RuntimeError, match=r"'cpu' can't run pad_noise: torch.float16 has no"):
        pad_noise(x, 3, rng=RNG, backend="cpu")


ONES = torch.ones(3, 4)
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("x", "pad", "options", "error", "match"),
    [
        ([[1.0]], 1, {}, TypeError, "x: expected a torch.Tensor, got list"),
        (ONES.int(), 1, {}, TypeError, "x: expected a floating dtype, got torch.int32"),
        (torch.tensor(1.0), 1, {}, ValueError, r"x: expected a non-empty \[..., D\], got \[\]"),
        (torch.ones(0, 4), 1, {}, ValueError, r"x: expected a non-empty .* got \[0, 4\]"),
        (torch.ones(3, 0), 1, {}, ValueError, r"x: expected a non-empty .* got \[3, 0\]"),
        (ONES, 0, {}, ValueError, "pad: expected a positive number of dimensions, got 0"),
        (ONES, -2, {}, ValueError, "pad: expected a positive number of dimensions, got -2"),
        (ONES, 1.0, {}, ValueError, "pad: expected a positive number of dimensions, got 1.0"),
        (ONES, True, {}, ValueError, "pad: expected a positive number of dimensions, got True"),
        (ONES, None, {}, ValueError, "pad: expected a positive number of dimensions, got None"),
        (ONES, 1, {"rng": torch.tensor([1.0, 2.0])}, ValueError, "rng: expected int64"),
        (ONES, 1, {"rng": torch.tensor([1, 2, 3])}, ValueError, "rng: expected int64"),
        (ONES, 1, {"rng": 42}, TypeError, "rng: expected an int64 tensor"),
        (ONES, 1, {"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of"),
    ],
)
def test_bad_inputs_are_named(x, pad, options, error, match):
    with pytest.raises(error, match="^" + match):
        pad_noise(x, pad, **options)


def test_cuda_says_why_it_cannot_run_on_cpu_tensors(monkeypatch):
    monkeypatch.delenv(cuda_runtime.EMULATOR, raising=False)
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run pad_noise: its tensors are"):
        pad_noise(ONES, 1, backend="cuda")


@pytest.mark.parametrize("name", ["pad_scale", "data_scale"])
@pytest.mark.parametrize(
    "scale",
    [-1.0, INF, NAN, torch.ones(1), torch.ones(4), torch.tensor(1), "2", None, [1.0]],
    ids=str,
)
def test_bad_scales_are_named(name, scale):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        pad_noise(ONES, 1, **{name: scale})
