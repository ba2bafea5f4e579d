"""The rates this machine reaches, measured by the run itself, and the floors that follow."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from .timing import interleave, interleave_on_gpu


@dataclass(frozen=True)
class Ceilings:
    """Per second: floating-point operations of a product, bytes read and written by a copy,
    evaluations of exp."""

    product_bf16: float
    product_fp32: float
    copy: float
    exp: float

    def asdict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """The least a job must do, whatever the program: bytes to and from memory, floating-point
    operations, exps; and the type its products may be computed in."""

    bytes: float = 0
    flops: float = 0
    exps: float = 0
    product: str = "fp32"

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which this machine can't do it."""
        return max(self._terms(ceilings).values())

    def bound(self, ceilings: Ceilings) -> str:
        """Which of "bytes", "flops" and "exps" sets the floor."""
        terms = self._terms(ceilings)
        return max(terms, key=terms.get)

    def _terms(self, ceilings: Ceilings) -> dict[str, float]:
        product = getattr(ceilings, f"product_{self.product}")
        return {
            "bytes": self.bytes / ceilings.copy,
            "flops": self.flops / product,
            "exps": self.exps / ceilings.exp,
        }


def measure(device: str, scale: float = 1.0, seconds: float = 0.5) -> Ceilings:
    """Measures the rates; ``scale`` shrinks the problems, for tests.

    The 20th percentile of the times counts: a ceiling is what the machine can do when left alone.
    """
    cuda = device == "cuda"
    side = max(64, int((8192 if cuda else 2048) * scale))
    copied = max(1 << 16, int((4 << 30 if cuda else 256 << 20) * scale))  # bytes read plus written

    def time(call: Callable[[], object]) -> float:
        if cuda:
            return interleave_on_gpu({"": call}, seconds)[0][""].p20
        return interleave({"": call}, seconds)[""].p20

    product = _product_rate(device, side, torch.float32, time)
    if cuda:
        # Three products in TF32 give the accuracy of one in fp32, and may be faster than it.
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            product = max(product, _product_rate(device, side, torch.float32, time) / 3)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return Ceilings(
        product_bf16=_product_rate(device, side, torch.bfloat16, time),
        product_fp32=product,
        copy=_copy_rate(device, copied, time),
        exp=_exp_rate(cuda, scale, time),
    )


def _product_rate(device: str, side: int, dtype: torch.dtype, time: Callable) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / time(lambda: torch.mm(a, b, out=out))


def _copy_rate(device: str, moved: int, time: Callable) -> float:
    source = torch.randn(moved // 8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time(lambda: target.copy_(source))


def _exp_rate(cuda: bool, scale: float, time: Callable) -> float:
    if cuda:
        from .exp_sweep import BLOCK, exp_sweep

        x = torch.rand(BLOCK * max(1, int(16384 * scale)), device="cuda")
        return exp_sweep(x) / time(lambda: exp_sweep(x))
    x = torch.randn(1 << 18)  # stays in the caches of two cores
    out = torch.empty_like(x)
    return x.numel() / time(lambda: torch.exp(x, out=out))
