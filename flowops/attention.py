r"""Causal attention over patches, and the fused head of an autoregressive block.

    o_i = sum_{j <= i + S - T} softmax_j(scale q_i . k_j) v_j
    z, logdet = affine_update(x, concat_heads(o) W^T + bias)

with T queries, S >= T keys and values; the queries are the last T of S tokens.

Source: Vaswani et al. (arXiv 1706.03762), eq. 1; Dao et al., "FlashAttention" (arXiv 2205.14135)
for what is saved; Zhai et al. (arXiv 2412.06329), section 2.2 for the block.
"""

import math

import torch
from torch import Tensor

from . import dispatch
from .affine import affine_update_backward_reference, affine_update_reference, cpu_reason

# --- reference -----------------------------------------------------------------------------------


def causal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """``causal_attention`` in plain PyTorch: ``o [B, T, H, D]`` and log-sum-exp ``[B, H, T]``."""
    q, k, v, dtype = *_computing(q, k, v), q.dtype
    scores = _scores(q, k, scale)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return torch.einsum("bhts,bshd->bthd", weights, v).to(dtype), lse


def causal_attention_backward_reference(grad_o, q, k, v, o, lse, scale):
    """Gradients of ``causal_attention`` from the saved o and log-sum-exp."""
    dtype = q.dtype
    grad_o, q, k, v, o = _computing(grad_o, q, k, v, o)
    weights = torch.exp(_scores(q, k, scale) - lse.unsqueeze(-1))
    grad_v = torch.einsum("bhts,bthd->bshd", weights, grad_o)
    grad_weights = torch.einsum("bthd,bshd->bhts", grad_o, v)
    delta = (grad_o * o).sum(-1).transpose(1, 2).unsqueeze(-1)
    grad_scores = weights * (grad_weights - delta) * scale
    grad_q = torch.einsum("bhts,bshd->bthd", grad_scores, k)
    grad_k = torch.einsum("bhts,bthd->bshd", grad_scores, q)
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def causal_patch_attention_reference(
    q, k, v, weight, bias, x, reverse: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """``causal_patch_attention`` in plain PyTorch."""
    o = causal_attention_reference(q, k, v, scale)[0]
    return affine_update_reference(x, _params(o, weight, bias), reverse)


def _params(o: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(o.flatten(2), weight, bias)


def _computing(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return scores.masked_fill(~visible, float("-inf"))


# --- registration --------------------------------------------------------------------------------


def _attention_flops(q, k, *_) -> int:
    """Two products over the pairs a query may see."""
    (B, T, H, D), S = q, k[1]
    return 4 * B * H * D * (T * S - T * (T - 1) // 2)


@dispatch.define_op(
    "causal_attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    _attention_flops,
)
def _(q, k, v, scale):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=_lse_dtype(q))


@dispatch.define_op(
    "causal_attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    lambda grad_o, q, k, *_: _attention_flops(q, k) * 5 // 2,
)
def _(grad_o, q, k, v, o, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@dispatch.define_op(
    "causal_patch_attention(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor bias, Tensor x,"
    " bool reverse, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda q, k, v, weight, *_: _attention_flops(q, k) + 2 * q[0] * q[1] * weight[0] * weight[1],
)
def _(q, k, v, weight, bias, x, reverse, scale):
    B, T, H, _ = q.shape
    lse_dtype = _lse_dtype(q)
    logdet = x.new_empty(B, dtype=torch.promote_types(lse_dtype, _lse_dtype(x)))
    return (
        x.new_empty(x.shape),
        logdet,
        q.new_empty(q.shape),
        q.new_empty((B, H, T), dtype=lse_dtype),
    )


@dispatch.define_op(
    "causal_patch_attention_backward(Tensor grad_z, Tensor grad_logdet, Tensor q, Tensor k,"
    " Tensor v, Tensor weight, Tensor bias, Tensor x, Tensor o, Tensor lse, bool reverse,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad_z, grad_logdet, q, k, v, weight, *_: (
        _attention_flops(q, k) * 5 // 2 + 6 * q[0] * q[1] * weight[0] * weight[1]
    ),
)
def _(grad_z, grad_logdet, q, k, v, weight, bias, x, o, lse, reverse, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, weight, bias, x))


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# --- backends ------------------------------------------------------------------------------------


@dispatch.implement("causal_attention", "reference")
def _(q, k, v, scale):
    o, lse = causal_attention_reference(q, k, v, scale)
    return o.contiguous(), lse.contiguous()


@dispatch.implement("causal_attention_backward", "reference")
def _(*args):
    return tuple(g.contiguous() for g in causal_attention_backward_reference(*args))


def _has_sdpa(scale: float) -> str | None:
    if scale <= 0:
        return "PyTorch's flash attention needs a positive scale"
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "this PyTorch has no flash attention for the CPU"
    return None


def _cpu_masking(q: Tensor, k: Tensor) -> tuple[bool, Tensor | None]:
    """``is_causal`` and ``attn_mask``: torch aligns the first to the first key, where a cached
    prefix needs the last one; a single query sees everything."""
    T, S = q.shape[1], k.shape[1]
    if T == S or T == 1:
        return T == S, None
    return False, torch.full((T, S), float("-inf"), dtype=q.dtype).triu(S - T + 1)


def _dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """torch's op, called directly, takes a contiguous last dimension for granted."""
    return tuple(t if t.stride(3) == 1 else t.contiguous() for t in tensors)


@dispatch.implement("causal_attention", "cpu", lambda *args: _has_sdpa(args[-1]))
def _(q, k, v, scale):
    q, k, v = _dense_rows(q, k, v)
    causal, mask = _cpu_masking(q, k)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(t.transpose(1, 2) for t in (q, k, v)),
        *(0.0, causal),
        attn_mask=mask,
        scale=scale,
    )
    return o.transpose(1, 2).contiguous(), lse.contiguous()


@dispatch.implement("causal_attention_backward", "cpu", lambda *args: _has_sdpa(args[-1]))
def _(grad_o, q, k, v, o, lse, scale):
    # torch's backward in half precision is several times slower than its own in fp32.
    dtype = q.dtype
    grad_o, q, k, v, o = _dense_rows(*_computing(grad_o, q, k, v, o))
    causal, mask = _cpu_masking(q, k)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(t.transpose(1, 2) for t in (grad_o, q, k, v, o)),
        *(lse, 0.0, causal),
        attn_mask=mask,
        scale=scale,
    )
    return tuple(g.transpose(1, 2).to(dtype).contiguous() for g in grads)


