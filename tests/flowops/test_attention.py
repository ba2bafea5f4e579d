import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from flowops import affine_update, causal_attention, causal_patch_attention, dispatch
from flowops.attention import causal_attention_reference
from flowops.patch_attention import causal_patch_attention_reference
from helpers import assert_close, poison

BACKENDS = [b for b in ("reference", "cpu") if dispatch.can_run("causal_attention", b)[0]]
TOKENS = (1, 2, 17, 63, 100, 256, 300)
WIDTHS = (16, 32, 64, 128)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
LOW = {"fp32": torch.float32, "bf16": torch.bfloat16}

by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_order = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
by_width = pytest.mark.parametrize("D", WIDTHS)


def qkv(B, T, H, D, dtype=torch.float32, S=None, mean=0.0):
    """Contiguous q of T tokens, k and v of S."""
    shapes = ((B, T, H, D), *(2 * ((B, S or T, H, D),)))
    return tuple((torch.randn(s, dtype=torch.float64) + mean).to(dtype) for s in shapes)


def sdpa(q, k, v, scale=None):
    """torch's attention in this layout, with the mask of a cached prefix."""
    T, S = q.shape[1], k.shape[1]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).transpose(1, 2)


def reference(q, k, v, scale=None):
    return causal_attention_reference(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)[0]


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def values_and_gradients(function, inputs, weights):
    """Outputs of ``function``, then one gradient for q, k and v as if they were packed, then those
    to its other inputs.

    The gradients to q and k are differences of terms as large as those of v (with a single key
    their exact value is 0), so rounding is judged at the magnitude of all three.
    """
    inputs = [t.detach().requires_grad_() for t in inputs]
    poison(*inputs)
    outs = as_tuple(function(*inputs))
    loss = sum((out * w.to(out.dtype)).sum() for out, w in zip(outs, weights, strict=True))
    poison(*inputs)
    grads = torch.autograd.grad(loss, inputs)
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    return (*outs, torch.cat([g.flatten() for g in grads[:3]]), *grads[3:])


def check_close(actual, plain, golden, what, inner=None):
    """The tolerance rule; in fp64 the golden is no wider and rounds as often as what it judges."""
    assert actual.dtype == plain.dtype, what
    if plain.dtype == torch.float64:
        error, largest = (actual - golden).abs().max(), golden.abs().max()
        assert error <= 1e-13 + 1e-13 * largest, f"{what}: {error}, largest {largest}"
    else:
        assert_close(actual, plain, golden, what, inner)


