"""Compiles, loads and launches the CUDA C++ of ``csrc/cuda`` (the package ``flowops.cuda``).

A source becomes a binary in one of two ways: it is in the fat binary that the installation made
where there was nvcc, or NVRTC compiles it at first use for the GPU at hand, and it is kept on disk.
CuPy brings NVRTC and the driver's functions; streams and memory are torch's.

Nothing is compiled or loaded while a CUDA graph is captured: ``warmup()`` does that before. What
fails is not tried again, and fails with the same words.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import struct
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ._version import __version__

#: How kernels name storage types.
TAGS = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}

#: The options of nvcc (CMakeLists.txt) and NVRTC alike.
OPTIONS = ("--std=c++17",)

#: Environment variable: where binaries that NVRTC made are kept.
CACHE = "FLOWOPS_CACHE"
#: Environment variable: a directory with csrc/cuda compiled for the CPU (tests/emulator). Kernels
#: then run there, on CPU tensors.
EMULATOR = "FLOWOPS_CUDA_EMULATOR"
#: Order in which the emulator runs threads; 0 is one after the other.
emulator_seed = 1

_EMULATED_PROCESSORS = 2
_EMULATED_SHARED = 227 << 10
_MOST_WITHOUT_ASKING = 48 << 10  # bytes of shared memory
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

_lock = threading.RLock()
_modules: dict[tuple[str, int], object] = {}
_functions: dict[tuple[str, int], list] = {}  # (kernel, device) -> [function, shared bytes allowed]
_failures: dict[tuple[str, int], str] = {}


# --- sources -------------------------------------------------------------------------------------


def directory() -> Path:
    """Where the sources are, and the fat binaries if there are any."""
    return Path(importlib.util.find_spec("flowops.cuda").submodule_search_locations[0])


@functools.cache
def sources() -> dict[str, str]:
    """The text of every file of ``csrc/cuda`` that is compiled, by its name."""
    files = sorted([*directory().glob("*.cu"), *directory().glob("*.cuh")])
    return {file.name: file.read_text() for file in files}


def names() -> list[str]:
    """What ``launch`` calls ``source``."""
    return [name.removesuffix(".cu") for name in sources() if name.endswith(".cu")]


def digest() -> str:
    """Of all sources; what the installation writes beside a fat binary (``setup.py`` alike)."""
    whole = hashlib.sha256()
    for name, text in sources().items():
        whole.update(f"{name}\0{text}\0".encode())
    return whole.hexdigest()


# --- compiling -----------------------------------------------------------------------------------


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for. Hopper's own instructions are in sm_90a alone."""
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"


def compile_source(source: str, arch: str) -> bytes:
    """The machine code of ``<source>.cu`` for ``arch``, from the cache or by NVRTC.

    Raises:
        RuntimeError: with the compiler's log.
    """
    nvrtc = _nvrtc()
    options = (*OPTIONS, f"--gpu-architecture={arch}")
    text = sources()[f"{source}.cu"]
    headers = _included(text)
    key = hashlib.sha256(
        json.dumps([__version__, nvrtc.getVersion(), options, text, headers]).encode()
    ).hexdigest()
    kept = _read(key)
    if kept is not None:
        return kept
    program = nvrtc.createProgram(
        *(text, f"{source}.cu"),
        *(tuple(t.encode() for t in headers.values()), tuple(name.encode() for name in headers)),
    )
    try:
        nvrtc.compileProgram(program, options)
        binary = nvrtc.getCUBIN(program) + b"\0"  # CuPy cuts off the last byte, a zero
    except nvrtc.NVRTCError as error:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise RuntimeError(
            f"compiling csrc/cuda/{source}.cu for {arch} with NVRTC {version}: {error}\n"
            f"{nvrtc.getProgramLog(program).strip()}"
        ) from None
    finally:
        nvrtc.destroyProgram(program)
    _keep(key, binary)
    return binary


def _included(text: str) -> dict[str, str]:
    """The headers that a source takes in, directly or through others."""
    found, waiting = {}, [text]
    while waiting:
        for name in re.findall(r'#include "(\w+\.cuh)"', waiting.pop()):
            if name not in found:
                found[name] = sources()[name]
                waiting.append(found[name])
    return found


def _nvrtc():
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:  # CuPy loads the library at the first call, in its own ways
        raise RuntimeError(f"loading NVRTC: {error}") from None
    return nvrtc


def cache_directory() -> Path:
    """``$FLOWOPS_CACHE``, or ``flowops`` in the user's cache directory."""
    if given := os.environ.get(CACHE):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flowops"


def _read(key: str) -> bytes | None:
    """A binary that was kept whole, or None."""
    try:
        kept = (cache_directory() / f"{key}.cubin").read_bytes()
    except OSError:
        return None
    binary = kept[32:]
    return binary if hashlib.sha256(binary).digest() == kept[:32] else None


