import contextlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run in Triton's interpreter. That is chosen when they are
    # imported, and for what they take from Triton's library when Triton is.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
