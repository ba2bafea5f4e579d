import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowops import affine_inverse, affine_update
from flowops.affine import affine_inverse_reference, affine_update_reference
from kernel_checks import BACKENDS, DEVICE, DTYPES, EXAMPLES, follows_reference, twice_the_same

OPS = {
    "update": (affine_update, affine_update_reference),
    "inverse": (affine_inverse, affine_inverse_reference),
}


def data(B, T, C, width, dtype, params_dtype=None, mean=0.0):
    """Log-scales around 0.5, so that their sum does not cancel."""
    x = torch.randn(B, T, C, dtype=torch.float64) + mean
    params = torch.randn(B, T, width * C, dtype=torch.float64) + mean
    params[..., : (width - 1) * C] = 0.5 + 0.4 * (params[..., : (width - 1) * C] - mean)
    return x.to(dtype), params.to(params_dtype or dtype)


def check(backend, op, x, params, reverse, what):
    public, reference = OPS[op]
    follows_reference(
        lambda x, p: public(x, p, reverse=reverse, backend=backend),
        lambda x, p: reference(x, p, reverse),
        (x, params),
        what,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    op=st.sampled_from(sorted(OPS)),
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 17, 63, 100]),
    C=st.sampled_from([1, 3, 12, 17, 48, 63]),
    width=st.sampled_from([1, 2]),
    reverse=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 100.0]),
)
@example("update", 2, 100, 48, 2, True, torch.float32, 100.0)  # several chunks a row
@example("update", 2, 1, 1, 2, False, torch.float32, 0.0)
@example("inverse", 1, 1000, 12, 2, True, torch.float32, 0.0)
@example("inverse", 1, 64, 192, 2, False, torch.float16, 0.0)
def test_follows_the_reference(backend, op, B, T, C, width, reverse, dtype, mean):
    x, params = data(B, T, C, width, dtype, mean=mean)
    check(backend, op, x, params, reverse, f"{op} {list(params.shape)} {dtype} reverse={reverse}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_params_in_a_narrower_dtype(backend, op):
    x, params = data(2, 17, 12, 2, torch.float32, torch.float16)
    check(backend, op, x, params, True, op)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_strides(backend, op):
    x, params = data(3, 17, 12, 2, torch.float32)
    spread = torch.full((4, 20, 30), float("nan"))
    spread[1:, 2:-1, 4:-2] = params
    by_token = x.transpose(0, 1).contiguous().transpose(0, 1)
    last = x.transpose(1, 2).contiguous().transpose(1, 2)
    for odd in (by_token, last, x[:1].expand(3, -1, -1)):
        assert not odd.is_contiguous()
        check(backend, op, odd, spread[1:, 2:-1, 4:-2], False, f"{op} {odd.stride()}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_log_scales_behave_like_exp(backend):
    a = torch.tensor([80, -80, 88.5, -88.5, 100, -100, 200, -200, 1e30, -1e30])
    a = torch.cat([a, torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])])
    params = torch.zeros(1, 2, 2 * len(a))
    params[0, 0, : len(a)] = a
    x = affine_inverse(torch.ones(1, 2, len(a)).to(DEVICE), params.to(DEVICE), backend=backend)
    expected = torch.exp(a)
    # The hardware's exp2 may take denormal results for 0.
    torch.testing.assert_close(x[0, 1].cpu(), expected, rtol=3e-7, atol=1.2e-38, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exp_is_accurate_over_its_whole_range(backend):
    a = torch.linspace(-87, 87, 4001)
    params = torch.zeros(1, 2, 2 * len(a))
    params[0, 0, : len(a)] = a
    ones = torch.ones(1, 2, len(a)).to(DEVICE)
    x = affine_inverse(ones, params.to(DEVICE), backend=backend)
    relative = x[0, 1].cpu().double() / torch.exp(a.double()) - 1
    assert relative.abs().max() < 3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_logdet_without_scales_is_zero(backend):
    x, params = (t.to(DEVICE) for t in data(3, 17, 5, 1, torch.float32))
    assert torch.equal(affine_update(x, params, backend=backend)[1], torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    x, params = (t.to(DEVICE) for t in data(3, 100, 48, 2, torch.float32))
    twice_the_same(lambda x, p: affine_update(x, p, backend=backend), (x, params))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_too_long_to_count_are_refused(backend):
    x = torch.zeros(1, 1, 1).expand(1, 2**30, 2).to(DEVICE)
    with pytest.raises(RuntimeError, match=r"a batch row has 2\^31 elements"):
        affine_update(x, x, backend=backend)
