import csv
import json
import sys

import pytest

from flowops.bench import plot, report
from flowops.bench.job import OURS, Row

ENV = {"kind": "cpu", "device": "A CPU", "torch": "2.13", "threads": 2, "isa": "v4 of v3, v4"}


def rows(op="affine", ours=100.0, eager=300.0, shape="8x8", git="abc1234", **options):
    shared = {"bound": "bytes", "amount": 1e6, "floor_us": 50.0, "first_s": 0.1, "git": git}
    label = (op, "forward", shape, "fp32")

    def row(name, role, us):
        times = {"p20_us": 0.9 * us, "p50_us": us, "p80_us": 1.1 * us, "e2e_us": us}
        return Row(*label, name, role, **times, **shared, **options)

    return [
        row(OURS, "ours", ours),
        row("eager", "eager", eager),
        row("torch.compile", "other", 80.0),
        Row(*label, "KeOps", "other", "missing: pykeops", git=git),
    ]


def test_a_partial_run_replaces_the_rows_of_its_ops_alone():
    stored = rows("affine") + rows("gram") + rows("gram", shape="16x16")
    merged = report.merge(stored, rows("gram", ours=90.0, git="def5678"))
    assert [row.op for row in merged] == ["affine"] * 4 + ["gram"] * 4
    assert {row.git for row in merged if row.op == "affine"} == {"abc1234"}
    assert {row.git for row in merged if row.op == "gram"} == {"def5678"}
    assert {row.shape for row in merged} == {"8x8"}  # 16x16 is no job any more


def test_what_was_not_run_leaves_the_stored_job_whole():
    stored = rows("affine") + rows("gram")
    skipped = [
        Row("gram", "forward", shape, "fp32", OURS, "ours", "not run: the budget of 1 s is spent")
        for shape in ("8x8", "16x16")
    ]
    merged = report.merge(stored, skipped)
    assert merged[:8] == stored
    assert [row.shape for row in merged[8:]] == ["16x16"]


def test_results_on_disk(tmp_path):
    for _ in range(2):
        report.store(tmp_path, ENV, {"copy": 1e10}, rows(), rows())
    with open(tmp_path / "all.csv", newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 8
    assert records[0]["provider"] == OURS
    assert records[0]["env_device"] == "A CPU"
    assert report.load(tmp_path) == (ENV, rows())
    assert json.loads((tmp_path / "last.json").read_text())["ceilings"] == {"copy": 1e10}
    assert report.load(tmp_path / "none") == ({}, [])


def test_the_readme_has_a_table_for_every_device(tmp_path):
    results = tmp_path / "results"
    report.store(results / "a", ENV, {}, rows() + rows("gram"), [])
    gpu = {**ENV, "kind": "cuda", "device": "A GPU", "driver": "570", "power_limit": "700 W"}
    failed = rows("gram")
    failed[0] = Row("gram", "forward", "8x8", "fp32", OURS, "ours", "FAILED: output 0")
    report.store(results / "b", gpu, {}, failed, [])
    (results / "empty").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    report.write_readme(readme, results)
    text = readme.read_text()
    line = "| affine | forward | 8x8, fp32 | 100 µs | 80 µs, torch.compile | 0.80x | 50 % |"
    assert line in text
    assert "| gram | forward | 8x8, fp32 | FAILED: output 0 |" in text
    assert "A CPU, torch 2.13, 2 threads, v4; commit abc1234:" in text
    assert "A GPU, torch 2.13, driver 570, 700 W; commit" in text
    assert text.count("| op | job |") == 2
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="markers .* are gone"):
        report.write_readme(readme, results)


def test_regressions_on_a_gpu_are_those_of_time():
    stored = rows(ours=100.0)
    assert report.regressions(stored, rows(ours=104.0, eager=100.0), "cuda") == []
    (line,) = report.regressions(stored, rows(ours=110.0, eager=900.0), "cuda")
    assert line == "affine forward 8x8 fp32: 10 % slower than at abc1234"


def test_regressions_on_a_cpu_are_those_of_the_ratio():
    stored = rows(ours=100.0, eager=300.0)
    assert report.regressions(stored, rows(ours=200.0, eager=600.0), "cpu") == []
    (line,) = report.regressions(stored, rows(ours=110.0, eager=300.0), "cpu")
    assert "10 % slower against eager" in line


def test_failed_and_missing_rows_are_no_regressions():
    failed = [Row(*row.key, row.role, "FAILED: x") for row in rows()]
    assert report.regressions(rows(), failed, "cuda") == []
    assert report.regressions(failed, rows(ours=1e9), "cuda") == []


def test_details_of_a_row():
    ours, *_, missing = rows(peak_mb=12.0, error=1e-7)
    line = report.details(ours)
    for part in ("100 µs (90 µs to 110 µs)", "10 GB/s, 50 % of floor", "peak 12 MB", "1e-07"):
        assert part in line
    assert report.details(missing).split() == ["KeOps", "missing:", "pykeops"]


def test_plots(tmp_path):
    plot.plot(
        rows() + rows("gram") + rows("gram", shape="16x16"), tmp_path, "A", ["affine", "gram"]
    )
    for op in ("affine", "gram"):
        assert (tmp_path / f"{op}.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_is_a_line_and_no_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot.plot(rows(), tmp_path, "A", ["affine"])
    assert capsys.readouterr().out == "no plots: matplotlib is not installed\n"
    assert list(tmp_path.iterdir()) == []
