r"""The autoregressive affine step of TarFlow and MAF.

With ``a`` the log-scales, ``b`` the shifts and ``a_{-1} = b_{-1} = 0``,

    z_i = (x_i - b_{i-1}) exp(-a_{i-1}),     logdet = - sum_{i,c} a_{i-1,c}     (nats)
    x_i = z_i exp(a_{i-1}) + b_{i-1}

Source: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329), eq. 3-5;
Papamakarios et al., "Masked Autoregressive Flow" (arXiv 1705.07057), eq. 3-4.
"""

import importlib

import torch
from torch import Tensor

from . import dispatch
from .interop import takes_arrays

# --- reference: plain PyTorch, differentiable, exact in fp64 -------------------------------------


def affine_update_reference(
    x: Tensor, params: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """``affine_update`` in plain PyTorch."""
    a, b = _shifted(x, params, reverse)
    z = (x.to(b.dtype) - b) * torch.exp(-a)
    return z.to(x.dtype), -a.sum(dim=(1, 2))


def affine_inverse_reference(z: Tensor, params: Tensor, reverse: bool = False) -> Tensor:
    """``affine_inverse`` in plain PyTorch."""
    a, b = _shifted(z, params, reverse)
    return (z.to(b.dtype) * torch.exp(a) + b).to(z.dtype)


def affine_update_backward_reference(grad_z, grad_logdet, x, params, reverse=False):
    """Gradients of ``affine_update``: ``dx = g e^-a``, ``db = -dx``, ``da = -g z - g_logdet``."""
    a, b = _shifted(x, params, reverse)
    grad_x = grad_z.to(b.dtype) * torch.exp(-a)
    grad_a = -grad_x * (x.to(b.dtype) - b)
    grad_a = grad_a - grad_logdet.to(b.dtype)[:, None, None]
    return grad_x.to(x.dtype), _unshifted(grad_a, -grad_x, params, reverse)


def affine_inverse_backward_reference(grad_x, z, params, reverse=False):
    """Gradients of ``affine_inverse``: ``dz = g e^a``, ``da = g z e^a``, ``db = g``."""
    a, b = _shifted(z, params, reverse)
    grad_x = grad_x.to(b.dtype)
    grad_z = grad_x * torch.exp(a)
    grad_params = _unshifted(grad_z * z.to(b.dtype), grad_x, params, reverse)
    return grad_z.to(z.dtype), grad_params


def _shifted(x: Tensor, params: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """``a_{i-1}, b_{i-1}`` in x's token order and the dtype of the arithmetic."""
    params = params.to(dispatch.compute_dtype(x, params))
    params = torch.cat([torch.zeros_like(params[:, :1]), params[:, :-1]], dim=1)
    if reverse:
        params = params.flip(1)
    if params.shape[2] == x.shape[2]:
        return torch.zeros_like(params), params
    a, b = params.chunk(2, dim=2)
    return a, b


def _unshifted(grad_a: Tensor, grad_b: Tensor, params: Tensor, reverse: bool) -> Tensor:
    """The adjoint of ``_shifted``."""
    only_shift = params.shape[2] == grad_b.shape[2]
    grad = grad_b if only_shift else torch.cat([grad_a, grad_b], dim=2)
    if reverse:
        grad = grad.flip(1)
    return torch.cat([grad[:, 1:], torch.zeros_like(grad[:, :1])], dim=1).to(params.dtype)


# --- registration --------------------------------------------------------------------------------


def _flops(x, params, *_):
    return 4 * x[0] * x[1] * params[2]  # exp, subtract, multiply, sum: two an input, both ways


@dispatch.define_op(
    "affine_update(Tensor x, Tensor params, bool reverse) -> (Tensor, Tensor)", _flops
)
def _(x, params, reverse):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=dispatch.compute_dtype(x, params))


@dispatch.define_op("affine_inverse(Tensor z, Tensor params, bool reverse) -> Tensor", _flops)
def _(z, params, reverse):
    return z.new_empty(z.shape)


@dispatch.define_op(
    "affine_update_backward(Tensor grad_z, Tensor grad_logdet, Tensor x, Tensor params,"
    " bool reverse) -> (Tensor, Tensor)",
    lambda grad_z, grad_logdet, x, params, *_: 2 * _flops(x, params),
)
def _(grad_z, grad_logdet, x, params, reverse):
    return x.new_empty(x.shape), params.new_empty(params.shape)


@dispatch.define_op(
    "affine_inverse_backward(Tensor grad_x, Tensor z, Tensor params, bool reverse)"
    " -> (Tensor, Tensor)",
    lambda grad_x, z, params, *_: 2 * _flops(z, params),
)
def _(grad_x, z, params, reverse):
    return z.new_empty(z.shape), params.new_empty(params.shape)


# --- backends ------------------------------------------------------------------------------------


def _contiguous(function):
    """Registered ops promise contiguous outputs; expressions of flips and slices don't."""

    def contiguous(*args):
        out = function(*args)
        return out.contiguous() if isinstance(out, Tensor) else tuple(t.contiguous() for t in out)

    return contiguous


dispatch.implement("affine_update", "reference")(_contiguous(affine_update_reference))
dispatch.implement("affine_inverse", "reference")(_contiguous(affine_inverse_reference))
dispatch.implement("affine_update_backward", "reference")(
    _contiguous(affine_update_backward_reference)
)
dispatch.implement("affine_inverse_backward", "reference")(
    _contiguous(affine_inverse_backward_reference)
)


def cpu_reason(x: Tensor, params: Tensor) -> str | None:
    """Why the native kernels can't take these storage types, or None."""
    if x.dtype != params.dtype and (x.dtype, params.dtype) != (torch.float32, torch.bfloat16):
        return f"no native CPU kernel for x in {x.dtype} with params in {params.dtype}"
    return dispatch.cpu_dtype_reason(x, params)


def _cpu_supports(*args) -> str | None:
    return cpu_reason(*args[-3:-1])


def _empty_like(x: Tensor) -> Tensor:
    """Contiguous, and in half the time of ``x.new_empty(x.shape)``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _native_args(x: Tensor, params: Tensor, reverse: bool) -> tuple:
    B, T, C = x.shape
    return (
        *(dispatch.NATIVE_DTYPES[x.dtype], dispatch.NATIVE_DTYPES[params.dtype]),
        *(B, T, C, params.shape[2] != C, reverse, torch.get_num_threads()),
        *(x.data_ptr(), *x.stride()[:2], params.data_ptr(), *params.stride()[:2]),
    )


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


@dispatch.implement("affine_update", "cpu", _cpu_supports)
def _(x, params, reverse):
    x, params = _dense_rows(x), _dense_rows(params)
    z = _empty_like(x)
    logdet = x.new_empty(x.shape[0], dtype=dispatch.compute_dtype(x, params))
    dispatch.native().affine_forward(
        *_native_args(x, params, reverse), z.data_ptr(), logdet.data_ptr()
    )
    return z, logdet


@dispatch.implement("affine_inverse", "cpu", _cpu_supports)
def _(z, params, reverse):
    z, params = _dense_rows(z), _dense_rows(params)
    x = _empty_like(z)
    dispatch.native().affine_inverse(*_native_args(z, params, reverse), x.data_ptr())
    return x


@dispatch.implement("affine_update_backward", "cpu", _cpu_supports)
def _(grad_z, grad_logdet, x, params, reverse):
    return _native_backward("affine_backward", grad_z, grad_logdet, x, params, reverse)


@dispatch.implement("affine_inverse_backward", "cpu", _cpu_supports)
def _(grad_x, z, params, reverse):
    return _native_backward("affine_inverse_backward", grad_x, None, z, params, reverse)


def _long_row_reason(params: Tensor) -> str | None:
    """Why the kernels of a GPU, which count the elements of a batch row in 32 bits, can't."""
    if params.shape[1] * params.shape[2] >= 2**31:
        return "a batch row has 2^31 elements, which the kernels count in 32 bits"
    return None


def _triton_supports(*args) -> str | None:
    x, params, _ = args[-3:]
    return _long_row_reason(params) or dispatch.triton_dtype_reason(x, params)


def _cuda_supports(*args) -> str | None:
    from .cuda.affine import dtype_reason

    x, params, _ = args[-3:]
    return _long_row_reason(params) or dtype_reason(x, params)


def _on_gpu(backend: str, package: str, supports) -> None:
    """Registers the launchers of ``flowops.<package>.affine``."""

    def forward(x, params, reverse, inverse):
        x, params = _dense_rows(x), _dense_rows(params)
        compute = dispatch.compute_dtype(x, params)
        return _launchers(package).affine_fwd(x, params, reverse, inverse, compute)

    def backward(grad_out, grad_logdet, x, params, reverse, inverse):
        x, params, grad_out = _dense_rows(x), _dense_rows(params), grad_out.contiguous()
        compute = dispatch.compute_dtype(x, params)
        launcher = _launchers(package).affine_bwd
        return launcher(grad_out, grad_logdet, x, params, reverse, inverse, compute)

    @dispatch.implement("affine_update", backend, supports)
    def _(x, params, reverse):
        return forward(x, params, reverse, False)

    @dispatch.implement("affine_inverse", backend, supports)
    def _(z, params, reverse):
        return forward(z, params, reverse, True)[0]

    @dispatch.implement("affine_update_backward", backend, supports)
    def _(grad_z, grad_logdet, x, params, reverse):
        return backward(grad_z, grad_logdet.contiguous(), x, params, reverse, False)

    @dispatch.implement("affine_inverse_backward", backend, supports)
    def _(grad_x, z, params, reverse):
        return backward(grad_x, None, z, params, reverse, True)


def _launchers(package: str):
    return importlib.import_module(f".{package}.affine", __package__)


_on_gpu("triton", "kernels", _triton_supports)
_on_gpu("cuda", "cuda", _cuda_supports)


def _native_backward(kernel, grad_out, grad_logdet, x, params, reverse):
    x, params, grad_out = _dense_rows(x), _dense_rows(params), grad_out.contiguous()
    if grad_logdet is not None:
        grad_logdet = grad_logdet.contiguous()
    grad_x, grad_params = _empty_like(x), _empty_like(params)
    getattr(dispatch.native(), kernel)(
        *_native_args(x, params, reverse),
        grad_out.data_ptr(),
        0 if grad_logdet is None else grad_logdet.data_ptr(),
        *(grad_x.data_ptr(), grad_params.data_ptr()),
    )
    return grad_x, grad_params


# --- autograd ------------------------------------------------------------------------------------

_UPDATE = torch.ops.flowops.affine_update.default
_INVERSE = torch.ops.flowops.affine_inverse.default


class AffineUpdateFunction(torch.autograd.Function):
    """Double backward goes through the reference formula, which is differentiable itself.

    ``ctx`` comes with ``forward`` (not a separate ``setup_context``): torch binds the arguments of
    the other form through ``inspect`` at every call, which costs more than a small kernel does.
    """

    @staticmethod
    def forward(ctx, x, params, reverse, backend):
        ctx.save_for_backward(x, params)
        ctx.reverse, ctx.backend = reverse, backend
        return _UPDATE(x, params, reverse, backend)

    @staticmethod
    def backward(ctx, grad_z, grad_logdet):
        args = (grad_z, grad_logdet, *ctx.saved_tensors, ctx.reverse)
        if torch.is_grad_enabled():
            grads = affine_update_backward_reference(*args)
        else:
            grads = torch.ops.flowops.affine_update_backward(*args, ctx.backend)
        return *grads, None, None


class AffineInverseFunction(torch.autograd.Function):
    """As ``AffineUpdateFunction``."""

    @staticmethod
    def forward(ctx, z, params, reverse, backend):
        ctx.save_for_backward(z, params)
        ctx.reverse, ctx.backend = reverse, backend
        return _INVERSE(z, params, reverse, backend)

    @staticmethod
    def backward(ctx, grad_x):
        args = (grad_x, *ctx.saved_tensors, ctx.reverse)
        if torch.is_grad_enabled():
            grads = affine_inverse_backward_reference(*args)
        else:
            grads = torch.ops.flowops.affine_inverse_backward(*args, ctx.backend)
        return *grads, None, None


# --- public --------------------------------------------------------------------------------------


@takes_arrays
def affine_update(
    x: Tensor, params: Tensor, *, reverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``z_i = (x_i - b_{i-1}) exp(-a_{i-1})`` and its log-determinant, the shift by one included.

    exp, update and log-determinant run in fp32 or wider (fp64 for fp64) whatever the storage;
    nothing is cast under autocast. Deterministic.

    Args:
        x: ``[B, T, C]``, floating. It and params may be arrays with ``__dlpack__``, as of CuPy;
            the results then are such arrays.
        params: ``[B, T, 2C]``, the network's output per token: log-scales ``a`` first, then shifts
            ``b``. Or ``[B, T, C]``, the shifts alone (volume preserving). May be stored in another
            floating dtype than x.
        reverse: x and z are in raster order while params are in reversed token order.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``z [B, T, C]`` in x's dtype and ``logdet [B]`` in nats, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: naming the argument that is off.
        RuntimeError: if a backend asked for by name can't run.

    Source: arXiv 2412.06329, eq. 3-5.
    """
    _check(x, "x", params, backend)
    if not dispatch.needs_grad(x, params):
        return _UPDATE(x, params, reverse, backend)
    return AffineUpdateFunction.apply(x, params, reverse, backend)


@takes_arrays
def affine_inverse(
    z: Tensor, params: Tensor, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """``x_i = z_i exp(a_{i-1}) + b_{i-1}`` for parameters that are already known.

    Args:
        z: ``[B, T, C]``, floating.
        params: as in ``affine_update``.
        reverse: as in ``affine_update``.
        backend: as in ``affine_update``.

    Returns:
        ``x [B, T, C]`` in z's dtype; ``affine_update(x, params)[0]`` is z again.

    Raises:
        As ``affine_update``.

    Source: arXiv 2412.06329, eq. 3.
    """
    _check(z, "z", params, backend)
    if not dispatch.needs_grad(z, params):
        return _INVERSE(z, params, reverse, backend)
    return AffineInverseFunction.apply(z, params, reverse, backend)


def _check(x: Tensor, name: str, params: Tensor, backend: str) -> None:
    dispatch.check_backend(backend)
    dispatch.check_floating(**{name: x, "params": params})
    shape, given = x.shape, params.shape
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"{name}: expected a non-empty [B, T, C], got {list(shape)}")
    B, T, C = shape
    if len(given) != 3 or given[0] != B or given[1] != T or given[2] not in (C, 2 * C):
        raise ValueError(
            f"params: expected [{B}, {T}, {2 * C}] or [{B}, {T}, {C}] for {name} of shape "
            f"{list(shape)}, got {list(given)}"
        )
