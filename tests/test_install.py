"""What pip installs, with and without compilers. The builds run in the tests' own environment."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

from flowops import cuda_runtime, dispatch

ROOT = Path(__file__).parents[1]
MADE = ("*.fatbin", "fatbin.json", "_fatbin_note.txt", "_C.*", "_native_note.txt")
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))
TINY = 'extern "C" __global__ void tiny_kernel(float* x) { *x = 1; }\n'
WITH_NVCC = {"PATH": os.environ["PATH"], "FLOWOPS_NATIVE": "0"}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def copy_sources(tmp_path):
    """As in a checkout that was installed before, in place and elsewhere."""
    ignore = shutil.ignore_patterns(".*", *MADE, "build", "runs", "*.egg-info")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=ignore)
    for name in ("affine.fatbin", "fatbin.json"):
        (source / "csrc" / "cuda" / name).write_text("of an earlier installation")
    return source


def with_one_kernel(tmp_path, text):
    """What is quick to compile."""
    source = copy_sources(tmp_path)
    for file in (source / "csrc" / "cuda").glob("*.cu*"):
        file.unlink()
    (source / "csrc" / "cuda" / "tiny.cu").write_text(text)
    return source


def build_wheel(tmp_path, source=None, **environment):
    """Builds a wheel of a copy of the sources; compilers are hidden unless PATH is given."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    command += ["--verbose", "--wheel-dir", str(tmp_path / "wheels")]
    hidden = {"CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}
    hidden["PATH"] = str(Path(sys.executable).parent)
    if NVCC is not None and "PATH" in environment:
        hidden["CUDACXX"] = NVCC
    return subprocess.run(
        [*command, str(source or copy_sources(tmp_path))],
        capture_output=True,
        text=True,
        env={**os.environ, **hidden, **environment},
    )


def unpack(tmp_path):
    """Where the wheel's files are now, and their names."""
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        return tmp_path / "site", archive.namelist()


def run_in(site, code):
    """What ``code`` prints that imports flowops from ``site``."""
    # An editable installation beside it would lend its native module.
    alone = "import sys\nsys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    result = subprocess.run(
        [sys.executable, "-c", alone + code],
        capture_output=True,
        text=True,
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site), cuda_runtime.EMULATOR: ""},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def said(result, what):
    """The lines of pip's log that say it is missing."""
    lines = result.stderr.splitlines() + result.stdout.splitlines()
    prefix = f"flowops: installed without {what}: "
    return [line.strip().removeprefix(prefix) for line in lines if prefix in line]


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("install")
    result = build_wheel(tmp_path)
    return result, *unpack(tmp_path)


def test_without_a_compiler_it_installs_and_says_so_in_one_line(without_compiler):
    result, _, names = without_compiler
    assert result.returncode == 0
    assert said(result, "native CPU kernels") == ["no C++ compiler was found"]
    assert said(result, "fat binaries of the CUDA kernels") == ["no nvcc was found"]
    assert not any("_C." in name or "fatbin." in name for name in names)
    assert not any(name.endswith(".fatbin") for name in names)


