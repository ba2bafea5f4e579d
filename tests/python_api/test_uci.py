"""Small files in the formats of the five data sets; what is expected is worked out here anew."""

import gzip
import sys

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowops.api.uci import STANDARD, UCI, load_uci

# Results are rounded to float32, expectations are not: half an ulp at 4, and cancellation in sums.
ROUNDED = {"rtol": 1e-6, "atol": 1e-6}


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    np.save(path, array)


def expected_parts(data):
    """The last tenth to test on, the last tenth of the rest to validate on."""
    rest, test = data[: -(len(data) // 10)], data[-(len(data) // 10) :]
    return rest[: -(len(rest) // 10)], rest[-(len(rest) // 10) :], test


def assert_parts(found, train, valid, test):
    for part, expected in zip(
        (found.train, found.valid, found.test), (train, valid, test), strict=True
    ):
        assert part.dtype == np.float32
        assert part.flags.c_contiguous
        np.testing.assert_allclose(part, expected, **ROUNDED)


def test_the_published_sizes():
    assert UCI == ("power", "gas", "hepmass", "miniboone", "bsds300")
    # household_power_consumption.txt has 2,075,259 rows, 25,979 of them without measurements.
    assert sum(STANDARD["power"].rows) == 2_075_259 - 25_979
    # ethylene_CO.txt has 4,208,261 rows, of which a quarter was taken.
    assert sum(STANDARD["gas"].rows) == round(0.25 * 4_208_261)
    # MiniBooNE_PID.txt has 36,499 signal events, 11 of them outliers.
    assert sum(STANDARD["miniboone"].rows) == 36_499 - 11
    for name in ("power", "gas", "miniboone"):
        train, valid, test = STANDARD[name].rows
        assert test == (train + valid + test) // 10
        assert valid == (train + valid) // 10


@pytest.fixture
def power_rows():
    return np.random.default_rng(0).normal(5, 2, (200, 8))


def expected_power(rows):
    rng = np.random.RandomState(42)
    rows = rows.copy()
    rng.shuffle(rows)
    voltage, active, metering = rng.rand(200), rng.rand(200), rng.rand(200, 3)
    columns = [
        rows[:, 0] + 0.001 * active,
        rows[:, 2] + 0.01 * voltage,
        *(rows[:, 4 + k] + metering[:, k] for k in range(3)),
        rows[:, 7],
    ]
    data = np.stack(columns, axis=1)
    reference = data[:180]
    return expected_parts((data - reference.mean(0)) / reference.std(0))


def test_power(tmp_path, power_rows):
    save(tmp_path / "power" / "data.npy", power_rows)
    found = load_uci("power", tmp_path)
    assert_parts(found, *expected_power(power_rows))
    assert (len(found.train), len(found.valid), len(found.test)) == (162, 18, 20)
    assert found.notes[0] == "train: 162 rows, the published data have 1,659,917"
    assert len(found.notes) == 3


def write_household(path, rows, missing=()):
    names = "Global_active_power;Global_reactive_power;Voltage;Global_intensity"
    lines = [f"Date;Time;{names};Sub_metering_1;Sub_metering_2;Sub_metering_3"]
    for i, row in enumerate(rows):
        time = f"{int(row[7]) // 60:02}:{int(row[7]) % 60:02}:00"
        cells = ["?"] * 6 + [""] if i in missing else [repr(float(x)) for x in row[:7]]
        lines.append(f"16/12/2006;{time};" + ";".join(cells))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def test_power_from_the_text_of_uci(tmp_path, power_rows):
    path = tmp_path / "power" / "household_power_consumption.txt"
    minutes = np.random.default_rng(1).integers(0, 1440, 203)
    rows = np.vstack([power_rows, power_rows[:3]])
    rows[:, 7] = minutes
    write_household(path, rows, missing=(0, 100, 202))
    found = load_uci("power", tmp_path)
    assert found.notes[0].startswith("3 rows without measurements left out")
    assert "drawn anew" in found.notes[1]
    rows = np.delete(rows, [0, 100, 202], axis=0)
    found_rows = np.vstack([found.train, found.valid, found.test])
    expected = np.vstack(expected_power(rows))
    np.testing.assert_allclose(found_rows[:, :5], expected[:, :5], **ROUNDED)
    noise = (found_rows - expected)[:, 5] * rows[:, 7].std()  # of one minute, less its mean
    assert np.abs(noise).max() < 0.6
    assert noise.std() == pytest.approx(np.sqrt(1 / 12), rel=0.1)
    assert np.array_equal(found.train, load_uci("power", tmp_path).train)

    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2].rsplit(";", 2)[0])
    with pytest.raises(ValueError, match=r"consumption\.txt: not the UCI's file, or cut"):
        load_uci("power", tmp_path)
    path.write_text(whole.replace("Voltage", "Strom"))
    with pytest.raises(ValueError, match=r"consumption\.txt: not the UCI's file.*Voltage"):
        load_uci("power", tmp_path)


@pytest.fixture
def gas_rows():
    """Time, two concentrations, 16 sensors: 2 to 9 are nearly copies of later ones."""
    rng = np.random.default_rng(0)
    sensors = rng.normal(100, 30, (400, 16))
    sensors[:, 2:10] = -3 * sensors[:, [11] * 4 + [12] * 4] + rng.normal(0, 1, (400, 8))
    sensors[:, [11, 12]] *= -1
    sensors[:, 1] = sensors[:, 15] + 30 * rng.normal(0, 0.25, 400)  # a correlation of 0.97
    sensors[:, 2:6] += rng.normal(0, 15, (400, 4))  # and some of 0.986
    sensors[:, 14] = -sensors[:, 13] + rng.normal(0, 1, 400)  # the opposite is no copy
    return np.column_stack([np.arange(400) * 0.01, np.zeros((400, 2)), sensors])


GAS_KEPT = [3, 4, *range(13, 19)]


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_gas(tmp_path, gas_rows, form):
    path = tmp_path / "gas" / f"ethylene_CO.{form}"
    if form == "npy":
        save(path, gas_rows)
    else:
        path.parent.mkdir()
        names = [*(f"s{k}" for k in range(16)), "Meth", "Time", "Eth"]
        pq.write_table(pa.table(list(np.roll(gas_rows, -3, axis=1).T), names=names), path)
    found = load_uci("gas", tmp_path)
    kept = gas_rows[:, GAS_KEPT]
    expected = (kept - kept.mean(0)) / kept.std(0, ddof=1)
    assert_parts(found, *expected_parts(expected))
    assert len(found.notes) == 3


@pytest.mark.parametrize("title", [True, False])
def test_gas_from_the_text_of_uci(tmp_path, gas_rows, title):
    path = tmp_path / "gas" / "ethylene_CO.txt"
    path.parent.mkdir()
    header = "Time (seconds), CO conc (ppm), Ethylene conc (ppm), sensor readings (16 channels)\n"
    lines = ["   ".join(map(repr, row)) + " " for row in gas_rows.tolist()]
    path.write_text(header * title + "\n".join(lines) + "\n")
    found = load_uci("gas", tmp_path)
    assert "a random quarter of the rows" in found.notes[0]
    assert [len(found.train), len(found.valid), len(found.test)] == [81, 9, 10]
    rows = gas_rows[np.random.RandomState(0).permutation(400)[:100]][:, GAS_KEPT]
    assert_parts(found, *expected_parts((rows - rows.mean(0)) / rows.std(0, ddof=1)))


def test_the_pickle_of_gas_is_not_read(tmp_path):
    (tmp_path / "gas").mkdir()
    (tmp_path / "gas" / "ethylene_CO.pickle").write_bytes(b"whatever")
    with pytest.raises(
        FileNotFoundError, match=r"pickle is not read, since a pickle can run code: g"
    ):
        load_uci("gas", tmp_path)


@pytest.fixture
def hepmass(tmp_path):
    """27 features; the smallest value of 6 of them occurs 6 times, of one 5 times, and the largest
    of another very often, which counts for nothing."""
    rng = np.random.default_rng(0)
    train, test = (rng.normal(3, 2, (rows, 28)) for rows in (300, 60))
    for data in (train, test):
        data[:, 0] = np.arange(len(data)) % 3 > 0
    signal = np.flatnonzero(train[:, 0])
    for k in (1, 2, 9, 14, 22, 27):
        train[signal[:6], k] = -20
    train[signal[:5], 5] = -20
    train[signal[:50], 6] = 40
    folder = tmp_path / "hepmass"
    folder.mkdir()
    names = '"# label",' + ",".join(f'"f{k}"' for k in range(27))
    body = "\n".join(",".join(map(repr, row)) for row in train.tolist())
    (folder / "1000_train.csv").write_text(f"{names}\n{body}\n")
    # The header counts one column more, and so do the rows.
    body = "\n".join(",".join(map(repr, row)) + "," for row in test.tolist())
    (folder / "1000_test.csv").write_text(f"{names},mass\n{body}\n")
    return tmp_path, train, test


def test_hepmass(hepmass):
    root, train, test = hepmass
    found = load_uci("hepmass", root)
    kept = np.setdiff1d(np.arange(1, 28), [1, 2, 9, 14, 22, 27])
    train, test = (data[data[:, 0] == 1][:, kept] for data in (train, test))
    mean, std = train.mean(0), train.std(0, ddof=1)
    train, test = (train - mean) / std, (test - mean) / std
    assert_parts(found, train[:180], train[180:], test)
    assert len(train) == 200
    assert found.notes[2] == "test: 40 rows, the published data have 174,987"

    path = root / "hepmass" / "1000_train.csv"
    path.with_name("1000_train.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert np.array_equal(load_uci("hepmass", root).train, found.train)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train", lambda line: "0" + line[1:], r"1000_train\.csv: expected rows of class 1"),
        ("train", lambda line: line.rsplit(",", 1)[0], r"train\.csv: expected \[N, 28\], got"),
        ("test", lambda line: line.rsplit(",", 2)[0], r"1000_test\.csv has no column 'x28'"),
        ("test", lambda line: line.replace("1", "x", 1), r"1000_test\.csv: column 'x.* holds text"),
    ],
)
def test_hepmass_refuses(hepmass, name, change, message):
    path = hepmass[0] / "hepmass" / f"1000_{name}.csv"
    title, *lines = path.read_text().splitlines()
    path.write_text("\n".join([title, *map(change, lines)]))
    with pytest.raises(ValueError, match=message):
        load_uci("hepmass", hepmass[0])


