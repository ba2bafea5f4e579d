"""How fast batches come out of an image store: the loader of ``flowops.api.loading`` against
plain threads and grain, from files in the page cache and while the consumer computes."""

import argparse
import importlib.util
import math
import os
import queue
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from flowops.api.data import Images
from flowops.api.loading import batches, sample_indices
from flowops.api.prepare import PrepareConfig, prepare
from flowops.api.store import ImageStore, NpyFile

SEED = 0
SHARD_IMAGES = 16384
AHEAD = 2  # batches a worker reads ahead, in all rows

Loader = Callable[[ImageStore, int, int], Iterator]


def synthetic_store(folder: Path, images: int, img_size: int) -> ImageStore:
    """A store of noise."""
    generator = np.random.default_rng(SEED)
    source = folder / "source"
    source.mkdir()
    for shard, first in enumerate(range(0, images, SHARD_IMAGES)):
        n = min(SHARD_IMAGES, images - first)
        data = generator.integers(0, 256, (n, 3 * img_size**2), dtype=np.uint8)
        np.savez(source / f"batch_{shard:04d}.npz", data=data, labels=np.ones(n, np.int64))
    prepare(str(source), folder / "store", PrepareConfig(img_size=img_size))
    for path in source.iterdir():
        path.unlink()
    return ImageStore(folder / "store")


def with_batches(store: ImageStore, batch_size: int, workers: int) -> Iterator[Images]:
    """The loader itself; without workers it reads when asked."""
    return batches(
        store, seed=SEED, batch_size=batch_size, first_step=0, steps=2**40, workers=workers
    )


def with_threads(store: ImageStore, batch_size: int, workers: int) -> Iterator[Images]:
    """Threads that take turns, each with a bounded queue."""
    queues = [queue.Queue(AHEAD) for _ in range(workers)]
    stop = threading.Event()

    def read(worker: int) -> None:
        for step in count(worker, workers):
            images = store[sample_indices(len(store), SEED, step * batch_size, batch_size)]
            while not stop.is_set():
                try:
                    queues[worker].put(images, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set():
                return

    threads = [threading.Thread(target=read, args=(k,), daemon=True) for k in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for step in count():
            yield queues[step % workers].get()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class _Steps(torch.utils.data.Dataset):
    """A store seen as an array of batches, which is what grain and a plain DataLoader read."""

    def __init__(self, store: ImageStore, batch_size: int):
        self.store, self.batch_size = store, batch_size

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        index = sample_indices(len(self.store), SEED, step * self.batch_size, self.batch_size)
        images = self.store[index]
        return {"pixels": images.pixels.numpy(), "labels": images.labels.numpy()}


def with_plain_loader(store: ImageStore, batch_size: int, workers: int) -> Iterator[Images]:
    """torch's DataLoader as it comes: workers hand every tensor over."""
    loader = torch.utils.data.DataLoader(
        _Steps(store, batch_size),
        batch_size=None,
        sampler=count(),
        num_workers=workers,
        prefetch_factor=AHEAD,
        multiprocessing_context="forkserver",
        generator=torch.Generator(),
    )
    for batch in loader:
        yield Images(batch["pixels"], batch["labels"])


def with_grain(store: ImageStore, batch_size: int, workers: int) -> Iterator[Images]:
    """grain; without workers its threads read ahead."""
    import grain

    threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    data = grain.MapDataset.source(_Steps(store, batch_size)).to_iter_dataset(threads)
    if workers:
        data = data.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
        )
    iterator = iter(data)
    try:
        for batch in iterator:
            yield Images(torch.from_numpy(batch["pixels"]), torch.from_numpy(batch["labels"]))
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


ROWS: dict[str, tuple[Loader, int]] = {
    "in turn": (with_batches, 0),
    "1 worker": (with_batches, 1),
    "2 workers": (with_batches, 2),
    "plain DataLoader, 1 worker": (with_plain_loader, 1),
    "plain DataLoader, 2 workers": (with_plain_loader, 2),
    "1 thread": (with_threads, 1),
    "2 threads": (with_threads, 2),
    "grain, 1 thread": (with_grain, 0),
    "grain, 1 worker": (with_grain, 1),
    "grain, 2 workers": (with_grain, 2),
}


@dataclass(frozen=True)
class Round:
    """What one turn of a loader found."""

    images_per_second: float
    cpu: float
    """Seconds of all processes, for a batch."""
    wait: float
    """Seconds for a batch, while the consumer computes in between."""


def measure(iterator: Iterator, batch_size: int, seconds: float, compute: float) -> Round:
    """Asks for batches for so many seconds; then, for as long, for a batch after every ``compute``
    seconds of computing that hold Python's lock, as launching kernels does."""
    before, batches, started = cpu_seconds(), 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        next(iterator)
        batches += 1
    took, cpu = time.perf_counter() - started, cpu_seconds() - before
    waits, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        resume = time.perf_counter() + compute
        while time.perf_counter() < resume:
            pass
        asked = time.perf_counter()
        next(iterator)
        waits.append(time.perf_counter() - asked)
    return Round(batch_size * batches / took, cpu / batches, statistics.median(waits))


def cpu_seconds(pid: int | None = None) -> float:
    """Of this process, its threads and all processes below it; not a number where that can't be
    told. On a busy machine it says more than the time that passes."""
    total = 0.0
    try:
        for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0]) / 1e9
            for child in (task / "children").read_text().split():
                total += cpu_seconds(int(child))
    except OSError:
        return math.nan
    return total


