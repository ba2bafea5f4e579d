"""Gradients of K @ w and of K on the GPU, K computed again tile by tile.

A program owns a strip of rows and a group of points. It walks the strip once per tile of points,
with that tile's dz and dw in registers, and adds to dx in memory that no other program touches.
What several programs found for the same point or row leaves as partials, summed in a fixed order:
no atomics, and the number of partials follows from the sizes alone, not from the GPU.
"""

from math import isqrt

import torch
import triton
import triton.language as tl

from .gram import (
    FEW_FEATURES,
    block_of,
    centre_of,
    centred,
    constants,
    coupling_grads,
    difference,
    divide,
    gram_fwd,
    kernel_tile,
    stride_of,
)
from .launch import TABLE, Launch, launch, row, start

TABLE["gram_bwd"] = {
    "default": [
        row(4, 1, BLOCK_N=32, BLOCK_M=32, limits={"bytes": 4, "dot": 0}),
        row(8, 1, BLOCK_N=32, BLOCK_M=16, limits={"bytes": 4}),
        row(4, 1, BLOCK_N=32, BLOCK_M=32),
    ]
}

#: The widest points and outputs that ``gram_bwd_kernel`` is for: each slice of 32 of them computes
#: K again.
WIDEST = 128
#: Programs to aim at: four for each multiprocessor of an H100, whatever the GPU is.
_PROGRAMS = 4 * 132
#: Elements of K, and of the gradient of S, that the path for wider ones holds at a time.
_AT_ONCE = 1 << 24


