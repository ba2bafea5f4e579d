r"""The inverse of an autoregressive block: drawing a sample through a causal Transformer.

    x_0 = z_0,   x_{i+1} = F(x)_{i+1} = z_{i+1} exp(a_i) + b_i,   (a_i, b_i) from tokens 0..i

Token by token it takes T - 1 dependent steps. F is strictly lower triangular, so sweeps over a
window of tokens at once (Jacobi) converge to the same x: each makes at least one more token exact.
A token is frozen as it is once F would change it by at most ``tol`` and all before it are frozen;
what F would change it by is then its residual. Keys and values of frozen tokens were computed from
the very values that are returned.

Source: Zhai et al. (arXiv 2412.06329), section 2.2; the fixed point: Song et al. (arXiv
2002.03629).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch
from .attention import triton_precision
from .decode_weights import BlockWeights, PackedBlock, from_panels, panel_reason

#: ``method="auto"`` looks at what this many wide sweeps have frozen (csrc/cpu/kernels.h).
PROBE_SWEEPS = 8


class Decoded(NamedTuple):
    """``x [B, T, C]``; ``residual [B]``, the largest ``|F(x) - x|`` of each image in units of x;
    ``counts [2]`` (int64): sweeps over windows and steps of single tokens."""

    x: Tensor
    residual: Tensor
    counts: Tensor


# --- reference -----------------------------------------------------------------------------------


def decode_block_reference(
    z: Tensor,
    weights: Sequence[Tensor],
    embed: Tensor,
    guide: Tensor,
    heads: int,
    eps: float,
    temperature: float,
    reverse: bool,
    outputs: int,
    panels: bool,
    tol: float,
    window: int,
    break_even: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``decode_block`` in plain PyTorch: any dtype, every image at its own front."""
    packed = PackedBlock(*weights)
    if panels:
        packed = from_panels(packed, heads, outputs)
    B, T, _ = z.shape
    z = z.flip(1) if reverse else z
    x, front = z.clone(), z.new_zeros(B, dtype=torch.long)
    residual, counts = z.new_zeros(B), [0, 0]
    transformer = _Transformer(packed, embed, B, T, heads, eps, temperature)
    window, decided = min(window, max(T - 1, 1)), break_even <= 0 or window == 1
    while (front < T - 1).any():
        if not decided and counts[0] == PROBE_SWEEPS // 2:
            noted = front.sum()
        if not decided and counts[0] == PROBE_SWEEPS:
            decided, frozen, due = True, front.sum(), break_even * B
            # The first sweeps freeze little: a token takes a few to settle.
            if frozen < due * PROBE_SWEEPS and frozen - noted < due * (PROBE_SWEEPS // 2):
                window = 1
        at = front[:, None] + torch.arange(window, device=z.device)  # [B, window]
        inside = at <= T - 2
        at = at.clamp(max=T - 2)
        params = transformer(_tokens(x, at), at)
        new = _transform(_tokens(z, at + 1), params, _guides(guide, at), B)
        old = _tokens(x, at + 1)
        change = (new - old).abs().amax(2)
        # Frozen tokens: a run from the window's start, of changes up to tol.
        stays = (change <= tol).where(inside, True) if window > 1 else torch.zeros_like(inside)
        run = stays.cumprod(1).bool()
        residual = residual.maximum(change.where(run & inside, 0).amax(1))
        x = x.scatter(1, (at + 1)[..., None].expand_as(new), old.where(run[..., None], new))
        moved = run.sum(1) + (~run.all(1)).long()
        front = (front + moved).clamp(max=T - 1)
        counts[window == 1] += 1
    x = x.flip(1) if reverse else x
    return x, residual, torch.tensor(counts, device=z.device)


class _Transformer:
    """The block's parameters at some tokens of every image, attending to cached keys and values;
    ``R`` rows, conditional ones first."""

    def __init__(self, packed: PackedBlock, embed: Tensor, B: int, T: int, heads, eps, temperature):
        self.packed, self.embed, self.heads, self.eps = packed, embed, heads, eps
        self.repeats = len(embed) // B
        L, W = packed.proj.shape[:2]
        shape = (L, len(embed), T, heads, W // heads)
        self.keys, self.values = packed.proj.new_zeros(shape), packed.proj.new_zeros(shape)
        scale = embed.new_full((len(embed), 1, 1, 1), (W // heads) ** -0.5)
        scale[B:] /= temperature
        self.scale = scale

    def __call__(self, tokens: Tensor, at: Tensor) -> Tensor:
        """``tokens [B, n, C]`` at positions ``at [B, n]`` -> ``[R, n, P]``."""
        p = self.packed
        h = F.linear(tokens, p.w_in) + p.position[at]
        h = h.repeat(self.repeats, 1, 1) + self.embed[:, None]
        at = at.repeat(self.repeats, 1)
        for layer in range(len(p.proj)):
            o = self._attend(self._linear(self._norm(h, p.norm1[layer]), "qkv", layer), at, layer)
            h = h + self._linear(o, "proj", layer)
            hidden = F.gelu(self._linear(self._norm(h, p.norm2[layer]), "up", layer))
            h = h + self._linear(hidden, "down", layer)
        return F.linear(h.to(p.w_out.dtype), p.w_out, p.b_out.to(p.w_out.dtype)).to(h.dtype)

    def _norm(self, h: Tensor, norm: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], norm[0], norm[1], self.eps)

    def _linear(self, h: Tensor, name: str, layer: int) -> Tensor:
        w, bias = getattr(self.packed, name)[layer], getattr(self.packed, f"{name}_bias")[layer]
        return F.linear(h.to(w.dtype), w, bias.to(w.dtype))

    def _attend(self, qkv: Tensor, at: Tensor, layer: int) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)  # [R, n, H, D]
        rows = torch.arange(len(at), device=at.device)[:, None]
        self.keys[layer][rows, at], self.values[layer][rows, at] = k, v
        seen = int(at.max()) + 1
        k, v = self.keys[layer][:, :seen], self.values[layer][:, :seen]
        hidden = torch.arange(seen, device=at.device) > at[:, None, :, None]  # [R, 1, n, seen]
        scores = torch.einsum("rnhd,rjhd->rhnj", q, k).to(self.scale.dtype) * self.scale
        weights = scores.masked_fill(hidden, -math.inf).softmax(3).to(v.dtype)
        # A window's later tokens may be infinite, and 0 * inf is not 0.
        spoilt = ~(k.isfinite() & v.isfinite()).all(3).all(2)[:, None, None]  # [R, 1, 1, seen]
        o = torch.einsum("rhnj,rjhd->rnhd", weights, v.nan_to_num(0, 0, 0))
        spoilt = (spoilt & ~hidden).any(3)[:, 0, :, None, None]  # [R, n, 1, 1]
        return o.masked_fill(spoilt, math.nan).flatten(2)


def _tokens(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, at[..., None].expand(*at.shape, x.shape[2]))


def _guides(guide: Tensor, at: Tensor) -> Tensor | None:
    return guide[at] if len(guide) else None


def _transform(z: Tensor, params: Tensor, guide: Tensor | None, B: int) -> Tensor:
    C = z.shape[2]
    if len(params) > B:
        params, free = params.chunk(2)
        weight = guide[..., -1:].expand_as(params)
        if params.shape[2] == 2 * C:
            weight = guide.repeat_interleave(C, 2)
        params = params + weight * (params - free)
    return z * params[..., :C].exp() + params[..., C:] if params.shape[2] == 2 * C else z + params


# --- registration --------------------------------------------------------------------------------


def _flops(z, weights, embed, guide, heads, *_) -> int:
    """Of the exact sampler: every weight for every token, and all tokens before it."""
    (_, T, _), R, (L, W) = z, embed[0], weights[5][:2]
    W = weights[1][1]
    E = weights[9][1]
    products = W * weights[0][1] + L * (4 * W * W + 2 * W * E) + W * weights[13][0]
    return R * (2 * (T - 1) * products + 4 * L * W * (T * (T - 1) // 2))


@dispatch.define_op(
    "decode_block(Tensor z, Tensor[] weights, Tensor embed, Tensor guide, int heads, float eps,"
    " float temperature, bool reverse, int outputs, bool panels, float tol, int window,"
    " float break_even) -> (Tensor, Tensor, Tensor)",
    _flops,
)
def _(z, weights, embed, guide, *_):
    return torch.empty_like(z), z.new_empty(len(z)), z.new_empty(2, dtype=torch.long)


@dispatch.implement("decode_block", "reference")
def _reference(*args):
    return decode_block_reference(*args)


def _cpu_reason(z, weights, embed, guide, heads, eps, temperature, reverse, outputs, panels, *_):
    if not panels:
        return panel_reason(PackedBlock(*weights), heads) or "its weights were packed for others"
    return None


@dispatch.implement("decode_block", "cpu", _cpu_reason)
def _cpu(
    z, weights, embed, guide, heads, eps, temperature, reverse, outputs, panels, tol, window, even
):
    (B, T, C), (L, W) = z.shape, weights[6].shape
    x, residual, counts = torch.empty_like(z), z.new_empty(B), z.new_empty(2, dtype=torch.long)
    dispatch.native().decode(
        *(dispatch.NATIVE_DTYPES[weights[3].dtype], B, T, C, W, L, heads, weights[9].shape[1]),
        *(outputs, window, len(embed) > B, reverse, eps, (W // heads) ** -0.5, temperature),
        *(tol, even, torch.get_num_threads(), z.data_ptr(), embed.data_ptr(), guide.data_ptr()),
        *([w.data_ptr() for w in weights], x.data_ptr(), residual.data_ptr(), counts.data_ptr()),
    )
    return x, residual, counts


def _triton_reason(z, weights, embed, guide, heads, eps, temperature, reverse, outputs, panels, *_):
    if panels:
        return "its weights were packed for the CPU kernels"
    narrow, D = weights[3].dtype, weights[6].shape[1] // heads
    if z.dtype != torch.float32 or narrow not in (torch.float32, torch.bfloat16):
        return f"{narrow} weights with {z.dtype} tokens have no Triton kernel"
    if D > 128:
        return f"its heads are {D} wide, more than 128"
    return dispatch.triton_dtype_reason(weights[3])


@dispatch.implement("decode_block", "triton", _triton_reason)
def _triton(
    z, weights, embed, guide, heads, eps, temperature, reverse, outputs, panels, tol, window, even
):
    from .decode_graphs import decode_block

    return decode_block(
        *(z, weights, embed, guide, heads, eps, temperature, reverse, tol, window, even),
        triton_precision(),
    )


def _cuda_reason(
    z, weights, embed, guide, heads, eps, temperature, reverse, outputs, panels, *rest
):
    from .cuda import decode

    if panels:
        return "its weights were packed for the CPU kernels"
    return decode.reason(z, PackedBlock(*weights), embed, heads, window=rest[1])


@dispatch.implement("decode_block", "cuda", _cuda_reason)
def _cuda(z, weights, *args):
    from .cuda import decode

    return decode.decode_block(z, PackedBlock(*weights), *args[:6])


# --- public --------------------------------------------------------------------------------------


def decode_block(
    z: Tensor,
    weights: BlockWeights,
    embed: Tensor,
    *,
    guide: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    method: str = "exact",
    tol: float = 1e-3,
    window: int | None = None,
    backend: str = "auto",
) -> Decoded:
    """``x_{i+1} = z_{i+1} exp(a_i) + b_i`` with ``(a_i, b_i)`` of a causal Transformer at x_0..x_i.

    Args:
        z: ``[B, T, C]`` in raster order, fp32 (fp64 for weights in fp64).
        weights: of ``pack_block``.
        embed: ``[B, W]`` added to every token of an image, or ``[2B, W]``: then rows B.. are those
            of a second, unconditional pass that guides the first, ``p += g (p - p_u)``.
        guide: ``[T, 2]``, the weights g for log-scales and shifts that each token gives; needed
            with ``embed [2B, W]`` alone.
        temperature: by which scores of the unconditional pass are divided.
        reverse: the block's token order is raster order reversed.
        method: ``"exact"``, token by token; ``"jacobi"``, sweeps over windows until every token's
            residual is at most ``tol``; ``"auto"``, Jacobi that goes on exactly where its first
            sweeps froze too few tokens to pay.
        tol: largest residual of a token, in units of x. 0 gives the exact result.
        window: tokens a sweep; None for what suits the device.
        backend: see ``flowops.dispatch``.

    Returns:
        ``Decoded``. No gradients. On the CPU's own kernels the same bits for any number of threads
        and, with ``"exact"``, ``tol=0`` or a given window of ``"jacobi"``, for any batch; with
        ``tol=0`` also for any method.

    Raises:
        TypeError, ValueError: naming the argument that is off.

    Source: arXiv 2412.06329 (inverse and guidance).
    """
    dispatch.check_backend(backend)
    rows = _check(z, weights, embed, guide)
    check_solver(method, tol, window)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
    window, even = _plan(weights, rows, method, window)
    with torch.no_grad():
        return Decoded(
            *torch.ops.flowops.decode_block(
                z.detach().contiguous(),
                list(weights.tensors),
                embed.detach().to(z.dtype).contiguous(),
                (z.new_empty(0, 2) if guide is None else guide.to(z.dtype)).contiguous(),
                *(weights.heads, weights.eps, float(temperature), reverse, weights.outputs),
                *(weights.panels, float(tol), window, even, backend),
            )
        )


def check_solver(method: str, tol: float, window: int | None) -> None:
    """Raises ValueError, naming the argument that is off."""
    if method not in ("exact", "jacobi", "auto"):
        raise ValueError(f"method: expected 'exact', 'jacobi' or 'auto', got {method!r}")
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol: expected a finite number, at least 0, got {tol!r}")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window: expected a positive number of tokens, got {window!r}")


#: Arithmetic operations in the time of reading a byte, in products of few rows: of a GPU, of a CPU,
#: and of a CPU whose caches hold the weights.
_OPERATIONS_PER_BYTE = {"cuda": 200.0, "cpu": 4.0, "cached": 1.5}
_CACHE = 8 << 20  # bytes


def pass_cost(weights: BlockWeights, rows: int) -> tuple[float, float]:
    """What a pass over the block reads, weights and the keys and values of half of the tokens, and
    what each token of its window adds to that in arithmetic; both in bytes."""
    packed = PackedBlock(*weights.tensors)
    products = [packed.w_in, packed.qkv, packed.proj, packed.up, packed.down, packed.w_out]
    L, W = packed.proj_bias.shape
    cache = L * W * weights.tokens * packed.qkv.element_size()
    weights_read = sum(w.nbytes for w in products)
    kind = "cpu" if packed.w_in.device.type == "cpu" else "cuda"
    if kind == "cpu" and weights_read <= _CACHE:
        kind = "cached"
    token = 2 * sum(w.numel() for w in products) / _OPERATIONS_PER_BYTE[kind]
    return weights_read + rows * cache, rows * token


def default_window(weights: BlockWeights, rows: int) -> int:
    """Tokens whose arithmetic takes three times as long as reading: wider sweeps read little less
    for a token."""
    read, token = pass_cost(weights, rows)
    return min(max(math.ceil(3 * read / token), 4), max(weights.tokens - 1, 1))


def break_even(weights: BlockWeights, rows: int, window: int) -> float:
    """Tokens that a sweep has to freeze to be as cheap as single steps."""
    read, token = pass_cost(weights, rows)
    return (read + window * token) / (read + token)


def _plan(weights: BlockWeights, rows: int, method: str, window: int | None) -> tuple[int, float]:
    """The window, and what sweeps have to freeze for ``auto`` to go on with them (0: no matter)."""
    if method == "exact":
        return 1, 0.0
    window = min(window or default_window(weights, rows), max(weights.tokens - 1, 1))
    if method == "jacobi":
        return window, 0.0
    even = break_even(weights, rows, window)
    # Tokens take more than three sweeps to settle, so that a sweep freezes less than a third of its
    # window; and where sweeps don't pay, trying them may cost a tenth of the block.
    hopeless, risk = even > window / 3, PROBE_SWEEPS * (even - 1)
    return (1, 0.0) if hopeless or risk > (weights.tokens - 1) / 10 else (window, even)


def _check(z, weights: BlockWeights, embed: Tensor, guide: Tensor | None) -> int:
    """The number of rows."""
    dispatch.check_floating(z=z, embed=embed)
    if not isinstance(weights, BlockWeights):
        raise TypeError(f"weights: expected what pack_block returns, got {type(weights).__name__}")
    wide, device = weights.tensors[0].dtype, weights.tensors[0].device
    if z.dtype != wide or z.device != device:
        raise ValueError(
            f"z: expected {wide} on {device} like weights, got {z.dtype} on {z.device}"
        )
    if z.ndim != 3 or list(z.shape[1:]) != [weights.tokens, weights.channels] or not len(z):
        raise ValueError(
            f"z: expected [B >= 1, {weights.tokens}, {weights.channels}], got {list(z.shape)}"
        )
    B, W = len(z), weights.tensors[1].shape[1]
    if embed.shape not in ((B, W), (2 * B, W)):
        raise ValueError(f"embed: expected [{B}, {W}] or [{2 * B}, {W}], got {list(embed.shape)}")
    if len(embed) == B and guide is not None:
        raise ValueError(f"guide: needs embed [{2 * B}, {W}], got {list(embed.shape)}")
    if guide is not None:
        dispatch.check_floating(z=z, guide=guide)
    if len(embed) > B and (guide is None or guide.shape != (weights.tokens, 2)):
        got = None if guide is None else list(guide.shape)
        raise ValueError(f"guide: expected [{weights.tokens}, 2], got {got}")
    return len(embed)