def _composed(backend: str) -> None:
    """``causal_patch_attention`` as a chain of this backend's ops."""

    def supports(first: int):
        """``first``: where q stands among the arguments."""
        if backend == "reference":
            return None
        return lambda *args: _has_sdpa(args[-1]) or cpu_reason(args[first + 5], args[first + 3])

    @dispatch.implement("causal_patch_attention", backend, supports(0))
    def _(q, k, v, weight, bias, x, reverse, scale):
        o, lse = torch.ops.flowops.causal_attention(q, k, v, scale, backend)
        z, logdet = torch.ops.flowops.affine_update(x, _params(o, weight, bias), reverse, backend)
        return z, logdet, o, lse

    @dispatch.implement("causal_patch_attention_backward", backend, supports(2))
    def _(grad_z, grad_logdet, q, k, v, weight, bias, x, o, lse, reverse, scale):
        grad_x, grad_params = torch.ops.flowops.affine_update_backward(
            grad_z, grad_logdet, x, _params(o, weight, bias), reverse, backend
        )
        grad_o = (grad_params @ weight).view(o.shape)
        grad_weight = grad_params.flatten(0, 1).mT @ o.flatten(2).flatten(0, 1)
        grads = torch.ops.flowops.causal_attention_backward(grad_o, q, k, v, o, lse, scale, backend)
        return *grads, grad_weight.contiguous(), grad_params.sum((0, 1)), grad_x


_composed("reference")
_composed("cpu")

# --- autograd ------------------------------------------------------------------------------------


