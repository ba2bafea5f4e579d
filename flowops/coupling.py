r"""The coupling of kernelised flows: log-scales and shifts from a kernel matrix's product.

    kernel_coupling          [s, t] = K(x1, z) @ w,  y2 = exp(s) x2 + t,  logdet = sum_j s_j
    kernel_coupling_inverse  x2 = (y2 - t) exp(-s)

K is that of ``gram``, never stored.

Source: "Kernelised Normalising Flows" (arXiv 2307.14839), eq. 6-9.
"""

import torch
from torch import Tensor

from . import dispatch
from .gram import (
    CONFIG,
    autograd_function,
    backward_flops,
    by_rows,
    cast_like,
    check_points,
    check_weights,
    differentiable,
    empty_like,
    matmul_flops,
    on_cpu,
    on_cuda,
    on_triton,
    se_gram_matmul_backward_reference,
    se_gram_matmul_reference,
)
from .interop import takes_arrays

# --- reference ------------------------------------------------------------------------------------


def kernel_coupling_reference(
    x1: Tensor, x2: Tensor, z: Tensor, w: Tensor, lengthscale: Tensor, kernel: str = "se"
) -> tuple[Tensor, Tensor]:
    """``kernel_coupling`` in plain PyTorch."""
    x1, x2, z, w, lengthscale, dtype = *dispatch.computing(x1, x2, z, w, lengthscale), x2.dtype
    s, t = se_gram_matmul_reference(x1, z, w, lengthscale, kernel).chunk(2, dim=1)
    return (torch.exp(s) * x2 + t).to(dtype), s.sum(1)


def kernel_coupling_inverse_reference(
    x1: Tensor, y2: Tensor, z: Tensor, w: Tensor, lengthscale: Tensor, kernel: str = "se"
) -> Tensor:
    """``kernel_coupling_inverse`` in plain PyTorch."""
    x1, y2, z, w, lengthscale, dtype = *dispatch.computing(x1, y2, z, w, lengthscale), y2.dtype
    s, t = se_gram_matmul_reference(x1, z, w, lengthscale, kernel).chunk(2, dim=1)
    return ((y2 - t) * torch.exp(-s)).to(dtype)


def kernel_coupling_backward_reference(
    grad_y2, grad_logdet, x1, x2, z, w, lengthscale, kernel="se"
):
    """Gradients of ``kernel_coupling`` to x1, x2, z, w and lengthscale."""
    inputs = (x1, x2, z, w, lengthscale)
    grad_y2, grad_logdet, x1, x2, z, w, lengthscale = dispatch.computing(
        grad_y2, grad_logdet, x1, x2, z, w, lengthscale
    )
    s = se_gram_matmul_reference(x1, z, w[:, : x2.shape[1]], lengthscale, kernel)
    grad_x2 = grad_y2 * torch.exp(s)
    grad_s = grad_x2 * x2 + grad_logdet.unsqueeze(1)
    grad_x1, *rest = se_gram_matmul_backward_reference(
        torch.cat([grad_s, grad_y2], dim=1), x1, z, w, lengthscale, kernel
    )
    return cast_like((grad_x1, grad_x2, *rest), inputs)


def kernel_coupling_inverse_backward_reference(grad_x2, x1, y2, z, w, lengthscale, kernel="se"):
    """Gradients of ``kernel_coupling_inverse`` to x1, y2, z, w and lengthscale."""
    inputs = (x1, y2, z, w, lengthscale)
    grad_x2, x1, y2, z, w, lengthscale = dispatch.computing(grad_x2, x1, y2, z, w, lengthscale)
    s, t = se_gram_matmul_reference(x1, z, w, lengthscale, kernel).chunk(2, dim=1)
    grad_y2 = grad_x2 * torch.exp(-s)
    grad_x1, *rest = se_gram_matmul_backward_reference(
        torch.cat([-grad_y2 * (y2 - t), -grad_y2], dim=1), x1, z, w, lengthscale, kernel
    )
    return cast_like((grad_x1, grad_y2, *rest), inputs)


# --- registration ---------------------------------------------------------------------------------


def _coupling_flops(x1, x2, z, w, *_) -> int:
    return matmul_flops(x1, z, w) + 3 * x2[0] * x2[1]


@dispatch.define_op(
    f"kernel_coupling(Tensor x1, Tensor x2, Tensor z, Tensor w, {CONFIG}) -> (Tensor, Tensor)",
    _coupling_flops,
)
def _(x1, x2, z, w, lengthscale, kernel, precision):
    dtype = dispatch.compute_dtype(x1, x2, z, w, lengthscale)
    return x2.new_empty(x2.shape), x2.new_empty(x2.shape[0], dtype=dtype)


@dispatch.define_op(
    "kernel_coupling_backward(Tensor grad_y2, Tensor grad_logdet, Tensor x1, Tensor x2, Tensor z,"
    f" Tensor w, {CONFIG}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad_y2, grad_logdet, x1, x2, z, w, *_: backward_flops(x1, z, w) + 4 * x2[0] * x2[1],
)
def _(grad_y2, grad_logdet, x1, x2, z, w, lengthscale, kernel, precision):
    return empty_like(x1, x2, z, w, lengthscale)


