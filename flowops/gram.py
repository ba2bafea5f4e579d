r"""Kernel (Gram) matrices and their products.

With ``S = |(x - z) / lengthscale|^2`` and ``r = sqrt(S)``:

    se        k = exp(-S / 2)
    matern12  k = exp(-r)
    matern32  k = (1 + sqrt(3) r) exp(-sqrt(3) r)
    matern52  k = (1 + sqrt(5) r + 5 S / 3) exp(-sqrt(5) r)

    se_gram           K[n, m] = k(x_n, z_m)
    se_gram_matmul    K @ w, K never stored

Source: "Kernelised Normalising Flows" (arXiv 2307.14839), eq. 6-7; Rasmussen and Williams,
"Gaussian Processes for Machine Learning" (2006), eq. 4.9 and 4.14-4.17.
"""

import importlib
import math

import torch
from torch import Tensor

from . import dispatch
from .interop import takes_arrays

KERNELS = ("se", "matern12", "matern32", "matern52")
_PRECISIONS = ("fp32", "tf32")

# --- reference -----------------------------------------------------------------------------------
# Distances are summed from direct differences, so data far from zero are as accurate as centred
# data and x == z gives exactly 1.


def se_gram_reference(x: Tensor, z: Tensor, lengthscale: Tensor, kernel: str = "se") -> Tensor:
    """``se_gram`` in plain PyTorch."""
    x, z, lengthscale, dtype = *dispatch.computing(x, z, lengthscale), x.dtype
    return _profile(_squared_distance(x, z, lengthscale), kernel).to(dtype)


def se_gram_matmul_reference(
    x: Tensor, z: Tensor, w: Tensor, lengthscale: Tensor, kernel: str = "se"
) -> Tensor:
    """``se_gram_matmul`` in plain PyTorch."""
    x, z, w, lengthscale, dtype = *dispatch.computing(x, z, w, lengthscale), x.dtype
    return (_profile(_squared_distance(x, z, lengthscale), kernel) @ w).to(dtype)


def se_gram_backward_reference(grad, x, z, lengthscale, kernel="se"):
    """Gradients of ``se_gram`` to x, z and lengthscale."""
    inputs = (x, z, lengthscale)
    grad, x, z, lengthscale = dispatch.computing(grad, x, z, lengthscale)
    S = _squared_distance(x, z, lengthscale)
    return cast_like(_distance_backward(grad * _slope(S, kernel), S, x, z, lengthscale), inputs)


def se_gram_matmul_backward_reference(grad, x, z, w, lengthscale, kernel="se"):
    """Gradients of ``se_gram_matmul`` to x, z, w and lengthscale."""
    inputs = (x, z, w, lengthscale)
    grad, x, z, w, lengthscale = dispatch.computing(grad, x, z, w, lengthscale)
    S = _squared_distance(x, z, lengthscale)
    grad_x, grad_z, grad_lengthscale = _distance_backward(
        (grad @ w.mT) * _slope(S, kernel), S, x, z, lengthscale
    )
    return cast_like((grad_x, grad_z, _profile(S, kernel).mT @ grad, grad_lengthscale), inputs)


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


def cast_like(grads, inputs) -> tuple[Tensor, ...]:
    return tuple(g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))


# --- registration --------------------------------------------------------------------------------

CONFIG = "Tensor lengthscale, str kernel, str precision"


def _gram_flops(x, z, *_) -> int:
    return x[0] * z[0] * (3 * x[1] + 1)  # subtract, square, add; one exp


def matmul_flops(x, z, w, *_) -> int:
    return _gram_flops(x, z) + 2 * x[0] * z[0] * w[1]


def backward_flops(x, z, w) -> int:
    """K again, then the products for dK, dw, dx and dz."""
    return _gram_flops(x, z) + x[0] * z[0] * (4 * w[1] + 4 * x[1] + 2)


@dispatch.define_op(f"se_gram(Tensor x, Tensor z, {CONFIG}) -> Tensor", _gram_flops)
def _(x, z, lengthscale, kernel, precision):
    return x.new_empty((x.shape[0], z.shape[0]))


@dispatch.define_op(
    f"se_gram_backward(Tensor grad, Tensor x, Tensor z, {CONFIG}) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, z, *_: _gram_flops(x, z) + x[0] * z[0] * (4 * x[1] + 2),
)
def _(grad, x, z, lengthscale, kernel, precision):
    return empty_like(x, z, lengthscale)


