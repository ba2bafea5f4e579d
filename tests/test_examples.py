"""The examples run, in small."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ["--steps", "2", "--batch", "16"]
EXAMPLES = {
    "accelerate_attention.py": [*TINY, "--tokens", "16", "--width", "16"],
    "accelerate_tarflow.py": [
        *(*TINY, "--channels", "64", "--blocks", "2", "--layers", "1"),
        *("--code", str(ROOT / "tests" / "plain_tarflow.py")),
    ],
    "padded_ffjord.py": [*TINY, "--solver-steps", "2"],
    "realnvp_affine.py": [*TINY, "--couplings", "2", "--width", "8"],
}


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    command = [sys.executable, ROOT / "examples" / name, *EXAMPLES[name], "--out", tmp_path]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, stdout=subprocess.DEVNULL)
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 1
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