def test_miniboone(tmp_path):
    data = np.random.default_rng(0).normal(4, 3, (150, 43)).astype(np.float32)
    save(tmp_path / "miniboone" / "data.npy", data)
    found = load_uci("miniboone", tmp_path)
    reference = data[:135].astype(np.float64)
    assert_parts(found, *expected_parts((data - reference.mean(0)) / reference.std(0)))


def test_miniboone_from_the_text_of_uci(tmp_path):
    rng = np.random.default_rng(0)
    signal, background = rng.normal(4, 3, (160, 50)), rng.normal(-9, 1, (90, 50))
    signal[[3, 80, 159]] = -999
    signal[10:16, 7 * np.arange(7)] = -30
    path = tmp_path / "miniboone" / "MiniBooNE_PID.txt"
    path.parent.mkdir()
    lines = ["  ".join(map(repr, row)) for row in np.vstack([signal, background]).tolist()]
    path.write_text("  160   90\n   " + "\n   ".join(lines) + "\n")
    found = load_uci("miniboone", tmp_path)
    data = np.delete(np.delete(signal, [3, 80, 159], axis=0), 7 * np.arange(7), axis=1)
    reference = data[: 157 - 15]
    assert_parts(found, *expected_parts((data - reference.mean(0)) / reference.std(0)))
    path.write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match="expected the numbers of signal and background rows first"
    ):
        load_uci("miniboone", tmp_path)


