"""Makes an image store (``store.py``) of a data set, in processes that each make whole shards.

A source is cut into shards before any work is handed out, so the store is the same to the byte
whatever the number of processes. A shard is there when its ``.json`` is; the store is there when
``index.json`` is. Whatever ends the work in between, the next run goes on from the shards.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint import write_whole
from .prepare_readers import Part, Skipped
from .prepare_sources import Source, find_source
from .prepare_workers import run_in_processes
from .store import FORMAT, INDEX, VERSION, check_size

_HEADER = 128  # bytes of .npy header, with room for any count
_MOST_CLASSES = 2**16
_REPORT_EVERY = 32

#: called with the number of images made since the last call
OnImages = Callable[[int], None]


@dataclass(frozen=True)
class PrepareConfig:
    """What a store is made of."""

    img_size: int
    """Side of the images: the centre square is resized to it."""
    channels: int = 3
    """3 for RGB, 1 for grey."""
    shard_images: int = 16384
    """Images a shard, for a folder of images; other files become a shard each."""
    classes: int | None = None
    """Number of classes, where the source doesn't name them; by default the largest label + 1."""
    image_column: str = "image"
    """Of parquet files."""
    label_column: str | None = None
    """Of parquet files; by default `label`, if there is one."""

    def __post_init__(self):
        for name in ("img_size", "shard_images", "classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.classes is not None and self.classes > _MOST_CLASSES:
            raise ValueError(f"classes: expected at most {_MOST_CLASSES}, got {self.classes}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), got {self.channels}")


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` did: ``kept`` of the shards were there before."""

    images: int
    shards: int
    kept: int
    skipped: int
    classes: int


class PrepareInterrupted(KeyboardInterrupt):
    """Ctrl-C, with the shards that are done kept."""


@dataclass(frozen=True)
class Job:
    """One shard to make: what a worker process is sent."""

    out: Path
    number: int
    part: Part
    config: PrepareConfig
    labelled: bool
    classes: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d} ({self.part.name})"

    def __call__(self, on_images: OnImages) -> None:
        """Writes pixels, labels and, last, what is known of the shard."""
        record = {"images": 0, "pixels": None, "labels": None, "source": self.part.name}
        skipped, labels = [], []
        with _PixelFile(self._path("images", "npy"), self.config) as pixels:
            for item in self.part.items():
                if isinstance(item, Skipped):
                    skipped.append(dataclasses.asdict(item))
                    continue
                try:
                    self._check_label(item.label)
                    pixels.append(item.pixels(self.config.img_size, self.config.channels))
                except ValueError as error:
                    skipped.append(dataclasses.asdict(Skipped(item.name, str(error))))
                    continue
                labels.append(item.label)
                if len(labels) % _REPORT_EVERY == 0:
                    on_images(_REPORT_EVERY)
            if labels:
                record["images"] = len(labels)
                record["pixels"] = pixels.finish()
                if self.labelled:
                    record["labels"] = self._write_labels(np.array(labels, np.int32))
                    record["largest_label"] = max(labels)
        record["skipped"] = skipped
        write_whole(self._path("shard", "json"), _json(record))
        on_images(len(labels) % _REPORT_EVERY)

    def kept(self) -> dict | None:
        """The record of a shard that is there, if its files are too."""
        try:
            record = json.loads(self._path("shard", "json").read_bytes())
            for part in (record["pixels"], record["labels"]):
                if part is not None:
                    check_size(self.out / part["file"], part["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record

    def _path(self, name: str, suffix: str) -> Path:
        return self.out / f"{name}-{self.number:05d}.{suffix}"

    def _check_label(self, label: int | None) -> None:
        if not self.labelled:
            return
        if label is None:
            raise ValueError("no label")
        classes = self.classes or _MOST_CLASSES
        if not 0 <= label < classes:
            raise ValueError(f"label {label}, expected from 0 to {classes - 1}")

    def _write_labels(self, labels: np.ndarray) -> dict:
        path = self._path("labels", "npy")
        data = _npy_header("<i4", labels.shape) + labels.astype("<i4").tobytes()
        write_whole(path, data)
        return {"file": path.name, "bytes": len(data), "crc32": zlib.crc32(data[_HEADER:])}


class _PixelFile:
    """A ``.npy`` file of images that are appended one by one, under its name once it is whole."""

    def __init__(self, path: Path, config: PrepareConfig):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.shape = (config.channels, config.img_size, config.img_size)
        self.count = self.checksum = 0

    def __enter__(self) -> "_PixelFile":
        with self._named_errors():
            self.file = open(self.temporary, "wb", buffering=2**20)
            self.file.write(bytes(_HEADER))
        return self

    def append(self, image: np.ndarray) -> None:
        data = image.tobytes()
        with self._named_errors():
            self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.count += 1

    def finish(self) -> dict:
        with self._named_errors():
            self.file.seek(0)
            self.file.write(_npy_header("|u1", (self.count, *self.shape)))
            self.file.flush()
            size = os.fstat(self.file.fileno()).st_size
            os.fsync(self.file.fileno())
            os.replace(self.temporary, self.path)
        return {"file": self.path.name, "bytes": size, "crc32": self.checksum}

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # what is buffered still, on a full disk
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"could not write {self.path}: {error.strerror}") from error


def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """Version 1.0 of the format, always as long, so that the count can be written last."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    length = _HEADER - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + f"{text:<{length - 1}}\n".encode()


def _json(value) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def prepare(
    source: str | Sequence[str],
    out: str | Path,
    config: PrepareConfig,
    *,
    workers: int = 0,
    max_skipped: float = 0.001,
    on_start: Callable[[Source, int], None] | None = None,
    on_images: OnImages = lambda images: None,
) -> Prepared:
    """Makes a store, or goes on with one.

    Args:
        source: a folder, or the names of files; see ``find_source``.
        out: the directory of the store.
        config: image size and what else the store is made of.
        workers: processes that make shards; with 0 they are made in this one.
        max_skipped: the largest share of images that may be skipped.
        on_start: called with the source and the number of images that are there already.
        on_images: called as images are made.

    Raises:
        FileNotFoundError, ValueError: naming what of the source is missing or broken, what of the
            options differs from those the store was begun with, or how many images were skipped.
        OSError: naming the file that could not be written.
        ChildProcessError: naming the shard whose worker died.
        PrepareInterrupted: after Ctrl-C.
    """
    if workers < 0 or not 0 <= max_skipped <= 1:
        raise ValueError(
            f"expected workers of at least 0 and max_skipped from 0 to 1, got {workers} and "
            f"{max_skipped}"
        )
    out = Path(os.path.abspath(out))
    names = [source] if isinstance(source, (str, Path)) else list(source)
    found = find_source(
        [str(name) for name in names],
        config.shard_images,
        config.image_column,
        config.label_column,
    )
    if out == found.root or found.root in out.parents:
        raise ValueError(f"out: {out} is inside of the source {found.root}")
    if config.classes and found.class_names and config.classes != len(found.class_names):
        raise ValueError(
            f"classes: the source names {len(found.class_names)}, got {config.classes}"
        )
    with _locked(out):
        _check_options(out, found, config)
        for path in out.glob(".*.tmp"):
            path.unlink()
        classes = len(found.class_names) or config.classes or 0
        jobs = [
            Job(out, number, part, config, found.labelled, classes)
            for number, part in enumerate(found.parts)
        ]
        records = [job.kept() for job in jobs]
        to_do = [job for job, record in zip(jobs, records, strict=True) if record is None]
        if on_start:
            on_start(found, sum(record["images"] for record in records if record))
        try:
            if workers:
                run_in_processes(to_do, workers, on_images)
            else:
                for job in to_do:
                    job(on_images)
        except KeyboardInterrupt:
            done = sum(job.kept() is not None for job in jobs)
            raise PrepareInterrupted(
                f"{done} of {len(jobs)} shards are done; the same command goes on from there"
            ) from None
        finally:
            for path in out.glob(".*.tmp"):  # of workers that were stopped
                path.unlink(missing_ok=True)
        return _finish(jobs, found, config, max_skipped, len(jobs) - len(to_do))


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process at a time writes a store."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: {out} is being written by another process") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _check_options(out: Path, source: Source, config: PrepareConfig) -> None:
    """Writes down what the store is made of, or compares it with what is written."""
    path = out / "prepare.json"
    ours = {
        "source": str(source.root),
        "kind": source.kind,
        **dataclasses.asdict(config),
        "listing": source.listing,
    }
    if not path.exists():
        if any(out.iterdir()):
            raise ValueError(f"out: {out} is not empty and not a store")
        write_whole(path, _json(ours))
        return
    try:
        theirs = json.loads(path.read_bytes())
        theirs = {name: theirs[name] for name in ours}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what a store was begun with: {error}") from error
    for name, value in ours.items():
        if theirs[name] != value:
            if name == "listing":
                raise ValueError(
                    f"source: the files of {source.root} changed since {out} was begun"
                )
            raise ValueError(
                f"{name}: {out} was begun with {theirs[name]}, this run has {value}; take another "
                f"directory for --out"
            )


def _finish(
    jobs: list[Job], source: Source, config: PrepareConfig, max_skipped: float, kept: int
) -> Prepared:
    """Checks how many images were skipped and writes the index."""
    out, records = jobs[0].out, [job.kept() for job in jobs]
    missing = [job.name for job, record in zip(jobs, records, strict=True) if record is None]
    if missing:
        raise OSError(f"{out}: {missing[0]} is gone")
    skips = [
        {"shard": number, **skip}
        for number, record in enumerate(records)
        for skip in record["skipped"]
    ]
    write_whole(out / "skipped.jsonl", "".join(json.dumps(s) + "\n" for s in skips).encode())
    images = sum(record["images"] for record in records)
    if not images and not skips:
        raise ValueError(f"source: {source.root} holds no images")
    skipped = sum(skip["images"] for skip in skips)
    if not images or skipped > max_skipped * (images + skipped):
        raise ValueError(
            f"{skipped} of {images + skipped} images were skipped, more than --max-skipped "
            f"{max_skipped:g} of them; {out / 'skipped.jsonl'} says which and why, first "
            f"{skips[0]['name']}: {skips[0]['reason']}"
        )
    names = source.class_names
    if source.labelled and not names:
        largest = max(record.get("largest_label", 0) for record in records)
        names = tuple(str(k) for k in range(config.classes or largest + 1))
    index = {
        "format": FORMAT,
        "version": VERSION,
        "img_size": config.img_size,
        "channels": config.channels,
        "images": images,
        "class_names": names,
        "skipped": skipped,
        "shards": [
            {key: record[key] for key in ("images", "pixels", "labels", "source")}
            | {"skipped": sum(skip["images"] for skip in record["skipped"])}
            for record in records
            if record["images"]
        ],
    }
    write_whole(out / INDEX, _json(index))
    return Prepared(images, len(jobs), kept, skipped, len(names))
