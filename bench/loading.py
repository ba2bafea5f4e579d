"""How fast batches come out of an image store: the loader of ``flowops.api.loading`` against
plain threads and grain, from files in the page cache and while the consumer computes."""

import argparse
import importlib.util
import queue
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
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


class _Steps:
    """A store seen as an array of batches, which is what grain reads."""

    def __init__(self, store: ImageStore, batch_size: int):
        self.store, self.batch_size = store, batch_size

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        index = sample_indices(len(self.store), SEED, step * self.batch_size, self.batch_size)
        images = self.store[index]
        return {"pixels": images.pixels.numpy(), "labels": images.labels.numpy()}


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
    "DataLoader, 1 worker": (with_batches, 1),
    "DataLoader, 2 workers": (with_batches, 2),
    "1 thread": (with_threads, 1),
    "2 threads": (with_threads, 2),
    "grain, 1 thread": (with_grain, 0),
    "grain, 1 worker": (with_grain, 1),
    "grain, 2 workers": (with_grain, 2),
}


def measure(iterator: Iterator, batch_size: int, seconds: float, compute: float) -> float:
    """Images a second; with ``compute``, seconds that the consumer waits for a batch while it
    computes for so long in between, holding Python's lock as launching kernels does."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        next(iterator)
        times.append(time.perf_counter() - started)
        resume = time.perf_counter() + compute
        while time.perf_counter() < resume:
            pass
    if compute:
        return statistics.median(times)
    return batch_size * len(times) / sum(times)


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
    found = {name: ([], []) for name, (loader, _) in ROWS.items() if _usable(loader)}
    with ExitStack() as stack:
        # All are open at once, those that do not have their turn are idle with their queues full.
        iterators = {
            name: stack.enter_context(closing(loader(store, args.batch_size, workers)))
            for name, (loader, workers) in ROWS.items()
            if name in found
        }
        for _ in range(args.rounds):
            for name, (speeds, waits) in found.items():
                for compute, results in ((0, speeds), (args.compute / 1e3, waits)):
                    deque(islice(iterators[name], 2 * AHEAD * max(ROWS[name][1], 1)), maxlen=0)
                    results.append(measure(iterators[name], args.batch_size, args.seconds, compute))
    table = Table(
        title=f"{len(store):,} images {store.channels}x{store.img_size}x{store.img_size}, "
        f"batches of {args.batch_size}"
    )
    table.add_column("loader")
    table.add_column("images/s", justify="right")
    table.add_column("best round", justify="right")
    table.add_column(f"wait, ms, beside {args.compute:g} ms of Python", justify="right")
    for name in ROWS:
        if name in found:
            speeds, waits = found[name]
            speed, wait = statistics.median(speeds), 1e3 * statistics.median(waits)
            table.add_row(name, f"{speed:,.0f}", f"{max(speeds):,.0f}", f"{wait:.2f}")
        else:
            table.add_row(name, "not installed", "", "")
    Console().print(table)


def _usable(loader: Loader) -> bool:
    return loader is not with_grain or importlib.util.find_spec("grain") is not None


if __name__ == "__main__":
    main()
