r"""Noise contract v1: values that depend on (seed, offset, width, row, column) alone.

A row-major matrix of width W is cut into groups of four columns. Column c of row r takes word
``c mod 4`` of Philox4x32-10 with key ``seed`` and the 128-bit counter
(``r ceil(W/4) + c div 4``, ``offset``), each half 64 bits. From the words,

    uniform = ((w >> 8) + 1) 2^-24                                         in (0, 1]
    normals = r cos t, r sin t   of each pair (w0, w1), (w2, w3),
              r = sqrt(-2 ln uniform(w0)),  t = 2 pi (w1 >> 8) 2^-24

in fp32 with fixed polynomials and IEEE operations that round once, so that every backend gives the
same bits. docs/noise.md has the polynomials and the known answers.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011); Box and Muller
(1958).
"""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch

Rng = Tensor | torch.Generator | None

_MASK = 0xFFFFFFFF
_KINDS = ("words", "uniform", "normal")  # their index is the code in csrc/cpu/kernels.h

# Minimax polynomials, highest power first; the same constants stand in csrc/cpu/philox.h and
# kernels/noise.py.
_LOG = (
    -0.07634492963552475,
    0.12761574983596802,
    -0.13160182535648346,
    0.14201758801937103,
    -0.16623356938362122,
    0.20001226663589478,
    -0.2500081956386566,
    0.3333333134651184,
)
_SIN = (-75.39346313476562, 81.59235382080078, -41.34165954589844, 6.2831854820251465)
_COS = (
    59.22919845581055,
    -85.4432373046875,
    64.93932342529297,
    -19.739208221435547,
    1.0,
)

# --- reference -----------------------------------------------------------------------------------