def check_against_fp64(inputs, what, scale=None, backends=BACKENDS):
    weights = [torch.randn_like(inputs[0])]
    doubles = [t.double() for t in inputs]
    golden = values_and_gradients(lambda *t: reference(*t, scale), doubles, weights)
    by_autograd = values_and_gradients(lambda *t: reference(*t, scale), inputs, weights)
    # Autograd keeps the softmax, with which terms of its derivative cancel that don't cancel in the
    # formula from o and the log-sum-exp: exactly so if there are only one or two keys.
    by_formula = values_and_gradients(
        lambda *t: causal_attention(*t, scale=scale, backend="reference"), inputs, weights
    )
    few_keys = inputs[1].shape[1] <= 2
    for backend in backends:
        actual = values_and_gradients(
            lambda *t, backend=backend: causal_attention(*t, scale=scale, backend=backend),
            *(inputs, weights),
        )
        plain = by_autograd if backend == "reference" and not few_keys else by_formula
        for name, a, p, g in zip(("o", "dqkv"), actual, plain, golden, strict=True):
            check_close(a, p, g, f"{backend} {name} {what}")
        assert actual[0].is_contiguous()


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (5, 5), (17, 63), (63, 64)])
def test_reference_is_attention(T, S):
    q, k, v = qkv(2, T, 3, 8, torch.float64, S)
    out = reference(q, k, v, 0.3)
    torch.testing.assert_close(out, sdpa(q, k, v, 0.3), rtol=1e-12, atol=1e-12)
    for b, t, h in ((0, 0, 0), (1, T - 1, 2), (1, T // 2, 1)):
        seen = S - T + t + 1
        scores = torch.tensor([0.3 * (q[b, t, h] @ k[b, s, h]) for s in range(seen)])
        expected = torch.softmax(scores.double(), 0) @ v[b, :seen, h]
        torch.testing.assert_close(out[b, t, h], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", TOKENS)
@by_width
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_values_and_gradients_follow_the_fp64_reference(T, D, dtype):
    check_against_fp64(qkv(1 if T > 100 else 2, T, 2, D, dtype), f"{T} {D}")


@by_backend
@pytest.mark.parametrize("T", TOKENS)
@by_width
def test_equals_torch_attention_in_fp64(backend, T, D):
    q, k, v = qkv(2, T, 2, D, torch.float64)
    out = causal_attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, sdpa(q, k, v), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
@by_width
@pytest.mark.parametrize(("T", "S"), [(1, 2), (1, 300), (2, 17), (17, 63), (100, 256), (63, 64)])
def test_queries_after_a_cached_prefix(T, S, D, dtype):
    check_against_fp64(qkv(2, T, 2, D, dtype, S), f"{T} of {S} {D}")


@by_backend
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_prefix_changes_where_the_queries_start_and_nothing_else(backend, dtype):
    q, k, v = qkv(2, 100, 3, 32, dtype)
    golden = reference(q.double(), k.double(), v.double())
    plain = reference(q, k, v)
    for T in (1, 2, 63, 99):
        out = causal_attention(q[:, -T:], k, v, backend=backend)
        check_close(out, plain[:, -T:], golden[:, -T:], f"{T}")


@by_backend
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(backend, scale):
    for S in (17, 33):
        check_against_fp64(qkv(2, 17, 2, 16, S=S), f"{scale}", scale, [backend])


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(scale):
    for S in (17, 33):
        inputs = qkv(2, 17, 2, 16, S=S)
        able = [b for b in BACKENDS if dispatch.can_run("causal_attention", b, *inputs, scale)[0]]
        check_against_fp64(inputs, f"{scale}", scale, ["auto", *able])


@by_backend
def test_keys_far_from_zero(backend):
    """A shift of all keys shifts all scores of a query, which softmax ignores."""
    q, k, v = (t.requires_grad_() for t in qkv(2, 63, 2, 32, torch.float64))
    out = causal_attention(q, k + 100, v + 100, backend=backend)
    torch.testing.assert_close(out, reference(q, k, v) + 100, rtol=1e-11, atol=1e-11)
    far = [q.detach().float(), (k.detach() + 10).float(), (v.detach() + 10).float()]
    check_against_fp64(far, "far", backends=[backend])


def layouts(q, k, v):
    B, T, H, D = q.shape
    packed = torch.stack([q, k, v], dim=2)  # [B, T, 3, H, D]
    yield "packed", packed.unbind(2)
    yield "chunked", torch.cat([q, k, v], dim=2).chunk(3, dim=2)
    by_head = torch.stack([q, k, v]).transpose(2, 3).contiguous()  # [3, B, H, T, D]
    yield "by head", by_head.transpose(2, 3).unbind(0)
    batch_inside = torch.stack([q, k, v]).transpose(1, 2).contiguous()  # [3, T, B, H, D]
    yield "batch inside", batch_inside.transpose(1, 2).unbind(0)
    padded = torch.full((3, B + 1, T + 2, H + 1, D + 8), float("nan"), dtype=q.dtype)
    padded[:, 1:, 1:-1, :-1, :D] = torch.stack([q, k, v])
    yield "sliced", padded[:, 1:, 1:-1, :-1, :D].unbind(0)


def strided_last_dimension(q, k, v):
    apart = torch.stack([q, k, v]).transpose(-1, -2).contiguous().transpose(-1, -2)
    return apart.unbind(0)


@by_backend
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_strides(backend, dtype):
    inputs = qkv(2, 63, 3, 32, dtype)
    for what, views in layouts(*inputs):
        assert not any(t.is_contiguous() for t in views), what
        assert all(torch.equal(a, b) for a, b in zip(views, inputs, strict=True)), what
        check_against_fp64(views, what, backends=[backend])


@by_backend
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_strided_last_dimension(backend, dtype, which):
    inputs = list(qkv(2, 63, 3, 32, dtype))
    inputs[which] = strided_last_dimension(*inputs)[which]
    assert inputs[which].stride(-1) != 1
    check_against_fp64(inputs, which, backends=[backend])


@by_backend
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_that_arrive_expanded_or_strided(backend, dtype):
    inputs = qkv(2, 63, 2, 32, dtype)
    weight = torch.randn(2, 63, 32, 2).to(dtype)
    for weigh in (
        lambda o: o.sum(),
        lambda o: o[..., 3].sum(),
        lambda o: (o.transpose(-1, -2).contiguous() * weight.to(o.dtype)).sum(),
    ):
        runs = []
        for function, dt in (
            (lambda *t: causal_attention(*t, backend=backend), dtype),
            (reference, dtype),
            (reference, torch.float64),
        ):
            leaves = [t.to(dt, copy=True).requires_grad_() for t in inputs]
            grads = torch.autograd.grad(weigh(function(*leaves)).double(), leaves)
            runs.append(torch.cat([g.flatten() for g in grads]))
        check_close(*runs, "gradient")


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no native attention")
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_packed_slices_are_read_in_place(dtype):
    packed = torch.randn(2, 100, 3, 4, 32).to(dtype)

    q, k, v = packed.unbind(2)

    def copies(function):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            function()
        shapes = [e.input_shapes[0] for e in profiler.events() if e.name == "aten::copy_"]
        return shapes.count(list(q.shape))

    assert copies(lambda: causal_attention(q, k, v, backend="cpu")) == 0
    assert copies(lambda: causal_attention(q.contiguous(), k, v, backend="cpu")) == 1


@by_backend
def test_gradients_reach_a_packed_projection(backend):
    packed = torch.randn(2, 17, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 17, 2, 16, dtype=torch.float64)
    loss = (causal_attention(*packed.unbind(2), backend=backend) * weight).sum()
    expected = (reference(*packed.unbind(2)) * weight).sum()
    actual, golden = (torch.autograd.grad(out, packed)[0] for out in (loss, expected))
    torch.testing.assert_close(actual, golden, rtol=1e-11, atol=1e-12)


@by_backend
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
@pytest.mark.parametrize("T", [2, 17, 63, 300])
def test_a_later_token_changes_no_bit_of_earlier_outputs(backend, dtype, T):
    q, k, v = qkv(2, T, 2, 32, dtype)
    before = causal_attention(q, k, v, backend=backend)
    for cut in {1, T // 3, T // 2, T - 1} - {0}:
        for change in (1.0, 1e4):
            changed = [t.clone() for t in (q, k, v)]
            for t in changed:
                t[:, cut:] = change * torch.randn(t[:, cut:].shape)
            after = causal_attention(*changed, backend=backend)
            assert torch.equal(after[:, :cut], before[:, :cut])
            assert (after[:, cut:] != before[:, cut:]).any(-1).all()


@by_backend
def test_gradients_are_causal_too(backend):
    q, k, v = (t.requires_grad_() for t in qkv(1, 100, 2, 16))
    out = causal_attention(q, k, v, backend=backend)
    for t in (0, 40, 99):
        for grad in torch.autograd.grad(out[:, t].sum(), (q, k, v), retain_graph=True):
            assert torch.equal(grad[:, t + 1 :], torch.zeros_like(grad[:, t + 1 :]))
        assert grad[:, : t + 1].abs().amin(dim=1).min() > 0


@by_backend
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_thread_count_does_not_change_a_bit(backend, dtype):
    inputs = qkv(2, 300, 4, 64, dtype)
    weights = [torch.randn_like(inputs[0])]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(
            values_and_gradients(lambda *t: causal_attention(*t, backend=backend), inputs, weights)
        )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def patch_inputs(B, T, H, D, C, width, dtype=torch.float32, x_dtype=None):
    q, k, v = qkv(B, T, H, D, dtype)
    weight = torch.randn(width * C, H * D, dtype=torch.float64) / (H * D) ** 0.5
    bias = 0.3 * torch.randn(width * C, dtype=torch.float64)
    if width == 2:
        # Log-scales around 0.5: their sum, the log-determinant, doesn't cancel.
        bias[:C] += 0.5
    x = torch.randn(B, T, C, dtype=torch.float64)
    return q, k, v, weight.to(dtype), bias.to(dtype), x.to(x_dtype or dtype)


@by_order
@by_backend
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 2])
def test_patch_attention_is_the_chain(reverse, backend, dtype, width):
    for T, H, D, C in ((1, 1, 16, 3), (17, 2, 16, 4), (63, 2, 32, 12), (100, 3, 64, 17)):
        inputs = patch_inputs(2, T, H, D, C, width, dtype)

        def chain(q, k, v, weight, bias, x, backend=backend):
            o = causal_attention(q, k, v, backend=backend)
            params = F.linear(o.flatten(2), weight, bias)
            return affine_update(x, params, reverse=reverse, backend=backend)

        expected = chain(*inputs)
        golden = chain(*(t.double() for t in inputs), backend="reference")
        actual = causal_patch_attention(*inputs, reverse=reverse, backend=backend)
        for name, a, e, g in zip(("z", "logdet"), actual, expected, golden, strict=True):
            # The log-determinant is summed wide, but from parameters in ``dtype``.
            check_close(a, e, g, f"{name} {T}", dtype if name == "logdet" else None)


@by_order
@by_backend
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 2])
def test_patch_attention_follows_the_fp64_reference(reverse, backend, dtype, width):
    names = ("z", "logdet", "dqkv", "dweight", "dbias", "dx")
    for T, H, D, C in ((1, 1, 16, 3), (17, 2, 16, 4), (63, 2, 32, 12), (100, 3, 64, 17)):
        inputs = patch_inputs(2, T, H, D, C, width, dtype)
        weights = [torch.randn_like(inputs[5]), torch.randn(2)]
        scale = D**-0.5

        def along_reference(*t, scale=scale):
            return causal_patch_attention_reference(*t, reverse, scale)

        golden = values_and_gradients(along_reference, [t.double() for t in inputs], weights)
        plain = values_and_gradients(along_reference, inputs, weights)
        actual = values_and_gradients(
            lambda *t: causal_patch_attention(*t, reverse=reverse, backend=backend),
            *(inputs, weights),
        )
        for name, a, p, g in zip(names, actual, plain, golden, strict=True):
            check_close(a, p, g, f"{name} {T}", dtype if name == "logdet" else None)


