"""A job, who can do it, and one measurement of it."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flowops import dispatch

from .ceilings import Ceilings, Work
from .timing import (
    GateError,
    capture,
    gate,
    interleave,
    interleave_graphs,
    interleave_on_gpu,
    peak_memory,
    relative_error,
    rotating_copies,
)

OURS = "flowops"
#: Our backends by name, beside what ``auto`` takes.
BY_NAME = {name: f"{OURS}, {name}" for name in ("triton", "cuda")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WRONG = 0.05  # a baseline further from fp64 than this computes something else


@dataclass(frozen=True)
class Missing:
    """Stands for a provider that can't run here, and says why."""

    reason: str


@dataclass
class Row:
    """One provider on one job. Times in microseconds; None where there is none."""

    op: str
    job: str
    shape: str
    dtype: str
    provider: str
    role: str  # "ours", "eager" (the plain program the gate measures against) or "other"
    status: str = "ok"
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    e2e_us: float | None = None
    first_s: float | None = None
    peak_mb: float | None = None
    error: float | None = None
    floor_us: float | None = None
    bound: str | None = None
    amount: float | None = None  # of what sets the floor: bytes, flops or exps
    elements: int | None = None  # of the op's first tensor
    first_dtype: str = ""  # its storage type
    time: str = ""
    git: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return (self.op, self.job, self.shape, self.dtype, self.provider)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def of_floor(self) -> float | None:
        return self.floor_us / self.p50_us if self.p50_us and self.floor_us else None


@dataclass(frozen=True)
class Spec:
    """A job that has not been built: its name, and how to make its tensors."""

    op: str
    job: str
    shape: str
    dtype: str
    build: Callable[[], "Job"]


class Job:
    """What ``measure`` needs. The first provider is ours, and the first that is not ours the plain
    baseline."""

    work: Work
    providers: dict[str, Callable | Missing]
    inputs: tuple[Tensor, ...]
    first: Tensor | None = None  # what dispatch sees the size of the job by
    rotates = False  # many launches on copies of the inputs, in a CUDA graph

    def call(self, name: str, inputs: tuple[Tensor, ...]) -> object:
        raise NotImplementedError

    def check(self, name: str) -> float | None:
        """The gate: raises GateError, or returns the relative error (None where the results are
        random and can't be compared)."""
        raise NotImplementedError

    def release(self) -> None:
        """Drops what only the gate needed."""


