"""Builds csrc/ through CMake and mounts the four folders as one package.

Two parts are built where that is possible, side by side, and neither needs the other: the native
CPU kernels (``FLOWOPS_NATIVE``), which take a C++ compiler, and fat binaries of the CUDA kernels
(``FLOWOPS_CUDA``), which take nvcc too. ``auto`` (default) installs without a part that can't be
built and says why; 1 fails instead; 0 skips it. torch is never imported and no GPU looked for.
"""

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Part:
    """What CMake builds under a name, and an installation may lack."""

    what: str
    variable: str  # of the environment
    package: str  # where it goes
    files: tuple[str, ...]
    note: str  # the file that says why it is not there; read by flowops


PARTS = {
    "native": Part(
        *("native CPU kernels", "FLOWOPS_NATIVE", "flowops"),
        *(("_C.*.so",), "_native_note.txt"),
    ),
    "cuda": Part(
        *("fat binaries of the CUDA kernels", "FLOWOPS_CUDA", "flowops.cuda"),
        *(("*.fatbin", "fatbin.json"), "_fatbin_note.txt"),
    ),
}


class CMakeBuild(build_ext):
    def run(self) -> None:
        modes = {name: os.environ.get(part.variable, "auto") for name, part in PARTS.items()}
        for name, mode in modes.items():
            if mode not in ("auto", "0", "1"):
                raise SystemExit(f"{PARTS[name].variable}: expected auto, 1 or 0, got {mode!r}")
        for name in PARTS:
            self.target(name).mkdir(parents=True, exist_ok=True)
            for old in self.installed(name):
                old.unlink()
        reasons = self.compile([name for name, mode in modes.items() if mode != "0"])
        for name, part in PARTS.items():
            if modes[name] == "0":
                reasons[name] = f"skipped at installation ({part.variable}=0)"
            if name not in reasons:
                continue
            if modes[name] == "1":
                raise SystemExit(f"flowops: {part.what}: {reasons[name]}")
            (self.target(name) / part.note).write_text(reasons[name] + "\n")
            print(f"flowops: installed without {part.what}: {reasons[name]}", file=sys.stderr)

    def compile(self, names: list[str]) -> dict[str, str]:
        """Builds parts together, so that one scheduler has all their files. Returns, in one line
        each, why those that are not there now could not be built."""
        reason = self.cmake(names) if names else None
        if reason is None:
            return {}
        if len(names) == 1:
            return {names[0]: reason}
        return {key: why for name in names for key, why in self.compile([name]).items()}

    def cmake(self, names: list[str]) -> str | None:
        """Builds and installs parts. Returns None, or in one line why not all could be."""
        build = pathlib.Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DFLOWOPS_PARTS={';'.join(names)}",
            f"-DFLOWOPS_CUDA_DIGEST={_cuda_digest()}",
            f"-DFLOWOPS_CUDA_DESTINATION={self.target('cuda')}",
            f"-DCMAKE_INSTALL_PREFIX={self.target('native')}",
        ]
        if "native" in names:
            try:
                import pybind11
            except ImportError:
                return "pybind11 is not installed (it is with build isolation)"
            configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
            configure.append(f"-DPython_EXECUTABLE={sys.executable}")
        # What can be built is, whatever else fails.
        install = ["cmake", "--build", str(build), "--target", "install", "--", "-k", "0"]
        for command in (configure, install):
            try:
                result = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError:
                return "cmake was not found (it is with build isolation)"
            sys.stdout.write(result.stdout + result.stderr)
            if result.returncode != 0:
                return _first_error(result.stdout + result.stderr)
        return None

    def target(self, name: str) -> pathlib.Path:
        """Where a part goes: the folder of its sources if the installation is editable."""
        return pathlib.Path(self.get_ext_fullpath(f"{PARTS[name].package}._")).resolve().parent

    def installed(self, name: str) -> list[pathlib.Path]:
        part = PARTS[name]
        return [path for form in (*part.files, part.note) for path in self.target(name).glob(form)]

    def get_outputs(self) -> list[str]:
        return [str(path) for name in PARTS for path in self.installed(name)]

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: CMake installs straight into the target, in place when editable."""


def _cuda_digest() -> str:
    """``flowops.cuda_runtime.digest()``: fat binaries of other sources than these are not used."""
    whole = hashlib.sha256()
    for file in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        whole.update(f"{file.name}\0{file.read_text()}\0".encode())
    return whole.hexdigest()


def _first_error(log: str) -> str:
    if "No CMAKE_CXX_COMPILER could be found" in log:
        return "no C++ compiler was found"
    lines = [line.strip() for line in log.splitlines()]
    for i, line in enumerate(lines):
        if line.startswith("CMake Error") and "(message)" in line:
            return lines[i + 1]
        if line.startswith("CMake Error"):
            return " ".join([line, *filter(None, lines[i + 1 : i + 3])])
        if "error:" in line or line.startswith(("nvcc fatal", "nvcc error")):
            return line
    return "the build failed; `pip install -v` shows the log"


setup(
    packages=[
        *("flowops", "flowops.api", "flowops.bench", "flowops.bench.papers"),
        *("flowops.cuda", "flowops.kernels"),
    ],
    package_dir={
        "flowops": "flowops",
        "flowops.api": "python_api",
        "flowops.bench": "bench",
        "flowops.cuda": "csrc/cuda",
        "flowops.kernels": "kernels",
    },
    ext_modules=[Extension("flowops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
