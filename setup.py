"""Builds csrc/ through CMake and mounts the four folders as one package.

FLOWOPS_NATIVE=auto (default) builds the native CPU kernels if it can and installs without them if
it can't; 1 fails instead; 0 skips them. torch is never imported here.
"""

import os
import pathlib
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
NOTE = "_native_note.txt"  # why there is no _C; read by flowops/dispatch.py


class CMakeBuild(build_ext):
    def run(self) -> None:
        mode = os.environ.get("FLOWOPS_NATIVE", "auto")
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"FLOWOPS_NATIVE: expected auto, 1 or 0, got {mode!r}")
        target = pathlib.Path(self.get_ext_fullpath("flowops._C")).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        for old in [target / NOTE, *target.glob("_C.*.so")]:
            old.unlink(missing_ok=True)
        if mode == "0":
            reason = "skipped at installation (FLOWOPS_NATIVE=0)"
        else:
            reason = self.compile(target)
        if reason is None:
            return
        if mode == "1":
            raise SystemExit(f"flowops: native CPU kernels: {reason}")
        (target / NOTE).write_text(reason + "\n")
        print(f"flowops: installed without native CPU kernels: {reason}", file=sys.stderr)

    def compile(self, target: pathlib.Path) -> str | None:
        """Returns None, or in one line why there is no module."""
        try:
            import pybind11
        except ImportError:
            return "pybind11 is not installed (it is with build isolation)"
        build = pathlib.Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]
        for command in (configure, ["cmake", "--build", str(build), "--target", "install"]):
            try:
                result = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError:
                return "cmake was not found (it is with build isolation)"
            sys.stdout.write(result.stdout + result.stderr)
            if result.returncode != 0:
                return _first_error(result.stdout + result.stderr)
        return None

    def get_outputs(self) -> list[str]:
        target = pathlib.Path(self.get_ext_fullpath("flowops._C")).resolve().parent
        return [str(path) for path in [*target.glob("_C.*.so"), *target.glob(NOTE)]]

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: CMake installs straight into the target, in place when editable."""


def _first_error(log: str) -> str:
    if "No CMAKE_CXX_COMPILER could be found" in log:
        return "no C++ compiler was found"
    lines = [line.strip() for line in log.splitlines()]
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join([line, *filter(None, lines[i + 1 : i + 3])])
        if "error:" in line:
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
