"""Compiles csrc/cuda to machine code with no GPU, and takes it apart with Triton's tools.

``python tests/cuda_compile.py --record`` writes what the assembler says of every kernel to
tests/kernels/cuda_resources.json. What NVRTC and nvcc made is kept under build/ for as long as the
sources stay as they are.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from flowops import cuda_runtime

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "cuda"
RECORD = ROOT / "tests" / "kernels" / "cuda_resources.json"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

_FUNCTION = re.compile(r"^ Function (\w+):\n +(REG:.*)$", re.MULTILINE)
_SECTION = re.compile(r"^\.text\.(\w+):$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?([A-Z][\w.]*)", re.MULTILINE)


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("cupy") is None or importlib.util.find_spec("triton") is None:
        return "needs the packages cupy and triton"
    try:
        cuda_runtime._nvrtc()
    except RuntimeError as error:
        return str(error)
    return None if _tool("nvdisasm").exists() else "Triton has no nvdisasm here"


def nvrtc_version() -> str:
    return ".".join(map(str, cuda_runtime._nvrtc().getVersion()))


@functools.cache
def compile_with_nvrtc(source: str) -> dict[str, bytes]:
    """The machine code of a source for each architecture."""
    before = os.environ.get(cuda_runtime.CACHE)
    os.environ[cuda_runtime.CACHE] = str(KEPT)
    try:
        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            made = pool.map(partial(cuda_runtime.compile_source, source), ARCHITECTURES)
            return dict(zip(ARCHITECTURES, made, strict=True))
    finally:
        os.environ.pop(cuda_runtime.CACHE)
        if before is not None:
            os.environ[cuda_runtime.CACHE] = before


@functools.cache
def kernels_of(source: str) -> dict[str, dict[str, dict]]:
    """Architecture -> kernel -> what `examine` says of it."""
    return {arch: examine(binary) for arch, binary in compile_with_nvrtc(source).items()}


def ptx_of(source: str) -> dict[str, str]:
    """Kernel -> its PTX for Hopper, before the assembler builds roots and quotients of it."""
    nvrtc, texts = cuda_runtime._nvrtc(), cuda_runtime.sources()
    headers = {name: text for name, text in texts.items() if name.endswith(".cuh")}
    program = nvrtc.createProgram(
        *(texts[f"{source}.cu"], f"{source}.cu"),
        *(tuple(t.encode() for t in headers.values()), tuple(name.encode() for name in headers)),
    )
    nvrtc.compileProgram(program, (*cuda_runtime.OPTIONS, "--gpu-architecture=compute_90"))
    ptx = nvrtc.getPTX(program)
    parts = re.split(r"\.entry (\w+)\(", ptx if isinstance(ptx, str) else ptx.decode())[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def kernels_of_nvcc(source: str, arch: str) -> list[tuple[str, dict[str, int]]]:
    """What nvcc finds in a source: with the resources where the installation made a fat binary of
    the sources as they are, else by name alone. Without optimization it takes seconds, not
    minutes."""
    fat = cuda_runtime.prebuilt(source)
    if fat is not None:
        return usage(fat.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"{source}.ptx"
        command = [nvcc(), *cuda_runtime.OPTIONS, f"-arch={arch}", "-ptx", "-Xcicc", "-O0"]
        command += [str(cuda_runtime.directory() / f"{source}.cu"), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        return [(kernel, {}) for kernel in re.findall(r"\.entry (\w+)\(", made.read_text())]


def usage(binary: bytes) -> list[tuple[str, dict[str, int]]]:
    """Kernels and the registers, stack and shared memory of each: bytes but for registers. A fat
    binary has each kernel several times."""
    text = _run("cuobjdump", "--dump-resource-usage", binary)
    found = []
    for kernel, line in _FUNCTION.findall(text):
        numbers = dict(part.split(":") for part in line.split())
        stack = int(numbers["STACK"]) + int(numbers["LOCAL"])
        shared, registers = int(numbers["SHARED"]), int(numbers["REG"])
        found.append((kernel, {"registers": registers, "stack": stack, "shared": shared}))
    return found


def examine(binary: bytes) -> dict[str, dict]:
    """For each kernel its resources, and the names of the instructions that it has."""
    kernels = dict(usage(binary))
    parts = _SECTION.split(_run("nvdisasm", binary))[1:]
    for kernel, text in zip(parts[::2], parts[1::2], strict=True):
        kernels[kernel]["instructions"] = sorted(set(_INSTRUCTION.findall(text)))
    return kernels


def _tool(name: str) -> Path:
    triton = importlib.util.find_spec("triton").submodule_search_locations[0]
    return Path(triton) / "backends" / "nvidia" / "bin" / name


def _run(name: str, *arguments: str | bytes) -> str:
    *options, binary = arguments
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(_tool(name)), *options, file.name]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise AssertionError(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout


def record() -> None:
    resources = {"nvrtc": nvrtc_version(), **{arch: {} for arch in ARCHITECTURES}}
    for source in cuda_runtime.names():
        for arch, kernels in kernels_of(source).items():
            for kernel, found in sorted(kernels.items()):
                assert kernel not in resources[arch], f"{source}.cu: {kernel} exists elsewhere"
                resources[arch][kernel] = {k: found[k] for k in ("registers", "stack", "shared")}
    lines = json.dumps(resources, indent=1)
    RECORD.write_text(re.sub(r"\n {3,}|\n {2}(?=\})", " ", lines) + "\n")  # a kernel a line


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    record()
