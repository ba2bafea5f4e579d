import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowops import cuda_runtime, make_rng, noise_normal, noise_uniform, noise_words
from flowops.noise import _box_muller, _uniform, philox_reference
from helpers import ENGINES, ISAS, running

DRAWS = {"words": noise_words, "uniform": noise_uniform, "normal": noise_normal}
INT64 = st.integers(-(2**63), 2**63 - 1)
#: With counters on both sides of 2^32, and up to where those of some 100 rows of 70 still fit.
FIRST_ROWS = st.integers(0, 2**63 // 18 - 100) | st.integers(2**32 - 40, 2**32)

by_engine = pytest.mark.parametrize("engine", ENGINES)
by_isa = pytest.mark.parametrize("isa", ISAS)
by_kind = pytest.mark.parametrize("kind", DRAWS)

# Random123's kat_vectors for philox4x32-10: counter, key, output; and seed 42 of the contract.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
    ((0, 0, 0, 0), (42, 0), (0x9CEAF053, 0x77F5493B, 0x12BF50AD, 0x5742B3D7)),
]


def philox(counter, key):
    """Philox4x32-10 in Python integers, as in Salmon et al., section 3.3."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def halves(value):
    """The low and the high 32 bits of an int64."""
    high, low = divmod(value % 2**64, 2**32)
    return low, high


def signed(low, high):
    value = low + (high << 32)
    return value - 2**64 if value >= 2**63 else value


def word_of(seed, offset, row, column, width):
    counter = row * math.ceil(width / 4) + column // 4
    return philox((*halves(counter), *halves(offset)), halves(seed))[column % 4]


def exact_normals(words):
    """Box-Muller in fp64 on the pairs of the last dimension."""
    w0, w1 = words[..., 0::2], words[..., 1::2]
    r = torch.sqrt(-2 * torch.log(((w0 >> 8) + 1).double() * 2.0**-24))
    turns = (w1 >> 8).double() * 2.0**-24
    # Reduced to an eighth of a turn before pi comes in, so that zeros are exact.
    quarter = torch.round(4 * turns)
    angle = 2 * math.pi * (turns - quarter / 4)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    for step in (1, 2):
        turn = (quarter.long() & step).bool()
        new_sine = cosine if step == 1 else -sine
        new_cosine = -sine if step == 1 else -cosine
        sine, cosine = torch.where(turn, new_sine, sine), torch.where(turn, new_cosine, cosine)
    return torch.stack([r * cosine, r * sine], dim=-1).flatten(-2)


def check_normals(normals, words):
    exact = exact_normals(words)
    assert normals.dtype == torch.float32
    assert ((normals.double() - exact).abs() <= 4 * 2.0**-23 * exact.abs()).all()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    rng = torch.tensor([signed(*key), signed(*counter[2:])])
    words = philox_reference(torch.tensor([signed(*counter[:2])]), rng)
    assert words.tolist() == [list(expected)]
    assert philox(counter, key) == expected


@by_engine
def test_known_answers_of_the_public_function(engine):
    with running(engine) as backend:
        for seed, answer in ((0, KNOWN_ANSWERS[0][2]), (42, KNOWN_ANSWERS[3][2])):
            words = noise_words((1, 4), rng=torch.tensor([seed, 0]), backend=backend)
            assert words.tolist() == [list(answer)]


@by_engine
@settings(max_examples=50, deadline=None)
@given(
    seed=INT64,
    offset=INT64,
    width=st.integers(1, 70),
    row=st.integers(0, 39),
    column=st.integers(0, 69),
    first_row=st.just(0) | FIRST_ROWS,
)
@example(seed=-1, offset=-1, width=70, row=39, column=69, first_row=0)
@example(seed=-(2**63), offset=2**63 - 1, width=1, row=39, column=0, first_row=2**63 - 41)
@example(seed=2**32, offset=2**32, width=5, row=0, column=4, first_row=2**32)
@example(seed=1, offset=0, width=4, row=20, column=1, first_row=2**32 - 20)
def test_words_are_philox_of_seed_offset_row_and_column(
    engine, seed, offset, width, row, column, first_row
):
    column %= width
    rng = torch.tensor([seed, offset])
    with running(engine) as backend:
        words = noise_words((row + 1, width), first_row=first_row, rng=rng, backend=backend)
    assert words[row, column].item() == word_of(seed, offset, first_row + row, column, width)


@by_isa
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    seed=INT64,
    offset=INT64,
    first_row=st.just(0) | FIRST_ROWS,
)
@example(rows=40, width=70, seed=-1, offset=-1, first_row=0)
@example(rows=1, width=1, seed=-(2**63), offset=-(2**63), first_row=2**63 - 2)
def test_cpu_gives_the_bits_of_the_reference(isa, rows, width, seed, offset, first_row):
    shape, where = (rows, width), {"first_row": first_row, "rng": torch.tensor([seed, offset])}
    with running(isa):
        for draw in DRAWS.values():
            actual = draw(shape, **where, backend="cpu")
            assert actual.is_contiguous()
            assert torch.equal(actual, draw(shape, **where, backend="reference"))


@by_kind
@pytest.mark.parametrize("shape", [(1, 200_003), (257, 1023), (50_001, 1), (1021, 100)])
def test_large_matrices_give_the_bits_of_the_reference(kind, shape):
    rng = torch.tensor([-7, 2**40])
    expected = DRAWS[kind](shape, rng=rng, backend="reference")
    for isa in ISAS:
        with running(isa):
            actual = DRAWS[kind](shape, rng=rng, backend="cpu")
            first, half = shape[0] // 3, (shape[0] + 1) // 2
            part = DRAWS[kind]((half, shape[1]), first_row=first, rng=rng, backend="cpu")
        assert torch.equal(actual, expected), isa
        assert torch.equal(part, expected[first : first + half]), isa


@by_isa
@by_kind
def test_thread_count_does_not_change_a_bit(isa, kind):
    rng = torch.tensor([3, 4])
    results = []
    with running(isa):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(DRAWS[kind]((777, 333), first_row=9, rng=rng, backend="cpu"))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@by_engine
@by_kind
def test_values_depend_on_row_and_column_alone(engine, kind):
    draw, rng = DRAWS[kind], torch.tensor([5, 6])
    with running(engine) as backend:
        whole = draw((40, 7), rng=rng, backend=backend)
        for rows in (1, 2, 17, 39):
            assert torch.equal(draw((rows, 7), rng=rng, backend=backend), whole[:rows])
        for width in (5, 6, 8):
            # The same number of counters a row, so the same values in the columns they share.
            other = draw((40, width), rng=rng, backend=backend)
            assert torch.equal(other[:, : min(7, width)], whole[:, : min(7, width)])
        assert torch.equal(draw((2, 4, 5, 7), rng=rng, backend=backend), whole.view(2, 4, 5, 7))
        assert torch.equal(draw([7], rng=rng, backend=backend), whole[0])
        assert torch.equal(draw(torch.Size([40, 7]), rng=rng, backend=backend), whole)
        for other in ([6, 6], [5, 7], [6, 5], [5 + 2**32, 6], [5, 6 + 2**32]):
            different = draw((40, 7), rng=torch.tensor(other), backend=backend)
            assert (different == whole).float().mean() < 0.01
    assert whole.unique().numel() > 270


@by_engine
@by_kind
def test_strided_rng(engine, kind):
    rng = torch.tensor([5, 99, 6, 99])[::2]
    assert not rng.is_contiguous()
    with running(engine) as backend:
        for _ in range(5):
            actual = DRAWS[kind]((40, 7), rng=rng, backend=backend)
            assert torch.equal(
                actual, DRAWS[kind]((40, 7), rng=torch.tensor([5, 6]), backend="reference")
            )


def test_uniforms_are_the_top_bits_of_the_words():
    words = torch.tensor([0, 255, 256, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1])
    steps = torch.tensor([1, 1, 2, 2**23 + 1, 2**24 - 1, 2**24, 2**24])
    assert torch.equal(_uniform(words), (steps.double() / 2**24).float())


@by_engine
def test_uniforms_lie_in_their_range(engine):
    rng = torch.tensor([11, 0])
    with running(engine) as backend:
        uniforms = noise_uniform((500, 1000), rng=rng, backend=backend)
        words = noise_words((500, 1000), rng=rng, backend=backend)
    assert words.dtype == torch.int64
    assert words.min() >= 0
    assert words.max() < 2**32
    assert uniforms.dtype == torch.float32
    assert torch.equal(uniforms.double(), ((words >> 8) + 1).double() / 2**24)
    assert 0 < uniforms.min() < 2e-5
    assert 1 - 2e-5 < uniforms.max() <= 1
    counts = torch.histc(uniforms, bins=100, min=0, max=1)
    assert ((counts - 5e3) ** 2 / 5e3).sum() < 99 + 6 * math.sqrt(2 * 99)


@by_engine
def test_normals_are_box_muller_of_the_words(engine):
    rng = torch.tensor([42, 7])
    with running(engine) as backend:
        normals = noise_normal((250, 1000), rng=rng, backend=backend)
        words = noise_words((250, 1000), rng=rng, backend=backend)
    check_normals(normals, words)


def test_normals_at_the_edges_of_their_words():
    edges = [0, 1, 2, 3, 2**21, 2**22, 2**23, 3 * 2**22, 2**24 - 2, 2**24 - 1]
    edges += [e + d for e in (2**21, 3 * 2**21, 5 * 2**21, 7 * 2**21, 11863283) for d in (-1, 0, 1)]
    pairs = torch.tensor(list(itertools.product(edges, edges))) << 8
    normals = _box_muller(pairs)
    assert normals.isfinite().all()
    check_normals(normals, pairs)
    largest = math.sqrt(48 * math.log(2))
    assert normals.abs().max().item() == pytest.approx(largest, rel=1e-6)
    assert torch.equal(_box_muller(torch.tensor([2**32 - 1, 12345])).abs(), torch.zeros(2))


def test_moments_of_a_million_normals():
    n = noise_normal((1000, 1000), rng=torch.tensor([1, 2])).double()
    N = n.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((n**power).mean() - mean) < 5 * math.sqrt(variance / N)
    for shift in (1, 2, 3, 4):
        assert abs((n[:, shift:] * n[:, :-shift]).mean()) < 5 / math.sqrt(N)
        assert abs((n[shift:] * n[:-shift]).mean()) < 5 / math.sqrt(N)
    at = torch.linspace(-3, 3, 25).double()
    below = torch.searchsorted(n.flatten().sort().values, at) / N
    expected = torch.special.ndtr(at)
    assert ((below - expected).abs() < 5 * torch.sqrt(expected * (1 - expected) / N)).all()


@by_engine
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_round_the_same_draws_once(engine, dtype):
    rng = torch.tensor([8, 9])
    with running(engine) as backend:
        for draw in (noise_uniform, noise_normal):
            plain = draw((30, 9), rng=rng, backend=backend)
            cast = draw((30, 9), rng=rng, dtype=dtype, backend=backend)
            assert cast.dtype == dtype
            assert torch.equal(cast, plain.to(dtype))


def test_make_rng_hands_a_tensor_back():
    rng = torch.tensor([-3, 2**62])
    assert make_rng(rng) is rng


def test_make_rng_draws_from_a_generator():
    first, second, again = (torch.Generator().manual_seed(s) for s in (5, 6, 5))
    a, b, c = make_rng(first), make_rng(second), make_rng(again)
    for rng in (a, b, c):
        assert rng.dtype == torch.int64
        assert rng.shape == (2,)
        assert rng[0] >= 0
        assert rng[1] == 0
    assert torch.equal(a, c)
    assert not torch.equal(a, b)
    assert not torch.equal(make_rng(first), a)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        make_rng(torch.Generator().manual_seed(5))
        assert torch.equal(torch.rand(3), expected)


@by_kind
def test_no_rng_follows_manual_seed(kind):
    torch.manual_seed(3)
    first, second = DRAWS[kind]((4, 6)), DRAWS[kind]((4, 6))
    torch.manual_seed(3)
    assert torch.equal(DRAWS[kind]((4, 6)), first)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert not torch.equal(DRAWS[kind]((4, 6)), first)


@by_kind
def test_generators_are_accepted(kind):
    draw = DRAWS[kind]
    first, second = (draw((4, 6), rng=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    rng = make_rng(torch.Generator().manual_seed(1))
    assert torch.equal(draw((4, 6), rng=rng), first)


BAD_RNGS = [
    (torch.tensor([1.0, 2.0]), ValueError, r"rng: expected int64 of shape \[2\] .*torch.float32"),
    (torch.tensor([1, 2], dtype=torch.int32), ValueError, "rng: expected int64 .*torch.int32"),
    (torch.tensor([1, 2, 3]), ValueError, r"rng: expected int64 of shape \[2\] .*shape \[3\]"),
    (torch.tensor(1), ValueError, r"rng: expected int64 of shape \[2\] .*shape \[\]"),
    (torch.tensor([[1, 2]]), ValueError, r"rng: expected int64 of shape \[2\] .*shape \[1, 2\]"),
    (42, TypeError, "rng: expected an int64 tensor .* got int"),
    ((1, 2), TypeError, "rng: expected an int64 tensor .* got tuple"),
    ("seed", TypeError, "rng: expected an int64 tensor .* got str"),
]


@pytest.mark.parametrize(("rng", "error", "match"), BAD_RNGS)
def test_bad_rngs_are_named(rng, error, match):
    with pytest.raises(error, match=match):
        make_rng(rng)
    with pytest.raises(error, match=match):
        noise_normal((2, 3), rng=rng)


def test_rng_on_another_device():
    rng = torch.empty(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="rng: expected a tensor on cpu, got one on meta"):
        make_rng(rng)
    with pytest.raises(ValueError, match="rng: expected a tensor on cpu, got one on meta"):
        noise_normal((2, 3), rng=rng, device="cpu")
    with pytest.raises(ValueError, match="rng: expected a generator on meta, got one on cpu"):
        make_rng(torch.Generator(), "meta")


@by_kind
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (-1, 3)])
def test_bad_shapes_are_named(kind, shape):
    with pytest.raises(ValueError, match="shape: expected at least one dimension, all positive"):
        DRAWS[kind](shape)


@by_kind
@pytest.mark.parametrize("shape", [5, 2.5, (2, 3.5), ("a",), None])
def test_shapes_of_another_type_are_named(kind, shape):
    with pytest.raises((TypeError, ValueError), match=r"^shape: expected"):
        DRAWS[kind](shape)


@by_kind
def test_backends_that_cannot_run(kind, monkeypatch):
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        DRAWS[kind]((2, 3), backend="gpu")
    monkeypatch.delenv(cuda_runtime.EMULATOR, raising=False)
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run noise: its tensors are on"):
        DRAWS[kind]((2, 3), backend="cuda")
