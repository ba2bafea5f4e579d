r"""Kernel (Gram) matrices and what kernelised flows do with them.

With ``S = |(x - z) / lengthscale|^2`` and ``r = sqrt(S)``:

    se        k = exp(-S / 2)
    matern12  k = exp(-r)
    matern32  k = (1 + sqrt(3) r) exp(-sqrt(3) r)
    matern52  k = (1 + sqrt(5) r + 5 S / 3) exp(-sqrt(5) r)

    se_gram           K[n, m] = k(x_n, z_m)
    se_gram_matmul    K @ w, K never stored
    kernel_coupling   [s, t] = K(x1, z) @ w,  y2 = exp(s) x2 + t,  logdet = sum_j s_j

Source: "Kernelised Normalising Flows" (arXiv 2307.14839), eq. 6-9; Rasmussen and Williams,
"Gaussian Processes for Machine Learning" (2006), eq. 4.9 and 4.14-4.17.
"""

import math

import torch
from torch import Tensor

from . import dispatch

KERNELS = ("se", "matern12", "matern32", "matern52")
_PRECISIONS = ("fp32", "tf32")

# --- reference -----------------------------------------------------------------------------------
# Distances are summed from direct differences, so data far from zero are as accurate as centred
# data and x == z gives exactly 1.


def se_gram_reference(x: Tensor, z: Tensor, lengthscale: Tensor, kernel: str = "se") -> Tensor:
    """``se_gram`` in plain PyTorch."""
    x, z, lengthscale, dtype = *_computing(x, z, lengthscale), x.dtype
    return _profile(_squared_distance(x, z, lengthscale), kernel).to(dtype)


def se_gram_matmul_reference(
    x: Tensor, z: Tensor, w: Tensor, lengthscale: Tensor, kernel: str = "se"
) -> Tensor:
    """``se_gram_matmul`` in plain PyTorch."""
    x, z, w, lengthscale, dtype = *_computing(x, z, w, lengthscale), x.dtype
    return (_profile(_squared_distance(x, z, lengthscale), kernel) @ w).to(dtype)


def kernel_coupling_reference(
    x1: Tensor, x2: Tensor, z: Tensor, w: Tensor, lengthscale: Tensor, kernel: str = "se"
) -> tuple[Tensor, Tensor]:
    """``kernel_coupling`` in plain PyTorch."""
    x1, x2, z, w, lengthscale, dtype = *_computing(x1, x2, z, w, lengthscale), x2.dtype
    s, t = se_gram_matmul_reference(x1, z, w, lengthscale, kernel).chunk(2, dim=1)
    return (torch.exp(s) * x2 + t).to(dtype), s.sum(1)


def kernel_coupling_inverse_reference(
    x1: Tensor, y2: Tensor, z: Tensor, w: Tensor, lengthscale: Tensor, kernel: str = "se"
) -> Tensor:
    """``kernel_coupling_inverse`` in plain PyTorch."""
    x1, y2, z, w, lengthscale, dtype = *_computing(x1, y2, z, w, lengthscale), y2.dtype
    s, t = se_gram_matmul_reference(x1, z, w, lengthscale, kernel).chunk(2, dim=1)
    return ((y2 - t) * torch.exp(-s)).to(dtype)


def se_gram_backward_reference(grad, x, z, lengthscale, kernel="se"):
    """Gradients of ``se_gram`` to x, z and lengthscale."""
    inputs = (x, z, lengthscale)
    grad, x, z, lengthscale = _computing(grad, x, z, lengthscale)
    S = _squared_distance(x, z, lengthscale)
    return _cast(_distance_backward(grad * _slope(S, kernel), S, x, z, lengthscale), inputs)


def se_gram_matmul_backward_reference(grad, x, z, w, lengthscale, kernel="se"):
    """Gradients of ``se_gram_matmul`` to x, z, w and lengthscale."""
    inputs = (x, z, w, lengthscale)
    grad, x, z, w, lengthscale = _computing(grad, x, z, w, lengthscale)
    S = _squared_distance(x, z, lengthscale)
    grad_x, grad_z, grad_lengthscale = _distance_backward(
        (grad @ w.mT) * _slope(S, kernel), S, x, z, lengthscale
    )
    return _cast((grad_x, grad_z, _profile(S, kernel).mT @ grad, grad_lengthscale), inputs)


