"""What ``flowops data prepare`` reads, image by image: folders, tar shards, parquet files and
``.npz`` batches. What is broken is handed on as ``Skipped`` and does not end the reading."""

import gzip
import io
import json
import math
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .data import decode_image, fit_image
from .table_readers import import_arrow

_TAR_IMAGES = ("jpg", "jpeg", "png", "webp")
_ROWS = 128  # of parquet and npz at a time

#: parts, whether they have labels, and the names of the classes where the files tell
Found = tuple[tuple["Part", ...], bool, tuple[str, ...]]


@dataclass(frozen=True)
class Item:
    """One image: the bytes of an image file, or its pixels ``[3, S, S]``. Without a label: None."""

    name: str
    label: int | None
    content: bytes | np.ndarray

    def pixels(self, img_size: int, channels: int) -> np.ndarray:
        """uint8 ``[c, img_size, img_size]``.

        Raises:
            ValueError: if it can't be decoded.
        """
        if isinstance(self.content, bytes):
            return decode_image(io.BytesIO(self.content), img_size, channels).numpy()
        if self.content.shape == (channels, img_size, img_size):
            return self.content
        from PIL import Image

        image = Image.fromarray(np.ascontiguousarray(self.content.transpose(1, 2, 0)))
        return fit_image(image, img_size, channels).numpy()


@dataclass(frozen=True)
class Skipped:
    """What could not be taken, and why; ``images`` of them."""

    name: str
    reason: str
    images: int = 1


@dataclass(frozen=True)
class Part:
    """What becomes one shard.

    ``path`` is the file, or the folder of the ``files`` (with their labels); ``images`` how many
    there should be, where that is known.
    """

    kind: str
    name: str
    path: Path
    images: int | None
    files: tuple[tuple[str, int], ...] = ()
    columns: tuple[str, str | None] = ("", None)

    def items(self) -> Iterator[Item | Skipped]:
        """The images in the order of the source.

        Raises:
            OSError, ValueError: naming the file that can't be read at all.
        """
        return _ITEMS[self.kind](self)


def _folder_items(part: Part) -> Iterator[Item | Skipped]:
    for name, label in part.files:
        yield Item(name, label, (part.path / name).read_bytes())


# --- tar shards ----------------------------------------------------------------------------------


class _Member(tarfile.TarInfo):
    """Notes that the end of an archive is marked: else it was cut, which tarfile passes over."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            archive.end_is_marked = True
            raise


def tar_parts(paths: Iterable[tuple[str, Path]]) -> Found:
    parts = tuple(Part("tar", name, path, None) for name, path in paths)
    items = (item for part in parts for item in part.items() if isinstance(item, Item))
    first = next(items, None)
    if first is None:
        raise ValueError(f"source: {parts[0].path} holds no images ({', '.join(_TAR_IMAGES)})")
    return parts, first.label is not None, ()


def _tar_items(part: Part) -> Iterator[Item | Skipped]:
    """Files whose paths are the same up to the first dot of their names make a sample."""
    key, sample, fault = None, {}, None
    try:
        with open(part.path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if packed else file
            archive = tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member)  # noqa: SIM115
            while (member := archive.next()) is not None:
                archive.members.clear()  # or they pile up
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                if (folder, stem) != key:
                    yield from _sample(part, key, sample)
                    key, sample = (folder, stem), {}
                if suffix.lower() in (*_TAR_IMAGES, "cls", "json"):
                    sample[suffix.lower()] = archive.extractfile(member).read()
            if not getattr(archive, "end_is_marked", False):
                raise tarfile.ReadError("no mark of the end")
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        if key is None:
            raise ValueError(f"{part.path}: not a tar file ({error})") from error
        fault = error
    yield from _sample(part, key, sample)
    if fault:
        yield Skipped(part.name, f"ends early or is broken after {'/'.join(key)} ({fault})")


def _sample(part: Part, key, files: dict[str, bytes]) -> Iterator[Item | Skipped]:
    name = f"{part.name}/{'/'.join(filter(None, key))}" if key else ""
    image = next((files[suffix] for suffix in _TAR_IMAGES if suffix in files), None)
    if image is None:
        if "cls" in files:
            yield Skipped(name, "a label without an image")
        return
    try:
        yield Item(name, _tar_label(files), image)
    except (ValueError, TypeError, KeyError) as error:
        yield Skipped(name, f"its label is not an integer ({error})")


def _tar_label(files: dict[str, bytes]) -> int | None:
    if "cls" in files:
        return int(files["cls"].decode("ascii"))
    about = json.loads(files.get("json", b"{}"))
    label = about.get("label", about.get("cls")) if isinstance(about, dict) else None
    if label is not None and type(label) is not int:
        raise TypeError(f"got {label!r}")
    return label


# --- parquet -------------------------------------------------------------------------------------


def parquet_parts(
    paths: Iterable[tuple[str, Path]], image_column: str, label_column: str | None
) -> Found:
    pa = import_arrow()
    parts, names = [], None
    for name, path in paths:
        try:
            with pa.parquet.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path}: truncated, or not a parquet file ({error})") from error
        label = label_column or ("label" if "label" in schema.names else None)
        for column in (image_column, label):
            if column is not None and column not in schema.names:
                raise ValueError(f"{path}: no column {column!r}, it has {', '.join(schema.names)}")
        if not _holds_bytes(pa, schema.field(image_column).type):
            found = schema.field(image_column).type
            raise ValueError(f"{path}: column {image_column!r}: expected images, got {found}")
        if label is not None and not pa.types.is_integer(schema.field(label).type):
            found = schema.field(label).type
            raise ValueError(f"{path}: column {label!r}: expected integers, got {found}")
        found = _class_names(schema.metadata or {}, label), label is not None
        if names is not None and found != names:
            raise ValueError(f"{path}: its classes are not those of {parts[0].path}")
        names = found
        parts.append(Part("parquet", name, path, rows, columns=(image_column, label)))
    return tuple(parts), names[1], names[0]


def _holds_bytes(pa, kind) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(pa, kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...]:
    """As the library ``datasets`` keeps them in the schema; none if it does not."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(str(name) for name in names) if isinstance(names, list) else ()
    except (ValueError, KeyError, TypeError):
        return ()


