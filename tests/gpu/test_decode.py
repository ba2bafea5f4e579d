"""The sampler on a GPU: graphs, what they keep, and that nothing waits for the host."""

import threading

import pytest
import torch

from flowops import decode_graphs
from flowops.decode import decode_block_reference
from flowops.decode_weights import PackedBlock
from helpers import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

EPS = 1e-5
SOLVERS = {
    "exact": (0.0, 1, 0.0),
    "jacobi": (1e-3, 16, 0.0),
    "auto, wide": (1e-3, 16, 0.5),
    "auto, single": (1e-6, 4, 3.9),
}
by_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@pytest.fixture(autouse=True)
def _no_graphs_before_or_after():
    decode_graphs.clear()
    yield
    decode_graphs.clear()


def inputs(B=2, T=49, C=4, W=128, L=2, guided=False, dtype=torch.float32):
    """z, weights, embed, guide and heads."""
    E, R = 4 * W, (2 if guided else 1) * B

    def normal(*shape, std=1.0, dtype=torch.float32):
        return (std * torch.randn(shape, device="cuda")).to(dtype)

    def matrices(*shape):
        return normal(*shape, std=shape[-1] ** -0.5, dtype=dtype)

    weights = PackedBlock(
        w_in=normal(W, C, std=C**-0.5),
        position=normal(T, W, std=0.3),
        norm1=1 + normal(L, 2, W, std=0.1),
        qkv=matrices(L, 3 * W, W),
        qkv_bias=normal(L, 3 * W, std=0.1),
        proj=matrices(L, W, W),
        proj_bias=normal(L, W, std=0.1),
        norm2=1 + normal(L, 2, W, std=0.1),
        up=matrices(L, E, W),
        up_bias=normal(L, E, std=0.1),
        down=matrices(L, W, E),
        down_bias=normal(L, W, std=0.1),
        w_out=normal(2 * C, W, std=0.2 * W**-0.5, dtype=dtype),
        b_out=normal(2 * C, std=0.1),
    )
    guide = normal(T, 2, std=0.5) if guided else torch.empty(0, 2, device="cuda")
    return normal(B, T, C), weights, normal(R, W, std=0.3), guide, W // 64


def through_graphs(given, solver, temperature=1.0, reverse=False):
    return decode_graphs.decode_block(*given, EPS, temperature, reverse, *solver, "tf32x3")


def without_graphs(given, solver, temperature=1.0, reverse=False):
    from flowops.kernels.decode import decode_block

    return decode_block(*given, EPS, temperature, reverse, *solver, "tf32x3")


def reference(given, solver, temperature=1.0, reverse=False):
    outputs = len(given[1].b_out)
    return decode_block_reference(*given, EPS, temperature, reverse, outputs, False, *solver)


def doubled(given):
    z, weights, embed, guide, heads = given
    weights = PackedBlock(*(w.double() for w in weights))
    return z.double(), weights, embed.double(), guide.double(), heads


def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"B": 1, "T": 100}, {}),
        ({"B": 1, "guided": True}, {"temperature": 1.5}),
        ({"B": 16, "W": 768, "C": 12}, {"reverse": True}),
        ({"B": 64, "W": 768, "C": 192, "guided": True}, {"temperature": 0.7}),
    ],
)
def test_exact_follows_the_fp64_reference(sizes, options, dtype):
    given, solver = inputs(**sizes, dtype=dtype), SOLVERS["exact"]
    runs = (
        through_graphs(given, solver, **options),
        reference(given, solver, **options),
        reference(doubled(given), solver, **options),
    )
    assert_close(*(run[0] for run in runs), f"{sizes} {dtype}", dtype)
    assert runs[0][2].tolist() == runs[2][2].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{"B": 1, "T": 200}, {"B": 64, "W": 768, "guided": True}])
def test_jacobi_without_tolerance_is_exact(sizes, dtype):
    given, window = inputs(**sizes, dtype=dtype), 40
    x, residual, counts = through_graphs(given, (0.0, window, 0.0))
    exact, golden = (reference(g, SOLVERS["exact"])[0] for g in (given, doubled(given)))
    assert_close(x, exact, golden, f"{sizes} {dtype}", dtype)
    assert residual.eq(0).all()
    assert 0 < counts[0] < given[0].shape[1]
    assert counts[1] == 0


@by_solver
@pytest.mark.parametrize("B", [1, 3, 64])
def test_graphs_do_what_plain_launches_do(B, solver):
    given = inputs(B)
    plain = without_graphs(given, solver)
    for _ in range(2):  # captured, then replayed
        same(through_graphs(given, solver), plain)


@by_solver
def test_nothing_waits_for_the_device(solver):
    given = inputs(4)
    through_graphs(given, solver)
    torch.cuda.set_sync_debug_mode("error")
    try:
        through_graphs(given, solver)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_solver
def test_inside_the_callers_graph(solver):
    given = inputs(2, T=9)
    expected = through_graphs(given, solver)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = through_graphs(given, solver)
    for _ in range(2):
        for out in captured:
            out.zero_()
        graph.replay()
        same(captured, expected)


@by_solver
def test_weights_changed_in_place_are_seen(solver):
    given = inputs(2)
    before = through_graphs(given, solver)
    given[1].w_out.mul_(0.5)
    after = through_graphs(given, solver)
    same(after, without_graphs(given, solver))
    assert not torch.equal(after[0], before[0])


def test_a_graph_goes_with_its_weights():
    for _ in range(3):
        given = inputs(2)
        through_graphs(given, SOLVERS["exact"])
        ((station,),) = (kept.values() for kept in decode_graphs._stations.values())
        del given
    assert len(station.graphs) == 1


def test_what_is_kept_is_bounded(monkeypatch):
    through_graphs(inputs(2), SOLVERS["exact"])
    (kept,) = decode_graphs._stations.values()
    (station,) = kept.values()
    bound = 5 * station.nbytes
    monkeypatch.setattr(decode_graphs, "_capacity", lambda device: bound)
    for B in (1, 3, 4, 2, 1):
        through_graphs(inputs(B), SOLVERS["exact"])
        assert sum(s.nbytes for s in kept.values()) <= bound
    assert [sizes.B for sizes in kept][-2:] == [2, 1]
    through_graphs(inputs(64), SOLVERS["exact"])
    assert not kept


def test_threads_and_streams_share_a_workspace():
    given = [inputs(2) for _ in range(4)]
    expected = [through_graphs(g, SOLVERS["jacobi"]) for g in given]
    results = [None] * len(given)

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                results[i] = through_graphs(given[i], SOLVERS["jacobi"])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, want in zip(results, expected, strict=True):
        same(result, want)
