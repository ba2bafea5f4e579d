"""The CUDA kernel of decode_block: one launch for all steps, blocks that wait for each other."""

import pytest
import torch

from decode_checks import EPS, check, inputs, on_cuda
from flowops import cuda_runtime, decode_block, dispatch
from flowops.decode_weights import PackedBlock
from kernel_checks import DEVICE, ON_GPU
from plain_decoder import random_problem

pytestmark = pytest.mark.skipif(
    not dispatch.backend_state("cuda")[0], reason=str(dispatch.backend_state("cuda")[1])
)

launcher = pytest.importorskip("flowops.cuda.decode")
NARROW = ("qkv", "proj", "up", "down", "w_out")

#: Blocks share, and pass on, all there is to share: heads, spans of keys, rows, guidance.
SMALL = {"B": 1, "T": 4, "C": 3, "D": 8, "heads": 2, "E": 40, "guided": True}


def stored(given, dtype):
    z, weights, *rest = given
    narrow = {name: getattr(weights, name).to(dtype) for name in NARROW}
    return z, weights._replace(**narrow), *rest


def processors(monkeypatch, count):
    monkeypatch.setattr(cuda_runtime, "processors", lambda device: count)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"B": 1, "T": 12, "C": 1, "heads": 3, "D": 8}, {}),
        ({"B": 2, "T": 3, "C": 48, "heads": 3, "D": 8, "shifts": True}, {"reverse": True}),
        ({"B": 3, "T": 2, "C": 12, "heads": 3, "D": 8, "guided": True}, {"temperature": 0.6}),
        # Rows of whole 128 bytes, which are exchanged in the ring; several tiles; two tiles of
        # rows of the batch.
        ({"B": 8, "T": 2, "C": 3, "D": 64, "E": 128, "guided": True}, {"temperature": 1.7}),
        ({"B": 5, "T": 2, "C": 12, "D": 128, "E": 24, "L": 2}, {"reverse": True}),
        # A product's sum over more terms than the warps take at once.
        ({"B": 1, "T": 3, "C": 1, "D": 40, "E": 544}, {}),
    ],
)
def test_follows_the_reference(sizes, options, dtype):
    given = stored(inputs(**sizes), dtype)
    x, residual, counts = check(given, str(sizes), "cuda", dtype, **options)
    first = -1 if options.get("reverse") else 0
    assert torch.equal(x[:, first], given[0][:, first])
    assert residual.eq(0).all()
    assert counts.tolist() == [0, sizes["T"] - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_grid_and_order_of_threads(monkeypatch, dtype):
    monkeypatch.setattr(launcher, "SPAN", 2)
    given = stored(inputs(**SMALL), dtype)
    first = on_cuda(*given)
    for count in (1, 5) if not ON_GPU else (1, 5, 33):
        processors(monkeypatch, count)
        assert same(on_cuda(*given), first), f"{count} blocks"
    if ON_GPU:
        return
    processors(monkeypatch, 2)
    for seed in (0, 2, 3):
        monkeypatch.setattr(cuda_runtime, "emulator_seed", seed)
        assert same(on_cuda(*given), first), f"seed {seed}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "guided"), [(3, False), (5, True)])
def test_images_do_not_see_each_other(dtype, B, guided):
    z, weights, embed, guide, heads = stored(inputs(B, 3, 2, 3, 8, guided=guided), dtype)
    z[1, 1] = float("nan")
    x = on_cuda(z, weights, embed, guide, heads)[0]
    assert x[1, 1:].isnan().all()
    for b in (0, B - 1):
        rows = embed[[b, B + b] if guided else [b]]
        assert torch.equal(on_cuda(z[[b]], weights, rows, guide, heads)[0], x[[b]]), b


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_tokens_that_are_not_finite_end_in_nan(value):
    given = inputs(1, 4, 2)
    clean = on_cuda(*given)[0]
    given[0][0, 1, 0] = value
    x = on_cuda(*given)[0]
    assert torch.equal(x[:, 0], clean[:, 0])
    assert not x[0, 1, 0].isfinite()
    assert x[:, 2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "span", "D"),
    [
        (7, 3, 24),
        pytest.param(36, 1, 8, marks=pytest.mark.skipif(not ON_GPU, reason="emulated too slowly")),
    ],
)
def test_spans_of_keys(monkeypatch, T, span, D, dtype):
    """Fewer keys than a block takes at once, and more spans than a warp merges at once."""
    monkeypatch.setattr(launcher, "SPAN", span)
    check(stored(inputs(1, T, 1, 1, D, E=24), dtype), f"spans of {span}", "cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_wrap_around_in_the_ring(monkeypatch, dtype):
    """As little shared memory as it takes, so that tiles are the smallest and the ring is full."""
    given = stored(inputs(2, 3, 3, 1, 64, E=192), dtype)
    roomy = on_cuda(*given)
    sizes = launcher._sizes(given[0], given[1], given[2], given[4])
    blocks = launcher._blocks(sizes, torch.device(DEVICE))
    fits = [n for n in range(1024, 96 << 10, 128) if launcher._layout(sizes, blocks, n)]
    ring = launcher._layout(sizes, blocks, fits[0])[0]
    step = sum(getattr(given[1], name).nbytes for name in NARROW)
    assert ring * 16 * blocks < step / 2
    monkeypatch.setattr(launcher, "_shared_limit", lambda device: fits[0])
    assert same(on_cuda(*given), roomy)


def test_through_the_public_function():
    problem = random_problem(2, 4, 3, guided=True, reverse=True, layers=1)
    assert DEVICE == "cpu" or ON_GPU
    decoder = problem.decoder.to(torch.float32).map(lambda _, t: t.to(DEVICE))
    tensors = [t.float().to(DEVICE) for t in (problem.z, problem.embed, problem.guide)]
    out = decode_block(
        *(tensors[0], decoder.packed(backend="cuda"), tensors[1]),
        guide=tensors[2],
        temperature=problem.temperature,
        reverse=True,
        backend="cuda",
    )
    exact = problem.solve("reference", torch.float64)
    assert (out.x.cpu() - exact.x).abs().max() <= 4e-6 * exact.x.abs().max()
    assert out.counts.tolist() == exact.counts.tolist()
    assert (out.x.dtype, out.residual.dtype, out.counts.dtype) == (
        *[torch.float32] * 2,
        torch.int64,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"B": 9}, "8 images, not 9"),
        ({"window": 3}, "single steps"),
        ({"dtype": torch.float16}, "float16"),
        ({"D": 12}, "12 wide"),
        ({"D": 136}, "136 wide"),
        ({"E": 36}, "hidden width 36"),
        ({"shift": True}, "16 bytes"),
        ({"E": 1 << 15}, "don't fit"),
    ],
)
def test_refuses(change, reason):
    sizes = {"B": 1, "T": 5, "C": 1, "D": 8, "E": 32}
    sizes |= {k: v for k, v in change.items() if k in sizes}
    given = stored(inputs(**sizes), change.get("dtype", torch.float32))
    z, weights, embed, guide, heads = given
    if "shift" in change:
        up = torch.empty(weights.up.numel() + 1)[1:].view_as(weights.up)
        weights = PackedBlock(*weights)._replace(up=up)
    can, why = dispatch.can_run(
        *("decode_block", "cuda", z.to(DEVICE), [w.to(DEVICE) for w in weights]),
        *(embed.to(DEVICE), guide.to(DEVICE), heads, EPS, 1.0, False, len(weights.b_out), False),
        *(0.0, change.get("window", 1), 0.0),
    )
    assert not can
    assert reason in why
