"""The CUDA backend on a real driver: both ways to a binary, warming up, wrong devices."""

import pytest
import torch

import flowops
from flowops import cuda_runtime as runtime
from flowops import dispatch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not dispatch.backend_state("cuda")[0],
    reason="no CUDA device, or no CuPy",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has loaded nothing, and with an empty cache."""
    monkeypatch.setenv(runtime.CACHE, str(tmp_path))
    for name in ("_modules", "_functions", "_failures"):
        monkeypatch.setattr(runtime, name, {})
    return tmp_path


def step():
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(8, 64, 12, device="cuda", generator=generator)
    params = 0.1 * torch.randn(8, 64, 24, device="cuda", generator=generator)
    return flowops.affine_update(x, params, backend="cuda")[0]


def test_nvrtc_and_the_fat_binary_give_the_same_bits(fresh, monkeypatch):
    if runtime.prebuilt("affine") is None:
        pytest.skip("installed without nvcc")
    prebuilt = step()
    assert not list(fresh.iterdir())
    monkeypatch.setattr(runtime, "prebuilt", lambda source: None)
    runtime._modules.clear(), runtime._functions.clear()
    assert torch.equal(step(), prebuilt)
    assert list(fresh.glob("*.cubin"))


def test_everything_loads(fresh):
    flowops.warmup()
    loaded = {source for source, _ in runtime._modules}
    assert loaded == set(runtime.names())
    assert len(runtime._functions) > len(loaded)


def test_a_graph_captured_before_anything_is_loaded_says_what_to_call(fresh):
    x, params = torch.randn(2, 5, 4, device="cuda"), torch.randn(2, 5, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"flowops.warmup\(\)"), torch.cuda.graph(graph):
        flowops.affine_update(x, params, backend="cuda")


def test_other_streams_are_waited_for_by_torchs_rules():
    """The kernel reads what the same stream wrote before, behind a long queue."""
    stream = torch.cuda.Stream()
    expected = step()
    with torch.cuda.stream(stream):
        a = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            a = a @ a * 1e-2
        actual = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_devices_are_told_apart():
    x, params = torch.randn(2, 5, 4, device="cuda:1"), torch.randn(2, 5, 8, device="cuda:1")
    z, _ = flowops.affine_update(x, params, backend="cuda")  # cuda:0 is the current one
    assert torch.equal(z, flowops.affine_update(x, params, backend="triton")[0])
    with pytest.raises(ValueError, match="params: expected a tensor on cuda:1"):
        flowops.affine_update(x, params.to("cuda:0"), backend="cuda")