@by_order
@by_backend
@pytest.mark.parametrize("width", [1, 2])
def test_logdet_of_patch_attention_is_that_of_the_jacobian(reverse, backend, width):
    T, C = 5, 3
    q, k, v, weight, bias, x = patch_inputs(2, T, 2, 16, C, width, torch.float64)
    options = {"reverse": reverse, "backend": backend}
    logdet = causal_patch_attention(q, k, v, weight, bias, x, **options)[1]
    for b in range(2):
        one = slice(b, b + 1)

        def update(flat, one=one):
            out = causal_patch_attention(
                q[one], k[one], v[one], weight, bias, flat.view(1, T, C), **options
            )
            return out[0].flatten()

        jacobian = torch.autograd.functional.jacobian(update, x[b].flatten())
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert abs(expected - logdet[b]) < 1e-10
        if width == 2:
            assert abs(expected) > 0.1


@by_backend
def test_patch_attention_keeps_x_in_its_own_storage(backend):
    """Under autocast q, k, v are narrow and x is not."""
    for x_dtype in (torch.float32, torch.float64):
        inputs = patch_inputs(2, 17, 2, 16, 4, 2, torch.bfloat16, x_dtype)
        # No native affine step takes fp64 with bf16 parameters; auto finds one that does.
        named = backend if x_dtype == torch.float32 else "auto"
        z, logdet = causal_patch_attention(*inputs, backend=named)
        plain = causal_patch_attention_reference(*inputs, False, 0.25)
        golden = causal_patch_attention_reference(*(t.double() for t in inputs), False, 0.25)
        assert z.dtype == plain[0].dtype == x_dtype
        assert logdet.dtype == plain[1].dtype
        for a, p, g in zip((z, logdet), plain, golden, strict=True):
            assert_close(a, p, g, "", torch.bfloat16)