def kernel_coupling_backward_reference(
    grad_y2, grad_logdet, x1, x2, z, w, lengthscale, kernel="se"
):
    """Gradients of ``kernel_coupling`` to x1, x2, z, w and lengthscale."""
    inputs = (x1, x2, z, w, lengthscale)
    grad_y2, grad_logdet, x1, x2, z, w, lengthscale = _computing(
        grad_y2, grad_logdet, x1, x2, z, w, lengthscale
    )
    s = se_gram_matmul_reference(x1, z, w[:, : x2.shape[1]], lengthscale, kernel)
    grad_x2 = grad_y2 * torch.exp(s)
    grad_s = grad_x2 * x2 + grad_logdet.unsqueeze(1)
    grad_x1, *rest = se_gram_matmul_backward_reference(
        torch.cat([grad_s, grad_y2], dim=1), x1, z, w, lengthscale, kernel
    )
    return _cast((grad_x1, grad_x2, *rest), inputs)


def kernel_coupling_inverse_backward_reference(grad_x2, x1, y2, z, w, lengthscale, kernel="se"):
    """Gradients of ``kernel_coupling_inverse`` to x1, y2, z, w and lengthscale."""
    inputs = (x1, y2, z, w, lengthscale)
    grad_x2, x1, y2, z, w, lengthscale = _computing(grad_x2, x1, y2, z, w, lengthscale)
    s, t = se_gram_matmul_reference(x1, z, w, lengthscale, kernel).chunk(2, dim=1)
    grad_y2 = grad_x2 * torch.exp(-s)
    grad_x1, *rest = se_gram_matmul_backward_reference(
        torch.cat([-grad_y2 * (y2 - t), -grad_y2], dim=1), x1, z, w, lengthscale, kernel
    )
    return _cast((grad_x1, grad_y2, *rest), inputs)


def _squared_distance(x: Tensor, z: Tensor, lengthscale: Tensor) -> Tensor:
    return ((x.unsqueeze(1) - z) / lengthscale).square().sum(-1)  # [N, M]


def _profile(S: Tensor, kernel: str) -> Tensor:
    """k as a function of the scaled squared distance."""
    if kernel == "se":
        return torch.exp(-0.5 * S)
    r = _root(S)
    if kernel == "matern12":
        return torch.exp(-r)
    if kernel == "matern32":
        return (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r)
    return (1 + math.sqrt(5) * r + 5 / 3 * r * r) * torch.exp(-math.sqrt(5) * r)


def _slope(S: Tensor, kernel: str) -> Tensor:
    """dk/dS. Matern 1/2 has a kink at 0: its slope there is taken as 0."""
    if kernel == "se":
        return -0.5 * torch.exp(-0.5 * S)
    r = _root(S)
    if kernel == "matern12":
        return torch.where(S > 0, torch.exp(-r) / (-2 * torch.where(S > 0, r, 1)), 0)
    if kernel == "matern32":
        return -1.5 * torch.exp(-math.sqrt(3) * r)
    return -5 / 6 * (1 + math.sqrt(5) * r) * torch.exp(-math.sqrt(5) * r)


def _root(S: Tensor) -> Tensor:
    """sqrt whose derivatives at 0 are 0 instead of infinite. Capped where every kernel is 0 long
    since, so that points infinitely far apart give 0 and not inf * 0."""
    S = S.clamp(max=1e12)
    return torch.where(S > 0, torch.where(S > 0, S, 1).sqrt(), 0)


def _distance_backward(weight, S, x, z, lengthscale):
    """Gradients through S for ``weight = dL/dS [N, M]``."""
    difference = x.unsqueeze(1) - z  # [N, M, D]
    inverse_square = lengthscale.square().reciprocal()
    grad_x = 2 * torch.einsum("nm,nmd->nd", weight, difference) * inverse_square
    grad_z = -2 * torch.einsum("nm,nmd->md", weight, difference) * inverse_square
    if lengthscale.ndim == 0:
        grad_lengthscale = -2 * (weight * S).sum() / lengthscale
    else:
        squares = torch.einsum("nm,nmd->d", weight, difference.square())
        grad_lengthscale = -2 * squares * inverse_square / lengthscale
    return grad_x, grad_z, grad_lengthscale


