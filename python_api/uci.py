"""The five data sets on which density estimators are compared, prepared from files on disk.

POWER, GAS, HEPMASS and MINIBOONE of the UCI repository and 8x8 patches of BSDS300, with the steps
of the authors who introduced the comparison, so that log-likelihoods compare with published ones:
noise, dropped columns, splits and standardisation are theirs, in their order.

Source: Papamakarios et al., "Masked Autoregressive Flow for Density Estimation" (arXiv 1705.07057),
appendix D, and the code published with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .table import read_table
from .table_readers import import_arrow, read_text


@dataclass(frozen=True, eq=False)
class UciData:
    """Three parts, float32 ``[N, D]``, standardised (but for BSDS300) as in published results.

    ``notes`` says what differs from the published data: row counts, noise drawn anew.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Standard:
    """What the published data set is: its width and the rows of its three parts."""

    dimensions: int
    rows: tuple[int, int, int]


STANDARD = {
    "power": _Standard(6, (1_659_917, 184_435, 204_928)),
    "gas": _Standard(8, (852_174, 94_685, 105_206)),
    "hepmass": _Standard(21, (315_123, 35_013, 174_987)),
    "miniboone": _Standard(43, (29_556, 3_284, 3_648)),
    "bsds300": _Standard(63, (1_000_000, 50_000, 250_000)),
}
UCI = tuple(STANDARD)

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


def load_uci(name: str, root: str | Path) -> UciData:
    """Reads and prepares one of the data sets.

    Args:
        name: one of ``UCI``.
        root: the folder that holds ``power/data.npy`` (or the UCI's
            ``household_power_consumption.txt``), ``gas/ethylene_CO.txt`` (or the published pickle
            converted to ``.parquet`` or ``.npy``), ``hepmass/1000_train.csv`` and
            ``1000_test.csv`` (or ``.csv.gz``), ``miniboone/data.npy`` (or ``MiniBooNE_PID.txt``),
            ``BSDS300/BSDS300.hdf5``.

    Raises:
        FileNotFoundError: naming the files looked for.
        ImportError: text and parquet need pyarrow, BSDS300 needs h5py.
        ValueError: naming the file: cells as for ``read_table``, or a number of columns other than
            the published one. Another number of rows is a note.

    Source: arXiv 1705.07057, appendix D.
    """
    if name not in STANDARD:
        raise ValueError(f"name: expected one of {', '.join(UCI)}, got {name!r}")
    parts, notes = _LOADERS[name](Path(root))
    standard, notes = STANDARD[name], list(notes)
    for part, values, rows in zip(("train", "valid", "test"), parts, standard.rows, strict=True):
        if values.shape[1] != standard.dimensions:
            raise ValueError(
                f"{name}: expected {standard.dimensions} columns after preparation, got "
                f"{values.shape[1]}"
            )
        if len(values) != rows:
            notes.append(f"{part}: {len(values):,} rows, the published data have {rows:,}")
    return UciData(name, *(np.ascontiguousarray(p, np.float32) for p in parts), tuple(notes))


def _power(root: Path) -> tuple[Parts, list[str]]:
    path = _find(root / "power", "data.npy", "household_power_consumption.txt")
    notes = []
    if path.suffix == ".npy":
        data = _check_width(path, read_table(path).values.astype(np.float64), 8)
    else:
        data, notes = _household(path)
    rng = np.random.RandomState(42)  # the published order and noise
    data = data[rng.permutation(len(data))]
    data = np.delete(data, [1, 3], axis=1)  # reactive power, mostly zeros; intensity, derived
    voltage, active = 0.01 * rng.rand(len(data), 1), 0.001 * rng.rand(len(data), 1)
    metering, time = rng.rand(len(data), 3), np.zeros((len(data), 1))  # the time has its noise
    data += np.hstack([active, voltage, metering, time])
    train, valid, test = _parts(path, data)
    return _standardise(path, (train, valid, test), np.vstack([train, valid])), notes


