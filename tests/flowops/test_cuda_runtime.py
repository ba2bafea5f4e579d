"""Compiling, keeping, loading and launching, with a stand-in for the driver of a GPU."""

import hashlib
import json
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch

import flowops
from flowops import cuda_runtime as runtime
from flowops import dispatch

ARCH = "sm_90a"


def nvrtc_or_skip():
    pytest.importorskip("cupy")
    try:
        runtime._nvrtc()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(runtime.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(monkeypatch):
    """One source with a header, quick to compile."""
    texts = {
        "tiny.cu": '#include "tiny.cuh"\nextern "C" __global__ void tiny(float* x) { *x = ONE; }\n',
        "tiny.cuh": "#define ONE 1.0f\n",
    }
    monkeypatch.setattr(runtime, "sources", lambda: texts)
    monkeypatch.setattr(runtime, "prebuilt", lambda source: None)
    return texts


# --- compiling -----------------------------------------------------------------------------------


def test_binaries_are_kept_by_source_headers_and_architecture(cache, tiny):
    nvrtc_or_skip()
    first = runtime.compile_source("tiny", ARCH)
    assert runtime._kernels_in(first) == ["tiny"]
    assert len(list(cache.iterdir())) == 1
    runtime.compile_source("tiny", "sm_80")
    tiny["tiny.cuh"] = "#define ONE 2.0f\n"
    assert runtime.compile_source("tiny", ARCH) != first
    assert {file.suffix for file in cache.iterdir()} == {".cubin"}
    assert len(list(cache.iterdir())) == 3


def test_what_was_kept_is_not_compiled_again(cache, tiny, monkeypatch):
    nvrtc_or_skip()
    first = runtime.compile_source("tiny", ARCH)
    nvrtc = runtime._nvrtc()

    class NoCompiler:
        getVersion = staticmethod(nvrtc.getVersion)

    monkeypatch.setattr(runtime, "_nvrtc", NoCompiler)
    assert runtime.compile_source("tiny", ARCH) == first
    (file,) = cache.iterdir()
    for damaged in (file.read_bytes()[:-1], b"", b"\0" * 100):
        file.write_bytes(damaged)
        with pytest.raises(AttributeError):  # it compiles
            runtime.compile_source("tiny", ARCH)


def test_the_compilers_log_is_in_the_error(cache, tiny):
    nvrtc_or_skip()
    tiny["tiny.cuh"] = "#define ONE does_not_exist\n"
    with pytest.raises(RuntimeError) as error:
        runtime.compile_source("tiny", ARCH)
    assert f"compiling csrc/cuda/tiny.cu for {ARCH} with NVRTC" in str(error.value)
    assert 'identifier "does_not_exist" is undefined' in str(error.value)
    assert not cache.exists()


def test_an_unwritable_cache_warns_once_and_compiles_all_the_same(tmp_path, tiny, monkeypatch):
    nvrtc_or_skip()
    (tmp_path / "file").touch()
    monkeypatch.setenv(runtime.CACHE, str(tmp_path / "file" / "cache"))
    runtime._warn_of_cache.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"can't be kept in .*file.cache .*FLOWOPS_CACHE"):
        first = runtime.compile_source("tiny", ARCH)
    assert runtime.compile_source("tiny", ARCH) == first  # warnings are errors here