@triton.jit
def _pull_of_differences(Q, x_row, z_row, mask_n, mask_m, l_ptr, stride_l, D, first,
                         COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """sum_m Q (x - z) [BLOCK_N, BLOCK_D], sum_n Q (z - x) [BLOCK_M, BLOCK_D] and
    sum_nm Q (x - z)^2 [BLOCK_D], all over lengthscales, for the features from first on."""
    columns = first + tl.arange(0, BLOCK_D)
    dx = tl.zeros((x_row.shape[0], BLOCK_D), COMPUTE)
    dz = tl.zeros((z_row.shape[0], BLOCK_D), COMPUTE)
    squares = tl.zeros((x_row.shape[0], BLOCK_D), COMPUTE)
    # Never unrolled: the compiler would keep the differences of all features from when it summed S.
    for d in range(first, tl.minimum(first + BLOCK_D, D)):
        delta = difference(x_row, z_row, d, mask_n, mask_m, l_ptr, stride_l, COMPUTE)
        pull, here = Q * delta, (columns == d)[None, :]
        dx = tl.where(here, tl.sum(pull, axis=1)[:, None], dx)
        dz = tl.where(here, -tl.sum(pull, axis=0)[:, None], dz)
        squares = tl.where(here, tl.sum(pull * delta, axis=1)[:, None], squares)
    return dx, dz, tl.sum(squares, axis=0)


@triton.jit
def _pull_of_dots(Q, x_row, z_row, mask_n, mask_m, c_ptr, l_ptr, stride_l, D, first,
                  PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    """The same from centred points: with dx and dz, the squares are sum x dx + sum z dz."""
    d = first + tl.arange(0, BLOCK_D)
    x = centred(x_row, mask_n, d, D, c_ptr, l_ptr, stride_l, PRECISION, COMPUTE)
    z = centred(z_row, mask_m, d, D, c_ptr, l_ptr, stride_l, PRECISION, COMPUTE)
    dx = tl.sum(Q, axis=1)[:, None] * x
    dx -= tl.dot(Q, z, input_precision=PRECISION, out_dtype=COMPUTE)
    dz = tl.sum(Q, axis=0)[:, None] * z
    dz -= tl.dot(tl.trans(Q), x, input_precision=PRECISION, out_dtype=COMPUTE)
    return dx, dz, tl.sum(x * dx, axis=0) + tl.sum(z * dz, axis=0)


@triton.jit
def _product(grad_row, w_row, mask_n, mask_m, O, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
             CHUNK: tl.constexpr):  # fmt: skip
    """grad @ w.T, over all outputs. [BLOCK_N, BLOCK_M]"""
    dk = tl.zeros((mask_n.shape[0], mask_m.shape[0]), COMPUTE)
    for first in range(0, O, CHUNK):
        o = first + tl.arange(0, CHUNK)
        mask_o = (o < O)[None, :]
        grad = tl.load(grad_row + o[None, :], mask=mask_n[:, None] & mask_o, other=0.0)
        w = tl.load(w_row + o[None, :], mask=mask_m[:, None] & mask_o, other=0.0)
        dk = tl.dot(
            grad.to(COMPUTE), tl.trans(w.to(COMPUTE)), dk, input_precision=PRECISION,
            out_dtype=COMPUTE,
        )  # fmt: skip
    return dk


@triton.jit
def gram_bwd_kernel(
    x_ptr, z_ptr, w_ptr, l_ptr, c_ptr, grad_ptr, dx_ptr, dz_ptr, dw_ptr, squares_ptr,
    N, M, D, O, strips, groups, strip_rows, group_points,
    stride_xn, stride_zm, stride_wm, stride_l, stride_gn, stride_gm,
    KERNEL: tl.constexpr, DOT: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
    HAS_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dx [groups, N, D], dz [strips, M, D], dw [strips, M, O], squares [strips * groups, D]; of
    each a program fills one slice of BLOCK_D features or BLOCK_O outputs.

    grad is that of K @ w [N, O], or without w that of K [N, M]. squares are the sums over pairs of
    dL/dS (x - z)^2 / lengthscale^2 per feature.
    """
    pid = tl.program_id(0)
    slice_, pid = pid // (strips * groups), pid % (strips * groups)
    strip, group = (pid % strips).to(tl.int64), (pid // strips).to(tl.int64)
    first_n, first_m = strip * strip_rows, group * group_points
    last_n = tl.minimum(first_n + strip_rows, N)
    last_m = tl.minimum(first_m + group_points, M)
    first_d = slice_ * BLOCK_D
    d, o = first_d + tl.arange(0, BLOCK_D), slice_ * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_d, mask_o = d < D, o < O
    l = tl.load(l_ptr + d * stride_l, mask=mask_d, other=1.0).to(COMPUTE)
    scale = divide(2.0, l)
    squares = tl.zeros((BLOCK_D,), COMPUTE)
    for m0 in range(first_m, last_m, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask_m = m < last_m
        z_row = z_ptr + m * stride_zm
        mask_md = mask_m[:, None] & mask_d[None, :]
        mask_mo = mask_m[:, None] & mask_o[None, :]
        dz = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
        dw = tl.zeros((BLOCK_M, BLOCK_O), COMPUTE)
        for n0 in range(first_n, last_n, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            mask_n = n < last_n
            x_row = x_ptr + n * stride_xn
            K, Q, lost = kernel_tile(
                x_row, z_row, mask_n, mask_m, c_ptr, l_ptr, stride_l, D,
                KERNEL, DOT, FEW, PRECISION, COMPUTE, CHUNK,
            )  # fmt: skip
            # Nothing but sums stays in registers from tile to tile: z and w, as operands of several
            # products and split for 3xTF32, would leave no room.
            if HAS_W:
                grad_row = grad_ptr + n[:, None] * stride_gn
                mask = mask_n[:, None] & mask_o[None, :]
                grad = tl.load(grad_row + o[None, :], mask=mask, other=0.0).to(COMPUTE)
                dw += tl.dot(tl.trans(K), grad, input_precision=PRECISION, out_dtype=COMPUTE)
                Q *= _product(
                    grad_row, w_ptr + m[:, None] * stride_wm, mask_n, mask_m, O,
                    PRECISION, COMPUTE, CHUNK,
                )  # fmt: skip
            else:
                grad_at = grad_ptr + n[:, None] * stride_gn + m[None, :] * stride_gm
                mask = mask_n[:, None] & mask_m[None, :]
                Q *= tl.load(grad_at, mask=mask, other=0.0).to(COMPUTE)
            if DOT:
                if lost:
                    pull_x, pull_z, pull_l = _pull_of_differences(
                        Q, x_row, z_row, mask_n, mask_m, l_ptr, stride_l, D, first_d, COMPUTE,
                        BLOCK_D,
                    )  # fmt: skip
                else:
                    pull_x, pull_z, pull_l = _pull_of_dots(
                        Q, x_row, z_row, mask_n, mask_m, c_ptr, l_ptr, stride_l, D, first_d,
                        PRECISION, COMPUTE, BLOCK_D,
                    )  # fmt: skip
            else:
                pull_x, pull_z, pull_l = _pull_of_differences(
                    Q, x_row, z_row, mask_n, mask_m, l_ptr, stride_l, D, first_d, COMPUTE, BLOCK_D
                )
            dz += pull_z
            squares += pull_l
            mask_nd = mask_n[:, None] & mask_d[None, :]
            dx_at = dx_ptr + (group * N + n)[:, None] * D + d[None, :]
            before = tl.load(dx_at, mask=mask_nd & (m0 > first_m), other=0.0)
            tl.store(dx_at, before + pull_x * scale[None, :], mask=mask_nd)
        dz_at = dz_ptr + (strip * M + m)[:, None] * D + d[None, :]
        tl.store(dz_at, dz * scale[None, :], mask=mask_md)
        if HAS_W:
            dw_at = dw_ptr + (strip * M + m)[:, None] * O + o[None, :]
            tl.store(dw_at, dw, mask=mask_mo)
        # Other threads of this program read dx at the next tile of points.
        tl.debug_barrier()
    tl.store(squares_ptr + pid.to(tl.int64) * D + d, squares, mask=mask_d)


def _split(n_tiles: int, m_tiles: int, row_elements: int, point_elements: int) -> tuple[int, int]:
    """Tiles of rows a strip and tiles of points a group, for about ``_PROGRAMS`` programs.

    Every strip writes ``point_elements`` and every group ``row_elements``: with S strips and G
    groups, S G programs, the sum is least where G^2 = programs * point_elements / row_elements.
    """
    groups = isqrt(_PROGRAMS * point_elements // row_elements)
    groups = min(max(groups, 1), m_tiles)
    strips = min(triton.cdiv(_PROGRAMS, groups), n_tiles)
    return triton.cdiv(n_tiles, strips), triton.cdiv(m_tiles, groups)


def blocks(D: int, O: int) -> tuple[int, int]:
    """The slice of features and of outputs whose gradients one program holds."""
    return block_of(D, 32) if D > FEW_FEATURES else triton.next_power_of_2(D), block_of(O, 32)


def _sum(partials, like):
    """Partials [count, ...] summed, in double if there are several, in the dtype of ``like``."""
    if partials.shape[0] == 1:
        return partials[0].to(like.dtype)
    return partials.sum(0, dtype=torch.float64).to(like.dtype)


def _lengthscale_gradient(squares, lengthscale):
    """From sums over pairs of dL/dS (x - z)^2 / lengthscale^2, ``[parts, D]``."""
    squares = squares.sum(dtype=torch.float64) if lengthscale.ndim == 0 else squares.sum(0)
    return (-2 * squares / lengthscale).to(lengthscale.dtype)


def _bwd(grad, x, z, w, lengthscale, kernel, precision, compute):
    """``(dx, dz, dw, dlengthscale)`` in their tensors' dtypes for the gradient of ``K @ w``;
    without w (None, and so is dw) for that of K."""
    (N, D), M, O = x.shape, z.shape[0], 1 if w is None else w.shape[1]
    if max(D, O) > WIDEST:
        return _bwd_wide(grad, x, z, w, lengthscale, kernel, precision, compute)
    const = constants(D, kernel, precision, compute)
    centre = centre_of(z, const, compute)
    block_d, block_o = blocks(D, O)
    slices = max(triton.cdiv(D, block_d), triton.cdiv(O, block_o))

    def attempt(choice: Launch):
        block_n, block_m = choice["BLOCK_N"], choice["BLOCK_M"]
        n_tiles, m_tiles = triton.cdiv(N, block_n), triton.cdiv(M, block_m)
        per_strip, per_group = _split(n_tiles, m_tiles, N * D, M * (D + O))
        strips, groups = triton.cdiv(n_tiles, per_strip), triton.cdiv(m_tiles, per_group)
        dx = x.new_empty((groups, N, D), dtype=compute)
        dz = x.new_empty((strips, M, D), dtype=compute)
        dw = dz if w is None else x.new_empty((strips, M, O), dtype=compute)
        squares = x.new_empty((strips * groups, D), dtype=compute)
        weights = grad if w is None else w
        start(
            *(gram_bwd_kernel, choice, slices * strips * groups),
            (
                *(x, z, weights, lengthscale, centre, grad, dx, dz, dw, squares),
                *(N, M, D, O, strips, groups, per_strip * block_n, per_group * block_m),
                *(x.stride(0), z.stride(0), weights.stride(0), stride_of(lengthscale)),
                *grad.stride(),
            ),
            **const,
            BLOCK_D=block_d,
            BLOCK_O=block_o,
            HAS_W=w is not None,
        )
        return (
            *(_sum(dx, x), _sum(dz, z), None if w is None else _sum(dw, w)),
            _lengthscale_gradient(squares, lengthscale),
        )

    sizes = {"bytes": compute.itemsize, "dot": int(const["DOT"])}
    return launch("gram_bwd", x.device, sizes, attempt)


def _bwd_wide(grad, x, z, w, lengthscale, kernel, precision, compute):
    """``_bwd`` for points or outputs that no program can hold: blocks of rows, with K and dL/dS
    of a block in memory and the products by torch."""
    N, M = x.shape[0], z.shape[0]
    centre = z.mean(0, dtype=compute)
    z_hat = (z - centre) / lengthscale
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz = torch.zeros(z.shape, dtype=torch.float64, device=z.device)
    dw = None if w is None else torch.zeros(w.shape, dtype=torch.float64, device=w.device)
    squares = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
    step = max(1, _AT_ONCE // M)
    for first in range(0, N, step):
        rows, block = x[first : first + step], grad[first : first + step].to(compute)
        x_hat = (rows - centre) / lengthscale
        Q = block if w is None else block @ w.to(compute).mT
        Q = gram_fwd(rows, z, lengthscale, kernel, precision, compute, Q)
        pull_x = torch.addmm(Q.sum(1, keepdim=True) * x_hat, Q, z_hat, alpha=-1)
        pull_z = torch.addmm(Q.sum(0).unsqueeze(1) * z_hat, Q.mT, x_hat, alpha=-1)
        dx[first : first + step] = 2 * pull_x / lengthscale
        dz += 2 * pull_z / lengthscale
        squares += (x_hat * pull_x).sum(0) + (z_hat * pull_z).sum(0)
        if w is not None:
            K = gram_fwd(rows.to(compute), z, lengthscale, kernel, precision, compute)
            dw += K.mT @ block
    dlengthscale = _lengthscale_gradient(squares.unsqueeze(0), lengthscale)
    return dx, dz.to(z.dtype), None if w is None else dw.to(w.dtype), dlengthscale


def gram_bwd(grad, x, z, lengthscale, kernel, precision, compute):
    """``(dx, dz, dlengthscale)`` for grad, the gradient of K, of any strides."""
    dx, dz, _, dlengthscale = _bwd(grad, x, z, None, lengthscale, kernel, precision, compute)
    return dx, dz, dlengthscale


def gram_matmul_bwd(grad, x, z, w, lengthscale, kernel, precision, compute):
    """``(dx, dz, dw, dlengthscale)``."""
    return _bwd(grad, x, z, w, lengthscale, kernel, precision, compute)


def coupling_bwd(grad_y2, grad_logdet, x1, x2, z, w, lengthscale, *config):
    """``(dx1, dx2, dz, dw, dlengthscale)``."""
    half, both = coupling_grads(
        "coupling_backward", (grad_y2, grad_logdet), x1, x2, z, w, lengthscale, *config
    )
    dx1, *rest = _bwd(both, x1, z, w, lengthscale, *config)
    return dx1, half, *rest


def coupling_inverse_bwd(grad_x2, x1, y2, z, w, lengthscale, *config):
    """``(dx1, dy2, dz, dw, dlengthscale)``."""
    half, both = coupling_grads("inverse_backward", (grad_x2,), x1, y2, z, w, lengthscale, *config)
    dx1, *rest = _bwd(both, x1, z, w, lengthscale, *config)
    return dx1, half, *rest
