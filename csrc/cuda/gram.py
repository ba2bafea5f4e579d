"""Launches the kernels of gram.cu and gram_backward.cu."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..cuda_runtime import blocks_at_once, launch, processors, shared_limit

#: Storage types and kernel functions, by their numbers in gram.cuh.
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PROFILES = {"se": 0, "matern12": 1, "matern32": 2, "matern52": 3}
#: What is made of K @ w, by its number in gram.cu.
MODES = ("matmul", "coupling", "inverse", "coupling_backward", "inverse_backward")

#: Points that the kernels are for.
MOST_POINTS = 256
#: To this many features, distances are always sums of squared differences.
FEW_FEATURES = 8
#: Rows that a block of a backward pass takes at a time.
_ROWS = 32


class Plan(NamedTuple):
    """A kernel, the warps of a block and its shared memory in bytes."""

    kernel: str
    warps: int
    shared: int


class Problem(NamedTuple):
    """What plans depend on."""

    N: int
    M: int
    D: int
    O: int
    kernel: str
    precision: str
    vector: bool
    device: torch.device

    @classmethod
    def of(cls, *args):
        """From the arguments of an op, which end with z, w, lengthscale, kernel and precision."""
        x, (z, w, lengthscale, kernel, precision) = args[0], args[-5:]
        (M, D), O = z.shape, w.shape[1]
        return cls(x.shape[0], M, D, O, kernel, precision, lengthscale.ndim > 0, x.device)

    def name(self) -> str:
        """Of the way distances are computed."""
        if self.D <= FEW_FEATURES and self.O <= 32:
            return "few"
        return "many"

    def suffix(self) -> str:
        if self.name() == "few":
            return "vector" if self.vector else "scalar"
        if self.D <= FEW_FEATURES or self.kernel == "matern12":
            return "differences"
        return self.precision


def reason(backward: bool, *args) -> str | None:
    """Why there is no kernel for these arguments of an op, or None."""
    for tensor in args[:-2]:
        if tensor.dtype not in STORAGE:
            return f"the CUDA kernels of K @ w have no storage in {tensor.dtype}"
    if args[-5].shape[0] > MOST_POINTS:
        return f"the CUDA kernels take up to {MOST_POINTS} points, not {args[-5].shape[0]}"
    plan = (backward_plan if backward else forward_plan)(Problem.of(*args))
    return plan if isinstance(plan, str) else None


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _least(n: int, *blocks: int) -> int:
    """The first block that holds n, or the last one."""
    return next((b for b in blocks if n <= b), blocks[-1])


def _too_large(problem: Problem, needed: int) -> str:
    return (
        f"{problem.M} points of {problem.D} features and {problem.O} outputs need {needed} bytes of"
        f" shared memory, and a block has {shared_limit(problem.device)}"
    )


def forward_plan(problem: Problem) -> Plan | str:
    """How to run gram.cu, or why not."""
    _, M, D, O, *_ = problem
    if problem.name() == "few":
        features, outputs, rows = _least(D, 2, 4, 8), _least(O, 16, 32), 32
        features = 8 if outputs == 32 else features
        kernel = f"gram_few_d{features}_o{outputs}"
        fixed = _padded(M, 8) * (12 + _padded(O, outputs) + 4)
        each = rows * (outputs + 4 + 4)
    else:
        differences = problem.suffix() == "differences"
        outputs = 64 if differences else _least(O, 32, 64, 128)
        rows = 16 if outputs == 128 else 32
        kernel = f"gram_many_o{outputs}"
        width, points = _padded(D, 8), _padded(M, 16)
        fixed = points * (width + 4 + _padded(O, outputs) + 4 + 1) + 2 * width
        each = rows * (max(width, outputs) + 4 + 1 + 4)
    warps = -(-problem.N // rows)
    warps = min(-(-warps // processors(problem.device)), 8)
    warps = min(warps, (shared_limit(problem.device) // 4 - fixed) // each)
    if warps < 1:
        return _too_large(problem, 4 * (fixed + each))
    return Plan(f"{kernel}_{problem.suffix()}", warps, 4 * (fixed + warps * each))


def backward_plan(problem: Problem) -> Plan | str:
    """How to run gram_backward.cu, or why not."""
    _, M, D, O, *_ = problem
    if problem.name() == "few":
        features, outputs = _least(D, 2, 4, 8), _least(O, 16, 32)
        features = 8 if outputs == 32 else features
        kernel = f"gram_backward_few_d{features}_o{outputs}"
        warps = -(-M // 32)
        floats = (32 * warps + _ROWS) * (12 + outputs + 4) + _ROWS * warps * features
        floats += (warps + 1) * features
    else:
        sizes = ((16, 32), (32, 64), (64, 128))
        if problem.suffix() == "differences":
            sizes = (sizes[0], sizes[2])
        fitting = [size for size in sizes if size[0] >= D and size[1] >= O]
        if not fitting:
            return f"gradients of {D} features and {O} outputs: there are kernels to 64 and 128"
        features, outputs = fitting[0]
        kernel = f"gram_backward_many_d{features}_o{outputs}"
        warps, most = -(-M // 16), 12 if features == 64 else 16
        if warps > most:
            return f"gradients of {D} features and {O} outputs are for {16 * most} points, not {M}"
        points, width = 16 * warps, _padded(D, 8)
        floats = (points + _ROWS) * (features + 4 + outputs + 4 + 1) + points * (_ROWS + 4)
        floats += 2 * width + warps * (width + _ROWS // 8)
    if 4 * floats > shared_limit(problem.device):
        return _too_large(problem, 4 * floats)
    return Plan(f"{kernel}_{problem.suffix()}", warps, 4 * floats)


def _matrix(t: Tensor | None) -> tuple:
    """A struct Matrix; a scalar is a vector of stride 0."""
    if t is None:
        return None, 0, 0
    return t, t.stride(0) if t.ndim == 2 else t.ndim, STORAGE[t.dtype]


def _dense(t: Tensor) -> Tensor:
    return t if t.ndim == 0 or t.stride(-1) == 1 else t.contiguous()


def _gram(x, z, w, lengthscale, kernel, paired) -> tuple:
    """The fields of a struct Gram."""
    matrices = (field for t in (x, z, w, lengthscale) for field in _matrix(t))
    return (*matrices, x.shape[0], *z.shape, w.shape[1], PROFILES[kernel], paired)


def _forward(mode, x, half, z, w, lengthscale, kernel, precision, grads=()):
    """``(out, logdet or None, gradients of [s, t] or None)``."""
    x, z, w, lengthscale = (_dense(t) for t in (x, z, w, lengthscale))
    problem = Problem.of(x, z, w, lengthscale, kernel, precision)
    plan = forward_plan(problem)
    grad, grad_logdet = (*grads, None, None)[:2]
    grad = None if grad is None else _dense(grad)
    grad_logdet = None if grad_logdet is None else grad_logdet.float().contiguous()
    if half is None:
        out = x.new_empty((problem.N, problem.O))
    else:
        half = _dense(half)
        out = half.new_empty(half.shape)
    logdet = x.new_empty(problem.N, dtype=torch.float32) if mode == "coupling" else None
    both = None
    if grads:
        both = x.new_empty((problem.N, problem.O), dtype=torch.float32)
    rows = 16 if "_o128_" in plan.kernel else 32
    grid = blocks_at_once(x.device, 2 if problem.name() == "few" else 1)
    grid = min(-(-problem.N // (rows * plan.warps)), grid)
    launch(
        *("gram", plan.kernel, grid, 32 * plan.warps),
        (
            *_gram(x, z, w, lengthscale, kernel, half is not None),
            *(field for t in (half, grad, out, both) for field in _matrix(t)),
            *(grad_logdet, logdet, MODES.index(mode)),
        ),
        shared=plan.shared,
    )
    return out, logdet, both


def _chunk_rows(N: int, warps: int) -> int:
    """Rows of a partial: enough partials for the largest GPUs, whichever this one is, and no sum in
    fp32 over very many rows."""
    chunks = 256 * max(1, 4 // warps)
    return min(max(_padded(-(-N // chunks), _ROWS), _ROWS), 1024)


def _backward(grad, x, z, w, lengthscale, kernel, precision):
    """``(dx, dz, dw, dlengthscale)``."""
    grad, x, z, w, lengthscale = (_dense(t) for t in (grad, x, z, w, lengthscale))
    problem = Problem.of(x, z, w, lengthscale, kernel, precision)
    N, M, D, O, *_ = problem
    plan = backward_plan(problem)
    rows, squares = _chunk_rows(N, plan.warps), D if problem.vector else 1
    chunks = -(-N // rows)
    partial = x.new_empty((chunks, M * (D + O) + squares), dtype=torch.float32)
    dx, dz, dw, dl = (t.new_empty(t.shape) for t in (x, z, w, lengthscale))
    launch(
        *("gram_backward" if problem.name() == "few" else "gram_backward_many", plan.kernel),
        *(chunks, 32 * plan.warps),
        (
            *_gram(x, z, w, lengthscale, kernel, False),
            *(*_matrix(grad), *_matrix(dx), partial, rows),
        ),
        shared=plan.shared,
    )
    launch(
        *("gram_backward", "gram_reduce", -(-partial.shape[1] // 32), 256),
        (
            *(partial, *_matrix(dz), *_matrix(dw), *_matrix(dl), *_matrix(lengthscale)),
            *(chunks, M, D, O, squares),
        ),
        shared=256 * 8,
    )
    return dx, dz, dw, dl


def matmul(x, *rest):
    """``K @ w [N, O]`` in x's dtype."""
    return _forward("matmul", x, None, *rest)[0]


def matmul_backward(grad, x, z, w, lengthscale, *config):
    """``(dx, dz, dw, dlengthscale)``."""
    return _backward(grad, x, z, w, lengthscale, *config)


def coupling(*args):
    """``(y2 [N, E], logdet [N])``."""
    return _forward("coupling", *args)[:2]


def coupling_inverse(*args):
    """``x2 [N, E]``."""
    return _forward("inverse", *args)[0]


def coupling_backward(grad_y2, grad_logdet, x1, x2, *rest):
    """``(dx1, dx2, dz, dw, dlengthscale)``."""
    half, _, both = _forward("coupling_backward", x1, x2, *rest, grads=(grad_y2, grad_logdet))
    dx1, *others = _backward(both, x1, *rest)
    return dx1, half, *others


def coupling_inverse_backward(grad_x2, x1, y2, *rest):
    """``(dx1, dy2, dz, dw, dlengthscale)``."""
    half, _, both = _forward("inverse_backward", x1, y2, *rest, grads=(grad_x2,))
    dx1, *others = _backward(both, x1, *rest)
    return dx1, half, *others
