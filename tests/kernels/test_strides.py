"""Views whose elements lie more than 2^31 apart: offsets that 32 bits can't hold. What lies between
them is reserved and never touched."""

import pytest
import torch

import flowops
from kernel_checks import DEVICE

FAR = 2**30 + 8


def spread(shape, strides, dtype=torch.float16):
    """Random values ``[shape]`` at these strides."""
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    whole = torch.empty(extent, dtype=dtype, device=DEVICE)
    view = whole.as_strided(shape, strides)
    view.copy_(torch.randn(shape))
    return view


def same_as_dense(function, *views):
    outs = function(*views)
    expected = function(*(v.contiguous() for v in views))
    for a, e in zip(*(o if isinstance(o, tuple) else (o,) for o in (outs, expected)), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("strides", [(2 * FAR, 4, 1), (8, FAR, 1)])
@pytest.mark.parametrize("inverse", [False, True])
def test_affine(strides, inverse):
    function = flowops.affine_inverse if inverse else flowops.affine_update
    x = spread((2, 3, 4), strides)
    params = torch.randn(2, 3, 8, dtype=torch.float16, device=DEVICE)
    same_as_dense(lambda x: function(x, params, backend="triton"), x)


@pytest.mark.parametrize("strides", [(2 * FAR, 32, 16, 1), (64, FAR, 16, 1), (16, 32, 2 * FAR, 1)])
@pytest.mark.parametrize("S", [3, 33])
def test_attention(strides, S):
    q, k = (torch.randn(2, n, 2, 16, device=DEVICE).half() for n in (S, 3))
    far = spread((2, 3, 2, 16), strides)
    same_as_dense(lambda t: flowops.causal_attention(t, k, k, backend="triton"), far)
    same_as_dense(lambda t: flowops.causal_attention(q[:, :2], t, t, backend="triton"), far)


def test_attention_tile_by_tile():
    """fp32 takes the kernels for long sequences."""
    q = torch.randn(1, 3, 1, 16, device=DEVICE)
    far = spread((1, 3, 1, 16), (16, FAR, 16, 1), torch.float32)
    same_as_dense(lambda t: flowops.causal_attention(q, t, t, backend="triton"), far)


@pytest.mark.parametrize("name", ["x", "z"])
def test_gram(name):
    near, far = torch.randn(3, 4, device=DEVICE).half(), spread((3, 4), (FAR, 1))
    x, z = (far, near) if name == "x" else (near, far)
    same_as_dense(lambda x, z: flowops.se_gram(x, z, 1.5, backend="triton"), x, z)
    w = torch.randn(3, 2, device=DEVICE).half()
    same_as_dense(lambda x, z: flowops.se_gram_matmul(x, z, w, 1.5, backend="triton"), x, z)


def test_pad_noise():
    rng = torch.tensor([1, 2], device=DEVICE)
    far = spread((3, 4), (FAR, 1))
    same_as_dense(lambda x: flowops.pad_noise(x, 2, rng=rng, backend="triton"), far)
