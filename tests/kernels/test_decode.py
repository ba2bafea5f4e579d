import math
import types

import pytest
import torch
from torch.nn import functional as F

from decode_checks import EPS, check, doubled, inputs, on_reference, on_triton
from flowops import decode_graphs
from flowops.decode import PROBE_SWEEPS
from flowops.decode_weights import PackedBlock
from kernel_checks import BACKENDS, DEVICE, ON_GPU

kernels = pytest.importorskip("flowops.kernels.decode")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"B": 1, "T": 1, "C": 2}, {}),
        ({"B": 1, "T": 2, "C": 1}, {}),
        ({"B": 1, "T": 4, "C": 3, "heads": 2, "guided": True, "L": 2}, {"temperature": 1.7}),
        ({"B": 3, "T": 5, "C": 12, "shifts": True}, {"reverse": True}),
        ({"B": 1, "T": 3, "C": 12, "D": 64, "guided": True, "shifts": True}, {"reverse": True}),
        ({"B": 1, "T": 3, "C": 70, "D": 24, "heads": 2}, {}),  # channels of several programs
        ({"B": 17, "T": 2, "C": 5, "guided": True}, {"temperature": 0.6}),  # several row tiles
        ({"B": 1, "T": 17, "C": 2}, {}),
    ],
)
def test_exact(backend, sizes, options):
    if backend == "cuda" and sizes["B"] > 8:
        pytest.skip("not served")
    residual, counts = check(inputs(**sizes), str(sizes), backend, **options)[1:]
    assert residual.eq(0).all()
    assert counts.tolist() == [0, sizes["T"] - 1]


@pytest.mark.parametrize(
    ("sizes", "window", "options"),
    [
        ({"B": 1, "T": 5, "C": 2, "heads": 2}, 3, {}),
        ({"B": 2, "T": 4, "C": 3, "guided": True}, 4, {"temperature": 1.7, "reverse": True}),
    ],
)
def test_jacobi_without_tolerance_is_exact(sizes, window, options):
    given = inputs(**sizes)
    x = check(given, "jacobi", window=window, **options)[0]
    exact = on_reference(*given, **options)[0]
    # The two take their sums in different orders, and every token passes that on.
    assert (x - exact).abs().max() <= 1e-5 * exact.abs().max()


def slow_update(z, weights, embed, guide, heads, x):
    """F(x) of an unguided block in raster order, one causal pass in fp64. Independent of
    flowops.decode."""
    z, w, embed, _, _ = doubled(z, weights, embed, guide, heads)
    x = x.double()
    h = x @ w.w_in.T + w.position + embed[:, None]
    W = (h.shape[2],)
    for i in range(len(w.qkv)):
        normed = F.layer_norm(h, W, *w.norm1[i], EPS)
        q, k, v = F.linear(normed, w.qkv[i], w.qkv_bias[i]).chunk(3, -1)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + F.linear(o, w.proj[i], w.proj_bias[i])
        hidden = F.gelu(F.linear(F.layer_norm(h, W, *w.norm2[i], EPS), w.up[i], w.up_bias[i]))
        h = h + F.linear(hidden, w.down[i], w.down_bias[i])
    a, b = F.linear(h, w.w_out, w.b_out).chunk(2, -1)
    return torch.cat([z[:, :1], z[:, 1:] * a[:, :-1].exp() + b[:, :-1]], 1)


@pytest.mark.parametrize(("B", "T", "window", "tol"), [(2, 7, 3, 0.2), (1, 17, 16, 1e-2)])
def test_residual_of_jacobi(B, T, window, tol):
    given = inputs(B, T, 3, heads=2, L=1)
    x, residual, counts = check(given, "tolerance", window=window, tol=tol)
    assert counts[0] < T - 1  # something was frozen before its turn
    change = (slow_update(*given, x) - x).abs().amax((1, 2))
    assert residual.max() <= tol
    assert (change - residual).abs().max() <= 2e-6 * x.abs().max()


@pytest.mark.parametrize(("even", "single"), [(0.5, False), (1.5, True)])
def test_auto_decides_after_its_probe(even, single):
    given = inputs(1, 17, 2)
    counts = check(given, "auto", window=2, tol=1e-6, even=even)[2]
    assert (counts[0] == PROBE_SWEEPS) == single
    assert (counts[1] > 0) == single


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_tokens_that_are_not_finite_leave_earlier_ones_alone(value):
    given, broken = inputs(1, 5, 2), 2
    clean = on_reference(*given)[0]
    z = given[0].clone()
    z[:, broken] = value
    x, residual, counts = on_triton(z, *given[1:], window=4, tol=1e-4)
    assert (x - clean)[:, :broken].abs().max() <= 1e-3
    assert not x[:, broken].isfinite().any()
    assert residual.max() <= 1e-4
    assert counts[0] <= 4


