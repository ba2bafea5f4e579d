"""Where CUDA kernels were measured to be faster than Triton's: what ``auto`` goes by on a GPU.

``measured.json`` holds the rows; ``flowops bench --device cuda --prefer`` replaces those of the ops
that it ran, for its GPU. Without a row for the op, the GPU and the size, ``auto`` takes Triton.
"""

import functools
import json
import re
from pathlib import Path

import torch

FILE = Path(__file__).with_name("measured.json")

_SUFFIXES = re.compile(r"(_update|_inverse)?(_backward)?$")


def family(op: str) -> str:
    """The ops that a row speaks for, by the name they share: ``affine`` for ``affine_update``,
    ``affine_inverse`` and their backward passes."""
    return _SUFFIXES.sub("", op, count=1)


@functools.cache
def rows() -> tuple[dict, ...]:
    """``device``, ``family``, ``dtype`` and ``elements``, the smallest and the largest size of the
    op's first tensor, with the ``ratio`` of times and the commit (``git``) that was measured."""
    return tuple(json.loads(FILE.read_text()))


@functools.cache
def _of_device(name: str) -> tuple[dict, ...]:
    return tuple(row for row in rows() if row["device"] == name)


def prefers_cuda(op: str, first: torch.Tensor) -> bool:
    """Whether a row says so for ``op`` on its first tensor."""
    return bool(rows()) and any(
        row["family"] == family(op)
        and row["dtype"] == str(first.dtype).removeprefix("torch.")
        and row["elements"][0] <= first.numel() <= row["elements"][1]
        for row in _of_device(torch.cuda.get_device_name(first.device))
    )