def _parquet_items(part: Part) -> Iterator[Item | Skipped]:
    pa = import_arrow()
    image_column, label_column = part.columns
    row = 0
    try:
        with pa.parquet.ParquetFile(part.path) as file:
            columns = [column for column in part.columns if column is not None]
            for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
                labels = batch.column(label_column).to_pylist() if label_column else None
                for k, image in enumerate(batch.column(image_column)):
                    content = image.as_py()
                    content = content["bytes"] if isinstance(content, dict) else content
                    name = f"{part.name}, row {row}"
                    row += 1
                    if content is None:
                        yield Skipped(name, "no bytes of an image")
                    else:
                        yield Item(name, labels and labels[k], content)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's, not the file's
            raise
        yield Skipped(part.name, f"unreadable from row {row} on ({error})", part.images - row)


# --- npz batches of the downsampled ImageNet -----------------------------------------------------


def npz_parts(paths: Iterable[tuple[str, Path]]) -> Found:
    parts, labelled = [], None
    for name, path in paths:
        try:
            with zipfile.ZipFile(path) as archive, archive.open("data.npy") as file:
                shape, dtype = _npy_header(file)
                has_labels = "labels.npy" in archive.namelist()
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: truncated, or not an .npz with `data` ({error})") from error
        side = _side(shape)
        if dtype != np.uint8 or not side:
            raise ValueError(f"{path}: expected data uint8 [n, 3*S*S], got {dtype} {list(shape)}")
        if labelled is not None and has_labels != labelled:
            raise ValueError(f"{path}: unlike {parts[0].path} as to labels")
        labelled = has_labels
        parts.append(Part("npz", name, path, shape[0]))
    return tuple(parts), labelled, ()


def _side(shape: tuple[int, ...]) -> int:
    """S of [n, 3*S*S], or 0."""
    side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    return side if len(shape) == 2 and 3 * side * side == shape[1] else 0


def _npy_header(file) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    v1, v2 = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = (v1 if version == (1, 0) else v2)(file)
    if fortran_order:
        raise ValueError("expected C order")
    return shape, dtype


def _npz_items(part: Part) -> Iterator[Item | Skipped]:
    """The pixels are read as a stream: such a file is 1.5 GB of them."""
    with zipfile.ZipFile(part.path) as archive:
        labels = None
        if "labels.npy" in archive.namelist():
            with archive.open("labels.npy") as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
            if labels.shape != (part.images,) or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(
                    f"{part.path}: expected integer labels [{part.images}], got {labels.dtype} "
                    f"{list(labels.shape)}"
                )
        with archive.open("data.npy") as file:
            shape, _ = _npy_header(file)
            width, side = shape[1], _side(shape)
            for first in range(0, part.images, _ROWS):
                rows = min(_ROWS, part.images - first)
                try:
                    content = file.read(rows * width)
                    if len(content) != rows * width:
                        raise EOFError("it ends early")
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    # One checksum for all: nothing says which images before are good.
                    raise ValueError(f"{part.path}: broken ({error})") from error
                pixels = np.frombuffer(content, np.uint8).reshape(rows, 3, side, side)
                for k in range(rows):
                    label = None if labels is None else int(labels[first + k]) - 1  # from 1
                    yield Item(f"{part.name}, image {first + k}", label, pixels[k])


_ITEMS: dict[str, Callable[[Part], Iterator[Item | Skipped]]] = {
    "folder": _folder_items,
    "tar": _tar_items,
    "parquet": _parquet_items,
    "npz": _npz_items,
}