def _keep(key: str, binary: bytes) -> None:
    """Under a temporary name first: other processes may compile the same at the same time."""
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache_directory(), suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(binary).digest() + binary)
            os.replace(name, cache_directory() / f"{key}.cubin")
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        _warn_of_cache(str(cache_directory()), str(error))


@functools.cache
def _warn_of_cache(directory: str, error: str) -> None:
    warnings.warn(
        f"flowops: CUDA kernels can't be kept in {directory} ({error}); every process will compile "
        f"them again. {CACHE} names another directory.",
        RuntimeWarning,
        stacklevel=2,
    )


def prebuilt(source: str) -> Path | None:
    """The fat binary of ``<source>.cu``, if there is one that was made of these sources."""
    binary, note = directory() / f"{source}.fatbin", directory() / "fatbin.json"
    try:
        made = json.loads(note.read_text())["digest"]
    except (OSError, ValueError, KeyError):
        return None
    return binary if made == digest() and binary.exists() else None


def origin() -> str:
    """Where the machine code comes from here, and by which CuPy it is launched.

    Raises:
        RuntimeError: if CuPy does not load, or if there are neither fat binaries nor NVRTC.
    """
    try:
        import cupy
    except Exception as error:  # a broken installation raises what it likes
        raise RuntimeError(f"CuPy does not load: {_first_line(error)}") from None
    launcher = f"CuPy {cupy.__version__}"
    try:
        made = json.loads((directory() / "fatbin.json").read_text())
    except (OSError, ValueError):
        made, reason = None, _fat_binary_note()
    else:
        if made["digest"] == digest():
            architectures = ", ".join(made["architectures"])
            return f"{launcher}, fat binary of nvcc {made['nvcc']} ({architectures})"
        reason = "it was made of other sources"
    try:
        version = ".".join(map(str, _nvrtc().getVersion()))
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"there is no fat binary: {reason}; and {launcher} finds no NVRTC: {_first_line(error)}"
        ) from None
    return f"{launcher}, NVRTC {version}, kept in {cache_directory()} (no fat binary: {reason})"


def _fat_binary_note() -> str:
    """Why the installation made none."""
    try:
        return (directory() / "_fatbin_note.txt").read_text().strip()
    except OSError:
        return "not built; reinstall with FLOWOPS_CUDA=1 to see why"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- loading -------------------------------------------------------------------------------------


def warmup(device: torch.device | int | str | None = None) -> None:
    """Compiles and loads all kernels for a GPU, so that nothing is left to do while a CUDA graph is
    captured.

    Args:
        device: a CUDA device; None for the current one.

    Raises:
        RuntimeError: if they can't be compiled or loaded, saying which, why and the compiler's log.
    """
    index = torch.device("cuda" if device is None else device).index
    index = torch.cuda.current_device() if index is None else index
    for source in names():
        _, binary = _module(source, index)
        for kernel in _kernels_in(binary):
            _function(source, kernel, index, 0)


def _kernels_in(binary: bytes) -> list[str]:
    """A kernel has a section of its own in the machine code."""
    return sorted({name.decode() for name in re.findall(rb"\.text\.([a-z][a-z0-9_]*)\0", binary)})


def _module(source: str, index: int) -> tuple[object, bytes]:
    """CuPy's module of ``<source>.cu`` on a device, and the binary it came from."""
    key = (source, index)
    with _lock:
        if key in _modules:
            return _modules[key]
        if key in _failures:
            raise RuntimeError(_failures[key])
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"csrc/cuda/{source}.cu is not loaded, and can't be while a CUDA graph is captured:"
                " call flowops.warmup() before"
            )
        try:
            _modules[key] = _load(source, index)
        except RuntimeError as error:
            _failures[key] = str(error)
            raise
        return _modules[key]


def _load(source: str, index: int) -> tuple[object, bytes]:
    """From the fat binary; where there is none for this GPU, from NVRTC."""
    arch = architecture(torch.cuda.get_device_capability(index))
    troubles, fat = [], prebuilt(source)
    if fat is not None:
        try:
            binary = fat.read_bytes()
            return _load_binary(binary, index), binary
        except Exception as error:  # the driver's errors are of a class of CuPy
            troubles.append(f"loading {fat} on {_gpu(index)}: {error}")
    try:
        binary = compile_source(source, arch)
    except (ImportError, RuntimeError) as error:
        raise RuntimeError("\n".join([*troubles, str(error)])) from None
    try:
        return _load_binary(binary, index), binary
    except Exception as error:
        troubles.append(
            f"loading NVRTC's csrc/cuda/{source}.cu for {arch} on {_gpu(index)}: {error}"
        )
    raise RuntimeError("\n".join(troubles))


