import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowops import cuda_runtime, noise_normal, noise_uniform, noise_words, pad_noise
from flowops.padding import pad_noise_reference
from kernel_checks import BACKENDS, DEVICE, DTYPES, EXAMPLES, follows_reference

INT64 = st.integers(-(2**63), 2**63 - 1)
RNG = torch.tensor([42, 7])
ALL = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TYPES = {"triton": DTYPES, "cuda": ALL}

by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_data_scale = pytest.mark.parametrize("data_scale", [0.0, 0.3])
cuda = pytest.mark.parametrize("backend", BACKENDS[1:])


def noise_agrees(backend, rows, width, rng, first_row=0):
    for function in (noise_words, noise_uniform, noise_normal):
        shape, rows_of = (rows, width), {"first_row": first_row}
        actual = function(shape, **rows_of, rng=rng.to(DEVICE), backend=backend)
        expected = function(shape, **rows_of, rng=rng, backend="reference")
        assert actual.dtype == expected.dtype
        bits = torch.int64 if function is noise_words else torch.int32  # zeros have signs
        assert torch.equal(actual.cpu().view(bits), expected.view(bits))


def padding_agrees(backend, x, pad, rng=RNG, **scales):
    """``x`` is where the kernel runs; its strides are part of the test."""
    actual = pad_noise(x, pad, **scales, rng=rng.to(DEVICE), backend=backend)
    expected = pad_noise(x.cpu(), pad, **scales, rng=rng, backend="reference")
    assert torch.equal(actual.cpu(), expected)


@by_backend
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 70),
    seed=INT64,
    offset=INT64,
    first_row=st.just(0) | st.integers(0, 2**63 // 18 - 301),
)
@example(1, 1, 0, 0, 0)
@example(700, 3, -1, -1, 0)
@example(300, 64, 1, 2, 0)
@example(300, 64, 1, 2, 2**28 - 100)  # some counters below 2^32, some above
@example(300, 63, 1, 2, 2**28 - 100)
@example(2, 1, 1, 2, 2**63 - 3)  # the last there are
@example(2, 4, 1, 2, 2**63 - 3)
@example(2, 64, 1, 2, 2**59 - 3)
@example(2, 63, 1, 2, 2**59 - 3)
def test_gives_the_bits_of_the_reference(backend, rows, width, seed, offset, first_row):
    noise_agrees(backend, rows, width, torch.tensor([seed, offset]), first_row)


@by_backend
@pytest.mark.parametrize("width", [5, 8])
def test_a_range_of_rows_is_a_slice_of_the_whole(backend, width):
    rng = RNG.to(DEVICE)
    for function in (noise_words, noise_uniform, noise_normal):
        whole = function((300, width), rng=rng, backend=backend)
        for first, rows in ((0, 300), (1, 299), (7, 200), (16, 1), (299, 1)):
            part = function((rows, width), first_row=first, rng=rng, backend=backend)
            assert torch.equal(part, whole[first : first + rows])


@by_backend
@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),  # Random123's own
        (42, "9ceaf053 77f5493b 12bf50ad 5742b3d7"),
    ],
)
def test_known_answer(backend, seed, words):
    drawn = noise_words((1, 4), rng=torch.tensor([seed, 0]).to(DEVICE), backend=backend)
    assert [f"{w:08x}" for w in drawn[0].tolist()] == words.split()


@by_backend
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 200),
    D=st.integers(1, 70),
    pad=st.integers(1, 9),
    pad_scale=st.floats(0, 100, width=32),
    data_scale=st.sampled_from([0.0, 1.0]) | st.floats(0, 10, width=32),
    kind=st.integers(0, 3),
    mean=st.sampled_from([0.0, 100.0]),
    seed=INT64,
)
@example(1, 1, 1, 2.0, 0.0, 0, 0.0, 0)
@example(300, 63, 9, 2.0, 0.3, 1, 100.0, -1)
def test_pad_noise_gives_the_bits_of_the_reference(
    backend, rows, D, pad, pad_scale, data_scale, kind, mean, seed
):
    dtype = TYPES[backend][kind % len(TYPES[backend])]
    x = (torch.randn(rows, D + 2, dtype=torch.float64) + mean).to(dtype).to(DEVICE)[:, 1:-1]
    rng = torch.tensor([seed, 3])
    padding_agrees(backend, x, pad, rng, pad_scale=pad_scale, data_scale=data_scale)


