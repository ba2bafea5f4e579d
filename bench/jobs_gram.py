"""Kernel matrices times weights, and the kernel coupling."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch

import flowops

from .ceilings import Work
from .job import Job, Missing, OpJob, Spec, compiled, on_gpu
from .jobs_attention import MODES


def gram_work(N: int, M: int, D: int, O: int, E: int = 0, backward: bool = False) -> Work:
    """Forward: 2D a pair for the distance, 2O for the product, one exp. Backward computes K again
    (2D and one exp), then dK and dw (2O each), dx and dz (2D each). K itself never moves. A
    coupling adds its E moving columns: O = 2E."""
    pairs = N * M
    moved = N * D + M * D + M * O + (2 * N * E + N if E else N * O)
    flops, exps = (2 * D + 2 * O) * pairs + 3 * N * E, pairs + N * E
    if backward:
        # x, z, w and their gradients; grad of the output, or grad_y2, grad_logdet, x2 and grad_x2.
        moved += 2 * (N * D + M * D + M * O) + (3 * N * E + N if E else N * O)
        flops += (6 * D + 4 * O) * pairs + 4 * N * E
        exps += pairs + N * E
    return Work(bytes=4 * moved, flops=flops, exps=exps)


def cases(device: str) -> list[tuple[int, int, int]]:
    """N, M, D; O is 2D. 784 is there because fusion saves memory there and not time."""
    if device == "cpu":
        return [(16384, 150, 8), (16384, 150, 2), (16384, 150, 31), (16384, 150, 63)]
    N = 65536
    return [
        (N, 150, 8),
        (N, 512, 8),
        (N, 64, 8),
        (N, 512, 2),
        (N, 512, 32),
        (N, 512, 63),
        (N, 512, 784),
    ]


def gram_specs(device: str) -> Iterator[Spec]:
    yield from _specs("gram", device)


def coupling_specs(device: str) -> Iterator[Spec]:
    yield from _specs("coupling", device)


def _specs(op: str, device: str) -> Iterator[Spec]:
    for N, M, D in cases(device):
        for mode, backward in MODES.items():
            build = partial(gram_job, op, device, N, M, D, backward)
            yield Spec(op, mode, f"N={N} M={M} D={D}", "fp32", build)


def gram_job(op: str, device: str, N: int, M: int, D: int, backward: bool) -> Job:
    O, coupling = 2 * D, op == "coupling"
    x, z = torch.randn(N, D, device=device), torch.randn(M, D, device=device)
    w = torch.randn(M, O, device=device) / M**0.5
    # Of the size of typical distances; a tensor, since a number would be copied to the GPU in
    # every call, which waits for it.
    lengthscale = torch.tensor(D**0.5, device=device)
    wrap = _as_coupling if coupling else lambda gram: gram
    baselines = {name: _adapt(gram, wrap, lengthscale) for name, gram in _grams(device).items()}
    if coupling:
        inputs = (x, torch.randn(N, D, device=device), z, w)
        grads = torch.randn(N, D, device=device), torch.randn(N, device=device)
    else:
        inputs, grads = (x, z, w), (torch.randn(N, O, device=device),)
    public = flowops.kernel_coupling if coupling else flowops.se_gram_matmul
    exact = lengthscale.double()
    return OpJob(
        gram_work(N, M, D, O, D if coupling else 0, backward),
        {**on_gpu(device, partial(public, lengthscale=lengthscale)), **baselines},
        inputs,
        truth=partial(public, lengthscale=exact, backend="reference"),
        grads=grads if backward else (),
    )


def _adapt(gram: Callable | Missing, wrap: Callable, lengthscale) -> Callable | Missing:
    if isinstance(gram, Missing):
        return gram
    function = wrap(gram)

    def adapted(*tensors):
        return function(*tensors, lengthscale)

    return compiled(adapted) if getattr(gram, "compile", False) else adapted


def _as_coupling(gram: Callable) -> Callable:
    """The coupling with K(x1, z) @ w computed by ``gram``."""

    def coupling(x1, x2, z, w, lengthscale):
        s, t = gram(x1, z, w, lengthscale).chunk(2, dim=1)
        return torch.exp(s) * x2 + t, s.sum(1)

    return coupling


# --- K(x, z) @ w by others -----------------------------------------------------------------------


def cdist_gram(x, z, w, lengthscale):
    return torch.exp(-0.5 * (torch.cdist(x, z) / lengthscale).square()) @ w


def addmm_gram(x, z, w, lengthscale):
    """|x|^2 + |z|^2 - 2 x.z in one product."""
    x, z = x / lengthscale, z / lengthscale
    squares = x.square().sum(1, keepdim=True) + z.square().sum(1)
    return torch.exp(torch.addmm(squares, x, z.mT, alpha=-2).mul(-0.5)) @ w


def _compile(function: Callable) -> Callable:
    """Marks a copy of ``function`` to be compiled once it is whole, coupling included."""

    def marked(*args):
        return function(*args)

    marked.compile = True
    return marked


def _grams(device: str) -> dict[str, Callable | Missing]:
    return {
        "cdist, exp, mm": cdist_gram,
        "addmm, exp, mm": addmm_gram,
        "cdist, exp, mm, compiled": _compile(cdist_gram),
        "addmm, exp, mm, compiled": _compile(addmm_gram),
        "KeOps": keops_gram if _installed("pykeops") else Missing("pykeops"),
        "GPyTorch": _gpytorch_gram(device) if _installed("gpytorch") else Missing("gpytorch"),
    }


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def keops_gram(x, z, w, lengthscale):
    from pykeops.torch import LazyTensor

    x, z = LazyTensor((x / lengthscale)[:, None, :]), LazyTensor((z / lengthscale)[None, :, :])
    return (-0.5 * ((x - z) ** 2).sum(-1)).exp() @ w


def _gpytorch_gram(device: str) -> Callable:
    from gpytorch.kernels import RBFKernel

    kernel = RBFKernel().to(device).requires_grad_(False)

    def gram(x, z, w, lengthscale):
        kernel.lengthscale = lengthscale
        return kernel(x, z) @ w

    return gram
