r"""The head of an autoregressive block as one op: attention, output projection, affine step.

    o = causal_attention(q, k, v)
    z, logdet = affine_update(x, concat_heads(o) W^T + bias)

Source: Zhai et al. (arXiv 2412.06329), section 2.2.
"""

import functools

import torch
from torch import Tensor

from . import dispatch
from .affine import affine_update_backward_reference, affine_update_reference, cpu_reason
from .attention import (
    attention_flops,
    autocast,
    causal_attention_backward_reference,
    causal_attention_reference,
    check_attention,
    dense_columns,
    sdpa_reason,
    triton_precision,
    triton_reason,
)

# --- reference -----------------------------------------------------------------------------------


def causal_patch_attention_reference(
    q, k, v, weight, bias, x, reverse: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """``causal_patch_attention`` in plain PyTorch."""
    o = causal_attention_reference(q, k, v, scale)[0]
    return affine_update_reference(x, _params(o, weight, bias), reverse)


def causal_patch_attention_backward_reference(
    grad_z, grad_logdet, q, k, v, weight, bias, x, reverse, scale
):
    o, lse = causal_attention_reference(q, k, v, scale)
    grad_x, grad_params = affine_update_backward_reference(
        grad_z, grad_logdet, x, _params(o, weight, bias), reverse
    )
    grad_o = (grad_params @ weight).view(o.shape)
    grads = causal_attention_backward_reference(grad_o, q, k, v, o, lse, scale)
    grad_weight = torch.einsum("btp,btw->pw", grad_params, o.flatten(2))
    return *grads, grad_weight, grad_params.sum((0, 1)), grad_x


def _params(o: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(o.flatten(2), weight, bias)


# --- registration --------------------------------------------------------------------------------


@dispatch.define_op(
    "causal_patch_attention(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor bias, Tensor x,"
    " bool reverse, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda q, k, v, weight, *_: attention_flops(q, k) + 2 * q[0] * q[1] * weight[0] * weight[1],
)
def _(q, k, v, weight, bias, x, reverse, scale):
    B, T, H, _ = q.shape
    lse = q.new_empty((B, H, T), dtype=dispatch.compute_dtype(q))
    logdet = x.new_empty(B, dtype=dispatch.compute_dtype(q, x))
    return x.new_empty(x.shape), logdet, q.new_empty(q.shape), lse


@dispatch.define_op(
    "causal_patch_attention_backward(Tensor grad_z, Tensor grad_logdet, Tensor q, Tensor k,"
    " Tensor v, Tensor weight, Tensor bias, Tensor x, Tensor o, Tensor lse, bool reverse,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad_z, grad_logdet, q, k, v, weight, *_: (
        attention_flops(q, k) * 5 // 2 + 6 * q[0] * q[1] * weight[0] * weight[1]
    ),
)
def _(grad_z, grad_logdet, q, k, v, weight, bias, x, o, lse, reverse, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, weight, bias, x))


# --- backends ------------------------------------------------------------------------------------


def _chain(q, k, v, weight, bias, x, reverse, scale, backend):
    """``causal_patch_attention`` as a chain of one backend's ops."""
    o, lse = torch.ops.flowops.causal_attention(q, k, v, scale, backend)
    z, logdet = torch.ops.flowops.affine_update(x, _params(o, weight, bias), reverse, backend)
    return z, logdet, o, lse


def _chain_backward(grad_z, grad_logdet, q, k, v, weight, bias, x, o, lse, reverse, scale, backend):
    grad_x, grad_params = torch.ops.flowops.affine_update_backward(
        grad_z, grad_logdet, x, _params(o, weight, bias), reverse, backend
    )
    grad_o = (grad_params @ weight).view(o.shape)
    return _gradients(grad_x, grad_params, grad_o, q, k, v, o, lse, scale, backend)


def _gradients(grad_x, grad_params, grad_o, q, k, v, o, lse, scale, backend):
    """What follows from the gradients of the projection's output and input."""
    grad_weight = grad_params.flatten(0, 1).mT @ o.flatten(2).flatten(0, 1)
    grads = torch.ops.flowops.causal_attention_backward(grad_o, q, k, v, o, lse, scale, backend)
    return *grads, grad_weight.contiguous(), grad_params.sum((0, 1)), grad_x


def _cpu_supports(q, k, v, weight, bias, x, *rest) -> str | None:
    return sdpa_reason(rest[-1]) or cpu_reason(x, weight)


for _backend, _supports in (("reference", None), ("cpu", _cpu_supports)):
    dispatch.implement("causal_patch_attention", _backend, _supports)(
        functools.partial(_chain, backend=_backend)
    )
    dispatch.implement(
        "causal_patch_attention_backward",
        _backend,
        _supports and (lambda grad_z, grad_logdet, *args: _cpu_supports(*args)),
    )(functools.partial(_chain_backward, backend=_backend))


def _triton_supports(q, k, v, weight, bias, x, *_) -> str | None:
    return triton_reason(q, x)


@dispatch.implement("causal_patch_attention", "triton", _triton_supports)
def _(q, k, v, weight, bias, x, reverse, scale):
    from .kernels import patch_attention as kernels

    if not kernels.fuses(q.dtype, x.shape[2]):
        return _chain(q, k, v, weight, bias, x, reverse, scale, "triton")
    return kernels.causal_patch_attention_fwd(
        *(*dense_columns(q, k, v), *dense_columns(weight, bias, x)),
        *(reverse, scale, triton_precision()),
    )


