"""What only a GPU can show: graph capture, no waiting, other streams, inductor. Every op, by its
cases; the kernels' own tests (tests/kernels) run on the GPU too where there is one."""

import pytest
import torch

import flowops
from flowops import dispatch, measured
from helpers import CASES, assert_close, through
from kernel_checks import BACKENDS, as_tuple, values_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
NARROW = [torch.float32, torch.bfloat16]


#: What ``auto`` takes, and the CUDA kernels, which it takes only where they were measured to win.
by_backend = pytest.mark.parametrize("backend", ["auto", BACKENDS[1]])


def op_of(case) -> str:
    return case.name.split("-")[0]


def on_gpu(case, dtype=torch.float32):
    return [t.detach().cuda() for t in case.tensors(dtype)]


def weights_of(case, tensors):
    return [torch.randn_like(o) for o in as_tuple(case.reference(*tensors))]


@by_case
@by_backend
@pytest.mark.parametrize("dtype", NARROW)
def test_values_and_gradients_follow_the_fp64_reference(case, dtype, backend):
    """As in tests/flowops/test_registration.py."""
    tensors = [t.detach() for t in case.tensors(dtype)]
    weights = weights_of(case, tensors)
    on_gpu = [t.cuda() for t in tensors]
    actual = values_and_gradients(through(case, backend, on_gpu), on_gpu, weights)
    plain = values_and_gradients(case.reference, tensors, weights)
    golden = values_and_gradients(case.reference, [t.double() for t in tensors], weights)
    for a, p, g in zip(actual, plain, golden, strict=True):
        inner = dtype if op_of(case) == "causal_patch_attention" else None
        assert_close(a.cpu(), p, g, case.name, inner)


@by_case
def test_auto_takes_triton_without_a_measured_row(case, monkeypatch):
    monkeypatch.delenv("FLOWOPS_BACKEND", raising=False)
    monkeypatch.setattr(measured, "rows", tuple)
    tensors = on_gpu(case)
    by_name = as_tuple(case.public(*tensors, backend="triton"))
    for a, b in zip(as_tuple(case.public(*tensors)), by_name, strict=True):
        assert torch.equal(a, b)


@by_case
@by_backend
@pytest.mark.parametrize("dtype", NARROW)
def test_sanitize_runs_at_small_sizes(case, dtype, backend):
    """Small and plain, for a memory checker to watch."""
    tensors = on_gpu(case, dtype)
    public = through(case, backend, tensors)
    outs = values_and_gradients(public, tensors, weights_of(case, tensors))
    assert all(out.isfinite().all() for out in outs)


@by_case
@by_backend
def test_forward_and_backward_wait_for_nothing(case, backend):
    tensors = [t.requires_grad_() for t in on_gpu(case)]
    weights = [w.detach() for w in weights_of(case, tensors)]
    public = through(case, backend, tensors)

    def step():
        outs = as_tuple(public(*tensors))
        return torch.autograd.grad(outs, tensors, weights)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_case
@by_backend
def test_graph_capture(case, backend):
    tensors = [t.requires_grad_() for t in on_gpu(case)]
    weights = [w.detach() for w in weights_of(case, tensors)]
    public = through(case, backend, tensors)

    def step():
        outs = as_tuple(public(*tensors))
        return [*outs, *torch.autograd.grad(outs, tensors, weights)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in tensors:
            t.mul_(0.9)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", {op_of(c): c for c in CASES}.values(), ids=op_of)
def test_inductor_finds_no_graph_break(case):
    torch.compiler.reset()
    tensors = [t.requires_grad_() for t in on_gpu(case)]
    eager = as_tuple(case.public(*tensors))
    compiled = as_tuple(torch.compile(case.public, fullgraph=True)(*tensors))
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)


@by_case
@by_backend
def test_two_runs_give_the_same_bits(case, backend):
    tensors = on_gpu(case)
    weights, public = weights_of(case, tensors), through(case, backend, tensors)
    first, second = (values_and_gradients(public, tensors, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_noise_inside_a_graph_is_fresh_at_every_replay():
    x = torch.zeros(1000, 3, device="cuda")
    flowops.pad_noise(x, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flowops.pad_noise(x, 2)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first[:, 3:], out[:, 3:])


@pytest.mark.parametrize("rows", [1, 2**20 + 3])
def test_padding_noise_is_that_of_the_cpu(rows):
    x, rng = torch.randn(rows, 5), torch.tensor([3, 1])
    on_cpu = flowops.pad_noise(x, 3, data_scale=0.1, rng=rng)
    on_gpu = flowops.pad_noise(x.cuda(), 3, data_scale=0.1, rng=rng.cuda())
    assert torch.equal(on_gpu.cpu(), on_cpu)


def test_doctor_names_the_device():
    usable, text = dispatch.backend_state("triton")
    assert usable
    assert torch.cuda.get_device_name() in text