def workspace(B, T, window, heads, D):
    z, weights, embed, _, _ = inputs(B, T, 1, heads=heads, D=D)
    sizes = kernels.sizes_of(z, weights, embed, heads, window)
    work = kernels.Workspace(sizes, torch.device(DEVICE))
    for tensor in work.tensors():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return work


@pytest.mark.parametrize(
    ("front", "n", "heads", "D"),
    [
        ([0, 63, 64, 130, 198, 199], 1, 2, 16),
        ([150], 1, 1, 24),
        ([0, 60, 150, 195, 199], 6, 1, 64),
        ([140], 70, 1, 16),
    ],
)
def test_attention_over_the_cache(front, n, heads, D):
    """And the product that merges its parts, here with the identity. The window's last token has
    infinite values: only its own query may see them."""
    T, B = 200, len(front)
    work = workspace(B, T, n, heads, D)
    M, W = B * n, heads * D
    work.q.copy_(torch.randn(M, W))
    k, v = work.k[0], work.v[0]
    spoilt = [min(f + n, T - 1) - 1 for f in front]
    for b, f in enumerate(front):
        size = (heads, min(f + n, T - 1), D)
        k[b, :, : size[1]], v[b, :, : size[1]] = torch.randn(size), torch.randn(size)
        if n > 1:
            v[b, :, spoilt[b]] = float("inf")
    fronts = torch.tensor(front, dtype=torch.int32, device=DEVICE)
    settings = kernels.Settings(EPS, 1.0, 0.0, "tf32x3")
    spread = work.splits[n] > 1
    o = work.parts if spread else work.row
    kernels._attention(work, settings, fronts, n, k, v, o)
    work.h.zero_()
    eye, zero = torch.eye(W, device=DEVICE), torch.zeros(W, device=DEVICE)
    made = "parts" if spread else "rows"
    kernels._linear(
        *(work, settings, fronts, n, o, eye, zero, work.h, made, "add", None, (None, None))
    )
    q = work.q.view(B, n, heads, D).cpu()
    k, v, h = k.cpu(), v.cpu(), work.h.view(B, n, heads, D).cpu()
    for b, f in enumerate(front):
        for t in range(n):
            p = f + t
            if p > T - 2:
                assert t > 0 or f == T - 1
                continue
            if n > 1 and p == spoilt[b]:
                assert h[b, t].isnan().all()
                continue
            keys = slice(0, p + 1)
            scores = torch.einsum("hd,hjd->hj", q[b, t].double(), k[b, :, keys].double())
            weights = (scores / math.sqrt(D)).softmax(-1)
            golden = torch.einsum("hj,hjd->hd", weights, v[b, :, keys].double())
            # fp32 scores of some units, 200 keys: a few eps, relative to the values' magnitude.
            assert (h[b, t] - golden).abs().max() <= 4e-6


