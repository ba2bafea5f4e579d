"""The CUDA kernel of causal_patch_attention; without a GPU in the emulator, where the gradients
come from the reference."""

import math

import pytest
import torch

from flowops import causal_patch_attention, cuda_runtime, dispatch
from kernel_checks import DEVICE, ON_GPU, follows_reference, twice_the_same

USABLE, WHY_NOT = dispatch.backend_state("cuda")
pytestmark = pytest.mark.skipif(not USABLE, reason=WHY_NOT)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
by_dtype = pytest.mark.parametrize("dtype", [BF16, FP16])


def inputs(B, T, H, C, dtype, width=2, x_dtype=None, mean=0.0):
    qkv = torch.randn(B, T, 3, H, 64, dtype=torch.float64).to(dtype)
    weight = torch.randn(width * C, H * 64, dtype=torch.float64) / (8 * math.sqrt(H))
    bias = 0.3 * torch.randn(width * C, dtype=torch.float64)
    bias[: (width - 1) * C] += 0.5  # log-scales whose sum doesn't cancel
    x = torch.randn(B, T, C, dtype=torch.float64) + mean
    return (*qkv.unbind(2), weight.to(dtype), bias.to(dtype), x.to(x_dtype or dtype))


def check(tensors, what, reverse=False, scale=0.125):
    follows_reference(
        lambda *t: causal_patch_attention(*t, reverse=reverse, scale=scale, backend="cuda"),
        lambda *t: causal_patch_attention(*t, reverse=reverse, scale=scale, backend="reference"),
        tensors,
        what,
        together=(0, 1, 2),
        # The log-determinant is summed wide, but from parameters in the dtype of q.
        inner={1: tensors[0].dtype},
    )


def run(tensors, reverse=False, scale=0.125):
    tensors = [t.to(DEVICE) for t in tensors]
    return torch.ops.flowops.causal_patch_attention(*tensors, reverse, scale, "cuda")


SIZES = [
    # B, T, H, C, width, reverse
    (2, 1, 1, 3, 2, False),
    (2, 17, 3, 3, 2, True),
    (1, 63, 3, 12, 2, False),
    (3, 64, 1, 48, 2, True),
    (2, 65, 1, 16, 2, False),
    (1, 100, 3, 12, 2, True),
    (1, 100, 1, 48, 2, False),
    (2, 100, 1, 12, 1, True),
    (1, 70, 1, 25, 2, False),
    (1, 70, 2, 64, 2, True),
    (1, 40, 1, 48, 1, False),
    (1, 256, 1, 48, 2, False),
    (1, 300, 1, 12, 2, False),
]
if ON_GPU:
    SIZES += [(3, 1024, 12, C, 2, reverse) for C in (12, 48) for reverse in (False, True)]


@by_dtype
@pytest.mark.parametrize(("B", "T", "H", "C", "width", "reverse"), SIZES)
def test_follows_the_reference(B, T, H, C, width, reverse, dtype):
    what = f"{B} of {T}, {H} heads, {C} channels, {width} {reverse} {dtype}"
    check(inputs(B, T, H, C, dtype, width), what, reverse)


@by_dtype
@pytest.mark.parametrize("T", [17, 130])
def test_x_in_fp32_and_far_from_zero(T, dtype):
    check(inputs(2, T, 1, 12, dtype, x_dtype=FP32, mean=100.0), f"fp32 x, {T}, {dtype}")
    check(inputs(2, T, 1, 12, dtype, mean=100.0), f"far x, {T}, {dtype}")


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, 1e-40])
def test_scale(scale):
    check(inputs(1, 100, 1, 3, FP16), f"scale {scale}", scale=scale)


@by_dtype
def test_scores_far_apart(dtype):
    """The maximum climbs from key to key, and falls: the running softmax has to follow it."""
    for rising in (1, -1):
        tensors = inputs(1, 200, 1, 12, dtype)
        ramp = torch.linspace(-3, 3, 200)[None, :, None, None] * rising
        k = (tensors[1] * 0.1 + ramp).to(dtype)
        q = tensors[0].abs()
        check((q, k, *tensors[2:]), f"rising {rising}, {dtype}", scale=1.0)


def test_log_sum_exp_and_o():
    tensors = inputs(2, 150, 2, 12, BF16)
    _, _, o, lse = run(tensors)
    golden = torch.ops.flowops.causal_patch_attention(
        *(t.double() for t in tensors), False, 0.125, "reference"
    )
    assert (lse.cpu() - golden[3]).abs().max() < 3e-6  # fp32 sums of 64 products of unit size
    # o is rounded to 8 bits, P before its product too.
    assert (o.cpu() - golden[2]).abs().max() < 2**-8 * golden[2].abs().max()


