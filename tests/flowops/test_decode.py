"""What ``decode_block`` computes on every engine, and what it refuses. How it gets there is in
test_decode_solver.py."""

import functools
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from flowops import decode_block, dispatch, pack_block
from flowops.decode_weights import PackedBlock, from_panels, panel_reason
from helpers import ENGINES, ISAS, assert_close, poison, running
from plain_decoder import STORED, random_decoder, random_problem

KINDS = {
    "affine": {},
    "shift": {"nvp": False},
    "reversed": {"reverse": True},
    "guided": {"guided": True},
    "guided shift, reversed": {"guided": True, "nvp": False, "reverse": True},
    "far": {"offset": 10.0, "nvp": False},
    "bf16": {},
}
#: B, T, C, heads, D, layers, hidden width.
SIZES = [
    (1, 1, 3, 1, 16, 1, 16),
    (2, 2, 1, 2, 16, 2, 32),
    (7, 17, 5, 3, 32, 1, 48),
    (33, 2, 7, 1, 64, 2, 128),
    (33, 17, 12, 3, 16, 2, 32),
    (1, 49, 12, 2, 32, 2, 64),
    (2, 49, 4, 3, 64, 1, 384),
]
#: An error is judged against that of the reference over this many images: over one or two alone
#: the reference may be right by luck.
IMAGES = 33

by_engine = pytest.mark.parametrize("engine", ENGINES)
by_isa = pytest.mark.parametrize("engine", ISAS)
by_kind = pytest.mark.parametrize("kind", KINDS)
native = pytest.mark.skipif(not ISAS, reason="needs the native CPU kernels")


@functools.cache
def solved(kind, sizes):
    """A problem of ``IMAGES`` images, its solution in fp64 and that of the reference in fp32."""
    _, T, C, heads, D, layers, hidden = sizes
    problem = random_problem(
        *(IMAGES, T, C, heads, D), layers=layers, hidden=hidden, seed=T + C, **KINDS[kind]
    )
    if kind == "bf16":
        object.__setattr__(problem, "decoder", problem.decoder.rounded(torch.bfloat16, STORED))
    return problem, problem.solve("reference", torch.float64).x, problem.solve("reference").x


def assert_follows(actual, plain, golden, what):
    """The tolerance rule for the first images of a solved problem."""
    whole = golden.clone()
    whole[: len(actual)] = actual.double()
    assert_close(whole, plain, golden, what, torch.float32)


@by_kind
def test_the_reference_solves_the_equation_that_is_written_plainly(kind):
    problem, x, _ = solved(kind, SIZES[2])
    assert problem.residual(x).max() < 1e-13 * x.abs().max()
    start = x[:, -1] if problem.reverse else x[:, 0]
    assert torch.equal(start, problem.z[:, -1] if problem.reverse else problem.z[:, 0])


@by_kind
@by_isa
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_native_kernels_follow_the_fp64_reference(engine, sizes, kind):
    problem, golden, plain = solved(kind, sizes)
    storage = torch.bfloat16 if kind == "bf16" else None
    with running(engine) as backend:
        few = problem.first(sizes[0])
        poison(few.z.float(), few.z.float()[:, 0, 0])
        out = few.solve(backend, storage=storage)
    assert out.x.dtype == out.residual.dtype == torch.float32
    assert_follows(out.x, plain, golden, f"{engine} {kind} {sizes}")
    assert torch.equal(out.residual, torch.zeros(sizes[0]))
    assert out.counts.tolist() == [0, sizes[1] - 1]


