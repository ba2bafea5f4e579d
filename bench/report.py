"""Results on disk, the comparison with what was stored before, tables and plots."""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from .job import OURS, Row

README_BLOCK = re.compile(r"(<!-- bench:begin -->\n).*?(<!-- bench:end -->)", re.DOTALL)
NOT_RUN = "not run"
REGRESSION = 1.05


# --- the stored run of a device ------------------------------------------------------------------


def load(folder: Path) -> tuple[dict, list[Row]]:
    """Environment and rows of ``last.json``; nothing where there is none."""
    path = folder / "last.json"
    if not path.exists():
        return {}, []
    last = json.loads(path.read_text())
    known = {field.name for field in fields(Row)}
    rows = [{k: v for k, v in row.items() if k in known} for row in last["rows"]]
    return last["environment"], [Row(**row) for row in rows]


def merge(stored: list[Row], fresh: list[Row]) -> list[Row]:
    """The stored rows with those of the fresh run's ops replaced; a job that was not run leaves the
    stored one in place. Rows of a job come from one run: they are only compared with each other."""
    before, ops = by_job(stored), list(dict.fromkeys(row.op for row in [*stored, *fresh]))
    replaced = {row.op for row in fresh}
    rows = [row for row in stored if row.op not in replaced]
    for key, job in by_job(fresh).items():
        skipped = any(row.status.startswith(NOT_RUN) for row in job)
        rows += before.get(key, job) if skipped else job
    return sorted(rows, key=lambda row: ops.index(row.op))


def store(folder: Path, env: dict, ceilings: dict, rows: list[Row], fresh: list[Row]) -> None:
    """Writes ``rows`` as the last state of the device and appends ``fresh`` to all runs."""
    folder.mkdir(parents=True, exist_ok=True)
    last = {"environment": env, "ceilings": ceilings, "rows": [asdict(r) for r in rows]}
    (folder / "last.json").write_text(json.dumps(last, indent=1) + "\n")
    record = {f"env_{key}": value for key, value in env.items()}
    path = folder / "all.csv"
    header = [*(field.name for field in fields(Row)), *record]
    if path.exists():
        with open(path, newline="") as file:
            header = next(csv.reader(file))
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, header, restval="", extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows({**asdict(row), **record} for row in fresh)


def regressions(stored: list[Row], fresh: list[Row], device: str) -> list[str]:
    """Our rows that got more than 5 % slower: on a GPU in time, on a CPU, whose clock is shared, in
    the ratio of 20th percentiles to the eager baseline of the same run."""
    lines = []
    old, new = _ours_and_eager(stored), _ours_and_eager(fresh)
    for key in old.keys() & new.keys():
        (before, eager_before), (after, eager_after) = old[key], new[key]
        if device == "cuda":
            change = after.p50_us / before.p50_us
        elif eager_before and eager_after:
            change = after.p20_us / eager_after.p20_us / (before.p20_us / eager_before.p20_us)
        else:
            continue
        if change > REGRESSION:
            what = "" if device == "cuda" else " against eager"
            lines.append(
                f"{' '.join(key)}: {100 * (change - 1):.0f} % slower{what} than at {before.git}"
            )
    return sorted(lines)


def _ours_and_eager(rows: list[Row]) -> dict[tuple, tuple[Row, Row | None]]:
    jobs = by_job(row for row in rows if row.ok)
    found = {key: {row.role: row for row in job} for key, job in jobs.items()}
    return {key: (r["ours"], r.get("eager")) for key, r in found.items() if "ours" in r}


def by_job(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    jobs: dict[tuple, list[Row]] = {}
    for row in rows:
        jobs.setdefault(row.key[:-1], []).append(row)
    return jobs


# --- tables --------------------------------------------------------------------------------------


def summary(rows: list[Row]) -> list[list[str]]:
    """One line a job: ours, the best baseline, their ratio, % of floor. Losses stay in."""
    table = []
    for (op, job, shape, dtype), group in by_job(rows).items():
        label = [op, job, f"{shape}, {dtype}"]
        ours = [row for row in group if row.ok and row.provider.startswith(OURS)]
        theirs = [row for row in group if row.ok and not row.provider.startswith(OURS)]
        if not ours:
            failed = next((row for row in group if row.provider == OURS), group[0])
            table.append([*label, failed.status, "", "", ""])
            continue
        best = min(ours, key=lambda row: row.p50_us)
        floor = f"{100 * best.of_floor:.0f} %" if best.of_floor else ""
        name = best.provider.removeprefix(OURS).strip(", ")
        line = [*label, duration(best.p50_us) + (f" ({name})" if name else "")]
        if theirs:
            baseline = min(theirs, key=lambda row: row.p50_us)
            line += [f"{duration(baseline.p50_us)}, {baseline.provider}"]
            line += [f"{baseline.p50_us / best.p50_us:.2f}x"]
        else:
            line += ["", ""]
        table.append([*line, floor])
    return table


HEADINGS = ["op", "job", "shape", "ours", "best baseline", "ratio", "% of floor"]


def markdown(folders: list[Path]) -> str:
    """The tables of the README: one for every device with a stored run."""
    parts = []
    for folder in folders:
        env, rows = load(folder)
        if not rows:
            continue
        lines = [f"| {' | '.join(HEADINGS)} |", "| --- | --- | --- | ---: | --- | ---: | ---: |"]
        lines += [f"| {' | '.join(line)} |" for line in summary(rows)]
        shas = ", ".join(dict.fromkeys(row.git for row in rows if row.git))
        parts.append(f"{describe(env)}; commit {shas}:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def describe(env: dict) -> str:
    parts = [env["device"], f"torch {env['torch']}"]
    if env["kind"] == "cuda":
        parts += [f"driver {env.get('driver', 'unknown')}", env.get("power_limit", "")]
    else:
        parts += [f"{env['threads']} threads", env["isa"].split(" of ")[0]]
    return ", ".join(part for part in parts if part)


def write_readme(path: Path, results: Path) -> None:
    """Puts the tables of the stored runs between the markers in the README."""
    text = path.read_text()
    if not README_BLOCK.search(text):
        raise ValueError(
            f"{path}: the markers <!-- bench:begin --> and <!-- bench:end --> are gone"
        )
    table = markdown(sorted(results.iterdir()))
    path.write_text(README_BLOCK.sub(lambda match: match[1] + table + match[2], text))


def plain(table: list[list[str]], headings: list[str] = HEADINGS) -> str:
    """Columns of text."""
    lines = [headings, *table]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def details(row: Row) -> str:
    """A line of the log: all columns of one row."""
    if not row.ok:
        return f"  {row.provider:32s} {row.status}"
    cells = [
        f"{duration(row.p50_us)} ({duration(row.p20_us)} to {duration(row.p80_us)})",
        f"end to end {duration(row.e2e_us)}",
        f"first call {row.first_s:.3g} s",
    ]
    if row.of_floor:
        cells.append(f"{rate(row)}, {100 * row.of_floor:.0f} % of floor")
    if row.peak_mb is not None:
        cells.append(f"peak {row.peak_mb:.0f} MB")
    if row.error is not None:
        cells.append(f"error {row.error:.0e}")
    return f"  {row.provider:32s} {'; '.join(cells)}"


def duration(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs"


def rate(row: Row) -> str:
    """What sets the floor, a second."""
    unit, size = {"bytes": ("GB/s", 1e9), "flops": ("TFLOP/s", 1e12), "exps": ("Gexp/s", 1e9)}[
        row.bound
    ]
    return f"{row.amount / (1e-6 * row.p50_us) / size:.3g} {unit}"
