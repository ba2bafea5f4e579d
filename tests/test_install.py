"""What pip installs, with and without a compiler. The builds run in the tests' own environment."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build_wheel(tmp_path, **environment):
    """Builds a wheel of a copy of the sources; compilers are hidden."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "_C.*", "_native_note.txt", "build", "runs", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [*command, "--verbose", "--wheel-dir", str(tmp_path / "wheels"), str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(Path(sys.executable).parent), **environment},
    )


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("install")
    result = build_wheel(tmp_path)
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    return result, tmp_path / "site", names


def test_without_a_compiler_it_installs_and_says_so_in_one_line(without_compiler):
    result, _, names = without_compiler
    assert result.returncode == 0
    lines = result.stderr.splitlines() + result.stdout.splitlines()
    said = [line.strip() for line in lines if "installed without native CPU kernels" in line]
    assert said == ["flowops: installed without native CPU kernels: no C++ compiler was found"]
    assert not any("_C." in name for name in names)


def test_everything_lives_in_one_package(without_compiler):
    _, _, names = without_compiler
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flowops"}
    for name in ("flowops/api/tarflow.py", "flowops/bench/run.py", "flowops/kernels/__init__.py"):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_without_native_kernels_every_op_still_runs(without_compiler):
    _, site, _ = without_compiler
    code = """
import sys
# An editable installation beside this one would lend its native module.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, flowops
from flowops import dispatch
assert dispatch.backend_state("cpu") == (False, "no C++ compiler was found")
x, params = torch.randn(2, 5, 3), torch.randn(2, 5, 6, requires_grad=True)
z, logdet = flowops.affine_update(x, params)
(z.sum() + logdet.sum()).backward()
assert flowops.affine_inverse(z, params).sub(x).abs().max() < 1e-5
assert flowops.pad_noise(x, 2).shape == (2, 5, 5)
try:
    flowops.affine_update(x, params, backend="cpu")
except RuntimeError as error:
    assert str(error) == (
        "backend 'cpu' can't run affine_update: no C++ compiler was found"
    ), error
else:
    raise AssertionError("no error")
print(flowops.__file__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site))


def test_native_1_fails_loudly(tmp_path):
    result = build_wheel(tmp_path, FLOWOPS_NATIVE="1")
    assert result.returncode != 0
    text = result.stdout + result.stderr
    assert "flowops: native CPU kernels: no C++ compiler was found" in text


def test_native_0_skips(tmp_path):
    result = build_wheel(tmp_path, FLOWOPS_NATIVE="0", PATH=os.environ["PATH"])
    assert result.returncode == 0
    assert "skipped at installation (FLOWOPS_NATIVE=0)" in result.stdout + result.stderr


def test_another_value_is_refused(tmp_path):
    result = build_wheel(tmp_path, FLOWOPS_NATIVE="maybe")
    assert result.returncode != 0
    assert "FLOWOPS_NATIVE: expected auto, 1 or 0, got 'maybe'" in result.stdout + result.stderr