@pytest.fixture
def bsds(tmp_path):
    path = tmp_path / "BSDS300" / "BSDS300.hdf5"
    path.parent.mkdir()
    rng = np.random.default_rng(0)
    parts = {name: rng.normal(0, 0.1, (n, 63)) for name, n in
             (("train", 30), ("validation", 20), ("test", 10))}  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, part in parts.items():
            file[name] = part
    return path, parts


def test_bsds300(bsds):
    path, parts = bsds
    found = load_uci("bsds300", path.parent.parent)
    assert_parts(found, *parts.values())
    path.parent.rename(path.parent.with_name("bsds300"))
    path = path.parent.with_name("bsds300") / path.name
    path.rename(path.with_name("bsds300.hdf5"))
    assert np.array_equal(load_uci("bsds300", path.parent.parent).test, found.test)


def test_bsds300_refuses(bsds, monkeypatch):
    path, _ = bsds
    whole, root = path.read_bytes(), path.parent.parent
    with h5py.File(path, "r+") as file:
        file["test"][4, 7] = np.nan
    with pytest.raises(ValueError, match=r"hdf5: test holds NaN or infinity, first in row 5$"):
        load_uci("bsds300", root)
    with h5py.File(path, "r+") as file:
        del file["test"]
        file["test"] = np.zeros((3, 64))
    with pytest.raises(ValueError, match=r"BSDS300\.hdf5: expected \[N, 63\], got \[3, 64\]"):
        load_uci("bsds300", root)
    with h5py.File(path, "r+") as file:
        del file["validation"]
    with pytest.raises(
        ValueError, match=r"expected a data set named 'validation', got \['test', 't"
    ):
        load_uci("bsds300", root)
    for keep in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"BSDS300\.hdf5: truncated or not an HDF5 file"):
            load_uci("bsds300", root)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"BSDS300 needs h5py: pip install 'flowops\[tables\]'"):
        load_uci("bsds300", root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("power", r"power: expected data\.npy or household_power_consumption\.txt in this folder"),
        ("gas", r"gas: expected ethylene_CO\.parquet or ethylene_CO\.npy or ethylene_CO\.txt in"),
        ("hepmass", r"hepmass: expected 1000_train\.csv or 1000_train\.csv\.gz in this folder"),
        ("miniboone", r"miniboone: expected data\.npy or MiniBooNE_PID\.txt in this folder"),
        ("bsds300", r"expected BSDS300/BSDS300\.hdf5 or bsds300/bsds300\.hdf5 in this folder"),
    ],
)
def test_missing_files_are_named(tmp_path, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_uci(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "width"),
    [("power", "data.npy", 8), ("gas", "ethylene_CO.npy", 19), ("miniboone", "data.npy", 43)],
)
def test_arrays_that_do_not_fit(tmp_path, name, file, width):
    path = tmp_path / name / file
    rows = np.random.default_rng(0).normal(size=(30, width))
    save(path, rows[:, 1:])
    with pytest.raises(
        ValueError, match=rf"{file}: expected \[N, {width}\], got \[30, {width - 1}\]"
    ):
        load_uci(name, tmp_path)
    save(path, rows[:10])
    with pytest.raises(
        ValueError, match=rf"{file}: a tenth of 9 rows is none, expected at least 11"
    ):
        load_uci(name, tmp_path)
    save(path, np.where(np.arange(width) == width - 1, 0.1, rows))
    with pytest.raises(
        ValueError, match=rf"{file}: prepared column \d+ holds the same value in all"
    ):
        load_uci(name, tmp_path)
    rows[7, 4] = np.nan
    save(path, rows)
    with pytest.raises(ValueError, match=rf"{file}: column 'x5' .* in row 8 of the data"):
        load_uci(name, tmp_path)


def test_gas_of_another_width_after_cleaning(tmp_path):
    save(tmp_path / "gas" / "ethylene_CO.npy", np.random.default_rng(0).normal(size=(50, 19)))
    with pytest.raises(ValueError, match="gas: expected 8 columns after preparation, got 16"):
        load_uci("gas", tmp_path)


def test_another_name(tmp_path):
    with pytest.raises(ValueError, match="name: expected one of power, gas, .*, got 'mnist'"):
        load_uci("mnist", tmp_path)
