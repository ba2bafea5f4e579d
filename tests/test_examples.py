"""The examples run, in small."""

import subprocess
import sys
from pathlib import Path

import numpy as np
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
    "photo_patches.py": ["--stride", "64"],
    "realnvp_affine.py": [*TINY, "--couplings", "2", "--width", "8"],
}


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    command = [sys.executable, ROOT / "examples" / name, *EXAMPLES[name], "--out", tmp_path]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, stdout=subprocess.DEVNULL)
    if name == "photo_patches.py":
        with np.load(tmp_path / "train.npz", allow_pickle=False) as part:
            assert part["data"].shape[1] == 3 * 32 * 32
            assert part["data"].dtype == np.uint8
            assert set(part["labels"]) == set(range(1, 10))
        return
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 1
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
