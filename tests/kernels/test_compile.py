"""The kernels as machine code: every launch of the table, compiled ahead of time."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / "kernels" / "resources.json").read_text())
#: Bytes of shared memory that a program may take; the smallest GPUs of a family count.
SHARED = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX = {"sm80": "mma.sync", "sm90": "wgmma", "sm100": "tcgen05.mma", "gfx942": "mfma"}
NVIDIA = ("sm80", "sm90", "sm100")

by_family = pytest.mark.parametrize("family", SHARED)


@pytest.fixture(scope="module")
def results():
    """What the compiler says, by family. In processes of their own: here Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)

    def compiled(family):
        command = [sys.executable, str(ROOT / "aot.py"), family]
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return json.loads(run.stdout)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(SHARED, pool.map(compiled, SHARED), strict=True))


def is_hot(name):
    """What training in the usual dtypes runs. Not fp64, fp32 heads of 128, and the backward pass of
    kernel matrices with more than 8 features, which keeps a second road for near points at hand."""
    wide_heads = "float32" in name and "D=128" in name
    many_features = "gram_bwd" in name and "D=8 " not in name
    return not ("float64" in name or wide_heads or many_features)


@by_family
def test_every_row_of_the_table_is_compiled(results, family):
    assert results[family]["unused"] == []


@by_family
def test_noise_of_other_rows_is_the_same_binary(results, family):
    """A program that draws its share of every batch asks for other rows each time."""
    binaries = results[family]["binaries"]
    assert [count for name, count in binaries.items() if "[normal ranges]" in name] == [1]


@by_family
def test_shared_memory_is_within_the_limit(results, family):
    for name, found in results[family]["compiled"].items():
        assert found["shared"] <= SHARED[family], f"{family} {name}: {found}"


@pytest.mark.parametrize("family", NVIDIA)
def test_hot_kernels_spill_no_registers(results, family):
    for name, found in results[family]["compiled"].items():
        if is_hot(name):
            assert found["stack"] == 0, f"{family} {name}: {found}"


@by_family
def test_products_run_on_matrix_units(results, family):
    expected = {MATRIX[family], "mma.sync"} if family in NVIDIA else {MATRIX[family]}
    seen = set()
    for name, found in results[family]["compiled"].items():
        has_products = ("attention" in name and "delta" not in name) or "matmul" in name
        if has_products and "float64" not in name:
            assert expected & set(found["matrix"]), f"{family} {name}: {found}"
            seen |= set(found["matrix"])
    assert MATRIX[family] in seen


@pytest.mark.skipif(
    triton.__version__ != RECORD["triton"], reason=f"recorded with Triton {RECORD['triton']}"
)
@by_family
def test_resources_are_those_on_record(results, family):
    """A change is fine if it is meant: ``python tests/aot.py --record``, and look at the diff."""
    assert results[family]["compiled"] == RECORD[family]