def _load_binary(binary: bytes, index: int):
    from cupy.cuda import Module

    module = Module()
    with _on(index):
        module.load(binary)
    return module


def _gpu(index: int) -> str:
    return f"{torch.cuda.get_device_name(index)}, driver for CUDA {_driver_version()}"


def _driver_version() -> str:
    from cupy.cuda import runtime

    version = runtime.driverGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def _function(source: str, kernel: str, index: int, shared: int):
    entry = _functions.get((kernel, index))
    if entry is None or entry[1] < shared:
        from cupy.cuda import driver, runtime

        with _lock, _on(index):
            # The driver wants a context here, which a thread that has done nothing on the GPU yet
            # lacks, even within torch.cuda.device(0). Loading and launching look for it in CuPy.
            runtime.setDevice(index)
            module, _ = _module(source, index)
            entry = _functions.get((kernel, index)) or [module.get_function(kernel), 0]
            if shared > max(entry[1], _MOST_WITHOUT_ASKING):
                driver.funcSetAttribute(entry[0].ptr, _MAX_DYNAMIC_SHARED, shared)
            entry[1] = max(entry[1], shared)
            _functions[kernel, index] = entry
    return entry[0]


# --- launching -----------------------------------------------------------------------------------


def launch(
    source: str,
    kernel: str,
    grid: int | Sequence[int],
    threads: int,
    args: Sequence[Tensor | int | float | None],
    *,
    shared: int = 0,
    cooperative: bool = False,
) -> None:
    """Starts ``kernel`` of ``<source>.cu`` on the current stream of the first tensor's device.

    Args:
        grid: blocks, one number or up to three.
        threads: of a block.
        args: the fields of the kernel's argument block, in order: addresses (of tensors; None is
            null), 64-bit integers, doubles.
        shared: bytes of dynamic shared memory.
        cooperative: all blocks have to be on the GPU at once, and may wait for each other.
    """
    device = next(a.device for a in args if isinstance(a, Tensor))
    grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
    packed = _pack(args)
    if device.type == "cpu":
        _emulate(source, kernel, grid, threads, packed, shared, cooperative)
        return
    import numpy

    function = _function(source, kernel, device.index, shared)
    block = numpy.frombuffer(packed, dtype=f"V{len(packed)}")
    stream = SimpleNamespace(ptr=torch.cuda.current_stream(device).cuda_stream)
    with _on(device.index):
        function(grid, (threads, 1, 1), (block,), shared, stream, cooperative)


def _on(index: int):
    """The device as the current one; looking first is cheaper than entering."""
    if torch.cuda.current_device() == index:
        return contextlib.nullcontext()
    return torch.cuda.device(index)


def _pack(args: Sequence[Tensor | int | float | None]) -> bytes:
    values = [_field(a) for a in args]
    return _packer(tuple(map(type, values)))(*values)


def _field(value: Tensor | int | float | None) -> int | float:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return 0 if value is None else value


@functools.cache
def _packer(types: tuple[type, ...]):
    return struct.Struct("=" + "".join("d" if t is float else "q" for t in types)).pack


def fits(tensor: Tensor, vector: int) -> bool:
    """Whether rows along the last dimension, which is contiguous, can be read in vectors of so many
    elements: every row begins at a multiple of their size."""
    return tensor.data_ptr() % (vector * tensor.element_size()) == 0 and all(
        stride % vector == 0 for stride in tensor.stride()[:-1]
    )


def blocks_at_once(device: torch.device, per_processor: int) -> int:
    """Blocks that the GPU holds, ``per_processor`` on each multiprocessor."""
    return per_processor * processors(device)


def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return _EMULATED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for."""
    if device.type == "cpu":
        return _EMULATED_SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


# --- the emulator --------------------------------------------------------------------------------


def emulating() -> bool:
    return bool(os.environ.get(EMULATOR))


@functools.cache
def _emulator(path: str):
    library = ctypes.CDLL(path)
    library.emulate.restype = ctypes.c_char_p
    library.emulate.argtypes = [
        *(ctypes.c_char_p, ctypes.c_uint * 3, ctypes.c_uint * 3, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_char_p, ctypes.c_ulong),
    ]
    return library.emulate


def _emulate(source, kernel, grid, threads, packed, shared, cooperative) -> None:
    emulate = _emulator(os.path.join(os.environ.get(EMULATOR, ""), f"{source}.so"))
    blocks, block = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(threads, 1, 1)
    error = emulate(*(kernel.encode(), blocks, block, shared, cooperative, packed, emulator_seed))
    if error is not None:
        raise RuntimeError(f"{kernel}: {error.decode()}")