def _household(path: Path) -> tuple[np.ndarray, list[str]]:
    """The UCI's text: measurements as they are, the time as minutes of the day plus noise."""
    pa = import_arrow()
    kinds = dict.fromkeys(
        (
            *("Global_active_power", "Global_reactive_power", "Voltage", "Global_intensity"),
            *("Sub_metering_1", "Sub_metering_2", "Sub_metering_3"),
        ),
        pa.float64(),
    )
    kinds["Time"] = pa.time32("s")
    try:
        found = pa.csv.read_csv(
            path,
            parse_options=pa.csv.ParseOptions(delimiter=";"),
            convert_options=pa.csv.ConvertOptions(
                column_types=kinds, include_columns=list(kinds), null_values=["", "?"]
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(f"{path}: not the UCI's file, or cut ({error})") from error
    rows, found = found.num_rows, found.drop_null()
    data = np.stack([found[name].cast(pa.float64()).to_numpy() for name in list(kinds)[:-1]], 1)
    minutes = found["Time"].cast(pa.int32()).to_numpy() // 60
    noise = np.random.RandomState(0).rand(len(data))
    notes = [
        f"{rows - found.num_rows:,} rows without measurements left out, as published",
        "noise on the time of day drawn anew: the published draw is in power/data.npy alone",
    ]
    return np.column_stack([data, minutes + noise]), notes


def _gas(root: Path) -> tuple[Parts, list[str]]:
    folder, notes = root / "gas", []
    try:
        path = _find(folder, "ethylene_CO.parquet", "ethylene_CO.npy", "ethylene_CO.txt")
    except FileNotFoundError as error:
        if not (folder / "ethylene_CO.pickle").is_file():
            raise
        raise FileNotFoundError(
            f"{folder}/ethylene_CO.pickle is not read, since a pickle can run code: get the UCI's "
            f"ethylene_CO.txt or, if you trust it, convert it with pandas.read_pickle(...)"
            f".to_parquet('ethylene_CO.parquet', index=False)"
        ) from error
    if path.suffix == ".txt":
        with open(path, "rb") as file:
            title = file.readline().lstrip()[:1].isalpha()
        data, columns = read_text(path, delimiter=" ", header=False, skip=int(title))
        # The published sample, a quarter in random order, was drawn without a seed.
        rng = np.random.RandomState(0)
        data = data[rng.permutation(len(data))[: round(0.25 * len(data))]]
        notes.append(
            "a random quarter of the rows, drawn anew: the published draw is in the pickle alone"
        )
    else:
        table = read_table(path)
        data, columns = table.values.astype(np.float64), table.columns
    _check_width(path, data, 19)
    named = ("Time", "Meth", "Eth")
    drop = [columns.index(c) for c in named] if set(named) <= set(columns) else [0, 1, 2]
    data = np.delete(data, drop, axis=1)
    _check_constant(path, data)
    data = data[:, _without_correlated(np.corrcoef(data, rowvar=False))]
    return _parts(path, *_standardise(path, (data,), data, ddof=1)), notes


def _without_correlated(correlation: np.ndarray) -> list[int]:
    """The columns left when, again and again, the first that correlates above 0.98 with another
    one is removed."""
    kept = list(range(len(correlation)))
    while True:
        repeated = (correlation[np.ix_(kept, kept)] > 0.98).sum(axis=1) > 1
        if not repeated.any():
            return kept
        del kept[repeated.argmax()]


def _hepmass(root: Path) -> tuple[Parts, list[str]]:
    signal, paths, columns = [], [], None
    for name in ("1000_train.csv", "1000_test.csv"):
        path = _find(root / "hepmass", name, f"{name}.gz")
        # The header of the test file counts a column more than that of the training file.
        data, columns = read_text(path, columns, delimiter=",", header=False, skip=1)
        signal.append(_check_width(path, data, 28)[data[:, 0] == 1, 1:])
        paths.append(path)
        if len(signal[-1]) < 2:
            raise ValueError(f"{path}: expected rows of class 1 in the first column, got none")
    data, test = _standardise(paths[0], signal, signal[0], ddof=1)
    kept = ~_repetitive(data)
    train, valid = _last_tenth(paths[0], data[:, kept])
    return (train, valid, test[:, kept]), []


def _miniboone(root: Path) -> tuple[Parts, list[str]]:
    path = _find(root / "miniboone", "data.npy", "MiniBooNE_PID.txt")
    if path.suffix == ".npy":
        data = read_table(path).values.astype(np.float64)
    else:
        with open(path, "rb") as file:
            counts = file.readline().split()
        if len(counts) != 2 or not counts[0].isdigit():
            raise ValueError(f"{path}: expected the numbers of signal and background rows first")
        data, _ = read_text(path, delimiter=" ", header=False, skip=1)
        data = data[: int(counts[0])]
        data = data[data[:, 0] >= -100]  # events that could not be reconstructed
        data = data[:, ~_repetitive(data)]
    train, valid, test = _parts(path, _check_width(path, data, 43))
    return _standardise(path, (train, valid, test), np.vstack([train, valid])), []


def _repetitive(data: np.ndarray) -> np.ndarray:
    """Columns whose smallest value occurs more than five times: the published criterion."""
    return (data == data.min(axis=0)).sum(axis=0) > 5


def _bsds300(root: Path) -> tuple[Parts, list[str]]:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("BSDS300 needs h5py: pip install 'flowops[tables]'") from error
    path = _find(root, "BSDS300/BSDS300.hdf5", "bsds300/bsds300.hdf5")
    parts = []
    try:
        with h5py.File(path, "r") as file:
            for name in ("train", "validation", "test"):
                if name not in file:
                    raise ValueError(f"{path}: expected a data set named {name!r}, got {[*file]}")
                parts.append(_check_width(path, np.asarray(file[name], np.float32), 63))
    except OSError as error:
        raise ValueError(f"{path}: truncated or not an HDF5 file ({error})") from error
    for name, values in zip(("train", "validation", "test"), parts, strict=True):
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise ValueError(
                f"{path}: {name} holds NaN or infinity, first in row {bad.argmax() + 1}"
            )
    return tuple(parts), []


_LOADERS: dict[str, Callable[[Path], tuple[Parts, list[str]]]] = {
    "power": _power,
    "gas": _gas,
    "hepmass": _hepmass,
    "miniboone": _miniboone,
    "bsds300": _bsds300,
}


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: expected {' or '.join(names)} in this folder")


def _check_width(path: Path, data: np.ndarray, width: int) -> np.ndarray:
    if data.ndim != 2 or data.shape[1] != width:
        raise ValueError(f"{path}: expected [N, {width}], got {list(data.shape)}")
    return data


def _check_constant(path: Path, data: np.ndarray) -> None:
    constant = np.flatnonzero(data.min(axis=0) == data.max(axis=0)) + 1
    if len(constant):
        raise ValueError(f"{path}: prepared column {constant[0]} holds the same value in all rows")


def _standardise(path: Path, parts, reference: np.ndarray, ddof: int = 0):
    """Parts with mean 0 and standard deviation 1 in the reference rows."""
    _check_constant(path, reference)
    mean, std = reference.mean(axis=0), reference.std(axis=0, ddof=ddof)
    return tuple((part - mean) / std for part in parts)


def _last_tenth(path: Path, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = int(0.1 * len(data))
    if not n:
        raise ValueError(f"{path}: a tenth of {len(data)} rows is none, expected at least 11 rows")
    return data[:-n], data[-n:]


def _parts(path: Path, data: np.ndarray) -> Parts:
    rest, test = _last_tenth(path, data)
    return *_last_tenth(path, rest), test