@by_backend
def test_patch_attention_reads_packed_slices(backend):
    q, k, v, weight, bias, x = patch_inputs(2, 17, 2, 16, 4, 2, torch.float64)
    packed = torch.stack([q, k, v], dim=2).unbind(2)
    wide = torch.cat([x, x], dim=2)[..., 2:6]
    spread = torch.stack([weight, weight], dim=-1).flatten(-2)[:, ::2]
    actual = causal_patch_attention(*packed, spread, bias, wide, backend=backend)
    expected = causal_patch_attention(q, k, v, weight, bias, wide.contiguous(), backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


GOOD = {"q": ones(2, 3, 2, 16), "k": ones(2, 3, 2, 16), "v": ones(2, 3, 2, 16)}
PATCH = {**GOOD, "weight": ones(8, 32), "bias": ones(8), "x": ones(2, 3, 4)}
BAD_ATTENTION = [
    ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
    ({"k": None}, TypeError, "k: expected a torch.Tensor, got NoneType"),
    ({"v": 1.0}, TypeError, "v: expected a torch.Tensor, got float"),
    ({"q": ones(2, 3, 2, 16).int()}, TypeError, "q: expected a floating dtype, got torch.int32"),
    ({"k": ones(2, 3, 2, 16).long()}, TypeError, "k: expected a floating dtype, got torch.int64"),
    ({"v": ones(2, 3, 2, 16).bool()}, TypeError, "v: expected a floating dtype, got torch.bool"),
    (
        {"q": ones(3, 2, 16)},
        ValueError,
        r"q: expected a non-empty \[B, T, H, D\], got \[3, 2, 16\]",
    ),
    ({"q": ones(0, 3, 2, 16)}, ValueError, r"q: expected a non-empty .* got \[0, 3, 2, 16\]"),
    ({"q": ones(2, 0, 2, 16)}, ValueError, r"q: expected a non-empty .* got \[2, 0, 2, 16\]"),
    ({"q": ones(2, 3, 0, 16)}, ValueError, r"q: expected a non-empty .* got \[2, 3, 0, 16\]"),
    ({"q": ones(2, 3, 2, 0)}, ValueError, r"q: expected a non-empty .* got \[2, 3, 2, 0\]"),
    ({"k": ones(2, 3, 32)}, ValueError, r"k: expected \[2, S >= 3, 2, 16\] .* got \[2, 3, 32\]"),
    ({"k": ones(2, 2, 2, 16)}, ValueError, r"k: expected \[2, S >= 3, .* got \[2, 2, 2, 16\]"),
    ({"k": ones(1, 3, 2, 16)}, ValueError, r"k: expected \[2, S >= 3, .* got \[1, 3, 2, 16\]"),
    ({"k": ones(2, 3, 1, 16)}, ValueError, r"k: expected \[2, S >= 3, .* got \[2, 3, 1, 16\]"),
    ({"v": ones(2, 3, 2, 8)}, ValueError, r"v: expected \[2, S >= 3, .* got \[2, 3, 2, 8\]"),
    ({"v": ones(2, 4, 2, 16)}, ValueError, r"v: expected the shape of k, \[2, 3, 2, 16\], got"),
    ({"k": ones(2, 3, 2, 16).half()}, TypeError, r"k: expected torch.float32 like q, got"),
    ({"v": ones(2, 3, 2, 16).double()}, TypeError, r"v: expected torch.float32 like q, got"),
    ({"k": ones(2, 3, 2, 16, device="meta")}, ValueError, "k: expected a tensor on cpu like q"),
    ({"scale": "wide"}, (TypeError, ValueError), "scale: expected"),
    ({"scale": [1.0]}, (TypeError, ValueError), "scale: expected"),
    ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of .* got 'gpu'"),
    ({"backend": "cuda"}, RuntimeError, "backend 'cuda' can't run causal_(patch_)?attention: "),
]
BAD_PATCH = [
    ({"k": ones(2, 4, 2, 16), "v": ones(2, 4, 2, 16)}, ValueError, "k: expected as many tokens as"),
    ({"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    ({"x": ones(2, 3, 4).int()}, TypeError, "x: expected a floating dtype, got torch.int32"),
    ({"x": ones(3, 4)}, ValueError, r"x: expected \[2, 3, C\] .* got \[3, 4\]"),
    ({"x": ones(2, 4, 4)}, ValueError, r"x: expected \[2, 3, C\] .* got \[2, 4, 4\]"),
    ({"x": ones(2, 3, 0)}, ValueError, r"x: expected \[2, 3, C\] .* got \[2, 3, 0\]"),
    ({"weight": [[1.0]]}, TypeError, "weight: expected a torch.Tensor, got list"),
    ({"weight": ones(8, 32).int()}, TypeError, "weight: expected a floating dtype"),
    ({"weight": ones(8)}, ValueError, r"weight: expected \[8, 32\] or \[4, 32\], got \[8\]"),
    (
        {"weight": ones(8, 31)},
        ValueError,
        r"weight: expected \[8, 32\] or \[4, 32\], got \[8, 31\]",
    ),
    (
        {"weight": ones(7, 32)},
        ValueError,
        r"weight: expected \[8, 32\] or \[4, 32\], got \[7, 32\]",
    ),
    ({"weight": ones(8, 32).double()}, TypeError, "weight: expected torch.float32 like q, got"),
    ({"bias": None}, TypeError, "bias: expected a torch.Tensor, got NoneType"),
    ({"bias": ones(4)}, ValueError, r"bias: expected \[8\], got \[4\]"),
    ({"bias": ones(8, 1)}, ValueError, r"bias: expected \[8\], got \[8, 1\]"),
    ({"bias": ones(8).bfloat16()}, TypeError, "bias: expected torch.float32 like q, got"),
    ({"x": ones(2, 3, 4, device="meta")}, ValueError, "x: expected a tensor on cpu like q"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD_ATTENTION)
def test_bad_inputs_of_attention_are_named(change, error, match):
    with pytest.raises(error, match="^" + match):
        causal_attention(**{**GOOD, **change})


@pytest.mark.parametrize(("change", "error", "match"), BAD_ATTENTION + BAD_PATCH)
def test_bad_inputs_of_patch_attention_are_named(change, error, match):
    with pytest.raises(error, match="^" + match):
        causal_patch_attention(**{**PATCH, **change})


@pytest.mark.parametrize("name", ["k", "v", "weight", "bias"])
@pytest.mark.parametrize("value", [None, 1.0])
def test_non_tensors_are_named_under_autocast_too(name, value):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor"),
    ):
        causal_patch_attention(**{**PATCH, name: value})
