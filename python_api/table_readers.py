"""Reads tables from text, ``.npy`` and parquet files, naming the first fault by row and column.

Rows count from 1: row 1 is the first row of data. For text the line of the file is named as well.
"""

import csv
import gzip
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")

#: Cells that say that a value is missing.
MISSING = ("", "?", "NA", "N/A", "n/a", "#N/A", "NULL", "Null", "null", "None", "none", "<NA>")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf|infinity|nan)", re.I)
_LARGEST_INTEGER = 2**53  # up to here float64 holds every integer

#: values ``[N, D]`` and the names of their columns
Found = tuple[np.ndarray, tuple[str, ...]]


def import_arrow():
    """pyarrow with the two modules used here; it is an extra."""
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("csv and parquet need pyarrow: pip install 'flowops[tables]'") from error
    return pyarrow


def read_text(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    delimiter: str | None = None,
    header: bool | None = None,
    skip: int = 0,
) -> Found:
    """Reads text of any suffix.

    Args:
        path: the file; one that ends in ``.gz`` is uncompressed.
        columns: names of the columns wanted, in the order wanted; by default all.
        delimiter: between cells; a space is any run of spaces and tabs. By default comma, semicolon
            or tab, whichever is most frequent in the first line, else a space.
        header: whether the first line names the columns (else they are called x1, x2, ...); by
            default, if it reads like it.
        skip: lines to pass over at the start.

    Raises:
        ValueError: naming the file, and the row and column of the first fault.
        ImportError: without pyarrow.
    """
    data, start = _read_bytes(path), 0
    for _ in range(skip):
        start = data.find(b"\n", start) + 1 or len(data)
    first = _line(data, start)
    delimiter = delimiter or _find_delimiter(path, first)
    spaces = delimiter == " "
    if spaces:
        data = b"\n".join(b"\t".join(line.split()) for line in data[start:].split(b"\n"))
        start, first, delimiter = 0, _line(data, 0), "\t"
    title = first.removeprefix(b"#")  # as numpy.savetxt begins a header
    cells = _cells(title.strip() if spaces else title, delimiter)
    header = is_header(cells) if header is None else header
    if header and "\ufffd" in "".join(cells):
        raise ValueError(f"{path}: line {skip + 1} is not UTF-8 text")
    names = cells if header else [f"x{k + 1}" for k in range(len(cells))]
    source = _Source(path, names, columns, skip + 1 + header)
    body = memoryview(data)[start + (len(first) + 1) * header :]
    return source.found(_parse(source, body, delimiter))


