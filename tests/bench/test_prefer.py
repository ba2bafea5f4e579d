import json

import pytest

from flowops.bench import prefer, run
from flowops.bench.job import OURS, Row


def job(op, elements, triton, cuda, mode="forward", dtype="float32"):
    """A job's rows: what auto took, Triton, CUDA (None: it could not run) and a baseline."""
    label = (op, mode, f"{elements}", dtype)
    made = {OURS: triton, f"{OURS}, triton": triton, f"{OURS}, cuda": cuda, "eager": 100.0}
    return [
        Row(
            *(*label, provider, "other", "ok" if time else "not available"),
            p50_us=time,
            elements=elements,
            first_dtype=dtype,
            git="abc",
        )
        for provider, time in made.items()
    ]


def test_a_range_is_where_cuda_won_every_job():
    rows = [
        *job("affine", 100, 10.0, 5.0),
        *job("affine", 200, 10.0, 8.0),
        *job("affine", 200, 10.0, 9.0, "forward + backward"),
        *job("affine", 300, 10.0, 9.9),  # not by enough
        *job("affine", 400, 10.0, 2.0),
        *job("affine", 400, 10.0, 20.0, "forward + backward"),
        *job("affine", 500, 10.0, 4.0),
        *job("affine", 100, 10.0, 20.0, dtype="bfloat16"),
        *job("gram", 100, 10.0, None),
        *job("attention", 100, 10.0, 5.0),  # no CUDA kernel of its own
    ]
    found = prefer.preferences("a GPU", rows)
    assert [(r["family"], r["dtype"], r["elements"], r["ratio"]) for r in found] == [
        ("affine", "float32", [100, 200], 1.111),
        ("affine", "float32", [500, 500], 2.5),
    ]
    assert all(r["device"] == "a GPU" and r["git"] == "abc" for r in found)


def test_writing_replaces_the_rows_of_what_was_run(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text("[]\n")
    prefer.write(path, "a GPU", [*job("affine", 100, 10.0, 5.0), *job("gram", 9, 10.0, 5.0)])
    prefer.write(path, "another", job("affine", 100, 10.0, 5.0))
    prefer.write(path, "a GPU", job("affine", 100, 10.0, 20.0))
    kept = [(row["device"], row["family"]) for row in json.loads(path.read_text())]
    assert kept == [("a GPU", "se_gram_matmul"), ("another", "affine")]
    assert {file.name for file in tmp_path.iterdir()} == {"measured.json"}


def test_preferences_come_from_a_gpu():
    with pytest.raises(ValueError, match="prefer: expected a run on a GPU"):
        run.parse(["--device", "cpu", "--prefer"])