@dataclass
class OpJob(Job):
    """One op, forward or forward and backward.

    Args:
        providers: functions of the leaves.
        inputs: tensors that are copied to make the cache cold.
        truth: the fp64 result as a function of the leaves in fp64.
        grads: gradients of the outputs; none for the forward pass alone.
        leaves: views of the inputs that the functions take and that get gradients.
        plain: the baseline of the gate, where it is not the first provider that is not ours.
        random: providers whose results can't be compared.
    """

    work: Work
    providers: dict[str, Callable | Missing]
    inputs: tuple[Tensor, ...]
    truth: Callable
    dtype: torch.dtype = torch.float32
    grads: tuple[Tensor, ...] = ()
    leaves: Callable[..., tuple[Tensor, ...]] = lambda *inputs: inputs
    plain: Callable | None = None
    random: frozenset[str] = frozenset()
    rotates = True
    _expected: tuple | None = field(default=None, repr=False)

    @property
    def first(self) -> Tensor:
        return self.leaves(*self.inputs)[0]

    def call(self, name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self._results(self.providers[name], self.leaves(*inputs), self.grads)

    def _results(self, function, leaves, grads) -> tuple[Tensor, ...]:
        """Outputs and gradients. The leaves are made anew, on the stream that is current."""
        leaves = tuple(t.detach().requires_grad_(bool(grads)) for t in leaves)
        with torch.set_grad_enabled(bool(grads)):
            out = function(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        return (*outs, *torch.autograd.grad(outs, leaves, grads)) if grads else outs

    def check(self, name: str) -> float | None:
        if name in self.random:
            return None
        if self._expected is None:
            leaves = self.leaves(*self.inputs)
            doubles = tuple(t.double() for t in leaves)
            grads = tuple(g.double() for g in self.grads)
            golden = self._results(self.truth, doubles, grads)
            plain = self.plain or self.providers[plain_baseline(self.providers)]
            self._expected = (golden, self._results(plain, leaves, self.grads))
        golden, plain = self._expected
        actual = self.call(name, self.inputs)
        if not is_ours(name):
            return max(relative_error(a, g) for a, g in zip(actual, golden, strict=True))
        outputs = len(actual) - (len(self.leaves(*self.inputs)) if self.grads else 0)
        return max(
            gate(f"output {i}" if i < outputs else f"gradient {i - outputs}", *t, self.dtype)
            for i, t in enumerate(zip(actual, plain, golden, strict=True))
        )

    def release(self) -> None:
        self._expected = None


def is_ours(provider: str) -> bool:
    """Held to the gate, and named so in the tables: what ``auto`` takes, or one of ours by name."""
    return provider == OURS or provider in BY_NAME.values()


def on_gpu(device: str, function: Callable) -> dict[str, Callable | Missing]:
    """``function``, which takes ``backend``, by what ``auto`` takes, and on a GPU by each of our
    backends too."""
    providers: dict[str, Callable | Missing] = {OURS: function}
    return providers | ({} if device == "cpu" else by_name(lambda b: partial(function, backend=b)))


def by_name(make: Callable[[str], Callable]) -> dict[str, Callable | Missing]:
    """``make(backend)`` under the name of each of our backends."""
    states = {backend: dispatch.backend_state(backend) for backend in BY_NAME}
    return {
        BY_NAME[backend]: make(backend) if usable else Missing(state)
        for backend, (usable, state) in states.items()
    }


def compiled(function: Callable) -> Callable:
    """``torch.compile`` for one shape."""
    return torch.compile(function, dynamic=False)


def measure(spec: Spec, ceilings: Ceilings, seconds: float, device: str, only=()) -> list[Row]:
    """Gate and time every provider of a job; failures are rows. ``only`` names providers."""
    torch._dynamo.reset()  # else its limit of recompilations turns later jobs into eager ones
    torch.manual_seed(0)
    label = (spec.op, spec.job, spec.shape, spec.dtype)
    try:
        job = spec.build()
    except Exception as error:
        return [Row(*label, OURS, "ours", f"FAILED: {describe(error)}")]
    names = [name for name in job.providers if not only or name in only]
    rows = {name: Row(*label, name, _role(job, name)) for name in names}
    for name, row in rows.items():
        _admit(job, name, row)
    job.release()
    ready = [name for name, row in rows.items() if row.ok]
    if rows.get(OURS) and not rows[OURS].ok:
        for name in ready:
            rows[name].status = "not timed: the gate failed"
        ready = []
    for row in rows.values():
        bound = job.work.bound(ceilings)
        row.floor_us, row.bound = 1e6 * job.work.floor(ceilings), bound
        row.amount = getattr(job.work, bound)
        if job.first is not None:
            row.elements = job.first.numel()
            row.first_dtype = str(job.first.dtype).removeprefix("torch.")
    if ready:
        try:
            _time(job, {name: rows[name] for name in ready}, seconds, device)
        except Exception as error:  # out of memory, say: the run goes on
            for name in ready:
                rows[name].status = f"FAILED: {describe(error)}"
    del job
    _clear(device)
    return list(rows.values())


def _role(job: Job, name: str) -> str:
    return {OURS: "ours", plain_baseline(job.providers): "eager"}.get(name, "other")


def plain_baseline(providers: dict[str, object]) -> str:
    return next(name for name in providers if not is_ours(name))


def _admit(job: Job, name: str, row: Row) -> None:
    """First call and gate; what goes wrong becomes the row's status."""
    provider = job.providers[name]
    if isinstance(provider, Missing):
        row.status = f"missing: {provider.reason}"
        return
    ours = is_ours(name)
    try:
        start = time.perf_counter()
        job.call(name, job.inputs)
        _wait()
        row.first_s = time.perf_counter() - start
        row.error = job.check(name)
        if not ours and row.error is not None and not row.error <= WRONG:
            row.status = f"not timed: off by {row.error:.1e}"
    except GateError as error:
        row.status = f"FAILED: {error}"
    except Exception as error:
        row.status = f"{'FAILED' if ours else 'not available'}: {describe(error)}"


def _time(job: Job, rows: dict[str, Row], seconds: float, device: str) -> None:
    calls = {name: _bound(job, name) for name in rows}
    budget = seconds * len(rows)
    if device == "cpu":
        timings = end_to_end = interleave(calls, budget)
    else:
        timings, end_to_end = interleave_on_gpu(calls, budget)
        for name, call in calls.items():
            rows[name].peak_mb = peak_memory(call)
        if job.rotates:
            timings |= _cold(job, end_to_end, budget)
    for name, row in rows.items():
        t = timings[name]
        row.p20_us, row.p50_us, row.p80_us = (1e6 * s for s in (t.p20, t.median, t.p80))
        row.e2e_us = 1e6 * end_to_end[name].median


def _cold(job: Job, estimates: dict, seconds: float) -> dict:
    """Device times from graphs; a provider that can't be captured keeps its time between events."""
    copies, graphs = rotating_copies(job.inputs), {}
    for name, estimate in estimates.items():
        try:
            graphs[name] = capture(lambda inputs, n=name: job.call(n, inputs), copies, estimate.p20)
        except Exception as error:
            torch.cuda.synchronize()
            print(f"  {name}: no CUDA graph, timed by events: {describe(error)}")
    return interleave_graphs(graphs, seconds) if graphs else {}


def _bound(job: Job, name: str) -> Callable[[], object]:
    return lambda: job.call(name, job.inputs)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _clear(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def describe(error: Exception) -> str:
    """The first line of an error, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]
