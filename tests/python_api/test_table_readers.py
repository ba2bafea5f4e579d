import datetime
import gzip
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowops.api.table import read_table

SAME = [[1.0, 2.0], [3.0, -40.0]]


@pytest.fixture
def write(tmp_path):
    def to(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return to


@pytest.fixture
def write_npy(tmp_path):
    def to(array):
        np.save(tmp_path / "t.npy", array, allow_pickle=True)
        return tmp_path / "t.npy"

    return to


@pytest.fixture
def write_parquet(tmp_path):
    def to(columns):
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    return to


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "a,b\n1,2\n3,-40\n"),
        ("t.csv", "a,b\n1,2\n3,-40"),
        ("t.csv", "a,b\r\n1,2\r\n3,-40\r\n\r\n"),
        ("t.csv", "a,b\r1,2\r3,-40\r"),
        ("t.csv", "\ufeffa,b\n1,2\n3,-40\n"),
        ("t.csv", '"a","b"\n"1", 2\n3 ,-4e1\n'),
        ("t.csv", " a, b\n1,2\n3 , -40\n"),
        ("t.csv", "a;b\n1;2\n3;-40\n"),
        ("t.csv", "a\tb\n1\t2\n3\t-40\n"),
        ("t.CSV", "a,b\n1.,+2\n3,-.4E+2\n"),
        ("t.csv", "a,b\nTrue,2\n3,-40\n"),
        ("t.tsv", "a\tb\n1\t2\n3\t-40\n"),
        ("t.txt", "a,b\n1,2\n3,-40\n"),
        ("t.txt", "# a b\n  1   2 \n3\t-40.000\n"),
        ("t.txt", "#a b\n1 2\n3 -40\n"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n3,-40\n", mtime=0)),
    ],
)
def test_text_of_every_kind(write, name, content):
    table = read_table(write(name, content))
    assert table.columns == ("a", "b")
    assert table.values.dtype == np.float64
    assert table.values.tolist() == SAME


@pytest.mark.parametrize(
    ("first", "columns"),
    [
        ("1,2", ("x1", "x2")),
        ("1.5,2", ("x1", "x2")),
        ("year,2020", ("year", "2020")),
        ('"a, b","c"', ("a, b", "c")),
        ("my value,température", ("my value", "température")),
    ],
)
def test_header_or_not(write, first, columns):
    table = read_table(write("t.csv", f"{first}\n1,2\n3,4\n"))
    assert table.columns == columns
    assert len(table) == (3 if columns == ("x1", "x2") else 2)


def test_columns_are_chosen_and_ordered_by_name(write, write_parquet):
    path = write("t.csv", "a,species,b,c\n1,setosa,2,\n3,setosa,4,\n")
    table = read_table(path, ["b", "a"])
    assert table.columns == ("b", "a")
    assert table.values.tolist() == [[2, 1], [4, 3]]
    path = write_parquet({"a": [1.0, 3.0], "s": ["x", "y"], "b": [2, 4]})
    assert read_table(path, ["b", "a"]).values.tolist() == [[2, 1], [4, 3]]
    np.save(path.with_name("t.npy"), np.array([[1, 2, 3], [4, 5, 6]]))
    assert read_table(path.with_name("t.npy"), ["x3"]).values.tolist() == [[3], [6]]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (["a", "z"], ValueError, r"columns: .*t\.csv has no column 'z', it has 'a', 'b'$"),
        (["a", "a"], ValueError, r"columns: expected different names, got \['a', 'a'\]"),
        ([], ValueError, r"columns: expected different names, got \[\]"),
        ("ab", TypeError, "columns: expected a list of names, got the text 'ab'"),
    ],
)
def test_columns_that_are_not_there(write, columns, error, message):
    with pytest.raises(error, match=message):
        read_table(write("t.csv", "a,b\n1,2\n3,4\n"), columns)