def test_processes_that_compile_at_once_agree(tmp_path):
    nvrtc_or_skip()
    code = f"""
import hashlib, os
os.environ["FLOWOPS_CACHE"] = {str(tmp_path / "cache")!r}
from flowops import cuda_runtime
text = 'extern "C" __global__ void tiny(float* x) {{ *x = 1; }}'
cuda_runtime.sources = lambda: {{"tiny.cu": text}}
print(hashlib.sha256(cuda_runtime.compile_source("tiny", "{ARCH}")).hexdigest())
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    digests = {process.communicate(timeout=300)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(digests) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert hashlib.sha256(file.read_bytes()[32:]).hexdigest() == digests.pop().strip()


def test_a_fat_binary_counts_while_its_sources_are_the_same(tmp_path, tiny, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "directory", lambda: tmp_path)
    monkeypatch.setattr(runtime, "sources", lambda: tiny)
    assert runtime.prebuilt("tiny") is None
    (tmp_path / "tiny.fatbin").write_bytes(b"code")
    assert runtime.prebuilt("tiny") is None
    (tmp_path / "fatbin.json").write_text(json.dumps({"digest": runtime.digest()}))
    assert runtime.prebuilt("tiny") == tmp_path / "tiny.fatbin"
    assert runtime.prebuilt("other") is None
    tiny["tiny.cuh"] = "#define ONE 2.0f\n"
    assert runtime.prebuilt("tiny") is None
    (tmp_path / "fatbin.json").write_text("{")
    assert runtime.prebuilt("tiny") is None


def test_architectures():
    assert runtime.architecture((9, 0)) == "sm_90a"
    assert runtime.architecture((8, 6)) == "sm_86"
    assert runtime.architecture((12, 0)) == "sm_120"


# --- loading and launching -----------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


class Driver:
    """Stands in for the driver: what was loaded and launched; ``refuses`` is an error to raise."""

    def __init__(self):
        self.loaded, self.launched, self.allowed, self.bound = [], [], [], set()
        self.refuses, self.capturing = None, False


@pytest.fixture
def driver(monkeypatch, tiny):
    cupy = pytest.importorskip("cupy")
    driver = Driver()

    class Function:
        def __init__(self, name):
            self.name, self.ptr = name, name

        def __call__(self, *args):
            driver.launched.append((self.name, *args))

    class Module:
        def load(self, binary):
            if driver.refuses:
                raise driver.refuses
            time.sleep(0.01)
            driver.loaded.append(binary)

        def get_function(self, name):
            assert threading.get_ident() in driver.bound  # a new thread has no context
            return Function(name)

    for name in ("_modules", "_functions", "_failures"):
        monkeypatch.setattr(runtime, name, {})
    monkeypatch.setattr(cupy.cuda, "Module", Module)
    monkeypatch.setattr(
        *(cupy.cuda.driver, "funcSetAttribute", lambda *args: driver.allowed.append(args)),
        raising=False,
    )
    monkeypatch.setattr(
        *(cupy.cuda.runtime, "setDevice", lambda index: driver.bound.add(threading.get_ident()))
    )
    monkeypatch.setattr(runtime, "compile_source", lambda source, arch: b"\0.text.tiny\0")
    monkeypatch.setattr(runtime, "_driver_version", lambda: "12.2")
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: driver.capturing)
    stream = type("Stream", (), {"cuda_stream": 1234})()
    monkeypatch.setattr(cuda, "current_stream", lambda device: stream)
    return driver


def launch(*args, **options):
    runtime.launch("tiny", "tiny", 3, 64, args, **options)


def test_a_launch_packs_its_arguments_and_takes_torchs_stream(driver):
    x = torch.ones(4).as_subclass(OnGpu)
    launch(x, None, 7, -1, 0.5, -0.0, True, shared=100)
    ((name, grid, block, (packed,), shared, stream, cooperative),) = driver.launched
    assert (name, grid, block, shared, cooperative) == ("tiny", (3, 1, 1), (64, 1, 1), 100, False)
    assert stream.ptr == 1234
    assert packed.size == 1  # by value
    assert packed.tobytes() == struct.pack("=Qqqqddq", x.data_ptr(), 0, 7, -1, 0.5, -0.0, 1)
    launch(x)
    assert len(driver.loaded) == 1


def test_much_shared_memory_is_asked_for_once(driver):
    x = torch.ones(4).as_subclass(OnGpu)
    for shared in (1000, 60 << 10, 50 << 10, 60 << 10, 99 << 10):
        launch(x, shared=shared)
    assert driver.allowed == [("tiny", 8, 60 << 10), ("tiny", 8, 99 << 10)]


def test_nothing_is_loaded_while_a_graph_is_captured(driver):
    x = torch.ones(4).as_subclass(OnGpu)
    driver.capturing = True
    with pytest.raises(RuntimeError, match=r"call flowops.warmup\(\) before"):
        launch(x)
    driver.capturing = False
    flowops.warmup("cuda:0")
    driver.capturing = True
    launch(x, shared=1000)
    assert len(driver.loaded) == len(driver.launched) == 1


def test_threads_load_once(driver):
    x = torch.ones(4).as_subclass(OnGpu)
    threads = [threading.Thread(target=launch, args=(x,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(driver.loaded), len(driver.launched)) == (1, 8)


def test_a_driver_too_old_is_named_and_remembered(driver):
    x = torch.ones(4).as_subclass(OnGpu)
    driver.refuses = Exception("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
    with pytest.raises(RuntimeError) as error:
        launch(x)
    for part in ("loading", "csrc/cuda/tiny.cu", ARCH, "a GPU, driver for CUDA 12.2", "PTX_VERS"):
        assert part in str(error.value)
    driver.refuses = None
    with pytest.raises(RuntimeError) as again:
        launch(x)
    assert str(again.value) == str(error.value)
    assert not driver.loaded


def test_nvrtc_takes_over_from_a_fat_binary_that_does_not_load(driver, tmp_path, monkeypatch):
    fat = tmp_path / "tiny.fatbin"
    fat.write_bytes(b"of another GPU")
    monkeypatch.setattr(runtime, "prebuilt", lambda source: fat)
    x = torch.ones(4).as_subclass(OnGpu)
    launch(x)
    assert driver.loaded == [b"of another GPU"]
    runtime._modules.clear(), runtime._functions.clear()
    fat.unlink()
    launch(x)
    assert driver.loaded[1:] == [b"\0.text.tiny\0"]


# --- asked for by name ---------------------------------------------------------------------------


def test_cuda_by_name_is_never_replaced(monkeypatch):
    monkeypatch.delenv(runtime.EMULATOR, raising=False)
    x, params = torch.randn(2, 5, 4), torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run affine_update: its tensors"):
        flowops.affine_update(x, params, backend="cuda")
    monkeypatch.setattr(runtime, "emulating", lambda: True)
    monkeypatch.setenv(runtime.EMULATOR, "/nowhere")
    with pytest.raises(OSError, match="/nowhere/affine.so"):
        flowops.affine_update(x, params, backend="cuda")


def test_the_emulator_reports_what_a_kernel_does_wrong():
    if not dispatch.backend_state("cuda")[0] or not runtime.emulating():
        pytest.skip("no emulator")
    with pytest.raises(RuntimeError, match="no_such_kernel: no kernel no_such_kernel"):
        runtime.launch("affine", "no_such_kernel", 1, 32, (torch.ones(1),))
