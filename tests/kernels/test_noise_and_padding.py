import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowops import noise_normal, noise_uniform, noise_words, pad_noise
from flowops.padding import pad_noise_reference
from kernel_checks import DEVICE, DTYPES, EXAMPLES, follows_reference

INT64 = st.integers(-(2**63), 2**63 - 1)
RNG = torch.tensor([42, 7])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(rows=st.integers(1, 300), width=st.integers(1, 70), seed=INT64, offset=INT64)
@example(1, 1, 0, 0)
@example(700, 3, -1, -1)
def test_gives_the_bits_of_the_reference(rows, width, seed, offset):
    rng = torch.tensor([seed, offset])
    for function in (noise_words, noise_uniform, noise_normal):
        actual = function((rows, width), rng=rng.to(DEVICE), backend="triton")
        expected = function((rows, width), rng=rng, backend="reference")
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.cpu(), expected)


def test_known_answer():
    words = noise_words((1, 4), rng=torch.tensor([42, 0]).to(DEVICE), backend="triton")
    assert [f"{w:08x}" for w in words[0].tolist()] == [
        *("9ceaf053", "77f5493b", "12bf50ad", "5742b3d7")
    ]


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 200),
    D=st.integers(1, 70),
    pad=st.integers(1, 9),
    pad_scale=st.floats(0, 100, width=32),
    data_scale=st.sampled_from([0.0, 1.0]) | st.floats(0, 10, width=32),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 100.0]),
    seed=INT64,
)
@example(1, 1, 1, 2.0, 0.0, torch.float32, 0.0, 0)
@example(300, 63, 9, 2.0, 0.3, torch.float64, 100.0, -1)
def test_pad_noise_gives_the_bits_of_the_reference(
    rows, D, pad, pad_scale, data_scale, dtype, mean, seed
):
    x = (torch.randn(rows, D + 2, dtype=torch.float64) + mean).to(dtype)[:, 1:-1]
    rng, scales = torch.tensor([seed, 3]), {"pad_scale": pad_scale, "data_scale": data_scale}
    actual = pad_noise(x.to(DEVICE), pad, **scales, rng=rng.to(DEVICE), backend="triton")
    expected = pad_noise(x, pad, **scales, rng=rng, backend="reference")
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pad_noise_with_learned_scales(dtype):
    x, a, b = torch.rand(33, 5).to(dtype), torch.tensor(1.5), torch.tensor(0.3)
    follows_reference(
        lambda x, a, b: pad_noise(
            x, 3, pad_scale=a, data_scale=b, rng=RNG.to(DEVICE), backend="triton"
        ),
        lambda x, a, b: pad_noise_reference(x, RNG, 3, a, b),
        (x, a.to(dtype), b.to(dtype)),
        str(dtype),
        together=(1, 2),
    )