def test_everything_lives_in_one_package(without_compiler):
    _, _, names = without_compiler
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flowops"}
    for name in ("flowops/api/tarflow.py", "flowops/bench/run.py", "flowops/kernels/__init__.py"):
        assert name in names
    assert {f"flowops/cuda/{name}" for name in cuda_runtime.sources()} < set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_without_native_kernels_every_op_still_runs(without_compiler):
    _, site, _ = without_compiler
    code = """
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
    assert run_in(site, code).startswith(str(site))


# --- one part without the other ------------------------------------------------------------------


def test_native_1_fails_loudly(tmp_path):
    result = build_wheel(tmp_path, FLOWOPS_NATIVE="1")
    assert result.returncode != 0
    text = result.stdout + result.stderr
    assert "flowops: native CPU kernels: no C++ compiler was found" in text


def test_cuda_1_fails_loudly(tmp_path):
    result = build_wheel(tmp_path, FLOWOPS_NATIVE="0", FLOWOPS_CUDA="1")
    assert result.returncode != 0
    text = result.stdout + result.stderr
    assert "flowops: fat binaries of the CUDA kernels: no nvcc was found" in text


def test_0_skips(tmp_path):
    result = build_wheel(tmp_path, **WITH_NVCC, FLOWOPS_CUDA="0")
    assert result.returncode == 0
    assert said(result, "native CPU kernels") == ["skipped at installation (FLOWOPS_NATIVE=0)"]
    reason = "skipped at installation (FLOWOPS_CUDA=0)"
    assert said(result, "fat binaries of the CUDA kernels") == [reason]


@pytest.mark.parametrize("variable", ["FLOWOPS_NATIVE", "FLOWOPS_CUDA"])
def test_another_value_is_refused(tmp_path, variable):
    result = build_wheel(tmp_path, **{variable: "maybe"})
    assert result.returncode != 0
    assert f"{variable}: expected auto, 1 or 0, got 'maybe'" in result.stdout + result.stderr


@needs_nvcc
def test_fat_binaries_need_no_native_kernels(tmp_path):
    (tmp_path / "without" / "pybind11").mkdir(parents=True)
    (tmp_path / "without" / "pybind11" / "__init__.py").write_text("raise ImportError")
    environment = {**WITH_NVCC, "FLOWOPS_NATIVE": "auto", "FLOWOPS_CUDA": "1"}
    environment["PYTHONPATH"] = str(tmp_path / "without")
    result = build_wheel(tmp_path, with_one_kernel(tmp_path, TINY), **environment)
    assert result.returncode == 0
    assert said(result, "native CPU kernels") == [
        "pybind11 is not installed (it is with build isolation)"
    ]
    site, names = unpack(tmp_path)
    assert "flowops/cuda/tiny.fatbin" in names
    assert not (site / "flowops" / "cuda" / "_fatbin_note.txt").exists()


@needs_nvcc
def test_a_kernel_that_does_not_compile_is_named(tmp_path):
    source = with_one_kernel(tmp_path, TINY.replace("1", "does_not_exist"))
    result = build_wheel(tmp_path, source, **WITH_NVCC)
    assert result.returncode == 0
    (reason,) = said(result, "fat binaries of the CUDA kernels")
    assert "tiny.cu" in reason
    assert 'identifier "does_not_exist" is undefined' in reason
    site, names = unpack(tmp_path)
    assert (site / "flowops" / "cuda" / "_fatbin_note.txt").read_text().strip() == reason
    assert not any(name.endswith((".fatbin", "fatbin.json")) for name in names)


# --- fat binaries --------------------------------------------------------------------------------


@needs_nvcc
def test_a_fat_binary_is_used_until_its_sources_change(tmp_path):
    result = build_wheel(tmp_path, with_one_kernel(tmp_path, TINY), **WITH_NVCC, FLOWOPS_CUDA="1")
    assert result.returncode == 0, result.stdout
    site, _ = unpack(tmp_path)
    code = """
from flowops import cuda_runtime
binary = cuda_runtime.prebuilt("tiny")
assert cuda_runtime._kernels_in(binary.read_bytes()) == ["tiny_kernel"]
try:
    print(cuda_runtime.origin())
    with open(cuda_runtime.directory() / "tiny.cu", "a") as file:
        file.write("// edited\\n")
    cuda_runtime.sources.cache_clear()
    assert cuda_runtime.prebuilt("tiny") is None
    print(cuda_runtime.origin())
except RuntimeError as error:
    print(error)
