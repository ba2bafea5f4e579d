"""Random blocks to decode, and the same call on the reference and the GPU kernels."""

import torch

from flowops import decode_graphs
from flowops.decode import decode_block_reference
from flowops.decode_weights import PackedBlock
from helpers import assert_close
from kernel_checks import DEVICE

EPS, EXACT = 1e-5, {"tol": 0.0, "window": 1, "even": 0.0}


def inputs(B, T, C, heads=1, D=16, L=1, E=32, guided=False, shifts=False, spread=0.3):
    """z, packed weights, embed and guide of a random block, fp32."""
    W, P, R = heads * D, (1 if shifts else 2) * C, (2 if guided else 1) * B
    norm = torch.stack([1 + 0.1 * torch.randn(L, W), 0.1 * torch.randn(L, W)], 1)
    weights = PackedBlock(
        w_in=torch.randn(W, C) / C**0.5,
        position=0.3 * torch.randn(T, W),
        norm1=norm,
        qkv=torch.randn(L, 3 * W, W) / W**0.5,
        qkv_bias=0.1 * torch.randn(L, 3 * W),
        proj=torch.randn(L, W, W) / W**0.5,
        proj_bias=0.1 * torch.randn(L, W),
        norm2=norm.flip(2),
        up=torch.randn(L, E, W) / W**0.5,
        up_bias=0.1 * torch.randn(L, E),
        down=torch.randn(L, W, E) / E**0.5,
        down_bias=0.1 * torch.randn(L, W),
        w_out=spread * torch.randn(P, W) / W**0.5,
        b_out=0.1 * torch.randn(P),
    )
    guide = torch.randn(T, 2) if guided else torch.empty(0, 2)
    return torch.randn(B, T, C), weights, 0.3 * torch.randn(R, W), guide, heads


def on_triton(z, weights, embed, guide, heads, temperature=1.0, reverse=False, **solver):
    solver = EXACT | solver
    out = decode_graphs.decode_block(
        *(z.to(DEVICE), [w.to(DEVICE) for w in weights], embed.to(DEVICE), guide.to(DEVICE)),
        *(heads, EPS, temperature, reverse, solver["tol"], solver["window"], solver["even"]),
        "tf32x3",
    )
    return tuple(t.cpu() for t in out)


def on_cuda(z, weights, embed, guide, heads, temperature=1.0, reverse=False, **solver):
    solver = EXACT | solver
    out = torch.ops.flowops.decode_block(
        *(z.to(DEVICE), [w.to(DEVICE) for w in weights], embed.to(DEVICE), guide.to(DEVICE)),
        *(heads, EPS, temperature, reverse, len(weights.b_out), False),
        *(solver["tol"], solver["window"], solver["even"], "cuda"),
    )
    return tuple(t.cpu() for t in out)


def on_reference(z, weights, embed, guide, heads, temperature=1.0, reverse=False, **solver):
    solver = EXACT | solver
    return decode_block_reference(
        *(z, weights, embed, guide, heads, EPS, temperature, reverse, len(weights.b_out), False),
        *(solver["tol"], solver["window"], solver["even"]),
    )


def doubled(z, weights, embed, guide, heads):
    weights = PackedBlock(*(w.double() for w in weights))
    return z.double(), weights, embed.double(), guide.double(), heads


def check(given, what="", backend="triton", dtype=None, **options):
    """Against the reference by the tolerance rule, in the storage dtype's units. Returns the
    result."""
    actual = {"triton": on_triton, "cuda": on_cuda}[backend](*given, **options)
    plain, golden = on_reference(*given, **options), on_reference(*doubled(*given), **options)
    for i in range(2):
        assert actual[i].dtype == torch.float32
        # Residuals are differences of tokens and round as those do.
        scale = golden[0].abs().max()
        assert_close(
            *(torch.cat([r[i].flatten() / scale, torch.ones(1)]) for r in (actual, plain, golden)),
            f"{what} {i}",
            dtype,
        )
    assert actual[2].tolist() == golden[2].tolist(), what
    return actual