@dispatch.define_op(
    f"se_gram_matmul(Tensor x, Tensor z, Tensor w, {CONFIG}) -> Tensor", matmul_flops
)
def _(x, z, w, lengthscale, kernel, precision):
    return x.new_empty((x.shape[0], w.shape[1]))


@dispatch.define_op(
    f"se_gram_matmul_backward(Tensor grad, Tensor x, Tensor z, Tensor w, {CONFIG})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, z, w, *_: backward_flops(x, z, w),
)
def _(grad, x, z, w, lengthscale, kernel, precision):
    return empty_like(x, z, w, lengthscale)


def empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


# --- backends ------------------------------------------------------------------------------------

_DIFFERENCES_AT_ONCE = 1 << 22  # elements of [n, M, D] that the reference holds


def by_rows(op: str, function, rowwise: int, row_outputs: int | None = None) -> None:
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


by_rows("se_gram", se_gram_reference, 1)
by_rows("se_gram_matmul", se_gram_matmul_reference, 1)
by_rows("se_gram_backward", se_gram_backward_reference, 2, 1)
by_rows("se_gram_matmul_backward", se_gram_matmul_backward_reference, 2, 1)


def on_triton(op: str, module: str, launcher: str, strided: int = 0) -> None:
    """Registers ``launcher`` of ``flowops.kernels.<module>`` for ``op``. It takes any strides of
    the first ``strided`` tensors; the others get a contiguous last dimension."""

    @dispatch.implement(op, "triton", lambda *args: dispatch.triton_dtype_reason(*args[:-2]))
    def _(*args):
        *tensors, kernel, precision = args
        tensors[strided:] = [
            t if t.ndim == 0 or t.stride(-1) == 1 else t.contiguous() for t in tensors[strided:]
        ]
        function = getattr(importlib.import_module(f".kernels.{module}", __package__), launcher)
        return function(*tensors, kernel, precision, dispatch.compute_dtype(*tensors))


on_triton("se_gram", "gram", "gram_fwd")
on_triton("se_gram_matmul", "gram", "gram_matmul_fwd")
on_triton("se_gram_backward", "gram_backward", "gram_bwd", strided=1)
on_triton("se_gram_matmul_backward", "gram_backward", "gram_matmul_bwd")


def on_cpu(op: str, code: int) -> None:
    """Registers the native kernels for ``op``, ``GramOp(code)`` of csrc/cpu/kernels.h, and for its
    backward. Their arithmetic and storage are one dtype; other tensors are converted."""
    has_half, has_weights = code >= 2, code >= 1

    def problem(x, half, z, w, lengthscale, kernel):
        (N, D), M = x.shape, z.shape[0]
        return (
            *(dispatch.NATIVE_DTYPES[x.dtype], code, KERNELS.index(kernel)),
            *(N, M, D, w.shape[1] if has_weights else 0, lengthscale.numel() > 1),
            *(torch.get_num_threads(), x.data_ptr(), x.stride(0)),
            *((half.data_ptr(), half.stride(0)) if has_half else (0, 0)),
            *(z.data_ptr(), w.data_ptr() if has_weights else 0, lengthscale.data_ptr()),
        )

    def unpacked(tensors):
        """x, half, z, w, lengthscale in the dtype of the arithmetic, with strides that the kernels
        take."""
        tensors = list(dispatch.computing(*tensors))
        strided = 2 if has_half else 1
        for i, t in enumerate(tensors):
            if not (t.is_contiguous() or (i < strided and t.stride(-1) == 1)):
                tensors[i] = t.contiguous()
        x, *rest, lengthscale = tensors
        half = rest.pop(0) if has_half else None
        return x, half, rest[0], rest[1] if has_weights else None, lengthscale

    @dispatch.implement(op, "cpu")
    def _(*args):
        *tensors, kernel, _ = args
        x, half, z, w, lengthscale = unpacked(tensors)
        N, columns = x.shape[0], half.shape[1] if has_half else (w if has_weights else z.T).shape[1]
        out = x.new_empty((N, columns))
        logdet = x.new_empty(N) if code == 2 else None
        dispatch.native().gram_forward(
            *problem(x, half, z, w, lengthscale, kernel),
            *(out.data_ptr(), 0 if logdet is None else logdet.data_ptr()),
        )
        out = out.to(tensors[1 if has_half else 0].dtype)
        return out if logdet is None else (out, logdet)

    @dispatch.implement(f"{op}_backward", "cpu")
    def _(*args):
        *tensors, kernel, _ = args
        grads, tensors = tensors[: 2 if code == 2 else 1], tensors[2 if code == 2 else 1 :]
        dtype = dispatch.compute_dtype(*tensors)
        grads = [g.to(dtype).contiguous() for g in grads]
        inputs = unpacked(tensors)
        made = [
            None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in inputs
        ]
        x_grad, half_grad, z_grad, w_grad, lengthscale_grad = (
            0 if t is None else t.data_ptr() for t in made
        )
        dispatch.native().gram_backward(
            *problem(*inputs, kernel),
            *(grads[0].data_ptr(), grads[1].data_ptr() if code == 2 else 0),
            *(x_grad, half_grad, z_grad, w_grad, lengthscale_grad),
        )
        return cast_like([t for t in made if t is not None], tensors)