TEXT_FAULTS = {
    "text": ("a,s\n1,x\n2,y\n", r"column 's' \(number 2\) holds text, first 'x' in row 1 .*line 2"),
    "text in row 1": ("1.5,x\n2,y\n", r"column 'x2' \(number 2\) .* 'x' in row 1 .*\(line 1\)"),
    "text far down": ("a,b\n" + 5000 * "1,2\n" + "3,4 kg\n", r"'4 kg' in row 5001 .*\(line 5002\)"),
    "date": ("a,b\n1,2\n3,2020-01-31\n", r"'2020-01-31' in row 2 of the data \(line 3\)"),
    "decimal comma": ("a;b\n1;2,5\n", r"holds text, first '2,5'"),
    "underscore": ("a,b\n1,2\n3,1_000\n", r"holds text, first '1_000'"),
    "not UTF-8": (b"a,b\n1,\xe9\n", r"column 'b' \(number 2\) holds text"),
    "empty": (
        "a,b\n1,2\n3,\n,5\n",
        r"'b' \(number 2\) holds an empty or NaN cell in row 2 .*line 3",
    ),
    "how many": ("a,b\n1,2\n3,\n,5\n", r"such cells are in 2 of 3 rows: fill them in or remove"),
    "question mark": (
        "a,b\n?,2\n3,4\n",
        r"column 'a' \(number 1\) holds an empty .* row 1 .*line 2",
    ),
    "NA": ("a,b\n1,2\n3,NA\n", r"holds an empty or NaN cell in row 2"),
    "nan": ("a,b\n1,2\n3,NaN\n", r"holds an empty or NaN cell in row 2"),
    "infinity": ("a,b\n1,2\n3,-inf\n", r"column 'b' \(number 2\) holds -inf in row 2"),
    "overflow": ("a,b\n1,2\n3,1e400\n", r"holds inf in row 2"),
    "blank line": ("a\n1\n\n3\n", r"column 'a' \(number 1\) holds an empty .* row 2 .*\(line 3\)"),
    "cut": (
        "a,b,c\n1,2,3\n4,5",
        r"row 2 .*line 3.*: expected 3 cells .*, got 2 in the last line: is",
    ),
    "short": ("a,b\n1,2\n3\n5,6\n", r"row 2 .*\(line 3\): expected 2 cells as in .* line, got 1$"),
    "long": ("a,b\n1,2\n3,4,5\n5,6\n", r"row 2 .*\(line 3\): expected 2 cells .*, got 3$"),
    "trailing commas": ("a,b\n1,2,\n3,4,\n", r"row 1 .*\(line 2\): expected 2 cells .*, got 3"),
    "open quote": ('a,b\n"1,2\n3,4\n', r"row 1 .*\(line 2\): expected 2 cells .*, got 1"),
    "quoted line end": ('a,b\n"1\n2",2\n3,4\n', r"row 1 .*\(line 2\): expected 2 cells"),
    "duplicate names": ("a,b,a\n1,2,3\n", r"columns 1 and 3 are both named 'a'"),
    "no name": (",b\n0,2\n1,3\n", r"column 1 has no name, as the index that pandas writes"),
    "large integer": ("a\n1\n9007199254740993\n", r"beyond 2\^53, first 9007199254740993 in row 2"),
    "header alone": ("a,b\n", r"holds no rows of data, expected at least two"),
    "one row": ("a,b\n1,2\n", r"holds one row of data, expected at least two"),
    "nothing": ("", r"t\.csv is empty"),
    "line ends": ("\n\r\n", r"t\.csv is empty"),
    "header not UTF-8": (b"t\xe9,b\n1,2\n3,4\n", r"line 1 is not UTF-8 text"),
    "UTF-16": ("a,b\n1,2\n3,4\n".encode("utf-16"), r"not a text file \(or one in UTF-16"),
}


@pytest.mark.parametrize("case", TEXT_FAULTS)
def test_faults_of_text_are_named(write, case):
    content, message = TEXT_FAULTS[case]
    with pytest.raises(ValueError, match=message) as error:
        read_table(write("t.csv", content))
    assert "t.csv" in str(error.value)


def test_an_empty_last_cell_is_not_a_short_line(write):
    with pytest.raises(ValueError, match="column 'b' .* holds an empty .* in row 2"):
        read_table(write("t.tsv", "a\tb\n1\t2\n3\t\n"))


def test_integers_that_fit_are_read(write):
    table = read_table(write("t.csv", f"a,b\n{2**60},1e300\n-{2**53 - 1},7\n"))
    assert table.values.tolist() == [[2.0**60, 1e300], [-(2.0**53) + 1, 7.0]]


@pytest.mark.parametrize("keep", [5, 15, -9])
def test_a_cut_gzip_file(write, keep):
    whole = gzip.compress(b"a,b\n" + b"1,2\n" * 100)
    with pytest.raises(ValueError, match=r"t\.csv\.gz: truncated or not a gzip file"):
        read_table(write("t.csv.gz", whole[:keep]))


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4", ">f8", "i1", "i4", "i8", "u8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_every_kind(write_npy, kind, order):
    array = np.array([[0, 1], [1, 0], [1, 1]], dtype=kind, order=order)
    table = read_table(write_npy(array))
    assert table.columns == ("x1", "x2")
    assert table.values.tolist() == array.astype(float).tolist()
    assert table.values.dtype == (np.float32 if kind in ("f2", "f4", ">f4") else np.float64)
    assert table.values.flags.c_contiguous
    assert type(table.values) is np.ndarray


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(6), r"two-dimensional array of real numbers, got float64 of shape \[6\]"),
        (np.zeros((2, 2, 2)), r"got float64 of shape \[2, 2, 2\]"),
        (np.zeros((2, 2), complex), "got complex128"),
        (np.array([["a"], ["b"]]), "got <U1"),
        (np.zeros((2, 2), "M8[D]"), "got datetime64"),
        (np.zeros(2, [("a", "f8")]), "got .*'a'"),
        (np.array([[1, None]], dtype=object), r"truncated, or not a \.npy array of numbers"),
        (np.zeros((0, 2)), "holds no rows of data"),
        (np.zeros((1, 2)), "holds one row of data"),
        (np.zeros((2, 0)), "holds no columns"),
        (np.array([[0], [2**60 + 1]]), r"column 'x1' .* first 1152921504606846977 in row 2"),
        (np.array([[0], [2**63 + 1]], "u8"), r"column 'x1' .* first 9223372036854775809 in row 2"),
        (
            np.array([[1, 2], [3, np.nan]]),
            r"column 'x2' \(number 2\) holds an empty or NaN .* row 2",
        ),
        (np.array([[1, 2], [-np.inf, 3]], "f4"), r"column 'x1' \(number 1\) holds -inf in row 2"),
    ],
)
def test_faults_of_npy_are_named(write_npy, array, message):
    with pytest.raises(ValueError, match=message) as error:
        read_table(write_npy(array))
    assert "t.npy" in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 60, 130, -1])
