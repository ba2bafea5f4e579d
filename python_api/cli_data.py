"""The commands ``flowops data prepare``, ``verify`` and ``info``."""

import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

USAGE = """usage: flowops data COMMAND [options]

commands:
  prepare  decode and resize a data set once, into a store that training reads in any order
  verify   read a store and compare checksums
  info     sizes, classes and counts of a store

`flowops data COMMAND --help` lists the options.
"""


def data(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    commands = {"prepare": _prepare, "verify": _verify, "info": _info}
    if argv[0] not in commands:
        raise ValueError(f"data: expected one of {', '.join(commands)}, got {argv[0]!r}")
    return commands[argv[0]](argv[1:])


def _prepare(argv: list[str]) -> int:
    import tyro

    from .prepare import PrepareConfig, PrepareInterrupted

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Make an image store of a folder of images (its subfolders are the classes), of tar shards
        as of webdataset, of parquet files as of Hugging Face, or of the .npz batches of the
        downsampled ImageNet. Run again, it goes on where it was stopped."""

        source: tyro.conf.Positional[tuple[str, ...]]
        """A folder; or files, also as 'train-{0000..0146}.tar' or 'train-*.parquet'."""
        out: Path
        """Directory of the store."""
        config: Annotated[PrepareConfig, tyro.conf.arg(name="")]
        workers: int = _cores()
        """Processes; by default one a core."""
        max_skipped: float = 0.001
        """Largest share of broken images to put up with; they are listed in skipped.jsonl."""

    args = tyro.cli(Arguments, prog="flowops data prepare", args=argv)
    if args.workers < 1:
        raise ValueError(f"workers: expected at least 1, got {args.workers}")
    try:
        _run(args)
    except PrepareInterrupted as interrupt:
        print(f"\nflowops: interrupted: {interrupt}", file=sys.stderr)
        return 130
    return 0


def _run(args) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from .prepare import prepare

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), Remaining())
    started, made = time.perf_counter(), 0
    with Progress(*columns) as progress:
        task = progress.add_task("images", total=None)

        def on_start(source, images: int) -> None:
            counts = [part.images for part in source.parts]
            total = None if None in counts else sum(counts)
            progress.update(task, total=total, completed=images)

        def on_images(images: int) -> None:
            nonlocal made
            made += images
            speed = made / (time.perf_counter() - started)
            progress.update(task, advance=images, description=f"{speed:,.0f} images/s")

        result = prepare(
            args.source,
            args.out,
            args.config,
            workers=args.workers,
            max_skipped=args.max_skipped,
            on_start=on_start,
            on_images=on_images,
        )
        progress.update(task, total=result.images, completed=result.images)
    seconds = time.perf_counter() - started
    classes = f"{result.classes:,} classes" if result.classes else "no classes"
    print(f"{result.images:,} images, {classes}, {result.shards:,} shards ({result.kept:,} kept)")
    print(f"{made:,} made in {seconds:.1f} s, {made / seconds:,.0f} images/s")
    if result.skipped:
        print(f"{result.skipped:,} skipped, listed in {args.out / 'skipped.jsonl'}")
    print(args.out)


def _verify(argv: list[str]) -> int:
    import tyro
    from rich.progress import Progress

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Read a store and compare checksums; of latents, check that all values are finite. The
        exit status is 1 if a file is bad."""

        store: tyro.conf.Positional[Path]
        """A directory, or a .npy file of latents."""

    store = _open(tyro.cli(Arguments, prog="flowops data verify", args=argv).store)
    lock = threading.Lock()
    with Progress() as progress:
        task = progress.add_task("checking", total=store.total_bytes())

        def on_bytes(count: int) -> None:
            with lock:
                progress.advance(task, count)

        faults = store.verify(on_bytes)
    for fault in faults:
        print(f"flowops: {fault}", file=sys.stderr)
    if not faults:
        print(f"{len(store):,} images, {store.total_bytes():,} bytes: all well")
    return 1 if faults else 0


def _info(argv: list[str]) -> None:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Sizes, classes and counts of a store."""

        store: tyro.conf.Positional[Path]
        """A directory, or a .npy file of latents."""

    args = tyro.cli(Arguments, prog="flowops data info", args=argv)
    store = _open(args.store)
    size, classes = store.img_size, store.class_names
    named = f" ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})" if classes else ""
    lines = {
        "images": f"{len(store):,} of {store.channels} x {size} x {size}",
        "classes": f"{len(classes):,}{named}",
        "bytes": f"{store.total_bytes():,}",
        "crc32": f"{store.fingerprint()['crc32']:08x}",
    }
    if hasattr(store, "shards"):
        lines["shards"] = f"{len(store.shards):,}"
        lines["skipped"] = f"{store.skipped:,}"
    for name, value in lines.items():
        print(f"{name:8s} {value}")


def _cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(path: Path):
    from .store import ImageStore, LatentStore

    return LatentStore(path) if path.suffix == ".npy" else ImageStore(path)