@dispatch.implement(
    "causal_patch_attention_backward", "triton", lambda *args: _triton_supports(*args[2:])
)
def _(grad_z, grad_logdet, q, k, v, weight, bias, x, o, lse, reverse, scale):
    from .kernels import patch_attention as kernels

    if not kernels.fuses(q.dtype, x.shape[2]):
        return _chain_backward(
            grad_z, grad_logdet, q, k, v, weight, bias, x, o, lse, reverse, scale, "triton"
        )
    grad_x, grad_params, grad_o = kernels.causal_patch_attention_bwd_params(
        *(grad_z.contiguous(), grad_logdet.contiguous(), q, *dense_columns(weight, bias, x), o),
        *(reverse, triton_precision()),
    )
    return _gradients(grad_x, grad_params, grad_o, q, k, v, o, lse, scale, "triton")


def _cuda_supports(*args) -> str | None:
    return _cuda().patch_attention_reason(*args[:6])


def _cuda():
    from .cuda import attention

    return attention


@dispatch.implement("causal_patch_attention", "cuda", _cuda_supports)
def _(q, k, v, weight, bias, x, reverse, scale):
    return _cuda().causal_patch_attention_fwd(
        *(*dense_columns(q, k, v), *dense_columns(weight, bias, x)), reverse, scale
    )


def _gradients_of_cuda(q: Tensor) -> str:
    """What computes them, there being no CUDA kernel: Triton's on a GPU, and where the emulator
    runs the forward pass, the formula."""
    return "triton" if q.is_cuda else "reference"


def _cuda_backward_supports(*args) -> str | None:
    op, backend = "causal_patch_attention_backward", _gradients_of_cuda(args[2])
    return dispatch.can_run(op, backend, *args)[1] or None


@dispatch.implement("causal_patch_attention_backward", "cuda", _cuda_backward_supports)
def _(*args):
    backend = _gradients_of_cuda(args[2])
    return torch.ops.flowops.causal_patch_attention_backward(*args, backend)


# --- autograd ------------------------------------------------------------------------------------


class CausalPatchAttentionFunction(torch.autograd.Function):
    """As ``CausalAttentionFunction``; the affine parameters are computed again from o."""

    @staticmethod
    def forward(ctx, q, k, v, weight, bias, x, reverse, scale, backend):
        z, logdet, o, lse = torch.ops.flowops.causal_patch_attention(
            q, k, v, weight, bias, x, reverse, scale, backend
        )
        ctx.save_for_backward(q, k, v, weight, bias, x, o, lse)
        ctx.reverse, ctx.scale, ctx.backend = reverse, scale, backend
        return z, logdet

    @staticmethod
    def backward(ctx, grad_z, grad_logdet):
        *inputs, o, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                *causal_patch_attention_backward_reference(
                    grad_z, grad_logdet, *inputs, ctx.reverse, ctx.scale
                ),
                *(None, None, None),
            )
        grads = torch.ops.flowops.causal_patch_attention_backward(
            grad_z, grad_logdet, *inputs, o, lse, ctx.reverse, ctx.scale, ctx.backend
        )
        return *grads, None, None, None


# --- public --------------------------------------------------------------------------------------


def causal_patch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    reverse: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``affine_update(x, concat_heads(causal_attention(q, k, v)) @ weight.T + bias)`` as one op.

    Arithmetic as in the ops it joins. Under autocast all but x are cast to its dtype.

    Args:
        q, k, v: as in ``causal_attention``, with S = T.
        weight: ``[2C, H * D]``, rows of the log-scales first; or ``[C, H * D]``, shifts alone.
        bias: ``[2C]`` or ``[C]``.
        x: ``[B, T, C]``; its token order as in ``affine_update``.
        reverse, scale, backend: as in ``affine_update`` and ``causal_attention``.

    Returns:
        ``z [B, T, C]`` and ``logdet [B]`` in nats, as ``affine_update``.

    Raises:
        As the two ops.

    Source: arXiv 2412.06329, section 2.2.
    """
    dispatch.check_backend(backend)
    dispatch.check_floating(q=q, k=k, v=v, weight=weight, bias=bias, x=x)
    q, k, v, weight, bias = autocast(q, k, v, weight, bias)
    scale = check_attention(q, k, v, scale)
    B, T, H, D = q.shape
    if k.shape[1] != T:
        raise ValueError(f"k: expected as many tokens as q ({T}), got {k.shape[1]}")
    if x.ndim != 3 or x.shape[:2] != (B, T) or x.shape[2] < 1:
        raise ValueError(f"x: expected [{B}, {T}, C] for q of {list(q.shape)}, got {list(x.shape)}")
    C = x.shape[2]
    if weight.ndim != 2 or weight.shape[1] != H * D or weight.shape[0] not in (C, 2 * C):
        raise ValueError(
            f"weight: expected [{2 * C}, {H * D}] or [{C}, {H * D}], got {list(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} like q, got {tensor.dtype}")
    args = (q, k, v, weight, bias, x, reverse, scale, backend)
    if not dispatch.needs_grad(*args[:6]):
        return torch.ops.flowops.causal_patch_attention.default(*args)[:2]
    return CausalPatchAttentionFunction.apply(*args)