@by_backend
@pytest.mark.parametrize("which", [0, 2])
def test_pad_noise_with_learned_scales(backend, which):
    dtype = TYPES[backend][which]
    x, a, b = torch.rand(33, 5).to(dtype), torch.tensor(1.5), torch.tensor(0.3)
    follows_reference(
        lambda x, a, b: pad_noise(
            x, 3, pad_scale=a, data_scale=b, rng=RNG.to(DEVICE), backend=backend
        ),
        lambda x, a, b: pad_noise_reference(x, RNG, 3, a, b),
        (x, a.to(dtype), b.to(dtype)),
        str(dtype),
        together=(1, 2),
    )


# --- the cuda kernels: tiles and vectors ----------------------------------------------------------

#: Rows and width of several tiles for every block, of tiles within a row, and of rows in order.
SIZES = [(1500, 65), (3, 20_006), (6000, 9), (40, 1003), (700, 64)]


@cuda
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_noise_by_tiles(backend, rows, width):
    for first_row in (0, 2**40 + 1):
        noise_agrees(backend, rows, width, RNG, first_row)


@cuda
@by_data_scale
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_pad_noise_by_tiles(backend, data_scale, dtype, rows, width):
    for pad in (1, width // 3):
        x = torch.randn(rows, width - pad).to(dtype).to(DEVICE)
        padding_agrees(backend, x, pad, data_scale=data_scale)


@cuda
@by_data_scale
@pytest.mark.parametrize("D", [1, 3, 8, 13])
def test_strides(backend, data_scale, D):
    """Views whose rows begin anywhere, with elements or nothing at all between them."""
    for dtype in ALL:
        wide = torch.randn(2 * 37, D + 2).to(dtype).to(DEVICE)
        flat = torch.randn(37 * D + 1).to(dtype).to(DEVICE)
        rows_of_vectors = torch.randn(37, D + 8 - D % 8).to(dtype).to(DEVICE)[:, :D]
        views = [wide[:37, 1:-1], wide[::2, :-2], wide[:1, 1:-1], rows_of_vectors]
        views += [wide[:37, 1:-1].T.contiguous().T, wide[:1, :D].expand(37, -1)]
        views += [flat[1:].view(37, D), flat[:-1].view(37, D)]  # no gaps; off 16 bytes, and on
        for x in views:
            padding_agrees(backend, x, 2, data_scale=data_scale)


@cuda
@pytest.mark.skipif(not cuda_runtime.emulating(), reason="the order of threads is the emulator's")
@pytest.mark.parametrize("order", [0, 2, 3])
def test_any_order_of_threads(backend, order, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "emulator_seed", order)
    noise_agrees(backend, 1500, 65, RNG)
    for data_scale in (0.0, 0.3):
        padding_agrees(backend, torch.randn(1500, 63), 2, data_scale=data_scale)


@cuda
@pytest.mark.parametrize("dtype", ALL)
def test_scales_in_memory_are_as_numbers(backend, dtype):
    """What the op does for scales on a GPU."""
    from flowops.cuda.padding import pad_noise_fwd

    x, rng = torch.randn(33, 5).to(dtype).to(DEVICE), RNG.to(DEVICE)
    for a, b in ((1.5, 0.3), (2.0, 0.0)):
        for of in (torch.float16, torch.float32, torch.float64):
            scales = torch.tensor(a, dtype=of), torch.tensor(b, dtype=of)
            in_memory = pad_noise_fwd(x, rng, 3, *(s.to(DEVICE) for s in scales))
            assert torch.equal(in_memory, pad_noise_fwd(x, rng, 3, *(s.item() for s in scales)))


@cuda
def test_rows_too_long_to_count_are_refused(backend):
    with pytest.raises(RuntimeError, match=r"a row has 2\^28 elements"):
        pad_noise(torch.zeros(1, 1).expand(1, 2**28 - 1).to(DEVICE), 1, backend=backend)
    with pytest.raises(RuntimeError, match=r"a row has 2\^31 elements"):
        noise_words((1, 2**31 + 1), rng=RNG.to(DEVICE), backend=backend)
