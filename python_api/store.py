"""Images on disk to train on, read in any order: shards of ``.npy`` files that ``prepare.py``
writes, or one ``.npy`` file of latents.

A row is read with one ``preadv`` straight into its place in the batch. Beside a memory map that
reads cold files twice as fast, since it asks for a whole row and for nothing else, and a file that
has shrunk is an error instead of SIGBUS.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import Images

INDEX, FORMAT, VERSION = "index.json", "flowops-images", 1
_CHUNK = 2**22

#: called with the bytes checked since the last call
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class NpyFile:
    """Where the rows of a ``.npy`` file are."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def open(cls, path: Path) -> "NpyFile":
        """Reads the header and checks the size of the file against it.

        Raises:
            FileNotFoundError, ValueError: naming the file.
        """
        try:
            with open(path, "rb") as file:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, fortran_order, dtype = read(file)
                offset = file.tell()
        except FileNotFoundError:
            raise FileNotFoundError(f"no such file: {path}") from None
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: not a .npy file that can be read ({error})") from error
        if fortran_order or dtype.hasobject or not dtype.isnative:
            raise ValueError(f"{path}: expected little-endian numbers in C order")
        found = cls(path, dtype, shape, offset)
        check_size(path, found.size)
        return found

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes the whole file has."""
        return self.offset + self.shape[0] * self.row_bytes

    def chunks(self) -> Iterator[bytes]:
        """The data, a few MiB at a time."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            while chunk := file.read(_CHUNK):
                yield chunk