class _Source:
    """A file, its columns and those wanted, and the line of row 1: what its errors tell.

    ``chosen`` holds the positions in the file of the columns wanted.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        wanted: Sequence[str] | None,
        first_line: int | None = None,
    ):
        self.path, self.names, self.first_line = path, names, first_line
        position: dict[str, int] = {}
        for k, name in enumerate(names):
            if position.setdefault(name, k) != k and name:
                raise ValueError(
                    f"{path}: columns {position[name] + 1} and {k + 1} are both named {name!r}"
                )
        if wanted is not None:
            for name in wanted:
                if name not in position:
                    more = f", ... ({len(names)} in all)" if len(names) > 20 else ""
                    raise ValueError(
                        f"columns: {path} has no column {name!r}, it has "
                        f"{', '.join(map(repr, names[:20]))}{more}"
                    )
            if len(set(wanted)) != len(wanted) or not wanted:
                raise ValueError(f"columns: expected different names, got {list(wanted)}")
        for name in names if wanted is None else wanted:
            if name in ("", "__index_level_0__"):
                raise ValueError(
                    f"{path}: column {position[name] + 1} has no name, as the index that pandas "
                    f"writes: name it, or name the others with --columns"
                )
        self.chosen = [position[name] for name in (names if wanted is None else wanted)]

    def column(self, j: int) -> str:
        """Names a chosen column and its number in the file."""
        k = self.chosen[j]
        return f"column {self.names[k]!r} (number {k + 1})"

    def row(self, i: int) -> str:
        line = "" if self.first_line is None else f" (line {self.first_line + i})"
        return f"row {i + 1} of the data{line}"

    def refuse(
        self, i: int, j: int, kind: str, value: object = None, advice: str = "encode it as numbers"
    ) -> NoReturn:
        first = "first" if value is None else f"first {value!r}"
        raise ValueError(
            f"{self.path}: {self.column(j)} holds {kind}, {first} in {self.row(i)}: {advice}, "
            f"or leave it out with --columns"
        )

    def check_integers(self, integers: Iterable[tuple[int, int, int]]) -> None:
        """Refuses integers, given with row and column, that a float64 rounds."""
        for i, j, value in integers:
            if int(float(value)) != value:
                self.refuse(i, j, "integers beyond 2^53", value, "round them")

    def found(self, values: np.ndarray) -> Found:
        """The values with their names, if there are rows and all are finite."""
        if not values.shape[1]:
            raise ValueError(f"{self.path} holds no columns")
        if len(values) < 2:
            rows = "no rows" if len(values) == 0 else "one row"
            raise ValueError(f"{self.path} holds {rows} of data, expected at least two")
        bad = ~np.isfinite(values)
        if bad.any():
            rows = bad.any(axis=1)
            i, j = np.argwhere(bad)[0]
            what = "an empty or NaN cell" if np.isnan(values[i, j]) else f"{values[i, j]:g}"
            raise ValueError(
                f"{self.path}: {self.column(j)} holds {what} in {self.row(i)}; such cells are "
                f"in {rows.sum():,} of {len(values):,} rows: fill them in or remove the rows"
            )
        return values, tuple(self.names[k] for k in self.chosen)


def is_header(cells: Sequence[str]) -> bool:
    """A line names columns if a cell of it is text and its numbers, if any, are plain digits."""
    numbers = [cell for cell in cells if cell not in MISSING and _is_number(cell)]
    return not all(map(_is_number, cells)) and all(cell.isdigit() for cell in numbers)


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or not a gzip file ({error})") from error
    if b"\0" in data[:4096]:
        raise ValueError(f"{path} is not a text file (or one in UTF-16: save it as UTF-8)")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    data = data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\n")
    if not data:
        raise ValueError(f"{path} is empty")
    return data


def _line(data: bytes, start: int) -> bytes:
    end = data.find(b"\n", start)
    return data[start : end if end >= 0 else len(data)]


def _find_delimiter(path: Path, line: bytes) -> str:
    if ".tsv" in path.suffixes:
        return "\t"
    line = re.sub(rb'"[^"]*"', b"", line)
    best = max(b",;\t", key=lambda d: line.count(d))
    if bytes([best]) in line or ".csv" in path.suffixes:
        return chr(best)
    return " "


def _cells(line: bytes, delimiter: str) -> list[str]:
    text = line.decode("utf-8", "replace")
    cells = next(csv.reader([text], delimiter=delimiter)) if '"' in text else text.split(delimiter)
    return [cell.strip() for cell in cells]


def _is_number(cell: str) -> bool:
    return cell in MISSING or cell.lower() in ("true", "false") or bool(_NUMBER.fullmatch(cell))


def _value(cell: str) -> float:
    if cell in MISSING:
        return math.nan
    return float(cell.lower() == "true") if cell.lower() in ("true", "false") else float(cell)


def _parse(source: _Source, body: memoryview, delimiter: str) -> np.ndarray:
    """The chosen columns; pyarrow reads them, unless it stumbles: line by line the fault is found,
    or there is none (pyarrow knows no ``+1``, say)."""
    pa = import_arrow()
    names = [str(k) for k in range(len(source.names))]
    chosen = [names[k] for k in source.chosen]
    try:
        found = pa.csv.read_csv(
            pa.BufferReader(pa.py_buffer(body)),
            pa.csv.ReadOptions(column_names=names, block_size=2**24),
            pa.csv.ParseOptions(delimiter=delimiter, ignore_empty_lines=False),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(chosen, pa.float64()),
                include_columns=chosen,
                null_values=[*MISSING, "nan", "NaN", "NAN"],
            ),
        )
    except pa.ArrowInvalid:
        values = _parse_lines(source, bytes(body).split(b"\n"), delimiter)
    else:
        values = np.empty((found.num_rows, len(chosen)))
        for j, name in enumerate(chosen):
            values[:, j] = found[name].to_numpy()
    large = np.argwhere(_large(values) & np.isfinite(values))
    lines = bytes(body).split(b"\n") if len(large) else []
    cells = ((i, j, _cells(lines[i], delimiter)[source.chosen[j]]) for i, j in large)
    source.check_integers((i, j, int(c)) for i, j, c in cells if c.lstrip("+-").isdigit())
    return values


def _parse_lines(source: _Source, lines: list[bytes], delimiter: str) -> np.ndarray:
    lines = [] if lines == [b""] else lines
    chosen, width = source.chosen, len(source.names)
    values = np.empty((len(lines), len(chosen)))
    for i, line in enumerate(lines):
        cells = _cells(line, delimiter)
        if len(cells) != width:
            cut = " in the last line: is the file cut?" if i == len(lines) - 1 else ""
            raise ValueError(
                f"{source.path}: {source.row(i)}: expected {width} cells as in the first line, got "
                f"{len(cells)}{cut}"
            )
        for j, k in enumerate(chosen):
            if not _is_number(cells[k]):
                source.refuse(i, j, "text", cells[k])
            values[i, j] = _value(cells[k])
    return values


def read_npy(path: Path, columns: Sequence[str] | None = None) -> Found:
    """Reads a two-dimensional ``.npy`` (columns x1, x2, ...). Errors as ``read_text``."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # knows the file's size; no pickles
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: truncated, or not a .npy array of numbers ({error})") from error
    if array.dtype.kind not in "fiub" or array.ndim != 2:
        raise ValueError(
            f"{path}: expected a two-dimensional array of real numbers, got {array.dtype} of shape "
            f"{list(array.shape)}"
        )
    if array.offset + array.nbytes != path.stat().st_size:
        raise ValueError(f"{path}: goes on after the array that its header describes")
    source = _Source(path, [f"x{k + 1}" for k in range(array.shape[1])], columns)
    array = array[:, source.chosen]
    if array.dtype.kind in "iu":
        source.check_integers((i, j, int(array[i, j])) for i, j in np.argwhere(_large(array)))
    narrow = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    dtype = np.float32 if narrow else np.float64
    return source.found(np.array(array, dtype, order="C"))


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Found:
    """Reads a parquet file. Errors as ``read_text``."""
    pa = import_arrow()
    try:
        file = pa.parquet.ParquetFile(path)
        source = _Source(path, file.schema_arrow.names, columns)
        found = file.read(columns=[source.names[k] for k in source.chosen])
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: truncated or not a parquet file ({reason})") from error
    narrow = all(pa.types.is_float32(t) or pa.types.is_float16(t) for t in found.schema.types)
    values = np.empty((found.num_rows, found.num_columns), np.float32 if narrow else np.float64)
    for j, k in enumerate(source.chosen):
        values[:, j] = _arrow_numbers(pa, source, j, found[source.names[k]])
    return source.found(values)


def _arrow_numbers(pa, source: _Source, j: int, column) -> np.ndarray:
    kind, types = column.type, pa.types
    integer = types.is_integer(kind)
    known = (types.is_floating, types.is_boolean, types.is_decimal, types.is_null)
    if not integer and not any(is_known(kind) for is_known in known):
        i = next((i for i, cell in enumerate(column) if cell.is_valid), 0)
        if types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind):
            source.refuse(i, j, "text", column[i].as_py())
        source.refuse(i, j, str(kind))
    if integer:
        exact = column.fill_null(0).to_numpy()
        source.check_integers((i, j, int(exact[i])) for i in np.flatnonzero(_large(exact)))
    return column.cast(pa.float64(), safe=False).to_numpy()


def _large(values: np.ndarray) -> np.ndarray:
    return (values >= _LARGEST_INTEGER) | (values <= -_LARGEST_INTEGER)
