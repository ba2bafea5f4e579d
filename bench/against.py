"""``--against GIT_REF``: our own times here and at another commit, in turns."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from . import report
from .job import Row

ROUNDS = 2  # there, here, there, here
_PACKAGE = "flowops_bench_copy"
_HEADINGS = ["op", "job", "shape", "here"]


def compare(ref: str, ops: list[str], device: str, seconds: float, budget: float | None) -> int:
    """Prints a line a job; returns 1 where a job of ours fails here."""
    folder = Path(tempfile.mkdtemp(prefix="flowops-against-"))
    tree = folder / "tree"
    try:
        _run("git", "worktree", "add", "--detach", str(tree), ref)
        site = build(tree, folder / "site")
        # Both sides run the jobs of this checkout, from a copy outside of any flowops.
        shutil.copytree(
            Path(__file__).parent,
            folder / _PACKAGE,
            ignore=shutil.ignore_patterns("results", "__pycache__", "demo.py"),
        )
        there, here = [], []
        for _ in range(ROUNDS):
            there.append(work(folder, site, ops, device, seconds, budget))
            here.append(work(folder, None, ops, device, seconds, budget))
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["git", "worktree", "prune"], capture_output=True)
    table, failed = ratios(here, there)
    print("\n" + report.plain(table, [*_HEADINGS, ref, f"here/{ref}"]))
    return int(failed)


def build(tree: Path, site: Path) -> Path:
    """Installs the flowops of ``tree`` into ``site``: with the tools that are here, or else with
    those that pip brings."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    try:
        _run(*install, str(site), "--no-build-isolation", str(tree))
    except ValueError:
        shutil.rmtree(site, ignore_errors=True)
        _run(*install, str(site), str(tree))
    return site


def work(folder: Path, site: Path | None, ops, device, seconds, budget) -> list[Row]:
    """One run of the worker; ``site`` holds its flowops, None for the one that is installed."""
    out = folder / "rows.json"
    out.unlink(missing_ok=True)
    paths = [str(folder), *([str(site)] if site else [])]
    inherited = os.environ.get("PYTHONPATH")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths + ([inherited] if inherited else []))}
    command = [sys.executable, "-m", f"{_PACKAGE}.worker", *ops, "--device", device]
    command += ["--seconds", str(seconds), "--out", str(out)]
    command += ["--isolated"] if site else []
    command += ["--budget", str(budget / (2 * ROUNDS))] if budget else []
    _run(*command, env=env, cwd=folder)
    result = json.loads(out.read_text())
    if site is not None and not Path(result["flowops"]).is_relative_to(site):
        raise ValueError(f"against: expected the flowops of {site}, got {result['flowops']}")
    return [Row(**row) for row in result["rows"]]


def ratios(here: list[list[Row]], there: list[list[Row]]) -> tuple[list[list[str]], bool]:
    """The table, medians over the rounds, and whether a job failed here."""
    table, failed = [], False
    others: dict[tuple, list[Row]] = {}
    for rows in there:
        for row in rows:
            others.setdefault(row.key, []).append(row)
    for key in dict.fromkeys(row.key for rows in here for row in rows):
        ours = [row for rows in here for row in rows if row.key == key]
        op, job, shape, dtype, _ = key
        label = [op, job, f"{shape}, {dtype}"]
        theirs = others.get(key, [])
        failed |= any(row.status.startswith("FAILED") for row in ours)
        mine, them = _median(ours), _median(theirs)
        ratio = f"{mine / them:.2f}" if mine and them else ""
        table.append([*label, _cell(ours, mine), _cell(theirs, them), ratio])
    return table, failed


def _median(rows: list[Row]) -> float | None:
    times = [row.p50_us for row in rows]
    return statistics.median(times) if times and None not in times else None


def _cell(rows: list[Row], median: float | None) -> str:
    if median is not None:
        return report.duration(median)
    return next((row.status for row in rows if not row.ok), "not there")


def _run(*command: str, **options) -> None:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip().splitlines() or ["no output"]
        raise ValueError(f"against: {' '.join(command[:4])} failed: {said[-1]}")