"""
    origins = run_in(site, code).splitlines()
    made = json.loads((site / "flowops" / "cuda" / "fatbin.json").read_text())
    assert set(made["architectures"]) >= {"sm_80", "sm_90a"}
    if cupy_loads():
        architectures = ", ".join(made["architectures"])
        assert origins[0].endswith(f", fat binary of nvcc {made['nvcc']} ({architectures})")
        assert "no fat binary: it was made of other sources" in origins[1]
    else:
        assert "CuPy does not load" in origins[0]


def test_installation_and_runtime_agree_on_the_digest(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    cuda_runtime.sources.cache_clear()
    assert runpy.run_path(str(ROOT / "setup.py"))["_cuda_digest"]() == cuda_runtime.digest()


def test_nvcc_and_nvrtc_get_the_same_options():
    command = f"${{NVCC}} {' '.join(cuda_runtime.OPTIONS)} -fatbin"
    assert command in (ROOT / "CMakeLists.txt").read_text()


def test_a_source_distribution_has_all_sources_and_nothing_that_was_built(tmp_path):
    source = copy_sources(tmp_path)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
    )
    with tarfile.open(tmp_path / result.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("cpu", "cuda"):
        files = [f for f in (source / "csrc" / folder).iterdir() if f.suffix not in (".pyc", "")]
        expected = {f"csrc/{folder}/{f.name}" for f in files if "fatbin" not in f.name}
        assert expected <= names
    assert "CMakeLists.txt" in names
    assert not any("fatbin" in name or name.endswith((".pyc", ".so")) for name in names)


# --- what flowops doctor says --------------------------------------------------------------------


def cupy_loads():
    try:
        import cupy  # noqa: F401
    except ImportError:
        return False
    return True


def test_doctor_tells_why_there_is_no_fat_binary(without_compiler):
    _, site, _ = without_compiler
    text = run_in(site, "from flowops.api.cli import main\nmain(['doctor'])")
    (line,) = [line for line in text.splitlines() if line.startswith("  cuda   ")]
    if cupy_loads():
        assert "no fat binary: no nvcc was found" in line
    else:
        assert "the package cupy is not installed: pip install 'flowops[cuda13]'" in line


@pytest.fixture
def gpu(monkeypatch):
    """PyTorch sees a GPU; backends are looked at anew."""
    if not cupy_loads():
        pytest.skip("no CuPy")
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(dispatch.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(dispatch.torch.version, "hip", None)
    monkeypatch.delenv(cuda_runtime.EMULATOR, raising=False)
    dispatch._gpu_state.cache_clear()
    yield monkeypatch
    dispatch._gpu_state.cache_clear()


def no_nvrtc():
    raise RuntimeError("loading NVRTC: no such file: libnvrtc.so.13\nand more")


def test_state_with_fat_binaries_needs_no_nvrtc(tmp_path, gpu):
    gpu.setattr(cuda_runtime, "directory", lambda: tmp_path)
    gpu.setattr(cuda_runtime, "_nvrtc", no_nvrtc)
    made = {"digest": cuda_runtime.digest(), "nvcc": "13.0", "architectures": ["sm_80", "sm_90a"]}
    (tmp_path / "fatbin.json").write_text(json.dumps(made))
    usable, text = dispatch.backend_state("cuda")
    assert usable
    assert text.endswith(", fat binary of nvcc 13.0 (sm_80, sm_90a) on a GPU")


def test_state_without_any_compiler(tmp_path, gpu):
    gpu.setattr(cuda_runtime, "directory", lambda: tmp_path)
    gpu.setattr(cuda_runtime, "_nvrtc", no_nvrtc)
    (tmp_path / "_fatbin_note.txt").write_text("no nvcc was found\n")
    usable, text = dispatch.backend_state("cuda")
    assert not usable
    assert text.startswith("there is no fat binary: no nvcc was found; and CuPy ")
    assert text.endswith(" finds no NVRTC: loading NVRTC: no such file: libnvrtc.so.13")


def test_state_with_nvrtc_alone(tmp_path, gpu):
    gpu.setattr(cuda_runtime, "directory", lambda: tmp_path)
    gpu.setattr(cuda_runtime, "_nvrtc", lambda: type("Nvrtc", (), {"getVersion": lambda: (13, 5)}))
    gpu.setenv(cuda_runtime.CACHE, "/somewhere")
    usable, text = dispatch.backend_state("cuda")
    assert usable
    assert ", NVRTC 13.5, kept in /somewhere (no fat binary: not built; reinstall" in text


def test_state_with_a_broken_cupy(tmp_path, gpu):
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("raise ImportError('libcuda.so.1\\nand more')")
    gpu.delitem(sys.modules, "cupy")
    gpu.syspath_prepend(tmp_path)
    usable, text = dispatch.backend_state("cuda")
    assert (usable, text) == (False, "CuPy does not load: libcuda.so.1")


def test_state_of_a_machine_without_a_gpu_repeats_pytorch(gpu):
    def init():
        raise RuntimeError("The NVIDIA driver is too old (found version 11040). Please update it.")

    gpu.setattr(dispatch.torch.cuda, "is_available", lambda: False)
    gpu.setattr(dispatch.torch.cuda, "init", init)
    usable, text = dispatch.backend_state("cuda")
    assert not usable
    assert text == (
        "no CUDA device is visible to PyTorch: The NVIDIA driver is too old (found version 11040)"
    )
