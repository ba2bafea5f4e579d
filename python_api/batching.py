"""As many images at a time as memory holds, and a bar that shows how far they are."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from .decode import Guidance, Solver

Drawn = TypeVar("Drawn")

#: The part of the free memory that keys and values may take.
_MEMORY_SHARE = 0.7


def in_batches(n: int, batch_size: int, draw: Callable[[int, int], Drawn]) -> Iterator[Drawn]:
    """Yields ``draw(first, last)`` over ``[0, n)``. Where memory does not hold a batch after all,
    goes on with half of it and warns."""
    first = 0
    while first < n:
        last = min(first + batch_size, n)
        try:
            drawn = draw(first, last)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if last - first == 1:
                raise
            batch_size = (last - first) // 2
            warnings.warn(
                f"memory does not hold {last - first} images at a time ({type(error).__name__}): "
                f"sampling {batch_size} at a time",
                stacklevel=2,
            )
            continue
        yield drawn
        first = last


class ProgressBar:
    """Images on stderr, in parts of their blocks; waits for every block."""

    def __init__(self, images: int, blocks: int):
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("sampling", total=images)
        self._images, self._blocks, self._finished, self._begun = images, blocks, 0, 0.0

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *error):
        self._progress.stop()

    def on_block(self, tokens: Tensor) -> None:
        if tokens.device.type == "cuda":
            torch.cuda.current_stream(tokens.device).synchronize()
        self._begun += len(tokens) / self._blocks
        self._show(self._finished + self._begun)

    def on_batch(self, images: Tensor) -> None:
        self._finished, self._begun = self._finished + len(images), 0.0
        self._show(self._finished)

    def _show(self, images: float) -> None:
        self._progress.update(self._task, completed=min(images, self._images))


def fitting_batch(
    blocks: Iterable[nn.Module], asked: int, guidance: Guidance, solver: Solver, device
) -> int:
    """How many images of ``asked`` fit into the free memory at a time; warns if not all."""
    free = free_memory(torch.device(device))
    if free is None:
        return asked
    most = max(
        1, int(free * _MEMORY_SHARE) // max(image_bytes(b, guidance, solver) for b in blocks)
    )
    if most < asked:
        warnings.warn(
            f"{asked} images at a time need more than the {free / 2**30:.1f} GiB of memory that "
            f"are free: sampling {most} at a time",
            stacklevel=3,
        )
    return min(asked, most)


def image_bytes(block: nn.Module, guidance: Guidance, solver: Solver) -> int:
    """Memory that one image takes while ``block`` is inverted: keys and values of all tokens, and
    what a sweep holds of a window."""
    T, W = block.num_patches, block.proj_in.out_features
    wide = max(block.proj_in.weight.element_size(), 4)
    hidden = block.attn_blocks[0].mlp.main[0].out_features
    window = 1 if solver.method == "exact" else min(solver.window or T, T)
    cache = 2 * len(block.attn_blocks) * W * (T + 15)
    sweep = window * (6 * W + hidden + block.proj_out.out_features)
    passes = 2 if guidance.active else 1
    return wide * (passes * (cache + sweep) + 4 * T * block.proj_in.in_features)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device``, or None where that can't be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    if device.type != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = _read_cgroup("memory.max").get("")
    if limit is None:
        return free
    # Pages of files count as used, but make room.
    used = _read_cgroup("memory.current").get("", 0)
    used -= _read_cgroup("memory.stat").get("inactive_file", 0)
    return min(free, max(limit - used, 0))


def _read_cgroup(name: str) -> dict[str, int]:
    """The numbers of a file of this process's control group by the word before them."""
    try:
        with open(f"/sys/fs/cgroup/{name}") as file:
            lines = [line.split() for line in file]
    except OSError:
        return {}
    return {" ".join(words[:-1]): int(words[-1]) for words in lines if words[-1].isdigit()}