def _computing(*tensors: Tensor) -> tuple[Tensor, ...]:
    double = any(t.dtype == torch.float64 for t in tensors)
    return tuple(t.to(torch.float64 if double else torch.float32) for t in tensors)


def _cast(grads, inputs) -> tuple[Tensor, ...]:
    return tuple(g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))


# --- registration --------------------------------------------------------------------------------

_CONFIG = "Tensor lengthscale, str kernel, str precision"


def _gram_flops(x, z, *_) -> int:
    return x[0] * z[0] * (3 * x[1] + 1)  # subtract, square, add; one exp


def _matmul_flops(x, z, w, *_) -> int:
    return _gram_flops(x, z) + 2 * x[0] * z[0] * w[1]


def _backward_flops(x, z, w) -> int:
    """K again, then the products for dK, dw, dx and dz."""
    return _gram_flops(x, z) + x[0] * z[0] * (4 * w[1] + 4 * x[1] + 2)


def _coupling_flops(x1, x2, z, w, *_) -> int:
    return _matmul_flops(x1, z, w) + 3 * x2[0] * x2[1]


@dispatch.define_op(f"se_gram(Tensor x, Tensor z, {_CONFIG}) -> Tensor", _gram_flops)
def _(x, z, lengthscale, kernel, precision):
    return x.new_empty((x.shape[0], z.shape[0]))


@dispatch.define_op(
    f"se_gram_backward(Tensor grad, Tensor x, Tensor z, {_CONFIG}) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, z, *_: _gram_flops(x, z) + x[0] * z[0] * (4 * x[1] + 2),
)
def _(grad, x, z, lengthscale, kernel, precision):
    return _empty_like(x, z, lengthscale)


@dispatch.define_op(
    f"se_gram_matmul(Tensor x, Tensor z, Tensor w, {_CONFIG}) -> Tensor", _matmul_flops
)
def _(x, z, w, lengthscale, kernel, precision):
    return x.new_empty((x.shape[0], w.shape[1]))


@dispatch.define_op(
    f"se_gram_matmul_backward(Tensor grad, Tensor x, Tensor z, Tensor w, {_CONFIG})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, z, w, *_: _backward_flops(x, z, w),
)
def _(grad, x, z, w, lengthscale, kernel, precision):
    return _empty_like(x, z, w, lengthscale)


@dispatch.define_op(
    f"kernel_coupling(Tensor x1, Tensor x2, Tensor z, Tensor w, {_CONFIG}) -> (Tensor, Tensor)",
    _coupling_flops,
)
def _(x1, x2, z, w, lengthscale, kernel, precision):
    double = torch.float64 in (t.dtype for t in (x1, x2, z, w, lengthscale))
    logdet = x2.new_empty(x2.shape[0], dtype=torch.float64 if double else torch.float32)
    return x2.new_empty(x2.shape), logdet


@dispatch.define_op(
    "kernel_coupling_backward(Tensor grad_y2, Tensor grad_logdet, Tensor x1, Tensor x2, Tensor z,"
    f" Tensor w, {_CONFIG}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad_y2, grad_logdet, x1, x2, z, w, *_: _backward_flops(x1, z, w) + 4 * x2[0] * x2[1],
)
def _(grad_y2, grad_logdet, x1, x2, z, w, lengthscale, kernel, precision):
    return _empty_like(x1, x2, z, w, lengthscale)


@dispatch.define_op(
    f"kernel_coupling_inverse(Tensor x1, Tensor y2, Tensor z, Tensor w, {_CONFIG}) -> Tensor",
    _coupling_flops,
)
def _(x1, y2, z, w, lengthscale, kernel, precision):
    return y2.new_empty(y2.shape)


@dispatch.define_op(
    "kernel_coupling_inverse_backward(Tensor grad_x2, Tensor x1, Tensor y2, Tensor z, Tensor w,"
    f" {_CONFIG}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad_x2, x1, y2, z, w, *_: _backward_flops(x1, z, w) + 4 * y2[0] * y2[1],
)
def _(grad_x2, x1, y2, z, w, lengthscale, kernel, precision):
    return _empty_like(x1, y2, z, w, lengthscale)


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


# --- backends ------------------------------------------------------------------------------------

_DIFFERENCES_AT_ONCE = 1 << 22  # elements of [n, M, D] that the reference holds


