"""Causal attention, alone and joined to the output projection and the affine step."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import flowops

from .ceilings import Work
from .job import DTYPES, OURS, Job, Missing, OpJob, Spec, compiled, on_gpu
from .jobs_pointwise import eager_affine

MODES = {"forward + backward": True, "forward": False}


def causal_pairs(B: int, T: int, H: int) -> int:
    """Pairs of a query and a key that it may see."""
    return B * H * T * (T + 1) // 2


def attention_work(B, T, H, D, dtype: str, backward: bool) -> Work:
    """Two products a pair forward, five backward; the softmax's exp once in each pass; q, k, v and
    o once, and backward with the gradients of all four."""
    pairs, tokens = causal_pairs(B, T, H), B * T * H * D
    forward, lse = 4 * D * pairs, 4 * B * T * H
    size = DTYPES[dtype].itemsize
    if not backward:
        return Work(bytes=4 * tokens * size, flops=forward, exps=pairs, product=dtype)
    return Work(
        bytes=(4 + 8) * tokens * size + 2 * lse,
        flops=forward + forward * 5 // 2,
        exps=2 * pairs,
        product=dtype,
    )


def attention_specs(device: str) -> Iterator[Spec]:
    if device == "cpu":
        cases, dtypes = [(64, 49, 2, 64), (8, 256, 4, 64), (2, 1024, 4, 64)], ["fp32", "bf16"]
    else:
        cases, dtypes = [(16, 1024, 12, 64), (64, 256, 12, 64), (4, 4096, 12, 64)], ["bf16"]
    for B, T, H, D in cases:
        for dtype in dtypes:
            for mode, backward in MODES.items():
                build = partial(attention_job, device, B, T, H, D, dtype, backward)
                yield Spec("attention", mode, f"{B}x{T}x{H}x{D}", dtype, build)


def attention_job(device, B, T, H, D, dtype: str, backward: bool) -> Job:
    qkv = torch.randn(B, T, 3, H, D, device=device).to(DTYPES[dtype])
    grad = torch.randn(B, T, H, D, device=device).to(DTYPES[dtype])
    return OpJob(
        attention_work(B, T, H, D, dtype, backward),
        {OURS: flowops.causal_attention, **attention_baselines(device, T)},
        (qkv,),
        truth=by_image(partial(flowops.causal_attention, backend="reference")),
        dtype=DTYPES[dtype],
        grads=(grad,) if backward else (),
        leaves=lambda qkv: qkv.unbind(2),
    )


def by_image(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One image at a time: in fp64 the scores of a whole batch may not fit."""

    def batched(*tensors):
        images = zip(*(t.split(1) for t in tensors), strict=True)
        return torch.cat([function(*image) for image in images])

    return batched


def attention_baselines(device: str, T: int) -> dict[str, Callable | Missing]:
    """Functions of q, k, v ``[B, T, H, D]``; the first is the mask of the reference program."""
    mask = torch.tril(torch.ones(T, T, device=device))
    baselines: dict[str, Callable | Missing] = {
        "SDPA, boolean mask": lambda *qkv: _sdpa(*qkv, attn_mask=mask.bool())
    }
    if device == "cpu":
        return {**baselines, "SDPA, causal": lambda *qkv: _sdpa(*qkv, is_causal=True)}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def only(backend: SDPBackend, *qkv):
        with sdpa_kernel(backend):
            return _sdpa(*qkv, is_causal=True)

    return {
        **baselines,
        "SDPA flash": partial(only, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": partial(only, SDPBackend.CUDNN_ATTENTION),
        "flex_attention, compiled": _flex(device, T),
    }


def _sdpa(q, k, v, **options) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _flex(device: str, T: int) -> Callable | Missing:
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return Missing("torch.nn.attention.flex_attention")
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)
    function = compiled(flex_attention)

    def flex(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return function(q, k, v, block_mask=block_mask).transpose(1, 2)

    return flex


# --- joined to the projection and the affine step ------------------------------------------------


def patch_attention_specs(device: str) -> Iterator[Spec]:
    if device == "cpu":
        cases, dtypes = [(64, 49, 2, 64, 16)], ["fp32"]
    else:
        cases, dtypes = [(16, 1024, 12, 64, 12), (64, 256, 12, 64, 48)], ["bf16"]
    for B, T, H, D, C in cases:
        for dtype in dtypes:
            for mode, backward in MODES.items():
                build = partial(patch_attention_job, device, B, T, H, D, C, dtype, backward)
                shape = f"{B}x{T}x{H}x{D}, C={C}"
                yield Spec("patch_attention", mode, shape, dtype, build)


def patch_attention_work(B, T, H, D, C, dtype: str, backward: bool) -> Work:
    """Attention, the product with the projection (twice that backward) and the affine step; o
    itself is kept for backward only, and the affine parameters never."""
    attention = attention_work(B, T, H, D, dtype, backward)
    size, o, weight = DTYPES[dtype].itemsize, B * T * H * D, 2 * C * H * D
    linear, steps = 2 * B * T * weight, B * T * C
    if not backward:
        moved = attention.bytes - o * size + weight * size + 2 * 4 * steps
        return Work(moved, attention.flops + linear, attention.exps + steps, dtype)
    # Against attention alone: grad_o is neither read nor written, the weight is read twice and its
    # gradient written, and x, z, grad_z, x, grad_x pass once each.
    moved = attention.bytes - o * size + 3 * weight * size + 5 * 4 * steps
    return Work(moved, attention.flops + 3 * linear, attention.exps + 2 * steps, dtype)


def patch_attention_job(device, B, T, H, D, C, dtype: str, backward: bool) -> Job:
    stored = DTYPES[dtype]
    qkv = torch.randn(B, T, 3, H, D, device=device).to(stored)
    weight = (0.3 / (H * D) ** 0.5 * torch.randn(2 * C, H * D, device=device)).to(stored)
    bias = (0.1 * torch.randn(2 * C, device=device)).to(stored)
    x = torch.randn(B, T, C, device=device)
    grads = torch.randn(B, T, C, device=device), torch.randn(B, device=device)

    def chain(attention):
        def function(q, k, v, weight, bias, x):
            params = F.linear(attention(q, k, v).flatten(2), weight, bias)
            z, logdet = eager_affine(x, params)
            return z, logdet.to(torch.promote_types(torch.float32, logdet.dtype))

        return function

    causal = chain(partial(_sdpa, is_causal=True))
    exact = by_image(partial(flowops.causal_attention, backend="reference"))
    return OpJob(
        patch_attention_work(B, T, H, D, C, dtype, backward),
        {
            **on_gpu(device, flowops.causal_patch_attention),
            "SDPA, linear, affine": causal,
            "SDPA, linear, affine, compiled": compiled(causal),
        },
        (qkv, weight, bias, x),
        truth=chain(exact),
        dtype=stored,
        grads=grads if backward else (),
        leaves=lambda qkv, *rest: (*qkv.unbind(2), *rest),
    )
