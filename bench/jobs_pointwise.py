"""The affine step, noise and padding, and whether our threads and torch's get along."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import flowops

from .ceilings import Work
from .job import DTYPES, OURS, Job, OpJob, Spec, compiled, on_gpu


def eager_affine(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference program has it: shift by concatenation, then the affine step."""
    params = torch.cat([torch.zeros_like(params[:, :1]), params[:, :-1]], dim=1)
    a, b = params.chunk(2, dim=-1)
    return (x - b) * torch.exp(-a), -a.sum(dim=(1, 2))


# --- affine --------------------------------------------------------------------------------------


def affine_specs(device: str) -> Iterator[Spec]:
    if device == "cpu":
        cases = [(64, 49, 16), (16, 1024, 12), (32, 256, 48), (64, 1024, 48)]
        dtypes = ["fp32"]
    else:
        cases = [(256, 1024, 12), (128, 256, 48), (16, 1024, 12), (256, 1024, 48)]
        dtypes = ["fp32", "bf16"]
    for B, T, C in cases:
        for dtype in dtypes:
            build = partial(affine_job, device, B, T, C, dtype)
            yield Spec("affine", "forward + backward", f"{B}x{T}x{C}", dtype, build)


def affine_job(device: str, B: int, T: int, C: int, dtype: str) -> Job:
    """x stays in fp32 and params come in the network's type, as in training."""
    x = torch.randn(B, T, C, device=device)
    params = (0.3 * torch.randn(B, T, 2 * C, device=device)).to(DTYPES[dtype])
    n, stored = B * T * C, DTYPES[dtype].itemsize
    # Forward reads x and params and writes z; backward reads those and grad_z again, and writes
    # the gradients of both. exp(-a) once in each pass.
    work = Work(
        bytes=n * (2 * 4 + 2 * stored) + n * (3 * 4 + 4 * stored) + 8 * B,
        flops=10 * n,
        exps=2 * n,
    )
    grads = torch.randn(B, T, C, device=device), torch.randn(B, device=device)

    def eager(x, params):
        z, logdet = eager_affine(x, params)
        return z, logdet.float()

    return OpJob(
        work,
        {**on_gpu(device, flowops.affine_update), "eager": eager, "torch.compile": compiled(eager)},
        (x, params),
        truth=eager_affine,
        dtype=DTYPES[dtype],
        grads=grads,
    )


# --- noise and padding ---------------------------------------------------------------------------


def padding_specs(device: str) -> Iterator[Spec]:
    N = 65536 if device == "cpu" else 1 << 20
    for D, pad in ((63, 2), (8, 1)):
        for scale, job in ((0.01, "noise on data and padding"), (0.0, "noise on padding")):
            build = partial(padding_job, device, N, D, pad, scale)
            yield Spec("padding", job, f"{N}x{D}+{pad}", "fp32", build)


def padding_job(device: str, N: int, D: int, pad: int, scale: float) -> Job:
    rng = torch.tensor([1, 0], device=device)

    def eager(x):
        data = x + scale * torch.randn_like(x) if scale else x
        return torch.cat([data, 2.0 * torch.randn(N, pad, device=device)], dim=1)

    ours = partial(flowops.pad_noise, pad=pad, data_scale=scale, rng=rng)
    plain = partial(ours, backend="reference")
    return OpJob(
        Work(bytes=4 * N * (2 * D + pad)),  # the noise is computed, not read
        {**on_gpu(device, ours), "eager": eager, "torch.compile": compiled(eager)},
        (torch.randn(N, D, device=device),),
        truth=plain,
        plain=plain,
        random=frozenset({"eager", "torch.compile"}),
    )


def noise_specs(device: str) -> Iterator[Spec]:
    N, W = (65536, 64) if device == "cpu" else (1 << 20, 64)
    yield Spec("noise", "normal", f"{N}x{W}", "fp32", partial(noise_job, device, N, W))


def noise_job(device: str, N: int, W: int) -> Job:
    """The state of the generator is the input; the truth is the same words through fp64."""
    rng = torch.tensor([1, 0], device=device)

    def ours(_, backend="auto"):
        return flowops.noise_normal((N, W), rng=rng, backend=backend)

    return OpJob(
        Work(bytes=4 * N * W),
        {**on_gpu(device, ours), "torch.randn": lambda _: torch.randn(N, W, device=device)},
        (torch.zeros(1, device=device),),
        truth=lambda _: ours(_, "reference").double(),
        plain=lambda _: ours(_, "reference"),
        random=frozenset({"torch.randn"}),
    )


# --- threads -------------------------------------------------------------------------------------


class ThreadsJob(Job):
    """A loop that alternates a torch product with an affine step, against the same calls grouped:
    equal times mean that our threads and torch's do not fight; what both lose is the caches'."""

    work = Work()
    inputs = ()

    def __init__(self, step: Callable[[], object], repeats: int = 20):
        a = torch.randn(256, 256)

        def product():
            torch.mm(a, a)

        self.providers = {
            OURS: lambda: [call() for _ in range(repeats) for call in (product, step)],
            "one after the other": lambda: [
                call() for call in (product, step) for _ in range(repeats)
            ],
        }

    def call(self, name, inputs):
        return self.providers[name]()

    def check(self, name):
        return None  # the affine jobs gate what runs here


def threads_specs(device: str) -> Iterator[Spec]:
    if device != "cpu":
        return

    def build(function):
        x, params = torch.randn(16, 64, 48), 0.3 * torch.randn(16, 64, 96)
        return ThreadsJob(lambda: function(x, params))

    for name, function in (("affine_update", flowops.affine_update), ("eager", eager_affine)):
        job = f"mm and {name} in turns, 20x"
        yield Spec("threads", job, "256x256; 16x64x48", "fp32", partial(build, function))