def _by_rows(op: str, function, rowwise: int, row_outputs: int | None = None) -> None:
    """The reference of ``op`` in blocks of rows, so that no [N, M, D] is stored.

    The first ``rowwise`` arguments are cut and the outputs concatenated. For a backward pass only
    the first ``row_outputs`` are; the others are summed over the blocks. It runs in double, since
    sums over many rows in fp32 would owe more to their order than to their terms.
    """

    @dispatch.implement(op, "reference")
    def _(*args):
        *tensors, kernel, _ = args
        if row_outputs is not None:
            tensors = [t.double() for t in tensors]
        rows, shared = tensors[:rowwise], tensors[rowwise:]
        N, (M, D) = rows[0].shape[0], shared[0].shape
        step = max(1, _DIFFERENCES_AT_ONCE // (M * D))
        blocks = [
            function(*(t[i : i + step] for t in rows), *shared, kernel) for i in range(0, N, step)
        ]
        if isinstance(blocks[0], Tensor):
            return torch.cat(blocks)
        parts = list(zip(*blocks, strict=True))
        if row_outputs is None:
            return tuple(torch.cat(p) for p in parts)
        grads = [torch.cat(p) for p in parts[:row_outputs]]
        grads += [torch.stack(p).sum(0) for p in parts[row_outputs:]]
        inputs = args[-2 - len(grads) : -2]
        return tuple(g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))


_by_rows("se_gram", se_gram_reference, 1)
_by_rows("se_gram_matmul", se_gram_matmul_reference, 1)
_by_rows("kernel_coupling", kernel_coupling_reference, 2)
_by_rows("kernel_coupling_inverse", kernel_coupling_inverse_reference, 2)
_by_rows("se_gram_backward", se_gram_backward_reference, 2, 1)
_by_rows("se_gram_matmul_backward", se_gram_matmul_backward_reference, 2, 1)
_by_rows("kernel_coupling_backward", kernel_coupling_backward_reference, 4, 2)
_by_rows("kernel_coupling_inverse_backward", kernel_coupling_inverse_backward_reference, 3, 2)

# --- autograd ------------------------------------------------------------------------------------


def _function(name: str, op: str, backward_reference) -> type[torch.autograd.Function]:
    """The autograd Function of ``op``. K is computed again in backward, never stored; double
    backward goes through the reference formula, which is differentiable itself."""
    forward_op = getattr(torch.ops.flowops, op)
    backward_op = getattr(torch.ops.flowops, f"{op}_backward")

    def forward(ctx, *args):
        *tensors, kernel, precision, backend = args
        ctx.save_for_backward(*tensors)
        ctx.kernel, ctx.config = kernel, (kernel, precision, backend)
        return forward_op(*tensors, *ctx.config)

    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            out = backward_reference(*grads, *ctx.saved_tensors, ctx.kernel)
        else:
            out = backward_op(*grads, *ctx.saved_tensors, *ctx.config)
        return *out, None, None, None

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), body)


SeGramFunction = _function("SeGramFunction", "se_gram", se_gram_backward_reference)
SeGramMatmulFunction = _function(
    "SeGramMatmulFunction", "se_gram_matmul", se_gram_matmul_backward_reference
)
KernelCouplingFunction = _function(
    "KernelCouplingFunction", "kernel_coupling", kernel_coupling_backward_reference
)
KernelCouplingInverseFunction = _function(
    "KernelCouplingInverseFunction",
    "kernel_coupling_inverse",
    kernel_coupling_inverse_backward_reference,
)

# --- public --------------------------------------------------------------------------------------


def se_gram(
    x: Tensor,
    z: Tensor,
    lengthscale: float | Tensor,
    *,
    kernel: str = "se",
    precision: str = "fp32",
    backend: str = "auto",
) -> Tensor:
    """``K[n, m] = exp(-|(x_n - z_m) / lengthscale|^2 / 2)``.

    Distances and exp in fp32 (fp64 for fp64) whatever the storage; nothing is cast under autocast.
    Data far from zero are as accurate as centred data, and ``x == z`` gives exactly 1.

    Args:
        x: ``[N, D]``, floating.
        z: ``[M, D]``, the auxiliary points.
        lengthscale: positive, in the units of x: a number, a 0-d tensor or ``[D]``.
        kernel: ``"se"``, ``"matern12"``, ``"matern32"`` or ``"matern52"``.
        precision: ``"fp32"``; ``"tf32"`` allows tensor cores to round the products (no backend
            of this version does).
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``K [N, M]`` in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument that is off.
        RuntimeError: if a backend asked for by name can't run.

    Source: arXiv 2307.14839, eq. 6; Rasmussen and Williams (2006), eq. 4.9 and 4.14-4.17.
    """
    lengthscale = _check("x", x, z, lengthscale, kernel, precision, backend)
    return SeGramFunction.apply(x, z, lengthscale, kernel, precision, backend)