def test_a_cut_npy(write_npy, keep):
    path = write_npy(np.zeros((10, 3)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t\.npy: truncated, or not a \.npy array of numbers"):
        read_table(path)


def test_npy_with_more_behind_it(write_npy):
    path = write_npy(np.zeros((10, 3)))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"t\.npy: goes on after the array"):
        read_table(path)


class Payload:
    def __reduce__(self):
        return (print, ("a stranger's code runs",))


def test_pickles_are_not_read(write_npy, capsys):
    array = np.empty((2, 1), dtype=object)
    array[:] = Payload()
    with pytest.raises(ValueError, match=r"t\.npy: truncated, or not"):
        read_table(write_npy(array))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        ((pa.float32(), pa.float16()), np.float32),
        ((pa.float32(), pa.float64()), np.float64),
        ((pa.int8(), pa.bool_()), np.float64),
        ((pa.uint64(), pa.decimal128(5, 1)), np.float64),
    ],
)
def test_parquet_of_every_kind(write_parquet, kinds, dtype):
    columns = [
        pa.array(c).cast(kind) for c, kind in zip(([1.0, 0.0], [0.0, 1.0]), kinds, strict=True)
    ]
    table = read_table(write_parquet(dict(zip("ab", columns, strict=True))))
    assert table.columns == ("a", "b")
    assert table.values.tolist() == [[1, 0], [0, 1]]
    assert table.values.dtype == dtype


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"a": [1, 2], "s": [None, "x"]},
            r"column 's' \(number 2\) holds text, first 'x' in row 2",
        ),
        ({"s": pa.array(["x", "y"]).dictionary_encode()}, "holds text, first 'x' in row 1"),
        (
            {"d": [datetime.date(2020, 1, 31)] * 2},
            r"column 'd' .* holds date32\[day\], first in row",
        ),
        ({"d": [[1.0], [2.0]]}, "column 'd' .* holds list<"),
        ({"a": [1, 2], "b": [1, None]}, r"column 'b' .* holds an empty .* in row 2 of the data; "),
        ({"a": [None, None]}, r"such cells are in 2 of 2 rows"),
        ({"a": [1.0, math.inf]}, r"column 'a' \(number 1\) holds inf in row 2"),
        ({"a": [1, -(2**53) - 1, None]}, "first -9007199254740993 in row 2"),
        ({"a": [1, 2], "__index_level_0__": [5, 3]}, "column 2 has no name, as the index"),
        ({"a": pa.array([], pa.float64())}, "holds no rows"),
        ({"a": [1.0]}, "holds one row"),
        ({}, "holds no columns"),
    ],
)
def test_faults_of_parquet_are_named(write_parquet, columns, message):
    with pytest.raises(ValueError, match=message) as error:
        read_table(write_parquet(columns))
    assert "t.parquet" in str(error.value)


def test_duplicate_names_in_parquet(tmp_path):
    pq.write_table(pa.table([[1.0, 2.0]] * 2, names=["a", "a"]), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="columns 1 and 2 are both named 'a'"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_cut_parquet(write_parquet, keep):
    path = write_parquet({"a": [1.0, 2.0]})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t\.parquet: truncated or not a parquet file"):
        read_table(path)


def test_what_is_no_table(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="no such file: .*nowhere.csv"):
        read_table(tmp_path / "nowhere.csv")
    with pytest.raises(
        ValueError, match=r"t\.xls: expected a file that ends in \.csv, .*\.parquet"
    ):
        read_table(write("t.xls", "a"))
    with pytest.raises(ValueError, match=r"t: expected a file that ends in"):
        read_table(write("t", "a"))


IN_ONE_FOLDER = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CELLS = st.sampled_from(["1", "-2.5", "3e2", "+4", "", "x", "inf", "1,5"])


@given(st.lists(st.lists(CELLS, min_size=1, max_size=3), min_size=1, max_size=6))
@IN_ONE_FOLDER
def test_text_is_read_whole_or_refused(tmp_path, rows):
    """No mixture of cells makes a table of other numbers than ``float`` finds."""
    path = tmp_path / "t.csv"
    path.write_text("a;b\n" + "\n".join(";".join(row) for row in rows) + "\n")
    good = all(len(row) == 2 and set(row).isdisjoint(["", "x", "inf", "1,5"]) for row in rows)
    if good and len(rows) > 1:
        assert read_table(path).values.tolist() == [[float(cell) for cell in row] for row in rows]
    else:
        with pytest.raises(ValueError, match=r"t\.csv"):
            read_table(path)
