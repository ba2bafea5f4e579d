import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors of these tests are small; those that compare thread counts set their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
