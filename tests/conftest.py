import contextlib
import os

import pytest
import torch

import emulate

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run in Triton's interpreter. That is chosen when they are
    # imported, and for what they take from Triton's library when Triton is.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401
    # And the CUDA kernels in an emulator, compiled for the CPU.
    emulator = emulate.build()
    if emulator is not None:
        os.environ.setdefault("FLOWOPS_CUDA_EMULATOR", str(emulator))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
