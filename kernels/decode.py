"""The inverse of an autoregressive block on the GPU, without a word from the host between sweeps.

A sweep runs a window of n tokens of every image through the block, from the image's own front
(``front[b]``, the first token without cached keys and values), and moves the fronts over what it
froze. Window 1 is the exact sampler. A front at the last token means that there is nothing to do:
wide sweeps and single steps have fronts of their own, and whichever is not due sees such fronts.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .decode_layer import (
    FEW_ROWS,
    decode_attend_step_kernel,
    decode_attend_window_kernel,
    decode_linear_kernel,
    decode_prepare_kernel,
    load_matrix,
    positions,
    precision_of,
    product,
    splits_of,
    tiles_for,
)
from .launch import TABLE, row, start
from .numerics import exponential

#: ``break_even`` is compared with what this many wide sweeps have frozen.
PROBE_SWEEPS = 8

_CHANNELS = 64  # of a program that makes parameters

TABLE["decode_tail"] = {
    "default": [
        row(8, 1, BLOCK_M=1, BLOCK_K=1024, limits={"rows": FEW_ROWS, "channels": 16}),
        row(8, 1, BLOCK_M=1, BLOCK_K=256, limits={"rows": FEW_ROWS}),
        row(4, 3, BLOCK_M=16, BLOCK_K=128, limits={"rows": 1024, "channels": 16, "itemsize": 2}),
        row(4, 2, BLOCK_M=16, BLOCK_K=32, limits={"rows": 1024}),
        row(8, 2, BLOCK_M=64, BLOCK_K=32),
    ]
}
TABLE["decode_freeze"] = {"default": [row(4, 1)]}


@triton.jit
def decode_tail_kernel(
    h_ptr, weight_ptr, bias_ptr, guide_ptr, z_ptr, x_ptr, new_ptr, front_ptr, count_ptr, B, n, T,
    K: tl.constexpr, C: tl.constexpr, HAS_SCALE: tl.constexpr, GUIDED: tl.constexpr,
    ADVANCE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """F at the tokens after the rows': parameters h W^T + bias, guided, and the affine step.

    Into new [B, n, C]; or, to ADVANCE by one token, into x, and the front with it: then a program
    has all channels of its images.
    """
    tiles_c, M = tl.cdiv(C, BLOCK_C), B * n
    pid = tl.program_id(0)
    row = pid // tiles_c * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b, p, active = positions(row, front_ptr, B, M, n, T)
    if BLOCK_M > 1:  # noqa: SIM102
        if tl.max(active.to(tl.int32), axis=0) == 0:
            return
    wide, b = row.to(tl.int64), b.to(tl.int64)
    SHIFT: tl.constexpr = C if HAS_SCALE else 0  # the first row of the shifts
    a = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    shift, free_a, free_shift = a, a, a
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w_shift = load_matrix(weight_ptr + SHIFT * K, c, k, C, K, K, BLOCK_C, BLOCK_K)
        mask = (row < M)[:, None] if K % BLOCK_K == 0 else (row < M)[:, None] & (k < K)[None, :]
        h = tl.load(h_ptr + wide[:, None] * K + k[None, :], mask=mask, other=0.0).to(w_shift.dtype)
        shift = product(h, w_shift, shift, PRECISION)
        if HAS_SCALE:
            w = load_matrix(weight_ptr, c, k, C, K, K, BLOCK_C, BLOCK_K)
            a = product(h, w, a, PRECISION)
        if GUIDED:
            h = tl.load(h_ptr + (wide + M)[:, None] * K + k[None, :], mask=mask, other=0.0)
            h = h.to(w_shift.dtype)
            free_shift = product(h, w_shift, free_shift, PRECISION)
            if HAS_SCALE:
                free_a = product(h, w, free_a, PRECISION)
    mask = active[:, None] & (c < C)[None, :]
    if GUIDED:
        weight = tl.load(guide_ptr + 2 * p + 1, mask=active, other=0.0)
        shift += weight[:, None] * (shift - free_shift)
    shift += tl.load(bias_ptr + SHIFT + c, mask=c < C, other=0.0)[None, :]
    moved = (b * T + p + 1)[:, None] * C + c[None, :]
    new = tl.load(z_ptr + moved, mask=mask, other=0.0)
    if HAS_SCALE:
        if GUIDED:
            weight = tl.load(guide_ptr + 2 * p, mask=active, other=0.0)
            a += weight[:, None] * (a - free_a)
        a += tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]
        new *= exponential(a)
    new += shift
    if ADVANCE:
        tl.store(x_ptr + moved, new, mask=mask)
        done = tl.load(count_ptr + b, mask=active, other=0)
        tl.debug_barrier()  # all have read the fronts
        tl.store(front_ptr + b, p + 1, mask=active)
        tl.store(count_ptr + b, done + 1, mask=active)
    else:
        tl.store(new_ptr + wide[:, None] * C + c[None, :], new, mask=mask)


@triton.jit
def decode_freeze_kernel(
    new_ptr, x_ptr, residual_ptr, front_ptr, count_ptr, tol, n, T, C: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Moves the front of one image over the tokens that new leaves within tol and one more, which
    is exact; they stay as they are, the rest becomes new. EXACT: none stays."""
    b = tl.program_id(0).to(tl.int64)
    front = tl.load(front_ptr + b)
    count = tl.minimum(n, T - 1 - front)  # tokens that may move: front + 1 + t
    if count <= 0:
        return
    c = tl.arange(0, BLOCK_C)
    new_ptr += b * n * C
    x_ptr += (b * T + front + 1) * C
    stays, residual = count, 0.0  # tokens from the front that stay
    if EXACT:
        stays = count * 0
    else:
        for first in range(0, count, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            at = t[:, None] * C + c[None, :]
            mask = (t < count)[:, None] & (c < C)[None, :]
            new = tl.load(new_ptr + at, mask=mask, other=0.0)
            change = tl.abs(new - tl.load(x_ptr + at, mask=mask, other=0.0))
            moves = tl.max((change <= tol).to(tl.int32) ^ 1, axis=1)  # so does NaN
            stays = tl.minimum(stays, tl.min(tl.where(moves != 0, t, count), axis=0))
            change = tl.where(t < stays, tl.max(change, axis=1), 0.0)
            residual = tl.maximum(residual, tl.max(change, axis=0))
        residual = tl.maximum(residual, tl.load(residual_ptr + b))
    tl.debug_barrier()
    for first in range(0, count, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        at = t[:, None] * C + c[None, :]
        mask = ((t >= stays) & (t < count))[:, None] & (c < C)[None, :]
        tl.store(x_ptr + at, tl.load(new_ptr + at, mask=mask, other=0.0), mask=mask)
    if not EXACT:
        tl.store(residual_ptr + b, residual)
    tl.store(front_ptr + b, front + tl.minimum(stays + 1, count))
    tl.store(count_ptr + b, tl.load(count_ptr + b) + 1)


@dataclass(frozen=True)
class Sizes:
    """Of a workspace. R rows of the batch, B or 2B; E the perceptrons' width; dtype that of the
    products' factors."""

    B: int
    T: int
    C: int
    R: int
    W: int
    E: int
    L: int
    heads: int
    window: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Settings:
    """Numbers that launches are made with. ``precision``: the ``input_precision`` of fp32
    products."""

    eps: float
    temperature: float
    tol: float
    precision: str


def sizes_of(z, weights, embed, heads: int, window: int) -> Sizes:
    """``weights`` here and below: the tensors of ``flowops.decode_weights.PackedBlock``, by name,
    not in panels."""
    (B, T, C), (L, E, W) = z.shape, weights.up.shape
    window = max(1, min(window, T - 1))
    return Sizes(B, T, C, len(embed), W, E, L, heads, window, weights.qkv.dtype)


class Workspace:
    """What the inversion of a block of these sizes reads and writes besides weights, at fixed
    addresses. Tokens are in the block's order."""

    def __init__(self, sizes: Sizes, device: torch.device):
        self.sizes, s = sizes, sizes
        (B, T, C, R, W), window, dtype = (s.B, s.T, s.C, s.R, s.W), s.window, s.dtype
        rows = R * window
        self.splits = {n: splits_of(R, s.heads, n, T) for n in (1, window)}
        parts = max(s * R * n for n, s in self.splits.items() if s > 1 or n == 1)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.z, self.x, self.new = empty(B, T, C), empty(B, T, C), empty(B, window, C)
        self.embed, self.guide, self.residual = empty(R, W), empty(T, 2), empty(B)
        #: Fronts of wide sweeps and of single steps, then how many each image has seen.
        self.state, self.noted = empty(4, B, dtype=torch.int32), empty(dtype=torch.int64)
        self.h, self.hidden = empty(rows, W), empty(rows, s.E, dtype=dtype)
        self.q, self.row = empty(rows, W, dtype=dtype), empty(rows, W, dtype=dtype)
        self.parts, self.lse = empty(parts, W), empty(parts, s.heads)
        self.k, self.v = (empty(s.L, R, s.heads, T, W // s.heads, dtype=dtype) for _ in "kv")

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in vars(self).values() if isinstance(t, torch.Tensor)]

    def load(self, z, embed, guide, reverse: bool) -> None:
        self.z.copy_(z.flip(1) if reverse else z)
        self.x.copy_(self.z)
        self.embed.copy_(embed)
        if len(guide):
            self.guide.copy_(guide)
        self.residual.zero_()
        self.state.zero_()
        self.state[0 if self.sizes.window == 1 else 1] = self.sizes.T - 1

    def remaining(self) -> torch.Tensor:
        """Most tokens that an image still needs: of wide sweeps, and of single steps. int32 [2]"""
        return self.sizes.T - 1 - self.state[:2].amin(1)

    def probe(self, sweeps: int, break_even: float) -> None:
        """To be called after so many wide sweeps: half-way through the probe notes what they have
        frozen, at its end goes on with single steps if that, and what came since, are too few."""
        if break_even <= 0 or sweeps not in (PROBE_SWEEPS // 2, PROBE_SWEEPS):
            return
        wide, single = self.state[0], self.state[1]
        frozen, due = wide.sum(), break_even * self.sizes.B
        if sweeps < PROBE_SWEEPS:
            self.noted.copy_(frozen)
            return
        few = frozen < due * PROBE_SWEEPS
        few &= frozen - self.noted < due * (PROBE_SWEEPS // 2)
        single.copy_(torch.where(few, wide, single))
        wide.masked_fill_(few, self.sizes.T - 1)

    def result(self, reverse: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.x.flip(1) if reverse else self.x.clone()
        return x, self.residual.clone(), self.state[2:].amax(1).long()


def sweep(work: Workspace, weights, settings: Settings, n: int) -> None:
    """One sweep over a window of n tokens; n = 1: one exact step."""
    s, kind = work.sizes, int(n == 1)
    front, count = work.state[kind], work.state[2 + kind]
    spread = work.splits[n] > 1
    o, made = (work.parts, "parts") if spread else (work.row, "rows")

    def linear(x, weight, bias, out, *modes: str, norm=None, cache=(None, None)):
        _linear(work, settings, front, n, x, weight, bias, out, *modes, norm, cache)

    linear(work.x, weights.w_in, weights.position, work.h, "tokens", "embed")
    for i in range(s.L):
        cache = (work.k[i], work.v[i])
        qkv, up = weights.qkv[i], weights.up[i]
        norms = weights.norm1[i], weights.norm2[i]
        linear(work.h, qkv, weights.qkv_bias[i], work.q, "norm", "qkv", norm=norms[0], cache=cache)
        _attention(work, settings, front, n, *cache, o)
        linear(o, weights.proj[i], weights.proj_bias[i], work.h, made, "add")
        linear(work.h, up, weights.up_bias[i], work.hidden, "norm", "gelu", norm=norms[1])
        linear(work.hidden, weights.down[i], weights.down_bias[i], work.h, "rows", "add")
    _tail(work, weights, settings, front, count, n)


def _linear(work, settings, front, n, x, weight, bias, out, INPUT, OUTPUT, norm, cache) -> None:
    s, M, (N, K) = work.sizes, work.sizes.R * n, weight.shape
    shared = {"K": K, "D": s.W // s.heads, "SPLITS": work.splits[n]}
    place = (front, s.B, M, n, s.T, settings.eps)
    if INPUT in ("norm", "parts") and not (M <= FEW_ROWS and K <= 1024):
        start(
            *(decode_prepare_kernel, tiles_for("decode_prepare", x.device), M),
            (x, norm, work.lse, work.row, *place),
            **shared,
            INPUT=INPUT,
            BLOCK_K=triton.next_power_of_2(K),
        )
        x, INPUT = work.row, "rows"
    sizes = {"rows": M, "depth": K, "outputs": N, "itemsize": weight.element_size()}
    choice = tiles_for("decode_linear", x.device, **sizes)
    start(
        *(decode_linear_kernel, choice),
        triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(N, choice["BLOCK_N"]),
        (x, weight, bias, norm, work.lse, work.embed, out, *cache, *place),
        **shared,
        N=N,
        INPUT=INPUT,
        OUTPUT=OUTPUT,
        PRECISION=precision_of(weight, settings.precision),
    )


def _attention(work, settings, front, n, k, v, o) -> None:
    s, D, splits = work.sizes, work.sizes.W // work.sizes.heads, work.splits[n]
    BLOCK_D = max(16, triton.next_power_of_2(D))
    scale = D**-0.5 / math.log(2)
    scales, pairs = (scale, scale / settings.temperature), s.R * s.heads * splits
    name = "decode_attend_step" if n == 1 else "decode_attend_window"
    choice = tiles_for(name, k.device, row_bytes=BLOCK_D * k.element_size())
    shared = {"D": D, "BLOCK_D": BLOCK_D, "SPLITS": splits}
    tensors = (work.q, k, v, o, work.lse, front, s.B, s.R)
    if n == 1:
        args = (*tensors, s.T, s.heads, *scales)
        start(decode_attend_step_kernel, choice, pairs, args, **shared)
        return
    tiles = triton.cdiv(n, choice["BLOCK_M"])
    start(
        *(decode_attend_window_kernel, choice, pairs * tiles),
        (*tensors, n, s.T, s.heads, tiles, *scales),
        **shared,
        PRECISION=precision_of(k, settings.precision),
    )


def _tail(work, weights, settings: Settings, front, count, n: int) -> None:
    s, w, block = work.sizes, weights.w_out, max(16, triton.next_power_of_2(work.sizes.C))
    at_once = min(block, _CHANNELS)
    advance = n == 1 and block == at_once
    sizes = {"rows": s.R * n, "channels": at_once, "itemsize": w.element_size()}
    choice = tiles_for("decode_tail", w.device, **sizes)
    start(
        *(decode_tail_kernel, choice),
        triton.cdiv(s.B * n, choice["BLOCK_M"]) * triton.cdiv(s.C, at_once),
        (
            *(work.h, w, weights.b_out, work.guide, work.z, work.x, work.new, front, count),
            *(s.B, n, s.T),
        ),
        K=s.W,
        C=s.C,
        HAS_SCALE=len(w) != s.C,
        GUIDED=s.R != s.B,
        ADVANCE=advance,
        BLOCK_C=at_once,
        PRECISION=precision_of(w, settings.precision),
    )
    if not advance:
        start(
            *(decode_freeze_kernel, tiles_for("decode_freeze", w.device), s.B),
            (work.new, work.x, work.residual, front, count, settings.tol, n, s.T),
            C=s.C,
            EXACT=n == 1,
            BLOCK_C=block,
            BLOCK_T=max(1, 2048 // block),
        )


def decode_block(
    z, weights, embed, guide, heads: int, eps: float, temperature: float, reverse: bool,
    tol: float, window: int, break_even: float, precision: str,
):  # fmt: skip
    """``(x, residual, counts)`` of ``flowops.decode.decode_block_reference``.

    The host asks how far the sweeps are, except while a CUDA graph is captured: then as many as
    could be needed are launched.
    """
    work = Workspace(sizes_of(z, weights, embed, heads, window), z.device)
    work.load(z, embed, guide, reverse)
    settings = Settings(eps, temperature, tol, precision)
    window, most = work.sizes.window, work.sizes.T - 1
    ask = not (z.is_cuda and torch.cuda.is_current_stream_capturing())
    if window > 1:
        for i in range(most):
            work.probe(i, break_even)
            if ask and not work.remaining()[0]:
                break
            sweep(work, weights, settings, window)
    if window == 1 or break_even > 0:
        for _ in range(int(work.remaining()[1]) if ask else most):
            sweep(work, weights, settings, 1)
    return work.result(reverse)