def slowly_frozen(new, x, front, T, tol):
    """The rule, token by token: x, front and residual of one image."""
    x, n, residual, j = x.clone(), len(new), 0.0, front + 1
    last = min(front + n, T - 1)
    while j <= last:
        change = (new[j - front - 1] - x[j]).abs().max()
        if not change <= tol:
            break
        residual, j = max(residual, change.item()), j + 1
    for i in range(j, last + 1):
        x[i] = new[i - front - 1]
    return x, min(j, last), residual


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("T", "C", "n"), [(9, 3, 4), (2, 1, 1), (700, 12, 600)])
def test_freezing(T, C, n, exact):
    n = 1 if exact else n
    fronts = [0, T - 1, T - 2, T // 2, max(T - n, 0), 0, T // 3]
    B, tol = len(fronts), 0.25
    x, new = torch.randint(-8, 8, (B, T, C)) / 8.0, torch.empty(B, n, C)
    for b, front in enumerate(fronts):  # ties with tol, and changes on both sides of it
        for t in range(n):
            j = min(front + 1 + t, T - 1)
            new[b, t] = x[b, j] + 0.25 * torch.randint(-1, 2, (C,))
            if torch.rand(()) < 3 / n:
                new[b, t, -1] += [0.5, float("inf"), float("nan")][b % 3]
    before = torch.rand(B) / 4
    state = torch.tensor([fronts, [5] * B], dtype=torch.int32)
    args = [t.to(DEVICE) for t in (new, x.clone(), before.clone(), *state)]
    block = max(16, 1 << (C - 1).bit_length())
    kernels.start(
        *(kernels.decode_freeze_kernel, kernels.tiles_for("decode_freeze", args[0].device), B),
        (*args, tol, n, T),
        C=C,
        EXACT=exact,
        BLOCK_C=block,
        BLOCK_T=128,
    )
    _, moved, residual, front, count = (t.cpu() for t in args)
    for b in range(B):
        done = fronts[b] == T - 1
        limit = -1.0 if exact else tol
        want = slowly_frozen(new[b], x[b], fronts[b], T, limit)
        assert torch.equal(moved[b].nan_to_num(7, 8, 9), want[0].nan_to_num(7, 8, 9))
        assert front[b] == want[1]
        assert residual[b] == (before[b] if exact or done else max(before[b].item(), want[2]))
        assert count[b] == 5 + (not done)


# --- graphs --------------------------------------------------------------------------------------


@pytest.fixture
def stations(monkeypatch):
    """Stations whose graphs run what they would have captured: where there is no GPU, what the host
    does around graphs can be seen as well."""
    if not ON_GPU:
        nothing = lambda *_: None  # noqa: E731
        event = lambda: types.SimpleNamespace(  # noqa: E731
            wait=nothing, record=nothing, synchronize=nothing
        )
        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(decode_graphs, "_capture", lambda function: function)
        monkeypatch.setattr(decode_graphs._Station, "begin", nothing)
        monkeypatch.setattr(decode_graphs, "_capacity", lambda device: 1 << 30)
    monkeypatch.setattr(decode_graphs, "_SINGLE_STEPS", 3)
    decode_graphs.clear()
    yield decode_graphs._stations
    decode_graphs.clear()


def through_graphs(given, tol=0.0, window=1, even=0.0, reverse=False):
    z, weights, embed, guide, heads = given
    return decode_graphs._decode(
        *(z, weights, embed, guide, heads, window, reverse, even),
        kernels.Settings(EPS, 1.0, tol, "tf32x3"),
    )


def placed(given):
    z, weights, embed, guide, heads = given
    weights = PackedBlock(*(w.to(DEVICE) for w in weights))
    return z.to(DEVICE), weights, embed.to(DEVICE), guide.to(DEVICE), heads


@pytest.mark.parametrize(
    "options",
    [
        {"reverse": True},
        {"window": 3, "tol": 0.1},
        {"window": 2, "tol": 1e-6, "even": 1.5},
    ],
)
def test_graphs_do_what_plain_launches_do(stations, options):
    given = placed(inputs(1, 7, 1))
    plain = kernels.decode_block(
        *given,
        *(EPS, 1.0, options.get("reverse", False), options.get("tol", 0.0)),
        *(options.get("window", 1), options.get("even", 0.0), "tf32x3"),
    )
    for a, b in zip(through_graphs(given, **options), plain, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def _empty_graphs(stations, monkeypatch):
    """Graphs that hold no weights, as real ones."""
    if not ON_GPU:
        monkeypatch.setattr(decode_graphs, "_capture", lambda function: lambda: None)


@pytest.mark.usefixtures("_empty_graphs")
def test_blocks_of_equal_sizes_share_a_workspace(stations):
    first, second = (placed(inputs(1, 2, 1)) for _ in range(2))
    through_graphs(first)
    through_graphs(second)
    ((station,),) = (kept.values() for kept in stations.values())
    assert len(station.graphs) == 2
    through_graphs(first)
    assert len(station.graphs) == 2
    del first
    through_graphs(second)
    assert len(station.graphs) == 1  # its weights are gone


@pytest.mark.usefixtures("_empty_graphs")
def test_a_workspace_made_in_inference_mode_serves_outside_of_it(stations):
    given = placed(inputs(1, 2, 1))
    with torch.inference_mode():
        through_graphs(given)
    through_graphs(given)
    ((station,),) = (kept.values() for kept in stations.values())
    assert not any(tensor.is_inference() for tensor in station.work.tensors())


@pytest.mark.usefixtures("_empty_graphs")
def test_the_least_recently_used_workspace_is_dropped(stations, monkeypatch):
    small, other, large = (placed(inputs(B, 2, 1)) for B in (1, 2, 3))
    for given in (small, other, small):
        through_graphs(given)
    (kept,) = stations.values()
    room = sum(station.nbytes for station in kept.values())
    monkeypatch.setattr(decode_graphs, "_capacity", lambda device: room + 1000)
    through_graphs(large)
    assert [sizes.B for sizes in kept] == [1, 3]
    monkeypatch.setattr(decode_graphs, "_capacity", lambda device: 0)
    assert through_graphs(other)[0].shape == other[0].shape  # done, and nothing kept
    assert not kept