def philox_reference(counter: Tensor, rng: Tensor) -> Tensor:
    """Philox4x32-10 words ``[..., 4]`` (int64, below 2^32) of 64-bit counters ``[...]``."""
    seed, offset = rng[0], rng[1]
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = (offset & _MASK).expand_as(c0), ((offset >> 32) & _MASK).expand_as(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap; masking after the shift recovers the unsigned halves.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def noise_reference(rng: Tensor, rows: int, width: int, kind: str, first_row: int = 0) -> Tensor:
    """The contract in plain PyTorch: ``[rows, width]``, int64 words or fp32 values."""
    groups = (width + 3) // 4
    counter = first_row * groups + torch.arange(rows * groups, device=rng.device)
    values = philox_reference(counter.view(rows, groups), rng)
    if kind == "uniform":
        values = _uniform(values)
    elif kind == "normal":
        values = _box_muller(values)
    return values.view(rows, 4 * groups)[:, :width].contiguous()


def _uniform(words: Tensor) -> Tensor:
    return ((words >> 8) + 1).float() * 2.0**-24


def _box_muller(words: Tensor) -> Tensor:
    w0, w1 = words[..., 0::2], words[..., 1::2]
    bits = ((w0 >> 8) + 1).float().view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # of the power of two nearest from below to sqrt(2) u
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    k = (exponent - 24).float()
    ff = f * f
    tail = (ff * f) * _horner(_LOG, f) + k * -2.12194440e-4
    log_u = k * 0.693359375 + (f + (tail - ff * 0.5))
    # torch's fp32 sqrt is not always rounded correctly (MKL); through fp64 it is.
    r = (log_u * -2.0).double().sqrt().float()

    turn = w1 >> 8
    quarter = (turn + 0x200000) >> 22
    t = (turn - (quarter << 22)).float() * 2.0**-24
    tt = t * t
    sine, cosine = _horner(_SIN, tt) * t, _horner(_COS, tt)
    swap = (quarter & 1).bool()
    sine, cosine = torch.where(swap, cosine, sine), torch.where(swap, sine, cosine)
    cosine = torch.where(((quarter + 1) & 2).bool(), -cosine, cosine)
    sine = torch.where((quarter & 2).bool(), -sine, sine)
    return torch.stack([r * cosine, r * sine], dim=-1).flatten(-2)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


# --- registration and backends -------------------------------------------------------------------


@dispatch.define_op(
    "noise(Tensor rng, SymInt rows, SymInt width, str kind, SymInt first_row) -> Tensor",
    flops=lambda rng, rows, width, *_: 24 * rows * width,
)
def _(rng, rows, width, kind, first_row):
    return rng.new_empty((rows, width), dtype=torch.int64 if kind == "words" else torch.float32)


dispatch.implement("noise", "reference")(noise_reference)


@dispatch.implement("noise", "cpu")
def _(rng, rows, width, kind, first_row):
    rng = rng.contiguous()
    out = rng.new_empty((rows, width), dtype=torch.int64 if kind == "words" else torch.float32)
    dispatch.native().noise(
        _KINDS.index(kind),
        rng.data_ptr(),
        *(rows, width, first_row, out.data_ptr(), torch.get_num_threads()),
    )
    return out


@dispatch.implement("noise", "triton")
def _(rng, rows, width, kind, first_row):
    from .kernels.noise import noise_fwd

    return noise_fwd(rng.contiguous(), rows, width, kind, first_row)


def _cuda_supports(rng, rows, width, *_) -> str | None:
    from .cuda import noise

    return noise.reason(width)


@dispatch.implement("noise", "cuda", _cuda_supports)
def _(rng, rows, width, kind, first_row):
    from .cuda.noise import noise_fwd

    return noise_fwd(rng.contiguous(), rows, width, kind, first_row)


# --- public --------------------------------------------------------------------------------------


def make_rng(rng: Rng = None, device: torch.device | str = "cpu") -> Tensor:
    """The state that a noise op draws from: int64 ``[2]`` = (seed, offset).

    Args:
        rng: such a tensor (checked and handed back), a ``torch.Generator``, or None for a seed
            drawn from torch's generator of the device. Drawing never waits for the device.
        device: where the tensor has to be.

    Raises:
        TypeError, ValueError: naming what is off.
    """
    device = torch.device(device)
    if isinstance(rng, Tensor):
        if rng.dtype != torch.int64 or rng.shape != (2,):
            raise ValueError(
                f"rng: expected int64 of shape [2] (seed, offset), got {rng.dtype} of shape "
                f"{list(rng.shape)}"
            )
        if rng.device.type != device.type:
            raise ValueError(f"rng: expected a tensor on {device}, got one on {rng.device}")
        return rng
    if rng is not None and not isinstance(rng, torch.Generator):
        raise TypeError(
            "rng: expected an int64 tensor [2], a torch.Generator or None, got "
            f"{type(rng).__name__}"
        )
    if rng is not None and rng.device.type != device.type:
        raise ValueError(f"rng: expected a generator on {device}, got one on {rng.device}")
    seed = torch.randint(0, 2**63 - 1, (1,), generator=rng, device=device)
    return torch.cat([seed, torch.zeros_like(seed)])


def noise_words(
    shape: Sequence[int],
    *,
    first_row: int = 0,
    rng: Rng = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Philox words of the contract, as int64 in [0, 2^32).

    Args:
        shape: ``[..., W]``; all but the last dimension count rows.
        first_row: the number of the first of these rows in the matrix that they are a part of, at
            least 0. ``(first_row + rows) * ceil(W / 4)``, its groups up to here, are below 2^63.
        rng: see ``make_rng``.
        device: defaults to rng's, or the CPU.
        backend: as everywhere in ``flowops``.

    Raises:
        TypeError, ValueError: naming the argument that is off.

    Source: SC 2011, Salmon et al.
    """
    return _noise("words", shape, first_row, rng, device, backend)


def noise_uniform(
    shape: Sequence[int],
    *,
    first_row: int = 0,
    rng: Rng = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Uniforms in (0, 1] on a grid of 2^-24, drawn in fp32 and rounded once to ``dtype``.

    Arguments and errors as ``noise_words``.
    """
    return _noise("uniform", shape, first_row, rng, device, backend).to(dtype)


def noise_normal(
    shape: Sequence[int],
    *,
    first_row: int = 0,
    rng: Rng = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Standard normals (largest magnitude 5.77), drawn in fp32 and rounded once to ``dtype``.

    Arguments and errors as ``noise_words``.
    """
    return _noise("normal", shape, first_row, rng, device, backend).to(dtype)


def _noise(kind, shape, first_row, rng, device, backend) -> Tensor:
    dispatch.check_backend(backend)
    try:
        shape = [_integer(size) for size in shape]
    except TypeError:
        raise TypeError(f"shape: expected a sequence of integers, got {shape!r}") from None
    if not shape or min(shape) < 1:
        raise ValueError(f"shape: expected at least one dimension, all positive, got {shape}")
    rows, groups = math.prod(shape[:-1]), (shape[-1] + 3) // 4
    try:
        first_row = _integer(first_row)
    except TypeError:
        raise TypeError(f"first_row: expected an integer, got {first_row!r}") from None
    last = (2**63 - 1) // groups - rows
    if first_row < 0 or first_row > last:
        raise ValueError(f"first_row: expected 0 to {last} for shape {shape}, got {first_row}")
    if device is None:
        device = rng.device if isinstance(rng, Tensor | torch.Generator) else "cpu"
    state = make_rng(rng, device)
    out = torch.ops.flowops.noise(state, rows, shape[-1], kind, first_row, backend)
    return out.view(shape)


def _integer(value) -> int:
    # While torch.compile traces, a symbolic number is an int; operator.index makes it a constant.
    return value if isinstance(value, int | torch.SymInt) else operator.index(value)
