import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flowops.api.checkpoint import read_tensors, save_tensors
from flowops.api.table import (
    Standardizer,
    Table,
    check_variation,
    read_table,
    split,
    write_table,
)

IN_ONE_FOLDER = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TABLES = st.tuples(st.integers(2, 5), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=NUMBERS)
)


@given(TABLES, st.sampled_from(["csv", "npy", "parquet"]), st.booleans())
@IN_ONE_FOLDER
def test_written_tables_come_back(tmp_path, values, suffix, narrow):
    if narrow:
        with np.errstate(over="ignore", under="ignore"):
            values = values.astype(np.float32)
        values[~np.isfinite(values)] = 0
    names = ("#a", 'b "quoted", so', "c", "température")[: values.shape[1]]
    path = tmp_path / f"t.{suffix}"
    write_table(path, Table(values, names))
    table = read_table(path)
    assert table.columns == (names if suffix != "npy" else ("x1", "x2", "x3", "x4")[: len(names)])
    assert table.values.dtype == (np.float64 if suffix == "csv" else values.dtype)
    back = table.values.astype(values.dtype)
    assert np.array_equal(back, values)
    assert np.array_equal(np.signbit(back), np.signbit(values))


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, Table(np.eye(2), ("a", "b")))
    before = path.read_bytes()
    for columns in (("1", "2"), ("1.5", "b")):
        with pytest.raises(ValueError, match="in a csv, these would read as numbers"):
            write_table(path, Table(np.ones((2, 2)), columns))
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"t\.tsv: expected a file that ends in \.csv, \.npy or"):
        write_table(tmp_path / "t.tsv", Table(np.eye(2), ("a", "b")))
    with pytest.raises(OSError, match="could not write .*nowhere/t.npy"):
        write_table(tmp_path / "nowhere" / "t.npy", Table(np.eye(2), ("a", "b")))
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_is_checked():
    with pytest.raises(TypeError, match="values: expected a float64 or float32 array, got int64"):
        Table(np.ones((2, 1), np.int64), ("a",))
    with pytest.raises(TypeError, match="values: expected .* got list"):
        Table([[1.0]], ("a",))
    with pytest.raises(ValueError, match=r"values: expected \[N, 2\] for 2 columns, got \[2, 3\]"):
        Table(np.ones((2, 3)), ("a", "b"))
    for names in (("a", "a"), ("a", "")):
        with pytest.raises(ValueError, match="columns: expected different names"):
            Table(np.ones((2, 2)), names)


def test_variation():
    rows = np.random.default_rng(0).normal(size=(100, 4))
    rows[:, 1] = rows[:, 1] > 0
    rows[:, 2] = np.arange(100) % 11  # eleven values, nine rows each
    assert len(check_variation(Table(rows[:, 1:], ("b", "c", "d")))) == 1
    (note,) = check_variation(Table(rows, ("a", "b", "c", "d")))
    assert note.startswith("column 'b' takes 2 distinct values in 100 rows")
    rows[:, 0], rows[:, 2] = 0.1, -3
    message = r"2 constant columns .*: 'a' \(always 0.1\), 'c' \(always -3\)$"
    with pytest.raises(ValueError, match=message):
        check_variation(Table(rows, ("a", "b", "c", "d")))
    with pytest.raises(ValueError, match="standard deviation in the column 'a', 'c'$"):
        Standardizer.fit(Table(rows, ("a", "b", "c", "d")))


