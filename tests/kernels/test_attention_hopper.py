"""The kernels for Hopper. By itself only a GPU of compute capability 9.0 gets them."""

import pytest
import torch

from flowops import cuda_runtime
from flowops.attention import causal_attention_reference
from flowops.cuda import attention_hopper
from flowops.patch_attention import causal_patch_attention_reference
from helpers import assert_close, poison
from kernel_checks import DEVICE, ON_GPU

runs_here = torch.cuda.get_device_capability() == (9, 0) if ON_GPU else cuda_runtime.emulating()
pytestmark = pytest.mark.skipif(not runs_here, reason="needs a Hopper GPU or the emulator")

BF16, F16, FP32 = torch.bfloat16, torch.float16, torch.float32
D = attention_hopper.WIDTH


def inputs(B, T, H, C, width, dtype, x_dtype=None):
    q, k, v = torch.randn(3, B, T, H, D, dtype=torch.float64).to(dtype)
    weight = torch.randn(width * C, H * D, dtype=torch.float64) / (H * D) ** 0.5
    bias = 0.3 * torch.randn(width * C, dtype=torch.float64)
    bias[: (width - 1) * C] += 0.5  # log-scales whose sum doesn't cancel
    x = torch.randn(B, T, C, dtype=torch.float64)
    return q, k, v, weight.to(dtype), bias.to(dtype), x.to(x_dtype or dtype)


def fused(tensors, reverse=False, scale=D**-0.5):
    tensors = [_moved(t) for t in tensors]
    assert attention_hopper.takes(*tensors)
    poison(*tensors)
    outs = attention_hopper.causal_patch_attention_fwd(*tensors, reverse, scale)
    return [t.cpu() for t in outs]


def _moved(t):
    """t on the device, with its strides and what lies between its elements."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(DEVICE)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def reference(tensors, reverse, scale):
    o, lse = causal_attention_reference(*tensors[:3], scale)
    return (*causal_patch_attention_reference(*tensors, reverse, scale), o, lse)


def check(tensors, what, reverse=False, scale=D**-0.5):
    runs = fused(tensors, reverse, scale), reference(tensors, reverse, scale)
    golden = reference([t.double() for t in tensors], reverse, scale)
    # The log-determinant is summed wide, but from parameters in the dtype of q.
    dtypes = {"z": None, "logdet": tensors[0].dtype, "o": None, "lse": None}
    for (name, dtype), a, p, g in zip(dtypes.items(), *runs, golden, strict=True):
        assert a.dtype == p.dtype, name
        assert_close(a, p, g, f"{what}: {name}", dtype)


# Among them: one token, half a warpgroup, one and two full tiles, one token more, more stages of
# keys than shared memory has, more units than blocks; every size of the weight's tile.
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("B", "T", "H", "C", "width", "reverse"),
    [
        (1, 1, 1, 3, 2, False),
        (2, 17, 3, 12, 2, True),
        (1, 64, 3, 3, 1, True),
        (2, 100, 1, 48, 2, False),
        (1, 128, 1, 17, 1, False),
        (1, 129, 3, 12, 2, True),
        (3, 129, 1, 64, 2, False),
        (1, 300, 1, 48, 2, True),
    ],
)
def test_follows_the_reference(B, T, H, C, width, reverse, dtype):
    tensors = inputs(B, T, H, C, width, dtype)
    check(tensors, f"{B}x{T} {H}x{D} {C} {width} {reverse} {dtype}", reverse)


def test_many_tiles_and_heads():
    check(inputs(1, 300, 3, 12, 2, BF16), "300 of 3 heads")


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale):
    check(inputs(1, 70, 1, 3, 2, F16), f"scale {scale}", scale=scale)


def test_scores_that_grow_along_the_keys():
    """The running maximum changes with every tile of keys."""
    q, k, *rest = inputs(1, 200, 1, 3, 2, F16)
    k = (k + torch.linspace(0, 20, 200)[None, :, None, None] * q.mean(1, keepdim=True)).to(F16)
    check((q, k, *rest), "growing scores")


def test_x_in_fp32():
    check(inputs(2, 70, 1, 5, 2, BF16, FP32), "fp32 x", True)


def test_strides():
    q, k, v, weight, bias, x = inputs(2, 70, 2, 5, 2, BF16)
    expected = fused((q, k, v, weight, bias, x))
    packed = torch.stack([q, k, v], dim=2).unbind(2)
    by_head = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    padded = torch.full((3, 4, 72, 3, D + 8), float("nan"), dtype=BF16)
    padded[:, 1:3, 1:-1, 1:, 8:] = torch.stack([q, k, v])
    sliced = padded[:, 1:3, 1:-1, 1:, 8:].unbind(0)
    wide_weight = torch.cat([weight, torch.full_like(weight, float("nan"))], 1)[:, : 2 * D]
    wide_x = torch.cat([x, x], 2)[..., 5:]
    for views in (packed, by_head, sliced):
        assert not any(t.is_contiguous() for t in (*views, wide_weight, wide_x))
        outs = fused((*views, wide_weight, bias, wide_x))
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


def test_a_later_token_changes_no_bit_of_earlier_outputs():
    tensors = inputs(1, 140, 1, 3, 2, F16)
    z, _, o, lse = fused(tensors)
    for cut in (1, 64, 100, 139):
        changed = [t.clone() for t in tensors]
        for t in (*changed[:3], changed[5]):
            t[:, cut:] = 60.0
        after = fused(changed)
        assert torch.equal(after[0][:, :cut], z[:, :cut])
        assert torch.equal(after[2][:, :cut], o[:, :cut])
        assert torch.equal(after[3][..., :cut], lse[..., :cut])


@pytest.mark.skipif(ON_GPU, reason="the order of threads is the emulator's")
def test_the_order_of_threads_changes_no_bit(monkeypatch):
    tensors = inputs(3, 140, 2, 12, 2, BF16)
    runs = []
    for seed in range(4):
        monkeypatch.setattr(cuda_runtime, "emulator_seed", seed)
        runs.append(fused(tensors))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_the_grid_changes_no_bit(monkeypatch):
    tensors = inputs(3, 140, 1, 3, 2, F16)
    expected = fused(tensors)
    for blocks in (1, 5):
        monkeypatch.setattr(
            attention_hopper, "blocks_at_once", lambda device, per_processor, n=blocks: n
        )
        assert all(torch.equal(a, b) for a, b in zip(fused(tensors), expected, strict=True))


def test_what_is_not_taken():
    names = ("q", "k", "v", "weight", "bias", "x")
    tensors = dict(zip(names, inputs(1, 70, 1, 3, 2, BF16), strict=True))
    takes = attention_hopper.takes
    assert takes(**tensors)
    wide = torch.zeros(1, 70, 1, D + 1, dtype=BF16)
    for other in (
        {"x": tensors["x"].half()},
        {"x": torch.zeros(1, 70, 65, dtype=BF16)},
        {"q": tensors["q"].float()},
        {"q": torch.zeros(1, 70, 1, 32, dtype=BF16)},
        {"k": wide[..., 1:]},
        {"weight": torch.zeros(D, 6, dtype=BF16).mT},
    ):
        assert not takes(**tensors | other)
    if not ON_GPU:
        assert not attention_hopper.serves(**tensors)
    assert attention_hopper.shared_bytes(128) == 160 * 1024 + 112
