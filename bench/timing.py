"""How a number is made: gate first, then interleaved runs, medians and ratios.

See docs/performance-notes.md for the rules.
"""

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import flowops


@dataclass(frozen=True)
class Timing:
    """Seconds a call: 20th, 50th and 80th percentile."""

    p20: float
    median: float
    p80: float


def interleave(
    calls: dict[str, Callable[[], object]], seconds: float = 3.0, warmup: int = 2
) -> dict[str, Timing]:
    """Times the calls in turns, so that all see the same disturbances, for about ``seconds``."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(spent.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return {name: _percentiles(values) for name, values in spent.items()}


def _percentiles(values: list[float]) -> Timing:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(*quantiles.tolist())


def gate(
    name: str,
    actual: Tensor,
    baseline: Tensor,
    golden: Tensor,
    dtype: torch.dtype,
    factor: float = 2,
) -> float:
    """Raises unless ``actual`` is as good as the baseline by the tolerance rule of the tests, with
    the fp64 result as golden; returns the error relative to golden's largest value.

    ``factor`` is the rule's 2 for one op. A whole model, above all a sampler, amplifies rounding by
    what its weights make of it, and two right programs differ by more than that.
    """
    golden = golden.double()
    scale = golden.abs().max().item()
    error = (actual.double() - golden).abs().max().item()
    allowed = factor * (baseline.double() - golden).abs().max().item()
    allowed += 2 * torch.finfo(dtype).eps * scale
    if not error <= allowed:
        raise AssertionError(f"{name}: error {error:.2e}, allowed {allowed:.2e}: not timed")
    return error / scale if scale else error


def environment() -> dict[str, object]:
    """What a reader needs to repeat a number."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flowops": flowops.__version__,
        "isa": flowops.dispatch.backend_state("cpu")[1],
        "git": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines())
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = f"family {fields['cpu family']} model {fields['model']}"
        return f"{fields['model name']} ({model})"
    except (OSError, KeyError, ValueError):
        return platform.processor() or platform.machine()


def _git(*args: str) -> str:
    try:
        result = subprocess.run(["git", *args], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()
