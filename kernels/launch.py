"""How a kernel is launched: tile sizes, warps and pipeline stages.

``TABLE`` holds them per kernel and GPU family; the rows of ``"default"`` serve every other GPU, and
sizes that a family has no row for. The first row whose limits hold for the sizes of the call is
taken. ``FLOWOPS_AUTOTUNE=1`` times all rows of the kernel that can run on the call's sizes, once
per kernel, family and sizes; without it nothing is ever timed, so that no first call stalls.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton

Result = TypeVar("Result")

logger = logging.getLogger("flowops")


@dataclass(frozen=True)
class Launch:
    """Tile sizes by name, warps a program and stages of the software pipeline."""

    tiles: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 2

    def __getitem__(self, name: str) -> int:
        return dict(self.tiles)[name]


def row(num_warps: int, num_stages: int = 2, *, limits: dict[str, int] | None = None, **tiles: int):
    """A row of ``TABLE``: upper limits on sizes of the call, and the launch that serves them."""
    return limits or {}, Launch(tuple(tiles.items()), num_warps, num_stages)


#: kernel -> family -> rows; filled by the kernels' modules.
TABLE: dict[str, dict[str, list[tuple[dict[str, int], Launch]]]] = {}


def family_of(device: torch.device) -> str:
    """``"sm80"``, ``"sm90"``, ``"sm100"``, an AMD architecture such as ``"gfx942"``, or ``"cpu"``
    under the interpreter."""
    if device.type != "cuda":
        return device.type
    return _family(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _family(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, _ = torch.cuda.get_device_capability(index)
    return f"sm{10 * major}"


@functools.cache
def _find(kernel: str, family: str, sizes: tuple[tuple[str, int], ...]) -> Launch | None:
    rows = TABLE[kernel]
    for limits, launch in [*rows.get(family, []), *rows["default"]]:
        if _holds(limits, sizes):
            return launch
    return None


def serves(kernel: str, device: torch.device, sizes: dict[str, int]) -> bool:
    """Whether ``TABLE`` has a row of ``kernel`` for these sizes on this device."""
    return _find(kernel, family_of(device), tuple(sizes.items())) is not None


def choose(kernel: str, family: str, sizes: tuple[tuple[str, int], ...]) -> Launch:
    """The launch of ``kernel`` for these sizes.

    Raises:
        LookupError: if no row serves them (``serves`` says so before).
    """
    found = _find(kernel, family, sizes)
    if found is None:
        raise LookupError(f"{kernel} has no launch for {dict(sizes)}")
    return found


def _holds(limits: dict[str, int], sizes: tuple[tuple[str, int], ...]) -> bool:
    return all(value <= limits.get(name, value) for name, value in sizes)


def start(
    function: triton.JITFunction,
    choice: Launch,
    programs: int,
    args: tuple,
    *,
    fuse: bool = True,
    **constants,
) -> None:
    """Runs ``programs`` programs of ``function`` on the device of ``args[0]``, a tensor.

    ``fuse`` says whether multiplications and additions may be fused, which changes the last bit.
    """
    index = args[0].device.index
    if index is not None and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            start(function, choice, programs, args, fuse=fuse, **constants)
        return
    function[(programs,)](
        *args,
        **constants,
        **dict(choice.tiles),
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
        enable_fp_fusion=fuse,
    )


def launch(
    kernel: str, device: torch.device, sizes: dict[str, int], attempt: Callable[[Launch], Result]
) -> Result:
    """``attempt(choice)`` with the launch for these sizes. ``attempt`` makes its outputs itself, so
    that trying several launches leaves no trace."""
    family, key = family_of(device), tuple(sizes.items())
    choice = choose(kernel, family, key)
    if device.type == "cuda" and os.environ.get("FLOWOPS_AUTOTUNE") == "1":
        choice = _tuned(kernel, family, key, choice, attempt)
    return attempt(choice)


_TUNED: dict[tuple, Launch] = {}


def _tuned(kernel: str, family: str, key: tuple, default: Launch, attempt: Callable) -> Launch:
    if (kernel, family, key) not in _TUNED and not torch.cuda.is_current_stream_capturing():
        rows = [row for rows in TABLE[kernel].values() for row in rows]
        times = {}
        for choice in dict.fromkeys([default, *(c for limits, c in rows if _holds(limits, key))]):
            try:
                times[choice] = triton.testing.do_bench(
                    functools.partial(attempt, choice), return_mode="median"
                )
            except (triton.OutOfResources, triton.CompilationError) as error:
                logger.info("flowops autotune: %s can't run %s: %s", kernel, choice, error)
        _TUNED[kernel, family, key] = min(times, key=times.get, default=default)
        logger.info(
            *("flowops autotune: %s on %s, %s: %s", kernel, family),
            *(dict(key), _TUNED[kernel, family, key]),
        )
    return _TUNED.get((kernel, family, key), default)
