"""Finds out what a data set on disk is (a folder of images, tar shards, parquet files, ``.npz``
batches) and cuts it into parts, of which every one becomes a shard of the store."""

import glob
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .data import SUFFIXES
from .prepare_readers import Part, npz_parts, parquet_parts, tar_parts

KINDS = {"tar": (".tar", ".tar.gz", ".tgz"), "parquet": (".parquet",), "npz": (".npz",)}
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Source:
    """A data set found on disk: ``root`` is its folder, or the first of its files; ``listing`` a
    checksum of names and sizes."""

    kind: str
    root: Path
    parts: tuple[Part, ...]
    labelled: bool
    class_names: tuple[str, ...]
    listing: int


def find_source(
    names: Sequence[str],
    shard_images: int,
    image_column: str = "image",
    label_column: str | None = None,
) -> Source:
    """Finds out what a source is.

    Args:
        names: a folder; or files, globs and ranges as ``train-{0000..0146}.tar``.
        shard_images: images a part, for a folder of images.
        image_column: of parquet files.
        label_column: of parquet files; by default ``label``, if there is one.

    Raises:
        FileNotFoundError, ValueError: naming what is missing, unclear or broken.
    """
    if not names:
        raise ValueError("source: expected a folder, or files")
    if len(names) == 1 and Path(names[0]).is_dir():
        folder = Path(os.path.abspath(names[0]))
        kind, files = _look_into(folder)
        if kind == "folder":
            return _image_folder(folder, shard_images)
    else:
        files = _matches(names)
        kinds = {_kind(path): path for path in files}
        if len(kinds) > 1 or None in kinds:
            odd = kinds.get(None) or " and ".join(str(path) for path in kinds.values())
            raise ValueError(
                f"source: expected .tar, .parquet or .npz files of one kind, got {odd}"
            )
        kind = next(iter(kinds))
    common = os.path.commonpath([path.parent for path in files])
    paths = [(os.path.relpath(path, common), path) for path in files]
    listing = _crc([[name, path.stat().st_size] for name, path in paths])
    if kind == "parquet":
        found = parquet_parts(paths, image_column, label_column)
    else:
        found = npz_parts(paths) if kind == "npz" else tar_parts(paths)
    return Source(kind, files[0], *found, listing)


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for kind, endings in KINDS.items() if name.endswith(endings)), None)


def _crc(listing: list) -> int:
    return zlib.crc32(json.dumps(listing).encode())


def _matches(names: Sequence[str]) -> list[Path]:
    """Files that the names stand for, in order."""
    found = []
    for name in itertools.chain.from_iterable(map(_expand, names)):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not matches or not Path(matches[0]).exists():
            raise FileNotFoundError(f"source: no such file: {name}")
        if Path(matches[0]).is_dir():
            raise ValueError(f"source: expected one folder, or files; {matches[0]} is a folder")
        found += [Path(os.path.abspath(match)) for match in matches]
    return found


def _expand(name: str) -> Iterator[str]:
    """``a-{08..10}`` as a-08, a-09, a-10."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not found:
        yield name
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise ValueError(f"source: the range {found[0]} of {name} is empty")
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{name[: found.start()]}{number:0{len(first)}}{name[found.end() :]}")


def _look_into(folder: Path) -> tuple[str, list[Path]]:
    """Whether a folder holds images or other files, and those."""
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in visible if _kind(path)]
    if not files:
        return "folder", []
    others = [p for p in visible if p.is_dir() or p.suffix.lower() in SUFFIXES]
    mixed = [path for path in files if _kind(path) != _kind(files[0])] + others
    if mixed:
        raise ValueError(
            f"source: {folder} holds {files[0].name} and {mixed[0].name}: name the files wanted, "
            f"as '{folder}/*{files[0].suffix}'"
        )
    patterns = sorted({re.sub(r"\d+", "*", path.name) for path in files})
    if len(patterns) > 1:
        raise ValueError(
            f"source: {folder} holds files of several names ({', '.join(patterns)}): name those "
            f"wanted, as '{folder}/{patterns[0]}'"
        )
    return _kind(files[0]), files


# --- folders -------------------------------------------------------------------------------------


def _image_folder(folder: Path, shard_images: int) -> Source:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if classes and {name.lower() for name in classes} <= _SPLITS:
        raise ValueError(
            f"source: the folders in {folder} ({', '.join(classes)}) look like splits, not "
            f"classes: name one of them"
        )
    loose = _images_below(folder, "", deep=not classes)
    if classes and loose:
        raise ValueError(f"source: {folder} holds folders, and images as {loose[0]} beside them")
    files = [(name, 0) for name in loose]
    for label, name in enumerate(classes):
        files += [(path, label) for path in _images_below(folder, name)]
    if not files:
        raise ValueError(
            f"source: {folder} holds neither images ({', '.join(SUFFIXES)}) nor .tar, .parquet or "
            f".npz files"
        )
    parts = []
    for first in range(0, len(files), shard_images):
        chosen = tuple(files[first : first + shard_images])
        name = f"{chosen[0][0]} to {chosen[-1][0]}"
        parts.append(Part("folder", name, folder, len(chosen), chosen))
    labelled = len(classes) > 1
    names = tuple(classes) if labelled else ()
    return Source("folder", folder, tuple(parts), labelled, names, _crc(files))


def _images_below(folder: Path, name: str, deep: bool = True) -> list[str]:
    """Paths of images, relative to the folder."""
    found = []
    for at, folders, files in os.walk(folder / name):
        folders[:] = sorted(f for f in folders if f[0] != ".") if deep else []
        below = os.path.relpath(at, folder)
        found += [
            os.path.normpath(os.path.join(below, file))
            for file in files
            if file.lower().endswith(SUFFIXES) and file[0] != "."
        ]
    return sorted(found)
