"""Tables of numbers for density estimation: read, checked, split, standardised, written."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checkpoint import write_whole
from .table_readers import (
    TEXT_SUFFIXES,
    import_arrow,
    is_header,
    read_npy,
    read_parquet,
    read_text,
)


@dataclass(frozen=True, eq=False)
class Table:
    """``values [N, D]``, float64 or float32, and a name for each column."""

    values: np.ndarray
    columns: tuple[str, ...]

    def __post_init__(self):
        if not isinstance(self.values, np.ndarray) or self.values.dtype not in ("f4", "f8"):
            kind = getattr(self.values, "dtype", type(self.values).__name__)
            raise TypeError(f"values: expected a float64 or float32 array, got {kind}")
        if self.values.ndim != 2 or self.values.shape[1] != len(self.columns):
            raise ValueError(
                f"values: expected [N, {len(self.columns)}] for {len(self.columns)} columns, got "
                f"{list(self.values.shape)}"
            )
        if len(set(self.columns)) != len(self.columns) or not all(self.columns):
            raise ValueError(f"columns: expected different names, none empty, got {self.columns}")

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> "Table":
        return Table(self.values[rows], self.columns)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> Table:
    """Reads a table of numbers. No row and no cell is dropped, filled in or rounded.

    Args:
        path: ``.csv``, ``.tsv``, ``.txt`` (also with ``.gz``; with or without a header line), a
            two-dimensional ``.npy``, or ``.parquet``.
        columns: names of the columns wanted, in the order wanted; the others may hold anything.
            Columns that the file does not name are called x1, x2, ...

    Returns:
        float32 if the columns are stored as float32 or float16, else float64; integers and booleans
        become floats.

    Raises:
        FileNotFoundError: no such file.
        ImportError: text and parquet need pyarrow.
        TypeError, ValueError: naming the file, and the row and column of the first fault: text, an
            empty, NaN or infinite cell, an integer beyond 2^53, a line of another width. Rows
            count from 1, the first row of data.
    """
    path = Path(path)
    if isinstance(columns, str):
        raise TypeError(f"columns: expected a list of names, got the text {columns!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".npy"]:
        return Table(*read_npy(path, columns))
    if suffixes[-1:] == [".parquet"]:
        return Table(*read_parquet(path, columns))
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    if suffixes and suffixes[-1] in TEXT_SUFFIXES:
        return Table(*read_text(path, columns))
    expected = ", ".join((*TEXT_SUFFIXES, ".npy", ".parquet"))
    raise ValueError(f"{path}: expected a file that ends in {expected}")


def write_table(path: str | Path, table: Table) -> None:
    """Writes a table, whole or not at all; ``read_table`` gives back the same values.

    Args:
        path: ``.csv`` (float32 comes back as float64), ``.npy`` (without names) or ``.parquet``.
        table: what to write.

    Raises:
        ValueError: another suffix; names that a csv can't tell from a row of numbers.
        ImportError: csv and parquet need pyarrow.
        OSError: naming the file. The previous file is intact.
    """
    path, data = Path(path), io.BytesIO()
    suffix = path.suffix.lower()
    if suffix == ".npy":
        np.save(data, table.values)
    elif suffix == ".parquet":
        import_arrow().parquet.write_table(_to_arrow(table), data)
    elif suffix == ".csv":
        if not is_header(table.columns):
            raise ValueError(f"columns: in a csv, these would read as numbers: {table.columns}")
        header = io.StringIO()
        csv.writer(header, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(table.columns)
        data.write(header.getvalue().encode())
        arrow = import_arrow()
        arrow.csv.write_csv(_to_arrow(table), data, arrow.csv.WriteOptions(include_header=False))
    else:
        raise ValueError(f"{path}: expected a file that ends in .csv, .npy or .parquet")
    write_whole(path, data.getvalue())


def _to_arrow(table: Table):
    columns = [np.ascontiguousarray(column) for column in table.values.T]
    return import_arrow().table(columns, names=list(table.columns))


def check_variation(table: Table) -> list[str]:
    """Looks for columns that a continuous density does not describe.

    Returns:
        Notes on columns whose values repeat ten times or more on average: data that are discrete.

    Raises:
        ValueError: naming all columns that hold one value only.
    """
    constant, notes = [], []
    for name, column in zip(table.columns, table.values.T, strict=True):
        distinct = len(np.unique(column))
        if distinct == 1:
            constant.append(f"{name!r} (always {column[0]:g})")
        elif 10 * distinct <= len(column):
            notes.append(
                f"column {name!r} takes {distinct:,} distinct values in {len(column):,} rows: on "
                f"discrete data the likelihood has no upper bound; add noise or padding dimensions"
            )
    if constant:
        raise ValueError(
            f"{len(constant)} constant columns have no density, leave them out: "
            f"{', '.join(constant)}"
        )
    return notes


def split(
    table: Table, valid: float = 0.1, test: float = 0.1, seed: int = 0
) -> tuple[Table, Table, Table]:
    """Training, validation and test rows, drawn without replacement.

    Args:
        table: N rows.
        valid, test: shares of the rows, rounded down; the rest is for training.
        seed: of the order; the same on every machine and version of numpy.

    Raises:
        ValueError: shares that are not between 0 and 1 or leave nothing, a part without rows.
    """
    for name, share in (("valid", valid), ("test", test)):
        if not 0 < share < 1:
            raise ValueError(f"{name}: expected a share between 0 and 1, got {share}")
    if valid + test >= 1:
        raise ValueError(f"valid + test: expected less than 1, got {valid + test:g}")
    # A share of 0.1 is slightly more or less than a tenth: 0.29 * 100 = 28.999999999999996.
    sizes = [math.floor(share * len(table) + 1e-9) for share in (valid, test)]
    if 0 in sizes:
        needed = math.ceil((1 - 1e-9) / min(valid, test))
        raise ValueError(
            f"valid, test: shares of {valid:g} and {test:g} need {needed:,} rows or more, got "
            f"{len(table):,}"
        )
    # A stream of its own: rows drawn from PCG64(seed) would be sorted by their own values. And only
    # the words of a bit generator are promised to stay what they are.
    stream = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(len(table),)))
    order = np.argsort(stream.random_raw(len(table)), kind="stable")
    parts = np.split(order, np.cumsum([len(table) - sum(sizes), sizes[0]]))
    return tuple(table[part] for part in parts)


@dataclass(frozen=True, eq=False)
class Standardizer:
    """``u = (x - mean) / scale``, column by column, in float64.

    ``log p(x) = log p(u) - logdet`` with ``logdet = sum(log scale)``, in nats.

    Args:
        mean, scale: float64 ``[D]``; scale positive.

    Raises:
        ValueError: values that are not finite, a scale that is not positive.
    """

    mean: np.ndarray
    scale: np.ndarray

    def __post_init__(self):
        mean, scale = (np.asarray(a, np.float64) for a in (self.mean, self.scale))
        if mean.ndim != 1 or mean.shape != scale.shape:
            raise ValueError(
                f"mean, scale: expected [D] each, got {list(mean.shape)} and {list(scale.shape)}"
            )
        for k in np.flatnonzero(~(np.isfinite(mean) & np.isfinite(scale) & (scale > 0)))[:1]:
            raise ValueError(
                f"mean, scale: expected finite numbers and a positive scale, got {mean[k]:g} and "
                f"{scale[k]:g} for column {k + 1}"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "scale", scale)

    @classmethod
    def fit(cls, train: Table) -> "Standardizer":
        """Mean and standard deviation of the training rows.

        Raises:
            ValueError: naming the columns that are constant, or too large or small for float64.
        """
        values = train.values.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            mean, scale = values.mean(0), values.std(0)
        # The rounded mean of a constant column can differ from its value.
        usable = np.isfinite(scale) & (scale > 0) & (values.min(0) < values.max(0))
        if not usable.all():
            names = ", ".join(repr(train.columns[k]) for k in np.flatnonzero(~usable))
            raise ValueError(f"no finite, positive standard deviation in the column {names}")
        return cls(mean, scale)

    @property
    def logdet(self) -> float:
        """``log |dx/du| = sum(log scale)``, nats."""
        return float(np.log(self.scale).sum())

    def forward(self, values: np.ndarray) -> np.ndarray:
        """x ``[N, D]`` to u, float64."""
        return (self._check(values) - self.mean) / self.scale

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """u ``[N, D]`` to x, float64."""
        return self._check(values) * self.scale + self.mean

    def tensors(self) -> dict[str, Tensor]:
        """What a model file keeps of it."""
        return {"mean": torch.tensor(self.mean), "scale": torch.tensor(self.scale)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Standardizer":
        """The inverse of ``tensors``.

        Raises:
            ValueError: naming what is missing or is no scale.
        """
        for name in ("mean", "scale"):
            if name not in tensors:
                raise ValueError(f"{name} is missing from the standardisation")
        return cls(tensors["mean"].cpu().numpy(), tensors["scale"].cpu().numpy())

    def _check(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values)
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise ValueError(f"values: expected [N, {len(self.mean)}], got {list(values.shape)}")
        return values.astype(np.float64, copy=False)
