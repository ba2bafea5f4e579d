"""How a number is made: the gate first, then interleaved runs and their percentiles.

See docs/benchmarks.md for the rules. Needs torch alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_REPLAY_SECONDS = 5e-4  # a replay shorter than this is mostly the events around it
_MOST_LAUNCHES = 256


class GateError(AssertionError):
    """A result that is not good enough to be timed."""


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
    for _ in _rounds(seconds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return {name: percentiles(values) for name, values in spent.items()}


def interleave_on_gpu(
    calls: dict[str, Callable[[], object]], seconds: float, warmup: int = 2
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """As ``interleave``: time between events on the stream, and time until the GPU is done."""
    device: dict[str, list[float]] = {name: [] for name in calls}
    whole: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            call()
    for _ in _rounds(seconds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start = time.perf_counter()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            whole[name].append(time.perf_counter() - start)
            device[name].append(begin.elapsed_time(end) / 1e3)
    return tuple({name: percentiles(v) for name, v in spent.items()} for spent in (device, whole))


def _rounds(seconds: float):
    """Yields until ``seconds`` are over: at least five times, unless that takes four times as
    long, and at least twice."""
    start, count = time.perf_counter(), 0
    while True:
        spent = time.perf_counter() - start
        if spent >= seconds and (count >= 5 or (count >= 2 and spent >= 4 * seconds)):
            return
        yield
        count += 1


def percentiles(values: list[float]) -> Timing:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(*quantiles.tolist())


# --- CUDA graphs ---------------------------------------------------------------------------------


def rotating_copies(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """As many copies of the inputs (themselves the first) as it takes for a walk over them to leave
    nothing of the first in the L2 cache."""
    size = sum(t.numel() * t.element_size() for t in inputs)
    cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size if inputs else 0
    count = min(_MOST_LAUNCHES, 1 + 2 * cache // max(size, 1)) if size else 1
    return [inputs, *(tuple(t.clone() for t in inputs) for _ in range(count - 1))]


def capture(
    call: Callable[[tuple[Tensor, ...]], object], copies: list[tuple[Tensor, ...]], estimate: float
) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of one call on each copy, in turns, and how many calls it holds.

    ``call`` must not wait for the GPU. It is warmed up on the stream it is captured on, so that
    workspaces and compiled code exist before.
    """
    walk = len(copies) * max(estimate, 1e-6)
    repeats = max(1, min(int(_REPLAY_SECONDS / walk) + 1, _MOST_LAUNCHES // len(copies)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            call(copies[i % len(copies)])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for inputs in copies:
                call(inputs)
    return graph, repeats * len(copies)


def interleave_graphs(
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], seconds: float
) -> dict[str, Timing]:
    """Device seconds a call, by replay in turns."""
    replays = {name: graph.replay for name, (graph, _) in graphs.items()}
    device, _ = interleave_on_gpu(replays, seconds)
    return {
        name: Timing(*(t / graphs[name][1] for t in (timing.p20, timing.median, timing.p80)))
        for name, timing in device.items()
    }


def peak_memory(call: Callable[[], object]) -> float:
    """Megabytes that ``call`` needs at once beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# --- gate ----------------------------------------------------------------------------------------


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
    if actual.shape != golden.shape:
        raise GateError(f"{name}: shape {list(actual.shape)}, expected {list(golden.shape)}")
    scale = golden.abs().max().item()
    error, plain = relative_error(actual, golden), relative_error(baseline, golden)
    check_error(name, error, plain, dtype, factor, scale)
    return error


def check_error(name, error, plain, dtype, factor: float = 2, scale: float = 1.0) -> None:
    """The tolerance rule on relative errors. A baseline far from golden would excuse anything, so
    it is a failure of its own."""
    if not plain <= 0.05:
        raise GateError(f"{name}: the baseline itself is off by {plain:.2e}: not timed")
    allowed = factor * plain + 2 * torch.finfo(dtype).eps
    if not error <= allowed:
        raise GateError(
            f"{name}: error {error * scale:.2e}, allowed {allowed * scale:.2e}: not timed"
        )


def relative_error(actual: Tensor, golden: Tensor) -> float:
    """Largest error over golden's largest value, or the error itself where golden is zero."""
    golden = golden.double()
    scale = golden.abs().max().item()
    error = (actual.double() - golden).abs().max().item()
    return error / scale if scale else error