def main(argv: list[str] | None = None) -> int:
    """Prints the table; rows take turns, and what is printed are medians over the rounds."""
    parser = argparse.ArgumentParser(prog="flowops bench loading", description=__doc__)
    parser.add_argument("--store", type=Path, help="an image store; by default one of noise")
    parser.add_argument("--images", type=int, default=200_000, help="of the store of noise")
    parser.add_argument("--img-size", type=int, default=64, help="of the store of noise")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--compute", type=float, default=10.0, help="ms a batch, second column")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row and round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.store:
            store = ImageStore(args.store)
        else:
            store = synthetic_store(Path(folder), args.images, args.img_size)
        print_table(store, args)
    return 0


def print_table(store: ImageStore, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    for shard in store.shards:  # into the page cache
        deque(NpyFile.open(store.path / shard["pixels"]["file"]).chunks(), maxlen=0)
    usable = {name: row for name, row in ROWS.items() if _usable(row[0])}
    found = {name: [] for name in usable}
    with ExitStack() as stack:
        # All are open at once; those that do not have their turn are idle, their queues full.
        iterators = {
            name: stack.enter_context(closing(loader(store, args.batch_size, workers)))
            for name, (loader, workers) in usable.items()
        }
        for _ in range(args.rounds):
            for name, rounds in found.items():
                deque(islice(iterators[name], 2 * AHEAD * max(usable[name][1], 1)), maxlen=0)
                rounds.append(
                    measure(iterators[name], args.batch_size, args.seconds, args.compute / 1e3)
                )
    table = Table(
        title=f"{len(store):,} images {store.channels}x{store.img_size}x{store.img_size}, "
        f"batches of {args.batch_size}"
    )
    table.add_column("loader")
    for heading in ("images/s", "CPU ms a batch", f"ms of wait after {args.compute:g} ms"):
        table.add_column(heading, justify="right")
    for name in ROWS:
        if name not in found:
            table.add_row(name, "not installed", "", "")
            continue
        speed, cpu, wait = (
            statistics.median(getattr(r, field.name) for r in found[name])
            for field in fields(Round)
        )
        table.add_row(name, f"{speed:,.0f}", f"{1e3 * cpu:.1f}", f"{1e3 * wait:.2f}")
    Console().print(table)


def _usable(loader: Loader) -> bool:
    return loader is not with_grain or importlib.util.find_spec("grain") is not None


if __name__ == "__main__":
    main()