on_cpu("se_gram", 0)
on_cpu("se_gram_matmul", 1)


def on_cuda(op: str, launcher: str) -> None:
    """Registers the launcher of ``flowops.cuda.gram`` for ``op``, and for its backward."""

    def module():
        return importlib.import_module(".cuda.gram", __package__)

    for name, backward in ((launcher, False), (f"{launcher}_backward", True)):
        dispatch.implement(
            f"{op}_backward" if backward else op,
            "cuda",
            lambda *args, backward=backward: module().reason(backward, *args),
        )(lambda *args, name=name: getattr(module(), name)(*args))


on_cuda("se_gram_matmul", "matmul")

# --- autograd ------------------------------------------------------------------------------------


def autograd_function(name: str, op: str, backward_reference) -> type[torch.autograd.Function]:
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


def differentiable(function: type[torch.autograd.Function], op, *args):
    """``function.apply(*args)``, or the op itself where no gradient can be asked for."""
    return function.apply(*args) if dispatch.needs_grad(*args[:-3]) else op(*args)


SeGramFunction = autograd_function("SeGramFunction", "se_gram", se_gram_backward_reference)
SeGramMatmulFunction = autograd_function(
    "SeGramMatmulFunction", "se_gram_matmul", se_gram_matmul_backward_reference
)

# --- public --------------------------------------------------------------------------------------


@takes_arrays
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
        x: ``[N, D]``, floating. It, z and lengthscale may be arrays with ``__dlpack__``, as of
            CuPy; the result then is such an array.
        z: ``[M, D]``, the auxiliary points.
        lengthscale: positive, in the units of x: a number, a 0-d tensor or ``[D]``.
        kernel: ``"se"``, ``"matern12"``, ``"matern32"`` or ``"matern52"``.
        precision: ``"fp32"``; ``"tf32"`` allows tensor cores to round the factors of products to 11
            bits (only ``"triton"`` does; in products and couplings ``"cuda"`` too).
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``K [N, M]`` in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument that is off.
        RuntimeError: if a backend asked for by name can't run.

    Source: arXiv 2307.14839, eq. 6; Rasmussen and Williams (2006), eq. 4.9 and 4.14-4.17.
    """
    lengthscale = check_points("x", x, z, lengthscale, kernel, precision, backend)
    args = (x, z, lengthscale, kernel, precision, backend)
    return differentiable(SeGramFunction, torch.ops.flowops.se_gram.default, *args)


@takes_arrays
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
    lengthscale = check_points("x", x, z, lengthscale, kernel, precision, backend)
    check_weights(z, w, None)
    args = (x, z, w, lengthscale, kernel, precision, backend)
    return differentiable(SeGramMatmulFunction, torch.ops.flowops.se_gram_matmul.default, *args)


def check_points(name, x, z, lengthscale, kernel, precision, backend) -> Tensor:
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
        dtype = dispatch.compute_dtype(x)
        lengthscale = torch.full((), lengthscale, dtype=dtype, device=x.device)
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


def check_weights(z: Tensor, w: Tensor, columns: int | None) -> None:
    dispatch.check_floating(z=z, w=w)
    if w.ndim != 2 or w.shape[0] != z.shape[0] or w.shape[1] != (columns or max(1, w.shape[1])):
        expected = f"[{z.shape[0]}, {columns or 'O'}]"
        raise ValueError(f"w: expected {expected} for z of {list(z.shape)}, got {list(w.shape)}")