class CausalAttentionFunction(torch.autograd.Function):
    """Saves q, k, v, o and the log-sum-exp; double backward goes through the reference."""

    @staticmethod
    def forward(ctx, q, k, v, scale, backend):
        o, lse = torch.ops.flowops.causal_attention(q, k, v, scale, backend)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.backend = scale, backend
        return o

    @staticmethod
    def backward(ctx, grad_o):
        q, k, v, o, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # o and lse as functions of q, k, v
            o, lse = causal_attention_reference(q, k, v, ctx.scale)
            grads = causal_attention_backward_reference(grad_o, q, k, v, o, lse, ctx.scale)
        else:
            grads = torch.ops.flowops.causal_attention_backward(
                grad_o, q, k, v, o, lse, ctx.scale, ctx.backend
            )
        return *grads, None, None


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
                *_patch_backward_reference(grad_z, grad_logdet, *inputs, ctx.reverse, ctx.scale),
                *(None, None, None),
            )
        grads = torch.ops.flowops.causal_patch_attention_backward(
            grad_z, grad_logdet, *inputs, o, lse, ctx.reverse, ctx.scale, ctx.backend
        )
        return *grads, None, None, None


def _patch_backward_reference(grad_z, grad_logdet, q, k, v, weight, bias, x, reverse, scale):
    o, lse = causal_attention_reference(q, k, v, scale)
    grad_x, grad_params = affine_update_backward_reference(
        grad_z, grad_logdet, x, _params(o, weight, bias), reverse
    )
    grad_o = (grad_params @ weight).view(o.shape)
    grads = causal_attention_backward_reference(grad_o, q, k, v, o, lse, scale)
    grad_weight = torch.einsum("btp,btw->pw", grad_params, o.flatten(2))
    return *grads, grad_weight, grad_params.sum((0, 1)), grad_x


# --- public --------------------------------------------------------------------------------------


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """``o_i = sum_{j <= i} softmax_j(scale q_i . k_j) v_j``, the diagonal included.

    Softmax in fp32 (fp64 for fp64). Under autocast the inputs are cast to its dtype. Only o and the
    log-sum-exp are kept for backward. On the CPU this is PyTorch's flash attention, with its
    backward in fp32.

    Args:
        q: ``[B, T, H, D]``, any strides: a slice of a packed ``[B, T, 3, H, D]`` is read in place.
        k, v: ``[B, S, H, D]`` with ``S >= T``: the queries are the last T of S tokens.
        scale: of the scores, default ``1 / sqrt(D)``.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``o [B, T, H, D]``, contiguous: ready for the output projection.

    Raises:
        TypeError, ValueError: naming the argument that is off.
        RuntimeError: if a backend asked for by name can't run.

    Source: arXiv 1706.03762, eq. 1.
    """
    dispatch.check_backend(backend)
    dispatch.check_floating(q=q, k=k, v=v)
    q, k, v = _autocast(q, k, v)
    scale = _check_attention(q, k, v, scale)
    return CausalAttentionFunction.apply(q, k, v, scale, backend)


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
    q, k, v, weight, bias = _autocast(q, k, v, weight, bias)
    scale = _check_attention(q, k, v, scale)
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
    return CausalPatchAttentionFunction.apply(q, k, v, weight, bias, x, reverse, scale, backend)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(
        device_type
    ):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q: expected a non-empty [B, T, H, D], got {list(q.shape)}")
    B, T, H, D = q.shape
    for name, tensor in (("k", k), ("v", v)):
        shape = tensor.shape
        if tensor.ndim != 4 or (shape[0], *shape[2:]) != (B, H, D) or shape[1] < T:
            raise ValueError(
                f"{name}: expected [{B}, S >= {T}, {H}, {D}] for q of {list(q.shape)}, got "
                f"{list(shape)}"
            )
        if shape != k.shape:
            raise ValueError(f"v: expected the shape of k, {list(k.shape)}, got {list(shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} like q, got {tensor.dtype}")
    if scale is None:
        return 1.0 / math.sqrt(D)
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    return float(scale)
