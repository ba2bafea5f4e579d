"""Batches in an order that depends on the seed alone, cut among the ranks of a run.

Image number ``s`` of a run is ``epoch_order(n, seed, s // n)[s % n]``: every image once an epoch,
batches may span two. Which images a step takes does not depend on how many ranks there are, nor on
where the run was resumed; there is nothing to save but the number of the step.
"""

import functools
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flowops import noise_words

from .data import Images


class ImageSource(Protocol):
    """``Images``, ``ImageStore``, ``LatentStore``, or anything like them. Worker processes need one
    that can be pickled."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Images: ...


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of ``n`` images in an epoch: they are sorted by 64 bits of the noise contract, two
    words drawn with rng = (seed, 4 epoch + 3).

    Args:
        n: number of images, positive.
        seed: of the run.
        epoch: from 0.

    Returns:
        A permutation, int64 ``[n]``. It is kept for the next call: not to be written to.

    Raises:
        ValueError: naming the argument that is off.
    """
    if n < 1 or epoch < 0:
        raise ValueError(f"expected n of at least 1 and epoch of at least 0, got {n} and {epoch}")
    words = noise_words((n, 2), rng=torch.tensor([seed, 4 * epoch + 3]))
    return torch.sort(words[:, 0] | (words[:, 1] << 32), stable=True).indices


def sample_indices(n: int, seed: int, first: int, count: int) -> Tensor:
    """Images number ``first`` to ``first + count`` of the endless stream of shuffled epochs.

    Args:
        n: number of images, positive.
        seed: of the run.
        first: number of the first one, from 0.
        count: how many.

    Returns:
        int64 ``[count]``.

    Raises:
        ValueError: naming the argument that is off.
    """
    if n < 1 or first < 0 or count < 0:
        raise ValueError(
            f"expected n of at least 1, first and count of at least 0, got {n}, {first}, {count}"
        )
    runs, last = [], first + count
    while first < last:
        epoch, start = divmod(first, n)
        run = epoch_order(n, seed, epoch)[start : start + last - first]
        runs.append(run)
        first += len(run)
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)


def batches(
    data: ImageSource,
    *,
    seed: int,
    batch_size: int,
    first_step: int,
    steps: int,
    rank: int = 0,
    world_size: int = 1,
    parts: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Images]:
    """The images of one rank: ``parts`` micro-batches for each step of ``first_step`` to ``steps``.

    The ``batch_size`` images of a step are cut in ``parts`` parts, each part in ``world_size`` runs
    of equal length, one a rank.

    Args:
        data: what to take the images from.
        seed: of the order.
        batch_size: images a step, over all ranks and parts.
        first_step: the step to go on with.
        steps: the step to stop before.
        rank: from 0 to ``world_size`` - 1.
        world_size: number of ranks.
        parts: micro-batches a step.
        workers: processes that read ahead, two micro-batches each; with 0 nothing is read ahead.
        pin: page-lock the batches, for copies to a GPU that do not wait. Without CUDA: no effect.

    Returns:
        An iterator of ``Images``; closing it ends the workers.

    Raises:
        ValueError: naming the argument that is off, at the call.
        RuntimeError: while iterating, naming a worker that died.
        OSError, ValueError: while iterating, those of ``data``.
    """
    shares = {"world_size": world_size, "parts": parts, "batch_size": batch_size}
    for name, value in shares.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if batch_size % (world_size * parts):
        raise ValueError(
            f"batch_size: expected a multiple of {world_size * parts} ({world_size} ranks, "
            f"{parts} parts), got {batch_size}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected from 0 to {world_size - 1}, got {rank}")
    if not 0 <= first_step <= steps:
        raise ValueError(f"first_step: expected from 0 to {steps}, got {first_step}")
    if workers < 0:
        raise ValueError(f"workers: expected at least 0, got {workers}")
    if not len(data):
        raise ValueError("data: expected at least one image")

    def indices() -> Iterator[np.ndarray]:
        run = batch_size // (world_size * parts)
        for step in range(first_step, steps):
            chosen = sample_indices(len(data), seed, step * batch_size, batch_size).numpy()
            # A copy: a slice would bring the whole step along to the worker.
            yield from chosen.reshape(parts, world_size, run)[:, rank].copy()

    pin = pin and torch.cuda.is_available()
    read = _in_workers if workers else _in_turn
    return read(data, indices(), workers, pin)


def _in_turn(
    data: ImageSource, indices: Iterator[np.ndarray], workers: int, pin: bool
) -> Iterator[Images]:
    for index in indices:
        chosen = data[torch.from_numpy(index)]
        if pin:
            labels = None if chosen.labels is None else chosen.labels.pin_memory()
            chosen = Images(chosen.pixels.pin_memory(), labels, chosen.class_names)
        yield chosen


def _in_workers(
    data: ImageSource, indices: Iterator[np.ndarray], workers: int, pin: bool
) -> Iterator[Images]:
    first = next(indices, None)
    if first is None:
        return
    ahead = 2 * workers
    # While one batch is copied out, ``ahead`` others are being written.
    slots = _Slots(data, ahead + 1, len(first))
    # The parent may have threads and a CUDA context, neither of which survives a fork. The server
    # imports once what all workers need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader = torch.utils.data.DataLoader(
        slots,
        batch_size=None,
        sampler=zip(itertools.cycle(range(ahead + 1)), itertools.chain([first], indices)),
        num_workers=workers,
        prefetch_factor=ahead // workers,
        worker_init_fn=_quiet_worker,
        multiprocessing_context=context,
        generator=torch.Generator(),  # else every iterator draws from the global one
    )
    iterator = iter(loader)
    try:
        for written in iterator:
            if isinstance(written, Exception):
                raise written
            yield slots.take(written, pin)
    finally:
        del iterator  # which ends the workers


class _Slots(torch.utils.data.Dataset):
    """Shared memory for a few batches, which workers write in turn.

    Tensors that a worker returns are memory that is mapped and handed over anew for every batch,
    which takes longer than to read it.
    """

    def __init__(self, data: ImageSource, count: int, batch_size: int):
        self.data = data
        one = data[torch.zeros(1, dtype=torch.int64)]
        shape = (count, batch_size, *one.pixels.shape[1:])
        self.pixels = torch.empty(shape, dtype=one.pixels.dtype).share_memory_()
        self.labels = None
        if one.labels is not None:
            self.labels = torch.empty((count, batch_size), dtype=torch.int64).share_memory_()

    def __getitem__(self, task: tuple[int, np.ndarray]) -> int | Exception:
        """What a worker does. An error is handed over as it is, since the loader would wrap it in
        a traceback."""
        slot, index = task
        try:
            chosen = self.data[torch.from_numpy(index)]
        except (OSError, ValueError, TypeError, IndexError) as error:
            return error
        self.pixels[slot] = chosen.pixels
        if self.labels is not None:
            self.labels[slot] = chosen.labels
        return slot

    def take(self, slot: int, pin: bool) -> Images:
        """A copy of a batch, for the slot will be written again."""
        copy = Tensor.pin_memory if pin else _copy
        labels = None if self.labels is None else copy(self.labels[slot])
        return Images(copy(self.pixels[slot]), labels, tuple(self.data.class_names))


def _copy(tensor: Tensor) -> Tensor:
    """``clone`` in one thread: several wait for each other where workers keep the cores busy."""
    return torch.from_numpy(tensor.numpy().copy())


def _quiet_worker(worker: int) -> None:
    """Leaves signals to the parent: those that a terminal or a scheduler sends to all processes
    must not end workers with an error while the parent saves a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
