"""Compiles csrc/cuda for the CPU, to run kernels without a GPU: ``python tests/emulate.py``."""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
HEADERS = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"
COMPILER = os.environ.get("CXX", "g++")
#: No fused multiply-add: the noise contract counts on every operation rounding once.
OPTIONS = ["-O2", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror"]
OPTIONS += ["-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable"]


def build() -> Path | None:
    """The directory with a library for each source, or None where there is no compiler. A source
    that does not compile has a log in its place. What is there already is kept; several processes
    may ask at once."""
    if shutil.which(COMPILER) is None:
        return None
    keys = {source: _key(source) for source in sorted(SOURCES.glob("*.cu"))}
    whole = hashlib.sha256("".join(keys.values()).encode()).hexdigest()[:16]
    target = BUILD / whole
    target.mkdir(parents=True, exist_ok=True)
    missing = [s for s in keys if not (target / f"{s.stem}.so").exists()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda s: _compile(s, BUILD / f"{s.stem}-{keys[s]}.so", target), missing))
    return target


def _key(source: Path) -> str:
    """Of all that the library of a source is made of."""
    seen, waiting = {}, [HEADERS / "emulator.h", source]
    while waiting:
        file = waiting.pop()
        seen[file] = file.read_text()
        for name in re.findall(r'#include "(.*)"', seen[file]):
            found = [folder / name for folder in (SOURCES, HEADERS)]
            waiting += [path for path in found if path.exists() and path not in seen]
    parts = [COMPILER, *OPTIONS, *(seen[file] for file in sorted(seen))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(source: Path, library: Path, into: Path) -> None:
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / library.name
            command = [COMPILER, *OPTIONS, "-include", str(HEADERS / "emulator.h"), f"-I{SOURCES}"]
            command += [f"-I{HEADERS}", "-x", "c++", str(source), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                (into / f"{source.stem}.log").write_text(result.stdout + result.stderr)
                return
            os.replace(made, library)
    with contextlib.suppress(FileExistsError):  # another process was first
        os.link(library, into / f"{source.stem}.so")


if __name__ == "__main__":
    target = build() or sys.exit(f"no compiler {COMPILER}")
    logs = [log.read_text() for log in target.glob("*.log")]
    sys.exit("\n".join(logs)) if logs else print(target)
