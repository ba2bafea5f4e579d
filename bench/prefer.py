"""From measured rows to ``flowops/measured.json``: where ``auto`` takes CUDA before Triton."""

import json
import os
from itertools import groupby
from pathlib import Path

from .job import BY_NAME, Row
from .report import by_job

#: Ops of the benchmark -> families of registered ops (``flowops.measured.family``).
FAMILIES = {
    "affine": "affine",
    "padding": "pad_noise",
    "patch_attention": "causal_patch_attention",
    "gram": "se_gram_matmul",
    "coupling": "kernel_coupling",
    "sampling": "decode_block",
}
#: CUDA has to win by more than two runs of the same program differ.
MARGIN = 1.03


def preferences(device: str, rows: list[Row]) -> list[dict]:
    """Ranges of sizes from the smallest to the largest at which CUDA won every job, with no loss
    between; sizes that were not measured are outside."""
    found = []
    contests = sorted(_contests(rows), key=lambda c: (c[0], c[1]))
    for (family, dtype), group in groupby(contests, key=lambda c: c[0]):
        sizes = [
            (elements, [(ratio, git) for *_, ratio, git in jobs])
            for elements, jobs in groupby(group, key=lambda c: c[1])
        ]
        wins = groupby(sizes, key=lambda size: all(ratio >= MARGIN for ratio, _ in size[1]))
        for won, run in wins:
            if not won:
                continue
            run = list(run)
            ratio, git = min(job for _, jobs in run for job in jobs)
            found.append(
                {
                    "device": device,
                    "family": family,
                    "dtype": dtype,
                    "elements": [run[0][0], run[-1][0]],
                    "ratio": round(ratio, 3),
                    "git": git,
                }
            )
    return found


def _contests(rows: list[Row]):
    """((family, dtype), elements, Triton's time over CUDA's, commit) of jobs that both did."""
    for (op, *_), job in by_job(rows).items():
        times = {row.provider: row for row in job if row.ok}
        triton, cuda = (times.get(BY_NAME[name]) for name in ("triton", "cuda"))
        if op in FAMILIES and triton and cuda and cuda.elements:
            ratio = triton.p50_us / cuda.p50_us
            yield (FAMILIES[op], cuda.first_dtype), cuda.elements, ratio, cuda.git


def write(path: Path, device: str, rows: list[Row]) -> None:
    """Replaces this device's rows of the ops that were run; the others stay."""
    ran = {FAMILIES[row.op] for row in rows if row.op in FAMILIES}
    kept = [
        row
        for row in json.loads(path.read_text())
        if row["device"] != device or row["family"] not in ran
    ]
    table = kept + preferences(device, rows)
    text = ",\n".join(f"  {json.dumps(row)}" for row in table)
    part = path.with_suffix(".part")
    part.write_text(f"[\n{text}\n]\n" if table else "[]\n")
    os.replace(part, path)