@dispatch.define_op(
    f"kernel_coupling_inverse(Tensor x1, Tensor y2, Tensor z, Tensor w, {CONFIG}) -> Tensor",
    _coupling_flops,
)
def _(x1, y2, z, w, lengthscale, kernel, precision):
    return y2.new_empty(y2.shape)


@dispatch.define_op(
    "kernel_coupling_inverse_backward(Tensor grad_x2, Tensor x1, Tensor y2, Tensor z, Tensor w,"
    f" {CONFIG}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad_x2, x1, y2, z, w, *_: backward_flops(x1, z, w) + 4 * y2[0] * y2[1],
)
def _(grad_x2, x1, y2, z, w, lengthscale, kernel, precision):
    return empty_like(x1, y2, z, w, lengthscale)


# --- backends -------------------------------------------------------------------------------------

by_rows("kernel_coupling", kernel_coupling_reference, 2)
by_rows("kernel_coupling_inverse", kernel_coupling_inverse_reference, 2)
by_rows("kernel_coupling_backward", kernel_coupling_backward_reference, 4, 2)
by_rows("kernel_coupling_inverse_backward", kernel_coupling_inverse_backward_reference, 3, 2)

on_triton("kernel_coupling", "gram", "coupling_fwd")
on_triton("kernel_coupling_inverse", "gram", "coupling_inverse_fwd")
on_triton("kernel_coupling_backward", "gram_backward", "coupling_bwd")
on_triton("kernel_coupling_inverse_backward", "gram_backward", "coupling_inverse_bwd")

on_cpu("kernel_coupling", 2)
on_cpu("kernel_coupling_inverse", 3)

on_cuda("kernel_coupling", "coupling")
on_cuda("kernel_coupling_inverse", "coupling_inverse")

# --- autograd -------------------------------------------------------------------------------------

KernelCouplingFunction = autograd_function(
    "KernelCouplingFunction", "kernel_coupling", kernel_coupling_backward_reference
)
KernelCouplingInverseFunction = autograd_function(
    "KernelCouplingInverseFunction",
    "kernel_coupling_inverse",
    kernel_coupling_inverse_backward_reference,
)

# --- public ---------------------------------------------------------------------------------------


@takes_arrays
def kernel_coupling(
    x1: Tensor,
    x2: Tensor,
    z: Tensor,
    w: Tensor,
    lengthscale: float | Tensor,
    *,
    kernel: str = "se",
    precision: str = "fp32",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``[s, t] = K(x1, z) @ w``, ``y2 = exp(s) x2 + t`` and ``logdet = sum_j s_j`` in one pass.

    Args:
        x1: ``[N, D]``, the half that stays.
        x2: ``[N, E]``, the half that moves.
        z: ``[M, D]``, the auxiliary points.
        w: ``[M, 2E]``: weights of the log-scales s, then of the shifts t.
        lengthscale, kernel, precision, backend: as in ``se_gram``.

    Returns:
        ``y2 [N, E]`` in x2's dtype and ``logdet [N]`` in nats, fp32 (fp64 for fp64).

    Raises:
        As ``se_gram``.

    Source: arXiv 2307.14839, eq. 8-9.
    """
    lengthscale = check_points("x1", x1, z, lengthscale, kernel, precision, backend)
    _check_half(x1, "x2", x2, z, w)
    args = (x1, x2, z, w, lengthscale, kernel, precision, backend)
    return differentiable(KernelCouplingFunction, torch.ops.flowops.kernel_coupling.default, *args)


@takes_arrays
def kernel_coupling_inverse(
    x1: Tensor,
    y2: Tensor,
    z: Tensor,
    w: Tensor,
    lengthscale: float | Tensor,
    *,
    kernel: str = "se",
    precision: str = "fp32",
    backend: str = "auto",
) -> Tensor:
    """``x2 = (y2 - t) exp(-s)`` with ``[s, t] = K(x1, z) @ w``.

    Args:
        y2: ``[N, E]``, what ``kernel_coupling`` returned.
        x1, z, w, lengthscale, kernel, precision, backend: as in ``kernel_coupling``.

    Returns:
        ``x2 [N, E]`` in y2's dtype.

    Raises:
        As ``se_gram``.

    Source: arXiv 2307.14839, eq. 8.
    """
    lengthscale = check_points("x1", x1, z, lengthscale, kernel, precision, backend)
    _check_half(x1, "y2", y2, z, w)
    args = (x1, y2, z, w, lengthscale, kernel, precision, backend)
    op = torch.ops.flowops.kernel_coupling_inverse.default
    return differentiable(KernelCouplingInverseFunction, op, *args)


def _check_half(x1: Tensor, name: str, x2: Tensor, z: Tensor, w: Tensor) -> None:
    dispatch.check_floating(**{"x1": x1, name: x2})
    if x2.ndim != 2 or x2.shape[0] != x1.shape[0] or x2.shape[1] < 1:
        raise ValueError(f"{name}: expected [{x1.shape[0]}, E], got {list(x2.shape)}")
    check_weights(z, w, 2 * x2.shape[1])
