import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowops import causal_attention, causal_patch_attention
from flowops.attention import causal_attention_reference
from flowops.patch_attention import causal_patch_attention_reference
from kernel_checks import DEVICE, DTYPES, EXAMPLES, ON_GPU, follows_reference, twice_the_same

FP32 = torch.float32


def qkv(B, T, S, H, D, dtype=FP32, mean=0.0):
    shapes = ((B, T, H, D), (B, S, H, D), (B, S, H, D))
    return tuple((torch.randn(s, dtype=torch.float64) + mean).to(dtype) for s in shapes)


def check(inputs, what, scale=None):
    number = inputs[0].shape[3] ** -0.5 if scale is None else scale
    follows_reference(
        lambda *t: causal_attention(*t, scale=scale, backend="triton"),
        # Through the op: backward from o and the log-sum-exp, as the kernels have it.
        lambda *t: causal_attention(*t, scale=number, backend="reference"),
        inputs,
        what,
        together=(0, 1, 2),
    )


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 2, 17, 33, 63, 64, 65]),
    prefix=st.sampled_from([0, 0, 1, 30, 64]),
    H=st.integers(1, 3),
    D=st.sampled_from([8, 16, 24, 32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
)
@example(1, 1, 0, 1, 16, FP32)
@example(2, 63, 0, 2, 64, FP32)
@example(1, 100, 0, 2, 32, FP32)
@example(1, 17, 100, 1, 128, torch.float16)
def test_sequences_that_fit_on_chip(B, T, prefix, H, D, dtype):
    check(qkv(B, T, T + prefix, H, D, dtype), f"{T} after {prefix}, {H} heads of {D}, {dtype}")


LONG = [
    (300, 300, 16, FP32),
    (1, 300, 64, FP32),
    (63, 290, 32, FP32),
    (130, 130, 128, FP32),
    (129, 129, 64, torch.float64),
    (257, 257, 32, torch.float16),
]
if ON_GPU:
    LONG += [
        (T, S, D, dtype)
        for T, S in ((256, 256), (1000, 1000), (1024, 1024), (17, 1000), (4100, 4100))
        for D in (16, 32, 64, 128)
        for dtype in (FP32, torch.bfloat16, torch.float16)
    ]


@pytest.mark.parametrize(("T", "S", "D", "dtype"), LONG)
def test_long_sequences(T, S, D, dtype):
    check(qkv(1, T, S, 1, D, dtype), f"{T} of {S}, {D}, {dtype}")


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.parametrize("S", [33, 290])
def test_scale(scale, S):
    check(qkv(1, 33, S, 1, 16), f"{scale} {S}", scale)


@pytest.mark.parametrize("S", [63, 290])
def test_keys_far_from_zero(S):
    q, k, v = qkv(1, 33, S, 2, 32)
    check((q, k + 10, v + 10), "far")


@pytest.mark.parametrize("T", [40, 270])
def test_any_strides(T):
    q, k, v = qkv(2, T, T, 2, 16)
    by_head = torch.stack([q, k, v]).transpose(2, 3).contiguous().transpose(2, 3).unbind(0)
    packed = torch.stack([q, k, v], dim=2).unbind(2)
    padded = torch.full((3, 3, T + 2, 3, 24), float("nan"))
    padded[:, 1:, 1:-1, :-1, :16] = torch.stack([q, k, v])
    sliced = padded[:, 1:, 1:-1, :-1, :16].unbind(0)
    last = torch.stack([q, k, v]).transpose(-1, -2).contiguous().transpose(-1, -2).unbind(0)
    expected = causal_attention(*(t.to(DEVICE) for t in (q, k, v)), backend="triton")
    for views in (by_head, packed, sliced, last):
        assert not any(t.is_contiguous() for t in views)
        # clone() would make the views dense
        out = causal_attention(*(_moved(t) for t in views), backend="triton")
        assert torch.equal(out, expected)
    if T == 40:
        check(packed, "packed")


def _moved(t):
    """t on the device, with its strides and what lies between its elements."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(DEVICE)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def test_a_later_token_changes_no_bit_of_earlier_outputs():
    for T in (40, 270):
        q, k, v = (t.to(DEVICE) for t in qkv(1, T, T, 1, 16))
        before = causal_attention(q, k, v, backend="triton")
        for cut in (1, T // 2, T - 1):
            changed = [t.clone() for t in (q, k, v)]
            for t in changed:
                t[:, cut:] = 1e4
            after = causal_attention(*changed, backend="triton")
            assert torch.equal(after[:, :cut], before[:, :cut])


@pytest.mark.parametrize("T", [40, 270])
def test_deterministic(T):
    inputs = tuple(t.to(DEVICE) for t in qkv(1, T, T, 2, 16))
    twice_the_same(lambda *t: causal_attention(*t, backend="triton"), inputs)


def test_heads_too_wide_are_refused():
    inputs = [t.to(DEVICE) for t in qkv(1, 2, 2, 1, 129)]
    with pytest.raises(RuntimeError, match="heads of width 129 are wider than"):
        causal_attention(*inputs, backend="triton")


def patch_inputs(B, T, H, D, C, width, dtype, x_dtype=None):
    q, k, v = qkv(B, T, T, H, D, dtype)
    weight = torch.randn(width * C, H * D, dtype=torch.float64) / (H * D) ** 0.5
    bias = 0.3 * torch.randn(width * C, dtype=torch.float64)
    bias[: (width - 1) * C] += 0.5  # log-scales whose sum doesn't cancel
    x = torch.randn(B, T, C, dtype=torch.float64)
    return q, k, v, weight.to(dtype), bias.to(dtype), x.to(x_dtype or dtype)


def check_patch(inputs, reverse, what):
    scale = inputs[0].shape[3] ** -0.5
    follows_reference(
        lambda *t: causal_patch_attention(*t, reverse=reverse, backend="triton"),
        lambda *t: causal_patch_attention(*t, reverse=reverse, scale=scale, backend="reference"),
        inputs,
        what,
        together=(0, 1, 2),
        # The log-determinant is summed wide, but from parameters in the dtype of q.
        inner={1: inputs[0].dtype},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "H", "D", "C", "width", "reverse"),
    [
        (1, 1, 16, 3, 2, False),
        (17, 2, 8, 4, 1, True),
        (65, 3, 32, 12, 2, True),
        (70, 2, 64, 48, 2, False),
        (33, 1, 128, 17, 2, False),
        (20, 2, 16, 192, 2, True),  # too wide for registers: composed
    ],
)
def test_patch_attention(T, H, D, C, width, reverse, dtype):
    inputs = patch_inputs(2, T, H, D, C, width, dtype)
    check_patch(inputs, reverse, f"{T} {H}x{D} {C} {width} {reverse} {dtype}")


@pytest.mark.parametrize("dtype", [FP32, torch.float64])
@pytest.mark.parametrize(("C", "width", "reverse"), [(12, 2, True), (48, 2, False), (5, 1, True)])
def test_fused_patch_attention_in_wide_dtypes(C, width, reverse, dtype, monkeypatch):
    """They are composed because a fused program would spill, not because it would be wrong."""
    from flowops.kernels import patch_attention

    monkeypatch.setattr(patch_attention, "fuses", lambda dtype, channels: True)
    inputs = patch_inputs(2, 70, 2, 16, C, width, dtype)
    check_patch(inputs, reverse, f"{C} {width} {reverse} {dtype}")


def test_patch_attention_keeps_x_in_its_own_storage():
    check_patch(patch_inputs(2, 17, 2, 16, 4, 2, torch.float16, FP32), False, "fp32 x")
    z, logdet = causal_patch_attention(
        *(t.to(DEVICE) for t in patch_inputs(2, 17, 2, 16, 4, 2, FP32, torch.float64)),
        backend="triton",
    )
    assert z.dtype == logdet.dtype == torch.float64


def test_patch_attention_of_strided_views():
    q, k, v, weight, bias, x = patch_inputs(2, 17, 2, 16, 4, 2, FP32)
    packed = torch.stack([q, k, v], dim=2).unbind(2)
    wide = torch.cat([x, x], dim=2)[..., 2:6]
    spread = torch.stack([weight, weight], dim=-1).flatten(-2)[:, ::2]
    check_patch((*packed, spread, bias, wide), True, "strided")


def test_patch_attention_is_causal_and_its_logdet_that_of_the_jacobian():
    T, C = 4, 2
    q, k, v, weight, bias, x = (
        t.to(DEVICE) for t in patch_inputs(1, T, 2, 16, C, 2, torch.float64)
    )

    def update(flat):
        out = causal_patch_attention(q, k, v, weight, bias, flat.view(1, T, C), backend="triton")
        return out[0].flatten()

    logdet = causal_patch_attention(q, k, v, weight, bias, x, backend="triton")[1]
    jacobian = torch.autograd.functional.jacobian(update, x.flatten())
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - logdet[0]) < 1e-10


def test_reference_of_patch_attention_is_the_composed_formula():
    inputs = patch_inputs(1, 5, 1, 8, 3, 2, torch.float64)
    z, logdet = causal_patch_attention_reference(*inputs, False, 0.3)
    o = causal_attention_reference(*inputs[:3], 0.3)[0]
    params = torch.nn.functional.linear(o.flatten(2), *inputs[3:5])
    assert torch.equal(logdet, -params[:, :-1, :3].sum((1, 2)))
    assert torch.equal(z[:, 0], inputs[5][:, 0])
