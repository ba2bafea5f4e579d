"""Compiles csrc/cuda for the CPU, to run kernels without a GPU: ``python tests/emulate.py``."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
HEADERS = ROOT / "tests" / "emulator"
COMPILER = os.environ.get("CXX", "g++")
#: No fused multiply-add: the noise contract counts on every operation rounding once.
OPTIONS = ["-O2", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror"]
OPTIONS += ["-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable"]


def build() -> Path | None:
    """The directory with a library for each source, or None where there is no compiler. It is kept
    under build/ for as long as the sources stay as they are; several processes may ask at once."""
    if shutil.which(COMPILER) is None:
        return None
    key = hashlib.sha256(repr((COMPILER, OPTIONS)).encode())
    for file in sorted([*SOURCES.glob("*.cu*"), *HEADERS.iterdir()]):
        key.update(file.read_bytes())
    target = ROOT / "build" / "emulator" / key.hexdigest()[:16]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source: _compile(source, Path(made)), SOURCES.glob("*.cu")))
        try:
            os.rename(made, target)
        except OSError:  # another process was first
            return target
        os.mkdir(made)  # what the context manager removes
    return target


def _compile(source: Path, into: Path) -> None:
    command = [COMPILER, *OPTIONS, "-include", str(HEADERS / "emulator.h"), f"-I{SOURCES}"]
    command += [f"-I{HEADERS}", "-x", "c++", str(source), "-o", str(into / f"{source.stem}.so")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


if __name__ == "__main__":
    print(build() or sys.exit(f"no compiler {COMPILER}"))
