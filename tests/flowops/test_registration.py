"""What every op promises whatever it computes: derivatives, torch.library, compile, dispatch."""

import functools

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import flowops
from flowops import dispatch
from helpers import CASES, assert_close, through
from plain_decoder import random_problem

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BACKENDS = [name for name in dispatch.BACKENDS if dispatch.backend_state(name)[0]]


def op_of(case) -> str:
    return case.name.split("-")[0]


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


@by_case
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_double_backward(case, backend):
    # Launches of what is interpreted or emulated take milliseconds.
    tensors, fast = case.tensors(torch.float64), backend in ("triton", "cuda")
    run = through(case, backend, tensors)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=fast)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=fast)


@by_case
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_follow_the_fp64_reference(case, backend, dtype):
    tensors = case.tensors(dtype)
    public = through(case, backend, tensors)
    golden_tensors = [t.detach().double().requires_grad_() for t in tensors]
    plain_tensors = [t.detach().clone().requires_grad_() for t in tensors]
    runs = [
        (as_tuple(public(*tensors)), tensors),
        (as_tuple(case.reference(*plain_tensors)), plain_tensors),
        (as_tuple(case.reference(*golden_tensors)), golden_tensors),
    ]
    for actual, plain, golden in zip(*(outs for outs, _ in runs), strict=True):
        assert actual.dtype == plain.dtype
        # The log-determinant of patch attention is summed wide, but from parameters in ``dtype``.
        inner = dtype if op_of(case) == "causal_patch_attention" else None
        assert_close(actual, plain, golden, "value", inner)
    # Of one sign: a sum whose terms cancel would be judged at the size of what is left.
    weights = [torch.rand_like(out) + 0.5 for out in runs[2][0]]
    gradients = [
        torch.autograd.grad(
            sum((o * w.to(o.dtype)).sum() for w, o in zip(weights, outs, strict=True)), ins
        )
        for outs, ins in runs
    ]
    for actual, plain, golden in zip(*gradients, strict=True):
        assert actual.dtype == plain.dtype
        assert_close(actual, plain, golden, "gradient")


@by_case
def test_compiles_without_a_graph_break(case):
    torch.compiler.reset()
    tensors = case.tensors(torch.float32)
    compiled = torch.compile(case.public, fullgraph=True, backend="aot_eager")
    eager, traced = as_tuple(case.public(*tensors)), as_tuple(compiled(*tensors))
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a, b)
    loss = [sum((o * o).sum() for o in outs) for outs in (eager, traced)]
    for a, b in zip(*(torch.autograd.grad(value, tensors) for value in loss), strict=True):
        torch.testing.assert_close(a, b)


def test_selective_checkpointing_runs_a_saved_op_once(monkeypatch):
    ran = []
    function, supports = dispatch._IMPLEMENTATIONS["causal_attention"]["reference"]
    monkeypatch.setitem(
        dispatch._IMPLEMENTATIONS["causal_attention"],
        "reference",
        (lambda *args: ran.append("forward") or function(*args), supports),
    )
    q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))

    def policy(context, op, *args, **kwargs):
        saves = op in flowops.SAC_SAVE_OPS
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return flowops.causal_attention(q * 2, k, v, backend="reference").sin()

    out = checkpoint(
        *(block, q, k, v),
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
    )
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert ran == ["forward"]
    expected = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@by_case
def test_counts_flops(case):
    with FlopCounterMode(display=False) as counter:
        case.public(*case.tensors(torch.float32))
    ours = {
        str(name): count
        for name, count in counter.get_flop_counts()["Global"].items()
        if str(name).startswith("flowops")
    }
    assert ours[f"flowops.{op_of(case)}"] > 0


@by_case
def test_autocast_gives_the_promised_dtypes(case):
    tensors = case.tensors(torch.float32)
    plain = as_tuple(case.public(*tensors))
    with torch.autocast("cpu", torch.bfloat16):
        cast = as_tuple(case.public(*tensors))
    casts = op_of(case) == "causal_attention"
    for a, b in zip(plain, cast, strict=True):
        assert b.dtype == (torch.bfloat16 if casts else torch.float32)
        tolerance = 0.05 if "attention" in op_of(case) else 0.0
        torch.testing.assert_close(b.float(), a, atol=tolerance, rtol=tolerance)


def registered_examples(backend):
    rng, g = torch.tensor([1, 2]), torch.randn
    q, k = g(2, 3, 2, 16), g(2, 5, 2, 16)
    x, p = g(2, 3, 4), g(2, 3, 8)
    xs, z, w, length = g(6, 3), g(4, 3), g(4, 4), torch.tensor(1.3)
    half, config = g(6, 2), ("se", "fp32", "auto")
    o, lse = torch.ops.flowops.causal_attention(q, k, k, 0.25, "auto")
    weight, bias = g(8, 32), g(8)
    q3 = q.detach()
    _, _, o3, lse3 = torch.ops.flowops.causal_patch_attention(
        q3, q3, q3, weight, bias, x, False, 0.25, "auto"
    )
    block = random_problem(2, 5, 3, guided=True, reverse=True)
    packed = block.decoder.to(torch.float32).packed(backend=backend)
    return {
        "affine_update": (x, p, True, "auto"),
        "affine_update_backward": (g(2, 3, 4), g(2), x, p, True, "auto"),
        "affine_inverse": (x, p, False, "auto"),
        "affine_inverse_backward": (g(2, 3, 4), x, p, False, "auto"),
        "causal_attention": (q, k, k, 0.25, "auto"),
        "causal_attention_backward": (g(2, 3, 2, 16), q, k, k, o, lse, 0.25, "auto"),
        "causal_patch_attention": (q3, q3, q3, weight, bias, x, False, 0.25, "auto"),
        "causal_patch_attention_backward": (
            *(g(2, 3, 4), g(2), q3, q3, q3, weight, bias, x, o3, lse3),
            *(False, 0.25, "auto"),
        ),
        "decode_block": (
            *(block.z.float(), list(packed.tensors), block.embed.float(), block.guide.float()),
            *(packed.heads, packed.eps, 0.7, True, packed.outputs, packed.panels),
            *(1e-3, 3, 1.5, "auto"),
        ),
        "noise": (rng, 5, 7, "normal", 3, "auto"),
        "pad_noise": (xs, rng, 2, torch.tensor(2.0), torch.tensor(0.1), "auto"),
        "se_gram": (xs, z, length, *config),
        "se_gram_backward": (g(6, 4), xs, z, length, *config),
        "se_gram_matmul": (xs, z, w, length, *config),
        "se_gram_matmul_backward": (g(6, 4), xs, z, w, length, *config),
        "kernel_coupling": (xs, half, z, w, length, *config),
        "kernel_coupling_backward": (half, g(6), xs, half, z, w, length, *config),
        "kernel_coupling_inverse": (xs, half, z, w, length, *config),
        "kernel_coupling_inverse_backward": (half, xs, half, z, w, length, *config),
    }


@pytest.mark.parametrize("op", dispatch.ops())
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(op, backend):
    args = registered_examples(backend)[op]
    usable, reason = dispatch.can_run(op, backend, *args[:-1])
    if not usable:
        pytest.skip(reason)
    torch.library.opcheck(getattr(torch.ops.flowops, op).default, (*args[:-1], backend))