def check_size(path: Path, expected: int) -> None:
    """Raises ValueError if a file is missing or has another size than it should."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, expected {expected:,} bytes") from None
    if size != expected:
        raise ValueError(f"{path}: expected {expected:,} bytes, got {size:,}")


class _RowReader:
    """Gathers rows out of several files as if they were one array."""

    def __init__(self, files: Sequence[Path], counts: Sequence[int]):
        self.files, self.counts = files, counts
        self.ends = np.cumsum(counts)
        self.open_files: dict[int, tuple[int, int]] = {}
        _allow_open_files(len(files))

    def read(self, index: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rows ``index`` (int64 ``[b]``) as ``[b, *shape]``."""
        n = int(self.ends[-1])
        rows = _checked(index, n).numpy()
        out = torch.empty((len(rows), *shape), dtype=dtype)
        if not len(rows):
            return out
        size = out[0].numel() * out.element_size()
        places = memoryview(out.view(-1).view(torch.uint8).numpy())
        shards = np.searchsorted(self.ends, rows, side="right")
        inside = rows - self.ends[shards] + np.asarray(self.counts)[shards]
        for i, (shard, row) in enumerate(zip(shards.tolist(), inside.tolist(), strict=True)):
            descriptor, offset = self.open_files.get(shard) or self._open(shard, shape)
            place = places[i * size : (i + 1) * size]
            if os.preadv(descriptor, [place], offset + row * size) != size:
                raise OSError(f"{self.files[shard]}: ends before image {row}; it was cut")
        return out

    def _open(self, shard: int, shape: tuple[int, ...]) -> tuple[int, int]:
        file = NpyFile.open(self.files[shard])
        if file.shape != (self.counts[shard], *shape):
            raise ValueError(
                f"{file.path}: expected shape {[self.counts[shard], *shape]}, got "
                f"{list(file.shape)}"
            )
        descriptor = os.open(file.path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # whole rows are asked for: reading ahead is a waste
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self.open_files[shard] = descriptor, file.offset
        return descriptor, file.offset

    def __del__(self):
        for descriptor, _ in self.open_files.values():
            os.close(descriptor)


def _allow_open_files(count: int) -> None:
    """Raises this process's soft limit of open files where the shards need more."""
    import resource

    needed = count + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < needed:
        if resource.RLIM_INFINITY != hard < needed:
            raise OSError(f"{count} shards need {needed} open files, the limit is {hard}: ulimit")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _checked(index: Tensor, n: int) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        got = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else repr(index)
        raise TypeError(f"index: expected an int64 tensor [b], got {got}")
    index = index.cpu()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < n:
        raise IndexError(
            f"index: expected from 0 to {n - 1}, got {int(index.min())} to {int(index.max())}"
        )
    return index


class ImageStore:
    """A directory that ``flowops data prepare`` made: ``store[index]`` is ``Images``.

    Can be pickled; the copy opens the files anew.

    Args:
        path: the directory. Every file's size is checked against the index.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing, cut or not of a store.
        OSError: if the shards are more than the files a process may have open.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = _read_index(self.path)
        self.img_size: int = index["img_size"]
        self.channels: int = index["channels"]
        self.class_names: tuple[str, ...] = tuple(index["class_names"])
        self.skipped: int = index["skipped"]
        self.shards: list[dict] = index["shards"]
        self._length: int = index["images"]
        for shard in self.shards:
            for part in ("pixels", "labels"):
                if shard[part] is not None:
                    check_size(self.path / shard[part]["file"], shard[part]["bytes"])
        files = [self.path / shard["pixels"]["file"] for shard in self.shards]
        self._reader = _RowReader(files, [shard["images"] for shard in self.shards])
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Tensor) -> Images:
        """Images ``index`` (int64 ``[b]``), in the order asked for.

        Raises:
            TypeError, IndexError, OSError: naming what is off.
        """
        shape = (self.channels, self.img_size, self.img_size)
        pixels = self._reader.read(index, shape, torch.uint8)
        labels = self.labels
        return Images(pixels, None if labels is None else labels[index.cpu()], self.class_names)

    @property
    def labels(self) -> Tensor | None:
        """int64 ``[n]``, of all images."""
        if self._labels is None and self.class_names:
            parts = [_read_labels(self.path / shard["labels"]["file"]) for shard in self.shards]
            for shard, part in zip(self.shards, parts, strict=True):
                if not 0 <= int(part.min()) <= int(part.max()) < len(self.class_names):
                    raise ValueError(
                        f"{self.path / shard['labels']['file']}: expected labels below "
                        f"{len(self.class_names)}, got {int(part.min())} to {int(part.max())}"
                    )
            self._labels = torch.cat(parts)
        return self._labels

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])

    def fingerprint(self) -> dict[str, int]:
        """What a checkpoint says about its data; of the index alone."""
        return {
            "img_size": self.img_size,
            "channels": self.channels,
            "images": len(self),
            "classes": len(self.class_names),
            "crc32": zlib.crc32(json.dumps([_checksums(shard) for shard in self.shards]).encode()),
        }

    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(
            shard[part]["bytes"]
            for shard in self.shards
            for part in ("pixels", "labels")
            if shard[part] is not None
        )

    def verify(self, on_bytes: OnBytes | None = None, threads: int = 2) -> list[str]:
        """Reads every file and compares its checksum. ``on_bytes`` is called from the threads.

        Returns:
            A line for every bad file, naming it; none if all is well.
        """
        parts = [
            shard[part] for shard in self.shards for part in ("pixels", "labels") if shard[part]
        ]

        def check(part: dict) -> str | None:
            path, checksum = self.path / part["file"], 0
            try:
                for chunk in NpyFile.open(path).chunks():
                    checksum = zlib.crc32(chunk, checksum)
                    if on_bytes:
                        on_bytes(len(chunk))
            except (OSError, ValueError) as error:
                return str(error)
            if checksum != part["crc32"]:
                return f"{path}: expected the checksum {part['crc32']:08x}, got {checksum:08x}"
            return None

        with ThreadPoolExecutor(threads) as pool:
            return [fault for fault in pool.map(check, parts) if fault]


def _checksums(shard: dict) -> list[int | None]:
    return [shard["pixels"]["crc32"], shard["labels"] and shard["labels"]["crc32"]]


def _read_index(path: Path) -> dict:
    if not path.is_dir():
        raise FileNotFoundError(f"no such store: {path}")
    file = path / INDEX
    if not file.is_file():
        if (path / "prepare.json").is_file():
            raise ValueError(f"{path}: not complete yet, `flowops data prepare` goes on with it")
        raise ValueError(f"{path}: not an image store, it has no {INDEX}")
    try:
        index = json.loads(file.read_bytes())
        if (index["format"], index["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{index['format']} version {index['version']}")
        complete = index["images"] == sum(shard["images"] for shard in index["shards"]) > 0
        if not complete:
            raise ValueError("the counts do not add up")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: not the index of a store ({FORMAT} version {VERSION}): {error}"
        ) from error
    return index


def _read_labels(path: Path) -> Tensor:
    array = np.load(path, allow_pickle=False)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{path}: expected integers [n], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.int64))


class LatentStore:
    """A ``.npy`` file of latents, fp16 or fp32 ``[n, c, H, H]``: ``store[index]`` is ``Images``
    whose pixels are of that dtype. Labels, if any, are integers ``[n]`` in ``NAME.labels.npy``
    beside it.

    Can be pickled; the copy opens the files anew. (bfloat16 does not exist in ``.npy`` files.)

    Args:
        path: the file. Its size, dtype and shape are checked here, its values by ``verify``.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is off.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = NpyFile.open(self.path)
        dtype, shape = self._file.dtype, self._file.shape
        if dtype not in (np.float16, np.float32):
            raise ValueError(f"{path}: expected float16 or float32, got {dtype}")
        if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
            raise ValueError(f"{path}: expected shape [n, c, H, H], got {list(shape)}")
        self.channels, self.img_size = shape[1:3]
        self.dtype = torch.float16 if dtype == np.float16 else torch.float32
        self.labels = self._find_labels()
        classes = 0 if self.labels is None else int(self.labels.max()) + 1
        self.class_names = tuple(str(k) for k in range(classes))
        self._reader = _RowReader([self.path], [shape[0]])

    def _find_labels(self) -> Tensor | None:
        path = self.path.with_name(f"{self.path.stem}.labels.npy")
        if not path.exists():
            return None
        labels = _read_labels(path)
        if len(labels) != len(self):
            raise ValueError(f"{path}: expected {len(self)} labels, got {len(labels)}")
        if int(labels.min()) < 0:
            raise ValueError(f"{path}: expected labels from 0, got {int(labels.min())}")
        return labels

    def __len__(self) -> int:
        return self._file.shape[0]

    def __getitem__(self, index: Tensor) -> Images:
        """Latents ``index`` (int64 ``[b]``), in the order asked for.

        Raises:
            TypeError, IndexError, OSError: naming what is off.
        """
        pixels = self._reader.read(index, self._file.shape[1:], self.dtype)
        labels = None if self.labels is None else self.labels[index.cpu()]
        return Images(pixels, labels, self.class_names)

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])

    def fingerprint(self) -> dict[str, int]:
        """What a checkpoint says about its data: sizes and a checksum of evenly spaced latents
        that make up at most 64 MiB, and of all labels."""
        every = -(-len(self) * self._file.row_bytes // 2**26)
        checksum = zlib.crc32(self[torch.arange(0, len(self), every)].pixels.numpy())
        if self.labels is not None:
            checksum = zlib.crc32(self.labels.numpy(), checksum)
        return {
            "img_size": self.img_size,
            "channels": self.channels,
            "images": len(self),
            "classes": len(self.class_names),
            "crc32": checksum,
        }

    def total_bytes(self) -> int:
        """Bytes of the latents."""
        return self._file.size - self._file.offset

    def verify(self, on_bytes: OnBytes | None = None) -> list[str]:
        """Reads all values.

        Returns:
            A line that names the first latent with a NaN or an infinity; none if all is well.
        """
        rows = max(1, _CHUNK // self._file.row_bytes)
        for first in range(0, len(self), rows):
            pixels = self[torch.arange(first, min(first + rows, len(self)))].pixels
            bad = (~torch.isfinite(pixels)).flatten(1).any(1)
            if bool(bad.any()):
                return [f"{self.path}: latent {first + int(bad.int().argmax())} is not finite"]
            if on_bytes:
                on_bytes(pixels.numel() * pixels.element_size())
        return []
