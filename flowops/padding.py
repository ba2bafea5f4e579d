r"""Noise in extra dimensions (PaddingFlow).

    pad_noise(x) = concat(x + data_scale eps_d, pad_scale eps_p)

with ``eps`` standard normals of the noise contract (``flowops.noise``) for the matrix of width
D + pad, drawn where they are used.

Source: Meng et al., "PaddingFlow: Improving Normalizing Flows with Padding-Dimensional Noise"
(arXiv 2403.08216), eq. 6-7.
"""

import torch
from torch import Tensor

from . import dispatch
from .interop import takes_arrays
from .noise import Rng, make_rng, noise_reference


def pad_noise_reference(
    x: Tensor, rng: Tensor, pad: int, pad_scale: Tensor, data_scale: Tensor
) -> Tensor:
    """``pad_noise`` in plain PyTorch; x is ``[N, D]``."""
    N, D = x.shape
    compute = dispatch.compute_dtype(x)
    eps = noise_reference(rng, N, D + pad, "normal").to(compute)
    data = x.to(compute) + eps[:, :D] * data_scale  # 0-d: takes eps's dtype, from any device
    return torch.cat([data, eps[:, D:] * pad_scale], dim=1).to(x.dtype)


@dispatch.define_op(
    "pad_noise(Tensor x, Tensor rng, int pad, Tensor pad_scale, Tensor data_scale) -> Tensor",
    flops=lambda x, rng, pad, *_: 26 * x[0] * (x[1] + pad),
)
def _(x, rng, pad, pad_scale, data_scale):
    return x.new_empty((x.shape[0], x.shape[1] + pad))


dispatch.implement("pad_noise", "reference")(pad_noise_reference)


def _cpu_supports(x, *_) -> str | None:
    return dispatch.cpu_dtype_reason(x)


@dispatch.implement("pad_noise", "cpu", _cpu_supports)
def _(x, rng, pad, pad_scale, data_scale):
    x, rng = x if x.stride(1) == 1 else x.contiguous(), rng.contiguous()
    N, D = x.shape
    out = x.new_empty((N, D + pad))
    dispatch.native().pad_noise(
        *(dispatch.NATIVE_DTYPES[x.dtype], rng.data_ptr(), N, D, pad),
        *(x.data_ptr(), x.stride(0), out.data_ptr()),
        *(pad_scale.item(), data_scale.item(), torch.get_num_threads()),
    )
    return out


@dispatch.implement("pad_noise", "triton", lambda x, *_: dispatch.triton_dtype_reason(x))
def _(x, rng, pad, pad_scale, data_scale):
    from .kernels.padding import pad_noise_fwd

    x = x if x.stride(1) == 1 else x.contiguous()
    return pad_noise_fwd(x, rng.contiguous(), pad, pad_scale, data_scale, dispatch.compute_dtype(x))


def _cuda_supports(x, rng, pad, *_) -> str | None:
    from .cuda import padding

    return padding.reason(x, pad)


@dispatch.implement("pad_noise", "cuda", _cuda_supports)
def _(x, rng, pad, pad_scale, data_scale):
    from .cuda.padding import pad_noise_fwd

    x = x if x.stride(1) == 1 else x.contiguous()
    there = x.device.type == "cuda"
    scales = (s if there and s.device == x.device else s.item() for s in (pad_scale, data_scale))
    return pad_noise_fwd(x, rng.contiguous(), pad, *scales)


class PadNoiseFunction(torch.autograd.Function):
    """Backward is a slice; gradients to the scales draw the noise again from ``rng``."""

    @staticmethod
    def forward(ctx, x, rng, pad, pad_scale, data_scale, backend):
        ctx.save_for_backward(rng, pad_scale, data_scale)
        ctx.features, ctx.backend = x.shape[1], backend
        return torch.ops.flowops.pad_noise(x, rng, pad, pad_scale, data_scale, backend)

    @staticmethod
    def backward(ctx, grad):
        rng, pad_scale, data_scale = ctx.saved_tensors
        D = ctx.features
        grad_pad_scale = grad_data_scale = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            eps = torch.ops.flowops.noise(rng, *grad.shape, "normal", 0, ctx.backend)
            weighted = grad * eps  # fp32 at least: eps is
            if ctx.needs_input_grad[3]:
                grad_pad_scale = weighted[:, D:].sum().to(pad_scale)
            if ctx.needs_input_grad[4]:
                grad_data_scale = weighted[:, :D].sum().to(data_scale)
        return grad[:, :D], None, None, grad_pad_scale, grad_data_scale, None


@takes_arrays
def pad_noise(
    x: Tensor,
    pad: int,
    *,
    pad_scale: float | Tensor = 2.0,
    data_scale: float | Tensor = 0.0,
    rng: Rng = None,
    backend: str = "auto",
) -> Tensor:
    """``concat(x + data_scale eps_d, pad_scale eps_p)`` in one pass, the noise drawn inside.

    Drawn and added in fp32 (fp64 for fp64), rounded once; nothing is cast under autocast. The value
    of every element depends on rng, the width D + pad, its row and its column alone.

    Args:
        x: ``[..., D]``, floating. It, the scales and rng may be arrays with ``__dlpack__``, as of
            CuPy; the result then is such an array.
        pad: number of padding dimensions, at least 1.
        pad_scale: standard deviation of the padding; a number or a 0-d tensor, to be learned.
        data_scale: standard deviation of the noise on x; likewise.
        rng: int64 tensor ``[2]`` (seed, offset) on x's device, a ``torch.Generator``, or None.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[..., D + pad]`` in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument that is off.
        RuntimeError: if a backend asked for by name can't run.

    Source: arXiv 2403.08216, eq. 6-7.
    """
    dispatch.check_backend(backend)
    dispatch.check_floating(x=x)
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty [..., D], got {list(x.shape)}")
    if isinstance(pad, bool) or not isinstance(pad, int) or pad < 1:
        raise ValueError(f"pad: expected a positive number of dimensions, got {pad!r}")
    pad_scale = _as_scale("pad_scale", pad_scale)
    data_scale = _as_scale("data_scale", data_scale)
    rows = x.reshape(-1, x.shape[-1])
    state = make_rng(rng, x.device)
    args = (rows, state, pad, pad_scale, data_scale, backend)
    if dispatch.needs_grad(rows, pad_scale, data_scale):
        out = PadNoiseFunction.apply(*args)
    else:
        out = torch.ops.flowops.pad_noise.default(*args)
    return out.view(*x.shape[:-1], x.shape[-1] + pad)


def _as_scale(name: str, scale: float | Tensor) -> Tensor:
    """A 0-d tensor; numbers stay on the CPU, from where launchers read them without waiting."""
    if isinstance(scale, Tensor):
        if scale.ndim != 0 or not scale.dtype.is_floating_point:
            raise ValueError(
                f"{name}: expected a number or a 0-d floating tensor, got {scale.dtype} of shape "
                f"{list(scale.shape)}"
            )
        return scale
    if not isinstance(scale, int | float) or not 0 <= scale < float("inf"):
        raise ValueError(f"{name}: expected a finite number, at least 0, got {scale!r}")
    return torch.tensor(scale, dtype=torch.float64)