@native
@settings(deadline=None, max_examples=40)
@given(
    st.data(),
    st.tuples(*(st.integers(1, most) for most in (4, 12, 20, 3))),
    st.sampled_from([16, 32, 48]),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_sizes(data, sizes, D, panels, nvp, guided, reverse):
    B, T, C, heads = sizes
    problem = random_problem(
        *(IMAGES, T, C, heads, D),
        hidden=16 * panels,
        layers=1,
        strength=0.3,
        nvp=nvp,
        guided=guided,
        reverse=reverse,
    )
    golden, plain = problem.solve("reference", torch.float64).x, problem.solve("reference").x
    few = problem.first(B)
    with running(data.draw(st.sampled_from(ISAS))):
        exact = few.solve("cpu").x
        window = data.draw(st.integers(1, T + 1))
        swept = few.solve("cpu", method="jacobi", tol=0, window=window).x
    assert_follows(exact, plain, golden, "exact")
    assert torch.equal(swept, exact)


@pytest.mark.parametrize("kind", ["affine", "guided"])
def test_half_precision_of_the_reference(kind):
    problem, golden, _ = solved(kind, SIZES[2])
    scale = golden.abs().max()
    for storage, bound in ((torch.bfloat16, 0.05), (torch.float16, 0.005)):
        x = problem.solve("reference", storage=storage).x
        assert x.dtype == torch.float32
        # Some ten units of the storage's rounding; fp32 alone would be far below.
        assert 1e-5 < (x - golden).abs().max() / scale < bound


# --- which engine --------------------------------------------------------------------------------


def test_weights_are_fp64_where_asked():
    problem, golden, _ = solved("affine", SIZES[2])
    assert problem.solve(dtype=torch.float64).x.dtype == torch.float64
    assert torch.equal(problem.solve(dtype=torch.float64).x, golden)


@native
@pytest.mark.parametrize(
    ("heads", "D", "hidden", "storage", "reason"),
    [
        (1, 24, 32, None, "width 24 is no multiple of 16"),
        (4, 8, 32, None, "head width 8 is no multiple of 16"),
        (2, 16, 40, None, "hidden width 40 is no multiple of 16"),
        (2, 16, 32, torch.float16, "torch.float16 has no native CPU kernel"),
        (2, 16, 32, torch.float64, "torch.float64 has no native CPU kernel"),
    ],
)
def test_what_has_no_native_kernel_runs_on_the_reference(heads, D, hidden, storage, reason):
    problem = random_problem(3, 5, 4, heads, D, hidden=hidden)
    dtype = torch.float64 if storage == torch.float64 else torch.float32
    weights = problem.decoder.to(dtype).packed(dtype=storage)
    assert not weights.panels
    assert reason in panel_reason(PackedBlock(*weights.tensors), heads)
    options = {"dtype": dtype, "storage": storage}
    out = problem.solve(**options)
    assert torch.equal(out.x, problem.solve("reference", **options).x)
    with pytest.raises(RuntimeError, match=f"backend 'cpu' can't run decode_block: .*{reason}"):
        problem.solve("cpu", **options)


@native
def test_the_reference_reads_panels_too():
    problem = random_problem(3, 5, 4)
    z, embed = problem.z.float(), problem.embed.float()
    panels, rows = (
        problem.decoder.to(torch.float32).packed(backend=b) for b in ("cpu", "reference")
    )
    assert panels.panels
    assert not rows.panels
    from_rows, from_panels = (
        decode_block(z, w, embed, backend="reference").x for w in (rows, panels)
    )
    assert torch.equal(from_rows, from_panels)
    with pytest.raises(RuntimeError, match="can't run decode_block: its weights were packed for"):
        decode_block(z, rows, embed, backend="cpu")


@native
@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("C", [1, 8, 12, 33])
def test_panels_hold_the_weights(C, nvp):
    decoder = random_decoder(5, C, 3, 32, hidden=80, nvp=nvp).to(torch.float32)
    rows, panels = decoder.packed(backend="reference"), decoder.packed(backend="cpu")
    assert panels.tensors[3].shape == (2, 3 * 96 // 16, 96, 16)
    back = from_panels(PackedBlock(*panels.tensors), 3, panels.outputs)
    for name, a, b in zip(PackedBlock._fields, back, rows.tensors, strict=True):
        assert torch.equal(a, b), name


def test_the_environment_chooses_the_layout(monkeypatch):
    monkeypatch.setenv("FLOWOPS_BACKEND", "reference")
    problem = random_problem(2, 3, 2)
    assert not problem.decoder.to(torch.float32).packed().panels
    assert torch.equal(problem.solve().x, problem.solve("reference").x)


def test_packed_weights_are_copies():
    problem = random_problem(3, 5, 4)
    decoder = problem.decoder.to(torch.float32)
    for backend in {"reference", *["cpu"] * bool(ISAS)}:
        weights = decoder.packed(backend=backend)
        before = [t.clone() for t in weights.tensors]
        decoder.map(lambda name, t: t.add_(1))
        assert all(torch.equal(a, b) for a, b in zip(before, weights.tensors, strict=True))


# --- around the op -------------------------------------------------------------------------------


@by_engine
def test_the_noise_is_left_alone_and_may_be_strided(engine):
    problem = random_problem(3, 6, 4)
    z, embed = problem.z.float(), problem.embed.float()
    strided = z.transpose(1, 2).contiguous().transpose(1, 2)
    with running(engine) as backend:
        weights = problem.decoder.to(torch.float32).packed(backend=backend)
        out = decode_block(z, weights, embed, backend=backend)
        assert torch.equal(z, problem.z.float())
        assert out.x.data_ptr() != z.data_ptr()
        again = decode_block(strided, weights, embed.T.contiguous().T, backend=backend)
    assert torch.equal(out.x, again.x)


@by_engine
def test_no_gradients(engine):
    problem = random_problem(2, 4, 3)
    with running(engine) as backend:
        decoder = problem.decoder.to(torch.float32).map(lambda name, t: t.requires_grad_())
        weights = decoder.packed(backend=backend)
        assert not any(t.requires_grad for t in weights.tensors)
        z, embed = (t.float().requires_grad_() for t in (problem.z, problem.embed))
        out = decode_block(z, weights, embed, backend=backend)
    assert not any(t.requires_grad for t in out)


@by_engine
def test_inference_mode_and_autocast_change_nothing(engine):
    problem = random_problem(2, 5, 3, guided=True)
    with running(engine) as backend:
        expected = problem.solve(backend).x
        with torch.inference_mode():
            assert torch.equal(problem.solve(backend).x, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(problem.solve(backend).x, expected)


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    problem = random_problem(2, 5, 3, guided=True)
    weights = problem.decoder.to(torch.float32).packed()
    z, embed, guide = (t.float() for t in (problem.z, problem.embed, problem.guide))

    def solve(z, embed, guide):
        out = decode_block(2 * z, weights, embed, guide=guide, method="auto", tol=1e-3, window=3)
        return out.x + 1, out.residual, out.counts

    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    for a, b in zip(solve(z, embed, guide), compiled(z, embed, guide), strict=True):
        assert torch.equal(a, b)


@native
@pytest.mark.parametrize("options", [{}, {"method": "jacobi", "tol": 0.0, "window": 4}], ids=str)
def test_no_python_between_tokens(options):
    def calls(T):
        problem = random_problem(2, T, 3)
        weights = problem.decoder.to(torch.float32).packed(backend="cpu")
        z, embed, counted = problem.z.float(), problem.embed.float(), []
        sys.setprofile(lambda frame, event, _: counted.append(event))
        try:
            decode_block(z, weights, embed, backend="cpu", **options)
        finally:
            sys.setprofile(None)
        return len(counted)

    calls(2)  # what is done once in a process
    assert calls(17) == calls(49) > 0


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("nvp", [False, True])
@pytest.mark.parametrize("backend", ["reference", *["cpu"] * bool(ISAS)])
def test_counts_the_flops_of_the_exact_sampler(backend, nvp, guided):
    (B, T, C, heads, D, layers, hidden), W = (3, 7, 5, 2, 16, 2, 48), 32
    problem = random_problem(
        *(B, T, C, heads, D), layers=layers, hidden=hidden, nvp=nvp, guided=guided
    )
    weights = problem.decoder.to(torch.float32).packed(backend=backend)
    guide = problem.guide.float() if guided else None
    with FlopCounterMode(display=False) as counter:
        decode_block(
            *(problem.z.float(), weights, problem.embed.float()), guide=guide, backend=backend
        )
    products = W * C + layers * (4 * W * W + 2 * W * hidden) + W * weights.outputs
    attention = layers * 2 * W * T * (T - 1) // 2
    ours = counter.get_flop_counts()["Global"][torch.ops.flowops.decode_block]
    # Packed outputs are counted with what fills their last panel.
    filled = W * (weights.tensors[13].numel() - weights.outputs)
    assert ours == (1 + guided) * B * 2 * ((T - 1) * (products + filled) + attention)


# --- refusals ------------------------------------------------------------------------------------


def refused_pack(**changed):
    decoder = random_decoder(5, 4).to(torch.float32)
    if "layer" in changed:
        first, second = decoder.layers
        decoder = replace(decoder, layers=(first, second._replace(**changed.pop("layer"))))
    tensors = {
        name: changed.pop(name, getattr(decoder, name))
        for name in ("w_in", "b_in", "position", "layers", "w_out", "b_out")
    }
    return pack_block(*tensors.values(), **{"heads": 2} | changed)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"layers": ()}, "layers: expected at least one, got none"),
        ({"heads": 3}, "heads: expected a divisor of the width 32, got 3"),
        ({"heads": 0}, "heads: expected a divisor of the width 32, got 0"),
        ({"heads": -2}, "heads: expected a divisor of the width 32, got -2"),
        ({"w_in": torch.zeros(32)}, r"w_in: expected \[W, C\], got \[32\]"),
        ({"b_in": torch.zeros(1)}, r"b_in: expected \[32\], got \[1\]"),
        ({"position": torch.zeros(5, 1)}, r"position: expected \[5, 32\], got \[5, 1\]"),
        ({"b_out": torch.zeros(4)}, r"b_out: expected \[8\], got \[4\]"),
        *(
            ({"layer": {name: torch.zeros(shape)}}, rf"layers\[1\].{name}: expected .*, got")
            for name, shape in {
                "norm1_weight": (16,),
                "qkv_weight": (32, 32),
                "proj_weight": (32, 16),
                "up_weight": (64, 32),
                "down_weight": (32, 16),
                "down_bias": (1,),
            }.items()
        ),
        ({"w_out": torch.zeros(7, 32)}, r"w_out: expected \[8, 32\] or \[4, 32\], got \[7, 32\]"),
        ({"w_out": torch.zeros(8, 31)}, r"w_out: expected .* got \[8, 31\]"),
        ({"backend": "fast"}, "backend: expected 'auto' or one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_pack_block_refuses(changed, match):
    with pytest.raises(ValueError, match=match):
        refused_pack(**changed)


def refused(error, match, guided=False, **changed):
    problem = random_problem(2, 5, 4, guided=guided)
    arguments = {
        "z": problem.z.float(),
        "weights": problem.decoder.to(torch.float32).packed(),
        "embed": problem.embed.float(),
        "guide": problem.guide.float() if guided else None,
    }
    arguments |= changed
    with pytest.raises(error, match=match):
        decode_block(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"z": [1.0]}, TypeError, "z: expected a torch.Tensor, got list"),
        ({"z": torch.ones(2, 5, 4, dtype=torch.long)}, TypeError, "z: expected a floating dtype"),
        ({"z": torch.ones(2, 5, 4).double()}, ValueError, "z: expected torch.float32 on cpu like"),
        ({"z": torch.ones(2, 4, 4)}, ValueError, r"z: expected \[B >= 1, 5, 4\], got \[2, 4, 4\]"),
        ({"z": torch.ones(2, 5, 3)}, ValueError, r"z: expected \[B >= 1, 5, 4\], got \[2, 5, 3\]"),
        ({"z": torch.ones(5, 4)}, ValueError, r"z: expected \[B >= 1, 5, 4\], got \[5, 4\]"),
        ({"z": torch.ones(0, 5, 4)}, ValueError, "z: expected .*B >= 1"),
        ({"weights": [torch.ones(2)]}, TypeError, "weights: expected what pack_block returns"),
        ({"embed": None}, TypeError, "embed: expected a torch.Tensor, got NoneType"),
        ({"embed": torch.ones(3, 32)}, ValueError, r"embed: expected \[2, 32\] or \[4, 32\], got"),
        ({"embed": torch.ones(2, 31)}, ValueError, r"embed: expected .* got \[2, 31\]"),
        ({"embed": torch.ones(2, 32, device="meta")}, ValueError, "embed: expected a tensor on"),
        ({"guide": torch.ones(5, 2)}, ValueError, r"guide: needs embed \[4, 32\], got \[2, 32\]"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a positive number"),
        ({"temperature": float("inf")}, ValueError, "temperature: expected a positive number"),
        ({"method": "newton"}, ValueError, "method: expected 'exact', 'jacobi' or 'auto', got 'n"),
        ({"tol": -1e-9}, ValueError, "tol: expected a finite number, at least 0, got -1e-09"),
        ({"tol": float("nan")}, ValueError, "tol: expected a finite number, at least 0, got nan"),
        ({"tol": float("inf")}, ValueError, "tol: expected a finite number, at least 0, got inf"),
        ({"window": 0}, ValueError, "window: expected a positive number of tokens, got 0"),
        ({"window": 2.5}, ValueError, "window: expected a positive number of tokens, got 2.5"),
        ({"backend": "fast"}, ValueError, "backend: expected 'auto' or one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_decode_block_refuses(changed, error, match):
    refused(error, match, **changed)


@pytest.mark.parametrize(
    ("guide", "match"),
    [
        (None, r"guide: expected \[5, 2\], got None"),
        (torch.ones(4, 2), r"guide: expected \[5, 2\], got \[4, 2\]"),
        (torch.ones(5), r"guide: expected \[5, 2\], got \[5\]"),
        (torch.ones(5, 2, device="meta"), "guide: expected a tensor on cpu"),
        (torch.ones(5, 2, dtype=torch.long), "guide: expected a floating dtype"),
        ([[1.0, 1.0]] * 5, "guide: expected a torch.Tensor, got list"),
    ],
    ids=["missing", "tokens", "one number", "device", "dtype", "type"],
)
def test_what_is_no_guide(guide, match):
    refused((TypeError, ValueError), match, guided=True, guide=guide)


def test_can_run_names_the_kernels():
    for backend in dispatch.BACKENDS:
        assert dispatch.can_run("decode_block", backend) == (
            (True, "") if dispatch.backend_state(backend)[0] else dispatch.backend_state(backend)
        )
