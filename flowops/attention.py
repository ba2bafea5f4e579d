r"""Causal attention over patches.

    o_i = sum_{j <= i + S - T} softmax_j(scale q_i . k_j) v_j

with T queries, S >= T keys and values; the queries are the last T of S tokens.

Source: Vaswani et al. (arXiv 1706.03762), eq. 1; Dao et al., "FlashAttention" (arXiv 2205.14135)
for what is saved.
"""

import math

import torch
from torch import Tensor

from . import dispatch

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


def _computing(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = dispatch.compute_dtype(tensors[0])
    return tuple(t.to(dtype) for t in tensors)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return scores.masked_fill(~visible, float("-inf"))


# --- registration --------------------------------------------------------------------------------


def attention_flops(q, k, *_) -> int:
    """Two products over the pairs a query may see."""
    (B, T, H, D), S = q, k[1]
    return 4 * B * H * D * (T * S - T * (T - 1) // 2)


@dispatch.define_op(
    "causal_attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    attention_flops,
)
def _(q, k, v, scale):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=dispatch.compute_dtype(q))


@dispatch.define_op(
    "causal_attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    lambda grad_o, q, k, *_: attention_flops(q, k) * 5 // 2,
)
def _(grad_o, q, k, v, o, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# --- backends ------------------------------------------------------------------------------------


@dispatch.implement("causal_attention", "reference")
def _(q, k, v, scale):
    o, lse = causal_attention_reference(q, k, v, scale)
    return o.contiguous(), lse.contiguous()


@dispatch.implement("causal_attention_backward", "reference")
def _(*args):
    return tuple(g.contiguous() for g in causal_attention_backward_reference(*args))


def sdpa_reason(scale: float) -> str | None:
    """Why PyTorch's kernel for the CPU can't run, or None."""
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


def dense_columns(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels, torch's among them, take a contiguous last dimension for granted."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


@dispatch.implement("causal_attention", "cpu", lambda *args: sdpa_reason(args[-1]))
def _(q, k, v, scale):
    q, k, v = dense_columns(q, k, v)
    causal, mask = _cpu_masking(q, k)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(t.transpose(1, 2) for t in (q, k, v)),
        *(0.0, causal),
        attn_mask=mask,
        scale=scale,
    )
    return o.transpose(1, 2).contiguous(), lse.contiguous()


@dispatch.implement("causal_attention_backward", "cpu", lambda *args: sdpa_reason(args[-1]))
def _(grad_o, q, k, v, o, lse, scale):
    # torch's backward in half precision is several times slower than its own in fp32.
    dtype = q.dtype
    grad_o, q, k, v, o = dense_columns(*_computing(grad_o, q, k, v, o))
    causal, mask = _cpu_masking(q, k)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(t.transpose(1, 2) for t in (grad_o, q, k, v, o)),
        *(lse, 0.0, causal),
        attn_mask=mask,
        scale=scale,
    )
    return tuple(g.transpose(1, 2).to(dtype).contiguous() for g in grads)


def triton_reason(q: Tensor, *others: Tensor) -> str | None:
    """Why the Triton kernels can't take these tensors, or None."""
    if q.shape[3] > 128:
        return f"heads of width {q.shape[3]} are wider than the Triton kernels' 128"
    return dispatch.triton_dtype_reason(q, *others)


def triton_precision() -> str:
    """How fp32 products are made: three TF32 products give fp32's accuracy; one is what the user
    allows with ``torch.set_float32_matmul_precision``."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@dispatch.implement("causal_attention", "triton", lambda q, *_: triton_reason(q))
def _(q, k, v, scale):
    from .kernels.attention import causal_attention_fwd

    return causal_attention_fwd(*dense_columns(q, k, v), scale, triton_precision())


@dispatch.implement("causal_attention_backward", "triton", lambda grad_o, q, *_: triton_reason(q))
def _(grad_o, q, k, v, o, lse, scale):
    from .kernels.attention_backward import causal_attention_bwd

    grad_o, q, k, v = dense_columns(grad_o, q, k, v)
    return causal_attention_bwd(grad_o, q, k, v, o, lse, scale, triton_precision())


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
    q, k, v = autocast(q, k, v)
    scale = check_attention(q, k, v, scale)
    if not dispatch.needs_grad(q, k, v):
        return torch.ops.flowops.causal_attention.default(q, k, v, scale, backend)[0]
    return CausalAttentionFunction.apply(q, k, v, scale, backend)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, but for fp64."""
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(
        device_type
    ):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    """Checks what both attention ops take; returns the scale."""
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