@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 35), st.integers(0, 5))
@settings(deadline=None)
def test_split(n, valid, test, seed):
    """Shares in percent, so that the sizes are known exactly."""
    table = Table(np.arange(float(n))[:, None], ("a",))
    if n * min(valid, test) < 100:
        needed = -(-100 // min(valid, test))
        with pytest.raises(ValueError, match=rf"need {needed} rows or more, got {n}$"):
            split(table, valid / 100, test / 100, seed)
        return
    parts = split(table, valid / 100, test / 100, seed)
    rows = np.concatenate([part.values[:, 0] for part in parts])
    assert np.array_equal(np.sort(rows), np.arange(n))
    assert (len(parts[1]), len(parts[2])) == (n * valid // 100, n * test // 100)
    again = split(table, valid / 100, test / 100, seed)
    assert all(np.array_equal(a.values, b.values) for a, b in zip(parts, again, strict=True))


def test_split_is_the_same_everywhere():
    table = Table(np.arange(20.0)[:, None], ("a",))
    train, valid, test = split(table, 0.1, 0.2, seed=1)
    assert (len(train), len(valid), len(test)) == (14, 2, 4)
    assert valid.values[:, 0].tolist() == [10, 2]  # PCG64's words are promised to stay the same
    assert len(split(Table(np.zeros((100, 1)), ("a",)), 0.29, 0.1)[1]) == 29
    assert not np.array_equal(split(table, 0.1, 0.2, seed=2)[0].values, train.values)


@pytest.mark.parametrize("seed", [0, 1])
def test_split_does_not_sort_what_was_drawn_from_the_same_seed(seed):
    values = np.random.Generator(np.random.PCG64(seed)).random((1000, 1))
    train, valid, test = split(Table(values, ("a",)), 0.3, 0.3, seed)
    for part in (train, valid, test):  # a mean of 300 uniform numbers: 5 standard deviations
        assert part.values.mean() == pytest.approx(0.5, abs=5 * np.sqrt(1 / 12 / 300))


@pytest.mark.parametrize(
    ("valid", "test", "message"),
    [
        (0.0, 0.1, "valid: expected a share between 0 and 1, got 0.0"),
        (0.1, 1.0, "test: expected a share between 0 and 1, got 1.0"),
        (math.nan, 0.1, "valid: expected a share"),
        (0.5, 0.5, r"valid \+ test: expected less than 1, got 1"),
        (0.1, 0.001, r"shares of 0.1 and 0.001 need 1,000 rows or more, got 50"),
    ],
)
def test_split_refuses(valid, test, message):
    with pytest.raises(ValueError, match=message):
        split(Table(np.ones((50, 1)), ("a",)), valid, test)


def test_standardizer(tmp_path):
    values = np.random.default_rng(0).normal([1e6, -3, 0], [1, 100, 1e-6], (1000, 3))
    standard = Standardizer.fit(Table(values, ("a", "b", "c")))
    u = standard.forward(values)
    # A value of 1e6 and scale 1 is rounded to 1e6 eps.
    assert np.allclose(u.mean(axis=0), 0, atol=1e-9)
    assert np.allclose(u.std(axis=0), 1, rtol=1e-9)
    assert np.allclose(standard.inverse(u), values, rtol=1e-15, atol=1e-20)
    assert standard.forward(values[:2].astype(np.float32)).dtype == np.float64
    save_tensors(tmp_path / "s.safetensors", standard.tensors(), {})
    same = Standardizer.from_tensors(read_tensors(tmp_path / "s.safetensors")[0])
    assert np.array_equal(same.forward(values), u)


def test_standardizer_changes_variables():
    """``log p(x) = log p(u) - logdet``, against a Gaussian whose density is known."""
    mean, scale = np.array([3.0, -2.0]), np.array([0.1, 5.0])
    standard = Standardizer(mean, scale)
    x = np.array([[3.05, 4.0], [2.9, -9.0]])
    u = torch.from_numpy(standard.forward(x))
    log_p_u = torch.distributions.Normal(0, 1).log_prob(u).sum(1)
    expected = torch.distributions.Normal(torch.tensor(mean), torch.tensor(scale)).log_prob(
        torch.from_numpy(x)
    )
    assert torch.allclose(log_p_u - standard.logdet, expected.sum(1), rtol=1e-14)


def test_standardizer_refuses():
    with pytest.raises(ValueError, match=r"mean, scale: expected \[D\] each, got \[2\] and \[3\]"):
        Standardizer(np.zeros(2), np.ones(3))
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="a positive scale, got 0 and .* for column 2"):
            Standardizer(np.zeros(2), np.array([1.0, scale]))
    with pytest.raises(ValueError, match="scale is missing from the standardisation"):
        Standardizer.from_tensors({"mean": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"values: expected \[N, 2\], got \[3, 4\]"):
        Standardizer(np.zeros(2), np.ones(2)).forward(np.zeros((3, 4)))
    huge = np.array([[1e300, 0.0], [-1e300, 1.0], [3e300, 2.0]])
    with pytest.raises(
        ValueError, match="no finite, positive standard deviation in the column 'a'$"
    ):
        Standardizer.fit(Table(huge, ("a", "b")))


def test_what_is_imported_and_when(tmp_path, monkeypatch):
    code = (
        "import sys, flowops.api, flowops.api.table, flowops.api.uci, flowops.api.sets; "
        "print({'pyarrow', 'h5py', 'sklearn', 'PIL', 'pandas'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3,4\n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow: pip install 'flowops\[tables\]'"):
        read_table(path)