def test_strides():
    for T, C in ((40, 48), (140, 12)):
        q, k, v, weight, bias, x = inputs(2, T, 2, C, BF16)
        assert not q.is_contiguous()
        padded = torch.full((3, 3, T + 2, 3, 72), float("nan"), dtype=BF16)
        padded[:, 1:, 1:-1, :-1, :64] = torch.stack([q, k, v])
        last = torch.stack([q, k, v]).transpose(-1, -2).contiguous().transpose(-1, -2)
        wide = torch.cat([weight, weight], dim=1)[:, : weight.shape[1]]
        odd = torch.cat([x, x], dim=2)[..., 1 : C + 1]
        expected = run((q, k, v, weight, bias, odd.contiguous()))
        for views in (
            (q, k, v, weight, bias, odd),
            (*padded[:, 1:, 1:-1, :-1, :64].unbind(0), wide, bias, odd),
            (*last.unbind(0), weight, bias, odd),
        ):
            found = run([_moved(t) for t in views])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        one = run((q[:1].expand_as(q), k, v, weight, bias, x))
        assert torch.equal(one[0], run((q[:1].repeat(2, 1, 1, 1), k, v, weight, bias, x))[0])


def _moved(t):
    """t on the device, with its strides and what lies between its elements."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(DEVICE)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.mark.parametrize(("T", "C"), [(60, 12), (150, 12), (150, 48)])
def test_a_later_token_changes_no_bit_of_earlier_ones(T, C):
    """Not even by NaN. That of a value reaches the 16 tokens, from a multiple of 16 on, of which it
    is one: they share a product, in which it is multiplied with 0."""
    tensors = inputs(1, T, 2, C, BF16)
    before = run(tensors)
    for cut in (1, 37, T - 1):
        q, k, v, weight, bias, x = (t.clone() for t in tensors)
        for t in (q, k, x):
            t[:, cut:] = float("nan")
        v[:, cut:] = 1e4
        v[:, -(-cut // 16) * 16 :] = float("nan")
        z, _, o, lse = run((q, k, v, weight, bias, x))
        assert torch.equal(z[:, :cut], before[0][:, :cut])
        assert torch.equal(o[:, :cut], before[2][:, :cut])
        assert torch.equal(lse[..., :cut], before[3][..., :cut])
        assert o[:, cut:].isnan().all()


def test_reversed_tokens_take_the_parameters_of_the_one_before():
    q, k, v, weight, bias, x = inputs(1, 100, 1, 12, BF16)
    z, logdet, *_ = run((q, k, v, weight, bias, x))
    backwards, same, *_ = run((q, k, v, weight, bias, x.flip(1)), reverse=True)
    assert torch.equal(backwards.flip(1), z)
    assert torch.equal(same, logdet)


def test_images_do_not_depend_on_each_other():
    tensors = inputs(3, 70, 1, 12, FP16)
    whole = run(tensors)
    alone = run([*(t[1:2] for t in tensors[:3]), *tensors[3:5], tensors[5][1:2]])
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_the_same_bits_in_any_order(monkeypatch):
    for shape in ((2, 100, 2, 12), (1, 70, 2, 48)):
        tensors = inputs(*shape, BF16)
        first = run(tensors)
        for seed in () if ON_GPU else (0, 2, 3):
            monkeypatch.setattr(cuda_runtime, "emulator_seed", seed)
            assert all(torch.equal(a, b) for a, b in zip(run(tensors), first, strict=True))
        on_device = tuple(t.to(DEVICE) for t in tensors)
        twice_the_same(lambda *t: causal_patch_attention(*t, backend="cuda"), on_device)


def test_what_has_no_kernel_is_refused():
    def refused(reason, *tensors):
        with pytest.raises(RuntimeError, match=reason):
            run(tensors)

    q, k, v, weight, bias, x = inputs(1, 5, 1, 4, BF16)
    refused("x in torch.float64 with q in torch.bfloat16", q, k, v, weight, bias, x.double())
    refused("q in torch.float32, only", *(t.float() for t in (q, k, v, weight, bias, x)))
    narrow = [t[..., :32] for t in (q, k, v)]
    refused("heads are 32 wide", *narrow, weight[:, :32], bias, x)
    refused("65 channels", q, k, v, *inputs(1, 5, 1, 65, BF16)[3:])
    odd = torch.zeros(1, 5, 1, 68, dtype=BF16)[..., 4:]
    refused("rows of k do not begin at multiples of 16 bytes", q, odd, v, weight, bias, x)