def se_gram_matmul(
    x: Tensor,
    z: Tensor,
    w: Tensor,
    lengthscale: float | Tensor,
    *,
    kernel: str = "se",
    precision: str = "fp32",
    backend: str = "auto",
) -> Tensor:
    """``K(x, z) @ w`` without storing K.

    Args:
        w: ``[M, O]``, the weights of the auxiliary points.
        x, z, lengthscale, kernel, precision, backend: as in ``se_gram``.

    Returns:
        ``[N, O]`` in x's dtype.

    Raises:
        As ``se_gram``.

    Source: arXiv 2307.14839, eq. 7.
    """
    lengthscale = _check("x", x, z, lengthscale, kernel, precision, backend)
    _check_weights(z, w, None)
    return SeGramMatmulFunction.apply(x, z, w, lengthscale, kernel, precision, backend)


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
    lengthscale = _check("x1", x1, z, lengthscale, kernel, precision, backend)
    _check_coupling(x1, "x2", x2, z, w)
    return KernelCouplingFunction.apply(x1, x2, z, w, lengthscale, kernel, precision, backend)


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
    lengthscale = _check("x1", x1, z, lengthscale, kernel, precision, backend)
    _check_coupling(x1, "y2", y2, z, w)
    return KernelCouplingInverseFunction.apply(
        x1, y2, z, w, lengthscale, kernel, precision, backend
    )


def _check(name, x, z, lengthscale, kernel, precision, backend) -> Tensor:
    """Checks the arguments that all four share; returns lengthscale as a tensor."""
    dispatch.check_backend(backend)
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {KERNELS}, got {kernel!r}")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision: expected one of {_PRECISIONS}, got {precision!r}")
    dispatch.check_floating(**{name: x, "z": z})
    for label, tensor in ((name, x), ("z", z)):
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise ValueError(f"{label}: expected a non-empty [rows, D], got {list(tensor.shape)}")
    if z.shape[1] != x.shape[1]:
        raise ValueError(f"z: expected [M, {x.shape[1]}] like {name}, got {list(z.shape)}")
    if not isinstance(lengthscale, Tensor):
        if not isinstance(lengthscale, int | float):
            raise TypeError(
                f"lengthscale: expected a number or a tensor, got {type(lengthscale).__name__}"
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        lengthscale = torch.tensor(lengthscale, dtype=dtype, device=x.device)
    dispatch.check_floating(**{name: x, "lengthscale": lengthscale})
    if lengthscale.shape not in (torch.Size([]), x.shape[1:]):
        raise ValueError(
            f"lengthscale: expected a scalar or [{x.shape[1]}], got {list(lengthscale.shape)}"
        )
    # Looking at values on another device would wait for it, under torch.compile break the graph.
    look = lengthscale.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and not bool((lengthscale > 0).all()):
        raise ValueError(f"lengthscale: expected positive values, got {lengthscale.tolist()}")
    return lengthscale


def _check_weights(z: Tensor, w: Tensor, columns: int | None) -> None:
    dispatch.check_floating(z=z, w=w)
    if w.ndim != 2 or w.shape[0] != z.shape[0] or w.shape[1] != (columns or max(1, w.shape[1])):
        expected = f"[{z.shape[0]}, {columns or 'O'}]"
        raise ValueError(f"w: expected {expected} for z of {list(z.shape)}, got {list(w.shape)}")


def _check_coupling(x1: Tensor, name: str, x2: Tensor, z: Tensor, w: Tensor) -> None:
    dispatch.check_floating(**{"x1": x1, name: x2})
    if x2.ndim != 2 or x2.shape[0] != x1.shape[0] or x2.shape[1] < 1:
        raise ValueError(f"{name}: expected [{x1.shape[0]}, E], got {list(x2.shape)}")
    _check_weights(z, w, 2 * x2.shape[1])
