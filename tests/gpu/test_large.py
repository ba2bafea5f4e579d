"""Sizes that the interpreter is too slow for, against fp64 on the same GPU."""

import pytest
import torch

import flowops
from flowops.affine import affine_update_reference
from flowops.gram import se_gram_matmul_reference
from helpers import assert_close
from kernel_checks import values_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def check(public, reference, inputs, what):
    weights = [torch.randn_like(o) for o in _tuple(reference(*inputs))]
    runs = (
        values_and_gradients(public, inputs, weights),
        values_and_gradients(reference, inputs, weights),
        values_and_gradients(reference, [t.double() for t in inputs], weights),
    )
    for i, (a, p, g) in enumerate(zip(*runs, strict=True)):
        assert_close(a, p, g, f"{what} {i}")


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "T", "C"), [(256, 64, 48), (32, 1024, 12), (8, 256, 192)])
def test_affine(B, T, C, dtype):
    x = torch.randn(B, T, C, device="cuda")
    params = 0.5 + 0.3 * torch.randn(B, T, 2 * C, device="cuda")
    check(
        lambda x, p: flowops.affine_update(x, p, backend="triton"),
        affine_update_reference,
        (x.to(dtype), params.to(dtype)),
        f"{B}x{T}x{C}",
    )


@pytest.mark.parametrize("T", [256, 1024, 4096, 16384])
def test_attention_against_torch(T):
    q, k, v = (torch.randn(1, T, 2, 64, device="cuda").bfloat16() for _ in range(3))

    def sdpa(q, k, v):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return out.transpose(1, 2)

    weight = [torch.randn(1, T, 2, 64, device="cuda")]
    ours = values_and_gradients(
        lambda *t: flowops.causal_attention(*t, backend="triton"), (q, k, v), weight
    )
    theirs = values_and_gradients(sdpa, (q, k, v), weight)
    golden = values_and_gradients(sdpa, [t.float() for t in (q, k, v)], weight)
    for a, p, g in zip(ours, theirs, golden, strict=True):
        assert_close(a, p, g, f"{T}")


@pytest.mark.parametrize(
    ("M", "D", "O"), [(150, 8, 16), (256, 2, 4), (512, 32, 64), (150, 63, 128)]
)
def test_gram(M, D, O):
    x, z = torch.randn(20_000, D, device="cuda"), torch.randn(M, D, device="cuda")
    w, lengthscale = torch.rand(M, O, device="cuda") / M, torch.tensor(D**0.5, device="cuda")
    check(
        lambda *t: flowops.se_gram_matmul(*t, backend="triton"),
        se_gram_matmul_reference,
        (x, z, w, lengthscale),
        f"{M} {D} {O}",
    )
